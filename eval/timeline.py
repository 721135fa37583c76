"""`python -m eval.timeline`: record and draw when one request read, copied and computed, layer by layer.

python -m eval.timeline record trace.json --budget 0.05 --paper
python -m eval.timeline draw trace.json timeline.png
"""

from __future__ import annotations

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore

from .dtypes import DtypeOption, dtype_name
from .running.requests import token_bytes
from .timing import (
    bytes_to_ready,
    drop_page_cache,
    machine,
    median_spread,
    ready_memory,
    resident_pages,
    time_to_first_token,
)

# The bars, drawn from back to front: colour, offset and height within a layer's row. Reader threads are below, the
# model's thread above (layers count downwards).
BARS = {
    "read keys": ("#f2b134", 0.55, 0.4),
    "read": ("#ed553b", 0.55, 0.4),
    "wait": ("#bbbbbb", 0.05, 0.4),
    "identify": ("#7a4fa3", 0.05, 0.4),
    "copy": ("#20639b", 0.05, 0.4),
    "compute": ("#3caea3", 0.05, 0.4),
}
NAMES = {
    "read keys": "reads of keys (reader threads)",
    "read": "reads of chunks (reader threads)",
    "wait": "compute waits",
    "identify": "identification",
    "copy": "copy into attention's buffer",
    "compute": "the model's compute",
}

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def record_request(
    model: Any,
    ids: torch.Tensor,
    suffix_tokens: int,
    config: ContiguousKVConfig,
    folder: Path,
    *,
    warm: bool,
    runs: int,
) -> dict[str, Any]:
    """Record several requests and keep the one with the median time to first token.

    Args:
        model: a causal language model.
        ids: prefix and suffix, int64 `(n,)`.
        suffix_tokens: number of suffix tokens in `ids`.
        config: the cache's configuration, with its timeline switched on.
        folder: folder for the store.
        warm: use one store for all requests, so that chunks are in memory; else each request is cold.
        runs: number of recorded requests, after one unrecorded request.
    """
    prefix = ids[: len(ids) - suffix_tokens]
    with PrefixStore(folder) as store:
        ContiguousKVCache(model, prefix, store=store).close()
    files = sorted(folder.rglob("*.safetensors"))
    recorded = []
    store = PrefixStore(folder)
    for _ in range(runs + 1):
        if not warm:
            store.close()
            drop_page_cache(files)
            if any(resident_pages(file) for file in files):
                raise AssertionError("the segment is in the page cache")
            store = PrefixStore(folder)
        ready_memory(bytes_to_ready(token_bytes(model) * len(prefix)))
        seconds, _, cache = time_to_first_token(
            model, ids[None], partial(ContiguousKVCache, model, prefix, store=store, config=config)
        )
        recorded.append({"ttft_s": seconds, "stats": cache.stats.as_dict(), "spans": cache.timeline.as_dicts()})
        cache.close()
    store.close()
    recorded = recorded[1:]
    middle = median_spread([request["ttft_s"] for request in recorded]).median
    request = min(recorded, key=lambda request: abs(request["ttft_s"] - middle))
    return request | {
        "prefix_tokens": len(prefix),
        "suffix_tokens": suffix_tokens,
        "warm": warm,
        "dtype": dtype_name(model.dtype),
        "machine": machine(),
    }


def draw_timeline(trace: dict[str, Any], path: Path) -> None:
    """Draw a recorded request: one row per layer, time to the right."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    spans = trace["spans"]
    layers = 1 + max(span["layer"] for span in spans)
    figure, axes = pyplot.subplots(figsize=(11, 1.8 + 0.22 * layers))
    for kind, (colour, offset, height) in BARS.items():
        for layer in range(layers):
            own = [span for span in spans if span["kind"] == kind and span["layer"] == layer]
            pieces = [(span["start"] * 1e3, (span["end"] - span["start"]) * 1e3) for span in own]
            axes.broken_barh(pieces, (layer + offset, height), facecolors=colour)
    axes.set_ylim(layers, 0)
    axes.set_xlim(0, max(span["end"] for span in spans) * 1e3 * 1.01)
    axes.set_yticks([layer + 0.5 for layer in range(layers)], [str(layer) for layer in range(layers)], fontsize=7)
    axes.set_xlabel("ms since the request began")
    axes.set_ylabel("layer")
    state = "chunks in memory" if trace["warm"] else "cold"
    axes.set_title(
        f"{trace['name']}: {trace['prefix_tokens']}-token prefix, {trace['suffix_tokens']}-token suffix, {state}; "
        f"first token after {trace['ttft_s'] * 1e3:.0f} ms",
        fontsize=10,
    )
    present = [kind for kind in BARS if any(span["kind"] == kind for span in spans)]
    handles = [Patch(color=BARS[kind][0], label=NAMES[kind]) for kind in present]
    axes.legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.08), ncol=3, fontsize=8, frameon=False)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    pyplot.close(figure)


def totals(trace: dict[str, Any]) -> dict[str, float]:
    """Milliseconds by kind."""
    found: dict[str, float] = {}
    for span in trace["spans"]:
        found[span["kind"]] = found.get(span["kind"], 0.0) + (span["end"] - span["start"]) * 1e3
    return found


@app.command()
def record(
    path: Path,
    paper: Annotated[bool, typer.Option(help="The published method instead of the default.")] = False,
    budget: Annotated[float, typer.Option(help="Share of chunks.")] = 0.05,
    warm: Annotated[bool, typer.Option(help="Chunks and keys are in memory.")] = False,
    prefix_tokens: int = 8128,
    suffix_tokens: int = 32,
    runs: Annotated[int, typer.Option(help="Requests; the median one is kept.")] = 7,
    model_name: Annotated[str | None, typer.Option("--model")] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """Record one request on real text."""
    from .documents import document_ids
    from .models import load_model

    model, tokenizer = load_model(model_name, dtype=dtype)
    console = Console()
    console.print(f"runs in {model.runs_in}")
    config = (
        ContiguousKVConfig.paper(budget, timeline=True) if paper else ContiguousKVConfig(budget=budget, timeline=True)
    )
    ids = document_ids(tokenizer, prefix_tokens + suffix_tokens)
    with tempfile.TemporaryDirectory(prefix="contiguouskv-timeline-") as folder:
        trace = record_request(model, ids, suffix_tokens, config, Path(folder) / "store", warm=warm, runs=runs)
    trace["name"] = f"{'published' if paper else 'default'}, {budget:.0%} of the chunks"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(trace) + "\n")
    parts = ", ".join(f"{kind} {milliseconds:.1f}" for kind, milliseconds in totals(trace).items())
    console.print(f"{trace['name']}: {trace['ttft_s'] * 1e3:.0f} ms to the first token ({parts} ms)")


@app.command()
def draw(trace: Path, picture: Path) -> None:
    """Draw a recorded request."""
    draw_timeline(json.loads(trace.read_text()), picture)


if __name__ == "__main__":
    app()
