"""What the library knows of a model is found out once, from the model inside all wrappers, and holds nothing alive."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from hf_contiguouskv.errors import InputError, UnsupportedModelError
from hf_contiguouskv.model import served_model
from hf_contiguouskv.model.served_model import ServedModel

from .models import build


class Wrapper(nn.Module):
    """As PEFT's: it has a base model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def get_base_model(self) -> nn.Module:
        return self.inner


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt-neox"])
def test_it_describes_the_model(family):
    model = build(family)
    served = ServedModel(model)
    text = model.config.get_text_config(decoder=True)
    geometry = served.geometry(8)
    assert len(served.windows) == text.num_hidden_layers == geometry.num_layers
    assert geometry.chunk_size == 8
    assert geometry.dtype == served.shape.dtype == torch.float32
    assert served.query_heads == text.num_attention_heads
    assert set(geometry.indexed_layers) == {n for n, window in enumerate(served.windows) if window is None}
    assert set(served.layers.devices) == {torch.device("cpu")}
    assert not served.is_multimodal


def test_wrappers_are_taken_off_once():
    model = build("llama")
    served = ServedModel(Wrapper(Wrapper(model)))
    assert served.lm is model
    assert served.fingerprint() == ServedModel(model).fingerprint()


def test_a_trial_forward_is_made_once_for_all_caches_and_again_when_the_dtype_changes(monkeypatch):
    tried: list[nn.Module] = []
    real = served_model.try_forward

    def counted(model, windows):
        tried.append(model)
        return real(model, windows)

    monkeypatch.setattr(served_model, "try_forward", counted)
    model = build("llama")
    served = ServedModel(model)
    assert served.shape == ServedModel(model).shape == ServedModel(Wrapper(model)).shape
    assert tried == [model]
    model.to(torch.float16)
    assert served.shape.dtype == torch.float16
    assert tried == [model, model]


def test_what_others_measure_is_found_by_every_cache_on_the_model():
    model, other = build("llama"), build("llama")
    ServedModel(model).measured["speed"] = 3
    assert ServedModel(model).measured["speed"] == 3
    assert "speed" not in ServedModel(other).measured


def test_it_holds_the_model_weakly_and_says_so_when_it_is_gone():
    model = build("llama")
    served, gone = ServedModel(model), weakref.ref(model)
    assert served.shape.kv_heads > 0
    assert copy.deepcopy(served) is served
    del model
    gc.collect()
    assert gone() is None
    with pytest.raises(InputError, match="gone"):
        _ = served.lm


def test_a_model_that_its_configuration_rules_out_is_refused_before_it_runs():
    model = build("llama")
    model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        ServedModel(model)


def test_what_is_no_model_of_transformers_is_refused():
    with pytest.raises(UnsupportedModelError, match="no config"):
        ServedModel(nn.Linear(1, 1))
