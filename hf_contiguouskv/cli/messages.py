"""Errors of commands: one line on stderr, and an object on stdout for programs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import typer

from ..errors import ContiguousKVError
from ..wording import MESSAGE_LIMIT, shown
from .output import print_json, say

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def messages_instead_of_tracebacks(command: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Errors of this library, and of the operating system, become one line on stderr and exit status 2.

    With `--json`, stdout has an object with `error` then.
    """

    @functools.wraps(command)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return command(*args, **kwargs)
        except BrokenPipeError:
            raise  # `contiguouskv ls | head` is no mistake; typer ends quietly.
        except (ContiguousKVError, OSError) as error:
            complain(error, as_json=bool(kwargs.get("as_json") or kwargs.get("json_path")))
            raise typer.Exit(2) from None

    return run


def complain(error: Exception, *, as_json: bool = False, **done: Any) -> None:
    """One line on stderr; for programs also an object on stdout.

    Args:
        error: what went wrong.
        as_json: whether there is an object.
        done: more fields of it, such as what had been done before.
    """
    if as_json:
        print_json(done | {"error": described(error)})
    say(f"contiguouskv: {described(error)['message']}", err=True)


def described(error: Exception) -> dict[str, str]:
    """An error for programs: its `type`, and its `message` in one line."""
    # (Errors of a command line know how to put it.)
    text = str(error.format_message()) if hasattr(error, "format_message") else str(error)
    return {"type": type(error).__name__, "message": shown(" ".join(text.split()), MESSAGE_LIMIT)}
