"""Host memory that a device copies from: its cost, whether direct reads can land in it, and the speed of copies."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from hf_contiguouskv.hardware.aligned_memory import aligned_buffer, as_memoryview

from ..timing import median_spread

MEBIBYTE = 2**20
ALLOCATED_MIB = (1, 16, 64, 256)
COPIED_MIB = (1, 16, 256)
REPEATS = 5


def pinned(nbytes: int) -> torch.Tensor:
    """uint8 `(nbytes,)` from torch's allocator of pinned memory."""
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def pinned_allocation() -> dict[str, Any]:
    """Milliseconds per MiB of pinned memory: for the first allocation, and when torch reuses freed memory."""
    found: dict[str, Any] = {}
    for mebibytes in ALLOCATED_MIB:
        began = time.perf_counter()
        tensor = pinned(mebibytes * MEBIBYTE)
        first = time.perf_counter() - began
        del tensor
        began = time.perf_counter()
        tensor = pinned(mebibytes * MEBIBYTE)
        again = time.perf_counter() - began
        found[f"{mebibytes} MiB"] = {"ms_per_mib": first * 1e3 / mebibytes, "again_ms_per_mib": again * 1e3 / mebibytes}
        del tensor
    return found


@contextmanager
def registered(tensor: torch.Tensor) -> Iterator[None]:
    """A context in which a device copies from this host memory asynchronously.

    Raises:
        RuntimeError: CUDA refuses it.
    """
    runtime = torch.cuda.cudart()
    code = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.numel(), 0))
    if code:
        raise RuntimeError(f"cudaHostRegister of {tensor.numel()} bytes: error {code}")
    try:
        yield
    finally:
        torch.cuda.synchronize()
        runtime.cudaHostUnregister(tensor.data_ptr())


def registration() -> dict[str, Any]:
    """Milliseconds per MiB of `cudaHostRegister`, for mapped memory with touched and with untouched pages."""
    found: dict[str, Any] = {}
    for mebibytes in ALLOCATED_MIB:
        row: dict[str, float] = {}
        for touched in (False, True):
            tensor = aligned_buffer(mebibytes * MEBIBYTE)
            if touched:
                tensor.fill_(1)
            began = time.perf_counter()
            with registered(tensor):
                row["touched_ms_per_mib" if touched else "fresh_ms_per_mib"] = (
                    (time.perf_counter() - began) * 1e3 / mebibytes
                )
                row["is_pinned"] = float(tensor.is_pinned())
        found[f"{mebibytes} MiB"] = row
    return found


def direct_reads(folder: Path) -> dict[str, str]:
    """Whether `O_DIRECT` reads land in pinned and in registered memory: "works", or the name of the error."""
    path = folder / "direct"
    content = os.urandom(MEBIBYTE)
    try:
        path.write_bytes(content)
        with path.open("rb") as file:
            os.fsync(file.fileno())
        mapped = aligned_buffer(MEBIBYTE)
        found = {"pageable": _read_into(path, aligned_buffer(MEBIBYTE), content)}
        found["pinned by torch"] = _read_into(path, pinned(MEBIBYTE), content)
        with registered(mapped):
            found["registered"] = _read_into(path, mapped, content)
        return found
    finally:
        path.unlink(missing_ok=True)


def _read_into(path: Path, tensor: torch.Tensor, content: bytes) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            got = os.preadv(descriptor, [as_memoryview(tensor)], 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))
    if got != len(content):
        return f"only {got} of {len(content)} bytes"
    return "works" if bytes(as_memoryview(tensor)) == content else "wrong bytes"


def copy_speeds(device: torch.device) -> dict[str, Any]:
    """Bytes per second to the device and back, with pinned and ordinary memory, and on the device."""
    found: dict[str, Any] = {}
    for mebibytes in COPIED_MIB:
        size = mebibytes * MEBIBYTE
        there, other = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
        row = {}
        for kind, host in (("pinned", pinned(size).fill_(1)), ("pageable", aligned_buffer(size).fill_(1))):
            row[f"to the device, {kind}"] = size / _seconds(lambda: there.copy_(host, non_blocking=True))  # noqa: B023
            row[f"to the host, {kind}"] = size / _seconds(lambda: host.copy_(there, non_blocking=True))  # noqa: B023
        row["on the device (read and write)"] = 2 * size / _seconds(lambda: other.copy_(there))  # noqa: B023
        found[f"{mebibytes} MiB"] = row
    return found


def _seconds(action: Callable[[], Any]) -> float:
    """Median seconds of several calls, including the wait for each."""
    action()
    torch.cuda.synchronize()
    taken = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        action()
        torch.cuda.synchronize()
        taken.append(time.perf_counter() - began)
    return median_spread(taken).median
