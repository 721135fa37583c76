"""A whole run: prefixes are stored, requests are made in all systems in turn, rows are written."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

from accelerate import PartialState
from tqdm.auto import tqdm

from hf_contiguouskv import __version__

from .. import streams
from ..systems import InMemory, System, system_named
from ..tasks import Request, task_named
from .folder import Key, RunFolder
from .quality import Judge
from .timed import timed_request

STREAMS = ("shared_documents", "conversations")
DTYPES = ("bfloat16", "float16", "float32")
IN_MEMORY = "in_memory"


@dataclass(frozen=True)
class Setting:
    """A system at a budget."""

    system: str
    budget: float


@dataclass(frozen=True)
class RunConfig:
    """What is run.

    Attributes:
        model: name or folder of the model; `None`: the default model.
        dtype: of model and KV.
        tasks: names of `eval.tasks.TASKS`.
        streams: names of `STREAMS`.
        systems: names of `eval.systems.SYSTEMS`.
        budgets: shares of the prefix, for systems that take one.
        requests: of each task.
        timed_requests: so many requests of each task are also made in systems whose answers are known beforehand (exact
            ones, and those that are only quicker than another): for their time alone.
        stream_requests: of each stream.
        documents: of a stream, or conversations.
        memory_share: what of all KV of a stream fits in the memory of a system.
        seed: of requests and of their order.
        data_dir: local data; `None`: see `eval.tasks`.

    Raises:
        ValueError: a field makes no sense.
    """

    model: str | None = None
    dtype: str = "bfloat16"
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

    def __post_init__(self) -> None:
        for name in self.tasks:
            task_named(name, self.data_dir)
        for name in self.systems:
            system_named(name)
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
        """Every system at every budget that it takes."""
        return [
            Setting(name, budget)
            for name in self.systems
            for budget in ((1.0,) if system_named(name).exact else self.budgets)
        ]


def _is_timed_only(setting: Setting) -> bool:
    kind = system_named(setting.system)
    return kind.answers_as is not None or (kind.exact and setting.system != IN_MEMORY)


class _Bench:
    """All systems of a run in one folder, with some prefixes stored."""

    def __init__(self, model: Any, folder: Path, settings: Sequence[Setting], **store_options: Any) -> None:
        self.folder = folder
        self.stack = ExitStack()
        self.in_memory = self.stack.enter_context(InMemory(model))
        self.systems: dict[Setting, System] = {}
        for setting in settings:
            if setting.system == IN_MEMORY:
                self.systems[setting] = self.in_memory
            else:
                make = system_named(setting.system).make
                self.systems[setting] = self.stack.enter_context(make(model, folder, setting.budget, **store_options))

    def store(self, request: Request) -> None:
        """Let all systems see the prefix of a request."""
        for system in self.systems.values():
            system.store(request.prefix_ids)

    def close(self) -> None:
        self.stack.close()
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def _bench(model: Any, folder: Path, settings: Sequence[Setting], **store_options: Any) -> Iterator[_Bench]:
    shutil.rmtree(folder, ignore_errors=True)  # Of a run that crashed.
    bench = _Bench(model, folder, settings, **store_options)
    try:
        yield bench
    finally:
        bench.close()


def _row(model: Any, request: Request, setting: Setting, stream: str | None, metric: str) -> dict[str, Any]:
    config = model.config.get_text_config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    token_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * model.dtype.itemsize
    return {
        "task": request.task,
        "number": request.number,
        "prefix": request.prefix,
        "prefix_tokens": len(request.prefix_ids),
        "suffix_tokens": len(request.suffix_ids),
        "prefix_bytes": len(request.prefix_ids) * token_bytes,
        "about": dict(request.about),
        "stream": stream,
        "system": setting.system,
        "budget": setting.budget,
        "metric": metric,
        "prediction": None,
        "score": None,
        "kl": None,
        "agreement": None,
        "perplexity": None,
    }


class _Run:
    """One process of a run."""

    def __init__(self, config: RunConfig, model: Any, tokenizer: Any, folder: RunFolder, state: PartialState) -> None:
        self._config = config
        self._model = model
        self._tokenizer = tokenizer
        self._folder = folder
        self._state = state
        self._done = folder.done()
        self._chance = random.Random(config.seed + state.process_index)
        self._work = folder.path / f"work-{state.process_index}"
        self._warm: set[str] = set()

    def all(self, progress: bool) -> None:
        """Make the requests of this process that have no row yet."""
        mine = list(self._requests())[self._state.process_index :: self._state.num_processes]
        todo = [(request, metric, self._missing(request, self._settings(request), None)) for request, metric in mine]
        # A stream is a sequence, so one process makes all of it.
        listed = self._streams() if self._state.is_main_process else []
        streamed = sum(len(self._missing(one, self._config.settings(), name)) for name, all_ in listed for one in all_)
        total = sum(len(missing) for _, _, missing in todo) + streamed
        with tqdm(total=total, unit="request", disable=not progress) as bar:
            for _, group in groupby(todo, key=lambda one: (one[0].task, one[0].prefix)):
                self._on_one_prefix([one for one in group if one[2]], bar)
            for name, requests in listed:
                self._stream(name, requests, bar)
        shutil.rmtree(self._work, ignore_errors=True)

    def _requests(self) -> Iterator[tuple[Request, str]]:
        for name in self._config.tasks:
            task = task_named(name, self._config.data_dir)
            for request in task.requests(self._tokenizer, self._config.requests, self._config.seed):
                yield request, task.metric

    def _settings(self, request: Request) -> list[Setting]:
        """In which systems a request of a task is made."""
        only_some = request.number >= self._config.timed_requests
        return [
            one
            for one in self._config.settings()
            if not (only_some and _is_timed_only(one)) and not system_named(one.system).in_streams
        ]

    def _missing(self, request: Request, settings: Iterable[Setting], stream: str | None) -> list[Setting]:
        def key(setting: Setting) -> Key:
            return request.task, request.number, stream, setting.system, setting.budget

        return [setting for setting in settings if key(setting) not in self._done]

    def _on_one_prefix(self, requests: Sequence[tuple[Request, str, list[Setting]]], bar: Any) -> None:
        if not requests:
            return
        needed = list(dict.fromkeys(setting for _, _, missing in requests for setting in missing))
        with _bench(self._model, self._work, needed) as bench:
            bench.in_memory.store(requests[0][0].prefix_ids)
            bench.store(requests[0][0])
            first = requests[0][0]
            if first.task not in self._warm:  # First calls of kernels are slow.
                self._warm.add(first.task)
                for setting in needed:
                    with timed_request(self._model, bench.systems[setting], first):
                        pass
            for request, metric, missing in requests:
                judge = Judge(self._model, self._tokenizer, request, metric)
                judge.refer_to(bench.in_memory)
                for setting in self._chance.sample(missing, len(missing)):
                    bar.set_description(f"{request.key} {setting.system} {setting.budget:.0%}")
                    row = _row(self._model, request, setting, None, metric)
                    with timed_request(self._model, bench.systems[setting], request) as timed:
                        if not _is_timed_only(setting):
                            row |= judge.judge(timed.cache, timed.first_token)
                    self._folder.add(row | timed.fields())
                    bar.update()

    def _streams(self) -> list[tuple[str, list[Request]]]:
        config = self._config
        common: dict[str, Any] = {"seed": config.seed, "data_dir": config.data_dir}
        found = []
        for name in config.streams:
            if name == "shared_documents":
                requests = streams.shared_documents(
                    self._tokenizer, documents=config.documents, requests=config.stream_requests, **common
                )
            else:
                turns = max(1, config.stream_requests // config.documents)
                requests = streams.conversations(self._tokenizer, conversations=config.documents, turns=turns, **common)
            found.append((name, requests))
        return found

    def _stream(self, name: str, requests: Sequence[Request], bar: Any) -> None:
        """All requests in order, in all systems; what a system keeps in memory it keeps for the next request."""
        settings = self._config.settings()
        if not any(self._missing(one, settings, name) for one in requests):
            return
        # The last prefix of a conversation holds those before it.
        longest = {one.prefix: len(one.prefix_ids) for one in requests}
        token_bytes = _row(self._model, requests[0], settings[0], name, "")["prefix_bytes"] // len(
            requests[0].prefix_ids
        )
        host_bytes = int(sum(longest.values()) * token_bytes * self._config.memory_share)
        with _bench(self._model, self._work, settings, host_bytes=host_bytes) as bench:
            for request in requests:
                bench.store(request)
                for setting in self._chance.sample(settings, len(settings)):
                    bar.set_description(f"{name} {request.number} {setting.system} {setting.budget:.0%}")
                    row = _row(self._model, request, setting, name, streams.METRIC)
                    with timed_request(self._model, bench.systems[setting], request, forget=False) as timed:
                        pass
                    # A stream that was broken off is made again from its beginning: memory starts empty.
                    if self._missing(request, [setting], name):
                        self._folder.add(row | timed.fields())
                        bar.update()


def run(
    config: RunConfig, out: Path, *, command: str = "", progress: bool = True, loaded: tuple[Any, Any] | None = None
) -> Path:
    """Make all requests that have no row in `out` yet. Under `accelerate launch` processes share them.

    Args:
        config: what.
        out: folder of the run. One that was broken off is continued.
        command: what the user typed, for the report.
        progress: whether to show a bar.
        loaded: model and tokenizer, if there are any already.

    Returns:
        `out`.

    Raises:
        RunFolderError: `out` holds another run.
    """
    import torch

    from ..models import DEFAULT_MODEL, load_model

    state = PartialState(cpu=not torch.cuda.is_available())
    folder = RunFolder(out, state.process_index)
    dtype = getattr(torch, config.dtype)
    # One process at a time: the first may have to download or convert the model.
    with state.main_process_first():
        model, tokenizer = loaded or load_model(config.model, dtype=dtype, device=state.device)
    if state.is_main_process:
        about = asdict(config) | {
            "model": config.model or DEFAULT_MODEL,
            "source": getattr(model, "source", None),
            "processes": state.num_processes,
            "command": command,
            "version": __version__,
        }
        folder.begin(about)
    state.wait_for_everyone()
    # Rivals at their best: transformers, too, can do without repeating K and V for each query head, if it is told to.
    with mock.patch.dict(os.environ, {"TRANSFORMERS_SDPA_FORCE_GQA": "1"}):
        _Run(config, model, tokenizer, folder, state).all(progress and state.is_main_process)
    state.wait_for_everyone()
    if state.is_main_process:
        folder.gather()
    state.wait_for_everyone()
    return out
