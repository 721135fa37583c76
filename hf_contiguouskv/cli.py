"""The `contiguouskv` command: look after a store from the shell.

Other modules add their commands with `@app.command()` and wrap them in `messages_instead_of_tracebacks`.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn
from rich.table import Table

from .errors import ContiguousKVError, StoreError
from .store import PrefixInfo, PrefixStore

app = typer.Typer(name="contiguouskv", help="Prefix KV caches on disk.", no_args_is_help=True, add_completion=False)

StorePath = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of the store.", show_default=False)]
Key = Annotated[
    str, typer.Argument(metavar="KEY", help="Key of a stored prefix, or its beginning.", show_default=False)
]
Keys = Annotated[list[str], typer.Argument(metavar="KEY...", help="Keys, or their beginnings.", show_default=False)]
OptionalKey = Annotated[
    str | None, typer.Argument(metavar="[KEY]", help="Key, or its beginning; all of them if left out.")
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
        except (ContiguousKVError, OSError) as error:
            typer.echo(f"contiguouskv: {error}", err=True)
            raise typer.Exit(2) from None

    return run


@app.command()
@messages_instead_of_tracebacks
def ls(store: StorePath, as_json: AsJson = False) -> None:
    """List the stored prefixes, oldest first."""
    with PrefixStore(store, create=False) as opened:
        entries = opened.entries()
    if as_json:
        typer.echo(json.dumps([asdict(entry) for entry in entries], indent=2))
        return
    table = Table("key", "tokens", "size", "dtype", "model", "continues", "last used", "uses", box=None, pad_edge=False)
    for column in (1, 2, 7):
        table.columns[column].justify = "right"
    for entry in entries:
        table.add_row(
            entry.key[:12] + (" (pinned)" if entry.pinned else ""),
            f"{entry.tokens:,}",
            human_bytes(entry.bytes),
            entry.dtype,
            entry.fingerprint[:8],
            entry.parent[:12],
            human_time(entry.last_used),
            str(entry.uses),
        )
    _console().print(table)
    total = sum(entry.bytes for entry in entries)
    typer.echo(f"{len(entries)} stored prefixes, {human_bytes(total)}")


@app.command()
@messages_instead_of_tracebacks
def info(store: StorePath, key: OptionalKey = None, as_json: AsJson = False) -> None:
    """Describe a store, or one stored prefix."""
    with PrefixStore(store, create=False) as opened:
        if key is None:
            facts = {"path": str(opened.path)} | opened.stats.as_dict()
            sizes = {"disk_bytes"}
            # What this very process has done is always nothing.
            for counter in ("host_bytes", "bytes_read", "bytes_written", "published", "evicted"):
                del facts[counter]
        else:
            facts = asdict(find_entry(opened, key))
            sizes = {"bytes"}
    if as_json:
        typer.echo(json.dumps(facts, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        if name in sizes:
            value = f"{value:,} ({human_bytes(value)})"
        elif name in ("created", "last_used"):
            value = human_time(value)
        table.add_row(name.replace("_", " "), escape(str(value)))
    _console().print(table)


@app.command()
@messages_instead_of_tracebacks
def verify(store: StorePath, key: OptionalKey = None) -> None:
    """Compare every stored byte with its checksum. Exit status 1 when something is wrong."""
    with PrefixStore(store, create=False) as opened:
        chosen = None if key is None else find_entry(opened, key).key
        columns = ("verifying", BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("verify", total=None)
            problems = opened.verify(chosen, lambda done, total: bar.update(task, completed=done, total=total))
    for problem in problems:
        typer.echo(str(problem))
    typer.echo("all checksums match" if not problems else f"{len(problems)} problems")
    if problems:
        raise typer.Exit(1)


@app.command()
@messages_instead_of_tracebacks
def gc(
    store: StorePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
) -> None:
    """Clean up after crashes: remove leftovers, index what is not indexed, forget what is gone."""
    with PrefixStore(store, create=False) as opened:
        report = opened.gc(dry_run=dry_run)
    would = "would be " if dry_run else ""
    for label, names in (
        (f"{would}removed", report.removed),
        (f"{would}added to the index", report.indexed),
        (f"{would}forgotten, its file is gone", report.forgotten),
        ("unreachable until its parent is stored again", report.unreachable),
        ("unreadable", report.unreadable),
        ("being written", report.in_use),
    ):
        for name in names:
            typer.echo(f"{label}: {name}")
    typer.echo(f"{human_bytes(report.bytes_freed)} {would}freed")


@app.command()
@messages_instead_of_tracebacks
def rm(
    store: StorePath,
    keys: Keys,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Also delete the longer prefixes that continue them.")
    ] = False,
) -> None:
    """Delete stored prefixes."""
    with PrefixStore(store, create=False) as opened:
        for entry in [find_entry(opened, key) for key in keys]:
            for deleted in opened.delete(entry.key, recursive=recursive):
                typer.echo(f"deleted {deleted}")


@app.command()
@messages_instead_of_tracebacks
def pin(store: StorePath, keys: Keys) -> None:
    """Keep prefixes when others are evicted."""
    with PrefixStore(store, create=False) as opened:
        for entry in [find_entry(opened, key) for key in keys]:
            opened.pin(entry.key)
            typer.echo(f"pinned {entry.key}")


@app.command()
@messages_instead_of_tracebacks
def unpin(store: StorePath, keys: Keys) -> None:
    """Undo `pin`."""
    with PrefixStore(store, create=False) as opened:
        for entry in [find_entry(opened, key) for key in keys]:
            opened.unpin(entry.key)
            typer.echo(f"unpinned {entry.key}")


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
    names = ", ".join(entry.key for entry in found[:5])
    raise StoreError(f"{len(found)} keys begin with {beginning!r} ({names}, ...); give more digits")


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


def _console() -> Console:
    # Tables are for reading: never cut a key because a pipe has no width.
    console = Console()
    return console if console.is_terminal else Console(width=160)


if __name__ == "__main__":
    app()
