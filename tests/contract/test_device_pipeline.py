"""Requests through accelerators that are not there: right answers whatever is late, nothing out of order, no leak.

The devices are fakes (`unit/fake_device.py`) whose copies run as late, as early or as oddly as streams allow; every
test ends with a proof over the log of what happened. What needs a real one is in `test_cuda.py`.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from unit.device_log import races
from unit.fake_device import EARLY, LATE, SCHEDULES, accelerated
from unit.test_grouped_attention import flash_on_a_cpu

from hf_contiguouskv import AttentionMass, ContiguousKVConfig, IndexedKeys, ReadOptions
from hf_contiguouskv.loading import device_residency as staging
from hf_contiguouskv.loading.key_runs import key_runs
from hf_contiguouskv.model import attention
from hf_contiguouskv.model.fingerprint import model_fingerprint
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.planning.read_plan import KEYS_AHEAD
from hf_contiguouskv.prefill import exact_prefill as prefill

from .device_helpers import (
    CONFIGS,
    MEBIBYTE,
    PREFIX,
    PRUNED,
    SUFFIX,
    HostWaits,
    ask,
    assert_idle,
    layers_on,
    on_a_cpu,
    opened,
)
from .models import PAD, build, token_ids
from .references import assert_close, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, write_prefix
from .test_recovery import damage, files

pytestmark = pytest.mark.needs_library

LAYERS, CHUNK = 4, 4096
CHUNKS = 11  # 165 tokens
PIECE = 4 * CHUNK
CPUS = [torch.device("cpu", 0), torch.device("cpu", 1)]


@pytest.fixture
def model(tiny_model: Any, store_path: Path) -> Any:
    """A model with plain attention, whose prefix is stored."""
    found = tiny_model("llama", "eager")
    write_prefix(found, PREFIX, store_path)
    return found


# ---- answers ----


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral-window"])
def test_a_whole_prefix_is_a_dynamic_cache_bit_for_bit(tiny_model, store_path, family, schedule):
    model = tiny_model(family, "eager")
    write_prefix(model, PREFIX, store_path)
    following = token_ids(2, seed=1203)
    plain = prefilled(model, PREFIX)
    expected = [forward(model, SUFFIX, plain), forward(model, following, plain)]
    with accelerated(schedule) as machine, opened(store_path) as store:
        for copies in (LAYERS, 0, 0):
            before = len(machine.copies())
            with ContiguousKVCache(model, PREFIX, store=store, budget=1.0) as cache:
                assert torch.equal(forward(model, SUFFIX, cache), expected[0])
                assert torch.equal(forward(model, following, cache), expected[1])
            assert len(machine.copies()) - before == copies
            assert cache.stats.hits["disk" if copies else "device"] == sum(cache.stats.hits.values()) > 0
            assert_idle(store.inner.memory)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_every_way_of_choosing_answers_as_on_a_cpu(tiny_model, store_path, family, config, schedule):
    model = tiny_model(family, "sdpa")
    write_prefix(model, PREFIX, store_path)
    expected = on_a_cpu(model, store_path, CONFIGS[config])
    # Windows see exact chunks, other layers packed ones: each size has blocks of its own.
    with accelerated(schedule), opened(store_path, device=16 * MEBIBYTE) as store:
        for _ in range(3):
            logits, stats = ask(model, store, CONFIGS[config])
            assert torch.equal(logits, expected)
            assert_idle(store.inner.memory)
        assert stats.hits["device"] == sum(stats.hits.values()) > 0
        assert stats.bytes_read == 0


def _small_memories() -> Iterator[Any]:
    for config, device, host in product(CONFIGS, [0, 5000, 60_000, 150_000], [0, 5000, 100_000]):
        yield pytest.param(config, device, host)


@pytest.mark.parametrize("schedule", [LATE, 4], ids=str)
@pytest.mark.parametrize(("config", "device", "host"), list(_small_memories()))
def test_the_smallest_memory_still_answers(model, store_path, device, host, config, schedule):
    suffixes = [SUFFIX, token_ids(6, seed=1204)]
    expected = [on_a_cpu(model, store_path, CONFIGS[config], suffix) for suffix in suffixes]
    with accelerated(schedule, piece=PIECE) as machine, opened(store_path, host, device) as store:
        for turn in (0, 1, 0):
            logits, _ = ask(model, store, CONFIGS[config], suffixes[turn])
            assert_close(logits, expected[turn])
            assert_idle(store.inner.memory)
            machine.run_all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_rows_of_a_batch_and_a_second_suffix_answer_as_on_a_cpu(model, store_path, schedule):
    suffixes = token_ids(9, seed=1205, rows=3)
    expected = on_a_cpu(model, store_path, CONFIGS["paper"], suffixes)
    with accelerated(schedule), opened(store_path) as store:
        for _ in range(2):
            assert_close(ask(model, store, CONFIGS["paper"], suffixes)[0], expected)
        with ContiguousKVCache(model, PREFIX, store=store, config=CONFIGS["paper"]) as cache:
            forward(model, SUFFIX, cache)
            cache.reset()
            assert_close(forward(model, suffixes, cache), expected)
        assert_idle(store.inner.memory)


def test_a_whole_prefix_from_several_tiers_is_still_bit_for_bit(model, store_path):
    expected = forward(model, SUFFIX, prefilled(model, PREFIX))
    with accelerated(EARLY) as _, opened(store_path) as store:
        ask(model, store, CONFIGS["paper"])  # Leaves some chunks on the device.
        logits, stats = ask(model, store, CONFIGS["exact"])
        assert min(stats.hits["device"], stats.hits["disk"]) > 0
        assert_close(logits, expected)
        assert torch.equal(logits, expected)


@pytest.mark.parametrize("schedule", [LATE, EARLY], ids=str)
def test_requests_in_and_out_of_inference_mode_share_a_store(model, store_path, schedule):
    expected = forward(model, SUFFIX, prefilled(model, PREFIX))
    for first in (True, False):
        with accelerated(schedule), opened(store_path, device=150_000) as store:
            for inference in (first, not first, first):
                with torch.inference_mode(inference):
                    assert_close(ask(model, store, CONFIGS["exact"])[0], expected)


# ---- what is stored ----


def _stored_bytes(path: Path) -> dict[str, bytes]:
    (file,) = path.rglob("*.safetensors")
    with safe_open(file, "pt") as segment:
        return {name: segment.get_tensor(name).view(torch.uint8).numpy().tobytes() for name in segment.keys()}  # noqa: SIM118


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [64, 8192])
def test_an_accelerator_stores_what_a_cpu_stores(store_path, schedule, dtype, block):
    model = build("llama").to(dtype)  # (Not the one that tests share.)
    config = ContiguousKVConfig(prefill_block=block)
    other = store_path.with_name("other")
    with PrefixStore(other) as store, ContiguousKVCache(model, PREFIX, store=store, config=config):
        pass
    with accelerated(schedule) as machine, opened(store_path) as store:
        with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
            assert cache.stats.tokens_prefilled == PREFIX.shape[1]
        # One copy brings all that is new of a layer, one more its index.
        blocks = -(-PREFIX.shape[1] // block)
        assert len(machine.copies("copy out")) == LAYERS * (blocks + 1)
        assert_idle(store.inner.memory)
    assert _stored_bytes(store_path) == _stored_bytes(other)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_a_prompt_is_stored_from_an_accelerator_behind_its_answer(tiny_model, store_path, schedule):
    model = tiny_model("llama", "sdpa")
    other = store_path.with_name("other")
    with PrefixStore(other) as store:
        generate(model, PREFIX, ContiguousKVCache(model, store=store))
    with accelerated(schedule) as machine, opened(store_path) as store:
        generate(model, PREFIX, ContiguousKVCache(model, store=store))
        store.flush()
        assert len(machine.copies("copy out")) == 2 * LAYERS
        assert store.match(model, PREFIX) == PREFIX.shape[1]
    assert _stored_bytes(store_path) == _stored_bytes(other)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("flash", [False, True])
def test_blocks_of_a_prefill_attend_as_an_accelerator_does(tiny_model, store_path, monkeypatch, family, flash):
    """On a CPU, by the function that an accelerator's layers use: without a mask where there is a flash kernel."""
    model = tiny_model(family, "sdpa")
    expected = forward(model, SUFFIX, prefilled(model, PREFIX))
    reached = []

    def noted(query: torch.Tensor, *others: Any, **options: Any) -> torch.Tensor:
        reached.append((query.shape[2], options["plain"]))
        return attend(query, *others, **options)

    attend = attention.attend
    for module in (attention, prefill):
        monkeypatch.setattr(module, "uses_our_attention", lambda device: True)
    monkeypatch.setattr(attention, "_flash", lambda *_: flash)
    monkeypatch.setattr(attention, "_flash_sdpa", flash_on_a_cpu)
    monkeypatch.setattr(attention, "attend", noted)
    with PrefixStore(store_path) as store:
        config = ContiguousKVConfig(budget=1.0, prefill_block=64)
        with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
            assert_close(forward(model, SUFFIX, cache), expected)
    lengths = {length for length, _ in reached}
    assert lengths == {64, 37, SUFFIX.shape[1]}
    assert all(plain for _, plain in reached)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt-neox"])
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("padded", [False, True])
def test_attention_without_a_mask_answers_as_with_it(tiny_model, store_path, monkeypatch, family, config, padded):
    """What the flash kernel of an accelerator computes, on a CPU; with padding there is a mask all the same."""
    model = tiny_model(family, "sdpa")
    if padded and any(ServedModel(model).windows):
        pytest.skip("windows count columns: such a batch is computed in full")
    suffixes = torch.cat([token_ids(9, seed=1205), token_ids(9, seed=1206)])
    if padded:
        suffixes[1, :4] = PAD
    ids = torch.cat([PREFIX.expand(2, -1), suffixes], dim=1)
    mask = (ids != PAD).long()

    def answers(path: Path) -> list[torch.Tensor]:
        with PrefixStore(path) as store, ContiguousKVCache(model, PREFIX, store=store, config=CONFIGS[config]) as cache:
            return list(generate(model, ids, cache, attention_mask=mask).logits)

    expected, flash = answers(store_path), []
    monkeypatch.setattr(attention, "uses_our_attention", lambda device: True)
    monkeypatch.setattr(attention, "_flash", lambda *_: flash.append(1) or True)
    monkeypatch.setattr(attention, "_flash_sdpa", flash_on_a_cpu)
    for found, wanted in zip(answers(store_path), expected, strict=True):
        assert_close(found, wanted)
    assert bool(flash) is not padded


# ---- which tier ----


@pytest.mark.parametrize("config", CONFIGS)
def test_one_copy_brings_all_that_a_layer_misses(model, store_path, config):
    with accelerated(1) as machine, opened(store_path) as store:
        _, stats = ask(model, store, CONFIGS[config])
        keys = [tier for tier in store.inner.memory.tiers for _ in tier._keys]
        assert sum(stats.hits.values()) == stats.hits["disk"]
        whole_layers = config == "whole layers"
        # The next leader's layer may be asked for twice: speculation, then what it lacks.
        assert LAYERS <= len(machine.copies()) - len(keys) <= LAYERS + (1 if whole_layers else 0)
        before = len(machine.copies())
        _, stats = ask(model, store, CONFIGS[config])
        assert len(machine.copies()) == before
        assert stats.bytes_read == 0


@pytest.mark.parametrize("eviction", ["published", "lru", "lfu", "expected-use"])
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_what_a_small_device_lets_go_is_found_on_the_host(model, store_path, schedule, eviction):
    suffixes = [token_ids(6, seed=1210 + i) for i in range(4)]
    expected = [on_a_cpu(model, store_path, CONFIGS["paper"], suffix) for suffix in suffixes]
    hits = 0
    with accelerated(schedule, piece=CHUNK) as machine:
        with opened(store_path, device=20 * CHUNK, eviction=eviction) as store:
            for turn in [0, 1, 2, 3] * 2:
                logits, stats = ask(model, store, CONFIGS["paper"], suffixes[turn])
                assert_close(logits, expected[turn])
                assert_idle(store.inner.memory)
                hits += stats.hits["host"]
                machine.run_all()
        assert len(machine.copies("copy out")) > 0
        assert hits > 0


@pytest.mark.parametrize("device", [0, 2 * CHUNK])
def test_a_host_tier_serves_a_device_that_has_no_room(model, store_path, device):
    with accelerated(EARLY, piece=CHUNK), opened(store_path, device=device) as store:
        ask(model, store, CONFIGS["exact"])
        _, stats = ask(model, store, CONFIGS["exact"])
        assert stats.hits["host"] > 0


def test_without_a_host_tier_requests_warm_the_device(model, store_path):
    with accelerated(EARLY, piece=CHUNK), opened(store_path, host=0) as store:
        ask(model, store, CONFIGS["exact"])
        ask(model, store, CONFIGS["exact"])
        _, stats = ask(model, store, CONFIGS["exact"])
        assert stats.hits["disk"] == 0


# ---- several devices ----


@pytest.mark.parametrize("schedule", [LATE, EARLY, 2], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("order", [[0, 0, 1, 1], [0, 1, 0, 1]], ids=str)
def test_chunks_of_a_layer_are_on_its_device(model, store_path, order, config, schedule):
    expected = on_a_cpu(model, store_path, CONFIGS[config])
    devices = layers_on([CPUS[number] for number in order])
    with accelerated(schedule, piece=CHUNK), devices, opened(store_path, device=2 * MEBIBYTE) as store:
        for _ in range(2):
            logits, stats = ask(model, store, CONFIGS[config])
            assert torch.equal(logits, expected)
            assert_idle(store.inner.memory)
        assert stats.hits["device"] == sum(stats.hits.values())
        assert set(store.inner.memory.devices) == set(CPUS)
        (table,) = store.inner.memory._tables.values()
        for layer, number in enumerate(order):
            for device, tier in store.inner.memory.devices.items():
                known = table.slots_in(tier.name).reshape(LAYERS, -1)[layer]
                assert (known >= 0).any() == (device == CPUS[number])
        assert all(tier.max_bytes == MEBIBYTE for tier in store.inner.memory.devices.values())


# ---- streams ----


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("device", [8 * MEBIBYTE, 40 * CHUNK])
def test_requests_on_streams_of_their_own_share_what_is_on_the_device(model, store_path, device, schedule):
    expected = forward(model, SUFFIX, prefilled(model, PREFIX))
    with accelerated(schedule, piece=16 * CHUNK) as machine, opened(store_path, device=device) as store:
        for stream in ("a", "b", "a", "c", "b"):
            with machine.on_stream(stream):
                assert_close(ask(model, store, CONFIGS["exact"])[0], expected)
            machine.run_all()
        # (That a block may be allocated for another stream than the one that writes first has its own test.)
        assert not [fault for fault in races(machine.log) if "alloc" not in fault]


@pytest.mark.parametrize(
    "config",
    [CONFIGS["paper"], ContiguousKVConfig(budget=0.3, selection=IndexedKeys(period=4, subperiod=4))],
    ids=["exact keys", "index"],
)
def test_keys_that_are_on_the_device_are_waited_for_by_every_stream(model, store_path, config):
    with accelerated(LATE) as machine, opened(store_path) as store:
        for stream in ("a", "b"):
            with machine.on_stream(stream):
                ask(model, store, config)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_host_waits_for_no_device_between_the_layers_of_a_period(tiny_model, store_path, config):
    model = tiny_model("llama", "sdpa", layers=10)
    write_prefix(model, PREFIX, store_path)
    settings = CONFIGS[config]
    leaders = set(range(10)) if settings.selection.period == 1 else set(range(0, 10, settings.selection.period))
    if config == "exact":
        leaders = set()
    with accelerated(LATE) as machine, opened(store_path) as store:
        for _ in range(2):
            before = len(machine.copies("fetch"))
            with ContiguousKVCache(model, PREFIX, store=store, config=settings) as cache, HostWaits(model) as waits:
                forward(model, SUFFIX, cache)
            # What a leader finds is needed on the host, once; nothing else is.
            assert len(machine.copies("fetch")) - before == len(leaders)
            assert not waits.found


def test_the_host_waits_for_no_device_to_know_its_rows(model, store_path):
    with accelerated(LATE), opened(store_path) as store, HostWaits(model) as waits:
        ask(model, store, CONFIGS["exact"])
    assert not waits.found


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("device", [8 * MEBIBYTE, 20 * CHUNK])
def test_what_stays_is_put_in_its_place_behind_the_first_token(model, store_path, config, device):
    def chunks(store: Any) -> int:
        (tier,) = store.inner.memory.devices.values()
        return tier.bytes_by_use["chunks"]

    following = token_ids(1, seed=1211)
    with accelerated(LATE, piece=CHUNK) as machine, opened(store_path, device=device) as store:
        with ContiguousKVCache(model, PREFIX, store=store, config=CONFIGS[config]) as cache:
            forward(model, SUFFIX, cache)
            first = chunks(store)
            assert first == 0 or device < MEBIBYTE  # A small device has no room for what waits.
            assert cache.stats.hits["disk"] > 0
            assert cache.stats.bytes_used > 0
            forward(model, following, cache)
            assert chunks(store) >= first
            assert chunks(store) > 0
            (tier,) = store.inner.memory.devices.values()
            assert tier._buffer_bytes <= (0 if device > MEBIBYTE else device)
        assert_idle(store.inner.memory)
        machine.run_all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("config", PRUNED)
def test_keys_that_do_not_stay_are_copied_for_each_request(tiny_model, store_path, config, schedule):
    """What is not compared with its checksum is kept nowhere, but its buffers are used again."""
    settings, others = replace(CONFIGS[config], reading=ReadOptions(verify=False)), token_ids(165, seed=1212)
    model = tiny_model("llama", "sdpa")
    for prefix in (PREFIX, others):
        write_prefix(model, prefix, store_path)
    expected = {}
    with PrefixStore(store_path) as store:
        for prefix in (PREFIX, others):
            with ContiguousKVCache(model, prefix, store=store, config=settings) as cache:
                expected[id(prefix)] = forward(model, SUFFIX, cache)
    with accelerated(schedule), opened(store_path) as store:
        for prefix in (PREFIX, others, PREFIX, others):
            with ContiguousKVCache(model, prefix, store=store, config=settings) as cache:
                assert_close(forward(model, SUFFIX, cache), expected[id(prefix)])
            assert_idle(store.inner.memory)


@pytest.mark.parametrize("config", ["index", "paper"])
def test_keys_cross_before_their_layer_is_reached(tiny_model, store_path, config):
    model = tiny_model("llama", "sdpa", layers=10)
    write_prefix(model, PREFIX, store_path)
    settings = (
        replace(CONFIGS[config], selection=AttentionMass(period=2, subperiod=1))
        if config == "paper"
        else CONFIGS[config]
    )
    tensors = ("key_index.8", "key_scale.8") if config == "index" else ("leader_keys.8",)
    begun: dict[int, int] = {}
    with accelerated(EARLY) as machine, opened(store_path) as store:
        stored = store.inner.lookup(model_fingerprint(model), PREFIX[0].numpy(), 16)
        size = key_runs(stored.spans[0].segment, {8: tensors}, 0)[8].nbytes

        def crossed(layer: int) -> None:
            time.sleep(0.05)  # Reads need no more, and the thread that ends one queues the copy.
            begun[layer] = sum(entry.detail == f"of {size} bytes" for entry in machine.copies())

        hooks = [
            layer.register_forward_pre_hook(lambda *_, number=number: crossed(number))
            for number, layer in enumerate(model.model.layers)
        ]
        ask(model, store, settings)
        for hook in hooks:
            hook.remove()
        assert_idle(store.inner.memory)
    if config == "index":
        assert all(begun[layer] >= min(10, layer + KEYS_AHEAD) for layer in range(10))
    else:  # Only layers 0 and 8 have leader keys. The next leader's are read while this one's are used.
        assert begun[0] == 1
        assert begun[8] == 2


# ---- what goes wrong ----


@pytest.mark.parametrize("schedule", [LATE, EARLY, 5], ids=str)
@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("layer", [0, 2])
def test_damage_in_the_middle_of_a_request_leaves_nothing_in_use(model, store_path, layer, config, schedule):
    expected = on_a_cpu(model, store_path, CONFIGS[config])
    for at in (0, 4 * CHUNK, 9 * CHUNK):
        damage(files(store_path)[0], f"payload.{layer}", at=at + 3)
    with accelerated(schedule), opened(store_path) as store:
        for _ in range(2):
            assert_close(ask(model, store, CONFIGS[config])[0], expected)
            assert_idle(store.inner.memory)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("moment", ["made", "asked", "interrupted"])
def test_a_cache_that_is_dropped_gives_everything_back(model, store_path, config, moment):
    with accelerated(2), opened(store_path) as store:
        cache = ContiguousKVCache(model, PREFIX, store=store, config=CONFIGS[config])
        if moment == "asked":
            forward(model, SUFFIX, cache)
        if moment == "interrupted":
            hook = model.model.layers[1].register_forward_pre_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt):
                forward(model, SUFFIX, cache)
            hook.remove()
        del cache
        gc.collect()
        assert_idle(store.inner.memory)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("failing", ["buffers", "slots"])
def test_a_device_that_has_no_memory_left_leaves_nothing_in_use(model, store_path, failing):
    expected = forward(model, SUFFIX, prefilled(model, PREFIX))
    # Small enough that the second request needs more memory for slots than the first.
    with accelerated(LATE, piece=CHUNK) as machine, opened(store_path, device=64 * CHUNK) as store:
        ask(model, store, CONFIGS["paper"])
        (device,) = set(machine.devices.values())
        device.full = failing == "buffers"
        # Without slots the request is answered all the same: what it brings is used, and stays nowhere.
        with pytest.raises(torch.OutOfMemoryError) if failing == "buffers" else nullcontext():
            ask(model, store, CONFIGS["exact"])
        device.full = None
        assert_idle(store.inner.memory)
        assert_close(ask(model, store, CONFIGS["exact"])[0], expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_a_device_with_less_memory_than_the_limit_says_is_one_with_less_room(model, store_path, config, monkeypatch):
    """What does not fit crosses in pieces, as if the limit had forbidden it."""
    monkeypatch.setattr(staging, "PIECE_BYTES", 4 * CHUNK)
    expected = on_a_cpu(model, store_path, CONFIGS[config])
    with accelerated(EARLY, piece=CHUNK) as machine, opened(store_path) as store:
        device = machine.device_of(torch.device("cpu"))
        device.most = 6 * CHUNK
        for _ in range(3):
            assert_close(ask(model, store, CONFIGS[config])[0], expected)
            assert_idle(store.inner.memory)
        assert device.refused > 0 or config in ("paper", "index")


@pytest.mark.parametrize("free", [None, 64 * MEBIBYTE, 0])
def test_a_device_lends_a_quarter_of_what_is_free(model, store_path, free):
    expected = on_a_cpu(model, store_path, CONFIGS["exact"])
    with accelerated(EARLY) as machine, PrefixStore(store_path, host_bytes=8 * MEBIBYTE) as store:
        machine.device_of(torch.device("cpu")).free = free
        assert_close(ask(model, store, CONFIGS["exact"])[0], expected)
        assert store.inner.memory.device_bytes == {None: 2**30, 64 * MEBIBYTE: 16 * MEBIBYTE, 0: 0}[free]
        assert_idle(store.inner.memory)


def test_what_is_kept_gives_way_where_memory_runs_out(model, store_path):
    with accelerated(EARLY, piece=CHUNK), opened(store_path) as store:
        ask(model, store, CONFIGS["exact"])
        (tier,) = store.inner.memory.devices.values()
        held, attempts = tier.held_bytes, []

        def action() -> int:
            attempts.append(tier.held_bytes)
            if len(attempts) < 3:
                raise torch.OutOfMemoryError("out of memory")
            return 7

        assert tier.where_it_fits(2 * CHUNK, action) == 7
        assert attempts[0] == held > attempts[1] > attempts[2] == 0
        assert_idle(store.inner.memory)
        expected = forward(model, SUFFIX, prefilled(model, PREFIX))
        assert_close(ask(model, store, CONFIGS["exact"])[0], expected)
        with pytest.raises(torch.OutOfMemoryError):
            tier.where_it_fits(CHUNK, _no_memory)


def _no_memory() -> None:
    raise torch.OutOfMemoryError("out of memory")


def test_the_books_of_a_segment_that_is_gone_take_no_room(model, store_path):
    with accelerated(LATE), opened(store_path) as store:
        ask(model, store, CONFIGS["exact"])
        store.delete(store.entries()[0].key)
        store.inner.memory.forget([table.identity[0] for table in store.inner.memory._tables.values()])
        assert_idle(store.inner.memory)
        assert store.inner.memory.host.table_bytes == 0


@pytest.mark.parametrize("config", CONFIGS)
def test_a_cache_may_be_closed_after_its_store(model, store_path, config):
    with accelerated(LATE):
        store = opened(store_path)
        cache = ContiguousKVCache(model, PREFIX, store=store, config=CONFIGS[config])
        store.close()
        cache.close()
