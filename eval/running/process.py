"""One process of a run: what it works with, and the rows that it writes."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ..systems import StateError, System, SystemUnavailableError
from ..tasks import Request
from ..timing import bytes_to_ready
from .config import RunConfig
from .folder import Key, RunFolder, key_of
from .forecast import Forecast, in_words
from .plan import Case, Plan
from .quality import Judge
from .readings import Cropped, Repeated, has_windows
from .requests import token_bytes
from .timed import timed_request

# The state of requests in streams: where earlier requests left the prefix.
IN_STREAM = "stream"


@dataclass
class Process:
    """One process of a run.

    Attributes:
        config: the run's configuration.
        plans: what is made, by the number of prefix tokens.
        model, tokenizer: the model that answers, and its tokenizer.
        folder: receives rows and notes.
        session: names this start of the run; times are compared only within one.
        number, count: this process among all.
        progress: whether to show a progress bar and notes.
        store_options: options of all stores.
        done: keys of rows that were there before.
        forecast: times of the work so far.
    """

    config: RunConfig
    plans: Mapping[int, Plan]
    model: Any
    tokenizer: Any
    folder: RunFolder
    session: str
    number: int
    count: int
    progress: bool
    store_options: Mapping[str, Any]
    done: set[Key] = field(default_factory=set)
    forecast: Forecast = field(default_factory=Forecast)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.config.seed + self.number)
        self._token_bytes = token_bytes(self.model)
        self._windows = has_windows(self.model)
        self._unable: set[Case] = set()
        self._told: set[str] = set()

    def plan_of(self, request: Request) -> Plan:
        """What is made of requests on a prefix as long as that of this request."""
        return self.plans[len(request.prefix_ids)]

    @property
    def work(self) -> Path:
        """Folder for the systems' files."""
        return self.folder.path / f"work-{self.number}"

    @property
    def crops(self) -> bool:
        """Whether caches of the model can be cropped, so that a request can be judged with its own cache."""
        return not self._windows

    def bytes_of(self, tokens: int) -> int:
        """Bytes of K and V of so many tokens."""
        return tokens * self._token_bytes

    # -- rows ---------------------------------------------------------------------------------------------------------

    def row(self, request: Request, case: Case, stream: str | None, metric: str) -> dict[str, Any]:
        """A row that has no results yet."""
        return {
            "task": request.task,
            "number": request.number,
            "stream": stream,
            "prefix": request.prefix,
            "prefix_key": hashlib.blake2b(request.prefix_ids.numpy().tobytes(), digest_size=8).hexdigest(),
            "prefix_tokens": len(request.prefix_ids),
            "suffix_tokens": len(request.suffix_ids),
            "prefix_bytes": self.bytes_of(len(request.prefix_ids)),
            "about": dict(request.about),
            "system": case.setting.system,
            "options": list(case.setting.options),
            "budget": case.setting.budget,
            "state": IN_STREAM if case.state is None else str(case.state),
            "read_gbps": self.config.read_gbps,
            "session": self.session,
            "processes": self.count,
            "metric": metric,
            "prediction": None,
            "score": None,
            "kl": None,
            "kl_answer": None,
            "agreement": None,
            "perplexity": None,
        }

    def missing(self, request: Request, cases: Iterable[Case], stream: str | None) -> list[Case]:
        """The cases in which a request has no row, without those that turned out to be impossible."""
        return [
            case
            for case in cases
            if case not in self._unable and key_of(self.row(request, case, stream, "")) not in self.done
        ]

    # -- requests -----------------------------------------------------------------------------------------------------

    def measured(self, system: System, request: Request, case: Case, judge: Judge | None) -> dict[str, Any] | None:
        """Make a request, and return the results of its row; `None`: the system cannot, which is noted.

        A request that did not find its state is made once more. (Not in streams, where it would find another memory.)

        Args:
            system, request, case: the request, and where it is made.
            judge: judges the answer, if it is to be judged.
        """
        found: dict[str, Any] = {}
        attempts = 1 if case.state is None else 2
        ready = bytes_to_ready(self.bytes_of(len(request.prefix_ids)))
        try:
            for _ in range(attempts):
                with timed_request(self.model, system, request, case.state, ready) as timed:
                    if judge is not None and not found and self.crops:
                        held = Cropped(self.model, request, timed.cache)
                        found = judge.judge(held, timed.first_token)
                if judge is not None and not found:
                    found = judge.judge(Repeated(self.model, request, system), timed.first_token)
                if timed.departure is None:
                    break
        except (SystemUnavailableError, StateError) as error:
            self._unable.add(case)
            self.skip(f"{case.label} is left out: {error}")
            return None
        return found | timed.fields()

    # -- messages -----------------------------------------------------------------------------------------------------

    def skip(self, note: str) -> None:
        """Note once what is left out."""
        if note not in self._told:
            self._told.add(note)
            self.folder.skip(note)
            self.say(note)

    def tell(self, what: str, pieces: Iterable[tuple[Any, int]], requests: int, cases: Iterable[Case]) -> None:
        """Say how long a part of the run will take, going by what was timed so far.

        Args:
            what: the part.
            pieces: all of its work, see `Forecast.seconds`.
            requests: number of its requests.
            cases: where they are made.
        """
        systems = len({case.setting.label for case in cases})
        self.say(
            f"{what}: about {in_words(self.forecast.seconds(pieces))}: {requests} requests of {systems} "
            f"system{'s' if systems != 1 else ''}"
        )

    def say(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.progress:
            tqdm.write(text, file=sys.stderr)
