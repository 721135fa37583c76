"""What is no run, and runs that cannot stand in one report, are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from report_rows import MEMORY, OURS, row, run_folder, section

from eval.report import RunError, measures, write_report
from eval.report.files import pack
from eval.report.names import Setting
from eval.report.rows import load
from eval.report.sections import Pictures


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only words and tables are looked at here; pictures take most of the time."""
    monkeypatch.setattr(Pictures, "__call__", lambda *arguments: "")


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
    with pytest.raises(RunError, match=r"has no rows\.jsonl"):
        load([folder])


def test_an_interrupted_run_has_its_rows(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [row(0, OURS)])
    # Rows that are not gathered yet; the first one is in both files because a crash hit the gathering.
    (folder / "rows-0.jsonl").write_text("".join(json.dumps(row(number, OURS)) + "\n" for number in (0, 1)))
    (folder / "rows-1.jsonl").write_text(json.dumps(row(2, OURS)) + '\n{"task')
    found = load([folder])
    assert sorted(found.table["number"]) == [0, 1, 2]
    assert found.runs[0].torn
    (folder / "rows.jsonl").unlink()
    assert len(load([folder]).table) == 3


def test_a_packed_run_gives_the_same_report(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [row(number, setting) for number in range(4) for setting in (OURS, MEMORY)])
    packed = tmp_path / "data" / "run"
    assert {path.name for path in pack(folder, packed)} == {"config.json", "machine.json", "rows.jsonl.xz"}
    assert (packed / "rows.jsonl.xz").stat().st_size < (folder / "rows.jsonl").stat().st_size / 4
    texts = [
        write_report([one], tmp_path / f"out-{number}")[0].read_text() for number, one in enumerate((folder, packed))
    ]
    assert texts[0] == texts[1]
    with pytest.raises(RunError, match="is not empty"):
        pack(folder, packed)
    (packed / "rows.jsonl").write_text("")
    with pytest.raises(RunError, match="both"):
        load([packed])
    (packed / "rows.jsonl").unlink()
    (packed / "rows.jsonl.xz").write_bytes(b"no such format")
    with pytest.raises(RunError, match="cannot be unpacked"):
        load([packed])
    with pytest.raises(RunError, match="no row"):
        pack(run_folder(tmp_path / "empty", []), tmp_path / "other")


def test_rows_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    old = row(0, OURS, cold=True)
    for name in ("state", "prefix_key", "options"):
        del old[name]
    with pytest.raises(RunError, match=r"line 1: the row names no state\. An earlier version wrote it.*again"):
        load([run_folder(tmp_path / "run", [old])])
    unnamed = row(0, OURS)
    del unnamed["prefix_key"]
    with pytest.raises(RunError, match="a row needs prefix_key"):
        load([run_folder(tmp_path / "other", [unnamed])])


@pytest.mark.parametrize(
    ("machine", "config", "named"),
    [
        ({"cpu": "another"}, {}, "cpu is 'another' in second and 'a processor' in first"),
        ({"instruction_sets": ["avx2", "fma", "avx512f"]}, {}, "instruction_sets"),
        ({"torch_threads": 4}, {}, "torch_threads"),
        ({"accelerator": "a card"}, {}, "accelerator"),
        ({"commit": "89fedcb"}, {}, "commit"),
        ({"commit": None}, {}, "commit"),
        ({}, {"version": "0.2.0"}, "version"),
        ({}, {"dtype": "bfloat16"}, "dtype is 'bfloat16' in second and 'float32' in first"),
    ],
)
def test_runs_whose_times_differ_for_another_reason_are_refused(
    tmp_path: Path, machine: dict[str, Any], config: dict[str, Any], named: str
) -> None:
    first = run_folder(tmp_path / "first", [row(0, OURS)])
    second = run_folder(tmp_path / "second", [row(1, OURS)], machine, **config)
    with pytest.raises(RunError, match=named):
        load([first, second])
    if "dtype" in config:
        with pytest.raises(RunError, match="second has another model, source or dtype"):
            load([first], [second])
    else:
        # Its answers do not depend on it.
        assert len(load([first], [second]).judged) == 2


def test_a_checkout_with_changes_is_named(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "first", [row(0, OURS)], {"commit": "0123abc+changes"})
    second = run_folder(tmp_path / "second", [row(1, OURS)])
    text = write_report([first, second], tmp_path / "out")[0].read_text()
    assert "> first ran code with changes that are in no commit." in text
    assert "> second ran" not in text


@pytest.mark.parametrize("config", [{"model": "another"}, {"source": "elsewhere"}])
def test_an_untimed_run_needs_the_model_of_a_timed_one(tmp_path: Path, config: dict[str, Any]) -> None:
    first = run_folder(tmp_path / "first", [row(0, OURS)])
    second = run_folder(tmp_path / "second", [row(1, OURS)], **config)
    with pytest.raises(RunError, match="second has another model, source or dtype"):
        load([first], [second])
    # With times, it gets its own part.
    assert len(load([first, second]).models) == 2


def test_repetitions_are_refused(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "first", [row(0, OURS), row(1, OURS)])
    again = run_folder(tmp_path / "again", [row(1, OURS), row(2, OURS)])
    with pytest.raises(RunError, match=r"first and again made the same request: sst2 1 in contiguouskv@0\.05, cold"):
        load([first, again])
    twice = run_folder(tmp_path / "twice", [row(0, OURS), row(0, OURS)])
    with pytest.raises(RunError, match="twice has two rows of one request"):
        load([twice])


def test_what_differs_is_no_repetition(tmp_path: Path) -> None:
    first = run_folder(tmp_path / "first", [row(0, OURS)])
    others = [
        run_folder(tmp_path / "seed", [row(0, OURS)], seed=1),
        run_folder(tmp_path / "speed", [row(0, OURS, read_gbps=1.0)], read_gbps=1.0),
        run_folder(tmp_path / "state", [row(0, OURS, state="open")]),
        run_folder(tmp_path / "options", [row(0, Setting("contiguouskv", 0.05, ("exact",)))]),
        run_folder(tmp_path / "prefix", [row(0, OURS, prefix=7)]),
        run_folder(tmp_path / "model", [row(0, OURS)], model="another"),
    ]
    assert len(load([first, *others]).table) == 7


def test_of_an_untimed_run_only_answers_count(tmp_path: Path) -> None:
    """Two runs: one says how fast, the other, made on a busy machine, how good."""
    quick = run_folder(tmp_path / "quick", [row(n, one, 0.2, score=1.0) for n in range(3) for one in (OURS, MEMORY)])
    busy = [row(n, one, 9.0, score=0.0, kl=0.5) for n in range(2, 9) for one in (OURS, MEMORY)]
    found = load([quick], [run_folder(tmp_path / "busy", busy)])
    assert measures.time(found.timed, OURS).value == pytest.approx(0.2)
    assert len(found.timed) == 6
    # Request 2 is in both: its first answer counts, once.
    score = measures.mean_of(found.judged, OURS, "score")
    assert (score.value, score.requests) == (pytest.approx(3 / 9), 9)
    write_report([quick], tmp_path / "out", [tmp_path / "busy"])
    text = (tmp_path / "out" / "report.md").read_text()
    assert "> busy was made while the machine did other work" in text
    assert "9,000" not in section(text, "Time to the first token")


def test_an_unknown_rival_is_refused(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run", [row(0, OURS)])
    for text, said in (("nobody", "system must be one of"), ("impress+dance", "no option 'dance'"), ("reload@2", "2")):
        with pytest.raises(RunError, match=said):
            write_report([folder], tmp_path / "out", against=text)


def test_times_of_processes_side_by_side_are_not_to_be_compared(tmp_path: Path) -> None:
    alone = run_folder(tmp_path / "alone", [row(0, OURS)])
    beside = run_folder(tmp_path / "beside", [row(1, OURS, processes=4), row(2, OURS)])
    assert "not comparable" not in write_report([alone], tmp_path / "out")[0].read_text()
    assert "4 processes side by side" in write_report([alone, beside], tmp_path / "out")[0].read_text()
