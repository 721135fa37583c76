"""The segments that a store keeps open, so that the next look-up opens nothing."""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from ..errors import SegmentCorruptError, SegmentMissingError, SegmentReadError
from .backend import SegmentBackend
from .rows import SegmentRow
from .segment import Segment, SegmentOpener

# So many stay open, however large what is kept of them is; more as long as all that is kept of them is small. (A chat
# of two thousand turns is a chain of two thousand segments, and every turn needs all of them.)
_ALWAYS_OPEN = 128
_MAX_KEPT_BYTES = 128 * 2**20
_TENSOR_BYTES = 400


class OpenSegments:
    """A bounded table of open segments by key. One that is pushed out stays open as long as it is used.

    What is kept of a segment is its parsed header, its token ids and its checksums: they bound the table.

    Args:
        backend: where they lie.
        opener: opens what is in a blob.
        on_forget: told the keys of segments that have been removed.
    """

    def __init__(
        self,
        backend: SegmentBackend,
        opener: SegmentOpener,
        on_forget: Callable[[Sequence[str]], None] | None = None,
    ) -> None:
        self._backend = backend
        self._opener = opener
        self._on_forget = on_forget
        self._recent: OrderedDict[str, Segment] = OrderedDict()
        self._kept_bytes = 0
        self._all: weakref.WeakSet[Segment] = weakref.WeakSet()
        self._lock = threading.Lock()

    def get(self, row: SegmentRow) -> Segment:
        """The open segment of `row`.

        Raises:
            SegmentMissingError: it is gone.
            SegmentCorruptError: it was cut, or is another segment.
            SegmentReadError: the storage failed.
        """
        # An open segment that was deleted or replaced since is no longer what the store holds.
        identity = None
        try:
            identity = self._backend.identity(row.key)
            if identity is None:
                raise SegmentMissingError(f"segment {row.key} is gone from {self._backend.name}")
            with self._lock:
                known = self._recent.get(row.key)
                if known is not None and known.identity == identity:
                    self._recent.move_to_end(row.key)
                    return known
            if known is not None:
                self.forget([row.key])  # Something else lies there now: what memory holds of it may be of no use.
            segment = self._opener(self._backend.open(row.key))
            if segment.key != row.key:
                raise SegmentCorruptError(f"{segment.name}: holds segment {segment.key}, expected {row.key}", segment)
        except (SegmentCorruptError, SegmentReadError) as error:
            error.identity = identity
            raise
        except OSError as error:
            text = f"segment {row.key} of {self._backend.name}: {error.strerror or error}"
            failure = SegmentReadError(text, None, error.errno)
            failure.identity = identity
            raise failure from error
        except MemoryError as error:
            failure = SegmentReadError(f"segment {row.key} of {self._backend.name}: there is no memory to open it")
            failure.identity = identity
            raise failure from error
        self.adopt(segment)
        return segment

    def adopt(self, segment: Segment) -> None:
        """Keep a segment that was opened elsewhere, so that the look-up that follows opens nothing."""
        with self._lock:
            self._keep(segment)

    def _keep(self, segment: Segment) -> None:
        self._drop(segment.key)
        self._recent[segment.key] = segment
        self._kept_bytes += kept_bytes(segment)
        self._all.add(segment)
        while len(self._recent) > _ALWAYS_OPEN and self._kept_bytes > _MAX_KEPT_BYTES:
            self._drop(next(iter(self._recent)))

    def _drop(self, key: str) -> None:
        segment = self._recent.pop(key, None)
        if segment is not None:
            self._kept_bytes -= kept_bytes(segment)

    def forget(self, keys: Iterable[str]) -> None:
        """Drop segments that have been removed; caches that have them open keep them, and nobody else."""
        gone = list(keys)
        names = set(gone)
        with self._lock:
            for key in gone:
                self._drop(key)
            for segment in [segment for segment in self._all if segment.key in names]:
                segment.retired = True
        if self._on_forget is not None and gone:
            self._on_forget(gone)

    def close(self) -> None:
        """Close all segments, those in use as well."""
        with self._lock:
            self._recent.clear()
            self._kept_bytes = 0
            for segment in list(self._all):
                segment.close()


def kept_bytes(segment: Segment) -> int:
    """About what an open segment keeps in memory, or may once it has been used, in bytes."""
    header = segment.header
    checksums = 16 * header.num_chunks * header.geometry.num_layers
    return 4096 + _TENSOR_BYTES * len(header.places) + 8 * header.num_tokens + checksums
