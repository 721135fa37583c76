"""A segment that is being written: where its bytes go, and what has been written so far."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from ..errors import StoreError, StoreFullError
from ..hardware.aligned_memory import as_memoryview
from .backend import BlobWriter
from .finite import NumberPlaces
from .format import SegmentHeader, covered_by_mac
from .hashing import TokenIds
from .key import Checksums, StoreKey
from .packing import pack_chunks
from .small_forms import small_forms
from .tensor_places import index_tensors

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SegmentOutput:
    """A blob that becomes a segment. Used by the writer thread, then by `commit`.

    Attributes:
        whole_checksums: of its tensors, in the order of `header.checked_tensors`; known once it is finished.

    Args:
        header: what the segment will say about itself.
        token_ids: int64 `[num_tokens]`.
        blob: from `SegmentBackend.create`, `header.nbytes` long.
        key: of the store, if it has one.
    """

    def __init__(
        self, header: SegmentHeader, token_ids: TokenIds, blob: BlobWriter, key: StoreKey | None = None
    ) -> None:
        self.header = header
        self.blob = blob
        self._key = key
        self._checksums = Checksums() if key is None else key.checksums(header.key)
        geometry = header.geometry
        self.data_start = len(header.encoded)
        self._numbers = NumberPlaces(header, self.data_start)
        self.written = np.zeros((geometry.num_layers, header.num_chunks), dtype=bool)
        self.checksums = np.zeros((geometry.num_layers, header.num_chunks), dtype="<u8")
        self._small = small_forms(geometry)
        self._small_checksums = [np.zeros((len(one.layers), header.num_chunks), dtype="<u8") for one in self._small]
        self.indexed: set[int] = set()
        self.whole_checksums: list[int] = []
        try:
            blob.write(0, memoryview(header.encoded))
            blob.write(self.start("token_ids"), memoryview(token_ids.tobytes()))
        except BaseException:
            blob.discard()
            raise

    def start(self, name: str) -> int:
        return self.data_start + self.header.places[name].start

    def write_chunks(self, layer: int, first: int, kv: torch.Tensor, small: torch.Tensor | None = None) -> None:
        """Write `kv` `[chunks, 2, kv_heads, c, head_dim]` and its checksums; what is past the last token becomes 0.

        `small`: the same in the layer's form in few bits, if that is known already; uint8 `[chunks, nbytes]`.
        """
        geometry, header = self.header.geometry, self.header
        chunks = kv.shape[0]
        valid = header.num_tokens - (header.num_chunks - 1) * geometry.chunk_size
        if valid < geometry.chunk_size and first + chunks == header.num_chunks:
            tail = kv[-1:].clone()
            tail[:, :, :, valid:] = 0
            if chunks > 1:
                self._write_extents(layer, first, kv[:-1], None if small is None else small[:-1])
            self._write_extents(layer, first + chunks - 1, tail, None if small is None else small[-1:])
        else:
            self._write_extents(layer, first, kv, small)

    def _write_extents(self, layer: int, first: int, kv: torch.Tensor, known: torch.Tensor | None) -> None:
        geometry = self.header.geometry
        extent, chunks = geometry.extent_bytes, kv.shape[0]
        octets = as_memoryview(kv)
        group, inside = divmod(layer, geometry.layers_per_group)
        stride = geometry.group_layers(group) * extent
        start = self.start(f"payload.{group}") + first * stride + inside * extent
        self._require_finite(start, octets, layer)
        self.checksums[layer, first : first + chunks] = self._each(octets, extent)
        if stride == extent:
            self.blob.write(start, octets)
        else:
            for i in range(chunks):
                self.blob.write(start + i * stride, octets[i * extent : (i + 1) * extent])
        if layer in geometry.leader_layers:
            keys = kv[:, 0].contiguous()
            self.blob.write(self.start(f"leader_keys.{layer}") + first * geometry.keys_bytes, as_memoryview(keys))
        for small, checksums in zip(self._small, self._small_checksums, strict=True):
            if layer in small.layers:
                packed = as_memoryview(pack_chunks(small.form, kv) if known is None else known)
                start = self.start(small.tensor(layer)) + first * small.nbytes
                self._require_finite(start, packed, layer)
                self.blob.write(start, packed)
                checksums[small.layers.index(layer), first : first + chunks] = self._each(packed, small.nbytes)
        self.written[layer, first : first + chunks] = True

    def _require_finite(self, start: int, octets: memoryview, layer: int) -> None:
        # What readers refuse must not be written.
        if not self._numbers.are_finite(start, octets):
            raise StoreError(
                f"segment {self.header.key}: keys or values of layer {layer} are infinite, no numbers or beyond "
                "2**56, so they are not stored; does the model overflow in this dtype?"
            )

    def write_index(self, layer: int, tensors: Sequence[torch.Tensor]) -> None:
        """Write the key index of a layer: its `index_tensors`, in their order."""
        for name, tensor in zip(index_tensors(self.header.geometry, layer), tensors, strict=True):
            octets, start = as_memoryview(tensor.contiguous()), self.start(name)
            self._require_finite(start, octets, layer)
            self.blob.write(start, octets)
        self.indexed.add(layer)

    def adopt(self) -> None:
        """Take what lies in the blob already for what was to be written, and make its checksums."""
        g = self.header.geometry
        for group in range(g.num_groups):
            layers = range(group * g.layers_per_group, group * g.layers_per_group + g.group_layers(group))
            start = self.start(f"payload.{group}")
            for chunk in range(self.header.num_chunks):
                octets = memoryview(self.blob.read(start, len(layers) * g.extent_bytes))
                self.checksums[layers, chunk] = self._each(octets, g.extent_bytes)
                start += octets.nbytes
        for small, checksums in zip(self._small, self._small_checksums, strict=True):
            for row, layer in enumerate(small.layers):
                start, nbytes = self.start(small.tensor(layer)), self.header.num_chunks * small.nbytes
                checksums[row] = self._each(memoryview(self.blob.read(start, nbytes)), small.nbytes)
        self.written[:] = True
        self.indexed = {layer for layer in range(g.num_layers) if index_tensors(g, layer)}

    def finish(self, compute_s: float) -> None:
        """Write the checksums and what only the end knows, and make it all durable.

        Args:
            compute_s: how long the model took, seconds; 0 is unknown.

        Raises:
            StoreError: something was never written.
        """
        if not self.written.all():
            layer, chunk = np.argwhere(~self.written)[0].tolist()
            raise StoreError(
                f"{self.blob.name}: segment is incomplete, {int((~self.written).sum())} extents were never written, "
                f"the first is layer {layer}, chunk {chunk} of the segment"
            )
        g = self.header.geometry
        missing = [layer for layer in range(g.num_layers) if index_tensors(g, layer) and layer not in self.indexed]
        if missing:
            raise StoreError(f"{self.blob.name}: segment is incomplete, no key index for layers {missing}")
        self.whole_checksums = [self._digest(name) for name in self.header.checked_tensors]
        whole = np.array(self.whole_checksums, dtype="<u8")
        # Neighbours, in this order and without padding.
        checksums = b"".join(one.tobytes() for one in (self.checksums, *self._small_checksums, whole))
        self.blob.write(self.start("checksums.payload"), memoryview(checksums))
        self.header = replace(self.header, compute_ms=round(1000 * compute_s))
        if self._key is not None:
            covered = covered_by_mac(self.header.encoded[8:])
            self.header = replace(self.header, mac=self._key.mac(covered, checksums))
        self.blob.write(0, memoryview(self.header.encoded))
        self.blob.seal()

    def _digest(self, name: str) -> int:
        # Chunks may come in any order, so tensors that span all of them are hashed once they are complete.
        digest = self._checksums.begin()
        start, left = self.start(name), self.header.places[name].nbytes
        while left:
            octets = self.blob.read(start, min(left, 2**22))
            if not octets:
                raise StoreError(f"{self.blob.name}: was cut while it was written")
            digest.update(octets)
            start, left = start + len(octets), left - len(octets)
        return int(digest.intdigest())

    def _each(self, octets: memoryview, size: int) -> list[int]:
        """The checksum of each `size` bytes."""
        checksum = self._checksums.of
        return [checksum(octets[start : start + size]) for start in range(0, len(octets), size)]


def as_store_error(error: OSError, key: str) -> StoreError:
    """What the operating system said, as one of our errors: a full disk is a full store."""
    if error.errno in _FULL:
        return StoreFullError(error.errno, f"segment {key}: {error.strerror}; free space or delete stored prefixes")
    return StoreError(f"segment {key} could not be written: {error}")
