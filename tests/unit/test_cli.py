"""The shell command lists, checks, cleans and deletes, and says what is wrong in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from store_helpers import some_tokens, write_prefix
from typer.testing import CliRunner, Result

from hf_contiguouskv.cli import app, human_bytes
from hf_contiguouskv.store import PrefixStore


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def keys(store_path: Path) -> list[str]:
    with PrefixStore(store_path) as store:
        write_prefix(store, some_tokens(20))
        write_prefix(store, some_tokens(40), first_chunk=5)
        return [entry.key for entry in store.entries()]


def test_ls_lists_prefixes(store_path: Path, keys: list[str]) -> None:
    result = run("ls", store_path)
    assert result.exit_code == 0
    assert all(key[:12] in result.stdout for key in keys)
    assert "2 stored prefixes" in result.stdout
    listed = json.loads(run("ls", store_path, "--json").stdout)
    assert [(entry["key"], entry["tokens"]) for entry in listed] == list(zip(keys, [20, 40], strict=True))


def test_info_describes_the_store_or_one_prefix(store_path: Path, keys: list[str]) -> None:
    assert "prefix tokens  40" in run("info", store_path).stdout
    facts = json.loads(run("info", store_path, keys[1][:8], "--json").stdout)
    assert (facts["key"], facts["tokens"], facts["chunks"]) == (keys[1], 40, 5)
    assert keys[0] in run("info", store_path, keys[0]).stdout


def test_verify_ends_with_status_1_when_bytes_are_wrong(store_path: Path, keys: list[str]) -> None:
    good = run("verify", store_path)
    assert (good.exit_code, good.stdout) == (0, "all checksums match\n")
    path = next(store_path.glob(f"segments/*/{keys[0]}.safetensors"))
    content = bytearray(path.read_bytes())
    content[-4000] ^= 255
    path.write_bytes(content)
    bad = run("verify", store_path)
    assert bad.exit_code == 1
    assert keys[0] in bad.stdout
    assert run("verify", store_path, keys[1]).exit_code == 0


def test_gc_says_what_it_would_do_and_does_it(store_path: Path, keys: list[str]) -> None:
    leftover = store_path / "index.sqlite.damaged-1"
    leftover.write_bytes(b"x" * 10_000)
    assert "would be removed: index.sqlite.damaged-1" in run("gc", store_path, "--dry-run").stdout
    assert leftover.exists()
    assert "removed: index.sqlite.damaged-1" in run("gc", store_path).stdout
    assert not leftover.exists()


def test_rm_refuses_a_parent_unless_it_may_delete_its_children(store_path: Path, keys: list[str]) -> None:
    refused = run("rm", store_path, keys[0])
    assert refused.exit_code == 2
    assert keys[1] in refused.stderr
    assert run("rm", store_path, keys[0][:10], "--recursive").stdout == f"deleted {keys[0]}\ndeleted {keys[1]}\n"
    assert json.loads(run("ls", store_path, "--json").stdout) == []


def test_pin_and_unpin(store_path: Path, keys: list[str]) -> None:
    assert run("pin", store_path, *keys).exit_code == 0
    assert all(entry["pinned"] for entry in json.loads(run("ls", store_path, "--json").stdout))
    assert run("unpin", store_path, keys[0]).exit_code == 0
    assert [entry["pinned"] for entry in json.loads(run("ls", store_path, "--json").stdout)] == [False, True]


def test_mistakes_are_one_line_and_status_2(tmp_path: Path, store_path: Path, keys: list[str]) -> None:
    for arguments in (
        ("ls", tmp_path / "nowhere"),
        ("ls", tmp_path),
        ("info", store_path, "zz"),
        ("rm", store_path, ""),
    ):
        result = run(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("contiguouskv: ")
        assert result.stderr.count("\n") == 1
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**50, "1024.0 TiB")]
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert human_bytes(count) == text
