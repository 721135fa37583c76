"""The tally of the fault suite, child processes, and prefixes whose bytes are known."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
import sqlite3
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tally import Figures
from unit.store_helpers import expected_kv, geometry, read_back, write_prefix

from hf_contiguouskv.store import KVGeometry, PrefixStore
from hf_contiguouskv.store.hashing import TokenIds

# A child that outlives its test by mistake ends after so many seconds.
_LIFETIME_S = 300


_FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures()


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """The one tally of this run."""
    return pytestconfig.stash[_FIGURES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    config.stash.get(_FIGURES, Figures()).print("fault suite", terminalreporter)


class Link:
    """A child's line to the test: both sides send JSON, one value a line."""

    def __init__(self, reading: int, writing: int) -> None:
        self._incoming = os.fdopen(reading, "rb")
        self._writing = writing

    def say(self, *message: Any) -> None:
        """Send; what was said before a kill arrives all the same (a pipe takes short lines whole or not at all)."""
        os.write(self._writing, json.dumps(message).encode() + b"\n")

    def hear(self) -> list[Any] | None:
        """The next message; `None` when the other side has ended."""
        line = self._incoming.readline()
        return json.loads(line) if line.endswith(b"\n") else None

    def close(self) -> None:
        self._incoming.close()
        os.close(self._writing)


class Child:
    """A forked process that runs `work(link)` and leaves without any clean-up of Python's.

    The parent must have no store open that the child uses, and no lock held by a thread that the child needs.
    """

    def __init__(self, work: Callable[[Link], object]) -> None:
        to_parent, to_child = os.pipe(), os.pipe()
        self.status: int | None = None
        sys.stdout.flush()
        with warnings.catch_warnings():
            # The threads that this process has are idle ones of libraries that the child does not use.
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            os.close(to_parent[0])
            os.close(to_child[1])
            _run_and_leave(work, Link(to_child[0], to_parent[1]))
        os.close(to_parent[1])
        os.close(to_child[0])
        self.link = Link(to_parent[0], to_child[1])

    def kill(self) -> None:
        """SIGKILL: no handler, no clean-up, nothing flushed."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self) -> int:
        """The exit code; negative for the signal that ended it."""
        if self.status is None:
            self.status = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.status

    def messages(self) -> list[list[Any]]:
        """Everything that it says until it ends."""
        heard = []
        while (message := self.link.hear()) is not None:
            heard.append(message)
        return heard

    def finish(self) -> list[list[Any]]:
        """Let it run to its end, which must be a good one; what it said."""
        heard = self.messages()
        code = self.wait()
        assert code == 0, f"child {self.pid} ended with {code}:\n{_failure(heard)}"
        return heard


def _failure(heard: list[list[Any]]) -> str:
    return "\n".join(message[1] for message in heard if message and message[0] == "failed") or "(it said nothing)"


def _run_and_leave(work: Callable[[Link], object], link: Link) -> None:
    code = 1
    try:
        signal.alarm(_LIFETIME_S)
        gc.disable()  # Collecting would touch, and so copy, the parent's whole memory; and run its finalizers.
        work(link)
        code = 0
    except BaseException:
        link.say("failed", traceback.format_exc()[-3500:])
    finally:
        os._exit(code)


Children = Callable[[Callable[[Link], object]], Child]


@pytest.fixture
def children() -> Iterator[Children]:
    """Starts child processes: `children(work)`; those that are left are killed at the end of the test."""
    started: list[Child] = []

    def start(work: Callable[[Link], object]) -> Child:
        child = Child(work)
        started.append(child)
        return child

    yield start
    for child in started:
        child.kill()
        child.wait()
        child.link.close()


GEOMETRIES = (
    geometry(),
    geometry(num_layers=5, layers_per_group=2, dtype=torch.bfloat16, leader_layers=(0,), indexed_layers=(0, 1)),
    geometry(num_layers=2, kv_heads=1, head_dim=64, chunk_size=16, leader_layers=(), indexed_layers=()),
    geometry(num_layers=6, kv_heads=4, head_dim=32, dtype=torch.float16, chunk_size=8, indexed_layers=(0, 5)),
    geometry(num_layers=3, dtype=torch.bfloat16, indexed_layers=(0,), packed_layers=(0,), compact_layers=(1, 2)),
)


# ---- what is stored, and the proof that it still is ----


@dataclass(frozen=True, eq=False)
class Prefix:
    """Tokens of one model, and how much of them was stored before."""

    ids: TokenIds
    kind: int
    stored_before: int = 0

    @property
    def geometry(self) -> KVGeometry:
        return GEOMETRIES[self.kind]

    @property
    def fingerprint(self) -> str:
        return f"{self.kind:02x}" * 16

    def write(self, store: PrefixStore) -> None:
        first = self.stored_before // self.geometry.chunk_size
        write_prefix(store, self.ids, first, self.geometry, self.fingerprint)

    def tokens_found(self, store: PrefixStore) -> int:
        # (Not counted as a use: to look must not change what expires or is evicted.)
        stored = store.inner.lookup(self.fingerprint, self.ids, self.geometry.chunk_size, count=False)
        return 0 if stored is None else stored.tokens

    def is_intact(self, store: PrefixStore) -> bool:
        """Whether all bytes of all its chunks are the ones that were written; it must be there in full."""
        stored = store.inner.lookup(self.fingerprint, self.ids, self.geometry.chunk_size, count=False)
        assert stored is not None
        assert stored.tokens == len(self.ids)
        layers = range(self.geometry.num_layers)
        found = read_back(store, stored, layers)
        # The last chunk may be the one of a longer prefix, which goes on where this one ends.
        end = len(self.ids)
        return all(
            torch.equal(
                in_token_order(found[layer])[:end], in_token_order(expected_kv(self.geometry, self.ids, layer))[:end]
            )
            for layer in layers
        )


def in_token_order(kv: torch.Tensor) -> torch.Tensor:
    """K and V `[chunks, 2, kv_heads, c, head_dim]` as `[tokens, 2, kv_heads, head_dim]`."""
    return kv.permute(0, 3, 1, 2, 4).flatten(0, 1)


def draw_prefix(rng: random.Random, stored: Sequence[Prefix]) -> Prefix:
    """A new prefix: of a random model, and half of the time a longer one than something that is stored."""
    numbers = np.random.default_rng(rng.getrandbits(32))
    if stored and rng.random() < 0.5:
        parent = rng.choice(stored)
        # A continuation may begin inside a chunk of its parent, or at one's end; a short one is often taken in by the
        # next.
        more = numbers.integers(0, 1000, rng.choice([rng.randrange(1, 4), rng.randrange(4, 60)]))
        return Prefix(np.concatenate([parent.ids, more]), parent.kind, len(parent.ids))
    kind = rng.randrange(len(GEOMETRIES))
    return Prefix(numbers.integers(0, 1000, rng.randrange(1, 200)), kind)


def check_store(
    path: Path,
    published: Sequence[Prefix],
    optional: Sequence[Prefix],
    figures: Figures,
    trace: str,
    *,
    sample: int = 5,
    tidy: bool = True,
) -> list[Prefix]:
    """Open the store as the next process would, and compare everything with what must be in it.

    Args:
        path: of the store.
        published: must be there.
        optional: may be there or not, but not with other bytes.
        figures: where to count.
        trace: how to come here again.
        sample: how many of `published` are read; all are looked up.
        tidy: whether nothing may lie in the folder that does not belong there.

    Returns:
        those of `optional` that are there in full.
    """
    wrong: list[str] = []

    def judge(name: str, bad: bool, what: str = "") -> None:
        figures.add(name, bad)
        if bad:
            wrong.append(f"{name}: {what}")

    try:
        store = PrefixStore(path)
    except Exception as error:
        judge("stores that did not open", True, repr(error))
        raise
    judge("stores that did not open", False)
    with store:
        for prefix in published:
            found = prefix.tokens_found(store)
            judge("published prefixes lost", found != len(prefix.ids), f"{found} of {len(prefix.ids)} tokens")
        arrived = [prefix for prefix in optional if prefix.tokens_found(store) == len(prefix.ids)]
        to_read = published if len(published) <= sample else random.Random(len(published)).sample(published, sample)
        for prefix in [*to_read, *arrived]:
            if prefix.tokens_found(store) == len(prefix.ids):
                judge("prefixes with wrong bytes", not prefix.is_intact(store), str(prefix.ids[:5]))
        problems = store.verify()
        judge("problems found by verify", bool(problems), "; ".join(map(str, problems)))
        judge("index and files differ", indexed_keys(path) != segment_keys(path), "")
    left = leftovers(path) if tidy else []
    judge("leftovers", bool(left), str(left))
    assert not wrong, f"{trace}: {wrong}"
    return arrived


def segment_keys(path: Path) -> set[str]:
    """Names of all files in `segments/`, found without the library."""
    return {file.stem for file in (path / "segments").rglob("*") if file.is_file()}


def indexed_keys(path: Path) -> set[str]:
    """Keys in the index, read without the library."""
    with closing(sqlite3.connect(f"file:{path / 'index.sqlite'}?mode=ro", uri=True)) as db:
        return {key for (key,) in db.execute("SELECT key FROM segments")}


def leftovers(path: Path) -> list[str]:
    """Files that no closed, sound store has."""
    usual = {"contiguouskv-store.json", "index.sqlite", "index.lock", "index.sqlite-wal", "index.sqlite-shm"}
    there = [file.relative_to(path) for file in path.rglob("*") if file.is_file()]
    return [str(file) for file in there if str(file) not in usual and file.parts[0] not in ("segments", "pins")]
