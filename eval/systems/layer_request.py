"""One request of a system that loads all layers of a prefix from one file, in order."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hf_contiguouskv import RequestStats
from hf_contiguouskv.hardware import accelerator as devices
from hf_contiguouskv.timeline import Timeline

from .attention import ROOM, BufferedLayer, GroupedLayer
from .layer_file import LayerShape
from .layer_memory import LayerMemory, Piece
from .layer_reader import Arrival, LayerFile, ReaderThreads


@dataclass
class Tiers:
    """Memory of an open system, and the threads that fill it.

    Attributes:
        host: the tier of the host.
        on: tiers of accelerators. Without one, attention uses the host's.
        threads: that read.
    """

    host: LayerMemory
    on: Mapping[torch.device, LayerMemory]
    threads: ReaderThreads

    def of(self, device: torch.device) -> LayerMemory:
        """Where attention on `device` looks for K and V."""
        return self.on.get(device, self.host)


@dataclass(frozen=True)
class Share:
    """A part of a layer that stays in memory, whatever requests do.

    Attributes:
        states: K and V, `(2, 1, kv_heads, tokens, head_dim)`.
        on_device: whether they are on the accelerator of the layer; if not, in the host's memory.
    """

    states: torch.Tensor
    on_device: bool


# By layer and part.
Resident = Mapping[tuple[int, int], Share]


@dataclass(eq=False)
class _Coming:
    """A layer on its way.

    Attributes:
        piece: where attention will find it.
        source: `"device"`, `"host"` or `"disk"`.
        staged: host memory that it crosses from, on an accelerator.
        arrivals: what must be there first.
        parts: that reads bring into `staged` or `piece`.
        left: parts that have not been read yet.
        crossed: event of the copy to an accelerator, which is queued by the thread that ends the last read.
        good: whether attention can use it.
    """

    piece: Piece
    source: str
    staged: Piece | None = None
    arrivals: list[Arrival] = field(default_factory=list)
    parts: tuple[int, ...] = ()
    left: int = 0
    crossed: Any = None
    good: bool = False


class LayerRequest:
    """Brings the layers of a prefix to where attention uses them.

    Args:
        key: of the prefix in memory.
        file: that holds it.
        tiers: memory.
        places: device of each layer.
        ahead: how many layers are read ahead of the one that attention needs.
        resident: what stays in memory of the prefix.
        keeps: whether layers stay in memory after the request; if not, only those that were there before do.

    Attributes:
        stats, timeline: what the request does.
    """

    def __init__(
        self,
        key: bytes,
        file: LayerFile,
        tiers: Tiers,
        places: Sequence[torch.device],
        ahead: int,
        resident: Resident,
        keeps: bool,
    ) -> None:
        self._key, self._file, self._tiers, self._places = key, file, tiers, places
        self._ahead, self._resident, self._keeps = ahead, resident, keeps
        self._capacity = file.shape.capacity(ROOM)
        self._layers: dict[int, _Coming] = {}
        self._under_way = 0
        self._lock = threading.Lock()
        shape = file.shape
        self.timeline = Timeline()
        self.stats = RequestStats(
            prefix_tokens=shape.tokens,
            tokens_from_store=shape.tokens,
            bytes_used=shape.layers * shape.rows * shape.tokens * shape.token_bytes,
        )
        # What is in the right place already is this request's: what it brings must not drive it out.
        for layer, device in enumerate(places):
            piece = tiers.of(device).take((key, layer))
            if piece is not None:
                found = "host" if tiers.of(device) is tiers.host else "device"
                self._layers[layer] = _Coming(piece, found, good=True)
        self._pump(range(ahead))

    @property
    def shape(self) -> LayerShape:
        """Of the prefix."""
        return self._file.shape

    @property
    def _octets(self) -> int:
        shape = self.shape
        return shape.rows * self._capacity * shape.token_bytes

    # -- bringing -----------------------------------------------------------------------------------------------------

    def _pump(self, layers: range) -> None:
        with self._tiers.threads.together():
            self._start_all(layers)

    def _start_all(self, layers: range) -> None:
        for layer in layers:
            if layer < self.shape.layers and layer not in self._layers:
                # Pinned memory is scarce: what is under way takes half of it. (Without an accelerator layers land where
                # attention uses them.)
                most = self._tiers.host.max_bytes // 2
                if self._tiers.on and self._under_way and self._under_way + self._octets > most:
                    return
                self._start(layer)

    def _start(self, layer: int) -> None:
        tier = self._tiers.of(self._places[layer])
        if tier is self._tiers.host:
            coming = self._layers[layer] = _Coming(tier.lend(self._octets), "disk")
            self._read(layer, coming, coming.piece)
            return
        host = self._tiers.host.take((self._key, layer))
        device_piece = tier.lend(self._octets, reuse_busy=True)
        if host is not None:
            parts = tuple(range(len(self.shape.parts)))
            coming = self._layers[layer] = _Coming(device_piece, "host", staged=host, parts=parts)
            began = time.perf_counter()
            self._cross(layer, coming)
            self._crossed(layer, coming)
            self.timeline.add("copy", layer, began, time.perf_counter())
            return
        coming = self._layers[layer] = _Coming(device_piece, "disk", staged=self._tiers.host.lend(self._octets))
        self._under_way += self._octets
        assert coming.staged is not None
        self._read(layer, coming, coming.staged)

    def _read(self, layer: int, coming: _Coming, into: Piece) -> None:
        buffer = into.buffer(self.shape, self._capacity)
        own = [part for part in range(len(self.shape.parts)) if (layer, part) not in self._resident]
        coming.parts, coming.left = tuple(own), len(own)

        def then() -> None:
            with self._lock:
                coming.left -= 1
                last = not coming.left
            if last:
                self._cross(layer, coming)

        for part in own:
            rows = self._file.rows_of(buffer, part)
            crosses = then if coming.staged is not None else None
            coming.arrivals.append(self._file.read(layer, part, rows, self.timeline, crosses))
        if coming.staged is not None:
            if not own:
                self._cross(layer, coming)
        else:
            coming.arrivals += [
                self._copied(buffer, part, self._resident[layer, part].states)
                for part in range(len(self.shape.parts))
                if part not in own
            ]

    def _copied(self, buffer: torch.Tensor, part: int, states: torch.Tensor) -> Arrival:
        """Have a reader thread put what stays in memory to its place."""
        first, arrival = self.shape.firsts[part], Arrival(1)

        def copy() -> None:
            error: Exception | None = None
            try:
                buffer[:, :, :, first : first + states.shape[3]] = states
            except RuntimeError as found:
                error = found
            arrival.piece_done(0)
            arrival.end(error)

        self._tiers.threads.run([copy])
        return arrival

    # -- accelerators -------------------------------------------------------------------------------------------------

    def _cross(self, layer: int, coming: _Coming) -> None:
        """Queue the copy of a layer whose reads are over. Called by reader threads, too."""
        opened = devices.device_of(self._places[layer])
        assert opened is not None
        assert coming.staged is not None
        source = coming.staged.buffer(self.shape, self._capacity)
        target = coming.piece.buffer(self.shape, self._capacity)
        if len(coming.parts) == len(self.shape.parts):
            coming.crossed = opened.copy_in(source.flatten(), target.flatten(), coming.piece.busy)
        else:
            after = coming.piece.busy
            for part in range(len(self.shape.parts)):
                for row, into in self._rows(layer, part, source, target):
                    coming.crossed, after = opened.copy_in(row, into, after), None

    def _crossed(self, layer: int, coming: _Coming) -> None:
        """The copy of a layer is queued: give back the memory that it crosses from."""
        assert coming.staged is not None
        if coming.source == "disk":
            self._under_way -= self._octets
        # (Where only the accelerator holds anything of it, nothing crosses.)
        coming.staged.busy = coming.crossed
        whole = len(coming.parts) == len(self.shape.parts)
        kept = coming.source == "host" or (self._keeps and whole)
        self._tiers.host.give_back(coming.staged, (self._key, layer) if kept else None)
        coming.staged = None

    def _rows(
        self, layer: int, part: int, source: torch.Tensor, target: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Rows of a part in host memory, and where they go."""
        shape = self.shape
        begin = shape.firsts[part]
        end = begin + shape.parts[part]
        share = self._resident.get((layer, part))
        if share is not None and share.on_device:
            return []  # See `_fill`.
        rows = source.flatten(0, 2)[:, begin:end] if share is None else share.states.flatten(0, 2)
        return list(zip(rows, target.flatten(0, 2)[:, begin:end], strict=True))

    def _fill(self, layer: int, buffer: torch.Tensor) -> None:
        """Copy what stays on the accelerator to its place, on the stream of attention."""
        for (at, part), share in self._resident.items():
            if at == layer and share.on_device:
                first = self.shape.firsts[part]
                buffer[:, :, :, first : first + share.states.shape[3]] = share.states

    # -- using --------------------------------------------------------------------------------------------------------

    def take(self, layer: int) -> torch.Tensor:
        """A layer where attention uses it, `(2, 1, kv_heads, capacity, head_dim)`. The prefix is its first tokens.

        Raises:
            DamagedFileError: a checksum does not match.
            OSError: the disk failed.
        """
        if layer not in self._layers:
            self._start(layer)
        self._pump(range(layer + 1, layer + 1 + self._ahead))
        coming = self._layers[layer]
        self._wait(layer, coming)
        opened = devices.device_of(self._places[layer])
        buffer = coming.piece.buffer(self.shape, self._capacity)
        if opened is not None:
            if coming.staged is not None:
                self._crossed(layer, coming)
            if coming.crossed is not None:
                opened.wait(coming.crossed)
            opened.uses(coming.piece.octets)
            if coming.source == "disk":
                self._fill(layer, buffer)
            self._pump(range(layer + 1, layer + 1 + self._ahead))
        coming.good = True
        self.stats.hits[coming.source] += 1
        return buffer

    def _wait(self, layer: int, coming: _Coming) -> None:
        began = time.perf_counter()
        waited = sum(arrival.wait() for arrival in coming.arrivals)
        if waited:
            self.stats.io_wait_s += waited
            self.timeline.add("wait", layer, began, time.perf_counter())

    def close(self) -> None:
        """The request is over: what fits stays in memory."""
        for layer, coming in sorted(self._layers.items()):
            for arrival in coming.arrivals:
                arrival.settle()
                self.stats.bytes_read += arrival.bytes_read
            if coming.staged is not None:
                coming.staged.busy = coming.crossed
                self._tiers.host.give_back(coming.staged)
            tier, opened = self._tiers.of(self._places[layer]), devices.device_of(self._places[layer])
            if opened is not None:
                coming.piece.busy = opened.mark()
            stays = coming.good and (self._keeps or coming.source != "disk")
            tier.give_back(coming.piece, (self._key, layer) if stays else None)
        self._layers.clear()


class LoadedLayer(BufferedLayer):
    """A layer whose prefix is on its way until the first update.

    Args:
        layer: index.
        request: brings it.
    """

    def __init__(self, layer: int, request: LayerRequest) -> None:
        GroupedLayer.__init__(self)
        self._layer = layer
        self._request: LayerRequest | None = request
        self._tokens = request.shape.tokens

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._request is not None:
            self.use(self._request.take(self._layer), self._tokens)
            self._request = None
        return super().update(key_states, value_states, *args, **kwargs)

    def crop(self, tokens_to_remove: int) -> None:
        if self._request is not None and tokens_to_remove:
            raise ValueError("a cache can be cropped once its prefix was used")
        super().crop(tokens_to_remove)
