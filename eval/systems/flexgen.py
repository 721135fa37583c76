"""FlexGen's role (Sheng et al., ICML 2023): see `FlexGen`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hf_contiguouskv.hardware import accelerator as devices
from hf_contiguouskv.hardware.aligned_memory import aligned_buffer
from hf_contiguouskv.timeline import Timeline

from .base import SystemUnavailableError, key_of
from .layer_request import Resident, Share
from .layer_system import LayerSystem
from .states import State, StateError, on_accelerator, warm_states


class FlexGen(LayerSystem):
    """FlexGen's role among systems that offload K and V: all of it is used, without chunks and without pruning.

    FlexGen places fixed shares of each layer's K and V on the accelerator, in host memory and on disk, and overlaps:
    while one layer computes, the disk's part of the next one is read. This is that placement and that pipeline for a
    stored prefix, on the same files as AttentionStore's. Shares are ranges of tokens, in whole pages: the first ones
    stay on the accelerator, the next ones in host memory. The rest of FlexGen is not here: its search for shares, its
    blocks of batches, its 4-bit compression. A generated token uses what the first forward has loaded, where FlexGen
    would load it again.

    Nothing else stays in memory after a request, and nothing is evicted. States: in `cold` nothing is in memory, so all
    is read from disk; in `open` the shares are where they belong; warm states are those of shares of 1. Shares that are
    1 together leave nothing to read once the system is open: then there is no state `open`. What the shares hold is not
    counted in `hits`, for it is no matter of chance; `details` tells how much it is.

    Args:
        model: whose prefixes.
        folder: of the files.
        device_share: share of each layer that stays on the accelerator.
        host_share: share of each layer that stays in host memory.
        store_options: `host_bytes`, `device_bytes` and `read_gbps` of `LayerSystem`.

    Raises:
        SystemUnavailableError: a share on the accelerator, and the model is on a CPU; or see `LayerSystem`.
        ValueError: shares are negative, or more than 1 together.
    """

    def __init__(
        self, model: Any, folder: Path, *, device_share: float = 0.0, host_share: float = 0.0, **store_options: Any
    ) -> None:
        if min(device_share, host_share) < 0.0 or device_share + host_share > 1.0:
            raise ValueError(f"shares must be from 0 to 1, and 1 together at most: {device_share}, {host_share}")
        if device_share and not on_accelerator(model.device):
            raise SystemUnavailableError("flexgen: a share on the device, and the model is on a CPU")
        shares = {"device": device_share, "host": host_share}
        name = "+".join(("flexgen", *(f"{tier}={share:g}" for tier, share in shares.items() if share)))
        self._shares = shares
        self._resident: dict[bytes, dict[tuple[int, int], Share]] = {}
        super().__init__(name, model, folder, ahead=1, keeps=False, **store_options)

    @property
    def states(self) -> tuple[State, ...]:
        """See `System`."""
        shared = sum(self._shares.values()) >= 1.0
        return (State.COLD, *(() if shared else (State.OPEN,)), *warm_states(self._model.device))

    def _cut(self, tokens: int, align: int) -> list[tuple[str, int]]:
        """Where each part of a layer stays, and its tokens; empty parts are left out."""
        found, left = [], tokens
        for tier, share in self._shares.items():
            # All that is left, if shares leave nothing to the disk.
            own = left if share and sum(self._shares.values()) >= 1.0 and tier == self._last else None
            own = min(left, int(tokens * share) // align * align) if own is None else own
            found.append((tier, own))
            left -= own
        return [(tier, own) for tier, own in (*found, ("disk", left)) if own]

    @property
    def _last(self) -> str:
        return "host" if self._shares["host"] else "device"

    def parts(self, tokens: int, align: int) -> tuple[int, ...]:
        return tuple(own for _, own in self._cut(tokens, align)) or (tokens,)

    def keep_shares(self, prefix_ids: torch.Tensor, *, must: bool = True) -> None:
        """Read the shares of a prefix, unless they are there. What it grew from is dropped.

        Raises:
            StateError: memory has no room for them, and they must be there.
        """
        key = key_of(prefix_ids)
        if key in self._resident:
            return
        for before in [one for one in self._resident if key.startswith(one)]:
            del self._resident[before]
        file, tiers = self._file(prefix_ids), self.opened()
        shape, kept = file.shape, {}
        cut = self._cut(shape.tokens, shape.align)
        held = {"host": 0, "device": 0}
        for share in (share for kept in self._resident.values() for share in kept.values()):
            held["device" if share.on_device else "host"] += share.states.nbytes
        for part, (tier, _) in enumerate(cut):
            if tier != "disk":
                held[tier] += shape.layers * shape.part_bytes(part)
        limits = {"host": self._host_bytes, "device": sum(tier.max_bytes for tier in tiers.on.values())}
        for tier, nbytes in held.items():
            if nbytes > limits[tier]:
                if not must:
                    return
                raise StateError(f"open: there is no room for {nbytes:,} bytes in {tier} ({limits[tier]:,} bytes)")
        for layer, place in enumerate(self._places):
            for part, (tier, tokens) in enumerate(cut):
                if tier == "disk":
                    continue
                nbytes = shape.part_bytes(part)
                octets = devices.pinned_buffer(nbytes) if tiers.on else aligned_buffer(nbytes)
                states = octets.view(shape.torch_dtype).view(2, 1, shape.kv_heads, -1, shape.head_dim)
                file.read(layer, part, file.rows_of(states, part, first=0), Timeline()).wait()
                if tier == "device":
                    opened = devices.device_of(place)
                    assert opened is not None
                    there = opened.empty(nbytes, for_copies=True)
                    opened.wait(opened.copy_in(octets, there))
                    opened.uses(there)
                    states = there.view(shape.torch_dtype).view(states.shape)
                kept[layer, part] = Share(states[:, :, :, :tokens], tier == "device")
        self._resident[key] = kept

    def resident(self, prefix_ids: torch.Tensor) -> Resident:
        return self._resident.get(key_of(prefix_ids), {})

    def details(self) -> dict[str, Any]:
        """See `System`: `resident_bytes`, what the shares of all prefixes hold, if there is any."""
        shares = [share for kept in self._resident.values() for share in kept.values()]
        return {"resident_bytes": sum(share.states.nbytes for share in shares)} if shares else {}

    def close_store(self) -> None:
        super().close_store()
        self._resident.clear()
