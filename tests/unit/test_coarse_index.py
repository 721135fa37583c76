"""The key index in 2 bits: against loops, and the scores that it gives."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from hf_contiguouskv.selection import CoarseIndex, IndexedKeysScorer, KeyIndex, Scratch, SelectionInput, index_parts
from hf_contiguouskv.selection.indexed_keys import peaks_on_cpu, peaks_on_device
from hf_contiguouskv.store.coarse_index import build_coarse_index, expand_coarse_index, in_order_of_text
from hf_contiguouskv.store.key_index import build_key_index


def some_index(kv_heads: int, c: int, tokens: int, head_dim: int, spread: int = 127, seed: int = 0) -> torch.Tensor:
    """Int8 `(kv_heads, c, chunks, head_dim)`; missing tokens of the last chunk are zeros, as in a key index."""
    chance = torch.Generator().manual_seed(seed)
    chunks = -(-tokens // c)
    numbers = torch.zeros(kv_heads, chunks * c, head_dim, dtype=torch.int8)
    numbers[:, :tokens] = torch.randint(-spread, spread + 1, (kv_heads, tokens, head_dim), generator=chance)
    return numbers.view(kv_heads, chunks, c, head_dim).transpose(1, 2).contiguous()


def expanded(codes: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Int8 `(kv_heads, c, chunks, head_dim)` in the order of the text, with the chunks that complete the last block."""
    kv_heads, quarter, n, blocks, head_dim = codes.shape
    out = torch.full((kv_heads, 4 * quarter, n, blocks, head_dim), 99, dtype=torch.int8)
    expand_coarse_index(codes, levels, out)
    return in_order_of_text(out, 2)


def slow_rounding(index: torch.Tensor, tokens: int) -> torch.Tensor:
    """Every number of the index, rounded in Python integers; of missing tokens, the lowest level of their block."""
    kv_heads, c, chunks, head_dim = index.shape
    n = max(1, 64 // c)
    found = torch.zeros(kv_heads, c, -(-chunks // n) * n, head_dim, dtype=torch.int64)
    for head in range(kv_heads):
        for channel in range(head_dim):
            for block in range(0, chunks, n):
                there = [
                    (place, chunk)
                    for chunk in range(block, min(chunks, block + n))
                    for place in range(c)
                    if chunk * c + place < tokens
                ]
                numbers = [int(index[head, place, chunk, channel]) for place, chunk in there]
                step = (max(numbers) - min(numbers) + 2) // 4
                lowest = (max(numbers) + min(numbers) - 3 * step) // 2
                found[head, :, block : block + n, channel] = lowest
                for (place, chunk), number in zip(there, numbers, strict=True):
                    nearest = min(range(4), key=lambda code: (abs(lowest + code * step - number), -code))
                    found[head, place, chunk, channel] = lowest + nearest * step
    return found


@settings(deadline=None, max_examples=40)
@given(
    kv_heads=st.integers(1, 2),
    c=st.sampled_from([4, 8, 16, 32, 64, 128]),
    tokens=st.integers(1, 300),
    head_dim=st.integers(1, 5),
    spread=st.integers(0, 127),
    seed=st.integers(0, 2**31),
)
@example(kv_heads=1, c=4, tokens=1, head_dim=1, spread=127, seed=0)
@example(kv_heads=2, c=16, tokens=64, head_dim=3, spread=127, seed=1)
def test_every_number_becomes_the_nearest_of_four_levels_of_its_block(kv_heads, c, tokens, head_dim, spread, seed):
    index = some_index(kv_heads, c, tokens, head_dim, spread, seed)
    codes, levels = build_coarse_index(index, tokens)
    assert (codes.dtype, levels.dtype) == (torch.uint8, torch.int8)
    assert codes.is_contiguous()
    assert levels.is_contiguous()
    assert torch.equal(expanded(codes, levels).long(), slow_rounding(index, tokens))


@pytest.mark.parametrize("numbers", [[-127, 127], [127], [-127], [126, 127], [-127, -126, -125, -124], [0]])
def test_levels_stay_in_the_range_of_the_key_index(numbers):
    index = torch.tensor(numbers, dtype=torch.int8).repeat(64)[:64].view(1, 4, 16, 1)
    back = expanded(*build_coarse_index(index, 64))
    assert int(back.min()) >= -127
    assert int((back.int() - index.int()).abs().max()) <= 127 // 4 + 1


def test_an_index_takes_a_ninth_of_its_bits_less_levels():
    codes, levels = build_coarse_index(some_index(3, 16, 8192, 64), 8192)
    assert (codes.nbytes + levels.nbytes) * 8 / (3 * 8192 * 64) == 2.25


def test_what_a_block_holds_does_not_depend_on_other_blocks():
    """A prefix that grows by a segment does not change what is stored of it."""
    index = some_index(2, 16, 256, 8)
    codes, levels = build_coarse_index(index, 256)
    for block in range(4):
        alone = build_coarse_index(index[:, :, 4 * block : 4 * block + 4].contiguous(), 64)
        assert torch.equal(codes[:, :, :, block : block + 1], alone[0])
        assert torch.equal(levels[:, :, block : block + 1], alone[1])


def some_keys(tokens: int, kv_heads: int = 2, head_dim: int = 8, seed: int = 5) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(kv_heads, tokens, head_dim, generator=chance) * torch.rand(head_dim, generator=chance) * 3


def as_key_index(part: CoarseIndex) -> KeyIndex:
    """The same levels in an index of 8 bits."""
    return KeyIndex(
        expanded(part.codes, part.levels)[:, :, part.first : part.first + part.chunks].contiguous(), part.scale
    )


@pytest.mark.parametrize("at_once", [1, 2**21])
@pytest.mark.parametrize(
    ("tokens", "first", "chunks"), [(333, 0, 21), (333, 3, 11), (64, 0, 4), (16, 0, 1), (80, 4, 1)]
)
def test_peaks_are_those_of_the_expanded_index_on_a_cpu_and_a_device(monkeypatch, at_once, tokens, first, chunks):
    monkeypatch.setattr(index_parts, "_EXPANDED_BYTES", at_once)
    whole = CoarseIndex.of(some_keys(tokens, kv_heads=3, head_dim=64), 16)
    part = whole._replace(first=first, chunks=chunks)
    queries = torch.randn(3, 21, 64, generator=torch.Generator().manual_seed(1))
    expected, found = torch.empty(chunks, 3, 21), torch.empty(chunks, 3, 21)
    peaks_on_cpu(queries.numpy(), as_key_index(part), 0.3, Scratch(), Scratch(), expected.numpy())
    peaks_on_cpu(queries.numpy(), part, 0.3, Scratch(), Scratch(), found.numpy())
    assert torch.equal(found, expected)
    assert torch.equal(peaks_on_device(queries, part, 0.3)[0], expected.permute(1, 2, 0))


@pytest.mark.parametrize("on_device", [False, True])
def test_a_prefix_of_segments_with_both_kinds_of_index_is_scored_as_one(on_device):
    keys, chance = some_keys(400), torch.Generator().manual_seed(2)
    queries = torch.randn(2, 4, 9, 8, generator=chance)
    voters = [torch.tensor([1, 4, 8]), torch.tensor([8])]
    inputs = SelectionInput(queries, queries[:, :2], voters, torch.ones(2, 9, dtype=torch.bool), 0.35)
    parts = [KeyIndex.of(keys[:, :96], 16), CoarseIndex.of(keys[:, 96:], 16)._replace(chunks=17)]
    plain = [parts[0], as_key_index(parts[1])]
    found = IndexedKeysScorer(parts, 20, 2.0, on_device=on_device)(inputs)
    expected = IndexedKeysScorer(plain, 20, 2.0, on_device=on_device)(inputs)
    assert torch.equal(found.importance, expected.importance)
    assert torch.equal(found.mass, expected.mass)
    assert found.importance.shape == (2, 20)


def test_the_rounded_index_is_nearer_to_the_keys_than_levels_from_end_to_end():
    """What the four levels are for: with levels at the ends, the error is 1.6 times as large for such numbers."""
    keys = torch.randn(2, 4096, 64, generator=torch.Generator().manual_seed(3))
    index, _ = build_key_index(keys, 16)
    numbers = index.transpose(1, 2).flatten(1, 2).float()
    ours = expanded(*build_coarse_index(index, 4096)).transpose(1, 2).flatten(1, 2).float()
    blocks = numbers.unflatten(1, (-1, 64))
    low, high = blocks.amin(2, keepdim=True), blocks.amax(2, keepdim=True)
    ends = (((blocks - low) / (high - low) * 3).round() * (high - low) / 3 + low).flatten(1, 2)
    assert (ours - numbers).square().mean() < 0.7 * (ends - numbers).square().mean()
