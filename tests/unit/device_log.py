"""What a fake device did, operation by operation, and the proof that everything was kept in order."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

HOST = "host"


@dataclass(frozen=True)
class Touch:
    """Bytes `[low, high)` of a block are read or written."""

    block: int
    low: int
    high: int
    write: bool


@dataclass(frozen=True)
class Entry:
    """One operation.

    Attributes:
        kind: "alloc", "copy in", "copy out", "compute", "host", "mark", "wait", "seen" (the host asked an event, and it
            had happened), "mixed" or "unpinned" (never right).
        agent: the stream that runs it, or "host".
        touches: memory that it reads or writes.
        after: events that it runs behind.
        event: the event for its end.
        detail: for messages.
    """

    kind: str
    agent: str
    touches: tuple[Touch, ...] = ()
    after: tuple[int, ...] = ()
    event: int | None = None
    detail: str = ""


def races(log: Sequence[Entry]) -> list[str]:
    """Every two accesses to the same memory, one of them a write, that nothing keeps in order, in words; and operations
    that are never right.

    The log is replayed with vector clocks, so this does not depend on when copies really ran.
    """
    found: list[str] = []
    clocks: dict[str, dict[str, int]] = defaultdict(dict)
    events: dict[int, dict[str, int]] = {}
    last: dict[int, dict[tuple[str, bool, int, int], tuple[int, int]]] = defaultdict(dict)
    for number, entry in enumerate(log):
        clock = clocks[entry.agent]
        _join(clock, clocks[HOST])  # What the host queues now comes after all that it knows to have happened.
        for event in entry.after:
            _join(clock, events[event])
        now = clock[entry.agent] = clock.get(entry.agent, 0) + 1
        if entry.kind in ("mixed", "unpinned"):
            found.append(f"{number}: {entry.kind}: {entry.detail}")
        for touch in entry.touches:
            for (agent, write, low, high), (time, earlier) in last[touch.block].items():
                if low < touch.high and touch.low < high and (write or touch.write) and clock.get(agent, 0) < time:
                    found.append(f"{_said(number, entry)} is not behind {_said(earlier, log[earlier])}: {touch}")
            last[touch.block][entry.agent, touch.write, touch.low, touch.high] = (now, number)
        if entry.event is not None:
            events[entry.event] = dict(clock)
    return found


def _join(clock: dict[str, int], other: dict[str, int]) -> None:
    for agent, time in list(other.items()):
        if clock.get(agent, 0) < time:
            clock[agent] = time


def _said(number: int, entry: Entry) -> str:
    return f"{number}: {entry.kind} {entry.detail} on {entry.agent}"
