"""The shell command lists, describes, checks, cleans and deletes, and says what is wrong in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from bundle_helpers import tree
from store_helpers import FINGERPRINT, expected_kv, geometry, some_tokens, write_prefix
from typer.testing import CliRunner, Result

from hf_contiguouskv.cli import app, human_bytes, messages_instead_of_tracebacks
from hf_contiguouskv.cli.output import human_age, human_seconds, seconds_from
from hf_contiguouskv.errors import InputError
from hf_contiguouskv.store import PrefixStore


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_json(*arguments: object) -> object:
    """What a command prints with `--json`; nothing else may be there."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


@pytest.fixture
def keys(store_path: Path) -> list[str]:
    """A prefix of 20 tokens and one of 40 that continues it."""
    with PrefixStore(store_path) as store:
        write_prefix(store, some_tokens(20))
        write_prefix(store, some_tokens(40), first_chunk=5)
        return [entry.key for entry in store.entries()]


def damage(store_path: Path, key: str, place: int = -4000) -> None:
    path = next(store_path.glob(f"segments/*/{key}.safetensors"))
    content = bytearray(path.read_bytes())
    content[place] ^= 255
    path.write_bytes(content)


def test_ls_shows_what_continues_what(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        root, child, aside, alone = tree(store)
        store.pin(child)
    lines = run("ls", store_path).stdout.splitlines()
    assert lines[0].split() == ["key", "tokens", "size", "model", "uses", "used"]
    assert [line.split("  ")[0] for line in lines[1:]] == [
        root[:12],
        f"├ {child[:12]}",
        f"└ {aside[:12]}",
        alone[:12],
        "4 stored prefixes, 112.0 KiB",
    ]
    assert [line.endswith("pinned") for line in lines] == [False, False, True, False, False, False]
    assert not any(line.endswith(" ") for line in lines)
    listed = run_json("ls", store_path)
    assert [(entry["key"], entry["tokens"], entry["continues"]) for entry in listed] == [
        (root, 20, ""),
        (child, 40, root),
        (aside, 26, root),
        (alone, 9, ""),
    ]


def test_ls_of_a_long_conversation_stays_narrow(store_path: Path) -> None:
    ids = some_tokens(4 * 40)
    with PrefixStore(store_path) as store:
        for chunks in range(1, 41):
            write_prefix(store, ids[: 4 * chunks], first_chunk=chunks - 1)
    lines = run("ls", store_path).stdout.splitlines()
    assert len(lines) == 42
    assert max(map(len, lines)) <= 80
    assert lines[40].strip().startswith("40 └ ")


def test_ls_names_what_lost_its_parent(store_path: Path, keys: list[str]) -> None:
    next(store_path.glob(f"segments/*/{keys[0]}.safetensors")).unlink()
    line = run("ls", store_path).stdout.splitlines()[1]
    assert line.startswith(keys[1][:12])
    assert line.endswith("parent lost")
    facts = run_json("info", store_path, keys[1])
    assert facts["chain"] is None
    assert "not stored any more" in facts["chain_problem"]
    assert "not stored any more" in run("info", store_path, keys[1]).stdout


def test_an_empty_store(store_path: Path) -> None:
    PrefixStore(store_path).close()
    assert run("ls", store_path).stdout == "0 stored prefixes, 0 B\n"
    assert run_json("ls", store_path) == []
    assert run_json("info", store_path)["segments"] == 0
    assert "never" in run("info", store_path).stdout
    assert run("verify", store_path).stdout == "all checksums match\n"


def test_info_describes_the_store(store_path: Path, keys: list[str]) -> None:
    with PrefixStore(store_path) as store:
        write_prefix(store, some_tokens(100, seed=3), fingerprint="ab" * 16)
        store.pin(keys[0])
        largest = store.entries()[2]
        stats = store.stats
    facts = run_json("info", store_path)
    assert (facts["segments"], facts["prefix_tokens"], facts["pinned"]) == (3, 140, 1)
    assert facts["segment_bytes"] == stats.segment_bytes < facts["disk_bytes"]
    assert facts["largest"][0] == {"key": largest.key, "bytes": largest.bytes, "tokens": 100}
    assert [model["fingerprint"] for model in facts["models"]] == [FINGERPRINT, "ab" * 16]
    assert sum(model["bytes"] for model in facts["models"]) == facts["segment_bytes"]
    assert (facts["quarantine"], facts["quarantined_bytes"]) == ([], 0)
    text = run("info", store_path).stdout
    assert "3, 1 of them pinned" in text
    assert largest.key in text
    # What this very process did is always nothing, so it is not said.
    assert not {"hits", "misses", "bytes_read", "evicted"} & set(facts)


def test_info_lists_the_quarantine(store_path: Path, keys: list[str]) -> None:
    with PrefixStore(store_path) as store:
        found = store.inner.lookup(FINGERPRINT, some_tokens(40), 4)
        store.inner.discard(found.spans[1].segment, "for a test")
        nbytes = store.stats.quarantined_bytes
    facts = run_json("info", store_path)
    assert facts["quarantine"] == [{"key": keys[1], "bytes": nbytes}]
    text = run("info", store_path).stdout
    assert "1 damaged segment" in text
    assert keys[1] in text
    assert f"would be removed, it was damaged: {keys[1]}" in run("gc", store_path, "--dry-run").stdout
    assert run_json("gc", store_path)["quarantine"] == [keys[1]]
    assert run_json("info", store_path)["quarantine"] == []


def test_info_describes_one_prefix(store_path: Path, keys: list[str]) -> None:
    facts = run_json("info", store_path, keys[1][:8])
    assert (facts["key"], facts["tokens"], facts["chunks"]) == (keys[1], 40, 5)
    assert [(link["key"], link["first_token"], link["tokens"]) for link in facts["chain"]] == [
        (keys[0], 0, 20),
        (keys[1], 20, 20),
    ]
    assert facts["prefix_bytes"] == sum(link["bytes"] for link in facts["chain"])
    assert facts["prefix_compute_s"] is None  # Nobody measured it.
    assert "unknown" in run("info", store_path, keys[1]).stdout
    assert run_json("info", store_path, keys[0])["continued_by"] == [keys[1]]
    text = run("info", store_path, keys[1].upper()).stdout
    assert all(word in text for word in (*keys, FINGERPRINT, "float32", "40, 20 of them here", "20 to 40"))


def test_info_says_what_losing_a_prefix_would_cost(store_path: Path) -> None:
    g, ids = geometry(indexed_layers=()), some_tokens(16)
    with PrefixStore(store_path) as store:
        for begin, end, seconds in ((0, 2, 1.25), (2, 4, 90.0)):
            with store.inner.begin_segment(FINGERPRINT, g, ids[: 4 * end], begin) as writer:
                for layer in range(g.num_layers):
                    writer.write_chunks(layer, 0, expected_kv(g, ids[4 * begin : 4 * end], layer))
                writer.commit(seconds)
        key = store.entries()[1].key
    facts = run_json("info", store_path, key)
    assert (facts["compute_s"], facts["prefix_compute_s"]) == (90.0, 91.25)
    assert "1 min 30 s; with all that it continues 1 min 31 s" in run("info", store_path, key).stdout


def test_verify_ends_with_status_1_when_bytes_are_wrong(store_path: Path, keys: list[str]) -> None:
    good = run("verify", store_path)
    assert (good.exit_code, good.stdout) == (0, "all checksums match\n")
    with PrefixStore(store_path) as store:
        nbytes = store.stats.segment_bytes
    assert run_json("verify", store_path) == {"bytes": nbytes, "problems": []}
    damage(store_path, keys[0])
    bad = run("verify", store_path)
    assert bad.exit_code == 1
    assert keys[0] in bad.stdout
    assert bad.stdout.endswith("\n1 problem\n")
    as_json = run("verify", store_path, "--json")
    assert as_json.exit_code == 1
    assert [problem["key"] for problem in json.loads(as_json.stdout)["problems"]] == [keys[0]]
    assert run("verify", store_path, keys[1]).exit_code == 0
    assert run("verify", store_path, keys[0][:10]).exit_code == 1


def test_gc_says_what_it_would_do_and_does_it(store_path: Path, keys: list[str]) -> None:
    leftover = store_path / "index.sqlite.damaged-1"
    leftover.write_bytes(b"x" * 10_000)
    assert "would be removed: index.sqlite.damaged-1" in run("gc", store_path, "--dry-run").stdout
    report = run_json("gc", store_path, "--dry-run")
    assert (report["dry_run"], report["removed"]) == (True, ["index.sqlite.damaged-1"])
    assert report["bytes_freed"] >= 10_000
    assert leftover.exists()
    assert "removed: index.sqlite.damaged-1" in run("gc", store_path).stdout
    assert not leftover.exists()
    assert run_json("gc", store_path)["bytes_freed"] == 0


def test_gc_deletes_what_nobody_used_for_long(store_path: Path, keys: list[str]) -> None:
    assert run_json("gc", store_path, "--unused-for", "30d")["expired"] == []
    assert run_json("gc", store_path, "--unused-for", "0s", "--dry-run")["expired"] == [keys[1], keys[0]]
    assert len(run_json("ls", store_path)) == 2
    assert run("pin", store_path, keys[0]).exit_code == 0
    assert f"removed, unused for 0s: {keys[1]}" in run("gc", store_path, "--unused-for", "0s").stdout
    assert [entry["key"] for entry in run_json("ls", store_path)] == [keys[0]]


def test_rm_refuses_a_parent_unless_it_may_delete_its_children(store_path: Path, keys: list[str]) -> None:
    refused = run("rm", store_path, keys[0])
    assert (refused.exit_code, refused.stdout) == (2, "")
    assert keys[1] in refused.stderr
    assert run("rm", store_path, keys[0][:10], "--recursive").stdout == f"deleted {keys[0]}\ndeleted {keys[1]}\n"
    assert run_json("ls", store_path) == []


@pytest.mark.parametrize("recursive", [[], ["-r"]])
def test_rm_takes_parent_and_child_in_any_order(store_path: Path, keys: list[str], recursive: list[str]) -> None:
    report = run_json("rm", store_path, keys[0], keys[1], keys[0][:5], *recursive)
    assert sorted(report["deleted"]) == sorted(keys)
    assert run_json("ls", store_path) == []


def test_rm_says_what_it_deleted_before_it_failed(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        root, child, aside, alone = tree(store)
    result = run("rm", store_path, root, child, alone)
    assert (result.exit_code, result.stdout) == (2, f"deleted {child}\n")
    assert aside in result.stderr
    assert [entry["key"] for entry in run_json("ls", store_path)] == [root, aside, alone]


def test_pin_and_unpin(store_path: Path, keys: list[str]) -> None:
    assert run_json("pin", store_path, *keys) == {"pinned": keys}
    assert all(entry["pinned"] for entry in run_json("ls", store_path))
    assert run("unpin", store_path, keys[0]).stdout == f"unpinned {keys[0]}\n"
    assert [entry["pinned"] for entry in run_json("ls", store_path)] == [False, True]
    assert run_json("unpin", store_path, keys[1]) == {"unpinned": [keys[1]]}


def mistakes(tmp_path: Path, store_path: Path, keys: list[str]) -> Iterator[tuple[object, ...]]:
    yield ("ls", tmp_path / "nowhere")
    yield ("ls", tmp_path)
    yield ("info", store_path, "zz")
    yield ("info", tmp_path / "nowhere")
    yield ("verify", store_path, "zz")
    yield ("gc", store_path, "--unused-for", "soon")
    yield ("rm", store_path, "")
    yield ("pin", store_path, keys[0], "zz")
    yield ("export", store_path, "--to", tmp_path / "bundle")
    yield ("export", store_path, keys[0], "--all", "--to", tmp_path / "bundle")
    yield ("export", store_path, "zz", "--to", tmp_path / "bundle")
    yield ("export", store_path, keys[0], "--to", store_path)
    yield ("import", tmp_path / "nowhere", tmp_path)
    yield ("import", tmp_path / "nowhere", "hf://no-owner")
    yield ("import", tmp_path / "nowhere", tmp_path, "--download-to", tmp_path)
    yield ("warm", tmp_path / "nowhere", store_path, "--chunk-size", "0")


def test_mistakes_are_one_line_and_status_2(tmp_path: Path, store_path: Path, keys: list[str]) -> None:
    for arguments in mistakes(tmp_path, store_path, keys):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, ""), arguments
        assert result.stderr.startswith("contiguouskv: "), arguments
        assert result.stderr.count("\n") == 1, arguments
        for_programs = run(*arguments, "--json")
        assert (for_programs.exit_code, for_programs.stderr) == (2, result.stderr), arguments
        error = json.loads(for_programs.stdout)["error"]
        assert error["type"].endswith("Error"), arguments
        assert f"contiguouskv: {error['message']}\n" == result.stderr, arguments
    assert sorted(path.name for path in tmp_path.iterdir()) == [store_path.name]
    assert not any(entry["pinned"] for entry in run_json("ls", store_path))


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["ls", "--json"], "MissingParameter", "STORE"),
        (["ls", "store", "--json", "--long"], "NoSuchOption", "--long"),
        (["ls", "store", "more", "--json"], "UsageError", "more"),
        (["show", "store", "--json"], "", "'show'"),
        (["--json", "ls", "store"], "NoSuchOption", "--json"),
        (["warm", "store", "file", "--json", "--dtype", "int8"], "BadParameter", "'int8'"),
        (["warm", "kv", "a.txt", "--chunk-size", "few", "--json"], "BadParameter", "--chunk-size"),
    ],
)
def test_mistakes_in_the_command_line_are_json_where_it_asks_for_json(
    arguments: list[str], kind: str, words: str
) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    error = json.loads(result.stdout)["error"]
    assert kind in error["type"]
    assert words in error["message"]
    assert result.stderr  # For people, as without --json.
    plain = run(*(argument for argument in arguments if argument != "--json"), "--no-such-option")
    assert (plain.exit_code, plain.stdout) == (2, "")


def test_help_is_no_mistake() -> None:
    result = run("ls", "--help", "--json")
    assert result.exit_code == 0
    assert "error" not in result.stdout


def test_rm_says_in_json_what_it_deleted_before_it_failed(store_path: Path) -> None:
    with PrefixStore(store_path) as store:
        root, child, aside, alone = tree(store)
    result = run("rm", store_path, root, child, alone, "--json")
    assert result.exit_code == 2
    found = json.loads(result.stdout)
    assert found["deleted"] == [child]
    assert aside in found["error"]["message"]
    assert result.stderr.count("\n") == 1


def test_a_closed_pipe_is_no_mistake() -> None:
    @messages_instead_of_tracebacks
    def command() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):
        command()


def test_help_lists_every_command() -> None:
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    of_stores = {
        "ls",
        "info",
        "verify",
        "gc",
        "rm",
        "pin",
        "unpin",
        "warm",
        "export",
        "import",
        "push",
        "pull",
        "repack",
    }
    assert names == of_stores | {"plan"}
    for name in names:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert "--json" in result.stdout


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**30, "1.0 GiB"), (2**50, "1024.0 TiB")]
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert human_bytes(count) == text


def test_times_are_readable() -> None:
    ages = [human_age(1000.0 - age, 1000.0) for age in (-5, 59, 60, 3599, 3600, 86399, 86400, 40 * 86400)]
    assert ages == ["just now", "just now", "1 min ago", "59 min ago", "1 h ago", "23 h ago", "1 d ago", "40 d ago"]
    lengths = [human_seconds(seconds) for seconds in (0.25, 1.5, 12.4, 200, 7500)]
    assert lengths == ["0.25 s", "1.5 s", "12 s", "3 min 20 s", "2 h 5 min"]
    assert [seconds_from(text) for text in ("45s", "90m", "12h", "30d", "2w", "1.5h")] == [
        45,
        5400,
        43200,
        30 * 86400,
        14 * 86400,
        5400,
    ]
    for text in ("", "30", "d", "-1d", "1y", "1d2h", "nan", "infs"):
        with pytest.raises(InputError, match="length of time"):
            seconds_from(text)
