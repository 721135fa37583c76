"""`python -m eval.storing`: what storing a prefix costs beside computing it."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore

from .documents import document_ids
from .dtypes import DtypeOption
from .models import load_model
from .systems.in_memory import prefill
from .timing import interleave, median_spread


def storing(model: Any, prefix_ids: torch.Tensor, folder: Path, rounds: int) -> dict[str, list[float]]:
    """Seconds of the same forwards, in the same blocks, with and without the store, in random order.

    Args:
        model: the causal language model.
        prefix_ids: int64 `(n,)`.
        folder: for the stores.
        rounds: measured rounds, after one that does not count.
    """
    seconds: dict[str, list[float]] = {"prefill": [], "prefill and store": []}
    for number, kind in interleave(list(seconds), rounds + 1):
        with tempfile.TemporaryDirectory(dir=folder) as empty:
            start = time.perf_counter()
            if kind == "prefill":
                prefill(model, prefix_ids, block=ContiguousKVConfig().prefill_block)
            else:
                with PrefixStore(Path(empty) / "store") as store:
                    ContiguousKVCache(model, prefix_ids, store=store).close()
            if number:
                seconds[kind].append(time.perf_counter() - start)
    return seconds


def main(
    tokens: Annotated[int, typer.Option(help="tokens of the prefix")] = 8128,
    rounds: Annotated[int, typer.Option(help="measured rounds")] = 3,
    model_name: Annotated[str | None, typer.Option("--model", help="default: SmolLM2-135M-Instruct")] = None,
    dtype: DtypeOption = "auto",
    folder: Annotated[Path | None, typer.Option(help="for the stores; default: a temporary one")] = None,
) -> None:
    """Compute a prefix with and without storing it."""
    model, tokenizer = load_model(model_name, dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="contiguouskv-storing-", dir=folder) as place:
        found = storing(model, document_ids(tokenizer, tokens), Path(place), rounds)
    plain, stored = (median_spread(seconds).median for seconds in found.values())
    print(f"runs in {model.runs_in}")
    print(f"prefill {plain:.1f} s, prefill and store {stored:.1f} s: storing costs {stored / plain - 1:.0%}")


if __name__ == "__main__":
    typer.run(main)
