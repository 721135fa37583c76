"""What all commands share: the application, arguments, errors in one line, keys that may be abbreviated.

Modules add their commands with `@app.command()` and wrap them in `messages_instead_of_tracebacks`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer

from .errors import ContiguousKVError, StoreError
from .store import PrefixInfo, PrefixStore

app = typer.Typer(name="contiguouskv", help="Prefix KV caches on disk.", no_args_is_help=True, add_completion=False)

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.", show_default=False)]
Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys, or their beginnings.", show_default=False)]
OptionalKey = Annotated[
    str | None,
    typer.Argument(metavar="KEY", help="Key, or its beginning; all of them if left out.", show_default=False),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def messages_instead_of_tracebacks(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Errors of this library, and of the operating system, become one line on stderr and exit status 2."""

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise  # `contiguouskv ls | head` is no mistake; typer ends quietly.
        except (ContiguousKVError, OSError) as error:
            complain(error)
            raise typer.Exit(2) from None

    return run


def complain(error: Exception) -> None:
    """One line on stderr."""
    typer.echo(f"contiguouskv: {' '.join(str(error).split())}", err=True)


def find_entries(store: PrefixStore, beginnings: list[str]) -> list[PrefixInfo]:
    """The stored prefixes whose keys begin so, each of them once.

    Raises:
        StoreError: for one of them there is none, or more than one.
    """
    found = [find_entry(store, beginning) for beginning in beginnings]
    return list({entry.key: entry for entry in found}.values())


def find_entry(store: PrefixStore, beginning: str) -> PrefixInfo:
    """The one stored prefix whose key begins with `beginning`.

    Raises:
        StoreError: none, or more than one.
    """
    found = [entry for entry in store.entries() if beginning and entry.key.startswith(beginning.lower())]
    if len(found) == 1:
        return found[0]
    if not found:
        raise StoreError(f"no stored prefix has a key that begins with {beginning!r}; `contiguouskv ls` lists them")
    names = ", ".join(entry.key for entry in found[:5]) + (", ..." if len(found) > 5 else "")
    raise StoreError(f"{len(found)} keys begin with {beginning!r} ({names}); give more digits")
