"""Tensors that say they are on a GPU and are computed on the CPU, with a note of what a GPU would have had to do.

A request through the library's device path runs as it would with an accelerator, operation by operation. What is
noted is the same on every machine: operations, kernels, bytes that kernels move, floating-point operations, copies
between host and device, and waits of the host.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = torch.device("cuda", 0)
"""What the tensors say. (Some code of torch and of the library asks for "cuda" by name.)"""

_aten = torch.ops.aten
# Their result is a number that the host has to know.
_ASKS = {"_local_scalar_dense", "equal", "nonzero", "masked_select", "is_nonzero", "_unique2", "unique_dim"}
_FACTORIES = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "lift")
# Reads of these are as long as what they return, not as long as what they look into.
_LOOK_UPS = {"index_select", "embedding", "gather", "index", "take", "take_along_dim"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "_int_mm", "mv", "addmv", "dot"}


class Ledger(Protocol):
    """Where operations are noted."""

    def operation(self, kernels: int, moved: int, flops: float, kind: str, on_device: bool) -> None:
        """An operation of torch: kernels it launches, bytes they move, multiplications and additions of `kind`."""

    def crossed(self, nbytes: int, *, out: bool, waits: bool) -> None:
        """A copy between host and device, queued behind what is computed; whether the host waits for it."""

    def own_time(self) -> Any:
        """A context: what happens inside is the work of this module, not of the program."""


_ledger: Ledger | None = None
_noise = torch.empty(0)
# Which weight has this address.
_numbers: dict[int, int] = {}
# How much of a number is new in each layer, over what stays.
_CHANGE = 1.0


class Pretend(torch.Tensor):
    """A tensor that says it is on `DEVICE`; `numbers` are on the CPU."""

    numbers: torch.Tensor
    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> Pretend:
        made: Pretend = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device("pretend", 0),
        )
        made.numbers = inner
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["numbers"], None

    def get_device(self) -> int:
        """As on a GPU."""
        return 0

    def record_stream(self, stream: Any) -> None:
        """As on a GPU."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _ledger is not None, "pretended tensors are of use while something is recorded"
        with _ledger.own_time():
            if function is torch.nn.functional.scaled_dot_product_attention:
                return _attention(*args, **(kwargs or {}))
            with torch._C.DisableTorchFunctionSubclass():
                return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        assert _ledger is not None
        with _ledger.own_time():
            return _run(function, args, kwargs or {})


class _Everything(TorchDispatchMode):
    """Sees every operation of the thread. Under this key torch does not look for a GPU before it makes a tensor."""

    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # Or torch calls the method below by way of dynamo, whose calls would be counted.

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert _ledger is not None
        with _ledger.own_time():
            return _run(function, args, kwargs or {})


@contextmanager
def noted_in(ledger: Ledger) -> Iterator[None]:
    """Operations of this thread are noted in `ledger`, and `DEVICE` can be used, until the end."""
    global _ledger, _noise
    _register()
    if not _noise.numel():
        _noise = torch.randn(2**23, generator=torch.Generator().manual_seed(0))
    assert _ledger is None, "one thing is recorded at a time"
    _ledger = ledger
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        with _Everything():  # type: ignore[no-untyped-call]
            yield
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        _ledger = None


def _register() -> None:
    """Make torch accept a device of our own: once per process, and for good."""
    if getattr(torch, "pretend", None) is not None:
        return
    try:
        from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register
    except ImportError as error:
        raise RuntimeError(
            f"counting needs a newer torch than {torch.__version__}: it has no Python devices"
        ) from error
    register("pretend")


def on_device(inner: torch.Tensor) -> Pretend:
    """`inner` on the pretended device, sharing its memory."""
    return Pretend(inner)


def without_memory(shape: torch.Size, dtype: torch.dtype) -> torch.Tensor:
    """A weight of any size that takes up one number; products with it are made up instead of computed."""
    weight = torch.full((1,) * max(1, len(shape)), 0.5, dtype=dtype)
    _numbers[weight.untyped_storage().data_ptr()] = len(_numbers)
    return weight.expand(shape)


def _inner(value: Any) -> Any:
    return value.numbers if isinstance(value, Pretend) else value


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type != "cpu"


def _run(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    assert _ledger is not None
    name = function._schema.name.removeprefix("aten::")
    tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
    there = any(isinstance(value, Pretend) for value in tensors)
    result_there = there
    inner_kwargs = {key: tree_map(_inner, value) for key, value in kwargs.items()}
    if kwargs.get("device") is not None:
        result_there = _is_there(kwargs["device"])
        inner_kwargs["device"] = torch.device("cpu")
    if "pin_memory" in inner_kwargs:
        inner_kwargs["pin_memory"] = False
    inner_args = tree_map(_inner, args)
    if name == "_fused_sdp_choice":
        return 0
    out: Any = _made_up(inner_args) if name in _PRODUCTS else None
    if there and name.startswith("_scaled_dot_product"):
        others = [str(one.type) == "Tensor" for one in function._schema.returns[1:]]
        out = (_attended(args[0]), *(torch.empty(0) if tensor else 0 for tensor in others))
    if there and name == "bmm" and function._overloadname == "dtype":
        # Products of 16 bits with sums of 32, which a CPU does not have.
        out = torch.bmm(*(one.to(inner_args[2]) for one in inner_args[:2]))
    if out is None:
        out = function(*inner_args, **inner_kwargs)
    _note(function, name, args, kwargs, inner_args, out, there, result_there)
    if function._schema.is_mutable and not name.endswith("_out"):
        written = _written(function, args, kwargs)
        if written is not None:
            return written
    return tree_map(lambda value: Pretend(value) if isinstance(value, torch.Tensor) and result_there else value, out)


def _written(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation returns that writes to an argument and returns it."""
    if len(function._schema.returns) != 1:
        return None
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[position] if position < len(args) else kwargs.get(argument.name)
    return None


def _made_up(args: Any) -> torch.Tensor | None:
    """Stands for a product with a weight that has no memory.

    The same weight gives the same numbers, and other weights others, but not very different ones: from layer to layer
    the chunks that are chosen by them are mostly the same ones (52 to 64%, as the published method's authors report).
    """
    factors = [value for value in args if isinstance(value, torch.Tensor)]
    if not any(value.numel() > 1 and not any(value.stride()) and value.dim() == 2 for value in factors[-2:]):
        return None
    left, right = factors[-2:]
    shape = (left.shape[0], right.shape[1])
    count = math.prod(shape)
    own = _noise[_numbers[right.untyped_storage().data_ptr()] * 7919 % (_noise.numel() - count) :][:count]
    return torch.add(_noise[:count], own, alpha=_CHANGE).view(shape).to(left.dtype)


def _note(
    function: Any,
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    inner_args: Any,
    out: Any,
    there: bool,
    result_there: bool,
) -> None:
    assert _ledger is not None
    if name in _FACTORIES:
        _ledger.operation(0, 0, 0.0, "", result_there or there)
        return
    if name == "_to_copy" and not _bytes(out):
        return
    if name == "_to_copy" and there != result_there:
        _ledger.crossed(_bytes(out), out=there, waits=there or not kwargs.get("non_blocking", False))
        return
    if name == "copy_":
        target, source = args[0], args[1]
        if isinstance(target, Pretend) != isinstance(source, Pretend):
            waits = not (args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            _ledger.crossed(_bytes(inner_args[0]), out=isinstance(source, Pretend), waits=waits)
            return
    device = there or result_there
    if _is_view(function):
        _ledger.operation(0, 0, 0.0, "", device)
        return
    moved, flops, kind = _moved(function, name, inner_args, kwargs, out), 0.0, ""
    if name in _PRODUCTS:
        flops, kind = _product_flops(inner_args, out)
    if name.startswith("_scaled_dot_product"):
        query, key = inner_args[0], inner_args[1]
        flops, kind = _attention_flops(query, key), _kind(query.dtype)
    _ledger.operation(1, moved, flops, kind, device)
    if there and (name in _ASKS or (name == "index" and _by_mask(args))):
        _ledger.crossed(8, out=True, waits=True)


def _is_view(function: Any) -> bool:
    returns = function._schema.returns
    return bool(returns) and returns[0].alias_info is not None and not returns[0].alias_info.is_write


def _by_mask(args: Any) -> bool:
    return any(value is not None and value.dtype == torch.bool for value in args[1])


def _bytes(value: Any) -> int:
    return sum(one.numel() * one.element_size() for one in tree_flatten(value)[0] if isinstance(one, torch.Tensor))


def _moved(function: Any, name: str, args: Any, kwargs: dict[str, Any], out: Any) -> int:
    """Bytes that a kernel reads and writes."""
    written = _bytes(out)
    if name in _LOOK_UPS:
        return 2 * written
    if name in ("index_copy_", "index_put_", "scatter_"):
        return 2 * _bytes(args[2:])
    read = _bytes(args) + _bytes({key: value for key, value in kwargs.items() if key != "out"})
    if name in ("fill_", "zero_", "copy_"):
        read -= _bytes(args[0])
    return read + written


def _kind(dtype: torch.dtype) -> str:
    return "f32" if dtype in (torch.float32, torch.float64) else "i8" if dtype == torch.int8 else "f16"


def _product_flops(args: Any, out: torch.Tensor) -> tuple[float, str]:
    factors = [value for value in args if isinstance(value, torch.Tensor)][-2:]
    return 2.0 * out.numel() * factors[0].shape[-1], _kind(factors[0].dtype)


def _attention_flops(query: torch.Tensor, key: torch.Tensor) -> float:
    return 4.0 * query.numel() * key.shape[-2]


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """One fused kernel, whatever the mask: its result is made up, its work is noted."""
    assert _ledger is not None
    moved = _bytes([query, query, key, value]) + (_bytes(attn_mask) if type(attn_mask) is Pretend else 0)
    _ledger.operation(1, moved, _attention_flops(query, key), _kind(query.dtype), True)
    return Pretend(_attended(query))


def _attended(query: torch.Tensor) -> torch.Tensor:
    """Stands for what attention gives, on the CPU, in the order in which kernels write it."""
    with _disable_current_modes():
        made = _noise[: query.numel()].to(query.dtype).view(query.shape[0], query.shape[2], query.shape[1], -1)
        return made.transpose(1, 2)
