"""SubJ: does a sentence give an opinion or a fact?"""

from __future__ import annotations

from pathlib import Path

from .few_shot import FewShot
from .rows import HubSource

LABELS = ("subjective", "objective")


def subj(data_dir: Path | str | None = None) -> FewShot:
    """110 examples in the prefix, as in the paper."""
    hub = HubSource("SetFit/subj", lambda row: {"text": row["text"], "label": LABELS.index(row["label_text"])})
    return FewShot("subj", 110, LABELS, "Sentence: {text}\nType:", hub, data_dir)
