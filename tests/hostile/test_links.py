"""Names in a store that lead to files elsewhere while they are opened; locks that others hold; umasks."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import shutil
import sqlite3
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tally import Figures
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import StoreError, UntrustedOwnerError
from hf_contiguouskv.store import PrefixStore, index_file, new_descriptors
from hf_contiguouskv.store.directory import Directory
from hf_contiguouskv.store.index_file import IndexFile
from hf_contiguouskv.store.new_descriptors import NewDescriptors

from .conftest import STRANGER, as_stranger, in_child, needs_root, open_to_all

IDS = some_tokens(40)
BESIDE = ["", "-wal", "-shm", "-journal"]

needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list descriptors")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    with PrefixStore(tmp_path / "store") as store:
        write_prefix(store, IDS)
    return tmp_path / "store"


@pytest.fixture
def private(tmp_path: Path) -> Path:
    """The index of another store."""
    with PrefixStore(tmp_path / "private") as store:
        write_prefix(store, some_tokens(24, seed=7))
    return tmp_path / "private" / "index.sqlite"


def found(path: Path, **options: Any) -> int:
    with PrefixStore(path, **options) as store:
        stored = store.inner.lookup(FINGERPRINT, IDS, geometry().chunk_size)
        return stored.tokens if stored else 0


# ---- what SQLite opens ----


def a_link(place: Path, private: Path) -> None:
    place.symlink_to(private)


def another_file(place: Path, private: Path) -> None:
    shutil.copy(private, place)


def a_link_to_the_folder(place: Path, private: Path) -> None:
    place.parent.rename(place.parent.with_name("away"))
    place.parent.symlink_to(private.parent)


def undo(place: Path, kept: Path) -> None:
    if place.parent.is_symlink():
        place.parent.unlink()
        place.parent.with_name("away").rename(place.parent)
    else:
        place.unlink()
    if kept.exists():
        kept.rename(place)


@needs_proc
@pytest.mark.parametrize("lie", [a_link, another_file, a_link_to_the_folder])
@pytest.mark.parametrize("also_open", [False, True], ids=["alone", "while both are open"])
def test_what_lies_there_only_while_sqlite_looks_is_not_used(
    path: Path,
    private: Path,
    tmp_path: Path,
    lie: Callable[[Path, Path], None],
    also_open: bool,
    monkeypatch: pytest.MonkeyPatch,
    attacks: Figures,
) -> None:
    """Before and after, it is the file that was looked at."""
    place, kept = path / "index.sqlite", tmp_path / "kept"
    connect, asked = sqlite3.connect, []
    content = private.read_bytes()

    def racing(*values: Any, **named: Any) -> sqlite3.Connection:
        if lie is not a_link_to_the_folder:
            place.rename(kept)
        lie(place, private)
        db = connect(*values, **named)
        undo(place, kept)
        db.set_trace_callback(asked.append)
        return db

    with contextlib.ExitStack() as stack:
        if also_open:
            for one in (path, private.parent):
                stack.enter_context(PrefixStore(one)).entries()
        folder = stack.enter_context(Directory.open(path))
        with monkeypatch.context() as patch:
            patch.setattr(sqlite3, "connect", racing)
            with pytest.raises(StoreError, match="another one was put in its place"):
                IndexFile(folder).connect(busy_s=0.0)
        db, _ = IndexFile(folder).connect(busy_s=0.0)
        db.close()
    assert set(asked) <= {"PRAGMA database_list"}
    assert private.read_bytes() == content
    assert found(path) == 40
    attacks.add("files that lie there for a moment not used")


def test_a_link_is_seen_where_the_system_lists_no_descriptors(
    path: Path, private: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    monkeypatch.setattr(new_descriptors, "_open_descriptors", lambda: None)
    assert found(path) == 40
    monkeypatch.undo()
    monkeypatch.setattr(NewDescriptors, "may_hold", lambda *_: True)
    place, kept, connect = path / "index.sqlite", tmp_path / "kept", sqlite3.connect

    def racing(*values: Any, **named: Any) -> sqlite3.Connection:
        place.rename(kept)
        place.symlink_to(private)
        db = connect(*values, **named)
        undo(place, kept)
        return db

    with Directory.open(path) as folder, monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", racing)
        with pytest.raises(StoreError, match="another one was put in its place"):
            IndexFile(folder).connect(busy_s=0.0)
    attacks.add("files that lie there for a moment not used")


@needs_proc
def test_a_descriptor_that_sqlite_uses_again_is_known(path: Path) -> None:
    """What it could not close, because of a lock of another connection, it takes for the next one."""
    with Directory.open(path) as folder:
        index = IndexFile(folder)
        writer, _ = index.connect(busy_s=0.0)
        writer.execute("BEGIN IMMEDIATE")
        for _ in range(3):
            db, _ = index.connect(busy_s=0.0)
            assert db.execute("SELECT count(*) FROM segments").fetchone() == (1,)
            db.close()
        writer.close()


def test_many_threads_open_and_close_what_they_like_meanwhile(path: Path) -> None:
    end = threading.Event()

    def busy() -> None:
        while not end.is_set():
            with open(path / "contiguouskv-store.json"):
                pass

    threads = [threading.Thread(target=busy) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            assert found(path) == 40
    finally:
        end.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("name", ["ü and 'quotes' ?#%41", b"no text \xff".decode(errors="surrogateescape"), "a/../b"])
def test_paths_of_every_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / "a").mkdir()
    path = Path(f"{tmp_path}/{name}")
    with PrefixStore(path) as store:
        write_prefix(store, IDS)
    assert found(path) == 40
    (tmp_path / "link").symlink_to(path)
    assert found(tmp_path / "link") == 40


# ---- hard links ----


@pytest.mark.parametrize("suffix", BESIDE)
def test_an_index_that_is_also_a_file_elsewhere_is_not_written(
    path: Path, private: Path, suffix: str, attacks: Figures
) -> None:
    content, mode = private.read_bytes(), private.stat().st_mode
    file = path / f"index.sqlite{suffix}"
    file.unlink(missing_ok=True)
    os.link(private, file)
    assert found(path) == 40
    assert found(path) == 40
    with PrefixStore(path) as store:
        store.gc()
        assert store.verify() == []
        write_prefix(store, IDS + 1)
    assert (private.read_bytes(), private.stat().st_mode, private.stat().st_nlink) == (content, mode, 1)
    attacks.add("hard links not followed")


@pytest.mark.parametrize("options", [{}, {"trust_owner": True}])
def test_a_lock_that_is_also_a_file_elsewhere_is_replaced(
    path: Path, tmp_path: Path, options: dict[str, Any], attacks: Figures
) -> None:
    outside = tmp_path / "outside"
    outside.write_text("precious")
    outside.chmod(0o644)
    (path / "index.lock").unlink()
    os.link(outside, path / "index.lock")
    (path / "index.sqlite").unlink()
    assert found(path, **options) == 40
    assert (outside.read_text(), stat.S_IMODE(outside.stat().st_mode)) == ("precious", 0o644)
    assert outside.stat().st_nlink == 1
    assert stat.S_IMODE((path / "index.lock").stat().st_mode) == 0o600
    attacks.add("hard links not followed")


def test_a_copy_of_links_is_a_backup(path: Path, tmp_path: Path) -> None:
    """Segments may have other names, for nothing writes to them. The index is made again, in both stores."""
    shutil.copytree(path, tmp_path / "copy", copy_function=os.link)
    for one in (path, tmp_path / "copy", path):
        assert found(one) == 40
    with PrefixStore(path) as store:
        store.delete(store.entries()[0].key)
    assert [found(path), found(tmp_path / "copy")] == [0, 40]


# ---- locks ----


def lock_of(path: Path, mode: int) -> int:
    """A descriptor of a lock with this mode, as a user has who may only read it."""
    lock = path / "index.lock"
    lock.touch()
    lock.chmod(mode)
    return os.open(lock, os.O_RDONLY)


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o610, 0o601, 0o666])
def test_a_lock_that_others_can_read_is_replaced(
    path: Path, mode: int, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    """A user who could read it once could hold the lock, also later."""
    monkeypatch.setattr(index_file, "_DOUBTFUL_LOCK_S", 0.2)
    monkeypatch.setattr(index_file, "_LOCK_S", 0.5)
    for holds in (False, True):
        held = lock_of(path, mode)
        if holds:
            fcntl.flock(held, fcntl.LOCK_EX)
        (path / "index.sqlite").unlink()
        assert found(path) == 40
        assert os.fstat(held).st_nlink == 0
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        (path / "index.sqlite").unlink()
        assert found(path) == 40
        os.close(held)
        assert stat.S_IMODE((path / "index.lock").stat().st_mode) == 0o600
    attacks.add("locks closed to others")


@needs_root
def test_a_reader_of_the_store_does_not_stop_it(path: Path, monkeypatch: pytest.MonkeyPatch, attacks: Figures) -> None:
    monkeypatch.setattr(index_file, "_DOUBTFUL_LOCK_S", 0.2)
    monkeypatch.setattr(index_file, "_LOCK_S", 0.5)
    for place in (path, *path.rglob("*")):
        place.chmod(0o755 if place.is_dir() else 0o644)
    open_to_all(path)
    locked, end = (multiprocessing.get_context("fork").Event() for _ in range(2))

    def hold() -> None:
        def work() -> None:
            fcntl.flock(os.open(path / "index.lock", os.O_RDONLY), fcntl.LOCK_EX)
            locked.set()
            end.wait(60)

        as_stranger(work)

    (path / "index.lock").touch()
    (path / "index.lock").chmod(0o644)
    process = multiprocessing.get_context("fork").Process(target=hold)
    process.start()
    try:
        assert locked.wait(30)
        (path / "index.sqlite").unlink()
        assert found(path) == 40
    finally:
        end.set()
        process.join()
    attacks.add("locks closed to others")


def test_a_lock_that_somebody_replaced_while_we_waited_is_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes that find a bad lock must not delete each other's good one."""
    held = lock_of(path, 0o644)
    lock = path / "index.lock"
    real = fcntl.flock

    def race(descriptor: int, operation: int) -> None:
        if lock.stat().st_ino == os.fstat(held).st_ino:
            lock.rename(path / "aside")
            lock.touch(mode=0o600)
        real(descriptor, operation)

    with Directory.open(path) as folder:
        monkeypatch.setattr(fcntl, "flock", race)
        with IndexFile(folder).lock():
            good = lock.stat()
        assert good.st_ino != os.fstat(held).st_ino
        assert lock.stat().st_ino == good.st_ino
    os.close(held)


@pytest.mark.parametrize("moment", ["while it builds", "before it is put in place"])
def test_of_two_that_build_at_once_one_gives_up(path: Path, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the lock was taken from one of them after all: the index is whole, whichever was faster."""
    (path / "index.sqlite").unlink()
    seen: list[int] = []
    build, is_due = IndexFile.build, IndexFile.is_due

    def other() -> None:
        monkeypatch.undo()
        (path / "index.lock").unlink()
        in_child(lambda: found(path))
        seen.append((path / "index.sqlite").stat().st_ino)

    @contextlib.contextmanager
    def racing_build(self: IndexFile) -> Iterator[sqlite3.Connection]:
        with build(self) as db:
            if moment == "while it builds" and not seen:
                other()
            yield db

    def racing_is_due(self: IndexFile, found: Any) -> bool:
        if moment != "while it builds" and not seen:
            other()
        return is_due(self, found)

    monkeypatch.setattr(IndexFile, "build", racing_build)
    monkeypatch.setattr(IndexFile, "is_due", racing_is_due)
    assert found(path) == 40
    assert [(path / "index.sqlite").stat().st_ino] == seen
    assert list(path.glob("*.damaged-*")) == []
    with PrefixStore(path) as store:
        assert store.verify() == []


# ---- umasks ----


@needs_root
@pytest.mark.parametrize("umask", [0o777, 0o477, 0o377, 0o277, 0o177, 0o077, 0o000])
def test_a_store_is_made_whatever_the_umask_of_an_ordinary_user(tmp_path: Path, umask: int, attacks: Figures) -> None:
    """(Root may enter what it has no right to.)"""
    open_to_all(tmp_path)
    tmp_path.chmod(0o777)
    path = tmp_path / "above" / "store"

    def work() -> None:
        before = os.umask(umask)
        with PrefixStore(path) as store:
            stored = write_prefix(store, IDS)
            store.pin(stored.spans[0].segment.key)
        (path / "index.sqlite").unlink()
        assert found(path) == 40
        os.umask(before)
        for place in (path, *path.rglob("*")):
            assert stat.S_IMODE(place.lstat().st_mode) == (0o700 if place.is_dir() else 0o600), place

    as_stranger(work)
    assert path.parent.stat().st_mode & 0o022 == 0
    attacks.add("folders closed to others")


# ---- messages ----


def test_a_refusal_says_what_to_do(path: Path) -> None:
    path.chmod(0o770)
    with pytest.raises(UntrustedOwnerError, match=r"chmod -R go-w.*whole store.*trust_owner=True.*--trust-owner"):
        PrefixStore(path)
    path.chmod(0o700)
    if os.geteuid() == 0:
        os.chown(path, STRANGER, STRANGER)
        with pytest.raises(UntrustedOwnerError, match=r"trust_owner=True.*--trust-owner"):
            PrefixStore(path)
