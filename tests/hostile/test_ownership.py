"""Folders and files that a second user has made beforehand, or may write: refused, left alone, or made again."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import sqlite3
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tally import Figures
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import StoreError, StoreFormatError, UntrustedOwnerError
from hf_contiguouskv.store import PrefixStore, index_file
from hf_contiguouskv.store.directory import Directory, require_trusted
from hf_contiguouskv.store.local_disk import LocalDisk
from hf_contiguouskv.store.partial_file import FileBlobWriter

from .conftest import STRANGER, as_stranger, needs_root, open_to_all

IDS = some_tokens(40)
MARKER = "contiguouskv-store.json"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store with one prefix of 40 tokens, of which every folder there can be is there."""
    with PrefixStore(tmp_path / "store") as store:
        stored = write_prefix(store, IDS)
        store.pin(stored.spans[0].segment.key)
    (tmp_path / "store" / "damaged").mkdir(mode=0o700)
    return tmp_path / "store"


def found(path: Path, **options: Any) -> int:
    with PrefixStore(path, **options) as store:
        stored = store.inner.lookup(FINGERPRINT, IDS, geometry().chunk_size)
        return stored.tokens if stored else 0


def segment_of(path: Path) -> Path:
    (segment,) = path.glob("segments/*/*.safetensors")
    return segment


def snapshot(path: Path) -> dict[str, tuple[int, int, int]]:
    return {
        str(file): (file.lstat().st_mtime_ns, file.lstat().st_mode, file.lstat().st_uid)
        for file in [path, *path.rglob("*")]
    }


def give_away(path: Path) -> None:
    os.chown(path, STRANGER, STRANGER, follow_symlinks=False)


def let(mode: int) -> Callable[[Path], None]:
    return lambda path: path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)


SPOILERS = [
    pytest.param(give_away, id="a stranger's", marks=needs_root),
    pytest.param(let(0o020), id="its group may write it"),
    pytest.param(let(0o002), id="all may write it"),
    pytest.param(let(0o1777), id="as a folder for all"),
]


# ---- what is refused on opening ----


@pytest.mark.parametrize("inner", [".", MARKER, "segments", "partial", "damaged", "pins"])
@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_store_that_others_own_or_may_write_is_refused(
    path: Path, inner: str, spoil: Callable[[Path], None], attacks: Figures
) -> None:
    spoil(path / inner)
    before = snapshot(path)
    with pytest.raises(UntrustedOwnerError, match=r"trust_owner=True") as caught:
        PrefixStore(path)
    assert str(path / inner) in str(caught.value)
    assert snapshot(path) == before
    assert found(path, trust_owner=True) == 40
    attacks.add("strangers' folders and markers refused")


@needs_root
@pytest.mark.parametrize("empty", [True, False], ids=["an empty folder", "a store"])
def test_a_folder_that_a_stranger_made_beforehand(tmp_path: Path, empty: bool, attacks: Figures) -> None:
    """The user who makes the folder first would read all prompts, and decide what is answered."""
    common = tmp_path / "common"
    common.mkdir()
    common.chmod(0o1777)
    open_to_all(tmp_path)
    planted = common / "store"

    def plant() -> None:
        if empty:
            planted.mkdir()
            planted.chmod(0o777)
        else:
            with PrefixStore(planted) as store:
                write_prefix(store, IDS)
            planted.chmod(0o777)

    as_stranger(plant)
    before = snapshot(planted)
    with pytest.raises(UntrustedOwnerError, match=f"belongs to user {STRANGER}"):
        PrefixStore(planted)
    assert snapshot(planted) == before
    attacks.add("strangers' folders and markers refused")


@needs_root
def test_what_root_owns_is_trusted_by_others(tmp_path: Path, attacks: Figures) -> None:
    folder = tmp_path / "of-root"
    folder.mkdir()
    open_to_all(folder)

    def look() -> None:
        Directory.open(folder).close()
        with pytest.raises(UntrustedOwnerError):
            Directory.open(theirs)

    theirs = tmp_path / "of-another"
    theirs.mkdir()
    theirs.chmod(0o755)
    os.chown(theirs, STRANGER + 1, STRANGER + 1)
    as_stranger(look)
    attacks.add("strangers' folders and markers refused")


@pytest.mark.parametrize("mode", range(0o000, 0o1000, 0o001 * 9))
def test_every_mode_is_judged_by_who_may_write(mode: int) -> None:
    status = os.stat_result((stat.S_IFREG | mode, 1, 1, 1, os.geteuid(), 0, 0, 0, 0, 0))
    if mode & 0o022:
        with pytest.raises(UntrustedOwnerError):
            require_trusted(status, "file")
        require_trusted(status, "file", trust_owner=True)
    else:
        require_trusted(status, "file")


# ---- an empty folder of one's own ----


@pytest.mark.parametrize("mode", [0o700, 0o755, 0o770, 0o777, 0o1777])
def test_an_empty_folder_of_ones_own_is_closed_before_anything_is_in_it(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(mode)
    create, modes = Directory.create_file, []

    def note(self: Directory, name: str) -> int:
        modes.append(stat.S_IMODE(folder.stat().st_mode))
        return create(self, name)

    monkeypatch.setattr(Directory, "create_file", note)
    with PrefixStore(folder):
        pass
    assert set(modes) == {0o700}
    attacks.add("folders closed to others")


def test_what_is_put_into_an_open_folder_in_the_last_moment_is_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(0o777)
    real = os.fchmod

    def race(descriptor: int, mode: int) -> None:
        (folder / "segments").mkdir(exist_ok=True)
        real(descriptor, mode)

    monkeypatch.setattr(os, "fchmod", race)
    with pytest.raises(StoreFormatError, match="holds other files"):
        PrefixStore(folder)
    assert [file.name for file in folder.iterdir()] == ["segments"]
    attacks.add("strangers' folders and markers refused")


def test_a_folder_that_is_trusted_as_it_is_keeps_its_mode(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    folder.mkdir()
    folder.chmod(0o770)
    with PrefixStore(folder, trust_owner=True):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o770
    with pytest.raises(UntrustedOwnerError):
        PrefixStore(folder)


# ---- what is used later ----


@pytest.mark.parametrize("which", ["the folder", "the file"])
@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_segment_that_others_could_have_written_is_skipped_and_left_alone(
    path: Path, which: str, spoil: Callable[[Path], None], attacks: Figures
) -> None:
    segment = segment_of(path)
    spoil(segment if which == "the file" else segment.parent)
    content = segment.read_bytes()
    with PrefixStore(path) as store:
        assert store.inner.lookup(FINGERPRINT, IDS, geometry().chunk_size) is None
        store.gc()
        store.inner.index.rebuild()
        assert store.inner.lookup(FINGERPRINT, IDS, geometry().chunk_size) is None
    assert segment.read_bytes() == content
    assert found(path, trust_owner=True) == 40
    attacks.add("strangers' segments skipped")


@pytest.mark.parametrize("suffix", ["", "-wal", "-shm", "-journal"])
@pytest.mark.parametrize("spoil", SPOILERS)
def test_an_index_that_others_could_have_written_is_made_anew(
    path: Path, suffix: str, spoil: Callable[[Path], None], attacks: Figures
) -> None:
    file = path / f"index.sqlite{suffix}"
    file.touch(mode=0o600)
    spoil(file)
    assert found(path) == 40
    index = path / "index.sqlite"
    assert (index.stat().st_uid, stat.S_IMODE(index.stat().st_mode)) == (os.geteuid(), 0o600)
    aside = list(path.glob("index.sqlite.damaged-*"))
    assert len(aside) == 1
    with PrefixStore(path) as store:
        assert store.verify() == []
    attacks.add("strangers' indexes not used")


@needs_root
def test_a_strangers_partial_file_is_left_alone(path: Path, attacks: Figures) -> None:
    file = path / "partial" / f"{'ab' * 16}.00000000.partial"
    file.write_bytes(b"theirs")
    give_away(file)
    disk = LocalDisk(path)
    assert disk.collect().in_use == (f"partial/{file.name}",)
    assert file.read_bytes() == b"theirs"
    disk.close()
    attacks.add("strangers' files left alone")


# ---- rights to what is made ----

UMASKS = [0o000, 0o022, pytest.param(0o777, marks=needs_root), pytest.param(0o577, marks=needs_root)]


@pytest.fixture(params=UMASKS, ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[None]:
    before = os.umask(request.param)
    yield
    os.umask(before)


def test_all_that_is_made_is_for_its_owner_only_from_its_first_moment(
    umask: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    tmp_path.chmod(0o755)
    path = tmp_path / "store"
    write, connect = FileBlobWriter.write, sqlite3.connect
    seen: dict[str, int] = {}

    def note() -> None:
        for file in [path, *path.rglob("*")]:
            with contextlib.suppress(FileNotFoundError):  # (Some come and go.)
                mode = stat.S_IMODE(file.lstat().st_mode)
                assert mode == (0o700 if file.is_dir() else 0o600), (file, oct(mode))
                seen[file.name.rpartition(".")[2]] = mode

    def noting_write(self: FileBlobWriter, offset: int, octets: memoryview) -> None:
        note()
        write(self, offset, octets)

    def noting_connect(*values: Any, **named: Any) -> sqlite3.Connection:
        note()  # SQLite writes to what is there, and makes what it wants beside it with the same mode.
        return connect(*values, **named)

    monkeypatch.setattr(FileBlobWriter, "write", noting_write)
    monkeypatch.setattr(sqlite3, "connect", noting_connect)
    with PrefixStore(path) as store:
        stored = write_prefix(store, IDS)
        store.pin(stored.spans[0].segment.key)
        store.inner.index.rebuild()
        store.inner.discard(stored.spans[0].segment, "a test")
        write_prefix(store, IDS)
        note()
    assert {"partial", "new", "sqlite", "sqlite-wal", "sqlite-shm", "lock", "json", "safetensors"} <= set(seen)
    attacks.add("files closed to others")


@needs_root
def test_a_stranger_reads_no_file_and_holds_no_lock_of_a_folder_that_he_may_enter(
    tmp_path: Path, attacks: Figures
) -> None:
    """The folder was opened to all later: the files in it are closed all the same."""
    path = tmp_path / "store"
    before = os.umask(0)
    try:
        with PrefixStore(path) as store:
            write_prefix(store, IDS)
            writer = store.backend.create("ab" * 16, 5000)
            for folder in [path, *(file for file in path.rglob("*") if file.is_dir())]:
                folder.chmod(0o755)
            open_to_all(path)
            files = [file for file in path.rglob("*") if file.is_file()]
            assert {"index.lock", "index.sqlite-wal", MARKER} <= {file.name for file in files}
            assert any(file.suffix == ".partial" for file in files)

            def break_in() -> None:
                for file in files:
                    for flags in (os.O_RDONLY, os.O_WRONLY):
                        with pytest.raises(PermissionError):
                            fcntl.flock(os.open(file, flags), fcntl.LOCK_EX | fcntl.LOCK_NB)

            as_stranger(break_in)
            writer.discard()
    finally:
        os.umask(before)
    attacks.add("files closed to others")


@pytest.mark.parametrize("owner", ["ours", pytest.param("a stranger's", marks=needs_root)])
def test_a_lock_that_others_could_hold_is_closed_or_replaced(
    path: Path, owner: str, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    monkeypatch.setattr(index_file, "_LOCK_S", 0.5)
    lock = path / "index.lock"
    lock.unlink()
    lock.touch()
    lock.chmod(0o666)
    held = os.open(lock, os.O_RDWR)
    if owner != "ours":
        give_away(lock)
        fcntl.flock(held, fcntl.LOCK_EX)
    (path / "index.sqlite").unlink()
    assert found(path) == 40
    os.close(held)
    assert (lock.stat().st_uid, stat.S_IMODE(lock.stat().st_mode)) == (os.geteuid(), 0o600)
    attacks.add("locks closed to others")


def test_a_lock_of_ours_that_is_held_is_waited_for(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_file, "_LOCK_S", 0.2)
    (path / "index.lock").touch(mode=0o600)
    held = os.open(path / "index.lock", os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    (path / "index.sqlite").unlink()
    with pytest.raises(StoreError, match=r"index\.lock"):
        PrefixStore(path)
    os.close(held)
    assert found(path) == 40


# ---- folders and files as such ----


def test_a_directory_makes_and_replaces_files_for_its_owner_only(umask: None, tmp_path: Path, attacks: Figures) -> None:
    with Directory.open(tmp_path / "a" / "b", create=True) as folder, folder.sub("c", create=True) as inner:
        inner.write_file("file", b"first")
        inner.write_file("file", b"second")
        assert inner.read_file("file", 6) == b"second"
        with pytest.raises(OSError, match="more than the 5 bytes") as caught:
            inner.read_file("file", 5)
        assert caught.value.errno == errno.EFBIG
        assert inner.names() == ["file"]
        assert stat.S_IMODE(inner.path_of("file").stat().st_mode) == 0o600
        for place in (folder.path, inner.path):
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
        assert stat.S_IMODE(folder.path.parent.stat().st_mode) & 0o022 == 0
    attacks.add("files closed to others")
