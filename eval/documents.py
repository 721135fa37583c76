"""Real text that needs no network: the language reference that ships with Python."""

from __future__ import annotations

from typing import Any

import torch


def reference_text() -> str:
    """All topics of `pydoc_data.topics`, about 700 KB of English, always in the same order."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def document_ids(tokenizer: Any, tokens: int, begin: int = 0) -> torch.Tensor:
    """The first `tokens` token ids of the reference, int64 `(tokens,)`.

    Args:
        tokenizer: the model's tokenizer.
        tokens: how many.
        begin: the character at which the text begins; what comes before it follows its end.

    Raises:
        ValueError: the text has fewer tokens.
    """
    text = reference_text()
    # A token has about four characters. Tokenising the whole text would take seconds.
    text = (text[begin:] + text[:begin])[: 8 * tokens + 1000]
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if len(ids) < tokens:
        raise ValueError(f"the built-in document has {len(ids)} tokens, {tokens} were asked for; use a shorter prefix")
    return torch.tensor(ids[:tokens])
