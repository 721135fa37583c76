"""One timed request: its time, what it read and from where, and whether its answer is right."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache

from ..running.phases import Stopwatch, attention_timed, phases_of
from ..running.timed import prompt_of
from ..systems import System
from ..systems.states import State, departure
from ..tasks import Request
from ..timing import resident_pages, time_to_first_token
from .cases import IN_STORES, Case

# Maximum distance of an answer from its reference: norm of the difference over norm of the reference. In bfloat16, two
# ways to compute the same attention differ by about a percent.
TOLERANCE = 0.05


# Statistics of a request that are copied into its results, besides those with their own field.
TOLD = ("bytes_used", "bytes_identified", "hits", "prefetch_hits", "prefetch_wasted_bytes", "tokens_prefilled")


@dataclass
class Answers:
    """Compares logits of the first new token with their reference.

    Attributes:
        known: reference answers, float32 `(vocabulary,)`, by the system that gave them.
    """

    known: dict[str, torch.Tensor] = field(default_factory=dict)

    def judge(self, case: Case, logits: torch.Tensor) -> dict[str, Any]:
        """Compare an exact system's answer with that of `in_memory`, and others with the system's own first answer.

        Returns:
            `answer_error` (`None` without a reference), `compared_with`, `answer_ok`.
        """
        own = centred(logits)
        if not torch.isfinite(own).all():
            return {"answer_error": None, "compared_with": None, "answer_ok": False, "answer": "is not finite"}
        if case.measured.system == "recompute":
            return {}  # The K and V of this text are not the random ones.
        reference = "in_memory" if case.measured.exact else case.measured.label
        if reference not in self.known:
            if not case.measured.exact or case.measured.system == "in_memory":
                self.known[reference] = own
            return {"answer_error": None, "compared_with": None, "answer_ok": True}
        error = distance(own, self.known[reference])
        return {"answer_error": round(error, 6), "compared_with": reference, "answer_ok": error <= TOLERANCE}


def centred(logits: torch.Tensor) -> torch.Tensor:
    """Logits of one position, float32, minus their mean, which has no meaning."""
    flat = logits.detach().flatten().float()
    return flat - flat.mean()


def distance(answer: torch.Tensor, reference: torch.Tensor) -> float:
    """Norm of the difference over the norm of the reference."""
    return float((answer - reference).norm() / reference.norm().clamp_min(1e-20))


class LastLogits:
    """Keeps a reference to the logits that a model computed last, which costs no time."""

    def __init__(self, model: Any) -> None:
        self.logits: torch.Tensor | None = None
        self._hook = model.get_output_embeddings().register_forward_hook(self._seen)

    def _seen(self, module: Any, inputs: Any, output: torch.Tensor) -> None:
        self.logits = output

    def take(self) -> torch.Tensor:
        """The logits of the last position, `(vocabulary,)`."""
        assert self.logits is not None
        found, self.logits = self.logits[0, -1], None
        return found

    def close(self) -> None:
        """Remove the hook."""
        self._hook.remove()


@contextmanager
def watched(model: Any) -> Iterator[LastLogits]:
    last = LastLogits(model)
    try:
        yield last
    finally:
        last.close()


def timed_floor(model: Any, request: Request, last: LastLogits) -> tuple[float, torch.Tensor]:
    """Seconds to the first token of the suffix alone, and the logits."""
    seconds, _, _ = time_to_first_token(model, request.suffix_ids[None], DynamicCache)
    return seconds, last.take()


def timed_request(
    model: Any,
    system: System,
    case: Case,
    request: Request,
    last: LastLogits,
    answers: Answers | None = None,
    whole_prefix: bool = False,
    around: Callable[[Callable[[], Any]], Any] = lambda action: action(),
) -> dict[str, Any]:
    """Bring a system into a state, and time one request.

    Args:
        model: the causal language model.
        system: the system; it has stored the request's prefix.
        case: the system's case, with the state.
        request: prefix and suffix.
        last: keeps the model's last logits.
        answers: compares answers; `None` for no comparison.
        whole_prefix: whether warm states hold the whole prefix, not only the part that this request uses.
        around: called with the request as a function, which it must call once (a profiler, for example).

    Returns:
        The results of the request, ready for JSON. `wall_s` is its whole time, including bringing about the state.
    """
    began = time.time()
    if case.state is not None:
        system.enter(case.state, request.prefix_ids, None if whole_prefix else request.suffix_ids)
    on_disk = (State.COLD, State.OPEN, State.KEYS_RESIDENT)
    files = system.files() if case.state in on_disk else []
    pages = _resident(files)
    looking, attending = Stopwatch(), Stopwatch()

    def make_cache() -> Any:
        with looking.running():
            return system.cache(request.prefix_ids)

    with attention_timed(attending, model.device):
        seconds, token, cache = around(lambda: time_to_first_token(model, prompt_of(request), make_cache))
    timeline = system.timeline(cache)
    spans = None if timeline is None else list(timeline.spans)
    logits = last.take()
    stats = system.finish(cache)
    found = {
        "seconds": round(seconds, 7),
        "first_token": token,
        "cold": None if pages is None else pages == 0,
        "bytes_read": stats.bytes_read,
        "io_wait_s": round(stats.io_wait_s, 6),
        "chunks_used": max(stats.chunks_used, default=None),
        "stats": {name: getattr(stats, name) for name in TOLD if getattr(stats, name)},
        "phases": _rounded(phases_of(seconds, looking.seconds, attending.seconds, stats.io_wait_s, spans)),
    }
    if case.state is not None and case.measured.folder in IN_STORES:
        found["departure"] = departure(case.state, stats)
    if answers is not None:
        found |= answers.judge(case, logits)
    if case.state in (State.COLD, State.OPEN):
        # The next request cannot use what the system has on the device.
        system.enter(State.COLD, request.prefix_ids)
    return found | {"wall_s": round(time.time() - began, 4)}


def _rounded(seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 6) for name, value in seconds.items()}


def _resident(files: list[Any]) -> int | None:
    """Pages of these files in the page cache; `None` if there are no files, or the system does not report it."""
    try:
        return sum(resident_pages(file) for file in files) if files else None
    except OSError:
        return None


def prefix_effect(answers: Answers, floor: torch.Tensor) -> float | None:
    """Distance of the answer without any prefix from the right answer: the effect of a missing prefix."""
    reference = answers.known.get("in_memory")
    return None if reference is None else distance(centred(floor), reference)
