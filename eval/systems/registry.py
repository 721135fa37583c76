"""Every system by its name: how it is made, and what of it a budget changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_contiguouskv import ContiguousKVConfig

from .attentionstore import AttentionStore
from .attentionstore_h2o import AttentionStoreH2O
from .base import System
from .contiguouskv import ContiguousKV
from .impress import Impress
from .in_memory import InMemory
from .recompute import Recompute
from .reload import Reload

# From the model, a folder for all systems of one prefix, the budget, and options of `PrefixStore`.
Make = Callable[..., System]


@dataclass(frozen=True)
class SystemKind:
    """One system.

    Attributes:
        make: makes it.
        exact: whether it attends to the whole prefix, so that there is only a budget of 1.0.
        answers_as: the system that gives the same answers, and is quicker or slower: quality is measured once.
        in_streams: it differs from that one in what it keeps in memory, so only streams of requests tell them apart.
        only_if_named: it is a variant of another system, and left out where all are asked for.
    """

    make: Make
    exact: bool = False
    answers_as: str | None = None
    in_streams: bool = False
    only_if_named: bool = False


def _chunks(name: str, config: Callable[..., ContiguousKVConfig], keys_stay: bool = False) -> Make:
    """Ours and the published method; a segment has what both need, so they share a folder."""

    def make(model: Any, folder: Path, budget: float, **options: Any) -> System:
        eviction = {"eviction": "published"} if "_paper" in name else {}
        settings = config(budget=budget, timeline=True)
        return ContiguousKV(name, model, folder / "chunks", settings, keys_stay, **eviction | options)

    return make


def _whole(overlap: bool) -> Make:
    def make(model: Any, folder: Path, budget: float, **options: Any) -> System:
        return AttentionStore(model, folder / "chunks", overlap, **options)

    return make


def _tokens(kind: Callable[..., System], folder_name: str, **arguments: Any) -> Make:
    def make(model: Any, folder: Path, budget: float, **options: Any) -> System:
        return kind(model, folder / folder_name, budget, timeline=True, **arguments | options)

    return make


_h2o = partial(_tokens, AttentionStoreH2O, "h2o")
_impress = partial(_tokens, Impress, "impress")

SYSTEMS: dict[str, SystemKind] = {
    "recompute": SystemKind(lambda model, folder, budget, **options: Recompute(), exact=True),
    "in_memory": SystemKind(lambda model, folder, budget, **options: InMemory(model), exact=True),
    "reload": SystemKind(lambda model, folder, budget, **options: Reload(model, folder / "whole"), exact=True),
    "attentionstore": SystemKind(_whole(overlap=False), exact=True),
    "attentionstore_overlapped": SystemKind(_whole(overlap=True), exact=True),
    "attentionstore_h2o": SystemKind(_h2o()),
    "attentionstore_h2o_lfu": SystemKind(_h2o(eviction="lfu"), answers_as="attentionstore_h2o", in_streams=True),
    "attentionstore_h2o_overlapped": SystemKind(_h2o(overlap=True), answers_as="attentionstore_h2o"),
    "impress": SystemKind(_impress()),
    "impress_groups": SystemKind(_tokens(Impress, "impress_groups", probes="groups")),
    "impress_overlapped": SystemKind(_impress(overlap=True), answers_as="impress"),
    "contiguouskv_paper": SystemKind(_chunks("contiguouskv_paper", ContiguousKVConfig.paper)),
    "contiguouskv": SystemKind(_chunks("contiguouskv", ContiguousKVConfig)),
    "contiguouskv_paper_resident": SystemKind(
        _chunks("contiguouskv_paper_resident", ContiguousKVConfig.paper, keys_stay=True),
        answers_as="contiguouskv_paper",
        only_if_named=True,
    ),
    "contiguouskv_resident": SystemKind(
        _chunks("contiguouskv_resident", ContiguousKVConfig, keys_stay=True),
        answers_as="contiguouskv",
        only_if_named=True,
    ),
    "contiguouskv_exact": SystemKind(
        _chunks("contiguouskv_exact", partial(ContiguousKVConfig, payload="exact")), only_if_named=True
    ),
}


DEFAULT_SYSTEMS = tuple(name for name, kind in SYSTEMS.items() if not kind.only_if_named)


def system_named(name: str) -> SystemKind:
    """A system by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in SYSTEMS:
        raise ValueError(f"system must be one of {list(SYSTEMS)}, got {name!r}")
    return SYSTEMS[name]
