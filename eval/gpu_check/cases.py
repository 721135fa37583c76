"""The timed requests: systems, budgets, and the place of the prefix when a request begins."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..systems import Setting, System
from ..systems.states import State
from .prefixes import kv_bytes
from .settings import Settings

FLOOR = "floor"
SPARE_BYTES = 2**27


@dataclass(frozen=True)
class Measured:
    """A system at a budget.

    Attributes:
        system: its name in `eval.systems`.
        budget: share of the prefix that attention uses.
        options: of the system.
        folder: its folder for prefixes, inside the folder of a length; systems may share one. `None` if it keeps none.
        scales: whether it is measured on prefixes of every length.
        exact: whether its answers equal those of `in_memory`.
    """

    system: str
    budget: float
    folder: str | None
    scales: bool = False
    exact: bool = False
    options: tuple[str, ...] = ()

    @property
    def setting(self) -> Setting:
        """As runs write it."""
        return Setting(self.system, self.budget, self.options)

    @property
    def label(self) -> str:
        """Its name in tables."""
        if self.system == "contiguouskv" and self.budget == 1.0:
            return "exact"
        names = {"contiguouskv": "default", "contiguouskv_paper": "published"}
        share = "" if self.budget == 1.0 else f" {self.budget:.0%}"
        return names.get(self.system, self.setting.label) + share


# In the order of storing: if room or time is short, the last ones are left out.
MEASURED = (
    Measured("in_memory", 1.0, None, scales=True, exact=True),
    Measured("contiguouskv", 0.25, "chunks", scales=True),
    Measured("contiguouskv", 0.05, "chunks", scales=True),
    Measured("contiguouskv_paper", 0.05, "chunks", scales=True),
    Measured("contiguouskv", 1.0, "chunks", scales=True, exact=True),
    Measured("attentionstore", 1.0, "layers", scales=True, exact=True, options=("overlap",)),
    Measured("attentionstore", 1.0, "layers", exact=True),
    Measured("impress", 0.05, "impress-first"),
    Measured("attentionstore_h2o", 0.05, "h2o"),
    Measured("reload", 1.0, "whole", exact=True),
    Measured("recompute", 1.0, None),
)
# Size of a folder as a multiple of the prefix's K and V: chunks also have an index, 4-bit values and the exact keys of
# some layers.
FOLDER_SIZES = {"chunks": 1.5, "layers": 1.01, "impress-first": 1.05, "h2o": 1.05, "whole": 1.0}
# What a system keeps besides the chosen share, as a multiple of K and V: an index, or keys.
KEPT_SHARES = {"contiguouskv": 0.3, "contiguouskv_paper": 0.15, "impress": 0.55, "attentionstore_h2o": 0.55}
IN_STORES = ("chunks", "layers", "impress-first", "h2o")


@dataclass(frozen=True)
class Case:
    """One system in one state.

    Attributes:
        measured: the system.
        state: the place of the prefix; `None` if the system has no states.
    """

    measured: Measured
    state: State | None

    @property
    def name(self) -> str:
        """The name for people and in keys."""
        return self.measured.label + ("" if self.state is None else f" {self.state}")


def cases_of(settings: Settings, tokens: int, measured: Measured, system: System) -> list[Case]:
    """The states in which a system is measured on a prefix of this length."""
    if not system.states:
        return [Case(measured, None)]
    complete = tokens in settings.complete_lengths
    # A server has its store open: that registers host memory with the device once, not in each request.
    states = [state for state in system.states if state is not State.COLD or State.OPEN not in system.states]
    # Chunks in host memory only add one crossing to chunks on the device, so long prefixes need not show this state.
    wanted = [state for state in states if complete or state is not State.WARM_HOST]
    return [Case(measured, state) for state in wanted or states]


def measured_at(settings: Settings, tokens: int) -> list[Measured]:
    """The systems that are measured on a prefix of this length."""
    found = [one for one in MEASURED if one.scales or tokens in settings.complete_lengths]
    return [one for one in found if one.system != "recompute" or tokens in settings.recompute_lengths]


def make_system(settings: Settings, model: Any, case: Case, folder: Path, tokens: int) -> System:
    """A system for one case, with its own memory and with the files of all systems that share its folder.

    Args:
        settings, model: settings and model of the run.
        case: the case.
        folder: folder for prefixes of this length.
        tokens: tokens of the prefix.
    """
    one = case.measured
    options = memory_limits(settings, tokens, case) if one.folder in IN_STORES else {}
    return one.setting.make(model, folder, **options)


def memory_limits(settings: Settings, tokens: int, case: Case) -> dict[str, int]:
    """`host_bytes` and `device_bytes` that hold what requests on one prefix use, and data in transit.

    A server would have larger limits. Here they are small, because host memory for all open stores is registered with
    the device.
    """
    whole = kv_bytes(settings, tokens)
    used = 1.0 if case.measured.exact else KEPT_SHARES[case.measured.system] + case.measured.budget
    under_way = 1.0 if case.measured.options == ("overlap",) else 0.25
    on_disk = 0.25 + under_way
    by_state = {State.COLD: on_disk, State.OPEN: on_disk, State.WARM_HOST: 1.25 + under_way}
    host = by_state.get(case.state or State.COLD, 0.5)
    return {
        "host_bytes": int(whole * used * host) + SPARE_BYTES,
        # The run with many suffixes keeps a whole prefix there.
        "device_bytes": int(whole * 2.5) + SPARE_BYTES,
    }
