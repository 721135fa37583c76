"""The tensors that a fingerprint covers, and digests of their values, sampled or whole."""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from typing import Any, NamedTuple

import torch

from ..errors import UnsupportedModelError

WHOLE_BYTES = 64 * 1024
"""Tensors up to this size are digested whole, larger ones are sampled."""

_ENDS = 1024
_STRIDED = 4096
_PER_CHANNEL = (torch.per_channel_affine, torch.per_channel_affine_float_qparams)


def counts(module: torch.nn.Module, buffer: str) -> bool:
    """Whether a fingerprint covers the buffer of this name.

    It covers persistent buffers, and the frequencies of RoPE, which a change of dtype rounds permanently. Other
    non-persistent buffers may be scratch space of a forward.
    """
    return buffer not in module._non_persistent_buffers_set or "inv_freq" in buffer


class NamedTensor(NamedTuple):
    """A tensor that a fingerprint covers.

    Attributes:
        name: its qualified name in the model.
        own: the tensor that the model holds.
        values: the tensor with the values: another one if the weight is offloaded.
        registered: whether it is a parameter or buffer, whose replacement the model's signature notices.
    """

    name: str
    own: torch.Tensor
    values: torch.Tensor
    registered: bool = True


def named_tensors(model: torch.nn.Module) -> Iterator[NamedTensor]:
    """All tensors of a model that a fingerprint covers, in a fixed order.

    Raises:
        UnsupportedModelError: a weight is on the `meta` device and no offload map has its values.
    """
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield NamedTensor(f"{prefix}.{name}", parameter, _materialised(module, name, parameter))
                for attribute, scales in _scales(module, parameter):
                    yield NamedTensor(f"{prefix}.{name}.{attribute}", scales, scales, registered=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and counts(module, name):
                yield NamedTensor(f"{prefix}.{name}", buffer, _materialised(module, name, buffer))


def _scales(module: torch.nn.Module, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Scales and codes of a quantised weight that are not parameters. bitsandbytes attaches them to the weight, and
    moves some to the module's state at the first forward."""
    holders: list[tuple[str, Any]] = [("", getattr(parameter, "quant_state", None)), ("", parameter)]
    holders += [("nested_", getattr(holders[0][1], "state2", None)), ("", getattr(module, "state", None))]
    found: dict[str, torch.Tensor] = {}
    for prefix, holder in holders:
        for attribute in ("absmax", "code", "offset", "SCB"):
            scales = None if holder is None else getattr(holder, attribute, None)
            if isinstance(scales, torch.Tensor):
                found.setdefault(prefix + attribute, scales)
    yield from sorted(found.items())


def _materialised(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    if tensor.device.type != "meta":
        return tensor
    # accelerate keeps offloaded weights in a map on the hook that loads them before each forward.
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        weights = getattr(one, "weights_map", None)
        if weights is not None:
            try:
                found = weights[name]
            except KeyError:
                continue
            if isinstance(found, torch.Tensor):
                return found
    raise UnsupportedModelError(
        f"weight {name!r} of {type(module).__name__} is on the meta device and was not found among offloaded weights; "
        "without its values this model cannot be told from others"
    )


def state_of(tensor: torch.Tensor) -> tuple[int, int, int, torch.dtype]:
    """Identity, address (0: it has none), edit counter (-1: it has none) and dtype; cheap to read."""
    try:
        version = tensor._version
    except RuntimeError:
        version = -1  # Inference tensors count no edits.
    try:
        address = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        address = 0  # Wrapper subclasses (quantised weights) have no address of their own.
    return id(tensor), address, version, tensor.dtype


def sample(tensor: torch.Tensor) -> bytes:
    """Digest (16 bytes) of sampled elements; samples are gathered on the tensor's device and copied once."""
    digest = blake2b(digest_size=16)
    for flat in _plain_parts(tensor.detach()):
        if flat.nbytes > WHOLE_BYTES:
            flat = torch.cat([flat[:_ENDS], flat[:: max(1, flat.numel() // _STRIDED)], flat[-_ENDS:]])
        digest.update(_octets(flat))
    return digest.digest()


def digest_whole(tensor: torch.Tensor) -> bytes:
    """Digest (16 bytes) of all elements."""
    digest = blake2b(digest_size=16)
    for flat in _plain_parts(tensor.detach()):
        for start in range(0, flat.numel(), 2**24):
            digest.update(_octets(flat[start : start + 2**24]))
    return digest.digest()


def _octets(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The parts of a quantised tensor (codes, scales, zero points), or the tensor itself; flattened."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _plain_parts(getattr(tensor, name).detach())]
    if tensor.is_quantized:
        return [part.reshape(-1) for part in _codes_and_scales(tensor)]
    return [tensor.as_subclass(torch.Tensor).reshape(-1)]


def _codes_and_scales(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Codes, scales and zero points of one of torch's own quantised tensors."""
    if tensor.qscheme() in _PER_CHANNEL:
        axis = torch.tensor(tensor.q_per_channel_axis())
        return [tensor.int_repr(), tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points(), axis]
    return [tensor.int_repr(), torch.tensor([tensor.q_scale(), tensor.q_zero_point()], dtype=torch.float64)]
