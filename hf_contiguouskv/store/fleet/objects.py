"""Object storage as an engine: S3, Google Cloud Storage, Azure and plain folders, through `obstore`.

Credentials, TLS and end points come from where each cloud's own tools look for them (environment variables, instance
metadata); nothing of them is kept, logged or put into a message here.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import math
import os
import re
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from ...errors import ConfigError, StoreError
from .breaker import CircuitBreaker
from .deadline import TELLING, TIME_IS_OVER, seconds_left
from .engine import DeadlineError, EngineUnavailableError, Fetched, ObjectInfo, Range
from .merging import Joined, join_ranges

if TYPE_CHECKING:
    from obstore import GetOptions
    from obstore.store import ObjectStore

Result = TypeVar("Result")
# The bytes of a range, and version and size of the object that they are of.
_Answer = tuple[Any, str | None, int]

SCHEMES = ("s3", "s3a", "gs", "az", "azure", "abfs", "abfss", "file")
# A request that was not answered is sent once more within the time-out; a second failure is the engine's.
_RETRIES = 1
# So many names come with one answer of a listing.
_PAGE = 1000
_UPLOAD_PART = 8 * 2**20
# An upload may take so much longer than a read: this much for each megabyte.
_UPLOAD_S_PER_MIB = 1.0
# Requests that are under way at once: many where they are small and wait, few where they share what the link carries,
# so that each ends in time.
_LARGE, _SMALL_AT_ONCE, _LARGE_AT_ONCE = 256 * 1024, 64, 8
# Small objects that are written or deleted at once.
_AT_ONCE = 64
# How long closing waits for what is given up.
_CLOSE_S = 10.0
# What servers and file systems say of a range that begins behind the end.
_BEHIND_THE_END = re.compile(r"Requested range was invalid|416 Range Not Satisfiable|InvalidRange")
# What may be secret in the text of an error: the query of an address (signatures), and what follows a user name.
_SECRET = re.compile(r"\?[^\s)\"']+|//[^/\s@]+@")


class ObjectStorage:
    """A `ListingEngine` on object storage.

    Calls run on an event loop in a thread of their own, so that one thread waits for many requests, and a call that
    never comes back is given up. Buffers are filled by the thread that waits, so what comes later fills none.

    Args:
        url: `s3://bucket/folder`, `gs://...`, `az://account/container/folder` or `file:///folder`.
        timeout_s: seconds after which an answer is not waited for any more. A read of many ranges may take longer, as
            long as one of them arrives within that time, and no deadline of a look-up is in force.

    Raises:
        ConfigError: the address is not one of these.
        StoreError: `obstore` is not installed.
    """

    is_volatile = False

    def __init__(self, url: str, timeout_s: float = 10.0) -> None:
        if urlsplit(url).scheme not in SCHEMES:
            raise ConfigError(f"{shown(url)}: expected an address that begins with one of {', '.join(SCHEMES)}")
        try:
            import obstore
            from obstore import exceptions
            from obstore.store import from_url
        except ImportError as error:
            raise StoreError(
                f"{shown(url)}: object storage needs obstore: pip install 'hf_contiguouskv[object]' ({error})"
            ) from error
        self.name = shown(url)
        # (A slow upload must not keep anyone from reading.)
        self.breaker = CircuitBreaker(self.name, timeout_s)
        self._writing = CircuitBreaker(f"{self.name} (writing)", timeout_s)
        self._sent = {"gets": 0, "lists": 0, "puts": 0}
        self.requests: Mapping[str, int] = self._sent
        self._timeout_s = timeout_s
        self._obstore = obstore
        self._errors = exceptions
        options: dict[str, Any] = {"mkdir": True} if url.startswith("file:") else {}
        if not url.startswith("file:"):
            options["retry_config"] = {"max_retries": _RETRIES, "retry_timeout": timedelta(seconds=timeout_s)}
            # (These options take the place of those that the environment names, so it is asked for this one.)
            options["client_options"] = {"connect_timeout": f"{max(1, int(1000 * timeout_s))}ms"}
            if any(os.environ.get(f"{cloud}_ALLOW_HTTP", "").lower() in ("1", "true") for cloud in ("AWS", "AZURE")):
                options["client_options"]["allow_http"] = True
        try:
            self._store: ObjectStore = from_url(url, **options)
        except (exceptions.BaseError, ValueError, OSError) as error:
            raise ConfigError(f"{self.name}: {_text(error)}") from None
        self._loop = _Loop()
        self._fetched_s = 0.0
        self._small, self._large = asyncio.Semaphore(_SMALL_AT_ONCE), asyncio.Semaphore(_LARGE_AT_ONCE)

    # -- small objects ------------------------------------------------------------------------------------------

    def create(self, name: str, octets: bytes) -> bool:
        try:
            self._write(lambda: self._put(name, octets, mode="create"))
        except FileExistsError:
            return False
        return True

    def put(self, name: str, octets: bytes) -> None:
        self._write(lambda: self._put(name, octets))

    def put_many(self, names: Sequence[str]) -> None:
        for some in _batches(names):

            async def put(some: Sequence[str] = some) -> None:
                await asyncio.gather(*(self._put(name, b"") for name in some))

            self._write(put)

    def get(self, name: str, max_bytes: int) -> bytes:
        async def get() -> bytes:
            self._sent["gets"] += 1
            found = await self._obstore.get_async(self._store, name)
            if found.meta["size"] > max_bytes:
                raise OSError(errno.EFBIG, f"it has more than the {max_bytes} bytes that such an object may have", name)
            return bytes(await found.bytes_async())

        return self._run(get)

    # -- large objects ------------------------------------------------------------------------------------------

    def upload(self, name: str, path: Path) -> None:
        seconds = self._timeout_s + _UPLOAD_S_PER_MIB * path.stat().st_size / 2**20
        # (Beside its parts, an upload in parts is begun and completed.)
        parts = -(-path.stat().st_size // _UPLOAD_PART)
        self._write(
            lambda: self._put(name, path, requests=1 if parts <= 1 else parts + 2, chunk_size=_UPLOAD_PART), seconds
        )

    def read_ranges(self, name: str, ranges: Sequence[Range], version: str | None = None) -> Fetched:
        joined = join_ranges(ranges)
        found = self._run(lambda: self._fetch_all(name, joined, version), None)
        total = 0
        for part, (octets, _, _) in zip(joined, found, strict=True):
            content = memoryview(octets)
            if content.nbytes != part.end - part.begin:
                raise EOFError(f"{self.name}/{name} ends before byte {part.end}")
            total += content.nbytes
            for offset, into in part.parts:
                into[:] = content[offset - part.begin : offset - part.begin + into.nbytes]
        return Fetched(total, found[0][1], found[0][2]) if found else Fetched(0, version, 0)

    async def _fetch_all(self, name: str, joined: list[Joined], version: str | None) -> list[_Answer]:
        done: list[_Answer] = []
        if version is None and joined:
            # Which content is read is settled by the first answer.
            first = asyncio.ensure_future(self._fetch(name, joined[0], None))
            try:
                await self._wait_while_some_end([first])
            finally:
                first.cancel()
            done.append(first.result())
            version = done[0][1]
        tasks = [asyncio.ensure_future(self._fetch(name, part, version)) for part in joined[len(done) :]]
        try:
            await self._wait_while_some_end(tasks)
        finally:
            for task in tasks:
                task.cancel()
        return done + [task.result() for task in tasks]

    async def _wait_while_some_end(self, tasks: Sequence[asyncio.Future[Any]]) -> None:
        """Wait for all; raise where for the length of the time-out nothing is fetched at all, or where one fails."""
        pending = set(tasks)
        while pending:
            ended, pending = await asyncio.wait(pending, timeout=self._timeout_s, return_when=asyncio.FIRST_COMPLETED)
            # (They may wait for each other, and for those of other threads.)
            if not ended and asyncio.get_running_loop().time() - self._fetched_s >= self._timeout_s:
                raise TimeoutError
            for task in ended:
                task.result()

    async def _fetch(self, name: str, part: Joined, version: str | None) -> _Answer:
        options: GetOptions = {"range": (part.begin, part.end)}
        if version is not None:
            options["if_match"] = version
        async with self._large if part.end - part.begin > _LARGE else self._small:
            self._sent["gets"] += 1
            try:
                found = await self._obstore.get_async(self._store, name, options=options)
                octets = await found.bytes_async()
            except self._errors.GenericError as error:
                if _BEHIND_THE_END.search(str(error)):
                    raise EOFError(f"{self.name}/{name} ends before byte {part.end}") from None
                raise
            self._fetched_s = asyncio.get_running_loop().time()
            return octets, found.meta["e_tag"], found.meta["size"]

    # -- names --------------------------------------------------------------------------------------------------

    def list_each(self, folders: Sequence[str], limit: int) -> list[list[ObjectInfo]]:
        async def first(folder: str) -> list[ObjectInfo]:
            found: list[ObjectInfo] = []
            # (What is listed tells whether another page was asked for: each but the last one is full.)
            self._sent["lists"] += 1
            async for page in self._obstore.list(self._store, folder, chunk_size=min(limit, _PAGE)):
                found += map(_info, page)
                self._sent["lists"] += len(page) == _PAGE
                if len(found) >= limit:
                    break
            return found[:limit]

        async def all_of_them() -> list[list[ObjectInfo]]:
            return list(await asyncio.gather(*map(first, folders)))

        return self._run(all_of_them)

    def walk(self, folder: str) -> Iterator[ObjectInfo]:
        stream = aiter(self._obstore.list(self._store, folder, chunk_size=_PAGE))

        async def page() -> list[ObjectInfo] | None:
            self._sent["lists"] += 1
            try:
                return [_info(meta) for meta in await anext(stream)]
            except StopAsyncIteration:
                return None

        while (found := self._run(page)) is not None:
            yield from found

    def delete(self, names: Iterable[str]) -> None:
        async def delete(name: str) -> None:
            with contextlib.suppress(FileNotFoundError):
                await self._obstore.delete_async(self._store, name)

        for some in _batches(list(names)):

            async def all_of_them(some: Sequence[str] = some) -> None:
                await asyncio.gather(*map(delete, some))

            self._write(all_of_them)

    def close(self) -> None:
        self._loop.close()

    # -- calls --------------------------------------------------------------------------------------------------

    def _put(self, name: str, content: bytes | Path, requests: int = 1, **options: Any) -> Awaitable[Any]:
        self._sent["puts"] += requests
        return self._obstore.put_async(self._store, name, content, **options)

    def _write(self, call: Callable[[], Awaitable[Result]], seconds: float | None = -1.0) -> Result:
        return self._run(call, seconds, self._writing)

    def _run(
        self,
        call: Callable[[], Awaitable[Result]],
        seconds: float | None = -1.0,
        breaker: CircuitBreaker | None = None,
    ) -> Result:
        """What `call` gives, with its errors as this protocol has them.

        Args:
            call: makes what is waited for; called on the loop.
            seconds: how long; negative: as the time-out says; `None`: `call` sees to it.
            breaker: that may refuse it; by default, that of reading.
        """
        breaker = breaker or self.breaker
        left = seconds_left()
        if left <= 0:
            raise DeadlineError(f"{self.name}: {TIME_IS_OVER}")
        breaker.enter(left)
        allowed = self._timeout_s if seconds is not None and seconds < 0 else seconds
        bounded = left < (math.inf if allowed is None else allowed)
        began = time.monotonic()
        try:
            result = self._loop.run(call, left if bounded else allowed)
        except BaseException as error:
            raised = self._explained(error)
            if bounded and isinstance(error, TimeoutError) and self._is_alive(began, left):
                breaker.gave_up()
                raised = DeadlineError(f"{self.name}: {TIME_IS_OVER}")
            elif isinstance(raised, EngineUnavailableError):
                breaker.failed(raised.strerror)
            elif isinstance(raised, Exception):
                breaker.succeeded()
            else:
                breaker.gave_up()  # Ctrl-C says nothing of the engine.
            raise raised from None
        breaker.succeeded()
        return result

    def _is_alive(self, began: float, waited_s: float) -> bool:
        """Whether a call that its look-up's deadline ended may have been answered in time.

        Args:
            began: when the call was made.
            waited_s: how long it was waited for.
        """
        # (A look-up's first call has nearly all of the time. If nothing is heard until then, the engine is down.)
        return waited_s < TELLING * self._timeout_s or self._fetched_s >= began

    def _explained(self, error: BaseException) -> BaseException:
        errors = self._errors
        if isinstance(error, FileNotFoundError | errors.PreconditionError | errors.NotModifiedError):
            return FileNotFoundError(2, _text(error), self.name)
        if isinstance(error, errors.AlreadyExistsError):
            return FileExistsError(17, _text(error), self.name)
        if isinstance(error, errors.PermissionDeniedError | errors.UnauthenticatedError):
            return PermissionError(13, _text(error), self.name)
        if isinstance(error, asyncio.CancelledError | CancelledError):
            return EngineUnavailableError("the store was closed")
        if isinstance(error, TimeoutError):
            return EngineUnavailableError(f"no answer within {self._timeout_s:g} s")
        if isinstance(error, errors.NotSupportedError | errors.InvalidPathError):
            return OSError(errno.EINVAL, _text(error), self.name)
        return EngineUnavailableError(_text(error)) if isinstance(error, errors.BaseError) else error


class _Loop:
    """An event loop in a thread, started at the first use."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def run(self, call: Callable[[], Awaitable[Result]], seconds: float | None) -> Result:
        """Wait on the loop for what `call` makes there.

        Raises:
            TimeoutError: it took longer; it was cancelled.
            EngineUnavailableError: this process is a fork, or the loop was closed.
        """
        with self._lock:
            if self._pid != os.getpid() or self._closed:
                # (The threads of the client are those of the parent. They cannot be started a second time.)
                reason = "the store was closed" if self._closed else "this process was forked after it was opened"
                raise EngineUnavailableError(reason)
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._loop.run_forever, name="contiguouskv-fleet", daemon=True)
                self._thread.start()
            future = asyncio.run_coroutine_threadsafe(_awaited(call), self._loop)
        try:
            return future.result(seconds)
        except TimeoutError:
            future.cancel()
            raise

    def close(self) -> None:
        with self._lock:
            self._closed = True
            loop, thread = self._loop, self._thread
            self._loop = self._thread = None
        if loop is not None and thread is not None and self._pid == os.getpid():
            asyncio.run_coroutine_threadsafe(_cancel_all(), loop).add_done_callback(
                lambda done: loop.call_soon_threadsafe(loop.stop)
            )
            thread.join(_CLOSE_S)
            if not loop.is_running():  # (At the end of the interpreter its thread may stand still inside.)
                loop.close()


async def _cancel_all() -> None:
    """End what is still waited for: a future of a loop that stands still would never be done."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _batches(names: Sequence[str]) -> Iterator[Sequence[str]]:
    return (names[start : start + _AT_ONCE] for start in range(0, len(names), _AT_ONCE))


async def _awaited(call: Callable[[], Awaitable[Result]]) -> Result:
    return await call()


def _info(meta: Any) -> ObjectInfo:
    return ObjectInfo(meta["path"], meta["size"], meta["last_modified"].timestamp())


def shown(url: str) -> str:
    """An address as it may appear in messages: without user, password and query."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _text(error: BaseException) -> str:
    """The first line of an error, without what may be secret in it."""
    first = str(error).strip().partition("\n")[0]
    return _SECRET.sub("...", first)[:300]
