"""What this package adds to the `contiguouskv` command: `bench`, `calibrate` and `eval`.

These are the entry points `contiguouskv.commands` of pyproject.toml. Every name here is a `typer.Typer`.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from hf_contiguouskv.cli import messages_instead_of_tracebacks
from hf_contiguouskv.cli.output import print_json
from hf_contiguouskv.errors import InputError

from .__main__ import app
from .dtypes import Dtype
from .presets import PRESETS

if TYPE_CHECKING:
    from .running import RunConfig

__all__ = ["app", "bench_app", "calibrate_app"]

bench_app = typer.Typer(add_completion=False)
calibrate_app = typer.Typer(add_completion=False)


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
    from .report import write_report
    from .running import RunConfig
    from .summary import print_summary

    fields: dict[str, Any] = dict(PRESETS["bench"].fields)
    fields |= {"tasks": (f"text:{prefix_tokens}+{suffix_tokens}",), "requests": requests, "timed_requests": requests}
    try:
        config = RunConfig(model=model, dtype=dtype, **fields)
    except ValueError as error:
        raise InputError(str(error)) from error
    with _run_in(folder, config, "bench") as place:
        print_summary(place)
        if out is not None:
            Console().print(f"written to {write_report([place], out)[0]}")


@calibrate_app.command()
@messages_instead_of_tracebacks
def calibrate(
    questions: Annotated[
        Path, typer.Option(help='JSON Lines: {"prefix": ..., "question": ..., "answers": [...]} in each line.')
    ],
    model: Annotated[
        str | None, typer.Option(help="Name or path of a causal LM.", show_default="SmolLM2-135M-Instruct")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Of model and KV; auto: what is fast on this machine.")] = "auto",
    tolerance: Annotated[
        float, typer.Option(help="KL divergence from the whole cache at the right answer, in nats.", min=0.0)
    ] = 0.05,
    budget: Annotated[
        list[float] | None,
        typer.Option(help="Share to try; may be repeated; 1.0 is always tried.", show_default="0.05, 0.1, 0.25, 0.5"),
    ] = None,
    requests: Annotated[int, typer.Option(help="Ask so many questions at most.")] = 50,
    state: Annotated[
        str, typer.Option(help="Where the prefix is when a request begins: cold, open, keys_resident or warm_host.")
    ] = "cold",
    folder: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the run, which stays, on the disk to be measured.", show_default="a temporary one"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the questions.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON for programs.")] = False,
) -> None:
    """Find the share of chunks that your own questions need: time, bytes and answers at several shares."""
    from .calibrate import SHARES, calibration, config_for, print_calibration

    try:
        config = config_for(
            questions, shares=budget or SHARES, requests=requests, model=model, dtype=dtype, state=state, seed=seed
        )
    except ValueError as error:
        raise InputError(str(error)) from error
    with _run_in(folder, config, "calibrate") as place:
        if as_json:
            print_json(calibration(place, tolerance))
        else:
            print_calibration(place, tolerance)


@contextmanager
def _run_in(folder: Path | None, config: RunConfig, name: str) -> Iterator[Path]:
    """Make a run in `folder`, or in a temporary one; the folder, while it is there."""
    from .models import ModelNotAvailableError
    from .running import NotServedError, RunFolderError, run
    from .tasks import DataMissingError
    from .tasks.own_data import OwnDataError

    temporary = tempfile.TemporaryDirectory(prefix=f"contiguouskv-{name}-") if folder is None else nullcontext(folder)
    with temporary as place:
        try:
            run(config, Path(place), command=shlex.join(["contiguouskv", *sys.argv[1:]]))
        except (ModelNotAvailableError, NotServedError, RunFolderError, DataMissingError, OwnDataError) as error:
            raise InputError(" ".join(str(error).split())) from error
        yield Path(place)
