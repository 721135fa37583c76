"""What a request computes and what its host does, in seconds, by the sizes of a model and the speeds of a machine."""

from __future__ import annotations

from dataclasses import dataclass

from ..model.configured_model import ConfiguredModel
from .machine import Machine

# A softmax over scores, and sums of it, move each of them so many times: written, read for the largest, read and
# written for the exponentials, read for the sum, read for the shares.
_SCORE_MOVES = 6
_SCORE_BYTES = 4


@dataclass(frozen=True)
class HostWork:
    """What Python and torch do for a request, whatever its length.

    Counted in requests of Qwen2.5-7B's shape (`eval/time_model/counts.json`).

    Attributes:
        before: calls of functions before the first layer.
        calls: of functions, per layer.
        operations: of torch, per layer.
        kernels: that an accelerator is given, per layer.
        calls_per_piece: calls for each chunk or block that is chosen and read, per layer.
    """

    before: float
    calls: float
    operations: float
    kernels: float
    calls_per_piece: float = 0.0

    def before_s(self, machine: Machine) -> float:
        """Seconds before the first layer."""
        return self.before * machine.call_s

    def layer_s(self, machine: Machine, pieces: float = 0.0) -> float:
        """Seconds per layer in which so many chunks or blocks are chosen and read."""
        calls = self.calls + pieces * self.calls_per_piece
        return calls * machine.call_s + self.operations * machine.operation_s + self.kernels * machine.launch_s


@dataclass(frozen=True)
class Case:
    """One request of one model on one machine.

    Attributes:
        model: whose.
        machine: where.
        prefix_tokens: tokens that are stored.
        suffix_tokens: tokens that are new.
    """

    model: ConfiguredModel
    machine: Machine
    prefix_tokens: int
    suffix_tokens: int

    # -- bytes --------------------------------------------------------------------------------------------------------

    @property
    def token_bytes(self) -> int:
        """Bytes of the exact K and V of one token in one layer."""
        return self.model.kv_bytes_per_token // self.model.layers

    def seen(self, layer: int) -> int:
        """Prefix tokens that a layer can see: all, or those in its sliding window."""
        window = self.model.shape.layers.windows[layer]
        return self.prefix_tokens if window is None else min(self.prefix_tokens, window)

    # -- seconds ------------------------------------------------------------------------------------------------------

    def layer_s(self, work: HostWork, kept: float, moved: float = 0.0, pieces: float = 0.0) -> tuple[float, float]:
        """Seconds of the host and of computing, of one layer for the suffix.

        Args:
            work: of the host.
            kept: prefix tokens that attention uses.
            moved: bytes that are copied into place before.
            pieces: chunks or blocks that are chosen and read.
        """
        new = self.suffix_tokens
        device = self._products_s(new) + self._attention_s(new * kept + new * (new + 1) / 2, kept + new)
        return work.layer_s(self.machine, pieces), device + moved / self.machine.memory_s

    def prefill_layer_s(self, work: HostWork, layer: int) -> tuple[float, float]:
        """Seconds of the host and of computing, of one layer for prefix and suffix in one forward."""
        tokens = self.prefix_tokens + self.suffix_tokens
        window = self.model.shape.layers.windows[layer]
        reach = tokens if window is None else min(tokens, window)
        pairs = reach * (reach + 1) / 2 + (tokens - reach) * reach
        return work.layer_s(self.machine), self._products_s(tokens) + self._attention_s(pairs, tokens)

    def output_s(self) -> float:
        """Seconds of the output matrix, for one token."""
        numbers = self.model.output_weights
        itemsize = self.model.shape.dtype.itemsize
        return max(2 * numbers / self.machine.flops_s, numbers * itemsize / self.machine.memory_s)

    def scoring_s(self, queries: int, heads: int, key_bytes: float) -> float:
        """Seconds to score all prefix tokens of one layer.

        Args:
            queries: suffix tokens that vote.
            heads: query heads whose scores count.
            key_bytes: of the keys that are read from memory.
        """
        scores = queries * heads * self.prefix_tokens
        products = 2 * scores * self.model.shape.head_dim / self.machine.attention_flops_s
        return products + (key_bytes + _SCORE_MOVES * _SCORE_BYTES * scores) / self.machine.memory_s

    def _products_s(self, tokens: int) -> float:
        """One layer's matrix products: arithmetic or the weights' way from memory, whichever takes longer."""
        model, layers = self.model, self.model.layers
        arithmetic = 2 * model.active_weights * tokens / self.machine.flops_s
        weights = model.weights_read(tokens) * model.shape.dtype.itemsize / self.machine.memory_s
        return max(arithmetic, weights) / layers

    def _attention_s(self, pairs: float, tokens: float) -> float:
        """One layer's attention over `pairs` of a query and a key, with K and V of `tokens` tokens."""
        arithmetic = 4 * pairs * self.model.query_heads * self.model.shape.head_dim / self.machine.attention_flops_s
        return max(arithmetic, tokens * self.token_bytes / self.machine.memory_s)
