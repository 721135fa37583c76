"""`python -m eval.warm`: compares a request whose chunks are in memory with a `DynamicCache` of only those tokens.

The rival holds exactly the keys and values that our selection kept, in one piece, with nothing to look up or choose.
The difference between the two is the cost of identifying chunks and copying them together. Both answer the same
question, interleaved in one process. Before timing, their results are checked for equality.
"""

from __future__ import annotations

import copy
import json
import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore
from hf_contiguouskv.model.transformers_internals import cache_argument

from .dtypes import DtypeOption, dtype_name
from .timing import interleave, machine, median_spread, time_to_first_token

LIMIT = 1.15


def kept_tokens_only(cache: ContiguousKVCache, model: Any) -> DynamicCache:
    """A `DynamicCache` with the prefix tokens that `cache` attends to in each layer; `cache` has seen its suffix."""
    state = cache.layers[0].attached
    found = DynamicCache(config=model.config)
    for layer, own in enumerate(cache.layers):
        kept = state.request.kept_tokens
        # (The prefix is loaded: no query is needed any more.)
        keys, values = (states[:, :, :kept] for states in own.visible_kv(own.keys, None, {}))
        found.update(keys.clone(), values.clone(), layer)
    return found


def check_same(model: Any, prefix: torch.Tensor, suffix: torch.Tensor, cache: ContiguousKVCache) -> DynamicCache:
    """The rival of `cache`, after checking that both compute the same logits for the suffix.

    Raises:
        AssertionError: the logits differ.
    """
    with torch.no_grad():
        called = cache_argument(model)
        ours = model(input_ids=suffix[None], **{called: cache}).logits[0].float()
        rival = kept_tokens_only(cache, model)
        positions = torch.arange(len(prefix), len(prefix) + len(suffix))[None]
        theirs = (
            model(input_ids=suffix[None], position_ids=positions, **{called: copy.deepcopy(rival)}).logits[0].float()
        )
    agree = (ours.argmax(-1) == theirs.argmax(-1)).float().mean().item()
    divergence = (ours.softmax(-1) * (ours.log_softmax(-1) - theirs.log_softmax(-1))).sum(-1).mean().item()
    if agree < 0.9 or divergence > 0.01:  # bf16: the order of summation differs.
        raise AssertionError(f"the two requests are not the same: {agree:.0%} agree, KL {divergence:.4f}")
    return rival


def run(model: Any, ids: torch.Tensor, suffix_tokens: int, budgets: list[float], rounds: int) -> dict[str, Any]:
    """Measure for each budget, interleaved: ours on an open store (the timer includes making the cache), ours after
    `reset()` of an existing cache, and the rival."""
    prefix, suffix = ids[: len(ids) - suffix_tokens], ids[len(ids) - suffix_tokens :]
    with (
        tempfile.TemporaryDirectory(prefix="contiguouskv-warm-") as folder,
        PrefixStore(Path(folder) / "store") as store,
    ):
        actions: dict[str, Callable[[], tuple[float, Any]]] = {
            "floor": partial(_timed, model, suffix[None], DynamicCache)
        }
        for budget in budgets:
            config = ContiguousKVConfig(budget=budget)
            make = partial(ContiguousKVCache, model, prefix, store=store, config=config)
            living = make()
            rival = check_same(model, prefix, suffix, living)
            living.reset()
            kept = torch.cat([prefix[: rival.get_seq_length()], suffix])[None]
            name = f"{budget:.0%}"
            actions[f"{name}: DynamicCache of the kept tokens"] = partial(_timed_copy, model, kept, rival)
            actions[f"{name}: new cache, warm store"] = partial(_timed, model, ids[None], make)
            actions[f"{name}: same cache, reset"] = partial(_timed_reset, model, ids[None], living)
        seconds: dict[str, list[float]] = {name: [] for name in actions}
        hits = {}
        with mock.patch.dict(os.environ, {"TRANSFORMERS_SDPA_FORCE_GQA": "1"}):
            for number, name in interleave(list(actions), rounds + 1):
                taken, cache = actions[name]()
                if number:
                    seconds[name].append(taken)
                if isinstance(cache, ContiguousKVCache):
                    hits[name] = cache.stats.as_dict()
                    if number and (cache.stats.hits["disk"] or cache.stats.bytes_read):
                        raise AssertionError(f"{name} was not warm: {cache.stats}")
                    if "new cache" in name:
                        cache.close()
        return _results(seconds, hits, len(prefix), suffix_tokens) | {"dtype": dtype_name(model.dtype)}


def _timed(model: Any, prompt: torch.Tensor, make: Callable[[], Any]) -> tuple[float, Any]:
    seconds, _, cache = time_to_first_token(model, prompt, make)
    return seconds, cache


def _timed_copy(model: Any, prompt: torch.Tensor, rival: DynamicCache) -> tuple[float, Any]:
    mine = copy.deepcopy(rival)  # Not timed, because the rival's tokens are already in memory.
    return _timed(model, prompt, lambda: mine)


def _timed_reset(model: Any, prompt: torch.Tensor, cache: ContiguousKVCache) -> tuple[float, Any]:
    def again() -> ContiguousKVCache:
        cache.reset()
        return cache

    return _timed(model, prompt, again)


def _results(
    seconds: dict[str, list[float]], stats: dict[str, Any], prefix_tokens: int, suffix_tokens: int
) -> dict[str, Any]:
    rows: dict[str, Any] = {}
    for name, values in seconds.items():
        spread = median_spread(values)
        rows[name] = spread.as_dict() | {"stats": stats.get(name)}
        budget = name.partition(":")[0]
        rival = seconds.get(f"{budget}: DynamicCache of the kept tokens")
        if rival is not None:
            # Compare requests of the same round, so that slow drifts of the machine cancel out.
            rows[name]["over_rival"] = median_spread(a / b for a, b in zip(values, rival, strict=True)).as_dict()
    return {
        "machine": machine(),
        "prefix_tokens": prefix_tokens,
        "suffix_tokens": suffix_tokens,
        "limit": LIMIT,
        "requests": rows,
    }


def report(results: dict[str, Any], console: Console) -> None:
    """Print the table."""
    title = f"{results['prefix_tokens']}-token prefix, {results['suffix_tokens']}-token suffix, everything in memory"
    table = Table("request", "TTFT ms", "quartiles", "x rival", "quartiles", title=title)
    for name, row in results["requests"].items():
        ratio = row.get("over_rival")
        table.add_row(
            name,
            f"{row['median'] * 1e3:.1f}",
            f"{row['low'] * 1e3:.1f} - {row['high'] * 1e3:.1f}",
            "" if ratio is None else f"{ratio['median']:.3f}",
            "" if ratio is None else f"{ratio['low']:.2f} - {ratio['high']:.2f}",
        )
    console.print(table)


def main(
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    tokens: Annotated[int, typer.Option(help="Tokens of prefix and suffix together.")] = 8160,
    suffix_tokens: Annotated[str, typer.Option(help="Suffix lengths, separated by commas.")] = "32,256",
    rounds: int = 21,
    budgets: Annotated[str, typer.Option(help="Budgets, separated by commas.")] = "0.05,0.1,1.0",
    model_name: Annotated[str | None, typer.Option("--model")] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Measure warm requests."""
    from .documents import document_ids
    from .models import load_model

    model, tokenizer = load_model(model_name, dtype=dtype)
    console = Console()
    console.print(f"runs in {model.runs_in}")
    ids = document_ids(tokenizer, tokens)
    shares = [float(budget) for budget in budgets.split(",")]
    found = []
    for length in suffix_tokens.split(","):
        found.append(run(model, ids, int(length), shares, rounds))
        report(found[-1], console)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
