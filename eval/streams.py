"""Streams of requests, in order of arrival: popular documents, and chats that grow turn by turn.

All text is real (see `tasks.haystack`) with secret numbers hidden in it, and every request asks for a number in its
prefix. So every answer can be judged by `METRIC`. A stream is the same for all systems: the assistant's earlier answers
are fixed in advance, whatever a system answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .policies.trace import Workload
from .tasks.base import Request, answer_turn, encode, user_turn
from .tasks.haystack import Haystack
from .tasks.needle import CITIES

METRIC = "needle_recall"
PLACES = (
    *CITIES,
    *("Athens", "Berlin", "Bergen", "Boston", "Cork", "Dakar", "Denver", "Dublin", "Geneva", "Havana", "Hanoi"),
    *("Jakarta", "Krakow", "Lagos", "London", "Lyon", "Madrid", "Malmo", "Manila", "Miami", "Milan", "Moscow"),
    *("Naples", "Odessa", "Osaka", "Paris", "Porto", "Prague", "Rome", "Sofia", "Sydney", "Tokyo", "Tunis"),
    *("Venice", "Vienna", "Warsaw"),
)
FACTS_OF_A_DOCUMENT, TOKENS_PER_FACT = 12, 64
FACTS_AT_FIRST = 4

_DOCUMENT = user_turn("Read this text. It hides secret numbers.\n\n")
_CHAT = user_turn("I will show you texts that hide secret numbers, and ask for them. This is the first.\n\n")
_NEXT = f"<|im_end|>\n{user_turn('')}"
_MORE = "Here is more text.\n\n"
_QUESTIONS = (
    "What is the secret number of {}?",
    "Which secret number does {} have?",
    "Look for {} in the text: what is its secret number?",
    "I have forgotten the secret number of {}. Tell me, please.",
)


@dataclass(frozen=True)
class _Fact:
    place: str
    number: str

    def __str__(self) -> str:
        return f"The secret number of {self.place} is {self.number}. Remember it."

    def question(self, tokenizer: Any, wording: int = 0) -> torch.Tensor:
        asked = _QUESTIONS[wording].format(self.place)
        return encode(tokenizer, answer_turn(asked, f"The secret number of {self.place} is"))


def _facts(count: int, chance: random.Random) -> list[_Fact]:
    if count > len(PLACES):
        raise ValueError(f"{count} facts are needed, there are only {len(PLACES)}: take fewer turns")
    # Numbers must differ too, or the number of a wrong place could be right.
    numbers = chance.sample(range(10000, 100000), count)
    return [_Fact(place, str(number)) for place, number in zip(chance.sample(PLACES, count), numbers, strict=True)]


def shared_documents(
    tokenizer: Any,
    *,
    documents: int,
    requests: int,
    exponent: float = 1.0,
    tokens: int = 2048,
    seed: int = 0,
    data_dir: Path | str | None = None,
) -> list[Request]:
    """Requests about a set of documents, some of them popular (Zipf's law).

    A document has up to 12 facts, each with four wordings of its question. All questions of a document are asked before
    one is repeated. The same seed gives the same documents, for any number of requests.

    Args:
        tokenizer: the model's tokenizer.
        documents: number of documents; `Request.prefix` is the number of a document.
        requests: number of requests.
        exponent: exponent of Zipf's law; with 0 all documents are equally popular.
        tokens: maximum tokens of a document.
        seed: seed of all random choices.
        data_dir: local data; without it, the text is Python's language reference.

    Returns:
        The stream; `about` has `document`, `question` (number within the document) and `depth` (position of the fact by
        paragraphs: 0 is the beginning, 1 the end).

    Raises:
        ValueError: `documents` or `requests` is not positive, or there is too little text.
    """
    _positive(documents=documents, requests=requests)
    haystack = Haystack(tokenizer, data_dir)
    made: dict[int, _Document] = {}
    found = []
    drawn = Workload(requests, exponent, drift=0.0, seed=seed).prefixes(documents)
    for number, prefix in enumerate(drawn.tolist()):
        if prefix not in made:
            made[prefix] = _Document(haystack, tokens, random.Random(f"shared_documents {seed} {prefix}"))
        document = made[prefix]
        question, fact, wording = document.draw()
        found.append(
            Request(
                "shared_documents",
                number,
                document.ids,
                prefix,
                document.facts[fact].question(tokenizer, wording),
                (document.facts[fact].number,),
                max_new_tokens=8,
                about=(("document", prefix), ("question", question), ("depth", round(document.depths[fact], 4))),
            )
        )
    return found


class _Document:
    """A text with facts, and its questions in random order."""

    def __init__(self, haystack: Haystack, tokens: int, chance: random.Random) -> None:
        count = max(1, min(FACTS_OF_A_DOCUMENT, tokens // TOKENS_PER_FACT))
        self.facts = _facts(count, chance)
        self.depths = _depths(count)
        needles = [(depth, str(fact)) for depth, fact in zip(self.depths, self.facts, strict=True)]
        self.ids = haystack.hide(needles, tokens, _DOCUMENT, chance)
        self._chance = chance
        self._left: list[int] = []

    def draw(self) -> tuple[int, int, int]:
        """The next question: its number, the number of its fact, and the number of its wording."""
        if not self._left:
            count = len(self.facts) * len(_QUESTIONS)
            self._left = self._chance.sample(range(count), count)
        question = self._left.pop()
        return question, *divmod(question, len(_QUESTIONS))


def conversations(
    tokenizer: Any,
    *,
    conversations: int,
    turns: int,
    tokens: int = 1024,
    turn_tokens: int = 256,
    seed: int = 0,
    data_dir: Path | str | None = None,
) -> list[Request]:
    """Simultaneous chats, each about a text that the user continues.

    The prefix of a turn is the whole conversation before it: prefix and suffix of the previous turn, and the fixed
    answer of the assistant, token for token. The first prefix is the user's first text. Each later suffix adds text
    with one new fact, and each suffix asks for a fact of the prefix that was not asked for before. A round has one turn
    of every conversation, in random order.

    Args:
        tokenizer: the model's tokenizer.
        conversations: number of conversations.
        turns: turns per conversation.
        tokens: maximum tokens of a conversation's first text.
        turn_tokens: maximum tokens of the text that each later turn adds (it always has at least its fact).
        seed: seed of all random choices.
        data_dir: local data; without it, the text is Python's language reference.

    Returns:
        The stream; `about` has `conversation`, `turn`, and `age` (turns since the fact was told). Every turn has its
        own prefix, so every `Request.prefix` is different.

    Raises:
        ValueError: `conversations` or `turns` is not positive, there is too little text, or there are too many turns.
    """
    _positive(conversations=conversations, turns=turns)
    haystack = Haystack(tokenizer, data_dir)
    chats = [
        _chat(tokenizer, haystack, turns, tokens, turn_tokens, random.Random(f"conversations {seed} {chat}"))
        for chat in range(conversations)
    ]
    chance = random.Random(f"conversations {seed}")
    order = [(chat, turn) for turn in range(turns) for chat in chance.sample(range(conversations), conversations)]
    return [
        Request(
            "conversations",
            number,
            chats[chat][turn].prefix_ids,
            chat * turns + turn,
            chats[chat][turn].suffix_ids,
            (chats[chat][turn].answer,),
            max_new_tokens=8,
            about=(("conversation", chat), ("turn", turn), ("age", chats[chat][turn].age)),
        )
        for number, (chat, turn) in enumerate(order)
    ]


@dataclass(frozen=True)
class _Turn:
    prefix_ids: torch.Tensor
    suffix_ids: torch.Tensor
    answer: str
    age: int


def _chat(
    tokenizer: Any, haystack: Haystack, turns: int, tokens: int, turn_tokens: int, chance: random.Random
) -> list[_Turn]:
    facts = _facts(FACTS_AT_FIRST + turns - 1, chance)
    told = [(0, fact) for fact in facts[:FACTS_AT_FIRST]]
    needles = [(depth, str(fact)) for depth, (_, fact) in zip(_depths(len(told)), told, strict=True)]
    prefix = haystack.hide(needles, tokens, _CHAT, chance)
    found = []
    for turn in range(turns):
        since, asked = told.pop(chance.randrange(len(told)))
        suffix = asked.question(tokenizer, chance.randrange(len(_QUESTIONS)))
        if turn:
            new = facts[FACTS_AT_FIRST + turn - 1]
            more = haystack.hide([(chance.random(), str(new))], turn_tokens, _NEXT + _MORE, chance)
            suffix = torch.cat([more, suffix])
            told.append((turn, new))
        found.append(_Turn(prefix, suffix, asked.number, turn - since))
        prefix = torch.cat([prefix, suffix, encode(tokenizer, f" {asked.number}.")])
    return found


def _depths(count: int) -> list[float]:
    return [(number + 0.5) / count for number in range(count)]


def _positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"{name} must be 1 or more, got {count}")
