"""Page-aligned memory that direct reads can land in, and the bytes of a tensor as a `memoryview`."""

from __future__ import annotations

import contextlib
import mmap

import torch

from ..errors import InputError

PAGE = 4096
# Request huge pages from this size. A mapping may be smaller than a huge page, because Linux merges neighbouring
# mappings: the key indexes of a cold prefix then take a fiftieth of the page faults (8 instead of 20 ms for 47 MB).
_HUGE = 2**18


def aligned_buffer(nbytes: int) -> torch.Tensor:
    """A page-aligned uint8 tensor `[nbytes]` on the CPU, so that direct reads can land in it without a copy."""
    mapping = mmap.mmap(-1, max(PAGE, -(-nbytes // PAGE) * PAGE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if nbytes >= _HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        # Only a hint: kernels built without huge pages refuse it.
        with contextlib.suppress(OSError):
            mapping.madvise(mmap.MADV_HUGEPAGE)
    # An ordinary tensor even in inference mode: other threads, and requests outside inference mode, write to it.
    with torch.inference_mode(False):
        return torch.frombuffer(mapping, dtype=torch.uint8)[:nbytes]


def as_memoryview(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor of any dtype, writable, without a copy.

    Raises:
        InputError: the tensor is not contiguous, or not on the CPU.
    """
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise InputError(f"expected a contiguous CPU tensor, got {tensor.device}, strides {tensor.stride()}")
    return memoryview(tensor.detach().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
