"""A process is killed in the middle of something: nothing that was published is lost, nothing half-made is seen.

Every kill is a SIGKILL of a forked child: Python cleans nothing up. Half of them come from outside at a random moment,
half from inside at a chosen step: before, after, or (writes) in the middle of a system call or an SQL statement.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sqlite3
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from contract.models import build, token_ids
from contract.references import assert_same_generation, generate, prefilled

from hf_contiguouskv import ContiguousKVCache
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.rows import drop_segment

from .conftest import Children, Figures, Link, Prefix, check_store, draw_prefix, leftovers
from .scale import SEED, scaled

Step = tuple[str, int]
"""A name and which of the steps of that name."""
Work = Callable[[Link, Callable[[], None]], object]
"""What a child does; it calls the second argument where its steps begin to count."""

# Kills of each kind: in all, more than 200 in the middle of a write.
TIMED_STORES, TIMED_KILLS = 4, scaled(26)
STEPPED_KILLS, KILLS_PER_STORE = 21 * scaled(8), 21
KILLS_PER_TASK, KILLS_OF_REQUESTS = scaled(10), scaled(6)

# ---- steps of a process, at one of which it kills itself ----


class Steps:
    """Counts the steps at which this process touches files or the index, and ends it at one of them.

    Args:
        fatal: `(name, i)`: the process ends at the i-th step (from 0) of this name. `None`: it only counts.

    Attributes:
        names: of the steps since `begin`, in order.
    """

    SYSTEM_CALLS = ("open", "pwrite", "posix_fallocate", "fsync", "replace", "unlink", "mkdir", "chmod", "close")

    def __init__(self, fatal: Step | None) -> None:
        self.names: list[str] = []
        self._fatal = fatal
        self._counting = False
        for name in self.SYSTEM_CALLS:
            setattr(os, name, self._counted(name, getattr(os, name)))
        connect = sqlite3.connect
        steps = self

        class Counted(sqlite3.Connection):
            def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
                steps.step(f"before SQL {sql.split()[0]}")
                result = super().execute(sql, *values)
                steps.step(f"after SQL {sql.split()[0]}")
                return result

            def executemany(self, sql: str, values: Any) -> sqlite3.Cursor:
                rows = list(values)
                super().executemany(sql, rows[: len(rows) // 2])
                steps.step(f"in the middle of SQL {sql.split()[0]}")
                return super().executemany(sql, rows[len(rows) // 2 :])

        sqlite3.connect = lambda *values, **named: connect(*values, **named, factory=Counted)  # type: ignore[assignment]

    def begin(self) -> None:
        """Count from here on."""
        self._counting = True

    def step(self, name: str) -> None:
        if self._counting:
            if self._is_fatal(name):
                os.kill(os.getpid(), signal.SIGKILL)
            self.names.append(name)

    def _is_fatal(self, name: str) -> bool:
        return self._counting and self._fatal == (name, self.names.count(name))

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*values: Any, **named: Any) -> Any:
            what = f"{name} {_kind(values[0])}".strip()
            self.step(f"before {what}")
            if name == "pwrite":
                if self._is_fatal(f"in the middle of {what}"):
                    fd, octets, offset = values
                    call(fd, octets[: len(octets) // 2], offset)
                self.step(f"in the middle of {what}")
            result = call(*values, **named)
            self.step(f"after {what}")
            return result

        return counted


def _kind(target: object) -> str:
    """What sort of file a system call is about, so that steps of different prefixes have the same names."""
    if not isinstance(target, str | Path):
        return ""
    name = Path(target).name
    for kind in (".partial", ".safetensors", ".json", "index.sqlite", "index.lock"):
        if kind in name:
            return kind.strip(".")
    return "folder"


def count_steps(children: Children, work: Work) -> Counter[str]:
    """How many steps of each name `work` has; it is run to its end in a child."""

    def count(link: Link) -> None:
        steps = Steps(None)
        work(link, steps.begin)
        link.say("steps", Counter(steps.names))

    return Counter(children(count).finish()[-1][1])


def kill_at(children: Children, fatal: Step, work: Work) -> list[list[Any]]:
    """Run `work` in a child that ends at a step; what the child had said until then."""
    child = children(lambda link: work(link, Steps(fatal).begin))
    heard = child.messages()
    assert child.wait() == -signal.SIGKILL, f"the child was to be killed at {fatal}, but ended, and said {heard}"
    return heard


# ---- kills in the middle of a write ----


def write_all(path: Path, prefixes: Sequence[Prefix], link: Link, begin: Callable[[], None] = lambda: None) -> None:
    """What the children do: store prefixes one after the other, and tell of each as soon as its commit returned."""
    store = PrefixStore(path)
    begin()
    for number, prefix in enumerate(prefixes):
        link.say("begins", number)
        prefix.write(store)
        link.say("published", number)


def outcome(heard: list[list[Any]], prefixes: Sequence[Prefix]) -> tuple[list[Prefix], list[Prefix]]:
    """The prefixes that were reported as published, and the one that was being written."""
    begun = [number for what, number in heard if what == "begins"]
    done = [number for what, number in heard if what == "published"]
    return [prefixes[number] for number in done], [prefixes[number] for number in begun if number not in done]


@pytest.mark.parametrize("world", range(TIMED_STORES))
def test_kills_at_random_moments_of_a_write(
    children: Children, figures: Figures, store_path: Path, tmp_path: Path, world: int
) -> None:
    rng = random.Random(f"timed {SEED} {world}")
    rehearsal = draw_series(rng, [])
    started = time.perf_counter()
    children(lambda link: write_all(tmp_path / "rehearsal", rehearsal, link)).finish()
    typical_s = (time.perf_counter() - started) / len(rehearsal)
    published: list[Prefix] = []
    in_a_write = attempts = 0
    while in_a_write < TIMED_KILLS:
        attempts += 1
        assert attempts <= 3 * TIMED_KILLS, f"only {in_a_write} of {attempts} kills came in the middle of a write"
        series = draw_series(rng, published)
        child = children(lambda link, series=series: write_all(store_path, series, link))
        first = child.link.hear()
        time.sleep(rng.uniform(0, 3 * typical_s))
        child.kill()
        heard = [first, *child.messages()] if first else []
        assert child.wait() in (-signal.SIGKILL, 0), heard
        reported, in_flight = outcome(heard, series)
        killed = child.wait() == -signal.SIGKILL
        figures.add("kills of all kinds", killed)
        figures.add("kills in the middle of a write", killed and bool(in_flight))
        in_a_write += killed and bool(in_flight)
        published += reported
        figures.add("prefixes reported as published before a kill", len(reported))
        trace = f"seed {SEED}, world {world}, kill {attempts}"
        published += check_store(store_path, published, in_flight, figures, trace)
    # At the end everything is read, not only a sample.
    check_store(store_path, published, [], figures, f"seed {SEED}, world {world}, the end", sample=len(published))


def draw_series(rng: random.Random, stored: Sequence[Prefix]) -> list[Prefix]:
    """What one child is to write, one after the other: later ones may continue earlier ones."""
    series: list[Prefix] = []
    for _ in range(8):
        series.append(draw_prefix(rng, [*stored, *series]))
    return series


def test_kills_at_every_step_of_a_write(children: Children, figures: Figures, store_path: Path, tmp_path: Path) -> None:
    rng = random.Random(f"stepped {SEED}")
    hit: set[str] = set()
    seen: Counter[str] = Counter()
    published: list[Prefix] = []
    for number in range(STEPPED_KILLS):
        path = tmp_path / f"store-{number // KILLS_PER_STORE}"
        published = published if path.exists() else []
        prefix = draw_prefix(rng, published)

        def work(link: Link, begin: Callable[[], None], where: Path, prefix: Prefix = prefix) -> None:
            write_all(where, [prefix], link, begin)

        steps = rehearsed(children, path, tmp_path / "rehearsal", work)
        seen.update(set(steps))
        # Steps that were never fatal come first, of these the ones that few writes have.
        name = min(sorted(set(steps) - hit) or rng.sample(sorted(steps), 1), key=seen.__getitem__)
        hit.add(name)
        fatal = name, rng.randrange(steps[name])
        heard = kill_at(children, fatal, lambda link, begin, path=path, work=work: work(link, begin, path))
        figures.add("kills of all kinds")
        reported, in_flight = outcome(heard, [prefix])
        figures.add("kills in the middle of a write", bool(in_flight))
        published += reported
        published += check_store(path, published, in_flight, figures, f"seed {SEED}, kill {number} at {fatal}")
        if number % KILLS_PER_STORE == KILLS_PER_STORE - 1:
            check_store(path, published, [], figures, f"seed {SEED}, after kill {number}", sample=len(published))
    assert seen
    assert hit == set(seen), f"no kill came at {sorted(set(seen) - hit)}: allow more of them"
    figures.add("different steps of a write at which it was killed", len(hit))


def rehearsed(
    children: Children, path: Path, copy: Path, work: Callable[[Link, Callable[[], None], Path], object]
) -> Counter[str]:
    """The steps of what is about to be done to the store at `path`, found out on a copy of it."""
    if path.exists():
        shutil.copytree(path, copy)
    try:
        return count_steps(children, lambda link, begin: work(link, begin, copy))
    finally:
        shutil.rmtree(copy)


# ---- kills in the middle of cleaning up ----


@dataclass
class Task:
    """Something that is done to a prepared store, and what it may take away.

    Attributes:
        work: is killed; says `("done",)` when it returns.
        stays: prefixes that must survive.
        goes: prefixes that may be there or not; they must be gone when `work` has returned.
        replaced: prefixes that may be there or not, as many as room is needed for.
        arrives: prefixes that may be there or not; they must be there when `work` has returned.
    """

    work: Callable[[Path], object]
    stays: list[Prefix]
    goes: list[Prefix] = field(default_factory=list)
    replaced: list[Prefix] = field(default_factory=list)
    arrives: list[Prefix] = field(default_factory=list)


def a_family(seed: int) -> list[Prefix]:
    """Five prefixes of one model that take up equally much: three roots, and a child and a grandchild of the first."""
    rng = np.random.default_rng([SEED, seed])
    tokens = 4 * 30
    roots = [Prefix(rng.integers(0, 1000, tokens), 0) for _ in range(3)]
    child = Prefix(np.concatenate([roots[0].ids, rng.integers(0, 1000, tokens)]), 0, tokens)
    grandchild = Prefix(np.concatenate([child.ids, rng.integers(0, 1000, tokens)]), 0, 2 * tokens)
    return [*roots, child, grandchild]


def key_of(store: PrefixStore, prefix: Prefix) -> str:
    stored = store.inner.lookup(prefix.fingerprint, prefix.ids, prefix.geometry.chunk_size, count=False)
    assert stored is not None
    assert stored.tokens == len(prefix.ids)
    return stored.spans[-1].segment.key


def a_delete(path: Path) -> Task:
    first, second, third, child, grandchild = family = a_family(1)
    with PrefixStore(path) as store:
        for prefix in family:
            prefix.write(store)
        keys = [key_of(store, child), key_of(store, grandchild)]

    def work(where: Path) -> None:
        store = PrefixStore(where)
        for key in keys:
            if key in {entry.key for entry in store.entries()}:
                store.delete(key, recursive=True)

    return Task(work, stays=[first, second, third], goes=[child, grandchild])


def a_clean_up(path: Path) -> Task:
    """`gc` of a store with every kind of garbage."""
    first, second, third, child, grandchild = family = a_family(2)
    with PrefixStore(path) as store:
        for prefix in family:
            prefix.write(store)
        damaged = store.inner.lookup(second.fingerprint, second.ids, second.geometry.chunk_size)
        assert damaged is not None
        store.inner.discard(damaged.spans[0].segment, "as if it were damaged")
        unindexed, lost = key_of(store, child), key_of(store, third)
    with closing(sqlite3.connect(path / "index.sqlite")) as db:
        drop_segment(db, unindexed)
        db.commit()
    (path / "segments" / lost[:2] / f"{lost}.safetensors").unlink()
    (path / "partial" / f"{lost}.0a0b0c0d.partial").write_bytes(b"begun")
    (path / "index.sqlite.damaged-1").write_bytes(b"no index")

    def work(where: Path) -> None:
        PrefixStore(where).gc()

    return Task(work, stays=[first, child, grandchild], goes=[second, third])


def an_expiry(path: Path) -> Task:
    first, second, third, child, grandchild = family = a_family(3)
    with PrefixStore(path) as store:
        for prefix in family:
            prefix.write(store)
        store.pin(key_of(store, second))
        old = [key_of(store, prefix) for prefix in (second, third, grandchild)]
    with closing(sqlite3.connect(path / "index.sqlite")) as db:
        db.executemany("UPDATE segments SET last_used = 1.0, created = 1.0 WHERE key = ?", [(key,) for key in old])
        db.commit()

    def work(where: Path) -> None:
        PrefixStore(where, ttl_s=1e6).gc()

    return Task(work, stays=[first, second, child], goes=[third, grandchild])


def an_eviction(path: Path) -> Task:
    """A full store takes two new prefixes; three of the old ones cannot go, for one of three reasons each."""
    first, second, third, child, grandchild = family = a_family(4)
    new = a_family(5)[:2]
    with PrefixStore(path) as store:
        for prefix in family:
            prefix.write(store)
        store.pin(key_of(store, grandchild))  # What a pinned one continues stays as well.
        room = store.stats.segment_bytes
        assert len({entry.bytes for entry in store.entries()}) == 1

    def work(where: Path) -> None:
        store = PrefixStore(where, max_disk_bytes=room)
        for prefix in new:
            prefix.write(store)

    return Task(work, stays=[first, child, grandchild], replaced=[second, third], arrives=new)


def a_lower_bound(path: Path) -> Task:
    """A store is opened with less room than it takes up."""
    first, second, third, child, grandchild = family = a_family(8)
    with PrefixStore(path) as store:
        for prefix in family:
            prefix.write(store)
        store.pin(key_of(store, grandchild))
        room = sum(entry.bytes for entry in store.entries()) * 3 // 5

    def work(where: Path) -> None:
        PrefixStore(where, max_disk_bytes=room).flush()

    return Task(work, stays=[first, child, grandchild], goes=[second, third])


def a_rebuild(path: Path) -> Task:
    with PrefixStore(path) as store:
        for prefix in (family := a_family(6)):
            prefix.write(store)

    def work(where: Path) -> None:
        with PrefixStore(where) as store:
            store.inner.index.rebuild()

    return Task(work, stays=family)


def a_lost_index(path: Path) -> Task:
    task = a_rebuild(path)
    (path / "index.sqlite").unlink()
    return Task(PrefixStore, stays=task.stays)


def a_new_store(path: Path) -> Task:
    first = a_family(7)[0]
    return Task(lambda where: first.write(PrefixStore(where)), stays=[], arrives=[first])


@pytest.mark.parametrize(
    "prepare", [a_delete, a_clean_up, an_expiry, an_eviction, a_lower_bound, a_rebuild, a_lost_index, a_new_store]
)
def test_kills_in_the_middle_of_other_work(
    children: Children, figures: Figures, tmp_path: Path, prepare: Callable[[Path], Task]
) -> None:
    template, path = tmp_path / "template", tmp_path / "store"
    task = prepare(template)

    def work(link: Link, begin: Callable[[], None], where: Path) -> None:
        begin()
        task.work(where)
        link.say("done")

    steps = rehearsed(children, template, tmp_path / "copy", work)
    rng = random.Random(f"{prepare.__name__} {SEED}")
    for name in rng.sample(sorted(steps), min(len(steps), KILLS_PER_TASK)):
        if template.exists():
            shutil.copytree(template, path)
        fatal = name, rng.randrange(steps[name])
        heard = kill_at(children, fatal, lambda link, begin: work(link, begin, path))
        figures.add("kills of all kinds")
        figures.add("kills of other work than writing")
        _check_task(path, task, figures, f"seed {SEED}, killed at {fatal}", done=["done"] in heard)
        shutil.rmtree(path)


def _check_task(path: Path, task: Task, figures: Figures, trace: str, *, done: bool) -> None:
    """After a kill in the middle of a task: what had to stay is there; and so it is when the task is done again."""
    optional = [*task.goes, *task.replaced, *task.arrives]
    there = check_store(path, task.stays, optional, figures, trace, tidy=False)
    if done:
        assert not [prefix for prefix in there if prefix in task.goes], f"{trace}: what was deleted is back"
        assert [prefix for prefix in there if prefix in task.arrives] == task.arrives, trace
    if task.replaced:
        # Room was needed for no more than the one segment that was being written.
        assert len(task.replaced) <= len([*there]) <= len(task.replaced) + 1, trace
    task.work(path)
    with PrefixStore(path) as store:
        store.gc()
    there = check_store(path, task.stays, optional, figures, f"{trace}, then done again")
    assert not [prefix for prefix in there if prefix in task.goes], trace
    assert [prefix for prefix in there if prefix in task.arrives] == task.arrives, trace


# ---- kills in the middle of a request ----


@pytest.mark.parametrize("mode", ["explicit", "automatic"])
def test_a_request_that_was_killed_is_answered_rightly_when_it_is_repeated(
    children: Children, figures: Figures, store_path: Path, tmp_path: Path, mode: str
) -> None:
    model = build("llama", "sdpa", layers=2)
    rng = random.Random(f"request {mode} {SEED}")

    def answer(ids: torch.Tensor, path: Path) -> Any:
        with PrefixStore(path) as store:
            prefix = ids[:, :-5] if mode == "explicit" else None
            cache = ContiguousKVCache(model, prefix, store=store, budget=1.0)
            result = generate(model, ids, cache, tokens=4)
            cache.close()
            return result

    started = time.perf_counter()
    children(lambda link: answer(token_ids(300, seed=0), tmp_path / "rehearsal")).finish()
    typical_s = time.perf_counter() - started
    shared = token_ids(100, seed=1)
    for number in range(KILLS_OF_REQUESTS):
        # Every other request goes on where an earlier one may have been killed.
        ids = torch.cat([shared, token_ids(150, seed=number)], dim=1) if number % 2 else token_ids(300, seed=number)

        def work(link: Link, ids: torch.Tensor = ids) -> None:
            link.say("begins")
            answer(ids, store_path)
            link.say("done")
            signal.pause()

        child = children(work)
        child.link.hear()
        time.sleep(rng.uniform(0, typical_s))
        child.kill()
        in_flight = ["done"] not in child.messages()
        assert child.wait() == -signal.SIGKILL
        figures.add("kills of all kinds")
        figures.add("kills in the middle of a request", in_flight)
        expected = generate(model, ids, prefilled(model, ids[:, :-5]), tokens=4)
        for _ in range(2):  # The second one finds what the first one stored.
            found = answer(ids, store_path)
            wrong = found.sequences.tolist() != expected.sequences.tolist()
            figures.add("wrong answers of requests repeated after a kill", wrong)
            assert_same_generation(found, expected)
        with PrefixStore(store_path) as store:
            assert store.verify() == []
        assert leftovers(store_path) == []
