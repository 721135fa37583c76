"""A network that misbehaves: a proxy on loopback that delays, limits, stalls or cuts what it forwards."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time


class Proxy:
    """Forwards connections to a port; a context manager.

    Args:
        target: port on loopback.

    Attributes:
        port: that it listens on.
        mode: "pass", "stall" (connections are taken, and nothing crosses) or "cut" (connections are closed).
        delay_s: that each piece of an answer waits.
        bytes_per_s: of answers, all connections together; 0: no limit.
        cut_after: connections are closed once so many bytes of answers have crossed from now on; `None`: not at all.
        answered: bytes of answers that have crossed.
    """

    def __init__(self, target: int) -> None:
        self.mode = "pass"
        self.delay_s = 0.0
        self.bytes_per_s = 0.0
        self.cut_after: int | None = None
        self.answered = 0
        self.port = 0
        self._target = target
        self._free_s = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(self, *error: object) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.CancelledError):
            if self.mode == "cut":
                writer.transport.abort()
                return
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            await asyncio.gather(self._forward(reader, back, answers=False), self._forward(there, writer, answers=True))

    async def _forward(self, source: asyncio.StreamReader, to: asyncio.StreamWriter, *, answers: bool) -> None:
        try:
            while piece := await source.read(16 * 1024):
                while self.mode == "stall":
                    await asyncio.sleep(0.02)
                if self.mode == "cut" or (answers and self._is_cut(len(piece))):
                    to.transport.abort()
                    return
                if answers:
                    await self._wait(len(piece))
                    self.answered += len(piece)
                to.write(piece)
                await to.drain()
        finally:
            to.close()

    def _is_cut(self, nbytes: int) -> bool:
        if self.cut_after is None:
            return False
        self.cut_after -= nbytes
        return self.cut_after < 0

    async def _wait(self, nbytes: int) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if self.bytes_per_s:
            now = time.monotonic()
            self._free_s = max(now, self._free_s) + nbytes / self.bytes_per_s
            await asyncio.sleep(self._free_s - now)
