"""Systems find what they were brought to, state by state, and answer alike from all of them."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import some_ids, tiny_llama
from transformers import DynamicCache

from eval.running.timed import timed_request
from eval.systems import (
    AttentionStore,
    AttentionStoreH2O,
    ContiguousKV,
    FlexGen,
    Impress,
    InMemory,
    NotStoredError,
    Recompute,
    Reload,
    State,
    StateError,
    departure,
)
from eval.systems.in_memory import prefill
from eval.systems.token_system import random_importance
from eval.tasks import Request
from eval.timing import resident_pages
from hf_contiguouskv import ContiguousKVConfig, RequestStats
from hf_contiguouskv.model.transformers_internals import cache_argument

LAYERS, KV_HEADS, HEAD_DIM = 3, 2, 8


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(
        hidden_size=6 * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=1024,
    )


PREFIX, SUFFIX = some_ids(500, 1), some_ids(6, 2)

TIERED: dict[str, Callable[..., Any]] = {
    "contiguouskv": lambda model, folder, **options: ContiguousKV(
        "contiguouskv", model, folder, ContiguousKVConfig(budget=0.2), **options
    ),
    "contiguouskv_paper": lambda model, folder, **options: ContiguousKV(
        "contiguouskv_paper", model, folder, ContiguousKVConfig.paper(0.2), **{"eviction": "published"} | options
    ),
    "contiguouskv_whole": lambda model, folder, **options: ContiguousKV(
        "contiguouskv_whole", model, folder, ContiguousKVConfig(budget=1.0), **options
    ),
    "attentionstore": lambda model, folder, **options: AttentionStore(model, folder, overlap=False, **options),
    "attentionstore+overlap": lambda model, folder, **options: AttentionStore(model, folder, overlap=True, **options),
    "flexgen": FlexGen,
    "attentionstore_h2o": lambda model, folder, **options: AttentionStoreH2O(model, folder, 0.1, **options),
    "impress": lambda model, folder, **options: Impress(model, folder, 0.1, **options),
    "impress+groups": lambda model, folder, **options: Impress(model, folder, 0.1, probes="groups", **options),
}
WHOLE = ("contiguouskv_whole", "attentionstore", "attentionstore+overlap", "flexgen")


def ask(model: Any, system: Any) -> tuple[torch.Tensor, Any]:
    cache = system.cache(PREFIX)
    with torch.no_grad():
        logits = model(input_ids=SUFFIX[None], **{cache_argument(model): cache}).logits[0]
    return logits, system.finish(cache)


@pytest.mark.parametrize("named", [False, True], ids=["everything", "what the suffix uses"])
@pytest.mark.parametrize("name", list(TIERED))
def test_requests_find_the_state_and_answer_alike(model: Any, tmp_path: Path, name: str, named: bool) -> None:
    suffix = SUFFIX if named else None
    with TIERED[name](model, tmp_path) as system:
        system.store(PREFIX)
        expected, _ = ask(model, system)
        keys = () if name in WHOLE else (State.KEYS_RESIDENT,)
        assert system.states == (State.COLD, State.OPEN, *keys, State.WARM_HOST)
        read = {}
        for state in (*system.states, *reversed(system.states)):
            for _ in range(2):
                system.enter(state, PREFIX, suffix)
                logits, stats = ask(model, system)
                assert departure(state, stats) is None
                torch.testing.assert_close(logits, expected, rtol=0, atol=0)
                read[state] = stats.bytes_read
        if keys:
            assert 0 < read[State.KEYS_RESIDENT] < read[State.COLD]
        with pytest.raises(ValueError, match="on a CPU nothing is on a device"):
            system.enter(State.WARM_DEVICE, PREFIX)


def test_a_state_that_a_system_does_not_know_is_refused(model: Any, tmp_path: Path) -> None:
    with (
        AttentionStore(model, tmp_path / "a") as whole,
        Recompute(model) as recompute,
        InMemory(model) as in_memory,
        Reload(model, tmp_path / "b") as reload,
    ):
        systems = (whole, recompute, in_memory, reload)
        assert [system.states for system in systems] == [
            (State.COLD, State.OPEN, State.WARM_HOST),
            (State.COLD,),
            (State.WARM_HOST,),
            (State.COLD, State.WARM_HOST),
        ]
        for system in systems:
            system.store(PREFIX)
            for state in system.states:
                system.enter(state, PREFIX)
                assert torch.isfinite(ask(model, system)[0]).all()
            for state in set(State) - set(system.states):
                with pytest.raises(ValueError, match=f"{system.name} cannot be {state}: its states are "):
                    system.enter(state, PREFIX)
        for system in (whole, in_memory, reload):
            with pytest.raises(NotStoredError):
                system.enter(State.WARM_HOST, some_ids(300, 9))


def test_a_file_that_was_just_read_is_warm(model: Any, tmp_path: Path) -> None:
    with Reload(model, tmp_path) as system:
        system.store(PREFIX)
        (path,) = system.files()
        system.enter(State.COLD, PREFIX)
        dropped = resident_pages(path) == 0  # Not every file system lets go of its pages.
        system.enter(State.WARM_HOST, PREFIX)
        assert resident_pages(path) == -(-path.stat().st_size // mmap.PAGESIZE)
        assert ask(model, system)[1].bytes_read == 0
        if dropped:
            system.enter(State.COLD, PREFIX)
            assert ask(model, system)[1].bytes_read > 0


@pytest.mark.parametrize("name", list(TIERED))
def test_memory_that_is_too_small_for_a_state_is_an_error(model: Any, tmp_path: Path, name: str) -> None:
    with TIERED[name](model, tmp_path, host_bytes=20_000) as system:
        system.store(PREFIX)
        with pytest.raises(StateError, match="there is no room for"):
            system.enter(State.WARM_HOST, PREFIX)
        system.enter(State.COLD, PREFIX)
        assert departure(State.COLD, ask(model, system)[1]) is None


def test_what_speaks_against_a_state() -> None:
    found = RequestStats(bytes_read=10, hits={"device": 0, "host": 2, "disk": 3})
    assert departure(State.COLD, found) == "cold: chunks came from {'host': 2} besides 3 from disk"
    assert departure(State.WARM_HOST, found) == "warm_host: chunks came from {'disk': 3} besides 2 from host"
    assert "10 bytes were read" in str(departure(State.WARM_HOST, replace(found, hits={"host": 2, "disk": 0})))
    assert "nothing was read" in str(departure(State.KEYS_RESIDENT, RequestStats()))
    assert "no chunk came from device" in str(departure(State.WARM_DEVICE, RequestStats()))


def test_a_timed_request_finds_its_state(model: Any, tmp_path: Path) -> None:
    request = Request("states", 0, PREFIX, len(PREFIX), SUFFIX, ())
    with TIERED["impress"](model, tmp_path) as system:
        system.store(PREFIX)
        for state in (State.WARM_HOST, State.COLD, State.KEYS_RESIDENT, State.OPEN):
            with timed_request(model, system, request, state=state) as timed:
                assert timed.seconds > 0
            assert timed.departure is None
            assert (timed.stats.bytes_read == 0) is (state is State.WARM_HOST)


# ---- K and V that are given ----


def random_states(model: Any, tokens: int = len(PREFIX), seed: int = 7) -> DynamicCache:
    chance = torch.Generator().manual_seed(seed)
    states = DynamicCache(config=model.config)
    for layer in range(LAYERS):
        keys, values = torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, generator=chance)
        states.update(keys, values, layer)
    return states


@pytest.mark.parametrize("name", [*TIERED, "in_memory", "reload"])
def test_given_states_are_used_as_computed_ones(model: Any, tmp_path: Path, name: str) -> None:
    """Those of the prefix itself give its own answers; others give theirs; the caller's tensors stay the caller's."""
    makes = TIERED | {"in_memory": lambda model, _: InMemory(model), "reload": Reload}
    states = prefill(model, PREFIX)
    before = [layer.keys.clone() for layer in states.layers]
    with makes[name](model, tmp_path / "a") as computed, makes[name](model, tmp_path / "b") as given:
        computed.store(PREFIX)
        given.store(PREFIX, states)
        for _ in range(2):
            torch.testing.assert_close(ask(model, given)[0], ask(model, computed)[0], atol=1e-4, rtol=1e-4)
    with makes[name](model, tmp_path / "c") as system:
        system.store(PREFIX, random_states(model))
        if name in (*WHOLE, "in_memory", "reload"):
            expected = random_states(model)
            with torch.no_grad():
                logits = model(input_ids=SUFFIX[None], **{cache_argument(model): expected}).logits[0]
            torch.testing.assert_close(ask(model, system)[0], logits, atol=1e-4, rtol=1e-4)
        assert torch.isfinite(ask(model, system)[0]).all()
    for layer, keys in zip(states.layers, before, strict=True):
        assert torch.equal(layer.keys, keys)
        assert layer.keys.shape[2] == len(PREFIX)


@pytest.mark.parametrize("name", ["contiguouskv", "attentionstore", "impress", "in_memory", "reload"])
def test_states_that_do_not_fit_are_refused(model: Any, tmp_path: Path, name: str) -> None:
    makes = TIERED | {"in_memory": lambda model, _: InMemory(model), "reload": Reload}
    with makes[name](model, tmp_path) as system:
        with pytest.raises(ValueError, match=r"keys of layer 0 must be \(1, 2, 500, 8\) in torch.float32"):
            system.store(PREFIX, random_states(model, tokens=499))
        half = random_states(model)
        half.layers[1].values = half.layers[1].values.half()
        with pytest.raises(ValueError, match=r"values of layer 1 .* in torch.float16"):
            system.store(PREFIX, half)
        short = random_states(model)
        del short.layers[2]
        with pytest.raises(ValueError, match="2 layers, the model has 3"):
            system.store(PREFIX, short)
        system.store(PREFIX, random_states(model))
        assert torch.isfinite(ask(model, system)[0]).all()


def test_the_order_of_importance_of_random_states_is_always_the_same(model: Any, tmp_path: Path) -> None:
    keys = random_states(model).layers[1].keys[0]
    one, other = (random_importance(keys, 6, HEAD_DIM**-0.5) for _ in range(2))
    assert torch.equal(one, other)
    assert torch.isinf(one[-64:]).all()
    assert 0 < float(one[:-64].sum()) < 64 * 6
    with TIERED["impress"](model, tmp_path / "a") as system:
        system.store(PREFIX, random_states(model))
        answer, _ = ask(model, system)
    with TIERED["impress"](model, tmp_path / "b") as system:
        system.store(PREFIX, random_states(model))
        assert torch.equal(ask(model, system)[0], answer)
