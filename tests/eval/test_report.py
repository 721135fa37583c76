"""Reports say what the rows say, with pictures, and nothing where rows say nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from report_rows import (
    DEFAULT,
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

from eval.report import frontier, measures, write_report
from eval.report.names import Rival, Setting, answering, colour, label, ordered, states_in_order, written
from eval.report.states import cut
from eval.systems import SYSTEMS, State


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


def test_streams_have_their_own_section_and_no_part_in_others(tmp_path: Path) -> None:
    hits = {"hits": {"device": 2, "host": 4, "disk": 4}, "bytes_read": 3_000_000}
    rows = [row(n, OURS, 0.1 * (n + 1), stream="conversations", state="open", stats=hits) for n in range(3)]
    rows.append(row(3, OURS, 50.0, stream="conversations", state="open", departure="open: it was not"))
    found = results(tmp_path, [*rows, row(0, OURS, 0.5), row(0, MEMORY, 0.5)])
    assert found.timed["ttft_s"].tolist() == [0.5, 0.5]
    assert measures.hit_rate(found.streamed, OURS) == pytest.approx(0.6)
    paths = write_report([tmp_path / "run"], tmp_path / "out")
    text = section(paths[0].read_text(), "Streams")
    line = cells(text, "**ContiguousKV (ours)**", "5%", "open")
    assert line[3] == "3"
    assert line[4].startswith("200 (")
    assert line[6:] == ["60.0%", "3.00", "3", "100.0 (100.0 - 100.0)†", "0.0200 (0.0200 - 0.0200)†"]
    assert tmp_path / "out" / "stream-conversations.png" in paths


STATES = ("cold", "keys_resident", "warm_host")


def test_a_report_is_complete_and_its_page_needs_no_other_file(tmp_path: Path) -> None:
    rows = whole_run(
        tasks=("sst2", "needle"),
        states=STATES,
        requests=20,
        timed_requests=3,
        prefixes=3,
        settings=(*DEFAULT, Setting("a_new_system", 0.05)),
    )
    rows += [row(n, OURS, stream="shared_documents", stats={"bytes_read": 7}) for n in range(3)]
    folder = run_folder(
        tmp_path / "run",
        rows,
        command="python -m eval run '<script>alert(1)</script>'",
        skipped=["flexgen: the model has sliding windows"],
    )
    out = tmp_path / "out"
    out.mkdir()
    paths = write_report([folder], out)
    pictures = [f"{name}-{state.replace('_', '-')}" for name in ("ttft", "frontier", "phases") for state in STATES]
    pictures += ["stream-shared-documents", "paper"]
    assert paths == [out / "report.md", out / "report.html", *(out / f"{name}.png" for name in pictures)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths[2:])
    text, page = paths[0].read_text(), paths[1].read_text()
    for title in (
        "The result in words",
        "What was run",
        "Time to the first token",
        "Quality",
        "Quality for time",
        "Where the time goes",
        "Bytes read",
        "Streams",
        "Beside the paper",
    ):
        assert f"\n## {title}\n" in text
        assert f"<h2>{title}</h2>" in page
    assert "Faster and slower disks" not in text
    assert [source[:22] for source in re.findall(r'src="([^"]*)"', page)] == ["data:image/png;base64,"] * len(pictures)
    assert not re.search(r"<link|<script|href=|url\(", page)
    assert page.count("<table>") == len(re.findall(r"^\| ---", text, re.MULTILINE)) > 8
    assert "a_new_system" in text
    assert "- note: flexgen: the model has sliding windows" in text
    assert "nan" not in text.lower()
    assert "None" not in text
    # Reload is in the tables of its states, and names those that it lacks.
    times = section(text, "Time to the first token")
    for state, there in zip(STATES, (True, False, True), strict=True):
        own = times.split(f"### {state}\n")[1].split("\n### ")[0]
        assert ("\n| reload | 100% |" in own) is there
        assert ("reload has no row of this state" in own) is not there


@pytest.mark.parametrize(
    "rows",
    [
        [row(0, Setting("recompute", 1.0))],
        [row(0, OURS)],
        [row(0, OURS, departure="cold: it was not")],
        [row(0, Setting("a_new_system", 0.3), **NO_QUALITY)],
        [row(0, OURS) | {"stats": None, "phases": None}],
        [
            {
                **{"task": "sst2", "number": 0, "system": "contiguouskv", "budget": 0.05},
                **{"state": "cold", "prefix_key": "1"},
            }
        ],
        [row(n, OURS, stream="conversations") for n in range(2)],
        [row(0, OURS), row(1, MEMORY)],
        [row(0, OURS, task="sst2"), row(0, MEMORY, task="trec"), row(0, STORE, task="rte")],
        [row(0, OURS, kl_answer=0.0), row(0, MEMORY)],
        [row(0, STORE, 0.1, wait=0.1), row(0, OURS, 0.1, wait=0.1)],
        [row(0, OURS, state="a_new_state"), row(0, RELOAD, state="a_new_state")],
        [row(0, one, read_gbps=speed) for one in (OURS, RELOAD) for speed in (1.0, 2.0)],
    ],
    ids=[
        "no stored prefix",
        "one row",
        "no state found",
        "a stranger for time only",
        "no stats",
        "hardly anything",
        "a stream only",
        "no pairs",
        "tasks apart",
        "no distance",
        "nothing but waiting",
        "a strange state",
        "two speeds",
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


def test_each_model_has_its_own_part(tmp_path: Path) -> None:
    small = [row(0, OURS, 0.1), row(0, RELOAD, 0.2), row(0, MEMORY, 0.1)]
    large = [row(0, OURS, 0.1), row(0, RELOAD, 0.4), row(0, MEMORY, 0.1)]
    folders = [run_folder(tmp_path / "small", small), run_folder(tmp_path / "large", large, model="larger/model")]
    paths = write_report(folders, tmp_path / "out")
    text = paths[0].read_text()
    assert "The runs are of 2 models" in text
    for name, ratio in (("tiny, made up", "0.50"), ("larger/model, made up", "0.25")):
        part = section(text, name)
        assert "\n### Time to the first token\n" in part
        table = part.split("#### cold")[1]
        assert cells(table.split("By task")[0], "**ContiguousKV (ours)**", "5%")[5] == ratio
    names = {path.name for path in paths[2:]}
    assert {"ttft-cold-tiny.png", "ttft-cold-larger-model.png"} <= names
    assert names == set(re.findall(r"\(([^()]*\.png)\)", text))


def test_the_frontier_has_what_differs_in_time_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting that answers as another one has no score of its own, and stands at the height of that one."""
    impress, overlapped = Setting("impress", 0.05), Setting("impress", 0.05, ("overlap",))
    read = {"bytes_read": 4, "bytes_used": 2}
    rows = [row(n, one, seconds, stats=read) for n in range(3) for one, seconds in ((impress, 0.3), (MEMORY, 0.1))]
    rows += [row(n, overlapped, 0.2, stats=read, **NO_QUALITY) for n in range(3)]
    shown = []
    draw = frontier._panel
    monkeypatch.setattr(
        frontier,
        "_panel",
        lambda axis, points, places, known: shown.append((points, places)) or draw(axis, points, places, known),
    )
    found = results(tmp_path, rows)
    assert frontier.frontier(found, cut(found.timed, "cold", Rival()), tmp_path / "frontier.png")
    assert len(shown) == 4
    for points, _ in shown:
        assert points[overlapped] == points[impress]
        # In memory loses nothing by definition.
        assert MEMORY not in points or points[MEMORY].value == 0
    times = shown[0][1]
    assert [times[one] for one in (MEMORY, overlapped, impress)] == pytest.approx([100, 200, 300])


def test_the_frontier_joins_budgets_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The exact request may take less time than one that chooses."""
    times = {0.05: 0.2, 0.25: 0.4, 1.0: 0.3}
    rows = [row(n, MEMORY, 0.1) for n in range(3)]
    rows += [row(n, Setting("contiguouskv", budget), took) for n in range(3) for budget, took in times.items()]
    axes = []
    draw = frontier._panel
    monkeypatch.setattr(frontier, "_panel", lambda axis, *rest: axes.append(axis) or draw(axis, *rest))
    found = results(tmp_path, rows)
    assert frontier.frontier(found, cut(found.timed, "cold", Rival()), tmp_path / "frontier.png")
    (line,) = [one for one in axes[0].containers if one.get_label() == label(Setting("contiguouskv", 0.05))]
    assert line.lines[0].get_xdata().tolist() == pytest.approx([200, 400, 300])


def test_answers_are_those_of_the_setting_that_was_judged(tmp_path: Path) -> None:
    """Where the plain setting was not made, one with an option for speed was judged, and stands for all alike."""
    quick, other = Setting("attentionstore_h2o", 0.05, ("overlap",)), Setting("attentionstore_h2o", 0.05, ("lfu",))
    rows = [row(n, one, kl_answer=0.5, score=0.0) for n in range(3) for one in (quick, MEMORY)]
    rows += [row(n, other, **NO_QUALITY) for n in range(3)]
    judged = results(tmp_path, rows).judged
    for setting in (quick, other):
        found = frontier.figures(judged, setting)
        assert found["KL at the answer, nats"] == measures.mean_of(judged, quick, "kl_answer")
        assert found["KL at the answer, nats"] is not None
    assert frontier.figures(judged, Setting("impress", 0.05))["KL at the answer, nats"] is None


def test_pictures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    both = run_folder(tmp_path / "both", [row(0, OURS), row(0, STORE)])
    one = run_folder(tmp_path / "one", [row(0, OURS)])
    out = tmp_path / "out"
    assert out / "paper.png" in write_report([both], out)
    (out / "paper-of-mine.png").touch()
    assert out / "paper.png" not in write_report([one], out)
    assert not (out / "paper.png").exists()
    assert (out / "paper-of-mine.png").exists()


def test_names_are_those_of_the_command_line() -> None:
    setting = Setting("attentionstore_h2o", 0.1, ("lfu", "overlap"))
    assert written(setting) == "attentionstore_h2o@0.1+lfu+overlap"
    assert Setting.parse(written(setting), ()) == [setting]
    assert label(setting) == "AttentionStore + H2O +lfu +overlap"
    assert answering(setting) == Setting("attentionstore_h2o", 0.1)
    assert answering(Setting("a_new_system", 0.1, ("x",))) == Setting("a_new_system", 0.1, ("x",))
    for name, kind in SYSTEMS.items():
        assert label(Setting(name, 1.0)) != name or name in ("recompute", "reload")
        assert (answering(Setting(name, 1.0)) == MEMORY) is kind.exact
    assert states_in_order(reversed(State)) == list(State)


def test_strangers_have_a_place_and_a_colour() -> None:
    ant, zebra = Setting("ant", 0.05), Setting("zebra", 0.05)
    overlapped = Setting("attentionstore", 1.0, ("overlap",))
    settings = [zebra, OURS, Setting("contiguouskv", 0.01), overlapped, STORE, ant, MEMORY]
    assert ordered(settings) == [MEMORY, STORE, overlapped, Setting("contiguouskv", 0.01), OURS, ant, zebra]
    colours = [colour(one, settings) for one in (ant, zebra, OURS, MEMORY, STORE, overlapped)]
    assert len(set(colours)) == 6
    assert colour(ant, settings) == colour(ant, reversed(settings))
