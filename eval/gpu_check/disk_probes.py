"""The speed of the disk, read as the library reads it: with `O_DIRECT`, by several threads of one process."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hf_contiguouskv.hardware.aligned_memory import aligned_buffer, as_memoryview

from ..timing import drop_page_cache

SIZES = (2**14, 2**17, 2**20)
THREADS = (1, 8, 16)
# Each combination reads for this many seconds, or until everything was read once.
SECONDS_EACH = 0.4
_PIECE = 2**23


def read_speeds(folder: Path, file_bytes: int, write_limit_s: float = 4.0) -> dict[str, Any]:
    """Bytes per second of writing a file, and of reading it in pieces of several sizes with several threads.

    Args:
        folder: folder for the temporary file.
        file_bytes: size of the file.
        write_limit_s: limit on writing in seconds, so that a slow disk gets a smaller file.
    """
    path = folder / "speed"
    try:
        found: dict[str, Any] = write(path, file_bytes, write_limit_s)
        drop_page_cache([path])
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        except OSError as error:
            return found | {"direct": errno.errorcode.get(error.errno or 0, str(error))}
        try:
            reads = [
                {"bytes": size, "threads": threads} | read_for(descriptor, found["file_bytes"], size, threads)
                for size in SIZES
                for threads in THREADS
            ]
        finally:
            os.close(descriptor)
        return found | {"direct": True, "reads": reads}
    finally:
        path.unlink(missing_ok=True)


def write(path: Path, file_bytes: int, limit_s: float) -> dict[str, Any]:
    """Write a file of incompressible bytes, and sync it to the disk."""
    piece = np.random.default_rng(0).bytes(min(_PIECE, file_bytes))
    began, written = time.perf_counter(), 0
    with path.open("wb") as file:
        while written < file_bytes and time.perf_counter() - began < limit_s:
            written += file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - began
    return {"file_bytes": written, "write_s": seconds, "write_bytes_per_s": written / seconds}


def read_for(
    descriptor: int, file_bytes: int, size: int, threads: int, seconds: float = SECONDS_EACH
) -> dict[str, Any]:
    """Read pieces in random order, each once, until time is over.

    Returns:
        `bytes_per_s`, `reads_per_s`, `read_us` (time of one read on its thread).
    """
    offsets = [number * size for number in range(file_bytes // size)]
    random.Random(0).shuffle(offsets)
    buffers = [as_memoryview(aligned_buffer(size)) for _ in range(threads)]
    taken = iter(offsets)
    lock = threading.Lock()
    counts = [0] * threads
    until = time.perf_counter() + seconds

    def work(number: int) -> None:
        while time.perf_counter() < until:
            with lock:
                some = [offset for _, offset in zip(range(4), taken, strict=False)]
            if not some:
                return
            for offset in some:
                if os.preadv(descriptor, [buffers[number]], offset) != size:
                    raise OSError(f"a read of {size} bytes at {offset} came back short")
                counts[number] += 1

    began = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, number) for number in range(threads)]:
            done.result()
    spent = time.perf_counter() - began
    reads = sum(counts)
    return {
        "bytes_per_s": reads * size / spent,
        "reads_per_s": reads / spent,
        "read_us": spent * threads / max(reads, 1) * 1e6,
    }
