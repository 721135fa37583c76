"""Requests outside streams: all systems store a prefix, then its requests are made in random order of systems."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from ..tasks import Request
from .bench import Bench, bench_in
from .plan import Case, spread_over_prefixes
from .process import Process
from .quality import Judge


@dataclass(frozen=True)
class _Todo:
    """A request, the cases in which it has no row yet, and those of them in which its answer is judged."""

    request: Request
    metric: str
    cases: list[Case]
    judged: list[Case]

    @property
    def tokens(self) -> int:
        return len(self.request.prefix_ids) + len(self.request.suffix_ids)


class AloneRun:
    """The requests of all tasks that fall to one process.

    Args:
        process: the process.
        asked: all requests with their metrics; those with the same prefix are adjacent.
    """

    def __init__(self, process: Process, asked: Sequence[tuple[Request, str]]) -> None:
        self._process = process
        self._warm: set[str] = set()
        self._is_told = False
        timed: dict[str, frozenset[int]] = {}
        for task in dict.fromkeys(request.task for request, _ in asked):
            of_task = [request for request, _ in asked if request.task == task]
            timed[task] = spread_over_prefixes(of_task, process.config.timed_requests)
        mine = asked[process.number :: process.count]
        found = [self._todo_of(request, metric, timed[request.task]) for request, metric in mine]
        self._todo = [one for one in found if one.cases]
        # The first requests are made in all cases, so that the forecast knows all.
        self._groups = [
            sorted(group, key=lambda one: one.request.number not in timed[one.request.task])
            for _, group in groupby(self._todo, key=lambda one: (one.request.task, one.request.prefix))
        ]

    def _todo_of(self, request: Request, metric: str, timed: frozenset[int]) -> _Todo:
        plan = self._process.plan_of(request)
        cases = self._process.missing(request, plan.made_of(request, metric, timed), None)
        return _Todo(request, metric, cases, [case for case in cases if plan.is_judged(case, metric)])

    @property
    def rows(self) -> int:
        """Rows that are missing."""
        return sum(len(one.cases) for one in self._todo)

    def all(self, bar: Any) -> None:
        """Make the missing requests."""
        for group in self._groups:
            self._on_one_prefix(group, bar)

    def _on_one_prefix(self, group: Sequence[_Todo], bar: Any) -> None:
        process, first = self._process, group[0]
        settings = list(dict.fromkeys(case.setting for one in group for case in one.cases))
        with bench_in(process.work, process.model, settings, **process.store_options) as bench:
            with process.forecast.seen("store", first.tokens):
                if any(one.judged for one in group):
                    bench.whole.store(first.request.prefix_ids)
                bench.store(first.request)
            if first.request.task not in self._warm:
                self._warm.add(first.request.task)
                self._warm_up(bench, first)
            for one in group:
                self._one(bench, one, bar)
                if not self._is_told:
                    self._is_told = True
                    cases = [case for todo in self._todo for case in todo.cases]
                    process.tell("tasks", self._pieces(), self.rows, cases)

    def _warm_up(self, bench: Bench, one: _Todo) -> None:
        """Make a request in each system: first calls of kernels are slow."""
        cases = {case.setting: case for case in reversed(one.cases)}
        for case in cases.values():
            self._process.measured(bench.systems[case.setting], one.request, case, None)

    def _one(self, bench: Bench, one: _Todo, bar: Any) -> None:
        process, request = self._process, one.request
        judge = None
        if one.judged:
            judge = Judge(process.model, process.tokenizer, request, one.metric)
            with process.forecast.seen("reference", one.tokens):
                judge.refer_to(bench.whole)
        for case in process.chance.sample(one.cases, len(one.cases)):
            bar.set_description(f"{request.key} {case.label}")
            if process.missing(request, [case], None):
                mine = judge if case in one.judged else None
                with process.forecast.seen((case, mine is None), one.tokens):
                    results = process.measured(bench.systems[case.setting], request, case, mine)
                if results is not None:
                    process.folder.add(process.row(request, case, None, one.metric) | results)
            bar.update()

    def _pieces(self) -> Iterator[tuple[Hashable, int]]:
        """All work of this process, for the forecast."""
        for group in self._groups:
            yield "store", group[0].tokens
            for one in group:
                if one.judged:
                    yield "reference", one.tokens
                for case in one.cases:
                    yield (case, case not in one.judged), one.tokens
