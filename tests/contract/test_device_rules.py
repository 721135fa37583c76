"""The proof of `test_device_pipeline.py` is worth something: whichever rule of the pipeline is broken, it notices."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from unit.device_log import races
from unit.fake_device import EARLY, LATE, FakeDevice, accelerated

from hf_contiguouskv.hardware.accelerator import StreamOrder
from hf_contiguouskv.loading.device_residency import CrossingChunks, DeviceResidency
from hf_contiguouskv.memory.device_tier import DeviceTier
from hf_contiguouskv.memory.entries import Buffer
from hf_contiguouskv.memory.tier import Tier
from hf_contiguouskv.store.reader import Ticket

from .device_helpers import CONFIGS, MEBIBYTE, PREFIX, ask, opened
from .models import token_ids
from .subject import write_prefix

pytestmark = pytest.mark.needs_library

CHUNK = 4096


@pytest.fixture
def model(tiny_model: Any, store_path: Path) -> Any:
    """A model whose prefix is stored."""
    found = tiny_model("llama", "eager")
    write_prefix(found, PREFIX, store_path)
    return found


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _forget_events(patch: pytest.MonkeyPatch, on_device: bool) -> None:
    give_back = Tier.give_back

    def forgetful(self: Tier, buffer: Buffer) -> None:
        if self.on_device == on_device:
            buffer.busy = None
        give_back(self, buffer)

    patch.setattr(Tier, "give_back", forgetful)


def _arrive_at_once(patch: pytest.MonkeyPatch) -> None:
    drain = DeviceTier.drain

    def impatient(self: DeviceTier) -> None:
        for demotion in self._demotions:
            demotion.copied = type("Done", (), {"query": lambda _: True})()
        drain(self)

    patch.setattr(DeviceTier, "drain", impatient)


def _copy_early(patch: pytest.MonkeyPatch) -> None:
    stage, serve = DeviceResidency.start_crossing, Ticket.serve

    def hasty(self: DeviceResidency, *arguments: Any, **options: Any) -> CrossingChunks | None:
        crossing = stage(self, *arguments, **options)
        if crossing is not None:
            crossing.start_copy()
        return crossing

    def slow(self: Ticket, total: Any) -> None:
        time.sleep(0.02)
        serve(self, total)

    patch.setattr(DeviceResidency, "start_crossing", hasty)
    patch.setattr(Ticket, "serve", slow)


ONE, TWO = ("a",), ("a", "b")
# How rules are broken, and on how many streams that must show.
SABOTAGE: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], tuple[str, ...]]] = {
    "attention does not wait for the copy": (lambda patch: patch.setattr(FakeDevice, "wait", _nothing), ONE),
    "the copy does not wait for the last use": (lambda patch: _forget_events(patch, True), ONE),
    "the host reads into a buffer under a copy": (lambda patch: _forget_events(patch, False), ONE),
    "demoted chunks arrive before they are there": (_arrive_at_once, ONE),
    "uses are not recorded with the allocator": (lambda patch: patch.setattr(FakeDevice, "uses", _nothing), ONE),
    "the copy begins before the reads have ended": (_copy_early, ONE),
    "slots are read while others write": (lambda patch: patch.setattr(StreamOrder, "before_read", _nothing), TWO),
    "slots are written while others read": (lambda patch: patch.setattr(StreamOrder, "before_write", _nothing), TWO),
}


def faults(model: Any, path: Path, streams: tuple[str, ...], schedule: str, room: int) -> int:
    """Wrong answers and accesses out of order in a run of requests, each on the next of `streams`."""
    found = 0
    with accelerated(schedule, piece=CHUNK) as machine:
        with opened(path, device=room) as store:
            for turn in range(6):
                with machine.on_stream(streams[turn % len(streams)]):
                    logits, _ = ask(model, store, CONFIGS["exact"], token_ids(6, seed=1210 + turn % 3))
                    found += bool(logits.isnan().any())
                    # The second of these reads what is there; the next stream writes what is not.
                    for _ in range(2):
                        logits, _ = ask(model, store, CONFIGS["paper"], token_ids(6, seed=1210))
                    found += bool(logits.isnan().any())
                if room > MEBIBYTE:  # All that is forgotten is read again, into buffers that were used before.
                    for table in list(store.inner.memory._tables.values()):
                        for tier in store.inner.memory.tiers:
                            tier.forget(table)
        # (That a block may be allocated for another stream than the one that writes first has its own test.)
        found += len([fault for fault in races(machine.log) if streams == ONE or "alloc" not in fault])
        machine.log.clear()
    return found


def campaign(model: Any, path: Path, streams: tuple[str, ...]) -> int:
    rooms, schedules = (40 * CHUNK, 8 * MEBIBYTE), (LATE, EARLY)
    return sum(faults(model, path, streams, schedule, room) for schedule in schedules for room in rooms)


@pytest.mark.parametrize("streams", [ONE, TWO], ids=str)
def test_with_all_rules_kept_there_is_nothing_to_notice(model, store_path, streams):
    assert campaign(model, store_path, streams) == 0


@pytest.mark.parametrize("rule", SABOTAGE)
def test_a_broken_rule_is_noticed(model, store_path, monkeypatch, rule):
    break_it, streams = SABOTAGE[rule]
    break_it(monkeypatch)
    assert campaign(model, store_path, streams) > 0
