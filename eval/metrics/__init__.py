"""Metrics: functions of one answer (`scores`, `fidelity`), and `evaluate` modules that average them.

The modules are loaded by path, so they do not need the Hub: `evaluate.load(metric_path("qa_f1"))`.
"""

from __future__ import annotations

from pathlib import Path

_MODULES = Path(__file__).with_name("modules")


def metric_names() -> list[str]:
    """Names of all metrics."""
    return sorted(path.stem for path in _MODULES.glob("*.py"))


def metric_path(name: str) -> str:
    """Path of a metric's `evaluate` module.

    Raises:
        ValueError: no metric has this name.
    """
    if name not in metric_names():
        raise ValueError(f"metric must be one of {metric_names()}, got {name!r}")
    return str(_MODULES / f"{name}.py")
