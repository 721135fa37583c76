"""Shape of a KV cache, and its layout in a segment."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..errors import InputError
from ..wording import quoted

SAFETENSORS_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPE_NAMES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LAYER_LISTS = ("leader_layers", "indexed_layers", "packed_layers", "compact_layers")
# At most this many channels share a scale in packed values.
_MAX_SHARING = 64


def channels_per_scale(head_dim: int) -> int:
    """Number of neighbouring channels of a packed value that share a scale: the largest divisor of `head_dim` up to
    64."""
    return next(count for count in range(min(head_dim, _MAX_SHARING), 0, -1) if head_dim % count == 0)


@dataclass(frozen=True)
class KVGeometry:
    """Shape of one model's KV cache, and its layout in a segment.

    Args:
        num_layers: layers with a KV cache.
        kv_heads: key/value heads per layer.
        head_dim: channels per head.
        dtype: dtype of keys and values: float32, float16 or bfloat16.
        chunk_size: tokens per chunk.
        layers_per_group: consecutive layers stored next to each other for one chunk.
        leader_layers: layers whose exact keys are stored a second time, contiguously.
        indexed_layers: layers that have an int8 key index.
        packed_layers: indexed layers whose values are stored a second time, in 4 bits.
        compact_layers: layers that have a coarse key index of 2 bits, and whose keys in 8 bits and values in 4 bits are
            stored a second time, chunk by chunk.

    Raises:
        InputError: a field is out of range.
    """

    num_layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    chunk_size: int = 16
    layers_per_group: int = 1
    leader_layers: tuple[int, ...] = ()
    indexed_layers: tuple[int, ...] = ()
    packed_layers: tuple[int, ...] = ()
    compact_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        limits = {"num_layers": 4096, "kv_heads": 4096, "head_dim": 65536, "chunk_size": 4096, "layers_per_group": 4096}
        for field, high in limits.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
                raise InputError(f"geometry: {field} must be a whole number from 1 to {high}, got {value!r}")
        if self.dtype not in SAFETENSORS_DTYPES:
            raise InputError(f"geometry: dtype must be one of {sorted(_DTYPE_NAMES)}, got {self.dtype}")
        for field in LAYER_LISTS:
            layers = getattr(self, field)
            if list(layers) != sorted(set(layers)) or any(not 0 <= layer < self.num_layers for layer in layers):
                raise InputError(
                    f"geometry: {field} must be different layers from 0 to {self.num_layers - 1} in ascending order, "
                    f"got {layers}"
                )
        if (self.packed_layers or self.compact_layers) and self.head_dim % 2:
            raise InputError(f"geometry: packed values need an even head_dim, got {self.head_dim}")
        if self.compact_layers and self.chunk_size % 4:
            raise InputError(f"geometry: a coarse index needs a chunk_size of 4 or more, got {self.chunk_size}")
        if set(self.compact_layers) & set(self.indexed_layers):
            raise InputError(
                f"geometry: compact_layers {self.compact_layers} must not be among indexed_layers {self.indexed_layers}"
            )
        if not set(self.packed_layers) <= set(self.indexed_layers):
            raise InputError(
                f"geometry: packed_layers {self.packed_layers} must be among indexed_layers {self.indexed_layers}"
            )

    def with_index(self, layers: tuple[int, ...], index_bits: int) -> KVGeometry:
        """The same K and V, with a key index of `index_bits` bits (8 or 2) and chunks in few bits of `layers`.

        With an odd `head_dim`, nothing can be packed: there is an index in 8 bits alone.
        """
        packs = self.head_dim % 2 == 0
        if index_bits == 2 and packs:
            return replace(self, indexed_layers=(), packed_layers=(), compact_layers=layers)
        return replace(self, indexed_layers=layers, packed_layers=layers if packs else (), compact_layers=())

    def continuing(self, earlier: KVGeometry) -> KVGeometry:
        """The geometry of what continues a segment of geometry `earlier`: it takes that one's form of index and chunks,
        or a prefix of both could only be served exactly."""
        if earlier.compact_layers:
            return self.with_index(earlier.compact_layers, 2)
        if self.compact_layers and earlier.packed_layers:
            return self.with_index(earlier.packed_layers, 8)
        return self

    def same_kv(self, other: KVGeometry) -> bool:
        """Whether chunks have the same shape and dtype; their layout may differ."""
        fields = ("num_layers", "kv_heads", "head_dim", "dtype", "chunk_size")
        return all(getattr(self, field) == getattr(other, field) for field in fields)

    @property
    def itemsize(self) -> int:
        """Bytes per number of K and V."""
        return self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """`"float32"`, `"float16"` or `"bfloat16"`."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def keys_bytes(self) -> int:
        """Bytes of the keys of one chunk of one layer."""
        return self.kv_heads * self.chunk_size * self.head_dim * self.itemsize

    @property
    def extent_bytes(self) -> int:
        """Bytes of one extent, `[2 (K, V), kv_heads, chunk_size, head_dim]`: one chunk of one layer."""
        return 2 * self.keys_bytes

    @property
    def packed_bytes(self) -> int:
        """Bytes of the packed values of one chunk of one layer (`packing`)."""
        scales = self.head_dim // channels_per_scale(self.head_dim)
        return self.kv_heads * self.chunk_size * (self.head_dim // 2 + 4 * scales)

    @property
    def compact_bytes(self) -> int:
        """Bytes of the keys in 8 bits and values in 4 bits of one chunk of one layer (`packing`)."""
        return self.packed_bytes + self.kv_heads * (self.chunk_size + 2) * self.head_dim

    @property
    def num_groups(self) -> int:
        """Layer groups; the last one may hold fewer layers."""
        return -(-self.num_layers // self.layers_per_group)

    def group_layers(self, group: int) -> int:
        """Number of layers in group `group`."""
        return min(self.layers_per_group, self.num_layers - group * self.layers_per_group)

    def to_metadata(self) -> dict[str, str]:
        """The fields as strings, for the `__metadata__` of a segment."""
        small = {"packed_layers": self.packed_layers, "compact_layers": self.compact_layers}
        return {
            "num_layers": str(self.num_layers),
            "kv_heads": str(self.kv_heads),
            "head_dim": str(self.head_dim),
            "dtype": self.dtype_name,
            "chunk_size": str(self.chunk_size),
            "layers_per_group": str(self.layers_per_group),
            "leader_layers": ",".join(map(str, self.leader_layers)),
            "indexed_layers": ",".join(map(str, self.indexed_layers)),
        } | {field: ",".join(map(str, layers)) for field, layers in small.items() if layers}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> KVGeometry:
        """The inverse of `to_metadata`; other keys are ignored.

        Raises:
            InputError: a field is missing or invalid.
        """
        dtype = metadata.get("dtype")
        if not isinstance(dtype, str) or dtype not in _DTYPE_NAMES:
            raise InputError(f"geometry: dtype must be one of {sorted(_DTYPE_NAMES)}, got {quoted(dtype)}")
        return cls(
            num_layers=whole_number(metadata, "num_layers"),
            kv_heads=whole_number(metadata, "kv_heads"),
            head_dim=whole_number(metadata, "head_dim"),
            dtype=_DTYPE_NAMES[dtype],
            chunk_size=whole_number(metadata, "chunk_size"),
            layers_per_group=whole_number(metadata, "layers_per_group"),
            leader_layers=_layer_numbers(metadata, "leader_layers"),
            indexed_layers=_layer_numbers(metadata, "indexed_layers"),
            # Fields that are left out where they are empty.
            packed_layers=_layer_numbers(metadata, "packed_layers") if "packed_layers" in metadata else (),
            compact_layers=_layer_numbers(metadata, "compact_layers") if "compact_layers" in metadata else (),
        )


def whole_number(metadata: Mapping[str, Any], field: str) -> int:
    """Field `field` of the metadata as a number.

    Raises:
        InputError: the field is missing or is not a whole number.
    """
    text = metadata.get(field)
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,15}", text):
        raise InputError(f"{field} must be a whole number, got {quoted(text)}")
    return int(text)


def _layer_numbers(metadata: Mapping[str, Any], field: str) -> tuple[int, ...]:
    text = metadata.get(field)
    if not isinstance(text, str) or not re.fullmatch(r"([0-9]{1,5}(,[0-9]{1,5})*)?", text):
        raise InputError(f"{field} must be layer numbers separated by commas, got {quoted(text)}")
    return tuple(int(layer) for layer in text.split(",")) if text else ()
