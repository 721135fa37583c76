"""Requests of this library: its default, everything exactly, and the published method. Quantities are those of
`ReadPlan`, which real requests use."""

from __future__ import annotations

import torch

from ..config import ContiguousKVConfig
from ..model.layer_plan import LayerPlan
from ..store.reads import gap_worth_reading
from .choosing import disk_cost
from .costs import Case, HostWork
from .network import Network
from .pipeline import Ask, LayerStep, RequestSteps
from .read_plan import TOGETHER_BYTES, ChoosingCost, ReadPlan
from .unwritten import unwritten_prefix
from .volumes import JOINED_BYTES, Volume, in_a_row, scattered

# Share of its chunks that a period has in common with the next (the paper: 52 to 64%).
SHARED = 0.58

_EXACT = HostWork(31_408, 560, 108, 51)
_DEFAULT = HostWork(31_808, 1_099, 209, 84, calls_per_piece=8)
_PUBLISHED = HostWork(31_410, 520, 136, 58, calls_per_piece=1.5)
# Bytes moved per byte of the K and V that attention then uses: copied (read and written), or expanded from 8-bit keys
# and 4-bit values (read; written; values twice again, for scale and offset).
_COPIED, _EXPANDED = 2.0, 3.5


def chunk_request(case: Case, config: ContiguousKVConfig) -> RequestSteps:
    """A request by this library, of whose prefix nothing is in memory.

    Args:
        case: the request.
        config: of the cache; its budget is a number.

    Raises:
        ConfigError: the budget is "auto".
    """
    return _ChunkRequest(case, config).steps()


class _ChunkRequest:
    """The quantities of one request."""

    def __init__(self, case: Case, config: ContiguousKVConfig) -> None:
        self._case = case
        windows = case.model.shape.layers.windows
        self._crosses = case.machine.has_accelerator
        device = torch.device("cuda" if self._crosses else "cpu")
        prefix = unwritten_prefix(case.model.geometry(config.chunk_size, config.index_bits), case.prefix_tokens)
        self._plan = ReadPlan.of(prefix, config, LayerPlan(windows, (device,) * len(windows)), self._choosing())
        self._published = config.selection.period > 1
        self._selection = config.selection
        self._config = config

    def _choosing(self) -> ChoosingCost | None:
        storage = self._case.machine.storage
        if storage.link_s is not None:
            return Network(storage.bytes_s, storage.latency_s).choosing
        return None if self._crosses else disk_cost(storage.disk_s)

    def steps(self) -> RequestSteps:
        """The request, layer by layer."""
        case, plan = self._case, self._plan
        windows = plan.layers.windows
        steps, used = [], 0.0
        for layer, window in enumerate(windows):
            if window is not None:
                nbytes = len(plan.tail_chunks(window)) * plan.prefix.extent_bytes
                kept = case.seen(layer)
                steps.append(LayerStep(*case.layer_s(_EXACT, kept, _COPIED * nbytes), in_a_row(nbytes)))
                used += kept * case.token_bytes
            else:
                steps.append(self._full_layer(layer))
                used += plan.kept_tokens * case.token_bytes
        before = self._work.before_s(case.machine) + case.output_s()
        return RequestSteps(steps, before, self._ahead, used_bytes=used)

    @property
    def _work(self) -> HostWork:
        return _EXACT if self._plan.keeps_all else _PUBLISHED if self._published else _DEFAULT

    @property
    def _ahead(self) -> int:
        """Layers whose first reads run ahead."""
        plan = self._plan
        if not plan.layers.full_layers or plan.keeps_all or plan.reads_whole_layers:
            each = max(1, plan.served.chunks * plan.served.extent_bytes)
            return max(1, plan.lookahead_bytes(self._crosses) // each)
        if self._published:
            return self._selection.period - 1
        return plan.lookahead_bytes(self._crosses) // max(1, plan.keys_bytes(plan.layers.full_layers[0]))

    def _full_layer(self, layer: int) -> LayerStep:
        case, plan = self._case, self._plan
        kv_bytes = plan.kept_tokens * case.token_bytes
        if plan.keeps_all:
            nbytes = plan.prefix.chunks * plan.prefix.extent_bytes
            seconds = case.layer_s(_EXACT, plan.kept_tokens, _COPIED * kv_bytes)
            return LayerStep(*seconds, self._whole(nbytes))
        moved = (_EXPANDED if plan.in_few_bits else _COPIED) * kv_bytes
        if plan.reads_whole_layers:
            keys, values = (
                self._whole(plan.keys_bytes(layer)),
                self._whole(plan.served.chunks * plan.served.extent_bytes),
            )
            first = Volume(keys.nbytes + values.nbytes, keys.reads + values.reads)
            return LayerStep(*case.layer_s(self._work, plan.kept_tokens, moved), first, self._choose_s(layer))
        leads = plan.is_leader(layer)
        return LayerStep(
            *case.layer_s(self._work, plan.kept_tokens, moved, plan.keep),
            self._whole(plan.keys_bytes(layer)) if leads or plan.keys_from_index else None,
            self._choose_s(layer) if leads else 0.0,
            self._period_asks(layer) if leads else (),
            tuple(Ask(target, self._chunks()) for target in plan.to_speculate(layer)),
        )

    def _choose_s(self, layer: int) -> float:
        case, limit = self._case, self._selection.queries
        queries = case.suffix_tokens if limit is None else min(limit, case.suffix_tokens)
        return case.scoring_s(queries, case.model.query_heads, self._plan.keys_bytes(layer))

    def _period_asks(self, leader: int) -> tuple[Ask, ...]:
        """What is asked for when the leader of a period has chosen: what was not read ahead for its layers."""
        ahead = self._speculated
        return tuple(Ask(layer, self._chunks(layer in ahead)) for layer in self._plan.period_of(leader))

    @property
    def _speculated(self) -> frozenset[int]:
        plan = self._plan
        return frozenset(target for layer in plan.layers.full_layers for target in plan.to_speculate(layer))

    def _chunks(self, partly_there: bool = False) -> Volume:
        """The chosen chunks of a layer, read by name; those that lie close together are read as one."""
        plan = self._plan
        share = plan.keep / max(1, plan.prefix.whole_chunks)
        keep = plan.keep * (1 - SHARED if partly_there else 1.0)
        # What a CPU reads by name is not joined across gaps (`HostResidency`).
        gap = gap_worth_reading(self._case.machine.storage.bytes_s) if self._crosses else 0
        found = scattered(keep, share, plan.served.extent_bytes, gap)
        tail = plan.served.extent_bytes if plan.prefix.tail_tokens and not partly_there else 0
        return Volume(found.nbytes + tail, found.reads)

    def _whole(self, nbytes: int) -> Volume:
        """A tensor of one layer; on a CPU, small ones of neighbouring layers are one read."""
        if self._crosses or nbytes >= JOINED_BYTES:
            return in_a_row(nbytes)
        return Volume(nbytes, nbytes / TOGETHER_BYTES)
