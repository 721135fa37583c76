"""The stores and the model that `store_bench` measures on."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from tqdm.auto import tqdm

from hf_contiguouskv import PrefixStore
from hf_contiguouskv.store import KVGeometry
from hf_contiguouskv.store.hashing import TokenIds

MODEL = "f0" * 16
CHUNK = 16
TINY = KVGeometry(num_layers=1, kv_heads=1, head_dim=1, dtype=torch.float16, chunk_size=CHUNK)


def no_fsync() -> Any:
    """A context in which `os.fsync` does nothing, for making test stores quickly and for measuring its cost."""
    return mock.patch("os.fsync", lambda fd: None)  # noqa: PT008 (a mock would remember every call)


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurements.

    Attributes:
        segments: segments of the large store.
        chunks: minimum total number of chunks in it.
        tokens: tokens of the prompts that are looked up, and of the prefix that is read; whole chunks.
        layers: layers of the prefix that is read (3 KV heads of 64 channels, bfloat16; SmolLM2-135M has 30 layers).
        parameters: approximate parameters of the fingerprinted model (bfloat16).
        rounds: rounds of the slow parts; the fast parts are repeated `20 * rounds` times.
    """

    segments: int = 10_000
    chunks: int = 100_000
    tokens: int = 8192
    layers: int = 30
    parameters: int = 540_000_000
    rounds: int = 15


def some_ids(count: int, seed: int) -> TokenIds:
    """Random token ids that share no beginning with the ids of another seed."""
    return np.random.default_rng(seed).integers(0, 2**20, count)


def store_kv(store: PrefixStore, ids: TokenIds, g: KVGeometry, first_chunk: int = 0, seed: int = 0) -> None:
    """Publish a segment of random K and V."""
    with store.inner.begin_segment(MODEL, g, ids, first_chunk) as writer:
        generator = torch.Generator().manual_seed(seed)
        for layer in range(g.num_layers):
            shape = (writer.header.num_chunks, 2, g.kv_heads, g.chunk_size, g.head_dim)
            writer.write_chunks(layer, 0, torch.rand(shape, generator=generator).to(g.dtype))
        writer.commit()


def fill(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Fill a store with many small segments, a prefix of `tokens` in one segment, and another in a chain of eight."""
    chain, whole = 8, sizes.tokens // CHUNK
    each = max(1, -(-(sizes.chunks - 2 * whole) // max(1, sizes.segments - chain - 1)))
    start = time.perf_counter()
    with no_fsync(), PrefixStore(folder) as store:
        store_kv(store, some_ids(sizes.tokens, 1), TINY)
        chained = some_ids(sizes.tokens, 2)
        for part in range(chain):
            store_kv(store, chained[: (part + 1) * sizes.tokens // chain], TINY, part * whole // chain)
        for seed in tqdm(range(3, sizes.segments - chain + 2), "segments", leave=False, disable=None):
            store_kv(store, some_ids(each * CHUNK, seed), TINY)
    with PrefixStore(folder) as store:
        count = sum(entry.chunks for entry in store.entries())
        return {"segments": store.stats.segments, "chunks": count, "fixture_s": time.perf_counter() - start}


def large_model(parameters: int) -> Any:
    """A Llama model with about `parameters` random bfloat16 parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    hidden = 1024 if parameters > 10**8 else 64
    per_layer = 16 * hidden * hidden  # 4 h^2 of attention and 12 h^2 of MLP.
    vocabulary = 32_000 if parameters > 10**8 else 500
    layers = max(1, (parameters - 2 * vocabulary * hidden) // per_layer)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        tie_word_embeddings=False,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
