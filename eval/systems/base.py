"""What a system is: a way to serve a prefix that was seen before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch

from hf_contiguouskv import RequestStats
from hf_contiguouskv.timeline import Timeline


class System(Protocol):
    """One way to serve a prefix. Made for one model; prefixes are int64 `(n,)` on the host. A context manager."""

    @property
    def name(self) -> str:
        """On the command line and in reports."""
        ...

    def store(self, prefix_ids: torch.Tensor) -> None:
        """See a prefix for the first time, and keep what its requests will need. Not timed."""
        ...

    def files(self) -> list[Path]:
        """What must not be in the page cache for a request to be cold."""
        ...

    def forget(self) -> None:
        """Drop what earlier requests have left in this process: the next one is as in a new process."""
        ...

    def cache(self, prefix_ids: torch.Tensor) -> Any:
        """A transformers cache for one request (prefix and suffix are passed to the model together). Timed."""
        ...

    def timeline(self, cache: Any) -> Timeline | None:
        """When the request did what, before `finish`; `None` where the system has nothing to tell."""
        ...

    def finish(self, cache: Any) -> RequestStats:
        """The request is over: what it did, in observed bytes."""
        ...

    def __enter__(self) -> System: ...

    def __exit__(self, *exception: object) -> None: ...


class NotStoredError(Exception):
    """A system was asked for a prefix that it was never told to store."""


def key_of(prefix_ids: torch.Tensor) -> bytes:
    """Names a prefix within a process."""
    return prefix_ids.numpy().tobytes()
