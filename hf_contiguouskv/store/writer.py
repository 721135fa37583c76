"""Writing one segment while the model still computes: a queue, a thread, and an atomic publish at the end."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from ..errors import InputError, StoreClosedError, StoreError
from .backend import BlobWriter, SegmentBackend
from .format import SegmentHeader
from .hashing import TokenIds
from .key import StoreKey
from .output import SegmentOutput, as_store_error
from .small_forms import small_forms
from .tensor_places import TORCH_DTYPES, index_tensors

if TYPE_CHECKING:
    from .entries import StoredPrefix


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
                raise StoreClosedError("the segment writer is closed")
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
    """Writes one segment in the background; made by `StoreInner.begin_segment`.

    Chunks and layers may come in any order. The first error of the background thread is raised by `commit`; until
    `commit` returns, no reader sees anything. A writer that is dropped, or left by an exception when it is used as a
    context manager, gives its blob up.

    Args:
        header: what the segment will say about itself.
        token_ids: int64 `[num_tokens]`.
        backend: where it goes.
        key: of the store, if it has one.
        publish: called by `commit` with the final header, the token ids and the sealed blob.
        max_queued_bytes: chunks that wait to be written; `write_chunks` waits while there are more.

    Raises:
        StoreFullError: the storage is full.
        StoreError: it refuses for another reason.
    """

    def __init__(
        self,
        header: SegmentHeader,
        token_ids: TokenIds,
        backend: SegmentBackend,
        key: StoreKey | None,
        publish: Callable[[SegmentHeader, TokenIds, BlobWriter], StoredPrefix],
        *,
        max_queued_bytes: int = 256 * 2**20,
    ) -> None:
        self.header = header
        self._token_ids = token_ids
        self._publish = publish
        try:
            self._output = SegmentOutput(header, token_ids, backend.create(header.key, header.nbytes), key)
        except OSError as error:
            raise as_store_error(error, header.key) from error
        self._jobs = _Jobs(max_queued_bytes)
        self._thread = threading.Thread(
            target=self._jobs.serve, name=f"contiguouskv-write-{header.key[:8]}", daemon=True
        )
        self._thread.start()
        self._finalizer = weakref.finalize(self, _abandon, self._jobs, self._thread, self._output)

    @property
    def nbytes(self) -> int:
        """Bytes of the finished segment."""
        return self.header.nbytes

    def write_chunks(
        self,
        layer: int,
        first: int,
        kv: torch.Tensor,
        *,
        small: torch.Tensor | None = None,
        ready: Callable[[], None] | None = None,
    ) -> None:
        """Queue K and V of consecutive chunks of one layer; waits while too many bytes are queued.

        Args:
            layer: 0 to `num_layers - 1`.
            first: position of the first of these chunks in the segment.
            kv: `[chunks, 2, kv_heads, c, head_dim]`, contiguous, on the CPU, in the dtype of the geometry; must not be
                changed until `commit`. In a partial last chunk, what lies past the last token is written as zeros.
            small: the same as `packing.pack_chunks` makes it in the layer's form in few bits, uint8 `[chunks, nbytes]`,
                on the CPU, where that is known already (of a partial last chunk: with those zeros).
            ready: called on the writer thread before it looks at these tensors; returns once they are there.

        Raises:
            InputError: wrong layer, position, shape, dtype or device.
            StoreError: the writer was committed or aborted.
        """
        output, geometry = self._output, self.header.geometry
        if not 0 <= layer < geometry.num_layers:
            raise InputError(f"layer must be from 0 to {geometry.num_layers - 1}, got {layer}")
        self._check_chunks(first, kv)
        tensor = kv.detach()
        if small is not None:
            nbytes = next((one.nbytes for one in small_forms(geometry) if layer in one.layers), 0)
            if small.shape != (len(tensor), nbytes) or small.dtype != torch.uint8:
                raise InputError(f"chunks in few bits: expected uint8 [{len(tensor)}, {nbytes}]")

        def write() -> None:
            if ready is not None:
                ready()
            output.write_chunks(layer, first, tensor, small)

        self._jobs.put(tensor.nbytes + (0 if small is None else small.nbytes), write)

    def write_index(self, layer: int, *tensors: torch.Tensor, ready: Callable[[], None] | None = None) -> None:
        """Queue the key index of one layer.

        Args:
            layer: one that has an index in the geometry.
            tensors: of all chunks of the segment, as `layer_index` makes them, on the CPU.
            ready: called on the writer thread before it looks at these tensors; returns once they are there.

        Raises:
            InputError: wrong layer, shape, dtype or device.
        """
        names = index_tensors(self.header.geometry, layer)
        if len(names) != len(tensors):
            raise InputError(
                f"layer {layer} has {len(names)} tensors of a key index in this geometry, not {len(tensors)}"
            )
        for name, tensor in zip(names, tensors, strict=True):
            place = self.header.places[name]
            dtype = TORCH_DTYPES[place.dtype]
            if tuple(tensor.shape) != place.shape or tensor.dtype != dtype or tensor.device.type != "cpu":
                raise InputError(
                    f"{name}: expected {dtype} {list(place.shape)} on the CPU, "
                    f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
                )
        output = self._output

        def write() -> None:
            if ready is not None:
                ready()
            output.write_index(layer, [tensor.detach() for tensor in tensors])

        self._jobs.put(sum(tensor.nbytes for tensor in tensors), write)

    def commit(self, compute_s: float = 0.0) -> StoredPrefix:
        """Wait for the queue, make the segment durable and publish it.

        Args:
            compute_s: how long the model took to compute it, seconds: what losing it would cost. 0 is unknown.

        Returns:
            the whole prefix that ends with this segment. If another writer has published the same one meanwhile,
            that one is kept and returned.

        Raises:
            StoreFullError: it does not fit in `max_disk_bytes`, or the disk is full.
            StoreError: incomplete, already committed or aborted, or its parent was deleted meanwhile.
        """
        if not self._finalizer.alive:
            raise StoreClosedError("the segment writer was committed or aborted before")
        self._jobs.end()
        self._thread.join()
        try:
            if self._jobs.error is not None:
                raise self._jobs.error
            self._output.finish(compute_s)
            stored = self._publish(self._output.header, self._token_ids, self._output.blob)
        except OSError as error:
            self.abort()
            if isinstance(error, StoreError):
                raise
            raise as_store_error(error, self.header.key) from error
        except BaseException:
            self.abort()
            raise
        self._finalizer.detach()
        self._output.blob.discard()  # Closes it; where another writer was faster, its blob stays.
        return stored

    def abort(self) -> None:
        """Stop, and give the blob up. Does nothing after `commit` or another `abort`."""
        self._finalizer()

    def _check_chunks(self, first: int, kv: torch.Tensor) -> None:
        g, chunks = self.header.geometry, self.header.num_chunks
        shape = (2, g.kv_heads, g.chunk_size, g.head_dim)
        if kv.ndim != 5 or tuple(kv.shape[1:]) != shape or kv.dtype != g.dtype:
            raise InputError(
                f"chunks: expected {g.dtype} [chunks, 2, {g.kv_heads}, {g.chunk_size}, {g.head_dim}], "
                f"got {kv.dtype} {list(kv.shape)}"
            )
        if kv.device.type != "cpu" or not kv.is_contiguous():
            raise InputError(f"chunks: expected a contiguous CPU tensor, got {kv.device}, strides {kv.stride()}")
        if not 0 <= first <= first + kv.shape[0] <= chunks:
            raise InputError(f"chunks {first} to {first + kv.shape[0]} are outside a segment of {chunks}")

    def __enter__(self) -> SegmentWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.abort()


def _abandon(jobs: _Jobs, thread: threading.Thread, output: SegmentOutput) -> None:
    jobs.end(drop=True)
    if thread is not threading.current_thread():
        thread.join()
    output.blob.discard()
