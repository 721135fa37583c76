"""What one open store is made of."""

from __future__ import annotations

from dataclasses import dataclass

from ..stats import StoreCounters
from .backend import SegmentBackend
from .directory import Directory
from .folder import Pins
from .index import StoreIndex
from .key import StoreKey
from .opened import OpenSegments
from .segment import SegmentOpener
from .tenant import Tenant
from .uses import PendingUses


@dataclass(frozen=True)
class StoreParts:
    """The parts that finding, publishing and eviction share. `PrefixStore` makes them once, when it is opened.

    Attributes:
        folder: holds the index and the pins.
        backend: holds the segments.
        index: which segments there are, and which tokens they hold.
        opened: the segments that stay open.
        opener: makes a segment of an open blob; knows the key.
        pins: keys of the segments that eviction leaves alone, whether they are stored or not.
        tenant: whose segments this object regards.
        key: secret that the segments are made with; `None`: there is none.
        counters: what this object did since it was opened.
        uses: uses of segments that the index does not know yet.
    """

    folder: Directory
    backend: SegmentBackend
    index: StoreIndex
    opened: OpenSegments
    opener: SegmentOpener
    pins: Pins
    tenant: Tenant
    key: StoreKey | None
    counters: StoreCounters
    uses: PendingUses
