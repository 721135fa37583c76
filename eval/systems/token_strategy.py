"""What strategies that choose tokens have in common: how they ask for units of a prefix, take them, and count them."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from time import perf_counter

import numpy as np
import numpy.typing as npt
import torch

from hf_contiguouskv.config import ReadOptions
from hf_contiguouskv.hardware.aligned_memory import aligned_buffer
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


class ScratchMemory:
    """Host memory that layers and requests reuse: fresh memory costs more than filling it. Used by one thread."""

    def __init__(self) -> None:
        self._octets: dict[str, torch.Tensor] = {}

    def of(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised; valid until the next call with this name."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._octets.get(name, ())) < size:
            self._octets[name] = aligned_buffer(size)
        return self._octets[name][:size].view(dtype).view(*shape)

    def clear(self) -> None:
        """Give it back."""
        self._octets.clear()


class TokenStrategy(ABC):
    """Chooses tokens instead of chunks, in every layer. One row, full attention. Implements the library's `Strategy`.

    Of the plan's prefix only its length and geometry count.

    Args:
        context: of the request.
        units: the prefix in units.
        nodes: of the prefix.
        overlap: whether the keys that every layer needs are read ahead of compute, from the start of the request on.
        scratch: memory to work with.

    Attributes:
        loader: of units. Each layer of the model has two stored ones: keys, values.
        kept: tokens that are chosen in each layer.

    """

    # All tokens may be kept, but they are chosen all the same.
    keeps_all = False

    def __init__(
        self, context: RequestContext, units: AttachedPrefix, nodes: Nodes, overlap: bool, scratch: ScratchMemory
    ) -> None:
        self.plan = plan = context.plan
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
        self.scratch = scratch
        self._timeline = context.timeline
        self._overlap = overlap
        self._sent: dict[tuple[str, torch.device], torch.Tensor] = {}

    @property
    def kept_tokens(self) -> int:
        """See `Strategy`: those that were chosen."""
        return self.kept

    def start(self, loaded: Collection[int]) -> None:
        if self._overlap:
            for layer in range(len(self.devices)):
                self.loader.want_later([self.layout.keys_of(layer)], self.nodes.keys_apart())
            self.loader.start_queued()

    def load(self, asked: LayerInput, destination: torch.Tensor) -> Sequence[Arrival]:
        if asked.query.shape[0] != 1 or asked.options.get("softcap") is not None:
            raise ValueError("these systems serve one row, of models without a soft cap on attention")
        if not self._overlap:
            self.ask(self.layout.keys_of(asked.layer), self.nodes.keys_apart())
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

    def single_tokens(self, layer: int) -> torch.Tensor | None:
        """See `Strategy`: which tokens are chosen is not kept."""
        return None

    def count(self, layer: int, arrived: Sequence[Arrival]) -> None:
        """See `Strategy`. Units were counted when they were taken; attention uses only some tokens of each."""
        self.stats.bytes_used += self.kept_tokens * self.prefix.token_bytes()

    def copy_for(self, context: RequestContext) -> TokenStrategy:
        return type(self)(context, self.units, self.nodes, self._overlap, self.scratch)

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

    def ask(self, stored_layer: int, units: Tokens) -> None:
        """Start reading units of one stored layer (int64, ascending)."""
        self.loader.want([stored_layer], units)

    def room(self, name: str, shape: Sequence[int], layer: int) -> torch.Tensor:
        """Memory for numbers of the model where a layer's attention runs; on a CPU until the next call with `name`."""
        dtype, device = self.prefix.geometry.dtype, self.devices[layer]
        if self.on_device(layer):
            return torch.empty(*shape, dtype=dtype, device=device)  # The device's allocator reuses it.
        return self.scratch.of(name, shape, dtype)

    @contextmanager
    def taken(self, stored_layer: int, units: Tokens, name: str, identifies: bool = False) -> Iterator[torch.Tensor]:
        """Units that were asked for, in the order of `units`, where attention runs, inside the context.

        Where they lie together in memory they are used there, without a copy.

        Args:
            stored_layer: that they are of.
            units: int64, ascending.
            name: of the memory that they are put together in, if need be.
            identifies: whether they serve to choose tokens (counted as `bytes_identified`).

        Yields:
            `(len(units), u, head_dim)`
        """
        g, layer = self.prefix.geometry, stored_layer // 2
        shape = (len(units), self.layout.unit_tokens, g.head_dim)
        found: torch.Tensor | None = None
        with closing(self.loader.take(stored_layer)) as arriving:
            for part in arriving:
                if not identifies:  # As in the library: hits are of what attention uses.
                    self.loader.accounts.count_hits(stored_layer, Arrival.of(part))
                elif part.ticket is not None:
                    self.stats.bytes_identified += part.ticket.bytes_read
                with self.timed("copy", layer):
                    positions = np.searchsorted(units, part.chunks)
                    together = neighbours(positions)
                    rows = part.extents(None)
                if together and len(positions) == len(units):
                    yield rows.view(g.dtype).view(shape)
                    continue  # There is nothing else, but the loader is to see the end.
                with self.timed("copy", layer):
                    if found is None:
                        found = self.room(name, shape, layer)
                    into = found.view(torch.uint8).view(len(units), -1)
                    if together:
                        into[positions[0] : positions[0] + len(positions)] = rows
                    else:
                        into.index_copy_(0, send(positions, self.devices[layer]), rows)
        if found is not None:
            yield found
        elif not len(units):
            yield self.room(name, shape, layer)

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
