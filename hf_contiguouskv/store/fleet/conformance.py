"""Whether an engine keeps the promises of `engine.py`: checks to run against your own.

    from hf_contiguouskv.store.fleet.conformance import check_engine

    check_engine(lambda: MyEngine("some-unused-folder"))

Each check takes a callable that makes an engine on the same place each time, raises `AssertionError` with what was
promised and what was seen, and returns nothing. Under pytest: `@pytest.mark.parametrize("check", ENGINE_CHECKS)`. What
a check has written it deletes, if it passes and the engine can tell what lies there. Objects are at most 12 MiB. A
check of what an engine is not (`ListingEngine`, `KeyValueEngine`) does nothing.

What cannot be checked from outside: that a writer who dies leaves nothing, that an answer comes or is given up in time,
and that messages hold no credentials.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ..conformance.tools import refuses, require
from .engine import KeyValueEngine, ListingEngine, ObjectInfo, SharedEngine

Make = Callable[[], SharedEngine]
EngineCheck = Callable[[Make], None]


@contextlib.contextmanager
def _opened(make: Make) -> Iterator[tuple[SharedEngine, str]]:
    """An engine, and a folder in it that nobody uses."""
    engine, folder = make(), f"check-{secrets.token_hex(8)}"
    try:
        yield engine, folder
        engine.delete([one.name for one in _walked(engine, folder) or []])
    finally:
        engine.close()


def _walked(engine: SharedEngine, folder: str) -> list[ObjectInfo] | None:
    """What lies below a folder; `None` where the engine says that it cannot tell."""
    try:
        return list(engine.walk(folder))
    except OSError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
        return None


def finds_names_in_some_way(make: Make) -> None:
    """It lists names, or answers for many of them."""
    with _opened(make) as (engine, _):
        kinds = (isinstance(engine, ListingEngine), isinstance(engine, KeyValueEngine))
        require(sum(kinds) == 1, f"it is a ListingEngine or a KeyValueEngine, one of the two; it is {kinds}")
        require(type(engine.is_volatile) is bool, "is_volatile is true or false")


def counts_what_is_charged_for(make: Make) -> None:
    """Its counts of requests have known names, and grow by at least one for each kind of call."""
    with _opened(make) as (engine, folder):
        if not engine.requests:
            return
        require(set(engine.requests) == {"gets", "lists", "puts"}, f"requests are {sorted(engine.requests)}")
        before = dict(engine.requests)
        engine.put(f"{folder}/a", b"abc")
        engine.get(f"{folder}/a", 100)
        engine.read_ranges(f"{folder}/a", [(0, memoryview(bytearray(3)))])
        if isinstance(engine, ListingEngine):
            engine.list_each([folder, f"{folder}-other"], 10)
        grown = {kind: engine.requests[kind] - before[kind] for kind in before}
        least = {"gets": 2, "lists": 2 if isinstance(engine, ListingEngine) else 0, "puts": 1}
        require(
            all(grown[kind] >= least[kind] for kind in least), f"requests grew by {grown}, at least {least} were sent"
        )


def creates_once(make: Make) -> None:
    """`create` writes an object that is not there, and leaves one that is."""
    with _opened(make) as (engine, folder):
        require(engine.create(f"{folder}/a", b"first") is True, "create of a new object returns true")
        require(engine.create(f"{folder}/a", b"second") is False, "create of an object that is there returns false")
        require(engine.get(f"{folder}/a", 100) == b"first", "create leaves what is there")


def creates_once_among_many(make: Make) -> None:
    """Of several who create one object at once, exactly one wins, and it is its content that stays."""
    with _opened(make) as (engine, folder):
        won: list[bytes] = []
        start = threading.Barrier(8)

        def create(number: int) -> None:
            start.wait()
            if engine.create(f"{folder}/raced", b"%d" % number):
                won.append(b"%d" % number)

        threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        require(len(won) == 1, f"of eight who create one object at once, one wins; {len(won)} did")
        require(engine.get(f"{folder}/raced", 100) == won[0], "the content of the winner stays")


def replaces(make: Make) -> None:
    """`put` writes, and replaces."""
    with _opened(make) as (engine, folder):
        engine.put(f"{folder}/a", b"first")
        engine.put(f"{folder}/a", b"other")
        require(engine.get(f"{folder}/a", 100) == b"other", "put replaces")
        engine.put(f"{folder}/empty", b"")
        require(engine.get(f"{folder}/empty", 100) == b"", "an object may be empty")


def says_what_is_missing(make: Make) -> None:
    """What is not there is missing, and no other error."""
    with _opened(make) as (engine, folder):
        refuses(FileNotFoundError, lambda: engine.get(f"{folder}/none", 100), "get of what is not there")
        ranges = [(0, memoryview(bytearray(4)))]
        refuses(FileNotFoundError, lambda: engine.read_ranges(f"{folder}/none", ranges), "reading what is not there")
        engine.delete([f"{folder}/none"])
        require(_walked(engine, f"{folder}/nowhere") in ([], None), "a folder that is not there holds nothing")


def bounds_what_is_small(make: Make) -> None:
    """`get` refuses what has more bytes than it was told."""
    with _opened(make) as (engine, folder):
        engine.put(f"{folder}/a", bytes(101))
        refuses(OSError, lambda: engine.get(f"{folder}/a", 100), "get of more bytes than allowed raises OSError")
        require(engine.get(f"{folder}/a", 101) == bytes(101), "get of as many bytes as allowed")


def uploads_and_reads_ranges(make: Make) -> None:
    """A large object is read back by ranges: in any order, neighbours, apart, empty and overlapping."""
    with _opened(make) as (engine, folder), tempfile.TemporaryDirectory() as place:
        content = secrets.token_bytes(12 * 2**20 + 17)
        path = Path(place, "large")
        path.write_bytes(content)
        engine.upload(f"{folder}/large", path)
        wanted = [(5, 100), (len(content) - 9, 9), (105, 7), (9 * 2**20, 5 * 2**19), (3, 4), (40, 0), (0, len(content))]
        buffers = [bytearray(length) for _, length in wanted]
        fetched = engine.read_ranges(
            f"{folder}/large", [(offset, memoryview(into)) for (offset, _), into in zip(wanted, buffers, strict=True)]
        )
        for (offset, length), into in zip(wanted, buffers, strict=True):
            require(
                into == content[offset : offset + length], f"bytes {offset} to {offset + length} are read as written"
            )
        require(fetched.nbytes >= len(content), "it says how many bytes it asked for")


def reads_little_more_than_asked(make: Make) -> None:
    """Of many small ranges, at most a tenth more is read than was asked for."""
    with _opened(make) as (engine, folder):
        engine.put(f"{folder}/a", secrets.token_bytes(2**20))
        ranges = [(offset, memoryview(bytearray(1000))) for offset in range(0, 2**20 - 1000, 4096)]
        fetched = engine.read_ranges(f"{folder}/a", ranges)
        asked = sum(into.nbytes for _, into in ranges)
        require(asked <= fetched.nbytes <= 1.1 * asked, f"{fetched.nbytes} bytes were read for {asked}")


def says_where_it_ends(make: Make) -> None:
    """A range that ends behind the object is an error, not fewer bytes."""
    with _opened(make) as (engine, folder):
        engine.put(f"{folder}/a", bytes(100))
        for offset, length in ((90, 20), (100, 1), (5000, 10)):
            ranges = [(offset, memoryview(bytearray(length)))]
            call = lambda ranges=ranges: engine.read_ranges(f"{folder}/a", ranges)  # noqa: E731
            refuses(EOFError, call, f"reading bytes {offset} to {offset + length} of 100")


def pins_a_version(make: Make) -> None:
    """What was replaced since the version that is asked for is missing, if the engine has versions."""
    with _opened(make) as (engine, folder):
        engine.put(f"{folder}/a", b"first")
        ranges = [(0, memoryview(bytearray(5)))]
        version = engine.read_ranges(f"{folder}/a", ranges).version
        if version is None:
            return
        require(engine.read_ranges(f"{folder}/a", ranges, version).version == version, "a version stays the same")
        engine.put(f"{folder}/a", b"other")
        refuses(
            FileNotFoundError, lambda: engine.read_ranges(f"{folder}/a", ranges, version), "reading what was replaced"
        )


def lists_folders(make: Make) -> None:
    """Of an engine that lists: `list_each` lists what lies below each folder, up to a limit."""
    with _opened(make) as (engine, folder):
        if not isinstance(engine, ListingEngine):
            return
        engine.put_many([f"{folder}/one/{number:02d}" for number in range(12)] + [f"{folder}/one-more/x"])
        engine.put(f"{folder}/two/deep/a", b"abc")
        one, two, none = engine.list_each([f"{folder}/one/", f"{folder}/two/", f"{folder}/three/"], 100)
        there = [f"{folder}/one/{number:02d}" for number in range(12)]
        require(sorted(info.name for info in one) == there, f"it must list what lies below a folder, listed {one}")
        deep = [(f"{folder}/two/deep/a", 3)]
        require([(info.name, info.nbytes) for info in two] == deep, f"it must list folders in folders, listed {two}")
        require(not none, f"a folder that is not there holds nothing, listed {none}")
        require(len(engine.list_each([f"{folder}/one/"], 5)[0]) == 5, "at most as many as the limit says")


def walks(make: Make) -> None:
    """`walk` gives all objects below a folder, with their lengths, or says that it cannot."""
    with _opened(make) as (engine, folder):
        engine.put_many([f"{folder}/one/{number:02d}" for number in range(12)] + [f"{folder}-more/x"])
        engine.put(f"{folder}/two/deep/a", b"abc")
        found = _walked(engine, folder)
        engine.delete([f"{folder}-more/x"])
        if found is None:
            return
        there = {f"{folder}/one/{number:02d}": 0 for number in range(12)} | {f"{folder}/two/deep/a": 3}
        lengths = {info.name: info.nbytes for info in found}
        require(lengths == there, f"walk gives all objects below a folder, gave {found}")
        require(len(found) == len(there), f"walk gives each object once, gave {found}")


def answers_for_many(make: Make) -> None:
    """Of an engine that answers for many names: which exist, and what they hold."""
    with _opened(make) as (engine, folder):
        if not isinstance(engine, KeyValueEngine):
            return
        names = [f"{folder}/{number}" for number in range(2500)]
        engine.put_each({name: name.encode() for name in names[::2]}, replace=False)
        exist = engine.which_exist([*names, names[0]])
        require(exist == [number % 2 == 0 for number in range(2500)] + [True], "which_exist tells which names exist")
        require(engine.which_exist([]) == [], "of no names none exist")
        found = engine.get_each([*names[:9], names[0]], 100)
        wanted = [name.encode() if number % 2 == 0 else None for number, name in enumerate(names[:9])]
        require(found == [*wanted, wanted[0]], f"get_each reads what is there, in order; read {found}")
        require(engine.get_each(names[:1], 3) == [None], "get_each leaves out what has more bytes than allowed")
        engine.put_each({names[0]: b"other", names[1]: b"new"}, replace=False)
        require(engine.get_each(names[:2], 100) == [wanted[0], b"new"], "without replace, what is there stays")
        engine.put_each({names[0]: b"other", names[3]: b""}, replace=True)
        require(engine.get_each([names[0], names[3]], 100) == [b"other", b""], "with replace, it is replaced")
        engine.put_each({}, replace=True)
        engine.delete(names)
        require(not any(engine.which_exist(names)), "what was deleted does not exist")


def deletes(make: Make) -> None:
    """`delete` deletes what is there."""
    with _opened(make) as (engine, folder):
        engine.put_many([f"{folder}/{number}" for number in range(5)])
        engine.delete([f"{folder}/{number}" for number in range(1, 9)])
        require(engine.get(f"{folder}/0", 10) == b"", "what was not deleted stays")
        for number in range(1, 9):
            call = lambda name=f"{folder}/{number}": engine.get(name, 10)  # noqa: E731
            refuses(FileNotFoundError, call, "get of what was deleted")


def shares(make: Make) -> None:
    """What one has written, another finds."""
    with _opened(make) as (engine, folder):
        engine.put(f"{folder}/a", b"here")
        other = make()
        try:
            require(other.get(f"{folder}/a", 10) == b"here", "what one has written, another reads")
            other.delete([f"{folder}/a"])
        finally:
            other.close()
        refuses(FileNotFoundError, lambda: engine.get(f"{folder}/a", 10), "what another has deleted")


def closes_twice(make: Make) -> None:
    """It may be closed more than once, and is of no use then."""
    engine = make()
    engine.close()
    engine.close()
    refuses(OSError, lambda: engine.get("none", 10), "a closed engine raises OSError")


ENGINE_CHECKS: tuple[EngineCheck, ...] = (
    finds_names_in_some_way,
    counts_what_is_charged_for,
    creates_once,
    creates_once_among_many,
    replaces,
    says_what_is_missing,
    bounds_what_is_small,
    uploads_and_reads_ranges,
    reads_little_more_than_asked,
    says_where_it_ends,
    pins_a_version,
    lists_folders,
    walks,
    answers_for_many,
    deletes,
    shares,
    closes_twice,
)


def check_engine(make: Make) -> None:
    """Run all checks.

    Args:
        make: makes an engine; each call on the same place.

    Raises:
        AssertionError: a promise is not kept.
    """
    for check in ENGINE_CHECKS:
        check(make)
