"""`budget="auto"`: the largest budget whose reads hide behind compute, or no loading where computing is faster."""

from __future__ import annotations

import logging
import sys
import weakref
from dataclasses import dataclass, replace

import torch

from .config import ContiguousKVConfig
from .errors import StoreError
from .needs import bytes_to_read
from .plan import LayerPlan
from .prefix import AttachedPrefix
from .speeds import SUFFIX_TOKENS, ComputeSpeeds, compute_speeds, read_speed
from .store import PrefixStore
from .support import ModelSupport

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
        budget: share of the chunks, in (0, 1].
        recompute: the prefix is computed again instead of loaded.
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
    recompute_s: float | None,
) -> BudgetChoice:
    """The decision, from measured speeds alone.

    Args:
        prefix: that nothing is in memory of.
        config: of the cache; its own budget does not matter.
        plan: of the model's layers.
        speeds, bytes_per_s: of the model, and of the disk.
        recompute_s: what computing the prefix takes, in seconds; `None`: unknown.
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
        if recompute_s is not None and recompute_s + speeds.forward_s < choice.read_s:
            reason = f"{head}computed again in {_ms(recompute_s)}; even with budget {choice.budget:g} {shown}"
            return replace(choice, budget=1.0, recompute=True, reason=reason)
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
    config = replace(config, budget=budget)
    keep = config.chunks_kept(prefix.whole_chunks)
    used = keep * prefix.geometry.chunk_size + prefix.tail_tokens
    considered = 0 if keep == prefix.whole_chunks else prefix.tokens / config.period
    compute = speeds.forward_s + used * speeds.used_s + considered * speeds.considered_s
    return BudgetChoice(budget, False, bytes_to_read(prefix, config, plan) / bytes_per_s, compute, "")


def recompute_seconds(prefix: AttachedPrefix) -> float | None:
    """What computing the prefix took when it was stored, in seconds; `None`: a segment of it does not say."""
    total = 0.0
    for span in prefix.spans:
        header = span.segment.header
        if not header.compute_ms:
            return None
        total += header.compute_ms / 1e3 * span.chunks / span.segment.num_chunks
    return total


class AutoBudget:
    """Chooses the budget for one cache's prefixes.

    It says why on standard error when a store's prefixes get a budget for the first time, and logs every choice.

    Args:
        model: its speed is measured now, unless it is known.
        store: its disk's speed is measured with the first prefix.
        support: of the model.
    """

    def __init__(self, model: torch.nn.Module, store: PrefixStore, support: ModelSupport) -> None:
        self._store = store
        self._plan = support.plan
        self._speeds = compute_speeds(model, support)
        self._chosen: dict[int, BudgetChoice] = {}

    def __deepcopy__(self, memo: dict[int, object]) -> AutoBudget:
        return self  # Speeds and choices are the same for a copy of the cache.

    def choose(self, prefix: AttachedPrefix, config: ContiguousKVConfig) -> BudgetChoice:
        """For a prefix that has just been found."""
        found = self._chosen.get(prefix.tokens)
        if found is None:
            try:
                speed = read_speed(self._store, prefix)
            except StoreError as error:
                # The request finds out by itself what is wrong, and gets over it.
                reason = f"budget {UNKNOWN:g}: the store cannot be read ({error})"
                found = BudgetChoice(UNKNOWN, False, 0.0, 0.0, reason)
            else:
                seconds = recompute_seconds(prefix)
                found = choose_budget(prefix, config, self._plan, self._speeds, speed, seconds)
            self._chosen[prefix.tokens] = found
            self._say(found)
        return found

    def _say(self, choice: BudgetChoice) -> None:
        text = f"{choice}, for a suffix of {SUFFIX_TOKENS} tokens"
        logger.info("%s", text)
        said = _said.setdefault(self._store, set())
        if (choice.budget, choice.recompute) not in said:
            said.add((choice.budget, choice.recompute))
            print(f"contiguouskv: {text}", file=sys.stderr)
