"""`reselect_every` through accelerators that are not there (`unit/fake_device.py`).

A later choice keeps every rule of the first one, whatever is late, and gives everything back.
"""

from __future__ import annotations

import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from unit.fake_device import EARLY, LATE, SCHEDULES, accelerated

from .device_helpers import CONFIGS, MEBIBYTE, PREFIX, PRUNED, SUFFIX, HostWaits, assert_idle, layers_on, opened
from .models import token_ids
from .references import assert_close, forward
from .subject import ContiguousKVCache, PrefixStore, write_prefix
from .test_recovery import damage, files

pytestmark = pytest.mark.needs_library

CHUNK = 4096
SETTINGS = {name: replace(CONFIGS[name], budget=0.45, reselect_every=2) for name in PRUNED}


def answer(model: Any, store: Any, settings: Any, rows: int = 1, steps: int = 6) -> tuple[list[torch.Tensor], Any]:
    """Logits of the suffix and of tokens after it, and the statistics."""
    with ContiguousKVCache(model, PREFIX, store=store, config=settings) as cache:
        ids = [SUFFIX.repeat(rows, 1), *(token_ids(1, seed=800 + number, rows=rows) for number in range(steps))]
        found = [forward(model, one, cache) for one in ids]
        assert cache.stats.reselections == steps // 2
        return found, cache.stats


def on_a_cpu(model: Any, path: Path, settings: Any, rows: int = 1) -> list[torch.Tensor]:
    with PrefixStore(path) as store:
        return answer(model, store, settings, rows)[0]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("config", PRUNED)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_are_those_of_a_cpu(tiny_model, store_path, family, config, schedule):
    model = tiny_model(family, "sdpa")
    write_prefix(model, PREFIX, store_path)
    for rows in (1, 2):
        expected = on_a_cpu(model, store_path, SETTINGS[config], rows)
        with accelerated(schedule), opened(store_path, device=16 * MEBIBYTE) as store:
            for _ in range(2):
                found, stats = answer(model, store, SETTINGS[config], rows)
                for ours, theirs in zip(found, expected, strict=True):
                    assert_close(ours, theirs)
                assert_idle(store.inner.memory)
            assert stats.bytes_read == 0


@pytest.mark.parametrize(("device", "host"), [(0, 0), (5000, 100_000), (60_000, 5000), (150_000, 0)])
@pytest.mark.parametrize("config", PRUNED)
def test_the_smallest_memory_still_answers(tiny_model, store_path, config, device, host):
    model = tiny_model("llama", "eager")
    write_prefix(model, PREFIX, store_path)
    expected = on_a_cpu(model, store_path, SETTINGS[config])
    with accelerated(LATE, piece=4 * CHUNK) as machine, opened(store_path, host, device) as store:
        for _ in range(2):
            for ours, theirs in zip(answer(model, store, SETTINGS[config])[0], expected, strict=True):
                assert_close(ours, theirs)
            assert_idle(store.inner.memory)
            machine.run_all()


@pytest.mark.parametrize("config", PRUNED)
def test_layers_on_two_devices_choose_again_where_they_are(tiny_model, store_path, config):
    model, cpus = tiny_model("llama", "eager"), [torch.device("cpu", 0), torch.device("cpu", 1)]
    write_prefix(model, PREFIX, store_path)
    expected = on_a_cpu(model, store_path, SETTINGS[config])
    with accelerated(EARLY), layers_on([cpus[0], cpus[0], cpus[1], cpus[1]]), opened(store_path) as store:
        for ours, theirs in zip(answer(model, store, SETTINGS[config])[0], expected, strict=True):
            assert_close(ours, theirs)
        assert_idle(store.inner.memory)


@pytest.mark.parametrize("schedule", [LATE, EARLY], ids=str)
@pytest.mark.parametrize("config", ["index", "paper"])
def test_damage_that_a_later_choice_meets_leaves_nothing_in_use(tiny_model, store_path, config, schedule):
    model = tiny_model("llama", "eager")
    write_prefix(model, PREFIX, store_path)
    expected = on_a_cpu(model, store_path, SETTINGS[config])
    tensor, extent = ("values4", 2 * 16 * (16 // 2 + 4)) if config == "index" else ("payload", CHUNK)
    with accelerated(schedule), opened(store_path, 0, 0) as store:
        with ContiguousKVCache(model, PREFIX, store=store, config=SETTINGS[config]) as cache:
            assert_close(forward(model, SUFFIX, cache), expected[0])
            for layer in range(4):
                for chunk in range(11):
                    damage(files(store_path)[0], f"{tensor}.{layer}", at=chunk * extent + 3)
            for number in range(6):
                assert_close(forward(model, token_ids(1, seed=800 + number), cache), expected[1 + number])
        assert store.stats.recovered == 1
        assert_idle(store.inner.memory)


@pytest.mark.parametrize("config", PRUNED)
@pytest.mark.parametrize("moment", ["between tokens", "interrupted"])
def test_a_cache_that_is_dropped_in_mid_answer_gives_everything_back(tiny_model, store_path, config, moment):
    model = tiny_model("llama", "eager")
    write_prefix(model, PREFIX, store_path)
    with accelerated(2), opened(store_path) as store:
        cache = ContiguousKVCache(model, PREFIX, store=store, config=SETTINGS[config])
        for ids in (SUFFIX, token_ids(1, seed=800), token_ids(1, seed=801)):
            forward(model, ids, cache)
        if moment == "interrupted":
            forward(model, token_ids(1, seed=802), cache)
            hook = model.model.layers[2].register_forward_pre_hook(_interrupt)
            with pytest.raises(KeyboardInterrupt):
                forward(model, token_ids(1, seed=803), cache)
            hook.remove()
        del cache
        gc.collect()
        assert_idle(store.inner.memory)


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("config", PRUNED)
@pytest.mark.parametrize("rows", [1, 2])
def test_the_host_waits_for_a_device_only_to_choose(tiny_model, store_path, config, rows):
    """A later choice waits as often as the first one: once for each layer that leads a period."""
    model = tiny_model("llama", "sdpa")
    write_prefix(model, PREFIX, store_path)
    with accelerated(EARLY) as machine, opened(store_path) as store:
        with ContiguousKVCache(model, PREFIX, store=store, config=SETTINGS[config]) as cache:
            for ids in (SUFFIX, token_ids(1, seed=800)):
                forward(model, ids.repeat(rows, 1), cache)
            fetched = len([entry for entry in machine.log if entry.kind == "fetch"])
            with HostWaits(model) as waits:
                forward(model, token_ids(1, seed=801).repeat(rows, 1), cache)
            leaders = -(-4 // SETTINGS[config].selection.period)
            assert len([entry for entry in machine.log if entry.kind == "fetch"]) - fetched == leaders
            assert cache.stats.reselections == 1
            assert not waits.found
        assert_idle(store.inner.memory)
