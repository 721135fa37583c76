"""`python -m eval.policies record|replay|report|tiers`: which eviction policy keeps the right chunks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from ..dtypes import DtypeOption
from ..models import cache_folder
from .trace import Trace, Workload

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

# Of everything that requests touch; at the last ones only hits are counted.
SIZES = (1 / 16, 1 / 8, 1 / 4)
MORE_SIZES = (1 / 2,)
# The same, of a device and of the host.
TIERS = ((1 / 16, 1 / 16), (1 / 16, 1 / 4), (1 / 8, 1 / 4))

Folder = Annotated[
    Path | None, typer.Option(help="Where trace, store and results lie, on a real disk; default: the cache folder.")
]


def folder_of(chosen: Path | None) -> Path:
    """Where everything that is not committed lies."""
    return chosen or cache_folder() / "policies"


@app.command()
def record(
    folder: Folder = None,
    model_name: Annotated[str | None, typer.Option("--model", help="Name or folder; default: SmolLM2-135M.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with nq_open/; default: text that needs no download.")
    ] = None,
    prefixes: Annotated[int, typer.Option(help="How many.")] = 50,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest prefix.")] = 512,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prefix.")] = 2048,
    requests: Annotated[int, typer.Option(help="That a replay will make.")] = Workload.requests,
    exponent: Annotated[float, typer.Option(help="Of Zipf's law.")] = Workload.exponent,
    budget: Annotated[float, typer.Option(help="Share of the chunks that is selected.")] = 0.10,
    seed: Annotated[int, typer.Option(help="Of lengths, questions and popularity.")] = 0,
    again: Annotated[bool, typer.Option("--again", help="Even if there is a trace.")] = False,
    dtype: DtypeOption = "auto",
) -> None:
    """Run the model on many questions to many prefixes, and keep what it selected."""
    path = folder_of(folder) / "trace.npz"
    if path.exists() and not again:
        print(f"{path} is there already; --again records it again")
        return
    from ..models import load_model
    from .record import record as run
    from .texts import documents

    model, tokenizer = load_model(model_name, dtype=dtype)
    print(f"runs in {model.runs_in}")
    texts = documents(tokenizer, prefixes, (shortest, longest), seed, data_dir)
    workloads = [Workload(requests, exponent, drift, seed=seed) for drift in (Workload.drift, 0.0)]
    found = run(model, tokenizer, texts, workloads, budget)
    found.about["text"] = "built-in reference" if data_dir is None else "nq_open"
    found.save(path)
    print(f"{found.about['recorded_requests']} requests to {prefixes} prefixes: {path}, {path.stat().st_size} bytes")


@app.command()
def replay(
    folder: Folder = None,
    policy: Annotated[list[str] | None, typer.Option(help="May be repeated; default: all.")] = None,
    share: Annotated[list[float] | None, typer.Option(help="Memory as a share of all that is touched.")] = None,
    more_share: Annotated[list[float] | None, typer.Option(help="The same, for hit rates only.")] = None,
    requests: Annotated[int, typer.Option(help="In each replay.")] = Workload.requests,
    exponent: Annotated[float, typer.Option(help="Of Zipf's law.")] = Workload.exponent,
    drift: Annotated[float, typer.Option(help="Share of the prefixes that swap ranks.")] = Workload.drift,
    drift_every: Annotated[int, typer.Option(help="Requests between two swaps.")] = Workload.drift_every,
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated; only the first is timed.")] = None,
    rounds: Annotated[int, typer.Option(help="0: hit rates alone, without reads.")] = 1,
    warm_up: Annotated[int, typer.Option(help="Requests that are not counted.")] = 500,
    timed: Annotated[int, typer.Option(help="Requests at the end that TTFT is taken of.")] = 250,
    pace: Annotated[float, typer.Option(help="Factor on recorded compute times; 0: no compute.")] = 1.0,
) -> None:
    """Replay what was recorded with every policy and size, without drift (timed) and with drift (hit rates)."""
    from hf_contiguouskv.memory import POLICIES

    from .compare import plan, run_replays
    from .replay import fill_store

    place = folder_of(folder)
    trace = Trace.load(place / "trace.npz")
    scenarios = plan(seed or [0], rounds, Workload(requests, exponent, drift, drift_every))
    store = fill_store(place, trace)
    results = run_replays(
        place / "trace.npz",
        store,
        scenarios,
        policy or list(POLICIES),
        share or list(SIZES),
        more_share or list(MORE_SIZES),
        warm_up,
        timed,
        pace,
    )
    path = place / "replay.json"
    path.write_text(json.dumps(results, indent=2) + "\n")
    print(f"{len(results['rows'])} replays: {path}")


@app.command()
def tiers(
    folder: Folder = None,
    policy: Annotated[list[str] | None, typer.Option(help="May be repeated; default: all.")] = None,
    share: Annotated[
        list[str] | None,
        typer.Option(metavar="DEVICE:HOST", help="Memory of both as shares of all that is touched; may be repeated."),
    ] = None,
    requests: Annotated[int, typer.Option(help="In each replay.")] = 1000,
    exponent: Annotated[float, typer.Option(help="Of Zipf's law.")] = Workload.exponent,
    seed: Annotated[int, typer.Option(help="Of the requests.")] = 0,
    warm_up: Annotated[int, typer.Option(help="Requests that are not counted.")] = 300,
    into: Annotated[Path, typer.Option(help="Folder for tiers.md and .json.")] = Path("docs/results"),
) -> None:
    """Replay what was recorded with memory of an imitated device above the host's: hit rates alone."""
    from hf_contiguouskv.memory import POLICIES

    from .compare import run_tiers
    from .replay import fill_store
    from .report import write_tiers

    place = folder_of(folder)
    store = fill_store(place, Trace.load(place / "trace.npz"))
    pairs = [_pair(one) for one in share] if share else list(TIERS)
    load = Workload(requests, exponent, 0.0, seed=seed)
    found = run_tiers(place / "trace.npz", store, load, policy or list(POLICIES), pairs, warm_up)
    for path in write_tiers(found, into):
        print(path)


def _pair(text: str) -> tuple[float, float]:
    try:
        device, host = map(float, text.split(":"))
    except ValueError:
        raise typer.BadParameter(f"expected DEVICE:HOST, two shares, got {text!r}") from None
    if not (0.0 <= device < float("inf") and 0.0 <= host < float("inf")):
        raise typer.BadParameter(f"DEVICE:HOST are shares of 0 or more, got {text!r}")
    return device, host


@app.command()
def report(
    folder: Folder = None,
    into: Annotated[Path, typer.Option(help="Folder for policies.md, .png and .json.")] = Path("docs/results"),
) -> None:
    """Write what the last `replay` measured as a table, a picture and JSON."""
    from .report import write

    for path in write(json.loads((folder_of(folder) / "replay.json").read_text()), into):
        print(path)


if __name__ == "__main__":
    app()
