"""Where the extents of a segment lie in its file, in one of the forms in which a segment holds its chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..memory.segments import Form
from .format import SegmentHeader
from .small_forms import SmallForm

__all__ = ["ExtentPlaces", "Form", "exact_extents", "small_extents"]


@dataclass(frozen=True)
class ExtentPlaces:
    """Extents of one form: one per layer that has them, and chunk.

    Attributes:
        nbytes: of one extent.
        starts: per layer, where its first extent begins in the file; -1: it has none.
        strides: per layer, bytes from one chunk to the next.
        checksums: name of the tensor of their checksums.
        rows: per layer, its row there; -1: none.
        tensors: per layer, the tensor that holds its extents and nothing else, or "".
    """

    nbytes: int
    starts: Sequence[int]
    strides: Sequence[int]
    checksums: str
    rows: Sequence[int]
    tensors: Sequence[str]

    @property
    def contiguous(self) -> bool:
        """Whether consecutive chunks of a layer follow each other."""
        return all(stride == self.nbytes for stride in self.strides)

    def offset(self, layer: int, chunk: int) -> int:
        """Where in the file the extent of `layer` and chunk number `chunk` of the segment begins."""
        return self.starts[layer] + chunk * self.strides[layer]


def exact_extents(header: SegmentHeader, data_start: int) -> ExtentPlaces:
    """K and V as the model computed them."""
    g = header.geometry
    starts, strides = [], []
    for layer in range(g.num_layers):
        group, inside = divmod(layer, g.layers_per_group)
        starts.append(data_start + header.places[f"payload.{group}"].start + inside * g.extent_bytes)
        strides.append(g.group_layers(group) * g.extent_bytes)
    layers = range(g.num_layers)
    tensors = [f"payload.{layer}" if g.layers_per_group == 1 else "" for layer in layers]
    return ExtentPlaces(g.extent_bytes, starts, strides, "checksums.payload", layers, tensors)


def small_extents(header: SegmentHeader, data_start: int, small: SmallForm) -> ExtentPlaces:
    """Those of a form in few bits."""
    layers, rows = range(header.geometry.num_layers), {layer: row for row, layer in enumerate(small.layers)}
    return ExtentPlaces(
        small.nbytes,
        [data_start + header.places[small.tensor(layer)].start if layer in rows else -1 for layer in layers],
        [small.nbytes] * len(layers),
        small.checksums,
        [rows.get(layer, -1) for layer in layers],
        [small.tensor(layer) if layer in rows else "" for layer in layers],
    )
