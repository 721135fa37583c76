"""What the checks are made of."""

from __future__ import annotations

import contextlib
import functools
import secrets
from collections.abc import Callable, Iterable, Iterator

import numpy as np

from ...errors import SegmentMissingError
from ..backend import Blob, BlobInfo, BlobWriter, SegmentBackend

Make = Callable[[], SegmentBackend]
Check = Callable[[Make], None]

PAGE = 4096
# The clock of the storage may differ from ours by so much.
CLOCK_S = 600.0


def require(holds: object, text: str) -> None:
    """Raise `AssertionError(text)` unless `holds`."""
    # No assert statement: `python -O` would drop it.
    if not holds:
        raise AssertionError(text)


def refuses(error: type[BaseException], action: Callable[[], object], what: str) -> None:
    """`action` raises `error`."""
    try:
        result = action()
    except error:
        return
    except Exception as other:
        raise AssertionError(f"{what} must raise {error.__name__}, raised {other!r}") from other
    raise AssertionError(f"{what} must raise {error.__name__}, returned {result!r}")


def promise(function: Check) -> Check:
    """Turn whatever a backend raises where nothing was to be raised into an `AssertionError` that names the check."""

    @functools.wraps(function)
    def check(make: Make) -> None:
        try:
            function(make)
        except AssertionError as error:
            raise AssertionError(f"{function.__name__}: {error}") from error
        except Exception as error:
            raise AssertionError(f"{function.__name__}: the backend raised {error!r}") from error

    return check


@contextlib.contextmanager
def made(make: Make) -> Iterator[SegmentBackend]:
    """A backend that is closed at the end."""
    backend = make()
    try:
        yield backend
    finally:
        backend.close()


def some_bytes(nbytes: int, seed: int = 0) -> bytes:
    """Bytes that differ from place to place and from seed to seed, with hardly a zero among them."""
    return np.random.default_rng(seed).integers(1, 256, nbytes, dtype=np.uint8).tobytes()


def new_key() -> str:
    """A key that nothing lies under."""
    return secrets.token_hex(16)


def written(backend: SegmentBackend, key: str, content: bytes) -> BlobWriter:
    """A writer that holds `content`, neither sealed nor published."""
    writer = backend.create(key, len(content))
    writer.write(0, memoryview(content))
    return writer


def publish(backend: SegmentBackend, key: str, content: bytes) -> BlobWriter:
    """Publish `content`; returns the writer, which is closed."""
    writer = written(backend, key, content)
    writer.seal()
    writer.publish()
    writer.discard()
    return writer


def read(blob: Blob, offset: int = 0, nbytes: int | None = None) -> bytes:
    """`nbytes` from `offset` of `blob`, or all that follows."""
    octets = bytearray(blob.nbytes - offset if nbytes is None else nbytes)
    blob.read_into([(offset, memoryview(octets))])
    return bytes(octets)


def is_whole(backend: SegmentBackend, key: str, content: bytes, when: str) -> None:
    """Require that `key` holds `content`."""
    blob = backend.open(key)
    try:
        require(blob.nbytes == len(content), f"{when}: nbytes is {blob.nbytes}, {len(content)} were written")
        require(read(blob) == content, f"{when}: other bytes are read than were written")
    finally:
        blob.close()


def is_gone(backend: SegmentBackend, key: str, when: str) -> None:
    """Require that no method knows of a blob under `key`."""
    refuses(SegmentMissingError, lambda: backend.open(key), f"{when}: open")
    require(backend.identity(key) is None, f"{when}: identity must be None, is {backend.identity(key)!r}")
    require(key not in backend.list_keys(), f"{when}: list_keys still has it")
    require(listed(backend.list_blobs(), key) is None, f"{when}: list_blobs still has it")
    require(backend.delete(key) is False, f"{when}: delete must be False")


def listed(infos: Iterable[BlobInfo], key: str) -> BlobInfo | None:
    """What a list says of `key`, if anything."""
    found = [info for info in infos if info.key == key]
    require(len(found) <= 1, f"{key} is listed {len(found)} times")
    return found[0] if found else None
