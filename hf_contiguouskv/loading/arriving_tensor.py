"""One tensor of keys on its way to where chunks are scored."""

from __future__ import annotations

import threading
from contextlib import suppress

import torch

from ..memory import Buffer, Tier
from ..memory.device_tier import DeviceTier
from ..store.entries import SegmentSpan
from ..store.reader import Ticket


class ArrivingTensor:
    """One tensor of one segment on its way: from disk, from the host's memory to a device, or from disk to a device.

    It has many attributes because it names both ends of up to two copies.

    The reader thread that ends the read queues the copy to the device, while the model computes earlier layers. Reader
    threads work on this, so it must not keep `KeyLoader` alive.

    Args:
        name, which: as in `KeptKeys`.
        span: of the segment.
        nbytes: length of the tensor.
        host: the host's tier.
        buffer: of the host's tier, receives the read; `None`: the tensor is in the host's memory already.
        source: uint8 `(n,)`, the tensor in the host's memory.
        there: the device's tier; `None`: the tensor is used on the host.
        target: of the device's tier, receives the copy.

    Attributes:
        ticket: of the read, if there is one.
    """

    def __init__(
        self,
        name: str,
        which: int,
        span: SegmentSpan,
        nbytes: int,
        host: Tier,
        buffer: Buffer | None,
        source: torch.Tensor,
        there: DeviceTier | None,
        target: Buffer | None,
    ) -> None:
        self.name = name
        self.which = which
        self.span = span
        self.nbytes = nbytes
        self.ticket: Ticket | None = None
        self.buffer = buffer
        self.there = there
        self.target = target
        self._host = host
        self._source = source
        self._lock = threading.Lock()
        self._queued = False

    def upload(self) -> None:
        """Queue the copy to the device, unless it has been queued."""
        if self.there is None or self.target is None:
            return
        with self._lock:
            if not self._queued:
                copied = self.there.device.copy_in(
                    self._source[: self.nbytes], self.target.data[: self.nbytes], after=self.target.busy
                )
                self._queued = True
                self.target.ready = self.target.busy = copied
                if self.buffer is not None:
                    self.buffer.busy = copied

    @property
    def bytes_read(self) -> int:
        """From disk, so far."""
        return 0 if self.ticket is None else self.ticket.bytes_read

    def give_up(self) -> None:
        """The bytes are not needed any more: give the buffers back."""
        if self.ticket is not None:
            with suppress(Exception):
                self.ticket.wait()
        if self.buffer is not None:
            self._host.give_back(self.buffer)
        if self.there is not None and self.target is not None:
            self.there.give_back(self.target)
