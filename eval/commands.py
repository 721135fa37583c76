"""What this package adds to the `contiguouskv` command: `bench` and `eval`.

These are the entry points `contiguouskv.commands` of pyproject.toml. Every name here is a `typer.Typer`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_contiguouskv.cli import messages_instead_of_tracebacks
from hf_contiguouskv.errors import InputError

from .__main__ import app
from .dtypes import Dtype

__all__ = ["app", "bench_app"]

bench_app = typer.Typer(add_completion=False)


@bench_app.command()
@messages_instead_of_tracebacks
def bench(
    model: Annotated[
        str | None, typer.Option(help="Name or path of a causal LM.", show_default="SmolLM2-135M-Instruct")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of model and KV; auto: what is fast on this machine.")] = "auto",
    prefix_tokens: Annotated[int, typer.Option(help="Tokens of the stored prefix.")] = 8128,
    suffix_tokens: Annotated[int, typer.Option(help="Tokens of each request.")] = 32,
    budget: Annotated[float, typer.Option(help="Share of chunks, for the published method and ours.")] = 0.05,
    rounds: Annotated[int, typer.Option(help="Measured requests of each system.")] = 9,
    folder: Annotated[Path | None, typer.Option(help="Where to put the temporary store.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Measure time to first token, cold, every system interleaved in this one process."""
    from .bench import main
    from .models import ModelNotAvailableError

    try:
        main(model, prefix_tokens, suffix_tokens, budget, rounds, folder, json_path, dtype)
    except ModelNotAvailableError as error:
        raise InputError(" ".join(str(error).split())) from error
