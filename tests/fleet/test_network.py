"""Does `budget="auto"` know the network? All speeds are injected; nothing here is timed."""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace

import pytest
import torch
from clock import Clock
from machines import Machines, engine_of
from transformers import DynamicCache, LlamaForCausalLM

from hf_contiguouskv import AttentionMass, ContiguousKVCache, ContiguousKVConfig
from hf_contiguouskv.model.fingerprint import model_fingerprint
from hf_contiguouskv.model.layer_plan import LayerPlan
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.planning import auto_budget, measured_speeds, network
from hf_contiguouskv.planning.auto_budget import BudgetChoice, choose_budget
from hf_contiguouskv.planning.measured_speeds import UNKNOWN_DISK, ComputeSpeeds, read_speed
from hf_contiguouskv.planning.network import USUAL, Network, away_share, network_cost, network_to
from hf_contiguouskv.planning.read_plan import WORTH_READING_BYTES, ChoosingCost, ReadPlan
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.attached_prefix import AttachedPrefix
from hf_contiguouskv.store.fleet.deadline import seconds_left
from hf_contiguouskv.store.fleet.engine import DeadlineError, EngineUnavailableError
from hf_contiguouskv.store.fleet.link import Link, LinkMeter

AUTO = ContiguousKVConfig(budget="auto", least_budget=0.05)
SPEEDS = ComputeSpeeds(forward_s=0.01, used_s=1e-7, considered_s=1e-7, choosing_s=1e-4, prefill_s=1.0)
PREFIX = torch.randint(0, 199, (1, 700), generator=torch.Generator().manual_seed(3))
QUESTION = torch.randint(0, 199, (1, 20), generator=torch.Generator().manual_seed(4))
FAST_DISK = 1e12


class TestLinkMeter:
    def read(self, meter: LinkMeter, clock: Clock, nbytes: int, seconds: float) -> None:
        with meter.counting() as read:
            clock.now += seconds
            read.nbytes = nbytes

    def test_short_reads_tell_the_round_trip_and_long_ones_the_bytes(self, clock: Clock) -> None:
        meter = LinkMeter(clock)
        assert meter.estimate() is None
        for seconds in (0.06, 0.05, 0.2):
            self.read(meter, clock, 1000, seconds)
        assert meter.estimate() is None
        for _ in range(3):
            self.read(meter, clock, 10_000_000, 1.05)
        link = meter.estimate()
        assert link is not None
        assert link.round_trip_s == pytest.approx(0.05)
        assert link.bytes_per_s == pytest.approx(1e7)

    def test_reads_that_share_the_link_are_not_taken_for_slow_ones(self, clock: Clock) -> None:
        meter = LinkMeter(clock)
        with meter.counting() as one:
            clock.now += 0.25
            with meter.counting() as two:
                clock.now += 0.5
                two.nbytes = 5_000_000
            clock.now += 0.25
            one.nbytes = 5_000_000
        assert meter.estimate() == Link(pytest.approx(1e7), 0.0)

    def test_a_time_in_which_a_read_failed_is_not_counted(self, clock: Clock) -> None:
        meter = LinkMeter(clock)
        with contextlib.suppress(OSError), meter.counting() as read:
            clock.now += 10
            read.nbytes = 5_000_000
            raise OSError("cut")
        assert meter.estimate() is None
        self.read(meter, clock, 1_000_000, 0.1)
        assert meter.estimate() == Link(pytest.approx(1e7), 0.0)

    def test_reads_without_a_pause_are_counted_as_they_go(self, clock: Clock) -> None:
        meter = LinkMeter(clock)
        with meter.counting():
            for _ in range(4):
                self.read(meter, clock, 10_000_000, 1.0)
            assert meter.estimate() == Link(pytest.approx(1e7), 0.0)

    def test_it_follows_a_network_that_changes(self, clock: Clock) -> None:
        meter = LinkMeter(clock)
        for _ in range(40):
            meter.note(100_000_000, 10.0)
        for _ in range(40):
            meter.note(100_000_000, 1.0)
        link = meter.estimate()
        assert link is not None
        assert link.bytes_per_s == pytest.approx(1e8, rel=0.05)

    def test_a_link_that_is_all_round_trip_has_a_speed_all_the_same(self, clock: Clock) -> None:
        meter = LinkMeter(clock)
        meter.note(1000, 0.1)
        meter.note(1_000_000, 0.1)
        assert meter.estimate() == Link(pytest.approx(1e8), 0.1)


@pytest.fixture
def reader(model: LlamaForCausalLM, folder_machines: Machines) -> PrefixStore:
    """A machine beside one that has stored the prefix."""
    ContiguousKVCache(model, PREFIX, store=folder_machines("one"), budget=1.0).close()
    folder_machines("one").flush()
    return folder_machines("two")


@pytest.fixture
def prefix(model: LlamaForCausalLM, reader: PrefixStore) -> tuple[AttachedPrefix, LayerPlan]:
    """The prefix as that machine has found it, with nothing of it read, and the plan of the model."""
    stored = reader.inner.lookup(model_fingerprint(model), PREFIX[0].numpy(), AUTO.chunk_size, count=False)
    assert stored is not None
    assert stored.tokens == 700
    return AttachedPrefix.of(stored, 700), ServedModel(model).layers


def plan(prefix: tuple[AttachedPrefix, LayerPlan], budget: float) -> ReadPlan:
    return ReadPlan.of(prefix[0], replace(AUTO, budget=budget), prefix[1])


def chosen(prefix: tuple[AttachedPrefix, LayerPlan], there: Network | None, disk: float = FAST_DISK) -> BudgetChoice:
    return choose_budget(prefix[0], AUTO, prefix[1], SPEEDS, disk, there, None if there is None else there.choosing)


@pytest.fixture
def all_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_budget, "away_share", lambda reads: 1.0)


def test_a_network_without_round_trips_is_as_good_as_a_disk_of_its_speed(
    prefix: tuple[AttachedPrefix, LayerPlan], all_away: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets = set()
    # (Requests cost as much as reads.)
    monkeypatch.setattr(Network, "choosing", ChoosingCost(WORTH_READING_BYTES, 0))
    for bytes_per_s in (1e4, 1e6, 1e7, 1e8, 1e12):
        over, on_disk = chosen(prefix, Network(bytes_per_s)), chosen(prefix, None, bytes_per_s)
        assert (over.budget, over.recompute) == (on_disk.budget, on_disk.recompute)
        assert over.read_s == pytest.approx(on_disk.read_s)
        assert "MB/s over the network" in over.reason
        assert "network" not in on_disk.reason
        budgets.add(over.budget)
    assert min(budgets) < 1.0 == max(budgets)


def test_round_trips_speak_against_choosing(prefix: tuple[AttachedPrefix, LayerPlan], all_away: None) -> None:
    by_name = replace(AUTO, payload="exact")
    near, far = (
        choose_budget(prefix[0], by_name, prefix[1], SPEEDS, FAST_DISK, there, there.choosing)
        for there in (Network(1e7), Network(1e7, 0.5))
    )
    assert near.budget < 1.0
    assert (far.budget, far.read_s > 0.5) == (1.0, True)
    reads = ReadPlan.of(prefix[0], replace(by_name, budget=0.05), prefix[1])
    assert plan(prefix, 1.0).waits == 1 < reads.waits
    assert Network(1e7, 0.5).worth_reading_bytes > Network(1e7).worth_reading_bytes == WORTH_READING_BYTES


def test_only_what_is_not_here_crosses(prefix: tuple[AttachedPrefix, LayerPlan]) -> None:
    reads = plan(prefix, 1.0)
    assert Network(1e6, 0.1).seconds(reads, 0.0) == 0.0
    whole = Network(1e6, 0.1).seconds(reads, 1.0)
    assert 0.1 < Network(1e6, 0.1).seconds(reads, 0.25) < whole


def test_computing_is_chosen_where_the_network_is_slower(
    prefix: tuple[AttachedPrefix, LayerPlan], all_away: None
) -> None:
    quick = replace(SPEEDS, prefill_s=1e-5)
    slow = choose_budget(prefix[0], AUTO, prefix[1], quick, FAST_DISK, Network(1e5))
    assert slow.recompute
    assert "computing again takes 7 ms" in slow.reason
    assert "0.1 MB/s over the network" in slow.reason
    assert not choose_budget(prefix[0], AUTO, prefix[1], quick, FAST_DISK, Network(1e12)).recompute


# -- caches -----------------------------------------------------------------------------------------------------------


def set_speeds(monkeypatch: pytest.MonkeyPatch, store: PrefixStore, bytes_per_s: float, prefill_s: float) -> None:
    assert store.inner.fleet is not None
    monkeypatch.setattr(auto_budget, "compute_speeds", lambda model, config: replace(SPEEDS, prefill_s=prefill_s))
    monkeypatch.setattr(auto_budget, "read_speed", lambda store, prefix: FAST_DISK)
    monkeypatch.setattr(store.inner.fleet.link, "estimate", lambda least_bytes=1: Link(bytes_per_s, 0.0))


def answer(model: LlamaForCausalLM, cache: object) -> torch.Tensor:
    ids = torch.cat([PREFIX, QUESTION], dim=1)
    with torch.no_grad():
        found: torch.Tensor = model.generate(
            ids, **{cache_argument(): cache}, max_new_tokens=4, do_sample=False, pad_token_id=199
        )
        return found


def test_a_cache_computes_what_comes_too_slowly_and_says_so(
    model: LlamaForCausalLM, reader: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_speeds(monkeypatch, reader, 1e5, prefill_s=1e-6)
    with ContiguousKVCache(model, PREFIX, store=reader, budget="auto") as cache:
        assert cache.budget_choice is not None
        assert cache.budget_choice.recompute
        assert "over the network" in cache.budget_choice.reason
        assert cache.stats.tokens_prefilled == 700
        assert torch.equal(answer(model, cache), answer(model, DynamicCache()))


def test_a_cache_reads_less_where_computing_takes_longer(
    model: LlamaForCausalLM, reader: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_speeds(monkeypatch, reader, 1e5, prefill_s=10.0)
    with ContiguousKVCache(model, PREFIX, store=reader, budget="auto", least_budget=0.1) as cache:
        assert cache.budget_choice is not None
        assert not cache.budget_choice.recompute
        assert cache.budget_choice.budget < 1.0
        assert cache.stats.tokens_from_store == 700


def test_a_cache_uses_all_of_what_comes_fast(
    model: LlamaForCausalLM, reader: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_speeds(monkeypatch, reader, 1e12, prefill_s=1e-6)
    with ContiguousKVCache(model, PREFIX, store=reader, budget="auto") as cache:
        assert cache.budget_choice is not None
        assert (cache.budget_choice.budget, cache.budget_choice.recompute) == (1.0, False)
        assert torch.equal(answer(model, cache), answer(model, DynamicCache()))


def test_what_was_read_once_does_not_wait_for_the_network(
    model: LlamaForCausalLM, reader: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ContiguousKVCache(model, PREFIX, store=reader, budget=1.0) as cache:
        answer(model, cache)
        layers = cache.session.request.plan.layers
    reader.flush()
    set_speeds(monkeypatch, reader, 1e3, prefill_s=1e-6)
    with ContiguousKVCache(model, PREFIX, store=reader, budget="auto") as cache:
        found = cache.session.request.prefix, layers
        assert away_share(plan(found, 1.0)) == 0.0
        # (What approximates its values was not read, and would have to cross.)
        assert away_share(plan(found, 0.05)) > 0.5
        assert cache.budget_choice is not None
        assert (cache.budget_choice.budget, cache.budget_choice.recompute) == (1.0, False)


def test_whether_layers_are_read_whole_depends_on_the_network(
    model: LlamaForCausalLM, reader: PrefixStore, folder_machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where bytes cross fast, few requests; where they cross slowly, few bytes. The answer is the same."""
    machines = {"fast": Link(1e9, 0.001), "slow": Link(1e5, 0.001)}
    asked, answers = {}, []
    for name, link in machines.items():
        store = folder_machines(name)
        assert store.inner.fleet is not None
        monkeypatch.setattr(store.inner.fleet.link, "estimate", lambda least_bytes=1, link=link: link)
        with ContiguousKVCache(model, PREFIX, store=store, budget=0.1) as cache:
            assert cache.session.request.plan.reads_whole_layers == (name == "fast")
            answers.append(answer(model, cache))
        asked[name] = store.stats.remote
    assert torch.equal(*answers)
    assert asked["fast"]["gets"] < asked["slow"]["gets"]
    assert asked["fast"]["bytes_read"] > asked["slow"]["bytes_read"]


def test_layers_in_groups_cross_in_fewer_requests(model: LlamaForCausalLM, folder_machines: Machines) -> None:
    rule, answers, sent = AttentionMass(period=4), [], []
    for group in (1, 4):
        config = ContiguousKVConfig.paper(0.3, selection=rule, layers_per_group=group, chunk_size=16)
        # (With a salt of its own, each is a prefix of its own.)
        store = folder_machines(f"writes {group}", salt=str(group))
        ContiguousKVCache(model, PREFIX, store=store, config=config).close()
        store.flush()
        store = folder_machines(f"reads {group}", salt=str(group))
        with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
            assert cache.stats.tokens_prefilled == 0
            answers.append(answer(model, cache))
            assert cache.session.request.prefix.layers_per_group == group
        sent.append(store.stats.remote)
    assert torch.equal(*answers)
    assert sent[1]["gets"] < sent[0]["gets"] / 2
    assert sent[1]["bytes_read"] < 1.1 * sent[0]["bytes_read"]


def test_what_is_on_this_machine_is_read_as_from_a_disk(
    model: LlamaForCausalLM, reader: PrefixStore, prefix: tuple[AttachedPrefix, LayerPlan]
) -> None:
    # (Nothing was read that tells how fast the network is.)
    assert network_cost(reader.inner, prefix[0]) == Network(USUAL.bytes_per_s, USUAL.round_trip_s).choosing
    with ContiguousKVCache(model, PREFIX, store=reader, budget=0.1) as cache:
        answer(model, cache)
        # Not all of it is here, so what is missing may have to cross.
        assert network_cost(reader.inner, cache.session.request.prefix) is not None
    for span in prefix[0].spans:
        span.segment.blob.read_into([(0, memoryview(bytearray(span.segment.blob.nbytes)))])
    assert network_cost(reader.inner, prefix[0]) is None


def test_the_next_process_knows_how_fast_the_network_is(folder_machines: Machines) -> None:
    for nbytes, known in ((2**20, None), (2**24, None), (2**20, 2**24), (2**26, 2**24)):
        store = folder_machines("one")
        assert store.inner.fleet is not None
        found = store.inner.fleet.link.estimate(2**40)
        assert (found and found.bytes_per_s) == (None if known is None else pytest.approx(known, rel=1e-3))
        store.inner.fleet.link.note(1000, 0.03)
        # (Short of 8 MiB, nothing is noted: the first reads of a connection say little.)
        store.inner.fleet.link.note(nbytes, 1.03)
        store.close()
    found = folder_machines("one").inner.fleet.link.estimate()  # type: ignore[union-attr]
    assert found == Link(pytest.approx(2**26, rel=1e-3), pytest.approx(0.03))


def test_a_machine_that_stored_it_knows_no_network(model: LlamaForCausalLM, folder_machines: Machines) -> None:
    with ContiguousKVCache(model, PREFIX, store=folder_machines("one"), budget=1.0) as cache:
        assert network_to(folder_machines("one").inner, cache.session.request.prefix) is None


# -- the first measurement ---------------------------------------------------------------------------------------------


def test_the_first_prefix_is_measured_by_a_part_of_it_that_is_kept(
    reader: PrefixStore, prefix: tuple[AttachedPrefix, LayerPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(network, "QUICK_S", -1.0)  # (One read, however fast it is.)
    before, nbytes = reader.stats.remote["bytes_read"], network.FIRST_READS[0]
    found = network_to(reader.inner, prefix[0])
    assert found is not None
    assert found.bytes_per_s > 0
    assert reader.stats.remote["bytes_read"] == before + nbytes
    assert network_to(reader.inner, prefix[0]) == found
    assert reader.stats.remote["bytes_read"] == before + nbytes
    (blob,) = (span.segment.blob for span in prefix[0].spans)
    assert blob.away_bytes(0, blob.nbytes) <= blob.nbytes - nbytes  # type: ignore[attr-defined]
    # The disk is not measured by what crossed a network.
    monkeypatch.setattr(measured_speeds, "_timed_read", None)
    assert read_speed(reader.inner, prefix[0]) == UNKNOWN_DISK


def test_a_measurement_that_does_not_end_in_time_bounds_the_speed(
    reader: PrefixStore, prefix: tuple[AttachedPrefix, LayerPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert reader.inner.fleet is not None
    monkeypatch.setattr(reader.inner.fleet, "look_up_s", 0.01)

    def late(*ignored: object) -> None:
        time.sleep(seconds_left())
        raise DeadlineError("it is over")

    monkeypatch.setattr(engine_of(reader), "read_ranges", late)
    assert network_to(reader.inner, prefix[0]) == Network(pytest.approx(network.FIRST_READS[0] / 0.01))


def test_a_measurement_that_fails_leaves_the_usual_budget(
    model: LlamaForCausalLM, reader: PrefixStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_budget, "compute_speeds", lambda model, config: SPEEDS)
    assert reader.match(model, PREFIX) == 700

    def cut(*ignored: object) -> None:
        raise EngineUnavailableError("it was cut")

    monkeypatch.setattr(engine_of(reader), "read_ranges", cut)
    with ContiguousKVCache(model, PREFIX, store=reader, budget="auto") as cache:
        assert cache.budget_choice is not None
        assert cache.budget_choice.budget == auto_budget.UNKNOWN
        assert "it was cut" in cache.budget_choice.reason
