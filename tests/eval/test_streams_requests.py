"""Streams of requests: popular documents really are popular, and chats go on token for token."""

from __future__ import annotations

import json
import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from words import Words

from eval.streams import conversations, shared_documents
from eval.tasks.base import Request

Stream = Callable[..., list[Request]]


@pytest.fixture(params=["local text", "built-in text"])
def data_dir(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path | None:
    """A folder with passages, and none."""
    monkeypatch.delenv("CONTIGUOUSKV_DATA", raising=False)
    if request.param == "built-in text":
        return None
    chance = random.Random(0)
    (tmp_path / "nq_open").mkdir()
    with (tmp_path / "nq_open" / "test.jsonl").open("w") as lines:
        for _ in range(200):
            text = " ".join("".join(chance.choices("abcdefgh", k=6)) for _ in range(60))
            lines.write(json.dumps({"question": "?", "answers": ["x"], "documents": [{"title": "", "text": text}]}))
            lines.write("\n")
    return tmp_path


def documents(tokenizer: Any, data_dir: Path | None, seed: int = 0) -> list[Request]:
    return shared_documents(tokenizer, documents=5, requests=60, tokens=1024, seed=seed, data_dir=data_dir)


def chats(tokenizer: Any, data_dir: Path | None, seed: int = 0) -> list[Request]:
    return conversations(tokenizer, conversations=4, turns=6, tokens=600, turn_tokens=200, seed=seed, data_dir=data_dir)


def by(stream: list[Request], key: str) -> dict[int, list[Request]]:
    found: dict[int, list[Request]] = defaultdict(list)
    for request in stream:
        found[dict(request.about)[key]].append(request)
    return found


@pytest.mark.parametrize("make", [documents, chats])
def test_a_stream_is_the_same_for_the_same_seed_and_another_for_another(make: Stream, data_dir: Path | None) -> None:
    tokenizer = Words()
    first, again, other = (make(tokenizer, data_dir, seed) for seed in (0, 0, 1))
    assert [request.number for request in first] == list(range(len(first)))
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one.prefix_ids, two.prefix_ids)
        assert torch.equal(one.suffix_ids, two.suffix_ids)
        assert (one.key, one.prefix, one.answers, one.about) == (two.key, two.prefix, two.answers, two.about)
    assert [request.prefix for request in first] != [request.prefix for request in other]
    assert {request.answers for request in first}.isdisjoint(request.answers for request in other)


@pytest.mark.parametrize("make", [documents, chats])
def test_each_answer_is_in_the_prefix_once_and_not_in_the_question(make: Stream, data_dir: Path | None) -> None:
    tokenizer = Words()
    for request in make(tokenizer, data_dir):
        prefix, asked = tokenizer.decode(request.prefix_ids), tokenizer.decode(request.suffix_ids)
        (answer,) = request.answers
        place = re.search(r"The secret number of (.+) is$", asked)
        assert place is not None
        assert prefix.count(f"The secret number of {place[1]} is {answer}.") == 1
        assert prefix.count(answer) == 1
        assert answer not in asked
        assert asked.count(place[1]) == 2
        assert request.prefix_ids.dtype == request.suffix_ids.dtype == torch.int64


def test_requests_to_a_document_share_it_and_ask_everything_before_anything_twice(data_dir: Path | None) -> None:
    stream = shared_documents(Words(), documents=3, requests=200, tokens=1024, data_dir=data_dir)
    for document, mine in by(stream, "document").items():
        assert {request.prefix for request in mine} == {document}
        assert all(torch.equal(request.prefix_ids, mine[0].prefix_ids) for request in mine)
        # The built-in text is another in each version of Python, and its paragraphs may be long.
        assert 300 < len(mine[0].prefix_ids) <= 1024
        asked = [tuple(request.suffix_ids.tolist()) for request in mine]
        questions = 12 * 4
        for start in range(0, len(asked), questions):
            part = asked[start : start + questions]
            assert len(set(part)) == len(part)
        assert len(set(asked)) == min(len(asked), questions)
        assert len({dict(request.about)["question"] for request in mine}) == len(set(asked))
    prefixes = {tuple(request.prefix_ids.tolist()) for request in stream}
    assert len(prefixes) == 3


@pytest.mark.parametrize("data_dir", ["local text"], indirect=True)
def test_facts_come_in_the_order_of_their_depths(data_dir: Path | None) -> None:
    tokenizer = Words()
    for mine in by(documents(tokenizer, data_dir), "document").values():
        text = tokenizer.decode(mine[0].prefix_ids)
        places = {dict(request.about)["depth"]: text.index(request.answers[0]) for request in mine}
        assert [places[depth] for depth in sorted(places)] == sorted(places.values())
        assert all(0 < depth < 1 for depth in places)


@pytest.mark.parametrize("exponent", [0.0, 1.0, 1.5])
def test_popularity_follows_the_law_of_zipf(exponent: float) -> None:
    count, requests = 6, 6000
    stream = shared_documents(Words(), documents=count, requests=requests, exponent=exponent, tokens=128)
    found = sorted(Counter(request.prefix for request in stream).values(), reverse=True)
    weights = [rank**-exponent for rank in range(1, count + 1)]
    expected = [requests * weight / sum(weights) for weight in weights]
    assert found == pytest.approx(expected, rel=0.15)


def test_a_longer_stream_is_about_the_same_documents() -> None:
    tokenizer = Words()
    short, long = (shared_documents(tokenizer, documents=4, requests=n, tokens=512, seed=3) for n in (30, 90))
    texts = {request.prefix: request.prefix_ids for request in long}
    assert {request.prefix for request in short} <= set(texts)
    assert all(torch.equal(request.prefix_ids, texts[request.prefix]) for request in short)


def test_a_turn_continues_what_was_said_token_for_token(data_dir: Path | None) -> None:
    tokenizer = Words()
    for mine in by(chats(tokenizer, data_dir), "conversation").values():
        for before, after in pairwise(mine):
            said = torch.cat([before.prefix_ids, before.suffix_ids])
            assert torch.equal(after.prefix_ids[: len(said)], said)
            assert tokenizer.decode(after.prefix_ids[len(said) :]) == f" {before.answers[0]}."
            assert tokenizer.decode(after.suffix_ids).startswith("<|im_end|>\n<|im_start|>user\n")
        whole = tokenizer.decode(torch.cat([mine[-1].prefix_ids, mine[-1].suffix_ids]))
        assert (
            re.findall(r"<\|im_(\w+)\|>(\w*)", whole)
            == [part for _ in mine for part in (("start", "user"), ("end", ""), ("start", "assistant"), ("end", ""))][
                :-1
            ]
        )


def test_each_round_has_one_turn_of_every_conversation_in_an_order_of_its_own(data_dir: Path | None) -> None:
    stream = chats(Words(), data_dir)
    assert len(stream) == 4 * 6
    orders = []
    for turn in range(6):
        part = stream[4 * turn : 4 * turn + 4]
        assert {dict(request.about)["turn"] for request in part} == {turn}
        orders.append([dict(request.about)["conversation"] for request in part])
        assert sorted(orders[-1]) == [0, 1, 2, 3]
    assert len({tuple(order) for order in orders}) > 1
    assert sorted(request.prefix for request in stream) == list(range(24))


def test_a_conversation_asks_for_each_fact_once_and_for_older_ones_too(data_dir: Path | None) -> None:
    tokenizer = Words()
    ages = set()
    for mine in by(chats(tokenizer, data_dir), "conversation").values():
        assert len({request.answers for request in mine}) == len(mine)
        starts = [0, *(len(request.prefix_ids) for request in mine)]
        for turn, request in enumerate(mine):
            age = dict(request.about)["age"]
            ages.add(age)
            # The fact stands in what turn `turn - age` added: the first text, or that turn's suffix.
            told = turn - age
            begin, end = (starts[told], starts[told + 1]) if told == 0 else (starts[told + 1], starts[told + 2])
            assert request.answers[0] in tokenizer.decode(request.prefix_ids[begin:end])
    assert len(ages) > 2


def test_conversations_that_begin_alike_differ_from_each_other() -> None:
    stream = conversations(Words(), conversations=5, turns=1, tokens=400)
    assert len({tuple(request.prefix_ids.tolist()) for request in stream}) == 5
    assert len({request.answers for request in stream}) == 5


@pytest.mark.parametrize(
    ("make", "counts", "message"),
    [
        (shared_documents, {"documents": 0, "requests": 1}, "documents must be 1 or more, got 0"),
        (shared_documents, {"documents": 1, "requests": 0}, "requests must be 1 or more, got 0"),
        (conversations, {"conversations": -1, "turns": 1}, "conversations must be 1 or more, got -1"),
        (conversations, {"conversations": 1, "turns": 0}, "turns must be 1 or more, got 0"),
        (conversations, {"conversations": 1, "turns": 200}, "203 facts are needed, there are only 48"),
        (shared_documents, {"documents": 1, "requests": 1, "tokens": 10**7}, "not enough text"),
    ],
)
def test_impossible_streams_are_refused(make: Stream, counts: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(Words(), **counts)
