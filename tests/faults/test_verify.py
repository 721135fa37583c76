"""`verify` finds every kind of damage, names the segment (for payload, layer and chunk too), and nothing sound."""

from __future__ import annotations

import json
import random
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner, Result
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.cli import app
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.hashing import TokenIds

from .damage import flip, kind_of, regions, segment_files, segment_path
from .scale import REPRODUCIBLE, scaled

GEOMETRIES = {
    "one layer per group": {"packed_layers": (1,), "compact_layers": (2,)},
    "two layers per group": {"packed_layers": (1,), "compact_layers": (2,), "layers_per_group": 2},
}


def make_store(path: Path, **changes: object) -> list[str]:
    """A root of 20 tokens, a child of 15 more, its sibling of 6, and another root of 9; their keys."""
    g = geometry(**changes)
    with PrefixStore(path) as store:
        written = zip(prompts(), (0, 5, 5, 0), strict=True)
        return [write_prefix(store, ids, first, g).spans[-1].segment.key for ids, first in written]


def prompts() -> list[TokenIds]:
    parent = some_tokens(20, seed=1)
    child, sibling = (np.concatenate([parent, some_tokens(count, seed=count)]) for count in (15, 6))
    return [parent, child, sibling, some_tokens(9, seed=4)]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture(params=list(GEOMETRIES))
def store(request: pytest.FixtureRequest, store_path: Path) -> Iterator[PrefixStore]:
    make_store(store_path, **GEOMETRIES[request.param])
    with PrefixStore(store_path) as opened:
        yield opened


def test_a_sound_store_has_no_problems(store: PrefixStore) -> None:
    assert len(store.entries()) == 4
    assert store.verify() == []
    assert [store.verify(entry.key) for entry in store.entries()] == [[]] * 4
    result = run("verify", store.path)
    assert (result.exit_code, result.stdout) == (0, "all checksums match\n")


# ---- every byte of a segment ----


def some_bytes(start: int, end: int, count: int) -> list[int]:
    """First, last, and `count` places between them."""
    return sorted({start, end - 1, *random.Random(start).sample(range(start, end), min(count, end - start))})


def test_a_flip_in_any_kind_of_byte_is_found(store: PrefixStore) -> None:
    found: set[str] = set()
    for key, path in segment_files(store.path).items():
        for region, (start, end) in regions(path).items():
            count = {"length": 8, "json": 150}.get(region, 6)
            for byte in some_bytes(start, end, count):
                bit = byte % 8
                flip(path, byte, bit)
                problems = store.verify(key)
                assert problems, (region, byte, bit)
                assert {problem.key for problem in problems} == {key}
                assert all(problem.problem for problem in problems)
                flip(path, byte, bit)
            found.add(kind_of(region))
    payload = {"payload", "leader_keys", "token_ids", "padding"}
    copies = {"key_index", "coarse_index", "coarse_levels", "key_scale", "values4", "compact"}
    sums = {"checksums.payload", "checksums.values4", "checksums.compact", "checksums.tensors"}
    assert found == payload | copies | sums | {"length", "json", "spaces"}
    assert store.verify() == []  # What was turned back is sound again: nothing was moved or changed.


def test_the_report_names_layer_and_chunk(store: PrefixStore) -> None:
    for key, path in segment_files(store.path).items():
        header, data = read_layout(path)
        first_chunk = int(header["__metadata__"]["first_chunk"])
        for name in (name for name in header if name.startswith("payload.")):
            chunks, layers, *extent = header[name]["shape"]
            nbytes = 4 * int(np.prod(extent))
            for chunk in range(chunks):
                for inside in range(layers):
                    layer = int(name.removeprefix("payload.")) * layers_per_group(header) + inside
                    byte = data + header[name]["data_offsets"][0] + (chunk * layers + inside) * nbytes + chunk % nbytes
                    flip(path, byte, 3)
                    problems = store.verify(key)
                    flip(path, byte, 3)
                    assert [problem.problem.split(":")[0] for problem in problems] == [
                        f"layer {layer}, chunk {first_chunk + chunk}"
                    ]
                    assert str(path) in problems[0].where


def read_layout(path: Path) -> tuple[dict, int]:
    octets = path.read_bytes()
    length = int.from_bytes(octets[:8], "little")
    return json.loads(octets[8 : 8 + length]), 8 + length


def layers_per_group(header: dict) -> int:
    return int(header["__metadata__"]["layers_per_group"])


def test_the_command_ends_with_status_1_and_names_the_segment(store: PrefixStore) -> None:
    key, path = next(iter(segment_files(store.path).items()))
    kinds = {kind_of(region): place for region, place in regions(path).items()}
    assert len(kinds) == 17
    for kind, (start, _) in kinds.items():
        flip(path, start, 4)
        for arguments in (["verify", store.path], ["verify", store.path, key]):
            result = run(*arguments)
            assert result.exit_code == 1, kind
            assert key in result.stdout
            assert "problem" in result.stdout.splitlines()[-1]
            assert ("layer " in result.stdout and "chunk " in result.stdout) or kind != "payload"
        flip(path, start, 4)
    assert run("verify", store.path).exit_code == 0


# ---- the index ----

WRONG = {
    ("segments", "id"): "id + 1000",
    ("segments", "key"): "'" + "ab" * 16 + "'",
    ("segments", "fingerprint"): "'another model'",
    ("segments", "beginning"): "'" + "cd" * 16 + "'",
    ("segments", "parent"): "zeroblob(16)",
    ("segments", "first_chunk"): "first_chunk + 1",
    ("segments", "num_chunks"): "num_chunks + 1",
    ("segments", "num_tokens"): "num_tokens + 1",
    ("segments", "chunk_size"): "chunk_size * 2",
    ("segments", "num_layers"): "num_layers + 1",
    ("segments", "dtype"): "'bfloat16'",
    ("segments", "nbytes"): "nbytes + 4096",
    ("segments", "compute_ms"): "compute_ms + 1",
    ("segments", "pinned"): "1",
    ("segments", "root"): "zeroblob(16)",
    ("chunks", "hash"): "zeroblob(16)",
    ("chunks", "segment"): "segment + 1000",
    ("chunks", "parent"): "zeroblob(16)",
    ("chunks", "position"): "position + 1",
    ("chunks", "tokens"): "zeroblob(length(tokens))",
    ("totals", "root"): "zeroblob(16)",
    ("totals", "fingerprint"): "'another'",
    ("totals", "chunk_size"): "chunk_size * 2",
    ("totals", "segments"): "segments + 1",
    ("totals", "tokens"): "tokens - 1",
    ("totals", "bytes"): "bytes + 4096",
}
"""For each column a value that makes sense by itself."""
UNKNOWABLE = {("segments", "created"), ("segments", "last_used"), ("segments", "uses")}
"""Columns that nothing else tells about: a sensible value cannot be told from the right one."""
NONSENSE = [
    ("segments", "created", "'yesterday'"),
    ("segments", "created", "9e999"),
    ("segments", "last_used", "x'00'"),
    ("segments", "last_used", "1e300"),
    ("segments", "created", "-1.0"),
    ("segments", "uses", "-1"),
    ("segments", "uses", "'often'"),
    ("segments", "pinned", "7"),
    ("segments", "root", "'text'"),
    ("segments", "root", "x'00'"),
    ("segments", "key", "'../../etc/passwd'"),
    ("segments", "parent", "'text'"),
    ("segments", "num_tokens", "-5"),
    ("segments", "num_tokens", "0"),
    ("segments", "chunk_size", "0"),
    ("segments", "nbytes", "1e30"),
    ("segments", "first_chunk", "9223372036854775807"),
    ("chunks", "hash", "'text'"),
    ("chunks", "tokens", "x'00'"),
    ("chunks", "tokens", "'text'"),
    ("chunks", "position", "-1"),
    ("chunks", "position", "'first'"),
    ("chunks", "segment", "'abc'"),
    ("chunks", "parent", "x''"),
    ("totals", "root", "'text'"),
    ("totals", "fingerprint", "x'ff'"),
    ("totals", "chunk_size", "'wide'"),
    ("totals", "segments", "-1"),
    ("totals", "tokens", "'many'"),
    ("totals", "bytes", "-1e30"),
    ("meta", "value", "'many'"),
    ("meta", "value", "'1'"),
    ("meta", "name", "'formats'"),
]


ONE_ROW = {"segments": "id = 2", "chunks": "segment = 2 AND position = 1", "totals": "1", "meta": "name = 'format'"}


@pytest.fixture
def keys(store_path: Path) -> list[str]:
    return make_store(store_path)


def execute(folder: Path, statement: str) -> None:
    db = sqlite3.connect(folder / "index.sqlite", isolation_level=None)
    assert db.execute(statement).rowcount > 0
    db.close()


def test_every_column_is_looked_at(keys: list[str], store_path: Path) -> None:
    db = sqlite3.connect(store_path / "index.sqlite")
    columns = {
        (table, row[1])
        for (table,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
        for row in db.execute(f"PRAGMA table_info({table})")
    }
    db.close()
    assert columns == set(WRONG) | UNKNOWABLE | {("meta", "name"), ("meta", "value")}
    assert {(table, column) for table, column, _ in NONSENSE} >= UNKNOWABLE | {("meta", "name"), ("meta", "value")}


def assert_found_and_repaired(folder: Path, statement: str) -> None:
    """A store that is open says what is wrong, the command repairs it (as the report promises), and all is found."""
    with PrefixStore(folder) as store:
        execute(folder, statement)
        problems = store.verify()
        assert problems, "nothing was reported"
        assert any("index" in str(problem) for problem in problems), problems
    assert run("gc", folder).exit_code == 0
    after = run("verify", folder)
    assert after.exit_code == 0, after.stdout
    assert_all_found(folder)


def assert_all_found(folder: Path) -> None:
    with PrefixStore(folder) as store:
        for ids in prompts():
            stored = store.inner.lookup(FINGERPRINT, ids, geometry().chunk_size)
            assert stored is not None
            assert stored.tokens == len(ids)


@pytest.mark.parametrize(("table", "column"), list(WRONG), ids=map(".".join, WRONG))
def test_a_wrong_value_in_the_index_is_found(keys, store_path, table, column) -> None:
    statement = f"UPDATE {table} SET {column} = {WRONG[table, column]} WHERE {ONE_ROW[table]}"
    assert_found_and_repaired(store_path, statement)


@pytest.mark.parametrize(("table", "column", "value"), [row for row in NONSENSE if row[0] != "meta"])
def test_nonsense_in_the_index_is_found(keys, store_path, table, column, value) -> None:
    assert_found_and_repaired(store_path, f"UPDATE {table} SET {column} = {value} WHERE {ONE_ROW[table]}")


@pytest.mark.parametrize(("table", "column", "value"), [row for row in NONSENSE if row[0] == "meta"])
def test_an_index_without_its_mark_is_found(keys, store_path, table, column, value) -> None:
    execute(store_path, f"UPDATE {table} SET {column} = {value} WHERE {ONE_ROW[table]}")
    result = run("verify", store_path)
    # (That of an earlier release is no damage. It is rebuilt all the same.)
    assert result.exit_code == (0 if value == "'1'" else 1), result.stdout
    assert ("index" in result.stdout) == (value != "'1'")
    assert run("gc", store_path).exit_code == 0
    assert run("verify", store_path).exit_code == 0
    assert_all_found(store_path)


ROWS = {
    "a segment is not indexed": "DELETE FROM segments WHERE id = 2",
    "a chunk is not indexed": "DELETE FROM chunks WHERE segment = 2 AND position = 1",
    "no chunk of a segment is indexed": "DELETE FROM chunks WHERE segment = 2",
    "a segment that does not exist": f"INSERT INTO segments SELECT 77, '{'ab' * 16}', fingerprint, beginning, parent, "
    "first_chunk, num_chunks, num_tokens, chunk_size, num_layers, dtype, nbytes, compute_ms, created, last_used, uses, "
    "pinned, root FROM segments WHERE id = 2",
    "a chunk that does not exist": "INSERT INTO chunks SELECT zeroblob(16), segment, parent, position + 50, tokens "
    "FROM chunks WHERE segment = 2 AND position = 1",
    "a chunk of no segment": "INSERT INTO chunks SELECT hash, 99, parent, position, tokens FROM chunks "
    "WHERE segment = 2 AND position = 1",
    "a table is empty": "DELETE FROM chunks",
    "there are no totals": "DELETE FROM totals",
    "totals of what is not there": "INSERT INTO totals VALUES (zeroblob(16), 'another', 16, 1, 16, 4096)",
}


@pytest.mark.parametrize("what", ROWS)
def test_a_row_too_many_or_too_few_is_found(keys, store_path, what) -> None:
    assert_found_and_repaired(store_path, ROWS[what])


# ---- many faults at once ----


def cut(path: Path, others: list[Path], rng: random.Random) -> None:
    with open(path, "r+b") as file:
        file.truncate(rng.randrange(path.stat().st_size))


def extend(path: Path, others: list[Path], rng: random.Random) -> None:
    with open(path, "ab") as file:
        file.write(rng.randbytes(rng.choice([1, 8, 4096])))


def flip_somewhere(path: Path, others: list[Path], rng: random.Random) -> None:
    flip(path, rng.randrange(path.stat().st_size), rng.randrange(8))


def remove(path: Path, others: list[Path], rng: random.Random) -> None:
    path.unlink()


def take_the_bytes_of_another(path: Path, others: list[Path], rng: random.Random) -> None:
    path.write_bytes(rng.choice(others).read_bytes())


def zero_a_page(path: Path, others: list[Path], rng: random.Random) -> None:
    # Of the first pages, which hold header and payload: a page of padding is zero already.
    with open(path, "r+b") as file:
        file.seek(4096 * rng.randrange(2))
        file.write(bytes(4096))


def put_a_folder_there(path: Path, others: list[Path], rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


FAULTS: list[Callable[[Path, list[Path], random.Random], None]] = [
    cut,
    extend,
    flip_somewhere,
    remove,
    take_the_bytes_of_another,
    zero_a_page,
    put_a_folder_there,
]


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "store"
    make_store(path)
    return path


@settings(
    max_examples=scaled(60),
    deadline=None,
    derandomize=REPRODUCIBLE,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(faults=st.dictionaries(st.integers(0, 3), st.sampled_from(FAULTS), max_size=4), seed=st.integers(0, 2**32))
def test_the_report_holds_every_damaged_segment_and_no_sound_one(template, tmp_path, faults, seed) -> None:
    folder = tmp_path / "store"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder)
    sound = {key: path.read_bytes() for key, path in segment_files(folder).items()}
    rng = random.Random(seed)
    with PrefixStore(folder) as store:
        for number, fault in faults.items():
            key = sorted(sound)[number]
            fault(segment_path(folder, key), [segment_path(template, other) for other in sound if other != key], rng)
        damaged = {key for number, key in enumerate(sorted(sound)) if number in faults}
        assert {problem.key for problem in store.verify()} == damaged
        left = {
            key for key, path in segment_files(folder).items() if path.is_file() and path.read_bytes() == sound[key]
        }
        assert left == set(sound) - damaged  # `verify` itself moved and changed nothing.
