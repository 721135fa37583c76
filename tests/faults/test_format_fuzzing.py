"""Crafted segments: refused with a named error, and never by way of a large allocation."""

from __future__ import annotations

import json
import os
import random
import re
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import xxhash
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from unit.store_helpers import geometry, open_segment, path_of, some_tokens, write_prefix

from hf_contiguouskv.errors import SegmentCorruptError, StoreError, StoreFormatError
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.verification import segment_problems

from .scale import REPRODUCIBLE, scaled

PAGE = 4096
SLACK = 32 * 2**20
"""What reading a header may allocate beyond the length of the file, in bytes."""


def fuzzed(examples: int) -> settings:
    """The same examples in every run."""
    slow = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
    return settings(max_examples=scaled(examples), deadline=None, derandomize=REPRODUCIBLE, suppress_health_check=slow)


class Sound(bytes):
    """The bytes of a segment; short in messages."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Sound:
    """A segment with every kind of tensor."""
    with PrefixStore(tmp_path_factory.mktemp("fuzzing") / "store") as store:
        stored = write_prefix(store, some_tokens(18), g=geometry(layers_per_group=2))
        return Sound(path_of(stored.spans[0].segment).read_bytes())


@pytest.fixture(scope="module", autouse=True)
def _traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def split(octets: bytes) -> tuple[bytes, bytes]:
    """JSON (with padding) and data of a segment."""
    length = int.from_bytes(octets[:8], "little")
    return octets[8 : 8 + length], octets[8 + length :]


def with_right_checksum(text: bytes) -> bytes:
    """`docs/FORMAT.md`: xxh3_64 of the JSON and its padding, with 16 zeros in the place of the checksum."""
    mark = b'"checksum":"'
    at = text.find(mark)
    if at < 0:
        return text
    start, end = at + len(mark), at + len(mark) + 16
    blank = text[:start] + b"0" * 16 + text[end:]
    return text[:start] + f"{xxhash.xxh3_64_intdigest(blank):016x}".encode() + text[end:]


def assemble(text: bytes, data: bytes, *, length: int | None = None, checksum: bool = True) -> bytes:
    """A file of a header (padded to a page, with a right checksum) and data."""
    text += b" " * (-(8 + len(text)) % PAGE)
    if checksum:
        text = with_right_checksum(text)
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def try_to_open(octets: bytes) -> StoreError | None:
    """Open a file of these bytes, and verify it: the error, or `None` where it is a sound segment.

    Anything else than an error of the store, and an allocation out of proportion, fails the test.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "crafted.safetensors"
        path.write_bytes(octets)
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        try:
            segment = open_segment(path)
            try:
                problems = segment_problems(segment, segment.key)
            finally:
                segment.close()
            error = SegmentCorruptError("; ".join(problems)) if problems else None
        except StoreError as caught:
            error = caught
        _, peak = tracemalloc.get_traced_memory()
    assert peak - before <= len(octets) + SLACK, f"{peak - before} bytes allocated for a file of {len(octets)}"
    return error


def refused(octets: bytes) -> None:
    error = try_to_open(octets)
    assert error is not None, "a crafted segment was taken for a sound one"
    assert isinstance(error, SegmentCorruptError | StoreFormatError), repr(error)
    assert str(error)


def test_the_sound_one_is_taken(sound: bytes) -> None:
    """What every test below changes one thing of; taking it apart and putting it together changes nothing."""
    assert try_to_open(sound) is None
    text, data = split(sound)
    assert assemble(text, data) == sound
    assert assemble(json.dumps(json.loads(text), separators=(",", ":")).encode(), data) == sound


# ---- the length ----


@fuzzed(100)
@given(length=st.integers(0, 2**64 - 1) | st.integers(0, 20_000))
@example(length=0)
@example(length=1)
@example(length=2**63)
@example(length=2**64 - 1)
@example(length=2**64 - 8)
@example(length=8 * 2**20)
@example(length=8 * 2**20 + 1)
def test_any_other_header_length(sound, length) -> None:
    if length != len(split(sound)[0]):
        refused(length.to_bytes(8, "little") + sound[8:])


@pytest.mark.parametrize("length", [8 * 2**20 - 8, 8 * 2**20, 2**32, 2**62])
def test_a_header_length_that_a_sparse_file_seems_to_have(sound, tmp_path, length) -> None:
    """A file of 64 GiB that takes up nothing: its size must not be believed. (A header has up to 8 MiB.)"""
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + sound[8:])
    os.truncate(path, 2**36)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    with pytest.raises(SegmentCorruptError):
        open_segment(path)
    assert tracemalloc.get_traced_memory()[1] - before <= 8 * 8 * 2**20


def test_a_header_as_large_as_it_may_be(sound) -> None:
    """Eight megabytes of nested lists: parsed within the bound, or refused before."""
    for text in (b"[" * (8 * 2**20 - 8), b"{" * 10_000, b'{"a":' * 200_000 + b"1" + b"}" * 200_000):
        refused(assemble(text, b"", checksum=False))
    many = json.dumps({f"padding.{i}": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(2000)})
    refused(assemble(many.encode(), bytes(2000)))


# ---- the JSON ----

NUMBERS = [0, 1, -1, 2**31, 2**53, 2**63, 2**64, 10**30, -(10**30), 0.5, 1e308, True, False, None, "7", [], {}]
TEXTS = [
    "",
    "0",
    "-1",
    "00",
    "٣",
    "1" * 16,
    "1" * 4000,
    "1.0",
    "1e9",
    "true",
    "nan",
    " 1",
    "1 ",
    "1_000",
    "\u0000",
    "x",
]


def edited(sound: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    """The sound segment with other JSON, and a right checksum for it."""
    text, data = split(sound)
    content = json.loads(text)
    change(content)
    return assemble(json.dumps(content, separators=(",", ":")).encode(), data)


def setting(name: str, field: str, value: object) -> Callable[[dict[str, Any]], None]:
    """A change of one field of a tensor, or of the metadata."""
    return lambda content: content[name].__setitem__(field, value)


def remove(content: dict[str, Any], name: str, field: str) -> None:
    del content[name][field]


def test_every_field_of_the_metadata_is_checked(sound) -> None:
    text, _ = split(sound)
    metadata = json.loads(text)["__metadata__"]
    assert len(metadata) >= 18
    for field, right in metadata.items():
        values: list[Any] = [*NUMBERS, *TEXTS, right + "0", right[:-1], right.upper() + "G"]
        for value in values:
            if value != right and field != "checksum":
                octets = edited(sound, setting("__metadata__", field, value))
                if harmless(field, value):
                    assert_refused_unless_harmless(sound, octets)
                else:
                    refused(octets)
        refused(edited(sound, partial(remove, name="__metadata__", field=field)))


HARMLESS = {
    "fingerprint": r"(?s).*",
    "compute_ms": r"[0-9]{12}",
    "salted": r"[01]",
    "beginning": r"([0-9a-f]{32})?",
}
"""Fields that nothing else in the file contradicts, and what they may say: whose it is (a look-up compares that), what
it cost, and the name under which other models' prefixes are noticed."""


def harmless(field: str, value: object) -> bool:
    return field in HARMLESS and isinstance(value, str) and bool(re.fullmatch(HARMLESS[field], value))


def assert_refused_unless_harmless(sound: bytes, octets: bytes) -> None:
    """What is taken has the very data of the sound one, and no other header but for fields that may differ."""
    error = try_to_open(octets)
    if error is not None:
        assert isinstance(error, SegmentCorruptError | StoreFormatError), repr(error)
        return
    (text, data), (right, right_data) = split(octets), split(sound)
    assert data == right_data
    content, expected = json.loads(text), json.loads(right)
    for field in HARMLESS:
        assert harmless(field, content["__metadata__"][field])
        expected["__metadata__"][field] = content["__metadata__"][field]
    expected["__metadata__"]["checksum"] = content["__metadata__"]["checksum"]
    encoded = json.dumps(expected, separators=(",", ":")).encode()
    assert text.rstrip(b" ") in (encoded, json.dumps(expected, separators=(",", ":"), ensure_ascii=False).encode())


@pytest.mark.parametrize("value", [*NUMBERS, "x", [1], [-4096, 0], [0, 2**64], [10**30, 10**30]], ids=repr)
@pytest.mark.parametrize("field", ["dtype", "shape", "data_offsets"])
def test_every_field_of_every_tensor_is_checked(sound, field, value) -> None:
    text, _ = split(sound)
    for name in json.loads(text):
        if name != "__metadata__":
            refused(edited(sound, setting(name, field, value)))


@pytest.mark.parametrize("value", NUMBERS, ids=repr)
def test_every_number_of_every_tensor_is_checked(sound, value) -> None:
    text, _ = split(sound)
    for name, tensor in json.loads(text).items():
        if name == "__metadata__":
            continue
        for field in ("shape", "data_offsets"):
            for position, right in enumerate(tensor[field]):
                if value == right and type(value) is type(right):
                    continue
                other = [*tensor[field][:position], value, *tensor[field][position + 1 :]]
                refused(edited(sound, setting(name, field, other)))


def shifted(content: dict[str, Any], name: str, start: int, end: int) -> None:
    content[name]["data_offsets"][0] += start
    content[name]["data_offsets"][1] += end


STRUCTURES: dict[str, Callable[[dict[str, Any]], object]] = {
    "a tensor less": lambda content: content.pop("token_ids"),
    "no padding": lambda content: [content.pop(name) for name in list(content) if name.startswith("padding")],
    "a tensor more": lambda content: content.update(extra={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
    "overlapping": lambda content: shifted(content, "payload.1", -4096, -4096),
    "a hole": lambda content: shifted(content, "payload.0", 0, -4096),
    "backwards": lambda content: content["payload.0"]["data_offsets"].reverse(),
    "behind the end": lambda content: shifted(content, "token_ids", 2**40, 2**40),
    "before the beginning": lambda content: shifted(content, "token_ids", -(2**40), -(2**40)),
    "three offsets": lambda content: content["payload.0"]["data_offsets"].append(0),
    "another dtype": lambda content: content["payload.0"].update(dtype="F16"),
    "no dtype that there is": lambda content: content["payload.0"].update(dtype="F7"),
    "a huge shape of nothing": lambda content: content["payload.0"]["shape"].extend([0, 2**40]),
    "a huge shape": lambda content: content["payload.0"].update(shape=[2**40] * 6),
    "a tensor is a list": lambda content: content.update(token_ids=[1, 2]),
    "metadata is a list": lambda content: content.update(__metadata__=[]),
    "metadata is text": lambda content: content.update(__metadata__="hf_contiguouskv"),
    "more metadata in a tensor": lambda content: content["payload.0"].update(more=1),
    "two names exchanged": lambda content: content.update(
        {"payload.0": content["payload.1"], "payload.1": content["payload.0"]}
    ),
}


@pytest.mark.parametrize("what", STRUCTURES)
def test_a_header_of_another_structure(sound, what) -> None:
    refused(edited(sound, STRUCTURES[what]))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", "4096"),
        ("kv_heads", "4096"),
        ("head_dim", "65536"),
        ("chunk_size", "4096"),
        ("num_tokens", "999999999999999"),
        ("num_tokens", "100000"),
        ("first_chunk", "999999999999999"),
        ("num_layers", "999999999999999"),
        ("leader_layers", ",".join(map(str, range(4096)))),
        ("indexed_layers", "0," * 5000 + "0"),
        ("layers_per_group", "4096"),
    ],
)
def test_a_geometry_that_asks_for_more_than_there_is(sound, field, value) -> None:
    refused(edited(sound, setting("__metadata__", field, value)))


def test_the_largest_geometry_of_a_file_that_seems_large_enough(sound, tmp_path) -> None:
    """In a sparse file of 64 GiB a header may claim anything; what it costs to refuse it is bounded all the same."""
    largest = {"num_layers": "4096", "leader_layers": ",".join(map(str, range(4096)))}
    largest["indexed_layers"] = largest["leader_layers"]
    path = tmp_path / "sparse.safetensors"
    path.write_bytes(edited(sound, lambda content: content["__metadata__"].update(largest)))
    os.truncate(path, 2**36)
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    with pytest.raises(SegmentCorruptError):
        open_segment(path)
    assert tracemalloc.get_traced_memory()[1] - before <= SLACK


def test_keys_that_come_twice(sound) -> None:
    """JSON readers disagree on which one counts, so a file that has them is two files in one."""
    text, data = split(sound)
    stripped = text.rstrip(b" ")
    metadata = json.dumps(json.loads(text)["__metadata__"], separators=(",", ":")).encode()
    for twice in (
        stripped.replace(b'{"__metadata__":', b'{"__metadata__":{"format":"other"},"__metadata__":', 1),
        stripped[:-1] + b',"__metadata__":' + metadata + b"}",
        stripped.replace(b'"token_ids":', b'"token_ids":{"dtype":"I64"},"token_ids":', 1),
        stripped.replace(b'"num_tokens":', b'"num_tokens":"5","num_tokens":', 1),
        stripped.replace(b'"dtype":"I64"', b'"dtype":"F64","dtype":"I64"', 1),
    ):
        assert twice != stripped
        refused(assemble(twice, data))


def test_text_that_is_no_json(sound) -> None:
    text, data = split(sound)
    stripped = text.rstrip(b" ")
    for other in (
        b"",
        b"null",
        b"[]",
        b"7",
        b'"text"',
        stripped[:-1],
        stripped + b"}",
        stripped.replace(b"hf_contiguouskv", b"hf_contiguous\xff\xfe", 1),
        stripped.replace(b'"fingerprint":"', b'"fingerprint":"\xc3\x28', 1),
        stripped.replace(b'"fingerprint":"', b'"fingerprint":"\\ud800', 1),
        stripped.replace(b":[", b":[NaN,", 1),
        stripped.replace(b":[", b":[Infinity,", 1),
        stripped.replace(b":[0,", b":[0.0,", 1),
        stripped.replace(b":[0,", b":[-0,", 1),
        stripped.replace(b":[0,", b":[00,", 1),
        stripped.replace(b":[0,", b":[" + b"9" * 5000 + b",", 1),
        stripped.decode().encode("utf-16"),
        stripped.decode().encode("utf-32"),
        b"\xef\xbb\xbf" + stripped,
    ):
        assert other != stripped
        refused(assemble(other, data))


@pytest.mark.parametrize("padding", [b"\0", b"\n", b"\t", b" x"])
def test_padding_is_spaces(sound, padding) -> None:
    """The checksum of the header is right: what stands behind the JSON must be spaces all the same."""
    text, data = split(sound)
    room = len(text) - len(text.rstrip(b" "))
    refused(assemble(text.rstrip(b" ") + (padding * room)[:room], data))


# ---- anything ----


@fuzzed(150)
@given(octets=st.binary(max_size=300))
@example(octets=b"")
def test_any_bytes(octets) -> None:
    refused(octets)


def json_values() -> st.SearchStrategy[Any]:
    leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(NUMBERS)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
        max_leaves=8,
    )


@fuzzed(150)
@given(data=st.data())
def test_any_json_in_any_place(sound, data) -> None:
    """One value of the header, wherever it is, becomes any other JSON."""
    text, octets = split(sound)
    content = json.loads(text)
    place, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(place[key], dict | list) and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
    place[key] = data.draw(json_values())
    assert_refused_unless_harmless(
        sound, assemble(json.dumps(content, separators=(",", ":")).encode("utf-8", "surrogatepass"), octets)
    )


@fuzzed(250)
@given(seed=st.integers(0, 2**32), count=st.integers(1, 6), checksum=st.booleans())
def test_random_mutations(sound, seed, count, checksum) -> None:
    """Bytes changed, inserted, removed, repeated and moved anywhere; half of them with a header checksum that fits."""
    rng = random.Random(seed)
    octets = bytearray(sound)
    for _ in range(count):
        # Half of them hit the header, a tenth of the file.
        end = len(split(sound)[0]) if rng.random() < 0.5 else len(octets)
        at, size = rng.randrange(min(end, len(octets))), rng.choice([1, 1, 2, 8, 100, 4096])
        match rng.randrange(5):
            case 0:
                octets[at] ^= 1 << rng.randrange(8)
            case 1:
                octets[at:at] = rng.randbytes(size)
            case 2:
                del octets[at : at + size]
            case 3:
                octets[at:at] = octets[at : at + size]
            case 4:
                other = rng.randrange(len(octets))
                octets[at : at + size] = octets[other : other + size]
        if not octets:
            break
    if checksum and len(octets) > 8 + len(split(sound)[0]):
        text, data = split(bytes(octets))
        octets = bytearray(octets[:8] + with_right_checksum(text) + data)
    assert_refused_unless_harmless(sound, bytes(octets))
    assert checksum or bytes(octets) == sound or try_to_open(bytes(octets)) is not None, "a change was not noticed"
