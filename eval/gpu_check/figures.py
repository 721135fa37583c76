"""Medians, multiples of the floor and ratios, from complete or partial results of the stage `time`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from ..report.paper import SPEED_UPS
from ..timing import median_spread

Row = dict[str, Any]
# The paper's speed-ups over its baselines at its budget, by our labels.
PAPER_BASELINES = {
    "attentionstore": SPEED_UPS["attentionstore"],
    "attentionstore_h2o 5%": SPEED_UPS["attentionstore_h2o"],
    "impress 5%": SPEED_UPS["impress"],
}
OTHER_BASELINES = ("attentionstore+overlap", "exact", "reload", "in_memory", "recompute")
BASELINES = (*PAPER_BASELINES, *OTHER_BASELINES)
OURS = ("published 5%", "default 5%", "default 25%")
AT_PAPERS_BUDGET = ("published 5%", "default 5%")


def blocks_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """The results of each prefix length, ascending."""
    found = content.get("stages", {}).get("time", {}).get("found", {}).get("prefixes", {})
    return sorted(found.values(), key=lambda one: one["tokens"])


def counted(block: dict[str, Any]) -> dict[tuple[str, str | None], list[Row]]:
    """Requests by label and state: those of counted rounds, or of the first round if there are no others."""
    all_of: dict[tuple[str, str | None], list[Row]] = defaultdict(list)
    for one in block.get("requests", []):
        all_of[one["label"], one["state"]].append(one)
    return {key: [one for one in rows if one["round"] > 0] or rows for key, rows in all_of.items()}


def floors(block: dict[str, Any]) -> dict[int, float]:
    """Median seconds of the suffix alone, by round."""
    by_round: dict[int, list[float]] = defaultdict(list)
    for one in block.get("floors", []):
        by_round[one["round"]].append(one["seconds"])
    return {number: median_spread(values).median for number, values in by_round.items()}


def rows_of(content: dict[str, Any]) -> list[Row]:
    """One row per length, system and state, and one for the floor of each length."""
    found = []
    for block in blocks_of(content):
        floor = floors(block)
        for (label, state), requests in counted(block).items():
            over = [one["seconds"] / floor[one["round"]] for one in requests if one["round"] in floor]
            errors = [one["answer_error"] for one in requests if one.get("answer_error") is not None]
            found.append(
                {
                    "tokens": block["tokens"],
                    "label": label,
                    "state": state,
                    "requests": len(requests),
                    "only_first": all(one["round"] == 0 for one in requests),
                    "seconds": spread(one["seconds"] for one in requests),
                    "over_floor": spread(over),
                    "bytes_read": spread(one["bytes_read"] for one in requests),
                    "io_wait_s": spread(one["io_wait_s"] for one in requests),
                    "phases": phases(requests),
                    "hits": requests[-1]["stats"].get("hits"),
                    "not_cold": sum(one["cold"] is False for one in requests),
                    "departures": sorted({one["departure"] for one in requests if one.get("departure")}),
                    "answer_error": max(errors, default=None),
                    "wrong_answers": sum(one.get("answer_ok") is False for one in requests),
                }
            )
        if floor:
            values = [one["seconds"] for one in block["floors"] if one["round"] > 0 or len(floor) == 1]
            found.append(
                {"tokens": block["tokens"], "label": "floor", "state": None, "requests": len(values)}
                | {"seconds": spread(values), "over_floor": spread([1.0])}
            )
    return found


def phases(requests: list[Row]) -> dict[str, float]:
    """Median seconds of each phase."""
    names = {name for one in requests for name in one.get("phases", {})}
    return {name: median_spread(one["phases"].get(name, 0.0) for one in requests).median for name in sorted(names)}


def speed_ups(content: dict[str, Any]) -> list[Row]:
    """How many times faster our systems are than others with the prefix in the same state, round by round."""
    found = []
    for block in blocks_of(content):
        requests = counted(block)
        states = {state for _, state in requests}
        for state in sorted(states, key=str):
            for ours in OURS:
                for baseline in BASELINES:
                    ratios = _ratios(requests.get((baseline, state), []), requests.get((ours, state), []))
                    if ratios:
                        paper = PAPER_BASELINES.get(baseline) if ours in AT_PAPERS_BUDGET else None
                        found.append(
                            {"tokens": block["tokens"], "state": state, "ours": ours, "baseline": baseline}
                            | {"times_faster": spread(ratios), "paper": paper}
                        )
    return found


def _ratios(slow: list[Row], fast: list[Row]) -> list[float]:
    by_round = {one["round"]: one["seconds"] for one in fast}
    return [one["seconds"] / by_round[one["round"]] for one in slow if one["round"] in by_round]


def new_shapes(content: dict[str, Any]) -> list[Row]:
    """The cost of a suffix length that was not seen before, per system."""
    varied = content.get("stages", {}).get("time", {}).get("found", {}).get("varied", [])
    by_label: dict[str, dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for one in varied:
        by_label[one["label"]][one["suffix_tokens"]][one["time_of_shape"]] = one["seconds"]
    found = []
    for label, lengths in by_label.items():
        pairs = [times for times in lengths.values() if len(times) == 2]
        if pairs:
            found.append(
                {
                    "label": label,
                    "lengths": len(pairs),
                    "first": spread(times[1] for times in pairs),
                    "second": spread(times[2] for times in pairs),
                    "difference": spread(times[1] - times[2] for times in pairs),
                }
            )
    return found


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Median and quartiles, ready for JSON; `None` without values."""
    listed = list(values)
    return median_spread(listed).as_dict() if listed else None
