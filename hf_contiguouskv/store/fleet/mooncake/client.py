"""A client of a Mooncake Store in this process, guarded: the package crashes or freezes a process that errs.

A call before the set-up, after the end or beside it is a segmentation fault; a set-up without a master holds Python's
global lock for seconds; a child process that calls waits for ever. None of this can be left to callers.
"""

from __future__ import annotations

import ctypes
import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

from ..breaker import CircuitBreaker
from ..engine import EngineUnavailableError
from .address import MooncakeAddress
from .arena import Arena
from .calls import Call, CallThreads
from .heads import PIECE
from .native import load

logger = logging.getLogger("hf_contiguouskv")

Result = TypeVar("Result")

# One byte of each owner is asked for first, into a slot of this size.
_CANARIES, _CANARY = 64, 4096
_READS, _WRITES = 8, 2
# For calls that this project does not make.
_LOCAL_BUFFER = 2**20
# How long closing waits for calls under way, and how long a set-up that failed is not repeated.
_CLOSE_S, _AGAIN_S = 10.0, 1.0
# So many owners are remembered.
_OWNERS = 4096
# No request begins with this, so a master that lives ends the connection.
_NO_REQUEST = bytes(64)


class MooncakeClient:
    """A client that is set up at the first call. It lends memory for as long as it lives.

    Args:
        address: of the master, and how much memory is lent.
        name: of the store, for messages.
        timeout_s: seconds that the master may take to answer at the set-up.

    Attributes:
        canaries, reads, writes: slots of memory that calls may use.

    Raises:
        StoreError: the package, or a system library, is missing.
    """

    def __init__(self, address: MooncakeAddress, name: str, timeout_s: float) -> None:
        self._module = load(name, timeout_s)
        self._address, self._name, self._timeout_s = address, name, timeout_s
        self._arena = Arena((_CANARIES, _CANARY), (_READS, PIECE), (_WRITES, PIECE))
        self.canaries, self.reads, self.writes = self._arena.kinds
        self._threads = CallThreads("contiguouskv-mooncake")
        self._setting_up = threading.Lock()
        self._store: Any = None
        self._failed: tuple[float, str] | None = None
        self._pid = os.getpid()
        self._owners_lock = threading.Lock()
        self._owners: dict[str, CircuitBreaker] = {}

    @property
    def is_of_a_parent(self) -> bool:
        """Whether this process was forked from the one that has the client."""
        return self._pid != os.getpid()

    def start(self, function: Callable[[Any], Result], release: Callable[[], object] = lambda: None) -> Call[Result]:
        """Begin a call in a thread of its own.

        Args:
            function: is given the package's `MooncakeDistributedStore`.
            release: as for `CallThreads.start`.

        Raises:
            EngineUnavailableError: this process is a fork, the client was closed, or too many calls hang. `Call.wait`
                raises it where the set-up fails.
        """
        if self.is_of_a_parent:
            release()
            raise EngineUnavailableError("this process was forked after the store was opened")
        return self._threads.start(lambda: function(self._ready()), release)

    def config(self, group: str | None = None, count: int = 0) -> Any:
        """How objects are stored.

        Args:
            group: objects of one group are kept and evicted together, as far as the master can.
            count: of the objects.
        """
        config = self._module.ReplicateConfig()
        if group is not None:
            config.group_ids = [group] * count
        return config

    def owner(self, endpoint: str) -> CircuitBreaker:
        """The circuit breaker of a machine that lends memory: one that hangs must not stop reads from the others."""
        with self._owners_lock:
            if endpoint not in self._owners:
                if len(self._owners) >= _OWNERS:
                    self._owners.clear()
                self._owners[endpoint] = CircuitBreaker(f"{self._name} (memory of {endpoint})", self._timeout_s)
            return self._owners[endpoint]

    def close(self) -> None:
        """End the client, and take the memory back. Calls under way are waited for.

        A client whose calls do not end is left as it is, since ending it would be a crash. Python's global lock is held
        for one to two seconds.
        """
        if self.is_of_a_parent:
            return
        if not self._threads.close(_CLOSE_S):
            logger.warning("%s: calls have not returned, so the client is left until the process ends", self._name)
            return
        store, self._store = self._store, None
        if store is not None:
            store.close()
            ctypes.pythonapi.Py_DecRef(ctypes.py_object(store))

    def _ready(self) -> Any:
        with self._setting_up:
            if self._store is None:
                if self._failed is not None and time.monotonic() < self._failed[0]:
                    raise EngineUnavailableError(self._failed[1])
                try:
                    self._store = self._set_up()
                except EngineUnavailableError as error:
                    self._failed = (time.monotonic() + _AGAIN_S, str(error.strerror))
                    raise
            return self._store

    def _set_up(self) -> Any:
        address = self._address
        own = address.host or _own_address(address)
        _require_answer(address, self._timeout_s)
        store = self._module.MooncakeDistributedStore()
        master = f"{address.master}:{address.port}"
        code = store.setup(own, "P2PHANDSHAKE", address.segment_bytes, _LOCAL_BUFFER, "tcp", "", master)
        if code == 0:
            code = store.register_buffer(self._arena.address, self._arena.nbytes)
        if code != 0:
            store.close()
            raise EngineUnavailableError(f"the client could not be set up ({code})")
        # (It must not be destroyed as long as it is open: not in a child process, which has a copy of it, and not at
        # the end of the interpreter, where calls may be under way.)
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(store))
        return store


def _own_address(address: MooncakeAddress) -> str:
    """The address of this machine on the way to the master. Nothing is sent."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
            one.connect((address.master, address.port))
            own: str = one.getsockname()[0]
    except OSError as error:
        raise EngineUnavailableError(f"no way leads to the master: {error}") from None
    return own


def _require_answer(address: MooncakeAddress, seconds: float) -> None:
    """Find out whether the master lives, without the package: it would hold Python's global lock until it gives up."""
    until = time.monotonic() + seconds
    try:
        with socket.create_connection((address.master, address.port), seconds) as connection:
            connection.sendall(_NO_REQUEST)
            connection.settimeout(max(0.01, until - time.monotonic()))
            connection.recv(1)
    except ConnectionResetError:
        return  # (It ends the connection with bytes unread.)
    except OSError as error:
        raise EngineUnavailableError(f"the master does not answer: {error}") from None


_shared_lock = threading.Lock()
_shared: dict[MooncakeAddress, tuple[MooncakeClient, int]] = {}


def _place(address: MooncakeAddress) -> MooncakeAddress:
    """What stores of one client have in common."""
    return MooncakeAddress(address.master, address.port, "", address.segment_bytes, address.host)


def acquire(address: MooncakeAddress, name: str, timeout_s: float) -> MooncakeClient:
    """The client of this process for a master; one for all its stores, so that memory is lent once.

    Raises:
        StoreError: the package, or a system library, is missing, or this process is a fork.
    """
    load(name, timeout_s)
    with _shared_lock:
        client, users = _shared.get(_place(address), (None, 0))
        if client is None:
            client = MooncakeClient(address, name, timeout_s)
        _shared[_place(address)] = (client, users + 1)
    return client


def release(address: MooncakeAddress, client: MooncakeClient) -> None:
    """Undo `acquire`; the last one who does closes the client."""
    if client.is_of_a_parent:
        return
    with _shared_lock:
        found, users = _shared[_place(address)]
        if users > 1:
            _shared[_place(address)] = (found, users - 1)
            return
        del _shared[_place(address)]
    client.close()
