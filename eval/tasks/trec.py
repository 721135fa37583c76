"""TREC: what kind of thing does a question ask for?"""

from __future__ import annotations

from pathlib import Path

from .few_shot import FewShot
from .rows import HubSource

LABELS = ("description", "entity", "abbreviation", "person", "number", "location")
# The Hub's order of the same six.
_THEIRS = ("abbreviation", "entity", "description", "person", "location", "number")


def trec(data_dir: Path | str | None = None) -> FewShot:
    """120 examples in the prefix, as in the paper."""
    hub = HubSource(
        "CogComp/trec",
        lambda row: {"text": row["text"], "label": LABELS.index(_THEIRS[row["coarse_label"]])},
        revision="refs/convert/parquet",  # The main branch has a script, which `datasets` no longer runs.
    )
    return FewShot("trec", 120, LABELS, "Question: {text}\nType:", hub, data_dir)
