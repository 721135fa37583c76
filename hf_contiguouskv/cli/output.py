"""How the command prints: tables for people, one JSON document for programs, progress on stderr.

Whatever is printed may come from a file or from a stranger: `say`, tables and `facts` escape what is not printable.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ..errors import InputError
from ..wording import encodable, escaped, quoted

_PIPE_WIDTH = 160
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}


def print_json(content: Any) -> None:
    """One JSON document, and nothing else, on stdout: ASCII, and without halves of characters, which UTF-8 lacks."""
    typer.echo(json.dumps(_encodable(content), indent=2))


def _encodable(content: Any) -> Any:
    if isinstance(content, str):
        return encodable(content)
    if isinstance(content, Mapping):
        return {_encodable(name): _encodable(value) for name, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_encodable(value) for value in content]
    return content


def say(words: object, *, err: bool = False) -> None:
    """One line on stdout (with `err`, on stderr), whatever is in the words."""
    _write(escaped(str(words)), err=err)


def _write(text: str, *, err: bool = False) -> None:
    # (A pipe may be too narrow for the lines of trees, or for what a name holds.)
    encoding = getattr(sys.stderr if err else sys.stdout, "encoding", None) or "utf-8"
    typer.echo(text.encode(encoding, "replace").decode(encoding), err=err)


def show(content: RenderableType) -> None:
    """Print a table or a text; in a pipe, wide enough that nothing is cut, and without spaces at the ends of lines."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(content)
        return
    console = Console(highlight=False, width=_PIPE_WIDTH)
    with console.capture() as captured:
        console.print(content)
    _write("\n".join(line.rstrip() for line in captured.get().rstrip("\n").split("\n")))


class _Table(Table):
    """A table whose cells are taken literally: no markup in words, and nothing that moves the cursor."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*(Text(escaped(cell)) if isinstance(cell, str) else cell for cell in cells), **options)


def styled(*parts: str | tuple[str, str]) -> Text:
    """A cell in several styles: words, or `(words, style)`."""
    return Text.assemble(*(escaped(part) if isinstance(part, str) else (escaped(part[0]), part[1]) for part in parts))


def columns(*names: str, right: tuple[str, ...] = ()) -> Table:
    """A table without lines. Cells of `right` are numbers; those of the last column may be long."""
    table = _Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in right else "left", no_wrap=name != names[-1])
    return table


def facts(pairs: dict[str, str]) -> Table:
    """Names with what there is to say, one a line."""
    table = _Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in pairs.items():
        table.add_row(name, value)
    return table


@contextlib.contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr, if that is a terminal; yields what must be called with `(bytes done, bytes in all)`."""
    console = Console(stderr=True)
    bars = (TextColumn(what), BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn())
    with Progress(*bars, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def counted(number: int, noun: str) -> str:
    """`1 prefix`, `1,024 prefixes`."""
    plural = noun + ("es" if noun.endswith("x") else "s")
    return f"{number:,} {noun if number == 1 else plural}"


def human_bytes(count: float) -> str:
    """`1536` as `1.5 KiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"


def human_time(seconds: float) -> str:
    """Seconds since the epoch as local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def human_age(seconds: float, now: float) -> str:
    """How long before `now` a moment was, both in seconds since the epoch: `3 min ago`."""
    age = max(0.0, now - seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if age >= size:
            return f"{age // size:.0f} {unit} ago"
    return "just now"


def human_seconds(seconds: float) -> str:
    """A length of time: `0.25 s`, `12 s`, `3 min 20 s`, `2 h 5 min`."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours:,} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def seconds_from(text: str) -> float:
    """`30d`, `12h`, `90m`, `45s` or `2w` in seconds.

    Raises:
        InputError: something else.
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)([smhdw])", text.strip())
    if match is None:
        raise InputError(f"expected a length of time such as 30d, 12h, 90m, 45s or 2w, got {quoted(text)}")
    return float(match[1]) * _SECONDS[match[2]]
