"""What modules save besides parameters and buffers: packed weights of quantised layers, state of their own making.

`torch.ao.quantization.quantize_dynamic`, for one, replaces each weight by an opaque object. A module that has such
state says so by overriding `_save_to_state_dict` or `get_extra_state`, and what these give is what a fingerprint reads.
"""

from __future__ import annotations

import enum
import io
import operator
import weakref
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ..errors import UnsupportedModelError
from .weights import counts, sample, state_of

_SAVE = torch.nn.Module._save_to_state_dict
_EXTRA = torch.nn.Module.get_extra_state
# What every module has; the rest of its `__dict__` is its own.
_COMMON = frozenset(torch.nn.Module().__dict__)
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_NAMES = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
_BY_VALUE = frozenset({*_SCALARS, *_NAMES})

# Of each type that saves more: how many attributes one of its modules had, and names of those that are its own.
_own_attributes: dict[type, tuple[int, tuple[str, ...]]] = {}


@dataclass(slots=True)
class Snapshot:
    """What is cheap to ask of a model or module, and changes with it.

    Attributes:
        values: compared by `==`.
        references: weak references to opaque objects, compared by `is`: the address of a packed weight that was
            replaced is often that of the next one, but a live object has one weak reference, and that is no other's.
    """

    values: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)

    def equals(self, other: Snapshot) -> bool:
        """Whether both are of the same state."""
        return (
            self.values == other.values
            and len(self.references) == len(other.references)
            and all(map(operator.is_, self.references, other.references))
        )


def saves_more(module: torch.nn.Module) -> bool:
    """Whether a module may save more than parameters and buffers; asked of every module for every request."""
    kind = type(module)
    if kind._save_to_state_dict is _SAVE and kind.get_extra_state is _EXTRA:
        return False
    # What bitsandbytes saves beside its weights are the scales that `weights.named_tensors` has; its way of saving
    # converts weights in place, fails for some of its layers, and gives other names after the first forward.
    return kind._save_to_state_dict.__module__.partition(".")[0] != "bitsandbytes"


def add_attributes(module: torch.nn.Module, snapshot: Snapshot) -> None:
    """Add what a module's own attributes are now, so that it shows when one of them is replaced.

    Args:
        module: one that `saves_more`.
        snapshot: is added to.
    """
    # (One microsecond for a packed layer. A model has hundreds, and this runs for every request.)
    attributes = module.__dict__
    count, names = _own_attributes.get(type(module), (0, ()))
    if count != len(attributes) or not all(map(attributes.__contains__, names)):
        names = tuple(name for name in attributes if name not in _COMMON)
        _own_attributes[type(module)] = len(attributes), names
    values, references = snapshot.values, snapshot.references
    values.append(names)
    for name in names:
        value = attributes[name]
        kind = type(value)
        if kind in _BY_VALUE:
            values.append(value)
        elif kind is torch.ScriptObject:
            references.append(weakref.ref(value))
        else:
            _add(value, snapshot)


def _add(value: Any, snapshot: Snapshot) -> None:
    if type(value) in _BY_VALUE:
        snapshot.values.append(value)
    elif isinstance(value, torch.Tensor):
        snapshot.values.append(state_of(value))
    elif isinstance(value, tuple | list):
        snapshot.values.append(len(value))
        for one in value:
            _add(one, snapshot)
    elif isinstance(value, dict):
        snapshot.values.append(len(value))
        for pair in value.items():
            _add(pair, snapshot)
    else:
        try:
            snapshot.references.append(weakref.ref(value))
        except TypeError:
            snapshot.values.append(id(value))


def saved_beyond(name: str, module: torch.nn.Module) -> bytes:
    """What a module saves besides parameters and buffers, in an unambiguous form; tensors in it are sampled.

    Args:
        name: of the module, for messages.
        module: one that `saves_more`.

    Returns:
        nothing (`b""`) where it saves nothing more after all.

    Raises:
        UnsupportedModelError: something in it cannot be read.
    """
    saved: OrderedDict[str, Any] = OrderedDict()
    saved._metadata = OrderedDict()  # type: ignore[attr-defined] # As in `state_dict`: some modules write to it.
    try:
        module._save_to_state_dict(saved, "", True)
    except Exception as error:
        raise _refusal(name, module, f"does not say what it saves ({type(error).__name__}: {error})") from error
    known = {id(parameter) for parameter in module._parameters.values()}
    known |= {id(buffer) for own, buffer in module._buffers.items() if counts(module, own)}
    parts = []
    for key in sorted(saved):
        value = saved[key]
        if value is None or id(value) in known:
            continue
        try:
            parts += [_framed(key.encode()), *_content(value)]
        except _UnreadableError as error:
            raise _refusal(name, module, f"saves {key!r} with {error} in it") from None
        except Exception as error:
            reason = f"saves {key!r}, which cannot be read ({type(error).__name__}: {error})"
            raise _refusal(name, module, reason) from error
    return b"".join(parts)


def _refusal(name: str, module: torch.nn.Module, what: str) -> UnsupportedModelError:
    kind = type(module)
    return UnsupportedModelError(
        f"module {name or 'itself'!r} of the model ({kind.__module__}.{kind.__qualname__}) {what}. Without it this "
        "model cannot be told from others: let the module keep it in parameters or buffers, or save it as tensors, "
        "numbers, strings, bytes, or lists, tuples and dicts of these"
    )


class _UnreadableError(Exception):
    """Names a type of which we do not know what is in it."""


def _framed(octets: bytes) -> bytes:
    return len(octets).to_bytes(8, "little") + octets


def _content(value: Any) -> Iterator[bytes]:
    """Pieces that differ in sum where values differ, wherever these lie and whatever order a dict is in."""
    if isinstance(value, torch.Tensor):
        yield _framed(f"tensor {tuple(value.shape)} {value.dtype}".encode()) + sample(value)
    elif isinstance(value, torch.ScriptObject):
        yield from _content(value.__getstate__())
    elif isinstance(value, tuple | list):
        yield _framed(f"list {len(value)}".encode())
        for one in value:
            yield from _content(one)
    elif isinstance(value, dict):
        yield _framed(f"dict {len(value)}".encode())
        yield from sorted(b"".join(_content(pair)) for pair in value.items())
    elif isinstance(value, set | frozenset):
        yield _framed(f"set {len(value)}".encode())
        yield from sorted(b"".join(_content(one)) for one in value)
    elif isinstance(value, np.ndarray | np.generic):
        if value.dtype.hasobject:
            raise _UnreadableError("a numpy array of objects")
        yield _framed(f"array {value.shape} {value.dtype}".encode()) + _framed(value.tobytes())
    elif isinstance(value, io.BytesIO):
        yield _framed(b"bytes") + _framed(value.getvalue())
    elif isinstance(value, bytearray | memoryview):
        yield _framed(b"bytes") + _framed(bytes(value))
    elif isinstance(value, torch.device):
        yield _framed(b"device")  # Where something lies does not change what it is.
    elif isinstance(value, (*_SCALARS, *_NAMES, enum.Enum)):
        yield _framed(f"{type(value).__name__} {value!r}".encode())
    else:
        raise _UnreadableError(f"a {type(value).__module__}.{type(value).__qualname__}")
