"""Do the commands work on the address of a shared store?"""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from machines import Machines, engine_of, found, found_tokens, is_right
from store_helpers import some_tokens, write_prefix
from transformers import LlamaForCausalLM
from typer.testing import CliRunner, Result

import hf_contiguouskv.cli.warm as warm
from hf_contiguouskv.cli import app
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.fleet import upkeep

IDS = some_tokens(1001)
LONGER = np.concatenate([IDS[:1000], some_tokens(500, seed=1)])


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> object:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


@pytest.fixture
def address(machines: Machines, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A shared store with a prefix and one that continues it; commands keep their folder apart."""
    monkeypatch.setenv("CONTIGUOUSKV_CACHE", str(tmp_path / "commands"))
    one = machines("one")
    write_prefix(one, IDS[:1000])
    write_prefix(one, LONGER, first_chunk=250)
    one.flush()
    return machines.url


def keys_of(address: str) -> dict[int, str]:
    """Keys of what is there, by the length of the prefix."""
    return {entry["tokens"]: entry["key"] for entry in run_json("ls", address)}  # type: ignore[attr-defined]


def test_ls_and_info(address: str) -> None:
    assert set(keys_of(address)) == {1000, 1500}
    text = run("ls", address).stdout
    assert "2 stored prefixes" in text
    about = run_json("info", address)
    assert isinstance(about, dict)
    assert about["segments"] == 2
    assert about["here"] is None
    key = keys_of(address)[1500]
    one = run_json("info", address, key[:8])
    assert isinstance(one, dict)
    assert (one["tokens"], one["key"]) == (1500, key)
    assert "on this machine" in run("info", address).stdout
    assert key in run("info", address, key).stdout


def test_commands_that_keep_nothing_make_no_folder(address: str, tmp_path: Path) -> None:
    keys = keys_of(address)
    commands = (
        ("info", address),
        ("verify", address),
        ("pull", address, tmp_path / "pulled", "--all"),
        ("push", tmp_path / "pulled", address, "--all"),
        ("rm", address, keys[1500], "--remote"),
        ("gc", address),
    )
    for command in commands:
        assert run(*command).exit_code == 0, command
    assert run("rm", address, keys[1000]).exit_code == 2
    assert not (tmp_path / "commands").exists()


def test_the_folder_of_a_machine_may_be_named(address: str, tmp_path: Path, machines: Machines) -> None:
    about = run_json("info", address, "--cache", tmp_path / "one")
    assert isinstance(about, dict)
    assert about["here"]["segments"] == about["segments"] == 2
    assert about["here"]["path"] == str(tmp_path / "one")
    key = keys_of(address)[1500]
    assert run("pin", address, key, "--cache", tmp_path / "one").exit_code == 0
    assert {entry.key for entry in machines("one").entries() if entry.pinned} == {key}
    assert run("rm", address, key, "--cache", tmp_path / "one").exit_code == 0
    assert [entry.tokens for entry in machines("one").entries()] == [1000]
    assert set(keys_of(address)) == {1000, 1500}


def test_the_usual_folder_of_a_store_with_a_key_is_found(folder_machines: Machines, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(b"k" * 32)
    (tmp_path / "key").chmod(0o600)
    arguments = ("--key", f"file:{tmp_path / 'key'}", "info", folder_machines.url)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CONTIGUOUSKV_CACHE", str(tmp_path / "commands"))
        with PrefixStore(folder_machines.url, key=f"file:{tmp_path / 'key'}") as store:
            write_prefix(store, IDS)
            store.flush()
            path = store.path
        about = run_json(*arguments)
        assert isinstance(about, dict)
        assert about["here"]["path"] == str(path)
        assert about["here"]["segments"] == 1


def test_verify(address: str, machines: Machines) -> None:
    assert run_json("verify", address, "--deep")["problems"] == []  # type: ignore[index]
    engine = engine_of(machines("one"))
    info = next(iter(engine.walk("segments")))
    octets = bytearray(info.nbytes)
    engine.read_ranges(info.name, [(0, memoryview(octets))])
    octets[-5000] ^= 1
    engine.put(info.name, bytes(octets))
    result = run("verify", address)
    assert result.exit_code == 1
    assert "1 problem" in result.stdout


def test_rm_remote(address: str, machines: Machines) -> None:
    keys = keys_of(address)
    refused = run("rm", address, keys[1000], "--remote")
    assert refused.exit_code == 2
    assert keys[1500] in refused.stderr
    assert len(keys_of(address)) == 2
    assert "would be deleted" in run("rm", address, keys[1000], "--remote", "-r", "--dry-run").stdout
    assert len(keys_of(address)) == 2
    assert run_json("rm", address, keys[1500], "--remote")["deleted"] == [keys[1500]]  # type: ignore[index]
    assert set(keys_of(address)) == {1000}
    assert run("rm", address, keys[1000], "--remote").exit_code == 0
    assert list(engine_of(machines("one")).walk("segments")) == []
    # Who has it still has it, and does not send it again.
    assert found_tokens(machines("one"), LONGER) == 1500
    machines("one").close()
    machines("one").flush()
    assert keys_of(address) == {}


def test_rm_of_what_nobody_used(address: str) -> None:
    assert run_json("rm", address, "--remote", "--unused-for", "1h")["deleted"] == []  # type: ignore[index]
    time.sleep(1.1)  # (Object servers tell whole seconds.)
    gone = run_json("rm", address, "--remote", "--unused-for", "0s")["deleted"]  # type: ignore[index]
    assert len(gone) == 2
    assert keys_of(address) == {}


def test_rm_without_remote_is_for_this_machine(address: str) -> None:
    with PrefixStore(address) as store:
        assert found_tokens(store, IDS[:1000]) == 1000
    key = keys_of(address)[1000]
    assert run("rm", address, key).exit_code == 0
    assert set(keys_of(address)) == {1000, 1500}


@pytest.mark.parametrize(
    "arguments",
    [
        ("rm", "FOLDER", "ab", "--remote"),
        ("rm", "URL", "--remote"),
        ("rm", "URL", "ab", "--remote", "--unused-for", "1d"),
        ("rm", "URL", "ab", "--dry-run"),
        ("rm", "URL"),
        ("push", "FOLDER", "URL"),
        ("push", "FOLDER", "FOLDER", "--all"),
        ("pull", "URL", "FOLDER"),
        ("info", "URL", "ffff"),
        ("info", "FOLDER", "--cache", "FOLDER"),
    ],
    ids=" ".join,
)
def test_what_makes_no_sense_is_said(arguments: tuple[str, ...], address: str, tmp_path: Path) -> None:
    PrefixStore(tmp_path / "folder").close()
    places = {"FOLDER": str(tmp_path / "folder"), "URL": address}
    result = run(*(places.get(argument, argument) for argument in arguments))
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1


def test_push_and_pull(address: str, tmp_path: Path) -> None:
    folder, other = tmp_path / "folder", f"file://{tmp_path / 'other'}"
    first = run_json("pull", address, folder, "--all")
    assert isinstance(first, dict)
    assert len(first["carried"]) == 2
    assert run_json("pull", address, folder, "--all")["already_there"] == first["carried"]  # type: ignore[index]
    with PrefixStore(folder) as store:
        stored = found(store, LONGER)
        assert stored is not None
        assert is_right(store, stored, LONGER)
        assert store.verify(deep=True) == []
    longest = keys_of(address)[1500]
    pushed = run_json("push", folder, other, longest)
    assert isinstance(pushed, dict)
    assert len(pushed["carried"]) == 2
    again = run("push", folder, other, "--all")
    assert "0 segments sent" in again.stdout
    with PrefixStore(other, cache=tmp_path / "third") as store:
        stored = found(store, LONGER)
        assert stored is not None
        assert is_right(store, stored, LONGER)


def test_a_bundle_goes_from_one_shared_store_into_another(address: str, tmp_path: Path) -> None:
    bundle, other = tmp_path / "bundle", f"file://{tmp_path / 'other'}"
    report = run_json("export", address, "--all", "--to", bundle)
    assert isinstance(report, dict)
    assert len(report["segments"]) == 2
    assert run("import", other, bundle).exit_code == 0
    assert set(keys_of(other)) == {1000, 1500}
    # Another machine, which was not there, finds it.
    with PrefixStore(other, cache=tmp_path / "elsewhere") as store:
        stored = found(store, LONGER)
        assert stored is not None
        assert stored.tokens == 1500
        assert is_right(store, stored, LONGER)


def test_warm_stores_for_all_machines(
    machines: Machines, model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CONTIGUOUSKV_CACHE", str(tmp_path / "commands"))

    def letters(text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[ord(letter) % 100 for letter in text]])}

    monkeypatch.setattr(warm, "load_model", lambda name, dtype: (model, letters))
    text = "the quick brown fox " * 20
    (tmp_path / "a.txt").write_text(text)
    assert run("warm", machines.url, tmp_path / "a.txt").exit_code == 0
    assert machines("elsewhere").match(model, letters(text)["input_ids"]) == len(text)


def test_pull_refuses_what_is_damaged(address: str, machines: Machines, tmp_path: Path) -> None:
    engine = engine_of(machines("one"))
    info = next(info for info in engine.walk("segments") if keys_of(address)[1000] in info.name)
    octets = bytearray(info.nbytes)
    engine.read_ranges(info.name, [(0, memoryview(octets))])
    # The lowest bit of an exact value: what approximates it stays the same.
    header = int.from_bytes(octets[:8], "little") + 8
    octets[header + 4096] ^= 1
    engine.put(info.name, bytes(octets))
    result = run("pull", address, tmp_path / "folder", "--all")
    assert result.exit_code == 2
    assert "do not match their checksum" in result.stderr
    with PrefixStore(tmp_path / "folder") as store:
        assert store.entries() == []


def test_leftovers_are_collected_once_they_are_old(
    address: str, machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = machines("one")
    engine = engine_of(one)
    kept = {info.name for info in engine.walk("segments")} | {info.name for info in engine.walk("anchors")}
    engine.put(f"segments/ab/{'ab' * 16}.00000000.safetensors", b"of a machine that died")
    name = next(name for name in sorted(kept) if name.startswith("anchors/"))
    engine.put(name[:-8] + "00000000", b"")
    assert one.shared_upkeep.collect() == ([], 0)
    monkeypatch.setattr(upkeep, "_YOUNG_S", -60.0)
    names, nbytes = one.shared_upkeep.collect(dry_run=True)
    assert len(names) == 2
    assert nbytes == len(b"of a machine that died")
    one.shared_upkeep.collect()
    left = {info.name for info in engine.walk("segments")} | {info.name for info in engine.walk("anchors")}
    assert left == kept


def test_a_tenant_sees_and_deletes_only_its_own(machines: Machines) -> None:
    one, two = machines("one", salt="a"), machines("two", salt="b")
    write_prefix(one, IDS)
    one.flush()
    assert len(one.shared_upkeep.entries()) == 1
    assert two.shared_upkeep.entries() == []
    key = one.shared_upkeep.entries()[0].key
    with pytest.raises(Exception, match="no prefix"):
        two.shared_upkeep.delete([key])
    with pytest.raises(Exception, match="without a salt"):
        two.shared_upkeep.collect()
    assert len(machines("three").shared_upkeep.entries()) == 1
