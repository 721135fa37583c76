"""Edits that torch does not count, in places that are not sampled, are found after a while, and cheaply."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from test_fingerprint import make_model
from transformers import PreTrainedModel

from hf_contiguouskv.model import weight_windows
from hf_contiguouskv.model.fingerprint import model_fingerprint
from hf_contiguouskv.model.weight_windows import BYTES_PER_LOOK, WeightWindows

ROUND = 12
"""Calls in which every weight of `large_model` is looked at, at least once."""


def large_model(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Two tensors of 10 MB (float32) and others of up to 32 KiB."""
    return make_model(vocab_size=40_000, tie_word_embeddings=False).to(dtype)


def settled(model: PreTrainedModel) -> str:
    """The fingerprint, after everything was looked at."""
    first = model_fingerprint(model)
    assert {model_fingerprint(model) for _ in range(ROUND)} == {first}
    return first


def first_other(model: PreTrainedModel, before: str) -> str:
    """The fingerprint when it is first another one than `before`, within a round."""
    for _ in range(ROUND):
        if (now := model_fingerprint(model)) != before:
            return now
    raise AssertionError("the edit was not found")


def settled_from(model: PreTrainedModel, before: str) -> str:
    """The same, if it stays like that."""
    after = first_other(model, before)
    assert settled(model) == after, "the edit was found in pieces"
    return after


def edit(tensor: torch.Tensor, row: int = 1000) -> None:
    """Changes a few numbers that no sample covers, in a way that torch does not count."""
    version = tensor._version
    tensor.data[row : row + 3, 5:7] += 1
    assert tensor._version == version


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_edit_that_is_not_counted_is_found_within_a_round(dtype: torch.dtype) -> None:
    model = large_model(dtype)
    before = settled(model)
    edit(model.lm_head.weight)
    settled_from(model, before)


def test_an_edit_of_many_tensors_is_found_at_once() -> None:
    model = large_model()
    before = settled(model)
    edit(model.lm_head.weight)
    edit(model.model.embed_tokens.weight, row=30_000)
    edit(model.model.layers[1].mlp.up_proj.weight, row=9)
    settled_from(model, before)


def test_an_edit_that_is_undone_is_found_as_well() -> None:
    model = large_model()
    before = settled(model)
    weight = model.lm_head.weight
    kept = weight.detach().clone()
    edit(weight)
    edited = settled_from(model, before)
    weight.data.copy_(kept)
    settled_from(model, edited)


def test_an_edit_that_is_counted_is_found_at_once_and_once() -> None:
    model = large_model()
    before = settled(model)
    with torch.no_grad():
        model.lm_head.weight[1000, 5] += 1
    after = model_fingerprint(model)
    assert after != before
    assert settled(model) == after


def test_an_edit_that_the_samples_show_is_found_once() -> None:
    with torch.inference_mode():  # No edit is counted there.
        model = large_model()
        before = settled(model)
        kept = model.lm_head.weight.clone()
        model.lm_head.weight.mul_(1.5)
        after = model_fingerprint(model)
        assert after != before
        assert settled(model) == after
        model.lm_head.weight.copy_(kept)
        assert settled(model) == before


def test_what_was_recorded_outlives_a_change_of_something_else() -> None:
    model = large_model()
    settled(model)
    model.config.rms_norm_eps = 0.5
    before = model_fingerprint(model)
    edit(model.lm_head.weight)
    first_other(model, before)


def test_a_look_reads_no_more_than_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    model = large_model()
    model_fingerprint(model)
    looks: list[int] = []
    digest = weight_windows.xxhash.xxh3_64_intdigest

    def counted(octets: memoryview) -> int:
        looks[-1] += len(octets)
        return digest(octets)

    monkeypatch.setattr(weight_windows.xxhash, "xxh3_64_intdigest", counted)
    for _ in range(2 * ROUND):
        looks.append(0)
        model_fingerprint(model)
    assert max(looks) <= BYTES_PER_LOOK
    total = sum(parameter.nbytes for parameter in model.parameters())
    assert sum(looks) >= 2 * total - BYTES_PER_LOOK


# ---- windows on their own ----


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.rand(300_000), torch.rand(7), torch.rand(400_000), torch.rand(2**18)]


def look_around(windows: WeightWindows) -> set[int]:
    return set().union(*(windows.look() for _ in range(6)))


def test_each_byte_has_its_turn(tensors: list[torch.Tensor]) -> None:
    windows = WeightWindows(tensors)
    assert look_around(windows) == look_around(windows) == set()
    for tensor in tensors:
        for place in (0, tensor.numel() // 2, tensor.numel() - 1):
            before = tensor[place].item()
            tensor[place] = 2.0
            assert look_around(windows) == {tensor.data_ptr()}
            assert windows.look() == {tensor.data_ptr()}, "it is found until new windows are made"
            tensor[place] = before
    assert look_around(windows) == set()


def test_what_is_made_anew_takes_over_what_still_holds(tensors: list[torch.Tensor]) -> None:
    earlier = WeightWindows(tensors)
    look_around(earlier)
    for tensor in tensors:
        tensor[1] = 2.0
    first, _, third, _ = (tensor.data_ptr() for tensor in tensors)
    windows = WeightWindows(tensors[:3], earlier, {first})
    assert look_around(windows) == {tensors[1].data_ptr(), third}


def replace_memory(tensor: torch.Tensor) -> None:
    tensor.data = torch.zeros(3)


def shrink_memory(tensor: torch.Tensor) -> None:
    tensor.untyped_storage().resize_(64)


def shrink(tensor: torch.Tensor) -> None:
    tensor.data = tensor.data[:5].clone()


@pytest.mark.parametrize("change", [replace_memory, shrink_memory, shrink])
def test_memory_that_a_tensor_no_longer_has_is_not_read(
    change: Callable[[torch.Tensor], None], tensors: list[torch.Tensor]
) -> None:
    windows = WeightWindows(tensors)
    look_around(windows)
    change(tensors[2])
    assert look_around(windows) == set()


def test_tensors_are_not_kept_alive(tensors: list[torch.Tensor]) -> None:
    windows = WeightWindows(tensors)
    look_around(windows)
    del tensors[0], tensors[1]
    gc.collect()
    assert look_around(windows) == set()
    assert sum(watched.tensor() is not None for watched in windows._order) == 2


def odd_tensors() -> Iterator[torch.Tensor]:
    yield torch.empty(0)
    yield torch.rand(4, 6).t()
    yield torch.ones(2, device="meta")
    yield torch.rand(5).to_sparse()


def test_what_is_no_stretch_of_host_memory_is_left_out(tensors: list[torch.Tensor]) -> None:
    assert WeightWindows(odd_tensors()).look() == set()
    tied = [tensors[0], tensors[0], torch.nn.Parameter(tensors[0])]
    assert len(WeightWindows(tied)._order) == 1


def test_many_threads_may_ask() -> None:
    model = large_model()
    found, failures = set(), []

    def ask() -> None:
        try:
            found.update(model_fingerprint(model) for _ in range(3 * ROUND))
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert len(found) == 1
