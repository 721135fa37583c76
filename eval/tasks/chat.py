"""What a tokenizer's chat template puts around a user message."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

_MESSAGE = "Here is the message."


@dataclass(frozen=True)
class Turn:
    """A user message, and the beginning of the answer to it.

    Attributes:
        begin, end: text before and behind the message; `end` ends where the answer begins.
        before_answer: text between `end` and an answer.
    """

    begin: str
    end: str
    before_answer: str


# The model continues a text as it is.
PLAIN = Turn("", "", " ")


class ChatTemplateError(ValueError):
    """A chat template cannot be used."""


def turn_of(tokenizer: Any) -> Turn:
    """The turn of a tokenizer's own chat template; `PLAIN` without a template.

    A beginning-of-text token that the tokenizer adds to every text is left out: requests get it anyway.

    Raises:
        ChatTemplateError: the template fails for one user message, or does not show it once.
    """
    if not getattr(tokenizer, "chat_template", None):
        return PLAIN
    messages = [{"role": "user", "content": _MESSAGE}]
    try:
        text: str = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    except (TemplateError, ValueError) as error:
        raise ChatTemplateError(f"the tokenizer's chat template fails for one user message: {error}") from error
    if text.count(_MESSAGE) != 1:
        raise ChatTemplateError(f"the tokenizer's chat template shows a user message {text.count(_MESSAGE)} times")
    begin, _, end = text.partition(_MESSAGE)
    return Turn(_without_bos(tokenizer, begin), end, "")


def _without_bos(tokenizer: Any, begin: str) -> str:
    bos: str | None = getattr(tokenizer, "bos_token", None)
    if bos is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]:
        return begin.removeprefix(bos)
    return begin
