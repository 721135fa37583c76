"""State that modules save besides parameters and buffers counts; what cannot be read is refused."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from test_fingerprint import make_model
from transformers import PreTrainedModel

from hf_contiguouskv.errors import UnsupportedModelError
from hf_contiguouskv.model import fingerprint
from hf_contiguouskv.model.fingerprint import model_fingerprint
from hf_contiguouskv.model.saved_state import saves_more

# Quantised tensors of torch's own are on their way out.
pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated:")


# ---- packed weights of `quantize_dynamic` ----


def quantised(model: torch.nn.Module, dtype: torch.dtype = torch.qint8) -> torch.nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, dtype=dtype, inplace=True)


def fine_tuned(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that differs in the values of one layer."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight.add_(0.3)
    return other


@pytest.mark.parametrize("dtype", [torch.qint8, torch.float16])
def test_packed_weights_count(dtype: torch.dtype) -> None:
    plain = make_model()
    other = quantised(fine_tuned(plain), dtype)
    first, same = quantised(copy.deepcopy(plain), dtype), quantised(copy.deepcopy(plain), dtype)
    assert model_fingerprint(first) == model_fingerprint(same)
    assert model_fingerprint(first) != model_fingerprint(other)
    assert model_fingerprint(first) != model_fingerprint(plain)
    with torch.no_grad():
        first(torch.arange(4)[None])
    assert model_fingerprint(first) == model_fingerprint(same) == model_fingerprint(copy.deepcopy(first))


def test_a_packed_weight_that_is_replaced_is_noticed() -> None:
    model = quantised(make_model())
    packed = model.model.layers[1].self_attn.v_proj._packed_params
    before = model_fingerprint(model)
    weight, bias = packed._weight_bias()
    seen = {before}
    for zero_point in (1, 2, 3, 4):
        other = torch._make_per_tensor_quantized_tensor(weight.int_repr(), weight.q_scale(), zero_point)
        # The second of two often lies where the one before the first did.
        packed.set_weight_bias(weight, bias)
        packed.set_weight_bias(other, bias)
        now = model_fingerprint(model)
        assert now not in seen
        seen.add(now)
    packed.set_weight_bias(weight, bias)
    assert model_fingerprint(model) == before


def test_packed_weights_are_unpacked_only_when_they_are_new(monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantised(make_model())
    model_fingerprint(model)
    unpacked = []

    def counted(name: str, module: torch.nn.Module) -> bytes:
        unpacked.append(name)
        return b"other"

    monkeypatch.setattr(fingerprint, "saved_beyond", counted)
    model.config.rms_norm_eps = 0.5
    model_fingerprint(model)
    assert unpacked == []
    packed = model.model.layers[0].mlp.up_proj._packed_params
    packed.set_weight_bias(*packed._weight_bias())
    model_fingerprint(model)
    assert unpacked == ["model.layers.0.mlp.up_proj._packed_params"]


# ---- any other state ----


class Stateful(torch.nn.Module):
    """Saves `state` in one of the two ways."""

    def __init__(self, state: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("scratch", torch.rand(2), persistent=False)
        self.state = state


class Extra(Stateful):
    def get_extra_state(self) -> Any:
        return self.state


class Saving(Stateful):
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "state"] = self.state
        if not keep_vars:
            raise AssertionError("tensors of its own cannot be told from others")


def per_channel(scale: float = 0.5, zero_point: int = 0, axis: int = 0, code: float = 1.0) -> torch.Tensor:
    scales, zero_points = torch.tensor([scale, 0.5]), torch.tensor([zero_point, 0])
    return torch.quantize_per_channel(torch.full((2, 2), code), scales, zero_points, axis, torch.qint8)


def per_tensor(scale: float = 0.5, zero_point: int = 0, code: float = 1.0) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.full((2, 2), code), scale, zero_point, torch.qint8)


def packed(weight: torch.Tensor) -> torch.ScriptObject:
    return torch.ops.quantized.linear_prepack(weight, torch.ones(2))


# Within a line, no two are the same.
with warnings.catch_warnings(action="ignore"):
    DIFFERENT: list[list[Any]] = [
        [torch.ones(3), torch.zeros(3), torch.ones(3, 1), torch.ones(3, dtype=torch.float64), torch.ones(2)],
        [
            per_tensor(),
            per_tensor(scale=0.25, code=0.5),
            per_tensor(zero_point=1),
            per_tensor(code=2.0),
            torch.ones(2, 2),
        ],
        [
            per_channel(),
            per_channel(scale=0.25),
            per_channel(zero_point=1),
            per_channel(axis=1),
            per_channel(code=2.0),
            per_tensor(),
        ],
        [packed(per_tensor()), packed(per_tensor(code=2.0)), packed(per_channel(scale=0.25))],
        [None, 1, 2, 1.5, "1", b"1", float("inf"), 1j, [1], [[1]], {"1": 1}, {1: 1}, {1}],
        [["ab", "c"], ["a", "bc"], ["abc"], "abc", ["ab", ["c"]], ["ab", "c", ""]],
        [{"a": 1, "b": 2}, {"a": 2, "b": 1}, {"a": 1}, {"a": 1, "b": {"b": 2}}],
        [torch.float16, torch.qint8, "torch.float16", torch.per_tensor_affine, torch.per_channel_affine],
        [np.ones(3), np.zeros(3), np.ones(3, dtype=np.float32), np.ones((3, 1)), np.float64(1), 1.0],
        [{"deep": [({"weight": torch.ones(2)},)]}, {"deep": [({"weight": torch.zeros(2)},)]}],
    ]


@pytest.mark.parametrize("kind", [Extra, Saving])
@pytest.mark.parametrize("states", [*DIFFERENT, [1, True, 1.0, "True"]])
def test_states_that_differ_give_fingerprints_that_differ(kind: Callable[[Any], Stateful], states: list[Any]) -> None:
    found = [model_fingerprint(kind(state)) for state in states]
    assert len(set(found)) == len(states)
    for state, first in zip(states, found, strict=True):
        again = state if isinstance(state, torch.ScriptObject) else copy.deepcopy(state)
        assert model_fingerprint(kind(again)) == first


def test_the_order_of_a_dict_the_kind_of_a_sequence_and_the_device_do_not_count() -> None:
    assert model_fingerprint(Extra({"a": 1, "b": 2})) == model_fingerprint(Extra({"b": 2, "a": 1}))
    assert model_fingerprint(Extra((1, 2))) == model_fingerprint(Extra([1, 2]))
    assert model_fingerprint(Extra(torch.device("cpu"))) == model_fingerprint(Extra(torch.device("cuda:1")))


@pytest.mark.parametrize("states", DIFFERENT)
def test_a_state_that_is_replaced_is_noticed(states: list[Any]) -> None:
    module = Extra(states[0])
    first = model_fingerprint(module)
    for state in states[1:]:
        module.state = state
        assert model_fingerprint(module) == model_fingerprint(Extra(state)) != first


def test_a_tensor_in_a_state_that_is_edited_is_noticed() -> None:
    tensor = torch.zeros(100_000)
    module = Extra({"layers": [{"weight": tensor}]})
    first = model_fingerprint(module)
    tensor.add_(1)
    assert model_fingerprint(module) != first


def test_an_attribute_that_appears_is_noticed() -> None:
    class Late(Stateful):
        def get_extra_state(self) -> Any:
            return getattr(self, "late", None)

    one, other = Late(1), Late(1)
    assert model_fingerprint(one) == model_fingerprint(other)
    one.late = 1
    assert model_fingerprint(one) != model_fingerprint(other)
    del one.late
    one.later = 1  # As many attributes as before.
    assert model_fingerprint(one) == model_fingerprint(other)


class Opaque:
    """What nobody can read."""


class Broken(torch.nn.Module):
    def get_extra_state(self) -> Any:
        raise RuntimeError("not now")


REFUSED = {
    "an object": (Extra(Opaque()), "Extra.* saves '_extra_state' with a test_saved_state.Opaque"),
    "an object in a list": (Saving([1, {"a": Opaque()}]), "Saving.* saves 'state' with a test_saved_state.Opaque"),
    "objects in an array": (Extra(np.array([Opaque()])), "numpy array of objects"),
    "a tensor without values": (Extra(torch.ones(2, device="meta")), "saves '_extra_state', which cannot be read"),
    "a sparse tensor": (Extra(torch.ones(2, 2).to_sparse()), "saves '_extra_state', which cannot be read"),
    "an error": (Broken(), r"Broken.* does not say what it saves \(RuntimeError: not now\)"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_read_is_refused_and_says_where_it_is(why: str) -> None:
    module, message = REFUSED[why]
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), module)
    with pytest.raises(UnsupportedModelError, match=message) as refusal:
        model_fingerprint(model)
    assert "module '1' of the model" in str(refusal.value)
    assert "let the module keep it in parameters or buffers" in str(refusal.value)
    with pytest.raises(UnsupportedModelError):  # Nothing is remembered of it.
        model_fingerprint(model)


# ---- models without such state ----


class Fixed:
    """A configuration that no version of a library changes."""

    def __init__(self) -> None:
        self.hidden_size = 96
        self.rope_parameters = {"rope_theta": 1e4, "rope_type": "default"}
        self.architectures = ["Other"]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def pattern(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Numbers that no generator or processor changes."""
    return ((torch.arange(torch.Size(shape).numel()) * 7919 % 1009 - 504) / 1024).reshape(shape).to(dtype)


def test_prefixes_that_are_stored_for_ordinary_models_stay_valid() -> None:
    model = torch.nn.Module()
    model.config = Fixed()
    model.embed = torch.nn.Embedding(512, 96)
    model.proj = torch.nn.Linear(96, 48)
    model.norm = torch.nn.LayerNorm(96, dtype=torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.copy_(pattern(*parameter.shape, dtype=parameter.dtype))
    model.register_buffer("inv_freq", pattern(8), persistent=False)
    model.register_buffer("scale", pattern(3))
    model.register_buffer("scratch", torch.rand(3), persistent=False)
    # Never to be changed: it would orphan everything that anybody has stored.
    assert model_fingerprint(model) == "11bd5cf8d58c2f191f1fa47866038fa2"


def test_modules_that_save_nothing_more_after_all_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    assert not any(saves_more(module) for module in model.modules())
    first, second = model_fingerprint(model), model_fingerprint(Saving(None))
    monkeypatch.setattr(fingerprint, "saves_more", lambda module: False)
    assert (model_fingerprint(make_model()), model_fingerprint(Saving(None))) == (first, second)


def test_what_bitsandbytes_saves_is_left_to_the_scales_of_its_weights() -> None:
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for kind in (bitsandbytes.nn.Linear8bitLt, bitsandbytes.nn.LinearNF4):
        assert not saves_more(kind(32, 32))
