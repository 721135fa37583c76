"""Backends that break one promise each, to show that the checks notice."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from hf_contiguouskv.errors import InputError
from hf_contiguouskv.store.backend import BlobInfo, Extent, Leftovers, SegmentBackend
from hf_contiguouskv.store.memory_backend import MemoryBackend, MemoryBlob, MemoryBlobWriter


def broken(**changes: Any) -> Callable[[], SegmentBackend]:
    """A memory backend with other methods."""
    return type("Broken", (MemoryBackend,), changes)


def broken_blob(**changes: Any) -> Callable[[], SegmentBackend]:
    """A memory backend whose open blobs have other methods."""
    kind = type("BrokenBlob", (MemoryBlob,), changes)

    def open_(self: MemoryBackend, key: str) -> MemoryBlob:
        MemoryBackend.open(self, key)  # For its errors.
        return kind(key, *self._blobs[key])

    return broken(open=open_)


def broken_writer(overhead_bytes: Any = MemoryBackend.overhead_bytes, **changes: Any) -> Callable[[], SegmentBackend]:
    """A memory backend whose writers have other methods."""
    kind = type("BrokenWriter", (MemoryBlobWriter,), changes)

    def create(self: MemoryBackend, key: str, nbytes: int) -> MemoryBlobWriter:
        MemoryBackend.create(self, key, 1)  # For its errors.
        return kind(self, key, nbytes)

    return broken(create=create, overhead_bytes=overhead_bytes)


def each_extent(read: Callable[[MemoryBlob, int, memoryview], int]) -> Callable[..., int]:
    """`read_into` made of a function that reads one extent."""
    return lambda self, extents: sum(read(self, offset, into) for offset, into in extents)


def sound(blob: MemoryBlob, extents: Iterable[Extent]) -> int:
    return MemoryBlob.read_into(blob, list(extents))


def _first_write_wins(self: MemoryBlobWriter, offset: int, octets: memoryview) -> None:
    seen = self.__dict__.setdefault("seen", set())
    MemoryBlobWriter.write(self, offset, octets) if offset not in seen else None
    seen.add(offset)


def _append(self: MemoryBlobWriter, offset: int, octets: memoryview) -> None:
    at = self.__dict__.get("end", 0)
    MemoryBlobWriter.write(self, at, octets)
    self.end = at + octets.nbytes  # type: ignore[attr-defined]


def _write_later(self: MemoryBlobWriter, offset: int, octets: memoryview) -> None:
    self.__dict__.setdefault("later", []).append((offset, octets))


def _write_now(self: MemoryBlobWriter) -> None:
    for offset, octets in self.__dict__.get("later", []):
        MemoryBlobWriter.write(self, offset, octets)


def _pad(self: MemoryBlobWriter, offset: int, nbytes: int) -> bytes:
    return MemoryBlobWriter.read(self, offset, nbytes).ljust(nbytes, b"\0")


def _lose_last_byte(self: MemoryBackend, key: str, content: memoryview) -> None:
    MemoryBackend.put(self, key, content[:-1])


def _first_stays(self: MemoryBackend, key: str, content: memoryview) -> None:
    if key not in self._blobs:
        MemoryBackend.put(self, key, content)


def _write_through_readers(self: MemoryBackend, key: str, content: memoryview) -> None:
    old = self._blobs.get(key)
    if old is not None and old[0].nbytes == content.nbytes:
        shared = memoryview(old[0].obj)
        shared[: content.nbytes] = content
    MemoryBackend.put(self, key, old[0] if old is not None and old[0].nbytes == content.nbytes else content)


def _one_buffer_per_key(self: MemoryBackend, key: str, nbytes: int) -> MemoryBlobWriter:
    writer = MemoryBackend.create(self, key, nbytes)
    writer._buffer = self.__dict__.setdefault("buffers", {}).setdefault(key, memoryview(bytearray(10**5)))[:nbytes]
    return writer


def _missing_is_key_error(self: MemoryBackend, key: str) -> MemoryBlob:
    return MemoryBlob(key, *self._blobs[key])


def _delete_under_readers(self: MemoryBackend, key: str) -> bool:
    found = self._blobs.get(key)
    if found is not None:
        memoryview(found[0].obj)[:] = bytes(found[0].nbytes)
    return MemoryBackend.delete(self, key)


_TAKE_KEYS = ("create", "open", "identity", "delete", "quarantine", "drop_quarantined")


def _unchecked(name: str) -> Callable[[], SegmentBackend]:
    """The method `name` takes anything for a key."""

    def method(self: MemoryBackend, key: Any, *rest: Any) -> Any:
        try:
            return getattr(MemoryBackend, name)(self, key, *rest)
        except InputError:
            return None

    return broken(**{name: method})


def _short_reads(blob: MemoryBlob, offset: int, into: memoryview) -> int:
    part = blob._content[offset : offset + into.nbytes]
    into[: part.nbytes] = part
    return part.nbytes


def _no_empty_extents(blob: MemoryBlob, offset: int, into: memoryview) -> int:
    if not into.nbytes:
        raise EOFError("nothing to read")
    return sound(blob, [(offset, into)])


def _whole_pages_only(blob: MemoryBlob, offset: int, into: memoryview) -> int:
    return sound(blob, [(offset & -4096, into)])


def _one_byte_too_many(blob: MemoryBlob, offset: int, into: memoryview) -> int:
    whole = memoryview(into.obj)
    if whole.nbytes > into.nbytes + 1 and not whole[-1]:
        whole[-1] = 1
    return sound(blob, [(offset, into)])


def _one_batch_only(self: MemoryBlob, extents: Sequence[Extent]) -> int:
    sound(self, extents[: self.extents_per_read])
    return sum(into.nbytes for _, into in extents)


def _sorted_into_given_order(self: MemoryBlob, extents: Sequence[Extent]) -> int:
    return sound(self, zip(sorted(offset for offset, _ in extents), [into for _, into in extents], strict=True))


def _one_thread_only(self: MemoryBlob, extents: Sequence[Extent]) -> int:
    busy, type(self).busy = getattr(type(self), "busy", False), True  # type: ignore[attr-defined]
    time.sleep(0.0002)
    count = sound(self, extents)
    if busy and extents and extents[0][1].nbytes:
        extents[0][1][0] ^= 255
    type(self).busy = False  # type: ignore[attr-defined]
    return count


def _close_once(self: Any) -> None:
    if self.__dict__.get("closed_before"):
        raise OSError("closed before")
    self.closed_before = True


def _close_all(self: MemoryBlob) -> None:
    type(self).everything_closed = True  # type: ignore[attr-defined]


def _read_unless_all_closed(blob: MemoryBlob, offset: int, into: memoryview) -> int:
    if getattr(type(blob), "everything_closed", False):
        raise OSError("closed")
    return sound(blob, [(offset, into)])


def _quarantine_any(self: MemoryBackend, key: str, identity: object) -> bool:
    return MemoryBackend.quarantine(self, key, self.identity(key))


def _quarantine_is_delete(self: MemoryBackend, key: str, identity: object) -> bool:
    return self.identity(key) == identity and identity is not None and self.delete(key)


def _quarantine_copies(self: MemoryBackend, key: str, identity: object) -> bool:
    found = self._blobs.get(key)
    done = MemoryBackend.quarantine(self, key, identity)
    if done and found is not None:
        self._blobs[key] = found
    return done


def _drop_all(self: MemoryBackend, key: str) -> int:
    freed = MemoryBackend.drop_quarantined(self, key)
    self._aside.clear()
    return freed


def _drop_both(self: MemoryBackend, key: str) -> int:
    self._blobs.pop(key, None)
    return MemoryBackend.drop_quarantined(self, key)


def _keep_aside(self: MemoryBackend, key: str) -> int:
    return self._aside[key][0].nbytes if key in self._aside else 0


def _publish_at_once(self: MemoryBlobWriter) -> None:
    self._backend.put(self.key, self._open())


def _begin_openly(self: MemoryBackend, key: str, nbytes: int) -> MemoryBlobWriter:
    self.__dict__.setdefault("begun", set()).add(key)
    return MemoryBackend.create(self, key, nbytes)


def _list_begun(self: MemoryBackend) -> set[str]:
    return MemoryBackend.list_keys(self) | self.__dict__.get("begun", set())


def _list_twice(self: MemoryBackend) -> list[BlobInfo]:
    return [*MemoryBackend.list_blobs(self)] * 2


def _listed_with(**changes: Any) -> Callable[[MemoryBackend], list[BlobInfo]]:
    return lambda self: [replace(info, **changes) for info in MemoryBackend.list_blobs(self)]


def _long_ago(self: MemoryBackend, key: str, content: memoryview) -> None:
    MemoryBackend.put(self, key, content)
    self._blobs[key] = (*self._blobs[key][:2], 5.0)


def _number_by_key(self: MemoryBackend, key: str, content: memoryview) -> None:
    self._blobs[key] = (content, int(key, 16), time.time())


def _delete_quietly(self: MemoryBackend, key: str) -> None:
    MemoryBackend.delete(self, key)


def _end_is_an_error(self: MemoryBlob, extents: Sequence[Extent]) -> int:
    try:
        return sound(self, extents)
    except EOFError as error:
        raise OSError(str(error)) from error


def _quarantine_almost_any(self: MemoryBackend, key: str, identity: object) -> bool:
    return identity is not None and _quarantine_any(self, key, identity)


def _drop_for_nothing(self: MemoryBackend, key: str) -> int:
    MemoryBackend.drop_quarantined(self, key)
    return 0


def _count_published(self: MemoryBackend) -> int:
    return sum(info.nbytes for info in self.list_blobs())


def _count_for_good(self: MemoryBackend) -> int:
    self.most = max(self.__dict__.get("most", 0), MemoryBackend.overhead_bytes(self))  # type: ignore[attr-defined]
    return self.most  # type: ignore[attr-defined]


def _remember(self: MemoryBackend, key: str, nbytes: int) -> MemoryBlobWriter:
    writer = MemoryBackend.create(self, key, nbytes)
    self.__dict__.setdefault("writers", []).append(writer)
    return writer


def _collect_everybody(self: MemoryBackend, dry_run: bool = False) -> Leftovers:
    for writer in self.__dict__.get("writers", []):
        writer.discard()
    return Leftovers()


def _collect_by_name(self: MemoryBackend, dry_run: bool = False) -> Leftovers:
    return Leftovers(removed=tuple(writer.name for writer in self.__dict__.get("writers", [])))


def _list_everybody(self: MemoryBackend, dry_run: bool = False) -> Leftovers:
    return Leftovers(in_use=tuple(writer.name for writer in self.__dict__.get("writers", [])))


def _collect_quarantine(self: MemoryBackend, dry_run: bool = False) -> Leftovers:
    self._aside.clear()
    return Leftovers()


def _collect_published(self: MemoryBackend, dry_run: bool = False) -> Leftovers:
    self._blobs.clear()
    return Leftovers()


def _discard_what_is_there(self: MemoryBlobWriter) -> None:
    self._buffer = None
    self._backend.delete(self.key)


def _leak(self: MemoryBlobWriter) -> None:
    if self._buffer is not None:
        self._backend.leaked = self._backend.__dict__.get("leaked", 0) + self.nbytes  # type: ignore[attr-defined]
    self._buffer = None


def _count_leaks(self: MemoryBackend) -> int:
    return MemoryBackend.overhead_bytes(self) + self.__dict__.get("leaked", 0)


BREAKAGES: list[tuple[str, str, Callable[[], SegmentBackend]]] = [
    ("describes_itself", "name must be a str", broken(name=None)),
    ("describes_itself", "lists_cheaply must be", broken(lists_cheaply=1)),
    ("describes_itself", "extents_per_read must be", broken_blob(extents_per_read=0)),
    ("writes_in_any_order", "other bytes", broken_writer(write=_first_write_wins)),
    ("writes_in_any_order", "ValueError", broken_writer(write=_append)),
    ("writes_in_any_order", "other bytes", broken_writer(write=_write_later, seal=_write_now)),
    ("reads_back_what_is_being_written", "all of it", broken_writer(read=lambda self, offset, nbytes: bytes(nbytes))),
    ("reads_back_what_is_being_written", "only what is there", broken_writer(read=_pad)),
    ("reads_back_what_is_being_written", "all of it", broken_writer(write=_write_later, seal=_write_now)),
    ("reads_back_what_is_being_written", "is closed", broken_writer(seal=MemoryBlobWriter.discard)),
    ("shows_nothing_before_publish", "after seal", broken_writer(seal=_publish_at_once)),
    ("shows_nothing_before_publish", "after create", broken(create=_begin_openly, list_keys=_list_begun)),
    ("publishes_whole_and_lists", "sizes", broken(put=_lose_last_byte)),
    ("publishes_whole_and_lists", "list_blobs does not", broken(list_blobs=lambda self: [])),
    ("publishes_whole_and_lists", "listed 2 times", broken(list_blobs=_list_twice)),
    ("publishes_whole_and_lists", "differ in created", broken(list_blobs=_listed_with(created=5.0))),
    ("publishes_whole_and_lists", "differ in stored_bytes", broken(list_blobs=_listed_with(stored_bytes=3))),
    ("publishes_whole_and_lists", "sizes", broken(list_blobs=_listed_with(nbytes=3))),
    ("publishes_whole_and_lists", "created 5", broken(put=_long_ago)),
    ("publishes_whole_and_lists", "list_keys", broken(list_keys=lambda self: {"f" * 32})),
    ("publishes_whole_and_lists", "identity", broken(identity=lambda self, key: "another")),
    ("replaces_under_the_same_key", "after its successor", broken(put=_first_stays)),
    ("replaces_under_the_same_key", "something else now", broken(put=_write_through_readers)),
    ("replaces_under_the_same_key", "has the identity", broken(put=_number_by_key)),
    ("lets_several_write_one_key", "other bytes", broken(create=_one_buffer_per_key)),
    ("deletes_under_open_readers", "delete must be True", broken(delete=_delete_quietly)),
    ("deletes_under_open_readers", "cannot read it any more", broken(delete=_delete_under_readers)),
    ("deletes_under_open_readers", "after delete", broken(delete=lambda self, key: key in self._blobs)),
    ("says_what_is_missing", "SegmentMissingError", broken(open=_missing_is_key_error)),
    ("says_what_is_missing", "identity must be None", broken(identity=lambda self, key: 0)),
    ("says_what_is_missing", "drop_quarantined", broken(drop_quarantined=lambda self, key: None)),
    ("says_what_is_missing", "quarantine", broken(quarantine=lambda self, key, identity: True)),
    *(("refuses_bad_keys", rf": {name}\(", _unchecked(name)) for name in _TAKE_KEYS),
    ("ends_where_it_ends", "EOFError", broken_blob(read_into=each_extent(_short_reads))),
    ("ends_where_it_ends", "raised OSError", broken_blob(read_into=_end_is_an_error)),
    ("knows_what_is_backed", "are not backed", broken_blob(is_backed=lambda self, offset, nbytes: False)),
    ("knows_what_is_backed", "are backed, it says", broken_blob(is_backed=lambda self, offset, nbytes: True)),
    ("reads_nothing", "EOFError", broken_blob(read_into=each_extent(_no_empty_extents))),
    ("reads_nothing", "0 bytes", broken_blob(read_into=lambda self, extents: sound(self, extents) + 4096)),
    ("reads_unaligned", "wrong", broken_blob(read_into=each_extent(_whole_pages_only))),
    ("reads_unaligned", "bytes beside", broken_blob(read_into=each_extent(_one_byte_too_many))),
    ("reads_unaligned", "are counted", broken_blob(read_into=lambda self, extents: sound(self, extents) * 0)),
    ("reads_many_extents", "wrong", broken_blob(read_into=_one_batch_only)),
    ("reads_many_extents", "wrong", broken_blob(read_into=_sorted_into_given_order)),
    ("reads_many_extents", "are counted", broken_blob(read_into=lambda self, extents: sound(self, extents) // 1000)),
    # Whichever thread sees it first.
    ("serves_many_threads", "wrong|other bytes", broken_blob(read_into=_one_thread_only)),
    ("closes_blobs", "must raise OSError", broken_blob(close=lambda self: None)),
    ("closes_blobs", "closed before", broken_blob(close=_close_once)),
    ("closes_blobs", "raised OSError", broken_blob(close=_close_all, read_into=each_extent(_read_unless_all_closed))),
    ("quarantines_what_it_is_asked_to", "takes None", broken(quarantine=_quarantine_any)),
    ("quarantines_what_it_is_asked_to", "another blob's identity", broken(quarantine=_quarantine_almost_any)),
    ("quarantines_what_it_is_asked_to", r"quarantined\(\) says None", broken(quarantine=_quarantine_is_delete)),
    ("quarantines_what_it_is_asked_to", "after quarantine", broken(quarantine=_quarantine_copies)),
    ("drops_its_quarantine", "0 bytes freed", broken(drop_quarantined=_drop_for_nothing)),
    ("drops_its_quarantine", "another key", broken(drop_quarantined=_drop_all)),
    ("drops_its_quarantine", "no such segment", broken(drop_quarantined=_drop_both)),
    ("drops_its_quarantine", "still has", broken(drop_quarantined=_keep_aside)),
    ("counts_its_overhead", "of quarantine", broken(overhead_bytes=lambda self: 0)),
    ("counts_its_overhead", "a published blob counts", broken(overhead_bytes=_count_published)),
    ("counts_its_overhead", "was dropped", broken(overhead_bytes=_count_for_good)),
    ("collects_no_living_writer", "is closed", broken(create=_remember, collect=_collect_everybody)),
    ("collects_no_living_writer", "what is in use", broken(create=_remember, collect=_collect_by_name)),
    ("collects_no_living_writer", "removed a quarantine", broken(collect=_collect_quarantine)),
    ("collects_no_living_writer", "no such segment", broken(collect=_collect_published)),
    ("discards_writers", "closed before", broken_writer(discard=_close_once)),
    ("discards_writers", "no such segment", broken_writer(discard=_discard_what_is_there)),
    ("discards_writers", "after a discard", broken_writer(overhead_bytes=_count_leaks, discard=_leak)),
    ("discards_writers", "has left", broken(create=_remember, collect=_list_everybody)),
    ("closes_twice", "closed before", broken(close=_close_once)),
    ("shares_what_is_published", "no such segment", MemoryBackend),
    ("shares_its_quarantine", "must be|means nothing", MemoryBackend),
]
"""A check, what it must say, and a backend that breaks the promise that it checks."""
