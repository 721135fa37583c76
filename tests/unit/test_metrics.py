"""Prometheus sees exactly what a store counts, and a scrape never fails."""

from __future__ import annotations

import gc
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, Counter, generate_latest, start_http_server
from prometheus_client.parser import text_string_to_metric_families
from store_helpers import FINGERPRINT, read_back, some_tokens, write_prefix

from hf_contiguouskv import metrics
from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.store import PrefixStore


@pytest.fixture
def registry() -> CollectorRegistry:
    return CollectorRegistry(auto_describe=True)


def samples(text: bytes | CollectorRegistry) -> dict[tuple[str, ...], float]:
    """`(name, label values...)` to value, from the text format."""
    text = text if isinstance(text, bytes) else generate_latest(text)
    found = {}
    for family in text_string_to_metric_families(text.decode()):
        for sample in family.samples:
            key = (sample.name, *(sample.labels[name] for name in sorted(sample.labels)))
            assert key not in found
            found[key] = sample.value
    return found


def test_every_counter_is_the_stores_own(store_path: Path, registry: CollectorRegistry) -> None:
    with PrefixStore(store_path) as probe:
        one = write_prefix(probe, some_tokens(20)).spans[0].segment
        nbytes, stored = one.nbytes, one.blob.stored_bytes
    with PrefixStore(store_path, max_disk_bytes=2 * stored + 4096) as store:
        metrics.register(store, registry)
        for seed in (1, 2):  # The second one needs the room of the one that is there.
            write_prefix(store, some_tokens(20, seed))
        found = store.inner.lookup(FINGERPRINT, some_tokens(20, seed=2)[:18], 4)
        assert found is not None
        read_back(store, found, [0])
        assert store.inner.lookup(FINGERPRINT, some_tokens(20, seed=9), 4) is None
        assert store.inner.lookup("e0" * 16, some_tokens(20, seed=2), 4) is None
        assert store.inner.lookup(FINGERPRINT, some_tokens(4, seed=8), 4) is None
        store.inner.discard(found.spans[0].segment, "for a test")
        store.inner.write_failed(OSError("for a test"))
        store.inner.counters.add('passed_over.a batch of 2.5 rows, with a "quote"', 3)
        seen, stats = samples(registry), store.stats
    assert seen.pop(("contiguouskv_bytes", "disk")) == stats.disk_bytes
    assert seen == {
        ("contiguouskv_hits_total",): 1,
        ("contiguouskv_misses_total", "not_stored"): 2,
        ("contiguouskv_misses_total", "other_model"): 1,
        ("contiguouskv_misses_total", "corrupt"): 0,
        ("contiguouskv_misses_total", "expired"): 0,
        ("contiguouskv_passed_over_total", 'a batch of 2.5 rows, with a "quote"'): 3,
        ("contiguouskv_tokens_found_total",): 18,
        ("contiguouskv_tokens_asked_total",): 18 + 20 + 20 + 4,
        ("contiguouskv_published_total",): 2,
        ("contiguouskv_evictions_total",): 1,
        ("contiguouskv_expired_total",): 0,
        ("contiguouskv_quarantines_total",): 1,
        ("contiguouskv_recovered_total",): 0,
        ("contiguouskv_write_failures_total",): 1,
        ("contiguouskv_bytes_read_total",): 4096,  # Five chunks, neighbours in one page, which is read once.
        ("contiguouskv_bytes_written_total",): 2 * nbytes,
        ("contiguouskv_bytes", "host"): 0,
        ("contiguouskv_bytes", "device"): 0,
        ("contiguouskv_segments",): 1,
        ("contiguouskv_prefix_tokens",): 20,
        ("contiguouskv_segment_bytes",): stored,
        ("contiguouskv_quarantined_bytes",): stored,
        ("contiguouskv_max_disk_bytes",): 2 * stored + 4096,
    }


def test_expiry_is_counted(store_path: Path, registry: CollectorRegistry) -> None:
    with PrefixStore(store_path, ttl_s=0) as store:
        metrics.register(store, registry)
        write_prefix(store, some_tokens(8))
        store.gc()
        assert registry.get_sample_value("contiguouskv_expired_total") == 1
        assert registry.get_sample_value("contiguouskv_segments") == 0
        assert registry.get_sample_value("contiguouskv_max_disk_bytes") is None


def test_several_stores_share_a_registry(tmp_path: Path, registry: CollectorRegistry) -> None:
    with PrefixStore(tmp_path / "a") as a, PrefixStore(tmp_path / "b") as b:
        first = metrics.register(a, registry, {"store": "a", "team": "x"})
        metrics.register(b, registry, {"team": "y", "store": "b"})
        write_prefix(b, some_tokens(8))
        seen = samples(registry)
        assert (seen["contiguouskv_segments", "a", "x"], seen["contiguouskv_segments", "b", "y"]) == (0, 1)
        # One family each: the text format allows its name only once.
        text = generate_latest(registry).decode()
        assert text.count("# TYPE contiguouskv_segments gauge") == 1
        for labels in (None, {"store": "c"}, {"store": "a", "team": "x"}):
            with pytest.raises(ConfigError, match="labels"):
                metrics.register(a, registry, labels)
        metrics.unregister(first, registry)
        assert ("contiguouskv_segments", "a", "x") not in samples(registry)
        assert ("contiguouskv_segments", "b", "y") in samples(registry)


@pytest.mark.parametrize("name", ["reason", "tier", "__name__", "a-b", "", "1a"])
def test_impossible_labels_are_refused(store_path: Path, registry: CollectorRegistry, name: str) -> None:
    with PrefixStore(store_path) as store, pytest.raises(ConfigError, match="label"):
        metrics.register(store, registry, {name: "x"})
    assert generate_latest(registry) == b""


def test_a_scrape_never_fails(store_path: Path, registry: CollectorRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    Counter("beside", "Of the application.", registry=registry).inc()
    store = PrefixStore(store_path)
    collector = metrics.register(store, registry)
    assert samples(registry)["contiguouskv_segments",] == 0
    with monkeypatch.context() as patch:
        patch.setattr(store.backend, "overhead_bytes", lambda: 1 / 0)
        assert [name for name, *_ in samples(registry)] == ["beside_total", "beside_created"]
    (store_path / "index.sqlite").write_bytes(b"nonsense" * 1000)
    assert samples(registry)["contiguouskv_segments",] == 0
    store.close()
    assert [name for name, *_ in samples(registry)] == ["beside_total", "beside_created"]
    # A closed store is in nobody's way.
    with PrefixStore(store_path) as again:
        metrics.register(again, registry)
        assert samples(registry)["contiguouskv_segments",] == 0
    metrics.unregister(collector, registry)


def test_unregister_frees_the_names(store_path: Path, registry: CollectorRegistry) -> None:
    with PrefixStore(store_path) as store:
        collector = metrics.register(store, registry)
        with pytest.raises(ValueError, match="contiguouskv_hits"):
            Counter("contiguouskv_hits", "Taken.", registry=registry)
        metrics.unregister(collector, registry)
        metrics.unregister(collector, registry)
        assert generate_latest(registry) == b""
        Counter("contiguouskv_hits", "Free again.", registry=registry)


def test_watching_does_not_keep_a_store_alive(store_path: Path, registry: CollectorRegistry) -> None:
    store = PrefixStore(store_path)
    collector = metrics.register(store, registry)
    assert collector.is_open
    del store
    gc.collect()
    assert not collector.is_open
    assert generate_latest(registry) == b""


def test_over_http(store_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with PrefixStore(store_path) as store:
        write_prefix(store, some_tokens(20))
        assert store.inner.lookup(FINGERPRINT, some_tokens(20), 4) is not None
        collector = metrics.register(store, labels={"store": "docs"})
        server, thread = start_http_server(port, "127.0.0.1", REGISTRY)
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
                seen = samples(answer.read())
        finally:
            server.shutdown()
            server.server_close()
            thread.join()
            metrics.unregister(collector)
    assert seen["contiguouskv_hits_total", "docs"] == 1
    assert seen["contiguouskv_prefix_tokens", "docs"] == 20


def test_without_the_library_the_message_names_the_extra(store_path: Path) -> None:
    program = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from hf_contiguouskv import PrefixStore, metrics\n"
        "try:\n    metrics.register(PrefixStore(sys.argv[1]))\n"
        "except ImportError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, store_path], capture_output=True, text=True, check=True)
    assert done.stdout == "metrics need prometheus_client: pip install 'hf-contiguouskv[metrics]'\n"
