"""What all layers of one cache share while a prefix is attached, and what the session asks of a layer."""

from __future__ import annotations

from typing import Any, Protocol, Self

import torch

from ..errors import AttentionNotActiveError
from ..model.attention import Installation
from ..request.prefix_request import PrefixRequest


class AttachedRequest:
    """The running request of a cache, and whether its forward may use it.

    Args:
        request: on the attached prefix.
        installation: of the attention function that leads back to the layers.

    Attributes:
        announced: a forward of the cache's own model is running.
        plain: its tokens see all tokens before them: there is no padding, and no other mask.
        expected: the layer whose K/V went to the model last, until attention has asked for what belongs to them.
    """

    def __init__(self, request: PrefixRequest, installation: Installation) -> None:
        self.request = request
        self.installation = installation
        self.announced = False
        self.plain = False
        self.expected: int | None = None

    def expect(self, layer: int) -> None:
        """A layer hands its suffix to the model.

        Raises:
            AttentionNotActiveError: the layer before it was attended to without its prefix.
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
            AttentionNotActiveError: it is not; its answers would be silently wrong.
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
    """A layer of a transformers cache that can have a prefix in front. Its other methods are those of `CacheLayer`."""

    def attach(self, attached: AttachedRequest | None) -> None:
        """Put a prefix in front, or take it away. The layer forgets its suffix."""
        ...

    def copy_of(self, attached: AttachedRequest | None, memo: dict[int, Any]) -> Self:
        """A deep copy whose prefix is that of `attached`."""
        ...

    def record(self, recording: bool) -> None:
        """Remember the K/V of all tokens of the next forward, or forget them."""
        ...

    def row_states(self, row: int, pads: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, int]:
        """K and V `(kv_heads, n, head_dim)` of one row, computed exactly, and the token that they begin with.

        Args:
            row: of the batch.
            pads: its columns of left padding.
            tokens: how many real tokens the row has, prefix included.
        """
        ...

    def get_seq_length(self) -> int: ...

    def crop(self, tokens_to_remove: int) -> None: ...

    def reset(self) -> None: ...

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None: ...

    def batch_repeat_interleave(self, repeats: int) -> None: ...

    def batch_select_indices(self, indices: torch.Tensor) -> None: ...
