"""What `budget="auto"` knows of the network: which part of a prefix must cross it, and how fast it is."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import StoreError
from ..store.attached_prefix import AttachedPrefix
from ..store.entries import SegmentSpan
from ..store.fleet.cached_blob import CachedBlob
from ..store.fleet.fleet import Fleet
from ..store.fleet.link import TELLING_BYTES, Link
from ..store.inner import StoreInner
from .read_plan import WORTH_READING_BYTES, ChoosingCost, ReadPlan

# Where nothing was read yet, so much is read to find out, and then more while that takes hardly any time.
FIRST_READS, QUICK_S = (256 * 1024, 2 * 2**20, 8 * 2**20), 0.05
# A link that is slow rather than fast: assumed where so little is not on this machine that nothing can be measured.
SLOW = Link(10e6, 0.05)
# A usual link between machines of a data centre: assumed for what to read until enough was read to tell more, by this
# process or an earlier one.
USUAL = Link(125e6, 0.005)
# Short reads that are under way at once (`store.fleet.cached_blob`), and seconds of processor time that each takes here
# (measured: docs/fleet.md).
SIDE_BY_SIDE, REQUEST_S = 64, 0.001
# Requests for each chosen chunk: neighbours are read together (measured: docs/fleet.md).
REQUESTS_PER_CHUNK = 0.25


@dataclass(frozen=True)
class Network:
    """The way to the shared store behind a store.

    Attributes:
        bytes_per_s: that cross it.
        round_trip_s: seconds until a short read has been answered.
    """

    bytes_per_s: float
    round_trip_s: float = 0.0

    @property
    def worth_reading_bytes(self) -> int:
        """Bytes that cross in the time that one more read costs: many reads share a round trip."""
        return max(WORTH_READING_BYTES, int(self.bytes_per_s * self.round_trip_s / SIDE_BY_SIDE))

    @property
    def choosing(self) -> ChoosingCost:
        """See `ReadPlan`."""
        per_chunk = self.bytes_per_s * REQUEST_S * REQUESTS_PER_CHUNK
        in_a_trip = int(self.bytes_per_s * self.round_trip_s)
        # (Twice as much: the next reads are asked for while these arrive.)
        return ChoosingCost(int(per_chunk), in_a_trip, in_flight=2 * in_a_trip)

    def seconds(self, reads: ReadPlan, away: float) -> float:
        """Seconds that a request waits for the network.

        Args:
            reads: what it reads.
            away: share of that which is not on this machine.
        """
        if not away:
            return 0.0
        # (However little is missing wherever chunks are chosen, it takes a round trip.)
        return away * reads.bytes_to_read(self.worth_reading_bytes) / self.bytes_per_s + reads.waits * self.round_trip_s

    def __str__(self) -> str:
        return f"{self.bytes_per_s / 1e6:,.3g} MB/s over the network, {self.round_trip_s * 1e3:,.0f} ms per round trip"


def away_share(reads: ReadPlan) -> float:
    """The share of what a request may read that is not on this machine, in [0, 1].

    Of chunks and keys, in the form in which the request reads them; which chunks it chooses is not known yet.
    """
    total = away = 0
    for span, served in zip(reads.prefix.spans, reads.served.spans, strict=True):
        for begin, end in _regions(served, reads):
            total += end - begin
            blob = span.segment.blob
            if isinstance(blob, CachedBlob):
                away += blob.away_bytes(begin, end)
    return away / total if total else 0.0


def _regions(span: SegmentSpan, reads: ReadPlan) -> list[tuple[int, int]]:
    """Ranges of a segment's bytes in which what is read of it lies."""
    segment = span.segment
    layers = reads.layers.full_layers if reads.in_few_bits else list(range(len(reads.layers.windows)))
    extents = segment.extents(reads.served.form)
    ends = [extents.offset(layer, segment.num_chunks - 1) + extents.nbytes for layer in layers]
    found = [(min(extents.starts[layer] for layer in layers), max(ends))] if layers else []
    names = [name for layer in reads.key_layers for name in reads.key_tensors(segment, layer)]
    return found + [(begin, begin + nbytes) for begin, nbytes in map(segment.tensor_extent, names)]


def is_away(prefix: AttachedPrefix) -> bool:
    """Whether a part of a prefix is not on this machine."""
    blobs = (span.segment.blob for span in prefix.spans)
    return any(isinstance(blob, CachedBlob) and blob.away_bytes(0, blob.nbytes) for blob in blobs)


def network_to(store: StoreInner, prefix: AttachedPrefix) -> Network | None:
    """The network that a request on `prefix` reads over; `None`: all of the prefix is on this machine.

    Its speeds are a running estimate from what this store has read. Where it has read too little, a first small part of
    the prefix is read now; it is kept.

    Raises:
        StoreError: that cannot be read.
    """
    if store.fleet is None or not is_away(prefix):
        return None
    link = store.fleet.link.estimate() or _first_estimate(store.fleet, prefix)
    return Network(link.bytes_per_s, link.round_trip_s)


def network_cost(store: StoreInner, prefix: AttachedPrefix) -> ChoosingCost | None:
    """What chunks by name cost over the network, by what is known of it; `None`: all of the prefix is on this
    machine."""
    if store.fleet is None or not is_away(prefix):
        return None
    link = store.fleet.link.estimate(TELLING_BYTES) or USUAL
    return Network(link.bytes_per_s, link.round_trip_s).choosing


def _first_estimate(fleet: Fleet, prefix: AttachedPrefix) -> Link:
    blobs = [span.segment.blob for span in prefix.spans]
    blob = max(
        (blob for blob in blobs if isinstance(blob, CachedBlob)), key=lambda blob: blob.away_bytes(0, blob.nbytes)
    )
    deadline = fleet.deadline()
    for nbytes in FIRST_READS:
        begin, end = blob.first_away(nbytes)
        try:
            with deadline.applied():
                blob.read_into([(begin, memoryview(bytearray(end - begin)))])
        except (OSError, EOFError) as error:
            if deadline.has_passed:
                return Link((end - begin) / fleet.look_up_s, 0.0)  # (It is slower than this.)
            raise StoreError(f"{blob.name}: {getattr(error, 'strerror', None) or error}") from error
        link = fleet.link.estimate()
        if end - begin < nbytes or (link is not None and nbytes / link.bytes_per_s > QUICK_S):
            break
    return fleet.link.estimate() or SLOW
