"""Choosing chunks: the scorers against slow loops, and the rule that picks the best ones."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_contiguouskv.selection import (
    AttentionMassScorer,
    IndexedKeysScorer,
    KeyIndex,
    SelectionInput,
    choose_chunks,
    device_products,
    voting_queries,
)
from hf_contiguouskv.selection.device_products import FloatUnits, IntegerUnits
from hf_contiguouskv.selection.indexed_keys import Scratch, peaks_on_cpu, peaks_on_device


def some_input(rows=2, heads=4, kv_heads=2, q=5, head_dim=8, seed=0, **changes):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    real = torch.ones(rows, q, dtype=torch.bool)
    fields = {
        "queries": normal(rows, heads, q, head_dim),
        "suffix_keys": normal(rows, kv_heads, q, head_dim),
        "voters": [torch.arange(q)] * rows,
        "visible": real,
        "scaling": head_dim**-0.5,
    }
    return SelectionInput(**(fields | changes))


def keys_of(tokens, kv_heads=2, head_dim=8, seed=9):
    return torch.randn(kv_heads, tokens, head_dim, generator=torch.Generator().manual_seed(seed))


def slow_importance(inputs, prefix_keys, chunk_size, power=1.0):
    """The published formula in Python loops: one softmax at a time, in float64."""
    rows, heads, _, _ = inputs.queries.shape
    kv_heads, tokens, _ = prefix_keys.shape
    whole = tokens // chunk_size
    result = torch.zeros(rows, whole, dtype=torch.float64)
    for row in range(rows):
        for i in inputs.voters[row].tolist():
            for head in range(heads):
                kv_head = head // (heads // kv_heads)
                query = inputs.queries[row, head, i].double()
                seen = [j for j in range(i + 1) if inputs.visible[row, j]]
                everything = torch.cat([prefix_keys[kv_head], inputs.suffix_keys[row, kv_head, seen]]).double()
                logits = everything @ query * inputs.scaling
                if inputs.softcap is not None:
                    logits = torch.tanh(logits / inputs.softcap) * inputs.softcap
                weights = torch.softmax(logits, 0)
                for chunk in range(whole):
                    mass = weights[chunk * chunk_size : (chunk + 1) * chunk_size].sum()
                    result[row, chunk] += mass**power / heads
    return result.float()


@pytest.mark.parametrize("tokens", [32, 37])
@pytest.mark.parametrize("votes", [None, 2])
@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_attention_mass_is_the_published_formula(tokens, votes, power, softcap):
    voters = [voting_queries(torch.ones(5, dtype=torch.bool), votes)] * 2
    inputs, keys = some_input(softcap=softcap, voters=voters), keys_of(tokens)
    importance, mass = AttentionMassScorer(keys, 4, power)(inputs)
    torch.testing.assert_close(importance, slow_importance(inputs, keys, 4, power), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mass, slow_importance(inputs, keys, 4), rtol=1e-5, atol=1e-6)


def test_padding_and_drafts_neither_vote_nor_are_seen():
    voters = [torch.tensor([2, 3]), torch.arange(5)]
    visible = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]], dtype=torch.bool)
    inputs, keys = some_input(voters=voters, visible=visible), keys_of(32)
    fast = AttentionMassScorer(keys, 4)(inputs).importance
    torch.testing.assert_close(fast, slow_importance(inputs, keys, 4), rtol=1e-5, atol=1e-6)


def test_a_long_suffix_is_scored_in_pieces(monkeypatch):
    inputs, keys = some_input(), keys_of(32)
    whole = AttentionMassScorer(keys, 4, 2.0)(inputs)
    monkeypatch.setattr("hf_contiguouskv.selection.attention_mass.LOGITS_AT_ONCE", 3 * 37)
    torch.testing.assert_close(AttentionMassScorer(keys, 4, 2.0)(inputs), whole)


def test_large_logits_do_not_overflow():
    inputs, keys = some_input(scaling=300.0), keys_of(32)
    assert torch.isfinite(AttentionMassScorer(keys, 4)(inputs).importance).all()


def test_a_row_of_padding_lets_its_last_query_vote():
    assert voting_queries(torch.zeros(4, dtype=torch.bool), None).tolist() == [3]
    assert voting_queries(torch.tensor([True, True, False, True]), 2).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("real", "votes", "recent", "expected"),
    [
        (32, 8, 2, [2, 7, 12, 17, 22, 27, 30, 31]),
        (9, 8, 2, [0, 1, 2, 4, 5, 6, 7, 8]),
        (32, 8, 0, [2, 6, 10, 14, 18, 22, 26, 30]),
        (32, 8, 8, list(range(24, 32))),
        (32, 8, 100, list(range(24, 32))),
        (32, 8, None, list(range(24, 32))),
        (32, 1, 2, [31]),
        (8, 8, 2, list(range(8))),
        (3, 8, 2, [0, 1, 2]),
        (32, None, 2, list(range(32))),
    ],
)
@pytest.mark.parametrize("padding", [0, 5])
def test_voters_are_the_last_queries_and_others_spread_over_what_is_before(real, votes, recent, expected, padding):
    voting = torch.ones(padding + real, dtype=torch.bool)
    voting[:padding] = False
    assert voting_queries(voting, votes, recent).tolist() == [padding + position for position in expected]


@given(real=st.integers(1, 300), votes=st.integers(1, 40), recent=st.integers(0, 45))
def test_voters_are_as_many_as_may_be_each_once_in_order_and_the_same_everywhere(real, votes, recent):
    found = voting_queries(torch.ones(real, dtype=torch.bool), votes, recent)
    assert len(found) == min(real, votes)
    assert (found.diff() > 0).all()
    last = min(recent, votes, real)
    assert found[len(found) - last :].tolist() == list(range(real - last, real))
    gaps = found[: len(found) - last].diff()
    if real > votes and len(gaps):
        assert gaps.max() - gaps.min() <= 1, "spread evenly"


@pytest.mark.parametrize("tokens", [32, 35])
def test_the_index_is_a_close_copy_of_the_keys(tokens):
    keys = keys_of(tokens)
    index, scale = KeyIndex.of(keys, 4)
    assert index.shape == (2, 4, math.ceil(tokens / 4), 8)
    restored = (index.float() * scale[:, None, None]).transpose(1, 2).reshape(2, -1, 8)[:, :tokens]
    assert (restored - keys).abs().max() <= scale.max() / 2 + 1e-6
    assert (index.transpose(1, 2).reshape(2, -1, 8)[:, tokens:] == 0).all()


def test_a_channel_of_zeros_does_not_divide_by_zero():
    keys = keys_of(16)
    keys[:, :, 3] = 0
    index, scale = KeyIndex.of(keys, 4)
    assert (index[..., 3] == 0).all()
    assert torch.isfinite(scale).all()


def test_chunk_peaks_come_close_to_the_exact_maximum():
    keys, queries = keys_of(64), torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(3))
    exact = torch.bmm(queries, keys.mT).unflatten(-1, (16, 4)).amax(-1) * 0.5
    part = KeyIndex.of(keys, 4)
    integers = torch.empty(16, 2, 6)
    peaks_on_cpu(queries.numpy(), part, 0.5, Scratch(), Scratch(), integers.numpy())
    for peaks in (integers.permute(1, 2, 0), peaks_on_device(queries, part, 0.5)[0]):
        assert peaks.dtype == torch.float32
        assert (peaks - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize(("head_dim", "votes"), [(8, 3), (64, 16), (96, 1), (128, 16), (1100, 2)])
def test_a_device_finds_the_very_peaks_of_a_cpu(head_dim, votes):
    generator = torch.Generator().manual_seed(head_dim)
    keys = torch.randn(2, 333, head_dim, generator=generator) * torch.rand(head_dim, generator=generator) * 9
    queries = torch.randn(2, 7 * votes, head_dim, generator=generator).exp()
    queries[0, 0] = 0
    part = KeyIndex.of(keys, 16)
    expected = torch.empty(21, 2, 7 * votes)
    peaks_on_cpu(queries.numpy(), part, 0.0883, Scratch(), Scratch(), expected.numpy())
    assert torch.equal(peaks_on_device(queries, part, 0.0883)[0], expected.permute(1, 2, 0))


@pytest.mark.parametrize("product", [IntegerUnits(), FloatUnits(torch.float32), FloatUnits(torch.float64)])
@pytest.mark.parametrize("chunks", [1, 37])
@pytest.mark.parametrize("at_once", [2**26, 2**12])
def test_a_devices_products_are_whole_numbers_and_right(monkeypatch, product, chunks, at_once):
    monkeypatch.setattr(device_products, "BYTES_AT_ONCE", at_once)
    generator = torch.Generator().manual_seed(chunks)
    index = torch.randint(-127, 128, (2, 16, chunks, 64), dtype=torch.int8, generator=generator)
    queries = torch.randint(-127, 128, (2, 13, 64), dtype=torch.int8, generator=generator)
    products = torch.einsum("hcnd,hqd->hqcn", index.long(), queries.long())
    found = product.maxima(index, queries)
    assert torch.equal(found.long(), products.amax(2))
    assert torch.equal(found, found.round())


def test_the_matrix_units_are_asked_for_float32_sums(monkeypatch):
    """A CPU has no such product; what would be called is replaced by what it computes."""
    asked, real = [], torch.bmm

    def bmm(factors, keys, out_dtype):
        asked.append((factors.dtype, keys.dtype, out_dtype))
        return real(factors.float(), keys.float())

    monkeypatch.setattr(torch, "bmm", bmm)
    product = FloatUnits(torch.bfloat16, torch.float32)
    assert device_products._is_exact(product, torch.device("cpu"), 128)
    assert asked == [(torch.bfloat16, torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
@pytest.mark.parametrize("exact", ["matrix units", "integer units", "neither"])
def test_the_first_product_that_is_exact_is_used(monkeypatch, capability, exact):
    def is_exact(product, device, head_dim):
        return exact == ("integer units" if isinstance(product, IntegerUnits) else "matrix units")

    monkeypatch.setattr(device_products, "_is_exact", is_exact)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = device_products._first_exact(torch.device("cuda", 0), 128)
    half = "bfloat16" if capability >= (8, 0) else "float16"
    assert found.name == {"matrix units": half, "integer units": "int8", "neither": "float32"}[exact]
    assert device_products._first_exact(torch.device("cpu"), 128).name == "float32"
    assert device_products._first_exact(torch.device("cuda", 0), 1100).name == "float64"


@pytest.mark.parametrize("wrong", [False, True])
def test_a_product_that_is_not_exact_is_not_used(monkeypatch, wrong):
    product = IntegerUnits()
    if wrong:
        right = product.maxima
        monkeypatch.setattr(product, "maxima", lambda index, queries: right(index, queries) // 2 * 2)
    assert device_products._is_exact(product, torch.device("cpu"), 64) is not wrong


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("softcap", [None, 0.7])
@pytest.mark.parametrize("scaling", [0.35, 6.0])
def test_a_cpu_and_a_device_choose_the_chunks_that_float64_chooses(power, softcap, scaling):
    voters = [torch.tensor([1, 2, 4]), torch.tensor([3])]
    inputs, keys = some_input(voters=voters, softcap=softcap, scaling=scaling), keys_of(67)
    parts = [KeyIndex.of(keys[:, :20], 4), KeyIndex.of(keys[:, 20:], 4)]
    scorer = IndexedKeysScorer(parts, 16, power)
    for row, (importance, mass) in enumerate(zip(*scorer(inputs), strict=True)):
        other = scorer._row_on_device(inputs, row)
        torch.testing.assert_close(importance, other.importance, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(mass, other.mass, rtol=1e-5, atol=1e-7)
        exact = slow_indexed_importance(inputs, row, parts, 16, power)
        torch.testing.assert_close(importance.double(), exact, rtol=1e-4, atol=1e-7)
        for keep in (1, 4, 11):
            chosen = [choose_chunks(one[None], keep, 0, 0) for one in (importance, other.importance, exact)]
            assert torch.equal(chosen[0], chosen[1])
            assert torch.equal(chosen[0], chosen[2])


def slow_indexed_importance(inputs, row, parts, whole, power):
    """From the rounded queries and keys on, in float64 and in loops."""
    heads, kv_heads = inputs.queries.shape[1], parts[0][0].shape[0]
    result = torch.zeros(whole, dtype=torch.float64)
    for head in range(heads):
        for voter in inputs.voters[row].tolist():
            peaks = []
            for index, scale in parts:
                own = head // (heads // kv_heads)
                query = inputs.queries[row, head, voter] * scale[own]
                step = query.abs().max() / 127
                rounded = (query / step).round().double()
                products = torch.einsum("cnd,d->cn", index[own].double(), rounded)
                peaks.append(products.amax(0) * step.double() * inputs.scaling)
            logits = torch.cat(peaks)[:whole]
            if inputs.softcap is not None:
                logits = torch.tanh(logits / inputs.softcap) * inputs.softcap
            result += torch.softmax(logits, 0) ** power
    return result / (heads if power == 1.0 else 1)


def test_queries_that_require_a_gradient_are_scored_all_the_same():
    """Outside of `no_grad`, a model in float32 hands out tensors of that kind."""
    inputs, keys = some_input(), keys_of(32)
    inputs.queries.requires_grad_()
    with torch.no_grad():
        scores = IndexedKeysScorer([KeyIndex.of(keys, 4)], 8, 2.0)(inputs)
    assert not scores.importance.requires_grad


def test_scores_of_very_large_and_of_no_logits_are_numbers():
    inputs, keys = some_input(scaling=1e6), keys_of(32)
    assert torch.isfinite(IndexedKeysScorer([KeyIndex.of(keys, 4)], 8, 2.0)(inputs).importance).all()
    inputs = some_input(queries=torch.zeros(1, 4, 5, 8), rows=1)
    importance, mass = IndexedKeysScorer([KeyIndex.of(keys, 4)], 8, 2.0)(inputs)
    torch.testing.assert_close(mass, torch.full((1, 8), 5 / 8))
    torch.testing.assert_close(importance, torch.full((1, 8), 20 / 64))


def test_segments_are_scored_as_one_prefix():
    inputs, keys = some_input(), keys_of(48)
    whole = IndexedKeysScorer([KeyIndex.of(keys, 4)], 12, 2.0)(inputs)
    parts = [KeyIndex.of(keys[:, :20], 4), KeyIndex.of(keys[:, 20:], 4)]
    torch.testing.assert_close(IndexedKeysScorer(parts, 12, 2.0)(inputs), whole, rtol=0.2, atol=0.05)


@pytest.mark.parametrize("power", [1.0, 2.0, 3.0])
@pytest.mark.parametrize("rows", [1, 2])
def test_the_mass_from_an_index_is_what_each_voter_spreads_whatever_the_emphasis(power, rows):
    voters = [torch.tensor([1, 2, 4]), torch.tensor([3])][:rows]
    inputs, keys = some_input(rows=rows, voters=voters), keys_of(64)
    importance, mass = IndexedKeysScorer([KeyIndex.of(keys, 4)], 16, power)(inputs)
    assert importance.shape == mass.shape == (rows, 16)
    torch.testing.assert_close(mass.sum(-1), torch.tensor([3.0, 1.0])[:rows])
    # The softmax over the chunks' best logits, by hand.
    for row in range(rows):
        queries = inputs.queries[row][:, voters[row]].unflatten(0, (2, 2)).flatten(1, 2)
        best = torch.bmm(queries, keys.mT).unflatten(-1, (16, 4)).amax(-1) * inputs.scaling
        share = torch.softmax(best, -1).flatten(0, 1)
        torch.testing.assert_close(mass[row], share.sum(0) / 4, rtol=0.1, atol=0.02)
        emphasised = mass[row] if power == 1.0 else share.pow(power).sum(0)
        torch.testing.assert_close(importance[row], emphasised, rtol=0.2, atol=0.02)


def test_an_obvious_needle_is_found_by_both_scorers():
    inputs, keys = some_input(rows=1), keys_of(64) * 0.1
    keys[:, 41] = inputs.queries[0, :, -1].unflatten(0, (2, 2)).sum(1) * 5
    for scorer in (AttentionMassScorer(keys, 4), IndexedKeysScorer([KeyIndex.of(keys, 4)], 16, 2.0)):
        assert scorer(inputs).importance[0].argmax() == 10
        assert scorer(inputs).mass[0].argmax() == 10


@given(st.integers(1, 40), st.data())
@settings(deadline=None, max_examples=60)
def test_the_best_chunks_are_kept_with_both_ends(chunks, data):
    keep = data.draw(st.integers(1, chunks))
    first, last = data.draw(st.integers(0, 4)), data.draw(st.integers(0, 4))
    scores = torch.randn(2, chunks, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    before = scores.clone()
    chosen = choose_chunks(scores, keep, first, last)
    assert torch.equal(scores, before)
    assert chosen.shape == (2, keep)
    for row in range(2):
        kept = chosen[row].tolist()
        assert kept == sorted(set(kept))
        forced = list(dict.fromkeys([*range(min(first, chunks)), *range(max(0, chunks - last), chunks)]))
        assert set(forced[: min(first, chunks, keep)]) <= set(kept)
        if len(forced) <= keep:
            assert set(forced) <= set(kept)
            free = [c for c in range(chunks) if c not in forced]
            best = sorted(free, key=lambda c: -scores[row, c])[: keep - len(forced)]
            assert set(kept) == set(forced) | set(best)


@given(st.lists(st.sampled_from([0.0, 0.5, 1.0, -1.0, float("inf"), float("nan")]), min_size=1, max_size=12), st.data())
def test_of_equals_the_earlier_are_kept_and_what_is_no_number_goes_last(scores, data):
    keep = data.draw(st.integers(1, len(scores)))
    ranked = sorted(range(len(scores)), key=lambda j: (math.inf if math.isnan(scores[j]) else -scores[j], j))
    assert choose_chunks(torch.tensor([scores]), keep, 0, 0).tolist() == [sorted(ranked[:keep])]


def test_ties_go_to_the_earlier_chunk():
    assert choose_chunks(torch.zeros(1, 8), 3, 0, 0).tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_building_an_index_leaves_the_keys_alone_and_stays_in_range(dtype):
    keys = (keys_of(50) * 7).to(dtype)
    before = keys.clone()
    index, _ = KeyIndex.of(keys, 4)
    assert torch.equal(keys, before)
    assert -127 <= int(index.min()) <= int(index.max()) <= 127
