"""`python -m eval.ablation run|report`: the value of each idea about selection and precision."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from tqdm.auto import tqdm

from ..dtypes import DtypeOption, dtype_name
from .table import as_markdown, dtypes_of
from .variants import FULL, SETS

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)

TASKS = ("needle", "sst2", "subj", "trec", "rte")


@app.command()
def run(
    out: Annotated[Path, typer.Argument(help="JSON Lines file to which rows are appended.")],
    sets: Annotated[list[str], typer.Option("--set", help=f"One of {', '.join(SETS)}; may be repeated.")],
    tasks: Annotated[list[str] | None, typer.Option("--task", help="May be repeated; default: five tasks.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of each task.")] = 24,
    share: Annotated[
        float | None, typer.Option(help="Share of the chunks, instead of the set's own (not for sets of shares).")
    ] = None,
    model_name: Annotated[str | None, typer.Option("--model", help="Name or folder; default: SmolLM2-135M.")] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Local data; default: $CONTIGUOUSKV_DATA, else the Hub.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the requests and of the examples before them.")] = 0,
    dtype: DtypeOption = "auto",
) -> None:
    """Answer requests in every variant of the chosen sets."""
    for name in sets:
        if name not in SETS:
            raise typer.BadParameter(f"must be of {', '.join(SETS)}, got {name!r}", param_hint="--set")
    from ..models import load_model
    from ..tasks import task_named
    from .judge import VariantJudge
    from .simulated import Simulation
    from .variants import at

    model, tokenizer = load_model(model_name, dtype=dtype)
    typer.echo(f"runs in {model.runs_in}")
    if before := dtypes_of(out) - {dtype_name(model.dtype)}:
        raise typer.BadParameter(
            f"{out} has rows in {', '.join(sorted(before))}: choose it, or another file", param_hint="--dtype"
        )
    variants = {name: [at(one, share) if share else one for one in SETS[name]] for name in sets}
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a") as file:
        for task in tasks or TASKS:
            asked = sorted(
                task_named(task, data_dir).requests(tokenizer, requests, seed), key=lambda request: request.prefix
            )
            bar = tqdm(total=len(asked), desc=task)
            for _, same in groupby(asked, key=lambda request: request.prefix):
                group = list(same)
                simulation = Simulation(model, group[0].prefix_ids)
                with simulation:
                    for request in group:
                        judge = VariantJudge(simulation, tokenizer, request)
                        about = {
                            "task": task,
                            "dtype": dtype_name(model.dtype),
                            "seed": seed,
                            "number": request.number,
                            "tokens": len(request.prefix_ids),
                        }
                        rows = [(FULL, "full")] + [(one, name) for name, some in variants.items() for one in some]
                        for variant, name in rows:
                            row = about | {"set": name, "variant": variant.name} | judge.judge(variant)
                            file.write(json.dumps(row) + "\n")
                        bar.update()
                file.flush()
            bar.close()


@app.command()
def report(
    rows: Annotated[list[Path], typer.Argument(help="Files of rows.")],
) -> None:
    """Print tables of the rows as Markdown."""
    print(as_markdown(rows))


if __name__ == "__main__":
    app()
