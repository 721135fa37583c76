"""Named counts that a suite prints at its end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


class Figures:
    """Named counts of a whole test run, printed at its end.

    A figure that should be 0 is counted like any other: the code that checks adds 1 where something is wrong and 0
    where nothing is, so that a 0 in the table means that the suite looked.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}

    def add(self, name: str, number: int = 1) -> None:
        """Add to a figure; one that was never added to does not exist."""
        self._counts[name] = self._counts.get(name, 0) + int(number)

    def __getitem__(self, name: str) -> int:
        return self._counts[name]

    def __iter__(self) -> Iterator[tuple[str, int]]:
        return iter(sorted(self._counts.items()))

    def __len__(self) -> int:
        return len(self._counts)

    def print(self, title: str, reporter: pytest.TerminalReporter) -> None:
        """A section at the end of the run; nothing where nothing was counted."""
        if not self._counts:
            return
        reporter.section(title)
        width = max(map(len, self._counts))
        for name, number in self:
            reporter.write_line(f"{name:<{width}}  {number:>8}")
