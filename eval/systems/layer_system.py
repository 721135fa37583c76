"""What systems that load all layers of a prefix have in common: their files, memory and states."""

from __future__ import annotations

import hashlib
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVConfig, RequestStats
from hf_contiguouskv.errors import UnsupportedModelError
from hf_contiguouskv.hardware import accelerator as devices
from hf_contiguouskv.hardware.aligned_memory import aligned_buffer
from hf_contiguouskv.memory.tiers import FREE_SHARE, UNKNOWN_DEVICE_BYTES
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.store.format import KVGeometry
from hf_contiguouskv.timeline import Timeline

from ..timing import drop_page_cache
from .attention import ROOM, GroupedAttention, cache_of
from .base import NotStoredError, SystemUnavailableError, key_of, require_states
from .in_memory import prefill
from .layer_file import LayerShape, write_layers
from .layer_memory import LayerMemory
from .layer_reader import LayerFile, ReaderThreads
from .layer_request import LayerRequest, LoadedLayer, Resident, Tiers
from .states import State, StateError, on_accelerator, require_state, warm_states
from .throttle import bucket_of

HOST_BYTES = 2 * 2**30


class LayerSystem:
    """All K and V of a prefix in one file, layer by layer.

    Args:
        name: with options.
        model: whose prefixes.
        folder: of the files.
        ahead: how many layers are read ahead of compute; `None`: all.
        keeps: whether what requests read stays in memory, where the least recently used layers go first.
        host_bytes: limit of what stays in host memory.
        device_bytes: the same for accelerators, which share it equally. `None`: a quarter of what is free.
        read_gbps: reads are no faster, in GB/s; `None`: as fast as the disk.

    Raises:
        SystemUnavailableError: the model has layers with sliding windows, or cannot be served for another reason.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        folder: Path,
        *,
        ahead: int | None,
        keeps: bool = True,
        host_bytes: int = HOST_BYTES,
        device_bytes: int | None = None,
        read_gbps: float | None = None,
    ) -> None:
        self.name = name
        self._model = model
        self._folder = folder
        self._keeps = keeps
        self._host_bytes, self._device_bytes = host_bytes, device_bytes
        self._bucket = bucket_of(read_gbps)
        self._attention = GroupedAttention(model)
        if self._attention.note is not None:
            raise SystemUnavailableError(f"{name} loads layers of full attention: {self._attention.note}")
        try:
            served = ServedModel(model)
            self._geometry: KVGeometry = served.geometry(ContiguousKVConfig().chunk_size)
            self._places = served.layers.devices
            self._fingerprint = served.fingerprint()
        except UnsupportedModelError as error:
            raise SystemUnavailableError(str(error)) from error
        self._ahead = len(self._places) if ahead is None else ahead
        self._tiers: Tiers | None = None
        self._open_files: dict[Path, LayerFile] = {}
        # Files that this object has written, by prefix.
        self._stored: dict[bytes, Path] = {}
        # The request that is running, or the last one.
        self._request: LayerRequest | None = None
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def states(self) -> tuple[State, ...]:
        """See `System`."""
        return (State.COLD, State.OPEN, *warm_states(self._model.device))

    # -- files --------------------------------------------------------------------------------------------------------

    def parts(self, tokens: int, align: int) -> tuple[int, ...]:
        """Tokens of each part of a layer, for a prefix of so many tokens: all but the last are multiples of `align`."""
        return (tokens,)

    @cached_property
    def _align(self) -> int:
        return self._shape((1,)).align

    def _shape(self, parts: tuple[int, ...]) -> LayerShape:
        g = self._geometry
        return LayerShape(g.num_layers, g.kv_heads, g.head_dim, str(g.dtype).removeprefix("torch."), parts)

    def _path(self, prefix_ids: torch.Tensor) -> Path:
        parts = self.parts(len(prefix_ids), self._align)
        digest = hashlib.blake2b(f"{self._fingerprint} {parts} ".encode(), digest_size=16)
        digest.update(key_of(prefix_ids))
        return self._folder / f"{digest.hexdigest()}.layers"

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        """See `System`.

        A prefix that grows (a chat) is written again, and its beginning is deleted. Layers that are in memory stay
        there, with what was added: a system that computes a turn has its K and V at hand.
        """
        path = self._path(prefix_ids)
        if path.exists():
            return
        if states is None:
            states = prefill(self._model, prefix_ids)
        else:
            require_states(states, len(prefix_ids), self._geometry)
        shape = self._shape(self.parts(len(prefix_ids), self._align))
        write_layers(path, shape, states)
        key = key_of(prefix_ids)
        for before in [one for one in self._stored if key.startswith(one)]:
            self._close_file(self._stored[before])
            self._stored.pop(before).unlink(missing_ok=True)
            self._grow(before, key, shape, states)
        self._stored[key] = path

    def _grow(self, before: bytes, key: bytes, shape: LayerShape, states: DynamicCache) -> None:
        """Have the longer prefix in memory, where its beginning was."""
        if self._tiers is None:
            return
        capacity = shape.capacity(ROOM)
        nbytes = shape.rows * capacity * shape.token_bytes
        for layer, (device, own) in enumerate(zip(self._places, states.layers, strict=True)):
            for tier in {id(tier): tier for tier in (self._tiers.of(device), self._tiers.host)}.values():
                old = tier.take((before, layer))
                if old is None:
                    continue
                tier.give_back(old)
                piece = tier.lend(nbytes)
                buffer = piece.buffer(shape, capacity)
                buffer[0, :, :, : shape.tokens], buffer[1, :, :, : shape.tokens] = own.keys, own.values
                opened = devices.device_of(device)
                piece.busy = None if opened is None else opened.mark()
                tier.give_back(piece, (key, layer))

    def files(self) -> list[Path]:
        return sorted(self._folder.glob("*.layers"))

    def _file(self, prefix_ids: torch.Tensor) -> LayerFile:
        path = self._path(prefix_ids)
        found = self._open_files.get(path)
        if found is None:
            if not path.exists():
                raise NotStoredError(f"a prefix of {len(prefix_ids)} tokens is not stored in {self._folder}")
            found = self._open_files[path] = LayerFile(path, self.opened().threads, self._bucket)
        return found

    def _close_file(self, path: Path) -> None:
        if path in self._open_files:
            self._open_files.pop(path).close()

    # -- memory -------------------------------------------------------------------------------------------------------

    def opened(self) -> Tiers:
        """Memory and threads."""
        if self._tiers is None:
            places = [place for place in dict.fromkeys(self._places) if on_accelerator(place)]
            if places:
                devices.reserve_pinned(self._host_bytes)
            host = LayerMemory("host", self._host_bytes, devices.pinned_buffer if places else aligned_buffer)
            on = {place: self._device_tier(place, len(places)) for place in places}
            self._tiers = Tiers(host, on, ReaderThreads())
        return self._tiers

    def _device_tier(self, place: torch.device, devices_used: int) -> LayerMemory:
        opened = devices.device_of(place)
        assert opened is not None
        if self._device_bytes is not None:
            limit = self._device_bytes // devices_used
        else:
            free = opened.free_bytes()
            limit = UNKNOWN_DEVICE_BYTES if free is None else free // FREE_SHARE
        return LayerMemory(str(place), limit, lambda nbytes: opened.empty(nbytes, for_copies=True))

    def close_store(self) -> None:
        """Let go of everything that is in memory."""
        self._end_request()
        if self._tiers is not None:
            self._tiers.threads.close()
            if self._tiers.on:
                devices.release_pinned(self._host_bytes)
            self._tiers = None
        for path in list(self._open_files):
            self._close_file(path)

    # -- states -------------------------------------------------------------------------------------------------------

    def enter(self, state: State, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor | None = None) -> None:
        """See `System`. A request uses all of the prefix, whatever its suffix is."""
        require_state(self.name, state, self.states)
        if not self._path(prefix_ids).exists():
            raise NotStoredError(f"a prefix of {len(prefix_ids)} tokens is not stored in {self._folder}")
        self._end_request()
        if state in (State.COLD, State.OPEN):
            self.close_store()
            if state is State.OPEN:
                self.opened()
                self.keep_shares(prefix_ids)
        else:
            self._warm(state, prefix_ids)
        drop_page_cache(self.files())

    def keep_shares(self, prefix_ids: torch.Tensor, *, must: bool = True) -> None:
        """The system is open: have in memory what stays there of a stored prefix, whatever is asked for.

        Args:
            prefix_ids: int64 `(n,)`.
            must: whether it is an error if memory has no room for it.
        """

    def resident(self, prefix_ids: torch.Tensor) -> Resident:
        """What stays in memory of a prefix."""
        return {}

    def _warm(self, state: State, prefix_ids: torch.Tensor) -> None:
        tiers, key = self.opened(), key_of(prefix_ids)
        if state is State.WARM_HOST:
            for tier in tiers.on.values():
                tier.drop()
        host = state is State.WARM_HOST
        missing = self._lacking(key, host)
        if missing and host and tiers.on:
            self._bring_to_host(prefix_ids)
        elif missing:
            request = self._requested(prefix_ids, keeps=True)
            try:
                for layer in range(len(self._places)):
                    request.take(layer)
            finally:
                request.close()
        missing = self._lacking(key, host)
        if missing:
            sizes = ", ".join(f"{tier.name} ({tier.max_bytes:,} bytes)" for tier in (*tiers.on.values(), tiers.host))
            raise StateError(f"{state}: there is no room for {missing} layers in {sizes}")

    def _lacking(self, key: bytes, host: bool) -> int:
        tiers = self.opened()
        places = [tiers.host if host else tiers.of(device) for device in self._places]
        return sum((key, layer) not in tier for layer, tier in enumerate(places))

    def _bring_to_host(self, prefix_ids: torch.Tensor) -> None:
        """Read what is not in host memory, and stop there."""
        file, tiers, key = self._file(prefix_ids), self.opened(), key_of(prefix_ids)
        capacity = file.shape.capacity(ROOM)
        for layer in range(file.shape.layers):
            if (key, layer) not in tiers.host:
                piece = tiers.host.lend(file.shape.rows * capacity * file.shape.token_bytes)
                buffer = piece.buffer(file.shape, capacity)
                for part in range(len(file.shape.parts)):
                    file.read(layer, part, file.rows_of(buffer, part), Timeline()).wait()
                tiers.host.give_back(piece, (key, layer))

    # -- requests -----------------------------------------------------------------------------------------------------

    def _requested(self, prefix_ids: torch.Tensor, keeps: bool) -> LayerRequest:
        return LayerRequest(
            key_of(prefix_ids),
            self._file(prefix_ids),
            self.opened(),
            self._places,
            self._ahead,
            {} if keeps and not self._keeps else self.resident(prefix_ids),
            keeps,
        )

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """See `System`. With look-ahead, its first reads are under way.

        Raises:
            NotStoredError: the prefix is not stored.
            DamagedFileError: the header of its file is not as it was written.
        """
        self._end_request()
        self._attention.begin()
        request = self._request = self._requested(prefix_ids, self._keeps)
        return cache_of([LoadedLayer(layer, request) for layer in range(request.shape.layers)])

    def timeline(self, cache: Any) -> Timeline | None:
        """See `System`."""
        return None if self._request is None else self._request.timeline

    def finish(self, cache: Any) -> RequestStats:
        request = self._request
        self._end_request()
        return RequestStats() if request is None else request.stats

    def _end_request(self) -> None:
        self._attention.end()
        if self._request is not None:
            self._request.close()
            self._request = None

    def details(self) -> dict[str, Any]:
        """See `System`."""
        return {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close_store()
