"""`contiguouskv bench`: time to first token of one stored prefix, every system interleaved in one process."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore, RequestStats
from hf_contiguouskv.model.transformers_internals import cache_argument

from .dtypes import Dtype, dtype_name
from .systems import AttentionStore, ContiguousKV, Recompute, State, System
from .timing import interleave, machine, median_spread, resident_pages, time_to_first_token

FLOOR, RECOMPUTE, FULL_LOAD = "floor (no prefix)", "recompute", "overlapped full load"


@dataclass
class Measured:
    """Measurements of one system: seconds to first token of each cold request, and the counters of the last one."""

    seconds: list[float] = field(default_factory=list)
    tokens: set[int] = field(default_factory=set)
    stats: dict[str, Any] = field(default_factory=dict)
    warm_reads: int = 0


@dataclass(frozen=True)
class Workload:
    """One prefix and one suffix, both int64 `(n,)`, and a folder for all systems' files of the prefix."""

    model: Any
    prefix_ids: torch.Tensor
    suffix_ids: torch.Tensor
    folder: Path

    @property
    def prompt(self) -> torch.Tensor:
        """The whole prompt, int64 `(1, n)`."""
        return torch.cat([self.prefix_ids, self.suffix_ids])[None]


def our_systems(budget: float) -> dict[str, ContiguousKVConfig]:
    """The configurations of the library that the benchmark compares."""
    percent, default = f"{budget:.0%}", ContiguousKVConfig()
    return {
        f"published, {percent}": ContiguousKVConfig.paper(budget),
        f"default, {percent}": ContiguousKVConfig(budget=budget),
        f"default, {default.budget:.0%}": default,
        "exact, 100%": ContiguousKVConfig(budget=1.0),
    }


def systems_of(load: Workload, budget: float) -> dict[str, System]:
    """All systems by their names in the table. They are closed by the caller."""
    found: dict[str, System] = {
        RECOMPUTE: Recompute(load.model),
        FULL_LOAD: AttentionStore(load.model, load.folder / "layers", overlap=True),
    }
    for name, config in our_systems(budget).items():
        found[name] = ContiguousKV(name, load.model, load.folder / "chunks", config)
    return found


def _request(load: Workload, system: System | None, measured: Measured) -> None:
    """Make one request, cold: the timer includes opening the store; `None`: the suffix alone."""
    if system is None:
        seconds, token, _ = time_to_first_token(load.model, load.suffix_ids[None], DynamicCache)
        stats = RequestStats()
    else:
        system.enter(State.COLD, load.prefix_ids)
        measured.warm_reads += sum(resident_pages(file) for file in system.files())
        seconds, token, cache = time_to_first_token(load.model, load.prompt, lambda: system.cache(load.prefix_ids))
        stats = system.finish(cache)
    measured.seconds.append(seconds)
    measured.tokens.add(token)
    measured.stats = stats.as_dict()


def run(
    load: Workload, budget: float = 0.05, rounds: int = 7, recompute_rounds: int = 2, progress: bool = True
) -> dict[str, Measured]:
    """Measure every system on one workload, cold.

    Args:
        load: the model, prefix and suffix; the prefix is stored first if necessary.
        budget: share of chunks for the published method and ours.
        rounds: measured rounds, after one uncounted round (first calls of kernels are slow).
        recompute_rounds: number of rounds that include recomputing the prefix, which is slow.
    """
    with ExitStack() as stack:
        systems: dict[str, System | None] = {FLOOR: None}
        for name, system in systems_of(load, budget).items():
            systems[name] = stack.enter_context(system)
            system.store(load.prefix_ids)
        results = {name: Measured() for name in systems}
        order = list(interleave(list(systems), rounds + 1))
        for number, name in tqdm(order, "requests", disable=not progress, leave=False):
            if name != RECOMPUTE or number <= recompute_rounds:
                _request(load, systems[name], Measured() if number == 0 else results[name])
    return results


def persist_overhead(load: Workload, rounds: int = 3, progress: bool = True) -> dict[str, float]:
    """The cost of storing a computed prefix: the same forwards, in the same blocks, with and without the store.

    Returns:
        Medians in seconds (`prefill_s`, `prefill_and_store_s`) and their ratio minus one (`overhead`).
    """
    block = ContiguousKVConfig().prefill_block
    seconds: dict[str, list[float]] = {"prefill_s": [], "prefill_and_store_s": []}
    order = list(interleave(list(seconds), rounds + 1))
    for number, kind in tqdm(order, "prefills", disable=not progress, leave=False):
        with tempfile.TemporaryDirectory(dir=load.folder.parent) as empty:
            start = time.perf_counter()
            if kind == "prefill_s":
                cache, called = DynamicCache(), cache_argument(load.model)
                with torch.no_grad():
                    for part in load.prefix_ids.split(block):
                        load.model(input_ids=part[None], use_cache=True, logits_to_keep=1, **{called: cache})
            else:
                with PrefixStore(Path(empty) / "store") as store:
                    ContiguousKVCache(load.model, load.prefix_ids, store=store).close()
            if number:
                seconds[kind].append(time.perf_counter() - start)
    medians = {kind: median_spread(values).median for kind, values in seconds.items()}
    return medians | {"overhead": medians["prefill_and_store_s"] / medians["prefill_s"] - 1}


def report(results: dict[str, Measured], load: Workload, console: Console) -> dict[str, Any]:
    """Print the table, and return the numbers (seconds, ratios, bytes), ready for JSON."""
    floor = median_spread(results[FLOOR].seconds).median
    recompute = median_spread(results[RECOMPUTE].seconds).median
    full = median_spread(results[FULL_LOAD].seconds).median
    table = Table(title=f"{len(load.prefix_ids)}-token prefix, {len(load.suffix_ids)}-token suffix, cold (O_DIRECT)")
    for column in ("system", "TTFT ms", "quartiles", "x floor", "speed-up", "MB read", "ampl.", "I/O wait ms"):
        table.add_column(column, justify="left" if column == "system" else "right")
    rows = {}
    for system, measured in results.items():
        spread = median_spread(measured.seconds)
        stats = measured.stats
        table.add_row(
            system,
            f"{spread.median * 1e3:.0f}",
            f"{spread.low * 1e3:.0f} - {spread.high * 1e3:.0f}",
            f"{spread.median / floor:.2f}",
            f"{recompute / spread.median:.1f}",
            f"{stats['bytes_read'] / 1e6:.1f}",
            f"{stats['read_amplification']:.2f}" if stats["bytes_used"] else "",
            f"{stats['io_wait_s'] * 1e3:.1f}",
        )
        rows[system] = spread.as_dict() | {
            "over_floor": spread.median / floor,
            "over_full_load": spread.median / full,
            "speed_up": recompute / spread.median,
            "pages_in_cache_before": measured.warm_reads,
            "stats": stats,
        }
    console.print(table)
    return {
        "machine": machine(),
        "prefix_tokens": len(load.prefix_ids),
        "suffix_tokens": len(load.suffix_ids),
        "dtype": dtype_name(load.model.dtype),
        "recompute_over_floor": recompute / floor,
        "systems": rows,
    }


def main(
    model_name: str | None,
    prefix_tokens: int,
    suffix_tokens: int,
    budget: float,
    rounds: int,
    folder: Path | None,
    json_path: Path | None,
    dtype: Dtype = "auto",
) -> dict[str, Any]:
    """Load the model, make a workload of real text, measure and report."""
    from .documents import document_ids
    from .models import load_model

    console = Console(width=None if sys.stdout.isatty() else 110)
    model, tokenizer = load_model(model_name, dtype=dtype)
    console.print(f"runs in {model.runs_in}")
    ids = document_ids(tokenizer, prefix_tokens + suffix_tokens)
    with tempfile.TemporaryDirectory(prefix="contiguouskv-bench-", dir=folder) as temporary:
        load = Workload(model, ids[:prefix_tokens], ids[prefix_tokens:], Path(temporary) / "store")
        results = run(load, budget, rounds)
        numbers = report(results, load, console)
        numbers["persist"] = persist = persist_overhead(load)
    console.print(
        f"prefill {persist['prefill_s']:.1f} s, prefill and store {persist['prefill_and_store_s']:.1f} s: "
        f"storing costs {persist['overhead']:.0%}"
    )
    console.print(f"on {numbers['machine']}")
    if json_path is not None:
        json_path.write_text(json.dumps(numbers, indent=2, default=str) + "\n")
        console.print(f"written to {json_path}")
    return numbers
