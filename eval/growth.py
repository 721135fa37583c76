"""`python -m eval.growth`: time to first token for growing prefixes with a constant number of used chunks.

Time does not depend on the values of K and V, so random numbers are stored without computing them. Prefixes can have
any length, even beyond the model's context. All lengths, systems and states are interleaved.
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
from .systems import Setting, State, System
from .tasks import Request
from .timing import interleave, machine, median_spread, time_to_first_token

SYSTEMS = ("attentionstore+overlap", "contiguouskv_paper", "contiguouskv")
STATES = (State.COLD, State.KEYS_RESIDENT)
# Tokens of the prefix, a system with its options, and its state.
Case = tuple[int, str, State]


@dataclass
class Measured:
    """Requests of one system on one prefix, in one state.

    Attributes:
        seconds: seconds to the first token of each request.
        over_floor: the same divided by the floor of the same round.
        departed: number of requests that did not find their state, or found pages of their files in the page cache
            (all, if files are in memory).
        stats: statistics of the last request.
    """

    seconds: list[float] = field(default_factory=list)
    departed: int = 0
    over_floor: list[float] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Medians with quartiles, ready for JSON."""
        return {
            "seconds": median_spread(self.seconds).as_dict(),
            "over_floor": median_spread(self.over_floor).as_dict(),
            "departed": self.departed,
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
    states: Sequence[State] = STATES,
    **store_options: Any,
) -> dict[str, Any]:
    """Measure every system on prefixes of all lengths.

    Args:
        model: a causal language model.
        folder: folder for the stores.
        lengths: lengths of the prefixes, in tokens.
        kept_tokens: prefix tokens that systems with a budget use, at every length.
        suffix_tokens: suffix tokens of every request.
        rounds: measured rounds, after one uncounted round.
        names: systems with their options (see `eval.systems.Setting`).
        states: in which requests find them. A system that has none of these is measured in its first one.
        store_options: options of the systems' stores, such as `host_bytes`.

    Returns:
        The measurements by length, system and state, ready for JSON.
    """
    words = torch.randint(0, model.config.vocab_size, (max(lengths) + suffix_tokens,), generator=_generator())
    suffix = words[-suffix_tokens:]
    floor = Measured()
    found: dict[Case, Measured] = {}
    with ExitStack() as stack:
        systems: dict[Case, tuple[System, Request]] = {}
        for length in lengths:
            kv = random_states(model, length)
            for name in names:
                (setting,) = Setting.parse(name, (kept_tokens / length,))
                system = stack.enter_context(setting.make(model, folder / str(length), **store_options))
                system.store(words[:length], kv)
                request = Request("growth", 0, words[:length], length, suffix, ())
                for state in [one for one in states if one in system.states] or system.states[:1]:
                    systems[length, name, state] = system, request
                    found[length, name, state] = Measured()
            del kv
        order = interleave(list(systems), rounds + 1)
        for number, key in tqdm(list(order), "requests", leave=False, disable=None):
            seconds, _, _ = time_to_first_token(model, suffix[None], DynamicCache)
            system, request = systems[key]
            with timed_request(model, system, request, state=key[2]) as timed:
                pass
            system.enter(system.states[0], request.prefix_ids)  # Other systems need the memory.
            if number:
                floor.seconds.append(seconds)
                floor.over_floor.append(1.0)
                found[key].seconds.append(timed.seconds)
                found[key].over_floor.append(timed.seconds / seconds)
                found[key].stats = timed.stats.as_dict()
                found[key].departed += timed.departure is not None
    return {
        "machine": machine(),
        "model": type(model).__name__,
        "dtype": dtype_name(model.dtype),
        "layers": model.config.num_hidden_layers,
        "kept_tokens": kept_tokens,
        "suffix_tokens": suffix_tokens,
        "floor": floor.as_dict(),
        "rows": [
            {"tokens": length, "system": name, "state": str(state)} | row.as_dict()
            for (length, name, state), row in found.items()
        ],
    }


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def report(results: dict[str, Any], console: Console) -> None:
    """Print the table: per system and length, the time, its ratio to the floor, and its growth since the first
    length."""
    title = f"{results['model']}: {results['kept_tokens']} tokens used, {results['suffix_tokens']}-token suffix"
    columns = ("system", "state", "prefix", "TTFT ms", "x floor", "quartiles", "growth", "MB read", "I/O wait ms")
    table = Table(*columns, title=title)
    first: dict[tuple[str, str], float] = {}
    for row in sorted(results["rows"], key=lambda row: (row["system"], row["state"], row["tokens"])):
        median, over = row["seconds"]["median"], row["over_floor"]
        start = first.setdefault((row["system"], row["state"]), median)
        table.add_row(
            row["system"],
            row["state"],
            f"{row['tokens']:,}",
            f"{median * 1e3:.0f}",
            f"{over['median']:.2f}",
            f"{over['low']:.2f} - {over['high']:.2f}",
            f"{median / start:.2f}",
            f"{row['stats']['bytes_read'] / 1e6:.1f}",
            f"{row['stats']['io_wait_s'] * 1e3:.1f}",
        )
    console.print(table)
    departed = sum(row["departed"] for row in results["rows"])
    if departed:
        console.print(f"[bold]{departed} requests did not find their state[/bold]")
    console.print(f"floor: {results['floor']['seconds']['median'] * 1e3:.0f} ms; on {results['machine']}")


def main(
    json_path: Annotated[Path | None, typer.Option("--json")] = None,
    tokens: Annotated[str, typer.Option(help="Prefix lengths, separated by commas.")] = "8192,16384,32768,65536",
    kept_tokens: Annotated[int, typer.Option(help="Prefix tokens used at every length.")] = 416,
    suffix_tokens: int = 32,
    rounds: int = 7,
    systems: Annotated[str, typer.Option(help="With commas; see python -m eval list.")] = ",".join(SYSTEMS),
    states: Annotated[str, typer.Option(help="With commas; see docs/evaluation.md.")] = ",".join(STATES),
    read_gbps: Annotated[float | None, typer.Option(help="No faster than this; default: as fast as the disk.")] = None,
    model_name: Annotated[str | None, typer.Option("--model", help="Default: SmolLM2-135M-Instruct.")] = None,
    random: Annotated[str | None, typer.Option(help="Instead of it a model of random weights: llama or qwen2.")] = None,
    dtype: DtypeOption = "auto",
    folder: Annotated[Path | None, typer.Option(help="On the disk to be measured; default: the temporary one.")] = None,
) -> None:
    """Measure requests on ever longer prefixes."""
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
        wanted = [State(state) for state in states.split(",")]
        names = systems.split(",")
        found = run(model, place, lengths, kept_tokens, suffix_tokens, rounds, names, wanted, read_gbps=read_gbps)
    finally:
        shutil.rmtree(place)
    if json_path is not None:
        json_path.write_text(json.dumps(found, indent=2) + "\n")
    report(found, console)


if __name__ == "__main__":
    typer.run(main)
