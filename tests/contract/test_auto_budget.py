"""`budget="auto"`: what is decided from which speeds, and that a cache does what was decided."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace

import pytest
import torch

from hf_contiguouskv import AttentionMass, ContiguousKVConfig
from hf_contiguouskv.errors import ConfigError, SegmentReadError
from hf_contiguouskv.model.layer_plan import LayerPlan
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.planning import auto_budget
from hf_contiguouskv.planning import measured_speeds as speeds
from hf_contiguouskv.planning.auto_budget import ALIKE, BUDGETS, choose_budget
from hf_contiguouskv.planning.measured_speeds import ComputeSpeeds
from hf_contiguouskv.planning.read_plan import WORTH_READING_BYTES, ReadPlan, chunks_kept
from hf_contiguouskv.store.attached_prefix import AttachedPrefix

from .models import CACHE, token_ids
from .references import assert_close, forward
from .subject import ContiguousKVCache, PrefixStore, prefix_from_disk, write_prefix

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(165, seed=711)
SUFFIX = token_ids(9, seed=712)
AUTO = ContiguousKVConfig(budget="auto")
SPEEDS = ComputeSpeeds(forward_s=0.01, used_s=1e-5, considered_s=1e-6, choosing_s=1e-4, prefill_s=1.0)
QUICK = replace(SPEEDS, prefill_s=1e-6)


@pytest.fixture
def prefix(tiny_model, store_path):
    """An attached prefix and the plan of its model, to decide about."""
    with prefix_from_disk(tiny_model("llama"), PREFIX, store_path) as cache:
        yield cache.session.request.prefix, cache.session.request.plan.layers


def set_speeds(monkeypatch: pytest.MonkeyPatch, bytes_per_s: float, computing: ComputeSpeeds = SPEEDS) -> None:
    monkeypatch.setattr(auto_budget, "read_speed", lambda store, prefix: bytes_per_s)
    monkeypatch.setattr(auto_budget, "compute_speeds", lambda model, config: computing)


def predicted(prefix: AttachedPrefix, layers: LayerPlan, budget: float, bytes_per_s: float) -> float:
    """Seconds to the first token: the longer of reading and computing."""
    config = replace(AUTO, budget=budget)
    keep = chunks_kept(budget, 10)
    compute = SPEEDS.forward_s + (keep * 16 + 5) * SPEEDS.used_s
    if keep < 10:
        compute += SPEEDS.choosing_s + 165 * SPEEDS.considered_s
    return max(compute, ReadPlan.of(prefix, config, layers).bytes_to_read(WORTH_READING_BYTES) / bytes_per_s)


@pytest.mark.parametrize("least", [0.05, 0.25, 0.32])
def test_the_budget_with_the_least_time_is_chosen_and_of_those_alike_the_largest(prefix, least):
    auto = replace(AUTO, least_budget=least)
    candidates = [budget for budget in BUDGETS if budget > least] + [least]
    found = {}
    for bytes_per_s in (1e9, 3e6, 2e6, 1e6, 1e3):
        choice = choose_budget(prefix[0], auto, prefix[1], SPEEDS, bytes_per_s)
        found[bytes_per_s] = choice.budget
        seconds = {budget: predicted(*prefix, budget, bytes_per_s) for budget in candidates}
        alike = [budget for budget, one in seconds.items() if one <= ALIKE * min(seconds.values())]
        assert choice.budget == max(alike)
        assert choice.ttft_s == pytest.approx(seconds[choice.budget])
        assert f"budget {choice.budget:g}" in choice.reason
        assert not choice.recompute
    assert found[1e3] < 1.0
    assert min(found.values()) >= least


def test_choosing_that_takes_longer_than_it_saves_is_left_out(prefix):
    """Then a short prefix is used as a whole, unless attention is slow."""
    slow = replace(SPEEDS, choosing_s=0.01)
    assert choose_budget(prefix[0], AUTO, prefix[1], slow, 1e9).budget == 1.0
    worth_it = choose_budget(prefix[0], AUTO, prefix[1], replace(slow, used_s=1e-3), 1e9)
    assert chunks_kept(worth_it.budget, 10) == chunks_kept(AUTO.least_budget, 10)
    assert choose_budget(prefix[0], replace(AUTO, least_budget=1.0), prefix[1], SPEEDS, 1e3).budget == 1.0


@pytest.mark.parametrize(("prefill_s", "again"), [(0.001, True), (50.0, False)])
def test_computing_again_is_chosen_where_it_is_faster_than_reading(prefix, prefill_s, again):
    """At 10 KB/s every budget takes seconds to read."""
    choice = choose_budget(prefix[0], AUTO, prefix[1], replace(SPEEDS, prefill_s=prefill_s), 1e4)
    assert choice.read_s > 1
    assert choice.recompute is again
    assert choice.budget < 1.0
    assert ("computing again takes 165 ms" in choice.reason) is again


def test_what_hides_is_loaded_however_fast_it_could_be_computed(prefix):
    assert not choose_budget(prefix[0], AUTO, prefix[1], replace(SPEEDS, prefill_s=1e-12), 1e9).recompute


@pytest.mark.parametrize("budget", [0.3, 1.0])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
@pytest.mark.parametrize(
    "config",
    [
        ContiguousKVConfig(),
        ContiguousKVConfig(payload="exact"),
        ContiguousKVConfig.paper(selection=AttentionMass(period=2, subperiod=2)),
    ],
    ids=["default", "exact", "published"],
)
def test_bytes_are_foreseen(tiny_model, store_path, family, config, budget):
    """About: chunks and indexes of a few hundred bytes are read in whole pages."""
    config, ids = replace(config, budget=budget), token_ids(960, seed=713)
    model = tiny_model(family)
    with prefix_from_disk(model, ids, store_path, config=config) as cache:
        forward(model, SUFFIX, cache)
        request = cache.session.request
        foreseen = request.plan.bytes_to_read()
        assert foreseen == pytest.approx(cache.stats.bytes_read, rel=0.35)


def test_a_cache_says_what_it_has_chosen_and_why(tiny_model, store_path, monkeypatch, capsys):
    set_speeds(monkeypatch, 2e6)
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, budget="auto") as cache:
        choice = cache.budget_choice
        assert choice is not None
        assert 0 < choice.budget < 1
        said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("contiguouskv: ")]
        assert len(said) == 1
        assert str(choice) in said[0]
        answer = forward(model, SUFFIX, cache)
        cache.reset()
        assert torch.equal(forward(model, SUFFIX, cache), answer)
        twin = copy.deepcopy(cache)
        assert twin.budget_choice == choice
        # The next request's cache has nothing new to say.
        ContiguousKVCache(model, PREFIX, store=cache.store, budget="auto").close()
        assert not capsys.readouterr().err
    with prefix_from_disk(model, PREFIX, store_path, budget=choice.budget) as cache:
        assert torch.equal(forward(model, SUFFIX, cache), answer)
        assert cache.budget_choice is None


def test_a_prefix_that_is_computed_again_is_exact_and_stays_in_memory(tiny_model, store_path, monkeypatch):
    model = tiny_model("llama")
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        exact = forward(model, SUFFIX, cache)
    set_speeds(monkeypatch, 1.0, QUICK)
    with PrefixStore(store_path) as store:
        with ContiguousKVCache(model, PREFIX, store=store, budget="auto") as cache:
            assert cache.budget_choice.recompute
            assert cache.budget_choice.budget == 1.0
            assert "computing again" in str(cache.budget_choice)
            assert all(span.segment.blob.in_memory for span in cache.session.request.prefix.spans)
            assert_close(forward(model, SUFFIX, cache), exact)
            assert (cache.stats.tokens_prefilled, cache.stats.tokens_from_store) == (165, 0)
            cache.reset()
            assert_close(forward(model, SUFFIX, cache), exact)
            assert "in memory" in str(cache.budget_choice)
        assert store.stats.segments == 1
        # In automatic mode the model computes the whole prompt, as if nothing were stored.
        with ContiguousKVCache(model, store=store, budget="auto") as cache:
            assert_close(forward(model, torch.cat([PREFIX, SUFFIX], dim=1), cache)[:, -1:], exact[:, -1:])
            assert cache.stats.tokens_from_store == 0
            assert cache.stats.bytes_read == 0


@pytest.mark.parametrize("stored", [0, 96])
def test_what_has_just_been_computed_is_not_computed_again(tiny_model, store_path, monkeypatch, stored):
    """It is not loaded in full either, from a disk that is too slow for any budget."""
    set_speeds(monkeypatch, 1.0, QUICK)
    model = tiny_model("llama")
    if stored:
        write_prefix(model, PREFIX[:, :stored], store_path, budget=1.0)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, budget="auto") as cache:
        assert (cache.stats.tokens_prefilled, cache.stats.tokens_from_store) == (165 - stored, stored)
        assert cache.session.request.plan.config.budget < 1.0
        forward(model, SUFFIX, cache)
        assert max(cache.stats.chunks_used) < 11


def test_a_model_in_training_mode_is_not_asked_to_compute_again(tiny_model, store_path, monkeypatch):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    set_speeds(monkeypatch, 1.0, QUICK)
    model.train()
    try:
        with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, budget="auto") as cache:
            assert cache.stats.tokens_from_store == 165
            assert cache.session.request.plan.config.budget < 1.0
    finally:
        model.eval()


def test_automatic_mode_attaches_with_the_budget_that_was_chosen(tiny_model, store_path, monkeypatch):
    set_speeds(monkeypatch, 2e6)
    model, prompt = tiny_model("llama"), torch.cat([PREFIX, SUFFIX], dim=1)
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, store=store, budget="auto") as cache:
        assert cache.budget_choice is None
        model.generate(prompt, **{CACHE: cache}, max_new_tokens=1, do_sample=False)
        assert cache.budget_choice is not None
        assert cache.stats.tokens_from_store >= 160
        keep = chunks_kept(cache.budget_choice.budget, 10)
        assert keep < 10
        assert cache.selected_chunks(0).shape == (1, keep)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window", "opt", "gpt-neox"])
@pytest.mark.parametrize("config", [AUTO, ContiguousKVConfig.paper(budget="auto")], ids=["default", "published"])
def test_speeds_of_any_model_are_measured_once(tiny_model, store_path, family, config):
    model = tiny_model(family)
    with prefix_from_disk(model, PREFIX, store_path, config=config) as cache:
        served = ServedModel(model)
        found = speeds.compute_speeds(served, config)
        assert found is speeds.compute_speeds(served, config)
        assert found.forward_s > 0
        assert found.prefill_s > 0
        windows_only = not served.layers.full_layers
        assert (found.used_s > 0) is (found.considered_s > 0) is (not windows_only)
        assert cache.budget_choice.budget in BUDGETS
        assert "cannot be measured" not in str(cache.budget_choice)


def test_a_short_read_speaks_for_the_disk_until_there_is_a_longer_one(tiny_model, store_path, monkeypatch):
    lengths = []
    measure = speeds._timed_read
    monkeypatch.setattr(speeds, "_timed_read", lambda *args: lengths.append(args[3]) or measure(*args))
    model = tiny_model("llama")
    for tokens, seed in ((32, 714), (40, 715), (165, 716), (165, 717)):
        write_prefix(model, token_ids(tokens, seed=seed), store_path)
    with PrefixStore(store_path) as store:
        for tokens, seed in ((32, 714), (32, 714), (40, 715), (165, 716), (165, 717)):
            with ContiguousKVCache(model, token_ids(tokens, seed=seed), store=store) as cache:
                assert speeds.read_speed(store.inner, cache.session.request.prefix) > 0
        assert len(lengths) == 2
        assert lengths[1] >= 2 * lengths[0]
        assert store.inner.memory.host.bytes_by_use["buffers"] <= store.inner.memory.host.max_bytes
        monkeypatch.setattr(speeds, "TELLING_BYTES", 1)
        with ContiguousKVCache(model, token_ids(960, seed=718), store=store) as cache:
            speeds.read_speed(store.inner, cache.session.request.prefix)
        assert len(lengths) == 2


def test_a_prefix_is_decided_about_once(tiny_model, store_path, monkeypatch):
    set_speeds(monkeypatch, 2e6)
    asked = []
    choose = auto_budget.choose_budget
    monkeypatch.setattr(auto_budget, "choose_budget", lambda *args: asked.append(args[0]) or choose(*args))
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, budget="auto") as cache:
        assert len(asked) == 1
        forward(model, SUFFIX, cache)
        cache.crop(-(9 + 80))
        cache.reset()
        assert asked == [cache.session.request.prefix]


def test_a_model_that_cannot_run_by_itself_gets_the_default(tiny_model, store_path, monkeypatch):
    def fails(model, config):
        raise IndexError("no such position")

    monkeypatch.setattr(auto_budget, "compute_speeds", fails)
    with prefix_from_disk(tiny_model("llama"), PREFIX, store_path, budget="auto") as cache:
        assert cache.budget_choice.budget == ContiguousKVConfig().budget
        assert "no such position" in str(cache.budget_choice)


def test_a_closed_cache_lets_go_of_the_store(tiny_model, store_path, monkeypatch):
    set_speeds(monkeypatch, 2e6)
    with prefix_from_disk(tiny_model("llama"), PREFIX, store_path, budget="auto") as cache:
        store = weakref.ref(cache.store)
    assert cache.budget_choice is None
    gc.collect()
    assert store() is None


def test_a_store_that_cannot_be_read_does_not_stop_the_choice(tiny_model, store_path, monkeypatch):
    model = tiny_model("llama")
    write_prefix(model, PREFIX, store_path)
    with PrefixStore(store_path) as store:

        def fails(store, prefix):
            raise SegmentReadError("the disk is gone", None, 5)

        monkeypatch.setattr(auto_budget, "read_speed", fails)
        with ContiguousKVCache(model, PREFIX, store=store, budget="auto") as cache:
            assert cache.budget_choice.budget == ContiguousKVConfig().budget
            assert "the disk is gone" in str(cache.budget_choice)
            forward(model, SUFFIX, cache)


def test_auto_is_the_only_word():
    with pytest.raises(ConfigError, match="'fast'"):
        ContiguousKVConfig(budget="fast")
    with pytest.raises(ConfigError, match="decided when a prefix is attached"):
        chunks_kept(AUTO.budget, 10)
    assert ContiguousKVConfig.paper(budget="auto").budget == "auto"
