"""Formats numbers as text and as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..statistics import Interval
from ..timing import Spread
from .names import OURS, Setting, label


def shown(interval: Interval | None, scale: float = 1.0, digits: int = 2, sign: bool = False) -> str:
    """A figure with its interval, if it has one: "1.32 (1.28 - 1.36)"; "" if it is unknown."""
    if interval is None or math.isnan(interval[0]):
        return ""
    kind = "+" if sign else ""
    # A difference that rounds to zero has no sign.
    value, low, high = (f"{round(one * scale, digits) + 0.0:{kind}.{digits}f}" for one in interval)
    return (
        value if math.isnan(interval[1]) else f"{value} ({low} - {high})" if not sign else f"{value} ({low} to {high})"
    )


def number(value: float | None, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    """A figure; "" if it is unknown."""
    return "" if value is None or math.isnan(value) else f"{value * scale:,.{digits}f}{unit}"


def milliseconds(spread: Spread | None) -> str:
    """Median and quartiles of seconds, in milliseconds: "210 (190 - 240)"."""
    if spread is None:
        return ""
    digits = 1 if spread.median < 0.1 else 0
    median, low, high = (f"{one * 1e3:,.{digits}f}" for one in (spread.median, spread.low, spread.high))
    return median if spread.count < 2 else f"{median} ({low} - {high})"


def share(value: float) -> str:
    """A budget as a percentage, without superfluous digits."""
    return f"{value * 100:.4g}%"


def named(setting: Setting) -> list[str]:
    """The first two cells of a row: the system (ours in bold) and its budget."""
    system, budget = setting
    return [f"**{label(system)}**" if system == OURS else label(system), share(budget)]


def quoted(text: object, characters: int = 24) -> str:
    """The beginning of a model's answer, as code on one line; "" if the answer is unknown."""
    if not isinstance(text, str):
        return ""
    # Code in a table cannot contain either character.
    line = " ".join(text.replace("`", "'").replace("|", "¦").split())
    return f"`{line[:characters].rstrip()}…`" if len(line) > characters else f"`{line or ' '}`"


def table(head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 2) -> str:
    """A Markdown table; all columns after the first `words` are numbers and right-aligned."""
    lines = [head, ["---" if place < words else "---:" for place in range(len(head))], *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)


def columns_used(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows without columns that are empty in every row."""
    kept = [place for place in range(len(head)) if any(row[place] for row in rows)]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in rows]


def listed(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
