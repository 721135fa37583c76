"""A real object server on loopback, for one test session."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ACCESS, SECRET = "fleet-tests", "secret-of-the-fleet-tests"
_START_S = 60.0


def weed() -> str | None:
    """The program of SeaweedFS, if its package is installed."""
    beside = Path(sys.executable).with_name("weed")
    return str(beside) if beside.exists() else shutil.which("weed")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now; below 55536, since this server uses the ones 10000 above as well."""
    sockets: list[socket.socket] = []
    while len(sockets) < count:
        one = socket.socket()
        one.bind(("127.0.0.1", 0))
        number = one.getsockname()[1]
        apart = all(abs(number - other.getsockname()[1]) not in (0, 10000) for other in sockets)
        if number < 55536 and apart and _is_free(number + 10000):
            sockets.append(one)
        else:
            one.close()
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@dataclass
class ObjectServer:
    """A server that speaks S3.

    Attributes:
        port: that it listens on.
        process: of the server.
    """

    port: int
    process: subprocess.Popen[bytes]

    def environment(self, port: int | None = None) -> dict[str, str]:
        """What tells a client of S3 where it is and who asks."""
        return {
            "AWS_ACCESS_KEY_ID": ACCESS,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT": f"http://127.0.0.1:{port or self.port}",
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }

    def freeze(self) -> None:
        """Let it answer nothing, as a machine that hangs."""
        os.killpg(self.process.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Undo `freeze`."""
        os.killpg(self.process.pid, signal.SIGCONT)


@contextmanager
def object_server(folder: Path, bucket: str = "fleet") -> Iterator[ObjectServer]:
    """A server with an empty bucket; stopped, by its process id, at the end."""
    program = weed()
    assert program is not None
    s3, master, volume, filer = free_ports(4)
    config = folder / "s3.json"
    rights = ["Admin", "Read", "List", "Tagging", "Write"]
    keys = [{"accessKey": ACCESS, "secretKey": SECRET}]
    config.write_text(json.dumps({"identities": [{"name": "tests", "credentials": keys, "actions": rights}]}))
    (folder / "data").mkdir()
    command = [program, "-logtostderr", "server", f"-dir={folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [
        f"-master.port={master}",
        f"-volume.port={volume}",
        f"-filer.port={filer}",
        "-master.volumeSizeLimitMB=64",
    ]
    command += ["-s3", f"-s3.port={s3}", f"-s3.config={config}", "-volume.max=20", "-master.telemetry=false"]
    # (Its catalogues of tables would take the same ports in each server.)
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]
    with open(folder / "log", "wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, start_new_session=True)
    server = ObjectServer(s3, process)
    try:
        _make_bucket(server, bucket, folder / "log")
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):  # (It may have ended by itself.)
            server.thaw()
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _make_bucket(server: ObjectServer, bucket: str, log: Path) -> None:
    from obstore.store import S3Store

    end = time.monotonic() + _START_S
    while time.monotonic() < end:
        if server.process.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/status", timeout=2):
                break
        except OSError:
            time.sleep(0.1)
    # (obstore has no call that makes a bucket: this server makes it with the first object.)
    told = server.environment()
    store = S3Store(
        bucket,
        endpoint=told["AWS_ENDPOINT"],
        region=told["AWS_REGION"],
        access_key_id=told["AWS_ACCESS_KEY_ID"],
        secret_access_key=told["AWS_SECRET_ACCESS_KEY"],
        client_options={"allow_http": True},
        retry_config={"max_retries": 0},
    )
    error: Exception | None = None
    while time.monotonic() < end and server.process.poll() is None:
        try:
            store.put("hello", b"there")
            store.delete("hello")
            return
        except Exception as failed:
            error = failed
            time.sleep(0.2)
    raise RuntimeError(f"the object server did not start: {error}\n{log.read_text(errors='replace')[-2000:]}")
