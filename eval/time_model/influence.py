"""What a predicted time hangs on: how much shorter it would be if one thing took no time at all."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from .machines import Machine
from .predict import Prediction
from .replay import replay

_NOTHING = 1e-15
_ENDLESS = 1e30


def _disk(machine: Machine) -> Machine:
    return replace(machine, disk=replace(machine.disk, bytes_s=_ENDLESS, reads_s=_ENDLESS, latency_s=_NOTHING))


def _bus(machine: Machine) -> Machine:
    assert machine.gpu is not None
    return replace(machine, gpu=replace(machine.gpu, bus_s=_ENDLESS, pageable_s=_ENDLESS))


def _launches(machine: Machine) -> Machine:
    assert machine.gpu is not None
    gpu = replace(machine.gpu, launch_s=_NOTHING, kernel_s=_NOTHING, copy_s=_NOTHING, wait_s=_NOTHING)
    return replace(machine, gpu=gpu)


def _host(machine: Machine) -> Machine:
    return replace(machine, host=replace(machine.host, call_s=_NOTHING, operation_s=_NOTHING, memory_s=_ENDLESS))


def _compute(machine: Machine) -> Machine:
    assert machine.gpu is not None
    gpu = replace(machine.gpu, memory_s=_ENDLESS, f32_s=_ENDLESS, f16_s=_ENDLESS, i8_s=_ENDLESS)
    return replace(machine, gpu=gpu)


WITHOUT: dict[str, Callable[[Machine], Machine]] = {
    "disk": _disk,
    "PCIe": _bus,
    "launches": _launches,
    "host": _host,
    "compute": _compute,
}
"""`host`: Python, torch's dispatch and copies in host memory. `launches`: launches, and what every kernel, copy and
wait takes at least."""


def influences(one: Prediction) -> list[tuple[str, float]]:
    """By which share the time would fall without each thing, the largest first. The shares do not add up to one."""
    lookahead = one.lookahead_bytes
    found = []
    for name, change in WITHOUT.items():
        ttft = replay(one.record, change(one.machine), one.tokens, lookahead).ttft
        found.append((name, 1 - ttft / one.timing.ttft))
    return sorted(found, key=lambda pair: -pair[1])
