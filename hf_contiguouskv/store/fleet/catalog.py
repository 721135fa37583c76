"""What a shared store holds: finding segments by the chunks of a prompt, and making them findable."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import secrets
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, TypeVar

from ...errors import StoreFormatError
from ..segment_row import is_key
from ..strict_json import once_each
from .computed import RESOLUTION_S, Computed, unknown
from .engine import SharedEngine
from .names import (
    MARKER,
    SHARED_FORMAT,
    SharedSegment,
    damaged_name,
    deleted_name,
    head_name,
    read_entry,
    used_name,
)
from .shared_index import index_of

logger = logging.getLogger("hf_contiguouskv")

Record = TypeVar("Record", SharedSegment, "Description")

# Heads are listed, and read, so many at once.
_LISTED, _AT_ONCE = 1000, 32
_MAX_HEAD = 64 * 1024


@dataclass(frozen=True, slots=True)
class Published:
    """What came of publishing a segment.

    Attributes:
        segment: the upload that counts.
        won: whether it is the one that was published now.
        withheld: whether it was not published because it was deleted for all machines after it was computed.
    """

    segment: SharedSegment
    won: bool
    withheld: bool = False


@dataclass(frozen=True, slots=True)
class Description:
    """What the head of a segment says of it, for those who look after the store. Nothing of it is trusted.

    Attributes:
        fingerprint: of the model.
        root: hash before the first chunk of its prefix, hex: tenants differ in it.
        parent: hash of the chunk that it continues, hex; empty where it continues nothing.
        continues: key of the segment that holds that chunk on the machine that published it.
        chunk_size: tokens per chunk.
        dtype: of K and V.
        layers: of the model.
    """

    fingerprint: str
    root: str
    parent: str
    continues: str
    chunk_size: int
    dtype: str
    layers: int


@dataclass(frozen=True, slots=True)
class Head:
    """The head of a segment.

    Attributes:
        segment: the upload that counts.
        names: its names below anchors.
        about: what it says of the segment.
    """

    segment: SharedSegment
    names: tuple[str, ...]
    about: Description


class Catalog:
    """Finds and publishes segments of one shared store.

    Args:
        engine: holds the objects.
    """

    def __init__(self, engine: SharedEngine) -> None:
        self.engine = engine
        self._index = index_of(engine)

    def prepare(self, create: bool = True) -> None:
        """Make the place a shared store, or check that it is one. A volatile engine is only asked whether it answers.

        Args:
            create: whether it may be made.

        Raises:
            StoreFormatError: it is marked as a store of another format; or it is none, and not `create`.
            OSError: the engine failed or refused.
        """
        if self.engine.is_volatile:
            # (A mark could vanish as well: such an engine has the format in every name.)
            with contextlib.suppress(FileNotFoundError):
                self.engine.get(MARKER, 4096)
            return
        mark = json.dumps({"format": SHARED_FORMAT}).encode()
        try:
            text = self.engine.get(MARKER, 4096)
        except FileNotFoundError:
            if not create:
                raise StoreFormatError(f"{self.engine.name} is not a shared store: it has no {MARKER}") from None
            if self.engine.create(MARKER, mark):
                return
            text = self.engine.get(MARKER, 4096)
        try:
            version = json.loads(text, object_pairs_hook=once_each)["format"]
        except (ValueError, KeyError, TypeError, RecursionError):
            version = None
        if version != SHARED_FORMAT:
            raise StoreFormatError(
                f"{self.engine.name}/{MARKER}: expected {mark.decode()}, found {text[:80]!r}. Use another folder, or "
                "the release of this library that wrote it."
            )

    def find(
        self,
        hashes: Sequence[bytes],
        chunk_size: int,
        have: int,
        is_of_use: Callable[[SharedSegment], bool] = lambda segment: True,
    ) -> list[SharedSegment]:
        """Segments that bring a prompt further than its first `have` whole chunks, in order.

        Args:
            hashes: of the whole chunks of the prompt.
            chunk_size: tokens per chunk.
            have: chunks that are at hand already.
            is_of_use: asked of each segment before it is taken.

        Raises:
            OSError: the engine failed.
        """
        return self._index.find(hashes, chunk_size, have, is_of_use)

    def head(self, key: str) -> Head | None:
        """Which upload of a segment counts; `None` where there is none.

        Raises:
            StoreFormatError: it makes no sense to this release.
            OSError: the engine failed.
        """
        try:
            text = self.engine.get(head_name(key), _MAX_HEAD)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno != errno.EFBIG:
                raise
            text = b""
        found = _parsed(text, key)
        if found is None:
            name = f"{self.engine.name}/{head_name(key)}"
            raise StoreFormatError(f"{name} makes no sense to this release; it is left alone")
        return found

    def holds(self, key: str) -> bool:
        """Whether a segment is there and can be read.

        Raises:
            StoreFormatError: its head makes no sense to this release.
            OSError: the engine failed.
        """
        there = self.head(key)
        return there is not None and self._is_usable(there.segment)

    def is_sound(self, segment: SharedSegment) -> bool:
        """Whether a segment can be read: this upload of it counts, nobody found it damaged, and its object is whole.

        Raises:
            OSError: the engine failed.
        """
        there = self.head(segment.key)
        return there is not None and there.segment == segment and self._is_usable(segment)

    def _is_usable(self, segment: SharedSegment) -> bool:
        return not self._is_damaged(segment) and self._is_there(segment)

    def _is_there(self, segment: SharedSegment) -> bool:
        """Whether the object of a segment is there, in its full length."""
        last = memoryview(bytearray(1))
        try:
            return self.engine.read_ranges(segment.object_name, [(segment.nbytes - 1, last)]).size == segment.nbytes
        except (FileNotFoundError, EOFError):
            return False

    def publish(
        self,
        segment: SharedSegment,
        about: Description,
        hashes: Sequence[bytes],
        path: Path,
        computed: Computed = unknown,
    ) -> Published:
        """Put a segment into the shared store unless it is there: bytes first, then its head, then its names.

        A machine that dies in between leaves nothing that is found and not whole.

        Args:
            segment: what is published; its upload is chosen here.
            about: what its head says of it.
            hashes: of the whole chunks of its prefix, up to its end at least.
            path: of its file.
            computed: when it was computed; it is asked if the segment was deleted for all machines.

        Raises:
            OSError: the engine failed, or the file cannot be read.
        """
        lost, chunk_size = None, about.chunk_size
        if self._is_withheld(segment.key, computed):
            return Published(segment, False, withheld=True)
        there = self.head(segment.key)
        if there is not None:
            fits = there.segment.first_chunk < there.segment.end_chunk(chunk_size) == len(hashes)
            if fits and self._is_usable(there.segment):
                # (Its writer may have died before it was named.)
                self._index.add(there.segment, hashes, chunk_size, self.is_sound)
                return Published(there.segment, False)
            lost = there
        own = replace(segment, upload=secrets.token_hex(4))
        names = self._index.names(own, hashes, chunk_size)
        self.engine.upload(own.object_name, path)
        text = json.dumps({"segment": asdict(own), "names": names, "about": asdict(about)}).encode()
        if lost is not None:
            self.engine.put(head_name(own.key), text)
            self.engine.delete([*lost.names, lost.segment.object_name])
        elif not self.engine.create(head_name(own.key), text):
            faster = self.head(own.key)
            # (A request that was sent twice meets the head that it wrote the first time.)
            if faster is not None and faster.segment.upload != own.upload:
                self.engine.delete([own.object_name])
                self._index.add(faster.segment, hashes, chunk_size, self.is_sound)
                return Published(faster.segment, False)
        if self._is_withheld(own.key, computed):
            # (Who deleted it while its bytes were sent had no head to find.)
            self.engine.delete([head_name(own.key), own.object_name])
            return Published(own, False, withheld=True)
        self._index.add(own, hashes, chunk_size, self.is_sound)
        return Published(own, True)

    def _is_damaged(self, segment: SharedSegment) -> bool:
        try:
            self.engine.get(damaged_name(segment.key, segment.upload), _MAX_HEAD)
        except FileNotFoundError:
            return False
        return True

    def _is_withheld(self, key: str, computed: Computed) -> bool:
        """Whether a segment was deleted for all machines after it was computed."""
        deleted = self.deleted_at(key)
        if deleted is None:
            return False
        moment = computed()
        return moment < math.inf and not moment > deleted

    def deleted_at(self, key: str) -> float | None:
        """When a segment was deleted for all machines, by the engine's clock; `None`: that is not known of it.

        What was computed until then is not published. Word of it that makes no sense stands for the end of time.

        Raises:
            OSError: the engine failed.
        """
        try:
            text = self.engine.get(deleted_name(key), _MAX_HEAD)
        except FileNotFoundError:
            return None
        try:
            return float(json.loads(text, object_pairs_hook=once_each)["until"])
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            return math.inf

    def report_deletion(self, key: str, now: float) -> None:
        """Leave word that a segment is deleted for all machines; before it is, so that no copy of it comes between.

        Args:
            key: of the segment.
            now: what the engine's clock says.
        """
        self.engine.put(deleted_name(key), json.dumps({"until": now + RESOLUTION_S}).encode())

    def heads(self) -> Iterator[tuple[str, Head | None, float]]:
        """All segments: key, head (`None`: it makes no sense) and when it was written, seconds since the epoch."""
        keys = [(info.name.rpartition("/")[2], info.modified) for info in self.engine.walk("heads")]
        with ThreadPoolExecutor(_AT_ONCE, thread_name_prefix="contiguouskv-heads") as threads:
            for start in range(0, len(keys), _LISTED):
                some = [(key, modified) for key, modified in keys[start : start + _LISTED] if is_key(key)]
                found = threads.map(self._readable, [key for key, _ in some])
                for (key, modified), head in zip(some, found, strict=True):
                    yield key, head, modified

    def _readable(self, key: str) -> Head | None:
        with contextlib.suppress(StoreFormatError):
            return self.head(key)
        return None

    def now(self) -> float:
        """What the clock of the engine says, seconds since the epoch: ages are told by it alone.

        Raises:
            OSError: the engine failed.
        """
        self.engine.put("clock/now", b"")
        return next(iter(self.engine.walk("clock"))).modified

    def last_uses(self) -> dict[str, float]:
        """When segments were last used, by key, seconds since the epoch; nothing where the engine is volatile."""
        if self.engine.is_volatile:
            return {}
        return {info.name.rpartition("/")[2]: info.modified for info in self.engine.walk("used")}

    def report_damage(self, key: str, upload: str) -> None:
        """Leave word that the bytes of an upload are wrong: the next machine that computes the segment replaces it."""
        self.engine.put(damaged_name(key, upload), b"")

    def note_use(self, keys: Sequence[str]) -> None:
        """Leave word that segments are used now. (A volatile engine sees that itself, and decides by it what goes.)"""
        if not self.engine.is_volatile:
            self.engine.put_many([used_name(key) for key in keys])

    def withdraw(self, key: str) -> None:
        """Delete a segment: first what leads to it, then its bytes.

        Raises:
            StoreFormatError: its head makes no sense to this release.
            OSError: the engine failed.
        """
        there = self.head(key)
        if there is not None:
            self.engine.delete(there.names)
            self.engine.delete([head_name(key), used_name(key)])
            self.engine.delete([there.segment.object_name])


def _parsed(text: bytes, key: str) -> Head | None:
    try:
        told: Any = json.loads(text, object_pairs_hook=once_each)
        segment, about = _known(SharedSegment, told["segment"]), _known(Description, told["about"])
        names = tuple(told["names"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    numbers = (segment.first_chunk, segment.num_tokens, segment.nbytes, about.chunk_size, about.layers)
    words = (segment.upload, *names, about.fingerprint, about.root, about.parent, about.continues, about.dtype)
    sane = (
        segment.key == key
        and all(type(one) is int and 0 <= one < 2**50 for one in numbers)
        and all(type(one) is str and len(one) < 1024 for one in words)
        and len(segment.upload) == 8
        and segment.upload.isalnum()
        and segment.nbytes > 0
        and about.chunk_size > 0
    )
    # (What is deleted with it are its own names, whatever it says.)
    own = tuple(name for name in names if sane and read_entry(name) == (key, segment.upload))
    return Head(segment, own, about) if sane else None


def _known(kind: type[Record], told: dict[str, Any]) -> Record:
    """A record of the fields that this release knows; a later one may have more."""
    return kind(**{field.name: told[field.name] for field in fields(kind)})
