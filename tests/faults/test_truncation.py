"""Files that were cut, extended, emptied or replaced: the answer stays exact, and the file is named."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
import torch
from safetensors.torch import save_file

from hf_contiguouskv import PrefixStore

from .damage import Scene, Tally, is_root, regions, segment_path

VICTIMS = ("parent", "child")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("truncation"))


@pytest.fixture
def folder(scene: Scene, tmp_path: Path) -> Path:
    return scene.copy(tmp_path / "store")


@pytest.fixture(autouse=True)
def _no_hanging() -> Iterator[None]:
    """What waits for ever (a pipe that nobody writes to) fails instead."""

    def stop(number: int, frame: FrameType | None) -> None:
        pytest.fail("this waits for something that never comes")  # (No `OSError`: nobody takes it for a bad file.)

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 45, 1)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def ask_all(scene: Scene, store: PrefixStore, modes: tuple[str, ...], tally: Tally) -> None:
    """A question about everything that needs the segments of `VICTIMS`, and about what does not."""
    for mode in modes:
        for name in ("child", "parent", "grandchild", "sibling", "lone"):
            scene.request(store, name, mode, "exact", tally)


EXPLICIT_FIRST, AUTOMATIC_FIRST = ("explicit", "automatic"), ("automatic", "explicit")


def assert_all_is_well(scene: Scene, folder: Path, tally: Tally, *, except_for: str | None = None) -> None:
    """Nothing went wrong, and after a clean-up everything is stored and sound."""
    assert (tally.wrong, tally.crashes) == ([], [])
    with PrefixStore(folder) as store:
        store.gc()
        assert store.verify() == []
        for name, sequence in scene.sequences.items():
            assert scene.found(store, name) == sequence.ids.shape[1], name
        scene.count_lost(store, [name for name in scene.sequences if name != except_for], tally)
        assert tally.lost == []
        # (A folder that holds something is none of ours, and never deleted.)
        left = [path for path in (folder / "damaged").glob("*") if not path.is_dir() or not any(path.iterdir())]
        assert left == []


def live_through(
    scene: Scene, folder: Path, victim: str, caplog: pytest.LogCaptureFixture, modes: tuple[str, ...] = EXPLICIT_FIRST
) -> None:
    """The segment of `victim` is damaged: it is named, answers are exact, and everything is found again."""
    tally, key = Tally(), scene.keys[victim]
    with PrefixStore(folder) as store:
        problems = store.verify()
        assert {problem.key for problem in problems} == {key}
        assert str(segment_path(folder, key)) in str(problems[0]) or key in str(problems[0])
        ask_all(scene, store, modes, tally)
        assert any(key in record.getMessage() for record in caplog.records)
        assert not segment_path(folder, key).is_symlink()
    assert_all_is_well(scene, folder, tally, except_for=victim)


# ---- segments ----


def places_to_cut(path: Path) -> dict[str, int]:
    """Lengths to cut a segment to, by name: around the parts of its header and the boundaries of its tensors."""
    found = {"nothing": 0, "one byte": 1, "short of a length": 7, "nothing but a length": 8, "one byte of JSON": 9}
    for region, (start, end) in regions(path).items():
        found[f"inside {region}"] = (start + end) // 2
        found[f"before {region}"] = start
    return found | {"one byte less": path.stat().st_size - 1, "one page less": path.stat().st_size - 4096}


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_segment_that_was_cut(scene, tmp_path, caplog, victim) -> None:
    lengths = places_to_cut(segment_path(scene.closed, scene.keys[victim]))
    assert len(set(lengths.values())) >= 20
    for number, length in enumerate(sorted(set(lengths.values()))):
        folder = scene.copy(tmp_path / "store")
        os.truncate(segment_path(folder, scene.keys[victim]), length)
        caplog.clear()
        live_through(scene, folder, victim, caplog, (EXPLICIT_FIRST, AUTOMATIC_FIRST)[number % 2])


@pytest.mark.parametrize("extra", [b"\0", b" " * 8, bytes(4096), b"x" * 10_000], ids=len)
def test_a_segment_that_was_extended(scene, folder, caplog, extra) -> None:
    with open(segment_path(folder, scene.keys["parent"]), "ab") as file:
        file.write(extra)
    live_through(scene, folder, "parent", caplog)


def empty_folder(path: Path, outside: Path) -> None:
    path.mkdir()


def full_folder(path: Path, outside: Path) -> None:
    path.mkdir()
    (path / "a file").write_text("of a user")


def link_to_the_right_bytes(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "sound.safetensors")


def link_to_nothing(path: Path, outside: Path) -> None:
    path.symlink_to(outside / "nothing")


def link_to_itself(path: Path, outside: Path) -> None:
    path.symlink_to(path)


def link_to_a_device(path: Path, outside: Path) -> None:
    path.symlink_to("/dev/zero")


def link_to_a_folder(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def a_pipe(path: Path, outside: Path) -> None:
    os.mkfifo(path)


def foreign_safetensors(path: Path, outside: Path) -> None:
    save_file({"weight": torch.ones(8, 8)}, path)


def foreign_safetensors_with_our_names(path: Path, outside: Path) -> None:
    metadata = {"format": "hf_contiguouskv", "version": "3", "key": path.name.split(".")[0]}
    save_file({"payload.0": torch.ones(2, 1, 2, 2, 16, 16), "token_ids": torch.arange(32)}, path, metadata)


def text(path: Path, outside: Path) -> None:
    path.write_text("This is no segment. " * 1000)


def another_segment(path: Path, outside: Path) -> None:
    shutil.copy(outside / "another.safetensors", path)


REPLACEMENTS: list[Callable[[Path, Path], None]] = [
    empty_folder,
    full_folder,
    link_to_the_right_bytes,
    link_to_nothing,
    link_to_itself,
    link_to_a_device,
    link_to_a_folder,
    a_pipe,
    foreign_safetensors,
    foreign_safetensors_with_our_names,
    text,
    another_segment,
]


@pytest.mark.parametrize("replace", REPLACEMENTS)
@pytest.mark.parametrize("victim", VICTIMS)
def test_something_else_in_the_place_of_a_segment(scene, folder, tmp_path, caplog, victim, replace) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    path = segment_path(folder, scene.keys[victim])
    shutil.copy(path, outside / "sound.safetensors")
    shutil.copy(segment_path(folder, scene.keys["lone"]), outside / "another.safetensors")
    before = {file.name: file.read_bytes() for file in outside.iterdir()}
    path.unlink()
    replace(path, outside)
    live_through(scene, folder, victim, caplog)
    # What a link leads to was neither used (the segment was computed again) nor touched.
    assert {file.name: file.read_bytes() for file in outside.iterdir()} == before
    assert stat.S_ISREG(path.lstat().st_mode)
    if replace is full_folder:
        assert (folder / "damaged" / path.name / "a file").read_text() == "of a user"


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_link_is_not_followed_even_to_the_right_bytes(scene, folder, tmp_path, victim) -> None:
    path = segment_path(folder, scene.keys[victim])
    path.rename(tmp_path / "sound.safetensors")
    path.symlink_to(tmp_path / "sound.safetensors")
    with PrefixStore(folder) as store:
        ids = scene.sequences[victim].ids
        assert scene.found(store, victim) == {"parent": 0, "child": 32}[victim] < ids.shape[1]
    assert (tmp_path / "sound.safetensors").stat().st_nlink == 1


@pytest.mark.parametrize("victim", VICTIMS)
def test_a_segment_that_may_not_be_read(scene, folder, caplog, monkeypatch, victim) -> None:
    path = segment_path(folder, scene.keys[victim])
    with monkeypatch.context() as patch:
        if is_root():
            # Modes do not bind root: what everybody else would get is put in its way.
            refuse_to_open(patch, path)
        else:
            path.chmod(0)
        tally = Tally()
        with PrefixStore(folder) as store:
            assert {problem.key for problem in store.verify()} == {scene.keys[victim]}
            ask_all(scene, store, EXPLICIT_FIRST, tally)
            assert any(scene.keys[victim] in record.getMessage() for record in caplog.records)
    # The right bytes are there, wherever they were put: nothing is lost once they can be read.
    assert_all_is_well(scene, folder, tally, except_for=victim)


def refuse_to_open(patch: pytest.MonkeyPatch, refused: Path) -> None:
    real, inode = os.open, refused.stat().st_ino

    def guarded(path, flags, *args, **options):
        with contextlib.suppress(FileNotFoundError):
            found = os.stat(path, dir_fd=options.get("dir_fd"), follow_symlinks=False)
            if found.st_ino == inode:
                raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **options)

    patch.setattr(os, "open", guarded)


# ---- the index ----


def live_through_index_damage(scene: Scene, folder: Path, named: bool, caplog: pytest.LogCaptureFixture) -> None:
    """Whatever happened to the index: nothing is recomputed that is there, and nothing of it is lost."""
    tally = Tally()
    with PrefixStore(folder) as store:
        for name, sequence in scene.sequences.items():
            assert scene.found(store, name) == sequence.ids.shape[1], name
        ask_all(scene, store, ("explicit",), tally)
        assert store.stats.published == 0
        ask_all(scene, store, ("automatic",), tally)
        assert store.stats.quarantined == 0
    assert_all_is_well(scene, folder, tally)
    if named:
        assert any("index.sqlite" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize("file", ["index.sqlite", "index.sqlite-wal"])
def test_an_index_that_was_cut(scene, tmp_path, caplog, file) -> None:
    size = (scene.crashed / file).stat().st_size
    some = [0, 1, 15, 16, 31, 32, 33, 99, 100, 101, 4095, 4096, 4097, 4152, 8192, size // 2, size - 4096, size - 1]
    for length in sorted({length for length in some if 0 <= length < size}):
        for crashed in (False, True):
            if crashed or file == "index.sqlite":
                folder = scene.copy(tmp_path / "store", crashed=crashed)
                os.truncate(folder / file, min(length, (folder / file).stat().st_size))
                live_through_index_damage(scene, folder, False, caplog)


@pytest.mark.parametrize("file", ["index.sqlite", "index.sqlite-wal", "index.sqlite-shm"])
@pytest.mark.parametrize("content", [b"", b"\0" * 4096, b"SQLite format 3\0", b"text " * 5000], ids=lambda b: len(b))
def test_an_index_with_other_bytes(scene, tmp_path, caplog, file, content) -> None:
    folder = scene.copy(tmp_path / "store", crashed=True)
    (folder / file).write_bytes(content)
    live_through_index_damage(scene, folder, file == "index.sqlite" and len(content) == 25_000, caplog)


@pytest.mark.parametrize("file", ["index.sqlite", "index.sqlite-wal", "index.sqlite-shm", "index.sqlite.new"])
@pytest.mark.parametrize("replace", [empty_folder, full_folder, link_to_nothing, link_to_itself, link_to_a_device])
def test_something_else_in_the_place_of_the_index(scene, tmp_path, caplog, file, replace) -> None:
    folder = scene.copy(tmp_path / "store")
    (folder / file).unlink(missing_ok=True)
    if file == "index.sqlite.new":
        (folder / "index.sqlite").unlink()  # So that a new one is made, by this very name.
    (tmp_path / "outside").mkdir()
    replace(folder / file, tmp_path / "outside")
    live_through_index_damage(scene, folder, False, caplog)
    assert list((tmp_path / "outside").iterdir()) == []


def test_a_link_to_another_index(scene, tmp_path, caplog) -> None:
    """A database elsewhere, even a sound one, is neither read nor written."""
    folder = scene.copy(tmp_path / "store")
    other = tmp_path / "other.sqlite"
    (folder / "index.sqlite").rename(other)
    before = other.read_bytes()
    (folder / "index.sqlite").symlink_to(other)
    live_through_index_damage(scene, folder, False, caplog)
    assert other.read_bytes() == before
    assert not (folder / "index.sqlite").is_symlink()
    assert not list(tmp_path.glob("other.sqlite-*"))


@pytest.mark.parametrize("gone", [["index.sqlite"], ["index.sqlite-wal"], ["index.sqlite-shm"]], ids="+".join)
def test_an_index_that_is_gone(scene, tmp_path, caplog, gone) -> None:
    folder = scene.copy(tmp_path / "store", crashed=True)
    for name in gone:
        (folder / name).unlink()
    live_through_index_damage(scene, folder, False, caplog)
