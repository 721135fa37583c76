"""Words that others chose, on their way to a terminal, a log or an error message.

What a file, a folder or a stranger says may hold escape sequences (which move the cursor or rename the window), line
feeds (which begin a line that looks like ours), characters that change the direction of writing, or seven megabytes.
`shown` and `quoted` are for such words where they are put into a sentence. The sinks do the same for whole messages, so
that nothing depends on every sentence: `ContiguousKVError`, the filter of the logger "hf_contiguouskv" (installed
here), and the functions of `cli/output.py` that print.
"""

from __future__ import annotations

import logging
import re
import reprlib
from collections.abc import Mapping
from typing import Any

LIMIT = 200
MESSAGE_LIMIT = 2000
_TRACEBACK_LINES = 200

_SURROGATES = re.compile("[\ud800-\udfff]")
_NUMBERS = (int, float, type(None))


def escaped(text: str) -> str:
    """`text` in one line; what is not printable is written as Python does it: `\\x1b`, `\\n`, `\\u202e`, `\\udcff`."""
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def shown(words: object, limit: int = LIMIT) -> str:
    """Words from outside as they may go to a terminal or a log: escaped, and at most `limit` characters.

    What is longer is cut; the end says so with "…" and how many characters there were. What was shown once stays as it
    is when it is shown again.

    Args:
        words: a text, or anything else that has one, such as an exception or a path.
        limit: in characters, 40 or more.
    """
    text = str(words)
    # (No more than can be shown is escaped, however long it is.)
    clean = escaped(text[: limit + 1])
    if len(clean) <= limit:
        return clean
    end = f"… ({len(text):,} characters)"
    return clean[: limit - len(end)] + end


def quoted(value: object, limit: int = LIMIT) -> str:
    """A value from outside as Python writes it, in quotes if it is a text; escaped and cut as `shown` does."""
    if isinstance(value, (str, bytes)) and len(value) > limit:
        kind = "characters" if isinstance(value, str) else "bytes"
        end = f"… ({len(value):,} {kind})"
        return escaped(repr(value[:limit]))[: limit - len(end)] + end
    return shown(repr(value) if isinstance(value, (str, bytes)) else reprlib.repr(value), limit)


def encodable(text: str) -> str:
    """`text` with what UTF-8 cannot say (bytes of a path that are none) escaped; everything else stays."""
    return _SURROGATES.sub(lambda match: repr(match[0])[1:-1], text)


def in_messages(value: Any) -> Any:
    """A part of a message, ready to be put into it: a number stays as it is, all else becomes words that are shown."""
    return value if isinstance(value, _NUMBERS) else shown(value, MESSAGE_LIMIT)


class LogFilter(logging.Filter):
    """Makes every record of a logger printable and bounds its length, whatever its arguments are."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record in place; let all of them pass."""
        record.msg = shown(record.msg, MESSAGE_LIMIT)
        if isinstance(record.args, Mapping):
            record.args = {name: in_messages(value) for name, value in record.args.items()}
        elif record.args:
            record.args = tuple(in_messages(value) for value in record.args)
        if record.exc_info and not record.exc_text:
            lines = logging.Formatter().formatException(record.exc_info).splitlines()
            # (Indented: a line of a traceback must not look like a record.)
            record.exc_text = "\n".join(f"  {shown(line, MESSAGE_LIMIT)}" for line in lines[-_TRACEBACK_LINES:])
        return True


logging.getLogger("hf_contiguouskv").addFilter(LogFilter())
