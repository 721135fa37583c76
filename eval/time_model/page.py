"""The tables, on the console and as the generated part of `docs/results/gpu.md`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..generated import put_between
from ..gpu_check.figures import rows_of
from ..report.cells import table
from ..systems import State
from . import totals, validation
from .counting import FLOOR, SUFFIX_TOKENS, Counts, Method, method_named
from .influence import influences
from .machines import MACHINES, Disk, Gpu, Host, Machine
from .predict import LENGTHS, Prediction, predict_all
from .probe import Probed
from .record import CountError
from .replay import READERS
from .shapes import QWEN_7B, shape_of

BEGIN, END = "<!-- begin: python -m eval.time_model --markdown -->", "<!-- end -->"
PICTURE = "gpu-predicted.png"
STATES = {
    State.COLD: "cold",
    State.OPEN: "store open",
    State.KEYS_RESIDENT: "keys resident",
    State.WARM_HOST: "in host memory",
    State.WARM_DEVICE: "in HBM",
}
_MIDDLE = LENGTHS[1]
Section = tuple[str, list[str], list[list[str]], int]
"""A heading, the head of a table, its rows, and how many of its columns are words."""


def length_name(tokens: int) -> str:
    """8192 as 8K; 130,944 as 128K (it is 128 less)."""
    return f"{-(-tokens // 1024)}K"


def measured_times(folder: Path) -> tuple[str, dict[tuple[str, str, int], float]]:
    """What `gpu.json` in `folder` has measured: the card, and medians in seconds by label, state and tokens.

    No such file, or a rehearsal: no card and nothing.
    """
    path = folder / "gpu.json"
    if not path.exists():
        return "", {}
    content = json.loads(path.read_text())
    if content.get("rehearsal"):
        return "", {}
    card = content.get("stages", {}).get("where", {}).get("found", {}).get("card") or {}
    rows = {
        (row["label"], row["state"] or State.COLD, row["tokens"]): row["seconds"]["median"]
        for row in rows_of(content)
        if row["seconds"]
    }
    return str(card.get("name", "an unknown card")), rows


def is_card(machine: Machine, card: str) -> bool:
    """Whether `card`, as its driver calls it, is that of `machine`, and runs the model that the check runs there."""
    gpu = machine.gpu
    return gpu is not None and shape_of(machine) is QWEN_7B and gpu.name.removesuffix(" 80GB") in card


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f}" if seconds >= 0.01 else f"{seconds * 1e3:.1f}"


def times(predictions: Sequence[Prediction], card: str, measured: dict[tuple[str, str, int], float]) -> list[Section]:
    """One table for each machine."""
    sections = []
    for machine in MACHINES:
        own = [one for one in predictions if one.machine is machine]
        shape, here = shape_of(machine), is_card(machine, card)
        head = ["method", "prefix is", *(f"{length_name(tokens)}, ms (x floor)" for tokens in LENGTHS)]
        head += [f"MB from disk at {length_name(_MIDDLE)}", f"what matters most at {length_name(_MIDDLE)}"]
        if here:
            head += [f"{length_name(tokens)} **measured**" for tokens in LENGTHS]
        rows = []
        for method, state in dict.fromkeys((one.method, one.state) for one in own):
            by_length = {one.tokens: one for one in own if (one.method, one.state) == (method, state)}
            middle = by_length[_MIDDLE]
            row = [method.title, "" if method.label == FLOOR else STATES[state]]
            row += [_cell(by_length[tokens], method) for tokens in LENGTHS]
            row += [f"{middle.timing.disk_bytes / 1e6:,.0f}", _most(middle)]
            if here:
                row += [_found(measured.get((method.label, state, tokens))) for tokens in LENGTHS]
            rows.append(row)
        kind = "computed, and measured" if here else "computed"
        sections.append((f"{machine.name}: {shape.name} ({kind})", head, rows, 2))
    return sections


def measured_alone(card: str, measured: dict[tuple[str, str, int], float]) -> list[Section]:
    """What was measured on a card that nothing is computed for; nothing otherwise."""
    if not card or any(is_card(machine, card) for machine in MACHINES):
        return []
    lengths = sorted({tokens for *_, tokens in measured})
    rows = []
    for label, state in dict.fromkeys((label, state) for label, state, _ in measured):
        row = [label, "" if label == FLOOR else STATES[State(state)]]
        rows.append(row + [_found(measured.get((label, state, tokens))) for tokens in lengths])
    head = ["method", "prefix is", *(f"{length_name(tokens)}, ms" for tokens in lengths)]
    return [(f"{card}: {QWEN_7B.name} (measured)", head, rows, 2)]


def _cell(one: Prediction, method: Method) -> str:
    return _ms(one.timing.ttft) + ("" if method.label == FLOOR else f" ({one.over_floor:.1f})")


def _found(seconds: float | None) -> str:
    return "" if seconds is None else _ms(seconds)


def _most(one: Prediction) -> str:
    found = influences(one)
    return ", ".join(f"{name} {share:.0%}" for name, share in found[:2] if share >= 0.05)


def counts_table(counts: Counts) -> Section:
    """What a layer does beside the floor's."""
    head = ["method", "prefix is", "kernels", "added", "operations", "calls", "host waits for GPU", "copies in"]
    head += ["reads", "before the first layer: calls", "host waits for GPU"]
    rows = []
    shape = shape_of(MACHINES[0])
    floor = totals.per_layer(counts.record(shape.name, FLOOR, State.COLD), _MIDDLE).kernels
    for name, record in counts.records[shape.name].items():
        label, state = name.split(" / ")
        layer, before = totals.per_layer(record, _MIDDLE), totals.before(record, _MIDDLE)
        rows.append(
            [
                method_named(label).title,
                "" if label == FLOOR else STATES[State(state)],
                f"{layer.kernels:,.0f}",
                f"{layer.kernels - floor:+,.0f}",
                f"{layer.operations:,.0f}",
                f"{layer.calls:,.0f}",
                f"{layer.waits:.1f}",
                f"{layer.copies:.1f}",
                f"{layer.reads:,.0f}",
                f"{before.calls:,.0f}",
                f"{before.waits:.0f}",
            ]
        )
    title = f"What was counted: {shape.name}, {length_name(_MIDDLE)}, per layer (mean over layers)"
    return title, head, rows, 2


def validation_table(counts: Counts) -> Section:
    """Predictions beside measurements on a CPU."""
    rows = []
    for one in validation.on_cpu(counts):
        where = "" if not one.tokens else length_name(one.tokens)
        title = validation.TITLES.get(one.name, one.name)
        rows.append([title, where, _ms(one.predicted), _ms(one.measured), f"{one.ratio:.2f}"])
    head = ["request", "prefix", "predicted, ms", "measured, ms", "predicted / measured"]
    return "SmolLM2-135M on the EPYC, no GPU", head, rows, 2


def paper_table(counts: Counts) -> Section:
    """The paper's ratios beside predicted ones."""
    head = ["published method, 5%, is faster than", "the paper, x"]
    head += [f"on disk, {length_name(tokens)}" for tokens in validation.PAPER_LENGTHS]
    warm = [state for state in STATES if state not in (State.COLD, State.OPEN)]
    head += [f"{STATES[state]}, {length_name(validation.WARM_LENGTH)}" for state in warm]
    rows = []
    for one in validation.beside_paper(counts):
        row = [one.baseline, f"{one.paper:.2f}"]
        row += [f"{one.on_disk[tokens]:.2f}" for tokens in validation.PAPER_LENGTHS]
        row += [f"{one.warm[state]:.2f}" if state in one.warm else "" for state in warm]
        rows.append(row)
    return f"{MACHINES[0].name}, {shape_of(MACHINES[0]).name}", head, rows, 1


def speeds_tables() -> list[Section]:
    """Every figure of the machines, with its source."""
    found: list[Section] = []
    for title, kind in (("Accelerators", "gpu"), ("Processors", "host"), ("Disks", "disk")):
        units: list[Gpu | Host | Disk] = list(dict.fromkeys(getattr(machine, kind) for machine in _everything()))
        units = [unit for unit in units if unit is not None]
        fields = [name for name in asdict(units[0]) if name not in ("name", "source")]
        rows = [[unit.name, *(_quantity(name, getattr(unit, name)) for name in fields), unit.source] for unit in units]
        found.append((title, ["", *(_FIELDS.get(name, name) for name in fields), "source"], rows, 1))
    return found


def _everything() -> list[Machine]:
    from .machines import OURS_CPU

    return [*MACHINES, OURS_CPU]


_FIELDS = {
    "memory_s": "memory",
    "f32_s": "float32",
    "f16_s": "16 bits",
    "i8_s": "int8",
    "bus_s": "bus, pinned",
    "pageable_s": "bus, other",
    "copy_s": "copy begins",
    "launch_s": "launch",
    "kernel_s": "kernel at least",
    "wait_s": "wait ends",
    "share": "share reached",
    "call_s": "call",
    "operation_s": "operation",
    "threads": "threads",
    "bytes_s": "long reads",
    "reads_s": "4 KiB reads",
    "latency_s": "one read",
}
_PER_SECOND = ("memory_s", "bus_s", "pageable_s", "bytes_s")
_FLOPS = ("f32_s", "f16_s", "i8_s")


def _quantity(name: str, value: Any) -> str:
    if name in _PER_SECOND:
        return f"{value / 1e9:,.4g} GB/s"
    if name in _FLOPS:
        return f"{value / 1e12:,.4g} T/s"
    if name == "reads_s":
        return f"{value:,.0f}/s"
    if name.endswith("_s"):
        return f"{value * 1e6:,.4g} us"
    return f"{value:g}"


def print_tables(counts: Counts, console: Console) -> None:
    """Print what the page shows."""
    sections = times(predict_all(counts), "", {})
    sections += [counts_table(counts), validation_table(counts), paper_table(counts)]
    for title, head, rows, words in sections:
        shown = Table(title=title, title_justify="left")
        for place, name in enumerate(head):
            shown.add_column(name, justify="left" if place < words else "right")
        for row in rows:
            shown.add_row(*row)
        console.print(shown)


def print_probed(found: Probed, console: Console) -> None:
    """Print what a processor's costs are, and how well they explain what was timed."""
    shown = Table("request", "ms of the processor", "explained", title="Requests of a tiny model", title_justify="left")
    for name, seconds, explained in found.requests:
        shown.add_row(name, f"{seconds * 1e3:.1f}", f"{explained * 1e3:.1f}")
    console.print(shown)
    console.print(
        f"a call {found.call_s * 1e6:.2f} us, an operation {found.operation_s * 1e6:.2f} us, "
        f"memory {found.memory_s / 1e9:.1f} GB/s"
    )


def rewrite(counts: Counts, path: Path) -> None:
    """Put tables and picture where they belong: between the markers of the page, and beside it.

    Raises:
        CountError: the page has no markers.
    """
    from .picture import draw

    try:
        put_between(path, BEGIN, END, generated(counts, path.parent))
    except ValueError as error:
        raise CountError(str(error)) from error
    draw(predict_all(counts), path.parents[1] / "pictures" / PICTURE)


def generated(counts: Counts, folder: Path) -> str:
    """The generated part, as Markdown."""
    card, measured = measured_times(folder)
    made = ", ".join(f"{name} {version}" for name, version in counts.made_with.items())
    parts = [
        f"**Measured: {f'on {card}, in gpu.json' if card else 'nothing, everything is computed'}.** "
        f"Counted with {made}; suffixes of {SUFFIX_TOKENS} tokens; {READERS} reader threads.",
        "### Times to the first token",
    ]
    parts.append(f"![Predicted times to the first token](../pictures/{PICTURE})")
    parts += _markdown([*measured_alone(card, measured), *times(predict_all(counts), card, measured)])
    parts += _markdown([counts_table(counts)])
    parts += ["### Beside measurements", *_markdown([validation_table(counts)])]
    parts += ["### Beside the paper", *_markdown([paper_table(counts)])]
    parts += ["### Speeds and where they are from", *_markdown(speeds_tables())]
    return "\n\n".join(parts)


def _markdown(sections: Sequence[Section]) -> list[str]:
    return [part for title, head, rows, words in sections for part in (f"**{title}**", table(head, rows, words))]
