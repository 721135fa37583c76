"""The configuration of a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import get_args

from ..dtypes import Dtype
from ..systems import Setting, State
from ..tasks import RANDOM, TEXT, task_named

STREAMS = ("shared_documents", "conversations")
DTYPES = get_args(Dtype)
STATES = tuple(str(state) for state in State)
# Tasks whose prefixes all have one length begin so.
ONE_LENGTH = (TEXT, RANDOM)


@dataclass(frozen=True)
class RunConfig:
    """Configuration of a run.

    Attributes:
        model: name or folder of the model; `None` for the default model.
        dtype: dtype of model and KV; `"auto"` is the dtype of a continued run, and for a new run the fastest on the
            device. The run's folder records it, and refuses another.
        tasks: names for `eval.tasks.task_named`.
        streams: names of `STREAMS`.
        systems: settings as text, for example `"impress@0.1+overlap"` (see `eval.systems.Setting.parse`).
        states: the states of `eval.systems.State` in which requests of tasks find systems. A system without a state is
            left out there; `recompute`, `in_memory` and `no_prefix` are made in their own state beside any other.
        budgets: shares of the prefix, for systems that take a budget and name none.
        kept_tokens: in place of `budgets`, so many tokens of each prefix (all of a shorter one).
        requests: requests of each task whose answers are judged.
        first: number of the first request of each task. Another run can have made those before it.
        timed_requests: requests of each task, spread over its prefixes, that are also made only for their time: in
            systems whose answers are known beforehand (exact systems, and settings that differ from another only in
            speed), and in all states but the first. Tasks whose answers are not judged have no other requests.
        prefixes: prefixes of each few-shot task. (The prefixes of other tasks follow from their requests.)
        stream_requests: requests of each stream.
        documents: documents (or conversations) of a stream.
        memory_share: share of a stream's KV that fits in a system's memory.
        judged_share: share of a stream's requests whose answers are judged: with 0.25 every fourth.
        read_gbps: limit on reads from disk in GB/s (1e9 bytes); `None`: as fast as the disk.
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
    states: tuple[str, ...] = ("cold",)
    budgets: tuple[float, ...] = (0.05, 0.25)
    kept_tokens: int | None = None
    requests: int = 50
    first: int = 0
    timed_requests: int = 5
    prefixes: int = 5
    stream_requests: int = 100
    documents: int = 10
    memory_share: float = 0.25
    judged_share: float = 0.25
    read_gbps: float | None = None
    seed: int = 0
    data_dir: str | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        names = Counter(task_named(name, self.data_dir).name for name in self.tasks)
        if twice := [name for name, count in names.items() if count > 1]:
            raise ValueError(f"two tasks are called {twice[0]!r}")
        if not self.budgets or not all(0.0 < budget <= 1.0 for budget in self.budgets):
            raise ValueError(f"budgets are shares of the prefix, from 0 (not included) to 1, got {self.budgets}")
        for name in self.systems:
            Setting.parse(name, self.budgets)
        if unknown := set(self.streams) - set(STREAMS):
            raise ValueError(f"stream must be one of {STREAMS}, got {sorted(unknown)}")
        if unknown := set(self.states) - set(STATES):
            raise ValueError(f"state must be one of {STATES}, got {sorted(unknown)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {DTYPES}, got {self.dtype!r}")
        if not (self.tasks or self.streams) or not self.systems or not self.states:
            raise ValueError("a run needs a task or a stream, a system and a state")
        if self.kept_tokens is not None and (self.kept_tokens < 1 or self.streams):
            raise ValueError(f"kept_tokens must be 1 at least, and is not for streams, got {self.kept_tokens}")
        if self.kept_tokens is not None and (other := [name for name in self.tasks if not name.startswith(ONE_LENGTH)]):
            # Each length has a budget of its own, so prefixes of different lengths would have no figure together.
            raise ValueError(f"kept_tokens is for tasks of one length ({', '.join(ONE_LENGTH)}), not for {other[0]}")
        for field in ("requests", "prefixes", "stream_requests", "documents"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be 1 at least, got {getattr(self, field)}")
        if self.first < 0:
            raise ValueError(f"first must be 0 at least, got {self.first}")
        if not 0.0 <= self.judged_share <= 1.0:
            raise ValueError(f"judged_share must be from 0 to 1, got {self.judged_share}")
        if self.read_gbps is not None and not self.read_gbps > 0.0:
            raise ValueError(f"read_gbps must be positive, got {self.read_gbps}")

    def budgets_for(self, prefix_tokens: int) -> tuple[float, ...]:
        """Shares of a prefix of so many tokens, for systems that take a budget and name none."""
        if self.kept_tokens is None:
            return self.budgets
        return (min(1.0, self.kept_tokens / prefix_tokens),)

    def settings(self, prefix_tokens: int) -> list[Setting]:
        """Every system at each of its budgets, for a prefix of so many tokens, without duplicates."""
        budgets = self.budgets_for(prefix_tokens)
        return list(dict.fromkeys(one for name in self.systems for one in Setting.parse(name, budgets)))

    def is_judged(self, number: int) -> bool:
        """Whether the answer to this request of a stream is judged."""
        return self.judged_share > 0.0 and number % max(1, round(1.0 / self.judged_share)) == 0
