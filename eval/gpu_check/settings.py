"""Settings of a check: sizes, rounds and deadlines, for a GPU and for its rehearsal on a CPU."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

# The command ends after this many seconds in any case.
TOTAL_S = 480.0
# Seconds that a process may take before its deadline begins: importing torch for the first time reads gigabytes.
START_S = 40.0
# Seconds that each stage may take.
DEADLINES_S = {"where": 20.0, "tests": 90.0, "time": 270.0, "trace": 40.0, "table": 5.0}
STAGES = tuple(DEADLINES_S)

QWEN2_5_7B = {
    "num_hidden_layers": 28,
    "hidden_size": 3584,
    "intermediate_size": 18_944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152_064,
    "max_position_embeddings": 131_072,
}
TINY = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 1024,
}


@dataclass(frozen=True)
class Settings:
    """One run.

    Attributes:
        out: folder of the results.
        folder: folder for stores and scratch files; removed at the end.
        rehearse: whether to run on a CPU, with a stand-in for the device.
        scale: factor on all deadlines.
        device: the model's device: "cuda", or "cpu" in a rehearsal.
        dtype: dtype of weights and KV.
        shape: shape of the model (fields of a `Qwen2Config`).
        lengths: lengths of the prefixes in tokens, ascending.
        shares: share of the time left, for each length.
        complete_lengths: lengths at which every system is measured; at other lengths, only systems that scale.
        recompute_lengths: lengths at which the prefix is also recomputed.
        trace_length: length of the prefix whose requests are traced; one of `lengths`.
        suffix_tokens: suffix tokens of every request.
        varied_suffixes: shortest and longest suffix of the run in which every request has another suffix length.
        rounds: measured rounds, after a first round that does not count.
        fewest_rounds: minimum number of rounds if time is short, at complete lengths (one at other lengths).
        disk_probe_bytes: size of the file for timing reads.
        any_file_system: whether to go on if stores lie in memory.
    """

    out: str
    folder: str
    rehearse: bool = False
    scale: float = 1.0
    device: str = "cuda"
    dtype: str = "bfloat16"
    shape: tuple[tuple[str, int], ...] = tuple(QWEN2_5_7B.items())
    # The last is 128K less 128, so that positions stay within the model's context, suffix included.
    lengths: tuple[int, ...] = (8192, 32_768, 130_944)
    shares: tuple[float, ...] = (0.25, 0.6, 1.0)
    complete_lengths: tuple[int, ...] = (8192, 32_768)
    recompute_lengths: tuple[int, ...] = (8192, 32_768)
    trace_length: int = 32_768
    suffix_tokens: int = 32
    varied_suffixes: tuple[int, int] = (17, 48)
    rounds: int = 5
    fewest_rounds: int = 3
    disk_probe_bytes: int = 2**30
    any_file_system: bool = False

    @classmethod
    def rehearsal(cls, out: str, folder: str, **more: Any) -> Self:
        """Settings for tiny sizes on a CPU."""
        tiny: dict[str, Any] = {
            "rehearse": True,
            "device": "cpu",
            "shape": tuple(TINY.items()),
            "lengths": (128, 256, 512),
            "complete_lengths": (128, 256),
            "recompute_lengths": (128,),
            "trace_length": 256,
            "suffix_tokens": 8,
            "varied_suffixes": (3, 6),
            "rounds": 2,
            "fewest_rounds": 1,
            "disk_probe_bytes": 2**22,
        }
        return cls(out, folder, **(tiny | more))

    def deadline(self, stage: str) -> float:
        """Seconds that a stage may take."""
        return DEADLINES_S[stage] * self.scale

    @property
    def total_s(self) -> float:
        """Seconds that all stages may take."""
        return TOTAL_S * max(1.0, self.scale)

    def save(self, path: Path) -> None:
        """Save the settings for a stage's process."""
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Load saved settings."""
        found = json.loads(path.read_text())
        lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        return cls(**(found | lists | {"shape": tuple((name, size) for name, size in found["shape"])}))
