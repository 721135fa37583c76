"""What the tests of the memory tiers ask of a store's memory. Reads internals, because nothing public counts users."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from hf_contiguouskv import AttentionMass, ContiguousKVConfig, RequestStats

from .references import generate
from .subject import ContiguousKVCache, PrefixStore

LAYERS, CHUNK_BYTES = 4, 4096
"""Of the tiny models of `models.py`: a chunk of one layer is one page in float32."""

CONFIGS: dict[str, Callable[[float], ContiguousKVConfig]] = {
    "paper": lambda budget: ContiguousKVConfig.paper(budget),
    "paper, period 2": lambda budget: ContiguousKVConfig.paper(budget, selection=AttentionMass(period=2, subperiod=1)),
    "default": lambda budget: ContiguousKVConfig(budget=budget),
}
POLICIES = ("expected-use", "published", "lru", "lfu")


@dataclass
class Answer:
    """What one request gave: token ids `[rows, n]`, per step logits `[rows, vocabulary]`, and its counters."""

    sequences: torch.Tensor
    logits: tuple[torch.Tensor, ...]
    stats: RequestStats

    def is_bit_for_bit(self, other: Answer) -> bool:
        return torch.equal(self.sequences, other.sequences) and all(map(torch.equal, self.logits, other.logits))


def ask(
    model: Any,
    prefix: torch.Tensor,
    suffix: torch.Tensor,
    store: Any,
    config: ContiguousKVConfig,
    *,
    tokens: int = 3,
    **options: Any,
) -> Answer:
    """One request on `prefix` `[1, n]` with the rows of `suffix` `[rows, q]`, greedy unless `options` say otherwise."""
    ids = torch.cat([prefix.expand(suffix.shape[0], -1), suffix], dim=1)
    with ContiguousKVCache(model, prefix, store=store, config=config) as cache:
        output = generate(model, ids, cache, tokens=tokens, **options)
        return Answer(output.sequences, output.logits, cache.stats)


def chunk_bytes(store: PrefixStore) -> int:
    """Bytes of chunks that lie in host memory."""
    return store.inner.memory.host.bytes_by_use["chunks"]


def assert_nothing_in_use(store: PrefixStore) -> None:
    """No slot has a user, no key is held, no buffer is lent; and the bookkeeping adds up."""
    gc.collect()
    assert_nothing_in_use_uncollected(store)


def assert_nothing_in_use_uncollected(store: PrefixStore) -> None:
    """`assert_nothing_in_use`, without help from the garbage collector."""
    store.inner.memory.catch_up()
    host = store.inner.memory.host
    for arena in host._arenas.values():
        assert int(arena.users.sum()) == 0, "slots are in use"
        owned, free = int((arena.owner > 0).sum()), arena.free_slots
        assert owned + free == arena.held_blocks * arena.blocks.slots_per_block, "slots were lost"
        assert len(set(arena._free)) == free, "a slot is free twice"
    assert host._buffer_bytes == 0, "buffers are lent"
    assert all(keys.users == 0 for keys in host._keys.values()), "keys are held"
    assert host._keys.held_bytes == sum(keys.buffer.counted for keys in host._keys.values())
    assert_tables_agree(store)


def assert_tables_agree(store: PrefixStore) -> None:
    """Tables and slots name each other, and tables know how much of them is resident."""
    host = store.inner.memory.host
    resident = 0
    for table in store.inner.memory._tables.values():
        places = (table.slots_in("host") >= 0).nonzero()[0]
        slots = table.slots_in("host")[places]
        if len(slots):
            arena = host._arenas[table.slot_bytes]
            assert (arena.owner[slots] == table.number).all()
            assert (arena.place[slots] == places).all()
        keys = sum(1 for one in host._keys.values() if one.table is table)
        assert table.resident == len(places) + keys
        resident += len(places)
    assert resident == sum(len(arena.resident()) for arena in host._arenas.values())
    assert host.held_bytes <= max(host.max_bytes, 0) or not host.max_bytes
