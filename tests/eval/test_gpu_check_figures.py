"""What the GPU check makes of what it has measured: figures worked out by hand, and whatever part of it there is."""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from eval.gpu_check import figures, table, traces
from eval.gpu_check.__main__ import is_well
from eval.gpu_check.device_tests import summary
from eval.gpu_check.outputs import LARGEST_FILE, MOST_FILES, tidy
from eval.gpu_check.pytest_recorder import read_lines
from eval.gpu_check.results import Results
from eval.gpu_check.settings import STAGES
from eval.gpu_check.trace_summary import covered, own_time, summarise

NUMBERS = {"bytes_read": 1_000_000, "io_wait_s": 0.001, "cold": True, "phases": {"wait": 0.001}, "stats": {}}


def asked(label: str, state: str | None, number: int, seconds: float, **more: Any) -> dict[str, Any]:
    return {"label": label, "state": state, "round": number, "seconds": seconds, "wall_s": seconds} | NUMBERS | more


@pytest.fixture
def content() -> dict[str, Any]:
    requests = [
        asked("published 5%", "cold", 0, 9.0),
        asked("attentionstore", "cold", 0, 9.0),
        asked("published 5%", "cold", 1, 0.10, answer_error=0.01, answer_ok=True),
        asked("published 5%", "cold", 2, 0.20, answer_error=0.03, answer_ok=True),
        asked("attentionstore", "cold", 1, 0.60),
        asked("attentionstore", "cold", 2, 0.80),
        asked("impress 5%", "warm_device", 1, 0.4, departure="warm_device: 5 bytes were read from disk"),
        asked("default 25%", "warm_device", 1, 0.1, answer_error=0.5, answer_ok=False),
        asked("default 25%", "warm_device", 2, 0.1, cold=False),
        asked("exact", "cold", 0, 0.7),
    ]
    seconds = {0: [0.5], 1: [0.02, 0.04, 0.03], 2: [0.05]}
    block = {
        "tokens": 8192,
        "kv_bytes": 470_000_000,
        "requests": requests,
        "floors": [{"round": number, "seconds": one} for number, some in seconds.items() for one in some],
        "skipped": [{"what": "reload", "why": "the disk is full"}],
        "prefix_effect": 0.4,
    }
    varied = [
        {"label": "exact", "suffix_tokens": 17, "time_of_shape": 1, "seconds": 0.5},
        {"label": "exact", "suffix_tokens": 17, "time_of_shape": 2, "seconds": 0.1},
        {"label": "exact", "suffix_tokens": 18, "time_of_shape": 1, "seconds": 0.3},
    ]
    found = {"prefixes": {"8192": block}, "varied": varied, "skipped": [{"what": "130944 tokens", "why": "no time"}]}
    return {"stages": {"time": {"status": "killed", "killed_in": "8192 exact", "found": found, "failed": {}}}}


def row_of(content: dict[str, Any], label: str) -> dict[str, Any]:
    return next(row for row in figures.rows_of(content) if row["label"] == label)


def test_medians_leave_out_the_first_round_and_floors_are_of_the_same_round(content):
    row = row_of(content, "published 5%")
    assert row["requests"] == 2
    assert row["seconds"]["median"] == pytest.approx(0.15)
    # Of 0.10 over the median floor 0.03, and 0.20 over 0.05.
    assert row["over_floor"]["median"] == pytest.approx((0.10 / 0.03 + 0.20 / 0.05) / 2)
    assert row["answer_error"] == 0.03
    assert row_of(content, "floor")["seconds"]["median"] == pytest.approx(0.035)


def test_a_first_round_counts_where_there_is_no_other(content):
    row = row_of(content, "exact")
    assert row["only_first"]
    assert row["seconds"]["median"] == 0.7
    assert row["over_floor"]["median"] == pytest.approx(0.7 / 0.5)


def test_what_is_wrong_with_a_row_is_counted(content):
    assert row_of(content, "default 25%")["wrong_answers"] == 1
    assert row_of(content, "default 25%")["not_cold"] == 1
    assert row_of(content, "impress 5%")["departures"] == ["warm_device: 5 bytes were read from disk"]


def test_only_equal_states_are_compared_round_by_round(content):
    found = {(one["state"], one["ours"], one["baseline"]): one for one in figures.speed_ups(content)}
    assert set(found) == {("cold", "published 5%", "attentionstore"), ("warm_device", "default 25%", "impress 5%")}
    one = found["cold", "published 5%", "attentionstore"]
    assert one["times_faster"]["median"] == pytest.approx((0.6 / 0.1 + 0.8 / 0.2) / 2)
    assert one["paper"] == 6.16
    # The paper's budget is 5%.
    assert found["warm_device", "default 25%", "impress 5%"]["paper"] is None


def test_a_new_shape_costs_the_difference_of_its_two_requests(content):
    (one,) = figures.new_shapes(content)
    assert (one["label"], one["lengths"]) == ("exact", 1)
    assert one["difference"]["median"] == pytest.approx(0.4)


def test_the_table_says_what_there_is_and_what_there_is_not(content):
    text = table.markdown(content)
    for part in (
        "8,192 tokens of prefix (0.47 GB",
        "| cold | published 5% |",
        "150.0 (100.0 - 200.0)",
        "1 wrong answers",
        "warm_device: 5 bytes were read from disk",
        "killed in 8192 exact",
        "8,192 tokens, reload: the disk is full",
        "130944 tokens: no time",
        "Without the prefix, an answer differs by 0.40",
        "6.16",
    ):
        assert part in text


def parts_of(content: dict[str, Any]) -> list[dict[str, Any]]:
    """What may be there when everything was killed at some moment."""
    found = [{}, {"stages": {}}, {"stages": {"time": {}}}, {"stages": {"time": {"found": {}}}}]
    for name in ("requests", "floors", "skipped", "prefix_effect"):
        part = copy.deepcopy(content)
        del part["stages"]["time"]["found"]["prefixes"]["8192"][name]
        found.append(part)
    part = copy.deepcopy(content)
    part["stages"] |= {name: {"status": "running"} for name in STAGES}
    return [*found, part]


def test_a_table_is_made_of_any_part(content, tmp_path):
    for part in parts_of(content):
        results = Results(tmp_path)
        results.content = part
        table.write(results)
        assert (tmp_path / "table.md").read_text().startswith("# GPU check")
        json.loads((tmp_path / "gpu.json").read_text())


def test_a_whole_check_is_well_and_any_failure_is_not(content):
    stages = {name: {"status": "complete", "found": {}} for name in STAGES}
    assert is_well({"stages": stages}, list(STAGES))
    for name in STAGES:
        assert not is_well({"stages": stages | {name: {"status": "killed", "found": {}}}}, list(STAGES))
    assert not is_well({"stages": stages | {"where": {"status": "complete", "failed": {"card": "no"}}}}, list(STAGES))
    good = {"counts": {"passed": 1}, "killed": False, "not_ended": [], "exit_codes": [0]}
    assert is_well({"stages": stages | {"tests": {"status": "complete", "found": {"g": good}}}}, list(STAGES))
    for bad in ({"counts": {"failed": 1}}, {"exit_codes": [None]}, {"exit_codes": [70, 0]}, {"not_ended": ["a.py::b"]}):
        group = good | bad
        assert not is_well({"stages": stages | {"tests": {"status": "complete", "found": {"g": group}}}}, list(STAGES))
    wrong = {"status": "complete", "found": {"rows": figures.rows_of(content)}}
    assert not is_well({"stages": stages | {"table": wrong}}, list(STAGES))


# ---- traces ----


def event(kind: str, name: str, ts: float, dur: float, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": kind, "name": name, "ts": ts, "dur": dur, "tid": 1, "args": args}


EVENTS = [
    event("cpu_op", "aten::linear", 0, 100),
    event("cpu_op", "aten::t", 10, 20),
    event("cpu_op", "aten::mm", 40, 50),
    event("cpu_op", "aten::t", 200, 5),
    event("cuda_runtime", "cudaLaunchKernel", 45, 5),
    event("cuda_driver", "cuLaunchKernelEx", 55, 5),
    event("cuda_runtime", "cudaStreamSynchronize", 300, 1000),
    event("cuda_runtime", "cudaHostAlloc", 1400, 500),
    event("kernel", "gemm", 100, 400),
    event("kernel", "gemm", 300, 400),
    event("kernel", "softmax", 800, 100),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 600, 200, bytes=5000),
    event("gpu_memcpy", "Memcpy HtoD (Pinned -> Device)", 2000, 100, bytes=3000),
    event("gpu_memcpy", "Memcpy DtoH (Device -> Pageable)", 2100, 50, bytes=8),
    {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 45, "id": 1},
    {"ph": "M", "name": "process_name"},
]


def test_a_trace_is_summed_up():
    found = summarise(EVENTS, 0.01)
    assert found["kernels"] == {"count": 3, "ms": pytest.approx(0.9)}
    assert found["launches"]["count"] == 2
    assert found["copies"]["HtoD (Pinned -> Device)"] == {"count": 2, "bytes": 8000, "ms": pytest.approx(0.3)}
    assert found["copies"]["DtoH (Device -> Pageable)"]["count"] == 1
    assert found["waits"] == [{"name": "cudaStreamSynchronize", "count": 1, "ms": 1.0}]
    assert found["allocations"] == [{"name": "cudaHostAlloc", "count": 1, "ms": 0.5}]
    # From 100 to 900, and from 2000 to 2150.
    assert found["device_busy_ms"] == pytest.approx(0.95)
    assert found["device_computes_ms"] == pytest.approx(0.7)
    assert [row["name"] for row in found["top_kernels"]] == ["gemm", "softmax"]
    own = {row["name"]: (row["count"], row["own_ms"]) for row in found["top_host_ops"]}
    assert own == {
        "aten::linear": (1, pytest.approx(0.03)),
        "aten::mm": (1, pytest.approx(0.05)),
        "aten::t": (2, pytest.approx(0.025)),
    }
    assert summarise([], 0.0)["device_busy_ms"] == 0.0


def test_time_that_is_covered_twice_counts_once():
    assert covered([event("kernel", "a", 0, 10), event("kernel", "b", 2, 3), event("kernel", "c", 9, 3)]) == 12


def test_operators_of_several_threads_are_not_in_each_other():
    other = event("cpu_op", "aten::add", 5, 10) | {"tid": 2}
    assert {row["own_ms"] for row in own_time([event("cpu_op", "aten::mm", 0, 20), other], 5)} == {0.02, 0.01}


def test_a_trace_that_is_too_large_loses_what_matters_least(tmp_path):
    path = tmp_path / "trace-x.json.gz"
    events = [event("cpu_op", f"aten::op{number * 7919 % 10_007}", number, 1) for number in range(3000)] + EVENTS
    whole = traces.write_trace(events, path)
    assert whole["left_out"] == []
    assert whole["bytes"] == path.stat().st_size
    less = traces.write_trace(events, path, limit=whole["bytes"] // 4)
    assert "cpu_op" in less["left_out"]
    kept = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {one.get("cat") for one in kept} == {"cuda_runtime", "cuda_driver", "kernel", "gpu_memcpy", None}
    least = traces.write_trace(events, path, limit=less["bytes"] - 1)
    assert "cuda_runtime" in least["left_out"]
    path.unlink()
    assert traces.write_trace(events, path, limit=10)["name"] is None
    assert not path.exists()


def test_names_that_json_does_not_allow_are_read_all_the_same(tmp_path):
    path = tmp_path / "trace.json"
    path.write_text('{"traceEvents": [{"name": "a\\z\\n\tb", "args": {"file": "c:\\\\d"}}]}')
    assert traces.read_events(path) == [{"name": "a\\z\n\tb", "args": {"file": "c:\\d"}}]
    path.write_text('{"traceEvents": []}')
    assert traces.read_events(path) == []


# ---- tests, files ----


def test_what_pytest_said_is_summed_up_whatever_was_cut_off(tmp_path):
    rows = [
        {"test": "a.py::good", "begins": True},
        {"test": "a.py::good", "outcome": "passed", "when": "call", "seconds": 1, "noted": {"waits": "4 of 4"}},
        {"test": "a.py::bad", "begins": True},
        {"test": "a.py::bad", "outcome": "failed", "when": "setup", "message": "boom"},
        {"test": "a.py::gone", "outcome": "skipped", "when": "setup", "message": "needs two"},
        {"test": "a.py::endless", "begins": True},
    ]
    path = tmp_path / "lines"
    path.write_text("\n".join(json.dumps(row) for row in rows) + '\n{"test": "cut o')
    found = summary(read_lines(path))
    assert found["counts"] == {"passed": 1, "failed": 1, "skipped": 1}
    assert found["failures"] == [{"test": "a.py::bad", "when": "setup", "message": "boom"}]
    assert found["skipped"] == {"needs two": 1}
    assert found["noted"] == {"good": {"waits": "4 of 4"}}
    assert found["not_ended"] == ["a.py::endless"]
    assert read_lines(tmp_path / "missing") == []


def test_results_are_brought_within_the_limits(tmp_path: Path):
    (tmp_path / "log.txt").write_bytes(b"first" + b"x" * (LARGEST_FILE + 10) + b"last")
    (tmp_path / "trace-a.json.gz").write_bytes(bytes(LARGEST_FILE + 1))
    (tmp_path / "gpu.json.part").write_text("{")
    (tmp_path / "gpu.json").write_text("{}")
    said = tidy(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gpu.json", "log.txt"]
    log = (tmp_path / "log.txt").read_bytes()
    assert len(log) <= LARGEST_FILE
    assert log.startswith(b"first")
    assert log.endswith(b"last")
    assert b"bytes are left out here" in log
    assert len(said) == 2
    for number in range(MOST_FILES):
        (tmp_path / f"extra {number}").touch()
    said = tidy(tmp_path)
    assert f"more than {MOST_FILES}" in said[0]
    assert any("is no plain name" in one for one in said)
