"""Every system by its name: how it is made, its options, and what they change."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hf_contiguouskv import AttentionMass, ContiguousKVConfig, IndexedKeys
from hf_contiguouskv.errors import ConfigError

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
# Options of a setting: values by name, `""` for an option without a value.
Options = Mapping[str, str]


@dataclass(frozen=True)
class OptionKind:
    """An option of a system.

    Attributes:
        name: as written after a `+`.
        changes_answers: whether the model may answer differently with it.
        value: `"share"`: it is written `NAME=SHARE`, with a share from 0 to 1; `"count"`: `NAME=N`, with a whole number
            from 1; `""`: it is written by its name alone.
        only_in_streams: it changes only what stays in memory, so only streams of requests show a difference.
    """

    name: str
    changes_answers: bool = False
    value: Literal["", "share", "count"] = ""
    only_in_streams: bool = False

    def check(self, option: str) -> None:
        """Raise if an option is not written as its kind asks.

        Raises:
            ValueError: it has a value and takes none, or its value is missing, no number, or out of range.
        """
        value = option.partition("=")[2]
        if not self.value and option != self.name:
            raise ValueError(f"{option!r}: the option {self.name!r} takes no value")
        if self.value == "count" and not (value.isascii() and value.isdecimal() and int(value) > 0):
            raise ValueError(f"{option!r}: a whole number from 1 must follow {self.name}=")
        if self.value == "share":
            try:
                good = 0.0 <= float(value) <= 1.0
            except ValueError:
                good = False
            if not good:
                raise ValueError(f"{option!r}: a share from 0 to 1 must follow {self.name}=")


def _require_nothing(budget: float, options: Options) -> None:
    """Of most systems, all options go together."""


@dataclass(frozen=True)
class SystemKind:
    """One system.

    Attributes:
        make: makes it: `make(model, folder, budget, options, **store_options)`, where `options` are values by name.
        exact: whether it attends to the whole prefix, so that there is only a budget of 1.0.
        options: that it takes.
        require: called with a budget and options by name; raises `ValueError` if they do not go together.
        answers_as: a system that takes no options and answers alike at every budget.
        judged: whether its answers say anything. Where they do not, there is only a budget of 1.0.
        in_streams: whether it can serve a stream of requests.
    """

    make: Make
    exact: bool = False
    options: tuple[OptionKind, ...] = ()
    require: Callable[[float, Options], object] = _require_nothing
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


def _ours(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    more: dict[str, Any] = {"payload": "exact"} if "exact" in options else {}
    if "compact" in options:
        more["index_bits"] = 2
    if "singles" in options:
        more["selection"] = IndexedKeys(single_tokens=float(options["singles"]))
    every = int(options["reselect"]) if "reselect" in options else None
    config = ContiguousKVConfig(budget=budget, timeline=True, reselect_every=every, **more)
    place = folder / ("chunks-compact" if "compact" in options else "chunks")
    return ContiguousKV(_label("contiguouskv", options), model, place, config, **store_options)


def _require_ours(budget: float, options: Options) -> None:
    others = [name for name in ("exact", "compact", "reselect") if name in options]
    if "singles" in options and others:
        raise ValueError(f"singles and {others[0]} do not go together: only chunks would be chosen")


def _published_config(budget: float, options: Options) -> ContiguousKVConfig:
    fields = {name: int(options[name]) for name in ("period", "subperiod") if name in options}
    of_config = {"chunk": "chunk_size", "grouped": "layers_per_group"}
    stored = {field: int(options[name]) for name, field in of_config.items() if name in options}
    try:
        return ContiguousKVConfig.paper(budget, timeline=True, selection=AttentionMass(**fields), **stored)
    except ConfigError as error:
        raise ValueError(f"{_label('contiguouskv_paper', options)}: {error}") from error


def _published(model: Any, folder: Path, budget: float, options: Options, **store_options: Any) -> System:
    """Its segments have what ours needs too, so both share a folder.

    With other chunks or periods it has segments of its own: they have keys apart for the layers that choose. So it has
    with layers side by side.
    """
    config = _published_config(budget, options)
    own = {"chunk", "period", "grouped"} & options.keys()
    name = f"chunks-{config.chunk_size}-{config.selection.period}"
    name += f"-{config.layers_per_group}" if "grouped" in options else ""
    place = folder / (name if own else "chunks")
    label = _label("contiguouskv_paper", options)
    return ContiguousKV(label, model, place, config, **{"eviction": "published"} | store_options)


def _label(name: str, options: Options) -> str:
    return "+".join((name, *sorted(f"{option}={value}" if value else option for option, value in options.items())))


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
        _flexgen, exact=True, options=(OptionKind("device", value="share"), OptionKind("host", value="share"))
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
    "contiguouskv_paper": SystemKind(
        _published,
        options=(
            OptionKind("chunk", changes_answers=True, value="count"),
            OptionKind("period", changes_answers=True, value="count"),
            OptionKind("subperiod", value="count"),
            OptionKind("grouped", value="count"),
        ),
        require=_published_config,
    ),
    "contiguouskv": SystemKind(
        _ours,
        options=(
            OptionKind("exact", changes_answers=True),
            OptionKind("compact", changes_answers=True),
            OptionKind("reselect", changes_answers=True, value="count"),
            OptionKind("singles", changes_answers=True, value="share"),
        ),
        require=_require_ours,
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
