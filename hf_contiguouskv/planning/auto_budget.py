"""`budget="auto"`: the budget with the least predicted time to the first token; computing again, if that is faster."""

from __future__ import annotations

import logging
import sys
import weakref
from dataclasses import dataclass, replace

from ..config import ContiguousKVConfig
from ..errors import StoreError
from ..model.layer_plan import LayerPlan
from ..model.served_model import ServedModel
from ..store.attached_prefix import AttachedPrefix
from ..store.inner import StoreInner
from .choosing import choosing_cost
from .measured_speeds import SUFFIX_TOKENS, ComputeSpeeds, compute_speeds, read_speed
from .network import Network, away_share, network_to
from .read_plan import WORTH_READING_BYTES, ChoosingCost, ReadPlan

logger = logging.getLogger("hf_contiguouskv")

# The candidate budgets, largest first.
BUDGETS = (1.0, *(percent / 100 for percent in range(95, 0, -5)))
# Of two budgets whose times differ by less, the larger one is chosen: predictions are no better than that.
ALIKE = 1.03
# The budget if speeds cannot be measured: the default of `ContiguousKVConfig`.
UNKNOWN = 0.25

# Choices already printed for each store, because a service makes a cache for each request.
_said: weakref.WeakKeyDictionary[StoreInner, set[tuple[float, bool]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class BudgetChoice:
    """The decision of `budget="auto"` for one prefix.

    Attributes:
        budget: share of the chunks to load, in (0, 1].
        recompute: whether computing the prefix again takes less time than loading this share.
        read_s: estimated seconds that a cold request of `SUFFIX_TOKENS` tokens reads.
        compute_s: estimated seconds that it computes.
        reason: the reason, in a sentence.
    """

    budget: float
    recompute: bool
    read_s: float
    compute_s: float
    reason: str

    @property
    def ttft_s(self) -> float:
        """Estimated seconds to the first token: reads run ahead of compute, so the longer of both decides."""
        return max(self.read_s, self.compute_s)

    def __str__(self) -> str:
        return self.reason


def choose_budget(
    prefix: AttachedPrefix,
    config: ContiguousKVConfig,
    plan: LayerPlan,
    speeds: ComputeSpeeds,
    bytes_per_s: float,
    network: Network | None = None,
    choosing: ChoosingCost | None = None,
) -> BudgetChoice:
    """Choose a budget from measured speeds.

    Args:
        prefix: a prefix of which nothing is in memory.
        config: the cache's configuration; its budget is ignored.
        plan: the model's layers.
        speeds, bytes_per_s: measured speeds of the model and of the disk.
        network: that what is not on this machine must cross; `None`: all of the prefix is on its disk.
        choosing: what chunks by name cost, for the request as well (`choosing_cost`).
    """
    storage = _Storage(bytes_per_s, network, choosing)
    estimates = [
        _estimated(prefix, budget, config, plan, speeds, storage) for budget in _candidates(config.least_budget)
    ]
    least = min(one.ttft_s for one in estimates)
    choice = next(one for one in estimates if one.ttft_s <= ALIKE * least)
    head = f"{prefix.tokens:,} prefix tokens: "
    shown = f"reading takes {_ms(choice.read_s)} ({storage}), computing {_ms(choice.compute_s)}"
    again = prefix.tokens * speeds.prefill_s
    if choice.read_s > choice.compute_s and again + speeds.forward_s < choice.read_s:
        reason = f"{head}computing again takes {_ms(again)}; even with budget {choice.budget:g} {shown}"
        return replace(choice, recompute=True, reason=reason)
    reason = f"{head}budget {choice.budget:g}: {shown} at the same time"
    if len(estimates) > 1:
        other = estimates[0] if choice is not estimates[0] else estimates[-1]
        reason += f"; with {other.budget:g} it would be {_ms(other.read_s)} and {_ms(other.compute_s)}"
    return replace(choice, reason=reason)


def _candidates(least: float) -> list[float]:
    """The budgets that may be chosen, largest first."""
    return [*(budget for budget in BUDGETS if budget > least), least]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def _estimated(
    prefix: AttachedPrefix,
    budget: float,
    config: ContiguousKVConfig,
    plan: LayerPlan,
    speeds: ComputeSpeeds,
    storage: _Storage,
) -> BudgetChoice:
    reads = ReadPlan.of(prefix, replace(config, budget=budget), plan, storage.choosing)
    compute = speeds.forward_s + reads.kept_tokens * speeds.used_s
    if not reads.keeps_all:
        compute += speeds.choosing_s + prefix.tokens * speeds.considered_s
    return BudgetChoice(budget, False, storage.seconds(reads), compute, "")


class _Storage:
    """Disk and network of one decision.

    Args:
        disk_bytes_per_s: of the disk.
        network: that what is not on this machine must cross, if anything is not.
        choosing: see `ReadPlan`.
    """

    def __init__(self, disk_bytes_per_s: float, network: Network | None, choosing: ChoosingCost | None) -> None:
        self._disk_s = disk_bytes_per_s
        self.choosing = choosing
        self._network = network
        # (Whatever the budget, a prefix is read in one of two forms.)
        self._away: dict[tuple[str, bool], float] = {}

    def seconds(self, reads: ReadPlan) -> float:
        """Seconds in which a cold request reads: what is on the disk, and then what is not on this machine."""
        disk = reads.bytes_to_read(WORTH_READING_BYTES) / self._disk_s
        if self._network is None:
            return disk
        form = reads.served.form, reads.keeps_all
        if form not in self._away:
            self._away[form] = away_share(reads)
        away = self._away[form]
        return (1 - away) * disk + self._network.seconds(reads, away)

    def __str__(self) -> str:
        most = max(self._away.values(), default=0.0)
        return f"{most:.0%} at {self._network}" if most else f"at {self._disk_s / 1e9:.2g} GB/s"


class AutoBudget:
    """Chooses budgets for one cache's prefixes.

    It logs every choice, and prints a store's first choice of each budget to standard error with the reason.

    Args:
        model: its speed is measured now, unless it is already known.
        store: the speed of its disk is measured with the first prefix. The speed of the network to the shared store
            behind it, if there is one, is estimated from what was read over it.
        config: the cache's configuration.
    """

    def __init__(self, model: ServedModel, store: StoreInner, config: ContiguousKVConfig) -> None:
        self._store = store
        self._plan = model.layers
        self._config = config
        self._speeds: ComputeSpeeds | None = None
        self._problem = ""
        # The last prefix and its choice, because the choice is needed twice: before and while a prefix is attached.
        self._last: tuple[AttachedPrefix, BudgetChoice] | None = None
        try:
            self._speeds = compute_speeds(model, config)
        except Exception as error:  # A model whose speed cannot be measured can still be served.
            self._problem = f"this model's speed cannot be measured ({error})"

    def __deepcopy__(self, memo: dict[int, object]) -> AutoBudget:
        return self  # A copy of the cache has the same speeds.

    def choose(self, prefix: AttachedPrefix) -> BudgetChoice:
        """Choose the budget for a prefix that has just been found."""
        if self._last is not None and self._last[0] == prefix:
            return self._last[1]
        found = self._chosen(prefix)
        self._last = prefix, found
        text = f"{found}, for a suffix of {SUFFIX_TOKENS} tokens"
        logger.info("%s", text)
        said = _said.setdefault(self._store, set())
        if (found.budget, found.recompute) not in said:
            said.add((found.budget, found.recompute))
            print(f"contiguouskv: {text}", file=sys.stderr)
        return found

    def _chosen(self, prefix: AttachedPrefix) -> BudgetChoice:
        if all(span.segment.in_memory for span in prefix.spans):
            return BudgetChoice(1.0, False, 0.0, 0.0, f"{prefix.tokens:,} prefix tokens: budget 1, they are in memory")
        problem = self._problem
        if self._speeds is not None:
            try:
                speed = read_speed(self._store, prefix)
                network = network_to(self._store, prefix)
                choosing = choosing_cost(self._store, prefix, self._plan)
                return choose_budget(prefix, self._config, self._plan, self._speeds, speed, network, choosing)
            except StoreError as error:
                # The request will meet the same error and recover from it.
                problem = f"the store cannot be read ({error})"
        return BudgetChoice(UNKNOWN, False, 0.0, 0.0, f"budget {UNKNOWN:g}: {problem}")
