"""Streams: requests in order, in all systems; each system keeps its memory for the next request."""

from __future__ import annotations

import shutil
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from .. import streams
from ..systems import InMemory
from ..tasks import Request
from .bench import bench_in
from .plan import Case
from .process import Process
from .quality import Judge
from .readings import Reading
from .requests import chat_of


class StreamRun:
    """One stream.

    Args:
        process: the process that makes all of it.
        name: name of the stream.
        requests: its requests, in order.
    """

    def __init__(self, process: Process, name: str, requests: Sequence[Request]) -> None:
        self._process = process
        self._name = name
        self._requests = requests
        self._cases = [Case(setting, None) for setting in process.plan_of(requests[0]).streamed]
        # Caches of models with windows cannot be cropped, and another request would change what is in memory.
        self._judged = [one for one in requests if process.config.is_judged(one.number) and process.crops]

    @property
    def rows(self) -> int:
        """Rows that are missing."""
        return sum(len(self._process.missing(one, self._cases, self._name)) for one in self._requests)

    def all(self, bar: Any) -> None:
        """Make all requests. An interrupted stream starts again from its beginning, because memory starts empty."""
        process = self._process
        rows = self.rows
        if not rows:
            return
        if not process.crops and process.config.judged_share:
            process.skip(f"answers of {self._name} are not judged: the model has sliding windows")
        self._warm_up()
        process.tell(self._name, self._pieces(), len(self._requests) * len(self._cases), self._cases)
        references = process.folder.path / f"{process.work.name}-references"
        room = int(process.config.memory_share * process.bytes_of(distinct_tokens(self._requests)))
        options = dict(process.store_options) | {"host_bytes": room, "device_bytes": room}
        settings = [case.setting for case in self._cases]
        with (
            References(process, references, self._judged) as known,
            bench_in(process.work, process.model, settings, **options) as bench,
        ):
            for request in self._requests:
                bench.store(request)
                bench.keep_shares(request)
                judge = known.judge(request)
                for case in process.chance.sample(self._cases, len(self._cases)):
                    bar.set_description(f"{self._name} {request.number} {case.label}")
                    mine = judge if case.setting.kind.judged else None
                    results = process.measured(bench.systems[case.setting], request, case, mine)
                    if results is not None and process.missing(request, [case], self._name):
                        process.folder.add(process.row(request, case, self._name, streams.METRIC) | results)
                        bar.update()

    def _warm_up(self) -> None:
        """Make the first request twice in each system, because first calls of kernels are slow; the second is timed."""
        process, request = self._process, self._requests[0]
        tokens = len(request.prefix_ids)
        settings = [case.setting for case in self._cases]
        with bench_in(process.work, process.model, settings, **process.store_options) as bench:
            with process.forecast.seen("stream store", tokens):
                bench.store(request)
            bench.keep_shares(request)
            for case in self._cases:
                process.measured(bench.systems[case.setting], request, case, None)
                with process.forecast.seen(case, tokens):
                    process.measured(bench.systems[case.setting], request, case, None)

    def _pieces(self) -> Iterator[tuple[Hashable, int]]:
        """All work, for the forecast."""
        yield "stream store", distinct_tokens(self._requests)
        yield "stream store", distinct_tokens(self._judged) // max(1, len(self._cases))
        for request in self._requests:
            for case in self._cases:
                yield case, len(request.prefix_ids)


class References:
    """Readings of the whole cache for the judged requests of a stream, on disk: there may be many.

    They are computed before the stream begins, chat by chat, so that each prefix is computed once. The folder is
    removed at the end.

    Args:
        process: the process.
        folder: folder for the readings.
        judged: requests whose answers are judged.
    """

    def __init__(self, process: Process, folder: Path, judged: Sequence[Request]) -> None:
        self._process = process
        self._folder = folder
        self._judged = {request.number for request in judged}
        self._requests = judged

    def __enter__(self) -> References:
        process = self._process
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        for _, group in groupby(sorted(self._requests, key=_place), key=chat_of):
            with InMemory(process.model) as whole:
                for request in group:
                    whole.store(request.prefix_ids)
                    reading = self._judge_of(request).refer_to(whole)
                    torch.save(reading.logits, self._file(request))
        return self

    def __exit__(self, *exception: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def judge(self, request: Request) -> Judge | None:
        """A judge with its reference; `None` if the answer is not to be judged."""
        if request.number not in self._judged:
            return None
        judge = self._judge_of(request)
        judge.reference = Reading(torch.load(self._file(request)), len(request.suffix_ids) - 1)
        return judge

    def _judge_of(self, request: Request) -> Judge:
        return Judge(self._process.model, self._process.tokenizer, request, streams.METRIC)

    def _file(self, request: Request) -> Path:
        return self._folder / f"{request.number}.pt"


def _place(request: Request) -> tuple[Any, int]:
    return chat_of(request), request.number


def distinct_tokens(requests: Sequence[Request]) -> int:
    """Distinct prefix tokens of a stream; the last turn of a chat contains the tokens of earlier turns."""
    longest: dict[Any, int] = {}
    for request in requests:
        longest[chat_of(request)] = max(longest.get(chat_of(request), 0), len(request.prefix_ids))
    return sum(longest.values())
