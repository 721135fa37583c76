"""Tasks of the user: lines of a file, in the tokenizer's own chat, with prefixes that are exactly those stored."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_model import tiny_tokenizer
from tokenizers.processors import TemplateProcessing
from words import Words

from eval.tasks import OwnDataError, data_noted, task_named
from eval.tasks.chat import PLAIN, ChatTemplateError, turn_of
from eval.tasks.own_data import suffix_of

TEXT = "A long text about a town. It has a river, a market and two bridges. The mayor is called Ines."
LINE = {"prefix": TEXT, "question": " Who is the mayor?", "answers": ["Ines"]}
Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes lines (texts as they are), and returns the name of the task."""

    def make(*lines: Any) -> str:
        path = tmp_path / "my.jsonl"
        path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
        return f"file:{path}"

    return make


def test_lines_are_asked_in_the_chat_of_the_tokenizer(write: Write) -> None:
    tokenizer = tiny_tokenizer()
    other = {"prefix": TEXT + " More.", "question": " What crosses the river?", "answers": ["bridges", "two bridges"]}
    task = task_named(write(LINE, LINE | {"question": " Is there a market?", "answers": ["yes"]}, other))
    assert (task.name, task.metric) == ("file:my.jsonl", "contains_any")
    requests = task.requests(tokenizer, 3)
    assert [request.key for request in requests] == [f"file:my.jsonl/{number}" for number in range(3)]
    assert sorted(request.prefix for request in requests) in ([0, 0, 1], [0, 1, 1])
    assert {dict(request.about)["line"] for request in requests} == {1, 2, 3}
    for request in requests:
        line = json.loads(Path(task.path).read_text().splitlines()[dict(request.about)["line"] - 1])
        text = tokenizer.decode(torch.cat([request.prefix_ids, request.suffix_ids]))
        messages = [{"role": "user", "content": line["prefix"] + line["question"]}]
        assert text == tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert tokenizer.decode(request.prefix_ids).endswith(line["prefix"])
        assert (request.answers, request.before_answer) == (tuple(line["answers"]), "")
        assert request.max_new_tokens == 32
    assert [one.answers for one in task.requests(tokenizer, 2)] == [one.answers for one in requests[:2]]
    orders = {tuple(one.answers for one in task.requests(tokenizer, 3, seed)) for seed in range(8)}
    assert len(orders) > 1


def test_a_file_has_as_many_requests_as_lines(write: Write) -> None:
    task = task_named(write(LINE, "", LINE | {"question": " How many bridges are there?"}))
    assert len(task.requests(tiny_tokenizer(), 50)) == 2


def test_labels_are_chosen_and_limits_are_taken_from_the_line(write: Write) -> None:
    line = LINE | {"choices": ["Ines", "Olga"], "max_new_tokens": 7}
    task = task_named(write(line))
    (request,) = task.requests(tiny_tokenizer(), 1)
    assert task.metric == "accuracy"
    assert (request.choices, request.max_new_tokens) == (("Ines", "Olga"), 1)
    (request,) = task_named(write(LINE | {"max_new_tokens": 7})).requests(tiny_tokenizer(), 1)
    assert request.max_new_tokens == 7


def test_without_a_chat_template_the_text_goes_on_as_it_is(write: Write) -> None:
    tokenizer = Words()
    (request,) = task_named(write(LINE)).requests(tokenizer, 1)
    assert turn_of(tokenizer) == PLAIN
    assert tokenizer.decode(request.prefix_ids) == TEXT
    assert tokenizer.decode(request.suffix_ids) == LINE["question"]
    assert request.before_answer == " "


class Pairs:
    """A tokenizer that merges two equal letters in a row."""

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        found, place = [], 0
        while place < len(text):
            pair = text[place : place + 2]
            merged = len(pair) == 2 and pair[0] == pair[1]
            found.append(ord(text[place]) + 1000 * merged)
            place += 1 + merged
        return {"input_ids": found}


@pytest.mark.parametrize(("question", "merges"), [("bcd", False), ("abc", True)])
def test_the_stored_prefix_begins_the_prompt_whatever_is_asked(question: str, merges: bool) -> None:
    """A token across the seam would not be in the stored prefix."""
    tokenizer = Pairs()
    prefix = torch.tensor(tokenizer("xya", False, False)["input_ids"])
    suffix = suffix_of(tokenizer, PLAIN, "xya", prefix, question)
    whole = tokenizer("xya" + question, False, False)["input_ids"]
    together = torch.cat([prefix, suffix]).tolist()
    assert (together == whole) is not merges
    assert together == (whole if not merges else [*map(ord, "xya"), *map(ord, question)])


def test_a_beginning_that_the_tokenizer_adds_is_not_taken_from_the_template() -> None:
    tokenizer = tiny_tokenizer()
    template = "<|endoftext|>{{ messages[0]['content'] }}[answer]"
    tokenizer.chat_template = template
    assert turn_of(tokenizer).begin == "<|endoftext|>"
    tokenizer.bos_token = "<|endoftext|>"
    assert turn_of(tokenizer).begin == "<|endoftext|>"
    tokenizer._tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    assert turn_of(tokenizer).begin == ""
    assert turn_of(tokenizer).end == "[answer]"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('needs a system message') }}", "fails for one user message: needs a system message"),
        ("nothing", "shows a user message 0 times"),
        ("{{ messages[0]['content'] }} {{ messages[0]['content'] }}", "shows a user message 2 times"),
    ],
)
def test_a_template_that_cannot_be_used_is_an_error(template: str, message: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ChatTemplateError, match=message):
        turn_of(tokenizer)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: Expecting property name"),
        ("[]", "line 2: an object with prefix, question, answers is needed, got list"),
        ({"prefix": TEXT, "question": "?"}, "line 2: 'answers' must be a list of texts, got None"),
        (LINE | {"answers": []}, "line 2: 'answers' must have one right answer at least"),
        (LINE | {"answers": "Ines"}, "line 2: 'answers' must be a list of texts, got 'Ines'"),
        (LINE | {"prefix": 3}, "line 2: 'prefix' must be a text, got 3"),
        (LINE | {"question": ""}, "line 2: 'question' must be a text, got ''"),
        (LINE | {"choice": ["a"]}, "line 2: the field 'choice' is unknown; a line may have prefix, "),
        (LINE | {"choices": ["Ines"]}, "line 2: 'choices' must be two different texts at least"),
        (LINE | {"choices": ["Olga", "Rosa"]}, r"line 2: 'choices' must .* have all answers, got \['Olga', 'Rosa'\]"),
        (LINE | {"choices": ["Ines", "Olga"]}, "line 2: either all lines have choices or none, and line 1 differs"),
        (LINE | {"max_new_tokens": 0}, "line 2: 'max_new_tokens' must be a whole number from 1 on, got 0"),
        (LINE | {"max_new_tokens": True}, "line 2: 'max_new_tokens' must be a whole number from 1 on, got True"),
    ],
)
def test_a_wrong_line_is_named(line: Any, message: str, write: Write) -> None:
    with pytest.raises(OwnDataError, match=message):
        task_named(write(LINE, line))


def test_missing_and_empty_files_are_named(tmp_path: Path, write: Write) -> None:
    with pytest.raises(OwnDataError, match=r"nothing\.jsonl cannot be read"):
        task_named(f"file:{tmp_path / 'nothing.jsonl'}")
    with pytest.raises(OwnDataError, match=r"my\.jsonl has no line"):
        task_named(write(""))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (LINE | {"prefix": "Short."}, "line 1: the prefix has 2 tokens, 16 are needed"),
        (LINE | {"question": "?"}, "line 1: the question has fewer than 2 tokens"),
    ],
)
def test_texts_that_are_too_short_are_named(line: Any, message: str, write: Write) -> None:
    with pytest.raises(OwnDataError, match=message):
        task_named(write(line)).requests(Words(), 1)


def test_the_content_of_the_file_is_noted(write: Write) -> None:
    def noted(*lines: Any) -> dict[str, str]:
        with data_noted() as found:
            task_named(write(*lines)).requests(tiny_tokenizer(), 1)
        return found

    assert set(noted(LINE)) == {"file:my.jsonl"}
    assert noted(LINE) == noted(LINE) != noted(LINE, LINE)


def test_a_tokenizer_without_the_attribute_has_no_template() -> None:
    assert turn_of(SimpleNamespace()) == PLAIN
