"""Commands that look after a store: `verify`, `gc`, `rm`, `pin` and `unpin`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from ..errors import ContiguousKVError, InputError
from ..store import StoreProblem
from .app import (
    Address,
    AsJson,
    CacheFolder,
    Keys,
    OptionalKey,
    OptionalKeys,
    StorePath,
    app,
    find_entries,
    find_entry,
    find_shared,
    open_store,
)
from .messages import complain, messages_instead_of_tracebacks
from .output import counted, human_bytes, print_json, progress, say, seconds_from


@app.command()
@messages_instead_of_tracebacks
def verify(
    store: StorePath,
    key: OptionalKey = None,
    deep: Annotated[
        bool,
        typer.Option("--deep", help="Also make what approximates keys and values again from them, and compare it."),
    ] = False,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Compare every stored byte with its checksum. Exit status 1 when something is wrong."""
    checked = 0

    def report(done: int, total: int) -> None:
        nonlocal checked
        checked = done
        show_progress(done, total)

    if isinstance(store, Address):
        problems, checked = _verify_shared(store, cache, key, deep)
        _tell_problems(problems, checked, as_json)
        return
    with open_store(store, cache, create=False) as opened:
        # (Not a look at the index before: whatever uses a damaged one repairs it, and nothing would be found.)
        chosen = None if key is None else find_entry(opened, key).key
        with progress("verifying") as show_progress:
            problems = opened.verify(chosen, report, deep)
    _tell_problems(problems, checked, as_json)


def _verify_shared(address: Path, cache: Path | None, key: str | None, deep: bool) -> tuple[list[StoreProblem], int]:
    """What is wrong in a shared store, and the bytes that were compared."""
    checked = 0

    def report(done: int, total: int) -> None:
        nonlocal checked
        checked = done
        show_progress(done, total)

    with open_store(address, cache, create=False) as opened:
        upkeep = opened.shared_upkeep
        entries = find_shared(upkeep, [key or ""], all_of_them=key is None)
        with progress("verifying") as show_progress:
            return upkeep.verify([entry.key for entry in entries], report, deep), checked


def _tell_problems(problems: list[StoreProblem], checked: int, as_json: bool) -> None:
    if as_json:
        print_json({"bytes": checked, "problems": [asdict(problem) for problem in problems]})
    else:
        for problem in problems:
            say(str(problem))
        say(counted(len(problems), "problem") if problems else "all checksums match")
    if problems:
        raise typer.Exit(1)


@app.command()
@messages_instead_of_tracebacks
def gc(
    store: StorePath,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    unused_for: Annotated[
        str | None,
        typer.Option(
            "--unused-for",
            metavar="TIME",
            help="Also delete what nobody used for so long, such as 30d, 12h, 90m; pinned prefixes stay.",
            show_default=False,
        ),
    ] = None,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Clean up: remove leftovers of crashes and damaged segments, index what is not indexed, forget what is gone."""
    ttl_s = None if unused_for is None else seconds_from(unused_for)
    with open_store(store, cache, create=False, ttl_s=ttl_s) as opened:
        report = opened.gc(dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run} | report.as_dict())
        return
    would = "would be " if dry_run else ""
    for label, names in (
        (f"{would}removed", report.removed),
        (f"{would}removed, it was damaged", report.quarantine),
        (f"{would}removed, unused for {unused_for}", report.expired),
        (f"{would}added to the index", report.indexed),
        (f"{would}forgotten, its file is gone", report.forgotten),
        ("unreachable until its parent is stored again", report.unreachable),
        ("unreadable", report.unreadable),
        ("being written", report.in_use),
    ):
        for name in names:
            say(f"{label}: {name}")
    say(f"{human_bytes(report.bytes_freed)} {would}freed")


@app.command()
@messages_instead_of_tracebacks
def rm(
    store: StorePath,
    keys: OptionalKeys = None,
    recursive: Annotated[
        bool, typer.Option("--recursive", "-r", help="Also delete the longer prefixes that continue them.")
    ] = False,
    remote: Annotated[
        bool, typer.Option("--remote", help="Of a shared store: delete them for all machines, not for this one.")
    ] = False,
    unused_for: Annotated[
        str | None,
        typer.Option(
            "--unused-for",
            metavar="TIME",
            help="With --remote, instead of keys: what no machine used for so long, such as 30d.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="With --remote: only say what would be deleted.")] = False,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Delete stored prefixes."""
    if remote:
        _rm_shared(store, cache, keys or [], unused_for, recursive=recursive, dry_run=dry_run, as_json=as_json)
        return
    if dry_run or unused_for is not None:
        raise InputError("--dry-run and --unused-for are for rm --remote; `contiguouskv gc` has them, too")
    if not keys:
        raise InputError("name the prefixes to delete")
    deleted: list[str] = []
    try:
        with open_store(store, cache, create=False) as opened:
            # A child goes before its parent, however they are named; with --recursive parents take children along.
            entries = sorted(find_entries(opened, keys or []), key=lambda entry: entry.tokens, reverse=not recursive)
            for entry in entries:
                if entry.key not in deleted:
                    deleted += opened.delete(entry.key, recursive=recursive)
    except (ContiguousKVError, OSError) as error:
        if as_json:
            complain(error, as_json=True, deleted=deleted)
            raise typer.Exit(2) from None
        raise
    finally:
        if not as_json:
            for key in deleted:  # Also where a later one could not be deleted.
                say(f"deleted {key}")
    if as_json:
        print_json({"deleted": deleted})


def _rm_shared(
    address: Path,
    cache: Path | None,
    keys: list[str],
    unused_for: str | None,
    *,
    recursive: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """`rm --remote`."""
    if not isinstance(address, Address):
        raise InputError("--remote is for the address of a shared store, and this is a folder")
    if bool(keys) == (unused_for is not None):
        raise InputError("name the prefixes to delete, or say --unused-for")
    with open_store(address, cache, create=False) as opened:
        upkeep = opened.shared_upkeep
        if unused_for is not None:
            gone = upkeep.delete_unused(seconds_from(unused_for), dry_run=dry_run)
        else:
            chosen = [entry.key for entry in find_shared(upkeep, keys)]
            gone = upkeep.delete(chosen, recursive=recursive, dry_run=dry_run)
    if as_json:
        print_json({"dry_run": dry_run, "deleted": [entry.key for entry in gone]})
        return
    would = "would be " if dry_run else ""
    for entry in gone:
        say(f"{would}deleted {entry.key}")
    say(f"{counted(len(gone), 'segment')}, {human_bytes(sum(entry.bytes for entry in gone))}")


@app.command()
@messages_instead_of_tracebacks
def pin(store: StorePath, keys: Keys, cache: CacheFolder = None, as_json: AsJson = False) -> None:
    """Keep prefixes when others are evicted."""
    _set_pinned(store, cache, keys, True, as_json)


@app.command()
@messages_instead_of_tracebacks
def unpin(store: StorePath, keys: Keys, cache: CacheFolder = None, as_json: AsJson = False) -> None:
    """Undo `pin`."""
    _set_pinned(store, cache, keys, False, as_json)


def _set_pinned(store: Path, cache: Path | None, keys: list[str], pinned: bool, as_json: bool) -> None:
    done = "pinned" if pinned else "unpinned"
    with open_store(store, cache, create=False) as opened:
        entries = find_entries(opened, keys)
        for entry in entries:
            (opened.pin if pinned else opened.unpin)(entry.key)
            if not as_json:
                say(f"{done} {entry.key}")
    if as_json:
        print_json({done: [entry.key for entry in entries]})
