"""Names, order and colours of systems in a report."""

from __future__ import annotations

from collections.abc import Iterable

from ..systems import SYSTEMS

# A system at a budget: tables have one row for each.
Setting = tuple[str, float]

IN_MEMORY = "in_memory"
ATTENTIONSTORE = "attentionstore"
PAPER = "contiguouskv_paper"
OURS = "contiguouskv"

_LABELS = {
    "recompute": "recompute",
    "in_memory": "in memory",
    "reload": "reload",
    "attentionstore": "AttentionStore",
    "attentionstore_overlapped": "AttentionStore (overlapped)",
    "attentionstore_h2o": "AttentionStore + H2O",
    "attentionstore_h2o_lfu": "AttentionStore + H2O (LFU)",
    "attentionstore_h2o_overlapped": "AttentionStore + H2O (overlapped)",
    "impress": "IMPRESS",
    "impress_overlapped": "IMPRESS (overlapped)",
    "impress_groups": "IMPRESS (groups)",
    "contiguouskv_paper": "ContiguousKV (published)",
    "contiguouskv": "ContiguousKV (ours)",
    "contiguouskv_paper_resident": "ContiguousKV (published, leader keys in memory)",
    "contiguouskv_resident": "ContiguousKV (ours, index in memory)",
    "contiguouskv_exact": "ContiguousKV (ours, exact payload)",
}
_COLOURS = {
    "recompute": "#b3b3b3",
    "in_memory": "#5c5c5c",
    "reload": "#9c755f",
    "attentionstore": "#7fb2e0",
    "attentionstore_overlapped": "#2b6ca3",
    "attentionstore_h2o": "#8e6bb0",
    "attentionstore_h2o_lfu": "#c9b3dd",
    "attentionstore_h2o_overlapped": "#5d3f7f",
    "impress": "#e0a03c",
    "impress_overlapped": "#f0cf95",
    "impress_groups": "#b5532b",
    "contiguouskv_paper": "#8cc79b",
    "contiguouskv": "#1f7a45",
    "contiguouskv_paper_resident": "#c2e3c9",
    "contiguouskv_resident": "#0c4a27",
    "contiguouskv_exact": "#5fa8a0",
}
_OTHER_COLOURS = ("#c2458a", "#2fa3a3", "#a3a32a", "#d96c6c", "#4b4ba8")
_MARKERS = {
    "reload": "v",
    "attentionstore": "s",
    "attentionstore_overlapped": "D",
    "attentionstore_h2o": "P",
    "impress": "X",
    "impress_groups": "^",
    "contiguouskv_paper": "h",
    "contiguouskv_exact": "d",
}
# Systems that attend to the whole prefix at any budget.
EXACT = tuple(name for name, kind in SYSTEMS.items() if kind.exact)


def answering(setting: Setting) -> Setting:
    """The setting whose answers a system gives: mostly itself (see `SystemKind.answers_as`)."""
    system, budget = setting
    known = SYSTEMS.get(system)
    return (known.answers_as if known is not None and known.answers_as else system), budget


def label(system: str) -> str:
    """A system's name for readers; its own name if there is no other."""
    return _LABELS.get(system, system)


def colour(system: str, systems: Iterable[str]) -> str:
    """A system's colour; unknown systems get the spare colours, in the order of their names among `systems`."""
    if system in _COLOURS:
        return _COLOURS[system]
    strangers = sorted(set(systems) - set(_COLOURS))
    return _OTHER_COLOURS[strangers.index(system) % len(_OTHER_COLOURS)]


def marker(system: str) -> str:
    """A system's marker in pictures, for readers who cannot distinguish the colours."""
    return _MARKERS.get(system, "o")


def ordered(settings: Iterable[Setting]) -> list[Setting]:
    """Settings by budget, the whole prefix first; within a budget in the order listed here, unknown systems last."""
    places = {name: place for place, name in enumerate(_LABELS)}

    def place(setting: Setting) -> tuple[float, int, str]:
        system, budget = setting
        return (-1.0 if budget >= 1 else budget), places.get(system, len(places)), system

    return sorted(set(settings), key=place)
