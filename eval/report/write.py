"""The whole report: as Markdown, as one HTML file, and its pictures."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path

from markdown_it import MarkdownIt

from .checks import RunError
from .names import Rival
from .rows import load
from .sections import Pictures, sections

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


def write_report(
    runs: Sequence[Path], out: Path, untimed: Sequence[Path] = (), against: str | None = None
) -> list[Path]:
    """Write `report.md`, `report.html` (one file, pictures inside) and the pictures, of one or several runs.

    Args:
        runs: run folders (see `files.rows_of`). Their rows are combined; times are compared within a run.
        out: folder of the report; made if it does not exist.
        untimed: more runs, made while the machine did other work; only their answers count.
        against: the system that times are divided by, `NAME[@BUDGET][+OPTION...]`; default: `reload`.

    Returns:
        Paths of all written files, the Markdown file first.

    Raises:
        RunError: a run cannot be read, runs cannot be compared, or there is no such system.
    """
    try:
        rival = Rival() if against is None else Rival.parse(against)
    except ValueError as error:
        raise RunError(f"--against {against}: {error}") from error
    results = load(runs, untimed)
    out.mkdir(parents=True, exist_ok=True)
    pictures = Pictures(out)
    text = sections(results, rival, pictures)
    markdown, page = out / "report.md", out / "report.html"
    markdown.write_text(text)
    page.write_text(as_html(text, out))
    return [markdown, page, *pictures.drawn]


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
