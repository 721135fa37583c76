"""Measure and draw `ttft_by_length.png`: cold time to first token against prefix length.

    python docs/pictures/ttft_by_length.py measure docs/results/ttft-by-length.json   # about four minutes, two cores
    python docs/pictures/ttft_by_length.py draw docs/results/ttft-by-length.json docs/pictures/ttft_by_length.png

Every length has its own store and its own saved `DynamicCache`. All systems and lengths take turns in one process. The
files of a request are dropped from the page cache before its timer starts. The script needs the `eval` extra.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

# A saved `DynamicCache` is used without repeating K and V per query head, as the library's own caches are.
os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import typer
from matplotlib.ticker import FuncFormatter, NullFormatter
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from eval.dtypes import DtypeOption, dtype_name
from eval.models import load_model
from eval.timing import (
    drop_page_cache,
    interleave,
    machine,
    median_spread,
    resident_pages,
    time_to_first_token,
)
from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore

app = typer.Typer(add_completion=False)

LENGTHS = (256, 512, 1024, 2048, 4096, 8128)
SUFFIX_TOKENS = 32
RECOMPUTE, RELOAD = "recompute", "reload a saved DynamicCache"
CONFIGS = {
    "exact, budget 1.0": ContiguousKVConfig(budget=1.0),
    "published method, 5%": ContiguousKVConfig.paper(0.05),
    "ours, budget 0.25 (default)": ContiguousKVConfig(),
}
COLOURS = {
    RECOMPUTE: "#6b7280",
    RELOAD: "#a16207",
    "exact, budget 1.0": "#10b981",
    "published method, 5%": "#f59e0b",
    "ours, budget 0.25 (default)": "#2563eb",
}


def document_ids(tokenizer: Any, tokens: int) -> torch.Tensor:
    """The first tokens of Python's own language reference, int64 `(tokens,)`."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"][:tokens])


def save_cache(model: Any, ids: torch.Tensor, path: Path) -> None:
    """Compute the cache of `ids` and save it as one safetensors file."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model.model(ids[None], past_key_values=cache, use_cache=True)
    save_file(
        {f"{name}.{i}": getattr(layer, name) for i, layer in enumerate(cache.layers) for name in ("keys", "values")},
        path,
    )


def load_cache(model: Any, path: Path) -> DynamicCache:
    """The cache that `save_cache` saved."""
    cache = DynamicCache(config=model.config)
    with safe_open(path, framework="pt") as file:
        for layer in range(len(file.keys()) // 2):
            cache.update(file.get_tensor(f"keys.{layer}"), file.get_tensor(f"values.{layer}"), layer)
    return cache


@app.command()
def measure(
    out: Path,
    rounds: int = 7,
    recompute_rounds: int = 3,
    dtype: DtypeOption = "auto",
    folder: Annotated[Path | None, typer.Option(help="On the disk to be measured.")] = None,
) -> None:
    """Time every system on every length, cold, and write medians and quartiles."""
    model, tokenizer = load_model(dtype=dtype)
    words = document_ids(tokenizer, max(LENGTHS) + SUFFIX_TOKENS)
    suffix = words[-SUFFIX_TOKENS:]
    seconds: dict[tuple[str, int], list[float]] = {}
    bytes_read: dict[tuple[str, int], int] = {}
    not_cold = 0
    with tempfile.TemporaryDirectory(prefix="contiguouskv-ttft-", dir=folder) as place, torch.inference_mode():
        for length in LENGTHS:
            with PrefixStore(Path(place) / str(length)) as store:
                ContiguousKVCache(model, words[:length], store=store).close()
            save_cache(model, words[:length], Path(place) / f"{length}.safetensors")
            print(f"{length} tokens are stored", flush=True)
        keys = [(name, length) for name in (RECOMPUTE, RELOAD, *CONFIGS) for length in LENGTHS]
        for number, (name, length) in interleave(keys, rounds + 1):
            if name == RECOMPUTE and number > recompute_rounds:
                continue
            files = [Path(place) / f"{length}.safetensors", *(Path(place) / str(length)).rglob("*.safetensors")]
            drop_page_cache(files)
            not_cold += any(resident_pages(file) for file in files)
            with ExitStack() as stack:
                took, cache = _request(model, torch.cat([words[:length], suffix]), name, length, Path(place), stack)
                if name in CONFIGS:
                    bytes_read[name, length] = cache.stats.bytes_read
            if number:  # The first round warms kernels up.
                seconds.setdefault((name, length), []).append(took)
    rows = [
        {"system": name, "tokens": length, "bytes_read": bytes_read.get((name, length))}
        | {"seconds": median_spread(seconds[name, length]).as_dict()}
        for name, length in keys
    ]
    found = {
        "machine": machine(),
        "model": model.source,
        "dtype": dtype_name(model.dtype),
        "suffix_tokens": SUFFIX_TOKENS,
        "requests_not_cold": not_cold,
        "rows": rows,
    }
    out.write_text(json.dumps(found, indent=2) + "\n")
    for row in rows:
        print(f"{row['system']:28} {row['tokens']:6,} {row['seconds']['median'] * 1e3:9,.0f} ms")


def _request(
    model: Any, prompt: torch.Tensor, name: str, length: int, place: Path, stack: ExitStack
) -> tuple[float, Any]:
    """Seconds to the first token, and the cache; opening the store or the file is inside the timer."""

    def from_store() -> Any:
        store = stack.enter_context(PrefixStore(place / str(length)))
        return stack.enter_context(ContiguousKVCache(model, prompt[:length], store=store, config=CONFIGS[name]))

    makers: dict[str, Callable[[], Any]] = {
        RECOMPUTE: lambda: DynamicCache(config=model.config),
        RELOAD: lambda: load_cache(model, place / f"{length}.safetensors"),
    }
    took, _, cache = time_to_first_token(model, prompt[None], makers.get(name, from_store))
    return took, cache


@app.command()
def draw(results: Path, picture: Path) -> None:
    """Draw what `measure` wrote."""
    found = json.loads(results.read_text())
    figure, ax = plt.subplots(figsize=(8.4, 4.6), dpi=130)
    medians: dict[str, dict[int, float]] = {}
    for name, colour in COLOURS.items():
        rows = [row for row in found["rows"] if row["system"] == name]
        lengths = [row["tokens"] for row in rows]
        medians[name] = {row["tokens"]: row["seconds"]["median"] * 1e3 for row in rows}
        ax.plot(lengths, medians[name].values(), color=colour, marker="o", markersize=4, label=name, linewidth=1.8)
    everything = {
        length: min(medians[RELOAD][length], medians["exact, budget 1.0"][length]) for length in medians[RELOAD]
    }
    at = crossover(medians["ours, budget 0.25 (default)"], everything)
    if at is not None:
        ax.axvline(at, color=COLOURS["ours, budget 0.25 (default)"], linestyle=":", linewidth=1.2)
        ax.annotate(
            f"the default is faster than loading\neverything from about {round(at, -2):,.0f} tokens",
            (at, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-6, 0),
            textcoords="offset points",
            fontsize=8.5,
            color=COLOURS["ours, budget 0.25 (default)"],
            va="top",
            ha="right",
        )
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("prefix length, tokens")
    ax.set_ylabel("time to first token, ms (log)")
    ax.grid(alpha=0.25, which="both", linewidth=0.5)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8.5, loc="center left", bbox_to_anchor=(1.0, 0.5))
    about = found["machine"]
    name = {"bfloat16": "bf16", "float32": "fp32", "float16": "fp16"}[found["dtype"]]
    ax.set_title(
        f"SmolLM2-135M-Instruct, {name}, {about['cpu']}, {about['cores']} cores, no GPU. Prefix cold on a local disk.\n"
        "Medians of interleaved requests.",
        fontsize=9,
        loc="left",
    )
    figure.savefig(picture, bbox_inches="tight")


def crossover(ours: dict[int, float], rival: dict[int, float]) -> float | None:
    """The shortest length from which `ours` stays below `rival`, interpolated; `None` where it never does."""
    lengths = sorted(ours)
    gains = [rival[length] - ours[length] for length in lengths]
    for i in range(len(lengths) - 1, 0, -1):
        if gains[i] <= 0:
            return None
        if gains[i - 1] <= 0:
            share = -gains[i - 1] / (gains[i] - gains[i - 1])
            return lengths[i - 1] + share * (lengths[i] - lengths[i - 1])
    return None


if __name__ == "__main__":
    app()
