"""What the planner says of the paper's hardware (arXiv 2601.13631), beside what the paper reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from transformers import Qwen2Config

from hf_contiguouskv.model.configured_model import ConfiguredModel, configured_model
from hf_contiguouskv.planning.costs import Case
from hf_contiguouskv.planning.forecast import PUBLISHED_BUDGET, System, systems
from hf_contiguouskv.planning.machine import ACCELERATORS, Machine, Storage, machine_with
from hf_contiguouskv.planning.pipeline import RequestSteps, timing
from hf_contiguouskv.planning.token_choices import BLOCK_TOKENS
from hf_contiguouskv.planning.volumes import Volume

from ..report.names import PAPER
from ..report.paper import SPEED_UPS
from ..time_model.machines import SAMSUNG_990_PRO
from ..time_model.shapes import QWEN_7B

LENGTHS = (2048, 4096, 8192, 32_768)
SUFFIX_TOKENS = 32


def _qwen(name: str, layers: int, intermediate: int) -> ConfiguredModel:
    """Qwen2.5 14B or 32B, by its published configuration."""
    config = Qwen2Config(
        vocab_size=152_064,
        hidden_size=5120,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=40,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
    )
    return configured_model(config, torch.bfloat16, name)


MODELS: tuple[Callable[[], ConfiguredModel], ...] = (
    lambda: configured_model(QWEN_7B.config(), torch.bfloat16, QWEN_7B.name),
    lambda: _qwen("Qwen2.5-14B", 48, 13_824),
    lambda: _qwen("Qwen2.5-32B", 64, 27_648),
)


@dataclass(frozen=True)
class PaperRow:
    """How many times faster the published method is predicted to be than a baseline.

    Attributes:
        model: name.
        baseline: title of the system.
        paper: what the paper says, over its models and tasks.
        well_read: by length of the prefix, if the baseline reads as well as it can: large reads, eight at a time.
        one_by_one: the same, if it reads one block of 64 tokens of a layer after the other.
    """

    model: str
    baseline: str
    paper: float
    well_read: dict[int, float]
    one_by_one: dict[int, float]


def paper_machine() -> Machine:
    """An A800 with a Samsung 990 Pro."""
    storage = Storage(SAMSUNG_990_PRO.bytes_s, SAMSUNG_990_PRO.latency_s)
    return machine_with(ACCELERATORS["a800"], storage, torch.bfloat16)


def paper_rows() -> list[PaperRow]:
    """The paper's three ratios at 5%, for its three models. Its baselines do not overlap loading with compute."""
    machine = paper_machine()
    by_name = {one.name: one for one in systems(published_budget=PUBLISHED_BUDGET, overlap=False)}
    found = []
    for make in MODELS:
        model = make()
        for name, figure in SPEED_UPS.items():
            well, slow = {}, {}
            for tokens in LENGTHS:
                case = Case(model, machine, tokens, SUFFIX_TOKENS)
                base = by_name[PAPER].timing(case).ttft_s
                well[tokens] = by_name[name].timing(case).ttft_s / base
                slow[tokens] = timing(one_by_one(by_name[name], case), machine).ttft_s / base
            found.append(PaperRow(model.name, by_name[name].title, figure, well, slow))
    return found


def one_by_one(system: System, case: Case) -> RequestSteps:
    """A system's request, if it reads blocks of 64 tokens (K or V of all heads of a layer) one after the other."""
    block = BLOCK_TOKENS * case.token_bytes / 2
    request = system.request(case)

    def apart(volume: Volume) -> Volume:
        return Volume(volume.nbytes, max(1, math.ceil(volume.nbytes / block)))

    steps = [
        replace(
            step,
            first=None if step.first is None else apart(step.first),
            asks=tuple(replace(ask, volume=apart(ask.volume)) for ask in step.asks),
        )
        for step in request.layers
    ]
    return replace(request, layers=steps, in_flight=1)
