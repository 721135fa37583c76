"""The marker of a store: what is none is refused, and neither waited for, nor read to its end, nor written through."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tally import Figures
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import StoreFormatError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.folder import open_folder

from .conftest import needs_root

MARKER = "contiguouskv-store.json"


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A pipe that is opened in the wrong way waits for ever."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError("it waits, or runs, without an end")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 90)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def fifo(marker: Path, outside: Path) -> None:
    os.mkfifo(marker)


def link_to_an_empty_file(marker: Path, outside: Path) -> None:
    outside.write_bytes(b"")
    marker.symlink_to(outside)


def link_to_a_marker(marker: Path, outside: Path) -> None:
    outside.write_text('{"format": 2}')
    marker.symlink_to(outside)


def link_to_nothing(marker: Path, outside: Path) -> None:
    marker.symlink_to(outside)


def link_to_zeros(marker: Path, outside: Path) -> None:
    marker.symlink_to("/dev/zero")


def a_device(marker: Path, outside: Path) -> None:
    os.mknod(marker, 0o600 | 0o020000, os.makedev(1, 5))  # /dev/zero


def a_folder(marker: Path, outside: Path) -> None:
    marker.mkdir()


def a_socket(marker: Path, outside: Path) -> None:
    with socket.socket(socket.AF_UNIX) as one, contextlib.chdir(marker.parent):
        one.bind(marker.name)


def far_too_long(marker: Path, outside: Path) -> None:
    with open(marker, "wb") as file:
        file.write(b'{"format": 2}')
        file.truncate(2**40)


def a_little_too_long(marker: Path, outside: Path) -> None:
    marker.write_bytes(b'{"format": 2}'.ljust(4097))


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "in a store"])
@pytest.mark.parametrize(
    "make",
    [
        fifo,
        link_to_an_empty_file,
        link_to_a_marker,
        link_to_nothing,
        link_to_zeros,
        pytest.param(a_device, marks=needs_root),
        a_folder,
        a_socket,
        far_too_long,
        a_little_too_long,
    ],
)
def test_a_marker_that_is_no_marker(
    tmp_path: Path, make: Callable[[Path, Path], None], alone: bool, attacks: Figures
) -> None:
    path, outside = tmp_path / "store", tmp_path / "outside"
    if alone:
        path.mkdir(mode=0o700)
    else:
        PrefixStore(path).close()
        (path / MARKER).unlink()
    make(path / MARKER, outside)
    before = outside.read_bytes() if outside.exists() else None
    for create in (True, False):
        with pytest.raises(StoreFormatError, match="does not mark a store"):
            PrefixStore(path, create=create)
    assert (outside.read_bytes() if outside.exists() else None) == before
    attacks.add("markers refused")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([1, 2, 3]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["format", "x"]), inner, max_size=2),
    max_leaves=5,
)
MARKS = st.one_of(
    st.binary(max_size=80),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.lists(st.tuples(st.sampled_from(["format", "forma\\u0074", "x"]), JSON), max_size=3).map(
        lambda pairs: ("{" + ", ".join(f'"{name}": {json.dumps(value)}' for name, value in pairs) + "}").encode()
    ),
    st.integers(1, 4000).map(lambda depth: b"[" * depth),
)


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=MARKS)
def test_whatever_a_marker_says(tmp_path: Path, content: bytes) -> None:
    """It is exactly the mark of this format, each name once, or an error says so."""
    path = tmp_path / "store"
    path.mkdir(mode=0o700, exist_ok=True)
    (path / MARKER).write_bytes(content)
    (path / "segments").mkdir(mode=0o700, exist_ok=True)
    (path / MARKER).chmod(0o600)

    def pairs_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)

    right = False
    with contextlib.suppress(ValueError, AssertionError, RecursionError):
        mark = json.loads(content, object_pairs_hook=pairs_of)
        right = isinstance(mark, dict) and type(mark.get("format")) is int and mark["format"] in (1, 2)
    if right:
        open_folder(path, create=False).close()
    else:
        with pytest.raises(StoreFormatError):
            open_folder(path, create=True)
    assert (path / MARKER).read_bytes() == (b'{"format": 2}' if right and mark["format"] == 1 else content)


@pytest.mark.parametrize("content", ['{"format": 1, "format": 2}', '{"format": 2, "format": 2}', '{"format": 2.0}'])
def test_a_mark_with_two_meanings_is_refused(tmp_path: Path, content: str, attacks: Figures) -> None:
    (tmp_path / MARKER).write_text(content)
    with pytest.raises(StoreFormatError, match="does not mark a store"):
        PrefixStore(tmp_path)
    attacks.add("markers refused")


def test_a_store_of_an_earlier_release_is_marked_only_where_all_else_is_right(tmp_path: Path) -> None:
    (tmp_path / MARKER).write_text('{"format": 1}')
    (tmp_path / "segments").symlink_to(tmp_path)
    with pytest.raises(StoreFormatError, match="is a link"):
        PrefixStore(tmp_path)
    assert (tmp_path / MARKER).read_text() == '{"format": 1}'
    (tmp_path / "segments").unlink()
    PrefixStore(tmp_path).close()
    assert (tmp_path / MARKER).read_text() == '{"format": 2}'


def test_a_link_to_a_store_is_a_store(tmp_path: Path) -> None:
    """Users link stores: what the link leads to counts."""
    (tmp_path / "link").symlink_to(tmp_path / "store")
    with PrefixStore(tmp_path / "store") as store:
        write_prefix(store, some_tokens(40))
    with PrefixStore(tmp_path / "link") as store:
        assert store.inner.lookup(FINGERPRINT, some_tokens(40), geometry().chunk_size).tokens == 40  # type: ignore[union-attr]
        write_prefix(store, some_tokens(60))
    assert len(list((tmp_path / "store").glob("segments/*/*"))) == 2
