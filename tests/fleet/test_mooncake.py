"""Does Mooncake Store keep the promises of an engine, with a real master and another process that lends memory?"""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from machines import Machines, engine_of, found, found_tokens, is_right, remote
from mooncake_server import MooncakeServer, mooncake_server
from scenarios import IDS, damage_and_replace
from store_helpers import some_tokens, write_prefix
from test_commands import run, run_json

from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.session.arguments import opened_store
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.fleet import fleet
from hf_contiguouskv.store.fleet.conformance import ENGINE_CHECKS, EngineCheck
from hf_contiguouskv.store.fleet.engine import EngineUnavailableError, KeyValueEngine
from hf_contiguouskv.store.fleet.mooncake.engine import MooncakeStore


@pytest.fixture
def url(mooncake: MooncakeServer) -> str:
    """The address of an empty store."""
    return mooncake.url(f"{secrets.token_hex(4)}/store")


@pytest.fixture
def machines(url: str, tmp_path: Path) -> Iterator[Machines]:
    with Machines(url, tmp_path) as some:
        yield some


@pytest.mark.parametrize("check", ENGINE_CHECKS, ids=lambda check: check.__name__)
def test_promise(check: EngineCheck, url: str) -> None:
    check(lambda: MooncakeStore(url))


def test_is_an_engine_that_forgets(url: str) -> None:
    engine = MooncakeStore(url)
    assert isinstance(engine, KeyValueEngine)
    assert engine.is_volatile
    assert "?" not in engine.name
    engine.close()


# -- what machines find ---------------------------------------------------------------------------------------------


def test_another_machine_finds_what_was_stored(machines: Machines) -> None:
    one, two = machines("one"), machines("two")
    assert found_tokens(two, IDS) == 0
    write_prefix(one, IDS)
    assert one.flush()
    for prompt, shared in ((np.concatenate([IDS, some_tokens(50, seed=1)]), 1001), (IDS[:600], 600)):
        stored = found(two, prompt)
        assert stored is not None
        assert stored.tokens == shared
        assert is_right(two, stored, prompt)
    assert remote(one)["published"] == 1
    assert remote(two)["found"] == 1


def test_a_conversation_and_a_key(machines: Machines) -> None:
    key = b"k" * 32
    one, two = machines("one", key=key), machines("two", key=key)
    write_prefix(one, IDS[:1000])
    one.flush()
    longer = np.concatenate([IDS[:1000], some_tokens(301, seed=3)])
    assert found_tokens(two, longer) == 1000
    write_prefix(two, longer, first_chunk=250)
    two.flush()
    three = machines("three", key=key)
    stored = found(three, longer)
    assert stored is not None
    assert (stored.tokens, len(stored.spans)) == (1301, 2)
    assert is_right(three, stored, longer)
    assert found_tokens(machines("four"), longer) == 0


def test_a_long_segment_lies_in_pieces_and_is_read_by_ranges(
    url: str, mooncake: MooncakeServer, tmp_path: Path
) -> None:
    engine = MooncakeStore(url)
    content = secrets.token_bytes(20 * 2**20 + 3)
    path = tmp_path / "large"
    path.write_bytes(content)
    engine.upload("segments/large", path)
    wanted = [(at, 3000) for at in range(1, 20 * 2**20, 70_000)]
    buffers = [bytearray(length) for _, length in wanted]
    version: str | None = None
    for _ in range(2):
        fetched = engine.read_ranges(
            "segments/large", [(at, memoryview(into)) for (at, _), into in zip(wanted, buffers, strict=True)], version
        )
        version = fetched.version
    assert all(into == content[at : at + length] for (at, length), into in zip(wanted, buffers, strict=True))
    # What has lost a piece is not there, whichever bytes are asked for.
    (last,) = mooncake.keys(f"/p/{version}/2")
    assert mooncake.tell_owner("remove", last) == 0
    with pytest.raises(FileNotFoundError):
        engine.read_ranges("segments/large", [(0, memoryview(bytearray(1)))])
    engine.delete(["segments/large"])
    with pytest.raises(FileNotFoundError):
        engine.get("segments/large", 2**30)
    engine.close()


def test_two_clients_that_write_one_name_agree(mooncake: MooncakeServer) -> None:
    folder = secrets.token_hex(4)
    engines = [MooncakeStore(mooncake.url(folder, options)) for options in ("", "&host=127.0.0.1")]
    start, won = threading.Barrier(8), []

    def write(number: int) -> None:
        engine = engines[number % 2]
        for name in range(10):
            start.wait(30)
            if engine.create(f"raced/{name}", b"%d" % number * 20_000):
                won.append((name, number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(name for name, _ in won) == list(range(10))
    for name, number in won:
        assert all(engine.get(f"raced/{name}", 2**20) == b"%d" % number * 20_000 for engine in engines)
    for engine in engines:
        engine.close()


def test_two_machines_that_store_the_same_keep_one_copy(machines: Machines, mooncake: MooncakeServer) -> None:
    one, two = machines("one"), machines("two")
    write_prefix(one, IDS)
    write_prefix(two, IDS)
    one.flush(), two.flush()
    counts = [remote(one), remote(two)]
    assert sum(count.get("published", 0) for count in counts) == 1
    assert sum(count.get("published_by_others", 0) for count in counts) == 1
    assert len(list(engine_of(one).walk("segments"))) == 1
    assert found_tokens(machines("three"), IDS) == len(IDS)


# -- bytes that are wrong ---------------------------------------------------------------------------------------------


def test_a_stranger_who_writes_into_a_segment_is_noticed(machines: Machines, mooncake: MooncakeServer) -> None:
    engine = engine_of(machines("one"))

    def damage() -> None:
        (info,) = engine.walk("segments")
        octets = bytearray(info.nbytes)
        version = engine.read_ranges(info.name, [(0, memoryview(octets))]).version
        octets[len(octets) // 2] ^= 1
        (piece,) = mooncake.keys(f"/p/{version}/")
        assert mooncake.tell_owner("replace", piece, octets.hex()) == 0

    damage_and_replace(machines, damage)


@pytest.mark.parametrize("octets", ["00", "ff" * 200, "ff" * 100_000])
def test_a_short_object_of_a_stranger_counts_as_none(url: str, mooncake: MooncakeServer, octets: str) -> None:
    engine = MooncakeStore(url)
    engine.put("heads/a", b"first")
    (key,) = [key for key in mooncake.keys("/o/heads/a") if key.startswith(engine._root)]
    assert mooncake.tell_owner("replace", key, octets) == 0
    with pytest.raises(FileNotFoundError):
        engine.get("heads/a", 2**20)
    assert engine.create("heads/a", b"second")
    assert engine.get("heads/a", 100) == b"second"
    engine.close()


def test_verification_cannot_be_turned_off(machines: Machines) -> None:
    with pytest.raises(ConfigError, match="always verified"):
        opened_store(machines("one"), needed=True, verify=False)


# -- room -------------------------------------------------------------------------------------------------------------


def test_where_nobody_lends_memory_the_store_works_alone(
    tmp_path: Path, require_mooncake: None, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_contiguouskv.store.fleet.mooncake.writing._RETRY_S", 0.1)
    with mooncake_server(tmp_path, owners=0) as server, Machines(server.url("x"), tmp_path) as machines:
        one = machines("one")
        stored = write_prefix(one, IDS)
        one.flush()
        assert "no machine lends memory" in caplog.text
        assert is_right(one, stored, IDS)
        assert found_tokens(machines("two"), IDS) == 0
        # With memory of this process, it is sent once it is used again.
        lending = PrefixStore(server.url("x", "&segment=64MiB"), cache=tmp_path / "three")
        write_prefix(lending, IDS)
        lending.flush()
        assert remote(lending)["published"] == 1
        assert found_tokens(machines("two"), IDS) == len(IDS)
        lending.close()


# -- calls ----------------------------------------------------------------------------------------------------------


def test_an_engine_that_is_closed_while_it_is_used(mooncake: MooncakeServer) -> None:
    # (Another address of this machine makes a client of its own, which ends with this engine.)
    engine = MooncakeStore(mooncake.url(secrets.token_hex(4), "&host=127.0.0.1"))
    engine.put("a", bytes(2**20))
    ended: list[BaseException] = []

    def read() -> None:
        try:
            while True:
                assert engine.get("a", 2**20) == bytes(2**20)
        except BaseException as error:
            ended.append(error)

    threads = [threading.Thread(target=read) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    engine.close()
    engine.close()
    for thread in threads:
        thread.join(30)
    assert [type(error) for error in ended] == [EngineUnavailableError] * 6


def test_a_fork_is_refused_and_disturbs_nobody(url: str) -> None:
    engine = MooncakeStore(url)
    engine.put("a", b"content")
    child = os.fork()
    if not child:
        code = 1
        try:
            engine.get("a", 100)
        except EngineUnavailableError as error:
            code = 0 if "forked" in str(error) else 2
        finally:
            engine.close()
            os._exit(code)
    until = time.monotonic() + 30
    ended, status = 0, 0
    while not ended and time.monotonic() < until:
        assert engine.get("a", 100) == b"content"
        ended, status = os.waitpid(child, os.WNOHANG)
    assert (ended, status) == (child, 0)
    engine.close()


# -- commands ---------------------------------------------------------------------------------------------------------


def test_commands(machines: Machines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONTIGUOUSKV_CACHE", str(tmp_path / "commands"))
    one, url, folder = machines("one"), machines.url, tmp_path / "folder"
    write_prefix(one, IDS[:1000])
    write_prefix(one, np.concatenate([IDS[:1000], some_tokens(500, seed=1)]), first_chunk=250)
    one.flush()
    keys = {entry["tokens"]: entry["key"] for entry in run_json("ls", url)}  # type: ignore[attr-defined]
    assert set(keys) == {1000, 1500}
    assert "2 segments" in run("info", url).stdout
    assert run_json("verify", url)["problems"] == []  # type: ignore[index]
    assert len(run_json("pull", url, folder, "--all")["carried"]) == 2  # type: ignore[index]
    assert run_json("rm", url, keys[1500], "--remote")["deleted"] == [keys[1500]]  # type: ignore[index]
    assert run_json("push", folder, url, "--all")["carried"] == [keys[1500]]  # type: ignore[index]
    refused = run("rm", url, "--remote", "--unused-for", "1d")
    assert refused.exit_code == 2
    assert "evicts what is not used" in refused.stderr
    without_list = url.partition("?")[0]
    refused = run("ls", without_list)
    assert refused.exit_code == 2
    assert "metrics_port" in refused.stderr
    assert run("push", folder, without_list, "--all").exit_code == 0


def test_what_this_machine_uses_is_sent_again(
    machines: Machines, mooncake: MooncakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "_LOOK_S", 0.0)
    one = machines("one")
    write_prefix(one, IDS)
    one.flush()
    (info,) = engine_of(one).walk("segments")
    engine_of(one).delete([info.name])
    assert found_tokens(machines("two"), IDS) == 0
    assert found_tokens(one, IDS) == len(IDS)
    one.flush()
    assert found_tokens(machines("two"), IDS) == len(IDS)
