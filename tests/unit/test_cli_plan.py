"""`contiguouskv plan` shows bytes and times of every system, or says in one line what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_cli import run, run_json
from transformers import LlamaConfig

from hf_contiguouskv.planning.forecast import systems


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The configuration of a model, and nothing else."""
    path = tmp_path_factory.mktemp("configuration")
    LlamaConfig(
        vocab_size=32_000,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        max_position_embeddings=65_536,
        dtype="bfloat16",
    ).save_pretrained(path)
    return path


def plan(folder: Path, *options: object) -> Any:
    return run_json("plan", "--model", folder, "--prefix-tokens", 8192, *options)


def test_every_system_has_its_bytes_and_its_time(folder: Path) -> None:
    found = plan(folder)
    by_name = {one["system"]: one for one in found["systems"]}
    assert list(by_name) == [one.name for one in systems()]
    kv = 2 * 16 * 4 * 64 * 2
    assert found["model"]["kv_bytes_per_token"] == kv
    assert by_name["reload"]["disk_bytes"] == by_name["reload"]["read_bytes"] == kv * 8192
    assert by_name["contiguouskv"]["read_bytes"] < by_name["contiguouskv@1"]["read_bytes"] == kv * 8192
    assert by_name["recompute"]["speed_up"] == 1.0
    assert all(one["ttft_s"] > found["floor_s"] for one in by_name.values())


def test_the_table_has_a_line_for_each_system_and_says_what_follows(folder: Path) -> None:
    result = run("plan", "--model", folder, "--prefix-tokens", 8192)
    assert result.exit_code == 0, result.stderr
    for system in systems():
        assert any(line.startswith(system.title) for line in result.stdout.splitlines())
    assert "8,192 stored tokens and 32 new ones" in result.stdout
    assert "with exact answers" in result.stdout
    assert "predicted" in result.stdout


def test_slower_storage_slows_what_reads_much_and_never_what_reads_nothing(folder: Path) -> None:
    fast = {one["system"]: one["ttft_s"] for one in plan(folder)["systems"]}
    slow = {one["system"]: one["ttft_s"] for one in plan(folder, "--link-gbps", 0.1)["systems"]}
    far = {one["system"]: one["ttft_s"] for one in plan(folder, "--link-latency-ms", 5)["systems"]}
    assert slow["recompute"] == far["recompute"] == fast["recompute"]
    assert slow["attentionstore+overlap"] > 5 * fast["attentionstore+overlap"]
    # One read after the other meets the way 5 ms long a thousand times, reads ahead meet it once.
    assert far["reload"] - fast["reload"] > 50 * (far["attentionstore+overlap"] - fast["attentionstore+overlap"])


def test_a_machine_can_be_described_by_its_speeds(folder: Path) -> None:
    found = plan(folder, "--gpu", "none", "--tflops", 0.3, "--memory-gbps", 18)
    assert found["machine"]["bus_s"] is None
    assert found["machine"]["flops_s"] == 0.3e12
    card = plan(folder, "--gpu", "l4", "--pcie-gbps", 7, "--tflops", 100, "--memory-gbps", 200)["machine"]
    assert (card["bus_s"], card["flops_s"], card["memory_s"]) == (7e9, 1e14, 2e11)


def test_a_budget_of_one_leaves_the_exact_request_alone(folder: Path) -> None:
    names = [one["system"] for one in plan(folder, "--budget", 1.0)["systems"]]
    assert "contiguouskv" not in names
    assert names[-1] == "contiguouskv@1"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--gpu", "abacus"), "--gpu must be one of a100"),
        (("--gpu", "none"), "needs --tflops and --memory-gbps"),
        (("--disk-gbps", 0), "--disk-gbps must be above zero"),
        (("--link-latency-ms", -1), "--link-latency-ms must not be below zero"),
        (("--budget", 2), "budget"),
        (("--suffix-tokens", 60_000), "more than the 65,536"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(folder: Path, options: tuple[object, ...], words: str) -> None:
    arguments = ("plan", "--model", folder, "--prefix-tokens", 8192, *options)
    result = run(*arguments)
    assert result.exit_code == 2
    assert words in result.stderr
    assert result.stderr.count("\n") == 1
    assert json.loads(run(*arguments, "--json").stdout)["error"]["type"] in ("InputError", "ConfigError")


def test_a_model_that_cannot_be_served_is_refused_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "falcon", "num_hidden_layers": 1}))
    result = run("plan", "--model", tmp_path, "--prefix-tokens", 100)
    assert result.exit_code == 2
    assert "computes attention itself" in result.stderr
