"""What all tests of the evaluation have in common."""

from __future__ import annotations

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Calls of ours use the name that this version of transformers has for the cache, not one that it deprecates."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("error:.*past_key_values.*:FutureWarning"))
