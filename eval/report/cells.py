"""Formats numbers as text and as Markdown tables."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..statistics import FEW_PREFIXES, Estimate
from .names import OURS, Setting, is_reference, label

# Follows an interval that is too narrow.
FEW = "†"
FEW_NOTE = (
    f"{FEW}: a task has fewer than {FEW_PREFIXES} prefixes, so the interval says little about other prefixes, and is "
    "too narrow."
)


def shown(estimate: Estimate | None, scale: float = 1.0, digits: int = 2, sign: bool = False) -> str:
    """A figure with its interval, if it has one: "1.32 (1.28 - 1.36)"; "" if it is unknown."""
    if estimate is None or math.isnan(estimate.value):
        return ""
    kind = "+" if sign else ""
    # A difference that rounds to zero has no sign.
    value, low, high = (f"{round(one * scale, digits) + 0.0:{kind},.{digits}f}" for one in estimate[:3])
    if not estimate.has_interval:
        return value
    between = "to" if sign else "-"
    return f"{value} ({low} {between} {high})" + (FEW if estimate.few_prefixes else "")


def counted(estimate: Estimate | None) -> str:
    """The number of requests or pairs of a figure; "" if it is unknown."""
    return "" if estimate is None else str(estimate.requests)


def number(value: float | None, digits: int = 2, scale: float = 1.0, unit: str = "") -> str:
    """A figure; "" if it is unknown."""
    return "" if value is None or math.isnan(value) else f"{value * scale:,.{digits}f}{unit}"


def share(value: float) -> str:
    """A budget as a percentage, without superfluous digits."""
    return f"{value * 100:.4g}%"


def named(setting: Setting, references: bool = False) -> list[str]:
    """The first two cells of a row: the system (ours in bold) and its budget.

    Args:
        setting: the setting.
        references: whether to mark references.
    """
    name = label(setting) + (" (reference)" if references and is_reference(setting) else "")
    ours = setting.system == OURS and not setting.options
    return [f"**{name}**" if ours else name, share(setting.budget)]


def at(setting: Setting) -> str:
    """A setting in a sentence: "IMPRESS at 5%"; the budget of the whole prefix is left out."""
    return label(setting) if setting.budget >= 1 else f"{label(setting)} at {share(setting.budget)}"


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
    text = "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
    return f"{text}\n\n{FEW_NOTE}" if any(FEW in cell for line in rows for cell in line) else text


def columns_used(head: Sequence[str], rows: Sequence[Sequence[str]]) -> tuple[list[str], list[list[str]]]:
    """Head and rows without columns that are empty in every row."""
    kept = [place for place in range(len(head)) if any(row[place] for row in rows)]
    return [head[place] for place in kept], [[row[place] for place in kept] for row in rows]


def listed(items: Sequence[str]) -> str:
    """ "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}" if items else ""
