"""The segment files that a store keeps open, so that the next look-up opens nothing."""

from __future__ import annotations

import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

from ..errors import SegmentCorruptError
from .index import SegmentRow
from .segment import Segment

_MAX_OPEN = 128


class OpenSegments:
    """A bounded table of open segments by key. One that is pushed out stays open as long as somebody uses it.

    Args:
        folder: of the store.
        direct: open files for direct reads as well, where the file system can.
    """

    def __init__(self, folder: Path, *, direct: bool) -> None:
        self._folder = folder
        self._direct = direct
        self._recent: OrderedDict[str, Segment] = OrderedDict()
        self._all: weakref.WeakSet[Segment] = weakref.WeakSet()
        self._lock = threading.Lock()

    def get(self, row: SegmentRow) -> Segment:
        """The open file of `row`.

        Raises:
            FileNotFoundError: it is gone.
            SegmentCorruptError: it was cut, or is not this segment.
        """
        path = self._folder / row.file
        # An open file that was deleted or cut since is no longer what the store holds.
        status = os.stat(path)
        with self._lock:
            segment = self._recent.get(row.key)
            if segment is not None and (segment.inode, segment.file_bytes) == (status.st_ino, status.st_size):
                self._recent.move_to_end(row.key)
                return segment
        segment = Segment(path, direct=self._direct)
        if segment.key != row.key or segment.header.fingerprint != row.fingerprint:
            raise SegmentCorruptError(f"{path}: holds segment {segment.key}, expected {row.key}")
        with self._lock:
            self._recent[row.key] = segment
            self._recent.move_to_end(row.key)
            self._all.add(segment)
            while len(self._recent) > _MAX_OPEN:
                self._recent.popitem(last=False)
        return segment

    def forget(self, keys: Iterable[str]) -> None:
        """Drop segments whose files have been removed."""
        with self._lock:
            for key in keys:
                self._recent.pop(key, None)

    def close(self) -> None:
        """Close all files, those in use as well."""
        with self._lock:
            self._recent.clear()
            for segment in list(self._all):
                segment.close()
