"""Systems find what they were brought to, state by state, and answer alike from all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eval.systems import (
    AttentionStore,
    AttentionStoreH2O,
    ContiguousKV,
    Impress,
    State,
    departure,
)
from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.transformers_internals import cache_argument

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 8


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=6 * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


def some_ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed))


PREFIX, SUFFIX = some_ids(500, 1), some_ids(6, 2)

TIERED: dict[str, Callable[..., Any]] = {
    "contiguouskv": lambda model, folder, **options: ContiguousKV(
        "contiguouskv", model, folder, ContiguousKVConfig(budget=0.2), **options
    ),
    "contiguouskv_paper": lambda model, folder, **options: ContiguousKV(
        "contiguouskv_paper", model, folder, ContiguousKVConfig.paper(0.2), **{"eviction": "published"} | options
    ),
    "contiguouskv_whole": lambda model, folder, **options: ContiguousKV(
        "contiguouskv_whole", model, folder, ContiguousKVConfig(budget=1.0), **options
    ),
    "attentionstore": lambda model, folder, **options: AttentionStore(model, folder, overlap=False, **options),
    "attentionstore_overlapped": AttentionStore,
    "attentionstore_h2o": lambda model, folder, **options: AttentionStoreH2O(model, folder, 0.1, **options),
    "impress": lambda model, folder, **options: Impress(model, folder, 0.1, **options),
    "impress_groups": lambda model, folder, **options: Impress(model, folder, 0.1, probes="groups", **options),
}
WHOLE = ("contiguouskv_whole", "attentionstore", "attentionstore_overlapped")


def ask(model: Any, system: Any) -> tuple[torch.Tensor, Any]:
    cache = system.cache(PREFIX)
    with torch.no_grad():
        logits = model(input_ids=SUFFIX[None], **{cache_argument(model): cache}).logits[0]
    return logits, system.finish(cache)


@pytest.mark.parametrize("named", [False, True], ids=["everything", "what the suffix uses"])
@pytest.mark.parametrize("name", list(TIERED))
def test_requests_find_the_state_and_answer_alike(model: Any, tmp_path: Path, name: str, named: bool) -> None:
    suffix = SUFFIX if named else None
    with TIERED[name](model, tmp_path) as system:
        system.store(PREFIX)
        expected, _ = ask(model, system)
        keys = () if name in WHOLE else (State.KEYS_RESIDENT,)
        assert system.states == (State.COLD, *keys, State.WARM_HOST)
        read = {}
        for state in (*system.states, *reversed(system.states)):
            for _ in range(2):
                system.enter(state, PREFIX, suffix)
                logits, stats = ask(model, system)
                assert departure(state, stats) is None
                torch.testing.assert_close(logits, expected, rtol=0, atol=0)
                read[state] = stats.bytes_read
        if keys:
            assert 0 < read[State.KEYS_RESIDENT] < read[State.COLD]
        with pytest.raises(ValueError, match="on a CPU nothing is on a device"):
            system.enter(State.WARM_DEVICE, PREFIX)
