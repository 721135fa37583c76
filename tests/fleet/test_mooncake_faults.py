"""What happens when machines of a Mooncake Store die, hang or forget: the request ends in time, and is right."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from machines import Machines, engine_of, found, found_tokens, is_right, remote
from mooncake_server import MooncakeServer, mooncake_server
from store_helpers import some_tokens, write_prefix
from test_faults import answer
from transformers import DynamicCache, LlamaForCausalLM

from hf_contiguouskv import ContiguousKVCache
from hf_contiguouskv.errors import SegmentReadError, StoreError
from hf_contiguouskv.store.fleet import breaker
from hf_contiguouskv.store.fleet.deadline import Deadline
from hf_contiguouskv.store.fleet.engine import DeadlineError, EngineUnavailableError
from hf_contiguouskv.store.fleet.mooncake.engine import MooncakeStore

IDS = some_tokens(1001)
# Seconds that an answer is waited for, and that a request may take then, on a busy machine.
TIMEOUT_S, IN_TIME_S = 1.0, 16.0
FAULTS = ("none", "owner killed", "owner frozen", "master killed", "master frozen", "master restarted", "removed")


@pytest.fixture
def server(require_mooncake: None, tmp_path: Path) -> Iterator[MooncakeServer]:
    """A Mooncake Store that may be broken."""
    (tmp_path / "server").mkdir()
    with mooncake_server(tmp_path / "server") as running:
        yield running
        running.mend()


@pytest.fixture
def machines(server: MooncakeServer, tmp_path: Path) -> Iterator[Machines]:
    with Machines(server.url("x"), tmp_path) as some:
        yield some
        # (Clients end sooner where their master answers.)
        server.mend()


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_S", 0.2)


def break_it(server: MooncakeServer, machines: Machines, fault: str) -> None:
    """Let something happen to the shared store."""
    if fault == "owner killed":
        server.kill_owner()
    elif fault == "owner frozen":
        server.freeze_owner()
    elif fault == "master killed":
        server.kill_master()
    elif fault == "master frozen":
        server.freeze_master()
    elif fault == "master restarted":
        server.kill_master()
        server.start_master()
    elif fault == "removed":
        for key in server.keys("/p/"):
            assert server.tell_owner("remove", key) == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_a_request_is_answered_as_without_a_store(
    model: LlamaForCausalLM,
    server: MooncakeServer,
    machines: Machines,
    fault: str,
) -> None:
    prefix = torch.randint(0, 199, (1, 700), generator=torch.Generator().manual_seed(3))
    question = torch.randint(0, 199, (1, 20), generator=torch.Generator().manual_seed(4))
    ids = torch.cat([prefix, question], dim=1)
    expected = answer(model, ids, DynamicCache())

    one = machines("one", remote_timeout_s=TIMEOUT_S)
    ContiguousKVCache(model, prefix, store=one, budget=1.0)
    one.flush()
    assert remote(one)["published"] == 1
    two = machines("two", remote_timeout_s=TIMEOUT_S)
    assert two.match(model, prefix) == 700
    break_it(server, machines, fault)
    began = time.monotonic()
    cache = ContiguousKVCache(model, prefix, store=two, budget=1.0)
    assert cache.stats.tokens_from_store == 700
    assert torch.equal(answer(model, ids, cache), expected)
    assert time.monotonic() - began < IN_TIME_S
    assert two.stats.recovered == (0 if fault == "none" else 1)


@pytest.mark.parametrize("fault", ["master killed", "master frozen", "owner killed", "owner frozen"])
def test_what_does_not_answer_is_left_alone(server: MooncakeServer, machines: Machines, fault: str) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    two = machines("two", remote_timeout_s=TIMEOUT_S)
    stored = found(two, IDS)
    assert stored is not None
    break_it(server, machines, fault)
    began = time.monotonic()
    with pytest.raises(SegmentReadError) as caught:
        is_right(two, stored, IDS)
    assert time.monotonic() - began < IN_TIME_S
    # It may be sound, so it stays.
    assert not caught.value.damage
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(SegmentReadError):
            is_right(two, stored, IDS)
    assert time.monotonic() - began < TIMEOUT_S


def test_a_frozen_owner_that_goes_on_is_read_again(
    server: MooncakeServer, machines: Machines, short_pauses: None
) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    two = machines("two", remote_timeout_s=TIMEOUT_S)
    stored = found(two, IDS)
    assert stored is not None
    server.freeze_owner()
    with pytest.raises(SegmentReadError):
        is_right(two, stored, IDS)
    server.mend()
    until = time.monotonic() + IN_TIME_S
    while True:
        try:
            assert is_right(two, stored, IDS)
            break
        except SegmentReadError:
            assert time.monotonic() < until
            time.sleep(0.1)


def test_a_master_that_is_down_when_the_store_is_opened(
    server: MooncakeServer, machines: Machines, short_pauses: None, caplog: pytest.LogCaptureFixture
) -> None:
    server.freeze_master()
    began = time.monotonic()
    one = machines("one", remote_timeout_s=TIMEOUT_S)
    assert time.monotonic() - began < IN_TIME_S
    assert "cannot be asked now" in caplog.text
    stored = write_prefix(one, IDS)
    assert is_right(one, stored, IDS)
    one.flush()
    assert one.inner.fleet is not None
    assert one.inner.fleet.waiting == 1
    # It is there again: what waits is sent, and others find it.
    server.mend()
    until = time.monotonic() + IN_TIME_S
    while one.inner.fleet.waiting and time.monotonic() < until:
        time.sleep(0.3)
        one.flush()
    assert found_tokens(machines("two"), IDS) == len(IDS)


def test_a_master_that_has_forgotten_all_is_told_again(
    server: MooncakeServer, machines: Machines, short_pauses: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_contiguouskv.store.fleet.fleet._LOOK_S", 0.0)
    one = machines("one", remote_timeout_s=TIMEOUT_S)
    write_prefix(one, IDS)
    one.flush()
    break_it(server, machines, "master restarted")
    # (The owner lends its memory again after a second.)
    until = time.monotonic() + IN_TIME_S
    while not found_tokens(machines("two", remote_timeout_s=TIMEOUT_S), IDS) and time.monotonic() < until:
        assert found_tokens(one, IDS) == len(IDS)
        one.flush()
        time.sleep(0.2)
    stored = found(machines("two"), IDS)
    assert stored is not None
    assert stored.tokens == len(IDS)
    assert is_right(machines("two"), stored, IDS)


def test_objects_that_are_removed_while_they_are_read_are_never_taken_for_right(
    server: MooncakeServer, machines: Machines
) -> None:
    ids = some_tokens(12_000)
    write_prefix(machines("one"), ids)
    machines("one").flush()
    (info,) = engine_of(machines("one")).walk("segments")
    (piece,) = server.keys("/p/")
    wrong = (b"\xa5" * info.nbytes).hex()
    outcome: list[object] = []
    done = threading.Event()

    def read() -> None:
        for number in range(12):
            store = machines(f"reader {number}", remote_timeout_s=TIMEOUT_S)
            stored = found(store, ids)
            if number == 1:
                done.set()
            try:
                outcome.append("missed" if stored is None else is_right(store, stored, ids))
            except StoreError as error:
                outcome.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    done.wait(IN_TIME_S)
    assert server.tell_owner("replace", piece, wrong) == 0
    reader.join(10 * IN_TIME_S)
    assert len(outcome) == 12
    assert outcome[0] is True
    assert False not in outcome
    assert isinstance(outcome[-1], StoreError) or outcome[-1] == "missed"


@pytest.mark.parametrize("frozen", ["master", "owner"])
def test_a_deadline_ends_a_call_and_is_held_against_nobody(server: MooncakeServer, frozen: str) -> None:
    engine, content = MooncakeStore(server.url("z"), 10.0), bytes(300_000)
    engine.put("a", content)
    version = engine.read_ranges("a", [(0, memoryview(bytearray(1)))]).version
    (server.freeze_master if frozen == "master" else server.freeze_owner)()
    ranges = [(0, memoryview(bytearray(len(content))))]
    for seconds in (0.2, 0.0):
        with Deadline(seconds).applied(), pytest.raises(DeadlineError):
            engine.read_ranges("a", ranges, version)
    server.mend()
    assert not engine._asking.breaker.is_open
    assert engine.read_ranges("a", ranges, version).size == len(content)
    engine.close()


def test_a_client_whose_call_hangs_is_left_at_its_end(server: MooncakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_contiguouskv.store.fleet.mooncake.client._CLOSE_S", 0.2)
    engine = MooncakeStore(server.url("y"), TIMEOUT_S)
    engine.put("a", b"content")
    go = threading.Event()
    call = engine._client.start(lambda store: go.wait(60))
    with pytest.raises(TimeoutError):
        call.wait(0.01)
    engine.close()
    with pytest.raises(EngineUnavailableError, match="closed"):
        engine.get("a", 100)
    go.set()
