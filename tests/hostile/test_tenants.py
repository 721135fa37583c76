"""A tenant who knows everybody's keys finds out, changes and deletes nothing of others, nor of the store as a whole."""

from __future__ import annotations

import logging
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tally import Figures
from unit.store_helpers import FINGERPRINT, path_of, some_tokens, write_prefix

from hf_contiguouskv.errors import ConfigError, PrefixInUseError, StoreError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.bundle import export_bundle
from hf_contiguouskv.store.chains import chains, children, parents_of_all
from hf_contiguouskv.store.entries import GcReport, PrefixInfo

NOBODY = "ab" * 16
IDS = some_tokens(24)


@dataclass
class Town:
    """A store with three parties, who store the same prompts: two segments each.

    Attributes:
        path: of the store.
        keys: of the segments of each party, the parent first. `None` is who has no salt.
    """

    path: Path
    keys: dict[str | None, list[str]]

    @property
    def victims(self) -> list[str]:
        return [*self.keys["victim"], *self.keys[None]]

    @contextmanager
    def nobody_else_is_touched(self) -> Iterator[None]:
        """Within it, nothing changes of what others than "enemy" have."""
        before = self._others()
        yield
        assert self._others() == before

    def _others(self) -> list[tuple[PrefixInfo, bytes]]:
        with PrefixStore(self.path) as store:
            entries = {entry.key: entry for entry in store.entries()}
            return [(entries[key], self.file(key).read_bytes()) for key in self.victims]

    def file(self, key: str) -> Path:
        return self.path / "segments" / key[:2] / f"{key}.safetensors"


@pytest.fixture
def town(store_path: Path) -> Town:
    keys: dict[str | None, list[str]] = {}
    for salt in ("victim", "enemy", None):
        with PrefixStore(store_path, salt=salt) as store:
            write_prefix(store, IDS[:16])
            spans = write_prefix(store, IDS, first_chunk=4).spans
            keys[salt] = [span.segment.key for span in spans]
    return Town(store_path, keys)


def used_long_ago(path: Path) -> None:
    with closing(sqlite3.connect(path / "index.sqlite", isolation_level=None)) as db:
        db.execute("UPDATE segments SET created = 1.0, last_used = 1.0")


# ---- the salt, and other arguments ----


@pytest.mark.parametrize(
    "salt", [0, False, "", b"", 1.5, ["tenant"], bytearray(b"tenant"), {"a": 1}, "\ud800"], ids=repr
)
def test_what_is_no_salt_is_not_taken_for_none(store_path: Path, attacks: Figures, salt: Any) -> None:
    with pytest.raises(ConfigError, match="salt") as refused:
        PrefixStore(store_path, salt=salt)
    assert "tenant" not in str(refused.value)  # It may be a secret.
    assert not store_path.exists()
    attacks.add("arguments that make no sense refused")


@pytest.mark.parametrize(
    "arguments",
    [
        {"ttl_s": "5"},
        {"ttl_s": float("nan")},
        {"ttl_s": -1},
        {"ttl_s": True},
        {"max_disk_bytes": True},
        {"max_disk_bytes": "10GB"},
        {"max_disk_bytes": float("nan")},
        {"host_bytes": False},
        {"device_bytes": [1]},
    ],
    ids=str,
)
def test_bounds_that_are_no_numbers(store_path: Path, attacks: Figures, arguments: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(arguments))):
        PrefixStore(store_path, **arguments)
    assert not store_path.exists()
    attacks.add("arguments that make no sense refused")


# ---- what a tenant sees ----


def test_a_tenant_lists_and_counts_its_own(town: Town, attacks: Figures) -> None:
    with PrefixStore(town.path, salt="enemy") as store:
        assert [entry.key for entry in store.entries()] == town.keys["enemy"]
        stats = store.stats
        own = sum(entry.bytes for entry in store.entries())
        assert (stats.segments, stats.prefix_tokens, stats.segment_bytes, stats.disk_bytes) == (2, 24, own, own)
        assert parents_of_all(store) == {town.keys["enemy"][1]: town.keys["enemy"][0]}
        for key in town.victims:
            assert [store.entries(key[:length]) for length in (8, 31, 32)] == [[], [], []]
    with PrefixStore(town.path) as whole:  # Who has no salt looks after everything.
        assert {entry.key for entry in whole.entries()} == {key for keys in town.keys.values() for key in keys}
        assert whole.stats.segments == 6
        assert whole.stats.disk_bytes > whole.stats.segment_bytes > own
    attacks.add("segments of others not listed", 4)


ACTS: dict[str, Callable[[PrefixStore, str, Path], object]] = {
    "pin": lambda store, key, folder: store.pin(key),
    "unpin": lambda store, key, folder: store.unpin(key),
    "delete": lambda store, key, folder: store.delete(key),
    "delete with all": lambda store, key, folder: store.delete(key, recursive=True),
    "verify": lambda store, key, folder: store.verify(key),
    "deep": lambda store, key, folder: store.verify(key, deep=True),
    "chains": lambda store, key, folder: chains(store, [key]),
    "children": lambda store, key, folder: children(store, key),
    "export": lambda store, key, folder: export_bundle(store, [key], folder / "bundle"),
}


@pytest.mark.parametrize("act", ACTS)
def test_a_key_of_somebody_else_is_as_good_as_none(town: Town, tmp_path: Path, attacks: Figures, act: str) -> None:
    def said(key: str) -> str:
        with pytest.raises(StoreError) as refused:
            ACTS[act](store, key, tmp_path)
        assert type(refused.value) is StoreError
        return str(refused.value).replace(key, "KEY")

    with town.nobody_else_is_touched(), PrefixStore(town.path, salt="enemy") as store:
        for key in town.victims:
            assert said(key) == said(NOBODY)
            attacks.add("keys of others refused")
    assert not (tmp_path / "bundle").exists()


def test_equal_prompts_of_others_are_not_found(town: Town, attacks: Figures) -> None:
    with PrefixStore(town.path, salt="stranger") as store:
        assert store.inner.lookup(FINGERPRINT, IDS, 4) is None
        assert store.inner.next_stored(FINGERPRINT, IDS, 4, 0) is None
        assert (store.stats.misses["not_stored"], sum(store.stats.misses.values())) == (1, 1)
        assert store.stats.segments == 0
        attacks.add("prompts of others not found")


def test_who_refuses_names_a_few_of_the_tenants_own(town: Town, attacks: Figures) -> None:
    with PrefixStore(town.path, salt="enemy") as store:
        for number in range(30):
            write_prefix(store, np.append(IDS[:16], some_tokens(4, seed=number + 1)), first_chunk=4)
        with pytest.raises(PrefixInUseError) as refused:
            store.delete(town.keys["enemy"][0])
        text = str(refused.value)
        own = {entry.key for entry in store.entries()}
        assert len(own) == 32
        assert sum(key in text for key in own) == 6  # The one that was to go, and five that are in the way.
        assert "26 more" in text
        assert not any(key in text for key in town.victims)
    attacks.add("refusals that tell no more than they need")


# ---- what a tenant makes go ----


def test_a_quota_is_the_tenants_own(town: Town, attacks: Figures) -> None:
    with PrefixStore(town.path, salt="enemy") as store:
        size = store.stats.segment_bytes
    with town.nobody_else_is_touched(), PrefixStore(town.path, salt="enemy", max_disk_bytes=size) as store:
        # What others have does not count: nothing had to go.
        store.flush()
        assert [entry.key for entry in store.entries()] == town.keys["enemy"]
        for seed in range(1, 9):
            write_prefix(store, some_tokens(24, seed))
            assert store.stats.segment_bytes <= size
        assert store.stats.evicted >= 7
        attacks.add("evictions kept to the tenant's own", int(store.stats.evicted))


def test_opening_with_a_quota_takes_nothing_from_others(town: Town, attacks: Figures) -> None:
    used_long_ago(town.path)
    with town.nobody_else_is_touched(), PrefixStore(town.path, salt="enemy", max_disk_bytes=0) as store:
        store.flush()
        assert store.stats.evicted == 2
        assert store.entries() == []
    attacks.add("evictions kept to the tenant's own", 2)


def test_a_time_to_live_is_the_tenants_own(town: Town, attacks: Figures) -> None:
    used_long_ago(town.path)
    with town.nobody_else_is_touched(), PrefixStore(town.path, salt="enemy", ttl_s=60) as store:
        assert set(store.gc(dry_run=True).expired) == set(town.keys["enemy"])
        assert set(store.gc().expired) == set(town.keys["enemy"])
        assert store.entries() == []
    attacks.add("expiry kept to the tenant's own", 2)


def test_the_operator_may_give_up_anything(town: Town) -> None:
    with PrefixStore(town.path, max_disk_bytes=0) as store:
        store.flush()
        assert store.stats.evicted == 6


def test_damage_and_leftovers_of_others_are_neither_shown_nor_deleted(town: Town, attacks: Figures) -> None:
    parent, child = town.keys["victim"]
    with PrefixStore(town.path, salt="victim") as store:
        stored = store.inner.lookup(FINGERPRINT, IDS, 4)
        assert stored is not None
        store.inner.discard(stored.spans[0].segment, "a test")  # Its child cannot be reached now.
        assert path_of(stored.spans[1].segment).exists()
    (town.path / "partial" / f"{parent}.12345678.partial").write_bytes(b"left by a crash")
    unreadable = town.file("cd" * 16)
    unreadable.parent.mkdir(mode=0o700, exist_ok=True)
    unreadable.write_bytes(b"no segment")
    unreadable.chmod(0o600)
    (town.path / "index.sqlite.damaged-1").write_bytes(b"rows of everybody")
    with PrefixStore(town.path, salt="enemy") as store:
        assert store.verify() == []
        assert store.stats.quarantined_bytes == 0
        assert store.gc(dry_run=True) == GcReport()
        assert store.gc() == GcReport()
        assert [info.key for info in store.backend.quarantined()] == [parent]
        attacks.add("leftovers of others not told", 4)
    assert (town.path / "index.sqlite.damaged-1").exists()
    with PrefixStore(town.path) as store:
        report = store.gc()
        assert (report.quarantine, report.unreachable) == ((parent,), (child,))
        assert len(report.unreadable) == 1
        assert "index.sqlite.damaged-1" in report.removed


def test_what_is_found_again_or_lost_is_told_to_its_owner_only(town: Town, attacks: Figures) -> None:
    lost, found = town.keys["victim"][1], town.keys["victim"][0]

    def disturb() -> None:
        with closing(sqlite3.connect(town.path / "index.sqlite", isolation_level=None)) as db:
            db.execute("DELETE FROM chunks WHERE segment = (SELECT id FROM segments WHERE key = ?)", (found,))
            db.execute("DELETE FROM segments WHERE key = ?", (found,))

    with PrefixStore(town.path, salt="enemy") as enemy, PrefixStore(town.path, salt="victim") as victim:
        disturb()
        town.file(lost).unlink()
        for report in (enemy.gc(dry_run=True), enemy.gc()):
            told = {*report.indexed, *report.forgotten, *report.repaired, *report.unreachable}
            assert told.isdisjoint(town.victims)
            attacks.add("repairs of others not told")
        assert [entry.key for entry in victim.entries()] == [found]


def test_a_damaged_index_is_told_without_the_names_in_it(town: Town, attacks: Figures) -> None:
    for salt in ("enemy", None):
        with PrefixStore(town.path, salt=salt) as store:
            with closing(sqlite3.connect(town.path / "index.sqlite", isolation_level=None)) as db:
                db.execute("UPDATE segments SET uses = -1 WHERE key = ?", (town.keys["victim"][1],))
            texts = [str(problem) for problem in store.verify()]
            assert texts
            assert any(town.keys["victim"][1] in text for text in texts) == (salt is None)
    attacks.add("keys of others not told")


@pytest.mark.parametrize("salt", ["enemy", None])
def test_no_key_of_others_comes_to_the_log_of_a_tenant(
    town: Town, caplog: pytest.LogCaptureFixture, attacks: Figures, salt: str | None
) -> None:
    unreadable = town.keys["victim"][1]
    town.file(unreadable).write_bytes(b"no segment")
    with closing(sqlite3.connect(town.path / "index.sqlite", isolation_level=None)) as db:
        db.execute("DELETE FROM segments WHERE key = ?", (unreadable,))
    caplog.set_level(logging.DEBUG, "hf_contiguouskv")
    with PrefixStore(town.path, salt=salt) as store:
        store.gc()
        store.inner.index.rebuild()
        store.verify()
    assert (unreadable in caplog.text) == (salt is None)
    if salt:
        assert not any(key in caplog.text for key in town.victims)
        attacks.add("keys of others not told")


# ---- rows that lie about whose they are ----


@pytest.mark.parametrize("column", ["root", "fingerprint", "chunk_size"])
def test_a_row_is_nobodys_whose_root_is_not_that_of_its_model(town: Town, attacks: Figures, column: str) -> None:
    """An attacker who writes the index cannot make a tenant delete another one's segment by copying half of a row."""
    theirs, own = town.keys["victim"][1], town.keys["enemy"][1]
    own_root = f"(SELECT root FROM segments WHERE key = '{own}')"
    value = {"root": own_root, "fingerprint": "'another'", "chunk_size": "8, num_chunks = (num_tokens + 7) / 8"}
    with closing(sqlite3.connect(town.path / "index.sqlite", isolation_level=None)) as db:
        db.execute(f"UPDATE segments SET {column} = {value[column]} WHERE key = ?", (theirs,))
    with PrefixStore(town.path, salt="enemy") as store:
        before = town.file(theirs).read_bytes()
        if column == "root":
            # The row says so, but the segment itself does not.
            assert {problem.key for problem in store.verify()} == {"", theirs}
        else:
            assert theirs not in {entry.key for entry in store.entries()}
            with pytest.raises(StoreError, match="no stored prefix"):
                store.delete(theirs)
        store.gc()
        assert [entry.key for entry in store.entries()] == town.keys["enemy"]
        assert town.file(theirs).read_bytes() == before
    with PrefixStore(town.path, salt="victim") as store:
        assert store.gc().unreadable == ()
        stored = store.inner.lookup(FINGERPRINT, IDS, 4)
        assert stored is not None
        assert stored.tokens == len(IDS)
    attacks.add("rows that claim another owner seen through")


def test_a_child_of_another_root_is_not_in_the_way(town: Town, attacks: Figures) -> None:
    """A row with another root that names the victim's chunk as its parent is no child of it."""
    parent, child = town.keys["victim"]
    with PrefixStore(town.path, salt="victim") as store:
        store.delete(child)
        with closing(sqlite3.connect(town.path / "index.sqlite", isolation_level=None)) as db:
            (chunk,) = db.execute(
                "SELECT hash FROM chunks JOIN segments ON id = segment WHERE key = ? AND position = 3", (parent,)
            ).fetchone()
            db.execute("UPDATE segments SET parent = ? WHERE key = ?", (chunk, town.keys["enemy"][1]))
        assert store.delete(parent) == [parent]
    attacks.add("rows that claim another owner seen through")


def test_time_goes_on_for_tenants_too(town: Town) -> None:
    """(That the fixtures above mean something: a tenant's own use keeps what is its own.)"""
    used_long_ago(town.path)
    with PrefixStore(town.path, salt="enemy") as store:
        store.inner.lookup(FINGERPRINT, IDS, 4)
    with PrefixStore(town.path, salt="enemy", ttl_s=600) as store:
        assert store.gc().expired == ()
        assert all(entry.last_used > time.time() - 60 for entry in store.entries())
