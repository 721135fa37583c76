"""A setting: a system at a budget, with options. On the command line it is `NAME[@BUDGET][+OPTION...]`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from .base import System
from .registry import SYSTEMS, SystemKind, system_named

IN_MEMORY = "in_memory"


@dataclass(frozen=True)
class Setting:
    """A system at a budget, with options.

    Attributes:
        system: one of `SYSTEMS`.
        budget: share of the prefix that attention uses; 1.0 for systems that take no budget.
        options: as written, `"overlap"` or `"host=0.5"`, sorted.
    """

    system: str
    budget: float
    options: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, budgets: Sequence[float]) -> list[Self]:
        """The settings that `NAME[@BUDGET][+OPTION...]` stands for.

        Args:
            text: for example `"impress@0.1+overlap"`.
            budgets: for a system that takes a budget, where `text` names none. There is one setting for each.

        Raises:
            ValueError: there is no such system or option, or the system takes no budget, or not this one.
        """
        head, *written = text.split("+")
        name, at, share = head.partition("@")
        kind = system_named(name)
        options = _checked(name, kind, written)
        if at:
            try:
                budgets = (float(share),)
            except ValueError:
                raise ValueError(f"{text!r}: a budget such as 0.25 must follow the @") from None
            if not kind.takes_budget or not 0.0 < budgets[0] <= 1.0:
                raise ValueError(f"{text!r}: budgets are from 0 (not included) to 1, of systems that choose")
        found = [cls(name, budget, options) for budget in (budgets if kind.takes_budget else (1.0,))]
        for one in found:
            kind.require(one.budget, one.values)
        return found

    @property
    def kind(self) -> SystemKind:
        """The kind of its system."""
        return SYSTEMS[self.system]

    @property
    def label(self) -> str:
        """The text form without the budget, for example `"impress+overlap"`."""
        return "+".join((self.system, *self.options))

    @property
    def only_in_streams(self) -> bool:
        """Whether it differs from another setting only in what stays in memory between requests."""
        return any(self.kind.option(name).only_in_streams for name in self.values)

    @cached_property
    def values(self) -> dict[str, str]:
        """Options by name; the value of an option without one is `""`."""
        return dict(_parted(option) for option in self.options)

    def answers_as(self) -> Self:
        """The setting that gives the same answers. Quality is judged once for all that answer as one setting.

        Exact systems answer as `in_memory`; options that do not change answers are left out.
        """
        if self.kind.exact:
            return type(self)(IN_MEMORY, 1.0)
        if self.kind.answers_as is not None:
            return type(self)(self.kind.answers_as, self.budget)
        kept = tuple(option for option in self.options if self.kind.option(_parted(option)[0]).changes_answers)
        return type(self)(self.system, self.budget, kept)

    def make(self, model: Any, folder: Path, **store_options: Any) -> System:
        """Make the system.

        Args:
            model: whose prefixes.
            folder: of all systems of one run. Systems keep their files in folders of their own there.
            store_options: `read_gbps`, and options of `PrefixStore` such as `host_bytes`.

        Raises:
            SystemUnavailableError: the system cannot run with this model or on its device.
        """
        return self.kind.make(model, folder, self.budget, self.values, **store_options)


def _parted(option: str) -> tuple[str, str]:
    name, _, value = option.partition("=")
    return name, value


def _checked(name: str, kind: SystemKind, written: Sequence[str]) -> tuple[str, ...]:
    named = [_parted(option)[0] for option in written]
    for option, own in zip(written, named, strict=True):
        known = kind.option(own) if own in kind.option_names else None
        if known is None:
            raise ValueError(f"{name} has no option {own!r}: its options are {list(kind.option_names)}")
        known.check(option)
    shares = [option for option, own in zip(written, named, strict=True) if kind.option(own).value == "share"]
    if sum(float(option.partition("=")[2]) for option in shares) > 1.0:
        raise ValueError(f"shares of {name} must be 1 together at most: {'+'.join(written)}")
    if len(set(named)) < len(named):
        raise ValueError(f"an option of {name} is written twice: {'+'.join(written)}")
    return tuple(sorted(written))
