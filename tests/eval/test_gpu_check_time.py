"""The timed part of the GPU check: which requests are made as time and room run short, and how answers are judged."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from eval.gpu_check import blocks, time_stage
from eval.gpu_check.blocks import Block
from eval.gpu_check.cases import MEASURED, Case, Measured, cases_of, measured_at, memory_limits
from eval.gpu_check.prefixes import kv_bytes, make_model, prefix_ids, random_states, request
from eval.gpu_check.requests import TOLERANCE, Answers, centred, distance, prefix_effect, watched
from eval.gpu_check.results import BrokenDeviceError, Clock, Record, Results
from eval.gpu_check.settings import Settings
from eval.systems.states import State

REAL = Settings("out", "folder")
ALL_STATES = (State.COLD, State.OPEN, State.KEYS_RESIDENT, State.WARM_HOST, State.WARM_DEVICE)


def labelled(label: str) -> Measured:
    return next(one for one in MEASURED if one.label == label)


# ---- what is measured ----


def test_all_systems_are_measured_at_short_prefixes_and_fewer_at_long_ones() -> None:
    labels = [one.label for one in measured_at(REAL, 8192)]
    assert labels == [
        "in_memory",
        "default 25%",
        "default 5%",
        "published 5%",
        "exact",
        "attentionstore+overlap",
        "attentionstore",
        "impress 5%",
        "attentionstore_h2o 5%",
        "reload",
        "recompute",
    ]
    assert [one.label for one in measured_at(REAL, 130_944)] == labels[:6]


def test_each_is_measured_in_the_states_that_it_has() -> None:
    def states(tokens: int, label: str, known: tuple[State, ...]) -> list[State | None]:
        return [case.state for case in cases_of(REAL, tokens, labelled(label), SimpleNamespace(states=known))]

    assert states(8192, "default 5%", ALL_STATES) == list(ALL_STATES[1:])
    assert states(130_944, "default 5%", ALL_STATES) == [State.OPEN, State.KEYS_RESIDENT, State.WARM_DEVICE]
    assert states(8192, "reload", (State.COLD, State.WARM_HOST)) == [State.COLD, State.WARM_HOST]
    assert states(130_944, "in_memory", (State.WARM_HOST,)) == [State.WARM_HOST]
    assert states(8192, "recompute", ()) == [None]


def test_sizes_are_those_of_the_model() -> None:
    assert kv_bytes(REAL, 32_768) == 32_768 * 57_344
    cold, warm = (memory_limits(REAL, 32_768, Case(labelled("exact"), state)) for state in (None, State.WARM_HOST))
    assert warm["host_bytes"] > 1.2 * kv_bytes(REAL, 32_768) > cold["host_bytes"]


def test_prefixes_are_the_same_each_time_and_none_begins_another() -> None:
    one, other = (prefix_ids(REAL, tokens) for tokens in (64, 128))
    assert torch.equal(one, prefix_ids(REAL, 64))
    assert not torch.equal(one, other[:64])
    asked = request(REAL, 64, 9)
    assert (len(asked.prefix_ids), len(asked.suffix_ids), asked.prefix) == (64, 9, 64)


def test_a_model_of_the_real_shape_is_qwen2_5_7b() -> None:
    model = make_model(Settings("o", "f", device="meta"))
    assert sum(one.numel() for one in model.parameters()) == 7_615_616_512
    assert {one.dtype for one in model.parameters()} == {torch.bfloat16}


def test_random_states_have_the_shape_of_the_model() -> None:
    tiny = Settings.rehearsal("o", "f")
    model = make_model(tiny)
    states = random_states(model, 48)
    assert [tuple(layer.keys.shape) for layer in states.layers] == [(1, 2, 48, 16)] * 4
    assert torch.equal(states.layers[2].values, random_states(model, 48).layers[2].values)
    assert not torch.equal(states.layers[0].keys, states.layers[1].keys)


# ---- answers ----


def test_answers_are_compared_with_those_that_they_should_be() -> None:
    answers, right = Answers(), torch.randn(100)
    assert answers.judge(Case(labelled("exact"), State.COLD), right)["compared_with"] is None
    answers.judge(Case(labelled("in_memory"), State.WARM_DEVICE), right)
    near = answers.judge(Case(labelled("exact"), State.COLD), right * (1 + TOLERANCE / 2))
    assert near["answer_ok"]
    assert near["compared_with"] == "in_memory"
    assert not answers.judge(Case(labelled("reload"), State.COLD), right.flip(0))["answer_ok"]
    other = torch.randn(100)
    assert answers.judge(Case(labelled("default 5%"), State.COLD), other)["answer_ok"]
    warm = answers.judge(Case(labelled("default 5%"), State.WARM_HOST), other)
    assert (warm["answer_ok"], warm["answer_error"], warm["compared_with"]) == (True, 0.0, "default 5%")
    assert not answers.judge(Case(labelled("default 5%"), State.WARM_HOST), right)["answer_ok"]
    assert answers.judge(Case(labelled("recompute"), State.COLD), other) == {}
    assert prefix_effect(answers, right.flip(0)) == pytest.approx(distance(centred(right.flip(0)), centred(right)))
    assert prefix_effect(Answers(), right) is None


def test_numbers_that_are_none_are_wrong() -> None:
    for wrong in (float("nan"), float("inf")):
        found = Answers().judge(Case(labelled("in_memory"), State.WARM_DEVICE), torch.tensor([1.0, wrong]))
        assert not found["answer_ok"]


def test_the_last_logits_are_seen_and_then_not_any_more() -> None:
    model = make_model(Settings.rehearsal("o", "f"))
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad(), watched(model) as last:
        expected = model(ids).logits[0, -1]
        assert torch.equal(last.take(), expected)
        assert last.logits is None
    with torch.no_grad():
        model(ids)
    assert last.logits is None


# ---- time and room ----


class FakeSystem:
    states = (State.COLD, State.WARM_HOST)

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder / name

    def store(self, ids: Any, states: Any) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "a.safetensors").write_bytes(bytes(1000))

    def __enter__(self) -> FakeSystem:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class Stage:
    """Blocks whose requests take no time but say how long they took; time passes as they say."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.now = time.time()
        self.walls: dict[str, float] = {}
        self.asked: list[tuple[str, str]] = []
        sizes = {"lengths": (100, 200), "complete_lengths": (100, 200), "recompute_lengths": (100,)}
        self.settings = Settings.rehearsal(str(folder), str(folder), rounds=4, fewest_rounds=2, **sizes)
        self.results = Results(folder)
        self.record = Record(self.results, "time", self.clock(1e6), folder)
        patch.setattr(time, "time", lambda: self.now)
        patch.setattr(blocks, "timed_request", self.timed)
        patch.setattr(blocks, "timed_floor", lambda *_: (0.01, torch.ones(3)))
        patch.setattr(blocks, "random_states", lambda *_: None)
        patch.setattr(
            blocks, "make_system", lambda s, m, case, folder, t: FakeSystem(folder, str(case.measured.folder))
        )
        self.patch = patch

    def clock(self, seconds: float) -> Clock:
        return Clock(self.now + seconds)

    def timed(self, model: Any, system: Any, case: Case, *_: Any) -> dict[str, Any]:
        if self.walls.get(case.name, 0.0) < 0:
            raise RuntimeError("no such request")
        wall = self.walls.get(case.name, 1.0)
        self.now += wall
        self.asked.append((case.measured.label, str(case.state)))
        return {"seconds": wall, "wall_s": wall}

    def block(self, tokens: int = 100, seconds: float = 1e6, **more: Any) -> Block:
        return Block(
            self.settings, None, tokens, self.folder / str(tokens), self.record, self.clock(seconds), None, **more
        )


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Stage]:
    with monkeypatch.context() as patch:
        yield Stage(tmp_path, patch)


def test_with_time_enough_everything_is_done(stage: Stage) -> None:
    block = stage.block()
    block.run()
    own = block.own
    assert own["status"] == "complete"
    assert own["skipped"] == []
    assert own["rounds"] == 4
    cases = len(block.systems)
    assert cases == 2 * len(measured_at(stage.settings, 100))
    assert len(own["requests"]) == cases * 5
    for number in range(5):
        assert len({(one["label"], one["state"]) for one in own["requests"] if one["round"] == number}) == cases
    # The answers of others are compared with those of the first.
    assert own["requests"][0]["label"] == "in_memory"
    orders = [[one["label"] for one in own["requests"] if one["round"] == number] for number in (1, 2, 3)]
    assert orders[0] != orders[1] != orders[2]
    assert own["stored"]["chunks"]["bytes"] == 1000


def test_rounds_are_left_out_before_systems_are(stage: Stage) -> None:
    cases = 2 * len(measured_at(stage.settings, 100))
    block = stage.block(seconds=cases * 4.5)
    block.run()
    assert block.own["rounds"] == 3
    assert [one["what"] for one in block.own["skipped"]] == ["rounds"]
    assert len(block.own["requests"]) == cases * 4


def test_the_slowest_are_left_out_where_the_fewest_rounds_do_not_fit(stage: Stage) -> None:
    stage.walls = {"reload cold": 50.0, "recompute cold": 30.0}
    cases = 2 * len(measured_at(stage.settings, 100))
    block = stage.block(seconds=cases - 2 + 80 + 2.5 * cases)
    block.run()
    assert [one["what"] for one in block.own["skipped"]] == ["reload cold", "recompute cold", "rounds"]
    assert "50.0 s" in block.own["skipped"][0]["why"]
    assert block.own["rounds"] == 2
    assert len([one for one in block.own["requests"] if one["label"] == "reload" and one["round"]]) == 2  # Warm.


def test_no_request_is_begun_when_time_is_over(stage: Stage) -> None:
    block = stage.block(seconds=3.5)
    block.run()
    assert len(block.own["requests"]) == 4
    assert block.own["status"] == "complete"
    why = [one["why"] for one in block.own["skipped"]]
    assert "no time was left for its first request" in why


def test_a_round_ends_where_the_next_request_would_take_too_long(stage: Stage) -> None:
    block = stage.block()
    block._store()
    block._first_round()
    cases, _ = block._planned(4)
    block._clock = stage.clock(5.5)
    assert not block._round(1, cases)
    assert sum(one["round"] == 1 for one in block.own["requests"]) == 5
    assert block.own["skipped"][-1]["why"] == "time ran out in round 1"


def test_a_request_that_fails_is_not_made_again(stage: Stage) -> None:
    stage.walls = {"default 5% cold": -1.0}
    block = stage.block()
    block.run()
    assert list(stage.record.failed) == ["100 default 5% cold"]
    assert ("default 5%", "cold") not in stage.asked
    assert stage.asked.count(("default 5%", "warm_host")) == 5


def test_a_folder_that_does_not_fit_the_disk_is_left_out(stage: Stage) -> None:
    size = kv_bytes(stage.settings, 100)
    stage.patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size * 1.6))
    block = stage.block()
    block.run()
    assert "chunks" not in block.own["stored"]
    assert {"impress-first", "h2o", "whole"} <= set(block.own["stored"])
    skipped = {one["what"]: one["why"] for one in block.own["skipped"]}
    assert {"default 25%", "exact", "published 5%"} <= set(skipped)
    assert "are free" in skipped["exact"]


def test_a_disk_that_is_too_slow_is_known_from_before(stage: Stage) -> None:
    block = stage.block(seconds=10, write_speed=kv_bytes(stage.settings, 100) / 6)
    block._store()
    assert block.own["stored"] == {}
    assert all("it would take" in one["why"] for one in block.own["skipped"])


def test_what_was_stored_goes_and_what_is_traced_stays(stage: Stage) -> None:
    block = stage.block()
    block.run()
    block.close(keep=("chunks",))
    assert [path.name for path in (stage.folder / "100").iterdir()] == ["chunks"]
    block.close()
    assert list((stage.folder / "100").iterdir()) == []


def test_a_block_goes_on_where_an_earlier_process_died(stage: Stage) -> None:
    stage.block().run()
    # As if it had died in the third round.
    own = stage.block().own
    own["requests"] = [one for one in own["requests"] if one["round"] < 3]
    before = len(own["requests"])
    marker = stage.folder / "time.running"
    marker.write_text("100 exact cold")
    stage.results.flush()
    stage.record = Record(Results(stage.folder), "time", stage.clock(1e6), stage.folder)
    stage.asked.clear()
    block = stage.block()
    assert len(block.own["requests"]) == before
    block.run()
    assert ("exact", "cold") not in stage.asked
    assert "100 exact cold" in stage.record.failed
    rounds = [one["round"] for one in block.own["requests"] if (one["label"], one["state"]) == ("exact", "warm_host")]
    assert rounds == [0, 1, 2, 0, 3, 4]


@pytest.mark.parametrize("seconds", [1e6, 260.0])
def test_longer_prefixes_are_begun_if_they_fit_going_by_shorter_ones(stage: Stage, seconds: float) -> None:
    stage.patch.setattr(time_stage, "Block", lambda *arguments: made.append(Block(*arguments)) or made[-1])
    stage.patch.setattr(time_stage, "_varied", lambda *_: None)
    made: list[Block] = []
    time_stage._lengths(
        Settings.rehearsal(
            str(stage.folder), str(stage.folder), lengths=(100, 800), complete_lengths=(100, 800), shares=(0.9, 1.0)
        ),
        None,
        stage.record,
        stage.clock(seconds),
        None,
    )
    skipped = stage.record.found["skipped"]
    if seconds == 1e6:
        assert [block.own["tokens"] for block in made] == [100, 800]
        assert skipped == []
    else:
        assert [block.own["tokens"] for block in made] == [100]
        assert skipped[0]["what"] == "800 tokens"
        assert "would take about" in skipped[0]["why"]


def test_a_prediction_leaves_out_what_is_not_measured_there(stage: Stage) -> None:
    stage.settings = Settings.rehearsal(
        str(stage.folder), str(stage.folder), lengths=(100, 400), complete_lengths=(100,)
    )
    block = stage.block()
    block.run()
    block.own["stored"] = {"chunks": {"seconds": 2.0}, "whole": {"seconds": 100.0}}
    scaling = len(measured_at(stage.settings, 400))
    # Stored once, and two rounds; what is warm on the host is left out there.
    assert block.predicted(400) == pytest.approx(4 * (2.0 + 2 * scaling))
    block.close()
    assert block.predicted(400) == pytest.approx(4 * (2.0 + 2 * scaling))


def test_a_broken_device_ends_the_block(stage: Stage) -> None:
    def dead() -> None:
        raise RuntimeError("CUDA error")

    stage.record._alive = dead
    stage.walls = {"in_memory cold": -1.0}
    with pytest.raises(BrokenDeviceError):
        stage.block().run()


def test_varied_suffixes_are_shared_by_no_two_systems(stage: Stage) -> None:
    stage.patch.setattr(time_stage, "timed_floor", lambda *_: (0.01, None))
    seen: list[tuple[str, int]] = []

    def timed(model: Any, system: Any, case: Case, asked: Any, last: Any, whole_prefix: bool) -> dict[str, Any]:
        assert whole_prefix
        seen.append((case.measured.label, len(asked.suffix_ids)))
        return {"seconds": 1.0}

    stage.patch.setattr(time_stage, "timed_request", timed)
    block = stage.block()
    block.run()
    settings = Settings.rehearsal("o", "f", varied_suffixes=(17, 48))
    time_stage._varied(settings, None, block, stage.record, stage.clock(100), None)
    found = stage.record.found["varied"]
    systems = 1 + len(time_stage.VARIED)
    assert len(found) == 2 * systems * (32 // systems)
    owners: dict[int, set[str]] = {}
    for label, length in seen:
        owners.setdefault(length, set()).add(label)
    assert all(len(labels) == 1 for labels in owners.values())
    stage.record.found["varied"].clear()
    time_stage._varied(settings, None, block, stage.record, stage.clock(0), None)
    assert stage.record.found["varied"] == []
