"""The tasks on which systems are evaluated: one module per task, one protocol."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from .base import UNJUDGED, Request, Task, TooFewRowsError
from .chat import ChatTemplateError
from .common_words import common_words
from .few_shot import FewShot
from .kv_retrieval import kv_retrieval
from .lengths import RANDOM, TEXT, Lengths
from .longbench import SUBSETS, longbench
from .needle import NEEDLES, needle, needle_multikey, needles_in
from .nq_open import nq_open
from .own_data import FILE, OwnDataError, own_data
from .register import register
from .rows import DataMissingError, data_noted
from .rte import rte
from .ruler import METRICS, ruler
from .sst2 import sst2
from .subj import subj
from .trec import trec
from .variable_tracking import variable_tracking

TASKS: dict[str, Callable[[Path | str | None], Task]] = {
    "sst2": sst2,
    "subj": subj,
    "trec": trec,
    "rte": rte,
    "needle": needle,
    "needle_multikey": needle_multikey,
    "variable_tracking": variable_tracking,
    "common_words": common_words,
    "register": register,
    "kv_retrieval": kv_retrieval,
    "nq_open": nq_open,
    **{f"longbench_{subset}": partial(longbench, subset) for subset in SUBSETS},
    **{f"ruler_{task}": partial(ruler, task) for task in METRICS},
}
# Tasks that are more than a name.
WRITTEN = (
    f"{FILE}NAME.jsonl",
    "needle:TOKENS",
    "needle_multikey:TOKENS",
    f"{TEXT}PREFIX+SUFFIX",
    f"{RANDOM}PREFIX+SUFFIX",
)

__all__ = [
    "RANDOM",
    "TASKS",
    "TEXT",
    "UNJUDGED",
    "WRITTEN",
    "ChatTemplateError",
    "DataMissingError",
    "OwnDataError",
    "Request",
    "Task",
    "TooFewRowsError",
    "data_noted",
    "task_named",
]


def task_named(name: str, data_dir: Path | str | None = None, prefixes: int | None = None) -> Task:
    """The task of this name.

    Args:
        name: one of `TASKS`, `file:` and the path of a file (see `own_data`), a name of `Lengths`, or a needle task and
            the tokens of its prefix, such as `needle:8192`.
        data_dir: folder with local data; default: `$CONTIGUOUSKV_DATA`, else the Hub.
        prefixes: prefixes of a few-shot task; default: five. The prefixes of other tasks follow from their requests.

    Raises:
        OwnDataError: the file is missing, or a line of it is wrong.
        ValueError: no task has this name, or lengths are missing in it.
    """
    if name.startswith(FILE):
        return own_data(name.removeprefix(FILE))
    if name.startswith((TEXT, RANDOM)):
        return Lengths.parse(name)
    if name.partition(":")[0] in NEEDLES and ":" in name:
        return needles_in(name, data_dir)
    if name not in TASKS:
        raise ValueError(f"task must be {', '.join(WRITTEN)}, or one of {sorted(TASKS)}, got {name!r}")
    task = TASKS[name](data_dir)
    return replace(task, prefixes=prefixes) if prefixes is not None and isinstance(task, FewShot) else task
