"""One bit of one file is wrong: every answer stays right, nothing raises, and nothing else is lost."""

from __future__ import annotations

import logging
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hf_contiguouskv import PrefixStore, ReadOptions
from hf_contiguouskv.store.inner import StoreInner

from .damage import CONFIGS, Scene, Tally, draw_requests, flip, kind_of, regions, segment_path
from .scale import SEED, scaled

SEGMENT_FLIPS, INDEX_FLIPS, LOG_FLIPS = scaled(240), scaled(160), scaled(160)
REQUESTS = 3
READ_BY = {"key_index": "indexed", "key_scale": "packed", "values4": "packed", "leader_keys": "paper"}
"""Tensors that only some requests read."""


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("flips"))


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="hf_contiguouskv")


def count(figures: Any, tally: Tally, flips: int) -> None:
    """Add to the fault suite's figures, and fail if anything went wrong."""
    figures.add("bit flips", flips)
    figures.add("requests after bit flips", tally.requests)
    figures.add("segments quarantined after bit flips", tally.quarantined)
    figures.add("requests that met a flipped bit while reading", tally.recovered)
    figures.add("wrong answers", len(tally.wrong))
    figures.add("crashes of the request path", len(tally.crashes))
    figures.add("prefixes lost by bit flips elsewhere", len(tally.lost))
    assert (tally.wrong, tally.crashes, tally.lost) == ([], [], [])


def live_through(
    scene: Scene,
    folder: Path,
    rng: random.Random,
    damage: tuple[Path, int, int],
    victim: str | None,
    what: str,
    tally: Tally,
) -> None:
    """Open the store, turn the bit over (before or after), ask, clean up, and see what is left.

    Args:
        scene: whose store `folder` is a copy of.
        folder: the copy.
        rng: draws the order of things.
        damage: file, byte and bit.
        victim: name of the sequence whose segment is damaged, if it is one.
        what: is damaged, a kind of tensor perhaps.
        tally: counts what goes wrong.
    """
    about = [victim, *(name for name, other in scene.sequences.items() if victim in other.parents)] if victim else []
    requests = draw_requests(scene, rng, about, REQUESTS, READ_BY.get(what))
    late, clean_first, reopen = rng.random() < 0.25, rng.random() < 0.25, rng.random() < 0.5
    if not late:
        flip(*damage)
    store = PrefixStore(folder)
    try:
        if late:
            # What is open and known by now is another way into the same damage.
            scene.request(store, requests[0][0], "explicit", "exact", tally)
            flip(*damage)
        if clean_first:
            store.gc()
        for name, mode, config in requests:
            scene.request(store, name, mode, config, tally)
        if reopen:
            tally.close(store)
            store = PrefixStore(folder)
        store.gc()
        damaged = {victim} if victim else set()
        scene.count_lost(store, scene.not_below(damaged), tally)
        if victim:
            # What continues the damaged one is found again once that one has been computed again.
            scene.request(store, victim, "explicit", "exact", tally)
            others = [name for name in scene.sequences if name != victim]
            scene.count_lost(store, others, tally)
            if scene.found(store, victim) != scene.sequences[victim].ids.shape[1]:
                tally.lost.append(f"{victim}: not stored again")
        tally.close(store)
    finally:
        store.close()


def run_flips(
    scene: Scene, tmp_path: Path, figures: Any, kind: str, flips: int, seed: int
) -> tuple[Counter[str], Tally]:
    """Turn over `flips` bits, each in a fresh copy; which regions were hit, and what happened."""
    rng = random.Random(f"{seed} {SEED}")
    tally, hit = Tally(), Counter[str]()
    files = {name: regions(segment_path(scene.closed, key)) for name, key in scene.keys.items()}
    for number in range(flips):
        folder = scene.copy(tmp_path / "store", crashed=kind == "index.sqlite-wal" or rng.random() < 0.2)
        victim = None
        if kind == "segment":
            victim = rng.choice(list(files))
            # Every kind of byte as often as every other: most of the file is payload.
            kinds: dict[str, list[str]] = {}
            for region in files[victim]:
                kinds.setdefault(kind_of(region), []).append(region)
            what = rng.choice(sorted(kinds))
            start, end = files[victim][rng.choice(kinds[what])]
            path, byte = segment_path(folder, scene.keys[victim]), rng.randrange(start, end)
        else:
            path = folder / kind
            what, byte = kind, rng.randrange(path.stat().st_size)
        bit = rng.randrange(8)
        hit[what] += 1
        before = len(tally.wrong) + len(tally.crashes) + len(tally.lost)
        try:
            live_through(scene, folder, rng, (path, byte, bit), victim, what, tally)
        except Exception as error:
            tally.crashes.append(f"{type(error).__name__}: {error}")
        for found in (tally.wrong, tally.crashes, tally.lost):
            if before < len(tally.wrong) + len(tally.crashes) + len(tally.lost) and found:
                found[-1] += f" [flip {number} of seed {seed}: bit {bit} of byte {byte} of {path.name}, {what}]"
    count(figures, tally, flips)
    return hit, tally


def test_a_flipped_bit_of_a_segment(scene, tmp_path, figures):
    hit, tally = run_flips(scene, tmp_path, figures, "segment", SEGMENT_FLIPS, seed=1)
    assert hit.total() == SEGMENT_FLIPS >= 150
    # The damage was met at look-ups and in the middle of requests. (A flip of padding between tensors harms nobody.)
    assert tally.recovered > 0
    assert tally.quarantined > SEGMENT_FLIPS / 4
    # Each kind of byte that a segment of these models consists of.
    everything = {kind_of(region) for key in scene.keys.values() for region in regions(segment_path(scene.closed, key))}
    assert (
        everything == set(hit) >= {"length", "json", "payload", "values4", "token_ids", "checksums.payload", "padding"}
    )


@pytest.mark.parametrize(("file", "flips"), [("index.sqlite", INDEX_FLIPS), ("index.sqlite-wal", LOG_FLIPS)])
def test_a_flipped_bit_of_the_index(scene, tmp_path, figures, file, flips):
    hit, tally = run_flips(scene, tmp_path, figures, file, flips, seed=2)
    assert hit.total() == flips >= 150
    # Segments are sound, whatever the index says.
    assert tally.quarantined == tally.recovered == 0


# ---- the checks above can fail ----


def test_an_unnoticed_flip_would_be_counted_as_a_wrong_answer(scene, tmp_path, monkeypatch):
    folder, tally = scene.copy(tmp_path / "store"), Tally()
    path = segment_path(folder, scene.keys["lone"])
    start, _ = regions(path)["payload.0"]
    # The top bit of an exponent of a key: 0.1 becomes 1e37.
    flip(path, start + 3, 6)
    monkeypatch.setitem(CONFIGS, "exact", replace(CONFIGS["exact"], reading=ReadOptions(verify=False)))
    with PrefixStore(folder) as store:
        scene.request(store, "lone", "explicit", "exact", tally)
    assert (len(tally.wrong), len(tally.crashes)) == (1, 0)


def test_a_lost_prefix_would_be_counted(scene, tmp_path):
    folder, tally = scene.copy(tmp_path / "store"), Tally()
    with PrefixStore(folder) as store:
        store.delete(scene.keys["parent"], recursive=True)
        scene.count_lost(store, scene.sequences, tally)
    assert {text.split(":")[0] for text in tally.lost} == {"parent", "child", "grandchild", "sibling"}


def test_a_crash_would_be_counted(scene, tmp_path, monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise ZeroDivisionError("on purpose")

    folder, tally = scene.copy(tmp_path / "store"), Tally()
    with PrefixStore(folder) as store:
        monkeypatch.setattr(StoreInner, "lookup", fail)
        scene.request(store, "lone", "explicit", "exact", tally)
    assert tally.crashes == ["explicit exact request for lone: ZeroDivisionError: on purpose"]
