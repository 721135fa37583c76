"""The side of a store that faces the fleet: look-ups in the shared store, sending, and books of what is kept here."""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Sequence

from ...errors import StoreError
from ..parts import StoreParts
from ..room import Room
from ..rows import SegmentRow, set_stored_bytes
from ..speeds import note_speeds, noted_speeds
from ..tenant import Tenant
from ..verification import in_words, segment_problems
from .backend import FleetBackend
from .breaker import CircuitBreaker
from .catalog import Catalog
from .deadline import Deadline, seconds_left
from .discovery import Discovery
from .engine import DeadlineError, EngineUnavailableError, SharedEngine
from .link import TELLING_BYTES, Link
from .names import SharedSegment
from .sending import Sender
from .upkeep import SharedUpkeep

logger = logging.getLogger("hf_contiguouskv")

# The shared store is asked for a prompt that lacks so many tokens: fewer are computed sooner than an answer comes.
ASK_FROM_TOKENS = 256
# How often a machine leaves word that it uses a segment, and how often it counts what it keeps.
_NOTE_USE_S, _SETTLE_S = 3600.0, 1.0
# How often it looks whether a segment that it uses is still in a volatile shared store.
_LOOK_S = 60.0
_REMEMBERED = 10_000


class Fleet:
    """What a store on this machine asks of the shared store behind it. Nothing here fails a request.

    Args:
        engine: holds the shared store.
        backend: of the store on this machine.
        parts: of that store.
        room: evicts when it takes up too much.
        submit: runs a function in the background.
        look_up_s: seconds that one look-up may wait for the shared store, all its calls together.

    Attributes:
        engine, look_up_s: as passed.
        catalog: of the shared store.
        link: how fast the shared store has been read.
    """

    def __init__(
        self,
        engine: SharedEngine,
        backend: FleetBackend,
        parts: StoreParts,
        room: Room,
        submit: Callable[[Callable[[], object]], None],
        look_up_s: float,
    ) -> None:
        self.engine = engine
        self.catalog = Catalog(engine)
        self.link = backend.link
        noted = noted_speeds(parts.index, "link")
        self.link.known = None if noted is None else Link(*noted)
        self._backend, self._parts, self._room, self._submit = backend, parts, room, submit
        self._discovery = Discovery(parts, backend, self.catalog)
        self._sender = Sender(parts, backend, self.catalog, parts.counters.add)
        self.look_up_s = look_up_s
        # (An engine that answers each call, but not a whole look-up in time, would cost each request all of that time.)
        self._look_ups = CircuitBreaker(f"{engine.name} (look-ups)", look_up_s)
        self._lock = threading.Lock()
        self._settled_s = time.monotonic()
        self._used: dict[str, float] = {}
        backend.on_fetched = self._fetched
        backend.on_missing = self._missing
        backend.on_damaged = self._damaged

    def upkeep(self, tenant: Tenant) -> SharedUpkeep:
        """What looks after the shared store as a whole.

        Args:
            tenant: who asks.
        """
        return SharedUpkeep(self.catalog, self._backend, tenant, self._parts.opener)

    def begin(self, create: bool) -> None:
        """Check the shared store, and send what an earlier process could not.

        Args:
            create: make the shared store where there is none; else nothing is written to it now.

        Raises:
            StoreError: it is none, of another format, or refuses this machine. Where it does not answer, a warning is
                logged, and the store works with what this machine has.
        """
        try:
            self.catalog.prepare(create)
        except EngineUnavailableError as error:
            logger.warning("%s cannot be asked now, the store goes on without it: %s", self.engine.name, error)
        except OSError as error:
            raise StoreError(f"{self.engine.name}: {error.strerror or error}") from error
        if create:
            self._sender.submit_unsent()

    def deadline(self) -> Deadline:
        """The deadline of a look-up that begins now."""
        return Deadline(self.look_up_s)

    def seek(self, hashes: Sequence[bytes], chunk_size: int, found_tokens: int) -> bool:
        """Ask the shared store for more of a prompt than this machine has; whether the index knows more now.

        It ends by the deadline of the context. What was found until then is used.

        Args:
            hashes: of the whole chunks of the prompt.
            chunk_size: tokens per chunk.
            found_tokens: tokens of it that this machine has.
        """
        self._sender.nudge()
        have = found_tokens // chunk_size
        if (len(hashes) - have) * chunk_size < ASK_FROM_TOKENS:
            return False
        counters = self._parts.counters
        counters.add("remote.asked")
        began = time.perf_counter()
        try:
            found = self._seek_in_time(hashes, chunk_size, have)
        except Exception as error:
            # (Whatever names and headers from elsewhere make a parser raise: the request goes on without them.)
            report = logger.debug if isinstance(error, OSError | StoreError) else logger.warning
            report("%s was not asked: %s: %s", self.engine.name, type(error).__name__, error)
            counters.add("remote.failures")
            return False
        finally:
            counters.add("remote.asked_us", round(1e6 * (time.perf_counter() - began)))
        if found:
            counters.add("remote.found")
        return found

    def _seek_in_time(self, hashes: Sequence[bytes], chunk_size: int, have: int) -> bool:
        """As `Discovery.seek`; look-ups pause after one that found nothing because its time was over.

        Raises:
            DeadlineError: its time was over before anything was found.
            OSError: the engine failed, or look-ups pause.
            StoreError: the index cannot be written.
        """
        self._look_ups.enter(seconds_left())
        try:
            found = self._discovery.seek(hashes, chunk_size, have)
            if not found and seconds_left() <= 0:
                raise DeadlineError(f"{self.engine.name}: nothing was found within {self.look_up_s:g} s")
        except DeadlineError as error:
            self._look_ups.failed(error.strerror)
            raise
        except Exception:
            self._look_ups.succeeded()  # (What else failed is the engine's own breaker's concern.)
            raise
        except BaseException:
            self._look_ups.gave_up()
            raise
        self._look_ups.succeeded()
        return found

    def whole(self, rows: Iterable[SegmentRow]) -> list[SegmentRow]:
        """Those of some segments that lie on this machine as a whole."""
        return [row for row in rows if self._backend.local.identity(row.key) is not None]

    def note_use(self, keys: Iterable[str]) -> None:
        """Segments were looked up: word of it is left in the shared store, at most once an hour for each.

        In a volatile one, which forgets, what this machine has of them is sent again if it is not there any more.
        """
        now, pause = time.monotonic(), _LOOK_S if self.engine.is_volatile else _NOTE_USE_S
        with self._lock:
            if len(self._used) > _REMEMBERED:
                self._used.clear()
            due = [key for key in keys if now - self._used.get(key, -pause) >= pause]
            self._used |= dict.fromkeys(due, now)
        if due:
            self._submit(lambda: self._leave_word(due))

    def _leave_word(self, keys: list[str]) -> None:
        try:
            self.catalog.note_use(keys)
            if self.engine.is_volatile:
                self._send_again(keys)
        except (OSError, StoreError) as error:
            logger.debug("no word of use was left in %s: %s", self.engine.name, error)

    def _send_again(self, keys: list[str]) -> None:
        for key in keys:
            if self._backend.local.identity(key) is not None and not self.catalog.holds(key):
                self._sender.submit(key)

    def send(self, key: str) -> None:
        """Send a segment that was just stored, in the background."""
        self._sender.submit(key)

    def flush(self) -> bool:
        """Wait until all that this machine has was sent, or could not be; whether anything still had to."""
        waited = self._sender.flush()
        self.settle()
        return waited

    @property
    def waiting(self) -> int:
        """Segments that were not sent yet."""
        return self._sender.waiting

    def finish(self) -> None:
        """Try once more to send what is left, count what is kept, and note how fast the network is. Reads go on."""
        self._sender.close()
        self.settle()
        found = self.link.measured(TELLING_BYTES)
        if found is not None:
            note_speeds(self._parts.index, "link", found.bytes_per_s, found.round_trip_s)

    def close(self) -> None:
        """Let go of the engine, once nobody reads from it any more."""
        self.engine.close()

    # -- told by the backend ----------------------------------------------------------------------------------------

    def _fetched(self, nbytes: int, seconds: float) -> None:
        counters = self._parts.counters
        counters.add("remote.bytes_read", nbytes)
        counters.add("remote.reads")
        counters.add("remote.read_us", round(1e6 * seconds))
        with self._lock:
            now = time.monotonic()
            if now - self._settled_s < _SETTLE_S:
                return
            self._settled_s = now
        self._submit(self.settle)

    def _missing(self, segment: SharedSegment) -> None:
        logger.warning("segment %s is not in %s any more", segment.key, self.engine.name)
        self._parts.counters.add("remote.missing")

    def _damaged(self, segment: SharedSegment) -> None:
        self._sender.run(lambda: self._look_again(segment))

    def _look_again(self, segment: SharedSegment) -> None:
        """Find out whether it was the shared store's bytes that were wrong, or what was kept of them here."""
        blob = self._backend.open_uncached(segment)
        try:
            problems = segment_problems(self._parts.opener(blob), segment.key)
        except Exception as error:
            problems = [in_words(segment.key, error)]
        if blob.was_unreachable:
            return  # (That says nothing of its bytes.)
        if not problems:
            return
        logger.warning("%s: %s", self.engine.name, problems[0])
        self._parts.counters.add("remote.damaged")
        self._backend.records.refuse(segment.key, segment.upload)
        self._backend.records.forget_sent([segment.key])
        try:
            self.catalog.report_damage(segment.key, segment.upload)
        except OSError as error:
            logger.debug("no word of damage was left in %s: %s", self.engine.name, error)
        self._sender.submit_unsent()

    # -- what is kept here ------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """Count what is kept here of segments of the shared store, and evict where it is too much."""
        keys = self._backend.settle_ranges()
        stored = {key: self._backend.kept_bytes(key) for key in keys}

        def change(db: sqlite3.Connection) -> None:
            for key, nbytes in stored.items():
                if self._backend.local.identity(key) is None:  # (It may have been stored here meanwhile.)
                    set_stored_bytes(db, key, nbytes)

        try:
            if stored:
                self._parts.index.write(change)
                for key, nbytes in stored.items():
                    self._backend.records.set_stored(key, nbytes)
            if not self._room.is_within_bound():
                self._room.evict_excess()
        except (StoreError, OSError) as error:
            logger.warning("what is kept of %s could not be counted: %s", self.engine.name, error)
