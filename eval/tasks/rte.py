"""RTE: does a text entail a statement?"""

from __future__ import annotations

from pathlib import Path

from .few_shot import FewShot
from .rows import HubSource


def rte(data_dir: Path | str | None = None) -> FewShot:
    """80 examples in the prefix, as in the paper."""
    hub = HubSource(
        "nyu-mll/glue",
        lambda row: {"premise": row["sentence1"], "hypothesis": row["sentence2"], "label": row["label"]},
        config="rte",
        splits=(("train", "train"), ("test", "validation")),
    )
    template = "{premise}\nQuestion: {hypothesis} True or false?\nAnswer:"
    return FewShot("rte", 80, ("true", "false"), template, hub, data_dir)
