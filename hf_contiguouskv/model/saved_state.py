"""State that modules save besides parameters and buffers: packed weights of quantised layers, and custom state.

`torch.ao.quantization.quantize_dynamic`, for example, replaces each weight by an opaque object. A module with such
state overrides `_save_to_state_dict` or `get_extra_state`, and a fingerprint reads what these return.
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
# Attributes that every module has; all others belong to its class.
_COMMON = frozenset(torch.nn.Module().__dict__)
_SCALARS = (bool, int, float, complex, str, bytes, type(None))
_NAMES = (torch.dtype, torch.layout, torch.memory_format, torch.qscheme)
_BY_VALUE = frozenset({*_SCALARS, *_NAMES})

# By type that saves more: the number of attributes of one of its modules, and the names that `_COMMON` lacks.
_own_attributes: dict[type, tuple[int, tuple[str, ...]]] = {}


@dataclass(slots=True)
class Snapshot:
    """Cheaply read state of a model or module that changes when the model changes.

    Attributes:
        values: compared by `==`.
        references: weak references to opaque objects, compared by `is`. A new packed weight often gets the address of
            the one it replaced, but each live object has its own single weak reference.
    """

    values: list[Any] = field(default_factory=list)
    references: list[Any] = field(default_factory=list)

    def equals(self, other: Snapshot) -> bool:
        """Whether both snapshots show the same state."""
        return (
            self.values == other.values
            and len(self.references) == len(other.references)
            and all(map(operator.is_, self.references, other.references))
        )


def saves_more(module: torch.nn.Module) -> bool:
    """Whether a module may save more than parameters and buffers; called for every module in every request."""
    kind = type(module)
    if kind._save_to_state_dict is _SAVE and kind.get_extra_state is _EXTRA:
        return False
    # Besides weights, bitsandbytes saves only scales, which `weights.named_tensors` covers. Its save method converts
    # weights in place, fails for some of its layers, and returns other names after the first forward.
    return kind._save_to_state_dict.__module__.partition(".")[0] != "bitsandbytes"


def add_attributes(module: torch.nn.Module, snapshot: Snapshot) -> None:
    """Add the current values of a module's own attributes to `snapshot`, so that a replaced attribute is noticed.

    Args:
        module: a module that `saves_more`.
        snapshot: is extended.
    """
    # (This runs for every request and takes one microsecond per packed layer, of which a model has hundreds.)
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
    """The state that a module saves besides parameters and buffers, in an unambiguous form; tensors are sampled.

    Args:
        name: name of the module, for messages.
        module: a module that `saves_more`.

    Returns:
        the state; `b""` if the module saves nothing more.

    Raises:
        UnsupportedModelError: some of the state cannot be read.
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
    """Names a type whose contents cannot be read."""


def _framed(octets: bytes) -> bytes:
    return len(octets).to_bytes(8, "little") + octets


def _content(value: Any) -> Iterator[bytes]:
    """Pieces that together differ whenever values differ, and do not depend on devices or the order of a dict."""
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
        yield _framed(b"device")  # The device does not change the value.
    elif isinstance(value, (*_SCALARS, *_NAMES, enum.Enum)):
        yield _framed(f"{type(value).__name__} {value!r}".encode())
    else:
        raise _UnreadableError(f"a {type(value).__module__}.{type(value).__qualname__}")
