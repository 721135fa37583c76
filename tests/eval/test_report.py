"""Reports say what the rows say: figures worked out by hand, and nothing where rows say nothing."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from eval.report import RunError, measures, paper, pictures, write_report
from eval.report.names import colour, ordered
from eval.report.rows import Results, load

MEMORY = ("in_memory", 1.0)
STORE = ("attentionstore", 1.0)
OURS = ("contiguouskv", 0.05)

CONFIG = {
    "model": "tiny",
    "source": "made up",
    "dtype": "float32",
    "tasks": ["sst2"],
    "requests": 4,
    "timed_requests": 4,
    "systems": ["in_memory", "contiguouskv"],
    "budgets": [0.05],
    "seed": 0,
    "processes": 1,
    "command": "python -m eval run --tasks sst2",
    "version": "0.1.0",
}
MACHINE = {"cpu": "a processor", "cores": 2, "accelerator": None, "torch": "2.13.0"}


def row(number: int, setting: tuple[str, float], ttft_s: float = 0.1, **changes: Any) -> dict[str, Any]:
    """A row as a run writes it; `wait` seconds of its time are waiting."""
    system, budget = setting
    no_files = system in ("recompute", "in_memory")
    wait = changes.pop("wait", 0.0)
    stats = {"bytes_read": 0, "bytes_used": 0, "bytes_identified": 0, "prefetch_wasted_bytes": 0} | {
        "hits": {"device": 0, "host": 0, "disk": 10}
    }
    return {
        "task": "sst2",
        "number": number,
        "prefix": 0,
        "prefix_tokens": 3000,
        "suffix_tokens": 20,
        "about": {},
        "stream": None,
        "system": system,
        "budget": budget,
        "ttft_s": ttft_s,
        "cold": None if no_files else True,
        "resident_pages": 0,
        "first_token": 1,
        "stats": stats | changes.pop("stats", {}),
        "prefix_bytes": 1000,
        "phases": {"lookup": 0.0, "wait": wait, "rest": ttft_s - wait},
        "metric": "accuracy",
        "prediction": "positive",
        "score": 1.0,
        "kl": None if system == "in_memory" else 0.01,
        "agreement": None if system == "in_memory" else 0.9,
        "perplexity": 4.0,
    } | changes


def run_folder(folder: Path, rows: Iterable[dict[str, Any]], **config: Any) -> Path:
    """A finished run."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    (folder / "machine.json").write_text(json.dumps(MACHINE))
    (folder / "rows.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return folder


def results(tmp_path: Path, rows: Iterable[dict[str, Any]]) -> Results:
    """What a report is made from."""
    return load([run_folder(tmp_path / "run", rows)])


def section(text: str, title: str) -> str:
    """What stands under a heading."""
    return text.split(f"## {title}\n")[1].split("\n## ")[0]


def cells(text: str, *begins: str) -> list[str]:
    """Of the table row with these first cells."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    (found,) = (line for line in lines if line[: len(begins)] == list(begins))
    return found


def test_answers_are_shown_of_tasks_that_generate_them(tmp_path: Path) -> None:
    said = {MEMORY: "71177.", OURS: "777, I think\nor | `8`, or perhaps another"}
    rows = [
        row(number, setting, task="needle", metric="needle_recall", prediction=text)
        for setting, text in said.items()
        for number in range(7)
    ]
    run = run_folder(tmp_path / "run", [*rows, row(0, OURS)])
    quality = section(write_report([run], tmp_path / "out")[0].read_text(), "Quality")
    assert "first requests of sst2" not in quality
    text = quality.split("Answers to the first requests of needle:")[1]
    assert cells(text, "in memory", "100%") == ["in memory", "100%", *["`71177.`"] * 5]
    assert cells(text, "**ContiguousKV (ours)**", "5%")[2:] == ["`777, I think or ¦ '8', o…`"] * 5


def test_times_are_compared_request_by_request(tmp_path: Path) -> None:
    rows = [row(0, OURS, 0.1), row(1, OURS, 0.2), row(0, STORE, 0.4), row(1, STORE, 0.2), row(2, STORE, 9.0)]
    found = results(tmp_path, rows).timed
    # 4 and 1 times: the geometric mean is 2. Request 2 has no partner.
    value, low, high = measures.ratio(found, STORE, OURS) or (0, 0, 0)
    assert value == pytest.approx(2.0)
    assert (low, high) == pytest.approx((1.0, 4.0))
    text = write_report([tmp_path / "run"], tmp_path / "out")[0].read_text()
    line = cells(section(text, "Time to the first token").split("By task")[0], "**ContiguousKV (ours)**", "5%")
    assert line == ["**ContiguousKV (ours)**", "5%", "2", "150 (100 - 200)", "0.50 (0.25 - 1.00)"]
    assert "Not all systems answered the same requests" in text


def test_rows_that_were_not_cold_have_no_times_or_bytes_but_scores(tmp_path: Path) -> None:
    read = {"bytes_read": 100, "bytes_used": 50}
    rows = [row(n, OURS, 0.1, stats=read) for n in range(3)]
    rows.append(row(3, OURS, 7.0, cold=False, score=0.0, stats={"bytes_read": 10**9, "bytes_used": 50}))
    rows += [row(n, MEMORY, 0.1) for n in range(4)]
    found = results(tmp_path, rows)
    assert list(found.timed["ttft_s"].unique()) == [0.1]
    volume = measures.volume(found.timed, OURS)
    assert volume is not None
    assert (volume.read, volume.share, volume.amplification) == pytest.approx((100, 0.1, 2.0))
    assert (measures.difference(found.judged, OURS, MEMORY) or (0,))[0] == pytest.approx(-0.25)
    text = write_report([tmp_path / "run"], tmp_path / "out")[0].read_text()
    assert "1 of 8 rows were not cold" in text
    assert cells(text, "ContiguousKV (ours)", "`contiguouskv`")[3:] == ["4", "3", "0", "1"]
    assert "Not all systems" not in text


def test_runs_are_compared_within_themselves(tmp_path: Path) -> None:
    folders = []
    for name, pace in (("fast", 1.0), ("slow", 10.0)):
        rows = [row(n, OURS, 0.1 * pace * (n + 1)) for n in range(2)]
        rows += [row(n, MEMORY, 0.05 * pace * (n + 1)) for n in range(2)]
        folders.append(run_folder(tmp_path / name, rows))
    found = load(folders)
    assert len(found.table) == 8
    assert measures.ratio(found.timed, OURS, MEMORY) == pytest.approx((2.0, 2.0, 2.0))
    # The second run asked the same two questions: it makes no new requests.
    pairs = measures.paired(found.timed, OURS, MEMORY, "ttft_s", lambda a, b: a - b)
    assert pairs["value"].tolist() == pytest.approx([0.275, 0.55])
    other_seed = run_folder(tmp_path / "seed", [row(0, OURS), row(0, MEMORY)], seed=1)
    found = load([*folders, other_seed])
    assert len(measures.paired(found.timed, OURS, MEMORY, "ttft_s", lambda a, b: a - b)) == 3


def test_a_request_that_comes_twice_is_paired_by_turn(tmp_path: Path) -> None:
    rows = [row(0, OURS, 0.2), row(0, MEMORY, 0.1), row(0, OURS, 0.8), row(0, MEMORY, 0.2)]
    value, low, _ = measures.ratio(results(tmp_path, rows).timed, OURS, MEMORY) or (0, 0, 0)
    assert value == pytest.approx(math.sqrt(2 * 4))
    assert math.isnan(low)


def test_scores_are_differences_of_the_same_requests_and_tasks_count_the_same(tmp_path: Path) -> None:
    rows = []
    for n, (mine, full) in enumerate([(1, 1), (0, 1), (1, 1), (0, 0)]):
        rows += [row(n, OURS, score=mine, perplexity=2.0), row(n, MEMORY, score=full)]
    for n in range(2):
        rows += [row(n, OURS, task="needle", metric="needle_recall", score=0, kl=0.03, perplexity=8.0)]
        rows += [row(n, MEMORY, task="needle", metric="needle_recall", score=1)]
    found = results(tmp_path, rows)
    assert (measures.difference(found.judged, OURS, MEMORY, "sst2") or (0,))[0] == pytest.approx(-0.25)
    value, low, high = measures.difference(found.judged, OURS, MEMORY) or (0, 0, 0)
    assert value == pytest.approx((-0.25 - 1.0) / 2)
    assert low <= value <= high < 0
    assert (measures.mean_of(found.judged, OURS, "kl") or (0,))[0] == pytest.approx(0.02)
    assert measures.perplexity(found.judged, OURS) == pytest.approx(4.0)
    text = section(write_report([tmp_path / "run"], tmp_path / "out")[0].read_text(), "Quality")
    line = cells(text.split("Score by task")[0], "**ContiguousKV (ours)**", "5%")
    assert line[2:4] == ["6", "2"]
    assert line[4].startswith("25.0 (")
    assert line[5].startswith("-62.5 (")
    assert line[6:] == ["0.0200 (0.0200 - 0.0200)", "90.0 (90.0 - 90.0)", "4.000"]
    by_task = cells(text.split("Points from in memory by task")[1].split("KL")[0], "**ContiguousKV (ours)**", "5%")
    assert by_task[3] == "-100.0 (-100.0 to -100.0)"
    # The paper's figure is about accuracy, so it stands beside the task that has one.
    lost = paper.losses(found)
    assert [(name, value[0]) for _, name, value in lost] == [
        ("accuracy (sst2)", pytest.approx(25.0)),
        ("all tasks' scores", pytest.approx(62.5)),
    ]


def test_rows_without_a_score_are_for_time_only(tmp_path: Path) -> None:
    rows = [row(0, OURS, score=1.0), row(1, OURS, score=None, kl=None, agreement=None, perplexity=None)]
    found = results(tmp_path, rows)
    assert (len(found.timed), len(found.judged)) == (2, 1)


def test_percentiles_need_rows_beyond_them(tmp_path: Path) -> None:
    found = results(tmp_path, [row(n, OURS, (n + 1) / 1000) for n in range(100)]).timed
    value, low, high = measures.percentile(found, OURS, 0.95) or (0, 0, 0)
    assert value == pytest.approx(0.09505)
    assert low < value < high
    assert (measures.percentile(found, OURS, 0.99) or (0,))[0] == pytest.approx(0.09901)
    few = found[found["number"] < 19]
    assert measures.percentile(few, OURS, 0.95) is None
    assert (measures.percentile(few, OURS, 0.5) or (0,))[0] == pytest.approx(0.010)
    text = write_report([tmp_path / "run"], tmp_path / "out")[0].read_text()
    assert cells(text.split("### Tails")[1].split("\n## ")[0], "**ContiguousKV (ours)**", "5%")[2] == "100"


def test_bytes_are_told_apart_by_what_they_were_for(tmp_path: Path) -> None:
    read = {"bytes_read": 600, "bytes_used": 200, "bytes_identified": 100, "prefetch_wasted_bytes": 50}
    more = {"bytes_read": 200, "bytes_used": 200, "bytes_identified": 0, "prefetch_wasted_bytes": 50}
    rows = [row(0, OURS, stats=read), row(1, OURS, stats=more, prefix_bytes=2000), row(0, MEMORY)]
    found = results(tmp_path, rows).timed
    volume = measures.volume(found, OURS)
    assert volume is not None
    assert (volume.read, volume.used, volume.identified, volume.wasted) == (400, 200, 50, 50)
    assert volume.share == pytest.approx((0.6 + 0.1) / 2)
    assert (volume.amplification, volume.payload) == pytest.approx((2.0, 1.5))
    assert measures.volume(found, MEMORY) is None


def test_a_torn_last_line_is_left_out_and_said(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [row(0, OURS), row(1, OURS)])
    path = folder / "rows.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"task": "sst2", "predic')
    assert len(load([folder]).table) == 2
    assert "A crash cut off the last row of run" in write_report([folder], tmp_path / "out")[0].read_text()
    # Cut within a letter of two bytes.
    path.write_bytes(whole + '{"task": "ä'.encode()[:-1])
    assert load([folder]).runs[0].torn
    # All of it there but the line end: nothing is lost.
    path.write_bytes(whole[:-1])
    found = load([folder])
    assert (len(found.table), found.runs[0].torn) == (2, False)


@pytest.mark.parametrize("broken", ['{"task": "ss', '{"task": "sst2", "number": 1}', "[1, 2]", "3"])
def test_any_other_broken_line_is_named(tmp_path: Path, broken: str) -> None:
    folder = run_folder(tmp_path / "run", [row(0, OURS)])
    path = folder / "rows.jsonl"
    good = path.read_text()
    path.write_text(good + broken + "\n" + good)
    with pytest.raises(RunError, match=r"rows\.jsonl, line 2"):
        load([folder])
    # With its line end, the last line was written to its end.
    path.write_text(good + broken + "\n")
    with pytest.raises(RunError, match=r"rows\.jsonl, line 2"):
        load([folder])


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"config\.json"):
        load([tmp_path])
    folder = run_folder(tmp_path / "run", [])
    with pytest.raises(RunError, match="no row"):
        load([folder])
    (folder / "rows.jsonl").unlink()
    with pytest.raises(RunError, match=r"rows\.jsonl is missing"):
        load([folder])


def test_waiting_says_how_much_reading_less_can_give(tmp_path: Path) -> None:
    rows = [row(n, STORE, 0.4, wait=0.3) for n in range(3)]
    rows += [row(n, OURS, 0.1, wait=0.02) for n in range(2)]
    found = results(tmp_path, rows).timed
    assert measures.waiting(found, STORE) == pytest.approx(0.75)
    assert measures.phases(found, OURS) == pytest.approx({"lookup": 0.0, "wait": 0.02, "rest": 0.08})
    text = section(write_report([tmp_path / "run"], tmp_path / "out")[0].read_text(), "Beside the paper")
    assert "AttentionStore 75% and ContiguousKV (ours) 20%" in text
    assert "it would be 4.00 times as fast, less than the paper's 6.16x" in text
    assert "AttentionStore 100 ms and ContiguousKV (ours) 80 ms" in text


def test_the_reason_follows_the_rows(tmp_path: Path) -> None:
    rows = [row(n, STORE, 1.0, wait=0.9) for n in range(2)] + [row(n, OURS, 0.1, wait=0.05) for n in range(2)]
    text = section(
        write_report([run_folder(tmp_path / "run", rows)], tmp_path / "out")[0].read_text(), "Beside the paper"
    )
    assert "it would be 10.00 times as fast, no less than the paper's 6.16x" in text
    assert cells(text, "**ContiguousKV (ours)**", "5%", "AttentionStore")[3:] == [
        "2",
        "10.00 (10.00 - 10.00)",
        "6.16",
        "above",
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
    assert paper.compared(measured, 6.16) == verdict


def test_baselines_are_compared_at_the_same_budget_unless_they_are_exact(tmp_path: Path) -> None:
    rows = [row(0, setting, 0.1) for setting in (OURS, ("contiguouskv", 0.1))]
    rows += [row(0, STORE, 0.3), row(0, ("impress", 0.1), 0.2), row(0, ("attentionstore_h2o", 1.0), 0.4)]
    found = paper.speed_ups(results(tmp_path, rows).timed)
    assert [(one.baseline, one.ours[1], one.paper) for one in found] == [
        ("attentionstore", 0.05, 6.16),
        ("attentionstore", 0.1, None),
        ("impress", 0.1, None),
    ]
    assert [one.measured[0] for one in found] == pytest.approx([3.0, 3.0, 2.0])


def test_streams_have_their_own_section_and_no_part_in_others(tmp_path: Path) -> None:
    hits = {"hits": {"device": 2, "host": 4, "disk": 4}, "bytes_read": 3_000_000}
    rows = [row(n, OURS, 0.1 * (n + 1), stream="conversations", stats=hits) for n in range(3)]
    rows.append(row(3, OURS, 50.0, stream="conversations", cold=False))
    found = results(tmp_path, [*rows, row(0, OURS, 0.5), row(0, MEMORY, 0.5)])
    assert found.timed["ttft_s"].tolist() == [0.5, 0.5]
    assert measures.hit_rate(found.streamed, OURS) == pytest.approx(0.6)
    paths = write_report([tmp_path / "run"], tmp_path / "out")
    text = section(paths[0].read_text(), "Streams")
    line = cells(text, "**ContiguousKV (ours)**", "5%")
    assert line[2] == "3"
    assert line[3].startswith("200 (")
    assert line[-2:] == ["60.0%", "3.00"]
    assert tmp_path / "out" / "stream-conversations.png" in paths


def test_times_of_processes_side_by_side_are_not_to_be_compared(tmp_path: Path) -> None:
    alone = run_folder(tmp_path / "alone", [row(0, OURS)])
    beside = run_folder(tmp_path / "beside", [row(0, OURS, processes=4), row(1, OURS)])
    assert "not comparable" not in write_report([alone], tmp_path / "out")[0].read_text()
    assert "4 processes side by side" in write_report([alone, beside], tmp_path / "out")[0].read_text()


def full_run() -> list[dict[str, Any]]:
    """A few requests of every kind of system, and a stream."""
    read = {"bytes_read": 120, "bytes_used": 50}
    settings = [
        ("recompute", 1.0),
        MEMORY,
        STORE,
        ("attentionstore_overlapped", 1.0),
        *((name, budget) for name in ("impress", "contiguouskv_paper", "contiguouskv") for budget in (0.05, 0.25)),
        ("a_new_system", 0.05),
    ]
    return [
        row(n, setting, 0.1 + 0.01 * place, task=task, wait=0.05, stats=read)
        for task in ("sst2", "needle")
        for n in range(3)
        for place, setting in enumerate(settings)
    ] + [row(n, OURS, stream="shared_documents", stats=read) for n in range(3)]


def test_a_report_is_complete_and_its_page_needs_no_other_file(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", full_run(), command="python -m eval run '<script>alert(1)</script>'")
    out = tmp_path / "out"
    out.mkdir()
    paths = write_report([folder], out)
    pictures = ["ttft", "frontier", "phases", "stream-shared-documents", "paper"]
    assert paths == [out / "report.md", out / "report.html", *(out / f"{name}.png" for name in pictures)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[2:])
    text, page = paths[0].read_text(), paths[1].read_text()
    for title in (
        "What was run",
        "Time to the first token",
        "Quality",
        "Quality for bytes and time",
        "Where the time goes",
        "Bytes read",
        "Streams",
        "Beside the paper",
    ):
        assert f"\n## {title}\n" in text
        assert f"<h2>{title}</h2>" in page
    assert [source[:22] for source in re.findall(r'src="([^"]*)"', page)] == ["data:image/png;base64,"] * len(pictures)
    assert not re.search(r"<link|<script|href=|url\(", page)
    assert page.count("<table>") == len(re.findall(r"^\| ---", text, re.MULTILINE)) > 8
    assert "a_new_system" in text
    assert "nan" not in text.lower()
    assert "None" not in text


@pytest.mark.parametrize(
    "rows",
    [
        [row(0, ("recompute", 1.0))],
        [row(0, OURS)],
        [row(0, OURS, cold=False)],
        [row(0, ("a_new_system", 0.3), score=None, kl=None, agreement=None, perplexity=None)],
        [row(0, OURS) | {"stats": None, "phases": None}],
        [{"task": "sst2", "number": 0, "system": "contiguouskv", "budget": 0.05}],
        [row(n, OURS, stream="conversations") for n in range(2)],
        [row(0, OURS), row(1, MEMORY)],
        [row(0, OURS, task="sst2"), row(0, MEMORY, task="trec"), row(0, STORE, task="rte")],
        [row(0, OURS, kl=0.0), row(0, MEMORY)],
        [row(0, STORE, 0.1, wait=0.1), row(0, OURS, 0.1, wait=0.1)],
    ],
    ids=[
        "no stored prefix",
        "one row",
        "nothing cold",
        "a stranger for time only",
        "no stats",
        "hardly anything",
        "a stream only",
        "no pairs",
        "tasks apart",
        "no distance",
        "nothing but waiting",
    ],
)
@pytest.mark.filterwarnings("error")
def test_partial_runs_have_reports(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    paths = write_report([run_folder(tmp_path / "run", rows)], tmp_path / "out")
    text = paths[0].read_text()
    assert {path.name for path in paths[2:]} == set(re.findall(r"\(([^()]*\.png)\)", text))
    assert "nan" not in text.lower()
    assert "None" not in text
    assert "## Beside the paper" in text


def test_of_an_untimed_run_only_answers_count(tmp_path: Path) -> None:
    """Two runs: one says how fast, the other, made on a busy machine, how good."""
    quick = run_folder(tmp_path / "quick", [row(n, one, 0.2, score=1.0) for n in range(3) for one in (OURS, MEMORY)])
    busy = [row(n, one, 9.0, score=0.0, kl=0.5) for n in range(3, 9) for one in (OURS, MEMORY)]
    found = load([quick], [run_folder(tmp_path / "busy", busy)])
    assert measures.spread(found.timed, OURS).median == pytest.approx(0.2)
    assert len(found.timed) == 6
    assert measures.mean_of(found.judged, OURS, "score")[0] == pytest.approx(3 / 9)
    write_report([quick], tmp_path / "out", [tmp_path / "busy"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "> busy was made while the machine did other work" in text
    assert "9,000" not in section(text, "Time to the first token")


def test_the_frontier_has_what_differs_in_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that answers as another one has no score of its own, and stands at the height of that one."""
    resident = ("contiguouskv_resident", 0.05)
    read = {"bytes_read": 4, "bytes_used": 2}
    rows = [row(n, one, seconds, stats=read) for n in range(3) for one, seconds in ((OURS, 0.3), (MEMORY, 0.1))]
    rows += [row(n, resident, 0.2, stats=read, score=None, kl=None, agreement=None, perplexity=None) for n in range(3)]
    shown = []
    draw = pictures._frontier_panel
    monkeypatch.setattr(
        pictures,
        "_frontier_panel",
        lambda axis, points, places: shown.append((points, places)) or draw(axis, points, places),
    )
    assert pictures.frontier(results(tmp_path, rows), tmp_path / "frontier.png")
    assert len(shown) == 4
    for points, places in shown:
        assert points[resident] == points[OURS]
        assert places is shown[0][1] or places is shown[2][1]
    assert shown[2][1][resident] == pytest.approx(2.0)
    assert shown[2][1][OURS] == pytest.approx(3.0)


def test_a_picture_of_an_earlier_report_does_not_stay(tmp_path: Path) -> None:
    both = run_folder(tmp_path / "both", [row(0, OURS), row(0, STORE)])
    one = run_folder(tmp_path / "one", [row(0, OURS)])
    out = tmp_path / "out"
    assert out / "paper.png" in write_report([both], out)
    assert out / "paper.png" not in write_report([one], out)
    assert not (out / "paper.png").exists()


def test_strangers_have_a_place_and_a_colour() -> None:
    settings = [("zebra", 0.05), OURS, ("contiguouskv", 0.01), STORE, ("ant", 0.05), MEMORY]
    assert ordered(settings) == [MEMORY, STORE, ("contiguouskv", 0.01), OURS, ("ant", 0.05), ("zebra", 0.05)]
    systems = [system for system, _ in settings]
    colours = [colour(name, systems) for name in ("ant", "zebra", "contiguouskv", "in_memory")]
    assert len(set(colours)) == 4
    assert colour("ant", systems) == colour("ant", reversed(systems))
