"""A real Mooncake Store on loopback: its master, and a process that lends memory."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_OWNER = Path(__file__).with_name("mooncake_owner.py")
_START_S = 20.0


def _free_ports() -> tuple[int, int]:
    with socket.socket() as one, socket.socket() as two:
        one.bind(("127.0.0.1", 0))
        two.bind(("127.0.0.1", 0))
        return one.getsockname()[1], two.getsockname()[1]


def _program() -> str:
    spec = importlib.util.find_spec("mooncake")
    assert spec is not None
    assert spec.submodule_search_locations
    return str(Path(spec.submodule_search_locations[0], "mooncake_master"))


class MooncakeServer:
    """A master, and the processes that lend it memory. All are stopped by their process ids.

    Args:
        folder: for what they print.

    Attributes:
        port: of the master.
        metrics_port: of its HTTP service.
    """

    def __init__(self, folder: Path) -> None:
        self.port, self.metrics_port = _free_ports()
        self._folder = folder
        self._master: subprocess.Popen[bytes] | None = None
        self._owners: list[subprocess.Popen[str]] = []

    def url(self, folder: str, options: str = "") -> str:
        """The address of a store."""
        return f"mooncake://127.0.0.1:{self.port}/{folder}?metrics_port={self.metrics_port}{options}"

    def start_master(self) -> None:
        """Start the master, on the same ports each time."""
        command = [_program(), "--rpc_address=127.0.0.1", f"--rpc_port={self.port}", "--metrics_host=127.0.0.1"]
        command += [f"--metrics_port={self.metrics_port}", "--logtostderr", "--default_kv_lease_ttl=2000"]
        with open(self._folder / "master.log", "ab") as log:
            self._master = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        until = time.monotonic() + _START_S
        while self._master.poll() is None and time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2):
                return
            time.sleep(0.01)
        raise RuntimeError(f"the master did not start: {(self._folder / 'master.log').read_text(errors='replace')}")

    def start_owner(self, nbytes: int = 128 * 2**20) -> None:
        """Start a process that lends memory."""
        command = [sys.executable, str(_OWNER), f"127.0.0.1:{self.port}", str(nbytes)]
        with open(self._folder / "owner.log", "ab") as log:
            owner = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self._owners.append(owner)
        assert owner.stdout is not None
        said = owner.stdout.readline()
        if said != "ready\n":
            raise RuntimeError(f"no memory is lent: {(self._folder / 'owner.log').read_text(errors='replace')}")

    def tell_owner(self, *words: str) -> int:
        """Let the last owner do what a stranger could; the answer of the package."""
        owner = self._owners[-1]
        assert owner.stdin is not None
        assert owner.stdout is not None
        owner.stdin.write(json.dumps(words) + "\n")
        owner.stdin.flush()
        return int(owner.stdout.readline())

    def kill_owner(self) -> None:
        """End the last owner, as a machine that loses its power."""
        owner = self._owners.pop()
        owner.kill()
        owner.communicate()

    def freeze_owner(self) -> None:
        """Let the last owner answer nothing, as a machine that hangs."""
        self._owners[-1].send_signal(signal.SIGSTOP)

    def freeze_master(self) -> None:
        """Let the master answer nothing."""
        assert self._master is not None
        self._master.send_signal(signal.SIGSTOP)

    def kill_master(self) -> None:
        """End the master, as a machine that loses its power."""
        if self._master is not None:
            self._master.kill()
            self._master.wait()
            self._master = None

    def mend(self) -> None:
        """Let all that is frozen go on, and start the master if it was killed."""
        for process in (self._master, *self._owners):
            if process is not None:
                process.send_signal(signal.SIGCONT)
        if self._master is None:
            self.start_master()

    def keys(self, part: str) -> list[str]:
        """The keys of the master that contain `part`."""
        import urllib.request

        url = f"http://127.0.0.1:{self.metrics_port}/get_all_keys"
        with urllib.request.urlopen(url, timeout=5) as answer:
            return [key for key in answer.read().decode().split("\n") if part in key]

    def close(self) -> None:
        """End all of it."""
        while self._owners:
            self.kill_owner()
        self.kill_master()


@contextmanager
def mooncake_server(folder: Path, owners: int = 1) -> Iterator[MooncakeServer]:
    """A Mooncake Store; ended at the end."""
    server = MooncakeServer(folder)
    try:
        server.start_master()
        for _ in range(owners):
            server.start_owner()
        yield server
    finally:
        server.close()
