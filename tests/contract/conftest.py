"""The shelf of tiny models that the contract tests share."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from .models import build

_built: dict[tuple[Any, ...], Any] = {}
_lent: list[tuple[tuple[Any, ...], str]] = []


@pytest.fixture(scope="session", autouse=True)
def _imports_are_not_garbage() -> None:
    # Several tests collect garbage; looking through all of torch and transformers each time is most of their time.
    gc.collect()
    gc.freeze()


@pytest.fixture
def tiny_model() -> Iterator[Callable[..., Any]]:
    """Builds, or takes from the session's shelf, a tiny model: `tiny_model("llama", "sdpa", layers=4)`.

    A model that a test leaves with a changed attention implementation or a forgotten hook is thrown away, so that
    one failure does not fail its neighbours. That models *are* left as they were is asserted by its own tests.
    """

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
