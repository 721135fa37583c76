"""JSON that two readers cannot understand differently."""

from __future__ import annotations

from typing import Any


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names all differ; for `json.loads(..., object_pairs_hook=once_each)`.

    Of two values under one name, one reader takes the first and another the last, so one would check what the other
    does not use.

    Raises:
        ValueError: a name comes twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name comes twice in an object")
    return found
