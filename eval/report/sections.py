"""The sections of a report, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from . import about, crossings, frontier, measures, paper, pictures, quality, tables, words
from .names import STATES, Rival, is_reference, label
from .rows import Results
from .states import Cut, cuts

_NONE = "No row says."
# A section: its title, and its paragraphs.
Section = tuple[str, list[str]]

_TIMES = (
    "Time from token ids in hand to the first new token id, in each state: the geometric mean of each task's n "
    "requests, then of the tasks, so that every task counts equally. Only requests count that RIVAL answered too, in "
    "the same run and session. Ratios are the time over that of another system for the same request, and pairs is "
    "their number; they are geometric means, too. Brackets hold 95% intervals: a bootstrap that draws prefixes, then "
    "requests within them, for each task. References stand beside every state, whatever their own is."
)
_QUALITY = (
    "Answers do not depend on the state. Scores are percent; points are differences of the same request's scores from "
    "those in memory. KL at the answer is that of the whole cache's next tokens from the system's, mean over the "
    "tokens of the right answer. Figures are the mean of the tasks' means; brackets hold 95% intervals, as for times. "
    "If all requests agree, an interval has no width, although other requests might differ."
)


class Pictures:
    """Draws the pictures of a report in its folder.

    Args:
        folder: the folder.

    Attributes:
        drawn: paths of the pictures that were drawn.
        suffix: ends the names of all pictures from now on.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.drawn: list[Path] = []
        self.suffix = ""
        # Pictures of an earlier report in this folder must not appear beside this report.
        earlier = folder / "report.md"
        named = re.findall(r"\]\(([^()/]+\.png)\)", earlier.read_text()) if earlier.exists() else []
        for name in named:
            (folder / name).unlink(missing_ok=True)

    def __call__(self, name: str, title: str, draw: Callable[[Path], bool]) -> str:
        """The picture in Markdown; "" if `draw` drew none."""
        path = self._folder / f"{_slug(name + self.suffix)}.png"
        if not draw(path):
            return ""
        self.drawn.append(path)
        return f"![{title}]({path.name})"


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "-", text).strip("-")


def sections(results: Results, rival: Rival, picture: Pictures) -> str:
    """The whole report; one part for each model, if there are several."""
    models = results.models
    systems = results.table["system"].nunique()
    parts = [f"# Stored prefixes: speed and quality of {systems} system{'s' if systems > 1 else ''}"]
    if len(models) > 1:
        parts.append(f"The runs are of {len(models)} models. Each has its own part; nothing is averaged over models.")
    for model in models:
        own = results.of_model(model)
        if not len(own.table):
            continue
        if len(models) > 1:
            name = ", ".join(one for one in model if one)
            parts.append(f"## {name}")
            picture.suffix = f"-{_slug(model[0])}" + (f"-{models.index(model)}" if _same_name(models, model) else "")
        mark = "###" if len(models) > 1 else "##"
        for title, paragraphs in _of_model(own, rival, picture):
            parts += [f"{mark} {title}", *(re.sub(r"(?m)^### ", f"{mark}# ", one) for one in paragraphs)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _same_name(models: list[tuple[str, str]], model: tuple[str, str]) -> bool:
    return [name for name, _ in models].count(model[0]) > 1


def _of_model(results: Results, rival: Rival, picture: Pictures) -> list[Section]:
    states = cuts(results.timed, rival) if len(results.timed) else []
    found = [
        ("The result in words", [words.result(results, rival)]),
        ("What was run", [about.what_was_run(results)]),
        ("Time to the first token", _times(states, rival, picture)),
        ("Quality", _quality(results)),
        ("Quality for time", _frontier(results, states, picture)),
        ("Where the time goes", _phases(states, picture)),
        ("Bytes read", _bytes(states)),
    ]
    crossing = _crossings(results, rival, picture)
    streams = _streams(results, picture)
    found += [("Faster and slower disks", crossing)] if crossing else []
    found += [("Streams", streams)] if streams else []
    drawn = picture(
        "paper", "Speed-ups beside the paper's", lambda path: pictures.beside_the_paper(paper.cold_cut(results), path)
    )
    found.append(("Beside the paper", [paper.section(results), drawn]))
    return found


def _state(cut: Cut) -> str:
    return f"### {cut.state}\n\nBefore a request: {STATES.get(cut.state, 'a state that is not known here')}."


def _times(states: list[Cut], rival: Rival, picture: Pictures) -> list[str]:
    if not states:
        return [_NONE]
    parts = [_TIMES.replace("RIVAL", rival.label)]
    for one in states:
        parts.append(_state(one))
        if not one.has_rival:
            parts.append(
                f"{rival.label} has no row of this state, and systems are compared in equal states only: "
                "there is no ratio over it."
            )
        drawn = picture(
            f"ttft-{one.state}",
            f"Time to the first token by system and budget, {one.state}",
            lambda path, one=one: pictures.times(one, path),  # type: ignore[misc]
        )
        ratio = f" (x ratio over {rival.label}, pairs)" if one.has_rival else ""
        parts += [tables.times(one), drawn, f"By task, in ms{ratio}:", tables.times_by_task(one)]
        tails = tables.tails(one)
        if tails:
            parts += [
                "Tails, each task by itself, of all its timed requests. A percentile is given if at least one request "
                "lies beyond it.",
                tails,
            ]
    return parts


def _quality(results: Results) -> list[str]:
    if not len(results.judged):
        return [_NONE]
    parts = [_QUALITY, quality.note_on_silent_tasks(results), quality.headline(results)]
    for title, table in (
        ("Score by task:", quality.scores_by_task(results)),
        ("Points from in memory by task:", quality.differences_by_task(results)),
        ("KL at the answer by task, nats:", quality.distances_by_task(results)),
        (
            "Secondary: over the tokens of the question, KL and agreement (both have the same most likely token), "
            "which say little about the answer; and the perplexity of the right answer, a geometric mean:",
            quality.distances(results),
        ),
    ):
        parts += [title, table] if table else []
    for title, table in quality.answers(results):
        parts += [title, table]
    return parts


def _frontier(results: Results, states: list[Cut], picture: Pictures) -> list[str]:
    drawn = []
    for one in states:
        text = picture(
            f"frontier-{one.state}",
            f"Quality against time, {one.state}",
            lambda path, one=one: frontier.frontier(results, one, path),  # type: ignore[misc]
        )
        drawn += [f"### {one.state}", text] if text else []
    if not drawn:
        return [_NONE]
    note = (
        "Points of a line are a system's budgets; lower left is better for KL, upper left for scores. Times are of "
        "the requests that all systems answered in the state, if there are any. A setting that differs from another "
        "only in time is shown with the other's answers. Bars are 95% intervals. A logarithmic KL axis is linear below "
        "its smallest figure. Recompute is left out where it takes more than twice as long as all others."
    )
    return [note, *drawn]


def _phases(states: list[Cut], picture: Pictures) -> list[str]:
    parts = []
    for one in states:
        bars = picture(
            f"phases-{one.state}",
            f"Mean time of each phase, {one.state}",
            lambda path, one=one: pictures.phases(one, path),  # type: ignore[misc]
        )
        parts += [f"### {one.state}", bars, f"Mean ms of a request; tasks count equally.{_waits(one)}"] if bars else []
        parts += [tables.phases(one)] if bars else []
    return parts or [_NONE]


def _waits(cut: Cut) -> str:
    """A summary of the table: the systems that wait most and least."""
    waits = {one: measured for one in cut.settings if (measured := measures.waiting(cut.rows, one)) is not None}
    known = sorted((waited, label(one)) for one, waited in waits.items() if not is_reference(one))
    if len(known) < 2:
        return ""
    (least, last), (most, first) = known[0], known[-1]
    return f" Waiting for reads is between {least:.0%} ({last}) and {most:.0%} ({first}) of the time."


def _bytes(states: list[Cut]) -> list[str]:
    found = [(one.state, table) for one in states if (table := tables.amplification(one))]
    if not found:
        return [_NONE]
    note = (
        "Means of n requests, observed, page rounding included; tasks count equally. Read / used is all bytes read "
        "over all bytes that attention used; the last column leaves out what was read to identify chunks or tokens "
        "and what was read ahead and not used. Systems that read nothing are not listed."
    )
    return [note, *(part for state, table in found for part in (f"### {state}", table))]


def _crossings(results: Results, rival: Rival, picture: Pictures) -> list[str]:
    found = crossings.section(results, rival)
    if not found:
        return []
    disk = crossings.disk_speed(results)
    known = "was not measured" if disk is None else f"is {disk:.3g} GB/s"
    parts = [
        "Runs whose reads had different limits show what a slower disk would change. The speed of this machine's disk "
        f"{known}; a limit above it has no effect, and reads without a limit "
        f"{'are left out of what is interpolated' if disk is None else 'stand at that speed'}."
    ]
    for state, text in found:
        drawn = picture(
            f"crossings-{state}",
            f"Time over that of {rival.label} by the speed of reads, {state}",
            lambda path, state=state: pictures.crossings(  # type: ignore[misc]
                crossings.lines(results, rival, state), rival.label, path
            ),
        )
        parts += [f"### {state}", text, drawn]
    return parts


def _streams(results: Results, picture: Pictures) -> list[str]:
    names = list(dict.fromkeys(results.table.loc[results.table["stream"] != "", "stream"]))
    if not names:
        return []
    parts = [
        "Requests in order, with memory kept between them. In brackets: 95% intervals, a bootstrap that draws "
        "prefixes, then requests (as if they did not depend on each other's order). Hits are chunks that were in "
        "host or device memory, of all chunks served."
    ]
    for name in names:
        drawn = picture(
            f"stream-{name}",
            f"Time to the first token in the stream {name}",
            lambda path, name=name: pictures.stream(results, name, path),  # type: ignore[misc]
        )
        parts += [f"### {name}", tables.stream(results, name) or _NONE, drawn]
    return parts
