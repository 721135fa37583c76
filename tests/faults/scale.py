"""How much the fault suite does: `FAULTS_SCALE` times as much as in CI, with the random numbers of `FAULTS_SEED`."""

from __future__ import annotations

import os

SCALE = max(1.0, float(os.environ.get("FAULTS_SCALE", "1")))
SEED = int(os.environ.get("FAULTS_SEED", "0"))
REPRODUCIBLE = SEED == 0
"""Hypothesis draws the same examples every time."""


def scaled(number: int) -> int:
    """So many in this run, of which CI does `number`."""
    return round(number * SCALE)
