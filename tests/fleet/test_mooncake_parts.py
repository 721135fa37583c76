"""Do the parts of the engine on Mooncake Store keep their promises, without its package?"""

from __future__ import annotations

import importlib
import os
import threading

import pytest

from hf_contiguouskv.errors import ConfigError, StoreError
from hf_contiguouskv.store.fleet.engine import EngineUnavailableError
from hf_contiguouskv.store.fleet.engines import default_folder, engine_for, within
from hf_contiguouskv.store.fleet.mooncake import native
from hf_contiguouskv.store.fleet.mooncake.address import MooncakeAddress
from hf_contiguouskv.store.fleet.mooncake.arena import Arena
from hf_contiguouskv.store.fleet.mooncake.calls import _HANGING, CallThreads
from hf_contiguouskv.store.fleet.mooncake.heads import MAX_HEAD, MAX_INLINE, PIECE, ObjectHead

# -- addresses ----------------------------------------------------------------------------------------------------


def test_an_address_says_where_and_how_much() -> None:
    found = MooncakeAddress.parse("mooncake://master-host:50051")
    assert found == MooncakeAddress("master-host", 50051)
    found = MooncakeAddress.parse("mooncake://10.0.0.1:5/a/b/?segment=1.5GiB&host=node-7&metrics_port=9003")
    assert found == MooncakeAddress("10.0.0.1", 5, "a/b", 3 * 2**29, "node-7", 9003)


@pytest.mark.parametrize(
    "url",
    [
        "mooncake://host",
        "mooncake:///folder",
        "mooncake://host:0/x",
        "mooncake://host:99999/x",
        "mooncake://user@host:5/x",
        "mooncake://[::1]:5/x",
        "mooncake://ho st:5/x",
        "mooncake://host:5/x?segments=4GiB",
        "mooncake://host:5/x?segment=4GB",
        "mooncake://host:5/x?segment=-1",
        "mooncake://host:5/x?segment=1MiB",
        "mooncake://host:5/x?metrics_port=x",
        "mooncake://host:5/x?host=a/b",
        "mooncake://host:5/x#y",
    ],
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ConfigError):
        engine_for(url, 1.0)


def test_stores_of_one_master_are_apart() -> None:
    urls = [
        "mooncake://h:5",
        "mooncake://h:5/a",
        "mooncake://h:5/a/o",
        "mooncake://h:5/a%2Fo/x",
        "mooncake://h:5/a/o/x",
    ]
    roots = [MooncakeAddress.parse(url).root for url in urls]
    assert len(set(roots)) == len(urls)
    assert not any(one != other and one.startswith(f"{other}/") for one in roots for other in roots)


def test_a_folder_in_an_address_keeps_its_options() -> None:
    assert within("mooncake://h:5/a/?segment=1GiB", "k") == "mooncake://h:5/a/k?segment=1GiB"
    assert within("s3://bucket/a", "k") == "s3://bucket/a/k"
    assert within("file:///a/b/", "k") == "file:///a/b/k"
    assert default_folder("mooncake://h:5/a?segment=1GiB") == default_folder("mooncake://h:5/a")


# -- the package --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ModuleNotFoundError("No module named 'mooncake'"), r"pip install 'hf_contiguouskv\[mooncake\]'"),
        (
            ImportError("libibverbs.so.1: cannot open shared object file: No such file or directory"),
            "apt-get install libibverbs1 libcurl4 libnuma1",
        ),
        (ImportError("libnuma.so.1: cannot open shared object file: No such file or directory"), "libnuma1"),
        (ImportError("undefined symbol: x"), "its package cannot be loaded"),
    ],
)
def test_what_is_missing_is_said(error: ImportError, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise error

    monkeypatch.setattr(native, "_loaded_in", None)
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(StoreError, match=said):
        engine_for("mooncake://host:5/x", 1.0)


def test_time_outs_of_the_package_follow_ours_unless_they_are_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded_in", None)
    monkeypatch.setattr(importlib, "import_module", lambda name: name)
    for name in ("MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_RPC_TIMEOUT_MS", "MC_LOG_LEVEL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MC_TCP_STATUS_TIMEOUT_SEC", "77")
    assert native.load("x", 2.5) == "mooncake.store"
    names = ("MC_TCP_PROGRESS_TIMEOUT_SEC", "MC_TCP_STATUS_TIMEOUT_SEC", "MC_RPC_TIMEOUT_MS", "MC_LOG_LEVEL")
    assert [os.environ[name] for name in names] == ["3", "77", "2500", "ERROR"]


def test_a_fork_of_a_process_that_loaded_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded_in", os.getpid() + 1)
    with pytest.raises(StoreError, match="forked"):
        engine_for("mooncake://host:5/x", 1.0)


# -- heads --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"short", bytes(MAX_INLINE), None], ids=["empty", "short", "long", "pieces"])
def test_a_head_is_read_as_it_was_written(content: bytes | None) -> None:
    head = ObjectHead.new(2 * PIECE + 1 if content is None else len(content), content)
    octets = head.pack("key")
    assert len(octets) <= MAX_HEAD
    assert ObjectHead.unpack("key", octets) == head
    assert len(head.piece_keys("root")) == (3 if content is None else 0)


def test_a_head_with_wrong_bytes_is_none() -> None:
    octets = ObjectHead.new(5, b"short").pack("key")
    assert ObjectHead.unpack("other", octets) is None
    for at in range(len(octets)):
        assert ObjectHead.unpack("key", octets[:at] + bytes([octets[at] ^ 1]) + octets[at + 1 :]) is None
        assert ObjectHead.unpack("key", octets[:at]) is None
    for wrong in (ObjectHead("00" * 16, 2**60, 0.0, None), ObjectHead("00" * 16, 4, 0.0, b"short")):
        assert ObjectHead.unpack("key", wrong.pack("key")) is None


# -- memory and calls ---------------------------------------------------------------------------------------------


def test_slots_do_not_overlap_and_belong_to_one() -> None:
    arena = Arena((2, 100), (3, 50))
    small, large = arena.kinds[1], arena.kinds[0]
    slots = [small.take(0), small.take(0), small.take(0), large.take(0), large.take(0)]
    for number, slot in enumerate(slots):
        slot.octets[:] = bytes([number]) * slot.octets.nbytes
    assert all(bytes(slot.octets) == bytes([number]) * slot.octets.nbytes for number, slot in enumerate(slots))
    assert all(arena.address <= slot.address <= arena.address + arena.nbytes - 50 for slot in slots)
    with pytest.raises(EngineUnavailableError, match="have not returned"):
        small.take(0.01)
    small.give_back(slots[1], rest_s=60.0)
    with pytest.raises(EngineUnavailableError):
        small.take(0.01)
    small.give_back(slots[2])
    assert small.take(0) is slots[2]
    small.give_back(slots[0], rest_s=0.01)
    assert small.take(30.0) is slots[0]


class TestCalls:
    def test_what_is_called_is_answered_or_raised(self) -> None:
        threads, freed = CallThreads("test"), []
        assert threads.start(lambda: 5, lambda: freed.append(1)).wait(30) == 5
        with pytest.raises(ZeroDivisionError):
            threads.start(lambda: 1 // 0, lambda: freed.append(2)).wait(30)
        assert freed == [2]
        assert threads.close(30)
        with pytest.raises(EngineUnavailableError, match="closed"):
            threads.start(lambda: 5, lambda: freed.append(3))
        assert freed == [2, 3]

    def test_what_a_call_uses_is_freed_once_it_is_over(self) -> None:
        threads, go, freed = CallThreads("test"), threading.Event(), threading.Event()
        call = threads.start(go.wait, freed.set)
        with pytest.raises(TimeoutError):
            call.wait(0.01)
        call.give_up()
        assert call.is_hanging
        assert not freed.is_set()
        assert not threads.close(0.01)
        go.set()
        assert freed.wait(30)
        assert threads.close(30)
        assert not call.is_hanging

    def test_no_more_calls_are_made_where_too_many_hang(self) -> None:
        threads, go = CallThreads("test"), threading.Event()

        def hang() -> None:
            with pytest.raises(TimeoutError):
                threads.start(go.wait).wait(0.01)

        for _ in range(_HANGING):
            hang()
        with pytest.raises(EngineUnavailableError, match="have not returned"):
            hang()
        go.set()
        assert threads.close(30)

    def test_many_threads_call_at_once(self) -> None:
        threads, barrier = CallThreads("test"), threading.Barrier(20)
        calls = [threads.start(lambda: barrier.wait(30) >= 0) for _ in range(20)]
        assert all(call.wait(30) for call in calls)
        assert threads.close(30)
