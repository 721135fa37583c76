"""A fingerprint follows the weights and their use, not names, and is cheap to ask for again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from hf_contiguouskv.errors import UnsupportedModelError
from hf_contiguouskv.model import fingerprint
from hf_contiguouskv.model.fingerprint import model_fingerprint


def make_model(seed: int = 0, **changes: object) -> PreTrainedModel:
    fields: dict[str, object] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    }
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(LlamaConfig(**(fields | changes))).eval()


def weight(model: PreTrainedModel) -> torch.nn.Parameter:
    return model.model.layers[1].self_attn.k_proj.weight


def test_equal_models_have_equal_fingerprints_wherever_they_come_from(tmp_path: Path) -> None:
    model = make_model()
    first = model_fingerprint(model)
    assert len(first) == 32
    assert model_fingerprint(model) == first
    assert model_fingerprint(make_model()) == first
    assert model_fingerprint(copy.deepcopy(model)) == first
    model.save_pretrained(tmp_path / "moved")
    assert model_fingerprint(AutoModelForCausalLM.from_pretrained(tmp_path / "moved")) == first


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"rms_norm_eps": 1e-3},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"num_key_value_heads": 4},
        {"hidden_act": "gelu"},
    ],
)
def test_other_weights_or_another_configuration_differ(changes: dict[str, object]) -> None:
    assert model_fingerprint(make_model(**changes)) != model_fingerprint(make_model())  # type: ignore[arg-type]


def add_in_place(model: PreTrainedModel) -> None:
    with torch.no_grad():
        weight(model).add_(0.01)


def edit_one_number(model: PreTrainedModel) -> None:
    with torch.no_grad():
        weight(model)[3, 5] += 1


def edit_past_autograd(model: PreTrainedModel) -> None:
    weight(model).data.mul_(1.5)


def replace_data(model: PreTrainedModel) -> None:
    weight(model).data = weight(model).data + 0.5


def replace_parameter(model: PreTrainedModel) -> None:
    model.model.layers[1].self_attn.k_proj.weight = torch.nn.Parameter(torch.zeros_like(weight(model)))


def change_theta(model: PreTrainedModel) -> None:
    model.config.rope_parameters["rope_theta"] = 123.0


def change_rope(model: PreTrainedModel) -> None:
    model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


def change_dtype(model: PreTrainedModel) -> None:
    model.to(torch.bfloat16)


@pytest.mark.parametrize(
    "change",
    [
        add_in_place,
        edit_one_number,
        edit_past_autograd,
        replace_data,
        replace_parameter,
        change_theta,
        change_rope,
        change_dtype,
    ],
)
def test_changing_the_model_changes_it(change: Callable[[PreTrainedModel], None]) -> None:
    model = make_model()
    before = model_fingerprint(model)
    change(model)
    assert model_fingerprint(model) != before


def test_one_edited_number_of_a_large_tensor_is_seen_when_torch_counts_the_edit() -> None:
    model = make_model(vocab_size=40_000)
    embedding = model.model.embed_tokens.weight
    first = model_fingerprint(model)
    # A place that sampling does not look at.
    with torch.no_grad():
        embedding[1000, 1] += 1
    second = model_fingerprint(model)
    assert second != first
    assert model_fingerprint(model) == second


def test_names_attention_and_generation_settings_do_not_count() -> None:
    model = make_model()
    before = model_fingerprint(model)
    model.set_attn_implementation("eager")
    model.config._name_or_path = "elsewhere"
    model.config.use_cache = False
    model.config.eos_token_id = 7
    model.generation_config.temperature = 0.3
    model.train()
    model.requires_grad_(False)
    assert model_fingerprint(model) == before
    # Neither when the cheap signature is not at hand.
    assert model_fingerprint(copy.deepcopy(model)) == before


def test_models_made_in_inference_mode_are_served() -> None:
    with torch.inference_mode():
        model = make_model()
        first = model_fingerprint(model)
        assert model_fingerprint(model) == first
        weight(model).add_(1)
        assert model_fingerprint(model) != first


def test_quantised_weights_that_wrap_other_tensors_count() -> None:
    class Wrapped(torch.nn.Module):
        def __init__(self, scale: float) -> None:
            super().__init__()
            self.codes = torch.nn.Parameter(torch.arange(100, dtype=torch.uint8), requires_grad=False)
            self.register_buffer("scale", torch.tensor(scale))
            self.register_buffer("scratch", torch.rand(3), persistent=False)

    assert model_fingerprint(Wrapped(1.0)) == model_fingerprint(Wrapped(1.0))
    assert model_fingerprint(Wrapped(1.0)) != model_fingerprint(Wrapped(2.0))


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_model().config)
    with pytest.raises(UnsupportedModelError, match="meta"):
        model_fingerprint(model)


def test_offloaded_weights_are_read_from_their_map() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = make_model()
    before = model_fingerprint(model)
    accelerate.cpu_offload(model, execution_device="cpu")
    assert weight(model).device.type == "meta"
    assert model_fingerprint(model) == before
    with torch.no_grad():
        assert model(torch.arange(4)[None]).logits.shape == (1, 4, 512)
    assert model_fingerprint(model) == before


def test_switching_merging_and_disabling_adapters_changes_it() -> None:
    peft = pytest.importorskip("peft")
    model = make_model()
    plain = model_fingerprint(model)
    config = peft.LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(model, config, adapter_name="one")
    wrapped.add_adapter("two", config)
    seen = [plain]

    def differs() -> None:
        now = model_fingerprint(wrapped)
        assert now not in seen
        # The cache may be given the model inside the wrapper.
        assert model_fingerprint(wrapped.get_base_model()) == now
        seen.append(now)

    differs()
    one = seen[-1]
    wrapped.set_adapter("two")
    differs()
    wrapped.set_adapter("one")
    assert model_fingerprint(wrapped) == one
    with wrapped.disable_adapter():
        differs()
    assert model_fingerprint(wrapped) == one
    wrapped.merge_adapter()
    differs()


def test_asking_again_reads_no_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    first = model_fingerprint(model)
    read: list[torch.Tensor] = []
    sample = fingerprint.sample
    monkeypatch.setattr(fingerprint, "sample", lambda tensor: read.append(tensor) or sample(tensor))
    assert {model_fingerprint(model) for _ in range(20)} == {first}
    assert read == []
    model.config.rms_norm_eps = 0.5
    assert model_fingerprint(model) != first
    assert len(read) > 20


def test_a_model_is_forgotten_with_its_last_user() -> None:
    import gc

    model = make_model()
    model_fingerprint(model)
    gc.collect()
    known = len(fingerprint._known)
    del model
    gc.collect()
    assert len(fingerprint._known) == known - 1


def test_frequencies_of_rope_that_a_dtype_has_rounded_differ() -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    before = model_fingerprint(model)
    model.to(torch.bfloat16).float()
    assert model_fingerprint(model) != before
