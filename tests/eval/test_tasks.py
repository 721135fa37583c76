"""Tasks: the same requests for the same seed, prefixes that are really shared, and answers that are really in them."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from words import Words

from eval.metrics.scores import needle_recall
from eval.tasks import TASKS, DataMissingError, data_noted, task_named
from eval.tasks.haystack import Haystack
from eval.tasks.needle import Needle
from eval.tasks.rows import HubSource, load_rows

# LongBench and RULER have rows of their own, see test_hub_tasks.py.
ALL = sorted(name for name in TASKS if not name.startswith(("longbench_", "ruler_")))


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Small files with the fields of the real ones."""
    chance = random.Random(0)

    def words(count: int) -> str:
        return " ".join("".join(chance.choices("abcdefgh", k=chance.randint(5, 8))) for _ in range(count))

    def write(name: str, split: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    for name, labels in (("sst2", 2), ("subj", 2), ("trec", 6)):
        for split, count in (("train", 130), ("test", 12)):
            write(name, split, [{"text": words(6), "label": number % labels} for number in range(count)])
    for split, count in (("train", 90), ("test", 12)):
        rows = [{"premise": words(9), "hypothesis": words(4), "label": number % 2} for number in range(count)]
        write("rte", split, rows)
    pairs = [[words(1) + str(number), words(1) + str(number)] for number in range(75)]
    records = [{"ordered_kv_records": pairs, "key": pairs[n][0], "value": pairs[n][1]} for n in range(12)]
    write("kv_retrieval", "test", records)
    common = [words(1) for _ in range(300)]
    passages = [" ".join(chance.choices(common, k=60)) for _ in range(80)]
    write(
        "nq_open",
        "test",
        [
            {"question": words(5), "answers": [passage.split()[7]], "documents": [{"title": words(2), "text": passage}]}
            for passage in passages
        ],
    )
    return tmp_path


@pytest.mark.parametrize("name", ALL)
def test_requests_are_the_same_for_the_same_seed_and_others_for_another(name: str, data_dir: Path) -> None:
    tokenizer = Words()
    first, again, other = (task_named(name, data_dir).requests(tokenizer, 6, seed) for seed in (0, 0, 1))
    assert [request.key for request in first] == [f"{name}/{number}" for number in range(6)]
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.prefix_ids, two.prefix_ids)
        assert torch.equal(one.suffix_ids, two.suffix_ids)
        assert (one.answers, one.choices, one.about) == (two.answers, two.choices, two.about)
    assert any(
        one.answers != two.answers or not torch.equal(one.suffix_ids, two.suffix_ids)
        for one, two in zip(first, other, strict=True)
    )


@pytest.mark.parametrize("name", ALL)
def test_requests_of_one_prefix_share_it_and_ask_different_things(name: str, data_dir: Path) -> None:
    requests = task_named(name, data_dir).requests(Words(), 8)
    by_prefix: dict[int, list[Any]] = {}
    for request in requests:
        by_prefix.setdefault(request.prefix, []).append(request)
        assert request.prefix_ids.dtype == request.suffix_ids.dtype == torch.int64
        assert len(request.prefix_ids) > 4 * len(request.suffix_ids) > 0
    for mine in by_prefix.values():
        assert all(torch.equal(request.prefix_ids, mine[0].prefix_ids) for request in mine)
        assert len({tuple(request.suffix_ids.tolist()) for request in mine}) == len(mine)
    assert list(by_prefix) == list(range(len(by_prefix)))


@pytest.mark.parametrize(("name", "shots"), [("sst2", 100), ("subj", 110), ("trec", 120), ("rte", 80)])
def test_few_shot_tasks_have_as_many_examples_as_in_the_paper(name: str, shots: int, data_dir: Path) -> None:
    tokenizer = Words()
    requests = task_named(name, data_dir).requests(tokenizer, 12)
    labels = set(requests[0].choices)
    for request in requests:
        prefix = tokenizer.decode(request.prefix_ids)
        examples = prefix.split("\n\n")
        assert examples.pop() == ""
        assert len(examples) == len(set(examples)) == shots
        assert {example.rsplit(" ", 1)[1] for example in examples} == labels
        asked = tokenizer.decode(request.suffix_ids)
        # It goes on exactly as the examples do.
        assert asked.endswith(":")
        assert request.answers[0] in labels
        assert asked not in prefix


@pytest.mark.parametrize("prefixes", [None, 3])
def test_few_shot_requests_take_their_prefixes_in_turn(prefixes: int | None, data_dir: Path) -> None:
    requests = task_named("sst2", data_dir, prefixes).requests(Words(), 12)
    count = prefixes or 5
    assert [request.prefix for request in requests] == [number % count for number in range(12)]
    texts = {request.prefix: tuple(request.prefix_ids.tolist()) for request in requests}
    assert all(tuple(request.prefix_ids.tolist()) == texts[request.prefix] for request in requests)
    assert len(set(texts.values())) == count
    # No question comes twice, even with another prefix.
    assert len({tuple(request.suffix_ids.tolist()) for request in requests}) == 12
    with pytest.raises(ValueError, match="prefixes must be 1 at least, got 0"):
        task_named("sst2", data_dir, 0)


@pytest.mark.parametrize("name", ALL)
def test_more_requests_begin_with_the_same_ones(name: str, data_dir: Path) -> None:
    tokenizer = Words()
    few, many = (task_named(name, data_dir).requests(tokenizer, count, seed=3) for count in (5, 11))
    for one, two in zip(few, many, strict=False):
        assert (one.key, one.prefix, one.answers, one.about) == (two.key, two.prefix, two.answers, two.about)
        assert torch.equal(one.prefix_ids, two.prefix_ids)
        assert torch.equal(one.suffix_ids, two.suffix_ids)
    asked = {(tuple(one.prefix_ids.tolist()), tuple(one.suffix_ids.tolist())) for one in many}
    assert len(asked) == len(many)


@pytest.mark.parametrize(
    "name", ["needle", "needle_multikey", "variable_tracking", "common_words", "kv_retrieval", "nq_open"]
)
def test_answers_are_in_the_prefix_and_not_in_the_question(name: str, data_dir: Path) -> None:
    tokenizer = Words()
    for request in task_named(name, data_dir).requests(tokenizer, 6):
        prefix, asked = tokenizer.decode(request.prefix_ids), tokenizer.decode(request.suffix_ids)
        for answer in request.answers:
            assert answer in prefix
            assert answer not in asked
        assert request.max_new_tokens > 1
        assert not request.choices


def test_needles_lie_at_the_depths_that_they_say(data_dir: Path) -> None:
    tokenizer = Words()
    requests = Needle("needle", 1, 1500, data_dir).requests(tokenizer, 15)
    depths = [dict(request.about)["depth"] for request in requests]
    assert depths[:3] == [0.5, 0.25, 0.75]
    assert sorted(depths) == pytest.approx([number / 16 for number in range(1, 16)], abs=1e-4)
    for request, depth in zip(requests, depths, strict=True):
        assert 1350 < len(request.prefix_ids) <= 1500
        text = tokenizer.decode(request.prefix_ids)
        assert text.count(request.answers[0]) == 1
        assert text.index(request.answers[0]) / len(text) == pytest.approx(depth, abs=0.12)


def test_needles_lie_in_texts_of_any_length(data_dir: Path) -> None:
    for name, keys in (("needle:512", 1), ("needle_multikey:900", 4)):
        task = task_named(name, data_dir)
        requests = task.requests(Words(), 2 * keys)
        assert {request.task for request in requests} == {task.name} == {name}
        assert len({request.prefix for request in requests}) == 2
        tokens = int(name.partition(":")[2])
        assert all(tokens - 150 < len(request.prefix_ids) <= tokens for request in requests)
    for name in ("needle:", "needle:255", "needle:2k", "needle_multikey:-300"):
        with pytest.raises(ValueError, match=r"tokens of the prefix, at least 256, must follow needle.*:$"):
            task_named(name, data_dir)


def test_needles_of_one_prefix_belong_to_different_cities(data_dir: Path) -> None:
    tokenizer = Words()
    requests = Needle("needle_multikey", 4, 1500, data_dir).requests(tokenizer, 8)
    assert [request.prefix for request in requests] == [0] * 4 + [1] * 4
    # Each prefix has a needle in each quarter.
    depths = [dict(request.about)["depth"] for request in requests]
    assert [int(depth * 4) for depth in depths] == [0, 1, 2, 3] * 2
    assert len(set(depths)) == 8
    assert len({request.answers for request in requests[:4]}) == 4
    text = tokenizer.decode(requests[0].prefix_ids)
    assert text.count("The secret number of") == 4


def test_a_register_is_asked_for_many_of_its_rows_in_an_order_of_its_own(data_dir: Path) -> None:
    tokenizer = Words()
    for request in task_named("register", data_dir).requests(tokenizer, 3):
        text = tokenizer.decode(request.prefix_ids)
        named = dict(re.findall(r"The secret number of (\w+) is (\d{3})\.", text))
        assert text.count("The secret number of") == len(named) == len(set(named.values())) == 24
        question = tokenizer.decode(request.suffix_ids)
        cities = re.search(r"in this order: ([\w, ]+)", question)
        assert cities is not None
        wanted = re.findall(r"\w+", cities[1])
        assert len(wanted) == len(set(wanted)) == 12
        # What the prompt begins and the answer goes on with.
        lines = [f'{{"city": "{city}", "number": {named[city]}}}' for city in wanted]
        assert f"{lines[0]}".startswith(question[question.rindex("{") :])
        said = "\n".join(lines).removeprefix(question[question.rindex("{") :])
        assert needle_recall(said, request.answers) == 1.0
        assert needle_recall(said.replace(wanted[5], wanted[6]), request.answers) < 1.0
        assert dict(request.about)["answers"] == list(request.answers)
        places = [text.index(f"of {city} is") for city in wanted]
        assert places != sorted(places)
        assert min(places) < len(text) / 3
        assert max(places) > len(text) * 2 / 3


def test_assignments_come_after_what_they_refer_to(data_dir: Path) -> None:
    tokenizer = Words()
    for request in task_named("variable_tracking", data_dir).requests(tokenizer, 6):
        text = tokenizer.decode(request.prefix_ids)
        places = [text.index(f"VAR {name} =") for name in request.answers]
        assert places == sorted(places)
        assert len(places) == 3


def test_common_words_come_more_often_than_all_others(data_dir: Path) -> None:
    tokenizer = Words()
    for request in task_named("common_words", data_dir).requests(tokenizer, 3):
        listed = re.findall(r"\d+\. (\w+)", tokenizer.decode(request.prefix_ids))
        counts = {word: listed.count(word) for word in listed}
        assert {word for word, count in counts.items() if count == 30} == set(request.answers)
        assert {count for word, count in counts.items() if word not in request.answers} == {3}
        assert len(request.prefix_ids) <= 2048


def test_without_a_data_folder_a_haystack_is_the_built_in_text() -> None:
    tokenizer = Words()
    ids = Haystack(tokenizer).hide([(0.0, "first"), (1.0, "last")], 1000, "begin ", random.Random(0))
    text = tokenizer.decode(ids)
    assert 600 < len(ids) <= 1000
    assert text.startswith("begin first\n\n")
    assert text.endswith("last\n\n")


def test_more_text_than_there_is_is_refused(data_dir: Path) -> None:
    with pytest.raises(ValueError, match="not enough text for 10000000 tokens"):
        Haystack(Words(), data_dir).hide([], 10_000_000, "", random.Random(0))


@pytest.mark.parametrize("name", ["sst2", "kv_retrieval"])
def test_more_requests_than_rows_are_refused(name: str, data_dir: Path) -> None:
    with pytest.raises(ValueError, match="rows were asked for"):
        task_named(name, data_dir).requests(Words(), 10_000)


def test_a_missing_file_is_named(data_dir: Path) -> None:
    (data_dir / "sst2" / "train.jsonl").unlink()
    with pytest.raises(DataMissingError, match=r"there is no .*sst2/train\.jsonl"):
        task_named("sst2", data_dir).requests(Words(), 1)


def test_what_was_loaded_is_noted_with_a_digest(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noted(name: str) -> dict[str, str]:
        with data_noted() as found:
            task_named(name, data_dir).requests(Words(), 2)
        return found

    first = noted("sst2")
    assert set(first) == {"sst2/train", "sst2/test"}
    assert noted("sst2") == first
    with (data_dir / "sst2" / "test.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more", "label": 0}) + "\n")
    changed = noted("sst2")
    assert changed["sst2/train"] == first["sst2/train"]
    assert changed["sst2/test"] != first["sst2/test"]
    assert set(noted("needle")) == {"nq_open/test"}
    monkeypatch.delenv("CONTIGUOUSKV_DATA", raising=False)
    with data_noted() as found:
        task_named("needle").requests(Words(), 1)
    assert set(found) == {"language reference of Python"}


def test_the_folder_is_taken_from_the_environment(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTIGUOUSKV_DATA", str(data_dir))
    assert len(load_rows("sst2", "test", None, None)) == 12


def test_without_folder_and_hub_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONTIGUOUSKV_DATA", raising=False)
    for name in ("sst2", "kv_retrieval"):
        with pytest.raises(DataMissingError, match="pass --data-dir"):
            task_named(name).requests(Words(), 1)


def test_rows_of_the_hub_get_our_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source, with a row as its data card shows it."""
    theirs: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
        "sst2": ({"sentence": "dull ", "label": 0}, {"text": "dull", "label": 0}),
        "subj": ({"text": "a fact .", "label_text": "objective"}, {"text": "a fact .", "label": 1}),
        "trec": ({"text": "Who ?", "coarse_label": 3}, {"text": "Who ?", "label": 3}),
        "rte": (
            {"sentence1": "A.", "sentence2": "B.", "label": 1},
            {"premise": "A.", "hypothesis": "B.", "label": 1},
        ),
    }
    asked = []

    def load_dataset(path: str, config: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
        asked.append((path, config, split, revision))
        return [theirs[current][0]]

    monkeypatch.delenv("CONTIGUOUSKV_DATA", raising=False)
    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for current, (_, ours) in theirs.items():
        hub = task_named(current).hub  # type: ignore[attr-defined]
        assert isinstance(hub, HubSource)
        assert load_rows(current, "test", None, hub) == [ours]
    assert ("nyu-mll/glue", "rte", "validation", None) in asked
    assert ("CogComp/trec", None, "test", "refs/convert/parquet") in asked


def test_an_unknown_task_is_refused_with_the_names_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"kv_retrieval.*longbench_qasper.*ruler_vt.*sst2.*got 'sst3'"):
        task_named("sst3")
