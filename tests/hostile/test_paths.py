"""Folders are swapped for links while a store is open, and names are given to what they do not fit: nothing outside
the store is read, written, moved or deleted, and no folder that holds something is deleted at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tally import Figures
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import ContiguousKVError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.backend import SegmentBackend
from hf_contiguouskv.store.directory import Directory
from hf_contiguouskv.store.local_disk import LocalDisk

IDS, MORE = some_tokens(40), some_tokens(60)
MARKER = "contiguouskv-store.json"
REFUSALS = (ContiguousKVError, OSError)


class Outside:
    """A folder beside the store with all the names by which a careless path would reach it."""

    def __init__(self, path: Path, store: Path) -> None:
        self.path = path
        keys = [file.stem for file in store.glob("*/**/*.safetensors")]
        names = [MARKER, "index.sqlite", "index.sqlite.damaged-1", "index.lock", "a.partial", "victim"]
        for key in keys:
            names += [
                f"{key}.safetensors",
                key,
                f"{key[:2]}/{key}.safetensors",
                f"segments/{key[:2]}/{key}.safetensors",
            ]
            names += [f"damaged/{key}.safetensors", f"pins/{key}", f"partial/{key}.00000000.partial"]
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(b"not of the store")
        self._before = self._state()

    def _state(self) -> dict[str, tuple[int, int, bytes]]:
        """All that is there, with the times at which files were written and names given."""
        return {
            str(file): (file.lstat().st_mtime_ns, file.lstat().st_ino, file.read_bytes() if file.is_file() else b"")
            for file in [self.path, *self.path.rglob("*")]
        }

    def assert_untouched(self, trace: object) -> None:
        assert self._state() == self._before, trace


class Scene:
    """A store that is open, with a prefix, its continuation, one in quarantine, and what crashes leave."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "store"
        self.store = PrefixStore(self.path, host_bytes=0)
        self.key = write_prefix(self.store, IDS).spans[0].segment.key
        self.other = write_prefix(self.store, IDS + 1).spans[0].segment.key
        self.lost = write_prefix(self.store, IDS + 2).spans[0].segment
        self.store.pin(self.key)
        self.store.inner.discard(self.lost, "a test")
        (self.path / "partial" / f"{self.key}.00000000.partial").write_bytes(b"left by a crash")
        (self.path / "index.sqlite.damaged-1").write_bytes(b"left by a repair")
        (folder / "outside").mkdir()
        self.outside = Outside(folder / "outside", self.path)

    def swap(self, inner: str) -> None:
        """Put a link to the folder outside where a folder of the store is."""
        place = self.path / inner if inner else self.path
        place.rename(self.folder / "taken away")
        place.symlink_to(self.outside.path)

    def close(self) -> None:
        self.store.close()


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    made = Scene(tmp_path)
    yield made
    made.close()


def backend(scene: Scene) -> SegmentBackend:
    return scene.store.backend


ACTIONS: dict[str, Callable[[Scene], object]] = {
    "gc": lambda s: s.store.gc(),
    "gc, to look": lambda s: s.store.gc(dry_run=True),
    "collect": lambda s: backend(s).collect(),
    "verify": lambda s: s.store.verify(),
    "look up": lambda s: s.store.inner.lookup(FINGERPRINT, IDS, geometry().chunk_size),
    "publish": lambda s: write_prefix(s.store, MORE),
    "publish again": lambda s: write_prefix(s.store, IDS + 2),
    "delete": lambda s: s.store.delete(s.key, recursive=True),
    "delete the file": lambda s: backend(s).delete(s.key),
    "quarantine": lambda s: backend(s).quarantine(s.other, backend(s).identity(s.other)),
    "drop the quarantine": lambda s: backend(s).drop_quarantined(s.lost.key),
    "unpin": lambda s: s.store.unpin(s.key),
    "pin": lambda s: s.store.pin(s.other),
    "rebuild": lambda s: s.store.inner.index.rebuild(),
    "count": lambda s: s.store.stats,
    "lose the index": lambda s: ((s.path / "index.sqlite").unlink(missing_ok=True), s.store.entries()),
    "open another": lambda s: PrefixStore(s.path).close(),
}


def places(scene: Scene) -> dict[str, str]:
    return {
        "segments": "segments",
        "segments/ab": f"segments/{scene.key[:2]}",
        "the other's": f"segments/{scene.other[:2]}",
        "partial": "partial",
        "damaged": "damaged",
        "pins": "pins",
    }


@pytest.mark.parametrize("action", [name for name in ACTIONS if name != "lose the index"])
@pytest.mark.parametrize("place", ["segments", "segments/ab", "the other's", "partial", "damaged", "pins"])
def test_a_folder_that_is_swapped_for_a_link_leads_nowhere(
    scene: Scene, place: str, action: str, attacks: Figures
) -> None:
    scene.swap(places(scene)[place])
    with contextlib.suppress(*REFUSALS):
        ACTIONS[action](scene)
    scene.outside.assert_untouched(action)
    attacks.add("swapped folders not entered")


@pytest.mark.parametrize("action", [name for name in ACTIONS if name not in ("lose the index", "open another")])
def test_a_store_that_is_swapped_for_a_link_leads_nowhere(scene: Scene, action: str, attacks: Figures) -> None:
    """Segments are reached all the same, where the folder is now; an index that lies elsewhere is not written."""
    scene.swap("")
    with contextlib.suppress(*REFUSALS):
        ACTIONS[action](scene)
    scene.outside.assert_untouched(action)
    assert scene.store.backend.identity(scene.key) is not None or action.startswith("delete")
    attacks.add("swapped folders not entered")


_CALLS = ("open", "stat", "unlink", "rmdir", "replace", "mkdir", "scandir", "listdir", "fstat", "fsync")


@contextlib.contextmanager
def at_call(number: int, act: Callable[[], None]) -> Iterator[list[int]]:
    """Do something right before the call of the system with this number; how many there were."""
    calls = [0]

    def counting(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*values: Any, **named: Any) -> Any:
            calls[0] += 1
            if calls[0] == number:
                act()
            return call(*values, **named)

        return counted

    with pytest.MonkeyPatch.context() as patch:
        for name in _CALLS:
            patch.setattr(os, name, counting(getattr(os, name)))
        yield calls


RACES = ["gc", "collect", "delete", "delete the file", "quarantine", "drop the quarantine", "unpin", "publish again"]


@pytest.mark.parametrize("action", RACES)
@pytest.mark.parametrize("place", ["segments", "segments/ab", "the other's", "partial", "damaged", "pins"])
def test_a_folder_that_is_swapped_at_any_moment_leads_nowhere(
    tmp_path: Path, place: str, action: str, attacks: Figures
) -> None:
    """Between a check and what follows it there is always a moment."""
    number, total = 1, 1
    while number <= total:
        folder = tmp_path / str(number)
        folder.mkdir()
        scene = Scene(folder)
        swap = lambda scene=scene: scene.swap(places(scene)[place])  # noqa: E731
        with at_call(number, swap) as calls, contextlib.suppress(*REFUSALS):
            ACTIONS[action](scene)
        total = max(total, calls[0])
        scene.outside.assert_untouched(f"{action}: swapped before call {number} of {total}")
        scene.close()
        shutil.rmtree(folder)
        attacks.add("races for a folder lost")
        number += 1 + total // 25


@pytest.mark.parametrize("action", ["look up", "publish", "verify", "gc"])
def test_what_was_swapped_is_healed(scene: Scene, action: str, attacks: Figures) -> None:
    """A link in the place of a folder of segments goes, and what was in that folder is stored again."""
    scene.swap(places(scene)["segments/ab"])
    for _ in range(2):
        with contextlib.suppress(*REFUSALS):
            ACTIONS[action](scene)
    scene.close()
    with PrefixStore(scene.path) as store:
        store.gc()
        assert store.verify() == []
        write_prefix(store, IDS)
        stored = store.inner.lookup(FINGERPRINT, IDS, geometry().chunk_size)
        assert stored is not None
        assert stored.tokens == 40
        assert store.verify() == []
    scene.outside.assert_untouched(action)
    attacks.add("swapped folders healed")


def test_a_path_leads_to_the_store_that_lies_there_now(tmp_path: Path) -> None:
    """A store that this process has open was deleted or moved, and another one made at its path."""
    with PrefixStore(tmp_path / "store") as first:
        assert PrefixStore.shared(tmp_path / "store") is first
        (tmp_path / "store").rename(tmp_path / "moved")
        with PrefixStore.shared(tmp_path / "store") as second:
            assert second is not first
            write_prefix(second, IDS)
            assert PrefixStore.shared(tmp_path / "store") is second
        assert list((tmp_path / "moved").glob("segments/*/*")) == []


# ---- folders where files belong ----


@pytest.mark.parametrize(
    "name",
    [
        "damaged/{key}.safetensors",
        "damaged/{lost}.safetensors",
        "partial/x.partial",
        "index.sqlite",
        "index.sqlite-wal",
        "index.sqlite-shm",
        "index.sqlite-journal",
        "index.sqlite.new",
        "index.sqlite.new-wal",
        "index.lock",
        "index.sqlite.damaged-7",
        "pins/{key}",
        "segments/{ab}/{key}.safetensors",
        "segments/zz",
    ],
)
def test_a_folder_that_holds_something_is_never_deleted(scene: Scene, name: str, attacks: Figures) -> None:
    scene.close()
    place = scene.path / name.format(key=scene.key, lost=scene.lost.key, ab=scene.key[:2])
    if place.is_file():
        place.unlink()
    (place / "of a user").mkdir(parents=True)
    (place / "of a user" / "work").write_text("of years")
    with PrefixStore(scene.path) as store:
        store.inner.lookup(FINGERPRINT, IDS, geometry().chunk_size)
        store.unpin(scene.other)
        with contextlib.suppress(ContiguousKVError):
            store.pin(scene.key)
        store.inner.discard(store.inner.lookup(FINGERPRINT, IDS + 1, geometry().chunk_size).spans[0].segment, "a test")  # type: ignore[union-attr]
        write_prefix(store, IDS)
        for dry_run in (True, False, False):
            store.gc(dry_run=dry_run)
        store.inner.index.rebuild()
        assert store.inner.lookup(FINGERPRINT, IDS, geometry().chunk_size).tokens == 40  # type: ignore[union-attr]
        store.delete(scene.key)
    works = list(scene.path.rglob("work"))
    assert [file.read_text() for file in works] == ["of years"]
    attacks.add("folders not deleted")


def test_an_empty_folder_among_leftovers_goes(scene: Scene) -> None:
    scene.close()
    for name in ("partial/x.partial", "index.sqlite.damaged-7"):
        (scene.path / name).mkdir()
    with PrefixStore(scene.path) as store:
        assert "index.sqlite.damaged-7" in store.gc().removed
    assert list(scene.path.glob("partial/*")) == list(scene.path.glob("index.sqlite.damaged-*")) == []


# ---- names ----


NAMES = st.one_of(
    st.sampled_from(["", ".", "..", "/", "../outside", "a/../../outside", "/etc/passwd", "a\0b", "..\0", "outside/"]),
    st.text(st.sampled_from("./\0ao\udc80"), max_size=6),
)


@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=NAMES)
def test_no_name_leads_out_of_a_folder(tmp_path: Path, name: str) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    if not inside.exists():
        inside.mkdir(mode=0o700)
        outside.mkdir()
        (outside / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    with Directory.open(inside) as folder:
        if "/" in name or "\0" in name or name in ("", ".", ".."):
            for act in (
                folder.open_file,
                folder.create_file,
                folder.stat,
                folder.remove,
                folder.make_free,
                folder.sub,
                lambda name: folder.sub(name, create=True),
                lambda name: folder.write_file(name, b"x"),
                lambda name: folder.read_file(name, 10),
                lambda name: folder.rename(name, folder, "x"),
                lambda name: folder.rename("x", folder, name),
            ):
                with pytest.raises(OSError, match="not the name") as caught:
                    act(name)
                assert caught.value.errno == errno.EINVAL
        else:
            folder.write_file(name, b"x")
            assert folder.names() == [name]
            assert folder.remove(name)
    assert sorted(tmp_path.rglob("*")) == before
    assert (outside / "file").read_text() == "kept"


def test_a_directory_follows_no_link(tmp_path: Path, attacks: Figures) -> None:
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    inside.mkdir(mode=0o700)
    outside.mkdir()
    (outside / "file").write_text("kept")
    (inside / "link").symlink_to(outside)
    (inside / "file").symlink_to(outside / "file")
    with Directory.open(inside) as folder:
        for act in (folder.open_file, folder.create_file, lambda name: folder.read_file(name, 9)):
            with pytest.raises(OSError, match=r"symbolic|exists"):
                act("file")
        with pytest.raises(OSError, match=r"symbolic|directory"):
            folder.sub("link", create=True)
        folder.write_file("file", b"mine")
        assert (inside / "file").read_bytes() == b"mine"
        assert folder.make_free("link") is None
    with pytest.raises(OSError, match=r"symbolic|directory"):
        (tmp_path / "to").symlink_to(inside) or Directory.open(tmp_path / "to")  # type: ignore[func-returns-value]
    Directory.open(tmp_path / "to", follow=True).close()
    assert [(file.name, file.read_text()) for file in outside.iterdir()] == [("file", "kept")]
    attacks.add("links not followed")


def test_what_is_closed_is_no_other_folder(tmp_path: Path) -> None:
    """A number of a descriptor is given again: a user of the old one would reach something else."""
    folder = Directory.open(tmp_path)
    folder.close()
    folder.close()
    with open(tmp_path / "file", "w"), pytest.raises(OSError, match="descriptor"):
        folder.remove("file")
    assert (tmp_path / "file").exists()


def test_several_list_one_folder_at_once(tmp_path: Path) -> None:
    """Descriptors that were copied share a place in the list; so would threads and forked processes."""
    for number in range(300):
        (tmp_path / str(number)).touch()
    with Directory.open(tmp_path) as folder, folder.scan() as one:
        first = [next(one).name for _ in range(5)]
        assert len(folder.names()) == 300
        assert len({*first, *(entry.name for entry in one)}) == 300


def test_a_disk_is_made_of_an_open_folder_or_of_a_path(tmp_path: Path) -> None:
    with Directory.open(tmp_path) as folder:
        disk = LocalDisk(folder)
        disk.close()
        disk.close()
        assert sorted(folder.names()) == ["partial", "segments"]
