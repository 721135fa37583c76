"""LongBench and RULER: the same rows from local files and from the Hub, asked so that prefixes are shared."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from words import Words

from eval.metrics import metric_names
from eval.tasks import TASKS, DataMissingError, Request, task_named
from eval.tasks.longbench import SUBSETS, LongBench, longbench
from eval.tasks.ruler import METRICS, Ruler, ruler

FIXTURES = Path(__file__).with_name("fixtures")
LONGBENCH = [f"longbench_{subset}" for subset in SUBSETS]
RULER = [f"ruler_{task}" for task in METRICS]
# What these are asked for is in their contexts, word for word.
EXTRACTIVE = ["longbench_narrativeqa", "longbench_hotpotqa", "longbench_2wikimqa", "longbench_musique"]
FIELDS = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}


def rows_of(path: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FIXTURES / path).read_text().splitlines()]


def row_of(request: Request, subset: str) -> dict[str, Any]:
    return next(row for row in rows_of(f"longbench/{subset}.jsonl") if row["_id"] == dict(request.about)["row"])


def test_every_subset_and_task_has_a_name_and_a_metric_that_there_is() -> None:
    assert len(LONGBENCH) == 14
    assert len(RULER) == 13
    for name in LONGBENCH + RULER:
        task = TASKS[name](None)
        assert task.name == name
        assert task.metric in metric_names()


def test_rows_of_the_fixtures_have_the_fields_of_the_real_ones() -> None:
    for subset in SUBSETS:
        assert all(set(row) == FIELDS and row["dataset"] == subset for row in rows_of(f"longbench/{subset}.jsonl"))
    theirs = {"context", "question", "answer_prefix", "answer", "task", "max_new_tokens"}
    assert all(set(row) == theirs for row in rows_of("ruler/4096.jsonl"))


@pytest.mark.parametrize("name", LONGBENCH + RULER)
def test_requests_are_the_same_for_the_same_seed_and_in_another_order_for_another(name: str) -> None:
    tokenizer = Words()
    task = task_named(name, FIXTURES)
    first, again = task.requests(tokenizer, 3), task.requests(tokenizer, 3)
    assert [request.key for request in first] == [f"{name}/{number}" for number in range(3)]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.prefix_ids, two.prefix_ids)
        assert torch.equal(one.suffix_ids, two.suffix_ids)
        assert (one.answers, one.choices, one.about) == (two.answers, two.choices, two.about)
    orders = {tuple(request.answers for request in task.requests(tokenizer, 3, seed)) for seed in range(8)}
    assert len(orders) > 1
    assert len({frozenset(order) for order in orders}) == 1


@pytest.mark.parametrize("name", LONGBENCH + RULER)
def test_same_context_same_prefix_and_different_questions(name: str) -> None:
    by_prefix: dict[int, list[Request]] = defaultdict(list)
    for request in task_named(name, FIXTURES).requests(Words(), 3):
        by_prefix[request.prefix].append(request)
        assert request.prefix_ids.dtype == request.suffix_ids.dtype == torch.int64
        assert len(request.prefix_ids) > len(request.suffix_ids) > 0
    assert list(by_prefix) == list(range(len(by_prefix)))
    for mine in by_prefix.values():
        assert all(torch.equal(request.prefix_ids, mine[0].prefix_ids) for request in mine)
        assert len({tuple(request.suffix_ids.tolist()) for request in mine}) == len(mine)
    assert len({tuple(mine[0].prefix_ids.tolist()) for mine in by_prefix.values()}) == len(by_prefix)
    # In the fixtures these three rows ask about the same text.
    assert len(by_prefix) == (1 if name in ("ruler_qa_1", "longbench_passage_retrieval_en") else 3)


@pytest.mark.parametrize("subset", SUBSETS)
def test_the_prefix_ends_with_the_context_and_the_suffix_asks_the_question(subset: str) -> None:
    tokenizer = Words()
    asked = SUBSETS[subset]
    for request in LongBench(subset, data_dir=FIXTURES).requests(tokenizer, 3):
        row = row_of(request, subset)
        prefix, suffix = tokenizer.decode(request.prefix_ids), tokenizer.decode(request.suffix_ids)
        assert prefix.endswith(row["context"])
        assert asked.instruction in prefix
        assert row["input"].strip().removesuffix(asked.begin).strip() in suffix
        assert suffix.endswith(asked.begin)
        assert suffix.count(asked.begin) == 1
        assert request.answers == tuple(row["answers"])
        assert dict(request.about) == {"row": row["_id"], "words": row["length"], "cut_tokens": 0}


def test_labels_are_chosen_and_everything_else_is_generated_in_a_chat() -> None:
    tokenizer = Words()
    for subset in SUBSETS:
        for request in LongBench(subset, data_dir=FIXTURES).requests(tokenizer, 3):
            suffix = tokenizer.decode(request.suffix_ids)
            if subset == "trec":
                assert request.choices == tuple(row_of(request, subset)["all_classes"])
                assert request.answers[0] in request.choices
                # It goes on exactly as the examples do.
                whole = tokenizer.decode(request.prefix_ids) + suffix
                assert whole.splitlines()[-3].startswith("Type: ")
                assert whole.splitlines()[-1] == "Type:"
                assert "<|im_start|>" not in whole
            else:
                assert request.choices == ()
                assert request.max_new_tokens > 1
                assert "<|im_end|>\n<|im_start|>assistant\n" in suffix


@pytest.mark.parametrize("name", EXTRACTIVE + [name for name in RULER if name != "ruler_qa_2"])
def test_answers_are_in_the_prefix_and_not_in_the_question(name: str) -> None:
    tokenizer = Words()
    for request in task_named(name, FIXTURES).requests(tokenizer, 3):
        prefix, asked = tokenizer.decode(request.prefix_ids), tokenizer.decode(request.suffix_ids)
        assert any(answer.lower() in prefix.lower() for answer in request.answers)
        if name.startswith("ruler") and not name.startswith("ruler_qa"):
            assert all(answer in prefix for answer in request.answers)
        assert not any(answer in asked for answer in request.answers)


@pytest.mark.parametrize("subset", ["narrativeqa", "gov_report", "trec"])
@pytest.mark.parametrize("max_tokens", [40, 61])
def test_a_long_prefix_loses_its_middle_and_the_question_stays(subset: str, max_tokens: int) -> None:
    tokenizer = Words()
    whole = LongBench(subset, data_dir=FIXTURES).requests(tokenizer, 3)
    cut = LongBench(subset, max_tokens, FIXTURES).requests(tokenizer, 3)
    for one, two in zip(whole, cut, strict=True):
        assert torch.equal(one.suffix_ids, two.suffix_ids)
        head, tail = max_tokens // 2, max_tokens - max_tokens // 2
        assert torch.equal(two.prefix_ids, torch.cat([one.prefix_ids[:head], one.prefix_ids[-tail:]]))
        assert dict(two.about)["cut_tokens"] == len(one.prefix_ids) - max_tokens > 0


def test_a_prefix_that_just_fits_is_not_cut() -> None:
    tokenizer = Words()
    whole = LongBench("qasper", data_dir=FIXTURES).requests(tokenizer, 1)[0]
    length = len(whole.prefix_ids)
    for max_tokens, missing in ((length, 0), (length - 1, 1)):
        found = LongBench("qasper", max_tokens, FIXTURES).requests(tokenizer, 1)[0]
        assert dict(found.about)["cut_tokens"] == missing
        assert len(found.prefix_ids) == length - missing


def test_questions_of_ruler_are_asked_as_the_rows_say() -> None:
    tokenizer = Words()
    for task in METRICS:
        rows = [row for row in rows_of("ruler/4096.jsonl") if row["task"] == task]
        for request in Ruler(task, data_dir=FIXTURES).requests(tokenizer, 3):
            row = next(row for row in rows if tuple(row["answer"]) == request.answers)
            assert tokenizer.decode(request.prefix_ids) == f"<|im_start|>user\n{row['context']}"
            middle = "<|im_end|>\n<|im_start|>assistant\n"
            assert tokenizer.decode(request.suffix_ids) == f"{row['question']}{middle}{row['answer_prefix']}"
            assert request.max_new_tokens == row["max_new_tokens"]
            assert request.about == (("length", 4096),)
    assert ruler("qa_1").metric == "contains_any"
    assert ruler("vt").metric == "needle_recall"


def test_longbench_comes_from_the_archive_of_its_authors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(FIXTURES / "longbench" / "qasper.jsonl", "data/qasper.jsonl")
    asked = []

    def download(repo_id: str, filename: str, *, repo_type: str, revision: str | None) -> str:
        asked.append((repo_id, filename, repo_type, revision))
        return str(tmp_path / filename)

    monkeypatch.delenv("CONTIGUOUSKV_DATA", raising=False)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    tokenizer = Words()
    hub = longbench("qasper").requests(tokenizer, 3)
    local = longbench("qasper", FIXTURES).requests(tokenizer, 3)
    assert [request.about for request in hub] == [request.about for request in local]
    assert all(torch.equal(one.prefix_ids, two.prefix_ids) for one, two in zip(hub, local, strict=True))
    assert asked == [("zai-org/LongBench", "data.zip", "dataset", None)]
    with pytest.raises(DataMissingError, match=r"zai-org/LongBench could not be loaded.*longbench/trec\.jsonl"):
        longbench("trec").requests(tokenizer, 1)


@pytest.mark.parametrize("length", [4096, 8192])
def test_ruler_comes_from_the_configuration_of_its_length(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(path: str, config: str | None, split: str, revision: str | None) -> datasets.Dataset:
        asked.append((path, config, split, revision))
        return datasets.Dataset.from_list(rows_of("ruler/4096.jsonl"))

    monkeypatch.delenv("CONTIGUOUSKV_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    tokenizer = Words()
    hub = Ruler("niah_multivalue", length).requests(tokenizer, 3)
    local = Ruler("niah_multivalue", data_dir=FIXTURES).requests(tokenizer, 3)
    assert [request.answers for request in hub] == [request.answers for request in local]
    assert all(torch.equal(one.prefix_ids, two.prefix_ids) for one, two in zip(hub, local, strict=True))
    assert asked == [("simonjegou/ruler", str(length), "test", None)]


def test_without_folder_and_hub_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.delenv("CONTIGUOUSKV_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", nothing)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", nothing)
    with pytest.raises(DataMissingError, match=r"pass --data-dir with longbench/qasper\.jsonl"):
        longbench("qasper").requests(Words(), 1)
    with pytest.raises(DataMissingError, match=r"pass --data-dir with ruler/4096\.jsonl"):
        ruler("vt").requests(Words(), 1)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataMissingError, match=r"there is no .*longbench/musique\.jsonl"):
        longbench("musique", tmp_path).requests(Words(), 1)
    with pytest.raises(DataMissingError, match=r"there is no .*ruler/8192\.jsonl"):
        Ruler("vt", 8192, FIXTURES).requests(Words(), 1)


def test_a_file_without_the_task_says_what_it_has(tmp_path: Path) -> None:
    shutil.copytree(FIXTURES / "ruler", tmp_path / "ruler")
    rows = [row for row in rows_of("ruler/4096.jsonl") if row["task"] in ("vt", "cwe")]
    (tmp_path / "ruler" / "4096.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataMissingError, match=r"length 4096: there are rows of \['cwe', 'vt'\], but none of 'fwe'"):
        ruler("fwe", tmp_path).requests(Words(), 1)


def test_unknown_subsets_tasks_and_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"subset must be one of .*qasper.*, got 'lcc'"):
        longbench("lcc")
    with pytest.raises(ValueError, match=r"task must be one of .*vt.*, got 'niah'"):
        ruler("niah")
    with pytest.raises(ValueError, match="max_tokens must be 2 at least, got 1"):
        LongBench("qasper", 1)
    with pytest.raises(ValueError, match="4 rows were asked for, but the data set has 3"):
        longbench("qasper", FIXTURES).requests(Words(), 4)
