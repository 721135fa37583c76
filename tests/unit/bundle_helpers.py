"""A small tree of prefixes, and bundles of it, for the tests of bundles."""

from __future__ import annotations

import json
from pathlib import Path

from store_helpers import some_tokens, write_prefix

from hf_contiguouskv.store import PrefixStore


def tree(store: PrefixStore) -> list[str]:
    """20 tokens; 40 that continue them; 26 that continue them from the middle of a segment."""
    ids = some_tokens(40)
    other = ids[:26].copy()
    other[18:] += 1
    write_prefix(store, ids[:20])
    write_prefix(store, ids, first_chunk=5)
    write_prefix(store, other, first_chunk=4)
    write_prefix(store, some_tokens(9, seed=1))
    return [entry.key for entry in store.entries()]


def content(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, but SQLite's locks (who reads first leaves a mark there)."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.name.endswith("-shm")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def manifest(bundle: Path) -> dict:
    return json.loads((bundle / "bundle.json").read_text())
