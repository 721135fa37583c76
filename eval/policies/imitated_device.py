"""Host memory that plays an accelerator's, so that a tier of device memory can be filled and counted without one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from hf_contiguouskv.hardware.accelerator import opened_devices

# A device that no machine has.
IMITATED = torch.device("privateuseone")


class _Happened:
    """An event of the past: here every copy has ended when the call returns."""

    def query(self) -> bool:
        return True


class HostAsDevice:
    """`hf_contiguouskv.hardware.accelerator.Device` on host memory. Its times mean nothing; what it holds does."""

    name = str(IMITATED)
    _event = _Happened()

    def empty(self, nbytes: int, *, for_copies: bool = False) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def copy_in(self, source: torch.Tensor, target: torch.Tensor, after: Any = None) -> Any:
        target.copy_(source)
        return self._event

    def copy_out(self, source: torch.Tensor, target: torch.Tensor) -> Any:
        return self.copy_in(source, target)

    def send(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def fetch(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def free_bytes(self) -> int | None:
        return None

    def let_go(self) -> None:
        pass

    def copies_so_far(self) -> list[Any]:
        return []

    def aside(self) -> AbstractContextManager[None]:
        return nullcontext()

    def finish(self, event: Any) -> None:
        pass

    def wait(self, event: Any) -> None:
        pass

    def mark(self) -> Any:
        return self._event

    def uses(self, tensor: torch.Tensor) -> None:
        pass

    def stream(self) -> Any:
        return None


@contextmanager
def imitated_device() -> Iterator[torch.device]:
    """A device whose memory is the host's, while the context lasts."""
    opened_devices[IMITATED] = HostAsDevice()
    try:
        yield IMITATED
    finally:
        del opened_devices[IMITATED]
