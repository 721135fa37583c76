"""Products of int8 keys and queries: all ways give the same integers, and the fastest of the exact ones is used."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_contiguouskv.selection import KeyIndex, Scratch, chosen_products
from hf_contiguouskv.selection.indexed_keys import peaks_on_cpu
from hf_contiguouskv.selection.integer_products import (
    FLOAT32,
    FLOAT64,
    INT8,
    ProductChooser,
    ShapeClass,
    _Sample,
    candidates,
    fastest_product,
)

# This build may run `_int_mm` on instructions that saturate: then it is no candidate here, and nothing to compare.
INT8_IS_EXACT = _Sample(ShapeClass(64, 16, 1)).agrees(INT8)
EXACT = [
    pytest.param(INT8, marks=pytest.mark.skipif(not INT8_IS_EXACT, reason="this build's int8 product is wrong")),
    FLOAT32,
    FLOAT64,
]


def some_index(kv_heads, c, chunks, head_dim, rows, values="random", seed=0):
    """Index and queries of int8 in -127 to 127: random, all as large as can be, or as large with random signs."""
    generator = torch.Generator().manual_seed(seed)

    def integers(*shape):
        if values == "largest":
            return torch.full(shape, 127, dtype=torch.int8)
        drawn = torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator)
        return drawn if values == "random" else torch.where(drawn < 0, -127, 127).to(torch.int8)

    return integers(kv_heads, c, chunks, head_dim), integers(kv_heads, rows, head_dim)


def maxima(product, index, queries, scratch=None):
    out = torch.empty(index.shape[0], index.shape[2], queries.shape[1], dtype=product.dtype)
    product.maxima(index, queries, Scratch() if scratch is None else scratch, out)
    return out


def slow_maxima(index, queries):
    """By sums of int64, one KV head at a time."""
    tokens = [torch.mm(keys.flatten(0, 1).long(), q.long().mT) for keys, q in zip(index, queries, strict=True)]
    return torch.stack(tokens).unflatten(1, index.shape[1:3]).amax(1)


@pytest.mark.parametrize("product", EXACT)
@pytest.mark.parametrize("values", ["random", "largest", "signs"])
@settings(deadline=None, max_examples=40)
@given(
    kv_heads=st.integers(1, 3),
    c=st.integers(1, 32),
    chunks=st.integers(1, 600),
    head_dim=st.integers(1, 32).map(lambda eighths: 8 * eighths),
    rows=st.integers(1, 96),
    seed=st.integers(0, 2**31),
)
def test_every_product_gives_the_integers_of_a_sum_in_int64(product, values, kv_heads, c, chunks, head_dim, rows, seed):
    chunks = min(chunks, max(1, 2**22 // (kv_heads * c * head_dim * rows)))  # Sums of int64 are slow.
    index, queries = some_index(kv_heads, c, chunks, head_dim, rows, values, seed)
    assert torch.equal(maxima(product, index, queries).long(), slow_maxima(index, queries))


@pytest.mark.parametrize("product", EXACT)
@pytest.mark.parametrize(("c", "chunks", "head_dim", "rows"), [(16, 600, 64, 48), (32, 500, 256, 96), (1, 600, 8, 1)])
def test_large_shapes_that_are_multiplied_in_pieces_give_the_same_peaks(product, c, chunks, head_dim, rows):
    generator = torch.Generator().manual_seed(1)
    part = KeyIndex.of(torch.randn(2, c * chunks, head_dim, generator=generator), c)
    queries = torch.randn(2, rows, head_dim, generator=generator).numpy()
    found, expected = torch.empty(chunks, 2, rows), torch.empty(chunks, 2, rows)
    peaks_on_cpu(queries, part, 0.125, Scratch(), Scratch(), expected.numpy(), FLOAT64)
    peaks_on_cpu(queries, part, 0.125, Scratch(), Scratch(), found.numpy(), product)
    assert torch.equal(found, expected)
    peaks_on_cpu(queries, part, 0.125, Scratch(), Scratch(), found.numpy())
    assert torch.equal(found, expected), "whichever product was chosen"


@pytest.mark.parametrize("product", EXACT)
@pytest.mark.parametrize("scratch_bytes", [1, 3000, 2 * 6 * 100 * 4, 2**22])
def test_maxima_do_not_depend_on_how_much_is_multiplied_at_a_time(monkeypatch, product, scratch_bytes):
    index, queries = some_index(2, 4, 100, 8, 6)
    monkeypatch.setattr("hf_contiguouskv.selection.integer_products.SCRATCH_BYTES", scratch_bytes)
    scratch = Scratch()
    assert torch.equal(maxima(product, index, queries, scratch).long(), slow_maxima(index, queries))
    smallest = 6 * 100 * 4 if product is INT8 else 4 * (8 + 6) * product.dtype.itemsize
    assert len(scratch._memory) <= max(scratch_bytes, smallest)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_a_lower_precision_of_float32_products_leaves_integers_exact(precision):
    index, queries = some_index(1, 16, 100, 64, 48)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        assert torch.equal(maxima(FLOAT32, index, queries).long(), slow_maxima(index, queries))
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("values", ["largest", "signs"])
def test_float32_is_exact_up_to_1040_channels_and_not_used_beyond(values):
    assert candidates(1040) == (INT8, FLOAT32)
    assert candidates(1041) == (INT8, FLOAT64)
    for head_dim in (1040, 1041, 4096):
        index, queries = some_index(1, 2, 5, head_dim, 3, values)
        assert torch.equal(maxima(candidates(head_dim)[1], index, queries).long(), slow_maxima(index, queries))


@pytest.mark.parametrize("begun_in_inference_mode", [True, False])
def test_sample_and_scratch_are_used_in_and_out_of_inference_mode(begun_in_inference_mode):
    chooser, scratch = ProductChooser(), Scratch()
    index, queries = some_index(1, 4, 5, 8, 3)
    for inference in (begun_in_inference_mode, not begun_in_inference_mode):
        with torch.inference_mode(inference):
            chooser.fastest(8, 3)
            for product in candidates(8):
                assert torch.equal(maxima(product, index, queries, scratch).long(), slow_maxima(index, queries))


def test_scratch_memory_is_shared_and_grows():
    scratch = Scratch()
    with torch.inference_mode():
        first = scratch.of(2, 3)
    assert (first.shape, first.dtype) == ((2, 3), torch.int32)
    assert not scratch._memory.is_inference(), "it outlives the mode"
    assert scratch.of(6).data_ptr() == scratch.of(1, 3, dtype=torch.float64).data_ptr() == first.data_ptr()
    assert scratch.of(100, dtype=torch.float32).shape == (100,)


class Clock:
    """A clock that only products move."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Timed:
    """An exact product that takes the seconds it is told, one turn after the other (the last ones for ever)."""

    dtype = FLOAT64.dtype

    def __init__(self, name, clock, *seconds, error=0.0, raises=None):
        self.name = name
        self.runs = 0
        self._clock, self._seconds, self._error, self._raises = clock, list(seconds), error, raises

    def maxima(self, index, queries, scratch, out):
        if self._raises is not None:
            raise self._raises
        FLOAT64.maxima(index, queries, scratch, out)
        out[0, 0, 0] += self._error
        # Whether it is exact is found by one chunk of all tokens, and is not timed.
        if index.shape[1] > 1:
            self.runs += 1
            self._clock.now += self._seconds.pop(0) if len(self._seconds) > 1 else self._seconds[0]


def chooser_among(clock, *products):
    return ProductChooser(lambda head_dim: products, clock)


@pytest.mark.parametrize("slow_first", [True, False])
def test_the_fastest_is_chosen(slow_first):
    clock = Clock()
    products = [Timed("slow", clock, 2.0), Timed("fast", clock, 1.0)]
    chooser = chooser_among(clock, *(products if slow_first else products[::-1]))
    assert chooser.chosen() == {}
    assert chooser.fastest(64, 48).name == "fast"
    assert chooser.chosen() == {ShapeClass(64, 64, torch.get_num_threads()): "fast"}


def test_noise_does_not_replace_the_first_candidate():
    clock = Clock()
    first, other = Timed("first", clock, 1.0), Timed("other", clock, 0.8, 0.8, 0.7)
    chooser = chooser_among(clock, first, other)
    assert [chooser.fastest(64, 48).name for _ in range(4)] == ["first", "first", "first", "other"]


@pytest.mark.parametrize("fault", [{"error": 1.0}, {"raises": RuntimeError("no kernel")}, {"raises": TypeError("?")}])
def test_a_fast_product_that_is_wrong_or_missing_is_not_chosen(fault):
    clock = Clock()
    chooser = chooser_among(clock, Timed("faulty", clock, 0.1, **fault), Timed("right", clock, 5.0))
    assert {chooser.fastest(64, 48).name for _ in range(5)} == {"right"}


def test_where_every_product_fails_float64_is_left():
    clock = Clock()
    assert chooser_among(clock, Timed("wrong", clock, 1.0, error=-1.0)).fastest(64, 1) is FLOAT64


@pytest.mark.skipif(not hasattr(torch, "_int_mm"), reason="this build has no integer product at all")
def test_saturated_sums_are_noticed(monkeypatch):
    """What the integer product of older builds gives on a processor without VNNI: pairs of products end at 16 bits."""

    def saturating(keys, queries, out):
        pairs = (keys.int()[:, :, None] * queries.int()).unflatten(1, (-1, 2)).sum(2)
        out.copy_(pairs.clamp(-(2**15), 2**15 - 1).sum(1))

    monkeypatch.setattr(torch, "_int_mm", saturating)
    for rows in (1, 7, 48):
        assert ProductChooser().fastest(64, rows) is FLOAT32
    assert ProductChooser().fastest(2048, 3) is FLOAT64


def test_a_build_without_an_integer_product_uses_float32(monkeypatch):
    monkeypatch.delattr(torch, "_int_mm", raising=False)
    assert ProductChooser().fastest(64, 48) is FLOAT32


def test_shapes_are_measured_once_per_class_and_number_of_threads(monkeypatch):
    clock = Clock()
    products = [Timed("a", clock, 1.0), Timed("b", clock, 2.0)]
    chooser = chooser_among(clock, *products)
    for queries in (33, 48, 64):
        chooser.fastest(64, queries)
    chooser.fastest(64, 65)
    chooser.fastest(128, 48)
    chooser.fastest(64, 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 999)
    chooser.fastest(64, 48)
    threads = {shapes.threads for shapes in chooser.chosen()} - {999}
    assert set(chooser.chosen()) == {
        *(ShapeClass(*shape, *threads) for shape in [(64, 64), (64, 128), (128, 64), (64, 1)]),
        ShapeClass(64, 64, 999),
    }


def test_a_disturbed_measurement_is_put_right_by_later_ones():
    clock = Clock()
    chooser = chooser_among(clock, Timed("loops", clock, 2.0), Timed("fast", clock, 30.0, 25.0, 1.0, 50.0))
    assert [chooser.fastest(64, 48).name for _ in range(20)] == ["loops"] * 3 + ["fast"] * 17


@pytest.mark.parametrize(("calls", "turns"), [(1, 1), (2, 2), (3, 2), (8, 4), (256, 9), (511, 9), (768, 11)])
def test_timing_again_becomes_rare(calls, turns):
    clock = Clock()
    product = Timed("a", clock, 1.0)
    chooser = chooser_among(clock, product, Timed("b", clock, 2.0))
    for _ in range(calls):
        chooser.fastest(8, 1)
    assert product.runs == turns


def test_an_only_product_is_not_timed():
    clock = Clock()
    product = Timed("a", clock, 1.0)
    chooser = chooser_among(clock, product)
    assert [chooser.fastest(8, 1) for _ in range(4)] == [product] * 4
    assert product.runs == 0


def test_threads_that_meet_a_class_at_the_same_time_begin_it_once():
    clock, together, found, begun = Clock(), threading.Barrier(4), [], []

    def candidates_after_a_while(head_dim):
        begun.append(head_dim)
        time.sleep(0.05)  # The other threads come to wait for this one.
        return Timed("slow", clock, 2.0), Timed("fast", clock, 1.0)

    chooser = ProductChooser(candidates_after_a_while, clock)

    def choose():
        together.wait()
        found.append(chooser.fastest(64, 48).name)

    threads = [threading.Thread(target=choose, name=f"choose-{i}") for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["fast"] * 4
    assert begun == [64]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_measuring_leaves_random_numbers_alone_and_stays_on_the_cpu(device):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    with torch.device(device):
        product = ProductChooser().fastest(16, 5)
    assert product in {INT8, FLOAT32}
    assert torch.equal(torch.rand(3), expected)


def test_what_a_process_has_chosen_can_be_read():
    product = fastest_product(24, 3)
    assert chosen_products()[ShapeClass(24, 4, torch.get_num_threads())] in {"int8", "float32"}
    assert product.name in {"int8", "float32"}
