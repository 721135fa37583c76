"""How long a run will take, from the first requests of it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from contextlib import contextmanager


class Forecast:
    """Times the kinds of work of a run per token, and says how long the rest will take.

    A kind that was not seen takes as long as the kinds that were, on average.
    """

    def __init__(self) -> None:
        self._seconds: dict[Hashable, float] = defaultdict(float)
        self._tokens: dict[Hashable, int] = defaultdict(int)

    @contextmanager
    def seen(self, kind: Hashable, tokens: int) -> Iterator[None]:
        """A context that does one piece of work of this kind, for a prompt of so many tokens."""
        began = time.perf_counter()
        yield
        self._seconds[kind] += time.perf_counter() - began
        self._tokens[kind] += tokens

    def seconds(self, left: Iterable[tuple[Hashable, int]]) -> float:
        """Seconds for the pieces of work that are left, each a kind and the tokens of its prompt."""
        total = sum(self._tokens.values())
        mean = sum(self._seconds.values()) / total if total else 0.0
        rates = {kind: self._seconds[kind] / self._tokens[kind] for kind in self._seconds if self._tokens[kind]}
        return sum(rates.get(kind, mean) * tokens for kind, tokens in left)


def in_words(seconds: float) -> str:
    """For example `"14 minutes"`."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 1.5 * length:
            return f"{seconds / length:.0f} {unit}" if unit == "minutes" else f"{seconds / length:.1f} {unit}"
    return f"{max(1, round(seconds))} seconds"
