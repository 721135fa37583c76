"""How a system is written with its budget and options, and which settings answer alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama

from eval.systems import DEFAULT_SYSTEMS, SYSTEMS, OptionKind, Setting, SystemUnavailableError


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("impress@0.1+overlap", [Setting("impress", 0.1, ("overlap",))]),
        ("impress+overlap+groups", [Setting("impress", budget, ("groups", "overlap")) for budget in (0.05, 0.25)]),
        ("in_memory+dynamic", [Setting("in_memory", 1.0, ("dynamic",))]),
        ("flexgen+host=0.5", [Setting("flexgen", 1.0, ("host=0.5",))]),
        ("contiguouskv@1", [Setting("contiguouskv", 1.0)]),
        ("no_prefix", [Setting("no_prefix", 1.0)]),
        ("kept_tokens", [Setting("kept_tokens", budget) for budget in (0.05, 0.25)]),
    ],
)
def test_a_setting_is_read_as_it_is_written(text: str, expected: list[Setting]) -> None:
    found = Setting.parse(text, (0.05, 0.25))
    assert found == expected
    for setting in found:
        again = Setting.parse(setting.label, (setting.budget,))
        assert again == [setting]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "system must be one of"),
        ("impress+fast", r"impress has no option 'fast': its options are \['overlap', 'groups', 'blocks'\]"),
        ("impress+overlap=1", "takes no value"),
        ("contiguouskv_paper+period", "a whole number from 1"),
        ("contiguouskv_paper+period=0", "a whole number from 1"),
        ("contiguouskv_paper+chunk=3", "power of two"),
        ("contiguouskv_paper+period=2+subperiod=3", "subperiod must be"),
        ("impress+overlap+overlap", "written twice"),
        ("flexgen+host", "a share from 0 to 1 must follow host="),
        ("flexgen+host=1.5", "a share from 0 to 1"),
        ("flexgen+host=nan", "a share from 0 to 1"),
        ("flexgen+host=0.6+device=0.6", "must be 1 together"),
        ("in_memory@0.5", "of systems that choose"),
        ("no_prefix@0.5", "of systems that choose"),
        ("kept_tokens+exact", "kept_tokens has no option .exact."),
        ("contiguouskv@0", "from 0 .not included. to 1"),
        ("contiguouskv@x+exact", "must follow the @"),
    ],
)
def test_what_no_system_can_do_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Setting.parse(text, (0.1,))


def test_settings_that_differ_in_time_only_answer_as_one() -> None:
    def answers(text: str) -> Setting:
        return Setting.parse(text, (0.1,))[0].answers_as()

    whole = Setting("in_memory", 1.0)
    for text in ("recompute", "reload", "in_memory+dynamic", "attentionstore+overlap", "flexgen+host=0.5", "in_memory"):
        assert answers(text) == whole
    assert answers("attentionstore_h2o+lfu+overlap") == Setting("attentionstore_h2o", 0.1)
    assert answers("impress+overlap+groups+blocks") == Setting("impress", 0.1, ("blocks", "groups"))
    assert answers("contiguouskv_paper+period=4+subperiod=4") == Setting("contiguouskv_paper", 0.1, ("period=4",))
    assert answers("contiguouskv+exact") == Setting("contiguouskv", 0.1, ("exact",))
    assert answers("contiguouskv@1.0") == Setting("contiguouskv", 1.0)
    assert answers("kept_tokens@0.3") == Setting("contiguouskv", 0.3)
    assert answers("no_prefix") == Setting("no_prefix", 1.0)


def test_only_streams_tell_evictions_apart() -> None:
    found = {text: Setting.parse(text, (0.1,))[0].only_in_streams for text in DEFAULT_SYSTEMS}
    assert [text for text, only in found.items() if only] == ["attentionstore_h2o+lfu"]


def test_defaults_are_settings_of_every_system() -> None:
    # The others are bounds of what systems can do.
    bounds = {"no_prefix", "kept_tokens"}
    assert {Setting.parse(text, (0.1,))[0].system for text in DEFAULT_SYSTEMS} == set(SYSTEMS) - bounds
    assert SYSTEMS["impress"].option("groups") == OptionKind("groups", changes_answers=True)


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_a_system_is_called_as_its_setting(model: Any, tmp_path: Path, name: str) -> None:
    kind = SYSTEMS[name]
    plain = [Setting(name, 0.5 if kind.takes_budget else 1.0)]
    for option in kind.options:
        if option.name != "device":
            value = {"": "", "share": "=0.5", "count": "=1"}[option.value]
            plain.append(Setting(name, plain[0].budget, (f"{option.name}{value}",)))
    for setting in plain:
        with setting.make(model, tmp_path, host_bytes=2**20, read_gbps=1.0) as system:
            assert system.name == setting.label
            assert system.details() == {} or name == "impress"


def test_what_needs_a_device_is_unavailable_on_a_cpu(model: Any, tmp_path: Path) -> None:
    with pytest.raises(SystemUnavailableError, match="the model is on a CPU"):
        Setting("flexgen", 1.0, ("device=0.5",)).make(model, tmp_path)


def test_models_with_sliding_windows_are_not_for_all(tmp_path: Path) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        sliding_window=32,
    )
    windowed = MistralForCausalLM(config).eval()
    for name in ("attentionstore", "flexgen", "attentionstore_h2o", "impress", "no_prefix", "kept_tokens"):
        with pytest.raises(SystemUnavailableError, match="sliding windows"):
            Setting(name, 0.5).make(windowed, tmp_path)
    for name in ("recompute", "in_memory", "reload", "contiguouskv", "contiguouskv_paper"):
        Setting(name, 0.5).make(windowed, tmp_path).__exit__()
