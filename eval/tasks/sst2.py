"""SST-2: is a sentence of a film review positive or negative?"""

from __future__ import annotations

from pathlib import Path

from .few_shot import FewShot
from .rows import HubSource


def sst2(data_dir: Path | str | None = None) -> FewShot:
    """100 examples in the prefix, as in the paper."""
    hub = HubSource(
        "stanfordnlp/sst2",
        lambda row: {"text": row["sentence"].strip(), "label": row["label"]},
        splits=(("train", "train"), ("test", "validation")),  # The Hub's test split has no labels.
    )
    return FewShot("sst2", 100, ("negative", "positive"), "Review: {text}\nSentiment:", hub, data_dir)
