"""Settings shared by all tests: offline, two threads, no progress bars, and small models that are built once."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
import transformers

_built: dict[tuple[Any, ...], Any] = {}
_lent: list[tuple[tuple[Any, ...], str]] = []


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "needs_library: cannot run with the DynamicCache stand-in (see tests/README.md)")
    torch.set_num_threads(2)
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
def tiny_model() -> Iterator[Callable[..., Any]]:
    """Builds, or takes from the session's shelf, a tiny model: `tiny_model("llama", "sdpa", layers=4)`.

    A model that a test leaves with a changed attention implementation or a forgotten hook is thrown away, so that
    one failure does not fail its neighbours. That models *are* left as they were is asserted by its own tests.
    """
    from tests.contract.models import build

    def lend(family: str, implementation: str = "sdpa", **options: Any) -> Any:
        key = (family, implementation, *sorted(options.items()))
        if key not in _built:
            _built[key] = build(family, implementation, **options)
        _lent.append((key, implementation))
        return _built[key]

    yield lend
    if any(_is_changed(_built.get(key), implementation) for key, implementation in _lent):
        gc.collect()
        for key, implementation in _lent:
            if _is_changed(_built.get(key), implementation):
                _built.pop(key, None)
    _lent.clear()


def _is_changed(model: Any, implementation: str) -> bool:
    if model is None:
        return False
    return model.config._attn_implementation != implementation or any(
        module._forward_pre_hooks for module in model.modules()
    )


@pytest.fixture
def store_path(tmp_path: Path) -> Path:
    return tmp_path / "kv-store"
