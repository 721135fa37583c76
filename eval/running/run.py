"""A whole run: it stores prefixes, makes requests in all systems in turn, and writes rows."""

from __future__ import annotations

import gc
import os
import sys
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from tqdm.auto import tqdm

from hf_contiguouskv import __version__
from hf_contiguouskv.model.fingerprint import model_fingerprint

from ..dtypes import DtypeChoice, choose_dtype, dtype_name
from ..systems import State
from .alone import AloneRun
from .config import RunConfig
from .folder import RunFolder, recorded_dtype
from .plan import Plan, offered
from .process import Process
from .requests import Asked, asked_of, questions_of, require_served
from .streamed import StreamRun


def _make_all(process: Process, asked: Asked) -> None:
    """Make the requests of this process that have no row yet."""
    alone = AloneRun(process, asked.alone)
    # A stream is a sequence, so one process makes all its requests.
    listed = asked.streams if process.number == 0 else {}
    streamed = [StreamRun(process, name, requests) for name, requests in listed.items()]
    total = alone.rows + sum(one.rows for one in streamed)
    with tqdm(total=total, unit="request", disable=not process.progress) as bar:
        alone.all(bar)
        for one in streamed:
            one.all(bar)


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
        NotServedError: see `asked_of` and `require_served`.
        DataMissingError: a task's data cannot be loaded.
    """
    from ..models import load_model

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
    store_options = {} if config.read_gbps is None else {"read_gbps": config.read_gbps}
    plans, notes = _planned(config, asked, model, store_options)
    if state.is_main_process:
        folder.begin(
            _description(config, asked, model, plans, loaded is not None)
            | {
                "skipped": notes,
                "processes": state.num_processes,
                "command": command,
                "version": __version__,
            }
        )
        for note in notes if progress else ():
            print(note, file=sys.stderr)
    state.wait_for_everyone()
    process = Process(
        config=config,
        plans=plans,
        model=model,
        tokenizer=tokenizer,
        folder=folder,
        session=uuid.uuid4().hex[:8],
        number=state.process_index,
        count=state.num_processes,
        progress=progress and state.is_main_process,
        store_options=store_options,
        done=folder.done(),
    )
    with _ready_for_timing(model):
        _make_all(process, asked)
    state.wait_for_everyone()
    if state.is_main_process:
        folder.gather()
    state.wait_for_everyone()
    return out


def _planned(
    config: RunConfig, asked: Asked, model: Any, store_options: Mapping[str, Any]
) -> tuple[dict[int, Plan], list[str]]:
    """What is asked of each length of prefix, and what is left out and why."""
    lengths = sorted({len(one.prefix_ids) for requests in asked.by_name().values() for one in requests})
    every = dict.fromkeys(setting for tokens in lengths for setting in config.settings(tokens))
    with tempfile.TemporaryDirectory(prefix="contiguouskv-") as empty:
        offers, notes = offered(model, every, Path(empty), store_options)
    states = [State(one) for one in config.states]
    plans = {tokens: Plan(config.settings(tokens), states, offers) for tokens in lengths}
    notes = [*notes, *(note for plan in plans.values() for note in plan.notes)]
    if config.streams:
        left = (one.label for one in every if not one.kind.in_streams)
        notes += [f"{label} is left out of streams: it holds what one request selects" for label in left]
    return plans, list(dict.fromkeys(notes))


def _description(
    config: RunConfig, asked: Asked, model: Any, plans: Mapping[int, Plan], was_loaded: bool
) -> dict[str, Any]:
    """What a run was made with, for its folder."""
    from ..models import DEFAULT_MODEL

    return asdict(config) | {
        "model": config.model or (model.config._name_or_path if was_loaded else DEFAULT_MODEL),
        "dtype": dtype_name(model.dtype),
        "fingerprint": model_fingerprint(model),
        "budgets": list(dict.fromkeys(share for tokens in plans for share in config.budgets_for(tokens))),
        "source": getattr(model, "source", None),
        "device": model.device.type,
        "questions": questions_of(asked),
        "data": asked.data,
    }


@contextmanager
def _ready_for_timing(model: Any) -> Iterator[None]:
    """Rivals at their best, and no long collections of garbage."""
    # On a CPU, with this variable transformers does not repeat K and V for each query head either. (On a GPU this is
    # slower with a mask.)
    on_cpu = model.device.type == "cpu"
    forced = mock.patch.dict(os.environ, {"TRANSFORMERS_SDPA_FORCE_GQA": "1"}) if on_cpu else nullcontext()
    # What was imported is no garbage. Without it, a collection before each request takes no time; with it, 0.2 s.
    gc.collect()
    gc.freeze()
    try:
        with forced:
            yield
    finally:
        gc.unfreeze()
