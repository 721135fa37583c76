"""A small store with several prefixes, ways to damage a copy of it, and what must hold afterwards.

Nothing here asks the library where a byte lies: the layout of a file is read from its safetensors header, so that a
mistake of the library about its own format does not hide.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache, cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from contract.models import build, token_ids
from contract.references import assert_close, assert_same_generation, generate, prefilled

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore
from hf_contiguouskv.model.fingerprint import model_fingerprint

CHUNK = 16
NEW_TOKENS = 3
CONFIGS: dict[str, ContiguousKVConfig] = {
    "exact": ContiguousKVConfig(budget=1.0),
    "indexed": ContiguousKVConfig(budget=0.1, payload="exact"),
    "packed": ContiguousKVConfig(budget=0.9),
    "paper": ContiguousKVConfig.paper(budget=0.3),
}


def segment_path(folder: Path, key: str) -> Path:
    """Where the segment `key` of the store in `folder` lies."""
    return folder / "segments" / key[:2] / f"{key}.safetensors"


def segment_files(folder: Path) -> dict[str, Path]:
    """The published segment files of a store by key."""
    return {path.name.split(".")[0]: path for path in sorted((folder / "segments").glob("??/*.safetensors"))}


def regions(path: Path) -> dict[str, tuple[int, int]]:
    """Every byte of a sound segment file by what it is: name -> `(start, end)`.

    Names: "length", "json", "spaces", and the tensors by their own names ("payload.0", "padding.3", ...).
    """
    octets = path.read_bytes()
    length = int.from_bytes(octets[:8], "little")
    text = octets[8 : 8 + length]
    content = json.loads(text)
    used = 8 + len(text.rstrip(b" "))
    found = {"length": (0, 8), "json": (8, used), "spaces": (used, 8 + length)}
    for name, tensor in content.items():
        if name != "__metadata__":
            start, end = tensor["data_offsets"]
            found[name] = (8 + length + start, 8 + length + end)
    found = {name: (start, end) for name, (start, end) in found.items() if end > start}
    places = sorted(found.values())
    assert places[0][0] == 0
    assert places[-1][1] == len(octets)
    assert all(left[1] == right[0] for left, right in pairwise(places))
    return found


def kind_of(region: str) -> str:
    """ "payload" of "payload.0", "checksums.payload" of itself."""
    return region if region.startswith("checksums") else region.split(".")[0]


def flip(path: Path, byte: int, bit: int) -> None:
    """Turn one bit of a file over, in place."""
    with open(path, "r+b", buffering=0) as file:
        file.seek(byte)
        (old,) = file.read(1)
        file.seek(byte)
        file.write(bytes([old ^ (1 << bit)]))


def _data(path: Path) -> bytes:
    """All but the header, which says how long the computing took: that differs when it is computed again."""
    octets = path.read_bytes()
    return octets[8 + int.from_bytes(octets[:8], "little") :]


@dataclass(frozen=True)
class Sequence:
    """A prompt whose beginning is stored.

    Attributes:
        name: for messages.
        model: "first" or "second".
        ids: int64 `[1, n]`, what is stored.
        question: int64 `[1, n + q]`, what a request asks.
        parents: names of the sequences that it continues.
    """

    name: str
    model: str
    ids: torch.Tensor
    question: torch.Tensor
    parents: tuple[str, ...] = ()


def _sequences() -> dict[str, Sequence]:
    parent = token_ids(32, seed=11)
    child = torch.cat([parent, token_ids(24, seed=12)], 1)
    # Continues in the middle of a chunk: its segment holds that chunk once more, whole.
    grandchild = torch.cat([child, token_ids(17, seed=13)], 1)
    sibling = torch.cat([parent, token_ids(20, seed=14)], 1)
    lone = token_ids(40, seed=15)
    wanted = [
        ("parent", "first", parent, ()),
        ("child", "first", child, ("parent",)),
        ("grandchild", "first", grandchild, ("parent", "child")),
        ("sibling", "first", sibling, ("parent",)),
        ("lone", "first", lone, ()),
        ("other", "second", child, ()),
    ]
    return {
        name: Sequence(name, model, ids, torch.cat([ids, token_ids(4, seed=90 + number)], 1), parents)
        for number, (name, model, ids, parents) in enumerate(wanted)
    }


@dataclass
class Tally:
    """What happened in some requests. The lists say what went wrong and must stay empty.

    Attributes:
        requests: how many there were.
        quarantined: segments that were taken out of service.
        recovered: requests that met damage while they read.
        wrong, crashes, lost: wrong answers, exceptions, prefixes that are not found although nothing harmed them.
    """

    requests: int = 0
    quarantined: int = 0
    recovered: int = 0
    wrong: list[str] = field(default_factory=list)
    crashes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)

    def close(self, store: PrefixStore) -> None:
        """Close a store, and add what it counted."""
        stats = store.stats
        self.quarantined += stats.quarantined
        self.recovered += stats.recovered
        store.close()


class Scene:
    """Two tiny models, and a store that holds prefixes of both.

    Args:
        folder: an empty one; holds the store as it was left by `close` ("closed") and by a crash ("crashed", with a
            write-ahead log).
    """

    def __init__(self, folder: Path) -> None:
        self.models: dict[str, Any] = {
            "first": build("llama", "sdpa", layers=2),
            "second": build("llama", "sdpa", layers=2, seed=1),
        }
        self.sequences = _sequences()
        self.closed, self.crashed = folder / "closed", folder / "crashed"
        self._references = cache(self._reference)
        self._folder = folder
        self.keys: dict[str, str] = {}
        with PrefixStore(self.closed) as store:
            for sequence in self.sequences.values():
                before = {entry.key for entry in store.entries()}
                ContiguousKVCache(self.models[sequence.model], sequence.ids, store=store).close()
                (key,) = {entry.key for entry in store.entries()} - before
                self.keys[sequence.name] = key
            shutil.copytree(self.closed, self.crashed)
        assert (self.crashed / "index.sqlite-wal").stat().st_size > 0
        assert not (self.closed / "index.sqlite-wal").exists()

    @cached_property
    def names(self) -> dict[str, str]:
        """Names of sequences by the key of the segment that ends with them."""
        return {key: name for name, key in self.keys.items()}

    def copy(self, folder: Path, *, crashed: bool = False) -> Path:
        """A fresh copy of the store at `folder`."""
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.crashed if crashed else self.closed, folder)
        return folder

    # -- requests ---------------------------------------------------------------------------------------------------

    def request(self, store: PrefixStore, name: str, mode: str, config: str, tally: Tally) -> None:
        """Ask a question of a sequence, and count what goes wrong.

        Args:
            store: damaged or not.
            name: of the sequence.
            mode: "explicit" or "automatic".
            config: a key of `CONFIGS`.
            tally: counts it.
        """
        tally.requests += 1
        what = f"{mode} {config} request for {name}"
        try:
            actual, attached = self._answer(store, name, mode, config)
        except Exception as error:
            tally.crashes.append(f"{what}: {type(error).__name__}: {error}")
            return
        try:
            expected = self._references(name, mode, config, attached)
            if config == "packed":
                # The scales of packed keys are those of a segment, and where segments end may have changed.
                assert_close(actual.logits[0], expected.logits[0], relative=0.5, absolute=0.05)
            else:
                assert_same_generation(actual, expected)
        except AssertionError as error:
            tally.wrong.append(f"{what}, {attached} tokens attached: {str(error).splitlines()[0]}")

    def _answer(self, store: PrefixStore, name: str, mode: str, config: str) -> tuple[Any, int]:
        sequence = self.sequences[name]
        model = self.models[sequence.model]
        prefix = sequence.ids if mode == "explicit" else None
        with ContiguousKVCache(model, prefix, store=store, config=CONFIGS[config]) as made:
            result = generate(model, sequence.question, made, tokens=NEW_TOKENS)
            attached = 0 if made.prefix_ids is None else len(made.prefix_ids)
        store.flush()
        return result, attached

    def _reference(self, name: str, mode: str, config: str, attached: int) -> Any:
        """The right answer: of a `DynamicCache`, or (pruned) of a sound store that holds `attached` tokens."""
        sequence = self.sequences[name]
        model = self.models[sequence.model]
        if config == "exact" or attached == 0:
            # However little of it was found, an exact answer is the one that there is.
            return generate(model, sequence.question, prefilled(model, sequence.ids), tokens=NEW_TOKENS)
        folder = self._folder / f"sound-{name}-{mode}-{config}-{attached}"
        beginning = sequence.question[:, :attached]
        with PrefixStore(folder) as store:
            ContiguousKVCache(model, beginning, store=store).close()
            with ContiguousKVCache(model, beginning, store=store, config=CONFIGS[config]) as made:
                return generate(model, sequence.question, made, tokens=NEW_TOKENS)

    # -- what is stored ---------------------------------------------------------------------------------------------

    def found(self, store: PrefixStore, name: str) -> int:
        """How many tokens of a sequence a look-up finds."""
        sequence = self.sequences[name]
        fingerprint = model_fingerprint(self.models[sequence.model])
        stored = store.inner.lookup(fingerprint, sequence.ids[0].numpy(), CHUNK)
        return 0 if stored is None else stored.tokens

    def count_lost(self, store: PrefixStore, names: Iterable[str], tally: Tally) -> None:
        """Note which of the sequences `names` are not found in full, or whose file is no longer what was stored."""
        for name in names:
            tokens, wanted = self.found(store, name), self.sequences[name].ids.shape[1]
            if tokens != wanted:
                tally.lost.append(f"{name}: {tokens} of {wanted} tokens are found")
            mine = segment_path(store.path, self.keys[name])
            if not mine.is_file() or _data(mine) != _data(segment_path(self.closed, self.keys[name])):
                tally.lost.append(f"{name}: its file is gone or changed")

    def not_below(self, damaged: set[str]) -> list[str]:
        """Sequences that need no segment of the sequences `damaged`."""
        return [name for name, sequence in self.sequences.items() if not damaged & {name, *sequence.parents}]


def draw_requests(
    scene: Scene, rng: random.Random, about: Iterable[str], count: int, config: str | None = None
) -> list[tuple[str, str, str]]:
    """`(sequence, mode, config)` of some requests: first about the sequences `about`; the first with `config`."""
    names = [*about]
    rng.shuffle(names)
    names = (names + rng.choices(list(scene.sequences), k=count))[:count]
    configs = rng.choices(list(CONFIGS), weights=[8, 1, 1, 1], k=count)
    configs[0] = config or configs[0]
    return [(name, rng.choice(("explicit", "automatic")), config) for name, config in zip(names, configs, strict=True)]


def is_root() -> bool:
    """Whether file modes do not bind this process."""
    return os.geteuid() == 0
