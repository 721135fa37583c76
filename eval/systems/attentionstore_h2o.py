"""AttentionStore with H2O's choice: all keys of a layer are loaded, and only the values of the tokens that matter.

With `+overlap` the keys of all layers are read ahead, from the start of a request on: they are needed in any case.

Tokens are ranked by the attention that they get from the suffix (column sums), per KV head. Keys and values are stored
apart, head by head. Values are read in units of 64 tokens of a head: with SmolLM2 on our disks a unit of one page (32
tokens) read 7% less, and took as long or longer, because there are twice as many reads and entries in the books.
"""

from __future__ import annotations

import numpy as np
import torch

from .choices import Chosen, best_on_device, held_by
from .moving import fetch
from .token_scores import best_tokens, column_sums
from .token_strategy import TokenStrategy
from .token_system import TokenSystem


class H2OStrategy(TokenStrategy):
    """See the module."""

    def choose(
        self, layer: int, queries: torch.Tensor, suffix_keys: torch.Tensor, scaling: float, destination: torch.Tensor
    ) -> None:
        nodes = self.nodes
        stored_keys, stored_values = self.layout.keys_of(layer), self.layout.values_of(layer)
        heads, tokens = self.prefix.geometry.kv_heads, self.prefix.tokens
        all_keys = nodes.keys_apart()
        with self.taken(stored_keys, all_keys, "keys", identifies=True) as found:
            keys = nodes.joined(found)
            with self.timed("identify", layer):
                mass = column_sums(queries, self.of_tokens(keys, layer), suffix_keys, scaling, self.on_device(layer))
                chosen = self._chosen(layer, mass.view(heads, -1, tokens).sum(1))
            units = chosen.units
            self.ask(stored_values, units)
            with self.timed("copy", layer):
                for head, own in enumerate(chosen.places):
                    torch.index_select(keys[head], 0, own, out=destination[0, head])
        with self.taken(stored_values, units, "values") as found, self.timed("copy", layer):
            values, u = found.flatten(0, 1), self.layout.unit_tokens
            for head, own in enumerate(chosen.ranks() * u + chosen.places % u):
                torch.index_select(values, 0, own, out=destination[1, head])
        self.used(stored_keys, all_keys)
        self.used(stored_values, units)

    def _chosen(self, layer: int, mass: torch.Tensor) -> Chosen:
        """The best tokens of each KV head, and which unit of the values each is in; `mass` is `(kv_heads, n)`."""
        u, heads = self.layout.unit_tokens, len(mass)
        units = self.nodes.blocks * heads
        if not self.on_device(layer):
            places = self.places_of(best_tokens(mass, self.kept))
            return Chosen.on_host(places, places // u * heads + np.arange(heads)[:, None], units)
        there = self.places_on_device(best_on_device(mass, self.kept), layer)
        unit_of = there // u * heads + torch.arange(heads, device=there.device)[:, None]
        held = held_by(unit_of, units)
        return Chosen(there, unit_of, held, fetch(held, self.devices[layer]))


class AttentionStoreH2O(TokenSystem):
    """AS+H2O. Memory evicts by LRU, or with `eviction="lfu"` by LFU: the paper has both."""

    published = "attentionstore_h2o"
    published_eviction = "lru"
    strategy = H2OStrategy

    def apart(self, heads: int, kv_heads: int) -> tuple[int, ...]:
        """See `TokenSystem`: all of them."""
        return tuple(range(kv_heads))
