"""Small stores with known content, for the tests of the store."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from hf_contiguouskv.store import KVGeometry, PrefixStore, StoredPrefix
from hf_contiguouskv.store.hashing import TokenIds
from hf_contiguouskv.store.layer_index import layer_index
from hf_contiguouskv.store.local_disk import FileBlob
from hf_contiguouskv.store.reader import Read, aligned_buffer, as_memoryview
from hf_contiguouskv.store.segment import Segment
from hf_contiguouskv.store.tensor_places import index_tensors

FINGERPRINT = "f0" * 16


def geometry(**changes: object) -> KVGeometry:
    fields: dict[str, object] = {
        "num_layers": 3,
        "kv_heads": 2,
        "head_dim": 8,
        "dtype": torch.float32,
        "chunk_size": 4,
        "leader_layers": (0, 2),
        "indexed_layers": (1,),
    }
    return KVGeometry(**(fields | changes))  # type: ignore[arg-type]


def open_segment(path: Path, direct: bool = True) -> Segment:
    """The segment in a file, wherever that lies."""
    return Segment(FileBlob(path, direct=direct))


def path_of(segment: Segment) -> Path:
    """The file of a segment on the local disk."""
    assert isinstance(segment.blob, FileBlob)
    return segment.blob.path


def spoil_key_index(store: PrefixStore, key: str, layer: int = 1) -> None:
    """Make the key index of a stored segment zeros, with a checksum that matches."""
    segment = store.inner.opener(store.backend.open(key))
    path, name = path_of(segment), f"key_index.{layer}"
    offset, nbytes = segment.tensor_extent(name)
    last, _ = segment.tensor_extent("checksums.tensors")
    row = last + 8 * segment.header.checked_tensors.index(name)
    checksum = segment.checksum(bytes(nbytes)).to_bytes(8, "little")
    segment.close()
    octets = bytearray(path.read_bytes())
    octets[offset : offset + nbytes] = bytes(nbytes)
    octets[row : row + 8] = checksum
    path.write_bytes(octets)


def tokens(*numbers: int) -> TokenIds:
    return np.array(numbers, dtype=np.int64)


def some_tokens(count: int, seed: int = 0) -> TokenIds:
    return np.random.default_rng(seed).integers(0, 1000, count)


def expected_kv(g: KVGeometry, ids: TokenIds, layer: int) -> torch.Tensor:
    """K and V `[chunks, 2, kv_heads, c, head_dim]` that depend on the token ids, and are 0 past the last token."""
    chunks = -(-len(ids) // g.chunk_size)
    padded = torch.zeros(chunks * g.chunk_size)
    padded[: len(ids)] = torch.from_numpy(ids).float() + 1
    kv = padded.reshape(chunks, 1, 1, g.chunk_size, 1)
    ramp = torch.arange(1, 2 * g.kv_heads * g.head_dim + 1).reshape(1, 2, g.kv_heads, 1, g.head_dim)
    return (kv * ramp * (layer + 1) / 64).to(g.dtype).contiguous()


def write_prefix(
    store: PrefixStore,
    ids: TokenIds,
    first_chunk: int = 0,
    g: KVGeometry | None = None,
    fingerprint: str = FINGERPRINT,
    compute_s: float = 0.0,
) -> StoredPrefix:
    g = g or geometry()
    with store.inner.begin_segment(fingerprint, g, ids, first_chunk) as writer:
        own = ids[first_chunk * g.chunk_size :]
        for layer in range(g.num_layers):
            writer.write_chunks(layer, 0, expected_kv(g, own, layer))
        for layer in range(g.num_layers):
            if index_tensors(g, layer):
                keys = expected_kv(g, own, layer)[:, 0].transpose(0, 1).flatten(1, 2)[:, : len(own)]
                writer.write_index(layer, *layer_index(keys, g, layer))
        return writer.commit(compute_s)


def read_back(store: PrefixStore, stored: StoredPrefix, layers: Sequence[int]) -> list[torch.Tensor]:
    """K and V of all chunks of `stored`, per layer, through the reader, checksums compared."""
    result = []
    for layer in layers:
        g = stored.spans[0].segment.geometry
        count = sum(span.chunks for span in stored.spans)
        buffer = aligned_buffer(count * g.extent_bytes)
        view, reads, position = as_memoryview(buffer), [], 0
        for span in stored.spans:
            assert span.first_chunk == position
            for i in range(span.offset, span.offset + span.chunks):
                offset, nbytes = span.segment.extents().offset(layer, i), g.extent_bytes
                into = view[position * nbytes : (position + 1) * nbytes]
                checks = [(0, nbytes, span.segment.run_checksums(layer, i, 1)[0])]
                reads.append(Read(span.segment, offset, nbytes, into, checks))
                position += 1
        store.inner.reader.submit(reads).wait()
        result.append(buffer.view(g.dtype).reshape(count, 2, g.kv_heads, g.chunk_size, g.head_dim))
    return result
