"""From chunks as they are stored to the rows of K and V that attention reads."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..hardware.accelerator import send
from ..memory.blocks import neighbours
from ..selection.index_parts import KeyIndex
from ..store.attached_prefix import AttachedPrefix, Chunks
from ..store.packing import unpack_compact, unpack_values
from .residency import LoadedChunks


def chosen(
    chunks: Chunks, selected: Chunks | None, keep: int, *, selected_only: bool = False
) -> tuple[Chunks | None, Chunks]:
    """Which of the chunks that have arrived a row uses, and where each of them goes.

    Args:
        chunks: int64, each once, those that have arrived.
        selected: int64 `(keep,)`, ascending, the row's selection; `None`: the first `keep` chunks of the prefix.
        keep: how many chunks the row uses.
        selected_only: whether `chunks` is known to hold nothing else, but for a partial last chunk.

    Returns:
        positions in `chunks` (`None`: all of them), and which of the row's chunks each is, int64 `(n,)` both.
    """
    if selected is not None and len(chunks) > keep and _covers(chunks, selected):
        return selected - chunks[0], np.arange(keep)  # A whole layer was read: no need to look up each of its chunks.
    places = chunks if selected is None else np.searchsorted(selected, chunks)
    used = places < keep
    if selected is not None and not selected_only:
        used &= selected[np.minimum(places, keep - 1)] == chunks
    if used.all():
        return None, places
    take = np.flatnonzero(used)
    return take, places[take]


def _covers(chunks: Chunks, selected: Chunks) -> bool:
    """Whether `chunks` are neighbours and everything `selected` (ascending) is among them."""
    first, last = int(chunks[0]), int(chunks[-1])
    return first <= int(selected[0]) and int(selected[-1]) <= last and neighbours(chunks)


def kv_view(prefix: AttachedPrefix, extents: torch.Tensor) -> torch.Tensor:
    """Exact chunks as they are stored, uint8 `(n, extent_bytes)`, as `(n, 2 (K, V), kv_heads, c, head_dim)`."""
    g = prefix.geometry
    return extents.view(g.dtype).view(-1, 2, g.kv_heads, g.chunk_size, g.head_dim)


def place(kv: torch.Tensor, positions: Chunks, destination: torch.Tensor) -> None:
    """Copy chunks into their positions.

    Args:
        kv: `(n, 2, kv_heads, c, head_dim)`.
        positions: int64 `(n,)`, each once.
        destination: `(2, kv_heads, chunks, c, head_dim)`.
    """
    turned = kv.permute(1, 2, 0, 3, 4)
    if neighbours(positions):
        destination.narrow(2, int(positions[0]), len(positions)).copy_(turned)
    else:
        where = send(torch.from_numpy(positions), destination.device)
        destination.index_copy_(2, where, turned)


def assemble(
    prefix: AttachedPrefix,
    part: LoadedChunks,
    selected: Sequence[Chunks] | None,
    keep: int,
    destination: torch.Tensor,
    *,
    selected_only: bool = False,
) -> None:
    """Copy the chunks of `part` into the rows that selected them.

    Chunks keep the order of the text, wherever they come from: the same chunks give the same answer, bit for bit. Of a
    packed prefix only values are copied: `place_keys` copies the keys.

    Args:
        prefix: in the form in which the chunks were read.
        part: chunks that have arrived.
        selected: per row int64 `(keep,)`, ascending; `None`: each row uses the first `keep` chunks.
        keep: whole chunks that each row uses.
        destination: `(2 (K, V), rows, kv_heads, kept_tokens, head_dim)`; a partial last chunk comes behind the others.
        selected_only: it is known that all rows want all of the part.
    """
    c, tail = prefix.geometry.chunk_size, prefix.tail_tokens
    whole = keep * c
    chunks = destination.narrow(3, 0, whole).view(*destination.shape[:3], keep, c, destination.shape[4])
    if tail:
        last = np.flatnonzero(part.chunks == prefix.whole_chunks)
        if len(last):
            put(prefix, part.extents(last), None, destination[:, :, :, None, whole:])
    for row in range(destination.shape[1]):
        own = None if selected is None else selected[row]
        take, places = chosen(part.chunks, own, keep, selected_only=selected_only)
        if len(places):
            put(prefix, part.extents(take), places, chunks[:, row : row + 1])


def put(prefix: AttachedPrefix, extents: torch.Tensor, places: Chunks | None, destination: torch.Tensor) -> None:
    """Copy extents, uint8 `(n, extent_bytes)`, into `destination` `(2, rows, kv_heads, chunks, tokens, head_dim)`.

    They go to `places`, int64 `(n,)`. `None`: there is one extent, a partial chunk, and room for one.
    """
    if prefix.form != "exact":
        _put_few_bits(prefix, extents, places, destination)
    elif places is None:
        destination.copy_(kv_view(prefix, extents)[0, :, None, :, None, : destination.shape[4]])
    else:
        place(kv_view(prefix, extents), places, destination[:, 0])


def _put_few_bits(
    prefix: AttachedPrefix, extents: torch.Tensor, places: Chunks | None, destination: torch.Tensor
) -> None:
    """As `put`, for extents in few bits. Where attention gets its keys from the key index, only values are put."""
    g = prefix.geometry
    if prefix.form == "packed":
        destination = destination[1:]
    if places is not None and neighbours(places):
        # Straight to where attention looks.
        _unpack(prefix, extents, destination[:, 0].narrow(2, int(places[0]), len(places)))
        return
    found = destination.new_empty(len(destination), g.kv_heads, len(extents), g.chunk_size, g.head_dim)
    _unpack(prefix, extents, found)
    if places is None:
        destination.copy_(found[:, None, :, :, : destination.shape[4]])
    else:
        where = send(torch.from_numpy(places), destination.device)
        destination[:, 0].index_copy_(2, where, found)


def _unpack(prefix: AttachedPrefix, extents: torch.Tensor, out: torch.Tensor) -> None:
    """Into `out`, `(1 (V) or 2 (K, V), kv_heads, n, c, head_dim)`."""
    states = [out[which].transpose(0, 1) for which in range(len(out))]  # (Not unbound: those could not be written.)
    if prefix.form == "packed":
        unpack_values(extents, prefix.geometry, states[0])
    else:
        unpack_compact(extents, prefix.geometry, *states)


def copy_in_order(prefix: AttachedPrefix, part: LoadedChunks, first_chunk: int, destination: torch.Tensor) -> None:
    """Copy all chunks of `part` into `destination` `(2, kv_heads, chunks, c, head_dim)`, from `first_chunk` on."""
    place(kv_view(prefix, part.extents(None)), part.chunks - first_chunk, destination)


def place_keys(
    prefix: AttachedPrefix, parts: Sequence[KeyIndex], selected: Sequence[Chunks], destination: torch.Tensor
) -> None:
    """Put the keys of selected chunks, in 8 bits, where attention looks.

    Args:
        prefix: whose keys.
        parts: index and scale per segment, for all chunks of the prefix (see `selection.index_parts`).
        selected: per row int64 `(keep,)`, ascending.
        destination: `(rows, kv_heads, kept_tokens, head_dim)`, on the device of the parts; a partial last chunk comes
            behind the others.
    """
    c, tail = prefix.geometry.chunk_size, prefix.tail_tokens
    for row, own in enumerate(selected):
        place_chunk_keys(prefix, parts, own, destination[row, :, : len(own) * c].unflatten(1, (-1, c)))
    if tail:
        index, scale = parts[-1]
        last = index[:, :tail, prefix.whole_chunks - prefix.spans[-1].first_chunk] * scale[:, None]
        destination[:, :, destination.shape[2] - tail :] = last.to(destination.dtype)


def place_chunk_keys(
    prefix: AttachedPrefix, parts: Sequence[KeyIndex], chunks: Chunks, destination: torch.Tensor
) -> None:
    """Keys of whole chunks (int64, ascending) into `destination`, `(kv_heads, n, c, head_dim)`; see `place_keys`."""
    begin, ends = 0, [len(chunks)]
    if len(parts) > 1:
        ends = np.searchsorted(chunks, [span.first_chunk + span.chunks for span in prefix.spans]).tolist()
    for span, part, end in zip(prefix.spans, parts, ends, strict=True):
        if end > begin:
            _place_keys_of_segment(part, chunks[begin:end] - span.first_chunk, destination[:, begin:end])
        begin = end


def _place_keys_of_segment(part: KeyIndex, chunks: Chunks, destination: torch.Tensor) -> None:
    """Keys of `chunks` of one segment into `(kv_heads, n, c, head_dim)`."""
    found = part.of_chunks(send(torch.from_numpy(chunks), part.numbers.device))
    # Two steps in the dtype of the destination, which are several times as fast as one product of mixed dtypes.
    destination.copy_(found.transpose(1, 2))
    destination.mul_(part.scale.to(destination.dtype)[:, None, None])
