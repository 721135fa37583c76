"""Batches over one prefix, at `budget=1.0`: every row answers as it would alone.

Padding may stand before the prefix (ordinary left padding) or between prefix and suffix.
"""

from __future__ import annotations

import pytest
import torch

from .models import FAMILIES, IMPLEMENTATIONS, PAD, WINDOWLESS, token_ids
from .references import assert_same_generation, assert_same_rows, generate, prefilled
from .subject import prefix_from_disk

PREFIX = token_ids(83, seed=41)
SUFFIXES = [token_ids(tokens, seed=50 + tokens) for tokens in (9, 4, 6)]
LONGEST = 9


def padded_batch(padding: str, prefix: torch.Tensor = PREFIX) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `[3, n + 9]` with the padding `"before"` the prefix or `"between"` prefix and suffix."""
    ids, masks = [], []
    for suffix in SUFFIXES:
        pads = torch.full((1, LONGEST - suffix.shape[1]), PAD)
        parts = [pads, prefix, suffix] if padding == "before" else [prefix, pads, suffix]
        ids.append(torch.cat(parts, dim=1))
        masks.append(torch.cat([torch.zeros_like(p) if p is pads else torch.ones_like(p) for p in parts], dim=1))
    return torch.cat(ids), torch.cat(masks)


def rows_alone(model, prefix: torch.Tensor = PREFIX) -> list:
    return [generate(model, torch.cat([prefix, suffix], dim=1), prefilled(model, prefix)) for suffix in SUFFIXES]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_with_equally_long_suffixes_are_exact(tiny_model, store_path, family):
    model = tiny_model(family)
    ids = torch.cat([PREFIX.expand(3, -1), token_ids(6, seed=42, rows=3)], dim=1)
    expected = generate(model, ids, prefilled(model, PREFIX, 3))
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        assert_same_generation(generate(model, ids, cache), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", WINDOWLESS)
def test_padding_between_prefix_and_suffix_changes_nothing(tiny_model, store_path, family, implementation):
    model = tiny_model(family, implementation)
    ids, mask = padded_batch("between")
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        assert_same_rows(generate(model, ids, cache, attention_mask=mask), rows_alone(model))


@pytest.mark.needs_library
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_ordinary_left_padding_changes_nothing(tiny_model, store_path, family, implementation):
    model = tiny_model(family, implementation)
    ids, mask = padded_batch("before")
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        assert_same_rows(generate(model, ids, cache, attention_mask=mask), rows_alone(model))


@pytest.mark.needs_library
@pytest.mark.parametrize("family", ["llama", "gemma3", "opt"])
def test_left_padding_equals_a_dynamic_cache_that_was_padded_too(tiny_model, store_path, family):
    model = tiny_model(family)
    ids, mask = padded_batch("before")
    expected = generate(model, ids, None, attention_mask=mask)
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        assert_same_generation(generate(model, ids, cache, attention_mask=mask), expected)


@pytest.mark.needs_library
@pytest.mark.parametrize("padding", ["before", "between"])
def test_beams_over_a_padded_batch_are_exact(tiny_model, store_path, padding):
    model = tiny_model("qwen3")
    ids, mask = padded_batch(padding)
    singles = [
        generate(model, torch.cat([PREFIX, suffix], dim=1), prefilled(model, PREFIX, 2), num_beams=2)
        for suffix in SUFFIXES
    ]
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        actual = generate(model, ids, cache, attention_mask=mask, num_beams=2)
    for row, single in enumerate(singles):
        assert actual.sequences[row, -8:].tolist() == single.sequences[0, -8:].tolist()


@pytest.mark.needs_library
def test_a_row_padded_by_more_than_a_chunk_is_exact(tiny_model, store_path):
    model = tiny_model("llama")
    long_suffix, short_suffix = token_ids(40, seed=43), token_ids(1, seed=44)
    pads = torch.full((1, 39), PAD)
    ids = torch.cat([torch.cat([PREFIX, long_suffix], 1), torch.cat([pads, PREFIX, short_suffix], 1)])
    mask = (ids != PAD).long()
    singles = [
        generate(model, torch.cat([PREFIX, suffix], dim=1), prefilled(model, PREFIX))
        for suffix in (long_suffix, short_suffix)
    ]
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        assert_same_rows(generate(model, ids, cache, attention_mask=mask), singles)


@pytest.mark.needs_library
@pytest.mark.parametrize("padding", ["before", "between"])
def test_a_padded_batch_may_ask_twice(tiny_model, store_path, padding):
    model = tiny_model("llama")
    ids, mask = padded_batch(padding)
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        first = generate(model, ids, cache, attention_mask=mask)
        cache.reset()
        second = generate(model, ids, cache, attention_mask=mask)
        assert_same_generation(second, first)
        assert_same_rows(second, rows_alone(model))


@pytest.mark.needs_library
@pytest.mark.parametrize("padding", ["before", "between"])
@pytest.mark.parametrize("prefill_chunk_size", [4, 64])
def test_a_padded_batch_prefilled_in_blocks_is_exact(tiny_model, store_path, padding, prefill_chunk_size):
    model = tiny_model("llama")
    ids, mask = padded_batch(padding)
    with prefix_from_disk(model, PREFIX, store_path, budget=1.0) as cache:
        actual = generate(model, ids, cache, attention_mask=mask, prefill_chunk_size=prefill_chunk_size)
        assert_same_rows(actual, rows_alone(model))
