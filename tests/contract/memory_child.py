"""A process of its own for `test_memory_limits.py`: how much resident memory requests take, beyond their own K and V.

`python -m tests.contract.memory_child FOLDER exact:0:2 default:8:2` prints one JSON object per line, for each
`config:limit in MiB:questions on each prefix`.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore

from .models import CACHE, quiet, token_ids

MIB = 2**20
TOKENS, LAYERS, KV_HEADS, HEAD_DIM = 2048, 8, 8, 64
KV_BYTES = TOKENS * LAYERS * KV_HEADS * HEAD_DIM * 2 * 4
CONFIGS = {
    "exact": ContiguousKVConfig(budget=1.0),
    "default": ContiguousKVConfig(budget=0.1),
}


def make_model() -> Any:
    """Little weight, much KV: 32 KiB per token."""
    torch.manual_seed(11)
    config = hf.LlamaConfig(
        vocab_size=128,
        hidden_size=KV_HEADS * HEAD_DIM,
        num_attention_heads=KV_HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        max_position_embeddings=4096,
        initializer_range=0.1,
    )
    model = hf.LlamaForCausalLM(config).eval()
    quiet(model)
    return model


def prefixes() -> list[torch.Tensor]:
    return [token_ids(TOKENS, seed=1100 + number) for number in range(2)]


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) * 1024


def _settle() -> None:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _question(model: Any, prefix: torch.Tensor, seed: int, cache: Any) -> None:
    ids = torch.cat([prefix, token_ids(8, seed=seed)], dim=1)
    model.generate(ids, **{CACHE: cache}, max_new_tokens=3, do_sample=False)


def main(folder: Path, runs: list[str]) -> None:
    torch.set_num_threads(1)
    model = make_model()
    # What a request without the library leaves behind in allocators and lazily loaded code is not the library's.
    _question(model, token_ids(256, seed=1), 2, DynamicCache(config=model.config))
    with PrefixStore(folder) as store:
        for settings in CONFIGS.values():
            with ContiguousKVCache(model, prefixes()[0], store=store, config=settings) as cache:
                _question(model, prefixes()[0], 3, cache)
    for run in runs:
        name, mebibytes, questions = run.split(":")
        settings, limit = CONFIGS[name], int(mebibytes) * MIB
        store = PrefixStore(folder, host_bytes=limit)
        _settle()
        baseline = _memory("VmRSS:")
        _forget_peak()
        for number in range(int(questions)):
            for prefix in prefixes():
                with ContiguousKVCache(model, prefix, store=store, config=settings) as cache:
                    assert cache.stats.tokens_from_store == TOKENS
                    _question(model, prefix, 10 + number, cache)
        peak = _memory("VmHWM:")
        _settle()
        report = {
            "config": name,
            "limit": limit,
            "peak": peak - baseline,
            "own": KV_BYTES if settings.budget == 1.0 else int(KV_BYTES * (settings.budget + 1 / 128)),
            "kept": _memory("VmRSS:") - baseline,
            "held": store.inner.memory.host.held_bytes,
            "tier_peak": store.inner.memory.host.peak_bytes,
        }
        print(json.dumps(report), flush=True)
        store.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
