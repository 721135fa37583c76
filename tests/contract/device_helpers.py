"""What the tests of the device pipeline share: requests through fake accelerators, and what must be true afterwards."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from hf_contiguouskv import AttentionMass, ContiguousKVConfig
from hf_contiguouskv.memory import MemoryTiers
from hf_contiguouskv.model.served_model import ServedModel

from .models import token_ids
from .references import forward
from .subject import ContiguousKVCache, PrefixStore

PREFIX = token_ids(165, seed=1201)
SUFFIX = token_ids(9, seed=1202)
MEBIBYTE = 2**20

CONFIGS = {
    "exact": ContiguousKVConfig(budget=1.0),
    "paper": ContiguousKVConfig.paper(0.3),
    "index": ContiguousKVConfig(budget=0.3),
    # Neither an index nor leader keys: whole leader layers are read.
    "whole layers": ContiguousKVConfig(
        budget=0.3,
        payload="exact",
        selection=AttentionMass(queries=16, concentration=2.0, keep_first=1, keep_last=1, period=3, subperiod=1),
    ),
}
PRUNED = [name for name in CONFIGS if name != "exact"]


def opened(path: Path, host: int = 8 * MEBIBYTE, device: int = 8 * MEBIBYTE, **options: Any) -> Any:
    return PrefixStore(path, host_bytes=host, device_bytes=device, **options)


def ask(model: Any, store: Any, config: ContiguousKVConfig, suffix: torch.Tensor = SUFFIX) -> tuple[torch.Tensor, Any]:
    """Logits of the suffix behind `PREFIX`, and the statistics of that request."""
    with ContiguousKVCache(model, PREFIX, store=store, config=config) as cache:
        return forward(model, suffix, cache), cache.stats


def on_a_cpu(model: Any, path: Path, config: ContiguousKVConfig, suffix: torch.Tensor = SUFFIX) -> torch.Tensor:
    with PrefixStore(path) as store:
        return ask(model, store, config, suffix)[0]


def assert_idle(memory: MemoryTiers) -> None:
    """No slot, key or buffer is in use, limits held, and the books agree with each other."""
    memory.catch_up()
    for tier in memory.tiers:
        for arena in tier._arenas.values():
            assert not arena.users.any(), f"{tier.name}: {int(arena.users.sum())} slots are in use"
            everybody = [*arena._free, *arena.resident().tolist()]
            held = arena.held_blocks * arena.blocks.slots_per_block
            assert len(everybody) == len(set(everybody)) == held, f"{tier.name}: slots were lost"
        assert not any(keys.users for keys in tier._keys.values()), f"{tier.name}: keys are in use"
        moving = sum(one.buffer.counted for device in memory.devices.values() for one in device._demotions)
        assert tier._buffer_bytes == (moving if tier is memory.host else 0), f"{tier.name}: buffers are in use"
        assert tier.peak_bytes <= tier.max_bytes
        assert tier.held_bytes <= tier.max_bytes


@contextmanager
def layers_on(devices: list[torch.device]) -> Iterator[None]:
    """Models have their layers on these devices."""
    real: Any = ServedModel.shape

    def moved(model: Any) -> Any:
        shape = real.fget(model)
        return replace(shape, layers=replace(shape.layers, devices=tuple(devices)))

    ServedModel.shape = property(moved)  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        ServedModel.shape = real  # type: ignore[method-assign]


class HostWaits(TorchFunctionMode):
    """Notes where the library would make the host wait for a device, by layer, from the first layer to the last.

    On a CPU such calls cost nothing, but they are the same calls.
    """

    ALWAYS = ("cpu", "item", "tolist", "__bool__", "__int__", "__float__", "__index__", "nonzero", "equal")

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.found: list[tuple[int, str]] = []
        self._layer: int | None = None
        self._hooks = []
        layers = model.model.layers
        for number, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(lambda *_, number=number: self._at(number)))
        self._hooks.append(layers[-1].register_forward_hook(lambda *_: self._at(None)))

    def _at(self, layer: int | None) -> None:
        self._layer = layer

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        caller = sys._getframe(1)
        ours = "/hf_contiguouskv/" in caller.f_code.co_filename
        if self._layer is not None and ours and (name in self.ALWAYS or self._moves(name, args, kwargs or {})):
            where = f"{Path(caller.f_code.co_filename).name}:{caller.f_lineno} {caller.f_code.co_name}: {name}"
            self.found.append((self._layer, where))
        return function(*args, **(kwargs or {}))

    @staticmethod
    def _moves(name: str, args: Any, kwargs: dict[str, Any]) -> bool:
        """A copy to a device from memory that is not pinned: the host may wait for it, whatever it was told.

        `device.send` is the way to move a small tensor.
        """
        to_device = any(isinstance(value, torch.device) for value in (*args[1:], *kwargs.values()))
        return name == "to" and to_device

    def __exit__(self, *exception: Any) -> None:
        for hook in self._hooks:
            hook.remove()
        super().__exit__(*exception)
