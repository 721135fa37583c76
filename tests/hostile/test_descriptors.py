"""Chains of thousands of segments under the limits that systems have: descriptors are given back, and taken again."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tally import Figures
from unit.store_helpers import FINGERPRINT, expected_kv, geometry, read_back, some_tokens, write_prefix

from hf_contiguouskv.errors import SegmentReadError
from hf_contiguouskv.store import PrefixStore, descriptors
from hf_contiguouskv.store.conformance.tools import publish, read, some_bytes
from hf_contiguouskv.store.files import FileBlob
from hf_contiguouskv.store.hashing import root_hash, segment_hashes
from hf_contiguouskv.store.local_disk import LocalDisk

from .conftest import in_child
from .crafting import crafted, plant

G = geometry(num_layers=1, kv_heads=1, head_dim=1, leader_layers=(), indexed_layers=())
C = G.chunk_size


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> int:
    """A process that keeps four files open."""
    monkeypatch.setattr(descriptors, "_MAX_FILES", 4)
    monkeypatch.setattr(descriptors, "_FEW", 4)
    return 4


class Blobs:
    """Blobs on a disk, and what is in them."""

    def __init__(self, folder: Path, count: int, *, direct: bool = True) -> None:
        self.disk = LocalDisk(folder, direct=direct)
        self.contents = {f"{number:032x}": some_bytes(9000, number) for number in range(count)}
        for key, content in self.contents.items():
            publish(self.disk, key, content)
        self.open = {key: self.disk.open(key) for key in self.contents}

    def path(self, key: str) -> Path:
        return self.disk.path_of(key)

    def close(self) -> None:
        self.disk.close()


@pytest.fixture
def blobs(tmp_path: Path, few: int) -> Iterator[Blobs]:
    made = Blobs(tmp_path, 12)
    yield made
    made.close()


def without_descriptors(blobs: Blobs) -> list[str]:
    return [key for key, blob in blobs.open.items() if blob.held is None]


# ---- many ----


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """A chat of 2,000 turns, each one a segment."""
    path, ids = tmp_path_factory.mktemp("chat") / "store", some_tokens(2000 * C)
    PrefixStore(path).close()
    keys = [name.hex() for name in segment_hashes(root_hash(FINGERPRINT, C), ids, C, first=True)]
    for turn, key in enumerate(keys):
        plant(path, key, crafted(G, ids[: (turn + 1) * C], turn))
    PrefixStore(path).close()  # It finds them, as those that a crash left without a row.
    return path, ids


@pytest.mark.parametrize("limit", [128, 256, 1024])
def test_a_chat_of_two_thousand_turns_under_a_limit_of_descriptors(
    chat: tuple[Path, np.ndarray], limit: int, attacks: Figures
) -> None:
    """(Before: at 520 turns and 1,024 descriptors nothing was found, and counted as corrupt.)"""
    path, ids = chat

    def serve() -> None:
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        inherited = open_descriptors()
        with PrefixStore(path) as store:
            for _ in range(2):
                stored = store.inner.lookup(FINGERPRINT, ids, C)
                assert stored is not None
                assert (stored.tokens, len(stored.spans)) == (len(ids), 2000)
                (kv,) = read_back(store, stored, [0])
                assert (kv == expected_kv(G, ids, 0)).all()
                # Half of them are left to everything else.
                assert open_descriptors() - inherited < limit // 2 + 32
            assert (sum(store.stats.misses.values()), store.stats.quarantined) == (0, 0)
            assert store.verify() == []

    in_child(serve)
    attacks.add("chains longer than there are descriptors")


def test_descriptors_are_bounded_and_all_given_back(blobs: Blobs, few: int, attacks: Figures) -> None:
    before = open_descriptors()
    for _ in range(3):
        for key, blob in blobs.open.items():
            assert read(blob) == blobs.contents[key]
            assert descriptors.open_files() <= few
            assert len(blobs.open) - len(without_descriptors(blobs)) <= few
    assert open_descriptors() <= before + 2 * few
    blobs.close()
    assert len(without_descriptors(blobs)) == len(blobs.open)
    for blob in blobs.open.values():
        with pytest.raises(OSError, match="closed") as caught:
            read(blob)
        assert caught.value.errno == errno.EBADF
    attacks.add("chains longer than there are descriptors")


def test_what_is_read_again_and_again_stays_open(blobs: Blobs) -> None:
    favourite, *others = blobs.open
    read(blobs.open[favourite])
    held = blobs.open[favourite].held
    assert held is not None
    for key in others * 3:
        read(blobs.open[key])
        read(blobs.open[favourite])
    assert blobs.open[favourite].held is held


def test_a_process_without_descriptors_gives_some_back(tmp_path: Path, attacks: Figures) -> None:
    """Others have taken them, so the limit of this library alone does not help."""

    def serve() -> None:
        blobs = Blobs(tmp_path, 20)
        taken = []
        resource.setrlimit(resource.RLIMIT_NOFILE, (200, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        publish(blobs.disk, "a" * 32, b"more")
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open("/dev/null", os.O_RDONLY))
        assert read(blobs.disk.open("a" * 32)) == b"more"
        assert 0 < len(without_descriptors(blobs)) < 20
        for descriptor in taken[:8]:
            os.close(descriptor)
        for key, blob in blobs.open.items():
            assert read(blob) == blobs.contents[key]

    in_child(serve)
    attacks.add("chains longer than there are descriptors")


def test_the_limit_is_half_of_what_the_system_allows(monkeypatch: pytest.MonkeyPatch) -> None:
    for soft, most in ((1024, 256), (4096, 512), (2**20, 512), (256, 64), (20, 5), (3, 4)):
        monkeypatch.setattr(resource, "getrlimit", lambda kind, soft=soft: (soft, 2**20))
        assert descriptors.max_files() == most
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert descriptors.max_files() == 512


# ---- at once ----


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_eight_threads_read_while_files_are_closed_under_them(
    tmp_path: Path, few: int, direct: bool, attacks: Figures
) -> None:
    """Who reads holds the descriptors: a number that meant another file by then would give its bytes."""
    blobs = Blobs(tmp_path, 16, direct=direct)
    keys = list(blobs.open)
    wrong: list[str] = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(300):
            key = keys[random.integers(len(keys))]
            begin = int(random.integers(8999))
            length = int(random.integers(1, 9001 - begin))
            if read(blobs.open[key], begin, length) != blobs.contents[key][begin : begin + length]:
                wrong.append(key)

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(work, range(8)))
    assert wrong == []
    assert descriptors.open_files() <= few + 8
    blobs.close()
    attacks.add("reads under threads that open others", 2400)


def test_a_read_that_is_under_way_keeps_its_descriptors(
    blobs: Blobs, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    key, *others = blobs.open
    real, inside, go_on = os.preadv, threading.Event(), threading.Event()
    slow = blobs.open[key].fd_direct or blobs.open[key].fd_buffered

    def preadv(descriptor: int, *values: object) -> int:
        if descriptor == slow and not inside.is_set():
            inside.set()
            assert go_on.wait(30)
        return real(descriptor, *values)  # type: ignore[arg-type]

    monkeypatch.setattr(os, "preadv", preadv)
    with ThreadPoolExecutor(1) as thread:
        reading = thread.submit(read, blobs.open[key])
        assert inside.wait(30)
        for other in others * 2:
            assert read(blobs.open[other]) == blobs.contents[other]
        assert blobs.open[key].held is None
        assert os.fstat(slow).st_ino == blobs.path(key).stat().st_ino
        go_on.set()
        assert reading.result() == blobs.contents[key]
    # Now it was closed: what has its number, if anything, is another file.
    with contextlib.suppress(OSError):
        assert os.fstat(slow).st_ino != blobs.path(key).stat().st_ino
    attacks.add("reads under threads that open others")


def test_a_forked_child_reads_on_whoever_held_what(blobs: Blobs) -> None:
    """A lock that a thread of the parent held when it forked would never be given back."""
    with descriptors._pool._lock:
        in_child(lambda: [read(blob) for blob in blobs.open.values()])
    for key, blob in blobs.open.items():
        assert read(blob) == blobs.contents[key]


# ---- lost ----


def replace_with(octets: bytes, blobs: Blobs, key: str) -> None:
    publish(blobs.disk, key, octets)


LOSSES = {
    "deleted": lambda blobs, key: blobs.disk.delete(key),
    "replaced by others' bytes": lambda blobs, key: replace_with(some_bytes(9000, 99), blobs, key),
    "replaced by the same bytes": lambda blobs, key: replace_with(blobs.contents[key], blobs, key),
    "deleted and stored again": lambda blobs, key: (
        blobs.disk.delete(key),
        replace_with(some_bytes(9000, 99), blobs, key),
    ),
    "put aside": lambda blobs, key: blobs.disk.quarantine(key, blobs.disk.identity(key)),
    "written over": lambda blobs, key: blobs.path(key).write_bytes(some_bytes(9000, 99)),
    "cut": lambda blobs, key: os.truncate(blobs.path(key), 100),
    "a link": lambda blobs, key: (
        blobs.path(key).rename(blobs.disk.folder / "elsewhere"),
        blobs.path(key).symlink_to(blobs.disk.folder / "elsewhere"),
    ),
    "a folder": lambda blobs, key: (blobs.path(key).unlink(), blobs.path(key).mkdir()),
    "a pipe": lambda blobs, key: (blobs.path(key).unlink(), os.mkfifo(blobs.path(key))),
    "its folder swapped for a link": lambda blobs, key: (
        blobs.path(key).parent.rename(blobs.disk.folder / "elsewhere"),
        blobs.path(key).parent.symlink_to(blobs.disk.folder / "elsewhere"),
    ),
    "open to others": lambda blobs, key: blobs.path(key).chmod(0o602),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_file_that_is_another_one_by_now_is_lost(blobs: Blobs, loss: str, attacks: Figures) -> None:
    key = without_descriptors(blobs)[0]
    blob, identity = blobs.open[key], blobs.open[key].identity
    LOSSES[loss](blobs, key)
    for _ in range(2):
        with pytest.raises(OSError, match="replaced or deleted") as caught:
            read(blob)
        assert caught.value.errno == errno.EIO
        assert SegmentReadError("", None, caught.value.errno).damage  # So that its tokens are computed again.
    assert blob.identity != identity
    # What lies there now is not taken for it, and not put aside in its place.
    assert not blobs.disk.quarantine(key, blob.identity)
    attacks.add("files not taken for others")


@pytest.mark.parametrize("loss", ["deleted", "replaced by others' bytes", "put aside", "a link"])
def test_a_file_whose_descriptors_are_held_is_not_lost(blobs: Blobs, loss: str) -> None:
    key = next(key for key, blob in blobs.open.items() if blob.held is not None)
    LOSSES[loss](blobs, key)
    assert read(blobs.open[key]) == blobs.contents[key]


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ENOMEM, errno.EIO])
def test_a_file_that_cannot_be_opened_now_is_not_lost(blobs: Blobs, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    key = without_descriptors(blobs)[0]
    identity = blobs.open[key].identity

    def refuse(*values: object, **named: object) -> int:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", refuse)
        with pytest.raises(OSError, match=r".") as caught:
            read(blobs.open[key])
        assert caught.value.errno == code
    assert blobs.open[key].identity == identity
    assert read(blobs.open[key]) == blobs.contents[key]


def test_segments_that_were_stored_anew_are_found_after_a_loss(tmp_path: Path, few: int, attacks: Figures) -> None:
    ids = some_tokens(12 * C)
    with PrefixStore(tmp_path / "store") as store, PrefixStore(tmp_path / "store") as other:
        for turn in range(12):
            write_prefix(other, ids[: (turn + 1) * C], turn, G)
        stored = store.inner.lookup(FINGERPRINT, ids, C)
        assert stored is not None
        segment = next(span.segment for span in stored.spans if span.segment.blob.held is None)  # type: ignore[attr-defined]
        path = store.backend.path_of(segment.key)  # type: ignore[attr-defined]
        octets = path.read_bytes()
        path.unlink()
        (path.parent / "new").write_bytes(octets)
        (path.parent / "new").chmod(0o600)
        (path.parent / "new").rename(path)
        with pytest.raises(SegmentReadError) as caught:
            segment.read_bytes(0, 8)
        assert caught.value.damage
        store.inner.discard(segment, "it was lost")
        assert path.read_bytes() == octets
        assert store.stats.quarantined == 0
        again = store.inner.lookup(FINGERPRINT, ids, C)
        assert again is not None
        assert again.tokens == 12 * C
        assert len(read_back(store, again, [0])[0]) == 12
    attacks.add("files not taken for others")


# ---- what is backed ----


@settings(deadline=None, max_examples=80)
@given(
    pages=st.lists(st.booleans(), min_size=1, max_size=12),
    rest=st.integers(0, 4095),
    begin=st.integers(0, 13 * 4096),
    length=st.integers(0, 13 * 4096),
)
def test_what_is_more_than_half_a_hole_is_not_backed(
    tmp_path_factory: pytest.TempPathFactory, pages: list[bool], rest: int, begin: int, length: int
) -> None:
    path = tmp_path_factory.mktemp("holes") / "file"
    size = 4096 * len(pages) + rest
    with open(path, "wb") as file:
        for number, written in enumerate(pages):
            if written:
                os.pwrite(file.fileno(), some_bytes(4096, number), 4096 * number)
        if rest:
            os.pwrite(file.fileno(), some_bytes(rest), 4096 * len(pages))
        file.truncate(size)
    blob = FileBlob(path)
    holes = {page for page, written in enumerate(pages) if not written}
    missing = sum(max(0, min(begin + length, 4096 * (page + 1)) - max(begin, 4096 * page)) for page in holes)
    assert blob.is_backed(begin, length) == (begin + length <= size and missing <= length // 2)
    blob.close()


def test_a_file_of_nothing_but_holes(tmp_path: Path, attacks: Figures) -> None:
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", 2**40)
    blob = FileBlob(tmp_path / "file")
    assert (blob.nbytes, blob.stored_bytes) == (2**40, 0)
    for offset, nbytes in ((0, 1), (0, 2**40), (2**39, 4096), (2**40 - 1, 1), (-1, 2), (2**40, 1), (0, 2**62)):
        assert not blob.is_backed(offset, nbytes)
    assert blob.is_backed(2**39, 0)
    blob.close()
    attacks.add("holes told from bytes")


def test_where_holes_cannot_be_told_all_is_backed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    os.truncate(tmp_path / "file", 8192)
    blob = FileBlob(tmp_path / "file")

    def fails_with(code: int) -> None:
        def lseek(*values: object) -> int:
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(os, "lseek", lseek)

    for code in (errno.EINVAL, errno.EOPNOTSUPP):
        fails_with(code)
        assert blob.is_backed(0, 8192)
    fails_with(errno.ENXIO)
    assert not blob.is_backed(0, 8192)
    fails_with(errno.EIO)
    with pytest.raises(OSError, match="error"):
        blob.is_backed(0, 8192)
