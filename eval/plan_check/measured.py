"""Predictions beside the rows of runs that are kept with this project, or of any other run on a CPU.

Speeds are taken from named rows only: of matrix products and attention from `recompute` at the run's longest prefix; of
the host from the rows of the suffix alone, or else from those of the cache in memory. The disk's speed is what the run
recorded. Everything else has the values of `contiguouskv plan`.
"""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_contiguouskv.model.configured_model import ConfiguredModel, configured_model, model_from_configuration
from hf_contiguouskv.planning import full_loads
from hf_contiguouskv.planning.costs import Case
from hf_contiguouskv.planning.forecast import RECOMPUTE, System, systems
from hf_contiguouskv.planning.machine import CALL_S, OPERATION_S, Machine, Storage, with_host_fitted
from hf_contiguouskv.planning.pipeline import timing

from ..report import RunError
from ..report.files import document, rows_of
from ..report.names import IN_MEMORY, NO_PREFIX
from ..run_files import CONFIG, MACHINE
from ..systems.setting import Setting
from ..time_model.machines import EPYC, OUR_DISK
from ..time_model.shapes import QWEN_HALF, SMOLLM2

DATA = Path(__file__).parents[2] / "docs" / "results" / "data"
RUNS = ("smollm2-8k", "smollm2-lengths", "smollm2-every-state", "smollm2-disk-0.25", "qwen2.5-coder-0.5b")
# The run that lends its speeds to runs that did not recompute anything.
LENDER = "smollm2-8k"
_SHAPES = {"HuggingFaceTB/SmolLM2-135M-Instruct": SMOLLM2, "qwen2.5-coder-0.5b": QWEN_HALF}
_STATES = {"cold": "", "warm_host": IN_MEMORY}
# Rows that tell how fast the host is: the first of these that a run has.
_HOST_ROWS = (NO_PREFIX, IN_MEMORY)
_LOW, _HIGH = 0.1, 0.9
_Found = tuple[dict[str, Any], Case, System]


@dataclass(frozen=True)
class Speeds:
    """How fast a machine computed, and by which rows that is known.

    Attributes:
        flops_s: floating-point operations per second of matrix products.
        attention_flops_s: the same of attention.
        source: the rows.
        longest: tokens of their prefix.
    """

    flops_s: float
    attention_flops_s: float
    source: str
    longest: int


@dataclass(frozen=True)
class Checked:
    """One system at one budget in one run.

    Attributes:
        setting: the system.
        requests: how many.
        shortest, longest: prefixes, in tokens.
        measured_s, predicted_s: medians, in seconds.
        ratio: predicted / measured, the median of the requests.
        low, high: the same, a tenth of the requests below and above.
        bytes_ratio: predicted / measured bytes per request, the median; `None`: it reads nothing.
        known: whether speeds were taken from these rows.
    """

    setting: Setting
    requests: int
    shortest: int
    longest: int
    measured_s: float
    predicted_s: float
    ratio: float
    low: float
    high: float
    bytes_ratio: float | None
    known: bool

    @property
    def error(self) -> float:
        """How far the prediction is off, as a share of what was measured."""
        return abs(self.ratio - 1.0)


@dataclass(frozen=True)
class CheckedRun:
    """A run.

    Attributes:
        name: of its folder.
        model: of the run.
        commit: of the code that was measured; "": not recorded.
        disk_gbps: speed of its disk, in GB/s.
        speeds: with which times were predicted.
        host: how many times the host's calls cost those of `contiguouskv plan`.
        host_source: the rows by which that is known.
        settings: of its systems.
    """

    name: str
    model: str
    commit: str
    disk_gbps: float
    speeds: Speeds
    host: float
    host_source: str
    settings: list[Checked]


def check(run: Path, lender: Path | None = None) -> CheckedRun:
    """Predict every request of a run, and compare.

    Args:
        run: its folder.
        lender: the run whose speeds are taken if this one recomputed nothing.

    Raises:
        RunError: the folder has no such files, or neither run has rows of `recompute`.
    """
    config, machine = document(run / CONFIG), document(run / MACHINE)
    rows = [row for row in rows_of(run)[0] if row.get("ttft_s") and not row.get("stream")]
    model = _model(config)
    speeds = speeds_of(run) or (speeds_of(lender) if lender else None)
    if speeds is None:
        raise RunError(f"{run} has no rows of {RECOMPUTE}: name a run that has, to take speeds from")
    recorded = machine.get("disk_gbps")
    disk = float(recorded) if recorded else OUR_DISK.bytes_s / 1e9
    if config.get("read_gbps"):
        disk = min(disk, float(config["read_gbps"]))
    there, host_source = _fitted(rows, model, _machine(speeds, disk), run.name)
    own_host = bool(host_source)
    if not own_host and lender is not None and lender != run:
        found = check(lender)
        there = replace(there, call_s=found.host * CALL_S, operation_s=found.host * OPERATION_S)
        host_source = found.host_source
    groups: dict[Setting, list[_Found]] = defaultdict(list)
    for row in rows:
        system = _system_of(row)
        if system is not None:
            groups[_setting(row)].append((row, _case(row, model, there), system))
    settings = []
    for setting, own in sorted(groups.items(), key=_place):
        lends = own_host and setting.system == host_source.split()[-1]
        if setting.system == RECOMPUTE and speeds.source.startswith(run.name):
            # The others are predicted.
            lent = [one for one in own if one[0]["prefix_tokens"] == speeds.longest]
            settings.append(_checked(setting, lent, True))
            own = [one for one in own if one[0]["prefix_tokens"] != speeds.longest]
        if own:
            settings.append(_checked(setting, own, lends))
    commit = str(machine.get("commit") or "")[:7]
    factor = there.call_s / CALL_S
    return CheckedRun(run.name, model.name, commit, disk, speeds, factor, host_source or "assumed", settings)


def _fitted(rows: Sequence[dict[str, Any]], model: ConfiguredModel, machine: Machine, name: str) -> tuple[Machine, str]:
    """The machine with the host that the rows of `_HOST_ROWS` tell of, and which rows these are; "": there are none."""
    for system in _HOST_ROWS:
        own = [row for row in rows if row["system"] == system and _system_of(row) is not None]
        if own:
            steps = [(row, _system_of(row), _case(row, model, machine)) for row in own]

            def ratio(there: Machine, steps: Any = steps) -> float:
                return float(
                    statistics.median(
                        kind.timing(replace(case, machine=there)).ttft_s / row["ttft_s"] for row, kind, case in steps
                    )
                )

            return with_host_fitted(machine, ratio, 1.0), f"{name}: {len(own)} rows of {system}"
    return machine, ""


def _case(row: dict[str, Any], model: ConfiguredModel, machine: Machine) -> Case:
    return Case(model, machine, int(row["prefix_tokens"]), int(row["suffix_tokens"]))


def speeds_of(run: Path) -> Speeds | None:
    """How fast a run computed, by its `recompute` rows with the longest prefix; `None`: it has none."""
    rows = [row for row in rows_of(run)[0] if row["system"] == RECOMPUTE and row.get("ttft_s")]
    if not rows:
        return None
    longest = _longest(rows)
    own = [row for row in rows if row["prefix_tokens"] == longest]
    model = _model(document(run / CONFIG))
    products, attention = [], []
    for row in own:
        tokens = row["prefix_tokens"] + row["suffix_tokens"]
        attended = row["phases"]["attention"]
        pairs = tokens * (tokens + 1) / 2 * model.layers
        attention.append(4 * pairs * model.query_heads * model.shape.head_dim / attended)
        products.append(2 * model.active_weights * tokens / (row["ttft_s"] - attended))
    source = f"{run.name}: {len(own)} rows of {RECOMPUTE} at {longest:,} tokens"
    return Speeds(statistics.median(products), statistics.median(attention), source, longest)


def _model(config: dict[str, Any]) -> ConfiguredModel:
    dtype = getattr(torch, str(config["dtype"]))
    shape = _SHAPES.get(str(config["model"]))
    if shape is None:
        return model_from_configuration(str(config["model"]), dtype)
    return configured_model(shape.config(), dtype, shape.name)


def _machine(speeds: Speeds, disk_gbps: float) -> Machine:
    storage = Storage(disk_gbps * 1e9, OUR_DISK.latency_s)
    return Machine(EPYC.name, speeds.flops_s, speeds.attention_flops_s, EPYC.memory_s, storage)


def _longest(rows: Sequence[dict[str, Any]]) -> int:
    return max((int(row["prefix_tokens"]) for row in rows if row["system"] == RECOMPUTE), default=-1)


def _setting(row: dict[str, Any]) -> Setting:
    return Setting(row["system"], float(row["budget"]), tuple(sorted(row.get("options") or ())))


def _system_of(row: dict[str, Any]) -> System | None:
    """The system of the plan that a row is of; `None`: the plan has none like it, or its state is another."""
    if row["system"] == NO_PREFIX:
        return System(NO_PREFIX, NO_PREFIX, None, full_loads.floor, stores="")
    state = _STATES.get(row["state"])
    if state is None or (state and row["system"] != state):
        return None
    setting = _setting(row)
    name = "+".join((setting.system, *setting.options))
    overlap, budget = "overlap" in setting.options, setting.budget
    if name == "contiguouskv" and budget >= 1.0:
        name = "contiguouskv@1"
    return next((one for one in systems(budget, budget, overlap) if one.name == name), None)


def _place(group: tuple[Setting, object]) -> tuple[int, float, tuple[str, ...]]:
    setting = group[0]
    order = [NO_PREFIX, *dict.fromkeys(one.name.split("+")[0].split("@")[0] for one in systems())]
    return order.index(setting.system), setting.budget, setting.options


def _checked(setting: Setting, found: Sequence[_Found], known: bool) -> Checked:
    measured = [float(row["ttft_s"]) for row, _, _ in found]
    requests = [system.request(case) for _, case, system in found]
    predicted = [timing(request, case.machine).ttft_s for request, (_, case, _) in zip(requests, found, strict=True)]
    ratios = [one / other for one, other in zip(predicted, measured, strict=True)]
    read = [
        request.read_bytes / row["stats"]["bytes_read"]
        for request, (row, _, _) in zip(requests, found, strict=True)
        if (row.get("stats") or {}).get("bytes_read")
    ]
    lengths = [int(row["prefix_tokens"]) for row, _, _ in found]
    return Checked(
        setting=setting,
        requests=len(found),
        shortest=min(lengths),
        longest=max(lengths),
        measured_s=statistics.median(measured),
        predicted_s=statistics.median(predicted),
        ratio=statistics.median(ratios),
        low=float(np.quantile(ratios, _LOW)),
        high=float(np.quantile(ratios, _HIGH)),
        bytes_ratio=statistics.median(read) if read else None,
        known=known,
    )
