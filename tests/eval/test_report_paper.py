"""The comparison with the paper, the result in words, and where systems overtake each other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from report_rows import (
    IMPRESS,
    MEMORY,
    OURS,
    PUBLISHED,
    RELOAD,
    STORE,
    cells,
    results,
    row,
    run_folder,
    section,
    whole_run,
)

from eval.report import crossings, paper, words, write_report
from eval.report.names import Rival, Setting
from eval.report.rows import load
from eval.statistics import Estimate

H2O = Setting("attentionstore_h2o", 0.05)


def test_waiting_says_how_much_reading_less_can_give(tmp_path: Path) -> None:
    rows = [row(n, STORE, 0.4, wait=0.3) for n in range(3)]
    rows += [row(n, OURS, 0.1, wait=0.02) for n in range(2)]
    text = section(
        write_report([run_folder(tmp_path / "run", rows)], tmp_path / "out")[0].read_text(), "Beside the paper"
    )
    assert "AttentionStore 75% and ContiguousKV (ours) at 5% 20%" in text
    assert "it would be 4.00 times as fast, less than the paper's 6.16x" in text
    assert "AttentionStore 100 ms and ContiguousKV (ours) at 5% 80 ms" in text


def test_the_reason_follows_the_rows(tmp_path: Path) -> None:
    rows = [row(n, STORE, 1.0, wait=0.9) for n in range(6)] + [row(n, OURS, 0.1, wait=0.05) for n in range(6)]
    text = section(
        write_report([run_folder(tmp_path / "run", rows)], tmp_path / "out")[0].read_text(), "Beside the paper"
    )
    assert "it would be 10.00 times as fast, no less than the paper's 6.16x" in text
    assert cells(text, "**ContiguousKV (ours)**", "5%", "AttentionStore")[3:] == [
        *("6", "6", "10.00 (10.00 - 10.00)", "6.16", "above")
    ]


@pytest.mark.parametrize(
    ("measured", "verdict"),
    [
        ((7.0, 6.5, 7.5), "above"),
        ((4.0, 3.0, 6.0), "below"),
        ((6.0, 5.0, 7.0), "not told apart"),
        ((7.0, math.nan, math.nan), "above (no interval)"),
    ],
)
def test_the_whole_interval_decides_beside_the_paper(measured: tuple[float, float, float], verdict: str) -> None:
    assert paper.compared(Estimate(*measured, 9, 9, 9), 6.16) == verdict


def test_baselines_are_compared_at_the_same_budget_unless_they_are_exact(tmp_path: Path) -> None:
    ten = Setting("contiguouskv", 0.1)
    rows = [row(0, setting, 0.1) for setting in (OURS, ten)]
    rows += [row(0, STORE, 0.3), row(0, Setting("impress", 0.1), 0.2), row(0, Setting("attentionstore_h2o", 0.5), 0.4)]
    rows += [row(0, Setting("attentionstore", 1.0, ("overlap",)), 0.2)]
    found = paper.speed_ups(results(tmp_path, rows).timed)
    assert [(one.baseline.system, one.baseline.options, one.ours.budget, one.paper) for one in found] == [
        ("attentionstore", (), 0.05, 6.16),
        # The paper's baselines do not overlap.
        ("attentionstore", ("overlap",), 0.05, None),
        ("attentionstore", (), 0.1, None),
        ("attentionstore", ("overlap",), 0.1, None),
        ("impress", (), 0.1, None),
    ]
    assert [one.measured.value for one in found] == pytest.approx([3.0, 2.0, 3.0, 2.0, 2.0])


def test_only_cold_requests_stand_beside_the_paper(tmp_path: Path) -> None:
    rows = [row(n, one, seconds) for n in range(2) for one, seconds in ((STORE, 0.4), (OURS, 0.1))]
    rows += [row(n, one, seconds, state="open") for n in range(2) for one, seconds in ((STORE, 0.1), (OURS, 0.1))]
    (found,) = paper.speed_ups(paper.cold_cut(results(tmp_path, rows)).rows)
    assert (found.measured.value, found.measured.requests) == (pytest.approx(4.0), 2)


def test_what_impress_reads_stands_beside_the_paper(tmp_path: Path) -> None:
    read = {"bytes_read": 700, "bytes_used": 50, "bytes_identified": 100}
    rows = [row(n, IMPRESS, 0.2, stats=read, details={"agreed": 0.25 + n / 2}) for n in range(2)]
    rows += [row(n, PUBLISHED, 0.1, stats={"bytes_read": 80, "bytes_identified": 30, "bytes_used": 50}) for n in (0, 1)]
    rows += [row(n, OURS, 0.1, stats={"bytes_read": 20, "bytes_identified": 5, "bytes_used": 15}) for n in (0, 1)]
    text = section(
        write_report([run_folder(tmp_path / "run", rows)], tmp_path / "out")[0].read_text(), "Beside the paper"
    )
    line = cells(text.split("What IMPRESS reads")[1], "IMPRESS", "5%")
    # 700 / 50; 600 / 50 of the published method and 600 / 15 of ours.
    assert line[2:] == [
        *("14.0", "12", "12.0 (12.0 - 12.0)†", "16.33", "40.0 (40.0 - 40.0)†", "50 (25 - 75)†", "2"),
    ]


def test_tails_beside_the_paper_are_of_each_task(tmp_path: Path) -> None:
    rows = [row(n, one, seconds) for n in range(20) for one, seconds in ((IMPRESS, 0.4), (OURS, 0.1))]
    rows += [row(n, one, 0.1, task="trec") for n in range(19) for one in (IMPRESS, OURS)]
    text = write_report([run_folder(tmp_path / "run", rows)], tmp_path / "out")[0].read_text()
    lines = [line for line in section(text, "Beside the paper").splitlines() if "| 20, 20 |" in line]
    assert lines == ["| **ContiguousKV (ours)** | 5% | IMPRESS | sst2 | 20, 20 | 4.00 |"]


def test_accuracy_is_lost_by_tasks_that_have_one(tmp_path: Path) -> None:
    rows = []
    for n, (mine, full) in enumerate([(1, 1), (0, 1), (1, 1), (0, 0)]):
        rows += [row(n, OURS, score=mine), row(n, MEMORY, score=full)]
    for n in range(2):
        rows += [row(n, OURS, task="needle", metric="needle_recall", score=0)]
        rows += [row(n, MEMORY, task="needle", metric="needle_recall", score=1)]
    lost = paper.losses(results(tmp_path, rows))
    assert [(name, value.value) for _, name, value in lost] == [
        ("accuracy (sst2)", pytest.approx(25.0)),
        ("all tasks' scores", pytest.approx(62.5)),
    ]


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((0.8, 0.7, 0.9), "faster"), ((1.2, 1.1, 1.3), "slower"), ((0.8, 0.7, 1.1), ""), ((0.5, math.nan, math.nan), "")],
)
def test_words_need_a_whole_interval_on_one_side(interval: tuple[float, float, float], verdict: str) -> None:
    assert words.verdict(Estimate(*interval, 9, 9, 9)) == verdict
    # Three requests may lie on one side by chance.
    assert words.verdict(Estimate(*interval, 3, 3, 3)) == ""


def test_few_prefixes_decide_nothing(tmp_path: Path) -> None:
    text = said(tmp_path, [row(n, one, seconds) for n in range(4) for one, seconds in ((OURS, 0.1), (RELOAD, 0.3))])
    assert "    - on fewer than 5 prefixes, which decide nothing, beside reload (3.00 times as fast, " in text
    assert "faster than" not in text


def said(folder: Path, rows: list[dict[str, Any]]) -> str:
    """The result in words."""
    return words.result(results(folder, rows), Rival())


def test_the_result_in_words_follows_the_rows(tmp_path: Path) -> None:
    """The same systems, and then with ours slower: each sentence turns round."""

    def rows(ours: float) -> list[dict[str, Any]]:
        times = {OURS: ours, RELOAD: 0.2, IMPRESS: 0.2, PUBLISHED: ours, MEMORY: 0.05, STORE: 0.2}
        found = [row(n, one, seconds) for n in range(6) for one, seconds in times.items()]
        return found + [row(n, one, state="open") for n in range(6) for one in (OURS, IMPRESS)]

    quick, slow = said(tmp_path / "quick", rows(0.1)), said(tmp_path / "slow", rows(0.4))
    cold, opened = quick.split("- **open**")
    assert (
        "- **cold**, ContiguousKV (ours) at 5%:\n"
        "    - faster than reload (2.00 times as fast, 2.00 - 2.00; 6 pairs, 6 prefixes), "
        "AttentionStore (2.00 times as fast, 2.00 - 2.00; 6 pairs, 6 prefixes) and "
        "IMPRESS at 5% (2.00 times as fast, 2.00 - 2.00; 6 pairs, 6 prefixes)\n"
        "    - not told apart from ContiguousKV (published) at 5% "
        "(1.00 times as fast, 1.00 - 1.00; 6 pairs, 6 prefixes)\n"
        "    - beside the references: in memory (2.00 times as long, 2.00 - 2.00; 6 pairs, 6 prefixes)"
    ) in cold
    assert "slower" not in cold
    # Reload has no such state, so nothing is said about it there.
    assert "not told apart from IMPRESS at 5%" in opened
    assert "reload" not in opened
    assert "    - slower than reload (2.00 times as long, 2.00 - 2.00; 6 pairs, 6 prefixes)" in slow
    assert "faster than" not in slow.split("- **open**")[0]


def test_one_table_has_ours_beside_all_others_at_every_budget(tmp_path: Path) -> None:
    half, default = Setting("contiguouskv", 0.5), Setting("contiguouskv", 0.25)
    times = {OURS: 0.1, default: 0.2, half: 0.3, RELOAD: 0.2, IMPRESS: 0.4, Setting("impress", 0.5): 0.1, MEMORY: 0.05}
    rows = [row(n, one, seconds) for n in range(6) for one, seconds in times.items()]
    text = said(tmp_path, [*rows, *(row(n, half, 0.1, state="open") for n in range(6))])
    # The words are of the default budget where it is, and else of the smallest.
    assert [line for line in text.splitlines() if line.startswith("- **")][:2] == [
        "- **cold**, ContiguousKV (ours) at 25%:",
        "- **open**, ContiguousKV (ours) at 50%:",
    ]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert cells[0] == ["state", "budget", "reload", "IMPRESS", "in memory (reference)"]
    assert cells[2:] == [
        ["cold", "5%", "0.50 (0.50 - 0.50)", "0.25 (0.25 - 0.25)", "2.00 (2.00 - 2.00)"],
        # No other system that chooses has this budget.
        ["cold", "25%", "1.00 (1.00 - 1.00)", "", "4.00 (4.00 - 4.00)"],
        ["cold", "50%", "1.50 (1.50 - 1.50)", "3.00 (3.00 - 3.00)", "6.00 (6.00 - 6.00)"],
        ["open", "50%", "", "", "2.00 (2.00 - 2.00)"],
    ]


def test_words_say_what_quality_is_lost(tmp_path: Path) -> None:
    rows = [row(n, one, score=score) for n in range(6) for one, score in ((OURS, 0.5), (MEMORY, 1.0))]
    text = said(tmp_path, rows)
    assert "beside in memory: -50.0 points of score (-50.0 to -50.0), 6 pairs; KL at the answer 0.0200 nats." in text
    assert said(tmp_path / "other", [row(0, RELOAD)]).startswith("No row of ContiguousKV (ours)")
    assert said(tmp_path / "stream", [row(0, OURS, stream="conversations")]).startswith("All requests are of streams")


def folders_at(tmp_path: Path, speeds: Sequence[float | None], times: dict[Setting, Sequence[float]]) -> list[Path]:
    """A run for each limit on reads, with the time of each setting there."""
    return [
        run_folder(
            tmp_path / f"at-{speed}",
            [row(n, one, own[place], read_gbps=speed) for n in range(5) for one, own in times.items()],
            read_gbps=speed,
        )
        for place, speed in enumerate(speeds)
    ]


def test_crossings_are_found_between_measured_speeds(tmp_path: Path) -> None:
    times = {RELOAD: (1.0, 0.4, 0.1), OURS: (0.25, 0.2, 0.2), IMPRESS: (0.5, 0.4, 0.4)}
    found = load(folders_at(tmp_path, (0.25, 1.0, 4.0), times))
    assert found.speeds == [0.25, 1.0, 4.0]
    assert found.speed == 4.0
    ours, impress = sorted(crossings.crossings(found, Rival(), "cold"), key=lambda one: one.first.system)
    assert (ours.first, ours.second, ours.told_apart) == (OURS, RELOAD, 2)
    # From 1/2 at 1 GB/s to 2 at 4 GB/s: equal at 2 GB/s.
    assert (ours.below, ours.at, ours.above) == pytest.approx((1.0, 2.0, 4.0))
    # Equal at 1 GB/s, where a ratio of 1 is told apart from nothing.
    assert (impress.first, impress.at, impress.below, impress.above) == (IMPRESS, 1.0, 0.25, 4.0)
    text = section(
        write_report(sorted(tmp_path.glob("at-*")), tmp_path / "out")[0].read_text(), "Faster and slower disks"
    )
    line = cells(text.split("Systems that overtake")[0], "**ContiguousKV (ours)**", "5%")
    assert line[2:] == ["0.25 (0.25 - 0.25), 5", "0.50 (0.50 - 0.50), 5", "2.00 (2.00 - 2.00), 5"]
    assert cells(text, "ContiguousKV (ours) at 5%", "reload") == [
        *("ContiguousKV (ours) at 5%", "reload", "1 and 4", "2", "yes")
    ]
    assert cells(text, "**ContiguousKV (ours)**", "5%", "IMPRESS")[3:] == [*("2.00 (2.00 - 2.00), 5",) * 3, "3.85"]
    assert "crossings-cold.png" in text


def test_reads_without_a_limit_stand_at_the_speed_of_the_disk(tmp_path: Path) -> None:
    """The disk gives 4 GB/s: a limit of 8 has no effect."""
    times = {RELOAD: (0.4, 0.1, 0.1), OURS: (0.2, 0.2, 0.2)}
    found = load(folders_at(tmp_path, (1.0, 8.0, None), times))
    assert crossings.places(found) == {1.0: 1.0, 8.0: 4.0, math.inf: 4.0}
    (one,) = crossings.crossings(found, Rival(), "cold")
    assert (one.below, one.at, one.above) == pytest.approx((1.0, 2.0, 4.0))
    # Everything else is of reads without a limit.
    assert len(found.timed) == 10


def test_without_a_known_disk_only_limits_are_interpolated(tmp_path: Path) -> None:
    rows = [row(n, one, seconds) for n in range(5) for one, seconds in ((RELOAD, 0.1), (OURS, 0.2))]
    slower = [row(n, one, seconds, read_gbps=1.0) for n in range(5) for one, seconds in ((RELOAD, 0.4), (OURS, 0.2))]
    folders = [
        run_folder(tmp_path / "free", rows, {"disk_gbps": None}),
        run_folder(tmp_path / "slower", slower, {"disk_gbps": None}, read_gbps=1.0),
    ]
    found = load(folders)
    assert crossings.places(found) == {1.0: 1.0}
    assert crossings.crossings(found, Rival(), "cold") == []
    text = section(write_report(folders, tmp_path / "out")[0].read_text(), "Faster and slower disks")
    assert "left out of what is interpolated" in text
    assert "crossings-cold.png" not in text


def test_warm_states_have_no_crossings(tmp_path: Path) -> None:
    folders = [
        run_folder(tmp_path / f"at-{speed}", whole_run(tasks=("sst2",), requests=3, read_gbps=speed), read_gbps=speed)
        for speed in (0.5, 2.0)
    ]
    assert crossings.states_with_speeds(load(folders)) == ["cold", "open", "keys_resident"]


def test_systems_of_other_budgets_do_not_cross(tmp_path: Path) -> None:
    other = Setting("impress", 0.25)
    found = load(folders_at(tmp_path, (0.5, 2.0), {OURS: (0.1, 0.2), other: (0.2, 0.1), H2O: (0.2, 0.1)}))
    assert [(one.first, one.second) for one in crossings.crossings(found, Rival(), "cold")] == [(OURS, H2O)]
