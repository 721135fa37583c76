"""The tally of the fault suite: what was done to the store, and what went wrong because of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


class Figures:
    """Named counts of a whole test run, printed at its end.

    A figure that should be 0 is counted like any other: the code that checks adds 1 where something is wrong and 0
    where nothing is, so that a 0 in the table means that somebody looked.
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


_FIGURES = pytest.StashKey[Figures]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_FIGURES] = Figures()


@pytest.fixture(scope="session")
def figures(pytestconfig: pytest.Config) -> Figures:
    """The one tally of this run."""
    return pytestconfig.stash[_FIGURES]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    tally = config.stash.get(_FIGURES, None)
    if not tally:
        return
    terminalreporter.section("fault suite")
    width = max(len(name) for name, _ in tally)
    for name, number in tally:
        terminalreporter.write_line(f"{name:<{width}}  {number:>8}")
