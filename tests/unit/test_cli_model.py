"""The commands that need a model: what `warm` stores is found by a program that loads the model by name."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from contract.models import build
from test_cli import run, run_json
from transformers import AutoModelForCausalLM

import hf_contiguouskv.cli.warm as warm_command
from hf_contiguouskv.errors import StoreError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.inner import StoreInner


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[3 + ord(letter) % 100 for letter in text]])}


@pytest.fixture
def small_model(monkeypatch: pytest.MonkeyPatch) -> Any:
    model = build("llama", layers=2)
    monkeypatch.setattr(warm_command, "load_model", lambda name, dtype: (model, Letters()))
    return model


def test_warm_stores_files(tmp_path: Path, store_path: Path, small_model: Any) -> None:
    for name, text in (("a.txt", "x" * 40), ("b.txt", "x" * 40 + "y" * 30)):
        (tmp_path / name).write_text(text)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    text = run("warm", store_path, files[0])
    assert text.exit_code == 0, text.stderr
    assert f"{files[0]}: 40 tokens, 0 were stored, 40 computed" in text.stdout
    assert text.stdout.endswith(", KV in float32 (the model's own)\n")
    report = run_json("warm", store_path, *files, files[0])
    done = [(file["tokens"], file["tokens_from_store"], file["tokens_computed"]) for file in report["files"]]
    assert [file["file"] for file in report["files"]] == [str(file) for file in files]
    assert (report["dtype"], report["failed"]) == ("float32", [])
    assert done[0] == (40, 40, 0)
    assert (done[1][0], done[1][1] + done[1][2]) == (70, 70)
    assert done[1][1] >= 32
    with PrefixStore(store_path) as store:
        assert store.match(small_model, Letters()("x" * 40 + "y" * 30)["input_ids"]) == 70


@pytest.mark.parametrize("saved", [torch.bfloat16, torch.float32])
def test_what_warm_stores_is_found_by_whoever_loads_the_model_by_name(
    tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch, saved: torch.dtype
) -> None:
    build("llama", layers=2).to(saved).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("transformers.AutoTokenizer", SimpleNamespace(from_pretrained=lambda _: Letters()))
    (tmp_path / "a.txt").write_text("x" * 40)
    arguments = ("warm", store_path, tmp_path / "a.txt", "--model", tmp_path / "model")
    by_name = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert run_json(*arguments)["dtype"] == str(by_name.dtype).removeprefix("torch.")
    ids = Letters()("x" * 40)["input_ids"]
    with PrefixStore(store_path) as store:
        assert store.match(by_name, ids) == 40
        assert store.match(by_name.to(torch.float16), ids) == 0
    assert run_json(*arguments, "--dtype", "float16")["dtype"] == "float16"
    in_half = run(*arguments, "--dtype", "float16").stdout
    assert in_half.endswith(", KV in float16\n")
    with PrefixStore(store_path) as store:
        assert store.match(AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16), ids) == 40


def test_warm_takes_line_ends_as_they_are(tmp_path: Path, store_path: Path, small_model: Any) -> None:
    text = "one line\r\nand another\rand a third\n" * 3
    (tmp_path / "a.txt").write_bytes(text.encode())
    assert run_json("warm", store_path, tmp_path / "a.txt")["files"][0]["tokens"] == len(text)
    with PrefixStore(store_path) as store:
        assert store.match(small_model, Letters()(text)["input_ids"]) == len(text)


BAD = {
    "missing": (None, "FileNotFoundError", "No such file"),
    "folder": (None, "IsADirectoryError", "Is a directory"),
    "empty": (b"", "InputError", "is empty"),
    "binary": (b"\xff\xfe", "InputError", "not UTF-8"),
    "long": (b"x" * 2000, "InputError", "2000 tokens, more than the 1024"),
}


@pytest.fixture
def bad_files(tmp_path: Path) -> list[Path]:
    """One of each kind of `BAD`, in order."""
    (tmp_path / "folder").mkdir()
    for name, (content, _, _) in BAD.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
    return [tmp_path / name for name in BAD]


def test_warm_names_files_that_it_cannot_store(bad_files: list[Path], store_path: Path, small_model: Any) -> None:
    for file, (_, kind, words) in zip(bad_files, BAD.values(), strict=True):
        result = run("warm", store_path, file)
        assert result.exit_code == 1
        assert file.name in result.stderr
        assert words in result.stderr
        assert result.stderr.count("\n") == 1
        for_programs = run("warm", store_path, file, "--json")
        assert (for_programs.exit_code, for_programs.stderr) == (1, result.stderr)
        report = json.loads(for_programs.stdout)
        assert report["files"] == []
        assert report["failed"][0]["error"]["type"] == kind


def test_warm_stores_the_good_files_beside_bad_ones(
    tmp_path: Path, bad_files: list[Path], store_path: Path, small_model: Any
) -> None:
    good = [tmp_path / "a.txt", tmp_path / "b.txt"]
    for file, letter in zip(good, "xy", strict=True):
        file.write_text(letter * 40)
    result = run("warm", store_path, good[0], *bad_files, good[1])
    assert result.exit_code == 1
    assert [line.split(":")[0] for line in result.stdout.splitlines()] == [*map(str, good), str(store_path)]
    # (A line of the bar, which a terminal writes over, may stand before.)
    said = [line for line in result.stderr.splitlines() if line.startswith("contiguouskv: ")]
    assert sorted(words in line for line, (_, _, words) in zip(said, BAD.values(), strict=True)) == [True] * len(BAD)
    with PrefixStore(store_path) as store:
        assert [store.match(small_model, Letters()(letter * 40)["input_ids"]) for letter in "xy"] == [40, 40]
    report = json.loads(run("warm", store_path, good[0], *bad_files, good[1], "--json").stdout)
    assert [file["file"] for file in report["files"]] == [*map(str, good)]
    assert [failed["file"] for failed in report["failed"]] == [*map(str, bad_files)]


def test_no_model_is_loaded_and_no_store_made_where_no_file_can_be_read(
    tmp_path: Path, store_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_command, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    assert run("warm", store_path, tmp_path / "missing").exit_code == 1
    assert not store_path.exists()


def test_warm_ends_with_status_2_when_the_store_takes_nothing(
    tmp_path: Path, store_path: Path, small_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise StoreError("the disk is full")

    monkeypatch.setattr(StoreInner, "begin_segment", refuse)
    (tmp_path / "a.txt").write_text("x" * 40)
    result = run("warm", store_path, tmp_path / "a.txt", tmp_path / "missing", "--json")
    assert result.exit_code == 2
    report = json.loads(result.stdout)
    assert report["error"] == {"type": "StoreError", "message": "1 of 1 could not be stored"}
    assert [failed["file"] for failed in report["failed"]] == [str(tmp_path / "missing")]


@pytest.mark.parametrize("as_json", [False, True])
def test_a_missing_model_is_one_line(tmp_path: Path, store_path: Path, as_json: bool) -> None:
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "config.json").write_text("{}")
    for name in ("nobody/nothing", tmp_path):
        result = run("warm", store_path, tmp_path / "a.txt", "--model", name, *(["--json"] if as_json else []))
        assert result.exit_code == 2
        assert result.stderr.startswith(f"contiguouskv: cannot load the model '{name}': ")
        assert result.stderr.count("\n") == 1
        if as_json:
            assert json.loads(result.stdout)["error"]["type"] == "InputError"
