"""Keys of several layers that are read as one are, layer by layer, those of the file."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_helpers import geometry, open_segment, path_of, some_tokens, write_prefix

from hf_contiguouskv.errors import SegmentCorruptError
from hf_contiguouskv.loading.key_runs import KeyRun, key_runs
from hf_contiguouskv.store import PrefixStore
from hf_contiguouskv.store.reader import ExtentReader, aligned_buffer
from hf_contiguouskv.store.segment import Segment

LAYERS = 6


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A segment whose indexes have 19,456 bytes each: between them is padding."""
    with PrefixStore(tmp_path_factory.mktemp("store")) as store:
        g = geometry(
            num_layers=LAYERS,
            chunk_size=16,
            head_dim=8,
            leader_layers=(0, 3),
            indexed_layers=tuple(range(LAYERS)),
        )
        return path_of(write_prefix(store, some_tokens(1203), g=g).spans[0].segment)


@pytest.fixture(scope="module")
def segment(file: Path) -> Segment:
    return open_segment(file)


def index_tensors(layers: list[int]) -> dict[int, tuple[str, ...]]:
    return {layer: (f"key_index.{layer}", f"key_scale.{layer}") for layer in layers}


def read(segment: Segment, run: KeyRun, reader: ExtentReader, verify: bool = True) -> torch.Tensor:
    memory = aligned_buffer(run.nbytes)
    reader.submit(run.reads(segment, memory, verify)).wait()
    return memory


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    layers=st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted),
    together=st.integers(0, 150_000),
    verify=st.booleans(),
)
def test_each_layer_has_its_own_tensors(segment: Segment, layers: list[int], together: int, verify: bool) -> None:
    tensors = index_tensors(layers)
    runs = key_runs(segment, tensors, together)
    assert list(runs) == layers
    with ExtentReader(threads=2) as reader:
        for layer, run in runs.items():
            memory = read(segment, run, reader, verify)
            for name, (start, nbytes) in zip(tensors[layer], run.places[layer], strict=True):
                expected = segment.read_tensor(name).reshape(-1).view(torch.uint8)
                assert torch.equal(memory[start : start + nbytes], expected)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(layers=st.sets(st.integers(0, LAYERS - 1), min_size=1).map(sorted), together=st.integers(0, 150_000))
def test_runs_are_neighbours_as_large_as_they_may_be(segment: Segment, layers: list[int], together: int) -> None:
    runs = list(dict.fromkeys(key_runs(segment, index_tensors(layers), together).values()))
    assert [layer for run in runs for layer in run.tensors] == layers
    assert len({run.name for run in runs}) == len(runs)

    def span(first: str, last: str) -> int:
        end, nbytes = segment.tensor_extent(last)
        return end + nbytes - segment.tensor_extent(first)[0]

    for run in runs:
        first, last, _ = run.ranges[0]
        assert len(run.tensors) == 1 or span(first, last) <= together
    for run, following in pairwise(runs):
        assert span(run.ranges[0][0], following.ranges[0][0]) > together, "the next layer would have fitted"


def test_leader_keys_are_a_run_of_one_tensor(segment: Segment) -> None:
    (run,) = key_runs(segment, {3: ("leader_keys.3",)}, 0).values()
    assert (run.first, run.name, run.ranges) == (3, "leader_keys.3", (("leader_keys.3", "leader_keys.3", 0),))
    with ExtentReader(threads=1) as reader:
        expected = segment.read_tensor("leader_keys.3").reshape(-1).view(torch.uint8)
        assert torch.equal(read(segment, run, reader), expected)


@pytest.mark.parametrize("tensor", ["key_index.1", "key_index.4", "key_scale.2"])
def test_a_wrong_byte_in_any_layer_of_a_run_is_told(file: Path, tmp_path: Path, tensor: str) -> None:
    with_fault = tmp_path / file.name
    octets = bytearray(file.read_bytes())
    sound = open_segment(file)
    offset, nbytes = sound.tensor_extent(tensor)
    sound.close()
    octets[offset + nbytes // 2] ^= 0x10
    with_fault.write_bytes(octets)
    segment = open_segment(with_fault)
    (run,) = set(key_runs(segment, index_tensors([1, 2, 3, 4]), 2**20).values())
    with ExtentReader(threads=2) as reader:
        with pytest.raises(SegmentCorruptError, match=rf"{tensor}.* do not match"):
            read(segment, run, reader)
        read(segment, run, reader, verify=False)
    segment.close()
