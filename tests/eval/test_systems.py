"""Systems that use the whole prefix answer as `DynamicCache` does, request after request, and count what they read."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import some_ids, tiny_llama
from transformers import DynamicCache

from eval.systems import (
    AttentionStore,
    ContiguousKV,
    FlexGen,
    InMemory,
    NotStoredError,
    Recompute,
    Reload,
    Setting,
    State,
    System,
    departure,
)
from eval.timing import resident_pages
from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.model.transformers_internals import cache_argument

CACHE = cache_argument()

# K and V of one token in both layers: 2 x 2 layers x 1 head x 16 channels x 4 bytes.
TOKEN_BYTES = 2 * 2 * 16 * 4


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


EXACT: dict[str, Callable[[Any, Path], Any]] = {
    "recompute": lambda model, folder: Recompute(model),
    "in_memory": lambda model, folder: InMemory(model),
    "in_memory+dynamic": lambda model, folder: InMemory(model, dynamic=True),
    "reload": Reload,
    "attentionstore": lambda model, folder: AttentionStore(model, folder, overlap=False),
    "attentionstore+overlap": lambda model, folder: AttentionStore(model, folder, overlap=True),
    "flexgen": FlexGen,
    "flexgen+host=0.6": lambda model, folder: FlexGen(model, folder, host_share=0.6),
    "contiguouskv": lambda model, folder: ContiguousKV("contiguouskv", model, folder, ContiguousKVConfig(budget=1.0)),
    "contiguouskv_paper": lambda model, folder: ContiguousKV(
        "contiguouskv_paper", model, folder, ContiguousKVConfig.paper(1.0)
    ),
}


@pytest.fixture(params=list(EXACT))
def system(request: pytest.FixtureRequest, model: Any, tmp_path: Path) -> Iterator[System]:
    with EXACT[request.param](model, tmp_path / "store") as found:
        assert found.name == request.param
        yield found


def logits_of(model: Any, prompt: torch.Tensor, cache: Any, new: int) -> torch.Tensor:
    """Of the first token after the prompt and of `new - 1` more, `(new, vocabulary)`."""
    output = model.generate(
        prompt[None],
        **{CACHE: cache},
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    return torch.cat(output.logits)


def test_answers_are_those_of_dynamic_cache_request_after_request(system: System, model: Any) -> None:
    """Two prefixes, one of them not of whole chunks, asked in turn; before some requests all of memory is given up."""
    prefixes = [some_ids(80, 1), some_ids(93, 2)]
    for prefix in prefixes:
        system.store(prefix)
    for number in range(6):
        prefix, suffix = prefixes[number % 2], some_ids(5 + number, 10 + number)
        prompt = torch.cat([prefix, suffix])
        if number in (2, 3) and State.COLD in system.states:
            system.enter(State.COLD, prefix)
        # `reload` reads through the page cache, and not every file system lets go of its pages.
        cold = system.name != "reload" or not any(map(resident_pages, system.files()))
        cache = system.cache(prefix)
        found = logits_of(model, prompt, cache, 3)
        stats = system.finish(cache)
        expected = logits_of(model, prompt, DynamicCache(), 3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        if stats.bytes_used:
            assert stats.bytes_used >= len(prefix) * TOKEN_BYTES
        if number in (2, 3) and cold and State.COLD in system.states:
            assert departure(State.COLD, stats) is None
            if system.name != "recompute":
                assert stats.bytes_read >= len(prefix) * TOKEN_BYTES


def test_what_was_not_stored_is_refused_or_computed(system: System, model: Any) -> None:
    prefix = some_ids(64, 5)
    if system.name in ("recompute", "contiguouskv", "contiguouskv_paper"):
        prompt = torch.cat([prefix, some_ids(4, 6)])
        found = logits_of(model, prompt, system.cache(prefix), 1)
        torch.testing.assert_close(found, logits_of(model, prompt, DynamicCache(), 1), rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(NotStoredError):
            system.cache(prefix)


def test_files_are_those_that_requests_read(system: System) -> None:
    assert system.files() == []
    system.store(some_ids(80, 1))
    on_disk = system.name != "recompute" and State.COLD in system.states
    assert len(system.files()) == (1 if on_disk else 0)
    assert all(file.stat().st_size >= 80 * TOKEN_BYTES for file in system.files())


def test_a_chat_that_goes_on_is_kept_once(model: Any, tmp_path: Path) -> None:
    """The whole cache in memory, or in a file: of the turns before, nothing is kept besides."""
    chat = some_ids(90, 7)
    with InMemory(model) as in_memory, Reload(model, tmp_path) as reload:
        for tokens in (40, 70, 90):
            longer = torch.cat([chat[:tokens], some_ids(3, 1)])
            expected = logits_of(model, longer, DynamicCache(), 2)
            for system in (in_memory, reload):
                system.store(chat[:tokens])
                cache = system.cache(chat[:tokens])
                torch.testing.assert_close(logits_of(model, longer, cache, 2), expected, atol=1e-4, rtol=1e-4)
                system.finish(cache)
            assert len(reload.files()) == 1
        with pytest.raises(NotStoredError):
            in_memory.cache(chat[:40])
        in_memory.store(some_ids(40, 8))
        assert in_memory.cache(chat) is not in_memory.cache(some_ids(40, 8))


def test_with_its_index_in_memory_only_chunks_are_read(model: Any, tmp_path: Path) -> None:
    answers, read = [], []
    with ContiguousKV("contiguouskv", model, tmp_path, ContiguousKVConfig(budget=0.3)) as system:
        for seed in (1, 2):
            system.store(some_ids(200, seed))
        for state in (State.COLD, State.KEYS_RESIDENT):
            for seed in (1, 2):
                system.enter(state, some_ids(200, seed))
                cache = system.cache(some_ids(200, seed))
                answers.append(logits_of(model, torch.cat([some_ids(200, seed), some_ids(5, 3)]), cache, 2))
                stats = system.finish(cache)
                assert stats.hits["disk"] == sum(stats.hits.values()) > 0
                read.append((stats.bytes_read > 0, stats.bytes_identified > 0))
    assert read == [(True, True)] * 2 + [(True, False)] * 2
    assert torch.equal(answers[0], answers[2])
    assert torch.equal(answers[1], answers[3])


@pytest.mark.parametrize(("options", "choosing"), [((), 1), (("period=1",), 2), (("chunk=8", "period=1"), 2)])
def test_the_published_method_reads_keys_alone_in_each_layer_that_chooses(
    model: Any, tmp_path: Path, options: tuple[str, ...], choosing: int
) -> None:
    prefix, suffix = some_ids(192, 1), some_ids(5, 2)
    # A segment of the default periods, which has keys apart for one layer only, must not be found.
    for setting in (Setting("contiguouskv_paper", 0.25), Setting("contiguouskv_paper", 0.25, options)):
        with setting.make(model, tmp_path) as system:
            system.store(prefix)
            read = {}
            for state in (State.OPEN, State.KEYS_RESIDENT):
                system.enter(state, prefix)
                cache = system.cache(prefix)
                logits_of(model, torch.cat([prefix, suffix]), cache, 1)
                read[state] = system.finish(cache)
    assert read[State.KEYS_RESIDENT].bytes_identified == 0
    # Keys of one layer: half of its K and V.
    assert read[State.OPEN].bytes_identified == choosing * 192 * TOKEN_BYTES // 4
    assert read[State.OPEN].hits == {"device": 0, "host": 0, "disk": 2 * 3 * (2 if "chunk=8" in options else 1)}
