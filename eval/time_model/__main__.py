"""`python -m eval.time_model`: predicted times to first token on machines that nobody has measured yet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..report import RunError
from .counting import count_all, load, save
from .page import print_probed, print_tables, rewrite
from .record import CountError
from .validation import medians


def main(
    count: Annotated[
        bool, typer.Option(help="First count again what requests of this version do, into counts.json (some minutes).")
    ] = False,
    probe: Annotated[
        bool, typer.Option(help="Instead of all that, measure what calls and operations cost on this processor.")
    ] = False,
    growth: Annotated[
        Path | None,
        typer.Option(help="Instead of all that, print the medians of this run of the preset `growth` as JSON."),
    ] = None,
    markdown: Annotated[
        Path | None, typer.Option(help="Rewrite the generated part of this page, and the picture beside it.")
    ] = None,
) -> None:
    """Print the tables."""
    console = Console()
    if probe:
        from .probe import probe as measure

        print_probed(measure(), console)
        return
    if growth is not None:
        try:
            print(json.dumps(medians(growth), indent=2))
        except RunError as error:
            raise typer.BadParameter(str(error)) from error
        return
    if count:
        save(count_all())
    try:
        counts = load()
    except CountError as error:
        raise typer.BadParameter(str(error)) from error
    print_tables(counts, console)
    if markdown is not None:
        rewrite(counts, markdown)
        console.print(f"written to {markdown}")


if __name__ == "__main__":
    typer.run(main)
