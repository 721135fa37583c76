"""Which requests a run makes where: states, references, judged answers, and times spread over prefixes."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_running import Animals, config_of, label, rows_of
from tiny_model import save_tiny_model
from transformers import MistralConfig, MistralForCausalLM

from eval.models import load_model
from eval.report.files import pack
from eval.running import RunFolderError, process, run
from eval.running.forecast import Forecast, in_words
from eval.running.plan import Case, Plan, spread_over_prefixes
from eval.systems import Setting, State, StateError, SystemUnavailableError
from eval.tasks import TASKS, UNJUDGED, Request

COLD, OPEN, WARM = State.COLD, State.OPEN, State.WARM_HOST


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("model"))), dtype="float32")


@pytest.fixture(autouse=True)
def _tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("animals", "kinds"):
        monkeypatch.setitem(TASKS, name, lambda data_dir, name=name: Animals(name))


def settings(*texts: str) -> list[Setting]:
    return [one for text in texts for one in Setting.parse(text, (0.1,))]


def plan_of(asked: list[Setting], states: tuple[State, ...], **own: tuple[State, ...]) -> Plan:
    offers = {one: own.get(one.system, (COLD, OPEN, WARM)) for one in asked}
    offers |= {one: (WARM,) for one in asked if one.system == "in_memory"}
    offers |= {one: (COLD,) for one in asked if one.system in ("recompute", "no_prefix")}
    return Plan(asked, states, offers)


def request(number: int, prefix: int) -> Request:
    return Request("task", number, torch.zeros(4).long(), prefix, torch.zeros(2).long(), ("a",))


# -- plans -------------------------------------------------------------------------------------------------------------


def test_every_system_is_made_in_every_state_that_it_has_and_references_beside_any() -> None:
    asked = settings("recompute", "in_memory", "reload", "impress")
    plan = plan_of(asked, (COLD, OPEN), reload=(COLD, WARM))
    assert [(case.setting.system, case.state) for case in plan.cases] == [
        ("recompute", COLD),
        ("in_memory", WARM),
        ("reload", COLD),
        ("impress", COLD),
        ("impress", OPEN),
    ]
    assert plan.notes == ["reload is left out in the state open: its states are cold, warm_host"]


def test_answers_are_judged_once_in_the_first_state() -> None:
    asked = settings("in_memory", "attentionstore", "impress+overlap", "impress", "impress+groups", "contiguouskv")
    plan = plan_of(asked, (OPEN, COLD))
    judged = {(case.setting.label, case.state) for case in plan.cases if plan.is_judged(case, "accuracy")}
    assert judged == {("in_memory", WARM), ("impress", OPEN), ("impress+groups", OPEN), ("contiguouskv", OPEN)}


def test_a_variant_is_judged_if_the_system_that_it_answers_as_is_not_there() -> None:
    plan = plan_of(settings("impress+overlap", "attentionstore"), (COLD,))
    assert [case.setting.label for case in plan.cases if plan.is_judged(case, "accuracy")] == ["impress+overlap"]


def test_the_floor_is_never_judged_and_kept_tokens_are_where_nothing_answers_alike() -> None:
    asked = settings("no_prefix", "kept_tokens", "in_memory")
    both = [*asked, *settings("contiguouskv")]
    alone, beside = (plan_of(one, (COLD, WARM), kept_tokens=(WARM,)) for one in (asked, both))
    assert [(case.setting.system, case.state) for case in alone.cases] == [
        ("no_prefix", COLD),
        ("kept_tokens", WARM),
        ("in_memory", WARM),
    ]
    assert alone.notes == ["kept_tokens is left out in the state cold: its states are warm_host"]
    judged = [[case.setting.system for case in one.cases if one.is_judged(case, "accuracy")] for one in (alone, beside)]
    assert judged == [["kept_tokens", "in_memory"], ["in_memory", "contiguouskv"]]
    assert [one.system for one in beside.streamed] == ["no_prefix", "in_memory", "contiguouskv"]
    # Nothing judges the answers of some tasks: only what is timed is made.
    assert not any(alone.is_judged(case, UNJUDGED) for case in alone.cases)
    assert alone.made_of(request(0, 0), UNJUDGED, frozenset({1})) == []
    assert alone.made_of(request(1, 0), UNJUDGED, frozenset({1})) == alone.cases


def test_options_that_only_streams_show_are_made_only_there() -> None:
    asked = settings("attentionstore_h2o", "attentionstore_h2o+lfu")
    plan = plan_of(asked, (COLD,))
    assert [case.setting for case in plan.cases] == asked[:1]
    assert plan.streamed == asked


def test_systems_that_cannot_be_made_are_in_no_case() -> None:
    asked = settings("in_memory", "impress")
    plan = Plan(asked, (COLD,), {asked[0]: (WARM,)})
    assert {case.setting.system for case in plan.cases} == {"in_memory"} == {one.system for one in plan.streamed}


def test_times_are_taken_of_the_first_requests_of_each_prefix() -> None:
    by_prefix = [request(number, number // 4) for number in range(12)]
    assert spread_over_prefixes(by_prefix, 2) == {0, 4}
    assert spread_over_prefixes(by_prefix, 5) == {0, 4, 8, 1, 5}
    assert spread_over_prefixes(by_prefix, 100) == set(range(12))
    in_turn = [request(number, number % 5) for number in range(50, 60)]
    assert spread_over_prefixes(in_turn, 5) == set(range(50, 55))
    plan = plan_of(settings("impress", "impress+overlap"), (COLD,))
    made = [plan.made_of(request(number, 0), "accuracy", frozenset({1})) for number in (0, 1)]
    assert [[case.setting.label for case in cases] for cases in made] == [["impress"], ["impress", "impress+overlap"]]


# -- runs --------------------------------------------------------------------------------------------------------------


def test_a_run_in_several_states_judges_in_the_first_and_times_in_all(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    systems = ("recompute", "in_memory", "attentionstore+overlap", "contiguouskv@0.25")
    states = ("open", "keys_resident", "warm_host", "cold")
    config = config_of(tasks=("animals",), systems=systems, states=states, requests=4, timed_requests=2)
    rows = rows_of(run(config, tmp_path, progress=False, loaded=loaded))
    made = Counter((row["system"], row["state"]) for row in rows)
    assert made == {
        ("recompute", "cold"): 2,
        ("in_memory", "warm_host"): 4,
        **{("attentionstore", state): 2 for state in ("open", "warm_host", "cold")},
        ("contiguouskv", "open"): 4,
        **{("contiguouskv", state): 2 for state in ("keys_resident", "warm_host", "cold")},
    }
    judged = {(row["system"], row["state"]) for row in rows if row["score"] is not None}
    assert judged == {("in_memory", "warm_host"), ("contiguouskv", "open")}
    # Both timed requests are of different prefixes.
    assert {row["prefix"] for row in rows if row["state"] == "keys_resident"} == {0, 1}
    for row in rows:
        assert row["departure"] is None, row
        if row["system"] in ("attentionstore", "contiguouskv"):
            assert (row["stats"]["bytes_read"] == 0) is (row["state"] == "warm_host")
    tokens = {row["first_token"] for row in rows if row["number"] == 0 and row["system"] != "contiguouskv"}
    assert len(tokens) == 1
    keys = {(row["prefix"], row["prefix_key"]) for row in rows}
    assert len(keys) == 2
    skipped = json.loads((tmp_path / "config.json").read_text())["skipped"]
    assert skipped == [
        "attentionstore+overlap is left out in the state keys_resident: its states are cold, open, warm_host"
    ]


def test_later_requests_are_those_that_an_earlier_run_did_not_make(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    config: dict[str, Any] = {"tasks": ("kinds",), "systems": ("in_memory",)}
    early = rows_of(run(config_of(**config, requests=3), tmp_path / "early", progress=False, loaded=loaded))
    late = rows_of(run(config_of(**config, requests=2, first=3), tmp_path / "late", progress=False, loaded=loaded))
    assert sorted(row["number"] for row in early) == [0, 1, 2]
    assert sorted(row["number"] for row in late) == [3, 4]
    assert {row["about"]["house"] for row in late} == {3, 4}
    assert {row["prefix_key"] for row in early} == {row["prefix_key"] for row in late}


class Unable:
    """A system that cannot run, or not in a state."""

    def __init__(self, system: Any, fault: Exception) -> None:
        self._system = system
        self._fault = fault

    def __getattr__(self, name: str) -> Any:
        return getattr(self._system, name)

    def enter(self, *arguments: Any) -> None:
        raise self._fault

    def __enter__(self) -> Unable:
        self._system.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._system.__exit__(*exception)


@pytest.mark.parametrize(
    ("where", "fault"),
    [
        ("make", SystemUnavailableError("needs a GPU")),
        ("enter", SystemUnavailableError("needs a GPU")),
        ("enter", StateError("no room")),
    ],
)
def test_a_system_that_cannot_run_is_noted_once_and_the_run_goes_on(
    where: str,
    fault: Exception,
    tmp_path: Path,
    loaded: tuple[Any, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make = Setting.make

    def made(self: Setting, *arguments: Any, **options: Any) -> Any:
        if self.system != "contiguouskv":
            return make(self, *arguments, **options)
        if where == "make":
            raise fault
        return Unable(make(self, *arguments, **options), fault)

    monkeypatch.setattr(Setting, "make", made)
    config = config_of(tasks=("animals", "kinds"), systems=("in_memory", "contiguouskv"), requests=2)
    rows = rows_of(run(config, tmp_path, loaded=loaded))
    assert {row["system"] for row in rows} == {"in_memory"}
    assert len(rows) == 4
    skipped = json.loads((tmp_path / "config.json").read_text())["skipped"]
    assert {note.partition(" is left out")[0] for note in skipped} == (
        {"contiguouskv"} if where == "make" else {"contiguouskv 10% cold", "contiguouskv 50% cold"}
    )
    assert all(note.endswith(f"left out: {fault}") for note in skipped)
    shown = capsys.readouterr().err
    assert all(shown.count(note) == 1 for note in skipped)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "machine.json", "rows.jsonl"]


def windowed(tokenizer: Any, window: int = 64) -> Any:
    """A tiny model whose layers all have a sliding window."""
    torch.manual_seed(1)
    config = MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=window,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.3,
    )
    return MistralForCausalLM(config).eval()


def test_models_with_windows_are_judged_and_systems_that_cannot_do_them_are_left_out(
    tmp_path: Path, loaded: tuple[Any, Any]
) -> None:
    model = windowed(loaded[1])
    systems = ("recompute", "in_memory", "reload", "contiguouskv@0.5", "contiguouskv_paper@0.5")
    config = config_of(tasks=("animals", "kinds"), systems=systems, requests=2)
    rows = rows_of(run(config, tmp_path, progress=False, loaded=(model, loaded[1])))
    noted = json.loads((tmp_path / "config.json").read_text())["skipped"]
    made = {label(row) for row in rows}
    assert {"recompute", "in_memory"} <= made
    assert made | {note.partition(" ")[0] for note in noted} == {text.partition("@")[0] for text in systems}
    for row in rows:
        if row["system"] not in ("recompute", "reload"):
            assert row["kl"] is not None
            # No layer chooses anything: all tokens of a window are used.
            assert row["kl"] == pytest.approx(0.0, abs=1e-5)
            assert row["prediction"]


@contextmanager
def departing(model: Any, system: Any, request: Any, state: Any, ready_bytes: int) -> Iterator[Any]:
    """A request that finds its state the second time."""
    departing.made += 1  # type: ignore[attr-defined]
    yield SimpleNamespace(
        cache=None,
        first_token=1,
        departure="other" if departing.made % 2 else None,  # type: ignore[attr-defined]
        fields=lambda: {"made": departing.made},  # type: ignore[attr-defined]
    )


@pytest.mark.parametrize(("state", "made"), [(COLD, 2), (None, 1)])
def test_a_request_is_repeated_once_and_not_in_a_stream(
    state: State | None, made: int, tmp_path: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    departing.made = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(process, "timed_request", departing)
    asked = settings("contiguouskv")
    one = process.Process(
        config=config_of(),
        plans={4: plan_of(asked, (COLD,))},
        model=loaded[0],
        tokenizer=loaded[1],
        folder=SimpleNamespace(path=tmp_path),
        session="",
        number=0,
        count=1,
        progress=False,
        store_options={},
    )
    assert one.measured(None, request(0, 0), Case(asked[0], state), None) == {"made": made}


def test_rows_without_a_state_are_refused(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    config = config_of(tasks=("animals",), systems=("in_memory",), requests=1)
    run(config, tmp_path, progress=False, loaded=loaded)
    path = tmp_path / "rows.jsonl"
    (row,) = rows_of(tmp_path)
    del row["state"]
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(RunFolderError, match="rows of an older version, without a state"):
        run(config, tmp_path, progress=False, loaded=loaded)


def test_a_packed_run_is_not_continued(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    config = config_of(tasks=("animals",), systems=("in_memory",), requests=1)
    kept = tmp_path / "kept"
    pack(run(config, tmp_path / "run", progress=False, loaded=loaded), kept)
    before = {path.name: path.read_bytes() for path in kept.iterdir()}
    with pytest.raises(RunFolderError, match="holds a packed run"):
        run(config, kept, progress=False, loaded=loaded)
    assert {path.name: path.read_bytes() for path in kept.iterdir()} == before


def test_a_task_from_a_file_runs_like_any_other(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    chance = random.Random(0)
    prefixes = ["".join(chance.choices("abcdef ", k=200)) for _ in range(2)]
    lines = [
        {
            "prefix": prefixes[number % 2],
            "question": f" who lives at {number}?",
            "answers": ["cat"],
            "max_new_tokens": 3,
        }
        for number in range(5)
    ]
    path = tmp_path / "my.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    config = config_of(tasks=(f"file:{path}",), systems=("in_memory", "contiguouskv@0.25"), requests=50)
    rows = rows_of(run(config, tmp_path / "run", progress=False, loaded=loaded))
    assert len(rows) == 10
    assert {row["task"] for row in rows} == {"file:my.jsonl"}
    assert {row["prefix"] for row in rows} == {0, 1}
    found = json.loads((tmp_path / "run" / "config.json").read_text())
    assert set(found["data"]) == set(found["questions"]) == {"file:my.jsonl"}


# -- forecasts ---------------------------------------------------------------------------------------------------------


def test_a_forecast_goes_by_tokens_and_by_the_mean_of_what_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 2.0, 10.0, 11.0])
    monkeypatch.setattr("eval.running.forecast.time.perf_counter", lambda: next(now))
    forecast = Forecast()
    assert forecast.seconds([("a", 100)]) == 0.0
    for kind in ("a", "b"):
        with forecast.seen(kind, 100):
            pass
    assert forecast.seconds([("a", 50), ("b", 200), ("c", 100)]) == pytest.approx(1.0 + 2.0 + 1.5)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.1, "1 seconds"), (45.0, "45 seconds"), (89.0, "89 seconds"), (850.0, "14 minutes"), (9000.0, "2.5 hours")],
)
def test_durations_are_told_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_the_time_is_told_before_most_of_it_has_passed(
    tmp_path: Path, loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(
        tasks=("animals",),
        streams=("shared_documents",),
        systems=("in_memory", "contiguouskv@0.25"),
        stream_requests=3,
        documents=1,
    )
    run(config, tmp_path, loaded=loaded)
    shown = capsys.readouterr().err
    assert "tasks: about " in shown
    assert ": 6 requests of 2 systems" in shown
    assert "shared_documents: about " in shown
