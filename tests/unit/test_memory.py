"""The host tier keeps what was used last, within its bound."""

from __future__ import annotations

import threading

import pytest
import torch

from hf_contiguouskv.errors import ConfigError
from hf_contiguouskv.memory import HostTier


def block(kib: int) -> torch.Tensor:
    return torch.zeros(kib * 1024, dtype=torch.uint8)


def test_what_was_used_last_stays() -> None:
    tier = HostTier(3 * 1024)
    for name in "abc":
        tier.put(name, block(1))
    assert tier.get("a") is not None
    tier.put("d", block(1))
    assert tier.get("b") is None
    assert [name for name in "acd" if tier.get(name) is not None] == ["a", "c", "d"]
    assert tier.bytes_used == 3 * 1024


def test_a_tensor_larger_than_the_bound_is_not_kept_and_replaces_nothing_else() -> None:
    tier = HostTier(2 * 1024)
    tier.put("small", block(1))
    tier.put("large", block(3))
    assert tier.get("large") is None
    assert tier.get("small") is not None


def test_putting_a_name_again_replaces_its_tensor() -> None:
    tier = HostTier(4 * 1024)
    tier.put("a", block(1))
    second = block(2)
    tier.put("a", second)
    assert tier.get("a") is second
    assert tier.bytes_used == 2 * 1024
    tier.clear()
    assert (tier.bytes_used, len(tier), tier.get("a")) == (0, 0, None)


def test_a_view_counts_as_the_memory_that_it_keeps_alive() -> None:
    tier = HostTier(4 * 1024)
    tier.put("view", block(3)[:10])
    assert tier.bytes_used == 3 * 1024


def test_a_bound_of_zero_keeps_nothing_and_a_negative_one_is_refused() -> None:
    tier = HostTier(0)
    tier.put("a", block(1))
    assert tier.get("a") is None
    with pytest.raises(ConfigError, match="max_bytes"):
        HostTier(-1)


def test_threads_may_share_it() -> None:
    tier = HostTier(16 * 1024)

    def work(offset: int) -> None:
        for i in range(500):
            tier.put((i + offset) % 40, block(1))
            tier.get(i % 40)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert tier.bytes_used == len(tier) * 1024 <= 16 * 1024
