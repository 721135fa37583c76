"""Where requests are recorded: a library that finds a pretended device, and readers without threads."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch

from hf_contiguouskv.hardware import accelerator as devices
from hf_contiguouskv.loading import device_residency as staging
from hf_contiguouskv.loading import host_residency as residency
from hf_contiguouskv.loading import key_loader as keys
from hf_contiguouskv.loading import payload_reads
from hf_contiguouskv.store import reader

from ..systems import layer_reader
from . import pretend
from .recording import InlineThreads, Queue, Recorder


class Stage:
    """Where requests are recorded: within, the library finds a pretended device and reads without threads.

    Args:
        flash: whether the device has flash attention (from compute capability 8.0 on).
        disk_bytes_s: the speed that readers are to know of the disk, in bytes per second.
    """

    def __init__(self, flash: bool = True, disk_bytes_s: float = 1e9) -> None:
        self.queue = Queue()
        self.recorder = Recorder(self.queue)
        self._flash = flash
        self._disk = disk_bytes_s
        self._stack = ExitStack()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.recorder, name)

    def __enter__(self) -> Stage:
        patch = self._patch
        patch(reader, "ReaderThreads", lambda original: self._inline_threads)
        self._stack.enter_context(mock.patch.multiple(reader.ReadTotals, begins=mock.DEFAULT, ends=mock.DEFAULT))
        patch(reader.ExtentReader, "submit", lambda original: self._bound("submitted", original))
        patch(reader.ExtentReader, "run", lambda original: self._bound("queued", original))
        patch(reader.Ticket, "wait", lambda original: self._bound("waited", original))
        patch(layer_reader.ReaderThreads, "run", lambda original: self._bound("serve_layers", original))
        patch(layer_reader.LayerFile, "read", lambda original: self._bound("layer_read", original))
        patch(layer_reader.Arrival, "wait", lambda original: self._bound("waited", original))
        for kind in ("add", "pump", "need", "used"):
            patch(payload_reads.Lookahead, kind, partial(self._bound, "ahead", kind))
        for method in ("bring", "index", "scorer"):
            patch(keys.KeyLoader, method, lambda original: self._bound("targeting", original))
        for owner in (staging.DeviceResidency, residency.HostResidency):
            for method in ("find_or_read", "read_piece"):
                patch(owner, method, lambda original: self._bound("targeting", original))
        kernels = {
            "SDPAParams": _Params,
            "looks_ahead": lambda states: False,  # Models whose answers are made up would not stand this test.
            "can_use_flash_attention": lambda params: bool(params) and self._flash,
            "can_use_efficient_attention": bool,
        }
        for module in list(sys.modules.values()):
            if getattr(module, "__name__", "").startswith("hf_contiguouskv"):
                for name, value in kernels.items():
                    if hasattr(module, name):
                        self._stack.enter_context(mock.patch.object(module, name, value))
        self._stack.enter_context(mock.patch.object(torch.cuda, "synchronize"))
        capability = (8, 0) if self._flash else (7, 5)
        self._stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", return_value=capability))
        self._stack.enter_context(mock.patch.object(torch.accelerator, "is_available", return_value=False))
        self._stack.enter_context(mock.patch.dict(devices.opened_devices, {pretend.DEVICE: self}))
        self._stack.enter_context(pretend.noted_in(self))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def _patch(self, owner: Any, name: str, make: Callable[[Any], Any]) -> None:
        self._stack.enter_context(mock.patch.object(owner, name, make(getattr(owner, name))))

    def _bound(self, maker: str, *arguments: Any) -> Callable[..., Any]:
        def method(*args: Any, **kwargs: Any) -> Any:
            return getattr(self.recorder, maker)(*arguments)(*args, **kwargs)

        return method

    def _inline_threads(self, count: int, totals: reader.ReadTotals) -> InlineThreads:
        totals.known = self._disk
        return InlineThreads(self.queue, totals)

    @contextmanager
    def recording(self, layers: Any, stored_per_layer: int = 1) -> Iterator[Recorder]:
        """What happens inside is recorded, by layer of the model (the modules `layers`, in order)."""
        self.recorder = recorder = Recorder(self.queue, stored_per_layer)
        hooks = [
            layer.register_forward_pre_hook(lambda *_, number=number: recorder.reached(number))
            for number, layer in enumerate(layers)
        ]
        hooks.append(layers[-1].register_forward_hook(lambda *_: recorder.reached(len(layers))))
        assert threading.current_thread() is threading.main_thread()
        sys.setprofile(recorder.called)
        try:
            yield recorder
        finally:
            sys.setprofile(None)
            for hook in hooks:
                hook.remove()
            self.recorder = Recorder(self.queue)


class _Params:
    """In place of `SDPAParams`: whether the tensors are on the device."""

    def __init__(self, query: Any, *others: Any) -> None:
        self._there = isinstance(query, pretend.Pretend)

    def __bool__(self) -> bool:
        return self._there
