"""IMPRESS (FAST'25): a few probe heads tell which tokens matter, and only blocks with such tokens are loaded.

In every layer the keys of the probe heads are loaded, which are stored apart. Each probe head names its `k` best tokens
by the suffix's attention. If the probe heads agree (mean pairwise Jaccard index at least `E[J] ** 0.6`), they vote;
if not, all other keys of the layer are loaded as well and all heads together choose. Then blocks of 64 tokens that
hold a chosen token are loaded: values, and the keys that are not there yet.

Tokens are stored in the order of their importance, as far as it was known when the prefix was stored, so that few
blocks hold most of what is chosen. (The paper reorders within a node of its prefix tree; a prefix here is one node.)
Memory keeps blocks by how often they were used, times the share of their tokens that was important.

With `+blocks` attention uses all tokens of the blocks that are loaded, and these are those with the most chosen tokens,
as many as hold a budget's tokens (rounded up to whole blocks).

The paper's models have a key head for every query head. Under grouped-query attention "the first three heads" can be
read in two ways: the first three query heads, which often share one key head (`"first"`); or one query head for each
KV head, whose keys together are all keys (`"groups"`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hf_contiguouskv.memory.history import Floats, Uses

from .choices import Chosen, best_on_device, held_by, voted_on_device
from .moving import fetch, send
from .token_scores import Tokens, best_tokens, column_sums, mean_jaccard, similar_enough, similarity, voted
from .token_strategy import TokenStrategy
from .token_system import TokenSystem

PROBES = ("first", "groups")
PROBE_HEADS = 3


def probe_heads(heads: int, kv_heads: int, probes: str) -> Tokens:
    """Query heads that probe, int64 ascending; `probes` is one of `PROBES`.

    Raises:
        ValueError: it is not.
    """
    if probes not in PROBES:
        raise ValueError(f"probes must be one of {PROBES}, got {probes!r}")
    return np.arange(min(PROBE_HEADS, heads)) if probes == "first" else np.arange(kv_heads) * (heads // kv_heads)


class UsedAndImportant:
    """Eviction as published: the least product of frequency and share of important tokens goes first."""

    name = "impress"
    arrivals_compete = False

    def worth(self, uses: Uses) -> Floats:
        """Requests that used a block, times its mean share of important tokens: the sum of the shares."""
        return uses.importance


class ImpressStrategy(TokenStrategy):
    """See the module.

    Attributes:
        agreed: layers in which the probe heads agreed, so far.
    """

    probes = "first"
    whole_blocks = False

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.agreed = 0

    @property
    def kept_tokens(self) -> int:
        """See `Strategy`."""
        u = self.layout.unit_tokens
        return min(self.prefix.tokens, -(-self.kept // u) * u) if self.whole_blocks else self.kept

    def choose(
        self, layer: int, queries: torch.Tensor, suffix_keys: torch.Tensor, scaling: float, destination: torch.Tensor
    ) -> None:
        nodes, layout, kv_heads = self.nodes, self.layout, destination.shape[1]
        stored_keys = layout.keys_of(layer)
        first_keys = nodes.keys_apart()
        with self.taken(stored_keys, first_keys, "first keys", identifies=True) as found:
            joined = nodes.joined(found)
            # (Values are asked for before their context ends: attention's buffer is filled from where keys are now.)
            if not layout.others:
                self._choose(layer, queries, suffix_keys, scaling, destination, joined)
                return
            with self.timed("copy", layer):
                keys = self.room("keys", (kv_heads, *joined.shape[1:]), layer)
                for head, own in zip(layout.apart, joined, strict=True):
                    keys[head] = own
        self._choose(layer, queries, suffix_keys, scaling, destination, keys)

    def _choose(
        self,
        layer: int,
        queries: torch.Tensor,
        suffix_keys: torch.Tensor,
        scaling: float,
        destination: torch.Tensor,
        keys: torch.Tensor,
    ) -> None:
        """As `choose`; those heads' `keys` `(kv_heads, places, head_dim)` that probe are there."""
        nodes, layout, u, kv_heads = self.nodes, self.layout, self.layout.unit_tokens, destination.shape[1]
        stored_keys, stored_values = layout.keys_of(layer), layout.values_of(layer)
        with self.timed("identify", layer):
            alike, chosen = self._voted(layer, self._of_probes(layer, queries, keys, suffix_keys, scaling))
        agree = alike >= similar_enough(self.prefix.tokens, self.kept)
        if agree:
            self.agreed += 1
        else:
            self._bring_blocks_of_keys(layer, np.arange(nodes.blocks), keys, identifies=True)
            with self.timed("identify", layer):
                mass = column_sums(queries, self.of_tokens(keys, layer), suffix_keys, scaling, self.on_device(layer))
                chosen = self._best(layer, mass.sum(0, keepdim=True))
        share = chosen.counts / u
        if self.whole_blocks:
            chosen = self._whole(layer, chosen)
        blocks = chosen.units
        value_units, value_share = nodes.values(blocks), share.repeat(kv_heads)
        self.loader.accounts.expect_importance([stored_values], value_share.astype(np.float32))
        if agree:  # Only blocks that hold a chosen token.
            self.ask(stored_keys, nodes.other_keys(blocks))
        self.ask(stored_values, value_units)
        if agree:
            self._bring_blocks_of_keys(layer, blocks, keys)
        with self.timed("copy", layer):
            torch.index_select(keys, 1, chosen.places, out=destination[0])
        with self.taken(stored_values, value_units, "values") as found, self.timed("copy", layer):
            values = found.view(len(blocks), kv_heads, u, -1)
            destination[1] = values[chosen.ranks(), :, chosen.places % u].transpose(0, 1)
        self._note(layer, share, blocks if agree else np.arange(nodes.blocks))
        self.used(stored_values, value_units, value_share)

    def _voted(self, layer: int, mass: torch.Tensor) -> tuple[float, Chosen]:
        """How alike the choices of the probe heads are, and what they vote for; `mass` is `(probe heads, n)`."""
        if not self.on_device(layer):
            by_probe = best_tokens(mass, self.kept)
            return similarity(by_probe), self._on_host(voted(by_probe, mass, self.kept))
        tokens, common = voted_on_device(best_on_device(mass, self.kept), mass, self.kept)
        chosen, (pairs,) = self._on_device(layer, tokens, common)
        return mean_jaccard(pairs[np.triu_indices(len(mass), 1)].tolist(), self.kept), chosen

    def _best(self, layer: int, mass: torch.Tensor) -> Chosen:
        """The tokens with the most `mass` `(1, n)`."""
        if not self.on_device(layer):
            return self._on_host(best_tokens(mass, self.kept)[0])
        return self._on_device(layer, best_on_device(mass, self.kept)[0])[0]

    def _whole(self, layer: int, chosen: Chosen) -> Chosen:
        """All tokens of the blocks that hold the most chosen ones; of equals the earlier ones; the last one in part, if
        there is no room for all of it."""
        u, nodes = self.layout.unit_tokens, self.nodes
        sizes = np.full(nodes.blocks, u)
        ends = np.cumsum(nodes.blocks_of) - 1
        sizes[ends] = np.array(nodes.tokens) - (np.array(nodes.blocks_of) - 1) * u
        order = np.argsort(-chosen.counts.astype(np.int64), kind="stable")
        filled = np.cumsum(sizes[order])
        last = int(np.searchsorted(filled, self.kept_tokens))
        counts = np.zeros(nodes.blocks, dtype=np.int64)
        counts[order[:last]] = sizes[order[:last]]
        counts[order[last]] = self.kept_tokens - (filled[last - 1] if last else 0)
        within = np.arange(u) < counts[:, None]
        places = np.flatnonzero(within.ravel())
        device = self.devices[layer]
        return Chosen(send(places, device), send(places // u, device), send(counts, device), counts)

    def _on_host(self, tokens: Tokens) -> Chosen:
        places = self.places_of(tokens)
        return Chosen.on_host(places, places // self.layout.unit_tokens, self.nodes.blocks)

    def _on_device(self, layer: int, tokens: torch.Tensor, *more: torch.Tensor) -> tuple[Chosen, list[Tokens]]:
        """Chosen tokens; and other numbers (int32), which come to the host with the number of tokens in each block."""
        places = self.places_on_device(tokens, layer)
        block_of = places // self.layout.unit_tokens
        held = held_by(block_of, self.nodes.blocks)
        came = fetch(torch.cat([held, *(one.flatten() for one in more)]), self.devices[layer])
        counts, *others = np.split(came, np.cumsum([len(held), *(one.numel() for one in more)])[:-1])
        shaped = [other.reshape(one.shape) for other, one in zip(others, more, strict=True)]
        return Chosen(places, block_of, held, counts), shaped

    def _bring_blocks_of_keys(self, layer: int, blocks: Tokens, keys: torch.Tensor, identifies: bool = False) -> None:
        """Put the keys of the other heads in `blocks` into their places in `keys` `(kv_heads, places, head_dim)`."""
        others = np.array(self.layout.others, dtype=np.int64)
        if not len(others):
            return
        units, u = self.nodes.other_keys(blocks), self.layout.unit_tokens
        self.ask(self.layout.keys_of(layer), units)
        with (
            self.taken(self.layout.keys_of(layer), units, "other keys", identifies) as found,
            self.timed("copy", layer),
        ):
            heads, where = self.sent("other heads", others, layer), send(blocks, self.devices[layer])
            own = found.view(len(blocks), len(others), u, -1).transpose(0, 1)
            keys.view(len(keys), -1, u, keys.shape[-1])[heads[:, None], where] = own

    def _note(self, layer: int, share: npt.NDArray[np.float64], blocks: Tokens) -> None:
        """Tell memory what share of each unit of keys was important, and which were used."""
        nodes, heads = self.nodes, len(self.layout.apart)
        first, rest = nodes.keys_apart(), nodes.other_keys(np.arange(nodes.blocks))
        shares = np.empty(len(first) + len(rest))
        parts = np.split(share, nodes.first_blocks[1:])
        shares[first] = np.concatenate([np.tile(part, heads) for part in parts])
        shares[rest] = share.repeat(len(self.layout.others))
        self.used(self.layout.keys_of(layer), np.sort(np.concatenate([first, nodes.other_keys(blocks)])), shares)

    def _of_probes(
        self, layer: int, queries: torch.Tensor, keys: torch.Tensor, suffix_keys: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Column sums of the probe heads, float32 `(probe heads, n)`."""
        probing = probe_heads(len(queries), len(keys), self.probes)
        head_of = probing // (len(queries) // len(keys))
        # KV heads with their probe heads (which are neighbours); one for each KV head: all at once.
        steps = len(queries) // len(keys)
        parts = [(slice(None), slice(None, None, steps))] if self.probes == "groups" else []
        for head in () if parts else self.layout.apart:
            own = probing[head_of == head]
            parts.append((slice(head, head + 1), slice(int(own[0]), int(own[-1]) + 1)))
        return torch.cat(
            [
                column_sums(
                    queries[some],
                    self.of_tokens(keys[head], layer),
                    suffix_keys[head],
                    scaling,
                    self.on_device(layer),
                )
                for head, some in parts
            ]
        )


class ImpressGroupsStrategy(ImpressStrategy):
    """One probe head for each KV head."""

    probes = "groups"


class ImpressBlocksStrategy(ImpressStrategy):
    """Whole blocks."""

    whole_blocks = True


class ImpressGroupsBlocksStrategy(ImpressGroupsStrategy):
    """One probe head for each KV head, and whole blocks."""

    whole_blocks = True


_STRATEGIES: dict[tuple[str, bool], type[ImpressStrategy]] = {
    ("first", False): ImpressStrategy,
    ("groups", False): ImpressGroupsStrategy,
    ("first", True): ImpressBlocksStrategy,
    ("groups", True): ImpressGroupsBlocksStrategy,
}


class Impress(TokenSystem):
    """IMPRESS.

    Args:
        probes: one of `PROBES`; `"groups"` is the option of this name.
        reorder: whether tokens are stored in the order of their importance.
        blocks: whether attention uses all tokens of the blocks that are loaded.
        arguments, options: see `TokenSystem`.
    """

    published = "impress"
    published_eviction = UsedAndImportant()
    strategy: type[ImpressStrategy]

    def __init__(
        self, *arguments: Any, probes: str = "first", reorder: bool = True, blocks: bool = False, **options: Any
    ) -> None:
        probe_heads(1, 1, probes)
        self.named = (*(("groups",) if probes == "groups" else ()), *(("blocks",) if blocks else ()))
        self.strategy = _STRATEGIES[probes, blocks]
        self._reorder = reorder
        super().__init__(*arguments, **options)

    @property
    def agreed(self) -> int:
        """In how many layers of the last request the probe heads agreed."""
        assert self.served is not None
        assert isinstance(self.served.last, ImpressStrategy)
        return self.served.last.agreed

    def details(self) -> dict[str, Any]:
        """See `System`: `agreed`, the share of layers in which the probe heads agreed."""
        return {} if self.served is None else {"agreed": self.agreed / self.layout.geometry.num_layers}

    @property
    def method(self) -> str:
        return f"{self.published} {self.strategy.probes} {self._reorder}"

    def apart(self, heads: int, kv_heads: int) -> tuple[int, ...]:
        """See `TokenSystem`: those of the probe heads."""
        return tuple(np.unique(probe_heads(heads, kv_heads, self.strategy.probes) // (heads // kv_heads)).tolist())

    def order(self, importance: torch.Tensor) -> torch.Tensor:
        """See `TokenSystem`: the most important first."""
        return importance.argsort(descending=True, stable=True) if self._reorder else super().order(importance)
