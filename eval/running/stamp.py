"""What a run records of machine, checkout and disk, so that only equal runs are continued and compared."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from hf_contiguouskv.hardware.aligned_memory import aligned_buffer, as_memoryview

from ..timing import machine

CHANGED = "+changes"
# Instruction sets that change times or rounding, by their names in /proc/cpuinfo.
_TOLD = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8")
_TOLD_ON_ARM = ("asimd", "asimddp", "sve", "sve2", "bf16", "i8mm", "svebf16", "svei8mm")
_PROBE_BYTES, _PROBE_THREADS, _PROBE_PIECE = 2**28, 8, 2**21
# The probe stops writing, and stops reading, after this many seconds each.
_PROBE_SECONDS = 0.8


def stamp() -> dict[str, Any]:
    """The facts of `eval.timing.machine`, with `instruction_sets` and `commit`."""
    return machine() | {"instruction_sets": instruction_sets(), "commit": commit()}


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The processor's instruction sets that matter to matrix products, in a fixed order; `neon` is any Arm's."""
    try:
        text = cpuinfo.read_text()
    except OSError:
        text = ""
    flags: set[str] = set()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            flags.update(value.split())
            break
    found = [name for name in _TOLD if name in flags]
    if platform.machine() in ("aarch64", "arm64") or "asimd" in flags:
        found += ["neon", *(name for name in _TOLD_ON_ARM[1:] if name in flags)]
    return found


def commit(package: Path = Path(__file__).parents[1]) -> str | None:
    """The git revision of the checkout that holds `package`, with "+changes" if its code differs from the revision.

    Returns:
        `None` for an installed package, or without git. (A checkout that only surrounds the package does not count.)
    """
    root = package.parent
    found = _git(root, "rev-parse", "--show-toplevel", "HEAD")
    if found is None:
        return None
    top, _, revision = found.partition("\n")
    if Path(top).resolve() != root.resolve():
        return None
    code = [name for name in (package.name, "hf_contiguouskv") if (root / name).exists()]
    changes = _git(root, "status", "--porcelain", "--", *code)
    return f"{revision}{CHANGED}" if changes else revision


def same_commit(one: str | None, other: str | None) -> bool:
    """Whether two commits are the same revision, whatever was changed in their folders."""
    return (one or "").removesuffix(CHANGED) == (other or "").removesuffix(CHANGED)


def _git(root: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def probe_disk(folder: Path, size: int = _PROBE_BYTES) -> float | None:
    """GB/s (1e9 bytes) of direct sequential reads in 8 threads from a file that is written to `folder` first.

    It takes less than two seconds: on a slow disk the file is smaller, or is not read to its end.

    Returns:
        `None` where files cannot be read directly.
    """
    path = folder / f".disk-probe-{os.getpid()}"
    try:
        written = _write(path, size)
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
        try:
            return _read(descriptor, written)
        finally:
            os.close(descriptor)
    except OSError:
        return None
    finally:
        path.unlink(missing_ok=True)


def _write(path: Path, size: int) -> int:
    """Write a file directly, as long as there is time; its size in bytes."""
    piece = as_memoryview(aligned_buffer(_PROBE_PIECE))
    piece[:] = np.random.default_rng(0).bytes(_PROBE_PIECE)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o600)
    try:
        until, written = time.perf_counter() + _PROBE_SECONDS, 0
        while written < size and (not written or time.perf_counter() < until):
            written += os.write(descriptor, piece)
        return written
    finally:
        os.close(descriptor)


def _read(descriptor: int, size: int) -> float:
    offsets = iter(range(0, size, _PROBE_PIECE))
    buffers = [as_memoryview(aligned_buffer(_PROBE_PIECE)) for _ in range(_PROBE_THREADS)]
    lock = threading.Lock()
    began = time.perf_counter()

    def work(buffer: memoryview) -> int:
        done = 0
        while time.perf_counter() - began < _PROBE_SECONDS:
            with lock:
                offset = next(offsets, None)
            if offset is None:
                break
            done += os.preadv(descriptor, [buffer], offset)
        return done

    with ThreadPoolExecutor(_PROBE_THREADS) as pool:
        read = sum(pool.map(work, buffers))
    return round(read / (time.perf_counter() - began) / 1e9, 3)
