"""The cost of what every request does on the device: launches, waits, attention of a new shape, arithmetic."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention.bias import CausalBias, causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ..timing import median_spread

LAUNCHES = 2000
# The shape of a 7B model with grouped heads, and of a suffix.
HEADS, KV_HEADS, HEAD_DIM, QUERIES = 28, 4, 128, 32
# Lengths that no other code here uses, so that their first call really is the first; each variant has its own lengths.
FIRST_KEYS, FRESH_LENGTHS = 6007, 3
BACKENDS = {-1: "none", 0: "math", 1: "flash", 2: "efficient", 3: "cudnn", 4: "override"}


def launches(device: torch.device) -> dict[str, float]:
    """Microseconds per small kernel: for the host to queue it, and including the device's part."""
    tensor = torch.zeros(16, device=device)
    for _ in range(100):
        tensor.add_(1)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(LAUNCHES):
        tensor.add_(1)
    queued = time.perf_counter() - began
    torch.cuda.synchronize()
    done = time.perf_counter() - began
    return {"queue_us": queued / LAUNCHES * 1e6, "with_device_us": done / LAUNCHES * 1e6}


def synchronisation(device: torch.device) -> dict[str, float]:
    """Microseconds of each way to wait, for a device that is idle or has one small kernel to run."""
    tensor = torch.zeros(16, device=device)
    stream = torch.cuda.current_stream()
    event = torch.cuda.Event()
    side = torch.cuda.Stream()

    def crossing() -> None:
        event.record()
        side.wait_event(event)

    return {
        "synchronize_device_us": _microseconds(torch.cuda.synchronize),
        "synchronize_stream_us": _microseconds(stream.synchronize),
        "record_and_wait_on_stream_us": _microseconds(crossing),
        "query_event_us": _microseconds(event.query),
        "kernel_and_item_us": _microseconds(lambda: tensor.add_(1).sum().item()),
        "new_event_us": _microseconds(lambda: torch.cuda.Event().record()),
    }


def _microseconds(action: Callable[[], Any], repeats: int = 200) -> float:
    action()
    torch.cuda.synchronize()
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        taken.append(time.perf_counter() - began)
    return median_spread(taken).median * 1e6


def arithmetic(device: torch.device, size: int = 8192, rounds: int = 8) -> dict[str, float]:
    """Operations per second of bfloat16 matrix products, for large matrices and for a suffix and a weight."""
    left, right = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    suffix = torch.randn(QUERIES, size, device=device, dtype=torch.bfloat16)
    found = {}
    for name, factor, rows in (("large_flops", left, size), ("suffix_flops", suffix, QUERIES)):
        factor @ right
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(rounds):
            factor @ right
        torch.cuda.synchronize()
        found[name] = 2.0 * rows * size * size * rounds / (time.perf_counter() - began)
    return found


@contextmanager
def cudnn_attention(allowed: bool) -> Iterator[None]:
    """A context in which attention may use cuDNN, or may not."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def attention_shapes(device: torch.device) -> list[dict[str, Any]]:
    """Milliseconds of attention after prefixes of new lengths: the first call and the second.

    Three ways to call it: with a mask and K and V repeated for each query head, as in transformers; with a mask and
    grouped heads; with a lower-right causal bias instead of a mask, and grouped heads.
    """
    found = []
    keys = FIRST_KEYS
    for cudnn in (True, False):
        with cudnn_attention(cudnn):
            for way in ("mask, repeated", "mask, grouped", "lower right, grouped"):
                _once(device, way, FIRST_KEYS - 1000 - keys % 7)  # Load the kernel: not part of the cost.
                rows = []
                for _ in range(FRESH_LENGTHS):
                    rows.append(_once(device, way, keys))
                    keys += 97
                first, second = ([row[name] for row in rows] for name in ("first_ms", "second_ms"))
                found.append(
                    {
                        "cudnn_allowed": cudnn,
                        "way": way,
                        "first_ms": first,
                        "second_ms": second,
                        "backend": rows[0]["backend"],
                        "shape_ms": median_spread(a - b for a, b in zip(first, second, strict=True)).median,
                    }
                )
    return found


def _once(device: torch.device, way: str, keys: int) -> dict[str, Any]:
    kv_heads = HEADS if way.endswith("repeated") else KV_HEADS
    query = torch.randn(1, HEADS, QUERIES, HEAD_DIM, device=device, dtype=torch.bfloat16)
    states = torch.randn(1, kv_heads, keys, HEAD_DIM, device=device, dtype=torch.bfloat16)
    if way.startswith("mask"):
        mask: Any = torch.zeros(1, 1, QUERIES, keys, device=device, dtype=torch.bfloat16)
        triangle = torch.ones(QUERIES, QUERIES, device=device, dtype=torch.bool).triu(1)
        mask[..., -QUERIES:].masked_fill_(triangle, float("-inf"))
    else:
        mask = causal_lower_right(QUERIES, keys)
    grouped = kv_heads != HEADS

    def attend() -> float:
        torch.cuda.synchronize()
        began = time.perf_counter()
        scaled_dot_product_attention(query, states, states, attn_mask=mask, enable_gqa=grouped)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) * 1e3

    first = attend()
    return {"first_ms": first, "second_ms": attend(), "backend": _backend(query, states, mask, grouped)}


def _backend(query: torch.Tensor, states: torch.Tensor, mask: Any, grouped: bool) -> str:
    """The implementation that torch chooses."""
    try:
        if not isinstance(mask, CausalBias):
            chosen = torch._fused_sdp_choice(query, states, states, attn_mask=mask, enable_gqa=grouped)
            return BACKENDS.get(int(chosen), str(chosen))
        # A bias makes its own choice, and never chooses cuDNN.
        parameters = torch.backends.cuda.SDPAParams(query, states, states, None, 0.0, False, grouped)
        if torch.backends.cuda.can_use_flash_attention(parameters):
            return "flash"
        return "efficient" if torch.backends.cuda.can_use_efficient_attention(parameters) else "a mask"
    except (RuntimeError, TypeError, AttributeError) as error:
        return f"unknown: {str(error)[:100]}"
