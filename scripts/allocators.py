"""What each hand-written allocator of `hf_contiguouskv/memory/` saves: the same requests with it and without it.

    python scripts/allocators.py --rounds 8

Each sample is a process of its own, because the C library decides per process whether freed memory stays with it. The
variants take turns in a new random order per round. A sample is the median of its requests after the first two, and the
median of their minor page faults.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table

from eval.documents import document_ids
from eval.dtypes import DtypeOption
from eval.models import load_model
from eval.timing import drop_page_cache, interleave, machine, median_spread, time_to_first_token
from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore
from hf_contiguouskv.hardware.aligned_memory import aligned_buffer
from hf_contiguouskv.memory import lending
from hf_contiguouskv.memory.blocks import Blocks, TensorBlocks
from hf_contiguouskv.memory.tiers import MemoryTiers

WITH_ALL = "as it is"
NO_WORKSPACE = "without workspace"
NO_IDLE = "without idle buffers"
TENSORS = "slots in tensors of 128 MiB"
VARIANTS = [WITH_ALL, NO_WORKSPACE, NO_IDLE, TENSORS]
STATES = ["chunks cold", "warm"]
_REQUESTS = 9


def open_store(folder: Path, variant: str) -> PrefixStore:
    """A store whose memory lacks what the variant names (`NO_IDLE` lacks it during requests, see `lacking`)."""
    if variant == TENSORS:

        def host_blocks(self: MemoryTiers, slot_bytes: int, max_bytes: int) -> Blocks:
            return TensorBlocks(slot_bytes, max_bytes, aligned_buffer)

        with mock.patch.object(MemoryTiers, "_host_blocks", host_blocks):
            return PrefixStore(folder, create=False)
    store = PrefixStore(folder, create=False)
    if variant == NO_WORKSPACE:
        store.inner.memory.workspace = lambda nbytes: None  # type: ignore[method-assign]
    return store


@contextmanager
def lacking(variant: str) -> Iterator[None]:
    """Keep no idle buffer meanwhile, if that is the variant."""
    with mock.patch.object(lending, "_IDLE_SHARE", 1 << 62) if variant == NO_IDLE else ExitStack():
        yield


def prompt(tokens: int, suffix: int, dtype: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The model, and ids of prompt and prefix, int64 `(n,)`."""
    model, tokenizer = load_model(None, dtype=dtype)
    ids = document_ids(tokenizer, tokens)
    return model, ids, ids[: len(ids) - suffix]


def serve(
    variant: str, folder: Path, model: Any, ids: torch.Tensor, prefix: torch.Tensor, budgets: list[float]
) -> list[dict[str, Any]]:
    """Requests in this process. Per budget and state: median seconds and page faults after the first two requests."""
    found = []
    for budget in budgets:
        config = ContiguousKVConfig(budget=budget)
        with open_store(folder, variant) as store:
            make = partial(ContiguousKVCache, model, prefix, store=store, config=config)
            for state in STATES:
                seconds, faults = [], []
                for _ in range(_REQUESTS):
                    if state == "chunks cold":
                        store.inner.memory.drop_chunks()
                        drop_page_cache(folder.rglob("*.safetensors"))
                    before = _page_faults()
                    with lacking(variant):
                        taken, _, cache = time_to_first_token(model, ids[None], make)
                        cache.close()
                    seconds.append(taken)
                    faults.append(_page_faults() - before)
                    if (state == "chunks cold") != bool(cache.stats.hits["disk"]):
                        raise AssertionError(f"{variant} was not {state}: {cache.stats}")
                medians = {"seconds": median(seconds[2:]), "faults": median(faults[2:])}
                found.append({"budget": budget, "state": state, "dtype": str(model.dtype), **medians})
    return found


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def main(
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of prefix and suffix together.")] = 8160,
    suffix_tokens: int = 32,
    rounds: Annotated[int, typer.Option(help="Processes per variant.")] = 8,
    budgets: Annotated[str, typer.Option(help="Budgets, separated by commas.")] = "0.05,0.25,1.0",
    dtype: DtypeOption = "auto",
    variant: Annotated[str | None, typer.Option(help="Only serve requests in this process, and print JSON.")] = None,
    folder: Annotated[Path | None, typer.Option(help="With --variant: a store that has the prefix.")] = None,
) -> None:
    """Measure requests with and without each allocator."""
    model, ids, prefix = prompt(tokens, suffix_tokens, dtype)
    if variant is not None and folder is not None:
        shares = [float(word) for word in budgets.split(",")]
        print(json.dumps(serve(variant, folder, model, ids, prefix, shares)))
        return
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="contiguouskv-allocators-") as name:
        path = Path(name) / "store"
        with PrefixStore(path) as store:
            ContiguousKVCache(model, prefix, store=store, config=ContiguousKVConfig(budget=1.0)).close()
        asked = f"--tokens={tokens} --suffix-tokens={suffix_tokens} --budgets={budgets} --dtype={dtype}".split()
        for number, lacked in interleave(VARIANTS, rounds):
            command = [sys.executable, __file__, *asked, "--variant", lacked, "--folder", str(path)]
            printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            samples += [{"variant": lacked, "round": number, **row} for row in json.loads(printed.splitlines()[-1])]
            if json_path is not None:  # After each process: an interrupted run leaves what it has.
                json_path.write_text(json.dumps({"machine": machine(), "samples": samples}, indent=1) + "\n")
    show(samples)


def show(samples: list[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("budget", "state", "memory", "TTFT ms", "quartiles", "worst", "page faults, median", "most")
    for budget, state, variant in dict.fromkeys((row["budget"], row["state"], row["variant"]) for row in samples):
        rows = [row for row in samples if (row["budget"], row["state"], row["variant"]) == (budget, state, variant)]
        spread = median_spread(row["seconds"] for row in rows)
        worst, faults = max(row["seconds"] for row in rows), [row["faults"] for row in rows]
        times = f"{spread.median * 1e3:.0f}", f"{spread.low * 1e3:.0f} - {spread.high * 1e3:.0f}", f"{worst * 1e3:.0f}"
        table.add_row(f"{budget:.0%}", state, variant, *times, f"{median(faults):.0f}", f"{max(faults):.0f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
