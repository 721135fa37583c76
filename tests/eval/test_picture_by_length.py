"""The README's picture is drawn from the rows that are kept."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from eval.report.files import rows_of

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "docs" / "pictures" / "ttft_by_length.py"
RUN = ROOT / "docs" / "results" / "data" / "smollm2-lengths"


def test_the_picture_shows_medians_of_the_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawing = runpy.run_path(str(SCRIPT))
    rows, _ = rows_of(RUN)
    medians = drawing["medians_of"](rows)
    own = sorted(
        row["ttft_s"]
        for row in rows
        if (row["system"], row["budget"], row["prefix_tokens"]) == ("contiguouskv", 0.25, 8128)
    )
    assert medians["contiguouskv", 0.25][8128] == pytest.approx(1e3 * own[len(own) // 2])
    assert [list(by_length) for by_length in medians.values()] == [[256, 512, 1024, 2048, 4096, 8128]] * 6
    drawing["main"](RUN, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
    told = capsys.readouterr().out
    assert f"8,128: {medians['reload', 1.0][8128]:8,.0f}" in told
    with pytest.raises(ValueError, match="no cold, timed row of recompute"):
        drawing["medians_of"]([row for row in rows if row["system"] != "recompute"])


def test_a_crossover_is_where_ours_stays_below() -> None:
    crossover = runpy.run_path(str(SCRIPT))["crossover"]
    rival = {1: 10.0, 2: 20.0, 4: 40.0}
    assert crossover({1: 15.0, 2: 15.0, 4: 15.0}, rival) == pytest.approx(1.5)
    assert crossover({1: 15.0, 2: 15.0, 4: 45.0}, rival) is None
    assert crossover({1: 5.0, 2: 15.0, 4: 15.0}, rival) is None
