"""Commands of other packages: each entry point of the group `contiguouskv.commands` is one.

The name of an entry point is the command, its object is a `typer.Typer`. The library imports no such package by name;
this project's own evaluation package adds `eval` and `bench` in this way.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any

import typer

from ..errors import InputError
from .messages import messages_instead_of_tracebacks

GROUP = "contiguouskv.commands"


def extension_names() -> list[str]:
    """The names of all installed commands, sorted."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def extension(name: str) -> Any | None:
    """The command of that name for typer's group, or `None` if no installed package has one.

    A command whose package cannot be imported is a command that says so.
    """
    for entry in entry_points(group=GROUP, name=name):
        try:
            app = entry.load()
        except ImportError as error:
            app = _unavailable(entry, error)
        command = typer.main.get_command(app)
        command.name = name
        return command
    return None


def _unavailable(entry: EntryPoint, error: ImportError) -> typer.Typer:
    app = typer.Typer(add_completion=False)

    @app.command(
        help=f"Not available: {error}.",
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )
    @messages_instead_of_tracebacks
    def unavailable() -> None:
        raise InputError(f"the command {entry.name} needs {entry.module}, which cannot be imported: {error}")

    return app
