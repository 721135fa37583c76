"""Others wrote into the store's folder: nothing outside it is opened, moved or deleted, and answers stay right."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import xxhash

from hf_contiguouskv import PrefixStore
from hf_contiguouskv.errors import ContiguousKVError, InputError

from .damage import Scene, Tally, segment_path

# Audit events of the interpreter that name files, whichever module caused them; true: the last part of the path is
# followed if it is a link. (What SQLite does is in C and not seen here: of that, the traces are looked for.)
_FOLLOWS = {
    "open": True,
    "os.chmod": True,
    "os.chown": True,
    "os.listdir": True,
    "os.scandir": True,
    "os.truncate": True,
    "os.utime": True,
    "sqlite3.connect": True,
    "os.link": False,
    "os.mkdir": False,
    "os.remove": False,
    "os.rename": False,
    "os.rmdir": False,
    "os.symlink": False,
}
_TWO_PATHS = ("os.link", "os.rename", "os.symlink")
# Where an event names the folders that its paths lie in, if these are given as descriptors.
_FOLDERS = {"os.mkdir": (2,), "os.remove": (1,), "os.rmdir": (1,), "os.rename": (2, 3)}
_watching: list[set[tuple[str, str]]] = []
_folder_of_open = threading.local()


def _hook(event: str, arguments: tuple[object, ...]) -> None:
    if not _watching or event not in _FOLLOWS:
        return
    follows = _FOLLOWS[event]
    if event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_NOFOLLOW:
        follows = False
    folders = [arguments[place] for place in _FOLDERS.get(event, ())]
    if event == "open":
        folders = [getattr(_folder_of_open, "descriptor", None)]
    for number, path in enumerate(arguments[: 2 if event in _TWO_PATHS else 1]):
        if isinstance(path, str | bytes | os.PathLike):
            descriptor = folders[number] if number < len(folders) else None
            base = os.readlink(f"/proc/self/fd/{descriptor}") if type(descriptor) is int and descriptor >= 0 else ""
            # Now: later the link may be gone.
            folder, name = os.path.split(os.path.abspath(os.path.join(base, os.fsdecode(path))))
            real = os.path.realpath(os.path.join(folder, name)) if follows else None
            _watching[-1].add((event, real or os.path.join(os.path.realpath(folder), name)))


def _tell_folder(open_: Callable[..., int]) -> Callable[..., int]:
    """`os.open`, of which the event does not name the folder."""

    def told(*values: Any, dir_fd: int | None = None, **named: Any) -> int:
        _folder_of_open.descriptor = dir_fd
        try:
            return open_(*values, dir_fd=dir_fd, **named)
        finally:
            _folder_of_open.descriptor = None

    return told


sys.addaudithook(_hook)


class Neighbourhood:
    """A store beside files that are none of its business, and a record of every path that was used.

    Args:
        folder: holds the store and "outside".
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.store, self.outside = folder, folder / "store", folder / "outside"
        self._used: set[tuple[str, str]] = set()
        self._before = self._content()

    def _content(self) -> dict[str, tuple[int, bytes]]:
        files = [path for path in self.folder.rglob("*") if self.store not in path.parents and path.is_file()]
        return {str(path): (path.lstat().st_mtime_ns, path.read_bytes()) for path in files}

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Record what is used meanwhile."""
        _watching.append(self._used)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, "open", _tell_folder(os.open))
                yield
        finally:
            _watching.remove(self._used)

    def assert_untouched(self) -> None:
        """Nothing outside the store was opened, listed, moved, changed, made or deleted."""
        store, folder = os.path.realpath(self.store), os.path.realpath(self.folder)
        inside = {use for use in self._used if use[1] == store or use[1].startswith(store + "/")}
        assert inside, "nothing was watched"
        # (Of the rest of the file system only the interpreter's own and the references' files are read.)
        assert {use for use in self._used - inside if use[1].startswith(folder)} == set()
        assert self._content() == self._before


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("crafted"))


@pytest.fixture
def place(scene: Scene, tmp_path: Path) -> Neighbourhood:
    scene.copy(tmp_path / "store")
    outside = tmp_path / "outside"
    for name in ("ab", "../outside/pins"):
        (outside / name).mkdir(parents=True, exist_ok=True)
    # Under every name by which a careless path would reach it.
    for name in ("victim", "victim.safetensors", "ab/victim.safetensors", "evil.partial", "index.sqlite.damaged-1"):
        shutil.copy(segment_path(scene.closed, scene.keys["lone"]), outside / name)
    return Neighbourhood(tmp_path)


ALL = ("parent", "child", "grandchild", "sibling", "lone", "other")


def live_through(scene: Scene, place: Neighbourhood) -> None:
    """Requests, upkeep and requests again: right answers, no exception, nothing outside is used."""
    tally = Tally()
    with place.watched(), PrefixStore(place.store) as store:
        for number, name in enumerate(ALL):
            scene.request(store, name, ("explicit", "automatic")[number % 2], "exact", tally)
        store.verify()
        store.gc(dry_run=True)
        for entry in store.entries():
            attempt(store, entry.key)
        store.gc()
        store.inner.index.rebuild()
        for name in ALL:
            scene.request(store, name, "explicit", "exact", tally)
    assert (tally.wrong, tally.crashes) == ([], [])
    with place.watched(), PrefixStore(place.store) as store:
        assert store.verify() == []
        for name, sequence in scene.sequences.items():
            assert scene.found(store, name) == sequence.ids.shape[1], name
        scene.count_lost(store, ALL, tally)
    assert tally.lost == []
    place.assert_untouched()


def attempt(store: PrefixStore, key: str) -> None:
    """Everything that a user does with a key that `entries` has listed. It may be refused, by an error with a name."""
    for act in (store.pin, store.unpin, store.verify):
        with suppress(ContiguousKVError):
            act(key)


# ---- keys ----

EVIL_KEYS = [
    "../../../outside/victim",
    "../../outside/victim",
    "/etc/passwd",
    "{outside}/victim",
    "ab/../../../outside/victim",
    "..",
    ".",
    "",
    "\0",
    "a" * 31,
    "A" * 32,
    "ab" * 16 + "\n",
    "ab" * 16 + "/",
    "\uff41" * 32,
    "\u0663" * 32,
    "ab" * 2000,
    "%2e%2e%2f" * 3,
    "~root",
    "-rf",
    "*",
    "'; DROP TABLE segments; --",
]
EVIL_VALUES = [None, 7, 2.5, b"..", "NaN", -1, 2**62, b"\xff" * 16, "../.."]


def execute(folder: Path, *statements: tuple[str, tuple[object, ...]]) -> None:
    db = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    for statement, values in statements:
        db.execute(statement, values)
    db.close()


@pytest.mark.parametrize("key", EVIL_KEYS, ids=lambda key: ascii(key)[:20])
def test_a_row_whose_key_is_a_path(scene, place, key) -> None:
    key = key.format(outside=place.outside) if key.startswith("{") else key
    execute(place.store, ("UPDATE segments SET key = ? WHERE id = 2", (key,)))
    live_through(scene, place)


@pytest.mark.parametrize("key", EVIL_KEYS, ids=lambda key: ascii(key)[:20])
def test_a_key_from_outside_is_never_a_path(scene, place, key) -> None:
    key = key.format(outside=place.outside) if key.startswith("{") else key
    with place.watched(), PrefixStore(place.store) as store:
        for act in (store.delete, store.pin, store.unpin):
            with pytest.raises(ContiguousKVError):
                act(key)
        for act in (store.backend.open, store.backend.delete, store.backend.identity):
            with pytest.raises(InputError):
                act(key)
        with pytest.raises(InputError):
            store.backend.create(key, 4096)
        with pytest.raises(InputError):
            store.backend.quarantine(key, None)
    place.assert_untouched()


COLUMNS = [
    "fingerprint", "beginning", "parent", "first_chunk", "num_chunks", "num_tokens", "chunk_size", "num_layers",
    "dtype", "nbytes", "compute_ms", "created", "last_used", "uses", "pinned",
]  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS)
def test_a_column_of_segments_of_any_type(scene, place, column) -> None:
    for value in EVIL_VALUES:
        scene.copy(place.store)
        if value is None:
            relax(place.store)
        execute(place.store, (f"UPDATE segments SET {column} = ? WHERE id = 2", (value,)))
        ask_once(scene, place)
    live_through(scene, place)


@pytest.mark.parametrize("column", ["hash", "segment", "parent", "position", "tokens"])
def test_a_column_of_chunks_of_any_type(scene, place, column) -> None:
    for value in EVIL_VALUES:
        scene.copy(place.store)
        if value is None:
            relax(place.store)
        execute(place.store, (f"UPDATE chunks SET {column} = ? WHERE segment = 2 AND position = 1", (value,)))
        ask_once(scene, place)
    live_through(scene, place)


def ask_once(scene: Scene, place: Neighbourhood) -> None:
    tally = Tally()
    with place.watched(), PrefixStore(place.store) as store:
        for name in ("child", "grandchild"):
            scene.request(store, name, "explicit", "exact", tally)
        store.gc()
        scene.count_lost(store, ALL, tally)
    assert (tally.wrong, tally.crashes, tally.lost) == ([], [], [])


def relax(folder: Path) -> None:
    """Make NULL possible where the schema forbids it (a primary key stays one)."""
    db = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    db.execute("PRAGMA writable_schema = ON")
    db.execute("UPDATE sqlite_master SET sql = replace(sql, ' NOT NULL', '') WHERE name = 'segments'")
    # Columns of a primary key without rowid are never NULL: those of `chunks` get one.
    db.execute("PRAGMA writable_schema = RESET")
    db.execute("CREATE TABLE loose AS SELECT * FROM chunks")
    db.execute("DROP TABLE chunks")
    db.execute("ALTER TABLE loose RENAME TO chunks")
    db.close()


# ---- chains ----

CHAINS = {
    "a parent that is itself": "UPDATE segments SET parent = (SELECT hash FROM chunks WHERE segment = segments.id "
    "ORDER BY position DESC LIMIT 1)",
    "a parent that is its own first chunk": "UPDATE segments SET parent = (SELECT hash FROM chunks WHERE segment = "
    "segments.id AND position = 0)",
    "a circle of two": "UPDATE segments SET parent = (SELECT hash FROM chunks WHERE segment = 3 - segments.id "
    "AND position = 0) WHERE id IN (1, 2)",
    "every parent is the same": "UPDATE segments SET parent = (SELECT hash FROM chunks WHERE segment = 3 LIMIT 1)",
    "chunks that follow themselves": "UPDATE chunks SET parent = hash",
    "all chunks in one segment": "UPDATE OR IGNORE chunks SET segment = 1",
    "chunks of another segment": "UPDATE OR IGNORE chunks SET segment = 7 - segment",
    "all at position 0": "UPDATE chunks SET position = 0",
    "positions far away": "UPDATE chunks SET position = position + 4503599627370496",
    "positions from the end": "UPDATE chunks SET position = 1 - position",
    "first chunks far away": "UPDATE segments SET first_chunk = 4503599627370496 WHERE first_chunk > 0",
    "no first chunks": "UPDATE segments SET first_chunk = 0",
    "all for the first model": "UPDATE segments SET fingerprint = (SELECT fingerprint FROM segments WHERE id = 1)",
    "longer than they are": "UPDATE segments SET num_tokens = num_tokens + 16, num_chunks = num_chunks + 1",
    "tokens of another prefix": "UPDATE chunks SET tokens = (SELECT tokens FROM chunks WHERE segment = 5 LIMIT 1)",
    "no tokens at all": "UPDATE chunks SET tokens = x''",
    "a trigger": "CREATE TRIGGER evil AFTER UPDATE ON segments BEGIN DELETE FROM segments; END",
    "a view in the place of a table": "ALTER TABLE chunks RENAME TO kept; CREATE VIEW chunks AS SELECT * FROM kept",
}


@pytest.mark.parametrize("what", CHAINS)
def test_a_chain_that_leads_nowhere(scene, place, what) -> None:
    execute(place.store, *((statement, ()) for statement in CHAINS[what].split("; C")[:1]))
    if "; C" in CHAINS[what]:
        execute(place.store, ("C" + CHAINS[what].split("; C")[1], ()))
    live_through(scene, place)


@pytest.mark.parametrize(("left", "right"), [("lone", "parent"), ("other", "child"), ("sibling", "child")])
def test_rows_that_exchanged_their_keys(scene, place, left, right) -> None:
    """The index names one prefix's segment for another's tokens: nobody gets the other one's KV."""
    execute(
        place.store,
        ("UPDATE segments SET key = 'x' WHERE key = ?", (scene.keys[left],)),
        ("UPDATE segments SET key = ? WHERE key = ?", (scene.keys[left], scene.keys[right])),
        ("UPDATE segments SET key = ? WHERE key = 'x'", (scene.keys[right],)),
    )
    live_through(scene, place)


# ---- names of files ----


@pytest.mark.parametrize(
    "name",
    ["..x", "victim", "ab" * 16 + ".x", "a" * 255, "\n", "ä", ".hidden", "-rf", "ab" * 16, b"\xff\xfe"],
    ids=ascii,
)
def test_crafted_pins(scene, place, name) -> None:
    pins = place.store / "pins"
    pins.mkdir()
    with open(os.path.join(os.fsencode(pins), os.fsencode(name)), "w"):
        pass
    live_through(scene, place)


def test_a_pin_that_is_a_folder_or_a_link(scene, place) -> None:
    pins = place.store / "pins"
    pins.mkdir()
    (pins / ("ab" * 16)).mkdir()
    (pins / ("cd" * 16)).symlink_to(place.outside / "victim")
    (pins / scene.keys["child"]).symlink_to(place.outside / "victim")
    with place.watched(), PrefixStore(place.store) as store:
        store.pin(scene.keys["child"])
        store.unpin(scene.keys["child"])
    live_through(scene, place)


@pytest.mark.parametrize("inner", ["pins", "partial", "damaged", "segments"])
def test_a_folder_of_the_store_that_is_a_link(scene, place, inner) -> None:
    """A link in the place of one of its folders leads out: it is refused, or nothing behind it is touched."""
    shutil.rmtree(place.store / inner, ignore_errors=True)
    (place.store / inner).symlink_to(place.outside)
    try:
        with place.watched(), PrefixStore(place.store) as store:
            tally = Tally()
            for name in ALL:
                scene.request(store, name, "explicit", "exact", tally)
            store.verify()
            store.gc()
        assert (tally.wrong, tally.crashes) == ([], [])
    except ContiguousKVError as error:
        assert inner in str(error)  # noqa: PT017 (a refusal is one of two right outcomes)
    place.assert_untouched()


NAMES = [
    "segments/ab/{other}.safetensors",
    "segments/abc/x.safetensors",
    "segments/../x.safetensors",
    "segments/zz/zz.safetensors",
    "segments/ab/" + "ab" * 16 + ".safetensors.tmp",
    "segments/ab/" + "ab" * 16 + "\n.safetensors",
    "segments/ab/ab..safetensors",
    "segments/AB/" + "AB" * 16 + ".safetensors",
    "segments/x",
    "segments/ab",
    "partial/x",
    "partial/.partial",
    "partial/ab.partial.d/x",
    "damaged/../y",
    "damaged/ab.safetensors",
    "index.sqlite.damaged-",
    "index.sqlite.new",
    "anything else",
]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_files_with_crafted_names(scene, place, name) -> None:
    path = place.store / name.format(other=scene.keys["lone"])
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(segment_path(place.store, scene.keys["lone"]), path)
    live_through(scene, place)


@pytest.mark.parametrize("name", ["partial/evil.partial", "index.sqlite.damaged-1", "index.sqlite.new", "index.lock"])
@pytest.mark.parametrize("target", ["victim", "ab", "nothing"])
def test_links_with_the_names_of_leftovers(scene, place, name, target) -> None:
    (place.store / name).unlink(missing_ok=True)
    (place.store / name).symlink_to(place.outside / target)
    live_through(scene, place)
    assert not (place.outside / "nothing").exists()


def test_a_segment_under_the_name_of_another(scene, place) -> None:
    """The file of one prefix lies under the name of another, and both do at once."""
    paths = [segment_path(place.store, scene.keys[name]) for name in ("lone", "other")]
    octets = [path.read_bytes() for path in paths]
    for path, other in zip(paths, reversed(octets), strict=True):
        path.write_bytes(other)
    tally = Tally()
    with place.watched(), PrefixStore(place.store) as store:
        for name in ALL:
            scene.request(store, name, "explicit", "exact", tally)
        store.gc()
        assert store.verify() == []
        for name in ALL:
            assert scene.found(store, name) == scene.sequences[name].ids.shape[1]
    assert (tally.wrong, tally.crashes) == ([], [])
    place.assert_untouched()


# ---- segments with crafted headers, of which the index is built ----


def rewrite_header(path: Path, **fields: str) -> None:
    """Change metadata of a segment in place and make its checksum right; the length of the header stays."""
    octets = path.read_bytes()
    length = int.from_bytes(octets[:8], "little")
    content = json.loads(octets[8 : 8 + length])
    content["__metadata__"].update(fields, checksum="0" * 16)
    text = json.dumps(content, separators=(",", ":")).encode()
    assert len(text) <= length
    text = text.ljust(length)
    checksum = f"{xxhash.xxh3_64_intdigest(text):016x}"
    text = text.replace(b'"checksum":"' + b"0" * 16, b'"checksum":"' + checksum.encode(), 1)
    path.write_bytes(octets[:8] + text + octets[8 + length :])


FIELDS = [
    {"fingerprint": "\ud800"},
    {"fingerprint": "\0"},
    {"fingerprint": ""},
    {"fingerprint": "x" * 60},
    {"fingerprint": "../../x"},
    {"beginning": "ab" * 16},
    {"beginning": ""},
    {"compute_ms": "999999999999"},
    {"salted": "1"},
    {"root": "ab" * 16},
    {"key": "ab" * 16},
    {"first_chunk": "7", "parent": "ab" * 16},
    {"first_chunk": "999999999999999", "parent": "ab" * 16},
    {"num_tokens": "39"},
    {"chunk_size": "32"},
    {"chunk_size": "1"},
    {"version": "1"},
    {"version": "3"},
    {"packed_layers": "0"},
    {"packed_layers": ""},
    {"dtype": "float16"},
]


@pytest.mark.parametrize("fields", FIELDS, ids=ascii)
@pytest.mark.parametrize("rebuilt", [False, True], ids=["indexed before", "index rebuilt from it"])
def test_a_crafted_segment(scene, place, fields, rebuilt) -> None:
    """Its header has a right checksum. It is not used for what it is not, and harms nothing else."""
    rewrite_header(segment_path(place.store, scene.keys["lone"]), **fields)
    if rebuilt:
        (place.store / "index.sqlite").unlink()
    tally = Tally()
    with place.watched(), PrefixStore(place.store) as store:
        for name in (*ALL, "lone"):
            for mode in ("explicit", "automatic"):
                scene.request(store, name, mode, "exact", tally)
        store.verify()
        store.gc()
        store.inner.index.rebuild()
        scene.count_lost(store, [name for name in ALL if name != "lone"], tally)
    assert (tally.wrong, tally.crashes, tally.lost) == ([], [], [])
    place.assert_untouched()
