"""Tables of variants, from rows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

# The dtype of rows without one, which earlier versions wrote.
_EARLIER_DTYPE = "bfloat16"
NEEDLES = ("needle", "needle_multikey")


def dtypes_of(file: Path) -> set[str]:
    """Names of the dtypes of a file's rows; empty if there is no file."""
    if not file.exists():
        return set()
    rows = (json.loads(line) for line in file.read_text(encoding="utf-8").splitlines())
    return {row.get("dtype", _EARLIER_DTYPE) for row in rows}


def as_markdown(files: Sequence[Path]) -> str:
    """One table per set: per task, the difference in points of score from the full cache, and the mean divergence,
    over the suffix and at the answer.

    Rows of several seeds, in one file or several, count together.

    Raises:
        ValueError: a request was answered twice in one variant, or models ran in different dtypes.
    """
    dtypes = set().union(*map(dtypes_of, files))
    if len(dtypes) > 1:
        raise ValueError(f"rows in {' and '.join(sorted(dtypes))} cannot be compared; make a table of each")
    rows = pd.concat([pd.read_json(file, lines=True) for file in files], ignore_index=True)
    # Rows of earlier versions have no seed.
    rows["seed"] = rows.seed.fillna(0) if "seed" in rows else 0
    request = ["task", "seed", "number"]
    full = rows[rows.set == "full"].drop_duplicates(request).set_index(request).score
    text = []
    for name in [one for one in rows.set.unique() if one != "full"]:
        own = rows[rows.set == name]
        if own.duplicated(["variant", *request]).any():
            raise ValueError(f"requests of set {name} were answered twice; take another file")
        text.append(f"### {name}\n\n{_table(own, full)}")
    return "\n\n".join(text)


def _table(rows: pd.DataFrame, full: pd.Series) -> str:
    tasks = list(rows.task.unique())
    others = [task for task in tasks if task not in NEEDLES]
    lines = [
        "| variant | " + " | ".join(tasks) + " | mean of the others | KL needle | KL others "
        "| KL needle, answer | KL others, answer |",
        "|---" * (len(tasks) + 6) + "|",
    ]
    reference = full.groupby("task").mean()
    counts = full.groupby("task").size()
    lines.append("| full, percent (requests) | " + " | ".join(f"{100 * reference[t]:.1f} ({counts[t]})" for t in tasks))
    lines[-1] += f" | {100 * reference[others].mean():.1f} | | | | |" if others else " | | | | | |"
    for variant in rows.variant.unique():
        own = rows[rows.variant == variant]
        by_task = own.groupby("task")
        points = 100 * (by_task.score.mean() - reference)
        cells = [f"{points[task]:+.1f}" for task in tasks]
        cells.append(f"{points[others].mean():+.1f}" if others else "")
        needles = [task for task in tasks if task in NEEDLES]
        # (Rows of earlier versions have no divergence at the answer.)
        for column in ("kl", "kl_answer"):
            for some in (needles, others):
                known = some and column in own and not own[column].isna().any()
                cells.append(f"{by_task[column].mean()[some].mean():.4f}" if known else "")
        lines.append(f"| {variant} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
