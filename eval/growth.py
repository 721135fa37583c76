"""`python -m eval.growth`: time to first token for growing prefixes with a constant number of used chunks.

Time does not depend on the values of K and V, so random numbers are stored without computing them. Prefixes can have
any length, even beyond the model's context. Requests are cold, and all lengths and systems are interleaved.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.model.served_model import ServedModel

from .dtypes import DtypeOption, choose_dtype, dtype_name
from .random_models import random_model
from .running.timed import timed_request
from .systems import System, system_named
from .tasks import Request
from .timing import interleave, machine, median_spread, time_to_first_token

FLOOR = "floor"
SYSTEMS = ("attentionstore_overlapped", "contiguouskv_paper", "contiguouskv_resident", "contiguouskv")


@dataclass
class Measured:
    """Requests of one system on one prefix.

    Attributes:
        seconds: seconds to the first token of each request.
        over_floor: the same divided by the floor of the same round.
        warm: number of requests whose files had pages in the page cache (all, if files are in memory).
        stats: statistics of the last request.
    """

    seconds: list[float] = field(default_factory=list)
    warm: int = 0
    over_floor: list[float] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Medians with quartiles, ready for JSON."""
        return {
            "seconds": median_spread(self.seconds).as_dict(),
            "over_floor": median_spread(self.over_floor).as_dict(),
            "warm": self.warm,
            "stats": self.stats,
        }


def random_states(model: Any, tokens: int) -> DynamicCache:
    """Random K and V of `tokens` tokens, equal in every layer, for `System.store`."""
    geometry = ServedModel(model).geometry(ContiguousKVConfig().chunk_size)
    shape = (2, 1, geometry.kv_heads, tokens, geometry.head_dim)
    keys, values = torch.randn(shape, generator=_generator()).to(geometry.dtype)
    layer = DynamicLayer()
    layer.update(keys, values)
    states = DynamicCache()
    states.layers = [layer] * geometry.num_layers
    return states


def run(
    model: Any,
    folder: Path,
    lengths: Sequence[int],
    kept_tokens: int,
    suffix_tokens: int,
    rounds: int,
    names: Sequence[str] = SYSTEMS,
) -> dict[str, Any]:
    """Measure every system on prefixes of all lengths.

    Args:
        model: a causal language model.
        folder: folder for the stores.
        lengths: lengths of the prefixes, in tokens.
        kept_tokens: prefix tokens that systems with a budget use, at every length.
        suffix_tokens: suffix tokens of every request.
        rounds: measured rounds, after one uncounted round.
        names: names of the systems (see `eval.systems`).

    Returns:
        The measurements by length and system, ready for JSON.
    """
    words = torch.randint(0, model.config.vocab_size, (max(lengths) + suffix_tokens,), generator=_generator())
    suffix = words[-suffix_tokens:]
    found: dict[tuple[int, str], Measured] = {(0, FLOOR): Measured()}
    with ExitStack() as stack:
        systems: dict[tuple[int, str], tuple[System, Request]] = {}
        for length in lengths:
            states = random_states(model, length)
            for name in names:
                make = system_named(name).make
                system = stack.enter_context(make(model, folder / str(length), kept_tokens / length))
                system.store(words[:length], states)
                systems[length, name] = system, Request("growth", 0, words[:length], length, suffix, ())
                found[length, name] = Measured()
        order = interleave(list(systems), rounds + 1)
        for number, key in tqdm(list(order), "requests", leave=False, disable=None):
            seconds, _, _ = time_to_first_token(model, suffix[None], DynamicCache)
            system, request = systems[key]
            with timed_request(model, system, request) as timed:
                pass
            if number:
                found[0, FLOOR].seconds.append(seconds)
                found[0, FLOOR].over_floor.append(1.0)
                found[key].seconds.append(timed.seconds)
                found[key].over_floor.append(timed.seconds / seconds)
                found[key].stats = timed.stats.as_dict()
                found[key].warm += timed.departure is not None
    return {
        "machine": machine(),
        "model": type(model).__name__,
        "dtype": dtype_name(model.dtype),
        "layers": model.config.num_hidden_layers,
        "kept_tokens": kept_tokens,
        "suffix_tokens": suffix_tokens,
        "floor": found.pop((0, FLOOR)).as_dict(),
        "rows": [{"tokens": length, "system": name} | row.as_dict() for (length, name), row in found.items()],
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def report(results: dict[str, Any], console: Console) -> None:
    """Print the table: per system and length, the time, its ratio to the floor, and its growth since the first
    length."""
    title = f"{results['model']}: {results['kept_tokens']} tokens used, {results['suffix_tokens']}-token suffix, cold"
    columns = ("system", "prefix", "TTFT ms", "x floor", "quartiles", "growth", "MB read", "I/O wait ms")
    table = Table(*columns, title=title)
    first: dict[str, float] = {}
    for row in sorted(results["rows"], key=lambda row: (row["system"], row["tokens"])):
        median, over = row["seconds"]["median"], row["over_floor"]
        start = first.setdefault(row["system"], median)
        table.add_row(
            row["system"],
            f"{row['tokens']:,}",
            f"{median * 1e3:.0f}",
            f"{over['median']:.2f}",
            f"{over['low']:.2f} - {over['high']:.2f}",
            f"{median / start:.2f}",
            f"{row['stats']['bytes_read'] / 1e6:.1f}",
            f"{row['stats']['io_wait_s'] * 1e3:.1f}",
        )
    console.print(table)
    warm = sum(row["warm"] for row in results["rows"])
    if warm:
        console.print(f"[bold]{warm} requests were not cold[/bold]: pages of their files were in the page cache")
    console.print(f"floor: {results['floor']['seconds']['median'] * 1e3:.0f} ms; on {results['machine']}")


def main(
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    tokens: Annotated[str, typer.Option(help="Prefix lengths, separated by commas.")] = "8192,16384,32768,65536",
    kept_tokens: Annotated[int, typer.Option(help="Prefix tokens used at every length.")] = 416,
    suffix_tokens: int = 32,
    rounds: int = 7,
    systems: Annotated[str, typer.Option(help="With commas; see python -m eval list.")] = ",".join(SYSTEMS),
    model_name: Annotated[str | None, typer.Option("--model", help="Default: SmolLM2-135M-Instruct.")] = None,
    random: Annotated[str | None, typer.Option(help="Instead of it a model of random weights: llama or qwen2.")] = None,
    dtype: DtypeOption = "auto",
    folder: Annotated[Path | None, typer.Option(help="On the disk to be measured; default: the temporary one.")] = None,
) -> None:
    """Measure cold requests on ever longer prefixes."""
    from .models import load_model

    console = Console(width=110)
    if random:
        choice = choose_dtype(dtype)
        model = random_model(random, choice.dtype)
        model.runs_in = f"{choice.name} on cpu ({choice.reason})"
    else:
        model, _ = load_model(model_name, dtype=dtype)
    console.print(f"runs in {model.runs_in}")
    lengths = [int(length) for length in tokens.split(",")]
    place = Path(tempfile.mkdtemp(prefix="contiguouskv-growth-", dir=folder))
    try:
        found = run(model, place, lengths, kept_tokens, suffix_tokens, rounds, systems.split(","))
    finally:
        shutil.rmtree(place)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")
    report(found, console)


if __name__ == "__main__":
    typer.run(main)
