"""The device pipeline on a real accelerator: what `test_device_pipeline.py` proves with fakes, and what they cannot."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from hf_contiguouskv.hardware.accelerator import Accelerator, pinned_buffer
from hf_contiguouskv.hardware.aligned_memory import PAGE, as_memoryview
from hf_contiguouskv.hardware.pinned_memory import PinnedPool, available_bytes, register_with_cuda
from hf_contiguouskv.model.attention import attend
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.prefill.persisting import persist_rows
from hf_contiguouskv.store.local_disk import FileBlob

from .device_helpers import CONFIGS, MEBIBYTE, PREFIX, PRUNED, SUFFIX, ask, assert_idle, on_a_cpu, opened
from .models import build, token_ids
from .references import assert_close, assert_same_generation, forward, generate, prefilled
from .subject import ContiguousKVCache, PrefixStore, write_prefix

AVAILABLE = torch.accelerator.is_available()
pytestmark = [
    pytest.mark.needs_library,
    pytest.mark.skipif(not AVAILABLE, reason="needs an accelerator: torch.accelerator.is_available() is false"),
]
CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: torch.cuda.is_available() is false")
TWO = pytest.mark.skipif(
    not AVAILABLE or torch.accelerator.device_count() < 2, reason="needs two accelerators: there are fewer"
)
EXACT = CONFIGS["exact"]
LAYERS = 4


def accelerator(index: int = 0) -> torch.device:
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, index)


@pytest.fixture(params=["llama", "gemma3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def stored(family: str, path: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """A float32 model on the accelerator whose prefix is stored; the prefix and a suffix, there as well."""
    model = build(family).to(accelerator())
    write_prefix(model, PREFIX, path)
    return model, PREFIX.to(model.device), SUFFIX.to(model.device)


@pytest.fixture
def llama(store_path: Path) -> tuple[Any, torch.Tensor, torch.Tensor]:
    return stored("llama", store_path)


# ---- answers and tiers ----


def test_a_whole_prefix_answers_as_a_dynamic_cache(store_path, family):
    model, prefix, suffix = stored(family, store_path)
    expected = forward(model, suffix, prefilled(model, prefix))
    with opened(store_path) as store:
        for tier in ("disk", "device", "device"):
            logits, stats = ask(model, store, EXACT, suffix)
            assert_close(logits, expected)
            assert stats.hits[tier] == sum(stats.hits.values()) > 0
            assert_idle(store.inner.memory)


def test_generate_goes_on_as_with_a_dynamic_cache(llama, store_path):
    model, prefix, suffix = llama
    ids = torch.cat([prefix, suffix], dim=1)
    with opened(store_path) as store, ContiguousKVCache(model, PREFIX, store=store, budget=1.0) as cache:
        assert_same_generation(generate(model, ids, cache), generate(model, ids, prefilled(model, prefix)))


@pytest.mark.parametrize("config", PRUNED)
def test_a_warm_request_answers_as_the_cold_one_without_a_read(llama, store_path, config):
    model, _, suffix = llama
    with opened(store_path) as store:
        cold, _ = ask(model, store, CONFIGS[config], suffix)
        warm, stats = ask(model, store, CONFIGS[config], suffix)
        assert_close(warm, cold)
        assert stats.hits["device"] == sum(stats.hits.values()) > 0
        assert stats.bytes_read == 0


def test_exact_keys_select_as_on_a_cpu(llama, store_path):
    model, _, suffix = llama
    with opened(store_path) as store:
        logits, _ = ask(model, store, CONFIGS["paper"], suffix)
    expected = on_a_cpu(build("llama"), store_path.with_name("cpu"), CONFIGS["paper"])
    assert_close(logits.cpu(), expected, relative=1e-3, absolute=1e-3)


@pytest.mark.parametrize("host", [0, 100_000, 8 * MEBIBYTE])
@pytest.mark.parametrize("device", [0, 60_000, 150_000])
def test_the_smallest_memory_still_answers(llama, store_path, device, host):
    model, prefix, suffix = llama
    expected = forward(model, suffix, prefilled(model, prefix))
    with opened(store_path, host, device) as store:
        for _ in range(3):
            assert_close(ask(model, store, EXACT, suffix)[0], expected)
            torch.accelerator.synchronize()
            assert_idle(store.inner.memory)


def test_requests_in_and_out_of_inference_mode_share_a_store(llama, store_path):
    model, prefix, suffix = llama
    expected = forward(model, suffix, prefilled(model, prefix))
    for first in (True, False):
        with opened(store_path, device=150_000) as store:
            for inference in (first, not first, first):
                with torch.inference_mode(inference):
                    assert_close(ask(model, store, EXACT, suffix)[0], expected)


# ---- limits ----


@CUDA
@pytest.mark.parametrize("device", [0, MEBIBYTE, 8 * MEBIBYTE])
def test_a_store_holds_no_more_device_memory_than_its_limit(llama, store_path, device):
    model, _, suffix = llama
    with opened(store_path, device=0) as store:
        ask(model, store, EXACT, suffix)  # What torch itself needs at first use.
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with opened(store_path, device=device) as store:
        for seed in range(4):
            ask(model, store, EXACT, token_ids(9, seed=seed).to(model.device))
        gc.collect()
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated() - before
        (tier,) = store.inner.memory.devices.values()
        assert tier.held_bytes <= device
        # The allocator rounds up each of a few pieces.
        assert held <= tier.held_bytes + 64 * 1024
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - before <= 64 * 1024


@CUDA
def test_pinned_buffers_are_pinned_and_begin_with_a_page():
    for nbytes in (1, PAGE, 100_000, MEBIBYTE):
        buffer = pinned_buffer(nbytes)
        assert buffer.is_pinned()
        assert buffer.numel() == nbytes
        assert buffer.data_ptr() % PAGE == 0


@CUDA
def test_reserved_host_memory_is_pinned_read_into_and_used_again(tmp_path):
    """What the system says about direct reads into registered pages does not matter: others are bounced."""
    pool, size = PinnedPool(register_with_cuda, lambda: [], available_bytes), 8 * MEBIBYTE
    pool.reserve(size)
    assert pool.nbytes == size
    content = torch.arange(size // 8, dtype=torch.int64).view(torch.uint8)
    (tmp_path / "file").write_bytes(content.numpy().tobytes())
    blob = FileBlob(tmp_path / "file")
    for _ in range(3):
        piece = pool.take(size)
        assert piece is not None
        assert piece.is_pinned()
        assert blob.read_into([(0, as_memoryview(piece))]) == size
        assert torch.equal(piece.to("cuda", non_blocking=True).cpu(), content)
        piece.zero_()
        del piece
    blob.close()
    # The library's own pool lives as long as the process; this one must not leave its pages with the driver.
    (region,) = pool._regions
    cudart = torch.cuda.cudart()
    assert cudart.cudaHostUnregister(region.memory.data_ptr()) == cudart.cudaError.success


@CUDA
def test_a_device_says_what_is_free_and_gets_memory_back():
    device = Accelerator(accelerator())
    before = device.free_bytes()
    assert before is not None
    memory = device.empty(256 * MEBIBYTE)
    assert before - device.free_bytes() >= 200 * MEBIBYTE
    del memory
    assert before - device.free_bytes() < 100 * MEBIBYTE  # Torch keeps it, and it is free all the same.
    reserved = torch.cuda.memory_reserved()
    device.let_go()
    assert torch.cuda.memory_reserved() < reserved


@CUDA
def test_small_tensors_cross_without_a_wait_and_scores_come_back():
    device = Accelerator(accelerator())
    for values in (torch.arange(20_000), torch.tensor([True, False]), torch.zeros(0, dtype=torch.int64)):
        with torch.inference_mode():
            torch.cuda.set_sync_debug_mode("error")
            there = device.send(values)
            torch.cuda.set_sync_debug_mode("default")
        assert there.device.type == "cuda"
        assert not there.is_inference()
        assert torch.equal(device.fetch(there), values)


@CUDA
def test_memory_that_runs_out_is_no_room(llama, store_path):
    model, prefix, suffix = llama
    expected = forward(model, suffix, prefilled(model, prefix))
    with opened(store_path) as store:
        ask(model, store, EXACT, suffix)
        (tier,) = store.inner.memory.devices.values()
        assert tier.held_bytes > 0
        with pytest.raises(torch.OutOfMemoryError):
            tier.where_it_fits(2**50, lambda: torch.empty(2**50, dtype=torch.uint8, device="cuda"))
        assert tier.bytes_by_use["chunks"] == 0
        tier.max_bytes = 2**51
        assert tier.lease(2**50, must=False) is None
        tier.max_bytes = 8 * MEBIBYTE
        tier.peak_bytes = tier.held_bytes  # Memory that was promised and refused counts as a peak.
        assert_close(ask(model, store, EXACT, suffix)[0], expected)
        assert_idle(store.inner.memory)


# ---- what is computed there ----


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_bytes_are_stored_from_both_places(tmp_path, dtype):
    """Arranged, packed and indexed on the device as on the CPU."""
    model = build("llama").to(dtype)
    geometry, chance = ServedModel(model).geometry(16), torch.Generator().manual_seed(7)
    shape = (geometry.num_layers, 2, geometry.kv_heads, 165, geometry.head_dim)
    states = (torch.randn(shape, generator=chance) * torch.rand(shape[-1], generator=chance) * 5).to(dtype)
    found = []
    for place in ("cpu", "cuda"):
        there = states.to(place)
        rows = [(PREFIX[0].numpy(), [(keys, values, 0) for keys, values in there])]
        with PrefixStore(tmp_path / place) as store:
            persist_rows(rows, store.inner, "of nobody", geometry)
        (file,) = (tmp_path / place).rglob("*.safetensors")
        with safe_open(file, "pt") as segment:
            found.append({name: segment.get_tensor(name) for name in segment.keys()})  # noqa: SIM118
    assert found[0].keys() == found[1].keys()
    for name, tensor in found[0].items():
        assert torch.equal(tensor.view(torch.uint8), found[1][name].view(torch.uint8)), name


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads"), [(8, 2), (4, 4)])
@pytest.mark.parametrize(("length", "keys"), [(1, 33), (9, 100), (40, 1039), (17, 17)])
@pytest.mark.parametrize("padding", [0, 3])
def test_attention_is_that_of_the_masked_reference(dtype, heads, kv_heads, length, keys, padding):
    chance = torch.Generator().manual_seed(keys)
    query = torch.randn(2, length, heads, 64, generator=chance).transpose(1, 2)
    key, value = (torch.randn(2, kv_heads, keys, 64, generator=chance) for _ in range(2))
    mask = torch.ones(length, keys, dtype=torch.bool).tril(keys - length).expand(2, 1, -1, -1).clone()
    mask[1, :, :, :padding] = False
    repeated = [one.to(dtype).double().repeat_interleave(heads // kv_heads, 1) for one in (key, value)]
    logits = (query.to(dtype).double() @ repeated[0].mT * 0.125).masked_fill(~mask, float("-inf"))
    expected = (logits.softmax(-1).nan_to_num() @ repeated[1]).transpose(1, 2)
    there = [one.to("cuda", dtype) for one in (query, key, value)]
    found = attend(*there, mask.cuda(), {"scaling": 0.125}, plain=padding == 0)
    seen = mask.any(-1).expand(2, heads, -1).transpose(1, 2)  # What sees nothing is padding itself.
    limit = 2e-4 if dtype is torch.float32 else 0.02
    difference = (found.cpu().double() - expected).abs().amax(-1)
    assert float(difference[seen].max()) < limit


# ---- streams ----


@pytest.fixture
def no_host_waits() -> Iterator[Any]:
    """Makes a model's layers raise where the host waits for the device, from the first layer to the last."""
    hooks = []

    def watch(model: Any) -> None:
        layers = model.model.layers
        hooks.append(layers[0].register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")))
        hooks.append(layers[-1].register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")))

    yield watch
    torch.cuda.set_sync_debug_mode("default")
    for hook in hooks:
        hook.remove()


@CUDA
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_the_host_waits_for_no_device_between_the_layers(llama, store_path, no_host_waits, warm):
    model, prefix, suffix = llama
    expected = forward(model, suffix, prefilled(model, prefix))
    with opened(store_path) as store:
        ask(model, store, EXACT, suffix)  # The first mask of each model is looked at.
    with opened(store_path) as store:
        if warm:
            ask(model, store, EXACT, suffix)
        no_host_waits(model)
        assert_close(ask(model, store, EXACT, suffix)[0], expected)


@CUDA
@pytest.mark.parametrize("device", [8 * MEBIBYTE, 150_000])
def test_threads_with_streams_of_their_own_share_a_store(llama, store_path, device):
    model, prefix, _ = llama
    suffixes = [token_ids(9, seed=1300 + number).to(model.device) for number in range(4)]
    expected = [forward(model, suffix, prefilled(model, prefix)) for suffix in suffixes]
    torch.cuda.synchronize()
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                for turn in range(6):
                    which = (number + turn) % len(suffixes)
                    assert_close(ask(model, store, EXACT, suffixes[which])[0], expected[which])
        except BaseException as error:
            failures.append(error)

    with opened(store_path, device=device) as store:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures, failures[0]
        torch.cuda.synchronize()
        assert_idle(store.inner.memory)


@CUDA
def test_threads_copy_at_the_same_time_and_keep_their_own_streams():
    """Reader threads and the model's thread all enter the streams for copies."""
    device, size, failures = Accelerator(accelerator()), 4 * MEBIBYTE, []

    def work(number: int) -> None:
        try:
            own = torch.cuda.Stream()
            with torch.cuda.stream(own):
                source = pinned_buffer(size).fill_(number)
                for _ in range(50):
                    target = device.empty(size, for_copies=True)
                    copied = device.copy_in(source, target)
                    assert torch.cuda.current_stream() == own, "another thread's stream was restored"
                    device.wait(copied)
                    device.uses(target)
                    back = pinned_buffer(size)
                    device.copy_out(target, back).synchronize()
                    assert bool((back == number).all())
                    assert torch.cuda.current_stream() == own
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures[0]


@CUDA
def test_a_copy_in_waits_for_the_event_that_it_is_given():
    device, size = Accelerator(accelerator()), 32 * MEBIBYTE
    source, target = pinned_buffer(size).fill_(9), device.empty(size, for_copies=True)
    torch.cuda.synchronize()
    target.fill_(1)
    torch.cuda._sleep(50_000_000)
    used = target.clone()
    copied = device.copy_in(source, target, after=device.mark())
    assert not copied.query()
    device.wait(copied)
    assert int(used.max()) == 1
    assert int(target.min()) == 9


# ---- several devices ----


@TWO
def test_a_model_on_two_devices_keeps_each_layers_chunks_on_its_own(store_path):
    accelerate = pytest.importorskip("accelerate")
    plain = build("llama")
    expected = forward(plain, SUFFIX, prefilled(plain, PREFIX))
    first, second = accelerator(0), accelerator(1)
    places = {"model.embed_tokens": first, "model.rotary_emb": first, "model.norm": second, "lm_head": second}
    places |= {f"model.layers.{layer}": (first, second)[layer >= LAYERS // 2] for layer in range(LAYERS)}
    model = accelerate.dispatch_model(plain, device_map=places)
    write_prefix(model, PREFIX, store_path)
    with opened(store_path) as store:
        for tier in ("disk", "device"):
            logits, stats = ask(model, store, EXACT, SUFFIX.to(first))
            assert_close(logits.cpu(), expected)
            assert stats.hits[tier] == sum(stats.hits.values()) > 0
        assert set(store.inner.memory.devices) == {first, second}
        (table,) = store.inner.memory._tables.values()
        for layer in range(LAYERS):
            for device, tier in store.inner.memory.devices.items():
                here = (table.slots_in(tier.name).reshape(LAYERS, -1)[layer] >= 0).any()
                assert here == (device == (first, second)[layer >= LAYERS // 2])
        assert_idle(store.inner.memory)
