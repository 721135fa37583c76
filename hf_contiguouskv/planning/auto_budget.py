"""`budget="auto"`: the largest budget whose reads hide behind compute, or no loading where computing is faster."""

from __future__ import annotations

import logging
import sys
import weakref
from dataclasses import dataclass, replace

from ..config import ContiguousKVConfig
from ..errors import StoreError
from ..model.layer_plan import LayerPlan
from ..model.served_model import ServedModel
from ..store import PrefixStore
from ..store.attached_prefix import AttachedPrefix
from .measured_speeds import SUFFIX_TOKENS, ComputeSpeeds, compute_speeds, read_speed
from .read_plan import WORTH_READING_BYTES, ReadPlan

logger = logging.getLogger("hf_contiguouskv")

# Budgets that are considered, the largest first.
BUDGETS = (1.0, *(percent / 100 for percent in range(95, 0, -5)))
# Where nothing can be measured: the default of `ContiguousKVConfig`.
UNKNOWN = 0.25

# What was said already of the prefixes of a store: a service makes a cache for each request.
_said: weakref.WeakKeyDictionary[PrefixStore, set[tuple[float, bool]]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class BudgetChoice:
    """What `budget="auto"` has come to for one prefix.

    Attributes:
        budget: share of the chunks to load, in (0, 1].
        recompute: computing the prefix again takes less time than loading that.
        read_s, compute_s: seconds that a cold request of `SUFFIX_TOKENS` tokens was estimated to read and to compute.
        reason: why, in a sentence.
    """

    budget: float
    recompute: bool
    read_s: float
    compute_s: float
    reason: str

    def __str__(self) -> str:
        return self.reason


def choose_budget(
    prefix: AttachedPrefix,
    config: ContiguousKVConfig,
    plan: LayerPlan,
    speeds: ComputeSpeeds,
    bytes_per_s: float,
) -> BudgetChoice:
    """The decision, from measured speeds alone.

    Args:
        prefix: that nothing is in memory of.
        config: of the cache; its own budget does not matter.
        plan: of the model's layers.
        speeds, bytes_per_s: of the model, and of the disk.
    """
    choice = None
    for budget in BUDGETS:
        more, choice = choice, _estimated(prefix, budget, config, plan, speeds, bytes_per_s)
        if choice.read_s <= choice.compute_s:
            break
    assert choice is not None
    head = f"{prefix.tokens:,} prefix tokens: "
    shown = f"reading takes {_ms(choice.read_s)} (at {bytes_per_s / 1e9:.2g} GB/s), computing {_ms(choice.compute_s)}"
    if choice.read_s > choice.compute_s:
        again = prefix.tokens * speeds.prefill_s
        if again + speeds.forward_s < choice.read_s:
            reason = f"{head}computing again takes {_ms(again)}; even with budget {choice.budget:g} {shown}"
            return replace(choice, recompute=True, reason=reason)
        return replace(choice, reason=f"{head}budget {choice.budget:g}, the smallest: {shown}")
    reason = f"{head}budget {choice.budget:g}: {shown} at the same time"
    if more is not None:
        reason += f"; with {more.budget:g} it would be {_ms(more.read_s)} and {_ms(more.compute_s)}"
    return replace(choice, reason=reason)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms"


def _estimated(
    prefix: AttachedPrefix,
    budget: float,
    config: ContiguousKVConfig,
    plan: LayerPlan,
    speeds: ComputeSpeeds,
    bytes_per_s: float,
) -> BudgetChoice:
    reads = ReadPlan.of(prefix, replace(config, budget=budget), plan)
    considered = 0 if reads.keeps_all else prefix.tokens
    compute = speeds.forward_s + reads.kept_tokens * speeds.used_s + considered * speeds.considered_s
    read = reads.bytes_to_read(WORTH_READING_BYTES) / bytes_per_s
    return BudgetChoice(budget, False, read, compute, "")


class AutoBudget:
    """Chooses budgets for one cache's prefixes.

    It says why on standard error when a store's prefixes get a budget for the first time, and logs every choice.

    Args:
        model: its speed is measured now, unless it is known.
        store: its disk's speed is measured with the first prefix.
        config: of the cache.
    """

    def __init__(self, model: ServedModel, store: PrefixStore, config: ContiguousKVConfig) -> None:
        self._store = store
        self._plan = model.layers
        self._config = config
        self._speeds: ComputeSpeeds | None = None
        self._problem = ""
        # The last prefix and what was chosen: it is asked for twice, before and when a prefix is attached.
        self._last: tuple[AttachedPrefix, BudgetChoice] | None = None
        try:
            self._speeds = compute_speeds(model, config)
        except Exception as error:  # A model that cannot run by itself can be served all the same.
            self._problem = f"this model's speed cannot be measured ({error})"

    def __deepcopy__(self, memo: dict[int, object]) -> AutoBudget:
        return self  # Speeds are the same for a copy of the cache.

    def choose(self, prefix: AttachedPrefix) -> BudgetChoice:
        """For a prefix that has just been found."""
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
                return choose_budget(prefix, self._config, self._plan, self._speeds, speed)
            except StoreError as error:
                # The request finds out by itself what is wrong, and gets over it.
                problem = f"the store cannot be read ({error})"
        return BudgetChoice(UNKNOWN, False, 0.0, 0.0, f"budget {UNKNOWN:g}: {problem}")
