"""Every system by its name: how it is made, its options, and what they change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_contiguouskv import ContiguousKVConfig

from .attentionstore import AttentionStore
from .attentionstore_h2o import AttentionStoreH2O
from .base import System
from .contiguouskv import ContiguousKV
from .flexgen import FlexGen
from .impress import Impress
from .in_memory import InMemory
from .kept_tokens import KeptTokens
from .no_prefix import NoPrefix
from .recompute import Recompute
from .reload import Reload

# From the model, a folder for all systems of one prefix, the budget, options by name, and options of the store.
Make = Callable[..., System]


@dataclass(frozen=True)
class OptionKind:
    """An option of a system.

    Attributes:
        name: as written after a `+`.
        changes_answers: whether the model may answer differently with it.
        takes_value: whether it is written `NAME=SHARE`, with a share from 0 to 1.
        only_in_streams: it changes only what stays in memory, so only streams of requests show a difference.
    """

    name: str
    changes_answers: bool = False
    takes_value: bool = False
    only_in_streams: bool = False

    def check(self, option: str) -> None:
        """Raise if the value of an option that takes one is not a share.

        Raises:
            ValueError: it is missing, or not a number from 0 to 1.
        """
        value = option.partition("=")[2]
        try:
            good = 0.0 <= float(value) <= 1.0
        except ValueError:
            good = False
        if not good:
            raise ValueError(f"{option!r}: a share from 0 to 1 must follow {self.name}=")


@dataclass(frozen=True)
class SystemKind:
    """One system.

    Attributes:
        make: makes it: `make(model, folder, budget, options, **store_options)`, where `options` are values by name.
        exact: whether it attends to the whole prefix, so that there is only a budget of 1.0.
        options: that it takes.
        answers_as: a system that takes no options and answers alike at every budget.
        judged: whether its answers say anything. Where they do not, there is only a budget of 1.0.
        in_streams: whether it can serve a stream of requests.
    """

    make: Make
    exact: bool = False
    options: tuple[OptionKind, ...] = ()
    answers_as: str | None = None
    judged: bool = True
    in_streams: bool = True

    @property
    def takes_budget(self) -> bool:
        """Whether it uses a share of the prefix that is chosen."""
        return self.judged and not self.exact

    @property
    def option_names(self) -> tuple[str, ...]:
        """Names of its options."""
        return tuple(option.name for option in self.options)

    def option(self, name: str) -> OptionKind:
        """An option by its name.

        Raises:
            KeyError: there is none of that name.
        """
        return {option.name: option for option in self.options}[name]


Options = Mapping[str, str]


def _chunks(name: str, config: Callable[..., ContiguousKVConfig]) -> Make:
    """Ours and the published method; a segment has what both need, so they share a folder."""

    def make(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
        eviction = {"eviction": "published"} if name == "contiguouskv_paper" else {}
        exact = {"payload": "exact"} if "exact" in options else {}
        settings = config(budget=budget, timeline=True, **exact)
        label = "+".join((name, *sorted(options)))
        return ContiguousKV(label, model, folder / "chunks", settings, **eviction | store_options)

    return make


def _recompute(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    return Recompute(model)


def _in_memory(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    return InMemory(model, dynamic="dynamic" in options)


def _no_prefix(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    return NoPrefix(model)


def _kept_tokens(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    return KeptTokens(model, folder / "chunks", budget, **store_options)


def _reload(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    return Reload(model, folder / "whole", read_gbps=store_options.get("read_gbps"))


def _attentionstore(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    return AttentionStore(model, folder / "layers", overlap="overlap" in options, **store_options)


def _flexgen(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    shares = {f"{name}_share": float(value) for name, value in options.items()}
    return FlexGen(model, folder / "layers", **shares, **store_options)


def _h2o(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    eviction = {"eviction": "lfu"} if "lfu" in options else {}
    return AttentionStoreH2O(
        model, folder / "h2o", budget, overlap="overlap" in options, timeline=True, **eviction | store_options
    )


def _impress(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    probes = "groups" if "groups" in options else "first"
    return Impress(
        model,
        folder / f"impress-{probes}",
        budget,
        overlap="overlap" in options,
        timeline=True,
        probes=probes,
        blocks="blocks" in options,
        **store_options,
    )


_OVERLAP = OptionKind("overlap")

SYSTEMS: dict[str, SystemKind] = {
    "recompute": SystemKind(_recompute, exact=True),
    "in_memory": SystemKind(_in_memory, exact=True, options=(OptionKind("dynamic"),)),
    "no_prefix": SystemKind(_no_prefix, judged=False),
    "kept_tokens": SystemKind(_kept_tokens, answers_as="contiguouskv", in_streams=False),
    "reload": SystemKind(_reload, exact=True),
    "attentionstore": SystemKind(_attentionstore, exact=True, options=(_OVERLAP,)),
    "flexgen": SystemKind(
        _flexgen, exact=True, options=(OptionKind("device", takes_value=True), OptionKind("host", takes_value=True))
    ),
    "attentionstore_h2o": SystemKind(_h2o, options=(_OVERLAP, OptionKind("lfu", only_in_streams=True))),
    "impress": SystemKind(
        _impress,
        options=(
            _OVERLAP,
            OptionKind("groups", changes_answers=True),
            OptionKind("blocks", changes_answers=True),
        ),
    ),
    "contiguouskv_paper": SystemKind(_chunks("contiguouskv_paper", ContiguousKVConfig.paper)),
    "contiguouskv": SystemKind(
        _chunks("contiguouskv", partial(ContiguousKVConfig)), options=(OptionKind("exact", changes_answers=True),)
    ),
}

# What is measured where nothing else is asked for.
DEFAULT_SYSTEMS = (
    "recompute",
    "in_memory",
    "reload",
    "attentionstore",
    "attentionstore+overlap",
    "flexgen",
    "attentionstore_h2o",
    "attentionstore_h2o+lfu",
    "attentionstore_h2o+overlap",
    "impress",
    "impress+overlap",
    "impress+groups",
    "contiguouskv_paper",
    "contiguouskv",
)


def system_named(name: str) -> SystemKind:
    """A system by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SYSTEMS:
        raise ValueError(f"system must be one of {list(SYSTEMS)}, got {name!r}")
    return SYSTEMS[name]
