"""What happens when the engine is down, frozen, slow, cut off or refuses: the request ends in time, and is right."""

from __future__ import annotations

import contextlib
import gc
import logging
import threading
import time

import pytest
import torch
from machines import Machines, found, found_tokens, is_right, remote
from store_helpers import some_tokens, write_prefix
from transformers import DynamicCache, LlamaForCausalLM

from eval.network.object_server import SECRET, ObjectServer
from eval.network.proxy import Proxy
from hf_contiguouskv import ContiguousKVCache
from hf_contiguouskv.errors import SegmentReadError, StoreError
from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.fleet import breaker

IDS = some_tokens(1001)
# Seconds that an answer is waited for, and that a call may take then, on a busy machine.
TIMEOUT_S, IN_TIME_S = 1.0, 8.0


@pytest.fixture
def machines(distant_machines: Machines) -> Machines:
    """Machines that reach the shared store over the network that misbehaves."""
    return distant_machines


@pytest.fixture
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(breaker, "FIRST_PAUSE_S", 0.2)
    monkeypatch.setattr(breaker, "LONGEST_PAUSE_S", 0.2)


@pytest.mark.parametrize("fault", ["stall", "cut"])
def test_an_engine_that_is_down_when_the_store_is_opened(
    machines: Machines, proxy: Proxy, fault: str, short_pauses: None, caplog: pytest.LogCaptureFixture
) -> None:
    proxy.mode = fault
    began = time.monotonic()
    one = machines("one", remote_timeout_s=TIMEOUT_S)
    assert time.monotonic() - began < IN_TIME_S
    assert "cannot be asked now" in caplog.text
    assert SECRET not in caplog.text
    stored = write_prefix(one, IDS)
    assert is_right(one, stored, IDS)
    one.flush()
    assert one.inner.fleet is not None
    assert one.inner.fleet.waiting == 1
    # It is there again: what waits is sent with the next segment, and others find it.
    proxy.mode = "pass"
    time.sleep(0.3)
    write_prefix(one, some_tokens(500, seed=1))
    one.flush()
    assert one.inner.fleet.waiting == 0
    assert found_tokens(machines("two"), IDS) == len(IDS)


def test_an_engine_that_stops_answering_costs_its_time_out_once(machines: Machines, proxy: Proxy) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    two = machines("two", remote_timeout_s=TIMEOUT_S)
    proxy.mode = "stall"
    began = time.monotonic()
    assert found_tokens(two, IDS) == 0
    assert TIMEOUT_S <= time.monotonic() - began < IN_TIME_S
    began = time.monotonic()
    for _ in range(3):
        assert found_tokens(two, IDS) == 0
    assert time.monotonic() - began < TIMEOUT_S
    assert remote(two)["failures"] == 4


@pytest.mark.parametrize("fault", ["stall", "cut"])
def test_a_network_that_is_cut_while_chunks_are_read(
    machines: Machines, proxy: Proxy, fault: str, short_pauses: None
) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    two = machines("two", remote_timeout_s=TIMEOUT_S)
    stored = found(two, IDS)
    assert stored is not None
    proxy.mode = fault
    began = time.monotonic()
    with pytest.raises(SegmentReadError) as caught:
        is_right(two, stored, IDS)
    assert time.monotonic() - began < IN_TIME_S
    # It may be sound, so it stays.
    assert not caught.value.damage
    proxy.mode = "pass"
    time.sleep(0.3)
    again = found(two, IDS)
    assert again is not None
    assert is_right(two, again, IDS)


def test_connections_that_break_inside_an_answer(machines: Machines, proxy: Proxy, short_pauses: None) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    two = machines("two", remote_timeout_s=TIMEOUT_S)
    stored = found(two, IDS)
    assert stored is not None
    for cut_after in (100, 3000, 20_000):
        proxy.cut_after = cut_after
        with contextlib.suppress(SegmentReadError):
            assert is_right(two, stored, IDS)
        proxy.cut_after = None
        time.sleep(0.3)
    assert is_right(two, stored, IDS)


def test_wrong_credentials_are_an_error_that_does_not_tell_them(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-that-it-is")
    with pytest.raises(StoreError) as caught:
        machines("one")
    text = f"{caught.value} {caplog.text}"
    assert "s3://fleet" in str(caught.value)
    assert "not-the-secret-that-it-is" not in text
    assert SECRET not in text


def test_a_server_that_is_frozen(server: ObjectServer, machines: Machines) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    two = machines("two", remote_timeout_s=TIMEOUT_S)
    stored = found(two, IDS)
    assert stored is not None
    server.freeze()
    try:
        began = time.monotonic()
        with pytest.raises(SegmentReadError):
            is_right(two, stored, IDS)
        assert found_tokens(two, some_tokens(600, seed=9)) == 0
        assert time.monotonic() - began < IN_TIME_S
    finally:
        server.thaw()


def test_a_store_that_is_closed_while_it_reads(machines: Machines, proxy: Proxy) -> None:
    ids = some_tokens(20_000)
    write_prefix(machines("one"), ids)
    machines("one").flush()
    two = machines("two", remote_timeout_s=TIMEOUT_S)
    stored = found(two, ids)
    assert stored is not None
    proxy.bytes_per_s = 2e6
    outcome: list[object] = []

    def read() -> None:
        try:
            outcome.append(is_right(two, stored, ids))
        except StoreError as error:
            outcome.append(error)

    reader = threading.Thread(target=read)
    reader.start()
    time.sleep(0.2)
    began = time.monotonic()
    two.close()
    reader.join(IN_TIME_S)
    assert not reader.is_alive()
    assert time.monotonic() - began < 2 * IN_TIME_S
    assert len(outcome) == 1
    proxy.bytes_per_s = 0.0


def test_a_store_that_cannot_be_opened_leaves_no_thread(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-that-it-is")
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(StoreError):
            machines("one")
    gc.collect()
    assert threading.active_count() <= before


def test_damage_is_not_found_where_nothing_can_be_read(machines: Machines, proxy: Proxy, short_pauses: None) -> None:
    write_prefix(machines("one"), IDS)
    machines("one").flush()
    two = machines("two", remote_timeout_s=TIMEOUT_S)
    stored = found(two, IDS)
    assert stored is not None
    proxy.mode = "cut"
    two.inner.discard(stored.spans[0].segment, "for a test")
    two.flush()
    proxy.mode = "pass"
    time.sleep(0.3)
    assert "damaged" not in remote(two)
    assert found_tokens(two, IDS) == len(IDS)


# -- whole requests ---------------------------------------------------------------------------------------------------


def answer(model: LlamaForCausalLM, ids: torch.Tensor, cache: object) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.generate(
            ids, **{cache_argument(): cache}, max_new_tokens=8, do_sample=False, pad_token_id=199
        )
        return found


@pytest.mark.parametrize("fault", ["none", "stall", "cut", "gone", "closed"])
def test_a_request_is_answered_as_without_a_store(
    model: LlamaForCausalLM, machines: Machines, proxy: Proxy, fault: str, short_pauses: None
) -> None:
    prefix = torch.randint(0, 199, (1, 700), generator=torch.Generator().manual_seed(3))
    question = torch.randint(0, 199, (1, 20), generator=torch.Generator().manual_seed(4))
    ids = torch.cat([prefix, question], dim=1)
    expected = answer(model, ids, DynamicCache())

    one = machines("one")
    ContiguousKVCache(model, prefix, store=one, budget=1.0)
    one.flush()
    two = machines("two", remote_timeout_s=TIMEOUT_S)
    assert two.match(model, prefix) == 700
    if fault in ("stall", "cut"):
        proxy.mode = fault
    elif fault == "gone":
        fleet = two.inner.fleet
        assert fleet is not None
        fleet.engine.delete([info.name for info in fleet.engine.walk("segments")])
    elif fault == "closed":
        one.close()
    began = time.monotonic()
    # (Reads begin when it is made.)
    cache = ContiguousKVCache(model, prefix, store=two, budget=1.0)
    assert cache.stats.tokens_from_store == 700
    assert torch.equal(answer(model, ids, cache), expected)
    assert time.monotonic() - began < 2 * IN_TIME_S
    assert two.stats.recovered == (1 if fault in ("stall", "cut", "gone") else 0)


@pytest.mark.parametrize("fault", ["stall", "cut"])
def test_a_request_without_the_shared_store_computes(
    model: LlamaForCausalLM, machines: Machines, proxy: Proxy, fault: str
) -> None:
    prefix = torch.randint(0, 199, (1, 700), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([prefix, prefix[:, :20]], dim=1)
    expected = answer(model, ids, DynamicCache())
    store: PrefixStore = machines("one", remote_timeout_s=TIMEOUT_S)
    proxy.mode = fault
    cache = ContiguousKVCache(model, prefix, store=store, budget=1.0)
    assert cache.stats.tokens_prefilled == 700
    assert torch.equal(answer(model, ids, cache), expected)
