"""A run makes every request in every system once, says what it was, and survives what befalls it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import save_tiny_model
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer

from eval.report import write_report
from eval.running import NotServedError, RunConfig, RunFolder, RunFolderError, process, run
from eval.running.folder import key_of
from eval.running.phases import PHASES
from eval.running.requests import asked_of
from eval.running.timed import timed_request
from eval.systems import DEFAULT_SYSTEMS, system_named
from eval.tasks import TASKS, Request
from eval.tasks.base import encode

Row = dict[str, Any]
ALL = (*DEFAULT_SYSTEMS, "contiguouskv+exact")
EXACT = [name for name in ALL if system_named(name.partition("+")[0]).exact]
# Only streams show how they differ from others.
IN_STREAMS = ["attentionstore_h2o+lfu"]
# Made for their time alone.
TIMED = [*(name for name in EXACT if name != "in_memory"), "attentionstore_h2o+overlap", "impress+overlap"]
LOSSY = ["attentionstore_h2o", "impress", "impress+groups", "contiguouskv_paper", "contiguouskv", "contiguouskv+exact"]
BUDGETS = (0.1, 0.5)


class Animals:
    """Two prefixes; who lives where (generated), or what a person is (labels of one token and of several)."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.metric = "needle_recall" if name == "animals" else "accuracy"

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        chance = random.Random(f"{self.name} {seed}")
        texts = ["".join(chance.choices("abcdefghij klmno", k=300)) for _ in range(2)]
        found = []
        for number in range(count):
            answer = chance.choice(("cat", "dog"))
            found.append(
                Request(
                    self.name,
                    number,
                    encode(tokenizer, texts[number % 2]),
                    number % 2,
                    encode(tokenizer, f" who lives at {number}? a"),
                    (answer,),
                    choices=() if self.name == "animals" else ("cat", "dog", "a"),
                    max_new_tokens=4,
                    about=(("house", number),),
                )
            )
        return found


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("animals", "kinds"):
        monkeypatch.setitem(TASKS, name, lambda data_dir, name=name: Animals(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    save_tiny_model(place)
    return place


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
    return model, AutoTokenizer.from_pretrained(folder)


def config_of(**changes: Any) -> RunConfig:
    fields: dict[str, Any] = {
        "dtype": "float32",
        "tasks": ("animals", "kinds"),
        "systems": ALL,
        "budgets": BUDGETS,
        "requests": 3,
        "timed_requests": 1,
    }
    return RunConfig(**fields | changes)


def rows_of(out: Path) -> list[Row]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def label(row: Row) -> str:
    """The setting of a row without its budget."""
    return "+".join((row["system"], *row["options"]))


def sentences(data: Path, about: str = "film") -> Path:
    """A data folder with SST-2 in it."""
    for split in ("train", "test"):
        path = data / "sst2" / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = ({"text": f"this is {about} number {number}", "label": number % 2} for number in range(120))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return data


def expected_keys(requests: int, timed: int, budgets: tuple[float, ...]) -> set[Any]:
    found = set()
    for task in ("animals", "kinds"):
        for number in range(requests):
            settings = [("in_memory", 1.0), *((name, budget) for name in LOSSY for budget in budgets)]
            if number < timed:
                settings += [(name, budget) for name in TIMED for budget in ((1.0,) if name in EXACT else budgets)]
            for name, budget in settings:
                system, *options = name.split("+")
                state = "warm_host" if name == "in_memory" else "cold"
                found.add((task, number, None, system, tuple(options), budget, state))
    return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, loaded: tuple[Any, Any]) -> Path:
    out = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("animals", "kinds"):
            patch.setitem(TASKS, name, lambda data_dir, name=name: Animals(name))
        return run(config_of(), out / "run", command="python -m eval run somewhere", progress=False, loaded=loaded)


def test_every_request_has_a_row_in_every_system(finished: Path) -> None:
    rows = rows_of(finished)
    keys = [key_of(row) for row in rows]
    assert len(keys) == len(set(keys))
    assert set(keys) == expected_keys(3, 1, BUDGETS)
    assert sorted(path.name for path in finished.iterdir()) == ["config.json", "machine.json", "rows.jsonl"]
    config = json.loads((finished / "config.json").read_text())
    assert config["command"] == "python -m eval run somewhere"
    assert config["systems"] == list(ALL)
    assert config["states"] == ["cold"]
    assert config["skipped"] == []
    assert (config["processes"], config["requests"], config["seed"]) == (1, 3, 0)
    machine = json.loads((finished / "machine.json").read_text())
    assert machine["cores"] >= 1
    assert set(machine) >= {"instruction_sets", "commit", "disk_gbps", "torch_threads"}


def test_rows_say_what_happened(finished: Path) -> None:
    for row in rows_of(finished):
        about = (name := label(row), row["budget"], row["number"])
        assert len(row["prefix_key"]) == 16
        assert row["read_gbps"] is None
        assert row["departure"] is None, about
        assert row["about"] == {"house": row["number"]}
        assert list(row["phases"]) == list(PHASES)
        assert sum(row["phases"].values()) == pytest.approx(row["ttft_s"], rel=1e-6), about
        assert all(seconds >= 0 for seconds in row["phases"].values())
        assert row["phases"]["attention"] > 0
        read = row["stats"]["bytes_read"]
        assert row["resident_pages"] == 0
        assert (read > 0) is (name not in ("recompute", "in_memory")), about
        if name in EXACT and read:
            assert read >= row["prefix_bytes"]
        if row["system"] == "impress":
            assert 0.0 <= row["details"]["agreed"] <= 1.0
        if name in LOSSY:
            assert 0 < row["stats"]["bytes_used"] < row["prefix_bytes"]
            assert row["phases"]["identify"] > 0, about
        if name in TIMED:
            assert row["score"] is row["kl"] is row["prediction"] is None
        else:
            assert row["kl"] > -1e-6
            assert 0.0 <= row["agreement"] <= 1.0
            assert row["kl_answer"] > -1e-6
            assert row["perplexity"] > 1.0
        if name == "in_memory":
            assert row["kl"] == pytest.approx(0.0, abs=1e-6)
            assert row["agreement"] == 1.0


def test_systems_that_use_the_whole_prefix_begin_with_the_same_token(finished: Path) -> None:
    rows = [row for row in rows_of(finished) if label(row) in EXACT and row["number"] == 0]
    for task in ("animals", "kinds"):
        tokens = {label(row): row["first_token"] for row in rows if row["task"] == task}
        assert len(tokens) == len(EXACT)
        assert len(set(tokens.values())) == 1, tokens


def test_larger_budgets_are_closer_to_the_whole_cache(finished: Path) -> None:
    rows = rows_of(finished)
    for name in LOSSY:
        kl = {
            budget: sum(row["kl"] for row in rows if (label(row), row["budget"]) == (name, budget))
            for budget in BUDGETS
        }
        assert 0 < kl[0.5] < kl[0.1], name


def test_a_report_can_be_made_of_it(finished: Path, tmp_path: Path) -> None:
    written = write_report([finished], tmp_path)
    pictures = {"ttft-cold.png", "frontier-cold.png", "phases-cold.png"}
    assert {path.name for path in written} >= {"report.md", "report.html", *pictures}
    text = (tmp_path / "report.md").read_text()
    for label in ("AttentionStore + H2O", "IMPRESS +groups", "ContiguousKV (published)", "5.83"):
        assert label in text


def test_a_run_goes_on_where_it_was_broken_off(
    finished: Path, tmp_path: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(tasks=("animals",), systems=("in_memory", "contiguouskv", "reload"))
    written: list[Any] = []
    add = RunFolder.add

    def failing(self: RunFolder, row: Row) -> None:
        if len(written) == 5:
            raise KeyboardInterrupt
        written.append(key_of(row))
        add(self, row)

    monkeypatch.setattr(RunFolder, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        run(config, tmp_path, progress=False, loaded=loaded)
    part = tmp_path / "rows-0.jsonl"
    before = part.read_text()
    part.write_text(before + '{"task": "animals", "numb')  # The crash cut a row.
    assert len(before.splitlines()) == 5

    def counting(self: RunFolder, row: Row) -> None:
        written.append(key_of(row))
        add(self, row)

    monkeypatch.setattr(RunFolder, "add", counting)
    run(config, tmp_path, progress=False, loaded=loaded)
    wanted = {
        key
        for key in expected_keys(3, 1, BUDGETS)
        if key[0] == "animals" and not key[4] and key[3] in ("in_memory", "contiguouskv", "reload")
    }
    assert len(written) == len(wanted)
    assert set(written) == wanted
    rows = rows_of(tmp_path)
    assert len(rows) == len(wanted)
    assert [json.dumps(row) for row in rows[:5]] == before.splitlines()
    assert {row["session"] for row in rows[:5]} != {row["session"] for row in rows[5:]}
    assert not list(tmp_path.glob("work-*"))
    # Nothing is left to do; more systems may be added.
    run(config, tmp_path, progress=False, loaded=loaded)
    assert len(written) == len(wanted)
    run(config_of(tasks=("animals",), systems=("impress",)), tmp_path, progress=False, loaded=loaded)
    assert {key[3] for key in written[len(wanted) :]} == {"impress"}
    assert len(rows_of(tmp_path)) == len(wanted) + 6
    assert json.loads((tmp_path / "config.json").read_text())["systems"] == [
        *("in_memory", "contiguouskv", "reload", "impress")
    ]


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"requests": 4}, {"timed_requests": 2}, {"first": 3}, {"read_gbps": 2.0}, {"prefixes": 4}]
)
def test_rows_of_different_runs_are_not_mixed(
    finished: Path, tmp_path: Path, loaded: tuple[Any, Any], change: dict[str, Any]
) -> None:
    before = (finished / "rows.jsonl").read_bytes()
    with pytest.raises(RunFolderError, match=f"another run .*{next(iter(change))} is"):
        run(config_of(**change), finished, progress=False, loaded=loaded)
    assert (finished / "rows.jsonl").read_bytes() == before


def test_rows_of_different_machines_are_not_mixed(
    finished: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.running import folder as module

    here = module.stamp()
    for field, other in (("cpu", "another"), ("commit", "f" * 40), ("torch_threads", 7), ("instruction_sets", ["sse"])):
        monkeypatch.setattr(module, "stamp", lambda field=field, other=other: here | {field: other})
        with pytest.raises(RunFolderError, match=rf"{field} is .*{other if isinstance(other, str) else ''}.*, was"):
            run(config_of(), finished, progress=False, loaded=loaded)


def test_a_broken_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"task": \n')
    with pytest.raises(RunFolderError, match="no row"):
        RunFolder(tmp_path).done()


def test_a_request_that_did_not_find_its_state_is_made_once_more_and_then_says_why(
    tmp_path: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.systems import reload, stored

    made: list[str] = []

    def warm(paths: list[Path]) -> None:
        for path in paths:
            path.read_bytes()

    def watched(model: Any, system: Any, request: Request, state: Any, ready_bytes: int) -> Any:
        made.append(system.name)
        return timed_request(model, system, request, state, ready_bytes)

    monkeypatch.setattr(reload, "drop_page_cache", warm)
    monkeypatch.setattr(stored, "drop_page_cache", warm)
    monkeypatch.setattr(process, "timed_request", watched)
    config = config_of(tasks=("kinds",), systems=("reload", "contiguouskv@0.1", "in_memory"), requests=1)
    rows = rows_of(run(config, tmp_path / "run", progress=False, loaded=loaded))
    for row in rows:
        departed = row["system"] != "in_memory"
        assert (row["departure"] is not None) is (row["resident_pages"] > 0) is departed
        assert not departed or row["departure"].endswith("pages of its files were in the page cache")
    # The warm-up is a request too.
    assert {name: made.count(name) for name in made} == {"reload": 4, "contiguouskv": 4, "in_memory": 2}
    assert len(rows) == 3


def test_what_the_model_cannot_take_is_refused_before_anything_is_stored(
    tmp_path: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = loaded
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "max_position_embeddings", 320)
        with pytest.raises(NotServedError, match=r"animals has a request of 3\d\d tokens .* takes 320"):
            run(config_of(), tmp_path / "run", progress=False, loaded=loaded)
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"prefix": "a text", "question": " what?", "answers": ["a"]}) + "\n")
    sentences(tmp_path)
    for changes, message in (
        ({"tasks": (f"file:{own}",), "first": 1}, r"file:own\.jsonl has no request from number 1 on"),
        ({"tasks": ("sst2",), "requests": 121}, "sst2: 121 rows were asked for, but the data set has 120"),
        ({"tasks": ("sst2",), "requests": 1, "first": 120}, "sst2: 121 rows were asked for"),
    ):
        with pytest.raises(NotServedError, match=message):
            run(config_of(**changes, data_dir=str(tmp_path)), tmp_path / "run", progress=False, loaded=loaded)
    assert not (tmp_path / "run").exists()


def test_other_data_are_other_questions(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    config = config_of(tasks=("sst2",), systems=("in_memory",), data_dir=str(sentences(tmp_path / "data")))
    run(config, tmp_path / "run", progress=False, loaded=loaded)
    sentences(tmp_path / "data", "play")
    with pytest.raises(RunFolderError, match=r"sst2 asks other questions.*; sst2 has other data"):
        run(config, tmp_path / "run", progress=False, loaded=loaded)


def test_prompts_begin_as_the_tokenizer_begins_texts(tmp_path: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = config_of(tasks=("sst2",), requests=1, data_dir=str(sentences(tmp_path / "data")))
    plain = asked_of(config, tokenizer).alone[0][0].prefix_ids
    tokenizer.bos_token = "<|im_start|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert asked_of(config, tokenizer).alone[0][0].prefix_ids.tolist() == [tokenizer.bos_token_id, *plain.tolist()]


def test_two_processes_share_the_requests(tmp_path: Path, folder: Path) -> None:
    sentences(tmp_path / "data")
    arguments = ["-m", "eval", "run", str(tmp_path / "two"), "--task", "sst2", "--requests", "5"]
    arguments += ["--timed-requests", "1", "--system", "in_memory", "--system", "contiguouskv", "--system", "reload"]
    arguments += ["--budget", "0.1", "--model", str(folder), "--dtype", "float32", "--data-dir", str(tmp_path / "data")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    subprocess.run([sys.executable, *launch, *arguments], check=True, env=environment, timeout=300, cwd=Path.cwd())
    two = rows_of(tmp_path / "two")
    assert json.loads((tmp_path / "two" / "config.json").read_text())["processes"] == 2
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["config.json", "machine.json", "rows.jsonl"]

    one_process = [str(tmp_path / "one") if part == str(tmp_path / "two") else part for part in arguments]
    subprocess.run([sys.executable, *one_process], check=True, env=environment, timeout=300, cwd=Path.cwd())
    one = {key_of(row): row for row in rows_of(tmp_path / "one")}
    assert {key_of(row) for row in two} == set(one)
    assert len(two) == len(one) == 5 * 2 + 1
    for row in two:
        mine = one[key_of(row)]
        assert (row["prediction"], row["score"]) == (mine["prediction"], mine["score"])
        if row["kl"] is not None:
            assert row["kl"] == pytest.approx(mine["kl"], abs=1e-5)
