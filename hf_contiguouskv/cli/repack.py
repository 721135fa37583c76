"""The command `repack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..store.chains import chains
from ..store.repacking import Repacked
from .app import AsJson, OptionalKeys, app, find_entries, open_store
from .messages import messages_instead_of_tracebacks
from .output import counted, human_bytes, print_json, progress, say


@app.command()
@messages_instead_of_tracebacks
def repack(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Folder of a store.", show_default=False)],
    keys: OptionalKeys = None,
    everything: Annotated[bool, typer.Option("--all", help="All that is stored.")] = False,
    earlier: Annotated[
        bool,
        typer.Option(
            "--earlier", help="What an earlier release stored in formats 1 and 2: bring it to the present format."
        ),
    ] = False,
    index_bits: Annotated[
        int, typer.Option("--index-bits", metavar="8|2", help="Bits per number of the key index.")
    ] = 2,
    as_json: AsJson = False,
) -> None:
    """Give stored prefixes another form: a key index of 2 bits, and chunks that bring their keys; or of 8 bits.

    Keys and values stay as they are, and what a prefix continues goes along. Each file is verified, written beside the
    old one, and put in its place at once, so an interrupted command can be given again.
    """
    if [bool(keys), everything, earlier].count(True) != 1:
        raise InputError("name the prefixes, or --all, or --earlier")
    if earlier:
        _repack_earlier(store, as_json)
        return
    done: list[Repacked] = []
    with open_store(store, create=False) as opened:
        entries = opened.entries()
        if not everything:
            # A prefix of both forms could only be served exactly, so what they continue goes along.
            named = [entry.key for entry in find_entries(opened, keys or [])]
            wanted = {row.key for chain in chains(opened, named).values() for row in chain}
            entries = [entry for entry in entries if entry.key in wanted]
        total, finished = sum(entry.bytes for entry in entries), 0
        with progress("repacking") as report:
            for entry in entries:
                found = opened.repack(entry.key, index_bits)
                if found is not None:
                    done.append(found)
                finished += entry.bytes
                report(finished, total)
    before, after = (sum(getattr(one, field) for one in done) for field in ("before", "after"))
    if as_json:
        print_json({"repacked": [one.key for one in done], "bytes_before": before, "bytes_after": after})
        return
    for one in done:
        say(f"repacked {one.key}")
    sizes = f"{human_bytes(before)}, now {human_bytes(after)}"
    say(f"{counted(len(done), 'segment')} repacked ({sizes}), {len(entries) - len(done):,} unchanged")


def _repack_earlier(store: Path, as_json: bool) -> None:
    with open_store(store, create=False) as opened:
        with progress("repacking") as report:
            brought = opened.repack_earlier(report)
        left = opened.inner.earlier.waiting_bytes
    if as_json:
        print_json({"repacked": brought, "bytes_left": left})
        return
    for key in brought:
        say(f"repacked {key}")
    say(f"{counted(len(brought), 'segment')} repacked, {human_bytes(left)} left (`gc` names them)")
