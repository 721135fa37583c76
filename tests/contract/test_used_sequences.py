"""After any sequence of uses a cache answers as the model does without it, and what is stored is right."""

from __future__ import annotations

import copy
import random
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from hf_contiguouskv.errors import InputError

from .models import PAD, WINDOWED
from .references import assert_close, assert_same_generation, forward
from .subject import ContiguousKVCache, PrefixStore, write_prefix
from .test_placed_text import text as token_ids
from .test_used_caches import FAMILIES, MODES, PREFIX, USES, alone, answer, ask, model_and_twin

pytestmark = pytest.mark.needs_library


class Life:
    """One cache through a sequence of uses, each drawn from a number."""

    def __init__(self, model: Any, twin: Any, cache: Any, prefix: torch.Tensor | None, windowed: bool) -> None:
        self.model, self.twin, self.cache, self.prefix, self.windowed = model, twin, cache, prefix, windowed
        self.prompts = [PREFIX]

    def prompt(self, draw: random.Random) -> torch.Tensor:
        question, known = token_ids(draw.randint(1, 30), draw.randint(0, 99)), draw.choice(self.prompts)
        kinds = ["document", "document", "longer", "longer", "shorter", "same", "stranger"]
        match draw.choice(kinds):
            case "document":
                return torch.cat([PREFIX, question], dim=1)
            case "longer":
                return torch.cat([known[:, :150], question], dim=1)
            case "shorter":
                return known[:, : draw.randint(1, known.shape[1])]
            case "same":
                return known
        return token_ids(draw.randint(1, 120), draw.randint(0, 99))

    def batch(self, draw: random.Random) -> tuple[torch.Tensor, torch.Tensor | None]:
        rows = draw.choice([1, 1, 1, 2, 3])
        if rows == 1 or draw.random() < 0.25:
            return self.prompt(draw).repeat(rows, 1), None
        prompts = [self.prompt(draw) for _ in range(rows)]
        width = max(prompt.shape[1] for prompt in prompts)
        ids = torch.cat([torch.cat([torch.full((1, width - p.shape[1]), PAD), p], dim=1) for p in prompts])
        return ids, (ids != PAD).long()

    def may_refuse(self, ids: torch.Tensor, mask: torch.Tensor | None, least: int = 70) -> bool:
        """Whether a row does not begin with an explicit prefix, or has no more than `least` tokens."""
        if self.prefix is None:
            return False
        rows = [row if mask is None else row[mask[at].bool()] for at, row in enumerate(ids)]
        return any(len(row) < least or row[:70].tolist() != PREFIX[0].tolist() for row in rows)

    def answers(self, draw: random.Random, strategy: str) -> None:
        ids, mask = self.batch(draw)
        if strategy in ("prompt lookup", "an assistant"):
            ids, mask = self.prompt(draw), None
        options: Any = USES[strategy]
        options = options(self.model) if callable(options) else options
        given = {} if mask is None else {"attention_mask": mask}
        seed = draw.randint(0, 99)
        torch.manual_seed(seed)
        samples = {"do_sample", "num_return_sequences", "num_beams"}
        expected = alone(self.twin, ids, **given, **{n: v for n, v in options.items() if n in samples})
        torch.manual_seed(seed)
        try:
            actual = answer(self.model, ids, self.cache, **given, **options)
        except InputError:
            assert self.may_refuse(ids, mask)
            return
        assert actual.sequences.tolist() == expected.sequences.tolist()
        if strategy == "an answer":
            assert_same_generation(actual, expected)
        if len(actual.sequences) == 1:
            self.prompts = [*self.prompts[-3:], actual.sequences]

    def scores(self, draw: random.Random) -> None:
        ids, mask = self.batch(draw)
        mask = torch.ones_like(ids) if mask is None else mask
        options = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp_min(0), "logits_to_keep": 1}
        expected = forward(self.twin, ids, None, **options)
        try:
            actual = forward(self.model, ids, self.cache, **options)
        except InputError:
            assert self.may_refuse(ids, mask, least=71) or ids.shape[1] <= self.cache.get_seq_length()
            return
        assert_close(actual, expected)

    def crop(self, draw: random.Random) -> None:
        length = self.cache.get_seq_length()
        if not self.windowed:
            self.cache.crop(-min(length, draw.choice([0, 1, 2, 5, length, draw.randint(0, length)])))
        elif self.prefix is not None:
            self.cache.reset()  # A window does not remember what has left it: only a fresh prefix can be cropped.
            self.cache.crop(-draw.randint(1, 70))
        elif length:
            self.cache.crop(-length)

    def copies(self, draw: random.Random) -> None:
        twin = copy.deepcopy(self.cache)
        if draw.random() < 0.5:
            self.answers(draw, "an answer")
        self.cache.close()
        self.cache = twin

    def selects_rows(self, draw: random.Random) -> None:
        if self.cache.get_seq_length():
            self.cache.batch_repeat_interleave(2)
            if draw.random() < 0.5:
                self.cache.batch_select_indices(torch.tensor([1]))

    def begins_anew(self, draw: random.Random) -> None:
        self.cache.store.flush()
        store, model = self.cache.store, self.model
        self.cache.close()
        self.cache = ContiguousKVCache(model, self.prefix, store=store, budget=1.0)

    def step(self, name: str, number: int) -> None:
        draw = random.Random(number)
        if name in USES:
            self.answers(draw, name)
        else:
            getattr(self, name)(draw)


STEPS = [*USES, *["an answer"] * 4, "scores", "scores", "crop", "crop", "copies", "selects_rows", "begins_anew"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    stored=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 10**6)), min_size=2, max_size=7),
)
def test_after_any_sequence_of_uses_the_answer_is_the_one_without_the_cache(
    tmp_path_factory, family, mode, stored, steps
):
    model, twin = model_and_twin(family)
    path = tmp_path_factory.mktemp("store")
    if stored:
        write_prefix(model, PREFIX, path)
    with PrefixStore(path) as store:
        cache = ContiguousKVCache(model, MODES[mode], store=store, budget=1.0)
        life = Life(model, twin, cache, MODES[mode], family in WINDOWED)
        for name, number in steps:
            if family.endswith("vl") and name == "an assistant":
                continue  # Transformers itself fails.
            life.step(name, number)
        prompt = ask(12, 99)
        life.cache.reset()
        assert_same_generation(answer(model, prompt, life.cache), alone(twin, prompt))
        store.flush()
        life.cache.close()
        assert store.verify() == []
        assert store.inner.background_failures == 0
        for known in life.prompts:
            check_published(model, twin, store, known)


def check_published(model: Any, twin: Any, store: PrefixStore, ids: torch.Tensor) -> None:
    """What the store has of these tokens is what one forward computes for them."""
    found = store.match(model, ids[0])
    if found:
        step = token_ids(2, seed=98)
        with ContiguousKVCache(model, ids[:, :found], store=store, budget=1.0) as cache:
            assert cache.stats.tokens_from_store == found
            expected = forward(twin, torch.cat([ids[:, :found], step], dim=1), DynamicCache(config=twin.config))
            assert_close(forward(model, step, cache), expected[:, -2:])
