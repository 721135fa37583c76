"""Writing one segment while the model still computes: a queue, a thread, and an atomic publish at the end."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import threading
import weakref
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import xxhash

from ..errors import InputError, StoreError, StoreFullError
from .format import SegmentHeader
from .hashing import TokenIds
from .reader import as_memoryview

if TYPE_CHECKING:
    from .entries import StoredPrefix

KVSource = torch.Tensor | Callable[[], torch.Tensor]
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


class _Output:
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
        whole = [self._digest(name) for name in self.header.index_names]
        self.write(self.start("checksums.payload"), memoryview(self.checksums.tobytes()))
        self.write(self.start("checksums.index"), memoryview(np.array(whole, dtype="<u8").tobytes()))
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


class _Jobs:
    """A queue of writes whose waiting bytes are bounded, and the first error of the thread that serves it."""

    def __init__(self, max_bytes: int) -> None:
        self.changed = threading.Condition()
        self.waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self.bytes_waiting = 0
        self.max_bytes = max_bytes
        self.ended = False
        self.error: BaseException | None = None

    def put(self, nbytes: int, job: Callable[[], None]) -> None:
        with self.changed:
            # One job that is larger than the bound is let in alone.
            self.changed.wait_for(
                lambda: not self.bytes_waiting or self.bytes_waiting + nbytes <= self.max_bytes or self.ended
            )
            if self.ended:
                raise StoreError("the segment writer is closed")
            self.waiting.append((nbytes, job))
            self.bytes_waiting += nbytes
            self.changed.notify_all()

    def end(self, *, drop: bool = False) -> None:
        with self.changed:
            self.ended = True
            if drop:
                self.waiting.clear()
            self.changed.notify_all()

    def serve(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: bool(self.waiting) or self.ended)
                if not self.waiting:
                    return
                nbytes, job = self.waiting.popleft()
            try:
                if self.error is None:
                    job()
            except BaseException as error:
                self.error = error
            finally:
                del job
                with self.changed:
                    self.bytes_waiting -= nbytes
                    self.changed.notify_all()


class SegmentWriter:
    """Writes one segment in the background; made by `PrefixStore.begin_segment`.

    Chunks and layers may come in any order. The first error of the background thread is raised by `commit`; until
    `commit` returns, no reader sees anything. A writer that is dropped, or left by an exception when it is used as a
    context manager, removes its partial file.

    Attributes:
        header: what the file will say about itself.
    """

    def __init__(
        self,
        header: SegmentHeader,
        token_ids: TokenIds,
        folder: Path,
        publish: Callable[[SegmentHeader, TokenIds, Path, int], StoredPrefix],
        *,
        max_queued_bytes: int = 256 * 2**20,
        drop_cached: bool = False,
    ) -> None:
        self.header = header
        self._token_ids = token_ids
        self._publish = publish
        self._drop_cached = drop_cached
        try:
            self._output = _Output(header, token_ids, folder)
        except OSError as error:
            raise _as_store_error(error, header.key) from error
        self._jobs = _Jobs(max_queued_bytes)
        self._thread = threading.Thread(
            target=self._jobs.serve, name=f"contiguouskv-write-{header.key[:8]}", daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, _abandon, self._jobs, self._thread, self._output)

    @property
    def nbytes(self) -> int:
        """Bytes of the finished file."""
        return self._output.nbytes

    def write_chunks(self, layer: int, first: int, kv: KVSource) -> None:
        """Queue K and V of consecutive chunks of one layer; waits while too many bytes are queued.

        Args:
            layer: 0 to `num_layers - 1`.
            first: position of the first of these chunks in the segment.
            kv: `[chunks, 2, kv_heads, c, head_dim]`, contiguous, on the CPU, in the dtype of the geometry; must not be
                changed until `commit`. Or a callable that returns it, called on the writer thread. In a partial last
                chunk, what lies past the last token is written as zeros.

        Raises:
            InputError: wrong layer, position, shape, dtype or device (for a callable: raised by `commit`).
            StoreError: the writer was committed or aborted.
        """
        output, check = self._output, self._check_chunks
        if not 0 <= layer < self.header.geometry.num_layers:
            raise InputError(f"layer must be from 0 to {self.header.geometry.num_layers - 1}, got {layer}")
        if isinstance(kv, torch.Tensor):
            check(self.header, first, kv)
            tensor = kv.detach()
            self._jobs.put(tensor.nbytes, lambda: output.write_chunks(layer, first, tensor))
            return
        source, header = kv, self.header

        def compute_and_write() -> None:
            result = source()
            check(header, first, result)
            output.write_chunks(layer, first, result.detach())

        self._jobs.put(0, compute_and_write)

    def write_index(self, layer: int, index: torch.Tensor, scale: torch.Tensor) -> None:
        """Queue the key index of one layer.

        Args:
            layer: one of the geometry's `indexed_layers`.
            index: int8 `[kv_heads, c, chunks, head_dim]` of all chunks of the segment, on the CPU.
            scale: float32 `[kv_heads, head_dim]`, on the CPU.

        Raises:
            InputError: wrong layer, shape, dtype or device.
        """
        if layer not in self.header.geometry.indexed_layers:
            raise InputError(f"layer {layer} has no key index in this geometry")
        for name, tensor, dtype in (("key_index", index, torch.int8), ("key_scale", scale, torch.float32)):
            shape = self.header.places[f"{name}.{layer}"].shape
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device.type != "cpu":
                raise InputError(
                    f"{name}: expected {dtype} {list(shape)} on the CPU, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )
        output = self._output
        self._jobs.put(index.nbytes + scale.nbytes, lambda: output.write_index(layer, index.detach(), scale.detach()))

    def commit(self) -> StoredPrefix:
        """Wait for the queue, make the file durable and publish it.

        Returns:
            the whole prefix that ends with this segment. If somebody else has published the same one meanwhile,
            theirs is kept and returned.

        Raises:
            StoreFullError: it does not fit in `max_disk_bytes`, or the disk is full.
            StoreError: incomplete, already committed or aborted, or its parent was deleted meanwhile.
        """
        if not self._finalizer.alive:
            raise StoreError("the segment writer was committed or aborted before")
        self._jobs.end()
        self._thread.join()
        try:
            if self._jobs.error is not None:
                raise self._jobs.error
            self._output.finish()
            stored = self._publish(self.header, self._token_ids, self._output.path, self._output.nbytes)
        except OSError as error:
            self.abort()
            if isinstance(error, StoreError):
                raise
            raise _as_store_error(error, self.header.key) from error
        except BaseException:
            self.abort()
            raise
        self._finalizer.detach()
        self._output.close(drop_cached=self._drop_cached)
        return stored

    def abort(self) -> None:
        """Stop, and remove the partial file. Does nothing after `commit` or another `abort`."""
        self._finalizer()

    @staticmethod
    def _check_chunks(header: SegmentHeader, first: int, kv: torch.Tensor) -> None:
        g = header.geometry
        shape = (2, g.kv_heads, g.chunk_size, g.head_dim)
        if kv.ndim != 5 or tuple(kv.shape[1:]) != shape or kv.dtype != g.dtype:
            raise InputError(
                f"chunks: expected {g.dtype} [chunks, 2, {g.kv_heads}, {g.chunk_size}, {g.head_dim}], "
                f"got {kv.dtype} {list(kv.shape)}"
            )
        if kv.device.type != "cpu" or not kv.is_contiguous():
            raise InputError(f"chunks: expected a contiguous CPU tensor, got {kv.device}, strides {kv.stride()}")
        if not 0 <= first <= first + kv.shape[0] <= header.num_chunks:
            raise InputError(f"chunks {first} to {first + kv.shape[0]} are outside a segment of {header.num_chunks}")

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()


def _abandon(jobs: _Jobs, thread: threading.Thread, output: _Output) -> None:
    jobs.end(drop=True)
    if thread is not threading.current_thread():
        thread.join()
    output.discard()


def _reserve(fd: int, nbytes: int) -> None:
    """Take the space now, so that a full disk shows before the model has computed anything."""
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        if error.errno in _FULL:
            raise
        os.ftruncate(fd, nbytes)


def _as_store_error(error: OSError, key: str) -> StoreError:
    if error.errno in _FULL:
        return StoreFullError(error.errno, f"segment {key}: {error.strerror}; free space or delete stored prefixes")
    return StoreError(f"segment {key} could not be written: {error}")
