"""All systems of a run in one folder, while they store some prefixes there."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..systems import InMemory, System, system_named
from ..tasks import Request
from .config import IN_MEMORY, Setting


class Bench:
    """The systems that make requests.

    Attributes:
        in_memory: the reference; a system of the run only if the run names it.
        systems: the systems, by setting.
    """

    def __init__(self, in_memory: InMemory, systems: dict[Setting, System]) -> None:
        self.in_memory = in_memory
        self.systems = systems

    def store(self, request: Request) -> None:
        """Store the prefix of a request in all systems."""
        for system in self.systems.values():
            system.store(request.prefix_ids)


@contextmanager
def bench_in(folder: Path, model: Any, settings: Sequence[Setting], **store_options: Any) -> Iterator[Bench]:
    """Make systems that store in `folder`, which is emptied before and removed afterwards.

    Args:
        folder, model: the folder, and the model of the systems.
        settings: systems and budgets.
        store_options: options of the stores, such as `host_bytes`.
    """
    shutil.rmtree(folder, ignore_errors=True)  # A crashed run may have left it.
    try:
        with ExitStack() as stack:
            in_memory = stack.enter_context(InMemory(model))
            systems: dict[Setting, System] = {}
            for setting in settings:
                if setting.system == IN_MEMORY:
                    systems[setting] = in_memory
                else:
                    make = system_named(setting.system).make
                    systems[setting] = stack.enter_context(make(model, folder, setting.budget, **store_options))
            yield Bench(in_memory, systems)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
