"""`PrefixStore`: prefixes on disk, found by their token ids."""

from __future__ import annotations

import logging
import os
import re
import sqlite3
from functools import partial
from numbers import Real
from typing import Any

from ..config import ContiguousKVConfig
from ..errors import ConfigError, StoreError
from ..memory import EvictionPolicy, MemoryTiers
from ..model.fingerprint import model_fingerprint
from ..stats import StoreCounters
from ..wording import quoted
from .backend import SegmentBackend
from .entries import SegmentSpan, StoredPrefix
from .fleet.backend import FleetBackend
from .fleet.engine import SharedEngine
from .fleet.engines import address_for_key, default_folder, engine_for, is_address
from .fleet.fleet import Fleet
from .fleet.records import Records
from .fleet.upkeep import SharedUpkeep
from .folder import Pins, open_folder
from .hashing import as_token_ids
from .index import StoreIndex
from .inner import StoreInner
from .key import KeySource, StoreKey
from .local_disk import LocalDisk
from .maintenance import index_segments
from .open_stores import OpenStores
from .opened import OpenSegments
from .parts import StoreParts
from .segment import Segment, SegmentOpener
from .tenant import Tenant
from .totals import stored_models
from .upkeep import Upkeep
from .uses import PendingUses

__all__ = ["PrefixStore", "SegmentSpan", "StoredPrefix"]

logger = logging.getLogger("hf_contiguouskv")

# A look-up waits at most so long for a prompt that is being written and that it could use.
_WAIT_FOR_WRITE_S = 30.0


class PrefixStore(Upkeep):
    """A folder of stored prefixes, plus this process's memory for them.

    Cheap to open; safe to share between caches, threads and processes. A context manager.

    Attributes:
        path: the folder; of a shared store, that of this machine.
        url: address of the shared store, without what is secret in it; `None` for a folder.
        backend: where segments lie.
        max_disk_bytes: as passed.
        inner: what this library itself asks of the store; it may change in any release.

    Args:
        path: the folder. Missing: it is created, for this user only. It must be a store, or empty. Or the address of a
            store that many machines share (`s3://bucket/folder`, `gs://`, `az://`, `file://`: needs the extra
            `object`; `mooncake://master:port/folder`: needs the extra `mooncake`): what others stored is found there,
            what this machine stores is sent there, and what it uses is kept in a folder of its own.
        max_disk_bytes: bound on what all segments take up, those that are there already included; what is worth least
            makes room (`eviction.worth`), in the background when the store is opened. `None`: no bound.
        ttl_s: seconds after which a segment that nobody used is not found any more, and goes at the next `gc`; pinned
            ones stay. `None`: never.
        host_bytes: hard limit on what this process keeps in host memory for all prefixes and requests, buffers of
            reads under way included; 0: disk only. Where attention runs on a CPU, this is the one tier there is, and
            up to an eighth of it is the memory that attention reads from, kept from one request to the next.
        device_bytes: the same for the memory of accelerators; several share it equally. `None`: a quarter of what is
            free on each when a model on it is first served. Where memory runs out, what is kept there gives way.
        eviction: which chunk goes first when memory is full: the name of one of `memory.POLICIES`, or a policy.
        salt: of a tenant, str or bytes. This object then finds, lists, counts, pins, deletes, exports and evicts only
            what was stored with the same salt, and `max_disk_bytes` bounds that alone. `None`: it finds what was stored
            without a salt, and looks after everything.
        create: whether a missing store may be created. Of a shared store: if not, nothing is sent when it is opened.
        direct: read past the operating system's page cache where the file system can.
        reader_threads: reads in flight at once.
        backend: where segments lie, if not in `path`; index and pins are in `path` all the same.
        key: a secret that those share who may put prefixes into the store: its bytes, a path or `"file:PATH"` of a file
            that holds it, or `"env:NAME"` of an environment variable. What was stored without it, or with another one,
            is not used. Without a key, anyone who can write to the store decides what is answered.
        trust_owner: accept a folder and files in it that other users of this machine own, or may write. They can read
            the prompts that are stored, and without a `key` choose what is answered.
        cache: of a shared store: the folder for what this machine keeps of it, which `max_disk_bytes` bounds. `None`:
            one below `~/.cache/contiguouskv`, or below the folder that the variable `CONTIGUOUSKV_CACHE` names.
        remote_timeout_s: of a shared store: seconds that one look-up waits for it, all its calls together; and seconds
            after which any other answer is not waited for any more. What was asked for is then computed, and the
            shared store is left alone for a while.

    Raises:
        StoreFormatError: `path` is something else than a store, or of another format than this library's.
        UntrustedOwnerError: neither this user nor root owns the folder, or others may write it, and not `trust_owner`.
        StoreError: the folder cannot be read or made.
        ConfigError: a bound is negative or no number, or the salt is neither str nor bytes, or empty.

    Examples:
        ```python
        with PrefixStore("kv-store", max_disk_bytes=50 * 2**30) as store:
            print(store.match(model, input_ids), store.entries())
        ```
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        max_disk_bytes: int | None = None,
        ttl_s: float | None = None,
        host_bytes: int = 2 * 2**30,
        device_bytes: int | None = None,
        eviction: str | EvictionPolicy = "expected-use",
        salt: str | bytes | None = None,
        create: bool = True,
        direct: bool = True,
        reader_threads: int = 8,
        backend: SegmentBackend | None = None,
        key: KeySource | None = None,
        trust_owner: bool = False,
        cache: str | os.PathLike[str] | None = None,
        remote_timeout_s: float = 10.0,
    ) -> None:
        bounds = {
            "max_disk_bytes": max_disk_bytes,
            "ttl_s": ttl_s,
            "host_bytes": host_bytes,
            "device_bytes": device_bytes,
        }
        for name, value in bounds.items():
            if value is not None:
                _require_bound(name, value)
        _require_bound("remote_timeout_s", remote_timeout_s)
        if not remote_timeout_s > 0:
            raise ConfigError(f"remote_timeout_s must be more than 0, got {remote_timeout_s}")
        tenant, secret = Tenant(salt), StoreKey.of(key)
        opener = partial(Segment, key=secret)
        engine = _engine(path, cache, backend, remote_timeout_s, secret)
        if engine is not None:
            path = default_folder(engine.name) if cache is None else cache
        try:
            folder = open_folder(path, create=create or engine is not None, trust_owner=trust_owner)
            self.path = folder.path
            self.url = None if engine is None else engine.name
            self.backend: SegmentBackend = LocalDisk(folder, direct=direct) if backend is None else backend
            if engine is not None:
                self.backend = FleetBackend(LocalDisk(folder, direct=direct), folder, engine, Records(folder))
        except OSError as error:
            raise StoreError(f"{path}: the store cannot be opened: {error}") from error
        self.max_disk_bytes = max_disk_bytes
        memory = MemoryTiers(host_bytes, device_bytes, eviction)
        pins = Pins(folder)

        # (None of the parts knows this object: in a circle, the collector would choose what ends first.)
        refill = partial(_refill, backend=self.backend, opener=opener, pins=pins, tenant=tenant)
        index = StoreIndex(folder, refill)
        parts = StoreParts(
            folder=folder,
            backend=self.backend,
            index=index,
            opened=OpenSegments(self.backend, opener, memory.forget),
            opener=opener,
            pins=pins,
            tenant=tenant,
            key=secret,
            counters=StoreCounters(),
            uses=PendingUses(index.write, ttl_s),
        )
        # (Last: `__del__` sees half-made stores too, and closes only those that have it.)
        self.inner = StoreInner(
            self.path, parts, memory, max_disk_bytes=max_disk_bytes, ttl_s=ttl_s, reader_threads=reader_threads
        )
        if engine is not None and isinstance(self.backend, FleetBackend):
            inner = self.inner
            inner.fleet = Fleet(
                engine, self.backend, parts, inner.room, inner.submit_background, look_up_s=remote_timeout_s
            )
            inner.publisher.on_published = inner.fleet.send
            try:
                inner.fleet.begin(create)
            except BaseException:
                inner.close()
                raise
        self._put_in_order()
        # A path alone says nothing of a tenant, so it must not lead to a tenant's store.
        _open_stores.add(self, by_path=tenant.is_operator)

    @property
    def has_key(self) -> bool:
        """Whether only what was stored with its key is used."""
        return self.inner.key is not None

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self.inner.is_closed

    @property
    def is_usable(self) -> bool:
        """Whether it is open, and its folder is still at its path."""
        return not self.is_closed and self.inner.parts.folder.is_in_place()

    @classmethod
    def shared(cls, path: str | os.PathLike[str]) -> PrefixStore:
        """The store that this process has open at `path` (the first, or the first with a key), or a new one.

        Args:
            path: of a folder, or the address of a shared store.
        """
        return _open_stores.at(default_folder(path) if is_address(path) else path, lambda: cls(path))

    def match(self, model: Any, input_ids: Any) -> int:
        """How many leading tokens of `input_ids` are stored for this very model; waits for what is being written.

        Args:
            model: a transformers model; its weights and configuration count, not its name.
            input_ids: int64 `[n]` or `[1, n]`.

        Raises:
            InputError: more than one row, or not integers.
        """
        ids = as_token_ids(input_ids.cpu() if hasattr(input_ids, "cpu") else input_ids)
        fingerprint = model_fingerprint(model)
        self.inner.wait_for_prompts(ids, 0)
        models = (*self.inner.read(stored_models), *self.inner.earlier.models)
        sizes = {size for model, size in models if model == fingerprint}
        if self.inner.fleet is not None:
            sizes.add(ContiguousKVConfig.chunk_size)  # (Other machines may have stored what this one has never seen.)
        found = (self.inner.lookup(fingerprint, ids, size, count=False) for size in sizes)
        return max((stored.tokens for stored in found if stored), default=0)

    @property
    def shared_upkeep(self) -> SharedUpkeep:
        """Of a shared store: lists, verifies and deletes for all machines. (The other methods are for this one alone.)

        Raises:
            StoreError: this is a store in a folder.
        """
        self.inner.require_open()
        if self.inner.fleet is None:
            raise StoreError(f"{self.path} is a store in a folder, not one that machines share")
        return self.inner.fleet.upkeep(self.inner.tenant)

    def flush(self) -> bool:
        """Wait until every prompt that caches have handed over is stored; whether any still had to be.

        Of a shared store: and until it was sent, or could not be.
        """
        return self.inner.flush()

    def close(self) -> None:
        """Finish background work, stop the threads and close the files. May be called more than once."""
        self.inner.close()

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "inner"):
            self.close()

    def __deepcopy__(self, memo: object) -> PrefixStore:
        # A copy of a cache reads from the same store.
        return self

    def __repr__(self) -> str:
        return f"PrefixStore({str(self.path)!r}{', closed' if self.is_closed else ''})"


def _refill(
    db: sqlite3.Connection, *, backend: SegmentBackend, opener: SegmentOpener, pins: Pins, tenant: Tenant
) -> None:
    """Fill an empty index from the segments."""
    index_segments(db, backend, opener, pins.keys(), tenant)


def _engine(
    place: str | os.PathLike[str],
    cache: str | os.PathLike[str] | None,
    backend: SegmentBackend | None,
    timeout_s: float,
    key: StoreKey | None,
) -> SharedEngine | None:
    """The engine of a shared store; `None` where `place` is a path."""
    if not is_address(place):
        if not isinstance(place, str) and re.match(r"[a-z0-9]+:/[^/]", os.fspath(place)):
            raise ConfigError(f"{place} was an address before it became a Path, which drops a slash: pass it as text")
        if cache is not None:
            raise ConfigError(f"cache={str(cache)!r} is for the address of a shared store, and {place} is a path")
        return None
    if backend is not None:
        raise ConfigError("backend= is for a store in a folder, not for the address of a shared store")
    return engine_for(address_for_key(place, None if key is None else key.public_name), timeout_s)


def _require_bound(name: str, value: object) -> None:
    # (A bool is a number to Python: `max_disk_bytes=True` would be a byte.)
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ConfigError(f"{name} must be a number or None, got {quoted(value)}")
    if not float(value) >= 0:
        raise ConfigError(f"{name} must be 0 or more, got {value}")


_open_stores: OpenStores[PrefixStore] = OpenStores()
