"""`contiguouskv plan`: bytes and times of every system for a model, a machine and a length of the prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Annotated, Any

import torch
import typer

from ..errors import InputError
from ..model.configured_model import ConfiguredModel, model_from_configuration
from ..planning.forecast import (
    PUBLISHED_BUDGET,
    RECOMPUTE,
    Forecast,
    System,
    case_of,
    floor_s,
    forecasts,
    slowest_storage_bytes_s,
    systems,
    with_floor,
)
from ..planning.machine import ACCELERATORS, SHARE_REACHED, Machine, Storage, machine_with
from ..wording import quoted
from .app import AsJson, app
from .messages import messages_instead_of_tracebacks
from .output import columns, facts, human_bytes, print_json, say, show
from .warm import Dtype

DEFAULT_GPU, NO_GPU = "h100", "none"
# Systems that sentences below the table name.
_ALL, _OURS, _EXACT = "attentionstore+overlap", "contiguouskv", "contiguouskv@1"
_NUMBERS = ("on disk", "read per request", "TTFT", "waits", "x recompute", "faster from")
_GIGA = 1e9


@app.command()
@messages_instead_of_tracebacks
def plan(
    model: Annotated[str, typer.Option(help="Hub name or folder of a causal LM. Only its config.json is read.")],
    prefix_tokens: Annotated[int, typer.Option(help="Tokens of the stored prefix.")],
    suffix_tokens: Annotated[int, typer.Option(help="Tokens that a request adds.")] = 32,
    budget: Annotated[
        float | None, typer.Option(help="Share of the chunks that this library uses.", show_default="its default, 0.25")
    ] = None,
    published_budget: Annotated[float, typer.Option(help="Share that the published methods use.")] = PUBLISHED_BUDGET,
    dtype: Annotated[Dtype, typer.Option(help="Of model and KV. auto: as the configuration says.")] = "auto",
    gpu: Annotated[
        str, typer.Option(help=f"{', '.join(ACCELERATORS)}; or {NO_GPU}: the model computes on the processor.")
    ] = DEFAULT_GPU,
    tflops: Annotated[
        float | None,
        typer.Option(help="TFLOP/s that products reach.", show_default=f"{SHARE_REACHED:.0%} of the card's data sheet"),
    ] = None,
    memory_gbps: Annotated[
        float | None,
        typer.Option(
            help="GB/s of the memory that the model computes from.",
            show_default=f"{SHARE_REACHED:.0%} of the card's data sheet",
        ),
    ] = None,
    pcie_gbps: Annotated[
        float | None, typer.Option(help="GB/s from pinned host memory to the card.", show_default="the card's")
    ] = None,
    disk_gbps: Annotated[float, typer.Option(help="GB/s (1e9 bytes) of long reads.")] = 6.8,
    disk_latency_us: Annotated[float, typer.Option(help="Microseconds of one short read.")] = 80.0,
    link_gbps: Annotated[
        float | None,
        typer.Option(
            help="GB/s of a network between disk and machine; 100 Gbit/s are 12.5.", show_default="no network"
        ),
    ] = None,
    link_latency_ms: Annotated[float, typer.Option(help="Milliseconds of one round trip over it.")] = 0.0,
    floor_ms: Annotated[
        float | None,
        typer.Option(
            help="Measured milliseconds to the first token of the new tokens alone: makes the host as slow as yours.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict bytes and times of every system, and when loading a prefix beats computing it.

    Nothing is measured, stored or downloaded but the model's configuration. The request finds nothing of its prefix in
    memory. TTFT is the time to the first token.
    """
    served = model_from_configuration(model, None if dtype == "auto" else getattr(torch, dtype))
    wanted = systems(budget, published_budget)
    storage = Storage(
        _positive("--disk-gbps", disk_gbps) * _GIGA,
        _at_least_zero("--disk-latency-us", disk_latency_us) / 1e6,
        None if link_gbps is None else _positive("--link-gbps", link_gbps) * _GIGA,
        _at_least_zero("--link-latency-ms", link_latency_ms) / 1e3,
    )
    machine = _machine(gpu, served.shape.dtype, storage, tflops, memory_gbps, pcie_gbps)
    if floor_ms is not None:
        machine = with_floor(served, machine, _positive("--floor-ms", floor_ms) / 1e3, suffix_tokens)
    found = forecasts(served, machine, prefix_tokens, suffix_tokens, wanted)
    case = case_of(served, machine, prefix_tokens, suffix_tokens)
    slowest = {one.name: slowest_storage_bytes_s(case, one) for one in wanted if one.stores}
    floor = floor_s(served, machine, suffix_tokens)
    if as_json:
        print_json(_document(served, machine, prefix_tokens, suffix_tokens, floor, found, slowest))
        return
    show(facts(_facts(served, machine, prefix_tokens, suffix_tokens, floor)))
    show("")
    show(_table(found))
    show("")
    for sentence in _sentences(found, wanted, slowest, prefix_tokens):
        say(sentence)


def _machine(
    gpu: str,
    dtype: torch.dtype,
    storage: Storage,
    tflops: float | None,
    memory_gbps: float | None,
    pcie_gbps: float | None,
) -> Machine:
    """The machine that the options describe.

    Raises:
        InputError: the card is not known, or a speed is missing or not above zero.
    """
    speeds = {
        name: None if value is None else _positive(name, value)
        for name, value in (("--tflops", tflops), ("--memory-gbps", memory_gbps), ("--pcie-gbps", pcie_gbps))
    }
    flops, memory, bus = speeds["--tflops"], speeds["--memory-gbps"], speeds["--pcie-gbps"]
    if gpu == NO_GPU:
        if flops is None or memory is None:
            raise InputError(f"--gpu {NO_GPU} needs --tflops and --memory-gbps: there is no data sheet of a processor")
        return Machine("no GPU", flops * 1e12, flops * 1e12, memory * _GIGA, storage)
    if gpu not in ACCELERATORS:
        raise InputError(f"--gpu must be one of {', '.join((*ACCELERATORS, NO_GPU))}, got {quoted(gpu)}")
    found = machine_with(ACCELERATORS[gpu], storage, dtype)
    if flops is not None:
        found = replace(found, flops_s=flops * 1e12, attention_flops_s=flops * 1e12)
    if memory is not None:
        found = replace(found, memory_s=memory * _GIGA)
    return found if bus is None else replace(found, bus_s=bus * _GIGA)


def _positive(option: str, value: float) -> float:
    if not 0 < value < float("inf"):
        raise InputError(f"{option} must be above zero, got {value}")
    return value


def _at_least_zero(option: str, value: float) -> float:
    if not 0 <= value < float("inf"):
        raise InputError(f"{option} must not be below zero, got {value}")
    return value


def _facts(model: ConfiguredModel, machine: Machine, prefix: int, suffix: int, floor: float) -> dict[str, str]:
    shape, storage = model.shape, machine.storage
    windows = [window for window in shape.layers.windows if window is not None]
    layers = f"{model.layers} layers" + (f" ({len(windows)} with a window of {max(windows):,})" if windows else "")
    dtype = str(shape.dtype).removeprefix("torch.")
    computing = f"{machine.flops_s / 1e12:,.4g} TFLOP/s, {machine.memory_s / _GIGA:,.4g} GB/s of memory"
    bus = f", {machine.bus_s / _GIGA:,.4g} GB/s from the host" if machine.bus_s is not None else ""
    reads = f"disk {storage.disk_s / _GIGA:,.4g} GB/s, {storage.disk_latency_s * 1e6:,.4g} us"
    if storage.link_s is not None or storage.link_latency_s:
        speed = f"{storage.link_s / _GIGA:,.4g} GB/s, " if storage.link_s is not None else ""
        reads += f"; network {speed}{storage.link_latency_s * 1e3:,.4g} ms"
    return {
        "model": f"{model.name}: {layers}, {shape.kv_heads} KV heads of {shape.head_dim}, {dtype}; "
        f"{human_bytes(model.kv_bytes_per_token)} of KV per token",
        "machine": f"{machine.name}: {computing}{bus}",
        "storage": reads,
        "request": f"{prefix:,} stored tokens and {suffix:,} new ones; nothing of the prefix is in memory",
        "floor": f"{_ms(floor)} for the new tokens alone",
    }


def _table(found: Sequence[Forecast]) -> Any:
    table = columns("system", "budget", *_NUMBERS, "", right=_NUMBERS)
    for one in found:
        table.add_row(
            one.title,
            "" if one.budget is None else f"{one.budget:.3g}",
            human_bytes(one.disk_bytes) if one.disk_bytes else "-",
            human_bytes(one.read_bytes) if one.read_bytes else "-",
            _ms(one.ttft_s),
            f"{one.waited_s / one.ttft_s:.0%}" if one.read_bytes else "-",
            f"{one.speed_up:.2f}",
            _from(one),
            "",
        )
    return table


def _from(one: Forecast) -> str:
    if one.system == RECOMPUTE:
        return "-"
    return "never" if one.beats_recompute_from is None else f"{one.beats_recompute_from:,} tokens"


def _sentences(
    found: Sequence[Forecast], wanted: Sequence[System], slowest: dict[str, float | None], tokens: int
) -> list[str]:
    """What the table means, one sentence each."""
    by_name = {one.system: one for one in found}
    named = [by_name[name] for name in (_ALL, _EXACT, _OURS) if name in by_name]
    lines = []
    for one in named:
        title = one.title if one.budget in (None, 1.0) else f"{one.title} at {one.budget:.0%}"
        if one.beats_recompute_from is None:
            lines.append(f"{title}: computing the prefix again is faster at the longest lengths.")
            continue
        least = slowest.get(one.system)
        speed = "" if least is None else f"; at {tokens:,} tokens it needs {_rate(least)} of storage for that"
        lines.append(f"{title}: faster than computing from {one.beats_recompute_from:,} tokens on{speed}.")
    stored = [one for one in found if one.disk_bytes]
    for title, exact in (("with exact answers", True), ("of those that leave tokens out", False)):
        own = [one for one in stored if (one.budget in (None, 1.0)) is exact]
        best = min(own, key=lambda one: one.ttft_s)
        lines.append(f"Fastest {title}: {best.title}, {_ms(best.ttft_s)}.")
    lines.append("All of this is predicted. The how-to page `plan` says how far predictions were from measured times.")
    return lines


def _rate(bytes_s: float) -> str:
    return f"{bytes_s / _GIGA:.2g} GB/s" if bytes_s >= 1e8 else f"{bytes_s / 1e6:.2g} MB/s"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds < 100 else f"{seconds:,.0f} s"


def _document(
    model: ConfiguredModel,
    machine: Machine,
    prefix: int,
    suffix: int,
    floor: float,
    found: Sequence[Forecast],
    slowest: dict[str, float | None],
) -> dict[str, Any]:
    shape = model.shape
    return {
        "model": {
            "name": model.name,
            "layers": model.layers,
            "windows": list(shape.layers.windows),
            "kv_heads": shape.kv_heads,
            "query_heads": model.query_heads,
            "head_dim": shape.head_dim,
            "dtype": str(shape.dtype).removeprefix("torch."),
            "kv_bytes_per_token": model.kv_bytes_per_token,
        },
        "machine": asdict(machine),
        "request": {"prefix_tokens": prefix, "suffix_tokens": suffix},
        "floor_s": floor,
        "systems": [one.as_dict() | {"least_storage_bytes_s": slowest.get(one.system)} for one in found],
    }
