"""Parts of pages that a command writes."""

from __future__ import annotations

from pathlib import Path


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Write `text` between the two markers of a page, in the place of what is there.

    Raises:
        ValueError: the page does not have each marker once, in this order.
    """
    before = page.read_text(encoding="utf-8")
    if before.count(begin) != 1 or before.count(end) != 1 or before.index(begin) > before.index(end):
        raise ValueError(f"{page} must have one line {begin!r} and behind it one line {end!r}")
    head, rest = before.split(begin)
    tail = rest.split(end)[1]
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")
