"""All systems of a run, in one folder, for as long as some prefixes are stored there."""

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
    """Systems that requests are made in.

    Attributes:
        in_memory: the reference; a system of the run only if it was asked for.
        systems: by what was asked for.
    """

    def __init__(self, in_memory: InMemory, systems: dict[Setting, System]) -> None:
        self.in_memory = in_memory
        self.systems = systems

    def store(self, request: Request) -> None:
        """Let all systems see the prefix of a request."""
        for system in self.systems.values():
            system.store(request.prefix_ids)


@contextmanager
def bench_in(folder: Path, model: Any, settings: Sequence[Setting], **store_options: Any) -> Iterator[Bench]:
    """Make systems that store in `folder`, which is emptied before and removed afterwards.

    Args:
        folder, model: where and whose.
        settings: which systems, at which budgets.
        store_options: of the stores (`host_bytes`, say).
    """
    shutil.rmtree(folder, ignore_errors=True)  # Of a run that crashed.
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
