"""Commands that carry prefixes from one store to another: `export` and `import`."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..store.bundle import BundleError, export_bundle, import_bundle, read_manifest
from ..store.bundle.hub import FetchedBundle, download_folder, fetch_bundle
from ..store.prefix_store import PrefixStore
from ..wording import quoted
from .app import Address, AsJson, CacheFolder, StorePath, app, find_entries, open_store
from .fleet import copy_here
from .messages import complain, messages_instead_of_tracebacks
from .output import counted, human_bytes, print_json, progress, say

_ON_THE_HUB = re.compile(r"hf://([^/@\s]+/[^/@\s]+)(?:@(\S+))?")


@app.command("export")
@messages_instead_of_tracebacks
def export_(
    store: StorePath,
    to: Annotated[
        Path, typer.Option("--to", metavar="FOLDER", help="The bundle; missing or empty.", show_default=False)
    ],
    keys: Annotated[
        list[str] | None, typer.Argument(metavar="KEY...", help="Keys, or their beginnings.", show_default=False)
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Export all that is stored.")] = False,
    base_model: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="The model's name on the Hub, for the card.", show_default=False),
    ] = None,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Write prefixes, and what they continue, as a folder that others can import.

    The folder has a card and can be uploaded to the Hugging Face Hub as it is. It holds the token ids of the text.
    """
    if bool(keys) == everything:
        raise InputError("name the prefixes to export, or --all")
    with _to_export(store, keys, to, cache) as (opened, chosen), progress("exporting") as report_progress:
        report = export_bundle(opened, chosen, to, report_progress, base_model)
    if as_json:
        print_json(report.as_dict())
        return
    for segment in report.segments:
        say(f"{segment.key}  {counted(segment.tokens, 'token')}, {human_bytes(segment.bytes)}")
    say(f"{report.folder}: {counted(len(report.segments), 'segment')}, {human_bytes(report.bytes)}")
    if report.salted:
        say("only a store with the same salt finds them", err=True)


@contextlib.contextmanager
def _to_export(
    store: Path, keys: list[str] | None, to: Path, cache: Path | None
) -> Iterator[tuple[PrefixStore, list[str]]]:
    """The store that is exported from, and the keys of the prefixes (`keys` or their beginnings; `None`: all).

    What lies in a shared store is first copied to a folder beside the bundle, where there should be room.
    """
    with open_store(store, cache, create=False) as opened:
        if not isinstance(store, Address):
            entries = find_entries(opened, keys) if keys else opened.entries()
            yield opened, [entry.key for entry in entries]
            return
        beside = next(folder for folder in to.absolute().parents if folder.is_dir())
        with (
            tempfile.TemporaryDirectory(prefix=".contiguouskv-", dir=beside) as place,
            open_store(Path(place) / "store") as copied,
        ):
            chosen, _ = copy_here(opened, copied, keys)
            yield copied, chosen


@app.command("import")
@messages_instead_of_tracebacks
def import_(
    store: StorePath,
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A bundle's folder, or hf://OWNER/NAME@REVISION (without @: the newest).",
            show_default=False,
        ),
    ],
    skip_refused: Annotated[
        bool, typer.Option("--skip-refused", help="Add what is sound although other segments are refused.")
    ] = False,
    download_to: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Keep the download here; one that was cut off goes on. Otherwise it is deleted afterwards.",
            show_default=False,
        ),
    ] = None,
    max_bytes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Download no more than this; if left out, what is free on the disk less a reserve.",
            show_default=False,
        ),
    ] = None,
    foreign_roots: Annotated[
        list[str] | None,
        typer.Option(
            "--foreign-root",
            metavar="HEX",
            help="Also add what was stored with another salt, with this root; may be given several times.",
            show_default=False,
        ),
    ] = None,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Put the prefixes of a bundle into a store, new or not, after every byte was compared with its checksum.

    From the Hub, only what the bundle lists is fetched. Exit status 1 when something was refused; nothing is added
    then, unless --skip-refused.
    """
    try:
        with _folder_of(source, Path(store), download_to, max_bytes) as (folder, fetched):
            read_manifest(folder)  # Before a store is made for nothing.
            with open_store(store, cache) as opened, progress("importing") as report_progress:
                report = import_bundle(
                    opened, folder, report_progress, skip_refused=skip_refused, foreign_roots=foreign_roots or ()
                )
    except BundleError as error:
        complain(error, as_json=as_json)
        raise typer.Exit(1) from None
    if as_json:
        print_json(report.as_dict() | {"commit": fetched.commit if fetched else None})
    else:
        for key in report.added:
            say(f"added {key}")
        for refused in report.refused:
            say(f"refused {refused.key}: {refused.reason}")
        say(
            f"{counted(len(report.added), 'segment')} added ({human_bytes(report.bytes)}), "
            f"{len(report.already_there):,} there already, {len(report.refused):,} refused"
        )
        if fetched:
            say(f"from {source} at commit {fetched.commit}")
        if report.other_salt:
            say(f"only a store with the same salt finds {len(report.other_salt):,} of them", err=True)
    if report.refused:
        raise typer.Exit(1)


@contextlib.contextmanager
def _folder_of(
    source: str, store: Path, download_to: Path | None, max_bytes: int | None
) -> Iterator[tuple[Path, FetchedBundle | None]]:
    """The folder that `source` names, and what is known of it where it had to be fetched from the Hub first."""
    if not source.startswith("hf://"):
        if download_to is not None or max_bytes is not None:
            raise InputError("--download-to and --max-bytes are for hf://OWNER/NAME")
        yield Path(source), None
        return
    match = _ON_THE_HUB.fullmatch(source)
    if match is None:
        raise InputError(f"expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION, got {quoted(source)}")
    if download_to is not None:
        download_to.mkdir(mode=0o700, parents=True, exist_ok=True)
        yield download_to, fetch_bundle(match[1], match[2], download_to, max_bytes)
        return
    # Beside the store, where there should be room; not in the Hub's cache, which is made of links.
    beside = next(folder for folder in Path(store).absolute().parents if folder.is_dir())
    with download_folder(beside) as folder:
        yield folder, fetch_bundle(match[1], match[2], folder, max_bytes)
