"""Time by prefix length: random prefixes are really stored and read cold, and the table says what was measured."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from eval.growth import random_states, report, run
from eval.random_models import CONFIGS, random_model

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


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(ValueError, match="'gpt9'"):
        random_model("gpt9")


def test_random_states_are_those_of_the_model_and_the_same_each_time(model: Any) -> None:
    states = random_states(model, 100)
    assert len(states.layers) == 3
    for layer, again in zip(states.layers, random_states(model, 100).layers, strict=True):
        assert layer.keys.shape == layer.values.shape == (1, 2, 100, 16)
        assert torch.equal(layer.keys, again.keys)
        assert not torch.equal(layer.keys, layer.values)


def test_all_lengths_and_systems_are_measured_and_shown(model: Any, tmp_path: Path) -> None:
    names = ("attentionstore+overlap", "contiguouskv", "impress+overlap", "in_memory")
    found = run(model, tmp_path, [128, 256], 32, 5, rounds=2, names=names)
    assert [(row["tokens"], row["system"], row["state"]) for row in found["rows"]] == [
        (length, *case)
        for length in (128, 256)
        for case in (
            ("attentionstore+overlap", "cold"),
            ("contiguouskv", "cold"),
            ("contiguouskv", "keys_resident"),
            ("impress+overlap", "cold"),
            ("impress+overlap", "keys_resident"),
            ("in_memory", "warm_host"),
        )
    ]
    read = {(row["tokens"], row["system"], row["state"]): row["stats"]["bytes_read"] for row in found["rows"]}
    for length in (128, 256):
        assert read[length, "contiguouskv", "keys_resident"] < read[length, "contiguouskv", "cold"]
        assert read[length, "contiguouskv", "cold"] < read[length, "attentionstore+overlap", "cold"]
        assert read[length, "attentionstore+overlap", "cold"] == length * 3 * 2 * 32 * 4
    for row in found["rows"]:
        assert row["seconds"]["count"] == row["over_floor"]["count"] == 2
        if row["system"].startswith("contiguouskv"):
            assert row["stats"]["chunks_used"] == [2] * 3
    console = Console(record=True, width=140, file=io.StringIO())
    found["rows"][1]["departed"] = 2
    report(found, console)
    shown = console.export_text()
    assert "requests did not find their state" in shown
    assert shown.count("keys_resident") == 4
    assert "32 tokens used, 5-token suffix" in shown
