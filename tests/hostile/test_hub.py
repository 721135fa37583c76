"""A repository on the Hub whose owner means ill, downloads that are cut off, and options that hold secrets."""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tally import Figures
from typer.testing import CliRunner, Result
from unit.fake_hub import COMMIT, FakeHub
from unit.store_helpers import some_tokens, spoil_key_index, write_prefix

from hf_contiguouskv.cli import app
from hf_contiguouskv.errors import StoreError, StoreFullError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.bundle import BundleError, export_bundle
from hf_contiguouskv.store.bundle.hub import download_folder, fetch_bundle
from hf_contiguouskv.store.bundle.manifest import MAX_MANIFEST_BYTES

IDS = some_tokens(40)
LEFT = "contiguouskv-download-" + "0123456789abcdef"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def keys(store_path: Path) -> list[str]:
    with PrefixStore(store_path) as store:
        write_prefix(store, IDS[:20])
        write_prefix(store, IDS, first_chunk=5)
        return [entry.key for entry in store.entries()]


@pytest.fixture
def hub(tmp_path: Path, store_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """A repository that holds a bundle, and more that nobody asked for."""
    folder = tmp_path / "uploaded" / "bundle"
    with PrefixStore(store_path) as store:
        export_bundle(store, keys, folder)
    (folder / "config.json").write_text("{}")
    (folder / "segments" / f"{'0' * 32}.safetensors").write_bytes(bytes(2**20))
    hub = FakeHub(folder)
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


def segment_path(key: str) -> str:
    return f"segments/{key}.safetensors"


# -- the repository ---------------------------------------------------------------------------------------------------


def test_only_what_is_listed_is_fetched_and_all_of_one_commit(
    tmp_path: Path, hub: FakeHub, keys: list[str], attacks: Figures
) -> None:
    fetched = fetch_bundle("owner/name", "main", tmp_path / "to")
    assert fetched.commit == COMMIT
    assert fetched.bytes == sum((hub.folder / segment_path(key)).stat().st_size for key in keys)
    assert hub.fetched() == ["bundle.json", *map(segment_path, keys)]
    assert [revision for _, _, revision in hub.calls] == ["main", *[COMMIT] * (len(hub.calls) - 1)]
    attacks.add("file that is not listed not fetched")


@pytest.mark.parametrize("commit", [None, "main", "", "0" * 39, "../" * 13 + "x", f"{COMMIT}\n"])
def test_a_revision_that_leads_to_no_commit_is_refused(
    tmp_path: Path, hub: FakeHub, commit: str | None, attacks: Figures
) -> None:
    hub.commit = commit
    with pytest.raises(StoreError, match="names no commit"):
        fetch_bundle("owner/name", None, tmp_path / "to")
    assert hub.fetched() == []
    attacks.add("revision without a commit refused")


@pytest.mark.parametrize("told", [(MAX_MANIFEST_BYTES + 1, None), (2**60, None), None])
def test_a_list_that_is_too_long_or_missing_is_not_fetched(
    tmp_path: Path, hub: FakeHub, told: tuple[int, str | None] | None, attacks: Figures
) -> None:
    hub.told["bundle.json"] = told
    with pytest.raises(StoreError, match=r"more than|not a bundle"):
        fetch_bundle("owner/name", None, tmp_path / "to")
    assert hub.fetched() == []
    attacks.add("list of a repository not fetched")


@pytest.mark.parametrize("told", ["longer", "shorter", "another digest", "missing"])
def test_a_repository_that_is_not_what_its_list_says_is_not_fetched(
    tmp_path: Path, hub: FakeHub, keys: list[str], told: str, attacks: Figures
) -> None:
    path = segment_path(keys[1])
    size = (hub.folder / path).stat().st_size
    hub.told[path] = {
        "longer": (2**50, None),
        "shorter": (size - 1, None),
        "another digest": (size, "0" * 64),
        "missing": None,
    }[told]
    with pytest.raises(BundleError, match=keys[1]):
        fetch_bundle("owner/name", None, tmp_path / "to")
    assert hub.fetched() == ["bundle.json"]
    attacks.add("repository that is not as listed not fetched")


def test_a_download_has_a_bound(
    tmp_path: Path, hub: FakeHub, keys: list[str], monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    total = sum((hub.folder / segment_path(key)).stat().st_size for key in keys)
    with pytest.raises(StoreFullError, match="--max-bytes"):
        fetch_bundle("owner/name", None, tmp_path / "to", max_bytes=total - 1)
    assert hub.fetched() == ["bundle.json"]
    before = set(tmp_path.iterdir())
    result = run("import", tmp_path / "new", "hf://owner/name", "--max-bytes", total - 1)
    assert result.exit_code == 2
    assert set(tmp_path.iterdir()) == before
    assert run("import", tmp_path / "new", "hf://owner/name", "--max-bytes", total).exit_code == 0
    # A list may say what it likes, and the repository agree: the disk is never filled to its end.
    listed = json.loads((hub.folder / "bundle.json").read_text())
    listed["segments"][1]["bytes"] = 2**52
    (hub.folder / "bundle.json").write_text(json.dumps(listed))
    hub.told[segment_path(keys[1])] = (2**52, None)
    with pytest.raises(StoreFullError, match="free on the disk"):
        fetch_bundle("owner/name", None, tmp_path / "again")
    attacks.add("download without end refused")


def test_what_the_hub_says_is_printed_in_one_printable_line(
    tmp_path: Path, hub: FakeHub, keys: list[str], attacks: Figures
) -> None:
    def fail(path: str) -> None:
        raise RuntimeError("\x1b[2J\nWARNING all is well " + "x" * 7 * 2**20)

    hub.on_download = fail
    result = run("import", tmp_path / "new", "hf://owner/name")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert result.stderr.rstrip("\n").isprintable()
    assert len(result.stderr) < 2100
    attacks.add("words of the Hub escaped")


# -- folders of downloads ---------------------------------------------------------------------------------------------


def test_a_download_is_for_its_owner_only(tmp_path: Path, hub: FakeHub, attacks: Figures) -> None:
    seen = []
    hub.on_download = lambda path: seen.extend(
        stat.S_IMODE(place.stat().st_mode) for place in tmp_path.glob("contiguouskv-download-*")
    )
    before = os.umask(0)
    try:
        assert run("import", tmp_path / "new", "hf://owner/name").exit_code == 0
    finally:
        os.umask(before)
    assert seen == [0o700] * 3
    assert not list(tmp_path.glob("contiguouskv-download-*"))
    attacks.add("download that others cannot read")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_takes_the_download_away(
    tmp_path: Path, hub: FakeHub, keys: list[str], number: signal.Signals, attacks: Figures
) -> None:
    def die(path: str) -> None:
        if path == segment_path(keys[1]):
            os.kill(os.getpid(), number)

    hub.on_download = die
    before = set(tmp_path.iterdir())
    assert run("import", tmp_path / "new", "hf://owner/name").exit_code == 128 + number
    assert set(tmp_path.iterdir()) == before
    attacks.add("download taken away after a signal")


def test_what_a_killed_download_left_is_collected_and_one_that_goes_on_is_not(
    tmp_path: Path, hub: FakeHub, keys: list[str], attacks: Figures
) -> None:
    reading, writing = os.pipe()

    def die(path: str) -> None:
        if path == segment_path(keys[1]):
            os.write(writing, b"x")
            time.sleep(600)

    pid = os.fork()
    if pid == 0:
        try:
            hub.on_download = die
            run("import", tmp_path / "new", "hf://owner/name")
        finally:
            os._exit(0)
    assert os.read(reading, 1) == b"x"
    (left,) = tmp_path.glob("contiguouskv-download-*")
    assert (left / segment_path(keys[0])).exists()
    assert run("import", tmp_path / "new", "hf://owner/name").exit_code == 0
    assert left.exists()  # Its process is alive.
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert run("import", tmp_path / "new", "hf://owner/name").exit_code == 0
    assert not left.exists()
    attacks.add("download of a killed process collected")


def test_nothing_is_collected_that_is_no_download(tmp_path: Path, attacks: Figures) -> None:
    """A user who may rename things beside the store gives something precious the name of a download."""
    precious = tmp_path / "precious"
    (precious / "segments").mkdir(parents=True)
    (precious / "segments" / "file").write_text("mine")
    (precious / "thesis.txt").write_text("mine")
    (tmp_path / "beside").mkdir()
    for make in (
        lambda place: precious.rename(place),
        lambda place: place.symlink_to(tmp_path / "away"),
        lambda place: place.write_text("mine"),
    ):
        place = tmp_path / "beside" / LEFT
        make(place)
        with download_folder(tmp_path / "beside") as folder:
            assert folder != place
        assert os.path.lexists(place)
        if place.is_symlink():
            place.unlink()
        elif place.is_file():
            assert place.read_text() == "mine"
        else:
            place.rename(tmp_path / "away")
        assert (tmp_path / "away" / "thesis.txt").read_text() == "mine"
        assert (tmp_path / "away" / "segments" / "file").read_text() == "mine"
        attacks.add("what only has the name of a download not deleted")


def test_links_in_a_left_download_are_deleted_and_not_followed(tmp_path: Path, attacks: Figures) -> None:
    outside = tmp_path / "outside"
    (outside / "inner").mkdir(parents=True)
    (outside / "inner" / "file").write_text("mine")
    left = tmp_path / LEFT
    (left / ".cache").mkdir(parents=True)
    left.chmod(0o700)
    (left / "bundle.json").symlink_to(outside / "inner" / "file")
    (left / "segments").symlink_to(outside)
    (left / ".cache" / "more").symlink_to(outside / "inner")
    with download_folder(tmp_path):
        assert not left.exists()
    assert (outside / "inner" / "file").read_text() == "mine"
    attacks.add("link in a left download not followed")


# -- options that hold secrets ----------------------------------------------------------------------------------------


def test_salt_and_key_come_from_files_and_variables_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    (tmp_path / "salt").write_bytes(b"tenant \xff\n")
    (tmp_path / "key").write_bytes(b"k" * 32 + b"\n")
    (tmp_path / "key").chmod(0o600)
    monkeypatch.setitem(os.environb, b"THE_SALT", b"tenant \xff")
    monkeypatch.setenv("THE_KEY", "k" * 32)
    with PrefixStore(tmp_path / "store", salt=b"tenant \xff", key=b"k" * 32) as store:
        write_prefix(store, IDS)
        (key,) = (entry.key for entry in store.entries())
    with PrefixStore(tmp_path / "store", key=b"k" * 32) as store:
        write_prefix(store, some_tokens(9, seed=4))
    for salt in (("--salt-file", tmp_path / "salt"), ("--salt-env", "THE_SALT")):
        for secret in (f"file:{tmp_path / 'key'}", "env:THE_KEY"):
            result = run(*salt, "--key", secret, "ls", tmp_path / "store", "--json")
            assert [entry["key"] for entry in json.loads(result.stdout)] == [key]
            assert run(*salt, "--key", secret, "verify", tmp_path / "store", "--deep").exit_code == 0
    # What everybody can see in the list of processes is not taken for a secret, and not printed.
    result = run("--key", "k" * 32, "ls", tmp_path / "store")
    assert result.exit_code == 2
    assert "k" * 32 not in result.stderr
    assert run("--salt", "tenant", "ls", tmp_path / "store").exit_code == 2
    attacks.add("secret on a command line not taken")


@pytest.mark.parametrize(
    "options",
    [
        ("--salt-file", "missing"),
        ("--salt-file", "empty"),
        ("--salt-env", "NOT_SET"),
        ("--salt-env", "EMPTY"),
        ("--salt-env", "EMPTY", "--salt-file", "empty"),
        ("--key", "env:NOT_SET"),
        ("--key", "file:missing"),
        ("--key", "env:"),
        ("--key", ""),
    ],
)
def test_a_tenant_without_a_salt_is_not_everybody(
    tmp_path: Path, keys: list[str], store_path: Path, options: Any, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    """What was to be a secret and is not there must not mean that there is none."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EMPTY", "")
    Path("empty").write_text(" \n")
    result = run(*options, "ls", store_path)
    assert result.exit_code == 2
    assert not any(key[:12] in result.stdout for key in keys)
    assert result.stderr
    attacks.add("missing secret not taken for none")


def test_options_of_one_command_are_not_those_of_the_next(tmp_path: Path, keys: list[str], store_path: Path) -> None:
    (tmp_path / "salt").write_text("tenant")
    assert json.loads(run("--salt-file", tmp_path / "salt", "ls", store_path, "--json").stdout) == []
    assert [entry["key"] for entry in json.loads(run("ls", store_path, "--json").stdout)] == keys


@pytest.mark.parametrize("command", ["ls", "info", "verify", "gc"])
def test_a_store_that_others_may_write_is_used_only_when_asked_for(
    keys: list[str], store_path: Path, command: str, attacks: Figures
) -> None:
    store_path.chmod(0o777)
    result = run(command, store_path)
    assert result.exit_code == 2
    assert "may be written by others" in result.stderr
    assert run("--trust-owner", command, store_path).exit_code == 0
    attacks.add("store that others may write refused")


def test_verify_deep_sees_what_verify_does_not(keys: list[str], store_path: Path, attacks: Figures) -> None:
    with PrefixStore(store_path) as store:
        spoil_key_index(store, keys[0])
    assert run("verify", store_path).exit_code == 0
    result = run("verify", store_path, "--deep")
    assert result.exit_code == 1
    assert "key_index.1" in result.stdout
    attacks.add("wrong approximation found by verify --deep")
