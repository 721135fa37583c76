"""Recall by position: where in long answers is what they say right?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from eval.positions import figures, print_positions
from eval.report import RunError


def row(said: str, *, budget: float = 0.1, options: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
    about = {"answers": ["11", "22", "33", "44", "55", "66", "77"]}
    named = {"system": "contiguouskv", "budget": budget, "options": list(options), "about": about, "prediction": said}
    return named | more


def decoding(tokens: int, seconds: float, read: int = 0, chosen: int = 0) -> dict[str, Any]:
    return {"decoding": {"tokens": tokens, "seconds": seconds, "bytes_read": read, "reselections": chosen}}


def test_each_position_has_a_recall_of_its_own() -> None:
    found = figures(
        [
            row("11 22 33 44", **decoding(10, 1.0, 100, 2)),
            row("11 33 77", **decoding(20, 4.0, 300, 4)),
            row("66", options=("reselect=4",), **decoding(10, 3.0)),
            row("not judged") | {"prediction": None},
            row("no such task") | {"about": {"depth": 0.5}},
        ]
    )
    assert [one.setting for one in found] == ["contiguouskv@0.1", "contiguouskv@0.1+reselect=4"]
    assert [one.answers for one in found] == [2, 1]
    assert found[0].recall == (1.0, 0.5, 1.0, 0.5, 0.0, 0.0, 0.5)
    assert found[0].parts(3) == pytest.approx([0.75, 0.5, 0.25])
    assert found[0].parts(7) == list(found[0].recall)
    assert (found[0].seconds, found[0].bytes_read, found[0].reselections) == (0.2, 200, 3)
    assert found[1].parts(3) == pytest.approx([0.0, 0.0, 0.5])


def test_rows_of_an_earlier_version_have_no_time_per_token() -> None:
    (found,) = figures([row("11")])
    assert (found.seconds, found.bytes_read, found.reselections) == (0.0, 0, 0)


def test_a_run_becomes_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    needed = {"task": "register", "number": 0, "prefix": 0, "prefix_key": "0", "state": "cold"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row("11 22", **decoding(10, 1.0)) | needed) + "\n")
    print_positions([tmp_path], Console(width=120))
    said = capsys.readouterr().out
    assert "contiguouskv@0.1" in said
    assert "100.0" in said
    with pytest.raises(RunError):
        print_positions([tmp_path / "missing"])
