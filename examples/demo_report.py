"""The report that the demo prints at the end: a table of times and the answers, also as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Question:
    """A question, how the answer begins (small models need the hint), and words that a good answer contains."""

    text: str
    begins: str = ""
    expected: str = ""


@dataclass
class Answer:
    """One system's answer to one question. Times are in seconds."""

    system: str
    question: str
    ttft_s: float
    text: str
    bytes_read: int = 0
    read_amplification: float = 0.0
    chunks_used: int = 0
    chunks_total: int = 0
    hits: dict[str, int] = field(default_factory=dict)


def summary(names: list[str], answers: list[Answer]) -> dict[str, dict[str, Any]]:
    """Per system: TTFT (median and spread, in seconds), speed-up over the first system, and bytes read."""
    from eval.timing import median_spread

    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        own = [answer for answer in answers if answer.system == name]
        rows[name] = {
            "ttft_s": median_spread(answer.ttft_s for answer in own).as_dict(),
            "bytes_read": median_spread(answer.bytes_read for answer in own).median,
            "read_amplification": median_spread(answer.read_amplification for answer in own).median,
            "chunks_used": own[0].chunks_used,
            "chunks_total": own[0].chunks_total,
        }
    base = rows[names[0]]["ttft_s"]["median"]
    for row in rows.values():
        row["speedup"] = base / row["ttft_s"]["median"]
    return rows


def print_report(console: Console, questions: Iterable[Question], names: list[str], answers: list[Answer]) -> None:
    """Print the table of times, then each system's answers."""
    questions = list(questions)
    rows = summary(names, answers)
    table = Table(title=f"Time to first token, cold\n({_counted(rows)})")
    table.add_column("system", no_wrap=True)
    for title in ("TTFT ms", "speed-up", "read MiB", "read ampl.", "chunks"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in rows.items():
        stored = bool(row["chunks_total"])
        table.add_row(
            name,
            f"{row['ttft_s']['median'] * 1e3:,.0f}",
            f"{row['speedup']:.1f}x",
            f"{row['bytes_read'] / 2**20:.1f}" if stored else "-",
            f"{row['read_amplification']:.2f}" if stored else "-",
            f"{row['chunks_used']} of {row['chunks_total']}" if stored else "-",
        )
    console.print()
    console.print(table)
    console.print("   TTFT: from token ids to the first new id; look-up, opening the store and every read included.\n")
    for question in questions:
        console.print(f"   [bold]{question.text}[/bold]  {question.begins} ...", markup=True)
        for answer in (one for name in names for one in answers if one.system == name):
            if answer.question == question.text:
                console.print(f"     {answer.system:<22}", end="")
                console.print(f"... {answer.text}", markup=False, no_wrap=True, overflow="ellipsis")
        if question.expected:
            console.print(f"     {'the document':<22}... {question.expected} ...\n", markup=False)
        else:
            console.print()


def _counted(rows: dict[str, dict[str, Any]]) -> str:
    """The number of questions behind the medians: `median of 3 questions; recompute: timed on one question`."""
    counts = {name: row["ttft_s"]["count"] for name, row in rows.items()}
    most = max(counts.values())
    if most == 1:
        return "one question"
    fewer = [f"; {name}: timed on one question" for name, count in counts.items() if count == 1]
    return f"median of {most} questions{''.join(fewer)}"


def write_json(
    path: Path, questions: Iterable[Question], names: list[str], answers: list[Answer], about: dict[str, Any]
) -> None:
    """Write everything that was printed as JSON."""
    expected = {question.text: question.expected for question in questions if question.expected}
    numbers = about | {
        "systems": summary(names, answers),
        "answers": [
            vars(answer) | {"has_expected_words": expected[answer.question] in answer.text}
            if answer.question in expected
            else vars(answer)
            for answer in answers
        ],
    }
    path.write_text(json.dumps(numbers, indent=2) + "\n")
