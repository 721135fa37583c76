"""Checks for edits of weights in host memory: a few bytes of each tensor on every call, and all bytes over many calls.

Both notice edits that torch does not count, such as those through `.data`.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass

import torch
import xxhash

from .weights import state_of

BYTES_PER_LOOK = 2 * 2**20
"""`WeightWindows.look` reads at most this many bytes: 0.15 ms on a server, 0.4 ms where memory delivers 5 GB/s."""

_WINDOW_BYTES = 512 * 1024
# A limit, so that many small tensors (norms, biases) take no longer than a few large ones.
_WINDOWS_PER_LOOK = 32
_PROBE_BYTES = 32


def _is_readable(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one contiguous range of host memory."""
    plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and tensor.is_contiguous() and tensor.nbytes > 0


def probe_places(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Views of the beginning, middle and end of a tensor in host memory; none for other tensors.

    The views do not keep the memory alive, so read them only while the signature shows that the tensors are the same.
    """
    if not _is_readable(tensor):
        return
    address, nbytes = tensor.data_ptr(), tensor.nbytes
    length = min(nbytes, _PROBE_BYTES)
    view = ctypes.c_char * length
    for offset in sorted({0, (nbytes - length) // 2, nbytes - length}):
        yield memoryview(view.from_address(address + offset))


def probe(places: list[memoryview]) -> bytes:
    """The current bytes at these places."""
    return b"".join(places)


@dataclass(slots=True)
class _Watched:
    """One tensor in host memory, and digests of its windows (`None`: not read yet)."""

    tensor: weakref.ref[torch.Tensor]
    address: int
    nbytes: int
    digests: list[int | None]

    def differs(self, window: int) -> bool:
        """Whether a window differs from its recorded digest; without a recorded digest, record it."""
        found, recorded = self._digest(window), self.digests[window]
        if recorded is None:
            self.digests[window] = found
        return found != recorded and None not in (found, recorded)

    def differs_anywhere(self) -> bool:
        """Whether any recorded window differs from its digest."""
        return any(self.differs(window) for window, recorded in enumerate(self.digests) if recorded is not None)

    def _digest(self, window: int) -> int | None:
        """Digest of the window's current bytes; `None` if the tensor no longer exists or has moved."""
        tensor = self.tensor()
        if tensor is None:
            return None
        # Keeps the memory alive while it is read, even if another thread gives the tensor other memory meanwhile.
        storage = tensor.untyped_storage()
        begin = storage.data_ptr()
        if tensor.data_ptr() != self.address or not begin <= self.address <= begin + storage.nbytes() - self.nbytes:
            return None
        offset = window * _WINDOW_BYTES
        length = min(_WINDOW_BYTES, self.nbytes - offset)
        found: int = xxhash.xxh3_64_intdigest((ctypes.c_char * length).from_address(self.address + offset))
        return found


class WeightWindows:
    """Checks the next few windows of all weights in host memory at each request.

    The first check of a window records its digest; later checks compare with it. Not thread-safe.

    Args:
        tensors: the tensors to watch; those outside host memory are left out.
        earlier: windows of the same model, from which digests that are still valid are taken over.
        changed: addresses of tensors whose digests are not taken over.
    """

    def __init__(
        self, tensors: Iterable[torch.Tensor], earlier: WeightWindows | None = None, changed: Collection[int] = ()
    ) -> None:
        old = {} if earlier is None else earlier._watched
        self._watched: dict[tuple[int, int], _Watched] = {}
        for tensor in filter(_is_readable, tensors):
            _, address, _, _ = state_of(tensor)
            key = (address, tensor.nbytes)
            if key in self._watched:
                continue  # Tied weights.
            kept = old.get(key)
            if kept is None or address in changed or kept.tensor() is not tensor:
                windows = -(-tensor.nbytes // _WINDOW_BYTES)
                kept = _Watched(weakref.ref(tensor), address, tensor.nbytes, [None] * windows)
            self._watched[key] = kept
        self._order = list(self._watched.values())
        self._windows = sum(len(watched.digests) for watched in self._order)
        self._tensor: int = 0 if earlier is None else earlier._tensor
        self._window = 0

    def look(self) -> set[int]:
        """Check the next windows, at most `BYTES_PER_LOOK` in all.

        Call this only while the signature shows that the tensors are the same.

        Returns:
            addresses of tensors that differ from their digests: nearly always none. If one differs, all recorded
                windows
            are compared, so that an edit of many tensors is found at once. Later calls return them again until new
            windows are made.
        """
        left = BYTES_PER_LOOK
        for _ in range(min(self._windows, _WINDOWS_PER_LOOK)):
            self._tensor %= len(self._order)
            watched = self._order[self._tensor]
            left -= min(_WINDOW_BYTES, watched.nbytes - self._window * _WINDOW_BYTES)
            if left < 0:
                break
            if watched.differs(self._window):
                return {watched.address for watched in self._order if watched.differs_anywhere()}
            self._window += 1
            if self._window == len(watched.digests):
                self._tensor, self._window = self._tensor + 1, 0
        return set()
