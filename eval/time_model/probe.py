"""What a call and an operation cost on this processor: requests of a tiny model, counted and timed."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from ..random_models import random_model
from ..systems import Setting, State, System
from ..timing import time_to_first_token
from . import totals
from .record import Record
from .stage import Stage

PREFIX_TOKENS, SUFFIX_TOKENS, ROUNDS = 1024, 4, 15
_MEMORY_BYTES = 2**28
_KINDS = (
    ("contiguouskv_paper", 0.05, State.WARM_HOST),
    ("contiguouskv", 0.25, State.WARM_HOST),
    ("contiguouskv", 1.0, State.WARM_HOST),
    ("attentionstore+overlap", 1.0, State.WARM_HOST),
    ("contiguouskv_paper", 0.05, State.OPEN),
    ("contiguouskv", 0.25, State.OPEN),
)


@dataclass(frozen=True)
class Probed:
    """Costs, and how well they explain what was timed.

    Attributes:
        call_s, operation_s: seconds of a call and of an operation of torch (on tensors of a few numbers).
        memory_s: bytes per second of a long copy by torch, read and written counted.
        requests: name, seconds of the processor that were taken, seconds that the two costs explain.
    """

    call_s: float
    operation_s: float
    memory_s: float
    requests: list[tuple[str, float, float]]


def probe() -> Probed:
    """Measure this processor, in half a minute. By processor time, so that other processes disturb little."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        names, seconds, counted = _requests()
    finally:
        torch.set_num_threads(threads)
    matrix = np.array(counted)
    costs, *_ = np.linalg.lstsq(matrix, np.array(seconds), rcond=None)
    explained = matrix @ costs
    requests = list(zip(names, seconds, explained.tolist(), strict=True))
    return Probed(float(costs[0]), float(costs[1]), _memory_speed(), requests)


def _requests() -> tuple[list[str], list[float], list[tuple[float, float]]]:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 28, "num_attention_heads": 2}
    model = random_model("qwen2", torch.float32, **shape, num_key_value_heads=1, vocab_size=64)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, (PREFIX_TOKENS + SUFFIX_TOKENS,), generator=generator)
    prefix, suffix = ids[:PREFIX_TOKENS], ids[PREFIX_TOKENS:]
    keys, values = torch.randn(2, 1, 1, PREFIX_TOKENS, 16, generator=generator)
    states = DynamicCache()
    for layer in range(28):
        states.update(keys, values, layer)
    with tempfile.TemporaryDirectory(prefix="contiguouskv-probe-") as folder, torch.no_grad():

        def floor(timed: Callable[[Callable[[], Any]], None]) -> None:
            timed(lambda: time_to_first_token(model, suffix[None], DynamicCache))

        def through(name: str, budget: float, state: State) -> Callable[[Callable[[Callable[[], Any]], None]], None]:
            def request(timed: Callable[[Callable[[], Any]], None]) -> None:
                (setting,) = Setting.parse(name, (budget,))
                made = setting.make(model, Path(folder), host_bytes=2**30, device_bytes=2**30)
                system: System
                with made as system:
                    system.store(prefix, states)
                    system.enter(state, prefix, suffix)
                    found: list[Any] = []
                    timed(lambda: found.append(time_to_first_token(model, ids[None], lambda: system.cache(prefix))[2]))
                    system.finish(found[0])

            return request

        kinds = {"floor": floor} | {
            f"{name} {budget:.0%} {state}": through(name, budget, state) for name, budget, state in _KINDS
        }
        seconds = [_shortest(request) for request in kinds.values()]
        with Stage() as stage:
            counted = [_counted(stage, model, request) for request in kinds.values()]
        return list(kinds), seconds, counted


def _shortest(request: Callable[[Callable[[Callable[[], Any]], None]], None]) -> float:
    found: list[float] = []

    def timed(action: Callable[[], Any]) -> None:
        began = time.thread_time()
        action()
        found.append(time.thread_time() - began)

    for _ in range(ROUNDS):
        request(timed)
    return min(found)


def _counted(
    stage: Stage, model: Any, request: Callable[[Callable[[Callable[[], Any]], None]], None]
) -> tuple[float, float]:
    recorders: list[Any] = []

    def timed(action: Callable[[], Any]) -> None:
        with stage.recording(model.model.layers) as recorder:
            action()
        recorders.append(recorder)

    for _ in range(2):
        request(timed)
    whole = totals.whole(Record.of((1, 2), [recorders[-1], recorders[-1]]), 1)
    return whole.calls, whole.operations


def _memory_speed() -> float:
    source = torch.ones(_MEMORY_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    found = []
    for _ in range(5):
        began = time.perf_counter()
        target.copy_(source)
        found.append(time.perf_counter() - began)
    return 2 * _MEMORY_BYTES / min(found)
