"""A segment whose opening raises anything at all stops no other: others are indexed, verified and kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from pathlib import Path

import pytest
from tally import Figures
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import StoreError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.backend import Blob
from hf_contiguouskv.store.memory_backend import MemoryBackend

G = geometry(num_layers=1, leader_layers=(), indexed_layers=())
C = G.chunk_size
PROMPTS = [some_tokens(10, seed) for seed in range(6)]
RAISED = [
    MemoryError("700 million tokens"),
    OverflowError("int too large to convert to float"),
    ValueError("cannot reshape"),
    RecursionError("maximum recursion depth exceeded"),
    KeyError("payload.0"),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
    AssertionError(),
    StoreError("no segment"),
    OSError(5, "Input/output error"),
    EOFError("cut"),
]


class Mined(MemoryBackend):
    """Some segments raise when they are opened."""

    def __init__(self) -> None:
        super().__init__()
        self.mines: dict[str, Exception] = {}

    def open(self, key: str) -> Blob:
        if key in self.mines:
            raise self.mines[key]
        return super().open(key)


class Lying(MemoryBackend):
    """Blobs that say of themselves what no blob is."""

    def __init__(self) -> None:
        super().__init__()
        self.tell: Callable[[Blob], None] = lambda blob: None
        self.liar = ""

    def open(self, key: str) -> Blob:
        blob = super().open(key)
        if key == self.liar:
            self.tell(blob)
        return blob


def filled(path: Path, backend: MemoryBackend) -> list[str]:
    with PrefixStore(path, backend=backend) as store:
        for ids in PROMPTS:
            write_prefix(store, ids, 0, G)
        return [entry.key for entry in store.entries()]


def forget_the_index(path: Path) -> None:
    for name in ("index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
        (path / name).unlink(missing_ok=True)


def found(store: PrefixStore) -> list[bool]:
    return [store.inner.lookup(FINGERPRINT, ids, C, count=False) is not None for ids in PROMPTS]


@pytest.mark.parametrize("raised", RAISED, ids=lambda error: type(error).__name__)
def test_what_one_segment_raises_is_told_of_that_segment(
    store_path: Path, caplog: pytest.LogCaptureFixture, attacks: Figures, raised: Exception
) -> None:
    backend = Mined()
    keys = filled(store_path, backend)
    bad, others = keys[2], {*keys} - {keys[2]}
    backend.mines[bad] = raised
    caplog.set_level(logging.WARNING, "hf_contiguouskv")
    with PrefixStore(store_path, backend=backend) as store:
        # It is indexed: who verifies and cleans up is told, and goes on to the others.
        assert {problem.key for problem in store.verify()} == {bad}
        report = store.gc()
        assert len(report.unreadable) == 1
        store.inner.index.rebuild()
        assert {entry.key for entry in store.entries()} == others
        assert found(store) == [number != 2 for number in range(6)]
    forget_the_index(store_path)
    caplog.clear()
    with PrefixStore(store_path, backend=backend) as store:
        # It is not indexed: opening, verifying and cleaning up skip it by name.
        assert "not indexed" in caplog.text
        assert {entry.key for entry in store.entries()} == others
        assert {problem.key for problem in store.verify()} == {bad}
        assert len(store.gc().unreadable) == 1
        write_prefix(store, some_tokens(10, seed=50), 0, G)
        assert found(store) == [number != 2 for number in range(6)]
    del backend.mines[bad]
    with PrefixStore(store_path, backend=backend) as store:
        assert all(found(store))
        assert store.verify() == []
    attacks.add("segments that raise skipped", 2)


def tell(name: str, value: Hashable) -> Callable[[Blob], None]:
    return lambda blob: setattr(blob, name, value)


@pytest.mark.parametrize(
    "lie",
    [
        pytest.param(tell("stored_bytes", 2**70), id="more bytes than SQLite can count"),
        pytest.param(tell("created", float("nan")), id="a time that is none"),
        pytest.param(tell("created", 1e300), id="a time after all times"),
        pytest.param(tell("created", -1e300), id="a time before all times"),
        pytest.param(tell("stored_bytes", "many"), id="a word for a number"),
    ],
)
def test_what_a_blob_says_of_itself_spoils_no_row_but_its_own(
    store_path: Path, attacks: Figures, lie: Callable[[Blob], None]
) -> None:
    backend = Lying()
    keys = filled(store_path, backend)
    backend.tell, backend.liar = lie, keys[0]
    forget_the_index(store_path)
    with PrefixStore(store_path, backend=backend) as store:
        assert found(store)[1:] == [True] * 5
        assert {entry.key for entry in store.entries()} >= {*keys[1:]}
        assert store.stats.segments in (5, 6)
        store.gc()
        assert found(store)[1:] == [True] * 5
    attacks.add("segments that raise skipped")


def test_a_row_that_was_dropped_to_be_repaired_is_kept_where_that_fails(store_path: Path, attacks: Figures) -> None:
    """Repairing drops a row and inserts it again: what is raised in between must not lose it."""
    backend = Lying()
    keys = filled(store_path, backend)
    with PrefixStore(store_path, backend=backend) as store:
        backend.tell, backend.liar = tell("stored_bytes", 2**70), keys[0]
        store.gc()
        assert {entry.key for entry in store.entries()} == {*keys}
        assert store.stats.segments == 6
        assert all(found(store))
    attacks.add("segments that raise skipped")
