"""Where the KV of a prefix is when a request begins, and whether a request found it there."""

from __future__ import annotations

from enum import StrEnum

import torch

from hf_contiguouskv import RequestStats
from hf_contiguouskv.hardware import accelerator as devices


class State(StrEnum):
    """Where a prefix is before a request. `System.enter` brings a system into one; nothing of that is timed."""

    #: Neither in this process nor in the page cache. The request opens the store, which is a new object.
    COLD = "cold"
    #: As `COLD`, but the store is open, and host memory is registered with the accelerator where there is one.
    OPEN = "open"
    #: The store is open, and what tells which tokens matter (our index, the published method's leader keys, the keys
    #: that AS+H2O and IMPRESS always load) is in memory where it is used. Everything else is on disk.
    KEYS_RESIDENT = "keys_resident"
    #: Keys and chunks are in host memory, pinned where there is an accelerator, which holds none of them.
    WARM_HOST = "warm_host"
    #: Keys and chunks are in the accelerator's memory.
    WARM_DEVICE = "warm_device"


class StateError(Exception):
    """A system could not be brought into a state: memory has no room for it, say."""


def on_accelerator(device: torch.device) -> bool:
    """Whether a model on `device` has memory of its own there."""
    return devices.device_of(device) is not None


def state_of_model(device: torch.device) -> State:
    """The warm state of what is kept where a model on `device` is."""
    return State.WARM_DEVICE if on_accelerator(device) else State.WARM_HOST


def warm_states(device: torch.device) -> tuple[State, ...]:
    """The warm states of a system that keeps chunks in tiers, with its model on `device`."""
    return (State.WARM_HOST, State.WARM_DEVICE) if on_accelerator(device) else (State.WARM_HOST,)


def require_state(name: str, state: State, states: tuple[State, ...]) -> None:
    """Raise if a system has no such state.

    Raises:
        ValueError: it has not.
    """
    if state in states:
        return
    why = ", and on a CPU nothing is on a device" if state is State.WARM_DEVICE and State.WARM_HOST in states else ""
    raise ValueError(f"{name} cannot be {state}: its states are {', '.join(states)}{why}")


def departure(state: State, stats: RequestStats) -> str | None:
    """What speaks against a request having found `state`; `None`: nothing does.

    Args:
        state: that the system was brought into before the request.
        stats: of the request, when it is over.
    """
    hits = stats.hits
    if not hits:
        return None  # A system that keeps nothing anywhere, such as `recompute`.
    where = {State.WARM_HOST: "host", State.WARM_DEVICE: "device"}.get(state, "disk")
    elsewhere = {tier: count for tier, count in hits.items() if count and tier != where}
    if elsewhere:
        return f"{state}: chunks came from {elsewhere} besides {hits[where]} from {where}"
    if where == "disk" and not stats.bytes_read:
        return f"{state}: nothing was read from disk"
    if where != "disk" and stats.bytes_read:
        return f"{state}: {stats.bytes_read} bytes were read from disk"
    if where != "disk" and not hits[where]:
        return f"{state}: no chunk came from {where}"
    return None
