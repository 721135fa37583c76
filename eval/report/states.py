"""The rows of one state: only these are compared, and the references."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import pandas

from ..statistics import Estimate
from . import measures
from .names import IN_MEMORY, MEMORY, RECOMPUTE, Rival, Setting, is_reference, states_in_order, written
from .rows import Table

_WARMEST_FIRST = ("warm_device", "warm_host")


@dataclass(frozen=True)
class Cut:
    """One state.

    Attributes:
        state: its name.
        rows: its timed rows. Rows of the references are in it, whatever their state, once for each request.
        rival: the system that times are divided by.
    """

    state: str
    rows: Table
    rival: Rival

    @cached_property
    def settings(self) -> list[Setting]:
        """Settings with rows of this state, and references."""
        return measures.settings(self.rows)

    @property
    def has_rival(self) -> bool:
        """Whether the rival has rows of this state."""
        return bool(len(self._of_rival))

    @cached_property
    def _of_rival(self) -> Table:
        options = "+".join(self.rival.options)
        chosen = (self.rows["system"] == self.rival.system) & (self.rows["options"] == options)
        if self.rival.budget is not None:
            chosen &= self.rows["budget"] == self.rival.budget
        return self.rows[chosen]

    @cached_property
    def comparable(self) -> Table:
        """Rows of requests that the rival answered too, in the same run and session.

        A setting that shares no request with the rival keeps all its rows, because they are all that it has.
        """
        if not self.has_rival:
            return self.rows
        common = measures.shared(self.rows, self._of_rival)
        alone = self.rows[~self.rows["setting"].isin(common["setting"].unique())]
        return pandas.concat([common, alone])

    @property
    def rivals(self) -> list[Rival]:
        """The rival, and `reload`, which every table has beside it."""
        return list(dict.fromkeys((self.rival, Rival())))

    def over_rival(self, setting: Setting, task: str | None = None, rival: Rival | None = None) -> Estimate | None:
        """Time of a setting over that of the rival; `None` without pairs, and for the rival itself.

        Args:
            setting: the setting.
            task: of one task only.
            rival: another rival than that of the cut.
        """
        other = measures.rival_of(self.rows, setting, rival or self.rival)
        return None if other is None else measures.ratio(self.rows, setting, other, task)

    def over_memory(self, setting: Setting) -> Estimate | None:
        """Time of a setting over that of in memory, the reference; `None` without pairs."""
        if setting == MEMORY or (self.rival.system, self.rival.options) == (IN_MEMORY, ()):
            return None
        return measures.ratio(self.comparable, setting, MEMORY)


def states_of(timed: Table) -> list[str]:
    """States with rows of a system that is no reference, the coldest first; else all states of the rows."""
    own = timed[~timed["setting"].isin([written(one) for one in measures.settings(timed) if is_reference(one)])]
    return states_in_order((own if len(own) else timed)["state"])


def cut(timed: Table, state: str, rival: Rival) -> Cut:
    """The rows of one state, with the references.

    Args:
        timed: rows whose times count.
        state: the state.
        rival: the system that times are divided by.
    """
    parts = [timed[timed["state"] == state]]
    present = set(parts[0]["setting"])
    for setting in measures.settings(timed):
        if not is_reference(setting) or written(setting) in present:
            continue
        own = measures.of(timed, setting)
        # A reference may have been made in several states: take one for all requests.
        order = ("cold",) if setting.system == RECOMPUTE else _WARMEST_FIRST
        found = [one for one in order if (own["state"] == one).any()] or [own["state"].iloc[0]]
        parts.append(own[own["state"] == found[0]])
    return Cut(state, pandas.concat(parts), rival)


def cuts(timed: Table, rival: Rival) -> list[Cut]:
    """A cut for every state of the rows."""
    return [cut(timed, state, rival) for state in states_of(timed)]
