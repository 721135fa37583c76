"""Products of int8 keys and int8 queries on an accelerator, computed exactly.

What a request chooses must not depend on where it is computed. A product that is returned as bfloat16 keeps 8 bits of a
logit: at a logit of 12 that is an error of 6% in its exponential. Integers are exact, wherever they are multiplied: on
the integer units (`torch._int_mm`), or in float32, where every sum stays below 2^24.

Which of the two a device has is found out once per device, by a sample whose sums are known.
"""

from __future__ import annotations

import threading
from typing import Protocol

import torch

from .integer_products import FLOAT32, FLOAT64

# Products held at once: a long suffix does not need gigabytes.
BYTES_AT_ONCE = 2**26
# `torch._int_mm` on CUDA wants this of its shapes.
_MULTIPLE, _FEWEST_ROWS = 8, 17


class DeviceProduct(Protocol):
    """One way of multiplying keys and queries on a device; `name` is for reports."""

    @property
    def name(self) -> str: ...

    def maxima(self, index: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """The largest product in each chunk.

        Args:
            index: int8 `(kv_heads, c, chunks, head_dim)`, contiguous, values from -127 to 127.
            queries: int8 `(kv_heads, n, head_dim)`, values from -127 to 127.

        Returns:
            whole numbers `(kv_heads, n, chunks)`, in int32 or a float dtype that holds them exactly.
        """
        ...


class IntegerUnits:
    """`torch._int_mm`, one KV head after the other: keys are read where they are, as they are."""

    name = "int8"

    def maxima(self, index: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """See `DeviceProduct`."""
        kv_heads, c, chunks, head_dim = index.shape
        rows = queries.shape[1]
        spare = -rows % _MULTIPLE
        factors = torch.nn.functional.pad(queries, (0, 0, 0, spare)) if spare else queries
        out = torch.empty(kv_heads, rows, chunks, dtype=torch.int32, device=index.device)
        step = max(1, BYTES_AT_ONCE // (4 * chunks * (rows + spare)))
        for head in range(kv_heads):
            query = factors[head].T
            for begin in range(0, c, step):
                some = index[head, begin : begin + step]
                products = torch._int_mm(_tall(some.reshape(-1, head_dim)), query)[: some.shape[0] * chunks, :rows]
                best = products.view(some.shape[0], chunks, rows).amax(0).T
                if begin:
                    torch.maximum(out[head], best, out=out[head])
                else:
                    out[head] = best
        return out


def _tall(keys: torch.Tensor) -> torch.Tensor:
    missing = _FEWEST_ROWS - keys.shape[0]
    return torch.nn.functional.pad(keys, (0, 0, 0, missing)) if missing > 0 else keys


class FloatUnits:
    """Keys are converted, some chunks at a time, and multiplied as floating-point numbers.

    A lower precision of float32 products (TF32) changes nothing: factors up to 127 have 7 bits, and sums stay float32.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.name = str(dtype).removeprefix("torch.")

    def maxima(self, index: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """See `DeviceProduct`."""
        kv_heads, c, chunks, head_dim = index.shape
        rows = queries.shape[1]
        factors = queries.to(self.dtype)
        out = torch.empty(kv_heads, rows, chunks, dtype=self.dtype, device=index.device)
        step = max(1, BYTES_AT_ONCE // (kv_heads * c * (head_dim + rows) * self.dtype.itemsize))
        for begin in range(0, chunks, step):
            some = index[:, :, begin : begin + step].to(self.dtype)
            products = torch.bmm(factors, some.reshape(kv_heads, -1, head_dim).mT)
            torch.amax(products.view(kv_heads, rows, c, -1), 2, out=out[:, :, begin : begin + step])
        return out


_chosen: dict[tuple[torch.device, int], DeviceProduct] = {}
_lock = threading.Lock()


def device_product(device: torch.device, head_dim: int) -> DeviceProduct:
    """The way in which keys of `head_dim` channels are multiplied on `device`; the first call finds it out."""
    found = _chosen.get((device, head_dim))
    if found is None:
        with _lock:
            found = _chosen.setdefault((device, head_dim), _first_exact(device, head_dim))
    return found


def _first_exact(device: torch.device, head_dim: int) -> DeviceProduct:
    floats = FloatUnits((FLOAT32 if FLOAT32.is_exact(head_dim) else FLOAT64).dtype)
    usable = head_dim % _MULTIPLE == 0 and device.type == "cuda"
    return IntegerUnits() if usable and _is_exact(IntegerUnits(), device, head_dim) else floats


def _is_exact(product: DeviceProduct, device: torch.device, head_dim: int) -> bool:
    """Whether this build has the product for this device, and every number of a sample is right.

    A third of the queries and half of the keys are all 127 or all -127, where sums are largest.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    index = torch.randint(-127, 128, (2, 16, 12, head_dim), dtype=torch.int8, device="cpu", generator=generator)
    queries = torch.randint(-127, 128, (2, 21, head_dim), dtype=torch.int8, device="cpu", generator=generator)
    index[:, ::4], index[:, 1::4] = 127, -127
    queries[:, ::6], queries[:, 3::6] = 127, -127
    products = torch.einsum("hcnd,hqd->hqcn", index.double(), queries.double())
    try:
        found = product.maxima(index.to(device), queries.to(device)).cpu()
    except Exception:  # Whatever it raises, there are others.
        return False
    return bool(torch.equal(found.double(), products.amax(2)))
