"""A cache belongs to one thread at a time: a second one gets a clear error, and the first one its own answer.

Nothing that two threads have mixed reaches the store. A cache may move from thread to thread between two calls.
"""

from __future__ import annotations

import copy
import sys
import threading
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from hf_contiguouskv.errors import ContiguousKVError, InputError

from .models import CACHE, build, token_ids
from .references import assert_close, assert_same_generation, forward, generate
from .subject import ContiguousKVCache, PrefixStore

pytestmark = pytest.mark.needs_library

PREFIX = token_ids(70, seed=701)
MODES = {"explicit": PREFIX, "automatic": None}
FIRST = torch.cat([PREFIX, token_ids(30, seed=702)], dim=1)
SECOND = torch.cat([PREFIX, token_ids(21, seed=703)], dim=1)
PATIENCE_S = 30


@pytest.fixture(scope="module")
def model() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def twin() -> Any:
    """The same weights, touched by one thread and no cache of ours."""
    return build("llama")


def assert_published_rightly(model: Any, twin: Any, store: Any, *prompts: torch.Tensor) -> None:
    """What the store has of these prompts is what one forward computes for them alone."""
    store.flush()
    assert store.inner.background_failures == 0
    step = token_ids(3, seed=704)
    for ids in prompts:
        found = store.match(model, ids[0])
        if found:
            with ContiguousKVCache(model, ids[:, :found], store=store, budget=1.0) as cache:
                expected = forward(twin, torch.cat([ids[:, :found], step], dim=1), None)[:, -3:]
                assert_close(forward(model, step, cache), expected)


@contextmanager
def another_thread_stops_at(model: Any, forwards: int, work: Any):
    """Run `work` on another thread as far as the middle of its n-th forward, and to its end after the block.

    Yields a list into which the result, or the exception, of `work` comes.
    """
    reached, go, results = threading.Event(), threading.Event(), []
    left = [forwards]

    def stop(module: Any, args: Any, output: Any) -> None:
        if threading.current_thread() is thread:
            left[0] -= 1
            if left[0] == 0:
                reached.set()
                assert go.wait(PATIENCE_S)

    def run() -> None:
        try:
            results.append(work())
        except Exception as error:
            results.append(error)

    handle = model.model.layers[1].register_forward_hook(stop)
    thread = threading.Thread(target=run)
    thread.start()
    try:
        assert reached.wait(PATIENCE_S)
        yield results
    finally:
        go.set()
        thread.join(PATIENCE_S)
        handle.remove()


INTRUSIONS = {
    "generate": lambda model, cache: generate(model, SECOND, cache),
    "a forward": lambda model, cache: forward(model, token_ids(1, seed=4), cache),
    "a forward of the decoder alone": lambda model, cache: model.model(token_ids(1, seed=4), **{CACHE: cache}),
    "reset": lambda model, cache: cache.reset(),
    "crop": lambda model, cache: cache.crop(-1),
    "close": lambda model, cache: cache.close(),
    "repeated rows": lambda model, cache: cache.batch_repeat_interleave(2),
}


@pytest.mark.parametrize("forwards", [1, 3], ids=["in its prompt", "in its answer"])
@pytest.mark.parametrize("intrusion", INTRUSIONS)
@pytest.mark.parametrize("mode", MODES)
def test_a_second_thread_is_refused_and_the_first_one_is_answered(model, twin, store_path, mode, intrusion, forwards):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        work = lambda: generate(model, FIRST, cache)  # noqa: E731
        with another_thread_stops_at(model, forwards, work) as answers, pytest.raises(InputError, match="thread"):
            INTRUSIONS[intrusion](model, cache)
        (answer,) = answers
        if isinstance(answer, Exception):
            raise answer
        assert_same_generation(answer, generate(twin, FIRST, None))
        assert_same_generation(generate(model, SECOND, cache), generate(twin, SECOND, None))
        assert_published_rightly(model, twin, store, FIRST, SECOND)


@pytest.mark.parametrize("mode", MODES)
def test_a_raw_forward_on_another_thread_is_protected_as_well(model, twin, store_path, mode):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        whole = {"attention_mask": torch.ones_like(FIRST), "logits_to_keep": 1}
        with another_thread_stops_at(model, 1, lambda: forward(model, FIRST, cache, **whole)) as answers:
            for intrude in INTRUSIONS.values():
                with pytest.raises(InputError, match="thread"):
                    intrude(model, cache)
        (logits,) = answers
        if isinstance(logits, Exception):
            raise logits
        assert_close(logits, forward(twin, FIRST, None)[:, -1:])
        assert_published_rightly(model, twin, store, FIRST)


@pytest.mark.parametrize("mode", MODES)
def test_reading_what_a_cache_says_of_itself_disturbs_nobody(model, twin, store_path, mode):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        with another_thread_stops_at(model, 2, lambda: generate(model, FIRST, cache)) as answers:
            assert cache.stats.as_dict()["prefix_tokens"] in (0, 70)
            cache.check(FIRST)
            assert cache.get_seq_length() >= 70
        assert_same_generation(answers[0], generate(twin, FIRST, None))


@pytest.mark.parametrize("forwards", [1, 3], ids=["in its prompt", "in its answer"])
@pytest.mark.parametrize("mode", MODES)
def test_a_copy_that_is_made_in_mid_answer_is_right_or_says_what_to_do(model, twin, store_path, mode, forwards):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        with another_thread_stops_at(model, forwards, lambda: generate(model, FIRST, cache)) as answers:
            try:
                own = copy.deepcopy(cache)
                assert_same_generation(generate(model, SECOND, own), generate(twin, SECOND, None))
            except InputError:
                own = copy.deepcopy(cache)
                own.reset()
                assert_same_generation(generate(model, SECOND, own), generate(twin, SECOND, None))
        assert_same_generation(answers[0], generate(twin, FIRST, None))
        assert_published_rightly(model, twin, store, FIRST, SECOND)


@pytest.mark.parametrize("mode", MODES)
def test_a_cache_may_move_from_thread_to_thread_between_calls(model, twin, store_path, mode):
    with PrefixStore(store_path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        for prompt in (FIRST, SECOND, FIRST):
            results: list[Any] = []
            thread = threading.Thread(target=lambda p=prompt, r=results: r.append(generate(model, p, cache)))
            thread.start()
            thread.join(PATIENCE_S)
            assert_same_generation(results[0], generate(twin, prompt, None))
            assert_same_generation(generate(model, prompt, cache), generate(twin, prompt, None))


@pytest.mark.parametrize("mode", MODES)
def test_three_threads_that_race_for_one_cache_get_their_own_answer_or_an_error(model, twin, store_path, mode):
    prompts = [FIRST, SECOND, torch.cat([PREFIX, token_ids(44, seed=705)], dim=1)]
    expected = [generate(twin, prompt, None) for prompt in prompts]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        for round_ in range(3):
            with PrefixStore(store_path / str(round_)) as store:
                cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
                start, results = threading.Barrier(3), {}

                def work(at: int, cache: Any = cache, start: Any = start, results: Any = results) -> None:
                    start.wait(PATIENCE_S)
                    try:
                        results[at] = generate(model, prompts[at], cache)
                    except Exception as error:
                        results[at] = error

                threads = [threading.Thread(target=work, args=(at,)) for at in range(3)]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join(PATIENCE_S)
                answered = [at for at, result in results.items() if not isinstance(result, ContiguousKVError)]
                assert answered
                for at in answered:
                    if isinstance(results[at], Exception):
                        raise results[at]
                    assert_same_generation(results[at], expected[at])
                assert_published_rightly(model, twin, store, *prompts)
    finally:
        sys.setswitchinterval(interval)
