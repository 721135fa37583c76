"""The checked device: a GPU, or its stand-in in a rehearsal."""

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
    """A context in which models on `settings.device` have a device with its own memory.

    Raises:
        FatalError: there is no GPU, and this is not a rehearsal.
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
    """A context in which stores treat every CPU as an accelerator whose copies arrive late.

    One CPU device without a model is excepted: it plays the host, to which systems bring what must not be on the
    device.
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
    """Check that there is a GPU.

    Raises:
        FatalError: there is no GPU.
    """
    if not torch.cuda.is_available():
        raise FatalError(
            f"torch {torch.__version__} sees no CUDA device. On a machine without one, --rehearse runs the same stages "
            "on the CPU."
        )


def alive_on(settings: Settings) -> Callable[[], None]:
    """A function that raises if CUDA calls fail: after a bad access no call works until the process ends."""

    def alive() -> None:
        if not settings.rehearse:
            torch.cuda.synchronize()
            torch.ones(1, device=settings.device).sum().item()

    return alive


def free_memory(settings: Settings) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if not settings.rehearse:
        torch.cuda.empty_cache()


def memory_in_use(settings: Settings) -> dict[str, int] | None:
    """The device's memory in bytes: free, total, and the peak allocated by tensors; `None` in a rehearsal."""
    if settings.rehearse:
        return None
    free, total = torch.cuda.mem_get_info()
    return {"free": free, "total": total, "peak_allocated": torch.cuda.max_memory_allocated()}
