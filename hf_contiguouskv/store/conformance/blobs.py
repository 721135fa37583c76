"""Writing, publishing, replacing and deleting: what every backend promises of its blobs."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable

from ...errors import InputError
from ..backend import SegmentBackend
from .tools import (
    CLOCK_S,
    PAGE,
    Make,
    is_gone,
    is_whole,
    listed,
    made,
    new_key,
    promise,
    publish,
    read,
    refuses,
    require,
    some_bytes,
    written,
)

BAD_KEYS: tuple[object, ...] = (
    "",
    ".",
    "..",
    "/",
    "a" * 31,
    "a" * 33,
    "A" * 32,
    "g" * 32,
    "../" + "a" * 29,
    "a" * 16 + "/" + "a" * 15,
    "/" + "a" * 31,
    "a" * 31 + "\0",
    "a" * 32 + "\n",
    "a" * 32 + "/..",
    "a" * 32 + ".safetensors",
    "\u0661" * 32,
    b"a" * 32,
    None,
    7,
)
"""What no method may take for a key: wrong lengths, other alphabets, paths, and what is no text."""


@promise
def describes_itself(make: Make) -> None:
    """It has all methods and attributes of the protocol, with values of their types."""
    with made(make) as backend:
        require(isinstance(backend, SegmentBackend), f"{type(backend).__name__} lacks a part of SegmentBackend")
        for name, kind in (("name", str), ("lists_cheaply", bool), ("direct", bool)):
            value = getattr(backend, name)
            require(type(value) is kind, f"{name} must be a {kind.__name__}, is {value!r}")
        key = new_key()
        writer = backend.create(key, 100)
        require((writer.nbytes, type(writer.name)) == (100, str), f"a writer says {writer.nbytes}, {writer.name!r}")
        writer.discard()
        publish(backend, key, some_bytes(100))
        blob = backend.open(key)
        require(type(blob.name) is str, f"the name of a blob must be a str, is {blob.name!r}")
        per_read = blob.extents_per_read
        require(type(per_read) is int and per_read >= 1, f"extents_per_read must be 1 or more, is {per_read!r}")
        hash(blob.identity)
        blob.close()
        backend.delete(key)


@promise
def writes_in_any_order(make: Make) -> None:
    """Pieces may be written in any order and twice; what was written is the caller's own again."""
    content, key = some_bytes(3 * PAGE + 777), new_key()
    cuts = [0, 1, 5, PAGE - 3, PAGE, 2 * PAGE + 9, len(content)]
    pieces = [(begin, content[begin:end]) for begin, end in itertools.pairwise(cuts)]
    # Two of them hold something else first.
    wrong = [(begin, bytes(len(octets))) for begin, octets in (pieces[0], pieces[3])]
    with made(make) as backend:
        writer = backend.create(key, len(content))
        for begin, octets in (*wrong, *reversed(pieces)):
            lent = bytearray(octets)
            writer.write(begin, memoryview(lent))
            lent[:] = b"\xff" * len(lent)
        writer.seal()
        writer.publish()
        writer.discard()
        is_whole(backend, key, content, "written in pieces from the end")
        backend.delete(key)


@promise
def reads_back_what_is_being_written(make: Make) -> None:
    """A writer reads what it has written, before and after `seal`; fewer bytes only at the end."""
    content, key = some_bytes(PAGE + 100), new_key()
    with made(make) as backend:
        writer = written(backend, key, content)
        for when in ("before seal", "after seal"):
            require(writer.read(0, len(content)) == content, f"{when}: all of it reads differently")
            require(writer.read(PAGE - 5, 50) == content[PAGE - 5 : PAGE + 45], f"{when}: a part reads differently")
            require(writer.read(PAGE, PAGE) == content[PAGE:], f"{when}: only what is there may be read at the end")
            require(writer.read(len(content), 10) == b"", f"{when}: nothing is there past the end")
            if when == "before seal":
                writer.write(10, memoryview(bytes(5)))
                require(writer.read(10, 5) == bytes(5), "what was written over reads as before")
                writer.write(10, memoryview(content[10:15]))
                writer.seal()
        writer.discard()


@promise
def shows_nothing_before_publish(make: Make) -> None:
    """Nobody sees a blob before `publish`, however complete it is."""
    content, key = some_bytes(1000), new_key()
    with made(make) as backend:
        writer = backend.create(key, len(content))
        is_gone(backend, key, "after create")
        writer.write(0, memoryview(content))
        is_gone(backend, key, "after write")
        writer.seal()
        is_gone(backend, key, "after seal")
        writer.publish()
        is_whole(backend, key, content, "after publish")
        writer.discard()
        backend.delete(key)


@promise
def publishes_whole_and_lists(make: Make) -> None:
    """After `publish` the blob is there, and everything that says something about it says the same."""
    contents = {new_key(): some_bytes(size, size) for size in (1, 100, PAGE, 50_000)}
    with made(make) as backend:
        before = backend.list_keys()
        for key, content in contents.items():
            begun = time.time()
            writer = publish(backend, key, content)
            blob, info = backend.open(key), listed(backend.list_blobs(), key)
            require(info is not None, "list_blobs does not have it")
            assert info is not None
            require(blob.nbytes == info.nbytes == len(content), f"sizes {blob.nbytes}, {info.nbytes}")
            stored = {writer.stored_bytes, blob.stored_bytes, info.stored_bytes}
            require(len(stored) == 1, f"writer, blob and list differ in stored_bytes: {stored}")
            require(blob.created == info.created, f"blob and list differ in created: {blob.created}, {info.created}")
            low, high = begun - CLOCK_S, time.time() + CLOCK_S
            require(low <= blob.created <= high, f"created {blob.created}, it is {time.time()}")
            require(backend.identity(key) == blob.identity, "identity(key) differs from that of the open blob")
            require(blob.identity is not None, "the identity of a blob is None")
            require(read(blob) == content, "other bytes are read than were written")
            blob.close()
        require(backend.list_keys() - before == set(contents), "list_keys: not what was published")
        for key in contents:
            backend.delete(key)
        require(backend.list_keys() == before, "list_keys still has what was deleted")


@promise
def replaces_under_the_same_key(make: Make) -> None:
    """A second blob under a key takes its place; who has the first one open reads that on; the identity changes."""
    # Of one size, so that a size alone tells nothing.
    first, second, key = some_bytes(9000, 1), some_bytes(9000, 2), new_key()
    with made(make) as backend:
        publish(backend, key, first)
        old = backend.open(key)
        writer = written(backend, key, second)
        writer.seal()
        is_whole(backend, key, first, "while its successor is being written")
        writer.publish()
        writer.discard()
        is_whole(backend, key, second, "after its successor was published")
        require(read(old) == first, "who had the replaced blob open reads something else now")
        require(backend.identity(key) != old.identity, "the successor has the identity of the one that it replaced")
        require(listed(backend.list_blobs(), key) is not None, "list_blobs has lost the key")
        old.close()
        backend.delete(key)


@promise
def lets_several_write_one_key(make: Make) -> None:
    """Writers of one key do not disturb each other: each publishes its own bytes, the last one stays."""
    first, second, key = some_bytes(5000, 1), some_bytes(6000, 2), new_key()
    with made(make) as backend:
        one, two = backend.create(key, len(first)), backend.create(key, len(second))
        for writer, content in ((two, second), (one, first)):
            writer.write(0, memoryview(content))
        for writer, content in ((two, second), (one, first)):
            writer.seal()
            writer.publish()
            is_whole(backend, key, content, "two writers at once")
        one.discard()
        two.discard()
        backend.delete(key)


@promise
def deletes_under_open_readers(make: Make) -> None:
    """`delete` says whether there was one, and those who have it open read on."""
    content, key = some_bytes(9000), new_key()
    with made(make) as backend:
        publish(backend, key, content)
        blob = backend.open(key)
        require(backend.delete(key) is True, "delete must be True where there is one")
        is_gone(backend, key, "after delete")
        require(read(blob) == content, "who had the deleted blob open cannot read it any more")
        blob.close()
        publish(backend, key, content)
        is_whole(backend, key, content, "published again after delete")
        backend.delete(key)


@promise
def says_what_is_missing(make: Make) -> None:
    """A key that is not there: an error from `open`, `None`, false or 0 from the others."""
    with made(make) as backend:
        key = new_key()
        is_gone(backend, key, "never published")
        require(backend.quarantine(key, None) is False, "quarantine of a missing key must be False")
        require(backend.quarantine(key, (1, 2)) is False, "quarantine of a missing key must be False")
        require(backend.drop_quarantined(key) == 0, "drop_quarantined of a missing key must free 0 bytes")


@promise
def refuses_bad_keys(make: Make) -> None:
    """What is no key is refused by every method, above all what could be a path."""
    with made(make) as backend:
        before = backend.list_keys()
        actions: dict[str, Callable[[str], object]] = {
            "create": lambda key: backend.create(key, 10),
            "open": backend.open,
            "identity": backend.identity,
            "delete": backend.delete,
            "quarantine": lambda key: backend.quarantine(key, None),
            "drop_quarantined": backend.drop_quarantined,
        }
        for key in BAD_KEYS:
            for name, action in actions.items():
                refuses(InputError, functools.partial(action, key), f"{name}({key!r})")  # type: ignore[arg-type]
        require(backend.list_keys() == before, "something was published under what is no key")
