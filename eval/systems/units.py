"""KV for systems that choose tokens: units of one head's neighbouring tokens, in the library's own store.

The library reads, checks and keeps chunks of `(2, kv_heads, c, head_dim)` numbers. A *unit* of `u` tokens of one KV
head, keys or values, has as many numbers as a chunk with one head and `c = u / 2`; so a prefix in units is stored as a
prefix of such chunks, with two layers (keys, values) for each of the model's. Reader, threads, checksums, memory and
eviction are then those of the library, whatever is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from hf_contiguouskv.prefix import AttachedPrefix
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.format import KVGeometry
from hf_contiguouskv.store.hashing import TokenIds

from .base import NotStoredError


@dataclass(frozen=True)
class UnitLayout:
    """How the KV of one model is cut into units.

    Attributes:
        geometry: of the model's KV.
        unit_tokens: tokens of one unit, an even number.
    """

    geometry: KVGeometry
    unit_tokens: int

    def __post_init__(self) -> None:
        if self.unit_tokens < 2 or self.unit_tokens % 2:
            raise ValueError(f"unit_tokens must be an even number from 2 on, got {self.unit_tokens}")

    @property
    def stored(self) -> KVGeometry:
        """What the store believes."""
        g = self.geometry
        return KVGeometry(2 * g.num_layers, 1, g.head_dim, g.dtype, chunk_size=self.unit_tokens // 2)

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return self.unit_tokens * self.geometry.head_dim * self.geometry.itemsize

    def blocks(self, tokens: int) -> int:
        """Units that the tokens of one head fill, the last one perhaps in part."""
        return -(-tokens // self.unit_tokens)

    def keys_of(self, layer: int) -> int:
        """The stored layer that holds the keys of `layer`."""
        return 2 * layer

    def values_of(self, layer: int) -> int:
        """The stored layer that holds the values of `layer`."""
        return 2 * layer + 1

    def cut(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values `(kv_heads, n, head_dim)` as `(kv_heads, blocks, u, head_dim)`, padded with zeros."""
        heads, tokens, head_dim = states.shape
        blocks = self.blocks(tokens)
        padded = states.new_zeros(heads, blocks * self.unit_tokens, head_dim)
        padded[:, :tokens] = states
        return padded.view(heads, blocks, self.unit_tokens, head_dim)

    def ids_of(self, prefix_ids: TokenIds) -> TokenIds:
        """Stands for the prefix in the store: as many numbers as the units have places, and no others for other ids."""
        seed = int.from_bytes(hashlib.blake2b(prefix_ids.tobytes(), digest_size=16).digest(), "little")
        units = self.geometry.kv_heads * self.blocks(len(prefix_ids))
        return np.random.default_rng(seed).integers(0, 2**31, units * self.unit_tokens // 2, dtype=np.int64)

    def fingerprint_of(self, model_fingerprint: str, method: str) -> str:
        """Keeps units apart from chunks, and from those of other methods."""
        return hashlib.blake2b(f"{model_fingerprint} {method} {self.unit_tokens}".encode(), digest_size=16).hexdigest()


def write_units(
    store: PrefixStore,
    layout: UnitLayout,
    fingerprint: str,
    prefix_ids: TokenIds,
    layers: Iterable[tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Store a prefix, unless it is stored already.

    Args:
        store, layout: where and how.
        fingerprint: see `UnitLayout.fingerprint_of`.
        prefix_ids: int64 `(n,)`.
        layers: per layer the units of keys and of values, `(units, u, head_dim)` each, in the order of the method.
    """
    ids = layout.ids_of(prefix_ids)
    stored = layout.stored
    known = store.lookup(fingerprint, ids, stored.chunk_size, geometry=stored, count=False)
    if known is not None and known.tokens == len(ids):
        return
    with store.begin_segment(fingerprint, stored, ids) as writer:
        for layer, both in enumerate(layers):
            for number, units in zip((layout.keys_of(layer), layout.values_of(layer)), both, strict=True):
                writer.write_chunks(
                    number, 0, units.contiguous().view(-1, 2, 1, stored.chunk_size, stored.head_dim).cpu()
                )
        writer.commit(0.0)


def find_units(store: PrefixStore, layout: UnitLayout, fingerprint: str, prefix_ids: TokenIds) -> AttachedPrefix:
    """A prefix that `write_units` has stored; its chunks are units.

    Raises:
        NotStoredError: it is not stored.
    """
    ids = layout.ids_of(prefix_ids)
    stored = store.lookup(fingerprint, ids, layout.stored.chunk_size, geometry=layout.stored)
    if stored is None or stored.tokens < len(ids):
        raise NotStoredError(f"a prefix of {len(prefix_ids)} tokens is not stored")
    return AttachedPrefix.of(stored, len(ids))
