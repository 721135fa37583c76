"""A whole run: it stores prefixes, makes requests in all systems in turn, and writes rows."""

from __future__ import annotations

import os
import random
import sys
import uuid
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import asdict
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from hf_contiguouskv import __version__
from hf_contiguouskv.model.fingerprint import model_fingerprint

from .. import streams
from ..dtypes import DtypeChoice, choose_dtype, dtype_name
from ..systems import system_named
from ..tasks import Request
from .bench import bench_in
from .config import IN_MEMORY, RunConfig, Setting
from .folder import Key, RunFolder, recorded_dtype
from .quality import Judge
from .readings import Cropped
from .requests import Asked, asked_of, chat_of, questions_of, require_served, token_bytes
from .timed import timed_request


def _is_timed_only(setting: Setting) -> bool:
    kind = system_named(setting.system)
    return kind.answers_as is not None or (kind.exact and setting.system != IN_MEMORY)


class _Run:
    """One process of a run."""

    def __init__(
        self,
        config: RunConfig,
        asked: Asked,
        model: Any,
        tokenizer: Any,
        folder: RunFolder,
        state: PartialState,
        session: str,
    ) -> None:
        self._config = config
        self._asked = asked
        self._model = model
        self._tokenizer = tokenizer
        self._folder = folder
        self._state = state
        self._session = session
        self._token_bytes = token_bytes(model)
        self._done = folder.done()
        self._chance = random.Random(config.seed + state.process_index)
        self._work = folder.path / f"work-{state.process_index}"
        self._warm: set[str] = set()

    def all(self, progress: bool) -> None:
        """Make the requests of this process that have no row yet."""
        mine = self._asked.alone[self._state.process_index :: self._state.num_processes]
        todo = [(request, metric, self._missing(request, self._settings(request), None)) for request, metric in mine]
        # A stream is a sequence, so one process makes all its requests.
        listed = self._asked.streams if self._state.is_main_process else {}
        settings = self._config.settings()
        streamed = sum(len(self._missing(one, settings, name)) for name, all_ in listed.items() for one in all_)
        total = sum(len(missing) for _, _, missing in todo) + streamed
        with tqdm(total=total, unit="request", disable=not progress) as bar:
            for _, group in groupby(todo, key=lambda one: (one[0].task, one[0].prefix)):
                self._on_one_prefix([one for one in group if one[2]], bar)
            for name, requests in listed.items():
                self._stream(name, requests, settings, bar)

    def _settings(self, request: Request) -> list[Setting]:
        """The systems in which a request of a task is made."""
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

    def _row(self, request: Request, setting: Setting, stream: str | None, metric: str) -> dict[str, Any]:
        return {
            "task": request.task,
            "number": request.number,
            "prefix": request.prefix,
            "prefix_tokens": len(request.prefix_ids),
            "suffix_tokens": len(request.suffix_ids),
            "prefix_bytes": len(request.prefix_ids) * self._token_bytes,
            "about": dict(request.about),
            "stream": stream,
            "system": setting.system,
            "budget": setting.budget,
            "session": self._session,
            "processes": self._state.num_processes,
            "metric": metric,
            "prediction": None,
            "score": None,
            "kl": None,
            "agreement": None,
            "kl_answer": None,
            "perplexity": None,
        }

    def _on_one_prefix(self, requests: Sequence[tuple[Request, str, list[Setting]]], bar: Any) -> None:
        if not requests:
            return
        needed = list(dict.fromkeys(setting for _, _, missing in requests for setting in missing))
        with bench_in(self._work, self._model, needed) as bench:
            first = requests[0][0]
            bench.in_memory.store(first.prefix_ids)
            bench.store(first)
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
                    row = self._row(request, setting, None, metric)
                    with timed_request(self._model, bench.systems[setting], request) as timed:
                        if not _is_timed_only(setting):
                            row |= judge.judge(Cropped(self._model, request, timed.cache), timed.first_token)
                    self._folder.add(row | timed.fields())
                    bar.update()

    def _stream(self, name: str, requests: Sequence[Request], settings: Sequence[Setting], bar: Any) -> None:
        """Make all requests in order, in all systems; each system keeps its memory for the next request."""
        if not any(self._missing(one, settings, name) for one in requests):
            return
        with bench_in(self._work, self._model, settings) as bench:  # First calls of kernels are slow.
            bench.store(requests[0])
            for setting in settings:
                with timed_request(self._model, bench.systems[setting], requests[0]):
                    pass
        room = int(self._config.memory_share * self._token_bytes * distinct_tokens(requests))
        with bench_in(self._work, self._model, settings, host_bytes=room, device_bytes=room) as bench:
            for request in requests:
                bench.store(request)
                for setting in self._chance.sample(settings, len(settings)):
                    bar.set_description(f"{name} {request.number} {setting.system} {setting.budget:.0%}")
                    row = self._row(request, setting, name, streams.METRIC)
                    with timed_request(self._model, bench.systems[setting], request, forget=False) as timed:
                        pass
                    # An interrupted stream starts again from its beginning, because memory starts empty.
                    if self._missing(request, [setting], name):
                        self._folder.add(row | timed.fields())
                        bar.update()


def distinct_tokens(requests: Sequence[Request]) -> int:
    """Distinct prefix tokens of a stream; the last turn of a chat contains the tokens of earlier turns."""
    longest: dict[Any, int] = {}
    for request in requests:
        longest[chat_of(request)] = max(longest.get(chat_of(request), 0), len(request.prefix_ids))
    return sum(longest.values())


def _agreed_dtype(config: RunConfig, out: Path, device: torch.device | str, state: PartialState) -> DtypeChoice:
    """The dtype of a run: as asked, else that of the run in `out`, else the fastest on the device.

    One process decides for all, because two measurements could give different results.
    """
    found: list[Any] = [None]
    if state.is_main_process:
        before = recorded_dtype(out) if config.dtype == "auto" else None
        if before is None:
            found = [choose_dtype(config.dtype, device)]
        else:
            found = [DtypeChoice(getattr(torch, before), "as the run that is continued")]
    choice: DtypeChoice = broadcast_object_list(found)[0]
    return choice


def run(
    config: RunConfig, out: Path, *, command: str = "", progress: bool = True, loaded: tuple[Any, Any] | None = None
) -> Path:
    """Make all requests that have no row in `out` yet. Under `accelerate launch` processes share them.

    Args:
        config: the run's configuration.
        out: folder of the run. An interrupted run is continued.
        command: the user's command line, for the report.
        progress: whether to show a progress bar.
        loaded: model and tokenizer, if they are already loaded.

    Returns:
        `out`.

    Raises:
        RunFolderError: `out` holds another run.
        NotServedError: see `require_served`.
        DataMissingError: a task's data cannot be loaded.
    """
    from ..models import DEFAULT_MODEL, load_model

    # Processes wait for the slowest process, and for the one that makes the streams.
    state = PartialState(cpu=not torch.cuda.is_available(), timeout=timedelta(days=7))
    device = config.device or state.device
    if loaded is None:
        choice = _agreed_dtype(config, out, device, state)
    # One process at a time: the first may have to download or convert the model.
    with state.main_process_first():
        model, tokenizer = loaded or load_model(config.model, dtype=choice.dtype, device=device)
        asked = asked_of(config, tokenizer)
    if loaded is None and progress and state.is_main_process:
        print(f"runs in {choice.name} on {model.device} ({choice.reason})", file=sys.stderr)
    require_served(model, asked)
    folder = RunFolder(out, state.process_index)
    if state.is_main_process:
        name = config.model or (DEFAULT_MODEL if loaded is None else model.config._name_or_path)
        about = asdict(config) | {
            "model": name,
            "dtype": dtype_name(model.dtype),
            "fingerprint": model_fingerprint(model),
            "source": getattr(model, "source", None),
            "device": model.device.type,
            "questions": questions_of(asked),
            "processes": state.num_processes,
            "command": command,
            "version": __version__,
        }
        folder.begin(about)
    state.wait_for_everyone()
    # Rivals at their best: on a CPU, with this variable transformers does not repeat K and V for each query head
    # either. (On a GPU this is slower with a mask.)
    on_cpu = model.device.type == "cpu"
    forced = mock.patch.dict(os.environ, {"TRANSFORMERS_SDPA_FORCE_GQA": "1"}) if on_cpu else nullcontext()
    with forced:
        _Run(config, asked, model, tokenizer, folder, state, uuid.uuid4().hex[:8]).all(
            progress and state.is_main_process
        )
    state.wait_for_everyone()
    if state.is_main_process:
        folder.gather()
    state.wait_for_everyone()
    return out
