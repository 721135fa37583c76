"""Single tokens: choosing the best, scoring them one by one, and placing them as whole chunks are placed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_contiguouskv.loading.placement import put
from hf_contiguouskv.loading.token_placement import place_token_keys, place_tokens
from hf_contiguouskv.model.kv_geometry import KVGeometry
from hf_contiguouskv.selection import (
    CoarseIndex,
    IndexedKeysScorer,
    KeyIndex,
    SelectionInput,
    choose_tokens,
    indexed_keys,
)
from hf_contiguouskv.selection.integer_products import FLOAT32, FLOAT64, INT8, IntegerProduct, Scratch
from hf_contiguouskv.store.attached_prefix import AttachedPrefix, Chunks
from hf_contiguouskv.store.extents import Form
from hf_contiguouskv.store.packing import pack_chunks, pack_values

C = 4


@given(st.data())
def test_the_best_tokens_are_chosen(data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, 1000), min_size=1, max_size=50, unique=True))
    importance = [data.draw(st.floats(-20, 0, width=32)) for _ in tokens]
    keep = data.draw(st.integers(1, len(tokens)))
    found = choose_tokens(torch.tensor(importance), np.array(tokens), keep).tolist()
    assert found == sorted(set(found))
    assert len(found) == keep
    score = dict(zip(tokens, importance, strict=True))
    assert sorted((score[token] for token in found), reverse=True) == sorted(importance, reverse=True)[:keep]


def test_numbers_that_are_not_finite_come_last() -> None:
    importance = torch.tensor([float("nan"), 0.5, 0.25, float("nan")])
    assert choose_tokens(importance, np.arange(4), 2).tolist() == [1, 2]


def some_keys(tokens: int, seed: int) -> torch.Tensor:
    return torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("pieces", [False, True])
@pytest.mark.parametrize("on_device", [False, True])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_tokens_are_scored_beside_chunks(
    on_device: bool, softcap: float | None, pieces: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two segments, the second one with keys of another size; at once and in pieces of a few tokens."""
    if pieces:
        monkeypatch.setattr(indexed_keys, "SCRATCH_BYTES", 500)
        monkeypatch.setattr(indexed_keys, "BYTES_AT_ONCE", 500)
    segments = [some_keys(20, 1), 3 * some_keys(17, 2)]
    parts = [KeyIndex.of(keys, C) for keys in segments]
    scorer = IndexedKeysScorer(parts, 9, 2.0, on_device=on_device, keeps_queries=True)
    chunks = np.array([0, 3, 4, 5, 8])
    queries = torch.randn(1, 6, 5, 8, generator=torch.Generator().manual_seed(3))
    voters = torch.tensor([1, 2, 4])
    inputs = SelectionInput(
        queries, torch.zeros(1, 2, 5, 8), [voters], torch.ones(1, 5, dtype=torch.bool), 0.3, softcap
    )
    scorer(inputs)
    found, tokens = scorer.of_tokens(0, chunks)
    assert sorted(tokens.tolist()) == [token for chunk in chunks for token in range(chunk * C, chunk * C + C)]
    keys = torch.cat(
        [
            (part.numbers.float() * part.scale[:, None, None]).transpose(1, 2).flatten(1, 2)[:, : len(kv[0])]
            for part, kv in zip(parts, segments, strict=True)
        ],
        dim=1,
    )
    logits = torch.einsum("hgqd,htd->hgqt", queries[0][:, voters].unflatten(0, (2, 3)), keys) * 0.3
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    # Beside the strongest token of each whole chunk (the last one is partial).
    strongest = logits[..., : 9 * C].unflatten(-1, (9, C)).amax(-1)
    expected = (logits[..., tokens] - strongest.logsumexp(-1, keepdim=True)).amax((0, 1, 2))
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.05)
    assert set(found.topk(5).indices.tolist()) <= set(expected.topk(7).indices.tolist())


def test_a_tokens_share_is_that_of_its_chunk() -> None:
    """With one token in each chunk, and one head and query."""
    scorer = IndexedKeysScorer([KeyIndex.of(some_keys(30, 1)[:1], 1)], 30, 1.0, keeps_queries=True)
    inputs = SelectionInput(
        torch.randn(1, 1, 1, 8), torch.zeros(1, 1, 1, 8), [torch.arange(1)], torch.ones(1, 1, dtype=torch.bool), 0.3
    )
    of_chunks = scorer(inputs).importance[0]
    of_tokens, tokens = scorer.of_tokens(0, np.arange(30))
    assert tokens.tolist() == list(range(30))
    torch.testing.assert_close(of_tokens.exp(), of_chunks)


def test_an_index_in_two_bits_is_refused() -> None:
    scorer = IndexedKeysScorer([CoarseIndex.of(some_keys(64, 1), 16)], 4, 2.0, keeps_queries=True)
    ones = torch.ones(1, 5, dtype=torch.bool)
    inputs = SelectionInput(torch.randn(1, 6, 5, 8), torch.zeros(1, 2, 5, 8), [torch.arange(5)], ones, 0.3)
    scorer(inputs)
    with pytest.raises(TypeError, match="8 bits, not from CoarseIndex"):
        scorer.of_tokens(0, np.array([0]))


@pytest.mark.parametrize("product", [INT8, FLOAT32, FLOAT64], ids=lambda product: product.name)
def test_every_way_to_multiply_gives_the_same_products(product: IntegerProduct) -> None:
    generator = torch.Generator().manual_seed(6)
    keys = torch.randint(-127, 128, (2, 40, 64), dtype=torch.int8, generator=generator)
    queries = torch.randint(-127, 128, (2, 7, 64), dtype=torch.int8, generator=generator)
    for some in (keys, keys[:, 3:20]):  # (Some tokens of all heads.)
        found = product.products(some, queries, Scratch())
        assert torch.equal(found.long(), some.long() @ queries.long().mT)


@dataclass
class Part:
    """Chunks that have arrived."""

    chunks: Chunks
    octets: torch.Tensor

    def extents(self, take: Chunks | None) -> torch.Tensor:
        return self.octets if take is None else self.octets[torch.from_numpy(take)]


@dataclass
class Span:
    """Where a segment lies in a prefix."""

    first_chunk: int
    chunks: int


def prefix_of(form: Form, chunks: int, spans: tuple[Span, ...] = ()) -> AttachedPrefix:
    g = KVGeometry(num_layers=1, kv_heads=2, head_dim=8, dtype=torch.float32, chunk_size=C)
    return AttachedPrefix(chunks * C, spans, g, form)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["exact", "packed", "compact"])
def test_tokens_are_placed_as_their_chunks_are(form: Form) -> None:
    """In two parts, in any order, of which one has a chunk that nothing is taken from."""
    prefix, chunks = prefix_of(form, 10), np.array([7, 2, 9, 4, 0])
    kv = torch.randn(5, 2, 2, C, 8, generator=torch.Generator().manual_seed(4))
    octets = {
        "exact": kv.flatten(1).view(torch.uint8),
        "packed": pack_values(kv[:, 1]),
        "compact": pack_chunks("compact", kv),
    }[form]
    whole = torch.zeros(2, 1, 2, 5, C, 8)
    put(prefix, octets, np.array([3, 1, 4, 2, 0]), whole)  # (Scattered, so in the order of the text.)
    tokens = np.array([0, 3, 9, 10, 18, 29, 30, 31])
    found = torch.zeros(2, 2, len(tokens), 8)
    for some in ([0, 1, 4], [2, 3]):
        place_tokens(prefix, Part(chunks[some], octets[some]), tokens, found)  # type: ignore[arg-type]
    order = {0: 0, 2: 1, 4: 2, 7: 3, 9: 4}
    for place, token in enumerate(tokens.tolist()):
        assert torch.equal(found[:, :, place], whole[:, 0, :, order[token // C], token % C])
    assert bool(found[0].any()) == (form != "packed")


def test_tokens_of_other_chunks_are_left_alone() -> None:
    prefix = prefix_of("packed", 10)
    octets = pack_values(torch.randn(1, 2, C, 8))
    found = torch.full((2, 2, 2, 8), 7.0)
    place_tokens(prefix, Part(np.array([5]), octets), np.array([3, 39]), found)  # type: ignore[arg-type]
    assert bool((found == 7.0).all())


@pytest.mark.parametrize("head_dim", [8, 6])
def test_keys_come_from_the_index_of_their_segment(head_dim: int) -> None:
    keys = torch.randn(2, 37, head_dim, generator=torch.Generator().manual_seed(5))
    parts = [KeyIndex.of(keys[:, :20], C), KeyIndex.of(5 * keys[:, 20:], C)]
    prefix = prefix_of("packed", 9, (Span(0, 5), Span(5, 5)))
    tokens = np.array([0, 1, 7, 19, 20, 22, 35])
    found = torch.empty(2, len(tokens), head_dim)
    place_token_keys(prefix, parts, tokens, found)
    for place, token in enumerate(tokens.tolist()):
        part, own = (parts[0], token) if token < 20 else (parts[1], token - 20)
        assert torch.equal(found[:, place], part.numbers[:, own % C, own // C] * part.scale)
