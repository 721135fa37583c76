"""Nothing is allocated on a liar's word, and one bad segment never stops a store."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tally import Figures
from unit.format_by_document import PAGE, header_checksum, places
from unit.store_helpers import FINGERPRINT, geometry, some_tokens, write_prefix

from hf_contiguouskv.errors import SegmentCorruptError, StoreFormatError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.format import MAX_HEADER_BYTES, parse_header
from hostile.conftest import in_child
from hostile.crafting import crafted, plant

G = geometry()
C = G.chunk_size
MIB = 2**20
# What a child may take besides what it has: ten segments of the tests, and the buffers of the threads that read.
ROOM = 512 * MIB


def metadata(**told: str) -> dict[str, str]:
    content = crafted(G, some_tokens(10))
    text = content[8 : 8 + int.from_bytes(content[:8], "little")]
    return json.loads(text)["__metadata__"] | told


def header_of(meta: dict[str, str]) -> bytes:
    """Length and JSON of a header that is right in itself."""
    told = places(meta)
    header = json.dumps({"__metadata__": meta | {"checksum": "0" * 16}} | told, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % PAGE)
    header = header.replace(b'"checksum":"' + b"0" * 16, f'"checksum":"{header_checksum(header)}'.encode())
    return len(header).to_bytes(8, "little") + header


def sparse(folder: Path, meta: dict[str, str]) -> Path:
    """A file whose header is there, and of which all else is a hole."""
    header = header_of(meta)
    path = plant(folder, meta["key"], header)
    os.truncate(path, len(header) + max(place["data_offsets"][1] for place in places(meta).values()))
    return path


@pytest.mark.parametrize("tokens", [2**20, 2**26, 700_000_000, 10**14])
def test_a_file_that_declares_what_it_does_not_hold_stops_nothing(
    store_path: Path, tokens: int, attacks: Figures
) -> None:
    ids = some_tokens(10)
    with PrefixStore(store_path) as store:
        write_prefix(store, ids)
    for seed in range(3):
        try:
            path = sparse(store_path, metadata(key=f"{seed:02x}" * 16, num_tokens=str(tokens)))
        except OSError:
            pytest.skip("this file system has no files of this length")
        assert path.stat().st_blocks * 512 < 2 * MIB

    def use() -> None:
        for _ in range(2):
            with PrefixStore(store_path) as store:
                found = store.inner.lookup(FINGERPRINT, ids, C)
                assert found is not None
                assert found.tokens == len(ids)
                assert len(store.gc().unreadable) == 3
                store.inner.index.rebuild()
                write_prefix(store, some_tokens(9, seed=4))
                assert store.verify() is not None
            (store_path / "index.sqlite").unlink()

    in_child(use, memory=ROOM)
    attacks.add("sparse files with large claims")


def test_a_header_that_is_a_hole_is_not_read(store_path: Path, attacks: Figures) -> None:
    ids = some_tokens(10)
    with PrefixStore(store_path) as store:
        write_prefix(store, ids)
    path = plant(store_path, "ab" * 16, (MAX_HEADER_BYTES - 8).to_bytes(8, "little"))
    os.truncate(path, 64 * MIB)
    with PrefixStore(store_path) as store:
        (reason,) = store.gc().unreadable
        assert "hole" in reason
        assert store.inner.lookup(FINGERPRINT, ids, C) is not None
    attacks.add("headers that are holes")


BOMBS = {
    "lists": b"[" + b"[]," * ((MAX_HEADER_BYTES - 100) // 3) + b"[]]",
    "objects": b'{"a":[' + b"{}," * ((MAX_HEADER_BYTES - 100) // 3) + b"{}]}",
    "depth": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
    "a long number": b'{"__metadata__":' + b"9" * MIB + b"}",
    "a long text": b'{"__metadata__":{"format":"' + b"x" * MIB + b'"}}',
    "depth in the metadata": b'{"__metadata__":{"format":' + b"[" * 500_000 + b"}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_header_that_unfolds_is_refused_within_bounds(bomb: str, attacks: Figures) -> None:
    text = BOMBS[bomb]
    text += b" " * (-(8 + len(text)) % PAGE)

    def parse() -> None:
        with pytest.raises((SegmentCorruptError, StoreFormatError)) as caught:
            parse_header(text, 2**40, "a file")
        assert len(str(caught.value)) <= 2000

    in_child(parse, memory=256 * MIB)
    attacks.add("headers that unfold")


NUMBERS = st.one_of(st.integers(0, 40), st.sampled_from([2**26, 2**31, 2**53, 10**15 - 1]))
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "num_layers": NUMBERS,
        "kv_heads": NUMBERS,
        "head_dim": NUMBERS,
        "chunk_size": NUMBERS,
        "layers_per_group": NUMBERS,
        "num_tokens": NUMBERS,
        "first_chunk": NUMBERS,
        "compute_ms": NUMBERS,
        "leader_layers": st.sampled_from(["", "0", "0,1,2", "4095", "99999", ",", "0,0"]),
        "indexed_layers": st.sampled_from(["", "0,1", "2,1", "x"]),
        "packed_layers": st.sampled_from(["0", "1", "0,1", ""]),
        "fingerprint": st.text(max_size=300),
        "salted": st.sampled_from(["0", "1", "2", ""]),
        "mac": st.sampled_from(["", "f" * 64, "F" * 64]),
        "version": st.sampled_from(["1", "2", "3", "4", "x", "999999999"]),
    },
)


@pytest.mark.usefixtures("bounded_memory")
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(told=FIELDS, size=st.sampled_from([4096, 2**20, 2**40, 2**62]))
def test_whatever_a_header_says_is_a_segment_or_one_of_our_errors(
    told: dict[str, str | int], size: int, attacks: Figures
) -> None:
    meta = metadata(**{name: str(value) for name, value in told.items()})
    header = json.dumps({"__metadata__": meta}, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % PAGE)
    header = header.replace(
        f'"checksum":"{meta["checksum"]}'.encode(), f'"checksum":"{header_checksum(header)}'.encode()
    )
    said = ""
    try:
        parsed = parse_header(header, size, "a file")
    except (SegmentCorruptError, StoreFormatError) as error:
        said = str(error)
    else:
        assert parsed.num_tokens * 8 <= size
    assert said.isprintable()
    attacks.add("headers from a grammar, read or refused")


@pytest.mark.parametrize("what", [b"", b"\0" * 4096, b"\xff" * 9000, b"{}" * 3000])
def test_one_bad_segment_never_stops_the_others(store_path: Path, what: bytes, attacks: Figures) -> None:
    prompts = [some_tokens(10, seed=seed) for seed in range(3)]
    with PrefixStore(store_path) as store:
        for ids in prompts:
            write_prefix(store, ids)
    for number in range(256):
        plant(store_path, f"{number:02x}" * 16, what)
    (store_path / "index.sqlite").unlink()
    with PrefixStore(store_path) as store:
        for ids in prompts:
            found = store.inner.lookup(FINGERPRINT, ids, C)
            assert found is not None
            assert found.tokens == len(ids)
        assert len(store.gc().unreadable) == 256
    attacks.add("bad segments among sound ones", 256)
