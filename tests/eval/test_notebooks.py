"""The notebooks run from top to bottom, in a short form with a tiny model, and show what they promise.

Tests of one notebook are a group: one process runs it once.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from tiny_model import save_tiny_model

from hf_contiguouskv.model.transformers_internals import cache_argument

# Of quickstart, which calls the model itself.
needs_5_24 = pytest.mark.skipif(
    cache_argument() != "cache", reason="it calls the cache as transformers 5.24 and later do"
)
ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = ("quickstart", "evaluate_your_model")
SHORT = {"TOKENS": "800", "ROUNDS": "2", "REQUESTS": "2", "PARAGRAPHS": "4", "DTYPE": "float32"}


def read(name: str) -> Any:
    return nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)


def executed(name: str, folder: Path) -> Any:
    """A notebook with its outputs; `CellExecutionError` shows the cell that failed."""
    notebook = read(name)
    model = save_tiny_model(folder / "model")
    settings = {f"CONTIGUOUSKV_NOTEBOOK_{key}": value for key, value in SHORT.items()}
    environment = (
        os.environ
        | settings
        | {
            "CONTIGUOUSKV_NOTEBOOK_MODEL": str(model),
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),
        }
    )
    client = NotebookClient(notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    client.execute(env=environment)
    warned = "".join(output["text"] for output in outputs(notebook) if output.get("name") == "stderr")
    assert "past_key_values" not in warned, "it uses a name that transformers has deprecated"
    return notebook


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return executed("quickstart", tmp_path_factory.mktemp("quickstart"))


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return executed("evaluate_your_model", tmp_path_factory.mktemp("evaluate"))


def outputs(notebook: Any) -> list[Any]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for output in outputs(notebook))


def shown(notebook: Any, kind: str) -> str:
    """All that was displayed in one format, for example `text/plain`."""
    return "\n".join(output["data"][kind] for output in outputs(notebook) if kind in output.get("data", {}))


def printed(notebook: Any) -> str:
    return "".join(output["text"] for output in outputs(notebook) if output.get("name") == "stdout")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_is_kept_without_outputs_and_opens_itself_in_colab(name: str) -> None:
    notebook = read(name)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert outputs(notebook) == []
    assert all(cell.execution_count is None for cell in notebook.cells if cell.cell_type == "code")
    assert f"/examples/{name}.ipynb)" in notebook.cells[0].source


@needs_5_24
@pytest.mark.xdist_group("quickstart")
def test_quickstart_says_what_it_runs_in(quickstart: Any) -> None:
    assert "runs in float32 on cpu (as asked)" in printed(quickstart)


@pytest.mark.xdist_group("evaluation")
def test_evaluation_says_what_it_runs_in(evaluation: Any) -> None:
    assert "runs in float32 (as asked)" in printed(evaluation)


@needs_5_24
@pytest.mark.xdist_group("quickstart")
def test_quickstart_times_every_system(quickstart: Any) -> None:
    table = shown(quickstart, "text/plain")
    for system in ("recompute", "exact, 100%", "default, 10%", "published, 5%"):
        assert system in table, table


@needs_5_24
@pytest.mark.xdist_group("quickstart")
def test_quickstart_draws_the_frontier_and_a_timeline(quickstart: Any) -> None:
    assert pictures(quickstart) == 2
    frontier = next(output["data"]["text/plain"] for output in outputs(quickstart) if "KL, nats" in str(output))
    assert all(name in frontier for name in ("default", "published")), frontier
    assert all(frontier.count(budget) >= 2 for budget in ("0.05", "0.10", "0.20", "0.40", "0.70", "1.00")), frontier


@needs_5_24
@pytest.mark.xdist_group("quickstart")
def test_quickstart_answers_and_says_what_was_read(quickstart: Any) -> None:
    assert printed(quickstart).count(" chunks, read ") == 3
    assert "compute waited" in printed(quickstart)


@pytest.mark.xdist_group("evaluation")
def test_an_own_task_is_run_and_reported(evaluation: Any) -> None:
    rows = int(SHORT["REQUESTS"]) * (1 + 2 * 2)  # in memory once, two systems at two budgets
    assert f"{rows} rows" in printed(evaluation)
    report = shown(evaluation, "text/markdown")
    for text in ("### Time to the first token", "### Quality", "| in memory |", "(published) |", "(ours)** |"):
        assert text in report, report
    assert pictures(evaluation) == 1


@pytest.mark.xdist_group("evaluation")
def test_evaluation_cleans_up(evaluation: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert left_over(tmp_path_factory, "evaluate") == []


@needs_5_24
@pytest.mark.xdist_group("quickstart")
def test_quickstart_cleans_up(quickstart: Any, tmp_path_factory: pytest.TempPathFactory) -> None:
    assert left_over(tmp_path_factory, "quickstart") == []


def left_over(factory: pytest.TempPathFactory, name: str) -> list[Path]:
    """Temporary folders of a notebook that are still there."""
    return list(factory.getbasetemp().glob(f"{name}*/{name}-*"))
