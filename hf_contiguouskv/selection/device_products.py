"""Products of int8 keys and int8 queries on an accelerator, computed exactly.

A request must choose the same chunks on every device. A product returned as bfloat16 keeps 8 bits of a logit: at a
logit of 12 that is an error of 6% in its exponential. Integer products are exact on every device if sums are kept in
float32 (where each stays below 2^24) or int32. There are three ways: 16-bit factors with float32 sums, the integer
units (`torch._int_mm`), or float32 throughout.

A sample with known sums shows once per device which of these it supports. The one with the fewest kernels is tried
first, because launching kernels is expected to take longer than their arithmetic (docs/results/gpu.md).
"""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch

from .integer_products import FLOAT32, FLOAT64

# Limit on products and converted keys held at once, so that a long suffix does not need gigabytes.
BYTES_AT_ONCE = 2**27
# `torch._int_mm` on CUDA needs dimensions that are multiples of 8, and at least 17 rows.
_MULTIPLE, _FEWEST_ROWS = 8, 17


class DeviceProduct(Protocol):
    """One way to multiply keys and queries on a device; `name` is for reports."""

    @property
    def name(self) -> str: ...

    def maxima(self, index: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        """The largest product in each chunk.

        Args:
            index: int8 `(kv_heads, c, chunks, head_dim)`, contiguous, values from -127 to 127.
            queries: int8 `(kv_heads, n, head_dim)`, values from -127 to 127.

        Returns:
            integers `(kv_heads, n, chunks)`, in int32 or a float dtype that holds them exactly.
        """
        ...


class IntegerUnits:
    """`torch._int_mm`, one KV head at a time; it reads the int8 keys in place."""

    name = "int8"

    def maxima(self, index: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
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
    """Converts keys to floating point, some chunks at a time, and multiplies all KV heads at once.

    Lower precision of the factors (16 bits, TF32) changes nothing, because factors up to 127 have 7 bits.

    Args:
        dtype: dtype of the factors.
        sums: dtype of the products, if it differs.
    """

    def __init__(self, dtype: torch.dtype, sums: torch.dtype | None = None) -> None:
        self.dtype = dtype
        self._sums = dtype if sums is None else sums
        self.name = str(dtype).removeprefix("torch.")

    def maxima(self, index: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
        kv_heads, c, _, head_dim = index.shape
        rows = queries.shape[1]
        factors = queries.to(self.dtype)
        more: dict[str, Any] = {} if self._sums is self.dtype else {"out_dtype": self._sums}
        step = max(1, BYTES_AT_ONCE // (kv_heads * c * (head_dim * self.dtype.itemsize + rows * self._sums.itemsize)))
        parts = []
        for some in index.split(step, 2):
            keys = some.to(self.dtype).reshape(kv_heads, -1, head_dim)
            products: torch.Tensor = torch.bmm(factors, keys.mT, **more)
            parts.append(products.view(kv_heads, rows, c, -1).amax(2))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


_chosen: dict[tuple[torch.device, int], DeviceProduct] = {}
_lock = threading.Lock()


def device_product(device: torch.device, head_dim: int) -> DeviceProduct:
    """The product for keys of `head_dim` channels on `device`; the first call determines it."""
    found = _chosen.get((device, head_dim))
    if found is None:
        with _lock:
            found = _chosen.setdefault((device, head_dim), _first_exact(device, head_dim))
    return found


def _first_exact(device: torch.device, head_dim: int) -> DeviceProduct:
    if not FLOAT32.is_exact(head_dim):
        return FloatUnits(FLOAT64.dtype)
    if device.type == "cuda" and head_dim % _MULTIPLE == 0:
        # (Sums of bfloat16 products are never kept in 16 bits; sums of float16 products may be, if a user allows it.)
        half = torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        for product in (FloatUnits(half, torch.float32), IntegerUnits()):
            if _is_exact(product, device, head_dim):
                return product
    return FloatUnits(FLOAT32.dtype)


def _is_exact(product: DeviceProduct, device: torch.device, head_dim: int) -> bool:
    """Whether this build has the product for this device, and computes every number of a sample correctly.

    A third of the queries and half of the keys are all 127 or all -127, which gives the largest sums.
    """
    generator = torch.Generator("cpu").manual_seed(0)
    index = torch.randint(-127, 128, (2, 16, 300, head_dim), dtype=torch.int8, device="cpu", generator=generator)
    queries = torch.randint(-127, 128, (2, 21, head_dim), dtype=torch.int8, device="cpu", generator=generator)
    index[:, ::4], index[:, 1::4] = 127, -127
    queries[:, ::6], queries[:, 3::6] = 127, -127
    products = torch.einsum("hcnd,hqd->hqcn", index.double(), queries.double())
    try:
        found = product.maxima(index.to(device), queries.to(device)).cpu()
    except Exception:  # Whatever it raises, another product can be used.
        return False
    return bool(torch.equal(found.double(), products.amax(2)))
