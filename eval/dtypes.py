"""The dtype in which models run on this machine.

Processors without bfloat16 instructions emulate bfloat16 matrix products, five to ten times slower than float32.
Processor flags do not decide this: libraries can be configured to use fewer instructions, and emulation is sometimes
faster. So it is measured once per process, in about a tenth of a second.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
import typer

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
DtypeOption = Annotated[
    Dtype, typer.Option("--dtype", help="Dtype of model and KV; auto: the fastest on this machine.")
]

# The product of a block of prompt tokens and a weight matrix of SmolLM2-135M: rows, inner dimension, columns.
_PRODUCT = (64, 576, 1536)
_ROUNDS = 8


@dataclass(frozen=True)
class DtypeChoice:
    """A dtype, and the reason for it.

    Attributes:
        dtype: dtype of weights and KV.
        reason: the reason, as half a sentence.
    """

    dtype: torch.dtype
    reason: str

    @property
    def name(self) -> str:
        """For example `"bfloat16"`."""
        return dtype_name(self.dtype)


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` as `"bfloat16"`."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(asked: str, device: torch.device | str = "cpu") -> DtypeChoice:
    """The dtype that `--dtype` names; for `"auto"`, the fastest on the device."""
    if asked == "auto":
        return fast_dtype(device)
    return DtypeChoice(getattr(torch, asked), "as asked")


def fast_dtype(device: torch.device | str = "cpu") -> DtypeChoice:
    """The 16-bit dtype that the device supports, or float32 if that is faster.

    Args:
        device: the model's device.
    """
    kind = torch.device(device).type
    if kind == "cpu":
        return _fast_on_processor()
    if kind == "cuda" and not torch.cuda.is_bf16_supported(including_emulation=False):
        return DtypeChoice(torch.float16, "this GPU has no bfloat16")
    return DtypeChoice(torch.bfloat16, "what GPUs are fast in")


@functools.cache
def _fast_on_processor() -> DtypeChoice:
    seconds = _product_seconds((torch.bfloat16, torch.float32))
    ratio = seconds[torch.bfloat16] / seconds[torch.float32]
    if ratio > 1.0:
        return DtypeChoice(
            torch.float32, f"bfloat16 takes {ratio:.1f} times as long for a matrix product on this processor"
        )
    return DtypeChoice(
        torch.bfloat16, f"float32 takes {1 / ratio:.1f} times as long for a matrix product on this processor"
    )


def _product_seconds(dtypes: tuple[torch.dtype, ...]) -> dict[torch.dtype, float]:
    """Processor time of one matrix product in each dtype, in seconds: the best of several interleaved rounds.

    Measured on one thread, and not as wall time: if other programs keep the cores busy, threads wait for each other
    much longer than they compute, in every dtype alike.
    """
    rows, inner, columns = _PRODUCT
    operands = {
        dtype: (torch.ones(rows, inner, dtype=dtype), torch.ones(columns, inner, dtype=dtype)) for dtype in dtypes
    }
    best = dict.fromkeys(dtypes, float("inf"))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(_ROUNDS):
            for dtype, (states, weight) in operands.items():
                start = time.thread_time()
                torch.nn.functional.linear(states, weight)
                best[dtype] = min(best[dtype], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return best
