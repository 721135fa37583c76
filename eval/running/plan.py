"""Which requests a run makes in which systems and states, and which answers it judges."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..systems import Setting, State, SystemUnavailableError
from ..tasks import UNJUDGED, Request

IN_MEMORY = "in_memory"
# They stand beside every state, in the one state that they have.
REFERENCES = ("recompute", IN_MEMORY, "no_prefix")

States = Mapping[Setting, tuple[State, ...]]


@dataclass(frozen=True)
class Case:
    """A setting in a state.

    Attributes:
        setting: the setting.
        state: where the prefix is when the request begins; `None`: where earlier requests of a stream left it.
    """

    setting: Setting
    state: State | None

    @property
    def label(self) -> str:
        """For messages."""
        return f"{named(self.setting)}{'' if self.state is None else f' {self.state}'}"


def named(setting: Setting) -> str:
    """A setting with its budget, for messages."""
    return f"{setting.label} {setting.budget:.0%}"


def offered(
    model: Any, settings: Iterable[Setting], folder: Path, store_options: Mapping[str, Any]
) -> tuple[dict[Setting, tuple[State, ...]], list[str]]:
    """The states of all settings that can serve a model, and a note for each that cannot.

    Args:
        model: the causal language model.
        settings: the settings. Each is made once; nothing is stored.
        folder: folder for the systems.
        store_options: options of the stores.
    """
    found: dict[Setting, tuple[State, ...]] = {}
    notes: list[str] = []
    for setting in settings:
        try:
            with setting.make(model, folder, **store_options) as system:
                found[setting] = system.states
        except SystemUnavailableError as error:
            notes.append(f"{setting.label} is left out: {error}")
    return found, list(dict.fromkeys(notes))


class Plan:
    """The requests of a run.

    Args:
        settings: settings of the run, in order, for prefixes of one length.
        states: states of the run, in order.
        offers: states of each setting that can be made, see `offered`.

    Attributes:
        cases: settings and states of requests outside streams.
        streamed: settings of streams.
        notes: what the run asks for and does not make.
    """

    def __init__(self, settings: Sequence[Setting], states: Sequence[State], offers: States) -> None:
        there = [setting for setting in settings if setting in offers]
        self.streamed = [setting for setting in there if setting.kind.in_streams]
        self.cases: list[Case] = []
        notes: list[str] = []
        for setting in there:
            if setting.only_in_streams:
                continue
            own = offers[setting]
            if setting.system in REFERENCES:
                self.cases.append(Case(setting, own[0]))
                continue
            self.cases += [Case(setting, state) for state in states if state in own]
            notes += [
                f"{setting.label} is left out in the state {state}: its states are {', '.join(own)}"
                for state in states
                if state not in own
            ]
        self.notes = list(dict.fromkeys(notes))
        self._judged = frozenset(_judged(self.cases))

    def is_judged(self, case: Case, metric: str) -> bool:
        """Whether answers are judged in this case. The answers in other cases are known from a judged one."""
        return metric != UNJUDGED and case in self._judged

    def made_of(self, request: Request, metric: str, timed: frozenset[int]) -> list[Case]:
        """The cases in which a request of a task is made.

        Args:
            request, metric: the request, and what judges it.
            timed: numbers of the requests that are also made only for their time, see `spread_over_prefixes`.
        """
        return [case for case in self.cases if request.number in timed or self.is_judged(case, metric)]


def _judged(cases: Sequence[Case]) -> Iterable[Case]:
    """One case for each different answer: the setting itself that others answer as, if it is there."""
    alike: dict[Setting, list[Case]] = defaultdict(list)
    for case in cases:
        if case.setting.kind.judged:
            alike[case.setting.answers_as()].append(case)
    for canonical, some in alike.items():
        if canonical.system == IN_MEMORY:
            some = [case for case in some if case.setting.system == IN_MEMORY]
        best = [case for case in some if case.setting == canonical] or some
        yield from best[:1]


def spread_over_prefixes(requests: Sequence[Request], count: int) -> frozenset[int]:
    """Numbers of `count` requests of one task: the first one of each prefix, then the second ones, and so on."""
    turns: dict[int, int] = defaultdict(int)
    ranked = []
    for request in requests:
        ranked.append((turns[request.prefix], request.prefix, request.number))
        turns[request.prefix] += 1
    return frozenset(number for _, _, number in sorted(ranked)[:count])
