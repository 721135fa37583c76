"""Who computed a KV cache: a digest of a model's weights, configuration and adapters.

Two models with the same fingerprint give the same keys and values for the same token ids. It covers

- the text configuration (RoPE included), without names, versions, token ids of generation, output flags and the
  choice of an attention implementation;
- name, shape, dtype and *sampled* bytes of all parameters and persistent buffers, LoRA weights among them, and of the
  inverse frequencies of RoPE;
- which adapters are active, disabled or merged, and their scaling.

Sampling: tensors up to 64 KiB are digested whole; of larger ones the first and last 1024 elements and 4096 elements
at equal distances. A fine-tune, a merge, or noise changes practically every element and is seen. What it cannot see:
a larger tensor that differs from another *only* in elements that are not sampled, such as one edited number. Where
the edit happens in this process through an ordinary in-place operation, that is noticed too (torch counts it), and
the tensor is digested whole.

The result is kept per model, together with a signature that is cheap to compare (addresses, edit counters and a few
bytes of every tensor on the CPU). An edit that torch does not count (through `.data`, or from outside) and that
misses those bytes is not seen.
"""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from ..errors import UnsupportedModelError

_WHOLE_BYTES = 64 * 1024
_ENDS = 1024
_STRIDED = 4096
_PROBE_BYTES = 32

# Keys of a configuration that change neither keys nor values.
_IGNORED = frozenset(
    {
        "architectures",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "return_dict",
        "id2label",
        "label2id",
        "problem_type",
        "num_labels",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "sep_token_id",
        "decoder_start_token_id",
        "name_or_path",
        "chunk_size_feed_forward",
        "attn_implementation",
        "experts_implementation",
        "torchscript",
        "tie_word_embeddings",
        "gradient_checkpointing",
    }
)


@dataclass
class _Known:
    """What was seen when a fingerprint was computed."""

    signature: tuple[Any, ...]
    probes: list[memoryview]
    probed: bytes
    fingerprint: str
    samples: dict[str, tuple[int, int, bytes]]
    edited: dict[str, bytes]


_known: weakref.WeakKeyDictionary[torch.nn.Module, _Known] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def model_fingerprint(model: Any) -> str:
    """Hex digest (32 digits) of what determines the keys and values that `model` computes.

    The first call reads samples of all weights (tens of milliseconds); later calls compare a cheap signature.

    Raises:
        UnsupportedModelError: weights that cannot be read (on the `meta` device without an offload map).
    """
    model = _unwrap(model)
    with _lock:
        known = _known.get(model)
        signature = _signature(model)
        if known is not None and known.signature == signature and _probe(known.probes) == known.probed:
            return known.fingerprint
        known = _compute(model, signature, known)
        _known[model] = known
        return known.fingerprint


def _unwrap(model: Any) -> Any:
    """The transformers model inside `torch.compile`, data-parallel and PEFT wrappers."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), torch.nn.Module):
            model = model._orig_mod
        elif isinstance(model, torch.nn.DataParallel | torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _signature(model: torch.nn.Module) -> tuple[Any, ...]:
    """Changes when weights are replaced or edited, when an adapter is switched, when the configuration changes."""
    tensors: list[Any] = []
    adapters: list[Any] = []
    # Not `model.parameters()`: its bookkeeping of names and duplicates takes longer than all the rest.
    stack: list[torch.nn.Module] = [model]
    while stack:
        module = stack.pop()
        for parameter in module._parameters.values():
            if parameter is not None:
                tensors.append(_state(parameter))
        if module._buffers:
            for name, tensor in module._buffers.items():
                if tensor is not None and _counts(module, name):
                    tensors.append(_state(tensor))
        if "_active_adapter" in module.__dict__:
            adapters.append(_adapter_state(module))
        stack.extend([child for child in module._modules.values() if child is not None])
    return tensors, adapters, _config_signature(model)


def _counts(module: torch.nn.Module, buffer: str) -> bool:
    """Persistent buffers, and the frequencies of RoPE, which a change of dtype rounds for good.

    Other buffers that are not saved may be scratch space of a forward.
    """
    return buffer not in module._non_persistent_buffers_set or "inv_freq" in buffer


def _state(tensor: torch.Tensor) -> tuple[int, int, int, torch.dtype]:
    try:
        version = tensor._version
    except RuntimeError:
        version = -1  # Inference tensors count no edits; the probes still see them.
    try:
        address = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):
        address = 0  # Wrapper subclasses (quantised weights) have no address of their own.
    return id(tensor), address, version, tensor.dtype


def _adapter_state(module: torch.nn.Module) -> str:
    own = module.__dict__
    fields = (
        "_active_adapter",
        "_disable_adapters",
        "merged_adapters",
        "scaling",
        "use_dora",
        "lora_bias",
        "fan_in_fan_out",
    )
    return repr([(field, own[field]) for field in fields if field in own])


def _text_config(model: Any) -> Any:
    config: Any = getattr(model, "config", None)
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def _config_signature(model: Any) -> str:
    config = _text_config(model)
    if config is None:
        return ""
    return repr([(k, v) for k, v in vars(config).items() if not _is_ignored(k)])


def _is_ignored(key: str) -> bool:
    return key in _IGNORED or key.startswith(("_", "output_"))


def _config_content(model: Any) -> str:
    config = _text_config(model)
    if config is None:
        return ""
    return _canonical(config.to_dict() if hasattr(config, "to_dict") else vars(config))


def _canonical(value: Any, whole: bool = False) -> str:
    """Text that does not depend on the order of keys; `whole`: with names that begin with an underscore."""
    if isinstance(value, dict):
        items = sorted(
            # What a quantisation's own library calls its fields is not for us to judge.
            (str(k), _canonical(v, whole or k == "quantization_config"))
            for k, v in value.items()
            if whole or not _is_ignored(str(k))
        )
        return "{" + ",".join(f"{k!r}:{v}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_canonical(one, whole) for one in value) + "]"
    return repr(value)


def _named_tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """Name, the tensor of the module, and the one that holds its values (another one when it is offloaded)."""
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield f"{prefix}.{name}", parameter, _materialised(module, name, parameter)
                for attribute, scales in _scales(module, parameter):
                    yield f"{prefix}.{name}.{attribute}", scales, scales
        for name, buffer in module._buffers.items():
            if buffer is not None and _counts(module, name):
                yield f"{prefix}.{name}", buffer, _materialised(module, name, buffer)


def _scales(module: torch.nn.Module, parameter: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors without which a quantised weight means nothing, and that are no parameters: bitsandbytes hangs them on
    the weight, and moves some to the module's state at the first forward."""
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
    # accelerate keeps offloaded weights in a map of the hook that loads them before each forward.
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


def _compute(model: Any, signature: tuple[Any, ...], known: _Known | None) -> _Known:
    digest = blake2b(digest_size=16)
    digest.update(b"hf_contiguouskv fingerprint 1\0" + _config_content(model).encode())
    samples: dict[str, tuple[int, int, bytes]] = {}
    edited = dict(known.edited) if known is not None else {}
    probes: list[memoryview] = []
    for name, own, tensor in _named_tensors(model):
        sample = _sample(tensor.detach())
        identity, _, version, _ = _state(own)
        samples[name] = (identity, version, sample)
        before = known.samples.get(name) if known is not None else None
        if before is None or before[0] != identity or before[2] != sample:
            edited.pop(name, None)
        elif before[1] != version and tensor.nbytes > _WHOLE_BYTES:
            # Edited, yet every sample is as before: only the whole tensor can tell.
            edited[name] = _digest_whole(tensor.detach())
        digest.update(f"\0{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode() + sample + edited.get(name, b""))
        # Only memory of the module itself: an offloaded tensor that was loaded for us is gone after this.
        probes.extend(_probe_places(own))
    for name, module in model.named_modules(remove_duplicate=False):
        if "_active_adapter" in module.__dict__:
            digest.update(f"\0{name}\0{_adapter_state(module)}".encode())
    return _Known(signature, probes, _probe(probes), digest.hexdigest(), samples, edited)


def _octets(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().cpu().view(torch.uint8).numpy().tobytes()


def _plain_parts(tensor: torch.Tensor) -> list[torch.Tensor]:
    """The tensors inside a wrapper subclass (quantised weights), or the tensor itself; flat."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) and hasattr(tensor, "__tensor_flatten__"):
        names, _ = tensor.__tensor_flatten__()
        return [part for name in names for part in _plain_parts(getattr(tensor, name).detach())]
    return [tensor.as_subclass(torch.Tensor).reshape(-1)]


def _sample(tensor: torch.Tensor) -> bytes:
    """Digest of sampled elements; sampled where the tensor is, then moved once."""
    digest = blake2b(digest_size=16)
    for flat in _plain_parts(tensor):
        if flat.nbytes > _WHOLE_BYTES:
            flat = torch.cat([flat[:_ENDS], flat[:: max(1, flat.numel() // _STRIDED)], flat[-_ENDS:]])
        digest.update(_octets(flat))
    return digest.digest()


def _digest_whole(tensor: torch.Tensor) -> bytes:
    digest = blake2b(digest_size=16)
    for flat in _plain_parts(tensor):
        for start in range(0, flat.numel(), 2**24):
            digest.update(_octets(flat[start : start + 2**24]))
    return digest.digest()


def _probe_places(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Windows on the beginning, middle and end of a tensor in host memory.

    They do not keep the memory alive: they may be read only while the signature shows that the tensors are the same.
    """
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    if not plain or tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.nbytes:
        return
    address, nbytes = tensor.data_ptr(), tensor.nbytes
    length = min(nbytes, _PROBE_BYTES)
    window = ctypes.c_char * length
    for offset in sorted({0, (nbytes - length) // 2, nbytes - length}):
        yield memoryview(window.from_address(address + offset))


def _probe(places: list[memoryview]) -> bytes:
    return b"".join(places)
