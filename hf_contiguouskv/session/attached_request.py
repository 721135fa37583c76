"""The state that all layers of a cache share while a prefix is attached, and the protocol of a layer."""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch

from ..errors import AttentionNotActiveError
from ..model.attention import Installation
from ..request.prefix_request import PrefixRequest


class AttachedRequest:
    """The running request of a cache, and whether its forward may use it.

    Args:
        request: the request on the attached prefix.
        installation: installs the attention function that calls back the layers.

    Attributes:
        announced: whether a forward of the cache's own model is running.
        plain: whether the forward's tokens see all tokens before them: no padding, and no other mask.
        expected: the last layer that passed its K/V to the model; `None` after attention has asked for its prefix.
    """

    def __init__(self, request: PrefixRequest, installation: Installation) -> None:
        self.request = request
        self.installation = installation
        self.announced = False
        self.plain = False
        self.expected: int | None = None

    def expect(self, layer: int) -> None:
        """Note that a layer passes its suffix to the model.

        Raises:
            AttentionNotActiveError: attention of the previous layer did not ask for its prefix.
        """
        if self.expected is not None:
            raise AttentionNotActiveError(
                f"attention of layer {self.expected} did not ask this cache for its prefix: the cache was made for "
                "another model, or the model's attention implementation was changed; make a new cache"
            )
        self.expected = layer

    def require_running(self) -> None:
        """Check that a forward of the cache's own model is running, with the library's attention function.

        Raises:
            AttentionNotActiveError: no such forward is running, so answers would be silently wrong.
        """
        if not self.announced:
            raise AttentionNotActiveError(
                "this cache with a prefix was passed to another model than it was made for, or to a forward that the "
                "library's hook does not see in this version of transformers; make a cache for that model"
            )
        if not self.installation.active:
            raise AttentionNotActiveError(
                "the model's attention implementation was changed in the middle of a forward with this cache; set it "
                "before the cache is made"
            )


class PrefixLayer(Protocol):
    """A layer of a transformers cache that can have a prefix in front; it also has the methods of `CacheLayer`."""

    def attach(self, attached: AttachedRequest | None) -> None:
        """Put a prefix in front, or remove it. The layer drops its suffix."""
        ...

    def copy_of(self, attached: AttachedRequest | None, memo: dict[int, Any]) -> Self:
        """A deep copy that uses the prefix of `attached`."""
        ...

    def record(self, recording: bool) -> None:
        """Keep the K/V of all tokens of the next forward, or drop them."""
        ...

    def row_states(self, row: int, pads: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Exactly computed K and V `(kv_heads, n, head_dim)` of one row, and the position of their first token.

        Args:
            row: index in the batch.
            pads: number of left-padding columns of the row.
            tokens: number of real tokens of the row, prefix included.
        """
        ...

    def get_seq_length(self) -> int: ...

    def crop(self, tokens_to_remove: int) -> None: ...

    def reset(self) -> None: ...

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...
