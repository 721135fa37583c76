"""The fingerprint of a model: a digest of its weights, configuration and adapters.

Two models with the same fingerprint compute the same keys and values for the same token ids. It covers

- the text configuration (RoPE included), without names, versions, token ids for generation, output flags and the
  attention implementation;
- name, shape, dtype and *sampled* bytes of all parameters and persistent buffers (LoRA weights included), and of the
  inverse frequencies of RoPE (`weights.py`);
- other state that modules save, such as packed weights of quantised layers; its tensors are also sampled
  (`saved_state.py`). A model is refused if such state cannot be read;
- which adapters are active, disabled or merged, and their scaling.

Sampling: tensors up to 64 KiB are digested whole. Larger tensors are digested at their first and last 1024 elements and
at 4096 elements at equal distances. A fine-tune, a merge or noise changes practically every element and is noticed. A
difference *only* in elements that are not sampled, such as one edited number, is not noticed if the edit was made in
another process, before the first fingerprint, or to a tensor that has replaced the earlier one.

The process keeps the result per model, and every later call checks cheaply whether the model is still the same:

- *noticed at once*: another configuration; a replaced tensor, adapter or packed weight; an edit by an ordinary in-place
  operation anywhere, because torch counts these; any edit that changes the first, middle or last 32 bytes of a tensor
  on the CPU (`weight_windows.probe`);
- *noticed later*: an edit that torch does not count (through `.data`, or from outside) anywhere in a tensor on the CPU.
  Every call compares the next 2 MiB of weights with their digests from the previous round
  (`weight_windows.WeightWindows`). 270 calls cover a model of 540 MB;
- *not noticed*: an edit that torch does not count to weights that are on an accelerator, offloaded, or inside a
  quantised tensor; an edit made before the first look at that part of the tensor; an edit inside an object that a
  module saves (a packed weight, a numpy array) if the object stays the same.

An edited tensor is digested whole if its samples do not show the edit.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Collection
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch

from .causal_lm import innermost_causal_lm
from .modules import modules_of
from .saved_state import Snapshot, add_attributes, saved_beyond, saves_more
from .weight_windows import WeightWindows, probe, probe_places
from .weights import WHOLE_BYTES, counts, digest_whole, named_tensors, sample, state_of

# Configuration fields that change neither keys nor values.
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
    """The state of a model when its fingerprint was computed.

    Attributes:
        samples: by tensor name: identity, edit counter and sample.
        edited: by tensor name: digest of the whole tensor, for tensors whose samples do not show their edit.
        saved: by module name, for modules that save more than tensors: the attributes and the saved state.
    """

    signature: Snapshot
    probes: list[memoryview]
    probed: bytes
    windows: WeightWindows
    fingerprint: str
    samples: dict[str, tuple[int, int, bytes]]
    edited: dict[str, bytes]
    saved: dict[str, tuple[Snapshot, bytes]]


_known: weakref.WeakKeyDictionary[torch.nn.Module, _Known] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def model_fingerprint(model: Any) -> str:
    """Hex digest (32 digits) of everything that determines the keys and values computed by `model`.

    The first call reads samples of all weights (tens of milliseconds). Later calls compare a cheap signature and 2 MiB
    of weights (well below one millisecond for a model of 135M parameters).

    Raises:
        UnsupportedModelError: weights cannot be read (on the `meta` device without an offload map, or saved by a module
            in an unknown format).
    """
    model = innermost_causal_lm(model)
    with _lock:
        known = _known.get(model)
        signature = _signature(model)
        edited: set[int] = set()
        if known is not None and known.signature.equals(signature) and probe(known.probes) == known.probed:
            edited = known.windows.look()
            if not edited:
                return known.fingerprint
        known = _compute(model, signature, known, edited)
        _known[model] = known
        return known.fingerprint


def _signature(model: torch.nn.Module) -> Snapshot:
    """A snapshot that changes when weights are replaced or edited, an adapter is switched, or the configuration
    changes."""
    signature = Snapshot([_config_signature(model)])
    values = signature.values
    # Not `model.parameters()`: its bookkeeping of names and duplicates takes longer than everything else here.
    for module in modules_of(model):
        for parameter in module._parameters.values():
            if parameter is not None:
                values.append(state_of(parameter))
        if module._buffers:
            for name, tensor in module._buffers.items():
                if tensor is not None and counts(module, name):
                    values.append(state_of(tensor))
        if "_active_adapter" in module.__dict__:
            values.append(_adapter_state(module))
        if saves_more(module):
            add_attributes(module, signature)
    return signature


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
    """Text that does not depend on the order of keys; with `whole`, ignored fields are included."""
    if isinstance(value, dict):
        items = sorted(
            # Include every field of a quantisation config, because its library chooses the names.
            (str(k), _canonical(v, whole or k == "quantization_config"))
            for k, v in value.items()
            if whole or not _is_ignored(str(k))
        )
        return "{" + ",".join(f"{k!r}:{v}" for k, v in items) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(_canonical(one, whole) for one in value) + "]"
    return repr(value)


def _compute(model: torch.nn.Module, signature: Snapshot, known: _Known | None, changed: Collection[int]) -> _Known:
    """Compute the fingerprint from the weights.

    Args:
        model: the unwrapped model.
        signature: the model's signature, taken before.
        known: the state at the last fingerprint.
        changed: addresses of tensors that differ from that state, whatever their edit counters say.
    """
    digest = blake2b(digest_size=16)
    digest.update(b"hf_contiguouskv fingerprint 1\0" + _config_content(model).encode())
    samples: dict[str, tuple[int, int, bytes]] = {}
    edited = dict(known.edited) if known is not None else {}
    probes: list[memoryview] = []
    watched: list[torch.Tensor] = []
    altered = set(changed)
    saved: dict[str, tuple[Snapshot, bytes]] = {}
    for name, own, tensor, registered in named_tensors(model):
        sampled = sample(tensor)
        identity, address, version, _ = state_of(own)
        samples[name] = (identity, version, sampled)
        before = known.samples.get(name) if known is not None else None
        if before != samples[name]:
            altered.add(address)
        if before is None or before[0] != identity or before[2] != sampled:
            edited.pop(name, None)
        elif (before[1] != version or address in changed) and tensor.nbytes > WHOLE_BYTES:
            # Edited, but the samples are the same, so only a digest of the whole tensor shows the edit.
            edited[name] = digest_whole(tensor)
        digest.update(f"\0{name}\0{tuple(tensor.shape)}\0{tensor.dtype}\0".encode() + sampled + edited.get(name, b""))
        # Watch only the model's own memory: a tensor loaded here from an offload map is freed afterwards.
        watched.append(own)
        if registered:
            probes.extend(probe_places(own))
    for name, module in model.named_modules(remove_duplicate=False):
        if "_active_adapter" in module.__dict__:
            digest.update(f"\0{name}\0{_adapter_state(module)}".encode())
        if saves_more(module):
            saved[name] = _saved(name, module, known)
            # (A module that saves nothing more adds nothing, so that KV stored for such models stays valid.)
            if beyond := saved[name][1]:
                digest.update(f"\0{name}\0saved\0".encode() + beyond)
    windows = WeightWindows(watched, None if known is None else known.windows, altered)
    return _Known(signature, probes, probe(probes), windows, digest.hexdigest(), samples, edited, saved)


def _saved(name: str, module: torch.nn.Module, known: _Known | None) -> tuple[Snapshot, bytes]:
    """A module's attributes, and the state it saves beyond tensors. The known state is reused while the attributes are
    unchanged, because unpacking the weights of a large model takes seconds."""
    now = Snapshot()
    add_attributes(module, now)
    before = known.saved.get(name) if known is not None else None
    return before if before is not None and before[0].equals(now) else (now, saved_beyond(name, module))
