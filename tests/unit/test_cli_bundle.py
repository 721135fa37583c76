"""The commands that carry prefixes between stores: `export` and `import`."""

from __future__ import annotations

import json
from pathlib import Path

import huggingface_hub
import pytest
from bundle_helpers import content, tree
from fake_hub import COMMIT, FakeHub
from store_helpers import FINGERPRINT
from test_cli import damage, run, run_json

from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.hashing import root_hash


@pytest.fixture
def keys(store_path: Path) -> list[str]:
    with PrefixStore(store_path) as store:
        return tree(store)


def test_export_and_import(tmp_path: Path, store_path: Path, keys: list[str]) -> None:
    root, child, *_ = keys
    exported = run("export", store_path, child[:8], "--to", tmp_path / "bundle", "--base-model", "owner/name")
    assert exported.exit_code == 0
    assert [line[:32] for line in exported.stdout.splitlines()[:2]] == [root, child]
    assert "2 segments" in exported.stdout.splitlines()[2]
    assert "base_model: owner/name" in (tmp_path / "bundle" / "README.md").read_text()
    imported = run("import", tmp_path / "new", tmp_path / "bundle")
    assert imported.exit_code == 0
    assert imported.stdout.startswith(f"added {root}\nadded {child}\n2 segments added")
    assert [entry["key"] for entry in run_json("ls", tmp_path / "new")] == [root, child]
    assert run("verify", tmp_path / "new").exit_code == 0

    report = run_json("export", store_path, "--all", "--to", tmp_path / "all")
    assert {segment["key"] for segment in report["segments"]} == set(keys)
    report = run_json("import", tmp_path / "new", tmp_path / "all")
    assert (set(report["added"]), set(report["already_there"])) == (set(keys[2:]), {root, child})


def test_import_of_a_damaged_bundle_ends_with_status_1(tmp_path: Path, store_path: Path, keys: list[str]) -> None:
    root, child, _, alone = keys
    bundle = tmp_path / "bundle"
    assert run("export", store_path, child, alone, "--to", bundle).exit_code == 0
    path = bundle / "segments" / f"{child}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = run("import", tmp_path / "new", bundle)
    assert result.exit_code == 1
    assert f"refused {child}: " in result.stdout
    assert "0 segments added" in result.stdout
    report = json.loads(run("import", tmp_path / "new", bundle, "--json").stdout)
    assert [refused["key"] for refused in report["refused"]] == [child]
    assert run_json("ls", tmp_path / "new") == []
    assert run("import", tmp_path / "new", bundle, "--skip-refused").exit_code == 1
    assert {entry["key"] for entry in run_json("ls", tmp_path / "new")} == {root, alone}
    # A list that makes no sense is damage as well; no store is made for it.
    (bundle / "bundle.json").write_text("{}")
    result = run("import", tmp_path / "another", bundle)
    assert (result.exit_code, result.stdout, result.stderr.count("\n")) == (1, "", 1)
    for_programs = run("import", tmp_path / "another", bundle, "--json")
    assert (for_programs.exit_code, for_programs.stderr) == (1, result.stderr)
    assert json.loads(for_programs.stdout)["error"]["type"] == "BundleError"
    assert not (tmp_path / "another").exists()


def test_a_damaged_segment_is_not_exported(tmp_path: Path, store_path: Path, keys: list[str]) -> None:
    damage(store_path, keys[0], 4096)
    result = run("export", store_path, keys[1], "--to", tmp_path / "bundle")
    assert (result.exit_code, result.stdout) == (2, "")
    assert keys[0] in result.stderr
    assert not (tmp_path / "bundle").exists()


@pytest.fixture
def hub(tmp_path: Path, store_path: Path, keys: list[str], monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    run("export", store_path, keys[1], "--to", tmp_path / "uploaded")
    hub = FakeHub(tmp_path / "uploaded")
    monkeypatch.setattr(huggingface_hub, "HfApi", hub)
    return hub


def test_import_from_the_hub(tmp_path: Path, hub: FakeHub, keys: list[str]) -> None:
    before = set(tmp_path.iterdir())
    report = run_json("import", tmp_path / "new", "hf://owner/name@refs/pr/1")
    assert (report["added"], report["commit"]) == (keys[:2], COMMIT)
    # The revision is looked up once; all else is of one commit, the list first, and nothing but what it lists.
    assert hub.calls[0] == ("repo_info", None, "refs/pr/1")
    assert {revision for _, _, revision in hub.calls[1:]} == {COMMIT}
    assert hub.fetched() == ["bundle.json", *(f"segments/{key}.safetensors" for key in keys[:2])]
    # The download is gone.
    assert set(tmp_path.iterdir()) == before | {tmp_path / "new"}
    said = run("import", tmp_path / "another", "hf://owner/name").stdout
    assert f"from hf://owner/name at commit {COMMIT}" in said
    assert run_json("import", tmp_path / "another", tmp_path / "uploaded")["commit"] is None


def test_the_download_can_be_kept(tmp_path: Path, hub: FakeHub, keys: list[str]) -> None:
    report = run_json("import", tmp_path / "new", "hf://owner/name", "--download-to", tmp_path / "kept")
    assert report["added"] == keys[:2]
    assert hub.calls[0] == ("repo_info", None, None)
    kept, uploaded = content(tmp_path / "kept"), content(tmp_path / "uploaded")
    assert {name: octets for name, octets in kept.items() if not name.startswith(".cache")} == {
        name: octets for name, octets in uploaded.items() if name != "README.md"
    }


def test_a_download_that_fails_is_one_line(tmp_path: Path, hub: FakeHub) -> None:
    before = set(tmp_path.iterdir())
    result = run("import", tmp_path / "new", "hf://owner/other")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "owner/other could not be fetched" in result.stderr
    assert result.stderr.count("\n") == 1
    assert set(tmp_path.iterdir()) == before


def test_salted_prefixes_are_pointed_out(tmp_path: Path) -> None:
    with PrefixStore(tmp_path / "salted", salt="x") as store:
        tree(store)
    exported = run("export", tmp_path / "salted", "--all", "--to", tmp_path / "bundle")
    assert exported.exit_code == 0
    assert "same salt" in exported.stderr
    refused = run("import", tmp_path / "new", tmp_path / "bundle")
    assert refused.exit_code == 1
    root = root_hash(FINGERPRINT, 4, b"x").hex()
    assert f"root {root}" in refused.stdout
    imported = run("import", tmp_path / "new", tmp_path / "bundle", "--foreign-root", root)
    assert imported.exit_code == 0
    assert "same salt finds 4 of them" in imported.stderr
    (tmp_path / "salt").write_text("x\n")
    same = run("--salt-file", tmp_path / "salt", "import", tmp_path / "same", tmp_path / "bundle")
    assert (same.exit_code, same.stderr) == (0, "")
