"""Exact products of int8 keys and int8 queries, by the method that is fastest on this processor.

PyTorch's integer product runs on the processor's VNNI instructions or, without them, in plain loops. For 7,936 keys and
48 queries of 64 channels, plain loops take 15 ms, float32 takes 0.6 ms and VNNI 0.2 ms. Float32 gives the same integers
in any order of summation, as long as no sum exceeds 2^24. The fastest method depends on the processor, the build of
PyTorch and the shape, so each process measures it for each class of shapes.

Each method is also checked before use: oneDNN's integer product saturates in 16 bits without VNNI, and PyTorch notices
only if the processor lacks the instructions, not if `ONEDNN_MAX_CPU_ISA` turns them off.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch

# A piece of this size stays in the processor's cache until its maximum is taken. In a single piece, choosing among
# 65,536 tokens took 2.5 times as long. Smaller pieces cost more calls: 1 MiB is a tenth slower.
SCRATCH_BYTES = 4 * 2**20
# Size of one product of a sample: it takes 6 ms in plain loops. An eighth of it was too small: between the layers of a
# model, where nothing of a sample is in the caches, both other products took 90 to 110 us, and two of six processes
# chose float32, although it is three times as slow at the sizes of requests.
MULTIPLICATIONS_PER_SAMPLE = 2**23
SAMPLE_CHUNK, SAMPLE_TOKENS = 16, (128, 8192)
# The first candidate is replaced only by one that takes less than this part of its time, so that noise replaces none.
CLEARLY_LESS = 0.75
# After many calls, timings repeat once in so many calls and take less than a hundredth of the work.
CALLS_BETWEEN_TURNS = 256


class Scratch:
    """Memory for products of keys and queries that all layers reuse, because allocating it costs more than the
    arithmetic on it."""

    def __init__(self) -> None:
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def of(self, *shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """An uninitialised CPU tensor of this shape and dtype; valid until the next call."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._memory) < size:
            with torch.inference_mode(False):
                self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._memory[:size].view(dtype).view(shape)


class IntegerProduct(Protocol):
    """One way to multiply keys and queries.

    Attributes:
        name: shown in reports.
        dtype: dtype of the products and their maxima.
    """

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def maxima(self, index: torch.Tensor, queries: torch.Tensor, scratch: Scratch, out: torch.Tensor) -> None:
        """The largest product in each chunk.

        Args:
            index: int8 `(kv_heads, c, chunks, head_dim)`, contiguous, values from -127 to 127.
            queries: int8 `(kv_heads, n, head_dim)`, contiguous, values from -127 to 127.
            scratch: memory for keys and products; about `SCRATCH_BYTES` are used.
            out: `dtype`, `(kv_heads, chunks, n)`, contiguous, is filled with integers.
        """
        ...

    def products(self, keys: torch.Tensor, queries: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """Every product.

        Args:
            keys: int8 `(kv_heads, tokens, head_dim)`, tokens contiguous, values from -127 to 127.
            queries: int8 `(kv_heads, n, head_dim)`, contiguous, values from -127 to 127.
            scratch: memory for keys and products.

        Returns:
            float32 `(kv_heads, tokens, n)`, contiguous, in `scratch`: may be overwritten.
        """
        ...


class Int8Product:
    """`torch._int_mm`: the fastest method if the processor has instructions for it."""

    name = "int8"
    dtype = torch.int32

    def maxima(self, index: torch.Tensor, queries: torch.Tensor, scratch: Scratch, out: torch.Tensor) -> None:
        """Read the keys in place, some tokens of all chunks at a time."""
        _, c, chunks, head_dim = index.shape
        rows = queries.shape[1]
        step = min(c, max(1, SCRATCH_BYTES // (chunks * rows * self.dtype.itemsize)))
        products = scratch.of(step, chunks, rows, dtype=self.dtype)
        more = torch.empty_like(out[0]) if step < c else None
        # Keys are the left factor, because a tall product with few columns is several times faster than its transpose.
        for keys, query, place in zip(index.unbind(0), queries.mT.unbind(0), out.unbind(0), strict=True):
            for begin in range(0, c, step):
                some = keys[begin : begin + step]
                block = products[: len(some)]
                torch._int_mm(some.view(-1, head_dim), query, out=block.view(-1, rows))
                if begin == 0:
                    torch.amax(block, 0, out=place)
                else:
                    torch.maximum(place, torch.amax(block, 0, out=more), out=place)

    def products(self, keys: torch.Tensor, queries: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """Read the keys in place."""
        integers, floats = scratch.of(2, *keys.shape[:2], queries.shape[1], dtype=self.dtype)
        for some, query, place in zip(keys.unbind(0), queries.mT.unbind(0), integers.unbind(0), strict=True):
            torch._int_mm(some, query, out=place)
        logits: torch.Tensor = floats.view(torch.float32).copy_(integers)
        return logits


class FloatProduct:
    """Converts keys to floating point piece by piece, and multiplies them.

    A lower `torch.set_float32_matmul_precision` changes nothing: factors up to 127 have 7 bits, and sums stay float32.

    Args:
        dtype: float32 or float64.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")

    def is_exact(self, head_dim: int) -> bool:
        """Whether `dtype` holds every sum of `head_dim` products exactly; float32 does for up to 1,040 products."""
        return head_dim * 127 * 127 * torch.finfo(self.dtype).eps <= 2

    def maxima(self, index: torch.Tensor, queries: torch.Tensor, scratch: Scratch, out: torch.Tensor) -> None:
        """Convert all tokens of some chunks at a time, so that each chunk needs only one maximum."""
        _, c, chunks, head_dim = index.shape
        rows = queries.shape[1]
        step = min(chunks, max(1, SCRATCH_BYTES // (c * (head_dim + rows) * self.dtype.itemsize)))
        memory = scratch.of(c * step * (head_dim + rows), dtype=self.dtype)
        # Not contiguous after `mT`: for few queries this is up to three times as fast as a contiguous copy.
        factors = queries.to(self.dtype).mT
        for keys, query, place in zip(index.unbind(0), factors.unbind(0), out.unbind(0), strict=True):
            for some, best in zip(keys.split(step, 1), place.split(step), strict=True):
                size = some.numel()
                converted = memory[:size].view(some.shape).copy_(some)
                products = memory[size : size + c * len(best) * rows].view(-1, rows)
                torch.mm(converted.view(-1, head_dim), query, out=products)
                torch.amax(products.view(c, -1, rows), 0, out=best)

    def products(self, keys: torch.Tensor, queries: torch.Tensor, scratch: Scratch) -> torch.Tensor:
        """Convert the keys first."""
        shape = *keys.shape[:2], queries.shape[1]
        memory = scratch.of(keys.numel() + math.prod(shape), dtype=self.dtype)
        converted = memory[: keys.numel()].view(keys.shape).copy_(keys)
        products = memory[keys.numel() :].view(shape)
        for some, query, place in zip(converted, queries.to(self.dtype).mT, products, strict=True):
            torch.mm(some, query, out=place)
        return products.float()


INT8, FLOAT32, FLOAT64 = Int8Product(), FloatProduct(torch.float32), FloatProduct(torch.float64)


def candidates(head_dim: int) -> tuple[IntegerProduct, ...]:
    """Products that may be the fastest, and that are exact unless the build is faulty."""
    return INT8, FLOAT32 if FLOAT32.is_exact(head_dim) else FLOAT64


class ShapeClass(NamedTuple):
    """A class of shapes that share one measurement.

    Attributes:
        head_dim: channels.
        queries: queries per KV head, rounded up to a power of two.
        threads: PyTorch's number of threads at the measurement.
    """

    head_dim: int
    queries: int
    threads: int


class ProductChooser:
    """Chooses the fastest product for each class of shapes. Thread-safe.

    A busy machine can distort any measurement, and plain loops are 20 times slower, so no choice is final: at the 1st,
    2nd, 4th, 8th, ... call every product is timed once more, and the shortest time of each counts. The first candidate
    stays unless another one is clearly faster.

    Args:
        candidates: the products to choose from, given the number of channels.
        clock: returns seconds. The default is the thread's own time, so that time spent on other threads does not
            count.
    """

    def __init__(
        self,
        candidates: Callable[[int], Sequence[IntegerProduct]] = candidates,
        clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._candidates = candidates
        self._clock = clock
        self._lock = threading.Lock()
        self._contests: dict[ShapeClass, _Contest] = {}

    def fastest(self, head_dim: int, queries: int) -> IntegerProduct:
        """The fastest product that is exact on this machine.

        The first call for a class of shapes takes a few milliseconds longer; a call that repeats the timing takes less
        than a millisecond longer.

        Args:
            head_dim: channels.
            queries: queries per KV head, all its query heads together.
        """
        shapes = ShapeClass(head_dim, 1 << (queries - 1).bit_length(), torch.get_num_threads())
        contest = self._contests.get(shapes)
        if contest is None:
            return self._begin(shapes).winner
        # Threads that count at the same time may lose a call, which only shifts the next timing.
        contest.calls += 1
        if contest.calls.bit_count() == 1 or contest.calls % CALLS_BETWEEN_TURNS == 0:
            # One thread measures at a time, because two would slow each other down.
            with self._lock:
                contest.turn(self._clock)
        return contest.winner

    def chosen(self) -> dict[ShapeClass, str]:
        """Names of the currently chosen products."""
        with self._lock:
            return {shapes: contest.winner.name for shapes, contest in self._contests.items()}

    def _begin(self, shapes: ShapeClass) -> _Contest:
        with self._lock:
            if shapes not in self._contests:
                sample = _Sample(shapes)
                exact = [product for product in self._candidates(shapes.head_dim) if sample.agrees(product)]
                # Float64 is exact by arithmetic. If even its check fails, using it will show why.
                contest = _Contest(sample, exact or [FLOAT64])
                contest.turn(self._clock)
                self._contests[shapes] = contest
            return self._contests[shapes]


class _Contest:
    """Times of several products on one sample.

    Attributes:
        calls: number of calls for this class of shapes; the first call creates the contest.
        winner: the first product, or one that is clearly faster.
    """

    def __init__(self, sample: _Sample, products: Sequence[IntegerProduct]) -> None:
        self.calls = 1
        self.winner = products[0]
        self._sample = sample
        self._seconds = {product: float("inf") for product in products}

    def turn(self, clock: Callable[[], float]) -> None:
        """Time every product once more."""
        if len(self._seconds) == 1:
            return
        for product, least in self._seconds.items():
            begin = clock()
            self._sample.run(product)
            self._seconds[product] = min(least, clock() - begin)
        first, fastest = next(iter(self._seconds)), min(self._seconds, key=self._seconds.__getitem__)
        self.winner = fastest if self._seconds[fastest] < CLEARLY_LESS * self._seconds[first] else first


class _Sample:
    """Keys and queries of one KV head that take about the same time for every class of shapes.

    A third of the queries and half of the keys are all 127 or all -127, which gives the largest sums.
    """

    def __init__(self, shapes: ShapeClass) -> None:
        head_dim, rows, _ = shapes
        fewest, most = SAMPLE_TOKENS
        tokens = min(most, max(fewest, MULTIPLICATIONS_PER_SAMPLE // (head_dim * rows)))
        chunks = tokens // SAMPLE_CHUNK
        # Not the global generator, which belongs to the user.
        generator = torch.Generator("cpu").manual_seed(0)

        def integers(*shape: int) -> torch.Tensor:
            return torch.randint(-127, 128, shape, dtype=torch.int8, device="cpu", generator=generator)

        self._index, self._queries = integers(1, SAMPLE_CHUNK, chunks, head_dim), integers(1, rows, head_dim)
        self._index[:, ::4], self._index[:, 1::4] = 127, -127
        self._queries[:, ::6], self._queries[:, 3::6] = 127, -127
        self._scratch = Scratch()

    def run(self, product: IntegerProduct) -> torch.Tensor:
        """Maxima of the sample's chunks."""
        return self._maxima(product, self._index)

    def agrees(self, product: IntegerProduct) -> bool:
        """Whether this build has the product and computes every number correctly; also warms it up."""
        keys = self._index.view(1, 1, -1, self._index.shape[-1])
        expected = torch.mm(keys[0, 0].double(), self._queries[0].double().mT)
        try:
            return bool(torch.equal(self._maxima(product, keys)[0].double(), expected))
        except Exception:  # Whatever it raises, another product can be used.
            return False

    def _maxima(self, product: IntegerProduct, index: torch.Tensor) -> torch.Tensor:
        out = torch.empty(1, index.shape[2], self._queries.shape[1], dtype=product.dtype, device="cpu")
        product.maxima(index, self._queries, self._scratch, out)
        return out


_OF_THIS_PROCESS = ProductChooser()


def fastest_product(head_dim: int, queries: int) -> IntegerProduct:
    """The fastest exact product (see `ProductChooser.fastest`), chosen once for the whole process."""
    return _OF_THIS_PROCESS.fastest(head_dim, queries)


def chosen_products() -> dict[ShapeClass, str]:
    """Names of the products that this process uses now, for reports; empty before the first selection on a CPU."""
    return _OF_THIS_PROCESS.chosen()
