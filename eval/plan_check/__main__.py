"""`python -m eval.plan_check`: how far predictions of `contiguouskv plan` are from measured times."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ..report import RunError
from ..summary import WIDTH
from .measured import DATA, LENDER, RUNS, check
from .page import print_all, rewrite
from .paper import paper_rows


def main(
    runs: Annotated[
        list[Path] | None, typer.Argument(metavar="RUN...", help="Folders of runs; else those of the page.")
    ] = None,
    speeds_from: Annotated[
        Path, typer.Option(help="Run whose speeds are taken for runs without rows of recompute.")
    ] = DATA / LENDER,
    markdown: Annotated[Path | None, typer.Option(help="Also rewrite the generated part of this page.")] = None,
) -> None:
    """Compare, and print the tables."""
    try:
        found = [check(run, speeds_from) for run in runs or [DATA / name for name in RUNS]]
    except RunError as error:
        raise typer.BadParameter(str(error)) from error
    paper = paper_rows()
    print_all(found, paper, Console(width=None if sys.stdout.isatty() else WIDTH))
    if markdown is not None:
        try:
            rewrite(markdown, found, paper)
        except ValueError as error:
            raise typer.BadParameter(str(error)) from error


if __name__ == "__main__":
    typer.run(main)
