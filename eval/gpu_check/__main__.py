"""`python -m eval.gpu_check --out FOLDER`: checks and times the library's GPU path, in eight minutes.

Exit status: 0 if every stage is complete, no test failed and no answer was wrong; 1 if not; 2 if no stage could run.
"""

from __future__ import annotations

import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markdown import Markdown

from .file_system import InMemoryError, choose_folder, describe
from .outputs import tidy
from .results import NAME, Results
from .settings import STAGES, Settings
from .stages import LOG, ROOT, Runner

WIDTH = 160
FILES = ("gpu.json", "table.md", "tests.txt", "log.txt", "trace-*.json.gz")


def main(
    out: Annotated[Path, typer.Option(help="folder for the results: at most 8 files; earlier ones are replaced")],
    store: Annotated[
        Path | None, typer.Option(help="folder on a disk for stores, 50 GB; default: the one with the most room")
    ] = None,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="run on a CPU at tiny sizes, with a stand-in for the device")
    ] = False,
    stages: Annotated[str, typer.Option(help="stages, separated by commas")] = ",".join(STAGES),
    scale_deadlines: Annotated[float, typer.Option(min=0.01, help="factor on the deadlines of stages")] = 1.0,
    any_file_system: Annotated[
        bool, typer.Option("--any-file-system", help="go on even if stores lie in memory, where nothing is cold")
    ] = False,
) -> None:
    """Check and measure the device path, stage by stage; FOLDER always holds the results so far."""
    if not (ROOT / "tests").is_dir():
        raise typer.BadParameter(
            f"this check runs the tests of a checkout of the project, and there are none in {ROOT}"
        )
    # If output goes to a file, rich would assume a narrow terminal.
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    chosen = stages.split(",")
    unknown = sorted(set(chosen) - set(STAGES))
    if unknown:
        raise typer.BadParameter(f"no such stage: {', '.join(unknown)}; there are {', '.join(STAGES)}")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    for pattern in FILES:
        for path in out.glob(pattern):
            path.unlink()
    try:
        place = choose_folder([store.resolve()] if store else _candidates(), any_file_system)
    except (InMemoryError, OSError) as error:
        console.print(f"[bold red]{error}[/bold red]", soft_wrap=True)
        raise typer.Exit(2) from error
    folder = Path(tempfile.mkdtemp(prefix="gpu-check-", dir=place))
    make: Any = Settings.rehearsal if rehearse else Settings
    settings = make(str(out), str(folder), scale=scale_deadlines, any_file_system=any_file_system)
    # A request to end is handled like an interrupt, so that the results so far become a table.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = run(settings, chosen, console)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    raise typer.Exit(code)


def _candidates() -> list[Path]:
    """Folders for stores. The results folder is not one: a killed check must not leave parts of a store there."""
    places = [Path(tempfile.gettempdir()), Path("/var/tmp"), Path.home(), Path.cwd(), ROOT]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def run(settings: Settings, stages: list[str], console: Console) -> int:
    """Run stages, and print the table; returns the exit status."""
    out = Path(settings.out)
    results = Results(out)
    results.content |= {
        "rehearsal": settings.rehearse,
        "started": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "command": sys.argv[1:],
        "store": describe(settings.folder),
        "stages": {},
    }
    results.flush()
    console.print(f"Stores in {settings.folder}, results in {out}", soft_wrap=True, highlight=False)
    runner = Runner(settings, results)
    began = time.time()
    fatal = False
    try:
        for stage in stages:
            if fatal and stage != STAGES[-1]:
                continue
            own = runner.run(stage)
            fatal = fatal or own["status"] == "fatal"
            said = f" ({own['error']})" if own.get("error") else ""
            console.print(f"{stage}: {own['status']}, {own['seconds']:.0f} s{said}", soft_wrap=True, highlight=False)
    except KeyboardInterrupt:
        console.print("interrupted")
        runner.kill()
        results.read()
        results.content["interrupted"] = True
        if STAGES[-1] in stages:
            runner.run(STAGES[-1])
    results.content["seconds"] = time.time() - began
    results.content["limits"] = tidy(out)
    results.flush(pretty=True)
    _show(out, console)
    if fatal:
        return 2
    return 0 if is_well(results.content, stages) else 1


def _show(out: Path, console: Console) -> None:
    table = out / "table.md"
    if table.exists():
        console.print(Markdown(table.read_text()))
    else:
        console.print(f"There is no table. The end of {LOG}:\n{(out / LOG).read_text(errors='replace')[-3000:]}")
    sizes = ", ".join(f"{path.name} ({path.stat().st_size:,} bytes)" for path in sorted(out.iterdir()))
    console.print(f"{out}: {sizes}", soft_wrap=True, highlight=False)


def is_well(content: dict[str, Any], stages: list[str]) -> bool:
    """Whether all stages are complete, all tests passed and all answers were right."""
    found = content["stages"]
    if any(found.get(stage, {}).get("status") != "complete" or found[stage].get("failed") for stage in stages):
        return False
    groups = found.get("tests", {}).get("found", {}).values()
    if any(
        one["killed"] or one["not_ended"] or one["counts"].get("failed") or one["exit_codes"] != [0] for one in groups
    ):
        return False
    rows = found.get("table", {}).get("found", {}).get("rows", [])
    return not any(row.get("wrong_answers") for row in rows)


__all__ = ["NAME", "main", "run"]

if __name__ == "__main__":
    typer.run(main)
