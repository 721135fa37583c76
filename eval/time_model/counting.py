"""Counting what requests do: the library's own requests, recorded on pretended device memory, kept in `counts.json`."""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm.auto import tqdm
from transformers import DynamicCache

from hf_contiguouskv import ContiguousKVConfig

from ..systems import Setting, State, departure
from ..systems.token_system import TokenSystem
from ..timing import time_to_first_token
from . import pretend
from .machines import MACHINES, OURS_CPU
from .record import CountError, Record
from .recording import AMOUNTS, Event, Recorder
from .shapes import QWEN_7B, QWEN_HALF, SMOLLM2, Shape, shape_of
from .stage import Stage

COUNTS = Path(__file__).with_name("counts.json")
SUFFIX_TOKENS = 32
_FIRST_TOKENS = 256
# What Linux reads at a time where a file is read from its beginning to its end.
_READ_AHEAD_BYTES = 128 * 1024
LENGTHS = (4096, 8192)
MEMORY_BYTES = 8 * 2**30
"""Limit of either tier while requests are counted: everything has room."""
FLOOR = "floor"


@dataclass(frozen=True)
class Method:
    """One way to serve a prefix.

    Attributes:
        label: as `eval.gpu_check` calls it.
        title: for tables.
        system: of `eval.systems`, with its options, or `FLOOR`.
        budget: share of the prefix that attention uses.
        states: in which requests may find it.
        config: of the library's requests; `None`: another system.
    """

    label: str
    title: str
    system: str
    budget: float
    states: tuple[State, ...]
    config: ContiguousKVConfig | None = None


# A server has its store open: with an accelerator, opening one registers host memory, which takes a process long once.
_COLD, _OPEN, _KEYS = State.COLD, State.OPEN, State.KEYS_RESIDENT
_WARM = (State.WARM_HOST, State.WARM_DEVICE)
_ALL = (_OPEN, _KEYS, *_WARM)
METHODS = (
    Method(FLOOR, "floor: no prefix", FLOOR, 1.0, (_COLD,)),
    Method("in_memory", "DynamicCache", "in_memory", 1.0, (State.WARM_DEVICE,)),
    Method("reload", "reload", "reload", 1.0, (_COLD, State.WARM_HOST)),
    Method("attentionstore", "AttentionStore", "attentionstore", 1.0, (_OPEN, *_WARM)),
    Method("attentionstore+overlap", "AttentionStore, overlapped", "attentionstore+overlap", 1.0, (_OPEN, *_WARM)),
    Method("attentionstore_h2o 5%", "AS+H2O, 5%", "attentionstore_h2o", 0.05, _ALL),
    Method("impress 5%", "IMPRESS, 5%", "impress", 0.05, _ALL),
    Method("exact", "exact", "contiguouskv", 1.0, (_OPEN, *_WARM), ContiguousKVConfig(budget=1.0)),
    Method("published 5%", "published, 5%", "contiguouskv_paper", 0.05, _ALL, ContiguousKVConfig.paper(0.05)),
    Method("default 5%", "default, 5%", "contiguouskv", 0.05, _ALL, ContiguousKVConfig(budget=0.05)),
    Method("default 25%", "default, 25%", "contiguouskv", 0.25, _ALL, ContiguousKVConfig(budget=0.25)),
)


def method_named(name: str) -> Method:
    """One of `METHODS`, by its label.

    Raises:
        ValueError: there is none of that name.
    """
    for method in METHODS:
        if method.label == name:
            return method
    raise ValueError(f"method must be one of {[method.label for method in METHODS]}, got {name!r}")


def slowest_disk(shape: Shape) -> float:
    """Of the machines that a model runs on, in bytes per second: it decides which reads are joined."""
    return min(machine.disk.bytes_s for machine in (*MACHINES, OURS_CPU) if shape_of(machine) is shape)


@contextmanager
def counting(shape: Shape, device: torch.device, lengths: Sequence[int]) -> Iterator[Counter]:
    """A model of this shape, and prefixes of these lengths stored for it, until the end.

    Args:
        shape: of the model.
        device: `pretend.DEVICE`, or the CPU.
        lengths: of prefixes, in tokens.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # What is computed is little, and nobody looks at it.
    # Folders go while stores have counters to write.
    logging.getLogger("hf_contiguouskv").setLevel(logging.ERROR)
    try:
        with (
            tempfile.TemporaryDirectory(prefix="contiguouskv-count-") as folder,
            Stage(shape.flash, slowest_disk(shape)) as stage,
            torch.no_grad(),
        ):
            yield Counter(shape, device, tuple(lengths), Path(folder), stage)
    finally:
        torch.set_num_threads(threads)


class Counter:
    """See `counting`."""

    def __init__(
        self, shape: Shape, device: torch.device, lengths: tuple[int, ...], folder: Path, stage: Stage
    ) -> None:
        self._shape = shape
        self._stage = stage
        self._folder = folder
        self._model = shape.model(device)
        self._generator = torch.Generator().manual_seed(0)
        self._ids = torch.randint(
            0, shape.vocabulary, (max(lengths) + SUFFIX_TOKENS,), device="cpu", generator=self._generator
        )
        self._states: dict[int, DynamicCache] = {}
        self._known: set[str] = set()
        # The last words of the longest prompt are everybody's suffix.
        self._suffix = self._ids[-SUFFIX_TOKENS:]

    def record(self, system: str, budget: float, state: State, lengths: tuple[int, int]) -> Record:
        """What a request does at two lengths.

        Raises:
            CountError: it does not find the state, or does not do the same at both lengths.
        """
        return Record.of(lengths, [self.recorded(system, budget, state, length) for length in lengths])

    def recorded(self, name: str, budget: float, state: State, tokens: int) -> Recorder:
        """One request, recorded.

        Raises:
            CountError: it does not find the state.
        """
        if name not in self._known:
            # The first request of a process is not like the others.
            self._known.add(name)
            self.recorded(name, budget, state, _FIRST_TOKENS)
        if name == FLOOR:
            return self._request(self._suffix, DynamicCache)
        prefix = self._ids[:tokens]
        plain = name in ("in_memory", "reload")
        options = {} if plain else {"host_bytes": MEMORY_BYTES, "device_bytes": MEMORY_BYTES}
        (setting,) = Setting.parse(name, (budget,))
        with setting.make(self._model, self._folder / str(tokens), **options) as system:
            system.store(prefix, self._random_states(tokens))
            system.enter(state, prefix, self._suffix)
            # Systems that choose tokens store keys and values as two layers.
            stored = 2 if isinstance(system, TokenSystem) else 1
            recorder = self._request(torch.cat([prefix, self._suffix]), lambda: system.cache(prefix), stored)
            stats = system.finish(recorder.cache)
            recorder.cache = None  # It holds the layers.
            departed = None if plain else departure(state, stats)
        if departed is not None:
            raise CountError(f"{name}: {departed}")
        if name == "reload" and state is State.COLD:
            recorder.layers[-1] = _read_from_file(recorder.layers[-1])
        return recorder

    def _request(self, prompt: torch.Tensor, make_cache: Callable[[], Any], stored_per_layer: int = 1) -> Recorder:
        with self._stage.recording(self._model.model.layers, stored_per_layer) as recorder:
            _, _, recorder.cache = time_to_first_token(self._model, prompt[None], make_cache)
        return recorder

    def _random_states(self, tokens: int) -> DynamicCache:
        if tokens not in self._states:
            shape = self._shape
            size = (2, 1, shape.kv_heads, tokens, shape.head_dim)
            keys, values = torch.randn(size, device="cpu", generator=self._generator).to(shape.dtype)
            self._states[tokens] = states = DynamicCache()
            for layer in range(shape.layers):
                states.update(keys, values, layer)
        return self._states[tokens]


def _read_from_file(events: list[Event]) -> list[Event]:
    """The same, where what crosses to the device is read from a file first, through the page cache and by the thread
    that wants it: the library's readers know nothing of that."""
    found: list[Event] = []
    for number, event in enumerate(events):
        if event[0] == "cross" and event[1] >= _READ_AHEAD_BYTES:
            label = (-1, number)
            found += [["submit", label, event[1] / _READ_AHEAD_BYTES, event[1], 1, [0] * len(AMOUNTS)], ["wait", label]]
        found.append(event)
    return found


# What is counted on a CPU: where there are measurements to compare predictions with (`validation`).
KEPT_TOKENS = 416
CPU_SYSTEMS = (
    (FLOOR, State.COLD),
    ("attentionstore+overlap", State.OPEN),
    ("contiguouskv_paper", State.OPEN),
    ("contiguouskv", State.KEYS_RESIDENT),
    ("contiguouskv", State.OPEN),
)
CPU_LENGTHS = ((8192, 16384), (32768, 65536))


@dataclass(frozen=True)
class Counts:
    """What was counted: records by shape (or `cpu` and lengths), and by method and state."""

    made_with: dict[str, str]
    records: dict[str, dict[str, Record]]

    def record(self, shape: str, method: str, state: State) -> Record:
        """One of them.

        Raises:
            CountError: it was not counted.
        """
        found = self.records.get(shape, {}).get(f"{method} / {state}")
        if found is None:
            raise CountError(f"{shape}, {method}, {state} was not counted: python -m eval.time_model --count")
        return found


def count_all(methods: Sequence[Method] = METHODS, shapes: Sequence[Shape] = (QWEN_7B, QWEN_HALF)) -> Counts:
    """Count everything that `counts.json` holds. Takes some minutes."""
    records: dict[str, dict[str, Record]] = {}
    for shape in shapes:
        with counting(shape, pretend.DEVICE, LENGTHS) as counter:
            todo = [(method, state) for method in methods for state in method.states]
            for method, state in tqdm(todo, shape.name, disable=None):
                found = counter.record(method.system, method.budget, state, LENGTHS)
                records.setdefault(shape.name, {})[f"{method.label} / {state}"] = found
    for lengths in CPU_LENGTHS:
        with counting(SMOLLM2, torch.device("cpu"), lengths) as counter:
            for system, state in tqdm(CPU_SYSTEMS, f"{SMOLLM2.name} on a CPU, {lengths}", disable=None):
                shares = [KEPT_TOKENS / length for length in lengths]
                pairs = zip(shares, lengths, strict=True)
                recorders = [counter.recorded(system, share, state, length) for share, length in pairs]
                name = f"cpu {lengths[0]}-{lengths[1]}"
                records.setdefault(name, {})[f"{system} / {state}"] = Record.of(lengths, recorders)
    versions = {"torch": str(torch.__version__), "transformers": str(transformers.__version__)}
    return Counts(versions, records)


def save(counts: Counts, path: Path = COUNTS) -> None:
    """Write counts, one program to a line."""
    path.write_text(_json(counts) + "\n")


def load(path: Path = COUNTS) -> Counts:
    """Read counts.

    Raises:
        CountError: there are none.
    """
    if not path.exists():
        raise CountError(f"there is no {path}: python -m eval.time_model --count")
    found = json.loads(path.read_text())
    records = {
        shape: {name: Record.from_json(record) for name, record in records.items()}
        for shape, records in found["records"].items()
    }
    return Counts(found["made_with"], records)


def _json(counts: Counts) -> str:
    """JSON in which every program is one line."""
    blocks = []
    for shape, records in counts.records.items():
        inner = []
        for name, record in records.items():
            fields = record.as_json()
            programs = ",\n".join(f"    {json.dumps(program)}" for program in fields.pop("programs"))
            head = json.dumps(fields)[1:-1]
            inner.append(f'  {json.dumps(name)}: {{{head}, "programs": [\n{programs}\n  ]}}')
        blocks.append(f" {json.dumps(shape)}: {{\n" + ",\n".join(inner) + "\n }")
    made_with = json.dumps(counts.made_with)
    return f'{{"made_with": {made_with},\n"records": {{\n' + ",\n".join(blocks) + "\n}}"
