"""Runs that have a name: what each asks for beside the defaults of `eval.running.RunConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """A run with a name.

    Attributes:
        about: what it measures, in one line.
        fields: of `RunConfig`.
    """

    about: str
    fields: Mapping[str, Any]


PRESETS = {
    "bench": Preset(
        "8K tokens of text, cold: time to first token between the suffix alone and computing all",
        {
            "tasks": ("text:8128+32",),
            "systems": (
                "no_prefix",
                "recompute",
                "reload",
                "attentionstore+overlap",
                "contiguouskv_paper@0.05",
                "contiguouskv@0.05",
                "contiguouskv@0.25",
                "contiguouskv@1",
            ),
            "requests": 9,
            "timed_requests": 9,
        },
    ),
    "lengths": Preset(
        "256 to 8K tokens of text, cold: from which length on a prefix is worth storing, and choosing",
        {
            "tasks": tuple(f"text:{tokens}+32" for tokens in (256, 512, 1024, 2048, 4096, 8128)),
            "systems": (
                "recompute",
                "reload",
                "attentionstore+overlap",
                "contiguouskv_paper@0.05",
                "contiguouskv@0.25",
                "contiguouskv@1",
            ),
            "requests": 7,
            "timed_requests": 7,
        },
    ),
    "growth": Preset(
        "8K to 64K random tokens of which 416 are used: how time grows with the prefix",
        {
            "tasks": tuple(f"random:{tokens}+32" for tokens in (8192, 16384, 32768, 65536)),
            "systems": (
                "no_prefix",
                "reload",
                "attentionstore+overlap",
                "contiguouskv_paper",
                "contiguouskv",
                "contiguouskv+compact",
            ),
            "states": ("cold", "keys_resident"),
            "kept_tokens": 416,
            "requests": 7,
            "timed_requests": 7,
        },
    ),
    "warm": Preset(
        "8K tokens of text, all that is used in memory: what it costs to choose and gather",
        {
            "tasks": ("text:8128+32", "text:7904+256"),
            "systems": ("no_prefix", "in_memory", "kept_tokens", "contiguouskv"),
            "states": ("warm_host", "warm_device"),
            "budgets": (0.05, 0.25, 1.0),
            "requests": 11,
            "timed_requests": 11,
        },
    ),
    "ablation": Preset(
        "the published method without its parts: chunks alone, then selections that layers share, then reads for the "
        "next period, then chunks in memory",
        {
            "tasks": ("sst2", "subj", "trec", "needle_multikey"),
            "systems": (
                *("in_memory", "reload", "attentionstore", "attentionstore_h2o", "impress"),
                *("contiguouskv_paper+period=1", "contiguouskv_paper+subperiod=8", "contiguouskv_paper"),
            ),
            "states": ("cold", "warm_host"),
            "requests": 8,
        },
    ),
    "sweep": Preset(
        "the published method with other chunks, periods and subperiods",
        {
            "tasks": ("sst2", "needle_multikey"),
            "systems": (
                *("in_memory", "reload", "contiguouskv_paper"),
                *(f"contiguouskv_paper+chunk={tokens}" for tokens in (4, 8, 32, 64)),
                *(f"contiguouskv_paper+period={layers}" for layers in (1, 2, 4, 15, 30)),
                *(f"contiguouskv_paper+subperiod={layers}" for layers in (1, 2, 6, 8)),
            ),
            "requests": 8,
        },
    ),
    "needles": Preset(
        "a sentence hidden in 2K tokens: what a budget costs in answers",
        {
            "tasks": ("needle",),
            "systems": ("in_memory", "contiguouskv_paper", "contiguouskv"),
            "budgets": (0.05, 0.1, 0.25),
            "requests": 24,
        },
    ),
}
