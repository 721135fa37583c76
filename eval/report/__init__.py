"""Turns the results of runs into a report for people."""

from __future__ import annotations

from .checks import RunError
from .write import write_report

__all__ = ["RunError", "write_report"]
