"""The bounds of what a system can do: the suffix alone, and only the tokens that ours selects."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import some_ids, tiny_llama

from eval.random_models import random_states
from eval.running.timed import timed_request
from eval.systems import ContiguousKV, KeptTokens, NoPrefix, NotStoredError, State, StateError, departure, kept_tokens
from eval.tasks import Request
from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.model.transformers_internals import cache_argument

BUDGET = 0.2


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )


PREFIX, SUFFIX = some_ids(500, 1), some_ids(6, 2)


def generated(model: Any, cache: Any, suffix: torch.Tensor = SUFFIX) -> torch.Tensor:
    """Logits of three tokens after the prompt, `(3, vocabulary)`."""
    output = model.generate(
        torch.cat([PREFIX, suffix])[None],
        **{cache_argument(): cache},
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(output.logits)


def test_the_suffix_alone_stands_at_its_place_and_sees_itself_only(model: Any) -> None:
    with NoPrefix(model) as system:
        system.store(PREFIX)
        assert system.files() == []
        for suffix in (SUFFIX, some_ids(300, 3), SUFFIX):  # There is room for fewer.
            system.enter(State.COLD, PREFIX, suffix)
            cache = system.cache(PREFIX)
            assert cache.get_seq_length() == len(PREFIX)
            found = generated(model, cache, suffix)
            assert cache.get_seq_length() == len(PREFIX) + len(suffix) + 2
            assert departure(State.COLD, system.finish(cache)) is None
            with torch.no_grad():
                positions = torch.arange(len(PREFIX), len(PREFIX) + len(suffix))[None]
                alone = model(input_ids=suffix[None], position_ids=positions).logits[0, -1]
            torch.testing.assert_close(found[0], alone, rtol=1e-4, atol=1e-4)
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("budget", [BUDGET, 1.0])
def test_kept_tokens_answer_as_ours_request_after_request(model: Any, tmp_path: Path, budget: float) -> None:
    config = ContiguousKVConfig(budget=budget)
    with ContiguousKV("ours", model, tmp_path, config) as ours, KeptTokens(model, tmp_path, budget) as system:
        system.store(PREFIX)
        assert system.states == (State.WARM_HOST,)
        assert system.files() == []
        for suffix in (SUFFIX, some_ids(9, 4), SUFFIX, SUFFIX):
            cache = ours.cache(PREFIX)
            expected = generated(model, cache, suffix)
            kept = cache.layers[0].attached.request.kept_tokens
            ours.finish(cache)
            system.enter(State.WARM_HOST, PREFIX, suffix)
            cache = system.cache(PREFIX)
            assert [layer.keys.shape[2] for layer in cache.layers] == [kept] * 3
            assert (kept == len(PREFIX)) is (budget == 1.0)
            torch.testing.assert_close(generated(model, cache, suffix), expected, rtol=1e-4, atol=1e-4)
            assert departure(State.WARM_HOST, system.finish(cache)) is None
            assert cache.get_seq_length() == len(PREFIX)


def test_a_request_is_selected_for_and_checked_once(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    select = KeptTokens._selected

    def watched(self: KeptTokens, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor) -> Any:
        made.append(len(suffix_ids))
        return select(self, prefix_ids, suffix_ids)

    monkeypatch.setattr(KeptTokens, "_selected", watched)
    request = Request("bounds", 0, PREFIX, 0, SUFFIX, ())
    with KeptTokens(model, tmp_path, BUDGET) as system:
        system.store(PREFIX)
        for _ in range(2):
            with timed_request(model, system, request, State.WARM_HOST) as timed:
                assert timed.cache.get_seq_length() > len(PREFIX)
            assert timed.departure is None
            assert timed.stats.bytes_read == 0
        assert made == [len(SUFFIX)]
        # Other tokens than ours selects would be another system.
        prune = kept_tokens._kept_tokens_of

        def damaged(*arguments: Any) -> Any:
            cache = prune(*arguments)
            for layer in cache.layers:
                layer.values[:] = 0.0
            return cache

        monkeypatch.setattr(kept_tokens, "_kept_tokens_of", damaged)
        with pytest.raises(StateError, match="kept_tokens answers otherwise"):
            system.enter(State.WARM_HOST, PREFIX, some_ids(8, 5))
        with pytest.raises(NotStoredError):
            system.cache(PREFIX)
    assert model.config._attn_implementation == "sdpa"


def test_kept_tokens_of_random_states_are_those_of_the_store(model: Any, tmp_path: Path) -> None:
    with KeptTokens(model, tmp_path, BUDGET) as system:
        system.store(PREFIX, random_states(model, len(PREFIX)))
        system.enter(State.WARM_HOST, PREFIX, SUFFIX)
        assert system.cache(PREFIX).get_seq_length() == len(PREFIX)


def test_what_kept_tokens_cannot_hold_is_refused(model: Any, tmp_path: Path) -> None:
    with KeptTokens(model, tmp_path, BUDGET) as system:
        with pytest.raises(NotStoredError, match="500 tokens"):
            system.enter(State.WARM_HOST, PREFIX, SUFFIX)
        system.store(PREFIX)
        with pytest.raises(NotStoredError, match="enter a state with the suffix first"):
            system.cache(PREFIX)
        with pytest.raises(ValueError, match="needs the suffix"):
            system.enter(State.WARM_HOST, PREFIX)
        with pytest.raises(ValueError, match="kept_tokens cannot be cold: its states are warm_host"):
            system.enter(State.COLD, PREFIX, SUFFIX)
