"""Settings shared by all tests: offline, one thread, no progress bars, seeded."""

from __future__ import annotations

import os
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers
from clock import Clock


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_library: cannot run with the DynamicCache stand-in (see tests/README.md)")
    expected = os.environ.get("EXPECTED_TRANSFORMERS")
    if expected and transformers.__version__ != expected:
        raise pytest.UsageError(f"these tests were to run on transformers {expected}, not {transformers.__version__}")
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not os.environ.get("CONTRACT_STAND_IN"):
        return
    for item in items:
        if item.get_closest_marker("needs_library"):
            item.add_marker(pytest.mark.skip(reason="needs the library, not the stand-in"))


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """What `time.time` says in this test."""
    found = Clock()
    monkeypatch.setattr(time, "time", found)
    return found


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "kv-store"
