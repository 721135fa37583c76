"""Answers are judged by what the model says with a cache, and by how close that is to the whole cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_model import save_tiny_model
from transformers import DynamicCache

from eval.models import load_model
from eval.running.quality import Judge, perplexity
from eval.running.readings import Cropped
from eval.systems import InMemory
from eval.tasks import Request
from eval.tasks.base import encode
from hf_contiguouskv import ContiguousKVCache
from hf_contiguouskv.model.transformers_internals import cache_argument

CACHE = cache_argument()


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("model"))), dtype="float32")


@pytest.fixture
def asked(loaded: tuple[Any, Any]) -> Callable[..., Request]:
    def make(**changes: Any) -> Request:
        fields: dict[str, Any] = {
            "task": "animals",
            "number": 0,
            "prefix_ids": encode(loaded[1], "a long story about a cat and a dog"),
            "prefix": 0,
            "suffix_ids": encode(loaded[1], " who is it? a"),
            "answers": ("bird",),
            "max_new_tokens": 6,
        }
        return Request(**fields | changes)

    return make


def judged(loaded: tuple[Any, Any], request: Request, metric: str) -> dict[str, Any]:
    """By a cache that holds the whole prompt."""
    model, tokenizer = loaded
    prompt = torch.cat([request.prefix_ids, request.suffix_ids])[None]
    cache = DynamicCache(config=model.config)
    output = model.generate(prompt, max_new_tokens=1, do_sample=False, **{CACHE: cache})
    judge = Judge(model, tokenizer, request, metric)
    with InMemory(model) as in_memory:
        in_memory.store(request.prefix_ids)
        judge.refer_to(in_memory)
        return judge.judge(Cropped(model, request, cache), int(output[0, -1]))


def test_labels_are_judged_by_the_likelihood_of_all_their_tokens(
    loaded: tuple[Any, Any], asked: Callable[..., Request]
) -> None:
    model, tokenizer = loaded
    choices = ("cat", "a dog", "z", "elephants")
    request = asked(choices=choices, answers=("cat",))
    found = judged(loaded, request, "accuracy")
    likelihoods = []
    for choice in choices:
        ids = encode(tokenizer, f" {choice}")
        whole = torch.cat([request.prefix_ids, request.suffix_ids, ids])
        with torch.no_grad():
            logits = model(input_ids=whole[None]).logits[0].log_softmax(-1)
        start = len(whole) - len(ids)
        likelihoods.append(sum(float(logits[start + n - 1, token]) for n, token in enumerate(ids.tolist())))
    best = choices[likelihoods.index(max(likelihoods))]
    assert len({len(encode(tokenizer, f" {choice}")) for choice in choices}) > 1
    assert found["prediction"] == best
    assert found["score"] == float(best == "cat")


def test_answers_are_generated_from_the_cache(loaded: tuple[Any, Any], asked: Callable[..., Request]) -> None:
    model, tokenizer = loaded
    request = asked()
    prompt = torch.cat([request.prefix_ids, request.suffix_ids])[None]
    output = model.generate(prompt, max_new_tokens=6, do_sample=False)
    expected = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()
    assert judged(loaded, request, "needle_recall")["prediction"] == expected


def test_fidelity_is_that_of_suffix_and_answer(loaded: tuple[Any, Any], asked: Callable[..., Request]) -> None:
    model, tokenizer = loaded
    request = asked()
    found = judged(loaded, request, "needle_recall")
    assert found["kl"] == pytest.approx(0.0, abs=1e-5)
    assert found["agreement"] == 1.0
    answer = encode(tokenizer, " bird")
    whole = torch.cat([request.prefix_ids, request.suffix_ids, answer])
    with torch.no_grad():
        loss = model(input_ids=whole[None]).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
    expected = torch.exp(-loss[torch.arange(len(answer)), answer].mean())
    assert found["perplexity"] == pytest.approx(float(expected), rel=1e-3)


def test_a_cache_that_chooses_in_mid_answer_gets_the_answer_as_it_would_give_it(
    loaded: tuple[Any, Any], asked: Callable[..., Request]
) -> None:
    model, tokenizer = loaded
    request = asked(prefix_ids=encode(tokenizer, "a long story about a cat and a dog " * 6), max_new_tokens=9)
    prompt = torch.cat([request.prefix_ids, request.suffix_ids])[None]
    with ContiguousKVCache(model, request.prefix_ids, budget=0.3, reselect_every=2) as cache:
        output = model.generate(prompt, max_new_tokens=9, do_sample=False, **{CACHE: cache})
        expected = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        cache.reset()
        first = model.generate(prompt, max_new_tokens=1, do_sample=False, **{CACHE: cache})
        passed: list[int] = []
        hook = model.get_input_embeddings().register_forward_hook(lambda *call: passed.append(call[2].shape[1]))
        judge = Judge(model, tokenizer, request, "needle_recall")
        found = judge.judge(Cropped(model, request, cache), int(first[0, -1]))
        hook.remove()
    assert found["prediction"] == expected
    decoding = found["decoding"]
    assert decoding["tokens"] == 8
    assert decoding["reselections"] == 4
    assert decoding["seconds"] > 0
    assert decoding["bytes_read"] == 0
    # One token at a time while answering; then the question at once, and the right answer one at a time again.
    assert passed == [1] * 8 + [len(request.suffix_ids) - 1] + [1] * (len(encode(tokenizer, " bird")) - 1)


def test_perplexity_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]))
    assert perplexity(logits, torch.tensor([0, 1])) == pytest.approx((0.5 * 0.1) ** -0.5)


def test_a_suffix_of_one_token_is_refused(loaded: tuple[Any, Any], asked: Callable[..., Request]) -> None:
    with pytest.raises(ValueError, match="two tokens"):
        judged(loaded, asked(suffix_ids=torch.tensor([5]), answers=("x",)), "needle_recall")
