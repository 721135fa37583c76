"""Exports are for their owner alone, write nothing that an import would refuse, and delete nothing but their own."""

from __future__ import annotations

import json
import os
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tally import Figures
from typer.testing import CliRunner
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, spoil_key_index, write_prefix

from hf_contiguouskv.cli import app
from hf_contiguouskv.errors import InputError, SegmentCorruptError, StoreError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.bundle import export_bundle, import_bundle
from hf_contiguouskv.store.hashing import root_hash
from hostile.conftest import as_stranger, needs_root, open_to_all
from hostile.crafting import crafted, plant

G = geometry()
C = G.chunk_size
IDS = some_tokens(40)


@pytest.fixture
def umask() -> Iterator[Callable[[int], object]]:
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def modes(folder: Path) -> set[tuple[bool, int]]:
    """Whether it is a folder, and its mode, of `folder` and all below."""
    return {
        (path.is_dir(), stat.S_IMODE(path.stat(follow_symlinks=False).st_mode)) for path in (folder, *folder.rglob("*"))
    }


def stored(store: PrefixStore) -> list[str]:
    write_prefix(store, IDS[:20])
    write_prefix(store, IDS, first_chunk=5)
    return [entry.key for entry in store.entries()]


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o002])
@pytest.mark.parametrize("existing", [False, True])
def test_an_export_is_for_its_owner_only(
    tmp_path: Path, store_path: Path, umask: Callable[[int], object], mask: int, existing: bool, attacks: Figures
) -> None:
    umask(mask)
    folder = tmp_path / "exports" / "bundle"
    seen: set[tuple[bool, int]] = set()
    if existing:
        folder.mkdir(parents=True)
    with PrefixStore(store_path) as store:
        keys = stored(store)

        def look(done: int, total: int) -> None:  # While it is being made, too.
            (place,) = folder.parent.iterdir()
            seen.update(modes(place))

        export_bundle(store, keys, folder, look)
    assert seen == modes(folder) == {(True, 0o700), (False, 0o600)}
    attacks.add("export that others cannot read")


@needs_root
def test_a_stranger_reads_nothing_of_an_export(tmp_path: Path, store_path: Path, attacks: Figures) -> None:
    with PrefixStore(store_path) as store:
        export_bundle(store, stored(store), tmp_path / "bundle")
    open_to_all(tmp_path)
    names = [str(path) for path in (tmp_path / "bundle").rglob("*")]

    def read() -> None:
        with pytest.raises(PermissionError):
            os.listdir(tmp_path / "bundle")
        for name in names:
            with pytest.raises(PermissionError):
                Path(name).read_bytes()

    as_stranger(read)
    attacks.add("export that a stranger cannot read")


LIES: dict[str, dict[str, Any]] = {
    "a fingerprint of markup": {"fingerprint": "`[click](http://evil)` <img src=x>"},
    "a fingerprint of front matter": {"fingerprint": "--- license: other"},
    "a salt that it has not": {"header": {"salted": "1"}},
    "a root that is none of its model": {"header": {"root": "ab" * 16}},
    "a beginning of other tokens": {"header": {"beginning": "ab" * 16}},
}


@pytest.mark.parametrize("lie", LIES)
def test_what_an_import_refuses_is_not_exported(tmp_path: Path, store_path: Path, lie: str, attacks: Figures) -> None:
    segment = crafted(G, IDS, **LIES[lie])
    key = json.loads(segment[8 : 8 + int.from_bytes(segment[:8], "little")])["__metadata__"]["key"]
    PrefixStore(store_path).close()
    plant(store_path, key, segment)
    (store_path / "index.sqlite").unlink()
    with PrefixStore(store_path) as store:
        with pytest.raises(StoreError) as caught:
            export_bundle(store, [key], tmp_path / "bundle")
        assert "is not sound" in str(caught.value) or "no stored prefix" in str(caught.value)
    assert not list(tmp_path.glob("bundle*"))
    attacks.add("lie of a stored segment not exported")


def test_approximations_that_are_wrong_are_not_exported(tmp_path: Path, store_path: Path, attacks: Figures) -> None:
    with PrefixStore(store_path) as store:
        (key, *_) = stored(store)
        spoil_key_index(store, key)
    with PrefixStore(store_path) as store:
        assert store.verify() == []
        with pytest.raises(SegmentCorruptError, match=r"key_index\.1: not that of the payload's keys"):
            export_bundle(store, [key], tmp_path / "bundle")
    assert not list(tmp_path.glob("bundle*"))
    attacks.add("wrong approximation not exported")


@pytest.mark.parametrize(
    "name", ["owner/na\nme: x", "owner/name\n", "o/n\x1b[2J", "a/b/c", "../x", "x" * 200, "o/n](http://e)"]
)
def test_the_card_holds_no_word_that_was_not_checked(
    tmp_path: Path, store_path: Path, name: str, attacks: Figures
) -> None:
    with PrefixStore(store_path) as store:
        with pytest.raises(InputError, match="base_model") as caught:
            export_bundle(store, stored(store), tmp_path / "bundle", base_model=name)
        assert str(caught.value).isprintable()
    assert not (tmp_path / "bundle").exists()
    attacks.add("card with words of strangers not written")


def test_an_export_that_fails_deletes_nothing_but_its_own(tmp_path: Path, store_path: Path, attacks: Figures) -> None:
    """Whatever comes into the folder meanwhile stays, links and what they lead to included."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "README.md").write_text("mine")
    for existing in (False, True):
        folder = tmp_path / f"exports {existing}" / "bundle"
        folder.parent.mkdir()
        if existing:
            folder.mkdir()

        def interfere(done: int, total: int, folder: Path = folder) -> None:
            (place,) = folder.parent.iterdir()
            (place / "README.md").write_text("a user's")
            (place / "segments" / "more").symlink_to(tmp_path / "precious")
            (place / "segments" / "kept").mkdir()
            (place / "segments" / "kept" / "file").write_text("a user's")
            raise KeyboardInterrupt

        with PrefixStore(store_path) as store, pytest.raises(KeyboardInterrupt):
            export_bundle(store, stored(store), folder, interfere)
        (place,) = folder.parent.iterdir()
        assert (place / "README.md").read_text() == "a user's"
        assert (place / "segments" / "kept" / "file").read_text() == "a user's"
        assert not list(place.rglob("*.safetensors"))
    assert (tmp_path / "precious" / "README.md").read_text() == "mine"
    attacks.add("what others put into an export not deleted")


def test_a_folder_that_is_swapped_for_a_link_is_not_written_through(
    tmp_path: Path, store_path: Path, attacks: Figures
) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (tmp_path / "exports").mkdir()

    def swap(done: int, total: int) -> None:
        if done == total:
            return
        (place,) = (tmp_path / "exports").iterdir()
        (place / "segments").rename(place / "moved")
        (place / "segments").symlink_to(outside)

    with PrefixStore(store_path) as store:
        export_bundle(store, stored(store), tmp_path / "exports" / "bundle", swap)
    assert list(outside.iterdir()) == []
    attacks.add("link in an export not followed")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_leaves_no_half_of_an_export(
    tmp_path: Path, store_path: Path, number: signal.Signals, monkeypatch: pytest.MonkeyPatch, attacks: Figures
) -> None:
    with PrefixStore(store_path) as store:
        stored(store)

    def export_and_die(*arguments: Any) -> object:
        store, keys, to, _, base_model = arguments
        return export_bundle(store, keys, to, lambda done, total: os.kill(os.getpid(), number), base_model)

    monkeypatch.setattr("hf_contiguouskv.cli.bundle.export_bundle", export_and_die)
    before = signal.getsignal(number)
    result = CliRunner().invoke(app, ["export", str(store_path), "--all", "--to", str(tmp_path / "exports" / "bundle")])
    assert result.exit_code == 128 + number
    assert list((tmp_path / "exports").iterdir()) == []
    assert signal.getsignal(number) == before
    attacks.add("half an export taken away after a signal")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere file names are text")
def test_an_export_to_a_path_that_is_no_text(tmp_path: Path, store_path: Path, attacks: Figures) -> None:
    with PrefixStore(store_path) as store:
        keys = stored(store)
    for as_json in ([], ["--json"]):
        to = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\xfe" + str(len(as_json)).encode())
        result = CliRunner().invoke(app, ["export", str(store_path), "--all", "--to", to, *as_json])
        assert result.exit_code == 0, result.output
        said = json.loads(result.stdout)["folder"] if as_json else result.stdout
        assert "\\udcff\\udcfe" in said
        result.stdout.encode()
        with PrefixStore(tmp_path / f"other{len(as_json)}") as store:
            assert set(import_bundle(store, to).added) == set(keys)
    attacks.add("export to a path that is no text")


def test_what_has_another_salt_is_exported_whole_or_not_at_all(tmp_path: Path) -> None:
    """(An honest export of a tenant: import by the same tenant takes it.)"""
    with PrefixStore(tmp_path / "one", salt="tenant") as store:
        keys = stored(store)
        report = export_bundle(store, keys, tmp_path / "bundle")
    assert set(report.salted) == set(keys)
    with PrefixStore(tmp_path / "two", salt="tenant") as store:
        assert set(import_bundle(store, tmp_path / "bundle").added) == set(keys)
        assert store.inner.lookup(FINGERPRINT, IDS, C, geometry=G) is not None
    assert root_hash(FINGERPRINT, C, b"tenant").hex() not in (tmp_path / "bundle" / "README.md").read_text()
