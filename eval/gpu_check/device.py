"""The device that is checked: a GPU, or in a rehearsal a stand-in for one."""

from __future__ import annotations

import gc
import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from hf_contiguouskv.hardware import accelerator as devices
from hf_contiguouskv.memory import tiers

from ..systems import bringing
from .results import FatalError
from .settings import Settings

NO_CUDA = "not measured: no CUDA"


@contextmanager
def device_ready(settings: Settings) -> Iterator[None]:
    """Inside, models of `settings.device` have a device with memory of its own.

    Raises:
        FatalError: there is no GPU, and this is no rehearsal.
    """
    if not settings.rehearse:
        require_cuda()
        yield
        return
    torch.set_num_threads(1)
    with stand_in():
        yield


@contextmanager
def stand_in() -> Iterator[Any]:
    """Inside, every CPU is an accelerator whose copies come late, for stores that are opened from now on.

    Except one that no model is on: it plays the host, where systems bring what shall not be on the device.
    """
    tests = str(Path(__file__).resolve().parents[2] / "tests")
    if tests not in sys.path:
        sys.path.insert(0, tests)
    accelerated = importlib.import_module("unit.fake_device").accelerated

    host = torch.device("cpu", 1)
    with accelerated() as machine, ExitStack() as patches:

        def device_of(device: torch.device) -> Any:
            return None if device == host else machine.device_of(device)

        patches.enter_context(mock.patch.object(bringing, "HOST", host))
        for module in (tiers, devices):
            patches.enter_context(mock.patch.object(module, "device_of", device_of))
        yield machine


def require_cuda() -> None:
    """Raise if there is no GPU.

    Raises:
        FatalError: there is none.
    """
    if not torch.cuda.is_available():
        raise FatalError(
            f"torch {torch.__version__} sees no CUDA device. On a machine without one, --rehearse runs the same stages "
            "on the CPU."
        )


def alive_on(settings: Settings) -> Callable[[], None]:
    """Raises where CUDA calls fail, whatever they are: after a bad access nothing works until the process ends."""

    def alive() -> None:
        if not settings.rehearse:
            torch.cuda.synchronize()
            torch.ones(1, device=settings.device).sum().item()

    return alive


def free_memory(settings: Settings) -> None:
    """Give back to the device what nothing uses."""
    gc.collect()
    if not settings.rehearse:
        torch.cuda.empty_cache()


def memory_in_use(settings: Settings) -> dict[str, int] | None:
    """Bytes of the device: free, in all, and the most that tensors took; `None` in a rehearsal."""
    if settings.rehearse:
        return None
    free, total = torch.cuda.mem_get_info()
    return {"free": free, "total": total, "peak_allocated": torch.cuda.max_memory_allocated()}
