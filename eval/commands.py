"""What this package adds to the `contiguouskv` command: `bench` and `eval`.

These are the entry points `contiguouskv.commands` of pyproject.toml. Every name here is a `typer.Typer`.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from hf_contiguouskv.cli import messages_instead_of_tracebacks
from hf_contiguouskv.errors import InputError

from .__main__ import app
from .dtypes import Dtype
from .presets import PRESETS

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
    requests: Annotated[int, typer.Option(help="Measured requests of each system.")] = 9,
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run, which stays, on the disk to be measured.", show_default="a temporary one"
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Write the whole report to this folder.")] = None,
) -> None:
    """Measure time to first token, cold, every system in this one process: `eval run --preset bench`."""
    from .models import ModelNotAvailableError
    from .report import write_report
    from .running import NotServedError, RunConfig, RunFolderError, run
    from .summary import print_summary

    fields: dict[str, Any] = dict(PRESETS["bench"].fields)
    fields |= {"tasks": (f"text:{prefix_tokens}+{suffix_tokens}",), "requests": requests, "timed_requests": requests}
    try:
        config = RunConfig(model=model, dtype=dtype, **fields)
    except ValueError as error:
        raise InputError(str(error)) from error
    temporary = tempfile.TemporaryDirectory(prefix="contiguouskv-bench-") if folder is None else nullcontext(folder)
    with temporary as place:
        try:
            run(config, Path(place), command=shlex.join(["contiguouskv", *sys.argv[1:]]))
        except (ModelNotAvailableError, NotServedError, RunFolderError) as error:
            raise InputError(" ".join(str(error).split())) from error
        print_summary(Path(place))
        if out is not None:
            Console().print(f"written to {write_report([Path(place)], out)[0]}")
