"""`python -m eval run`, `report` and `list`; `contiguouskv eval ...` when installed."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from typer.core import TyperGroup

from .dtypes import DtypeOption
from .presets import PRESETS

# What the extra `eval` of pyproject.toml installs, by the names that are imported.
EXTRA = ("datasets", "evaluate", "gguf", "markdown_it", "matplotlib", "pandas", "rouge_score")


class _NeedsExtra(TyperGroup):
    """A group of commands that says in one line which extra is missing."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            if error.name is None or error.name.partition(".")[0] not in EXTRA:
                raise
            advice = f"needs the extra 'eval' (pip install 'hf-contiguouskv[eval]'): {error}"
            typer.echo(f"{ctx.command_path} {advice}", err=True)
            raise typer.Exit(2) from None


app = typer.Typer(
    cls=_NeedsExtra,
    help="Measure time to first token and quality against every rival system.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)

PAPER_TASKS = ("sst2", "subj", "trec", "rte")
# How the value of an option is written, by its kind.
_VALUES = {"": "", "share": "=SHARE", "count": "=N"}
_CHOICE = "may be repeated; the command `list` names them all"


@app.command()
def run(
    context: typer.Context,
    out: Annotated[Path, typer.Argument(help="folder of the run; an interrupted run is continued")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="a run with a name, which other options change. "
            + " ".join(f"{name}: {one.about}." for name, one in PRESETS.items())
        ),
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(
            help="task, file:NAME.jsonl with your own questions, or text:PREFIX+SUFFIX and random:PREFIX+SUFFIX with "
            f"numbers of tokens, for time alone; {_CHOICE}. Without any, and without streams: all four of the paper, "
            "and needles"
        ),
    ] = None,
    system: Annotated[
        list[str] | None, typer.Option(help=f"NAME[@BUDGET][+OPTION...]; {_CHOICE}. Default: all rivals")
    ] = None,
    state: Annotated[
        list[str] | None, typer.Option(help="where the prefix is when a request begins; may be repeated; default: cold")
    ] = None,
    budget: Annotated[list[float] | None, typer.Option(help="share of the prefix; may be repeated")] = None,
    kept_tokens: Annotated[int | None, typer.Option(help="in place of a budget, so many tokens of the prefix")] = None,
    stream: Annotated[list[str] | None, typer.Option(help=f"request stream; {_CHOICE}")] = None,
    requests: Annotated[int, typer.Option(help="requests of each task whose answers are judged")] = 50,
    first: Annotated[
        int, typer.Option(help="number of the first request; 50 continues a run of 50 requests in another folder")
    ] = 0,
    prefixes: Annotated[int, typer.Option(help="prefixes of each few-shot task")] = 5,
    timed_requests: Annotated[
        int,
        typer.Option(help="requests of each task, where only the time is measured (all requests of text: and random:)"),
    ] = 5,
    stream_requests: Annotated[int, typer.Option(help="requests of each stream")] = 100,
    documents: Annotated[int, typer.Option(help="documents (or conversations) of a stream")] = 10,
    memory_share: Annotated[float, typer.Option(help="share of a stream's KV that a system may keep in memory")] = 0.25,
    judged_share: Annotated[float, typer.Option(help="share of a stream's answers that are judged")] = 0.25,
    read_gbps: Annotated[float | None, typer.Option(help="slow all reads down to so many GB/s")] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="name or folder; default: SmolLM2-135M-Instruct; or qwen2.5-coder-0.5b, random:llama, random:qwen2"
        ),
    ] = None,
    dtype: DtypeOption = "auto",
    data_dir: Annotated[str | None, typer.Option(help="local data; default: $CONTIGUOUSKV_DATA, else the Hub")] = None,
    device: Annotated[str | None, typer.Option(help="the model's device; default: a GPU if there is one")] = None,
    seed: int = 0,
) -> None:
    """Make requests in every system. Under `accelerate launch -m eval run ...` processes share them."""
    from .models import ModelNotAvailableError
    from .running import NotServedError, RunConfig, RunFolderError
    from .running import run as run_all
    from .summary import print_summary
    from .systems import DEFAULT_SYSTEMS
    from .tasks import DataMissingError

    if preset is not None and preset not in PRESETS:
        raise typer.BadParameter(f"preset must be one of {list(PRESETS)}, got {preset!r}")
    if budget and kept_tokens:
        raise typer.BadParameter("either --budget or --kept-tokens")
    arguments: dict[str, Any] = {
        "model": model,
        "dtype": dtype,
        "tasks": tuple(task or (() if stream else (*PAPER_TASKS, "needle"))),
        "streams": tuple(stream or ()),
        "systems": tuple(system or DEFAULT_SYSTEMS),
        "states": tuple(state or ("cold",)),
        "budgets": tuple(budget or (0.05, 0.25)),
        "kept_tokens": kept_tokens,
        "requests": requests,
        "first": first,
        "prefixes": prefixes,
        "timed_requests": timed_requests,
        "stream_requests": stream_requests,
        "documents": documents,
        "memory_share": memory_share,
        "judged_share": judged_share,
        "read_gbps": read_gbps,
        "seed": seed,
        "data_dir": data_dir,
        "device": device,
    }
    given = {_FIELDS.get(name, name) for name in context.params if _is_given(context, name)}
    if "budgets" in given:
        given.add("kept_tokens")  # A preset may have some.
    if preset is not None:
        arguments |= {name: value for name, value in PRESETS[preset].fields.items() if name not in given}
    try:
        config = RunConfig(**arguments)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    try:
        run_all(config, out, command=shlex.join([*str(context.find_root().info_name).split(), *sys.argv[1:]]))
    except (RunFolderError, DataMissingError, NotServedError, ModelNotAvailableError) as error:
        raise typer.BadParameter(str(error)) from error
    from accelerate import PartialState

    if PartialState().is_main_process:
        print_summary(out)


# Fields of a configuration whose options, which may be repeated, are called otherwise.
_FIELDS = {"task": "tasks", "system": "systems", "state": "states", "budget": "budgets", "stream": "streams"}


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the user gave an option."""
    source = context.get_parameter_source(name)
    return source is not None and not source.name.startswith("DEFAULT")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs")],
    out: Annotated[Path, typer.Option(help="folder for report.md, report.html and pictures")] = Path("report"),
    untimed: Annotated[
        list[Path] | None,
        typer.Option(help="another run, made while the machine did other work; only its answers count"),
    ] = None,
    against: Annotated[
        str, typer.Option(help="the system that times are divided by: NAME[@BUDGET][+OPTION...]")
    ] = "reload",
) -> None:
    """Turn one or several runs into Markdown, HTML and pictures."""
    from .report import RunError, write_report

    try:
        written = write_report(runs, out, untimed or (), against)
    except RunError as error:
        raise typer.BadParameter(str(error)) from error
    Console().print("\n".join(str(path) for path in written))


@app.command()
def positions(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs with a task of long answers, such as register")],
) -> None:
    """Print where in long answers what they say is right, and what a token took."""
    from .positions import print_positions
    from .report import RunError

    try:
        print_positions(runs)
    except RunError as error:
        raise typer.BadParameter(str(error)) from error


@app.command()
def pack(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="folder of a run")],
    out: Annotated[Path, typer.Argument(help="new folder; `report` reads it as it reads RUN")],
) -> None:
    """Copy a run with its rows compressed, to be kept beside a report."""
    from .report import RunError
    from .report.files import pack as pack_run

    try:
        written = pack_run(run_folder, out)
    except RunError as error:
        raise typer.BadParameter(str(error)) from error
    for path in written:
        typer.echo(f"{path} ({path.stat().st_size / 1e3:,.0f} KB)")


@app.command(name="list")
def list_all() -> None:
    """Name all tasks, streams, systems with their options, states, metrics and presets."""
    from .metrics import metric_names
    from .running.config import STATES, STREAMS
    from .systems import SYSTEMS
    from .tasks import TASKS, WRITTEN

    console = Console()
    systems = [
        name + "".join(f"[+{one.name}{_VALUES[one.value]}]" for one in kind.options) for name, kind in SYSTEMS.items()
    ]
    for kind, names in (
        ("tasks", [*TASKS, *WRITTEN]),
        ("streams", STREAMS),
        ("systems", systems),
        ("states", STATES),
        ("metrics", metric_names()),
    ):
        console.print(f"{kind}: {', '.join(names)}", highlight=False, markup=False)
    for name, one in PRESETS.items():
        console.print(f"preset {name}: {one.about}", highlight=False, markup=False)


if __name__ == "__main__":
    app()
