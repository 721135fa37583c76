"""What a system is: a way to serve a prefix that was seen before."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from hf_contiguouskv import RequestStats
from hf_contiguouskv.store.format import KVGeometry
from hf_contiguouskv.timeline import Timeline

from .states import State


class System(Protocol):
    """One way to serve a prefix. Made for one model; prefixes are int64 `(n,)` on the host. A context manager."""

    @property
    def name(self) -> str:
        """With its options, as on the command line; without the budget."""
        ...

    @property
    def states(self) -> tuple[State, ...]:
        """In which states a request can find this system, with its model where it is."""
        ...

    def store(self, prefix_ids: torch.Tensor, states: DynamicCache | None = None) -> None:
        """See a prefix for the first time, and keep what its requests will need. Not timed.

        Args:
            prefix_ids: int64 `(n,)`.
            states: K and V of every layer that stand for those of the prefix, `(1, kv_heads, n, head_dim)` in the
                model's dtype on any device: for measurements of time, which does not depend on what they say. They are
                copied. `None`: the model computes them.

        Raises:
            ValueError: `states` do not fit the prefix or the model.
        """
        ...

    def files(self) -> list[Path]:
        """What must not be in the page cache for a request to be cold."""
        ...

    def enter(self, state: State, prefix_ids: torch.Tensor, suffix_ids: torch.Tensor | None = None) -> None:
        """Bring what is stored of a prefix to where `state` says, right before a request. Not timed.

        Files are not in the page cache afterwards, as far as the file system lets go of them. Whether the request
        found the state is told by its statistics: `states.departure`.

        Args:
            state: one of `states`.
            prefix_ids: int64 `(n,)`, stored.
            suffix_ids: int64 `(q,)`, what the request is going to add. Warm states then hold what such a request
                leaves in memory (the first time one is made, to find that out), and need memory for no more.
                `None`: they hold all of the prefix, whatever will be asked.

        Raises:
            ValueError: the system has no such state.
            StateError: memory has no room for it.
            SystemUnavailableError: the system cannot run with this model or on its device.
            NotStoredError: the prefix is not stored.
        """
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

    def details(self) -> dict[str, Any]:
        """What else is known of the last request, when it is over: ready for JSON, `{}` where there is nothing.

        IMPRESS: `agreed`, the share of layers in which its probe heads agreed. Systems whose model cannot use the
        library's attention: `attention`, the reason.
        """
        ...

    def __enter__(self) -> System: ...

    def __exit__(self, *exception: object) -> None: ...


class SystemUnavailableError(Exception):
    """A system cannot run with this model or on its device; the message is the reason."""


class NotStoredError(Exception):
    """A system was asked for a prefix that it was never told to store."""


def key_of(prefix_ids: torch.Tensor) -> bytes:
    """Names a prefix within a process."""
    return prefix_ids.numpy().tobytes()


def require_states(states: DynamicCache, tokens: int, geometry: KVGeometry) -> None:
    """Raise if K and V that stand for those of a prefix do not fit it.

    Raises:
        ValueError: they do not: number of layers, shape or dtype.
    """
    g = geometry
    if len(states.layers) != g.num_layers:
        raise ValueError(f"states have {len(states.layers)} layers, the model has {g.num_layers}")
    wanted = (1, g.kv_heads, tokens, g.head_dim)
    for number, layer in enumerate(states.layers):
        for what, found in (("keys", layer.keys), ("values", layer.values)):
            if tuple(found.shape) != wanted or found.dtype != g.dtype:
                raise ValueError(
                    f"{what} of layer {number} must be {wanted} in {g.dtype}, got {tuple(found.shape)} in {found.dtype}"
                )
