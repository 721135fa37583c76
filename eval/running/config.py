"""The configuration of a run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

from ..dtypes import Dtype
from ..systems import system_named
from ..tasks import task_named

STREAMS = ("shared_documents", "conversations")
DTYPES = get_args(Dtype)
IN_MEMORY = "in_memory"


@dataclass(frozen=True)
class Setting:
    """A system at a budget."""

    system: str
    budget: float

    @classmethod
    def all_of(cls, asked: str, budgets: Sequence[float]) -> list[Setting]:
        """The settings that `"system"` or `"system@budget"` stands for.

        Raises:
            ValueError: the system does not exist, or takes no budget.
        """
        name, at, share = asked.partition("@")
        exact = system_named(name).exact
        if not at:
            return [cls(name, budget) for budget in ((1.0,) if exact else budgets)]
        try:
            budget = float(share)
        except ValueError:
            raise ValueError(f"{asked!r}: a budget such as 0.25 must follow the @") from None
        if exact or not 0.0 < budget <= 1.0:
            raise ValueError(f"{asked!r}: budgets are from 0 (not included) to 1, of systems that choose")
        return [cls(name, budget)]


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a run.

    Attributes:
        model: name or folder of the model; `None` for the default model.
        dtype: dtype of model and KV; `"auto"` is the dtype of a continued run, and for a new run the fastest on the
            device. The run's folder records it, and refuses another.
        tasks: names of `eval.tasks.TASKS`.
        streams: names of `STREAMS`.
        systems: names of `eval.systems.SYSTEMS`, each optionally with its own budget, as in `"impress@0.1"`.
        budgets: shares of the prefix, for systems that take a budget and name none.
        requests: requests of each task.
        timed_requests: requests of each task that are also made, only for their time, in systems whose answers are
            known beforehand (exact systems, and systems that differ from another only in speed).
        stream_requests: requests of each stream.
        documents: documents (or conversations) of a stream.
        memory_share: share of a stream's KV that fits in a system's memory.
        seed: seed of the requests and of their order.
        data_dir: local data; for `None` see `eval.tasks`.
        device: the model's device; `None` for one GPU per process if there are GPUs, else the CPU.

    Raises:
        ValueError: a field is invalid.
    """

    model: str | None = None
    dtype: str = "auto"
    tasks: tuple[str, ...] = ()
    streams: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    budgets: tuple[float, ...] = (0.05, 0.25)
    requests: int = 50
    timed_requests: int = 5
    stream_requests: int = 100
    documents: int = 10
    memory_share: float = 0.25
    seed: int = 0
    data_dir: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in self.tasks:
            task_named(name, self.data_dir)
        for name in self.systems:
            Setting.all_of(name, self.budgets)
        if unknown := set(self.streams) - set(STREAMS):
            raise ValueError(f"stream must be one of {STREAMS}, got {sorted(unknown)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        if not (self.tasks or self.streams) or not self.systems:
            raise ValueError("a run needs a task or a stream, and a system")
        if not self.budgets or not all(0.0 < budget <= 1.0 for budget in self.budgets):
            raise ValueError(f"budgets are shares of the prefix, from 0 (not included) to 1, got {self.budgets}")
        for field in ("requests", "stream_requests", "documents"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be 1 at least, got {getattr(self, field)}")

    def settings(self) -> list[Setting]:
        """Every system at each of its budgets, without duplicates."""
        return list(dict.fromkeys(one for name in self.systems for one in Setting.all_of(name, self.budgets)))
