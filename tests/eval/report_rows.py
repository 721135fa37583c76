"""Makes rows and folders of runs as a run writes them: single rows for figures worked out by hand, and a whole run."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.report.names import Setting
from eval.report.rows import Results, load

MEMORY = Setting("in_memory", 1.0)
STORE = Setting("attentionstore", 1.0)
RELOAD = Setting("reload", 1.0)
OURS = Setting("contiguouskv", 0.05)
PUBLISHED = Setting("contiguouskv_paper", 0.05)
IMPRESS = Setting("impress", 0.05)
EXACT = ("recompute", "in_memory", "reload", "attentionstore", "flexgen")

CONFIG = {
    "model": "tiny",
    "source": "made up",
    "dtype": "float32",
    "tasks": ["sst2"],
    "requests": 4,
    "timed_requests": 4,
    "systems": ["in_memory", "contiguouskv"],
    "budgets": [0.05],
    "seed": 0,
    "processes": 1,
    "command": "python -m eval run --tasks sst2",
    "version": "0.1.0",
    "read_gbps": None,
    "skipped": [],
}
MACHINE = {
    "cpu": "a processor",
    "cores": 2,
    "accelerator": None,
    "torch": "2.13.0",
    "torch_threads": 2,
    "instruction_sets": ["avx2", "fma"],
    "commit": "0123abc",
    "disk_gbps": 4.0,
}
NO_QUALITY = dict.fromkeys(("prediction", "score", "kl", "kl_answer", "agreement", "perplexity"))


def row(number: int, setting: Setting, ttft_s: float | None = 0.1, **changes: Any) -> dict[str, Any]:
    """A row; `wait` seconds of its time are waiting. Each request has a prefix of its own unless `prefix` is given."""
    wait = changes.pop("wait", 0.0)
    prefix = changes.pop("prefix", number)
    task = changes.get("task", "sst2")
    stats = {"bytes_read": 0, "bytes_used": 0, "bytes_identified": 0, "prefetch_wasted_bytes": 0} | {
        "hits": {"device": 0, "host": 0, "disk": 10}
    }
    distance = None if setting == MEMORY else 1.0
    return {
        "task": task,
        "number": number,
        "stream": None,
        "prefix": prefix,
        "prefix_key": f"{task}-{prefix}",
        "prefix_tokens": 3000,
        "suffix_tokens": 20,
        "prefix_bytes": 1000,
        "about": {},
        "system": setting.system,
        "options": list(setting.options),
        "budget": setting.budget,
        "state": "warm_host" if setting.system == "in_memory" else "cold",
        "read_gbps": None,
        "session": "one",
        "processes": 1,
        "metric": "accuracy",
        "prediction": "positive",
        "score": 1.0,
        "kl": distance and 0.01,
        "kl_answer": distance and 0.02,
        "agreement": distance and 0.9,
        "perplexity": 4.0,
        "ttft_s": ttft_s,
        "departure": None,
        "resident_pages": 0,
        "first_token": 1,
        "stats": stats | changes.pop("stats", {}),
        "phases": {"lookup": 0.0, "wait": wait, "rest": (ttft_s or 0.0) - wait},
        "details": {},
    } | changes


def run_folder(
    folder: Path, rows: Iterable[dict[str, Any]], machine: dict[str, Any] | None = None, **config: Any
) -> Path:
    """A finished run."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "machine.json").write_text(json.dumps(MACHINE | (machine or {})))
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def results(tmp_path: Path, rows: Iterable[dict[str, Any]]) -> Results:
    """What a report is made from."""
    return load([run_folder(tmp_path / "run", rows)])


def section(text: str, title: str) -> str:
    """What stands under a heading."""
    return text.split(f"\n## {title}\n")[1].split("\n## ")[0]


def cells(text: str, *begins: str) -> list[str]:
    """The table row with these first cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (found,) = (line for line in lines if line[: len(begins)] == list(begins))
    return found


# Of each system: seconds of compute beside attention, share of the prefix that is read, used and identified with, and
# whether loading overlaps with compute.
_KINDS: dict[str, tuple[float, float, float, float, bool]] = {
    "recompute": (2.5, 0.0, 1.0, 0.0, False),
    "in_memory": (0.15, 0.0, 1.0, 0.0, False),
    "reload": (0.16, 1.0, 1.0, 0.0, False),
    "attentionstore": (0.19, 1.0, 1.0, 0.0, False),
    "flexgen": (0.17, 1.0, 1.0, 0.0, True),
    "attentionstore_h2o": (0.22, 0.5, 0.0, 0.5, False),
    "impress": (0.2, 0.15, 0.0, 0.15, False),
    "contiguouskv_paper": (0.16, 0.02, 0.0, 0.04, True),
    "contiguouskv": (0.18, 0.01, 0.0, 0.02, True),
}
_STATES = {
    "recompute": ("cold",),
    "in_memory": ("warm_host",),
    "reload": ("cold", "warm_host"),
    "attentionstore": ("cold", "open", "warm_host"),
    "flexgen": ("cold", "open", "warm_host"),
}
ALL_STATES = ("cold", "open", "keys_resident", "warm_host")
DEFAULT = (
    *(Setting(name, 1.0) for name in EXACT),
    Setting("attentionstore", 1.0, ("overlap",)),
    *(
        Setting(name, budget, options)
        for budget in (0.05, 0.25)
        for name, options in (
            ("attentionstore_h2o", ()),
            ("impress", ()),
            ("impress", ("groups",)),
            ("contiguouskv_paper", ()),
            ("contiguouskv", ()),
        )
    ),
)


def whole_run(
    tasks: Sequence[str] = ("sst2", "trec", "needle"),
    states: Sequence[str] = ALL_STATES,
    requests: int = 24,
    timed_requests: int = 6,
    prefixes: int = 6,
    read_gbps: float | None = None,
    disk_gbps: float = 4.0,
    settings: Sequence[Setting] = DEFAULT,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """The rows of a run of a simple model of time: compute, and 0.4 GB of KV at the speed of reads.

    Exact settings and later states are made for `timed_requests` of each task only, as a run does. Answers are random,
    and better at larger budgets; the labels of `trec` are always the same.
    """
    chance = random.Random(seed)
    speed = min(disk_gbps, read_gbps or math.inf)
    whole = int(0.4e9)
    rows = []
    for place, task in enumerate(tasks):
        pace = {prefix: math.exp(chance.gauss(0.25 * place, 0.12)) for prefix in range(prefixes)}
        for number in range(requests):
            right = ("positive", "negative")[chance.random() < 0.5]
            for setting in settings:
                for which, state in enumerate(_STATES.get(setting.system, ALL_STATES)):
                    judged = setting.system not in EXACT or setting.system == "in_memory"
                    judged &= which == 0 and setting.options in ((), ("groups",))
                    if state not in states and setting.system not in ("in_memory", "recompute"):
                        continue
                    if number >= timed_requests and not judged:
                        continue
                    rows.append(
                        _made(
                            chance, task, number, number % prefixes, setting, state, speed, whole, pace, right, judged
                        )
                        | {"read_gbps": read_gbps}
                    )
    return rows


def _made(
    chance: random.Random,
    task: str,
    number: int,
    prefix: int,
    setting: Setting,
    state: str,
    speed: float,
    whole: int,
    pace: dict[int, float],
    right: str,
    judged: bool,
) -> dict[str, Any]:
    compute, share, used, identify, overlap = _KINDS.get(setting.system, _KINDS["impress"])
    overlap |= "overlap" in setting.options
    kept = used or setting.budget
    read = share * (1.0 if used else setting.budget / 0.05) if share < 1 else 1.0
    identified = 0.0 if state == "keys_resident" else identify
    size = int(whole * pace[prefix] * (read + identified)) if not state.startswith("warm") else 0
    opening = 0.02 if state == "cold" and setting.system not in ("recompute", "in_memory", "reload") else 0.0
    compute *= pace[prefix] * math.exp(chance.gauss(0, 0.05))
    waited = max(0.0, size / (speed * 1e9) - (0.6 * compute if overlap else 0.0))
    missing = 0.0 if kept >= 1 else (0.4 if "paper" in setting.system else 0.2) * 0.05 / setting.budget
    good = chance.random() > 0.2 + missing / 4
    answer = "positive" if task == "trec" else right if good else "other"
    quality: dict[str, Any] = {
        "prediction": answer,
        "score": float(answer == right),
        "kl": None if setting.system == "in_memory" else missing * chance.uniform(0.5, 2),
        "kl_answer": None if setting.system == "in_memory" else missing * chance.uniform(0.2, 1),
    }
    return row(
        number,
        setting,
        opening + compute + waited,
        task=task,
        prefix=prefix,
        state=state,
        metric="needle_recall" if task == "needle" else "accuracy",
        prefix_bytes=int(whole * pace[prefix]),
        stats={
            "bytes_read": size,
            "bytes_used": int(whole * pace[prefix] * kept),
            "bytes_identified": int(whole * pace[prefix] * identified) if size else 0,
        },
        phases={
            "lookup": opening,
            "identify": compute * 0.1 if identify else 0.0,
            "wait": waited,
            "gather": compute * 0.1,
            "attention": compute * 0.2,
            "rest": compute * (0.6 if identify else 0.7),
        },
        details={"agreed": chance.uniform(0.3, 0.6)} if setting.system == "impress" else {},
        **(quality if judged else NO_QUALITY),
    )
