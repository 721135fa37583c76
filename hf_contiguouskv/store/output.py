"""The partial file of a segment that is being written, and what has been written to it so far."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
from pathlib import Path

import numpy as np
import torch
import xxhash

from ..errors import StoreError, StoreFullError
from .format import SegmentHeader
from .hashing import TokenIds
from .pread import as_memoryview

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def open_partial(folder: Path, key: str) -> tuple[int, Path]:
    """Create a locked `*.partial` file for segment `key`.

    The lock tells `gc` that a live process writes the file; it goes with the descriptor, so a crash frees it.
    """
    while True:
        path = folder / f"{key}.{secrets.token_hex(4)}.partial"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        # Without locks on this file system, gc goes by the age of partial files.
        with contextlib.suppress(OSError):
            fcntl.flock(fd, fcntl.LOCK_EX)
        # A gc that came between the two calls above has removed the file.
        if os.fstat(fd).st_nlink:
            return fd, path
        os.close(fd)


class SegmentOutput:
    """The partial file and what has been written to it. Used by the writer thread, then by `commit`."""

    def __init__(self, header: SegmentHeader, token_ids: TokenIds, folder: Path) -> None:
        self.header = header
        geometry = header.geometry
        self.data_start = len(header.encoded)
        self.nbytes = self.data_start + header.data_bytes
        self.written = np.zeros((geometry.num_layers, header.num_chunks), dtype=bool)
        self.checksums = np.zeros((geometry.num_layers, header.num_chunks), dtype="<u8")
        self.indexed: set[int] = set()
        self.fd, self.path = open_partial(folder, header.key)
        try:
            _reserve(self.fd, self.nbytes)
            self.write(0, memoryview(header.encoded))
            self.write(self.start("token_ids"), memoryview(token_ids.tobytes()))
        except BaseException:
            self.discard()
            raise

    def start(self, name: str) -> int:
        return self.data_start + self.header.places[name].start

    def write(self, offset: int, octets: memoryview) -> None:
        done = 0
        while done < octets.nbytes:
            done += os.pwrite(self.fd, octets[done:], offset + done)

    def write_chunks(self, layer: int, first: int, kv: torch.Tensor) -> None:
        """Write `kv` `[chunks, 2, kv_heads, c, head_dim]` and its checksums; what is past the last token becomes 0."""
        geometry, header = self.header.geometry, self.header
        chunks = kv.shape[0]
        valid = header.num_tokens - (header.num_chunks - 1) * geometry.chunk_size
        if valid < geometry.chunk_size and first + chunks == header.num_chunks:
            tail = kv[-1:].clone()
            tail[:, :, :, valid:] = 0
            if chunks > 1:
                self._write_extents(layer, first, kv[:-1])
            self._write_extents(layer, first + chunks - 1, tail)
        else:
            self._write_extents(layer, first, kv)

    def _write_extents(self, layer: int, first: int, kv: torch.Tensor) -> None:
        geometry = self.header.geometry
        extent, chunks = geometry.extent_bytes, kv.shape[0]
        octets = as_memoryview(kv)
        for i in range(chunks):
            self.checksums[layer, first + i] = xxhash.xxh3_64_intdigest(octets[i * extent : (i + 1) * extent])
        group, inside = divmod(layer, geometry.layers_per_group)
        stride = geometry.group_layers(group) * extent
        start = self.start(f"payload.{group}") + first * stride + inside * extent
        if stride == extent:
            self.write(start, octets)
        else:
            for i in range(chunks):
                self.write(start + i * stride, octets[i * extent : (i + 1) * extent])
        if layer in geometry.leader_layers:
            keys = kv[:, 0].contiguous()
            self.write(self.start(f"leader_keys.{layer}") + first * geometry.keys_bytes, as_memoryview(keys))
        self.written[layer, first : first + chunks] = True

    def write_index(self, layer: int, index: torch.Tensor, scale: torch.Tensor) -> None:
        self.write(self.start(f"key_index.{layer}"), as_memoryview(index.contiguous()))
        self.write(self.start(f"key_scale.{layer}"), as_memoryview(scale.contiguous()))
        self.indexed.add(layer)

    def finish(self) -> None:
        """Write the checksums and make the file durable.

        Raises:
            StoreError: something was never written.
        """
        if not self.written.all():
            layer, chunk = np.argwhere(~self.written)[0].tolist()
            raise StoreError(
                f"{self.path.name}: segment is incomplete, {int((~self.written).sum())} extents were never written, "
                f"the first is layer {layer}, chunk {chunk} of the segment"
            )
        missing = set(self.header.geometry.indexed_layers) - self.indexed
        if missing:
            raise StoreError(f"{self.path.name}: segment is incomplete, no key index for layers {sorted(missing)}")
        whole = [self._digest(name) for name in self.header.checked_tensors]
        self.write(self.start("checksums.payload"), memoryview(self.checksums.tobytes()))
        self.write(self.start("checksums.tensors"), memoryview(np.array(whole, dtype="<u8").tobytes()))
        os.fsync(self.fd)

    def _digest(self, name: str) -> int:
        # Chunks may come in any order, so tensors that span all of them are hashed once they are complete.
        digest = xxhash.xxh3_64()
        start, left = self.start(name), self.header.places[name].nbytes
        while left:
            octets = os.pread(self.fd, min(left, 2**22), start)
            if not octets:
                raise StoreError(f"{self.path}: the file was cut while it was written")
            digest.update(octets)
            start, left = start + len(octets), left - len(octets)
        return int(digest.intdigest())

    def close(self, *, drop_cached: bool = False) -> None:
        if self.fd >= 0:
            if drop_cached and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self.fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(self.fd)
            self.fd = -1

    def discard(self) -> None:
        if self.fd >= 0:
            self.path.unlink(missing_ok=True)
            self.close()


def _reserve(fd: int, nbytes: int) -> None:
    """Take the space now, so that a full disk shows before the model has computed anything."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno in _FULL:
            raise
        os.ftruncate(fd, nbytes)


def as_store_error(error: OSError, key: str) -> StoreError:
    """What the operating system said, as one of our errors: a full disk is a full store."""
    if error.errno in _FULL:
        return StoreFullError(error.errno, f"segment {key}: {error.strerror}; free space or delete stored prefixes")
    return StoreError(f"segment {key} could not be written: {error}")
