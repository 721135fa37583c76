"""A disk that is really full: a small tmpfs. What was stored stays readable, and requests are answered all the same."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract.models import build, token_ids
from contract.references import assert_same_generation, generate, prefilled

from hf_contiguouskv import ContiguousKVCache
from hf_contiguouskv.errors import StoreError, StoreFullError
from hf_contiguouskv.store import PrefixStore

from .conftest import Figures, Prefix, check_store, indexed_keys, segment_keys

PAGE = 4096
_fallocate = os.posix_fallocate  # Tests replace the one that the store uses.


class SmallDisk:
    """A file system of a few MiB, of which a ballast file takes what the test wants.

    Attributes:
        path: where it is mounted.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._ballast = path / "ballast"

    @property
    def free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def leave(self, nbytes: int) -> None:
        """Take up everything but `nbytes` (whole pages)."""
        self.make_room()
        with self._ballast.open("wb") as file:
            if (taken := self.free - nbytes) > 0:
                _fallocate(file.fileno(), 0, taken)
        assert self.free == nbytes

    def make_room(self) -> None:
        self._ballast.unlink(missing_ok=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    path = tmp_path / "small-disk"
    path.mkdir()
    options = f"size=4m,uid={os.getuid()},gid={os.getgid()},mode=700"
    refusals = []
    for become_root in ([], ["sudo", "-n"]):
        command = [*become_root, "mount", "-t", "tmpfs", "-o", options, "small-disk", str(path)]
        if shutil.which(command[0]) is None:
            continue
        outcome = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if outcome.returncode == 0:
            break
        refusals.append(outcome.stderr.strip())
    else:
        pytest.skip(f"a small file system cannot be mounted here: {'; '.join(refusals) or 'no mount command'}")
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run([*become_root, "umount", "--lazy", str(path)], check=True, timeout=60)


def numbers(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 1000, count)


def three_prefixes() -> list[Prefix]:
    """Two roots, one that ends inside a chunk, and a continuation of it."""
    first, second = Prefix(numbers(62, 1), 0), Prefix(numbers(40, 2), 1)
    return [first, second, Prefix(np.concatenate([first.ids, numbers(30, 3)]), 0, len(first.ids))]


def stored(path: Path, prefixes: list[Prefix]) -> None:
    with PrefixStore(path) as store:
        for prefix in prefixes:
            prefix.write(store)


def test_writes_that_meet_a_full_disk_at_any_page_lose_nothing(
    small_disk: SmallDisk, tmp_path: Path, figures: Figures, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The room that is left grows page by page, so every write of a publish once finds the disk full."""
    published = three_prefixes()
    last = published[-1]
    # The first one ends inside a chunk, and is taken in by its continuation; so is the second of these by the third.
    root = Prefix(numbers(70, 4), 0)
    new = {
        "a new prefix": Prefix(numbers(100, 5), 0),
        "a continuation": Prefix(np.concatenate([last.ids, numbers(40, 6)]), 0, len(last.ids)),
        "a continuation that takes in what it continues": Prefix(np.concatenate([root.ids, numbers(50, 7)]), 0, 70),
    }
    template = tmp_path / "template"
    stored(template, [*published, root])
    stages: set[str] = set()
    for reserve in (True, False):
        # Without reserved space the disk fills while chunks are written, as when another program writes meanwhile.
        if not reserve:
            monkeypatch.setattr(os, "posix_fallocate", lambda fd, offset, nbytes: os.ftruncate(fd, nbytes))
        for name, prefix in new.items():
            path, pages = small_disk.path / "store", -1
            while True:
                pages += 1 if reserve else 2
                small_disk.make_room()
                shutil.copytree(template, path)
                trace = f"{name}, {pages} pages are left, reserved: {reserve}"
                stage = _write_on_full_disk(small_disk, path, prefix, pages)
                stages.add(stage)
                figures.add("writes on a full disk", stage != "fits")
                check_store(path, [*published, root], [prefix], figures, trace)
                assert list((path / "partial").iterdir()) == []
                if pages % 5 == 0:
                    small_disk.make_room()
                    stored(path, [prefix])
                    check_store(path, [*published, root, prefix], [], figures, f"{trace}, then there was room")
                shutil.rmtree(path)
                if stage == "fits":
                    break
    assert stages == {"begin", "write", "index", "fits"}


def _write_on_full_disk(disk: SmallDisk, path: Path, prefix: Prefix, pages: int) -> str:
    """Try to store `prefix`; where the disk turned out to be full."""
    with PrefixStore(path) as store:
        keys = segment_keys(path)
        disk.leave(pages * PAGE)
        error = _full_error(lambda: prefix.write(store))
        if error is None:
            assert prefix.is_intact(store)
            return "fits"
        # While the disk is full, this very store finds everything that it had, and nothing half-made.
        assert prefix.tokens_found(store) < len(prefix.ids)
        assert segment_keys(path) == keys == indexed_keys(path)
        if "index.sqlite" in str(error):
            return "index"
        return "begin" if _raised_by(error, "begin_segment") else "write"


def _full_error(action: Callable[[], object]) -> StoreFullError | None:
    try:
        action()
    except StoreFullError as error:
        return error if error.errno == errno.ENOSPC else pytest.fail(f"errno is {error.errno}: {error}")
    return None


def _raised_by(error: BaseException, function: str) -> bool:
    frame = error.__traceback__
    while frame is not None:
        if frame.tb_frame.f_code.co_name == function:
            return True
        frame = frame.tb_next
    return False


def test_what_is_stored_can_be_deleted_to_make_room(small_disk: SmallDisk, figures: Figures) -> None:
    path = small_disk.path / "store"
    prefixes = three_prefixes()
    stored(path, prefixes)
    with PrefixStore(path) as store:
        small_disk.leave(0)
        key = next(entry.key for entry in store.entries() if entry.fingerprint == prefixes[1].fingerprint)
        assert store.delete(key) == [key]
        assert small_disk.free > 0
        assert store.gc().forgotten == ()
    check_store(path, [prefixes[0], prefixes[2]], [], figures, "after a delete")


def test_a_new_store_on_a_full_disk_is_refused_and_works_once_there_is_room(small_disk: SmallDisk) -> None:
    path = small_disk.path / "store"
    for pages in range(40):
        small_disk.leave(pages * PAGE)
        with contextlib.suppress(StoreError, OSError):
            PrefixStore(path).close()
            break
    else:
        pytest.fail("160 KiB do not suffice for an empty store")
    assert pages > 0
    small_disk.make_room()
    prefix = Prefix(numbers(50, 8), 0)
    stored(path, [prefix])
    with PrefixStore(path) as store:
        assert prefix.is_intact(store)


# ---- requests ----

PREFIX = token_ids(90, seed=31)
QUESTION = torch.cat([PREFIX, token_ids(6, seed=32)], dim=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama", "sdpa", layers=2)


@pytest.fixture(scope="module")
def expected(model: Any) -> Any:
    return generate(model, QUESTION, prefilled(model, PREFIX), tokens=4)


Ask = Callable[[PrefixStore], Any]


@pytest.fixture(params=["explicit", "automatic"])
def ask(request: pytest.FixtureRequest, model: Any) -> Ask:
    def answer(store: PrefixStore) -> Any:
        cache = ContiguousKVCache(model, PREFIX if request.param == "explicit" else None, store=store, budget=1.0)
        result = generate(model, QUESTION, cache, tokens=4)
        store.flush()
        cache.close()
        return result

    return answer


def judge(found: Any, expected: Any, figures: Figures) -> None:
    figures.add("wrong answers on a full disk", found.sequences.tolist() != expected.sequences.tolist())
    assert_same_generation(found, expected)


@pytest.mark.parametrize("known_tokens", [0, 40])
@pytest.mark.parametrize("reserve", [True, False])
def test_requests_on_a_full_disk_are_answered_and_the_failure_is_reported(
    small_disk: SmallDisk,
    model: Any,
    ask: Ask,
    expected: Any,
    figures: Figures,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reserve: bool,
    known_tokens: int,
) -> None:
    if not reserve:
        monkeypatch.setattr(os, "posix_fallocate", lambda fd, offset, nbytes: os.ftruncate(fd, nbytes))
    template = small_disk.path / "template"
    with PrefixStore(template) as store:
        if known_tokens:
            ContiguousKVCache(model, PREFIX[:, :known_tokens], store=store).close()
    for pages in (0, 3, 8, 15):
        path = small_disk.path / "store"
        shutil.copytree(template, path)
        caplog.clear()
        with PrefixStore(path) as store, caplog.at_level(logging.WARNING, "hf_contiguouskv"):
            small_disk.leave(pages * PAGE)
            judge(ask(store), expected, figures)
            assert store.stats.write_failures == 1
            assert any("could not be stored" in record.getMessage() for record in caplog.records)
            assert store.inner.background_failures == 0
            judge(ask(store), expected, figures)  # Nothing that failed before is in the way.
            assert list((path / "partial").iterdir()) == []
            figures.add("requests on a full disk", 2)
            small_disk.make_room()
            judge(ask(store), expected, figures)
            judge(ask(store), expected, figures)
            assert store.match(model, PREFIX) == 90
            assert store.verify() == []
        shutil.rmtree(path)


def test_requests_are_served_from_a_store_on_a_full_disk(
    small_disk: SmallDisk, ask: Ask, expected: Any, figures: Figures
) -> None:
    path = small_disk.path / "store"
    with PrefixStore(path) as store:
        judge(ask(store), expected, figures)
    small_disk.leave(0)
    with PrefixStore(path) as store:
        judge(ask(store), expected, figures)
        stats = store.stats
        assert stats.hits == 1
        assert stats.bytes_read > 0
        assert stats.write_failures == 0
    figures.add("requests on a full disk")
