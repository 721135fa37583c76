"""KV for systems that choose tokens: units of one head's neighbouring tokens, in the library's own store.

The library reads, checks and keeps chunks of `(2, kv_heads, c, head_dim)` numbers. A *unit* of `u` tokens of one KV
head, keys or values, has as many numbers as a chunk with one head and `c = u / 2`; so a prefix in units is stored as a
prefix of such chunks, with two layers (keys, values) for each of the model's. Reader, threads, checksums, memory and
eviction are then those of the library, whatever is compared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.attached_prefix import AttachedPrefix
from hf_contiguouskv.store.format import KVGeometry
from hf_contiguouskv.store.hashing import TokenIds

from .base import NotStoredError

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class UnitLayout:
    """How the KV of one model is cut into units.

    A prefix is a row of *nodes*: what was added to it at a time (the turns of a chat, say). In a node, the units of
    keys are those of the heads `apart`, head by head, then those of the others, block by block; the units of values go
    block by block. A block has one unit for each KV head.

    Attributes:
        geometry: of the model's KV.
        unit_tokens: tokens of one unit, an even number.
        apart: KV heads whose keys are always needed, ascending.
    """

    geometry: KVGeometry
    unit_tokens: int
    apart: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.unit_tokens < 2 or self.unit_tokens % 2:
            raise ValueError(f"unit_tokens must be an even number from 2 on, got {self.unit_tokens}")

    @property
    def others(self) -> tuple[int, ...]:
        """KV heads that are not `apart`."""
        return tuple(head for head in range(self.geometry.kv_heads) if head not in self.apart)

    @property
    def stored(self) -> KVGeometry:
        """What the store believes."""
        g = self.geometry
        return KVGeometry(2 * g.num_layers, 1, g.head_dim, g.dtype, chunk_size=self.unit_tokens // 2)

    @property
    def unit_bytes(self) -> int:
        """Bytes of one unit."""
        return self.unit_tokens * self.geometry.head_dim * self.geometry.itemsize

    def keys_of(self, layer: int) -> int:
        """The stored layer that holds the keys of `layer`."""
        return 2 * layer

    def values_of(self, layer: int) -> int:
        """The stored layer that holds the values of `layer`."""
        return 2 * layer + 1

    def cut(self, states: torch.Tensor) -> torch.Tensor:
        """Keys or values `(kv_heads, n, head_dim)` as `(kv_heads, blocks, u, head_dim)`, padded with zeros."""
        heads, tokens, head_dim = states.shape
        blocks = -(-tokens // self.unit_tokens)
        padded = states.new_zeros(heads, blocks * self.unit_tokens, head_dim)
        padded[:, :tokens] = states
        return padded.view(heads, blocks, self.unit_tokens, head_dim)

    def arranged(self, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The units of one node, keys and values, `(units, u, head_dim)` each, from `(kv_heads, n, head_dim)` each."""
        cut_keys, cut_values = self.cut(keys), self.cut(values)
        others = cut_keys[list(self.others)].transpose(0, 1)
        apart = cut_keys[list(self.apart)]
        return torch.cat([apart.flatten(0, 1), others.flatten(0, 1)]), cut_values.transpose(0, 1).flatten(0, 1)

    def fingerprint_of(self, model_fingerprint: str, method: str) -> str:
        """Keeps units apart from chunks, and from those of other methods."""
        about = f"{model_fingerprint} {method} {self.unit_tokens}"
        return hashlib.blake2b(about.encode(), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Nodes:
    """Where the tokens of a prefix are. Blocks and *places* (of tokens, padding included) count through all nodes.

    Attributes:
        layout: of units.
        tokens: of each node.
    """

    layout: UnitLayout
    tokens: tuple[int, ...]

    @cached_property
    def blocks_of(self) -> tuple[int, ...]:
        """Blocks of each node; the last one of a node may be filled in part."""
        return tuple(-(-count // self.layout.unit_tokens) for count in self.tokens)

    @property
    def blocks(self) -> int:
        """Of all nodes."""
        return sum(self.blocks_of)

    @cached_property
    def first_blocks(self) -> tuple[int, ...]:
        """The first block of each node."""
        return tuple(accumulate(self.blocks_of, initial=0))[:-1]

    @cached_property
    def places(self) -> Numbers | None:
        """The place of each token, int64 `(n,)`; `None`: token `t` has the place `t`."""
        if len(self.tokens) == 1:
            return None
        u = self.layout.unit_tokens
        return np.concatenate(
            [first * u + np.arange(count) for first, count in zip(self.first_blocks, self.tokens, strict=True)]
        )

    def keys_apart(self) -> Numbers:
        """Units of the keys of the heads `apart`, int64 ascending."""
        heads, apart = self.layout.geometry.kv_heads, len(self.layout.apart)
        return np.concatenate(
            [
                first * heads + np.arange(blocks * apart)
                for first, blocks in zip(self.first_blocks, self.blocks_of, strict=True)
            ]
        )

    def joined(self, found: torch.Tensor) -> torch.Tensor:
        """Units `keys_apart`, `(units, u, head_dim)`, as `(heads apart, places, head_dim)`."""
        heads = len(self.layout.apart)
        parts = found.split([blocks * heads for blocks in self.blocks_of])
        rows = [part.view(heads, -1, part.shape[-1]) for part in parts]
        return rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)

    def other_keys(self, chosen: Numbers) -> Numbers:
        """Units of the keys of all other heads in blocks `chosen` (int64, ascending), block by block, ascending."""
        heads, apart, others = self.layout.geometry.kv_heads, len(self.layout.apart), len(self.layout.others)
        node = np.searchsorted(self.first_blocks, chosen, side="right") - 1
        first, blocks = np.array(self.first_blocks)[node], np.array(self.blocks_of)[node]
        begin = first * heads + blocks * apart + (chosen - first) * others
        units: Numbers = (begin[:, None] + np.arange(others)).ravel()
        return units

    def values(self, chosen: Numbers) -> Numbers:
        """Units of the values of all heads in blocks `chosen` (int64, ascending), block by block, ascending."""
        heads = self.layout.geometry.kv_heads
        units: Numbers = (chosen[:, None] * heads + np.arange(heads)).ravel()
        return units

    def ids(self, prefix_ids: TokenIds) -> TokenIds:
        """Stands for the prefix in the store: as many numbers as its units have room for; others for other nodes."""
        heads, u = self.layout.geometry.kv_heads, self.layout.unit_tokens
        parts = np.split(prefix_ids, np.cumsum(self.tokens)[:-1])
        found = []
        for part, blocks in zip(parts, self.blocks_of, strict=True):
            seed = int.from_bytes(hashlib.blake2b(part.tobytes(), digest_size=16).digest(), "little")
            found.append(np.random.default_rng(seed).integers(0, 2**31, blocks * heads * u // 2, dtype=np.int64))
        return np.concatenate(found)


def write_nodes(
    store: PrefixStore,
    nodes: Nodes,
    fingerprint: str,
    prefix_ids: TokenIds,
    arranged: Callable[[int, slice], tuple[torch.Tensor, torch.Tensor]],
) -> None:
    """Store the nodes of a prefix that are not stored yet.

    Args:
        store, nodes: where and how.
        fingerprint: see `UnitLayout.fingerprint_of`.
        prefix_ids: int64 `(n,)`.
        arranged: from a layer and the tokens of a node, the units of its keys and values (`UnitLayout.arranged`).
    """
    layout = nodes.layout
    ids, stored = nodes.ids(prefix_ids), layout.stored
    units, end, token = layout.geometry.kv_heads, 0, 0
    for blocks, count in zip(nodes.blocks_of, nodes.tokens, strict=True):
        begin, end = end, end + blocks * units
        tokens, token = slice(token, token + count), token + count
        known = store.inner.lookup(fingerprint, ids[: end * stored.chunk_size], stored.chunk_size, count=False)
        if known is not None and known.tokens >= end * stored.chunk_size:
            continue
        part = ids[: end * stored.chunk_size]
        with store.inner.begin_segment(fingerprint, stored, part, begin, known if begin else None) as writer:
            for layer in range(layout.geometry.num_layers):
                both = arranged(layer, tokens)
                for number, found in zip((layout.keys_of(layer), layout.values_of(layer)), both, strict=True):
                    chunks = found.contiguous().view(-1, 2, 1, stored.chunk_size, stored.head_dim)
                    writer.write_chunks(number, 0, chunks.cpu())
            writer.commit(0.0)


def find_nodes(store: PrefixStore, nodes: Nodes, fingerprint: str, ids: TokenIds) -> AttachedPrefix:
    """A prefix that `write_nodes` has stored; its chunks are units. `ids`: `nodes.ids` of it.

    Raises:
        NotStoredError: it is not stored.
    """
    stored = nodes.layout.stored
    found = store.inner.lookup(fingerprint, ids, stored.chunk_size, geometry=stored)
    if found is None or found.tokens < len(ids):
        raise NotStoredError(f"a prefix of {sum(nodes.tokens)} tokens is not stored")
    return AttachedPrefix.of(found, len(ids))
