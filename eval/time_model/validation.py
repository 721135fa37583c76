"""How near predictions come where there are measurements: on a CPU of this project, and in the published paper."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_contiguouskv import ContiguousKVConfig

from ..report import RunError
from ..report.names import NO_PREFIX
from ..report.paper import SPEED_UPS
from ..report.rows import load
from ..systems import State
from ..timing import median_spread
from .counting import CPU_LENGTHS, CPU_SYSTEMS, FLOOR, METHODS, Counts, Method, method_named
from .machines import MACHINES, OURS_CPU
from .predict import LENGTHS, predict
from .replay import Timing, replay
from .shapes import shape_of

GROWTH = Path(__file__).parents[2] / "docs" / "results" / "growth-smollm2-135m.json"
# How measurements that were made before rows had states are called. (AttentionStore had another implementation then.)
_OLDER = {
    "contiguouskv_paper": ("contiguouskv_paper", State.COLD),
    "contiguouskv_resident": ("contiguouskv", State.KEYS_RESIDENT),
    "contiguouskv": ("contiguouskv", State.COLD),
}
TITLES = {
    f"attentionstore+overlap {State.OPEN}": "AttentionStore, overlapped",
    f"contiguouskv_paper {State.OPEN}": "published, 416 tokens used",
    f"contiguouskv {State.KEYS_RESIDENT}": "default, 416 tokens used, index in memory",
    f"contiguouskv {State.OPEN}": "default, 416 tokens used",
}


@dataclass(frozen=True)
class Compared:
    """A prediction beside a measurement, both in seconds.

    Attributes:
        name: of the system and its state, or `FLOOR`.
        tokens: of the prefix; 0 for the floor.
        predicted: what the model says.
        measured: median.
        timing: of the prediction.
    """

    name: str
    tokens: int
    predicted: float
    measured: float
    timing: Timing

    @property
    def ratio(self) -> float:
        return self.predicted / self.measured


def on_cpu(counts: Counts, growth: Path = GROWTH) -> list[Compared]:
    """Every figure of `GROWTH`, predicted. `medians` makes such a file of a run.

    The floor and the speed of memory were fitted to each other; nothing else was. The list is empty where the file of
    measurements is missing: it is in the docs of a checkout, and no wheel has it.
    """
    if not growth.exists():
        return []
    found = json.loads(growth.read_text())
    measured = _measured(found["rows"])
    compared = []
    lookahead = ContiguousKVConfig().reading.lookahead_bytes
    for lengths in CPU_LENGTHS:
        records = counts.records[f"cpu {lengths[0]}-{lengths[1]}"]
        for system, state in CPU_SYSTEMS:
            record = records[f"{system} / {state}"]
            for tokens in lengths if system != FLOOR else lengths[:1]:
                timing = replay(record, OURS_CPU, tokens, lookahead)
                if system != FLOOR:
                    seconds = measured.get((system, state, tokens))
                    if seconds is not None:
                        compared.append(Compared(f"{system} {state}", tokens, timing.ttft, seconds, timing))
                elif lengths == CPU_LENGTHS[0]:
                    median = found["floor"]["seconds"]["median"]
                    compared.append(Compared(FLOOR, 0, timing.ttft, median, timing))
    return compared


def _measured(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, State, int], float]:
    """Medians in seconds. Opening a store takes milliseconds on a CPU: what was cold is compared as open."""
    found: dict[tuple[str, State, int], float] = {}
    for row in rows:
        if "state" in row:
            system, state = row["system"], State(row["state"])
        elif row["system"] in _OLDER:
            system, state = _OLDER[row["system"]]
        else:
            continue
        found[system, State.OPEN if state is State.COLD else state, row["tokens"]] = row["seconds"]["median"]
    return found


def medians(run: Path) -> dict[str, Any]:
    """Medians of a run of the preset `growth`, by system, state and tokens of the prefix, ready for JSON.

    Args:
        run: folder of the run.

    Raises:
        RunError: the folder has no such rows.
    """
    results = load([run])
    rows = results.timed
    floor = rows[rows["system"] == NO_PREFIX]
    if not len(floor):
        raise RunError(f"{run} has no row of {NO_PREFIX}: make a run of the preset growth")
    others = rows[rows["system"] != NO_PREFIX].groupby(["prefix_tokens", "system", "options", "state"], sort=False)
    return {
        "machine": results.runs[0].machine,
        "model": results.runs[0].config["model"],
        "dtype": results.runs[0].config["dtype"],
        "kept_tokens": results.runs[0].config.get("kept_tokens"),
        "floor": {"seconds": median_spread(floor["ttft_s"]).as_dict()},
        "rows": [
            {
                "tokens": int(tokens),
                "system": "+".join(filter(None, (system, options))),
                "state": state,
                "seconds": median_spread(own["ttft_s"]).as_dict(),
            }
            for (tokens, system, options, state), own in others
        ],
    }


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster the published method is than a baseline, in the same state.

    Attributes:
        baseline: its title.
        paper: what the paper says.
        on_disk: predicted where everything is on disk and the store is open, by length of the prefix.
        warm: predicted at `WARM_LENGTH`, by state.
    """

    baseline: str
    paper: float
    on_disk: dict[int, float]
    warm: dict[State, float]


PAPER_LENGTHS, WARM_LENGTH = (4096, *LENGTHS), 32_768


def beside_paper(counts: Counts) -> list[SpeedUp]:
    """The paper's ratios at 5% beside predicted ones, on its machine."""
    machine, ours = MACHINES[0], method_named("published 5%")
    shape = shape_of(machine)
    found = []
    for baseline, paper in SPEED_UPS.items():
        other = next(method for method in METHODS if method.system == baseline)

        def ratio(tokens: int, state: State, other: Method = other) -> float:
            slow, fast = (predict(counts, machine, shape, method, state, tokens) for method in (other, ours))
            return slow.timing.ttft / fast.timing.ttft

        on_disk = {tokens: ratio(tokens, State.OPEN) for tokens in PAPER_LENGTHS}
        warm: dict[State, float] = {state: ratio(WARM_LENGTH, state) for state in other.states if state != State.OPEN}
        found.append(SpeedUp(other.title, paper, on_disk, warm))
    return found
