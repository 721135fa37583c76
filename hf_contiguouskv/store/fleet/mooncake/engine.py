"""Mooncake Store as an engine: memory that machines lend each other, for what may vanish at any moment."""

from __future__ import annotations

import errno
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from ..engine import Fetched, ObjectInfo, Range
from ..merging import join_ranges
from ..objects import shown
from . import client as clients
from .address import MooncakeAddress
from .asking import Asking, batches
from .heads import MAX_HEAD, MAX_INLINE, PIECE, ObjectHead, head_key
from .listing import list_keys
from .native import error_of
from .reading import Part, RangeReader
from .writing import ObjectWriter

# A head that another writer has begun is waited for so long, asked for so often.
_SETTLE_S, _ASK_AGAIN_S = 1.0, 0.02
# A write that others undo is begun again so often.
_TRIES = 3
# Heads of large objects that are remembered: a read of one then needs no question about its head.
_REMEMBERED = 4096
# Heads are read so many at once.
_HEADS = 500


class MooncakeStore:
    """A `KeyValueEngine` on Mooncake Store, over TCP.

    Everything that comes from it may be wrong, whatever it says of itself: short objects are checked here, segments by
    their own checksums. Everything in it may vanish: nothing must exist there alone.

    Args:
        url: `mooncake://MASTER:PORT[/FOLDER]`, with `?segment=4GiB` to lend memory, `host=` for the address under which
            others reach this machine, and `metrics_port=` of the master for what needs a list of names.
        timeout_s: seconds after which an answer is not waited for any more.

    Raises:
        ConfigError: the address is no such one.
        StoreError: the package, or a system library, is missing, or this process is a fork of one that uses it.
    """

    is_volatile = True
    requests: Mapping[str, int] = MappingProxyType({})

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        self.name = shown(url)
        self._address = MooncakeAddress.parse(url)
        self._root = self._address.root
        self._client = clients.acquire(self._address, self.name, timeout_s)
        self._asking = Asking(self._client, self.name, timeout_s)
        self._reader = RangeReader(self._asking)
        self._writer = ObjectWriter(self._asking, self._root)
        self._lock = threading.Lock()
        self._known: OrderedDict[tuple[str, str], ObjectHead] = OrderedDict()
        self._closed = False

    # -- writing ------------------------------------------------------------------------------------------------

    def create(self, name: str, octets: bytes) -> bool:
        head = self._prepared(octets)
        for _ in range(_TRIES):
            there = self._placed(name, head)
            if there is not None:
                if there.nonce != head.nonce:
                    self._drop_pieces([head])
                return there.nonce == head.nonce
            # (What lies there is damaged, which counts as nothing.)
            self._asking.remove([head_key(self._root, name)], force=True)
        raise OSError(errno.EBUSY, "what lies there is damaged, and comes back", name)

    def put(self, name: str, octets: bytes) -> None:
        self._replace(name, self._prepared(octets))

    def put_many(self, names: Sequence[str]) -> None:
        self.put_each(dict.fromkeys(names, b""), replace=True)

    def put_each(self, objects: Mapping[str, bytes], *, replace: bool) -> None:
        for name, octets in objects.items():
            if len(octets) > MAX_INLINE:
                raise OSError(errno.EFBIG, f"it has more than {MAX_INLINE} bytes", name)
        for names in batches(list(objects)):
            keys = {name: head_key(self._root, name) for name in names}
            if replace:
                self._drop(names)
            heads = {name: ObjectHead.new(len(objects[name]), objects[name]) for name in names}
            self._writer.write({keys[name]: head.pack(keys[name]) for name, head in heads.items()})
            self._settle(list(keys.values()))

    def upload(self, name: str, path: Path) -> None:
        head = ObjectHead.new(path.stat().st_size)
        self._writer.write_pieces(head, path)
        self._replace(name, head)

    def _prepared(self, octets: bytes) -> ObjectHead:
        """The head of an object whose pieces, if there are any, were written."""
        if len(octets) <= MAX_INLINE:
            return ObjectHead.new(len(octets), octets)
        head = ObjectHead.new(len(octets))
        self._writer.write_pieces(head, octets)
        return head

    def _replace(self, name: str, head: ObjectHead) -> None:
        for _ in range(_TRIES):
            (before,) = self._heads([name])
            # (Force is for heads alone: who reads one just now may get other bytes, and sees it.)
            self._asking.remove([head_key(self._root, name)], force=True)
            if before is not None:
                self._drop_pieces([before])
            there = self._placed(name, head)
            # (Another one may have replaced it in the same moment, as if a moment later.)
            if there is not None and (before is None or there.nonce != before.nonce):
                return
        raise OSError(errno.EBUSY, "another writer puts it back", name)

    def _placed(self, name: str, head: ObjectHead) -> ObjectHead | None:
        """Write a head unless there is one, and say which one is there then; `None`: a damaged one.

        Raises:
            OSError: none is there (`EBUSY`): another writer began and did not end.
        """
        key = head_key(self._root, name)
        self._writer.write({key: head.pack(key)}, head.nonce)
        self._settle([key])
        return self._heads([name])[0]

    def _settle(self, keys: list[str]) -> None:
        """Wait until keys that were written, by this writer or another one, can be read.

        Raises:
            OSError: one cannot (`EBUSY`).
        """
        until = time.monotonic() + _SETTLE_S
        while not all(self._asking.exist(keys)):
            if time.monotonic() >= until:
                raise OSError(
                    errno.EBUSY, "what was written is not there: another writer died in it, or its room was needed"
                )
            time.sleep(_ASK_AGAIN_S)

    # -- reading ------------------------------------------------------------------------------------------------

    def get(self, name: str, max_bytes: int) -> bytes:
        head = self._head(name)
        if head.nbytes > max_bytes:
            raise OSError(errno.EFBIG, f"it has more than the {max_bytes} bytes that such an object may have", name)
        content = bytearray(head.nbytes)
        self._fill(name, head, [(0, memoryview(content))])
        return bytes(content)

    def get_each(self, names: Sequence[str], max_bytes: int) -> list[bytes | None]:
        found: list[bytes | None] = []
        for head in self._heads(names):
            content = head.content if head is not None else None
            found.append(content if content is not None and len(content) <= max_bytes else None)
        return found

    def read_ranges(self, name: str, ranges: Sequence[Range], version: str | None = None) -> Fetched:
        head = self._remembered(name, version)
        if head is None:
            head = self._head(name)
            if version not in (None, head.nonce):
                raise FileNotFoundError(errno.ENOENT, "it has another content by now", f"{self.name}/{name}")
            if head.content is None:
                self._require_whole(name, head)
                self._remember(name, head)
        return Fetched(self._fill(name, head, ranges), head.nonce, head.nbytes)

    def which_exist(self, names: Sequence[str]) -> list[bool]:
        return self._asking.exist([head_key(self._root, name) for name in names])

    def _head(self, name: str) -> ObjectHead:
        (head,) = self._heads([name])
        if head is None:
            raise FileNotFoundError(errno.ENOENT, "it is not there", f"{self.name}/{name}")
        return head

    def _heads(self, names: Sequence[str]) -> list[ObjectHead | None]:
        """The heads of objects; `None` for what is not there or damaged: both can be written."""
        keys = [head_key(self._root, name) for name in names]
        found: dict[str, ObjectHead] = {}
        left = keys
        # (A second time, because one that was replaced while it was read looks damaged.)
        for _ in range(2):
            damaged = []
            for some in batches(left, _HEADS):
                for key, octets in zip(some, self._reader.read_whole(some, MAX_HEAD), strict=True):
                    head = None if octets is None else ObjectHead.unpack(key, octets)
                    if head is not None:
                        found[key] = head
                    elif octets is not None:
                        damaged.append(key)
            left = damaged
        return [found.get(key) for key in keys]

    def _require_whole(self, name: str, head: ObjectHead) -> None:
        """Make sure that all pieces are there, before anything relies on it; being asked for, they stay for a while."""
        if not all(self._asking.exist(head.piece_keys(self._root))):
            raise FileNotFoundError(errno.ENOENT, "a part of it is not there any more", f"{self.name}/{name}")

    def _fill(self, name: str, head: ObjectHead, ranges: Sequence[Range]) -> int:
        """Fill ranges of an object; how many bytes crossed the network for it."""
        for offset, into in ranges:
            if offset + into.nbytes > head.nbytes:
                raise EOFError(f"{self.name}/{name} ends before byte {offset + into.nbytes}")
        if head.content is not None:
            for offset, into in ranges:
                into[:] = head.content[offset : offset + into.nbytes]
            return sum(into.nbytes for _, into in ranges)
        joined = join_ranges(ranges)
        buffers = [memoryview(bytearray(part.end - part.begin)) for part in joined]
        parts = [
            Part(head.piece_key(self._root, at // PIECE), at % PIECE, into)
            for part, buffer in zip(joined, buffers, strict=True)
            for at, into in _cut(part.begin, buffer)
        ]
        codes = self._reader.read(parts, self._asking.places([part.key for part in parts]))
        failed = next((code for code in codes if code < 0), None)
        if failed is not None:
            raise error_of(failed, f"{self.name}/{name}")
        for part, buffer in zip(joined, buffers, strict=True):
            for offset, into in part.parts:
                into[:] = buffer[offset - part.begin : offset - part.begin + into.nbytes]
        return sum(buffer.nbytes for buffer in buffers)

    def _remembered(self, name: str, version: str | None) -> ObjectHead | None:
        with self._lock:
            head = self._known.get((name, version)) if version is not None else None
            if head is not None and version is not None:
                self._known.move_to_end((name, version))
            return head

    def _remember(self, name: str, head: ObjectHead) -> None:
        with self._lock:
            self._known[name, head.nonce] = head
            if len(self._known) > _REMEMBERED:
                self._known.popitem(last=False)

    # -- names --------------------------------------------------------------------------------------------------

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        if self._address.metrics_port is None:
            raise OSError(
                errno.EOPNOTSUPP,
                "Mooncake Store lists nothing; add ?metrics_port=PORT of its master to the address, whose HTTP service "
                "does",
                self.name,
            )
        prefix = head_key(self._root, f"{folder}/")
        keys = list_keys(self._address, prefix, self._asking.timeout_s)
        names = [key.removeprefix(head_key(self._root, "")) for key in keys]
        for some in batches(names, _HEADS):
            for name, head in zip(some, self._heads(some), strict=True):
                if head is not None:
                    yield ObjectInfo(name, head.nbytes, head.created)

    def delete(self, names: Iterable[str]) -> None:
        for some in batches(list(names)):
            self._drop(some)

    def _drop(self, names: Sequence[str]) -> None:
        heads = self._heads(names)
        self._asking.remove([head_key(self._root, name) for name in names], force=True)
        self._drop_pieces([head for head in heads if head is not None])

    def _drop_pieces(self, heads: Iterable[ObjectHead]) -> None:
        # (Never by force: who reads a piece could get bytes of another object. What stays is evicted, as nobody asks
        # for it.)
        keys = [key for head in heads for key in head.piece_keys(self._root)]
        self._asking.remove(keys, force=False)

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._asking.close()
        clients.release(self._address, self._client)


def _cut(begin: int, buffer: memoryview) -> Iterator[tuple[int, memoryview]]:
    """The parts of a range that lie in one piece each, with their offsets in the object."""
    at = 0
    while at < buffer.nbytes:
        length = min(buffer.nbytes - at, PIECE - (begin + at) % PIECE)
        yield begin + at, buffer[at : at + length]
        at += length
