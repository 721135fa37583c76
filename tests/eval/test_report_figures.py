"""Figures of a report, worked out by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from report_rows import (
    IMPRESS,
    MEMORY,
    NO_QUALITY,
    OURS,
    RELOAD,
    STORE,
    cells,
    results,
    row,
    run_folder,
    section,
    whole_run,
)

from eval.report import measures, quality, write_report
from eval.report.names import Rival, Setting
from eval.report.rows import load
from eval.report.sections import Pictures
from eval.report.states import cut, cuts, states_of


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only words and tables are looked at here; pictures take most of the time."""
    monkeypatch.setattr(Pictures, "__call__", lambda *arguments: "")


def test_times_are_compared_request_by_request(tmp_path: Path) -> None:
    rows = [row(0, OURS, 0.1), row(1, OURS, 0.2), row(0, STORE, 0.4), row(1, STORE, 0.2), row(2, STORE, 9.0)]
    found = results(tmp_path, rows).timed
    # 4 and 1 times: the geometric mean is 2. Request 2 has no partner.
    ratio = measures.ratio(found, STORE, OURS)
    assert ratio is not None
    assert ratio.value == pytest.approx(2.0)
    assert (ratio.low, ratio.high) == pytest.approx((1.0, 4.0))
    assert (ratio.requests, ratio.prefixes, ratio.few_prefixes) == (2, 2, True)


def test_tasks_count_equally_in_ratios(tmp_path: Path) -> None:
    """Geometric means of 2 (of three requests) and 8 (of one) are 4, whatever the number of requests."""
    rows = [row(n, OURS, 0.1 * times) for n, times in enumerate((1, 2, 4))]
    rows += [row(n, RELOAD, 0.1) for n in range(3)]
    rows += [row(0, OURS, 0.8, task="trec"), row(0, RELOAD, 0.1, task="trec")]
    ratio = measures.ratio(results(tmp_path, rows).timed, OURS, RELOAD)
    assert ratio is not None
    assert ratio.value == pytest.approx(4.0)
    assert (ratio.requests, ratio.prefixes, ratio.fewest) == (4, 4, 1)


def test_a_ratio_counts_its_pairs_and_not_the_rows(tmp_path: Path) -> None:
    """Ours was made for 40 requests of three tasks, reload for three of each: nine pairs."""
    tasks = ("sst2", "trec", "needle")
    rows = [row(n, OURS, 0.1, task=task) for task in tasks for n in range(40)]
    rows += [row(n, RELOAD, 0.2, task=task) for task in tasks for n in range(3)]
    rows += [row(n, MEMORY, 0.05, task=task) for task in tasks for n in range(40)]
    text = write_report([run_folder(tmp_path / "run", rows)], tmp_path / "out")[0].read_text()
    times = section(text, "Time to the first token")
    line = cells(times.split("By task")[0], "**ContiguousKV (ours)**", "5%")
    assert line[2:4] == ["9", "9"]
    assert line[5:7] == ["0.50 (0.50 - 0.50)†", "9"]
    assert line[7:9] == ["2.00 (2.00 - 2.00)†", "9"]
    by_task = cells(times.split("By task")[1].split("Tails")[0], "**ContiguousKV (ours)**", "5%")
    assert by_task[2:] == ["100 (x0.50, 3)"] * 3
    said = section(text, "The result in words")
    assert "faster than reload (2.00 times as fast, 2.00 - 2.00†; 9 pairs, 9 prefixes)" in said
    assert "fewer than 5 prefixes" in times


def test_pairs_are_of_one_session_and_one_state(tmp_path: Path) -> None:
    rows = [row(0, OURS, 0.1), row(0, RELOAD, 0.2, session="another")]
    rows += [row(1, OURS, 0.1, state="warm_host"), row(1, RELOAD, 0.2)]
    rows += [row(2, OURS, 0.1), row(2, RELOAD, 0.4)]
    found = results(tmp_path, rows)
    (cold, warm) = cuts(found.timed, Rival())
    assert (cold.state, warm.state) == ("cold", "warm_host")
    ratio = cold.over_rival(OURS)
    assert ratio is not None
    assert (ratio.value, ratio.requests) == (pytest.approx(0.25), 1)
    assert warm.over_rival(OURS) is None
    assert not warm.has_rival
    text = write_report([tmp_path / "run"], tmp_path / "out")[0].read_text()
    assert "reload has no row of this state" in section(text, "Time to the first token").split("### warm_host")[1]


def test_references_stand_beside_every_state(tmp_path: Path) -> None:
    recompute = Setting("recompute", 1.0)
    rows = [row(0, OURS, 0.1, state=state) for state in ("cold", "keys_resident", "warm_device")]
    rows += [row(0, MEMORY, 0.05, state=state) for state in ("warm_host", "warm_device")]
    rows += [row(0, recompute, 0.8), row(0, RELOAD, 0.4)]
    timed = results(tmp_path, rows).timed
    # No state has only references.
    assert states_of(timed) == ["cold", "keys_resident", "warm_device"]
    for state in states_of(timed):
        found = cut(timed, state, Rival())
        assert measures.ratio(found.rows, OURS, MEMORY).value == pytest.approx(2.0)
        assert measures.ratio(found.rows, OURS, recompute).value == pytest.approx(1 / 8)
        # In memory is there once for each request: as warm as possible.
        assert measures.of(found.rows, MEMORY)["state"].tolist() == ["warm_device"]
        assert (found.over_rival(OURS) is not None) == (state == "cold")


def test_the_rival_can_be_chosen(tmp_path: Path) -> None:
    other, whole = Setting("impress", 0.25), Setting("attentionstore", 1.0, ("overlap",))
    rows = [row(0, one, seconds) for one, seconds in ((OURS, 0.1), (IMPRESS, 0.2), (other, 0.4), (whole, 0.8))]
    rows += [row(0, RELOAD, 0.3), row(0, Setting("contiguouskv", 0.25), 0.1)]
    timed = results(tmp_path, rows).timed
    for text, ours, name in (
        ("impress", 0.5, "IMPRESS"),
        ("impress@0.25", 0.25, "IMPRESS at 25%"),
        ("attentionstore+overlap", 1 / 8, "AttentionStore +overlap"),
    ):
        rival = Rival.parse(text)
        found = cut(timed, "cold", rival)
        assert rival.label == name
        assert found.over_rival(OURS).value == pytest.approx(ours)
    # Each at its own budget, and reload beside it.
    assert cut(timed, "cold", Rival.parse("impress")).over_rival(Setting("contiguouskv", 0.25)).value == 0.25
    for against, head in (
        ("impress", "| over IMPRESS | pairs | over reload | pairs |"),
        ("reload", "| over reload | pairs |"),
    ):
        text = write_report([tmp_path / "run"], tmp_path / "out", against=against)[0].read_text()
        assert f"| TTFT, ms {head}\n" in text


def test_rows_that_missed_their_state_have_no_times_or_bytes_but_scores(tmp_path: Path) -> None:
    read = {"bytes_read": 100, "bytes_used": 50}
    rows = [row(n, OURS, 0.1, stats=read) for n in range(3)]
    missed = {"departure": "cold: 3 pages were in the page cache", "score": 0.0}
    rows.append(row(3, OURS, 7.0, stats={"bytes_read": 10**9, "bytes_used": 50}, **missed))
    rows += [row(n, MEMORY, 0.1) for n in range(4)]
    found = results(tmp_path, rows)
    assert measures.of(found.timed, OURS)["ttft_s"].unique() == [0.1]
    volume = measures.volume(found.timed, OURS)
    assert volume is not None
    assert (volume.read, volume.share, volume.amplification) == pytest.approx((100, 0.1, 2.0))
    assert measures.difference(found.judged, OURS, MEMORY).value == pytest.approx(-0.25)
    text = write_report([tmp_path / "run"], tmp_path / "out")[0].read_text()
    assert "1 of 8 timed requests did not find their state" in text
    assert "1 x cold: 3 pages were in the page cache" in text
    assert cells(text, "`contiguouskv`", "cold")[2:] == ["5%", "4", "1"]


def test_scores_are_differences_of_the_same_requests_and_tasks_count_the_same(tmp_path: Path) -> None:
    rows = []
    for n, (mine, full) in enumerate([(1, 1), (0, 1), (1, 1), (0, 0)]):
        rows += [row(n, OURS, score=mine, perplexity=2.0), row(n, MEMORY, score=full)]
    for n in range(2):
        needle = {"task": "needle", "metric": "needle_recall"}
        rows += [row(n, OURS, **needle, score=0, kl=0.03, kl_answer=0.06, perplexity=8.0)]
        rows += [row(n, MEMORY, **needle, score=1)]
    found = results(tmp_path, rows)
    assert measures.difference(found.judged, OURS, MEMORY, "sst2").value == pytest.approx(-0.25)
    both = measures.difference(found.judged, OURS, MEMORY)
    assert both.value == pytest.approx((-0.25 - 1.0) / 2)
    assert both.low <= both.value <= both.high < 0
    assert measures.mean_of(found.judged, OURS, "kl").value == pytest.approx(0.02)
    assert measures.perplexity(found.judged, OURS) == pytest.approx(4.0)
    text = section(write_report([tmp_path / "run"], tmp_path / "out")[0].read_text(), "Quality")
    line = cells(text.split("Score by task")[0], "**ContiguousKV (ours)**", "5%")
    assert line[2:5] == ["6", "6", "2"]
    assert line[5].startswith("25.0 (")
    assert line[6].startswith("-62.5 (")
    assert line[7:] == ["6", "0.0400 (0.0400 - 0.0400)†"]
    by_task = cells(text.split("Points from in memory by task")[1].split("KL")[0], "**ContiguousKV (ours)**", "5%")
    assert by_task[3] == "-100.0 (-100.0 to -100.0)†"
    # What is measured over the question comes second.
    secondary = cells(text.split("Secondary:")[1].split("Answers to")[0], "**ContiguousKV (ours)**", "5%")
    assert secondary[2:] == ["6", "0.0200 (0.0200 - 0.0200)†", "90.0 (90.0 - 90.0)†", "4.000"]


def test_an_answer_counts_once_whatever_the_state_and_speed(tmp_path: Path) -> None:
    first = [row(0, OURS, score=1.0), row(1, OURS, score=0.0), row(0, OURS, state="open", score=0.0)]
    slower = [row(0, OURS, read_gbps=0.5, score=0.0), row(1, OURS, read_gbps=0.5, score=0.0)]
    found = load([run_folder(tmp_path / "first", first), run_folder(tmp_path / "slower", slower, read_gbps=0.5)])
    score = measures.mean_of(found.judged, OURS, "score")
    assert (score.value, score.requests) == (0.5, 2)


def test_rows_without_a_score_are_for_time_only(tmp_path: Path) -> None:
    found = results(tmp_path, [row(0, OURS), row(1, OURS, **NO_QUALITY)])
    assert (len(found.timed), len(found.judged)) == (2, 1)


def test_percentiles_are_of_one_task_and_need_rows_beyond_them(tmp_path: Path) -> None:
    rows = [row(n, OURS, (n + 1) / 1000) for n in range(100)]
    rows += [row(n, OURS, 9.0, task="trec") for n in range(19)]
    found = results(tmp_path, rows).timed
    tail = measures.percentile(found, OURS, "sst2", 0.95)
    assert tail.value == pytest.approx(0.09505)
    assert tail.low < tail.value < tail.high
    assert measures.percentile(found, OURS, "sst2", 0.99).value == pytest.approx(0.09901)
    assert measures.percentile(found, OURS, "trec", 0.95) is None
    text = section(write_report([tmp_path / "run"], tmp_path / "out")[0].read_text(), "Time to the first token").split(
        "Tails"
    )[1]
    assert cells(text, "sst2", "**ContiguousKV (ours)**")[3] == "100"
    assert "trec" not in text


def test_bytes_are_told_apart_by_what_they_were_for(tmp_path: Path) -> None:
    read = {"bytes_read": 600, "bytes_used": 200, "bytes_identified": 100, "prefetch_wasted_bytes": 50}
    more = {"bytes_read": 200, "bytes_used": 200, "bytes_identified": 0, "prefetch_wasted_bytes": 50}
    rows = [row(0, OURS, stats=read), row(1, OURS, stats=more, prefix_bytes=2000), row(0, MEMORY)]
    # Another task counts as much, although it has one request.
    rows.append(row(0, OURS, task="trec", stats={"bytes_read": 800, "bytes_used": 400}))
    found = results(tmp_path, rows).timed
    volume = measures.volume(found, OURS)
    assert volume is not None
    assert (volume.read, volume.used, volume.identified, volume.wasted) == (600, 300, 25, 25)
    assert volume.share == pytest.approx(((0.6 + 0.1) / 2 + 0.8) / 2)
    assert (volume.amplification, volume.payload) == pytest.approx((2.0, 550 / 300))
    assert measures.volume(found, MEMORY) is None


def test_phases_are_means_of_tasks(tmp_path: Path) -> None:
    rows = [row(n, STORE, 0.4, wait=0.3) for n in range(3)] + [row(0, STORE, 0.2, wait=0.1, task="trec")]
    found = results(tmp_path, rows).timed
    assert measures.phases(found, STORE) == pytest.approx({"lookup": 0.0, "wait": 0.2, "rest": 0.1})
    assert measures.waiting(found, STORE) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("said", "scores", "silent"),
    [
        # One label always, right half of the time: it tells nothing apart.
        (["yes"] * 20, [1.0, 0.0] * 10, True),
        (["yes"] * 19 + ["no"], [1.0, 0.0] * 10, True),
        (["yes"] * 18 + ["no"] * 2, [1.0, 0.0] * 10, False),
        # All right answers are the same.
        (["yes"] * 20, [1.0] * 20, False),
        # Too few requests: it may be chance.
        (["yes"] * 9, [1.0, 0.0] * 4 + [1.0], False),
    ],
    ids=["always", "95%", "90%", "one right answer", "few requests"],
)
def test_tasks_that_are_answered_with_one_label_do_not_count(
    tmp_path: Path, said: list[str], scores: list[float], silent: bool
) -> None:
    rows = [
        row(n, MEMORY, prediction=answer, score=score)
        for n, (answer, score) in enumerate(zip(said, scores, strict=True))
    ]
    rows += [row(n, OURS, prediction="no", score=0.0, kl_answer=0.5) for n in range(len(said))]
    rows += [row(n, one, task="needle", metric="needle_recall") for n in range(3) for one in (MEMORY, OURS)]
    found = results(tmp_path, rows)
    assert quality.silent_tasks(found) == ({"sst2": "yes"} if silent else {})
    text = write_report([tmp_path / "run"], tmp_path / "out")[0].read_text()
    assert ("sst2 ('yes') is answered with one label" in text) is silent
    line = cells(section(text, "Quality").split("Score by task")[0], "**ContiguousKV (ours)**", "5%")
    assert line[4] == ("1" if silent else "2")
    assert line[-1].startswith("0.0200" if silent else "0.2600")
    # Its own figures stay in the tables by task.
    assert cells(text.split("Score by task")[1].split("Points")[0], "**ContiguousKV (ours)**", "5%")[2].startswith(
        "0.0"
    )


def test_right_answers_differ_if_other_systems_show_it(tmp_path: Path) -> None:
    """In memory is never right; another system is right with two labels."""
    rows = [row(n, MEMORY, prediction="yes", score=0.0) for n in range(10)]
    rows += [row(n, OURS, prediction=("no", "maybe")[n % 2], score=1.0) for n in range(10)]
    found = results(tmp_path, rows)
    assert quality.silent_tasks(found) == {"sst2": "yes"}
    nothing = [row(n, MEMORY, prediction="yes", score=0.0) for n in range(10)]
    assert quality.silent_tasks(results(tmp_path / "two", nothing)) == {}


def test_a_setting_that_shares_no_request_with_the_rival_keeps_its_rows(tmp_path: Path) -> None:
    rows = [row(0, RELOAD, 0.2), row(0, OURS, 0.1), row(1, OURS, 0.4), row(5, STORE, 0.8)]
    found = cut(results(tmp_path, rows).timed, "cold", Rival())
    comparable = found.comparable
    assert sorted(zip(comparable["system"], comparable["number"], strict=True)) == [
        ("attentionstore", 5),
        ("contiguouskv", 0),
        ("reload", 0),
    ]


def test_a_whole_run_is_what_it_should_be(tmp_path: Path) -> None:
    """The rows of the synthetic run have the shape that a run gives them."""
    found = results(tmp_path, whole_run())
    cold, opened, resident, warm = cuts(found.timed, Rival())
    assert [one.state for one in (cold, opened, resident, warm)] == ["cold", "open", "keys_resident", "warm_host"]
    assert [one.has_rival for one in (cold, opened, resident, warm)] == [True, False, False, True]
    for setting in cold.settings:
        ratio = cold.over_rival(setting)
        assert ratio is None if setting == RELOAD else (ratio.requests, ratio.prefixes) == (18, 18)
        assert not (ratio and ratio.few_prefixes)
    assert math.isfinite(warm.over_rival(OURS).low)
    assert list(quality.silent_tasks(found)) == ["trec"]
