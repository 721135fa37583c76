"""Publishes prompts whose K/V a forward of the user has computed exactly."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..errors import StoreClosedError, StoreError
from ..model.kv_geometry import KVGeometry
from ..store.inner import StoreInner
from .segment_feed import SegmentFeed

# K and V of one layer, `(kv_heads, n - start, head_dim)` each, of tokens `[start, n)` of a prompt; and `start`.
LayerStates = tuple[torch.Tensor, torch.Tensor, int]


def persist_rows(
    rows: Sequence[tuple[np.ndarray, Sequence[LayerStates]]],
    store: StoreInner,
    fingerprint: str,
    geometry: KVGeometry,
    compute_s: float = 0.0,
) -> None:
    """Publish prompts whose KV was computed exactly by a forward of the user.

    Args:
        rows: per prompt its ids, int64 `(n,)`, and per layer `(keys, values, start)`: `(kv_heads, n - start,
            head_dim)` of tokens `[start, n)`. Tokens before `start` must already be stored, or the prompt is skipped.
        compute_s: duration of that forward in seconds.

    Failures to store are only counted and reported (`StoreInner.write_failed`), because the request has been answered.
    """
    for ids, layers in rows:
        try:
            _persist_row(ids, layers, store, fingerprint, geometry, compute_s / len(rows))
        except StoreClosedError:
            raise
        except (StoreError, OSError) as error:
            store.write_failed(error)


def _persist_row(
    ids: np.ndarray,
    layers: Sequence[LayerStates],
    store: StoreInner,
    fingerprint: str,
    geometry: KVGeometry,
    compute_s: float,
) -> None:
    c = geometry.chunk_size
    if not all(keys.dtype == values.dtype == geometry.dtype for keys, values, _ in layers):
        return
    done = -1
    while True:
        known = store.lookup(fingerprint, ids, c, geometry=geometry, count=False)
        before, done = done, 0 if known is None else known.tokens
        first_chunk = done // c
        if done in (len(ids), before) or any(start > first_chunk * c for _, _, start in layers):
            return
        # If a segment in the middle was lost, the segments after it are found again once it is stored.
        later = store.next_stored(fingerprint, ids, c, first_chunk + 1)
        end = len(ids) if later is None else later * c
        with store.begin_segment(fingerprint, geometry, ids[:end], first_chunk, known) as writer:
            feed = SegmentFeed(writer, first_chunk, end)
            for layer, (keys, values, start) in enumerate(layers):
                feed.feed(layer, keys[:, : end - start], values[:, : end - start], start)
            writer.commit(compute_s)
