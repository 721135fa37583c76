"""Commands that carry prefixes between a folder and a shared store: `push` and `pull`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..store.chains import chains
from ..store.fleet.carrying import CarryReport
from ..store.fleet.carrying import pull as pull_segments
from ..store.fleet.carrying import push as push_segments
from ..store.prefix_store import PrefixStore
from ..store.rows import segment_by_key
from .app import Address, AsJson, CacheFolder, OptionalKeys, app, find_entries, find_shared, open_store, place_of
from .messages import messages_instead_of_tracebacks
from .output import counted, human_bytes, print_json, progress, say

Folder = Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.", show_default=False)]
Shared = Annotated[
    Path, typer.Argument(metavar="URL", help="Address of a shared store.", show_default=False, parser=place_of)
]
Everything = Annotated[bool, typer.Option("--all", help="All that is stored.")]
DeletedToo = Annotated[
    bool, typer.Option("--deleted-too", help="Also what `rm --remote` deleted from the shared store.")
]


@app.command()
@messages_instead_of_tracebacks
def push(
    store: Folder,
    url: Shared,
    keys: OptionalKeys = None,
    everything: Everything = False,
    deleted_too: DeletedToo = False,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Send prefixes, and what they continue, from a folder to a shared store.

    What is there already is left, so a command that was interrupted can be given again.
    """
    _require_choice(keys, everything, url)
    with open_store(store, create=False) as source, open_store(url, cache, keeps=False) as target:
        entries = find_entries(source, keys) if keys else source.entries()
        chosen = {row.key for chain in chains(source, [entry.key for entry in entries]).values() for row in chain}
        rows = source.inner.read(lambda db: [row for key in chosen if (row := segment_by_key(db, key)) is not None])
        with progress("pushing") as report_progress:
            catalog = target.shared_upkeep.catalog
            report = push_segments(source.inner.parts, rows, catalog, report_progress, deleted_too=deleted_too)
    _tell(report, "sent", as_json)


@app.command()
@messages_instead_of_tracebacks
def pull(
    url: Shared,
    store: Folder,
    keys: OptionalKeys = None,
    everything: Everything = False,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Copy prefixes, and what they continue, from a shared store to a folder, new or not.

    Every byte is verified. What is there already is left, so a command that was interrupted can be given again.
    """
    _require_choice(keys, everything, url)
    with open_store(url, cache, create=False) as source, open_store(store) as target:
        _, report = copy_here(source, target, keys)
    _tell(report, "copied", as_json)


def copy_here(source: PrefixStore, target: PrefixStore, keys: list[str] | None) -> tuple[list[str], CarryReport]:
    """Copy prefixes, and what they continue, from a shared store; the keys of the prefixes, and what was done.

    Args:
        source: a shared store.
        target: a folder's.
        keys: of prefixes, or their beginnings; `None`: all.
    """
    upkeep = source.shared_upkeep
    chosen = [entry.key for entry in find_shared(upkeep, keys or [], all_of_them=not keys)]
    with progress("pulling") as report_progress:
        inner = target.inner
        report = pull_segments(upkeep.heads(chosen), upkeep.backend, inner.parts, inner.publisher, report_progress)
    return chosen, report


def _require_choice(keys: list[str] | None, everything: bool, url: Path) -> None:
    if bool(keys) == everything:
        raise InputError("name the prefixes, or --all")
    if not isinstance(url, Address):
        raise InputError(f"{url} is a path; expected the address of a shared store, such as s3://bucket/folder")


def _tell(report: CarryReport, done: str, as_json: bool) -> None:
    if as_json:
        print_json(report.as_dict())
        return
    for key in report.carried:
        say(f"{done} {key}")
    carried = f"{counted(len(report.carried), 'segment')} {done} ({human_bytes(report.bytes)})"
    say(f"{carried}, {len(report.already_there):,} there already")
    if report.withheld:
        count = counted(len(report.withheld), "segment")
        say(f"{count} not sent: deleted from the shared store before (--deleted-too sends them)", err=True)
