"""Predictions for all machines, methods, states and lengths."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.model.layer_plan import LayerPlan
from hf_contiguouskv.planning.read_plan import ReadPlan

from ..systems import State
from .counting import METHODS, Counts, Method
from .machines import MACHINES, Machine
from .record import Record
from .replay import Timing, replay
from .shapes import Shape, shape_of

LENGTHS = (8192, 32_768, 130_944)
"""Of prefixes, in tokens: those of `eval.gpu_check` (128K less 128)."""


@dataclass(frozen=True)
class Prediction:
    """One request.

    Attributes:
        machine, shape, method, state, tokens: which.
        record, lookahead_bytes: what was replayed.
        timing: what the replay comes to.
        floor_s: of this machine and model.
    """

    machine: Machine
    shape: Shape
    method: Method
    state: State
    tokens: int
    record: Record
    lookahead_bytes: int
    timing: Timing
    floor_s: float

    @property
    def over_floor(self) -> float:
        return self.timing.ttft / self.floor_s


def predict(counts: Counts, machine: Machine, shape: Shape, method: Method, state: State, tokens: int) -> Prediction:
    """One request on one machine.

    Raises:
        CountError: it was not counted.
    """
    lookahead = (method.config or ContiguousKVConfig()).reading.lookahead_bytes
    record = counts.record(shape.name, method.label, state)
    timing = replay(record, machine, tokens, lookahead)
    floor = METHODS[0]
    base = replay(counts.record(shape.name, floor.label, floor.states[0]), machine, tokens, lookahead)
    return Prediction(machine, shape, method, state, tokens, record, lookahead, timing, base.ttft)


def predict_all(counts: Counts) -> list[Prediction]:
    """Everything that the tables show."""
    return [
        predict(counts, machine, shape_of(machine), method, state, tokens)
        for machine in MACHINES
        for method in METHODS
        for state in method.states
        for tokens in LENGTHS
    ]


def library_bytes(shape: Shape, method: Method, tokens: int) -> int:
    """What the library itself expects a cold request of its own to read, in bytes (`ReadPlan.bytes_to_read`).

    Raises:
        ValueError: it is another system's request.
    """
    if method.config is None:
        raise ValueError(f"{method.label} is not the library's own")
    from types import SimpleNamespace

    from hf_contiguouskv.store.attached_prefix import AttachedPrefix
    from hf_contiguouskv.store.entries import SegmentSpan

    geometry = shape.geometry(method.config.chunk_size)
    chunks = -(-tokens // geometry.chunk_size)
    segment = SimpleNamespace(geometry=geometry, num_chunks=chunks)
    span = SegmentSpan(segment, 0, chunks, 0)  # type: ignore[arg-type]
    prefix = AttachedPrefix(tokens, (span,), geometry)
    plan = LayerPlan((None,) * shape.layers, (torch.device("cuda", 0),) * shape.layers)
    return ReadPlan.of(prefix, method.config, plan).bytes_to_read()
