"""A slower disk: one bucket for all threads, on a clock that only the test moves."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_llama import tiny_llama

from eval.systems import Setting, State
from eval.systems.throttle import ThrottledBackend, TokenBucket, bucket_of
from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.store.backend import SegmentBackend
from hf_contiguouskv.store.local_disk import LocalDisk


class SlowClock:
    """Time passes only while something sleeps."""

    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def test_reads_follow_each_other() -> None:
    clock = SlowClock()
    bucket = TokenBucket(1000.0, clock, clock.sleep)
    with bucket.reading(500):
        assert not clock.slept
    assert clock.slept == [0.5]
    # The time that a read itself takes counts.
    with bucket.reading(500):
        clock.now += 0.2
    assert clock.slept[1:] == [pytest.approx(0.3)]
    # Nothing is saved up while nobody reads.
    clock.now += 10.0
    with bucket.reading(100):
        pass
    assert clock.slept[2:] == [pytest.approx(0.1)]
    # A read that took longer than it must waits for nothing.
    with bucket.reading(100):
        clock.now += 5.0
    assert len(clock.slept) == 3


def test_reads_at_the_same_time_share_the_speed() -> None:
    clock = SlowClock()
    bucket = TokenBucket(1000.0, clock, clock.sleep)
    assert [bucket.reserve(250) - clock.now for _ in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    ends: list[float] = []
    threads = [threading.Thread(target=lambda: ends.append(bucket.reserve(1000))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(ends) == pytest.approx([102.0 + second for second in range(8)])


def test_a_speed_is_positive() -> None:
    for speed in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match="must be positive"):
            bucket_of(speed)
    assert bucket_of(None) is None
    bucket = bucket_of(0.5)
    assert bucket is not None
    assert bucket.bytes_per_s == 5e8


def test_a_throttled_backend_is_the_backend(tmp_path: Path) -> None:
    clock = SlowClock()
    backend = ThrottledBackend(LocalDisk(tmp_path), TokenBucket(1024.0, clock, clock.sleep))
    assert isinstance(backend, SegmentBackend)
    key = "ab" * 16
    writer = backend.create(key, 2048)
    writer.write(0, memoryview(bytes(range(256)) * 8))
    writer.seal()
    writer.publish()
    assert backend.list_keys() == {key}
    assert [one.nbytes for one in backend.list_blobs()] == [2048]
    blob = backend.open(key)
    assert blob.identity == backend.identity(key)
    assert blob.is_backed(0, 2048)
    found = bytearray(512)
    assert blob.read_into([(256, memoryview(found)[:256]), (1024, memoryview(found)[256:])]) >= 512
    assert bytes(found) == bytes(range(256)) * 2
    assert clock.slept == [pytest.approx(0.5)]
    blob.close()
    assert backend.quarantine(key, backend.identity(key))
    assert [one.key for one in backend.quarantined()] == [key]
    assert backend.drop_quarantined(key) > 0
    assert not backend.delete(key)
    assert backend.collect().removed == ()
    assert backend.overhead_bytes() >= 0
    assert backend.direct in (True, False)
    backend.close()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.mark.parametrize(
    "text",
    [
        "reload",
        "attentionstore",
        "attentionstore+overlap",
        "flexgen",
        "attentionstore_h2o",
        "impress",
        "contiguouskv",
        "contiguouskv_paper",
    ],
)
def test_every_system_that_reads_obeys(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """All that a cold request reads of K and V has passed through the system's own bucket."""
    asked: list[int] = []
    reserve = TokenBucket.reserve

    def counted(self: TokenBucket, nbytes: int) -> float:
        asked.append(nbytes)
        return reserve(self, nbytes)

    monkeypatch.setattr(TokenBucket, "reserve", counted)
    waited: list[float] = []
    monkeypatch.setattr(TokenBucket, "wait_until", lambda self, when: waited.append(when))
    chance = torch.Generator().manual_seed(1)
    prefix, suffix = (torch.randint(3, 97, (count,), generator=chance) for count in (300, 6))
    (setting,) = Setting.parse(text, (0.3,))
    with setting.make(model, tmp_path, read_gbps=1e-3) as system:
        system.store(prefix)
        asked.clear()
        system.enter(State.COLD, prefix)
        cache = system.cache(prefix)
        with torch.no_grad():
            model(input_ids=suffix[None], **{cache_argument(model): cache})
        stats = system.finish(cache)
    assert stats.hits["disk"] > 0 or text == "reload"  # Not every file system lets go of its pages.
    assert len(waited) >= 1
    if text != "reload":
        assert sum(asked) > stats.bytes_read / 2  # (What is counted is rounded up to pages.)
