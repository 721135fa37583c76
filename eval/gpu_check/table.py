"""The stage `table`: writes `table.md` from other stages' results. By hand: `python -m eval.gpu_check.table FOLDER`."""

from __future__ import annotations

import sys
from typing import Any

from ..report.cells import table
from ..report.paper import BUDGET
from . import figures
from .results import Clock, Results
from .settings import STAGES, Settings

NAME = "table.md"
_STATES = {None: 0, "cold": 1, "open": 2, "keys_resident": 3, "warm_host": 4, "warm_device": 5}


def run(settings: Settings, results: Results, clock: Clock) -> None:
    """Run the stage."""
    write(results)


def write(results: Results) -> None:
    """Write the table, and add its numbers to the results."""
    content = results.content
    results.stage("table")["found"] = {
        "rows": figures.rows_of(content),
        "speed_ups": figures.speed_ups(content),
        "new_shapes": figures.new_shapes(content),
    }
    results.path.with_name(NAME).write_text(markdown(content))
    results.flush()


def markdown(content: dict[str, Any]) -> str:
    """The whole table as Markdown."""
    parts = ["# GPU check", _about(content), _stages(content), _tests(content)]
    parts += [_times(content, block) for block in figures.blocks_of(content)]
    parts += [_paper(content), _shapes(content), _traces(content), _parts(content), _missing(content)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _about(content: dict[str, Any]) -> str:
    where = content.get("stages", {}).get("where", {}).get("found", {})
    versions, card = where.get("versions") or {}, where.get("card") or {}
    lines = []
    if content.get("rehearsal"):
        lines.append("**A rehearsal on a CPU, with a stand-in for the device: its times say nothing.**")
    if isinstance(card, dict) and card:
        gigabytes = card.get("memory_bytes", 0) / 1e9
        lines.append(f"{card.get('name')}, {gigabytes:.0f} GB, {card.get('multiprocessors')} multiprocessors.")
    names = ("python", "torch", "cuda", "cudnn", "driver", "transformers")
    lines.append(", ".join(f"{name} {versions[name]}" for name in names if versions.get(name)))
    machine, disk = where.get("machine") or {}, where.get("file system") or {}
    if machine:
        lines.append(f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib')} GiB.")
    if disk:
        sure = disk.get("lets go of pages")
        said = "lets go of pages" if sure is True else f"keeps pages ({sure}): nothing proves that a request is cold"
        lines.append(f"Stores on {disk.get('kind')} ({disk.get('device')}), which {said}.")
    return "\n\n".join(line for line in lines if line)


def _stages(content: dict[str, Any]) -> str:
    rows = []
    for name in STAGES:
        own = content.get("stages", {}).get(name)
        if own is not None and name != "table":
            deaths = [f"died with {one['exit_code']} in {one['in'] or '?'}" for one in own.get("deaths", [])]
            said = [own.get("error") or "", f"killed in {own['killed_in']}" if own.get("killed_in") else "", *deaths]
            notes = "; ".join(_line(one, 120) for one in said if one)
            rows.append([name, str(own.get("status", "")), _number(own.get("seconds"), 0), notes])
    return table(["stage", "status", "s", "notes"], rows, 4) if rows else ""


def _tests(content: dict[str, Any]) -> str:
    own = content.get("stages", {}).get("tests", {})
    groups = {name: one for name, one in own.get("found", {}).items() if isinstance(one, dict)}
    if not groups:
        return ""
    rows = []
    for name, one in groups.items():
        counts = one.get("counts", {})
        numbers = [str(counts.get(kind, 0)) for kind in ("passed", "failed", "skipped")]
        rows.append([name, "killed" if one.get("killed") else "", *numbers, _number(one.get("seconds"), 0)])
    failures = [
        f"- `{failure['test'].rpartition('/')[2]}`: {_line(failure['message'], 300)}"
        for one in groups.values()
        for failure in one.get("failures", [])
    ]
    hung = [f"- `{test}` did not end" for one in groups.values() for test in one.get("not_ended", [])]
    head = table(["tests", "", "passed", "failed", "skipped", "s"], rows, 2)
    return "\n\n".join(["## Tests", head, *(["\n".join([*failures, *hung][:30])] if failures or hung else [])])


def _times(content: dict[str, Any], block: dict[str, Any]) -> str:
    rows = [row for row in figures.rows_of(content) if row["tokens"] == block["tokens"]]
    rows.sort(key=lambda row: (_STATES.get(row["state"], 9), (row["seconds"] or {}).get("median", 0.0)))
    lines = []
    for row in rows:
        notes = [f"{row['wrong_answers']} wrong answers"] if row.get("wrong_answers") else []
        notes += [f"{row['not_cold']} not cold"] if row.get("not_cold") else []
        notes += ["first request only"] if row.get("only_first") else []
        notes += row.get("departures", [])[:1]
        lines.append(
            [
                row["state"] or "",
                row["label"],
                _line("; ".join(notes), 90),
                str(row["requests"]),
                _spread(row["seconds"], 1e3, 1),
                _spread(row["over_floor"], 1.0, 2),
                _median(row.get("bytes_read"), 1e-6, 1),
                _median(row.get("io_wait_s"), 1e3, 1),
                "" if row.get("answer_error") is None else f"{row['answer_error']:.3f}",
            ]
        )
    title = f"## {block['tokens']:,} tokens of prefix ({block['kv_bytes'] / 1e9:.2f} GB of K and V)"
    head = ["state", "system", "notes", "n", "TTFT ms", "x floor", "MB read", "wait ms", "answer differs by"]
    effect = block.get("prefix_effect")
    said = "" if effect is None else f"Without the prefix, an answer differs by {effect:.2f} from the right one."
    return "\n\n".join(
        part for part in (title, table(head, lines, 3) if lines else "Nothing was measured.", said) if part
    )


def _paper(content: dict[str, Any]) -> str:
    found = figures.speed_ups(content)
    if not found:
        return ""
    baselines = [name for name in figures.BASELINES if any(one["baseline"] == name for one in found)]
    rows: dict[tuple[str, str, str], dict[str, str]] = {}
    for one in found:
        key = f"{one['tokens']:,}", one["state"] or "", one["ours"]
        rows.setdefault(key, {})[one["baseline"]] = _spread(one["times_faster"], 1.0, 2)
    papers = [_number(figures.PAPER_BASELINES.get(name), 2) for name in baselines]
    lines = [["", "", "the paper, 5%", *papers]]
    lines += [[*key, *(row.get(name, "") for name in baselines)] for key, row in rows.items()]
    about = (
        f"How many times faster ours are. The paper's figures are for a budget of {BUDGET:.0%}, Qwen2.5 7B to 32B on "
        "an A800 with a Samsung 990 Pro, where it is 3.85 times as fast as the best earlier system; its baselines do "
        "not overlap loading with compute."
    )
    head = ["prefix", "state", "ours", *baselines]
    return f"## Ratios, each within one state and one round\n\n{about}\n\n{table(head, lines, 3)}"


def _shapes(content: dict[str, Any]) -> str:
    lines = [
        [one["label"], str(one["lengths"]), *(_spread(one[name], 1e3, 1) for name in ("first", "second", "difference"))]
        for one in figures.new_shapes(content)
    ]
    if not lines:
        return ""
    head = ["system, warm", "lengths", "first time, ms", "second time, ms", "difference, ms"]
    return f"## Suffixes of lengths not seen before\n\n{table(head, lines, 1)}"


def _traces(content: dict[str, Any]) -> str:
    found = content.get("stages", {}).get("trace", {}).get("found", {})
    traced = {name: one for name, one in found.items() if isinstance(one, dict) and "summary" in one}
    if not traced:
        return ""
    columns = [_trace(one) for one in traced.values()]
    lines = [
        [name, *(column.get(name, "") for column in columns)] for name in dict.fromkeys(n for c in columns for n in c)
    ]
    return f"## Where time goes ({found.get('tokens', 0):,} tokens)\n\n{table(['', *traced], lines, 1)}"


def _trace(one: dict[str, Any]) -> dict[str, str]:
    """One column: the trace of one request."""
    summary = one["summary"]
    found = {
        "ms untraced": _number(one["seconds_untraced"], 1, 1e3),
        "ms traced": _number(summary["seconds_traced"], 1, 1e3),
        "launches": str(summary["launches"]["count"]),
        "kernels, ms": f"{summary['kernels']['count']}, {summary['kernels']['ms']:.1f}",
        "device busy, ms": _number(summary["device_busy_ms"], 1),
    }
    for way in ("HtoD", "DtoH", "DtoD"):
        for kind, row in summary["copies"].items():
            if kind.startswith(way):
                found[f"copies {kind}"] = f"{int(row['count'])}, {row['bytes'] / 1e6:.1f} MB, {row['ms']:.1f} ms"
    for what in ("waits", "allocations"):
        for row in summary[what]:
            found[row["name"]] = f"{row['count']}, {row['ms']:.1f} ms"
    for name, seconds in one["request"].get("phases", {}).items():
        found[f"host: {name}, ms"] = _number(seconds, 1, 1e3)
    for place, row in enumerate(summary["top_kernels"][:3]):
        found[f"kernel {place + 1}"] = f"{_line(row['name'], 40)}, {row['count']}, {row['ms']:.1f} ms"
    for place, row in enumerate(summary["top_host_ops"][:3]):
        found[f"host operator {place + 1}"] = f"{_line(row['name'], 40)}, {row['count']}, {row['own_ms']:.1f} ms"
    return found


def _parts(content: dict[str, Any]) -> str:
    """The measurements of the stage `where`, one line each."""
    found = content.get("stages", {}).get("where", {}).get("found", {})
    known = ("versions", "machine", "card", "file system")
    lines = [f"- {name}: {_flat(value)}" for name, value in found.items() if name not in known]
    return "## Parts of the machine\n\n" + "\n".join(lines) if lines else ""


def _flat(value: Any) -> str:
    """Nested numbers on one line."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_flat(one)}" for name, one in value.items())
    if isinstance(value, list):
        return "; ".join(_flat(one) for one in value)
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _missing(content: dict[str, Any]) -> str:
    lines = []
    for name, stage in content.get("stages", {}).items():
        lines += [f"- {name}: {what}: {_line(why, 300)}" for what, why in stage.get("failed", {}).items()]
    skipped = content.get("stages", {}).get("time", {}).get("found", {}).get("skipped", [])
    lines += [f"- {one['what']}: {one['why']}" for one in skipped]
    for block in figures.blocks_of(content):
        lines += [f"- {block['tokens']:,} tokens, {one['what']}: {one['why']}" for one in block.get("skipped", [])]
    return "## Not measured, and why\n\n" + "\n".join(lines) if lines else ""


def _line(text: str, most: int) -> str:
    return " ".join(str(text).replace("|", "¦").split())[:most]


def _number(value: float | None, digits: int, scale: float = 1.0) -> str:
    return "" if value is None else f"{value * scale:,.{digits}f}"


def _median(found: dict[str, float] | None, scale: float, digits: int) -> str:
    return "" if found is None else f"{found['median'] * scale:,.{digits}f}"


def _spread(found: dict[str, float] | None, scale: float, digits: int) -> str:
    if found is None:
        return ""
    median, low, high = (f"{found[name] * scale:,.{digits}f}" for name in ("median", "low", "high"))
    return median if found["count"] < 2 else f"{median} ({low} - {high})"


if __name__ == "__main__":
    write(Results(sys.argv[1]))
