"""`python -m eval.network run|report`: time to the first token over links of several speeds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..dtypes import DtypeOption
from .links import LINKS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@app.command()
def run(
    out: Annotated[Path, typer.Argument(help="JSON file for the results.")],
    model_name: Annotated[str | None, typer.Option("--model", help="Name or folder; default: SmolLM2-135M.")] = None,
    tokens: Annotated[list[int] | None, typer.Option(help="Prefix lengths; may be repeated.")] = None,
    link: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(LINKS)}; may be repeated.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Requests of each kind.")] = 3,
    dtype: DtypeOption = "auto",
) -> None:
    """Measure. Nothing of the prefix is on the machine that asks; opening its store is inside the timer."""
    from ..models import load_model
    from .measure import measure

    unknown = set(link or ()) - LINKS.keys()
    if unknown:
        raise typer.BadParameter(f"no link is called {', '.join(sorted(unknown))}; there are {', '.join(LINKS)}")
    model, tokenizer = load_model(model_name, dtype=dtype)
    results = measure(model, tokenizer, tokens or [512, 2048, 8128], link or list(LINKS), rounds)
    out.write_text(json.dumps(results, indent=1) + "\n")
    print(f"{len(results['rows'])} requests: {out}")


@app.command()
def report(
    results: Annotated[Path, typer.Argument(help="JSON file of `run`.")],
    out: Annotated[Path, typer.Option(help="Markdown file; a picture lies beside it.")],
) -> None:
    """A table, a picture, and from which length on reading is faster than computing."""
    from .report import write_report

    write_report(json.loads(results.read_text()), out)
    print(out)


if __name__ == "__main__":
    app()
