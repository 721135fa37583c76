"""Segments as an enemy makes them: by the document of the format alone, and put where he wants them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from unit.format_by_document import Array, write_segment
from unit.store_helpers import FINGERPRINT, expected_kv

from hf_contiguouskv.store import KVGeometry, PrefixStore
from hf_contiguouskv.store.hashing import TokenIds


def raw_kv(g: KVGeometry, ids: TokenIds) -> Array:
    """K and V of a prefix as tests of the store make them, `[layers, 2, kv_heads, tokens, head_dim]`."""
    layers = [
        expected_kv(g, ids, layer).permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, : len(ids)].contiguous()
        for layer in range(g.num_layers)
    ]
    if g.dtype == torch.bfloat16:
        return np.stack([kv.view(torch.int16).numpy().view("<u2") for kv in layers])
    return np.stack([kv.numpy() for kv in layers])


def crafted(g: KVGeometry, ids: TokenIds, first_chunk: int = 0, kv: Array | None = None, **told: Any) -> bytes:
    """The bytes of a segment that holds what its header says, with checksums that match.

    Args:
        g: shapes and layout.
        ids: of the whole prefix.
        first_chunk: of the segment.
        kv: what it holds; what an honest writer of tests would, if left out.
        told: further arguments of `write_segment`.
    """
    own = ids[first_chunk * g.chunk_size :]
    _, content = write_segment(
        raw_kv(g, own) if kv is None else kv,
        ids,
        first_chunk,
        **(
            {
                "dtype": g.dtype_name,
                "c": g.chunk_size,
                "per_group": g.layers_per_group,
                "leaders": ",".join(map(str, g.leader_layers)),
                "indexed": ",".join(map(str, g.indexed_layers)),
                "packed": ",".join(map(str, g.packed_layers)),
                "compact": ",".join(map(str, g.compact_layers)),
                "fingerprint": FINGERPRINT,
            }
            | told
        ),
    )
    return content


def plant(folder: Path, key: str, content: bytes) -> Path:
    """Put bytes where the segment `key` of a store lies."""
    path = folder / "segments" / key[:2] / f"{key}.safetensors"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o600)
    return path


def path_in(store: PrefixStore, key: str) -> Path:
    """Where the segment `key` of an open store lies."""
    return store.path / "segments" / key[:2] / f"{key}.safetensors"
