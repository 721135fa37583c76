"""Every system by its name: bytes on disk, bytes per request, predicted time to the first token, and from which length
on it is faster than computing the prefix again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

from ..config import ContiguousKVConfig
from ..errors import ConfigError, InputError
from ..model.configured_model import ConfiguredModel
from . import full_loads, token_choices
from .chunk_choices import chunk_request
from .costs import Case
from .machine import Machine, with_host_fitted
from .pipeline import RequestSteps, Timing, timing
from .unwritten import unwritten_header

# The budget of the methods that were published, as their papers compare them.
PUBLISHED_BUDGET = 0.05
# Lengths at which systems are compared with recomputing: this one, and each an eighth longer than the one before.
_SHORTEST, _GROWTH = 16, 1.125
_LONGEST = 2**20
RECOMPUTE = "recompute"


@dataclass(frozen=True)
class System:
    """A way to serve a prefix.

    Attributes:
        name: for programs.
        title: for tables.
        budget: share of the prefix that attention uses; `None`: all of it, and nothing is chosen.
        request: makes its request.
        stores: what it keeps on disk: `""` (nothing), `"kv"` (K and V alone) or `"segment"` (this library's format).
        index_bits: of the key index in this library's format.
    """

    name: str
    title: str
    budget: float | None
    request: Callable[[Case], RequestSteps]
    stores: str = "kv"
    index_bits: int = 8

    def timing(self, case: Case) -> Timing:
        """How long its request takes."""
        return timing(self.request(case), case.machine)


@dataclass(frozen=True)
class Forecast:
    """What is predicted of one system.

    Attributes:
        system, title, budget: see `System`.
        disk_bytes: that the prefix takes on disk.
        read_bytes: that a request reads from there.
        used_bytes: of K and V that attention uses, in the model's dtype.
        ttft_s: seconds to the first token.
        waited_s: of these, seconds in which the model waits for reads.
        speed_up: times faster than recomputing.
        beats_recompute_from: tokens of the prefix from which on it is faster than recomputing, up to the longest
            prefix that was looked at; `None`: at that length it is not.
    """

    system: str
    title: str
    budget: float | None
    disk_bytes: int
    read_bytes: int
    used_bytes: int
    ttft_s: float
    waited_s: float
    speed_up: float
    beats_recompute_from: int | None

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def systems(
    budget: float | None = None, published_budget: float = PUBLISHED_BUDGET, overlap: bool = True
) -> list[System]:
    """The systems of a plan.

    Args:
        budget: share of the chunks that this library uses; `None`: its default.
        published_budget: share that the published methods use.
        overlap: whether AttentionStore with H2O and IMPRESS read keys ahead, which their papers do not.

    Raises:
        ConfigError: a budget is not in (0, 1].
    """
    ours = ContiguousKVConfig() if budget is None else ContiguousKVConfig(budget=budget)
    published = ContiguousKVConfig.paper(budget=published_budget)
    if isinstance(ours.budget, str):
        raise ConfigError("a plan needs a budget that is a number, got 'auto'")
    by_layers = full_loads.by_layers
    h2o = partial(token_choices.h2o, budget=published_budget, overlap=overlap)
    impress = partial(token_choices.impress, budget=published_budget, overlap=overlap)
    found = [
        System(RECOMPUTE, "recompute", None, full_loads.recompute, stores=""),
        System("in_memory", "whole cache in memory", None, full_loads.in_memory, stores=""),
        System("reload", "reload (one saved file)", None, full_loads.reload),
        System("attentionstore", "AttentionStore", None, partial(by_layers, overlap=False)),
        System("attentionstore+overlap", "AttentionStore, overlapped", None, partial(by_layers, overlap=True)),
        System("attentionstore_h2o" + "+overlap" * overlap, "AttentionStore + H2O", published_budget, h2o),
        System("impress" + "+overlap" * overlap, "IMPRESS", published_budget, impress),
        System(
            "contiguouskv_paper",
            "ContiguousKV, published",
            published_budget,
            partial(chunk_request, config=published),
            "segment",
        ),
    ]
    exact = partial(chunk_request, config=ContiguousKVConfig(budget=1.0))
    if ours.budget < 1.0:
        for name, title, config in (
            ("contiguouskv", "this library", ours),
            ("contiguouskv+compact", "this library, 2-bit index", replace(ours, index_bits=2)),
        ):
            chosen = partial(chunk_request, config=config)
            found.append(System(name, title, float(ours.budget), chosen, "segment", config.index_bits))
    return [*found, System("contiguouskv@1", "this library, exact", 1.0, exact, "segment")]


def forecasts(
    model: ConfiguredModel,
    machine: Machine,
    prefix_tokens: int,
    suffix_tokens: int = 32,
    wanted: Sequence[System] | None = None,
) -> list[Forecast]:
    """What is predicted of each system, of whose prefix nothing is in memory when the request comes.

    Args:
        model: that is served.
        machine: where.
        prefix_tokens: tokens that are stored.
        suffix_tokens: tokens that a request adds.
        wanted: systems; `None`: those of `systems()`.

    Raises:
        InputError: a length is below 1, or the model cannot place so many tokens.
    """
    case = case_of(model, machine, prefix_tokens, suffix_tokens)
    base = _recomputed(case)
    return [_forecast(system, case, base) for system in (systems() if wanted is None else wanted)]


def floor_s(model: ConfiguredModel, machine: Machine, suffix_tokens: int = 32) -> float:
    """Seconds to the first token of the suffix alone: no method can be faster."""
    case = Case(model, machine, 0, suffix_tokens)
    return timing(full_loads.floor(case), machine).ttft_s


def with_floor(model: ConfiguredModel, machine: Machine, seconds: float, suffix_tokens: int = 32) -> Machine:
    """The machine, with a host on which the suffix alone takes `seconds`.

    Raises:
        InputError: no price of calls explains that.
    """
    return with_host_fitted(machine, lambda there: floor_s(model, there, suffix_tokens), seconds)


def slowest_storage_bytes_s(case: Case, system: System) -> float | None:
    """Bytes per second from which on a system is faster than recomputing at this length; `None`: it never is."""
    base = _recomputed(case)

    def faster(bytes_s: float) -> bool:
        storage = replace(case.machine.storage, disk_s=bytes_s, link_s=None)
        machine = replace(case.machine, storage=storage)
        return system.timing(replace(case, machine=machine)).ttft_s < base

    low, high = 1e5, 1e12
    if not faster(high):
        return None
    while high / low > 1.01:
        middle = (low * high) ** 0.5
        low, high = (low, middle) if faster(middle) else (middle, high)
    return high


def case_of(model: ConfiguredModel, machine: Machine, prefix_tokens: int, suffix_tokens: int) -> Case:
    """One request.

    Raises:
        InputError: a length is below 1, or the model cannot place so many tokens.
    """
    if prefix_tokens < 1 or suffix_tokens < 1:
        raise InputError(f"prefix and suffix need one token at least, got {prefix_tokens} and {suffix_tokens}")
    total, limit = prefix_tokens + suffix_tokens, model.max_tokens
    if limit is not None and total > limit:
        raise InputError(f"{total:,} tokens are more than the {limit:,} that the model can place")
    return Case(model, machine, prefix_tokens, suffix_tokens)


def _recomputed(case: Case) -> float:
    return timing(full_loads.recompute(case), case.machine).ttft_s


def _forecast(system: System, case: Case, base_s: float) -> Forecast:
    request = system.request(case)
    found = timing(request, case.machine)
    return Forecast(
        system=system.name,
        title=system.title,
        budget=system.budget,
        disk_bytes=_disk_bytes(system, case),
        read_bytes=round(request.read_bytes),
        used_bytes=round(request.used_bytes),
        ttft_s=found.ttft_s,
        waited_s=found.waited_s,
        speed_up=base_s / found.ttft_s,
        beats_recompute_from=_beats_from(system, case),
    )


def _disk_bytes(system: System, case: Case) -> int:
    if not system.stores:
        return 0
    if system.stores == "kv":
        return case.model.kv_bytes_per_token * case.prefix_tokens
    geometry = case.model.geometry(ContiguousKVConfig().chunk_size, system.index_bits)
    return unwritten_header(geometry, case.prefix_tokens).nbytes


def _beats_from(system: System, case: Case) -> int | None:
    """The shortest prefix from which on the system is faster than recomputing, at every length that is looked at."""
    if system.name == RECOMPUTE:
        return None
    limit = max(case.prefix_tokens, (case.model.max_tokens or _LONGEST) - case.suffix_tokens)
    lengths = [_SHORTEST]
    while lengths[-1] < limit:
        lengths.append(min(limit, max(lengths[-1] + 1, int(lengths[-1] * _GROWTH))))
    found = None
    for tokens in reversed(lengths):
        if not _is_faster(system, case, tokens):
            break
        found = tokens
    return found


def _is_faster(system: System, case: Case, tokens: int) -> bool:
    there = Case(case.model, case.machine, tokens, case.suffix_tokens)
    return system.timing(there).ttft_s < _recomputed(there)
