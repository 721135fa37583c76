"""Keys in 8 bits and values in 4 bits: against loops, and what can be said of any numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from store_helpers import geometry

from hf_contiguouskv.errors import InputError
from hf_contiguouskv.model.kv_geometry import channels_per_scale
from hf_contiguouskv.store import KVGeometry
from hf_contiguouskv.store.packing import pack_chunks, pack_values, unpack_compact, unpack_values


def packed_geometry(head_dim: int, dtype: torch.dtype = torch.float32) -> KVGeometry:
    return geometry(head_dim=head_dim, dtype=dtype, packed_layers=(1,))


def some_values(g: KVGeometry, chunks: int, seed: int = 0) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randn(chunks, g.kv_heads, g.chunk_size, g.head_dim, generator=chance).to(g.dtype)


def unpacked(packed: torch.Tensor, g: KVGeometry) -> torch.Tensor:
    out = torch.full((len(packed), g.kv_heads, g.chunk_size, g.head_dim), float("nan"), dtype=g.dtype)
    unpack_values(packed, g, out)
    return out


@pytest.mark.parametrize(("head_dim", "shared"), [(2, 2), (64, 64), (80, 40), (96, 48), (112, 56), (128, 64), (134, 2)])
def test_channels_that_share_a_scale(head_dim: int, shared: int) -> None:
    assert channels_per_scale(head_dim) == shared


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [2, 8, 64, 80, 128])
def test_every_value_is_near_one_of_sixteen_steps_of_its_group(head_dim: int, dtype: torch.dtype) -> None:
    g = packed_geometry(head_dim, dtype)
    values = some_values(g, 3)
    packed = pack_values(values)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (3, g.packed_bytes))
    found = unpacked(packed, g)
    shared = channels_per_scale(head_dim)
    for theirs, ours in zip(values.float().flatten(0, 2), found.float().flatten(0, 2), strict=True):
        for group in range(0, head_dim, shared):
            own, its = theirs[group : group + shared], ours[group : group + shared]
            step = (own.max() - own.min()).item() / 15
            # Half a step; lowest and step themselves are rounded to 8 bits.
            noise = 0.01 * own.abs().max().item()
            assert (own - its).abs().max().item() <= 0.5 * step * 1.01 + noise
            assert len(its.unique()) <= 16


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=8, max_size=8))
@example([0.0] * 7 + [5.001388362006348e-40])
def test_any_numbers_stay_between_their_ends(numbers: list[float]) -> None:
    g = geometry(kv_heads=1, chunk_size=1, head_dim=8, packed_layers=(1,))
    values = torch.tensor(numbers).view(1, 1, 1, 8)
    found = unpacked(pack_values(values), g)
    assert found.isfinite().all()
    spread = max(numbers) - min(numbers)
    noise = 0.01 * max(abs(number) for number in numbers)
    # A step is a bfloat16, and none is finer than the least of them; a smaller one is taken for none at all.
    noise += 15 * 2.0**-133
    assert (found - values).abs().max().item() <= spread / 30 * 1.01 + noise


def test_alike_channels_come_back_as_they_are_in_bfloat16() -> None:
    g = packed_geometry(8)
    values = torch.full((2, g.kv_heads, g.chunk_size, 8), 0.3)
    assert torch.equal(unpacked(pack_values(values), g), values.bfloat16().float())
    assert not unpacked(pack_values(torch.zeros_like(values)), g).any()


def test_chunks_are_packed_one_by_one() -> None:
    g = packed_geometry(16)
    values = some_values(g, 4)
    alone = [pack_values(values[chunk : chunk + 1]) for chunk in range(4)]
    assert torch.equal(pack_values(values), torch.cat(alone))


def test_into_memory_of_any_order() -> None:
    g = packed_geometry(16)
    packed = pack_values(some_values(g, 4))
    turned = torch.zeros(g.kv_heads, 6, g.chunk_size, g.head_dim)
    unpack_values(packed, g, turned[:, 1:5].transpose(0, 1))
    assert torch.equal(turned[:, 1:5].transpose(0, 1), unpacked(packed, g))
    assert not turned[:, [0, 5]].any()


def test_a_geometry_that_cannot_be_packed() -> None:
    with pytest.raises(InputError, match="even head_dim"):
        geometry(head_dim=5, packed_layers=(1,))
    with pytest.raises(InputError, match="must be among indexed_layers"):
        geometry(packed_layers=(0,))
    with pytest.raises(InputError, match="packed_layers must be different layers"):
        geometry(packed_layers=(1, 1))


def compact_geometry(head_dim: int, dtype: torch.dtype = torch.float32, chunk_size: int = 4) -> KVGeometry:
    return geometry(
        head_dim=head_dim, dtype=dtype, chunk_size=chunk_size, leader_layers=(), indexed_layers=(), compact_layers=(1,)
    )


def some_chunks(g: KVGeometry, chunks: int) -> torch.Tensor:
    kv = torch.stack([some_values(g, chunks, seed=1), some_values(g, chunks, seed=2)], dim=1)
    kv[:, 0, :, :, 0] *= 40  # Keys have channels that are far larger than others.
    return kv


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "chunk_size"), [(2, 4), (64, 16), (80, 8), (128, 64)])
def test_compact_chunks_hold_keys_to_a_254th_of_their_channel_and_values_as_packed_ones_do(
    head_dim: int, chunk_size: int, dtype: torch.dtype
) -> None:
    g = compact_geometry(head_dim, dtype, chunk_size)
    kv = some_chunks(g, 3)
    packed = pack_chunks("compact", kv)
    assert (packed.dtype, tuple(packed.shape)) == (torch.uint8, (3, g.compact_bytes))
    keys, values = torch.full_like(kv, float("nan")).unbind(1)
    unpack_compact(packed, g, keys, values)
    assert torch.equal(values, unpacked(pack_values(kv[:, 1]), g))
    for chunk in range(3):
        for head in range(g.kv_heads):
            for channel in range(head_dim):
                own, its = kv[chunk, 0, head, :, channel].float(), keys[chunk, head, :, channel].float()
                peak = own.abs().max().item()
                # Half a step and the rounding of scale and product to 8 bits.
                assert (own - its).abs().max().item() <= peak * (0.5 / 127 + 2 * 2.0**-8)


def test_compact_chunks_are_packed_one_by_one_and_into_memory_of_any_order() -> None:
    g = compact_geometry(16)
    kv = some_chunks(g, 4)
    packed = pack_chunks("compact", kv)
    assert torch.equal(packed, torch.cat([pack_chunks("compact", kv[chunk : chunk + 1]) for chunk in range(4)]))
    turned = torch.zeros(2, g.kv_heads, 6, g.chunk_size, g.head_dim)
    unpack_compact(packed, g, *(one[:, 1:5].transpose(0, 1) for one in turned))
    plain = torch.zeros_like(kv)
    unpack_compact(packed, g, plain[:, 0], plain[:, 1])
    assert torch.equal(turned[:, :, 1:5].permute(2, 0, 1, 3, 4), plain)
    assert not turned[:, :, [0, 5]].any()


def test_keys_that_are_all_zero_stay_so() -> None:
    g = compact_geometry(8)
    kv = torch.zeros(2, 2, g.kv_heads, g.chunk_size, 8)
    found = torch.ones_like(kv)
    unpack_compact(pack_chunks("compact", kv), g, found[:, 0], found[:, 1])
    assert not found.any()


def test_a_geometry_that_cannot_be_compact() -> None:
    with pytest.raises(InputError, match="even head_dim"):
        geometry(head_dim=5, indexed_layers=(), compact_layers=(1,))
    with pytest.raises(InputError, match="chunk_size of 4 or more"):
        geometry(chunk_size=2, indexed_layers=(), compact_layers=(1,))
    with pytest.raises(InputError, match="must not be among indexed_layers"):
        geometry(compact_layers=(1,))
