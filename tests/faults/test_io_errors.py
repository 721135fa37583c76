"""System calls and the index fail: requests are answered all the same, rightly, and the store says what happened."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import shutil
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract.models import build, token_ids
from contract.references import assert_same_generation, generate, prefilled

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig
from hf_contiguouskv.errors import StoreError
from hf_contiguouskv.store import PrefixStore

from .conftest import Figures, Prefix, check_store
from .scale import SEED, scaled

PREFIX = token_ids(200, seed=51)
QUESTION = torch.cat([PREFIX, token_ids(6, seed=52)], dim=1)
PART = 70
"""Tokens of the prefix that some stores hold already. They end inside a chunk, which is a segment of its own."""

CONFIGS = {
    "exact": ContiguousKVConfig(budget=1.0),
    # (Answers of a packed prefix depend on where its segments end, and a repair may change that.)
    "default": ContiguousKVConfig(budget=0.1, payload="exact"),
    "paper": ContiguousKVConfig.paper(budget=0.2),
}
MODES = ("explicit", "automatic")
EVERYTHING = {("explicit", config) for config in CONFIGS} | {("automatic", "exact")}
STRIKES = scaled(6)
"""Requests with one failing call, per kind of failure."""


# ---- faults ----


class Fault:
    """Makes calls of one function fail, or do less than they were asked for.

    Args:
        name: of a function of `os`, or "sql".
        kind: an error code, or "short", or "end".
        which: numbers of the calls (from 0), counted from the moment it is armed; `None`: none, it only counts.
        concerns: whether a call's first argument (a path or descriptor; for "sql" the statement) counts at all.

    Attributes:
        calls: how many calls there were.
        hits: how many of them failed.
    """

    def __init__(
        self, name: str, kind: int | str, which: Callable[[int], bool], concerns: Callable[[Any], bool] = lambda _: True
    ) -> None:
        self.name, self.kind = name, kind
        self.calls = self.hits = 0
        self.armed = False
        self._which, self._concerns = which, concerns
        self._lock = threading.Lock()

    def _strikes(self, target: Any) -> bool:
        if not self.armed or not self._concerns(target):
            return False
        with self._lock:
            number, self.calls = self.calls, self.calls + 1
            strikes = self._which(number)
            self.hits += strikes
        return strikes

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        if self.name == "sql":
            self._install_sql(monkeypatch)
            return
        call = getattr(os, self.name)

        def faulty(*values: Any, **named: Any) -> Any:
            folder = named.get("dir_fd", named.get("src_dir_fd"))
            # (What is reached through an open folder, by its whole path.)
            target = values[0] if folder is None else os.path.join(path_of(folder), values[0])
            if not self._strikes(target):
                return call(*values, **named)
            if self.kind == "short":
                return _short(self.name, call, values)
            if self.kind == "end":
                return 0 if self.name == "preadv" else b""
            raise OSError(self.kind, os.strerror(self.kind))

        monkeypatch.setattr(os, self.name, faulty)

    def _install_sql(self, monkeypatch: pytest.MonkeyPatch) -> None:
        connect, fault = sqlite3.connect, self

        def faulty_connect(*values: Any, factory: type[sqlite3.Connection] = sqlite3.Connection, **named: Any) -> Any:
            class Faulty(factory):  # type: ignore[misc, valid-type]
                def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
                    fault.raise_for(sql)
                    return super().execute(sql, *values)

                def executemany(self, sql: str, values: Any) -> sqlite3.Cursor:
                    fault.raise_for(sql)
                    return super().executemany(sql, values)

            return connect(*values, factory=Faulty, **named)

        monkeypatch.setattr(sqlite3, "connect", faulty_connect)

    def raise_for(self, sql: str) -> None:
        # A connection is given back by ROLLBACK, which only frees memory.
        if sql != "ROLLBACK" and self._strikes(sql):
            error = sqlite3.OperationalError(f"injected error {self.kind}")
            error.sqlite_errorcode = self.kind  # type: ignore[attr-defined]
            raise error


def _short(name: str, call: Callable[..., Any], values: tuple[Any, ...]) -> Any:
    """Do about half of what was asked for, as the system may."""
    if name == "pread":
        fd, nbytes, offset = values
        return call(fd, max(1, nbytes // 2), offset)
    if name == "pwrite":
        fd, octets, offset = values
        return call(fd, octets[: max(1, len(octets) // 2)], offset)
    fd, buffers, offset = values
    got = call(fd, buffers, offset)
    half = max(1, got // 2)
    begin = 0
    for into in buffers:  # Nobody may look at what was not read.
        first, last = (min(max(edge - begin, 0), len(into)) for edge in (half, got))
        into[first:last] = b"\xee" * (last - first)
        begin += len(into)
    return half


def path_of(target: Any) -> str:
    """The path that a call's first argument means."""
    if isinstance(target, int):
        return os.readlink(f"/proc/self/fd/{target}")
    return os.fsdecode(target)


def is_segment(target: Any) -> bool:
    return path_of(target).endswith(".safetensors")


def is_of_store(target: Any) -> bool:
    return any(part in path_of(target) for part in ("/segments", "/partial", "/damaged"))


# name, kind, what it concerns, whether it must show in the counters wherever it strikes.
KINDS: dict[str, tuple[str, int | str, Callable[[Any], bool], bool]] = {
    "read: EIO": ("preadv", errno.EIO, is_segment, True),
    "read: short": ("preadv", "short", is_segment, False),
    "read: end of file": ("preadv", "end", is_segment, False),  # (A single one is like a short read.)
    "read: EINVAL": ("preadv", errno.EINVAL, is_segment, False),
    "read: EFAULT": ("preadv", errno.EFAULT, is_segment, False),
    "read back: EIO": ("pread", errno.EIO, is_of_store, True),
    "read back: short": ("pread", "short", is_of_store, False),
    "read back: end of file": ("pread", "end", is_of_store, True),
    "write: EIO": ("pwrite", errno.EIO, is_of_store, True),
    "write: ENOSPC": ("pwrite", errno.ENOSPC, is_of_store, True),
    "write: short": ("pwrite", "short", is_of_store, False),
    "reserve: ENOSPC": ("posix_fallocate", errno.ENOSPC, is_of_store, True),
    "reserve: EOPNOTSUPP": ("posix_fallocate", errno.EOPNOTSUPP, is_of_store, False),
    "fsync: EIO": ("fsync", errno.EIO, is_of_store, True),
    "rename: EIO": ("replace", errno.EIO, is_of_store, True),
    "open: EIO": ("open", errno.EIO, is_of_store, False),  # (Opening with O_DIRECT may fail: then reads are buffered.)
    "open: EMFILE": ("open", errno.EMFILE, is_of_store, False),
    "mkdir: EACCES": ("mkdir", errno.EACCES, is_of_store, True),
    "unlink: EIO": ("unlink", errno.EIO, is_of_store, False),
    "stat: EIO": ("stat", errno.EIO, is_segment, False),
    "fstat: EIO": ("fstat", errno.EIO, is_of_store, False),
    "index: disk I/O error": ("sql", sqlite3.SQLITE_IOERR, lambda _: True, False),
    "index: full": ("sql", sqlite3.SQLITE_FULL, lambda _: True, False),
    "index: busy": ("sql", sqlite3.SQLITE_BUSY, lambda _: True, False),
    "index: cannot open": ("sql", sqlite3.SQLITE_CANTOPEN, lambda _: True, False),
    "index: malformed": ("sql", sqlite3.SQLITE_CORRUPT, lambda _: True, False),
}


# ---- requests ----

Case = tuple[str, str, str]
"""What the store holds, how the cache is told its prefix, and its configuration."""
CASES: list[Case] = [
    (world, mode, config)
    for mode in MODES
    for config in CONFIGS
    # A pruned answer depends on what is found; in automatic mode that should be all or nothing.
    for world in (("empty", "part", "whole") if (mode, config) in EVERYTHING else ("empty", "one segment"))
]


class Bench:
    """A tiny model, stores to begin with, and the answers that requests on them must give."""

    def __init__(self, folder: Path) -> None:
        self.model = build("llama", "sdpa", layers=2)
        self.exact = generate(self.model, QUESTION, prefilled(self.model, PREFIX), tokens=4)
        self._scratch = folder / "scratch"
        # What is stored one after the other, as segments of their own.
        self._stores = {"empty": [], "part": [64, PART], "whole": [64, 200], "one segment": [200]}
        self._templates = {world: folder / world for world in self._stores}
        for world, path in self._templates.items():
            with PrefixStore(path) as store:
                for tokens in self._stores[world]:
                    ContiguousKVCache(self.model, PREFIX[:, :tokens], store=store).close()
        self._sound = {case: self._answers(case) for case in CASES}

    def _answers(self, case: Case) -> tuple[Any, Any, int]:
        world, mode, config = case
        with self.store(world) as store:
            first = self.ask(store, mode, config)
            counted = troubles(store)
            return first, self.ask(store, mode, config), counted

    def ask(self, store: PrefixStore, mode: str, config: str) -> Any:
        prefix = PREFIX if mode == "explicit" else None
        cache = ContiguousKVCache(self.model, prefix, store=store, config=CONFIGS[config])
        result = generate(self.model, QUESTION, cache, tokens=4)
        store.flush()
        cache.close()
        return result

    def sound_troubles(self, case: Case) -> int:
        """The `troubles` of a request that nothing happens to."""
        return self._sound[case][2]

    @contextmanager
    def store(self, world: str) -> Iterator[PrefixStore]:
        """A fresh copy."""
        shutil.copytree(self._templates[world], self._scratch)
        try:
            with PrefixStore(self._scratch) as store:
                yield store
        finally:
            shutil.rmtree(self._scratch)

    def right_answers(self, case: Case) -> list[Any]:
        """What a request may answer whose store is not what it was in the beginning."""
        _, mode, config = case
        if mode == "explicit" or config == "exact":
            return [self._sound[case][0]]  # The lost part of the prefix is computed again.
        # In automatic mode a pruned prefix is what happens to be stored: nothing, the prefix, or the whole prompt.
        return [self.exact, self._sound["one segment", mode, config][0], self._sound["empty", mode, config][1]]

    def judge(self, found: Any, case: Case, figures: Figures, trace: str) -> None:
        """`found` must be one of the right answers: its tokens, and their scores."""
        right = self.right_answers(case)
        matching = [one for one in right if one.sequences.tolist() == found.sequences.tolist()]
        figures.add("wrong answers after I/O errors", not matching)
        got, wanted = found.sequences[0, -4:].tolist(), [one.sequences[0, -4:].tolist() for one in right]
        assert matching, f"{trace}: {got}, expected {wanted}"
        for one in matching[:-1]:
            with contextlib.suppress(AssertionError):
                return assert_same_generation(found, one)
        return assert_same_generation(found, matching[-1])


def troubles(store: PrefixStore) -> int:
    """Everything that the counters say about things that went wrong."""
    stats = store.stats
    return stats.write_failures + stats.quarantined + stats.recovered + sum(stats.misses.values())


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("io-errors"))


def _never(call: int) -> bool:
    return False


@pytest.fixture(scope="module")
def calls(bench: Bench) -> dict[tuple[str, Case], int]:
    """How many calls of each kind a sound request makes."""
    counted = {}
    for case in CASES:
        world, mode, config = case
        with pytest.MonkeyPatch.context() as patch, bench.store(world) as store:
            faults = {
                kind: Fault(name, what, lambda _: False, concerns) for kind, (name, what, concerns, _) in KINDS.items()
            }
            for fault in faults.values():
                fault.install(patch)
                fault.armed = True
            bench.ask(store, mode, config)
            for kind, fault in faults.items():
                fault.armed = False
                counted[kind, case] = fault.calls
    return counted


def request_with(bench: Bench, fault: Fault, case: Case, figures: Figures, trace: str, *, shows: bool) -> None:
    """One request under a fault, and others after it: all are right, and the store is sound in the end."""
    world, mode, config = case
    with pytest.MonkeyPatch.context() as patch, bench.store(world) as store:
        fault.install(patch)
        fault.armed = True
        try:
            found = bench.ask(store, mode, config)
        except Exception as error:
            figures.add("requests that failed because of I/O errors")
            raise AssertionError(f"{trace}: the request failed: {error!r}") from error
        finally:
            fault.armed = False
        figures.add("requests that failed because of I/O errors", 0)
        figures.add("requests with I/O errors", fault.hits > 0)
        figures.add("I/O errors and short calls", fault.hits)
        bench.judge(found, case, figures, trace)
        assert store.inner.background_failures == 0, trace
        if shows and fault.hits:
            assert troubles(store) > bench.sound_troubles(case), f"{trace}: no counter shows it, {store.stats}"
        bench.judge(bench.ask(store, mode, config), case, figures, f"{trace}, the next request")
        bench.judge(bench.ask(store, "explicit", "exact"), ("empty", "explicit", "exact"), figures, f"{trace}, at last")
        assert store.match(bench.model, PREFIX) == PREFIX.shape[1], trace
        assert store.verify() == [], trace
        assert list((store.path / "partial").iterdir()) == [], trace


def moments(kind: str, calls: dict[tuple[str, Case], int]) -> list[tuple[Case, int]]:
    """Which call of which request is to fail: half of them in exact ones, the first and the last call more often."""
    rng = random.Random(f"{kind} {SEED}")
    chosen = []
    for exact in (True, False):
        possible = [case for case in CASES if (case[2] == "exact") == exact and calls[kind, case]]
        for number in range(STRIKES // 2 if possible else 0):
            case = possible[number % len(possible)]
            count = calls[kind, case]
            chosen.append((case, rng.choice([0, count - 1, rng.randrange(count), rng.randrange(count)])))
    return chosen


@pytest.mark.parametrize("kind", KINDS)
def test_one_failing_call(bench: Bench, calls: dict[tuple[str, Case], int], figures: Figures, kind: str) -> None:
    name, what, concerns, shows = KINDS[kind]
    struck = 0
    for case, number in moments(kind, calls):
        fault = Fault(name, what, lambda call, number=number: call == number, concerns)
        trace = f"{kind}, {case}, call {number} of {calls[kind, case]} (seed {SEED})"
        request_with(bench, fault, case, figures, trace, shows=shows)
        struck += fault.hits
    assert struck > 0, "this never happened"


@pytest.mark.parametrize(
    "case",
    [
        (world, mode, config)
        for world, mode, config in CASES
        if config == "exact" or (config == "default" and world in ("whole", "one segment"))
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.endswith(("short", "EINVAL", "EFAULT"))])
def test_every_call_fails(bench: Bench, figures: Figures, kind: str, case: Case) -> None:
    name, what, concerns, _ = KINDS[kind]
    fault = Fault(name, what, lambda _: True, concerns)
    request_with(bench, fault, case, figures, f"{kind} always, {case}", shows=False)


# ---- one segment that cannot be read ----


@pytest.mark.parametrize("position", [0, 1], ids=["first segment", "last segment"])
@pytest.mark.parametrize("forever", [False, True], ids=["this file", "whatever lies there"])
@pytest.mark.parametrize(("mode", "config"), sorted(EVERYTHING), ids=" ".join)
def test_a_segment_that_cannot_be_read(
    bench: Bench, figures: Figures, mode: str, config: str, forever: bool, position: int
) -> None:
    """Bad blocks under one segment: it is put aside, and its chunks are stored again, unless those are bad as well."""
    case = "whole", mode, config
    with pytest.MonkeyPatch.context() as patch, bench.store("whole") as store:
        bad = store.backend.path_of(store.entries()[position].key)
        inode = bad.stat().st_ino

        def is_bad(target: Any) -> bool:
            return path_of(target) == str(bad) if forever else os.fstat(target).st_ino == inode

        fault = Fault("preadv", errno.EIO, lambda _: True, is_bad)
        fault.install(patch)
        fault.armed = True
        trace = f"{case}, segment {position}, forever: {forever}"
        for number in range(3):
            bench.judge(bench.ask(store, mode, config), case, figures, f"{trace}, request {number}")
            figures.add("requests with I/O errors")
        assert fault.hits > 0
        figures.add("I/O errors and short calls", fault.hits)
        assert store.stats.quarantined >= 1
        assert store.inner.background_failures == 0
        fault.armed = False
        bench.ask(store, "explicit", "exact")
        if not forever:
            hits = fault.hits
            fault.armed = True
            bench.judge(bench.ask(store, mode, config), case, figures, f"{trace}, at last")
            assert fault.hits == hits, f"{trace}: the bad blocks are still read"
            fault.armed = False
        assert store.match(bench.model, PREFIX) == PREFIX.shape[1]
        assert store.verify() == []


@pytest.mark.parametrize("position", [0, 1], ids=["first segment", "last segment"])
@pytest.mark.parametrize("mode", MODES)
def test_a_prompt_that_lost_a_segment_is_stored_again(
    bench: Bench, figures: Figures, store_path: Path, mode: str, position: int
) -> None:
    case = "empty", mode, "exact"
    with PrefixStore(store_path) as store:
        for ids in (QUESTION[:, :100], QUESTION):
            cache = ContiguousKVCache(bench.model, ids[:, :-6] if mode == "explicit" else None, store=store, budget=1.0)
            generate(bench.model, ids, cache, tokens=2)
            store.flush()
        store.backend.path_of(store.entries()[position].key).unlink()
        for _ in range(2):
            bench.judge(bench.ask(store, mode, "exact"), case, figures, f"{mode}, segment {position} is lost")
        assert store.stats.write_failures == 0
        hits = store.stats.hits
        bench.judge(bench.ask(store, mode, "exact"), case, figures, f"{mode}, segment {position} was stored again")
        assert store.stats.hits == hits + 1
        assert store.match(bench.model, PREFIX) == PREFIX.shape[1]
        assert store.verify() == []


def test_what_memory_keeps_of_a_segment_is_not_used_for_another_one_with_the_same_end(
    bench: Bench, figures: Figures, store_path: Path
) -> None:
    """A segment is named after its end: after damage, one that begins elsewhere may have the same name."""
    first = PREFIX[:, :64]
    with PrefixStore(store_path) as store:
        ContiguousKVCache(bench.model, first[:, :48], store=store).close()
        ContiguousKVCache(bench.model, PREFIX, store=store).close()
        (long,) = [entry for entry in store.entries() if entry.tokens == PREFIX.shape[1]]
        bench.ask(store, "explicit", "default")  # Its key index is in memory now.
        for entry in store.entries():
            store.inner.discard(
                store.inner.lookup(entry.fingerprint, PREFIX[0].numpy(), 16).spans[-1].segment, "as if damaged"
            )
        bench.judge(
            bench.ask(store, "explicit", "default"), ("empty", "explicit", "default"), figures, "another beginning"
        )
        assert [entry.key for entry in store.entries()] == [long.key]
        assert store.entries()[0].chunks > long.chunks


# ---- the index fails at the worst moment ----


@pytest.mark.parametrize("code", [sqlite3.SQLITE_IOERR, sqlite3.SQLITE_FULL], ids=["disk I/O error", "full"])
@pytest.mark.parametrize("bounded", [False, True], ids=["replacing what it takes in", "evicting"])
def test_a_publish_whose_last_step_fails_loses_nothing(
    figures: Figures, store_path: Path, bounded: bool, code: int
) -> None:
    """When COMMIT fails, all else has been done: what was to go for the new segment must be there all the same."""
    numbers = np.random.default_rng(SEED)
    root = Prefix(numbers.integers(0, 1000, 40), 0)
    # Its only chunk is not full: the same chunk of a longer prefix takes its place.
    tail = Prefix(np.concatenate([root.ids, numbers.integers(0, 1000, 2)]), 0, 40)
    new = Prefix(np.concatenate([tail.ids, numbers.integers(0, 1000, 30)]), 0, 42)
    other = Prefix(numbers.integers(0, 1000, 72), 0)
    with PrefixStore(store_path) as store:
        for prefix in (root, tail):
            prefix.write(store)
        room = store.stats.segment_bytes if bounded else None
    inserted: list[str] = []

    def ends_a_publish(sql: str) -> bool:
        inserted.extend([sql] if sql.startswith("INSERT INTO segments") else [])
        return sql == "COMMIT" and bool(inserted)

    fault = Fault("sql", code, lambda _: True, ends_a_publish)
    with pytest.MonkeyPatch.context() as patch:
        fault.install(patch)
        with PrefixStore(store_path, max_disk_bytes=None if room is None else room + 8192) as store:
            fault.armed = True
            with pytest.raises(StoreError, match="index"):
                (other if bounded else new).write(store)
            fault.armed = False
            assert fault.hits == 2  # The publish, and the removal of what it had put in place.
    check_store(store_path, [root, tail], [new, other], figures, "after a failed COMMIT")
