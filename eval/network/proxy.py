"""A network that misbehaves: a proxy on loopback that delays, limits, stalls or cuts what it forwards."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time

_PIECE = 64 * 1024
_ON_ITS_WAY = 256


class Proxy:
    """Forwards connections to a port; a context manager.

    Args:
        target: port on loopback.

    Attributes:
        port: that it listens on.
        mode: "pass", "stall" (connections are taken, and nothing crosses) or "cut" (connections are closed).
        delay_s: from the server to the client, for each byte of an answer; those behind it need not wait for it.
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
            # What is on its way: when it arrives, and what. (As many pieces as a long, fast link holds.)
            on_its_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_ON_ITS_WAY)
            await asyncio.gather(
                self._forward(reader, back), self._receive(there, on_its_way), self._deliver(on_its_way, writer)
            )

    async def _forward(self, source: asyncio.StreamReader, to: asyncio.StreamWriter) -> None:
        """What the client sends."""
        try:
            while piece := await source.read(_PIECE):
                if not await self._may_pass():
                    to.transport.abort()
                    return
                to.write(piece)
                await to.drain()
        finally:
            to.close()

    async def _receive(self, source: asyncio.StreamReader, on_its_way: asyncio.Queue[tuple[float, bytes]]) -> None:
        """What the server answers, as fast as the link takes it."""
        with contextlib.suppress(OSError):
            while piece := await source.read(_PIECE):
                if self.bytes_per_s:
                    now = time.monotonic()
                    self._free_s = max(now, self._free_s) + len(piece) / self.bytes_per_s
                    await asyncio.sleep(self._free_s - now)
                await on_its_way.put((time.monotonic() + self.delay_s, piece))
        await on_its_way.put((0.0, b""))

    async def _deliver(self, on_its_way: asyncio.Queue[tuple[float, bytes]], to: asyncio.StreamWriter) -> None:
        """What arrives at the client, and when."""
        try:
            while True:
                when, piece = await on_its_way.get()
                if not piece:
                    return
                await asyncio.sleep(max(0.0, when - time.monotonic()))
                if not await self._may_pass() or self._is_cut(len(piece)):
                    to.transport.abort()
                    return
                self.answered += len(piece)
                to.write(piece)
                await to.drain()
        finally:
            to.close()

    async def _may_pass(self) -> bool:
        """Wait while nothing crosses; false if connections are cut."""
        while self.mode == "stall":
            await asyncio.sleep(0.02)
        return self.mode != "cut"

    def _is_cut(self, nbytes: int) -> bool:
        if self.cut_after is None:
            return False
        self.cut_after -= nbytes
        return self.cut_after < 0
