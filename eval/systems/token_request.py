"""What requests of systems that choose tokens have in common: the library's request and cache, with other insides."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore, RequestStats
from hf_contiguouskv.errors import SegmentCorruptError, SegmentReadError
from hf_contiguouskv.loading.hit_counting import Noted, count_hits
from hf_contiguouskv.loading.payload_reads import PayloadReads
from hf_contiguouskv.memory.blocks import neighbours
from hf_contiguouskv.model.layer_plan import LayerPlan
from hf_contiguouskv.planning.read_plan import ReadPlan
from hf_contiguouskv.prefill.exact_prefill import geometry_of
from hf_contiguouskv.request.prefix_request import PrefixRequest
from hf_contiguouskv.store.attached_prefix import AttachedPrefix

from .moving import send
from .states import on_accelerator
from .token_scores import Tokens, tokens_kept
from .units import Nodes

# Layers whose keys are read ahead of compute, as in the library.
AHEAD = 3


class TokenRequest(PrefixRequest):
    """A request that chooses tokens instead of chunks, in every layer. One row, full attention.

    Args:
        units: the prefix in units.
        nodes: of the prefix.
        ahead: layers whose first keys are read before attention gets there; 0: none.
        prefix, config, plan, store, stats: see `PrefixRequest`; of the prefix only its length and geometry count.

    Raises:
        ValueError: the model has layers with a sliding window.
    """

    def __init__(
        self,
        units: AttachedPrefix,
        nodes: Nodes,
        ahead: int,
        prefix: AttachedPrefix,
        config: ContiguousKVConfig,
        plan: LayerPlan,
        store: PrefixStore,
        stats: RequestStats,
    ) -> None:
        if len(plan.full_layers) < len(plan.windows):
            raise ValueError("only models with full attention in every layer are supported")
        self.units = units
        self.nodes = nodes
        self.layout = nodes.layout
        assert config.budget != "auto"
        self.kept = tokens_kept(prefix.tokens, config.budget)
        self._layers_ahead = ahead
        self._asked: set[int] = set()
        self._sent: dict[tuple[str, torch.device], torch.Tensor] = {}
        super().__init__(ReadPlan.of(prefix, config, plan), store, stats)

    @property
    def kept_tokens(self) -> int:
        """See `PrefixRequest`."""
        return self.kept

    @property
    def keeps_all(self) -> bool:
        """See `PrefixRequest`: even if all tokens are kept, they are chosen."""
        return False

    def _open_reads(self) -> None:
        store = self._store
        if store.memory.behind:
            store.reader.run(store.memory.catch_up)
        self._payload = PayloadReads(
            self.units, store.reader, store.memory, self.stats, self.plan.config.reading.verify, self.timeline
        )
        self._reading = False

    def _ensure_reading(self) -> None:
        if not self._reading:
            self._reading = True
            self._ask_keys(range(self._layers_ahead))

    def _replace_prefix(self, error: SegmentCorruptError | SegmentReadError, attempt: int) -> None:
        raise error  # These systems are measured, not relied upon: damage ends the request.

    def _ask_keys(self, layers: range) -> None:
        for layer in layers:
            if layer < len(self._full) and layer not in self._asked:
                self._asked.add(layer)
                self.ask(self.layout.keys_of(layer), self.nodes.keys_apart())

    def on_device(self, layer: int) -> bool:
        """Whether a layer is on an accelerator."""
        return on_accelerator(self.plan.layers.devices[layer])

    def sent(self, name: str, numbers: Tokens, layer: int) -> torch.Tensor:
        """`numbers`, the same in all of a request, on the device of a layer; sent there once."""
        device = self.plan.layers.devices[layer]
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

    @torch.no_grad()
    def _fill(
        self,
        layer: int,
        query: torch.Tensor,
        suffix_keys: torch.Tensor,
        options: Mapping[str, Any],
        destination: torch.Tensor,
    ) -> list[Noted]:
        if query.shape[0] != 1 or options.get("softcap") is not None:
            raise ValueError("these systems serve one row, of models without a soft cap on attention")
        self._ask_keys(range(layer, layer + 1 + self._layers_ahead))
        self.choose(layer, query[0], suffix_keys[0], options["scaling"], destination[:, 0])
        return []

    def _count(self, layer: int, batches: Sequence[Noted]) -> None:
        # Batches were counted when they were taken; of each, attention uses but some tokens.
        self.stats.bytes_used += self.kept * self.prefix.token_bytes()

    def ask(self, stored_layer: int, units: Tokens) -> None:
        """Start reading units of one stored layer (int64, ascending)."""
        self._payload.ask([stored_layer], units, self.plan.layers.devices[stored_layer // 2])

    def take(self, stored_layer: int, units: Tokens, identifies: bool = False) -> torch.Tensor:
        """Units that were asked for, in the order of `units`, where attention runs: `(len(units), u, head_dim)`.

        `identifies`: they serve to choose tokens (counted as `bytes_identified`).
        """
        g, size, device = self.prefix.geometry, self.layout.unit_bytes, self.plan.layers.devices[stored_layer // 2]
        before = self.stats.bytes_read
        found = torch.empty(len(units), self.layout.unit_tokens, g.head_dim, dtype=g.dtype, device=device)
        rows = found.view(torch.uint8).view(len(units), size)
        with closing(self._payload.take(stored_layer)) as arriving:
            for batch in arriving:
                with self.timed("copy", stored_layer // 2):
                    positions = np.searchsorted(units, batch.chunks)
                    if neighbours(positions):
                        rows[positions[0] : positions[0] + len(positions)] = batch.extents(None)
                    else:
                        rows.index_copy_(0, send(positions, device), batch.extents(None))
                    if not identifies:  # As in the library: hits are of what attention uses.
                        count_hits(self.stats, self._usage, batch, self.units.extent_bytes)
        if identifies:
            self.stats.bytes_identified += self.stats.bytes_read - before
        return found

    @contextmanager
    def timed(self, kind: str, layer: int) -> Iterator[None]:
        """What happens inside goes into the timeline, if there is one."""
        began = perf_counter()
        yield
        if self.timeline is not None:
            self.timeline.add(kind, layer, began, perf_counter())

    def used(self, stored_layer: int, units: Tokens, share: npt.NDArray[np.float64] | None = None) -> None:
        """Tell memory which units a layer has used, and which share of each unit of the prefix was important."""
        self._usage.used(self._payload.tables, stored_layer, units)
        if share is not None:
            self._usage.mass.append(([stored_layer], share.astype(np.float32)))

    def _settle_reads(self) -> None:
        self._payload.settle()

    def _close_reads(self) -> None:
        self._payload.close()


# Makes a request from `(prefix, config, plan, store, stats)`.
MakeRequest = Callable[[AttachedPrefix, ContiguousKVConfig, LayerPlan, PrefixStore, RequestStats], PrefixRequest]


class TokenCache(ContiguousKVCache):
    """The library's cache, served by another kind of request.

    Args:
        model, prefix_ids, store, config: see `ContiguousKVCache`.
        make_request: makes the request; called anew for each.
    """

    def __init__(
        self,
        model: nn.Module,
        prefix_ids: torch.Tensor,
        store: PrefixStore,
        config: ContiguousKVConfig,
        make_request: MakeRequest,
    ) -> None:
        self._make_request = make_request
        super().__init__(model, prefix_ids, store=store, config=config)

    def _attach_ids(self, lm: nn.Module, ids: torch.Tensor) -> None:
        self.prefix_ids = ids
        self._whole_prefix = AttachedPrefix(len(ids), (), geometry_of(self._support, self.config.chunk_size))
        self._attach(self._whole_prefix)
        assert self._attached is not None
        self._attached.request.start()

    def _new_request(self, prefix: AttachedPrefix, config: ContiguousKVConfig) -> PrefixRequest:
        assert self.store is not None
        return self._make_request(prefix, config, self._support.plan, self.store, self._stats)
