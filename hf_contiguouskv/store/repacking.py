"""Stored prefixes in another form: the key index and chunks in few bits are made again from the exact K and V."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Hashable
from dataclasses import replace
from typing import NamedTuple

from ..errors import InputError, StoreError
from ..model.kv_geometry import KVGeometry
from .backend import BlobWriter
from .derived import write_again
from .format import SegmentHeader
from .inner import StoreInner
from .key import NO_MAC
from .output import SegmentOutput, as_store_error
from .rows import drop_segment, insert_segment, segment_by_key, set_use
from .segment import Segment


class Repacked(NamedTuple):
    """A segment that has another form now.

    Attributes:
        key: its name, as before.
        before, after: bytes of its file.
    """

    key: str
    before: int
    after: int


def repack_segment(inner: StoreInner, key: str, index_bits: int) -> Repacked | None:
    """Give a segment a key index of `index_bits` bits, and chunks in the form that goes with it.

    Its K and V, its name and its history stay. Until the new file replaces the old one, at once, requests use the old
    one, and those that have it open keep it.

    Args:
        inner: of its store, not a shared one.
        key: of the segment.
        index_bits: 8 or 2 (see `ContiguousKVConfig`).

    Returns:
        what was done; `None`: it has this form already, or is gone or another one by now.

    Raises:
        InputError: its chunks or heads have a size for which there is no such form.
        SegmentCorruptError: its bytes do not match their checksums; it is left as it is.
        StoreFullError: there is no room for another file beside it.
        StoreError: it cannot be read or written.
    """
    with contextlib.closing(inner.opener(inner.parts.backend.open(key))) as segment:
        geometry = _in_form(segment.geometry, index_bits)
        if geometry == segment.geometry:
            return None
        header = replace(segment.header, geometry=geometry, mac=NO_MAC)
        try:
            output = SegmentOutput(
                header, segment.token_ids, inner.parts.backend.create(key, header.nbytes), inner.parts.key
            )
            try:
                write_again(segment, output)
                output.finish(header.compute_ms / 1000)
                done = _put_in_place(inner, segment.identity, output.header, segment, output.blob)
            finally:
                output.blob.discard()
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise as_store_error(error, key) from error
        before = segment.nbytes
    if not done:
        return None
    inner.parts.opened.forget([key])
    if not inner.room.is_within_bound():
        inner.room.evict_excess()
    return Repacked(key, before, header.nbytes)


def _in_form(geometry: KVGeometry, index_bits: int) -> KVGeometry:
    layers = tuple(sorted(geometry.indexed_layers + geometry.compact_layers))
    if index_bits == 2 and layers and (geometry.head_dim % 2 or geometry.chunk_size % 4):
        raise InputError(
            f"chunks of {geometry.chunk_size} tokens with {geometry.head_dim} channels cannot have an index of 2 bits: "
            "it needs a chunk_size of 4 or more, and an even head_dim"
        )
    return geometry.with_index(layers, index_bits)


def _put_in_place(
    inner: StoreInner, identity: Hashable, header: SegmentHeader, segment: Segment, blob: BlobWriter
) -> bool:
    """Replace the segment that was read, if it is still what is stored under its name."""

    def change(db: sqlite3.Connection) -> bool:
        row = segment_by_key(db, header.key)
        if row is None or inner.parts.backend.identity(header.key) not in (identity, *published):
            return False
        if not published:  # (A damaged index is rebuilt, and this is called once more.)
            blob.publish()
            published.append(inner.parts.backend.identity(header.key))
        drop_segment(db, header.key)
        insert_segment(db, header, segment.token_ids, blob.stored_bytes, row.created, bool(row.pinned))
        set_use(db, header.key, row.created, row.last_used, row.uses)
        return True

    published: list[Hashable] = []
    inner.parts.uses.flush()
    done: bool = inner.parts.index.write(change)
    return done


def require_repackable(inner: StoreInner) -> None:
    """Refuse stores whose segments may not be replaced.

    Raises:
        StoreClosedError: the store was closed.
        InputError: it is a shared one.
    """
    inner.require_open()
    if inner.fleet is not None:
        raise InputError(
            "what a shared store holds is never replaced: pull it to a folder, repack it there, delete it with "
            "rm --remote, and push it"
        )
