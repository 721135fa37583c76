"""All systems run the same attention, on a CPU too, and leave the model as they found it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from eval.systems import SYSTEMS, InMemory, Recompute, Setting
from eval.systems.attention import BufferedLayer
from hf_contiguouskv.model import attention
from hf_contiguouskv.model.transformers_internals import cache_argument

LAYERS = 3
SHAPE = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE)).eval()


def some_ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 97, (count,), generator=torch.Generator().manual_seed(seed))


PREFIX, SUFFIX = some_ids(200, 1), some_ids(6, 2)


def forward(model: Any, ids: torch.Tensor, cache: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids[None], use_cache=True, **{cache_argument(model): cache}).logits[0, -len(SUFFIX) :]


@pytest.mark.parametrize("text", [*SYSTEMS, "in_memory+dynamic", "attentionstore+overlap", "flexgen+host=0.5"])
def test_suffixes_are_attended_to_by_one_function(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """K and V are not repeated, the kernel's mask is made once, and all that is used answers as `recompute`."""
    expected = forward(model, SUFFIX if text == "no_prefix" else torch.cat([PREFIX, SUFFIX]), None)
    before = model.config._attn_implementation
    with Setting.parse(text, (1.0,))[0].make(model, tmp_path) as system:
        system.store(PREFIX)
        system.enter(system.states[-1], PREFIX, SUFFIX)
        cache = system.cache(PREFIX)
        watched = mock.Mock(wraps=attention.attend)
        monkeypatch.setattr(attention, "attend", watched)
        if text == "recompute":  # All of the prompt at once needs no mask, so there is nothing that could be repeated.
            forward(model, PREFIX, cache)
            assert not watched.called
        found = forward(model, SUFFIX, cache)
        # The suffix alone needs no mask either.
        assert watched.call_count == (0 if text == "no_prefix" else LAYERS)
        assert len({id(call.args[3]) for call in watched.call_args_list}) == (0 if text == "no_prefix" else 1)
        assert all(call.args[1].shape[1] == 2 for call in watched.call_args_list)
        system.finish(cache)
    # What contiguouskv packs is not what it was.
    near = {"atol": 0.2, "rtol": 0.2} if text == "contiguouskv" else {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(found, expected, **near)
    assert model.config._attn_implementation == before


def test_a_request_that_was_given_up_leaves_the_model_as_it_was(model: Any, tmp_path: Path) -> None:
    before = model.config._attn_implementation
    for text in ("recompute", "in_memory", "reload", "attentionstore"):
        with Setting.parse(text, (1.0,))[0].make(model, tmp_path) as system:
            system.store(PREFIX)
            system.cache(PREFIX)
            assert model.config._attn_implementation != before
        assert model.config._attn_implementation == before


def test_models_with_sliding_windows_use_their_own_attention_and_say_so(tmp_path: Path) -> None:
    torch.manual_seed(0)
    windowed = MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=32)).eval()
    expected = forward(windowed, torch.cat([PREFIX, SUFFIX]), None)
    for text in ("recompute", "in_memory", "in_memory+dynamic"):
        with Setting.parse(text, (1.0,))[0].make(windowed, tmp_path) as system:
            system.store(PREFIX)
            assert "sliding windows" in system.details()["attention"]
            for _ in range(2):
                cache = system.cache(PREFIX)
                ids = torch.cat([PREFIX, SUFFIX]) if text == "recompute" else SUFFIX
                torch.testing.assert_close(forward(windowed, ids, cache), expected, atol=1e-4, rtol=1e-4)
                system.finish(cache)


def test_eager_models_attend_as_eager_models_do(tmp_path: Path) -> None:
    torch.manual_seed(0)
    eager = LlamaForCausalLM._from_config(LlamaConfig(**SHAPE), attn_implementation="eager").eval()
    expected = forward(eager, torch.cat([PREFIX, SUFFIX]), None)
    with InMemory(eager) as system:
        system.store(PREFIX)
        torch.testing.assert_close(forward(eager, SUFFIX, system.cache(PREFIX)), expected, atol=1e-4, rtol=1e-4)


def test_details_are_empty_where_nothing_is_to_be_said(model: Any) -> None:
    assert Recompute(model).details() == {}


def test_what_a_request_adds_lies_behind_the_prefix(model: Any) -> None:
    with InMemory(model) as system:
        system.store(PREFIX)
        cache = system.cache(PREFIX)
        where = [layer.keys.data_ptr() for layer in cache.layers]
        before = [layer.keys.clone() for layer in cache.layers]
        forward(model, SUFFIX, cache)
        assert [layer.keys.data_ptr() for layer in cache.layers] == where
        assert cache.get_seq_length() == len(PREFIX) + len(SUFFIX)
        cache.crop(-2)
        assert cache.get_seq_length() == len(PREFIX) + len(SUFFIX) - 2
        system.finish(cache)
        assert cache.get_seq_length() == len(PREFIX)
        for layer, keys in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys, keys)


def test_a_buffer_that_is_full_grows() -> None:
    layer = BufferedLayer(torch.empty(2, 1, 2, 4, 8))
    states = torch.randn(2, 1, 2, 700, 8)
    for begin in range(0, 700, 70):
        keys, values = layer.update(states[0, :, :, begin : begin + 70], states[1, :, :, begin : begin + 70])
    assert torch.equal(keys, states[0])
    assert torch.equal(values, states[1])
    layer.crop(-650)
    assert layer.get_seq_length() == 50
    assert torch.equal(layer.keys, states[0, :, :, :50])
    with pytest.raises(ValueError, match="negative"):
        layer.crop(3)
    layer.reset()
    assert layer.get_seq_length() == 0
