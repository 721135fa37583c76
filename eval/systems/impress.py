"""IMPRESS (FAST'25): a few probe heads tell which tokens matter, and only blocks with such tokens are loaded.

In every layer the keys of the probe heads are loaded, which are stored apart. Each probe head names its `k` best tokens
by the suffix's attention. If the probe heads agree (mean pairwise Jaccard index at least `E[J] ** 0.6`), they vote;
if not, all other keys of the layer are loaded as well and all heads together choose. Then blocks of 64 tokens that
hold a chosen token are loaded: values, and the keys that are not there yet.

Tokens are stored in the order of their importance, as far as it was known when the prefix was stored, so that few
blocks hold most of what is chosen. (The paper reorders within a node of its prefix tree; a prefix here is one node.)
What stays in memory goes by how often a block was used, times the share of it that was important.

The paper's models have a key head for every query head. Under grouped-query attention "the first three heads" can be
read in two ways: the first three query heads, which often share one key head (`"first"`); or one query head for each
KV head, whose keys together are all keys (`"groups"`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from hf_contiguouskv.memory.history import Floats, Uses
from hf_contiguouskv.store.format import KVGeometry

from .token_request import TokenRequest
from .token_scores import Tokens, best_tokens, column_sums, similar_enough, similarity, voted
from .token_system import UNIT_TOKENS, TokenSystem
from .units import UnitLayout

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


@dataclass(frozen=True)
class ImpressLayout(UnitLayout):
    """Units of keys: those of the probing KV heads, head by head, then the others, block by block. Units of values:
    block by block. (A block has one unit for each KV head.)

    Attributes:
        heads: query heads of the model.
        probes: one of `PROBES`.
    """

    heads: int
    probes: str

    @property
    def probe_heads(self) -> Tokens:
        """Query heads that probe."""
        return probe_heads(self.heads, self.geometry.kv_heads, self.probes)

    @property
    def probing(self) -> Tokens:
        """KV heads that they share, int64 ascending."""
        return np.unique(self.probe_heads // (self.heads // self.geometry.kv_heads))

    @property
    def others(self) -> Tokens:
        """The other KV heads."""
        return np.setdiff1d(np.arange(self.geometry.kv_heads), self.probing)

    def arranged(self, keys: torch.Tensor, values: torch.Tensor, order: torch.Tensor) -> list[torch.Tensor]:
        """Units `(units, u, head_dim)` of keys and values `(kv_heads, n, head_dim)`, with their tokens in `order`."""
        cut_keys, cut_values = self.cut(keys[:, order]), self.cut(values[:, order])
        others = cut_keys[self.others].transpose(0, 1)
        return [
            torch.cat([cut_keys[self.probing].flatten(0, 1), others.flatten(0, 1)]),
            cut_values.transpose(0, 1).flatten(0, 1),
        ]


class ImpressRequest(TokenRequest):
    """See the module.

    Attributes:
        agreed: layers in which the probe heads agreed, so far.
    """

    layout: ImpressLayout

    def _open_reads(self) -> None:
        super()._open_reads()
        self.agreed = 0

    @property
    def first_keys(self) -> Tokens:
        """See `TokenRequest`: those of the probing KV heads."""
        return np.arange(len(self.layout.probing) * self.layout.blocks(self.prefix.tokens))

    def choose(
        self, layer: int, queries: torch.Tensor, suffix_keys: torch.Tensor, scaling: float, destination: torch.Tensor
    ) -> None:
        """See `TokenRequest`."""
        layout, tokens = self.layout, self.prefix.tokens
        u, blocks, kv_heads, others = layout.unit_tokens, layout.blocks(tokens), destination.shape[1], layout.others
        stored_keys, stored_values = layout.keys_of(layer), layout.values_of(layer)
        keys = torch.empty(kv_heads, blocks * u, destination.shape[-1], dtype=destination.dtype)
        keys[layout.probing] = self.take(stored_keys, self.first_keys, identifies=True).view(-1, *keys.shape[1:])
        with self.timed("identify", layer):
            mass = self._of_probes(queries, keys[:, :tokens], suffix_keys, scaling)
            by_probe = best_tokens(mass, self.kept)
            agree = similarity(by_probe) >= similar_enough(tokens, self.kept)
            chosen = voted(by_probe, mass, self.kept)
        other_units = len(self.first_keys) + np.arange(blocks * len(others))
        if agree:
            self.agreed += 1
            # Only of blocks that hold a chosen token.
            other_units = other_units.reshape(blocks, -1)[np.unique(chosen // u)].ravel()
            self.ask(stored_keys, other_units)
        else:
            if len(others):
                self.ask(stored_keys, other_units)
                found = self.take(stored_keys, other_units, identifies=True)
                keys[others] = found.view(blocks, len(others), u, -1).transpose(0, 1).reshape(-1, *keys.shape[1:])
            with self.timed("identify", layer):
                mass = column_sums(queries, keys[:, :tokens], suffix_keys, scaling)
                chosen = best_tokens(mass.sum(0, keepdim=True), self.kept)[0]
        used = np.unique(chosen // u)
        share = np.bincount(chosen // u, minlength=blocks) / u
        value_units = (used[:, None] * kv_heads + np.arange(kv_heads)).ravel()
        self._payload.tables.mass[stored_values] = share.repeat(kv_heads).astype(np.float32)
        self.ask(stored_values, value_units)
        if agree and len(others):
            found = self.take(stored_keys, other_units).view(len(used), len(others), u, -1)
            with self.timed("copy", layer):
                keys.view(kv_heads, blocks, u, -1)[others[:, None], used] = found.transpose(0, 1)
        with self.timed("copy", layer):
            torch.index_select(keys, 1, torch.from_numpy(chosen), out=destination[0])
        values = self.take(stored_values, value_units).view(len(used), kv_heads, u, -1)
        with self.timed("copy", layer):
            block = torch.from_numpy(np.searchsorted(used, chosen // u))
            destination[1] = values[block, :, torch.from_numpy(chosen % u)].transpose(0, 1)
        key_shares = np.concatenate([np.tile(share, len(layout.probing)), share.repeat(len(others))])
        self.used(stored_keys, np.concatenate([self.first_keys, other_units]), key_shares)
        self.used(stored_values, value_units, share.repeat(kv_heads))

    def _of_probes(
        self, queries: torch.Tensor, keys: torch.Tensor, suffix_keys: torch.Tensor, scaling: float
    ) -> torch.Tensor:
        """Column sums of the probe heads, float32 `(probe heads, n)`."""
        layout = self.layout
        head_of = layout.probe_heads // (layout.heads // layout.geometry.kv_heads)
        return torch.cat(
            [
                column_sums(
                    queries[layout.probe_heads[head_of == head]],
                    keys[head : head + 1],
                    suffix_keys[head : head + 1],
                    scaling,
                )
                for head in layout.probing.tolist()
            ]
        )


class Impress(TokenSystem):
    """IMPRESS.

    Args:
        probes: one of `PROBES`; `"groups"` is called `impress_groups`.
        reorder: whether tokens are stored in the order of their importance.
        arguments, options: see `TokenSystem`.
    """

    published_eviction = UsedAndImportant()
    request = ImpressRequest

    def __init__(self, *arguments: Any, probes: str = "first", reorder: bool = True, **options: Any) -> None:
        self.published = "impress" if probes == "first" else f"impress_{probes}"
        self._probes = probes
        self._reorder = reorder
        super().__init__(*arguments, **options)

    @property
    def method(self) -> str:
        """See `TokenSystem`."""
        return f"{self.published} {self._reorder}"

    def layout_for(self, geometry: KVGeometry, heads: int) -> ImpressLayout:
        """See `TokenSystem`."""
        return ImpressLayout(geometry, UNIT_TOKENS, heads, self._probes)

    def arranged(
        self, layout: UnitLayout, keys: torch.Tensor, values: torch.Tensor, importance: torch.Tensor
    ) -> Sequence[torch.Tensor]:
        """See `TokenSystem`."""
        assert isinstance(layout, ImpressLayout)
        order = importance.argsort(descending=True, stable=True) if self._reorder else torch.arange(len(importance))
        return layout.arranged(keys, values, order)
