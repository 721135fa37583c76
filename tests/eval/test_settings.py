"""Which systems a run has, at which budgets."""

from __future__ import annotations

import pytest

from eval.running.config import RunConfig, Setting
from eval.systems import DEFAULT_SYSTEMS, SYSTEMS


def test_a_system_may_have_a_budget_of_its_own() -> None:
    config = RunConfig(
        tasks=("sst2",),
        systems=("in_memory", "contiguouskv_paper", "contiguouskv@0.3", "contiguouskv@0.4", "contiguouskv@0.3"),
        budgets=(0.05, 0.1),
    )
    assert config.settings() == [
        Setting("in_memory", 1.0),
        Setting("contiguouskv_paper", 0.05),
        Setting("contiguouskv_paper", 0.1),
        Setting("contiguouskv", 0.3),
        Setting("contiguouskv", 0.4),
    ]


@pytest.mark.parametrize("asked", ["contiguouskv@", "contiguouskv@x", "contiguouskv@0", "contiguouskv@1.5"])
def test_a_budget_that_is_none_is_refused(asked: str) -> None:
    with pytest.raises(ValueError, match="budget"):
        RunConfig(tasks=("sst2",), systems=(asked,))


def test_unknown_systems_and_budgets_of_exact_ones_are_refused() -> None:
    with pytest.raises(ValueError, match="system must be one of"):
        RunConfig(tasks=("sst2",), systems=("nothing@0.1",))
    with pytest.raises(ValueError, match="of systems that choose"):
        RunConfig(tasks=("sst2",), systems=("in_memory@0.1",))


def test_variants_are_made_only_if_they_are_named() -> None:
    assert set(SYSTEMS) - set(DEFAULT_SYSTEMS) == {
        "contiguouskv_resident",
        "contiguouskv_exact",
        "contiguouskv_paper_resident",
    }


def test_an_unknown_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype must be one of"):
        RunConfig(tasks=("sst2",), systems=("in_memory",), dtype="int8")
