"""The result in words and in one table: each sentence and each cell is made from figures of the rows."""

from __future__ import annotations

from hf_contiguouskv import ContiguousKVConfig

from ..statistics import FEW_PREFIXES, Estimate
from . import measures
from .cells import FEW, FEW_NOTE, at, columns_used, listed, number, share, shown, table
from .names import MEMORY, OURS, RELOAD, Rival, Setting, is_reference, label
from .quality import note_on_silent_tasks, telling
from .rows import Results
from .states import Cut, cuts

_NONE = f"No row of {label(Setting(OURS, 1.0))} has a time that counts."
_STREAMS_ONLY = "All requests are of streams: their section has the result."


def verdict(ratio: Estimate) -> str:
    """The side of 1 on which the whole interval of a ratio of times lies: "faster", "slower", or "" for neither.

    Without an interval no side is told, and neither if there are few prefixes altogether: three ratios lie on one side
    of 1 by chance every fourth time.
    """
    if not ratio.has_interval or ratio.prefixes < FEW_PREFIXES:
        return ""
    return "faster" if ratio.high < 1 else "slower" if ratio.low > 1 else ""


def result(results: Results, rival: Rival) -> str:
    """Where ours is faster and slower, than what, by how much, in which state; and what it loses in quality.

    The words are of one budget of each state: the library's default, or else the smallest. The table has all budgets.
    """
    there = cuts(results.timed, rival)
    lines = [line for cut in there if (budgets := _ours(cut)) for line in _of(cut, _told(budgets))]
    text = "\n".join(lines) or (_STREAMS_ONLY if (results.table["stream"] != "").all() else _NONE)
    parts = [text, *([FEW_NOTE] if FEW in text else []), *_beside_all(there)]
    quality = _quality(results)
    if quality:
        parts.append(quality)
    return "\n\n".join([*parts, *filter(None, [note_on_silent_tasks(results)])])


def _ours(cut: Cut) -> list[Setting]:
    """Ours, without options, at each of its budgets."""
    return [one for one in cut.settings if (one.system, one.options) == (OURS, ())]


def _told(budgets: list[Setting]) -> Setting:
    default = Setting(OURS, float(ContiguousKVConfig().budget))
    return default if default in budgets else min(budgets, key=lambda one: one.budget)


def _beside_all(cuts: list[Cut]) -> list[str]:
    """The table of ratios over all other systems, in each state and at each budget; nothing if the words say it all."""
    rows = [(cut, setting) for cut in cuts for setting in _ours(cut)]
    if len(rows) == len({cut.state for cut, _ in rows}):
        return []
    others = [Setting(one.system, 1.0, one.options) for cut in cuts for one in cut.settings if one.system != OURS]
    others = sorted(dict.fromkeys(others), key=is_reference)
    lines = []
    for cut, setting in rows:
        line = [cut.state, share(setting.budget)]
        for one in others:
            other = measures.at_budget(cut.rows, one.system, setting.budget, one.options)
            line.append(shown(measures.ratio(cut.rows, setting, other) if other else None))
        lines.append(line)
    head = ["state", "budget", *(label(one) + (" (reference)" if is_reference(one) else "") for one in others)]
    said = (
        f"Time of {label(Setting(OURS, 1.0))} over that of each other system at the same budget (exact systems have "
        "one), in the same state, for the same requests. Below 1, ours is faster."
    )
    return [f"{said}\n\n{table(*columns_used(head, lines))}"]


def _of(cut: Cut, setting: Setting) -> list[str]:
    groups: dict[str, list[str]] = {"faster": [], "slower": [], "": [], "few": [], "reference": []}
    # Reload first, because that is what its users have now.
    for other in sorted(cut.settings, key=lambda one: one.system != RELOAD):
        if other.system == OURS or other != measures.at_budget(cut.rows, other.system, setting.budget, other.options):
            continue
        ratio = measures.ratio(cut.rows, setting, other)
        if ratio is not None:
            few = "few" if ratio.prefixes < FEW_PREFIXES else verdict(ratio)
            groups["reference" if is_reference(other) else few].append(_compared(other, ratio))
    said = {
        "faster": "faster than",
        "slower": "slower than",
        "": "not told apart from",
        "few": f"on fewer than {FEW_PREFIXES} prefixes, which decide nothing, beside",
        "reference": "beside the references:",
    }
    lines = [f"    - {text} {listed(groups[kind])}" for kind, text in said.items() if groups[kind]]
    return [
        f"- **{cut.state}**, {at(setting)}:",
        *(lines or ["    - no other system was timed on the same requests"]),
    ]


def _compared(other: Setting, ratio: Estimate) -> str:
    """One comparison: "IMPRESS at 5% (2.10 times as fast, 1.90 - 2.30; 18 pairs, 6 prefixes)"."""
    speed = ratio.value <= 1
    ends = [ratio.value, *((ratio.low, ratio.high) if ratio.has_interval else ())]
    first, *span = ([1 / one for one in ends] if speed else ends) if min(ends) > 0 else ends
    between = f", {min(span):.2f} - {max(span):.2f}{FEW if ratio.few_prefixes else ''}" if span else ", no interval"
    said = "times as fast" if speed else "times as long"
    pairs = "1 pair" if ratio.requests == 1 else f"{ratio.requests} pairs"
    prefixes = "1 prefix" if ratio.prefixes == 1 else f"{ratio.prefixes} prefixes"
    return f"{at(other)} ({first:.2f} {said}{between}; {pairs}, {prefixes})"


def _quality(results: Results) -> str:
    """What ours loses against the whole prefix in memory, at each budget."""
    rows = telling(results)
    parts = []
    for setting in measures.settings(rows):
        if (setting.system, setting.options) != (OURS, ()):
            continue
        score, divergence = measures.difference(rows, setting, MEMORY), measures.mean_of(rows, setting, "kl_answer")
        said = []
        if score is not None:
            low, high = (f"{one * 100 + 0.0:+.1f}" for one in (score.low, score.high))
            interval = f" ({low} to {high}{FEW if score.few_prefixes else ''})" if score.has_interval else ""
            said.append(f"{round(score.value * 100, 1) + 0.0:+.1f} points of score{interval}, {score.requests} pairs")
        if divergence is not None:
            said.append(f"KL at the answer {number(divergence.value, 4)} nats")
        if said:
            parts.append(f"- **quality**, {at(setting)}, beside {label(MEMORY)}: {'; '.join(said)}.")
    return "\n".join(parts)
