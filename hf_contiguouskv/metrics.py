"""Statistics of stores for Prometheus. Needs the extra `metrics` (`pip install 'hf-contiguouskv[metrics]'`).

    from prometheus_client import start_http_server
    from hf_contiguouskv import PrefixStore, metrics

    store = PrefixStore("kv-store")
    metrics.register(store)
    start_http_server(9400)

Numbers are read when Prometheus scrapes, so requests do no extra work for them. Counters count what this process did;
gauges show what the folder holds.
"""

from __future__ import annotations

import logging
import re
import threading
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from .errors import ConfigError
from .stats import StoreStats
from .store import PrefixStore
from .wording import encodable, quoted

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.core import Metric

__all__ = ["StoreCollector", "register", "unregister"]

logger = logging.getLogger("hf_contiguouskv")

_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")
_OWN_LABELS = ("reason", "tier")

# Field of `StoreStats`, name of the metric family, help text.
_COUNTERS = (
    ("hits", "contiguouskv_hits", "Look-ups of requests that found at least one token."),
    ("tokens_found", "contiguouskv_tokens_found", "Tokens that look-ups found."),
    ("tokens_asked", "contiguouskv_tokens_asked", "Tokens that were looked up."),
    ("published", "contiguouskv_published", "Segments that were stored."),
    ("evicted", "contiguouskv_evictions", "Segments that made room for others."),
    ("expired", "contiguouskv_expired", "Segments removed because they were unused for ttl_s."),
    ("quarantined", "contiguouskv_quarantines", "Damaged segments taken out of service."),
    ("recovered", "contiguouskv_recovered", "Requests that met damage and recomputed the lost tokens."),
    ("write_failures", "contiguouskv_write_failures", "Prefixes that could not be stored."),
    ("bytes_read", "contiguouskv_bytes_read", "Bytes read from segments, page rounding included."),
    ("bytes_written", "contiguouskv_bytes_written", "Bytes of the segments that were stored."),
)
_GAUGES = (
    ("segments", "contiguouskv_segments", "Segments that are stored."),
    ("prefix_tokens", "contiguouskv_prefix_tokens", "Tokens that stored segments hold."),
    ("segment_bytes", "contiguouskv_segment_bytes", "Bytes of stored segments; max_disk_bytes bounds this."),
    ("quarantined_bytes", "contiguouskv_quarantined_bytes", "Bytes of damaged segments that are kept for inspection."),
)
_REMOTE = (
    ("asked", "contiguouskv_remote_lookups", "Look-ups that asked a shared store."),
    ("asked_us", "contiguouskv_remote_lookup_microseconds", "Time that look-ups in a shared store took."),
    ("found", "contiguouskv_remote_hits", "Look-ups in a shared store that brought more."),
    ("failures", "contiguouskv_remote_failures", "Look-ups that a shared store did not answer."),
    ("reads", "contiguouskv_remote_reads", "Reads from a shared store."),
    ("bytes_read", "contiguouskv_remote_bytes_read", "Bytes that were read from a shared store."),
    ("read_us", "contiguouskv_remote_read_microseconds", "Time that reads from a shared store took."),
    ("missing", "contiguouskv_remote_missing", "Segments that turned out to be gone from a shared store."),
    ("damaged", "contiguouskv_remote_damaged", "Segments of a shared store whose bytes were wrong."),
    ("published", "contiguouskv_remote_published", "Segments that were sent to a shared store."),
    ("published_by_others", "contiguouskv_remote_published_by_others", "Segments that another machine had sent."),
    ("withheld", "contiguouskv_remote_withheld", "Segments that were not sent: deleted for all machines before."),
    ("send_failures", "contiguouskv_remote_send_failures", "Segments that could not be sent."),
    ("gets", "contiguouskv_remote_gets", "Requests to object storage that read."),
    ("lists", "contiguouskv_remote_lists", "Requests to object storage that list."),
    ("puts", "contiguouskv_remote_puts", "Requests to object storage that write."),
)
_TIERS = (("disk_bytes", "disk"), ("host_bytes", "host"), ("device_bytes", "device"))


class StoreCollector:
    """The metrics of one store, as a Prometheus collector. It does not keep the store open.

    Args:
        store: the store to report on.
        labels: labels on every sample; they distinguish stores that share a registry.

    Raises:
        ConfigError: a label has a name that Prometheus does not accept, or that this library uses itself.
        ImportError: the extra `metrics` is not installed.
    """

    def __init__(self, store: PrefixStore, labels: Mapping[str, str] | None = None) -> None:
        _require_library()
        # (A path may hold bytes that are not text, and one such label would fail the scrape of the whole process.)
        self.labels = {name: encodable(str(value)) for name, value in (labels or {}).items()}
        for name in self.labels:
            if not isinstance(name, str) or not _LABEL.fullmatch(name) or name in _OWN_LABELS:
                raise ConfigError(f"{quoted(name)} cannot be the name of a label")
        self._store = weakref.ref(store)

    @property
    def is_open(self) -> bool:
        """Whether the store still exists and is open."""
        store = self._store()
        return store is not None and not store.is_closed

    def collect(self) -> Iterable[Metric]:
        """Called by the registry at every scrape. Never raises; a closed store has no metrics."""
        return _families([self])

    def stats(self) -> tuple[StoreStats, int | None] | None:
        """The current numbers and the bound on `segment_bytes`; `None` if the store is closed or unreadable."""
        store = self._store()
        if store is None or store.is_closed:
            return None
        try:
            return store.stats, store.max_disk_bytes
        except Exception as error:
            # Whatever failed (the store was closed, the disk is gone), the scrape must return the other metrics.
            logger.warning("no metrics of %s: %s: %s", store.path, type(error).__name__, error)
            return None


class _Registered:
    """All stores of one registry. They share metric families, because the text format allows each family only once."""

    def __init__(self) -> None:
        self.collectors: list[StoreCollector] = []

    def describe(self) -> Iterable[Metric]:
        return _families([], empty=True)

    def collect(self) -> Iterable[Metric]:
        return _families(list(self.collectors))


_registries: weakref.WeakKeyDictionary[CollectorRegistry, _Registered] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def register(
    store: PrefixStore, registry: CollectorRegistry | None = None, labels: Mapping[str, str] | None = None
) -> StoreCollector:
    """Make a registry report on a store until `unregister`, or until the store is closed.

    Args:
        store: the store to report on.
        registry: `None` for prometheus_client's default, which `start_http_server` and `make_asgi_app` serve.
        labels: labels on every sample. Several stores in one registry need the same label names with different values.

    Raises:
        ConfigError: labels are missing, equal another store's, or have invalid names.
        ImportError: the extra `metrics` is not installed.
        ValueError: the registry has other metrics with these names.
    """
    collector = StoreCollector(store, labels)
    registry = _registry(registry)
    with _lock:
        shared = _registries.get(registry)
        if shared is None:
            shared = _Registered()
            registry.register(shared)
            _registries[registry] = shared
        shared.collectors = [other for other in shared.collectors if other.is_open]
        for other in shared.collectors:
            if other.labels.keys() != collector.labels.keys() or other.labels == collector.labels:
                raise ConfigError(
                    f"this registry reports on a store with labels {other.labels} already: give labels with the same "
                    f"names and other values, got {collector.labels}"
                )
        shared.collectors.append(collector)
    return collector


def unregister(collector: StoreCollector, registry: CollectorRegistry | None = None) -> None:
    """Undo `register`; does nothing if it was already undone.

    Args:
        collector: the result of `register`.
        registry: the registry passed to `register`; `None` for prometheus_client's default.
    """
    registry = _registry(registry)
    with _lock:
        shared = _registries.get(registry)
        if shared is None or collector not in shared.collectors:
            return
        shared.collectors.remove(collector)
        if not shared.collectors:
            registry.unregister(shared)
            del _registries[registry]


def _families(collectors: list[StoreCollector], *, empty: bool = False) -> list[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    found = [(collector.labels, numbers) for collector in collectors if (numbers := collector.stats()) is not None]
    if not found and not empty:
        return []
    own = list(found[0][0]) if found else []
    # (The labels of all stores have the same names, but their order may differ.)
    stores = [([labels[name] for name in own], stats, bound) for labels, (stats, bound) in found]

    misses = CounterMetricFamily(
        "contiguouskv_misses", "Look-ups that found nothing, by reason.", labels=[*own, "reason"]
    )
    passed_over = CounterMetricFamily(
        "contiguouskv_passed_over",
        "Prompts that automatic mode could not serve from the store or could not store, by reason.",
        labels=[*own, "reason"],
    )
    tiers = GaugeMetricFamily(
        "contiguouskv_bytes", "Bytes that a store takes up, by tier (disk: the whole folder).", labels=[*own, "tier"]
    )
    bounds = GaugeMetricFamily(
        "contiguouskv_max_disk_bytes", "The bound on segment_bytes, where there is one.", labels=own
    )
    families: list[Metric] = [misses, passed_over, tiers, bounds]
    for values, stats, bound in stores:
        for reason, count in stats.misses.items():
            misses.add_metric([*values, encodable(reason)], count)
        for reason, count in stats.passed_over.items():
            passed_over.add_metric([*values, encodable(reason)], count)
        for field, tier in _TIERS:
            tiers.add_metric([*values, tier], getattr(stats, field))
        if bound is not None:
            bounds.add_metric(values, bound)
    for kind, listed in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES)):
        for field, name, text in listed:
            family = kind(name, text, labels=own)
            for values, stats, _ in stores:
                family.add_metric(values, getattr(stats, field))
            families.append(family)
    shared = [(values, stats.remote) for values, stats, _ in stores if stats.remote]
    for what, name, text in _REMOTE if shared else ():
        family = CounterMetricFamily(name, text, labels=own)
        for values, remote in shared:
            family.add_metric(values, remote[what])
        families.append(family)
    return families


def _registry(registry: CollectorRegistry | None) -> CollectorRegistry:
    _require_library()
    from prometheus_client import REGISTRY

    return REGISTRY if registry is None else registry


def _require_library() -> None:
    try:
        import prometheus_client  # noqa: F401
    except ImportError as error:
        raise ImportError(
            "metrics need prometheus_client: pip install 'hf-contiguouskv[metrics]'", name="prometheus_client"
        ) from error
