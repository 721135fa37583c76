"""The forms in which a segment holds chunks a second time, in few bits."""

from __future__ import annotations

from typing import NamedTuple

from ..memory.segments import Form
from ..model.kv_geometry import KVGeometry


class SmallForm(NamedTuple):
    """A form in few bits. Each of its layers is a tensor of its own, uint8 `[chunks, nbytes]`.

    Attributes:
        form: its name.
        kind: the name of its tensors, which the layer's number follows.
        layers: that have it, ascending.
        nbytes: of one chunk of one layer.
    """

    form: Form
    kind: str
    layers: tuple[int, ...]
    nbytes: int

    @property
    def checksums(self) -> str:
        """Name of the tensor of its checksums, uint64 `[layers, chunks]`."""
        return f"checksums.{self.kind}"

    def tensor(self, layer: int) -> str:
        """Name of the tensor of a layer."""
        return f"{self.kind}.{layer}"


def small_forms(geometry: KVGeometry) -> list[SmallForm]:
    """Those that segments of this geometry have, in file order."""
    known = (
        SmallForm("packed", "values4", geometry.packed_layers, geometry.packed_bytes),
        SmallForm("compact", "compact", geometry.compact_layers, geometry.compact_bytes),
    )
    return [one for one in known if one.layers]
