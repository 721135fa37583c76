"""How ratios of times change with the speed of reads, and where systems overtake each other."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations

from ..statistics import Estimate, crossing
from . import measures, paper
from .about import speed_said
from .cells import at, columns_used, named, shown, table
from .names import OURS, PAPER, Rival, Setting, is_reference
from .rows import UNLIMITED, Results
from .states import Cut, cut, states_of
from .words import verdict


@dataclass(frozen=True)
class Crossing:
    """Where one setting overtakes another as reads become faster.

    Attributes:
        first: the setting that is faster at slower reads.
        second: the setting that is faster at faster reads.
        below, above: the measured speeds on both sides, in GB/s.
        at: the interpolated speed at which both take equally long, in GB/s.
        told_apart: at how many of the two speeds the intervals tell the two settings apart.
    """

    first: Setting
    second: Setting
    below: float
    above: float
    at: float
    told_apart: int


def disk_speed(results: Results) -> float | None:
    """The speed of reads without a limit, in GB/s: the smallest that a run's probe of the disk found."""
    found = [run.machine.get("disk_gbps") for run in results.runs if not run.untimed]
    return min((float(one) for one in found if one), default=None)


def places(results: Results) -> dict[float, float]:
    """The place of each limit on an axis, in GB/s: at most the disk's speed. Without a limit: the disk's, if known."""
    disk = disk_speed(results)
    return {
        speed: speed if disk is None else min(speed, disk)
        for speed in results.speeds
        if speed != UNLIMITED or disk is not None
    }


def cuts_at(results: Results, rival: Rival, state: str) -> dict[float, Cut]:
    """The rows of a state, for each limit on reads that has some."""
    rows = results.at_all_speeds
    found = {}
    for speed in results.speeds:
        own = rows[rows["read_gbps"] == speed]
        if (own["state"] == state).any():
            found[speed] = cut(own, state, rival)
    return found


def states_with_speeds(results: Results) -> list[str]:
    """States whose rows have several limits on reads; warm ones read nothing, so a limit cannot matter there."""
    rows = results.at_all_speeds
    return [
        state
        for state in states_of(rows)
        if rows.loc[rows["state"] == state, "read_gbps"].nunique() > 1 and not state.startswith("warm")
    ]


def comparable(one: Setting, other: Setting) -> bool:
    """Whether two settings have equal budgets, or one of them has the whole prefix."""
    return one.budget == other.budget or 1.0 in (one.budget, other.budget)


def crossings(results: Results, rival: Rival, state: str) -> list[Crossing]:
    """All crossings of two comparable settings in a state."""
    found = []
    by_speed, axis = cuts_at(results, rival, state), places(results)
    for one, other in combinations(_settings(by_speed), 2):
        if not comparable(one, other):
            continue
        ratios: dict[float, Estimate] = {}
        for speed in (speed for speed in by_speed if speed in axis):
            ratio = measures.ratio(by_speed[speed].rows, one, other)
            if ratio is not None:
                ratios.setdefault(axis[speed], ratio)
        speeds = sorted(ratios)
        for below, place, above in crossing(speeds, [math.log(ratios[speed].value) for speed in speeds]):
            first, second = (one, other) if ratios[below].value < 1 else (other, one)
            told_apart = sum(bool(verdict(ratios[speed])) for speed in (below, above))
            found.append(Crossing(first, second, below, above, place, told_apart))
    return found


def _settings(by_speed: dict[float, Cut]) -> list[Setting]:
    known = dict.fromkeys(setting for one in by_speed.values() for setting in one.settings)
    return [setting for setting in known if not is_reference(setting)]


def section(results: Results, rival: Rival) -> list[tuple[str, str]]:
    """For each state with several limits on reads: its name, and its tables as Markdown."""
    found = []
    for state in states_with_speeds(results):
        by_speed = cuts_at(results, rival, state)
        text = [_ratios(by_speed, rival), _overtaking(crossings(results, rival, state))]
        found.append((state, "\n\n".join([*text, *filter(None, [_beside_the_paper(by_speed)])])))
    return found


def _head(by_speed: dict[float, Cut]) -> list[str]:
    return [speed_said(speed) for speed in by_speed]


def _ratios(by_speed: dict[float, Cut], rival: Rival) -> str:
    lines = []
    for setting in _settings(by_speed):
        ratios = [one.over_rival(setting) for one in by_speed.values()]
        cells = [f"{shown(ratio)}, {ratio.requests}" if ratio else "" for ratio in ratios]
        if any(cells):
            lines.append([*named(setting), *cells])
    if not lines:
        return f"No system shares requests with {rival.label} at these speeds."
    text = f"Time over that of {rival.label} by the speed of reads, and the number of pairs:"
    return f"{text}\n\n{table(*columns_used(['system', 'budget', *_head(by_speed)], lines))}"


def _overtaking(found: list[Crossing]) -> str:
    known = sorted((one for one in found if one.told_apart), key=lambda one: -one.told_apart)
    left_out = len(found) - len(known)
    rest = (
        f"{left_out} more pairs of systems change places, but are told apart on neither side."
        if left_out > 1
        else "One more pair of systems changes places, but is told apart on neither side."
        if left_out
        else ""
    )
    if not known:
        return " ".join(
            ["No two systems of equal budget overtake each other for sure between these speeds.", rest]
        ).strip()
    lines = [
        [
            at(one.first),
            at(one.second),
            f"{one.below:.3g} and {one.above:.3g}",
            f"{one.at:.3g}",
            ("", "one end only", "yes")[one.told_apart],
        ]
        for one in known
    ]
    head = ["faster below", "faster above", "between, GB/s", "equal at, GB/s", "told apart at both ends"]
    text = (
        "Systems that overtake each other as reads become faster. The speed at which both take equally long is "
        "interpolated between two measured speeds, linearly in the logarithms of speed and ratio:"
    )
    return "\n\n".join(part for part in (text, table(head, lines), rest) if part)


def _beside_the_paper(by_speed: dict[float, Cut]) -> str:
    """How many times faster ours and the published method are than the paper's baselines, beside its figures."""
    lines = []
    for baseline, figure in paper.SPEED_UPS.items():
        for system in (PAPER, OURS):
            cells = []
            for one in by_speed.values():
                own = measures.at_budget(one.rows, system, paper.BUDGET)
                other = measures.at_budget(one.rows, baseline, paper.BUDGET)
                ratio = measures.ratio(one.rows, other, own) if own and other else None
                cells.append(f"{shown(ratio)}, {ratio.requests}" if ratio else "")
            if any(cells):
                names = named(Setting(system, paper.BUDGET))
                lines.append([*names, at(Setting(baseline, 1.0)), *cells, f"{figure:.2f}"])
    if not lines:
        return ""
    text = f"Times faster at the paper's budget, and the number of pairs; the paper's SSD is a {paper.DISK}:"
    head = ["system", "budget", "faster than", *_head(by_speed), "paper, x"]
    return f"{text}\n\n{table(*columns_used(head, lines), words=3)}"


def lines(results: Results, rival: Rival, state: str) -> dict[Setting, tuple[list[float], list[Estimate]]]:
    """For the picture: each setting's speeds (GB/s, ascending) and ratios to the rival."""
    by_speed, axis = cuts_at(results, rival, state), places(results)
    found = {}
    for setting in _settings(by_speed):
        ratios: dict[float, Estimate] = {}
        for speed in (speed for speed in by_speed if speed in axis):
            ratio = by_speed[speed].over_rival(setting)
            if ratio is not None:
                ratios.setdefault(axis[speed], ratio)
        if len(ratios) > 1:
            speeds = sorted(ratios)
            found[setting] = (speeds, [ratios[speed] for speed in speeds])
    return found
