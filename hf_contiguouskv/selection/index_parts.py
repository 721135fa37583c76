"""The key index of one segment and layer, in the form in which it lies in memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch

from ..store.coarse_index import build_coarse_index, expand_coarse_index, in_order_of_text
from ..store.key_index import build_key_index
from .integer_products import Scratch

# KV heads are expanded together up to this size: what is expanded stays in the processor's cache until it is used.
_EXPANDED_BYTES = 2 * 2**20


class IndexPart(Protocol):
    """What the scorer asks of a key index."""

    @property
    def scale(self) -> torch.Tensor:
        """Float32 `(kv_heads, head_dim)`: a key is about `index * scale`."""
        ...

    @property
    def shape(self) -> tuple[int, int, int]:
        """KV heads, chunks that are scored, channels."""
        ...

    @property
    def stored_chunks(self) -> int:
        """Chunks of `pieces`; there may be more than those that are scored."""
        ...

    def pieces(self, scratch: Scratch | None) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some KV heads at a time: which, and their index, int8 `(n, c, stored_chunks, head_dim)`, contiguous.

        Args:
            scratch: memory for a piece, which is valid until the next one; `None`: all heads at once, in fresh memory
                (on an accelerator).
        """
        ...

    def scored(self, products: torch.Tensor, dim: int) -> torch.Tensor:
        """What was computed for `stored_chunks` along `dim`, for the scored chunks in the order of the text."""
        ...


class KeyIndex(NamedTuple):
    """A key index in 8 bits.

    Attributes:
        numbers: int8 `(kv_heads, c, chunks, head_dim)`.
        scale: float32 `(kv_heads, head_dim)`.
    """

    numbers: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, keys: torch.Tensor, chunk_size: int) -> KeyIndex:
        """That of keys `(kv_heads, tokens, head_dim)`."""
        return cls(*build_key_index(keys, chunk_size))

    def of_chunks(self, chunks: torch.Tensor) -> torch.Tensor:
        """The numbers of some chunks, int64 `(n,)` on their device: int8 `(kv_heads, c, n, head_dim)`, a copy."""
        if self.numbers.shape[-1] % 8 == 0:
            # Eight channels at a time: a GPU copies element by element.
            return self.numbers.view(torch.int64).index_select(2, chunks).view(torch.int8)
        return self.numbers.index_select(2, chunks)

    def of_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The numbers of some tokens, int64 `(n,)` on their device: int8 `(kv_heads, n, head_dim)`, a copy."""
        c, chunks, head_dim = self.numbers.shape[1:]
        # (They lie by position in the chunk.)
        flat, places = self.numbers.flatten(1, 2), tokens % c * chunks + tokens // c
        if head_dim % 8 == 0:
            return flat.view(torch.int64).index_select(1, places).view(torch.int8)
        return flat.index_select(1, places)

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `IndexPart`."""
        kv_heads, _, chunks, head_dim = self.numbers.shape
        return kv_heads, chunks, head_dim

    @property
    def stored_chunks(self) -> int:
        """See `IndexPart`."""
        return self.numbers.shape[2]

    def pieces(self, scratch: Scratch | None) -> Iterator[tuple[slice, torch.Tensor]]:
        """See `IndexPart`."""
        yield slice(None), self.numbers

    def scored(self, products: torch.Tensor, dim: int) -> torch.Tensor:
        """See `IndexPart`."""
        return products


class CoarseIndex(NamedTuple):
    """A key index in 2 bits (`store.coarse_index`).

    Attributes:
        codes, levels: of a whole segment.
        scale: float32 `(kv_heads, head_dim)`.
        first, chunks: which chunks of the segment are scored.
    """

    codes: torch.Tensor
    levels: torch.Tensor
    scale: torch.Tensor
    first: int
    chunks: int

    @classmethod
    def of(cls, keys: torch.Tensor, chunk_size: int) -> CoarseIndex:
        """That of keys `(kv_heads, tokens, head_dim)`."""
        index, scale = build_key_index(keys, chunk_size)
        return cls(*build_coarse_index(index, keys.shape[1]), scale, 0, index.shape[2])

    @property
    def shape(self) -> tuple[int, int, int]:
        """See `IndexPart`."""
        return self.codes.shape[0], self.chunks, self.codes.shape[-1]

    @property
    def stored_chunks(self) -> int:
        """See `IndexPart`."""
        _, _, per_block, blocks, _ = self.codes.shape
        return per_block * blocks

    def pieces(self, scratch: Scratch | None) -> Iterator[tuple[slice, torch.Tensor]]:
        """See `IndexPart`."""
        kv_heads, quarter, per_block, blocks, head_dim = self.codes.shape
        head = 4 * quarter * per_block * blocks * head_dim
        step = kv_heads if scratch is None else max(1, _EXPANDED_BYTES // head)
        for begin in range(0, kv_heads, step):
            heads = slice(begin, min(kv_heads, begin + step))
            shape = heads.stop - begin, 4 * quarter, per_block, blocks, head_dim
            if scratch is None:
                memory = torch.empty(shape, dtype=torch.int8, device=self.codes.device)
            else:
                memory = scratch.of(*shape, dtype=torch.int8)
            expand_coarse_index(self.codes[heads], self.levels[heads], memory)
            yield heads, memory.flatten(2, 3)

    def scored(self, products: torch.Tensor, dim: int) -> torch.Tensor:
        """See `IndexPart`."""
        _, _, per_block, blocks, _ = self.codes.shape
        return in_order_of_text(products.unflatten(dim, (per_block, blocks)), dim).narrow(dim, self.first, self.chunks)
