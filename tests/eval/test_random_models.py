"""Models of random weights are the same each time, load by name, and take any text; so are K and V."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from eval.models import ModelNotAvailableError, load_model
from eval.random_models import CONFIGS, byte_tokenizer, random_model, random_states

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 64}


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest) -> Any:
    return random_model(request.param, torch.float32, **SHAPE, num_key_value_heads=2)


def test_a_random_model_is_the_same_each_time(model: Any) -> None:
    before = torch.get_rng_state()
    again = random_model(model.config.model_type, torch.float32, **SHAPE, num_key_value_heads=2)
    assert torch.equal(torch.get_rng_state(), before)
    for mine, its in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(mine, its)


def test_random_states_are_those_of_the_model_and_the_same_each_time(model: Any) -> None:
    states = random_states(model, 100)
    assert len(states.layers) == 3
    for layer, again in zip(states.layers, random_states(model, 100).layers, strict=True):
        assert layer.keys.shape == layer.values.shape == (1, 2, 100, 16)
        assert torch.equal(layer.keys, again.keys)
        assert not torch.equal(layer.keys, layer.values)


def test_a_random_model_is_loaded_by_its_name() -> None:
    model, tokenizer = load_model("random:qwen2", dtype="float32")
    assert (model.config.model_type, model.dtype, model.source) == ("qwen2", torch.float32, "random weights")
    assert model.runs_in == "float32 on cpu (as asked)"
    assert tokenizer("")["input_ids"] == []
    with pytest.raises(ModelNotAvailableError, match=r"random:gpt9.*one of \['llama', 'qwen2'\]"):
        load_model("random:gpt9", dtype="float32")


def test_bytes_are_tokens() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("grün\n")["input_ids"]
    assert len(ids) == 6
    assert max(ids) < tokenizer.vocab_size == 256
    assert tokenizer.decode(ids) == "grün\n"
