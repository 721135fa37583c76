"""What strategies that choose tokens have in common: how they ask for units of a prefix, take them, and count them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from hf_contiguouskv.config import ReadOptions
from hf_contiguouskv.loading.chunk_accounts import Arrival
from hf_contiguouskv.loading.chunk_loader import ChunkLoader
from hf_contiguouskv.memory.blocks import neighbours
from hf_contiguouskv.request.strategy import LayerInput, RequestContext
from hf_contiguouskv.store.attached_prefix import AttachedPrefix
from hf_contiguouskv.store.format import KVGeometry

from .moving import send
from .states import on_accelerator
from .token_scores import Tokens, tokens_kept
from .units import Nodes

# Layers whose keys are read ahead of compute, as in the library.
AHEAD = 3


class TokenStrategy(ABC):
    """Chooses tokens instead of chunks, in every layer. One row, full attention. Implements the library's `Strategy`.

    Of the plan's prefix only its length and geometry count.

    Args:
        context: of the request.
        units: the prefix in units.
        nodes: of the prefix.
        ahead: layers whose first keys are read before attention gets there; 0: none.

    Attributes:
        loader: of units. Each layer of the model has two stored ones: keys, values.
        kept: tokens that each layer uses.

    Raises:
        ValueError: the model has layers with a sliding window.
    """

    # All tokens may be kept, but they are chosen all the same.
    keeps_all = False

    def __init__(self, context: RequestContext, units: AttachedPrefix, nodes: Nodes, ahead: int) -> None:
        self.plan = plan = context.plan
        if len(plan.layers.full_layers) < len(plan.layers.windows):
            raise ValueError("only models with full attention in every layer are supported")
        assert plan.config.budget != "auto"
        self.stats = context.stats
        self.units = units
        self.nodes = nodes
        self.layout = nodes.layout
        self.prefix = plan.prefix
        self.kept = tokens_kept(plan.prefix.tokens, plan.config.budget)
        self.devices = plan.layers.devices
        stored = [device for device in self.devices for _ in range(2)]
        self.loader = ChunkLoader(
            context.store,
            [units] * len(stored),
            stored,
            context.stats,
            lookahead_bytes=ReadOptions().lookahead_bytes,
            verify=plan.config.reading.verify,
            timeline=context.timeline,
            usage=context.usage,
        )
        self._timeline = context.timeline
        self._ahead = ahead
        self._asked: set[int] = set()
        self._sent: dict[tuple[str, torch.device], torch.Tensor] = {}

    @property
    def kept_tokens(self) -> int:
        return self.kept

    def start(self, loaded: Collection[int]) -> None:
        self._ask_keys(range(self._ahead))

    def load(self, asked: LayerInput, destination: torch.Tensor) -> Sequence[Arrival]:
        if asked.query.shape[0] != 1 or asked.options.get("softcap") is not None:
            raise ValueError("these systems serve one row, of models without a soft cap on attention")
        self._ask_keys(range(asked.layer, asked.layer + 1 + self._ahead))
        with torch.no_grad():
            scaling = asked.options["scaling"]
            self.choose(asked.layer, asked.query[0], asked.suffix_keys[0], scaling, destination[:, 0])
        return []

    def load_tail(self, layer: int, window: int) -> tuple[torch.Tensor, torch.Tensor]:
        """See `Strategy`: there are no such layers."""
        raise ValueError("only models with full attention in every layer are supported")

    def selected_chunks(self, layer: int) -> torch.Tensor | None:
        """See `Strategy`: chunks are not what is chosen."""
        return None

    def count(self, layer: int, arrived: Sequence[Arrival]) -> None:
        """See `Strategy`. Units were counted when they were taken; attention uses only some tokens of each."""
        self.stats.bytes_used += self.kept * self.prefix.token_bytes()

    def copy_for(self, context: RequestContext) -> TokenStrategy:
        return type(self)(context, self.units, self.nodes, self._ahead)

    @abstractmethod
    def choose(
        self, layer: int, queries: torch.Tensor, suffix_keys: torch.Tensor, scaling: float, destination: torch.Tensor
    ) -> None:
        """Fill `destination` `(2 (K, V), kv_heads, kept_tokens, head_dim)`.

        Args:
            layer: layer index.
            queries: `(heads, q, head_dim)` after RoPE.
            suffix_keys: `(kv_heads, q, head_dim)`.
            scaling: factor on `q @ k`.
            destination: where attention looks.
        """

    # -- tokens and places --------------------------------------------------------------------------------------------

    def on_device(self, layer: int) -> bool:
        """Whether a layer is on an accelerator."""
        return on_accelerator(self.devices[layer])

    def sent(self, name: str, numbers: Tokens, layer: int) -> torch.Tensor:
        """`numbers`, the same in all of a request, on the device of a layer; sent there once."""
        device = self.devices[layer]
        found = self._sent.get((name, device))
        if found is None:
            found = self._sent[name, device] = send(numbers, device)
        return found

    def of_tokens(self, states: torch.Tensor, layer: int) -> torch.Tensor:
        """`(heads, places, head_dim)` without padding: `(heads, n, head_dim)`."""
        places = self.nodes.places
        return states[:, : self.prefix.tokens] if places is None else states[:, self.sent("places", places, layer)]

    def places_of(self, tokens: Tokens) -> Tokens:
        """Where tokens are, padding counted."""
        places = self.nodes.places
        return tokens if places is None else places[tokens]

    def places_on_device(self, tokens: torch.Tensor, layer: int) -> torch.Tensor:
        """As `places_of`, on the device of a layer."""
        places = self.nodes.places
        return tokens if places is None else self.sent("places", places, layer)[tokens]

    # -- units --------------------------------------------------------------------------------------------------------

    def _ask_keys(self, layers: range) -> None:
        for layer in layers:
            if layer < len(self.devices) and layer not in self._asked:
                self._asked.add(layer)
                self.ask(self.layout.keys_of(layer), self.nodes.keys_apart())

    def ask(self, stored_layer: int, units: Tokens) -> None:
        """Start reading units of one stored layer (int64, ascending)."""
        self.loader.want([stored_layer], units)

    def take(self, stored_layer: int, units: Tokens, identifies: bool = False) -> torch.Tensor:
        """Units that were asked for, in the order of `units`, where attention runs: `(len(units), u, head_dim)`.

        `identifies`: they serve to choose tokens (counted as `bytes_identified`).
        """
        g, size, device = self.prefix.geometry, self.layout.unit_bytes, self.devices[stored_layer // 2]
        before = self.stats.bytes_read
        found = torch.empty(len(units), self.layout.unit_tokens, g.head_dim, dtype=g.dtype, device=device)
        rows = found.view(torch.uint8).view(len(units), size)
        with closing(self.loader.take(stored_layer)) as arriving:
            for part in arriving:
                with self.timed("copy", stored_layer // 2):
                    positions = np.searchsorted(units, part.chunks)
                    if neighbours(positions):
                        rows[positions[0] : positions[0] + len(positions)] = part.extents(None)
                    else:
                        rows.index_copy_(0, send(positions, device), part.extents(None))
                    if not identifies:  # As in the library: hits are of what attention uses.
                        self.loader.accounts.count_hits(stored_layer, Arrival.of(part))
        if identifies:
            self.stats.bytes_identified += self.stats.bytes_read - before
        return found

    @contextmanager
    def timed(self, kind: str, layer: int) -> Iterator[None]:
        """What happens inside goes into the timeline."""
        began = perf_counter()
        yield
        self._timeline.add(kind, layer, began, perf_counter())

    def used(self, stored_layer: int, units: Tokens, share: npt.NDArray[np.float64] | None = None) -> None:
        """Tell memory which units a layer has used, and which share of each unit of the prefix was important."""
        self.loader.accounts.note_used(stored_layer, units)
        if share is not None:
            self.loader.accounts.note_importance([stored_layer], share.astype(np.float32))


class TokenMethod:
    """Serves one prefix by choosing tokens. Implements the library's `ServingMethod`.

    Args:
        make: makes a strategy from the context of a request.

    Attributes:
        last: the strategy of the last request; `None`: there was none.
    """

    def __init__(self, make: Callable[[RequestContext], TokenStrategy]) -> None:
        self._make = make
        self.last: TokenStrategy | None = None

    def attach(self, ids: torch.Tensor, geometry: KVGeometry) -> AttachedPrefix:
        """See `ServingMethod`. (The prefix itself is in units.)"""
        return AttachedPrefix(len(ids), (), geometry)

    def strategy(self, context: RequestContext) -> TokenStrategy:
        self.last = self._make(context)
        return self.last
