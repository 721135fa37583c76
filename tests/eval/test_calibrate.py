"""`contiguouskv calibrate`: the smallest share that is close enough, and what it costs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_rows import MEMORY, RELOAD, row, run_folder
from rich.console import Console
from tiny_model import save_tiny_model
from typer.testing import CliRunner, Result

from eval.calibrate import (
    TOLERANCE,
    calibration,
    config_for,
    fastest_within,
    figures,
    print_calibration,
    smallest_within,
)
from eval.commands import calibrate_app
from eval.report.names import Setting

# Per share: seconds to the first token, and nats from the whole cache at the answer.
SHARES = {0.05: (0.10, 0.5), 0.1: (0.09, 0.01), 0.25: (0.12, 0.2), 0.5: (0.11, 0.02), 1.0: (0.2, 0.0)}
QUESTIONS = 12


def calibrate(*arguments: object) -> Result:
    return CliRunner().invoke(calibrate_app, [str(argument) for argument in arguments])


def a_run(folder: Path, shares: dict[float, tuple[float, float]], spread: float = 0.0) -> Path:
    rows: list[dict[str, Any]] = []
    for number in range(QUESTIONS):
        rows += [row(number, MEMORY, 0.3, score=1.0), row(number, RELOAD, 0.4)]
        for share, (seconds, apart) in shares.items():
            own = apart + spread * (number % 2)
            rows.append(row(number, Setting("contiguouskv", share), seconds, kl_answer=own, score=float(number > 2)))
    return run_folder(folder, rows)


def test_a_share_is_taken_from_which_on_all_are_close(tmp_path: Path) -> None:
    found = figures(a_run(tmp_path / "run", SHARES))
    assert [one.share for one in found] == list(SHARES)
    # 10% is close by chance: 25% is not.
    assert smallest_within(found, 0.05).share == 0.5
    assert smallest_within(found, 0.3).share == 0.1
    assert smallest_within(found, 1.0).share == 0.05
    assert smallest_within(found, 0.001).share == 1.0


def test_the_fastest_is_one_of_those_that_are_close(tmp_path: Path) -> None:
    found = figures(a_run(tmp_path / "run", SHARES))
    assert fastest_within(found, 0.05).share == 0.5
    assert fastest_within(found, 0.3).share == 0.1
    assert fastest_within(found, 0.001).share == 1.0


def test_the_upper_end_of_the_interval_counts(tmp_path: Path) -> None:
    steady, uneven = {0.25: (0.1, 0.045), 1.0: (0.2, 0.0)}, {0.25: (0.1, 0.0), 1.0: (0.2, 0.0)}
    assert smallest_within(figures(a_run(tmp_path / "steady", steady)), TOLERANCE).share == 0.25
    found = figures(a_run(tmp_path / "uneven", uneven, spread=0.09))
    assert found[0].apart is not None
    assert found[0].apart.value == pytest.approx(0.045)
    assert found[0].apart.high > TOLERANCE
    assert smallest_within(found, TOLERANCE).share == 1.0


def test_the_table_names_times_answers_and_the_share_to_take(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    print_calibration(a_run(tmp_path / "run", SHARES), 0.3, console)
    said = console.export_text()
    (line,) = (line for line in said.splitlines() if " 10%" in line)
    for cell in ("90 (90 - 90)", "4.44", "0.0100", "75.0", "yes"):
        assert cell in line
    assert "12 questions; the whole cache scores 100.0" in said
    assert "Smallest share within 0.3 nats with 95% certainty: budget=0.1." in said
    assert "Fastest" not in said, "it is the smallest"


def test_programs_get_the_same_figures(tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", SHARES)
    told = json.loads(json.dumps(calibration(run, 0.3), allow_nan=False))
    assert (told["smallest_within"], told["fastest_within"]) == (0.1, 0.1)
    (one,) = (one for one in told["shares"] if one["share"] == 0.1)
    assert one["within"] is True
    assert one["ttft_s"]["value"] == pytest.approx(0.09)
    assert one["kl_answer"]["value"] == pytest.approx(0.01)
    assert one["times_faster_than_reload"]["value"] == pytest.approx(4.44, abs=0.01)
    assert told["whole_cache_score"]["value"] == 1.0


def test_where_nothing_is_close_the_whole_prefix_is_advised(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    print_calibration(a_run(tmp_path / "run", SHARES), 0.001, console)
    assert "use budget=1.0" in console.export_text()


def test_a_smaller_share_that_is_slower_is_told_beside_the_fastest(tmp_path: Path) -> None:
    console = Console(record=True, width=160)
    print_calibration(a_run(tmp_path / "run", {0.25: (0.3, 0.0), 1.0: (0.2, 0.0)}), 0.05, console)
    said = console.export_text()
    assert "budget=0.25." in said
    assert "Fastest of those within, in this state on this machine: budget=1." in said


def test_the_run_asks_all_questions_at_every_share_and_at_all(tmp_path: Path) -> None:
    path = tmp_path / "my.jsonl"
    path.write_text(json.dumps({"prefix": "a " * 40, "question": " b?", "answers": ["c"]}) + "\n")
    config = config_for(path, shares=(0.5, 0.25), requests=7, state="warm_host")
    assert (config.budgets, config.states, config.requests) == ((0.25, 0.5, 1.0), ("warm_host",), 7)
    assert config.systems == ("in_memory", "reload", "contiguouskv")


def test_questions_of_the_user_are_calibrated(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    text = "A long text about a town. It has a river, a market and two bridges. " * 12
    lines = [
        {"prefix": text + "The mayor is called Ines.", "question": " Who is the mayor?", "answers": ["Ines"]},
        {"prefix": text + "The mayor is called Paul.", "question": " Who is the mayor?", "answers": ["Paul"]},
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = calibrate("--questions", path, "--model", model, "--budget", 0.25, "--folder", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert " 25%" in result.stdout
    assert " 100%" in result.stdout
    assert "2 questions" in result.stdout
    assert "budget=" in result.stdout
    assert (tmp_path / "run" / "rows.jsonl").exists()


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        ('{"prefix": "x"}\n', (), "line 1"),
        (None, (), "my.jsonl"),
        ('{"prefix": "a b", "question": "c", "answers": ["d"]}\n', ("--budget", "2"), "budgets are shares"),
        ('{"prefix": "a b", "question": "c", "answers": ["d"]}\n', ("--state", "hot"), "state must be one of"),
    ],
)
def test_what_cannot_be_calibrated_is_one_line(
    tmp_path: Path, content: str | None, arguments: tuple[str, ...], message: str
) -> None:
    path = tmp_path / "my.jsonl"
    if content is not None:
        path.write_text(content)
    result = calibrate("--questions", path, *arguments)
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
