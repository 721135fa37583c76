"""The whole report: as Markdown, as one HTML file, and its pictures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from . import about, measures, paper, pictures, tables
from .names import ATTENTIONSTORE, IN_MEMORY, label
from .rows import Results, load

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1200px; padding: 0 1.5rem; }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; margin: 1rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #e4e4e4; white-space: nowrap; }
th { border-bottom: 2px solid #bbb; }
tr:has(strong) { background: #eef6f0; }
img { max-width: 100%; }
blockquote { margin: 1rem 0; padding: .4rem 1rem; border-left: 4px solid #c8553d; background: #fbf0ed; }
pre { background: #f5f5f5; padding: .6rem 1rem; overflow-x: auto; }
"""

_TIMES = (
    f"Seconds from token ids in hand to the first new token id, cold. Median (quartiles) over all cold requests (n). "
    f"Ratios are the time over that of {label(IN_MEMORY)}, and of {label(ATTENTIONSTORE)}, for the same request of the "
    "same run: geometric mean over requests, so that long prefixes weigh no more than short ones. Brackets hold 95% "
    "intervals, bootstrap over requests."
)
_UNEQUAL = (
    "Not all systems answered the same requests (see n), so their medians are hard to compare. Ratios always compare "
    "the same requests."
)
_QUALITY = (
    "Scores are percent. In brackets: 95% intervals, bootstrap over requests (within each task). Over several tasks: "
    "the mean of the tasks' means. Points from in memory are differences of the same request's scores. KL (of the "
    "whole cache's next tokens from the system's) and agreement (both have the same most likely token) are measured "
    "against in memory; perplexity is the geometric mean over requests. If all requests agree, the interval has no "
    "width, although other requests might differ."
)
_NONE = "No row says."


def write_report(runs: Sequence[Path], out: Path, untimed: Sequence[Path] = ()) -> list[Path]:
    """Write `report.md`, `report.html` (one file, pictures inside) and the pictures, of one or several runs.

    Args:
        runs: run folders (`config.json`, `machine.json`, `rows.jsonl`). Their rows are combined; requests are compared
            within their run.
        out: folder of the report; made if it does not exist.
        untimed: more runs, made while the machine did other work; only their answers count.

    Returns:
        Paths of all written files, the Markdown file first.

    Raises:
        RunError: a run cannot be read.
    """
    results = load(runs, untimed)
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[Path] = []

    def picture(name: str, title: str, draw: Callable[[Path], bool]) -> str:
        path = out / f"{name}.png"
        # A picture of an earlier report in this folder must not appear in this report.
        path.unlink(missing_ok=True)
        if not draw(path):
            return ""
        drawn.append(path)
        return f"![{title}]({path.name})"

    text = "\n\n".join(part for part in _parts(results, picture) if part) + "\n"
    markdown, page = out / "report.md", out / "report.html"
    markdown.write_text(text)
    page.write_text(as_html(text, out))
    return [markdown, page, *drawn]


def _parts(results: Results, picture: Callable[[str, str, Callable[[Path], bool]], str]) -> list[str]:
    timed, judged = results.timed, results.judged
    parts = [f"# Stored prefixes: speed and quality of {results.table['system'].nunique()} systems"]
    parts += ["## What was run", about.what_was_run(results)]

    parts.append("## Time to the first token")
    if len(timed):
        parts += [
            _TIMES,
            "" if measures.same_requests(results.alone) else _UNEQUAL,
            tables.times(results),
            picture("ttft", "Time to the first token by system and budget", lambda path: pictures.times(results, path)),
            f"By task, median in ms, and (x ratio to {label(IN_MEMORY)}):",
            tables.times_by_task(results),
        ]
        tails = tables.tails(results)
        parts += ["### Tails", _tail_note(), tails] if tails else []
    else:
        parts.append(_NONE)

    parts.append("## Quality")
    if len(judged):
        parts += [_QUALITY, tables.quality(results)]
        for title, table in (
            ("Score by task:", tables.scores_by_task(results)),
            ("Points from in memory by task:", tables.differences_by_task(results)),
            ("KL (nats) / agreement by task:", tables.distances_by_task(results)),
        ):
            parts += [title, table] if table else []
        for title, table in tables.answers(results):
            parts += [title, table]
    else:
        parts.append(_NONE)

    frontier = picture("frontier", "Quality against bytes read and time", lambda path: pictures.frontier(results, path))
    note = (
        "Points of a line are a system's budgets. Bytes are those observed on cold requests, page rounding included. "
        "Times are ratios to in memory (the dashed line), which reads nothing. Both are of requests that all systems "
        "answered, if there are any. A system that differs from another only in time is shown with the other's "
        "answers. Bars are 95% intervals. A logarithmic KL axis is linear below its smallest figure."
    )
    parts += ["## Quality for bytes and time", *((note, frontier) if frontier else (_NONE,))]

    parts.append("## Where the time goes")
    bars = picture("phases", "Mean time of each phase", lambda path: pictures.phases(results, path))
    parts += [bars, f"Mean ms of cold requests.{_phases_note(results)}", tables.phases(results)] if bars else [_NONE]

    volumes = tables.amplification(results)
    note = (
        "Mean of cold requests, observed. Amplification is all bytes read over all bytes that attention used; the last "
        "column leaves out what was read to identify chunks and what was read ahead and not used. Systems that read "
        "nothing are not listed."
    )
    parts += ["## Bytes read", *((note, volumes) if volumes else (_NONE,))]
    parts += _streams(results, picture)
    parts += [
        "## Beside the paper",
        paper.section(results),
        picture("paper", "Speed-ups beside the paper's", lambda path: pictures.beside_the_paper(results, path)),
    ]
    return parts


def _tail_note() -> str:
    return (
        "Cold requests of all tasks together, so tails also reflect the longest prefixes. A percentile is given if at "
        "least one request lies beyond it. Brackets hold 95% intervals, bootstrap over requests."
    )


def _phases_note(results: Results) -> str:
    """A summary of the table: the systems that wait most and least."""
    rows = results.timed
    waits = {setting: measures.waiting(rows, setting) for setting in measures.settings(rows)}
    known = sorted((waited, label(name)) for (name, _), waited in waits.items() if waited is not None)
    if len(known) < 2:
        return ""
    (least, last), (most, first) = known[0], known[-1]
    return f" Waiting for reads is between {least:.0%} ({last}) and {most:.0%} ({first}) of the time."


def _streams(results: Results, picture: Callable[[str, str, Callable[[Path], bool]], str]) -> list[str]:
    names = list(dict.fromkeys(results.table.loc[results.table["stream"] != "", "stream"]))
    if not names:
        return []
    parts = [
        "## Streams",
        "Requests in order, with memory kept between them. In brackets: 95% intervals, bootstrap over requests (as if "
        "they did not depend on each other). Hits are chunks that were in host or device memory, of all chunks served.",
    ]
    for name in names:
        file = "stream-" + re.sub(r"[^A-Za-z0-9]+", "-", name)

        def draw(path: Path, name: str = name) -> bool:
            return pictures.stream(results, name, path)

        drawn = picture(file, f"Time to the first token in the stream {name}", draw)
        parts += [f"### {name}", tables.stream(results, name) or _NONE, drawn]
    return parts


def as_html(text: str, folder: Path) -> str:
    """Markdown as one self-contained page with the pictures of `folder` embedded."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")

    def inside(match: re.Match[str]) -> str:
        picture = folder / match.group(1)
        return f'src="data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"'

    body = re.sub(r'src="([^":]+\.png)"', inside, body)
    title = html.escape(text.partition("\n")[0].lstrip("# "))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )
