"""Tools for honest measurements: timers, cold files, interleaved orders, medians with a spread, machine facts."""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from hf_contiguouskv.hardware.aligned_memory import aligned_buffer
from hf_contiguouskv.model.transformers_internals import cache_argument

T = TypeVar("T")


def synchronize(device: torch.device | str = "cpu") -> None:
    """Wait for a CUDA device to finish its queued work; do nothing for other devices."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def time_to_first_token(
    model: Any, input_ids: torch.Tensor, make_cache: Callable[[], Any], **generate_arguments: Any
) -> tuple[float, int, Any]:
    """Time one request from token ids in hand to its first new token id on the host.

    `make_cache` runs inside the timer, so prefix look-up, opening files and reads count too.

    Args:
        model: a transformers causal language model.
        input_ids: the whole prompt, int64 `[1, tokens]`, on the host.
        make_cache: makes the cache of this request; it may return `None` for no cache.
        generate_arguments: more arguments for `generate`.

    Returns:
        `(seconds, first_token_id, cache)`. The cache holds the prompt, so that the caller can continue from it.
    """
    synchronize(model.device)
    start = time.perf_counter()
    cache = make_cache()
    output = model.generate(
        input_ids.to(model.device),
        **({cache_argument(): cache, "max_new_tokens": 1, "do_sample": False} | generate_arguments),
    )
    first = int(output[0, input_ids.shape[1]])  # waits for the device and copies to the host
    return time.perf_counter() - start, first, cache


def ready_memory(nbytes: int) -> None:
    """Have the system hold so much free memory that is really there.

    A virtual machine may give free memory back to its host (free page reporting: Firecracker, some clouds). The next
    use of such a page waits for the host: 3 s per GiB where this was measured, against 0.3 s for pages that are there.
    A request that maps new memory then takes up to three times as long, by what the machine has freed before. Nothing
    of a request is prepared by this: its page faults and its clearing of pages remain, as on a bare machine.

    Args:
        nbytes: written to and freed at once; no more than half of the memory that is free, so that nothing has to go.
    """
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    nbytes = min(nbytes, free // 2)
    if nbytes > 0:
        aligned_buffer(nbytes).fill_(1)


def bytes_to_ready(prefix_bytes: int) -> int:
    """Memory to make ready before a request: more than it maps, which is K and V, a copy of them, and activations.

    Args:
        prefix_bytes: K and V of the prefix.
    """
    return 2**24 + 3 * prefix_bytes


def drop_page_cache(paths: Iterable[Path | str]) -> None:
    """Ask the system to drop the cached pages of these files; dirty pages are written first.

    The system may ignore this, so verify with `resident_pages`.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def resident_pages(path: Path | str) -> int:
    """Number of a file's pages in the operating system's page cache, by `mincore(2)`.

    Raises:
        OSError: the file cannot be opened or mapped.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        size = os.fstat(descriptor).st_size
        if size == 0:
            return 0
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        libc.mmap.argtypes = [
            ctypes.c_void_p,
            ctypes.c_size_t,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int,
            ctypes.c_int64,
        ]
        libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
        libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
        # `mmap.mmap` does not reveal the address of a read-only map, so call the system directly.
        address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
        if address == ctypes.c_void_p(-1).value:
            raise OSError(ctypes.get_errno(), f"cannot map {path}")
        try:
            pages = (size + mmap.PAGESIZE - 1) // mmap.PAGESIZE
            states = (ctypes.c_ubyte * pages)()
            if libc.mincore(address, size, states):
                raise OSError(ctypes.get_errno(), f"mincore failed for {path}")
            return int(np.count_nonzero(np.ctypeslib.as_array(states) & 1))
        finally:
            libc.munmap(address, size)
    finally:
        os.close(descriptor)


def storage_bytes_read() -> int:
    """Bytes that the kernel has read from storage for this process (`/proc/self/io`)."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("read_bytes:")).split()[1])


def machine() -> dict[str, Any]:
    """The measuring machine: processor, cores, memory (GiB), accelerator, and versions of relevant software."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torch_threads": torch.get_num_threads(),
        "transformers": metadata.version("transformers"),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


@dataclass(frozen=True)
class Spread:
    """A median and the spread of its values.

    Attributes:
        median: the middle value (or the mean of the two middle values).
        low: the first quartile, or the smallest of fewer than four values.
        high: the third quartile, or the largest of fewer than four values.
        count: number of values.
    """

    median: float
    low: float
    high: float
    count: int

    def as_dict(self) -> dict[str, float]:
        """The fields, ready for JSON."""
        return asdict(self)


def median_spread(values: Iterable[float]) -> Spread:
    """Median with quartiles, or with the extremes of fewer than four values.

    Raises:
        ValueError: there are no values.
    """
    ordered = sorted(values)
    if not ordered:
        raise ValueError("median_spread needs at least one value, got none")
    if len(ordered) < 4:
        low, high = ordered[0], ordered[-1]
    else:
        low, _, high = statistics.quantiles(ordered, n=4, method="inclusive")
    return Spread(statistics.median(ordered), low, high, len(ordered))


def interleave(systems: Sequence[T], rounds: int, seed: int = 0) -> Iterator[tuple[int, T]]:
    """Every system once per round, in a new random order each round: `(round, system)`.

    Slow drifts of the machine (clock, neighbours) then affect all systems equally instead of the one that ran last.
    """
    chance = random.Random(seed)
    for number in range(rounds):
        yield from ((number, system) for system in chance.sample(list(systems), len(systems)))
