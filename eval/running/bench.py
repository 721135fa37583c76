"""All systems of a run in one folder, while they store some prefixes there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..random_models import random_states
from ..systems import InMemory, Setting, System
from ..systems.layer_system import LayerSystem
from ..tasks import Request
from .readings import WholeCaches, has_windows


class Bench:
    """The systems that make requests.

    Attributes:
        whole: whole caches in memory, the reference for quality; a system of the run only if the run names it.
        systems: the systems, by setting.
    """

    def __init__(self, model: Any, whole: InMemory | WholeCaches, systems: dict[Setting, System]) -> None:
        self._model = model
        self.whole = whole
        self.systems = systems

    def store(self, request: Request) -> None:
        """Store the prefix of a request in all systems."""
        states = None if request.computed else random_states(self._model, len(request.prefix_ids))
        for system in self.systems.values():
            system.store(request.prefix_ids, states)

    def keep_shares(self, request: Request) -> None:
        """Have in memory what systems keep there of the prefix of a request by rule, as far as there is room."""
        for system in self.systems.values():
            if isinstance(system, LayerSystem):
                system.keep_shares(request.prefix_ids, must=False)


@contextmanager
def bench_in(folder: Path, model: Any, settings: Sequence[Setting], **store_options: Any) -> Iterator[Bench]:
    """Make systems that store in `folder`, which is emptied before and removed afterwards.

    Args:
        folder, model: the folder, and the model of the systems.
        settings: systems, budgets and options.
        store_options: options of the stores, such as `host_bytes`.
    """
    shutil.rmtree(folder, ignore_errors=True)  # A crashed run may have left it.
    try:
        with ExitStack() as stack:
            whole = WholeCaches(model) if has_windows(model) else stack.enter_context(InMemory(model))
            systems: dict[Setting, System] = {}
            for setting in settings:
                if setting == Setting("in_memory", 1.0) and isinstance(whole, InMemory):
                    systems[setting] = whole
                else:
                    systems[setting] = stack.enter_context(setting.make(model, folder, **store_options))
            yield Bench(model, whole, systems)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
