"""Commands that carry prefixes from one store to another: `export` and `import`."""

from __future__ import annotations

import contextlib
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from .cli_app import AsJson, StorePath, app, complain, find_entries, messages_instead_of_tracebacks
from .cli_output import counted, human_bytes, print_json, progress, say
from .errors import InputError, StoreError
from .store import PrefixStore
from .store.bundle import BundleError, export_bundle, import_bundle, read_manifest

_ON_THE_HUB = re.compile(r"hf://([^/@\s]+/[^/@\s]+)(?:@(\S+))?")
_WANTED = ["bundle.json", "segments/*.safetensors"]


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
    as_json: AsJson = False,
) -> None:
    """Write prefixes, and what they continue, as a folder that others can import.

    The folder has a card and can be uploaded to the Hugging Face Hub as it is. It holds the token ids of the text.
    """
    if bool(keys) == everything:
        raise InputError("name the prefixes to export, or --all")
    with PrefixStore(store, create=False) as opened:
        entries = find_entries(opened, keys) if keys else opened.entries()
        with progress("exporting") as report_progress:
            report = export_bundle(opened, [entry.key for entry in entries], to, report_progress, base_model)
    if as_json:
        print_json(report.as_dict())
        return
    for segment in report.segments:
        say(f"{segment.key}  {counted(segment.tokens, 'token')}, {human_bytes(segment.bytes)}")
    say(f"{report.folder}: {counted(len(report.segments), 'segment')}, {human_bytes(report.bytes)}")
    if report.salted:
        say("only a store with the same salt finds them", err=True)


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
    as_json: AsJson = False,
) -> None:
    """Put the prefixes of a bundle into a store, new or not, after every byte was compared with its checksum.

    Exit status 1 when something was refused; nothing is added then, unless --skip-refused.
    """
    try:
        with _folder_of(source, Path(store), download_to) as folder:
            read_manifest(folder)  # Before a store is made for nothing.
            with PrefixStore(store) as opened, progress("importing") as report_progress:
                report = import_bundle(opened, folder, report_progress, skip_refused=skip_refused)
    except BundleError as error:
        complain(error, as_json=as_json)
        raise typer.Exit(1) from None
    if as_json:
        print_json(report.as_dict())
    else:
        for key in report.added:
            say(f"added {key}")
        for refused in report.refused:
            say(f"refused {refused.key}: {refused.reason}")
        say(
            f"{counted(len(report.added), 'segment')} added ({human_bytes(report.bytes)}), "
            f"{len(report.already_there):,} there already, {len(report.refused):,} refused"
        )
        if report.other_salt:
            say(f"only a store with the same salt finds {len(report.other_salt):,} of them", err=True)
    if report.refused:
        raise typer.Exit(1)


@contextlib.contextmanager
def _folder_of(source: str, store: Path, download_to: Path | None) -> Iterator[Path]:
    """The folder that `source` names; fetched first, where that is the Hub."""
    if not source.startswith("hf://"):
        if download_to is not None:
            raise InputError("--download-to is for hf://OWNER/NAME")
        yield Path(source)
        return
    match = _ON_THE_HUB.fullmatch(source)
    if match is None:
        raise InputError(f"expected hf://OWNER/NAME or hf://OWNER/NAME@REVISION, got {source!r}")
    if download_to is not None:
        yield _fetch(match[1], match[2], download_to)
        return
    # Beside the store, where there should be room; not in the Hub's cache, which is made of links.
    beside = next(folder for folder in Path(store).absolute().parents if folder.is_dir())
    with tempfile.TemporaryDirectory(prefix="contiguouskv-download-", dir=beside) as folder:
        yield _fetch(match[1], match[2], Path(folder))


def _fetch(name: str, revision: str | None, folder: Path) -> Path:
    import huggingface_hub

    try:
        huggingface_hub.snapshot_download(
            name, repo_type="model", revision=revision, allow_patterns=_WANTED, local_dir=folder
        )
    except Exception as error:
        # Every way in which a download can fail, in one line.
        raise StoreError(f"{name} could not be fetched from the Hub: {type(error).__name__}: {error}") from error
    return folder
