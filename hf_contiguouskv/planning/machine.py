"""Machines by their speeds, for predictions: presets from data sheets, or what a user says of theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..errors import InputError

# Share of a data sheet's memory and arithmetic speed that ordinary kernels reach (assumed; matrix products and flash
# attention are published with 0.6 to 0.8).
SHARE_REACHED = 0.75
# Seconds of one call of a Python or C function, and of handing out one operation of torch (measured on an EPYC, Zen 4:
# `python -m eval.time_model --probe`).
CALL_S, OPERATION_S = 0.51e-6, 3.0e-6


@dataclass(frozen=True)
class Accelerator:
    """A card, by its data sheet.

    Attributes:
        name: for tables.
        memory_s: bytes per second of its memory.
        f32_s, f16_s: multiplications and additions per second in float32 and in 16 bits, dense.
        bus_s: bytes per second from pinned host memory: 80% of the data sheet of its bus (assumed).
        pageable_s: the same from other host memory (assumed).
        launch_s: seconds of the host for one launch (assumed).
    """

    name: str
    memory_s: float
    f32_s: float
    f16_s: float
    bus_s: float
    pageable_s: float
    launch_s: float = 3e-6


ACCELERATORS = {
    "a100": Accelerator("A100 80GB", 2.04e12, 19.5e12, 312e12, 25e9, 6e9),
    "a800": Accelerator("A800 80GB", 2.0e12, 19.5e12, 312e12, 25e9, 6e9),
    "h100": Accelerator("H100 80GB", 3.35e12, 67e12, 989e12, 50e9, 8e9),
    "h200": Accelerator("H200 141GB", 4.8e12, 67e12, 989e12, 50e9, 8e9),
    "l4": Accelerator("L4", 0.3e12, 30.3e12, 121e12, 25e9, 6e9),
    "rtx4090": Accelerator("RTX 4090", 1.008e12, 82.6e12, 165e12, 25e9, 8e9, launch_s=2.5e-6),
    "t4": Accelerator("T4", 0.32e12, 8.1e12, 65e12, 12e9, 4e9, launch_s=5e-6),
}
"""Presets by the names that `contiguouskv plan --gpu` takes."""


@dataclass(frozen=True)
class Storage:
    """What a request reads from.

    Attributes:
        disk_s: bytes per second of long reads.
        disk_latency_s: seconds of one short read by itself.
        link_s: bytes per second of a network between the disk and this machine; `None`: the disk is in the machine.
        link_latency_s: seconds of one round trip over that network.
    """

    disk_s: float
    disk_latency_s: float = 80e-6
    link_s: float | None = None
    link_latency_s: float = 0.0

    @property
    def bytes_s(self) -> float:
        """Bytes per second that arrive: the slower of disk and network decides."""
        return self.disk_s if self.link_s is None else min(self.disk_s, self.link_s)

    @property
    def latency_s(self) -> float:
        """Seconds until a read that nothing delays has begun to arrive."""
        return self.disk_latency_s + self.link_latency_s


@dataclass(frozen=True)
class Machine:
    """Speeds that requests reach.

    Attributes:
        name: for tables.
        flops_s: floating-point operations per second of matrix products; a multiplication and an addition are two.
        attention_flops_s: the same of attention.
        memory_s: bytes per second of the memory that the model computes from.
        storage: where prefixes lie.
        bus_s: bytes per second from pinned host memory to the accelerator; `None`: the model computes on the host.
        pageable_s: the same from other host memory.
        call_s: seconds of the host for one call of a Python or C function.
        operation_s: seconds of the host for handing out one operation of torch.
        launch_s: seconds of the host for launching one kernel.
        readers: reads that are under way at a time.
    """

    name: str
    flops_s: float
    attention_flops_s: float
    memory_s: float
    storage: Storage
    bus_s: float | None = None
    pageable_s: float | None = None
    call_s: float = CALL_S
    operation_s: float = OPERATION_S
    launch_s: float = 0.0
    readers: int = 8

    @property
    def has_accelerator(self) -> bool:
        """Whether the model computes on an accelerator, to which what was read must cross."""
        return self.bus_s is not None


def machine_with(card: Accelerator, storage: Storage, dtype: torch.dtype) -> Machine:
    """A machine with this card, whose kernels reach `SHARE_REACHED` of its data sheet.

    Args:
        card: the accelerator.
        storage: where prefixes lie.
        dtype: of the model: float32 has a speed of its own.
    """
    flops = (card.f32_s if dtype == torch.float32 else card.f16_s) * SHARE_REACHED
    return Machine(
        name=card.name,
        flops_s=flops,
        attention_flops_s=flops,
        memory_s=card.memory_s * SHARE_REACHED,
        storage=storage,
        bus_s=card.bus_s,
        pageable_s=card.pageable_s,
        launch_s=card.launch_s,
    )


def with_host_fitted(machine: Machine, predicted_s: Callable[[Machine], float], measured_s: float) -> Machine:
    """The machine with other prices of calls and operations, so that a prediction is what was measured.

    Args:
        machine: its other speeds stay.
        predicted_s: seconds that a request takes on a machine.
        measured_s: seconds that it took.

    Raises:
        InputError: even with calls that cost nothing, or a thousand times as much, the prediction is another.
    """

    def at(factor: float) -> Machine:
        return replace(machine, call_s=CALL_S * factor, operation_s=OPERATION_S * factor)

    low, high = 1e-3, 1e3
    least, most = predicted_s(at(low)), predicted_s(at(high))
    if not least <= measured_s <= most:
        raise InputError(
            f"a request that was measured with {measured_s * 1e3:,.1f} ms is predicted to take {least * 1e3:,.1f} ms "
            f"at least and {most * 1e3:,.0f} ms at most: other speeds of the machine are wrong"
        )
    while high / low > 1.001:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if predicted_s(at(middle)) > measured_s else (middle, high)
    return at(high)
