"""Metrics: functions of one answer (`scores`, `fidelity`), and `evaluate` modules that average them.

The modules are loaded by path, so nothing here needs the Hub: `evaluate.load(metric_path("qa_f1"))`.
"""

from __future__ import annotations

from pathlib import Path

_MODULES = Path(__file__).with_name("modules")


def metric_names() -> list[str]:
    """All metrics."""
    return sorted(path.stem for path in _MODULES.glob("*.py"))


def metric_path(name: str) -> str:
    """Where the `evaluate` module of a metric is.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in metric_names():
        raise ValueError(f"metric must be one of {metric_names()}, got {name!r}")
    return str(_MODULES / f"{name}.py")
