"""Grouped-query attention without repeating K and V gives what it gives with K and V repeated."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right

from hf_contiguouskv.model import attention
from hf_contiguouskv.model.attention import attend

HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8


def states(batch: int, length: int, cached: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = torch.Generator().manual_seed(0)
    query = torch.randn(batch, length, HEADS, HEAD_DIM, generator=chance).transpose(1, 2)  # As a model has it.
    key, value = (torch.randn(batch, KV_HEADS, cached + length, HEAD_DIM, generator=chance) for _ in range(2))
    return query, key, value


def by_loops(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Head by head, query by query, in float64: `(b, q, heads, d)`; `seen` is bool `(b, heads or 1, q, k)`."""
    batch, heads, length, head_dim = query.shape
    out = torch.zeros(batch, length, heads, head_dim)
    for row in range(batch):
        for head in range(heads):
            group = head // (heads // key.shape[1])
            for place in range(length):
                mine = seen[row, min(head, seen.shape[1] - 1), place]
                keys, values = key[row, group, mine].double(), value[row, group, mine].double()
                weights = (keys @ query[row, head, place].double() * 0.3).softmax(0)
                out[row, place, head] = weights @ values
    return out


def causal(batch: int, length: int, cached: int, padding: int = 0) -> torch.Tensor:
    seen = torch.ones(length, cached + length, dtype=torch.bool).tril(cached).expand(batch, 1, -1, -1).clone()
    seen[batch - 1, :, :, :padding] = False
    return seen


@pytest.mark.parametrize("folds", [True, False])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("numbers", [False, True], ids=["bool mask", "mask of numbers"])
def test_with_a_mask(monkeypatch: pytest.MonkeyPatch, folds: bool, batch: int, numbers: bool) -> None:
    if not folds:
        monkeypatch.setattr(attention, "_FOLDED_MASK", 0)
    query, key, value = states(batch, 5, 20)
    seen = causal(batch, 5, 20, padding=3)
    mask = torch.zeros(seen.shape).masked_fill(~seen, float("-inf")) if numbers else seen
    for _ in range(2):  # The second layer gets the mask that was prepared for the first.
        found = attend(query, key, value, mask, {"scaling": 0.3})
        assert found.is_contiguous()
        torch.testing.assert_close(found, by_loops(query, key, value, seen), rtol=1e-5, atol=1e-5)


def test_a_mask_of_its_own_for_each_head_is_not_folded() -> None:
    query, key, value = states(2, 5, 20)
    seen = causal(2, 5, 20).repeat(1, HEADS, 1, 1)
    for head in range(HEADS):
        seen[:, head, :, head] = False
    found = attend(query, key, value, seen, {"scaling": 0.3})
    torch.testing.assert_close(found, by_loops(query, key, value, seen), rtol=1e-5, atol=1e-5)


def test_one_query_without_a_mask() -> None:
    query, key, value = states(2, 1, 20)
    found = attend(query, key, value, None, {"scaling": 0.3})
    everything = torch.ones(2, 1, 1, 21, dtype=torch.bool)
    torch.testing.assert_close(found, by_loops(query, key, value, everything), rtol=1e-5, atol=1e-5)


def test_a_prepared_mask_is_prepared_anew_for_another_dtype() -> None:
    query, key, value = states(1, 5, 20)
    mask: Any = causal(1, 5, 20)
    full = attend(query, key, value, mask, {"scaling": 0.3})
    half = attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), mask, {"scaling": 0.3})
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)


def flash_on_a_cpu(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, dropout: float, scale: float
) -> torch.Tensor:
    """What the flash kernel computes: causal, ending at the last key, heads grouped."""
    causal = causal_lower_right(query.shape[2], key.shape[2])
    grouped = query.shape[1] != key.shape[1]
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=causal, scale=scale, enable_gqa=grouped
    )


def test_the_flash_kernel_is_called_as_it_wants_to_be() -> None:
    """Without a GPU it cannot run, but it can be asked what it would return, for grouped heads too."""
    query, key, value = (one.to("meta") for one in states(2, 5, 20))
    found = attention._flash_sdpa(query.bfloat16(), key.bfloat16(), value.bfloat16(), 0.0, 0.3)
    assert found.shape == query.shape


def test_there_is_no_flash_kernel_on_a_cpu_or_for_odd_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key, value = states(1, 5, 20)
    assert not attention._flash(query, key, value, 0.0, True)
    monkeypatch.setattr(attention, "can_use_flash_attention", lambda parameters: True)
    assert attention._flash(query, key, value, 0.0, True)
    assert not attention._flash(query[..., :6], key[..., :6], value[..., :6], 0.0, True)


@pytest.mark.parametrize("heads", [KV_HEADS, HEADS])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_plain_mask_is_left_out_where_there_is_a_flash_kernel(
    monkeypatch: pytest.MonkeyPatch, heads: int, batch: int
) -> None:
    monkeypatch.setattr(attention, "_flash", lambda *_: True)
    monkeypatch.setattr(attention, "_flash_sdpa", flash_on_a_cpu)
    monkeypatch.setattr(attention, "_prepared", None)  # Nobody makes a mask.
    query, key, value = states(batch, 5, 20)
    query = query[:, :heads]
    seen = causal(batch, 5, 20)
    found = attend(query, key, value, seen, {"scaling": 0.3}, plain=True)
    assert found.is_contiguous()
    torch.testing.assert_close(found, by_loops(query, key, value, seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("columns", [32, 25])
@pytest.mark.parametrize("shared", [False, True], ids=["a mask per row", "one mask"])
def test_the_kernel_for_masks_gets_rows_that_it_can_read(
    monkeypatch: pytest.MonkeyPatch, columns: int, shared: bool
) -> None:
    """Without a GPU the kernel cannot run, but it can be asked what it would return."""
    asked = []

    def fits(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, added: torch.Tensor, dropout: float) -> bool:
        asked.append((query.shape, added.shape))
        assert query.shape[1] == key.shape[1] == KV_HEADS
        assert added.stride(-1) == 1
        assert all(stride % 16 == 0 for stride in added.stride()[:-1])
        return True

    real = torch.ops.aten._scaled_dot_product_efficient_attention

    def kernel(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, bias: torch.Tensor, *rest: Any, **more: Any
    ):
        assert bias.shape == (2, KV_HEADS, 15, columns)  # It does not broadcast.
        return real(query, key, value, bias, *rest, **more)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_efficient_attention", kernel)
    monkeypatch.setattr(attention, "_efficient", fits)
    query, key, value = (one.to("meta") for one in states(2, 5, columns - 5))
    mask = torch.ones(1 if shared else 2, 1, 5, columns, dtype=torch.bool, device="meta")
    found = attend(query, key, value, mask, {"scaling": 0.3})
    assert found.shape == (2, 5, HEADS, HEAD_DIM)
    assert asked == [((2, KV_HEADS, 15, HEAD_DIM), (1 if shared else 2, 1, 15, columns))]


class _Module(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.config = torch.nn.Module()  # Anything that can be referred to weakly.


def test_the_first_mask_of_a_model_is_looked_at() -> None:
    query, key, _ = states(1, 5, 20)
    plain, other = causal(1, 5, 20), causal(1, 5, 20, padding=1)
    usual, unusual = _Module(), _Module()
    for _ in range(2):
        assert attention._is_lower_right(usual, query, key, plain)
        assert not attention._is_lower_right(unusual, query, key, other)
    assert not attention._is_lower_right(unusual, query, key, plain)
    # A mask of another shape is no mask of these tokens, and a module without a config says nothing.
    assert not attention._is_lower_right(usual, query[:, :, :4], key, plain)
    assert not attention._is_lower_right(torch.nn.Module(), query, key, plain)
    known = len(attention._lower_right)
    del usual, unusual
    assert len(attention._lower_right) == known - 2
