"""Systems on an accelerator answer as on a CPU, whatever order its copies run in, and from every state.

The accelerator is a fake (`unit/fake_device.py`), on whose log every test ends with a proof; the last tests want a real
one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tiny_llama import some_ids, tiny_llama
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache
from unit.fake_device import EARLY, LATE, SCHEDULES, Machine, accelerated

from eval.systems import (
    AttentionStore,
    AttentionStoreH2O,
    ContiguousKV,
    FlexGen,
    Impress,
    InMemory,
    Reload,
    State,
    bringing,
    departure,
    layer_reader,
)
from eval.systems.choices import best_on_device, held_by, voted_on_device
from eval.systems.token_scores import best_tokens, column_sums, similarity, voted
from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.hardware import accelerator as devices
from hf_contiguouskv.memory import tiers
from hf_contiguouskv.model import attention
from hf_contiguouskv.model.transformers_internals import cache_argument

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 6, 2, 8
# With a number it is no CPU to the fake accelerator's tests, but the host's memory.
HOST = torch.device("cpu", 7)


@pytest.fixture(scope="module")
def model() -> Any:
    return made()


def made(dtype: torch.dtype = torch.float32) -> Any:
    """A tiny model; in its second layer all query heads are alike, so that probe heads agree there."""
    found = tiny_llama(
        hidden_size=HEADS * HEAD_DIM,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
    )
    with torch.no_grad():
        for name, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            weight = getattr(found.model.layers[1].self_attn, name).weight
            weight.copy_(weight[:HEAD_DIM].repeat(heads, 1))
    return found.to(dtype)


PREFIX, SUFFIX = some_ids(200, 1), some_ids(6, 2)  # Three units of 64 tokens, and a part of one.

Make = Callable[..., Any]
TOKENS: dict[str, Make] = {
    "attentionstore_h2o": lambda *arguments, **options: AttentionStoreH2O(*arguments, **options),
    "impress": lambda *arguments, **options: Impress(*arguments, **options),
    "impress+groups": lambda *arguments, **options: Impress(*arguments, probes="groups", **options),
}
TIERED: dict[str, Make] = {
    "contiguouskv": lambda model, folder: ContiguousKV("contiguouskv", model, folder, ContiguousKVConfig(budget=0.3)),
    "contiguouskv_paper": lambda model, folder: ContiguousKV(
        "contiguouskv_paper", model, folder, ContiguousKVConfig.paper(0.3), eviction="published"
    ),
    "contiguouskv_whole": lambda model, folder: ContiguousKV(
        "contiguouskv_whole", model, folder, ContiguousKVConfig(budget=1.0)
    ),
    "attentionstore": lambda model, folder: AttentionStore(model, folder, overlap=False),
    "attentionstore+overlap": lambda model, folder, **options: AttentionStore(model, folder, overlap=True, **options),
    "flexgen": FlexGen,
} | {name: lambda model, folder, make=make: make(model, folder, 0.25) for name, make in TOKENS.items()}


def ask(model: Any, system: Any, suffix: torch.Tensor = SUFFIX, prefix: torch.Tensor = PREFIX) -> tuple[Any, Any, Any]:
    """Logits of the suffix `(q, vocabulary)`, statistics, and in how many layers probe heads agreed."""
    cache = system.cache(prefix)
    with torch.no_grad():
        ids = suffix[None].to(model.device)
        logits = model(input_ids=ids, **{cache_argument(model): cache}).logits[0]
    return logits.cpu(), system.finish(cache), getattr(system, "agreed", None)


@contextmanager
def on_fake(schedule: str | int) -> Iterator[Machine]:
    """As `accelerated`; `HOST` is the host's memory, for systems that bring chunks there."""
    with accelerated(schedule) as machine, pytest.MonkeyPatch.context() as patch:

        def device_of(device: torch.device) -> Any:
            return None if device == HOST else machine.device_of(device)

        for module in (tiers, devices):
            patch.setattr(module, "device_of", device_of)
        patch.setattr(bringing, "HOST", HOST)
        patch.setattr(layer_reader, "as_memoryview", machine.into_host)
        yield machine


# ---- AS+H2O and IMPRESS ----


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("overlap", [False, True], ids=["as published", "overlapped"])
@pytest.mark.parametrize("name", list(TOKENS))
def test_systems_that_choose_tokens_answer_as_on_a_cpu(
    model: Any, tmp_path: Path, name: str, overlap: bool, schedule: str | int
) -> None:
    for budget in (0.05, 0.25):
        folder = tmp_path / str(budget)
        with TOKENS[name](model, folder, budget, overlap=overlap) as system:
            system.store(PREFIX)
            expected, read, agreed = ask(model, system)
        with on_fake(schedule) as machine, TOKENS[name](model, folder, budget, overlap=overlap) as system:
            system.store(PREFIX)
            for tier in ("disk", "device", "device"):
                before = len(machine.copies())
                logits, stats, alike = ask(model, system)
                torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
                assert alike == agreed
                assert stats.hits[tier] == sum(stats.hits.values()) == read.hits["disk"]
                assert stats.bytes_read == (read.bytes_read if tier == "disk" else 0)
                assert stats.bytes_used == read.bytes_used
                if tier == "device":
                    assert len(machine.copies()) == before


@pytest.mark.parametrize("name", list(TOKENS))
def test_one_answer_a_choice_comes_back_from_the_device(model: Any, tmp_path: Path, name: str) -> None:
    """The host waits for the device where it must know what to read, and nowhere else; what it gets is small."""
    with on_fake(LATE) as machine, TOKENS[name](model, tmp_path, 0.25, overlap=True) as system:
        system.store(PREFIX)
        _, _, agreed = ask(model, system)
        fetched = [entry.detail for entry in machine.copies("fetch")]
        chosen = LAYERS if agreed is None else LAYERS + (LAYERS - agreed)
        assert len(fetched) == chosen
        # At most four bytes for each block, head and pair of heads.
        assert all(int(detail.split()[1]) <= 4 * (4 * KV_HEADS + 9) for detail in fetched)
        # The layer's keys in one copy, and its values (and other keys) in as many as there are choices.
        assert len(machine.copies()) <= 3 * LAYERS


@pytest.mark.parametrize("schedule", [LATE, EARLY, 1], ids=str)
@pytest.mark.parametrize("name", list(TOKENS))
def test_a_prefix_of_several_nodes_answers_as_on_a_cpu(
    model: Any, tmp_path: Path, name: str, schedule: str | int
) -> None:
    lengths = (100, 130, 200)
    with TOKENS[name](model, tmp_path / "cpu", 0.25) as system:
        for tokens in lengths:
            system.store(PREFIX[:tokens])
        expected, _, _ = ask(model, system)
    with on_fake(schedule), TOKENS[name](model, tmp_path / "device", 0.25) as system:
        for tokens in lengths:
            system.store(PREFIX[:tokens])
        for _ in range(2):
            torch.testing.assert_close(ask(model, system)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("schedule", [LATE, 2], ids=str)
@pytest.mark.parametrize("device_bytes", [0, 20_000, 60_000])
@pytest.mark.parametrize("name", list(TOKENS))
def test_tokens_are_right_in_the_smallest_memory(
    model: Any, tmp_path: Path, name: str, device_bytes: int, schedule: str | int
) -> None:
    with TOKENS[name](model, tmp_path, 0.25) as system:
        system.store(PREFIX)
        expected, _, _ = ask(model, system)
    small = {"device_bytes": device_bytes, "host_bytes": 100_000}
    with on_fake(schedule) as machine, TOKENS[name](model, tmp_path, 0.25, overlap=True, **small) as system:
        system.store(PREFIX)
        for _ in range(3):
            torch.testing.assert_close(ask(model, system)[0], expected, atol=1e-5, rtol=1e-5)
            machine.run_all()


class Waits(TorchFunctionMode):
    """Notes where a system makes the host wait for a device, or moves pageable memory there."""

    CALLS = (
        "cpu",
        "item",
        "tolist",
        "numpy",
        "to",
        "nonzero",
        "equal",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
    )

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, code = getattr(function, "__name__", ""), sys._getframe(1).f_code
        place = Path(code.co_filename)
        # `moving.fetch` is where the host waits: it is counted by another test.
        if place.parent.name == "systems" and place.name != "moving.py" and name in self.CALLS:
            self.found.append(f"{place.name} {code.co_name}: {name}")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("nodes", [(200,), (100, 200)], ids=["one node", "two nodes"])
@pytest.mark.parametrize("name", [name for name in TIERED if not name.startswith("contiguouskv")])
def test_the_host_waits_nowhere_else(model: Any, tmp_path: Path, name: str, nodes: tuple[int, ...]) -> None:
    with on_fake(LATE), TIERED[name](model, tmp_path) as system:
        for tokens in nodes:
            system.store(PREFIX[:tokens])
        for _ in range(2):
            cache = system.cache(PREFIX)
            with torch.no_grad(), Waits() as waits:
                model(input_ids=SUFFIX[None], **{cache_argument(model): cache})
            system.finish(cache)
            assert waits.found == []


# ---- scores and choices ----


@pytest.mark.parametrize("at_once", [1, 40, 700, 2**26])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scores_are_those_of_a_cpu_in_any_memory(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, at_once: int
) -> None:
    monkeypatch.setattr("eval.systems.token_scores.DEVICE_LOGITS_AT_ONCE", at_once)
    chance = torch.Generator().manual_seed(3)
    queries = torch.randn(HEADS, 17, HEAD_DIM, generator=chance).to(dtype)
    keys = torch.randn(KV_HEADS, 40 + 17, HEAD_DIM, generator=chance).to(dtype)
    exact = column_sums(queries.double().float(), keys[:, :40].float(), keys[:, 40:].float(), 0.3, False)
    # Queries as models have them: heads are the inner dimension.
    turned = queries.transpose(0, 1).contiguous().transpose(0, 1)
    found = column_sums(turned, keys[:, :40], keys[:, 40:], 0.3, True)
    torch.testing.assert_close(found, exact, atol=1e-5, rtol=1e-5)


def test_choices_are_those_of_a_cpu_with_ties() -> None:
    chance = torch.Generator().manual_seed(4)
    for _ in range(50):
        mass = torch.randint(0, 6, (3, 40), generator=chance).float() / 4
        for keep in (1, 7, 40):
            chosen = best_on_device(mass, keep)
            assert chosen.tolist() == best_tokens(mass, keep).tolist()
            tokens, common = voted_on_device(chosen, mass, keep)
            assert tokens.tolist() == voted(chosen.numpy(), mass, keep).tolist()
            pairs = [int(common[0, 1]), int(common[0, 2]), int(common[1, 2])]
            assert sum(pair / (2 * keep - pair) for pair in pairs) / 3 == pytest.approx(similarity(chosen.numpy()))
            assert held_by(tokens // 8, 5).tolist() == torch.bincount(tokens // 8, minlength=5).tolist()


# ---- states ----


@pytest.mark.parametrize("schedule", [LATE, EARLY, 3], ids=str)
@pytest.mark.parametrize("named", [False, True], ids=["everything", "what the suffix uses"])
@pytest.mark.parametrize("name", list(TIERED))
def test_requests_find_every_state_and_answer_alike(
    model: Any, tmp_path: Path, name: str, named: bool, schedule: str | int
) -> None:
    suffix = SUFFIX if named else None
    with TIERED[name](model, tmp_path) as system:
        system.store(PREFIX)
        expected, _, _ = ask(model, system)
    with on_fake(schedule) as machine, TIERED[name](model, tmp_path) as system:
        system.store(PREFIX)
        assert set(system.states) >= {State.COLD, State.WARM_HOST, State.WARM_DEVICE}
        for state in (*system.states, *reversed(system.states)):
            for _ in range(2):
                system.enter(state, PREFIX, suffix)
                before = len(machine.copies())
                logits, stats, _ = ask(model, system)
                assert departure(state, stats) is None
                torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
                assert (len(machine.copies()) > before) is (state is not State.WARM_DEVICE)
                machine.run_all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_shares_are_where_they_belong(model: Any, tmp_path: Path, schedule: str | int) -> None:
    """FlexGen with a part of each layer on the device, one in host memory, one on disk, and every two of them."""
    prefix = some_ids(480, 6)
    with InMemory(model) as whole:
        whole.store(prefix)
        expected, _, _ = ask(model, whole, prefix=prefix)
    for device_share, host_share in ((0.3, 0.3), (0.3, 0.7), (0.6, 0.0), (0.0, 0.6), (1.0, 0.0)):
        with (
            on_fake(schedule) as machine,
            FlexGen(model, tmp_path, device_share=device_share, host_share=host_share) as system,
        ):
            system.store(prefix)
            for state in (*system.states, *reversed(system.states)):
                for _ in range(2):
                    system.enter(state, prefix)
                    logits, stats, _ = ask(model, system, prefix=prefix)
                    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
                    assert departure(state, stats) is None
                    machine.run_all()


@pytest.mark.parametrize("schedule", [LATE, EARLY, 1, 2], ids=str)
@pytest.mark.parametrize("host_bytes", [0, 50_000, 10**7])
@pytest.mark.parametrize("device_bytes", [0, 100_000])
def test_layers_are_right_in_the_smallest_memory(
    model: Any, tmp_path: Path, host_bytes: int, device_bytes: int, schedule: str | int
) -> None:
    prefixes = [some_ids(tokens, tokens) for tokens in (200, 330)]
    with InMemory(model) as whole:
        expected = []
        for prefix in prefixes:
            whole.store(prefix)
            expected.append(ask(model, whole, prefix=prefix)[0])
    limits = {"host_bytes": host_bytes, "device_bytes": device_bytes}
    for overlap in (False, True):
        with (
            on_fake(schedule) as machine,
            AttentionStore(model, tmp_path / str(overlap), overlap=overlap, **limits) as system,
        ):
            for prefix in prefixes:
                system.store(prefix)
            for turn in (0, 1, 1, 0, 0, 1, 0):
                found = ask(model, system, prefix=prefixes[turn])[0]
                torch.testing.assert_close(found, expected[turn], atol=1e-5, rtol=1e-5)
                for tier in (system.opened().host, *system.opened().on.values()):
                    assert tier.peak_bytes <= tier.max_bytes
            machine.run_all()


def test_a_layer_crosses_in_one_copy(model: Any, tmp_path: Path) -> None:
    with on_fake(LATE) as machine, AttentionStore(model, tmp_path, overlap=True) as system:
        system.store(PREFIX)
        system.enter(State.COLD, PREFIX)
        before = len(machine.copies())
        ask(model, system)
        assert len(machine.copies()) - before == LAYERS


@pytest.mark.parametrize(
    "make", [lambda model, _: InMemory(model), Reload, AttentionStore], ids=["in memory", "reload", "attentionstore"]
)
def test_whole_caches_answer_as_on_a_cpu(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    with make(model, tmp_path) as system:
        system.store(PREFIX)
        expected, _, _ = ask(model, system)
    implementation, attend = model.config._attn_implementation, mock.Mock(wraps=attention.attend)
    monkeypatch.setattr(attention, "attend", attend)
    with on_fake(LATE), make(model, tmp_path) as system:
        system.store(PREFIX)
        assert not attend.called
        for state in system.states:
            for _ in range(2):
                system.enter(state, PREFIX)
                torch.testing.assert_close(ask(model, system)[0], expected, atol=1e-5, rtol=1e-5)
                assert model.config._attn_implementation == implementation
                assert attend.call_count == LAYERS  # K and V were not repeated.
                attend.reset_mock()


# ---- a real accelerator ----

REAL = pytest.mark.skipif(
    not torch.accelerator.is_available(), reason="needs an accelerator: torch.accelerator.is_available() is false"
)


@pytest.fixture(params=["float32", "bfloat16"])
def twin(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A model on the CPU, and the same on the accelerator."""
    device = torch.accelerator.current_accelerator()
    dtype = getattr(torch, str(request.param))
    return made(dtype), made(dtype).to(device)


def copied(model: Any, tokens: int) -> DynamicCache:
    """K and V that are the same on every device."""
    chance = torch.Generator().manual_seed(5)
    states = DynamicCache(config=model.config)
    for layer in range(LAYERS):
        keys, values = torch.randn(2, 1, KV_HEADS, tokens, HEAD_DIM, generator=chance).to(model.dtype)
        states.update(keys, values, layer)
    return states


@REAL
@pytest.mark.parametrize("name", list(TIERED))
def test_a_real_accelerator_answers_as_a_cpu_from_every_state(twin: Any, tmp_path: Path, name: str) -> None:
    on_cpu, on_device = twin
    # The same K and V for both: with 16-bit numbers, prefixes that two devices compute differ.
    states = copied(on_cpu, len(PREFIX))
    with TIERED[name](on_cpu, tmp_path / "cpu") as system:
        system.store(PREFIX, states)
        expected, _, agreed = ask(on_cpu, system)
    with TIERED[name](on_device, tmp_path / "device") as system:
        system.store(PREFIX, states)
        if on_cpu.dtype != torch.float32:
            # Queries that two devices compute differ by more than some tokens do: states are compared on one.
            expected, _, agreed = ask(on_device, system)
        for state in (*system.states, *reversed(system.states)):
            for suffix in (SUFFIX, None):
                system.enter(state, PREFIX, suffix)
                logits, stats, alike = ask(on_device, system)
                assert departure(state, stats) is None
                torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
                assert alike == agreed


@REAL
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA, which tells where the host waits")
@pytest.mark.parametrize("name", list(TIERED))
def test_on_cuda_the_host_waits_for_choices_only(twin: Any, tmp_path: Path, name: str) -> None:
    """CUDA raises where the host waits in any other way than `moving.fetch` and the library's own do: for an event."""
    _, model = twin
    first, last = model.model.layers[0], model.model.layers[-1]
    with TIERED[name](model, tmp_path) as system:
        system.store(PREFIX)
        ask(model, system)  # The first mask of a model is looked at.
        for state in (State.COLD, State.WARM_HOST, State.WARM_DEVICE):
            system.enter(state, PREFIX)
            hooks = [
                first.register_forward_pre_hook(lambda *_: torch.cuda.set_sync_debug_mode("error")),
                last.register_forward_hook(lambda *_: torch.cuda.set_sync_debug_mode("default")),
            ]
            try:
                ask(model, system)
            finally:
                torch.cuda.set_sync_debug_mode("default")
                for hook in hooks:
                    hook.remove()


@REAL
def test_a_real_accelerator_scores_and_chooses_as_a_cpu() -> None:
    device = torch.accelerator.current_accelerator()
    chance = torch.Generator().manual_seed(6)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        queries = torch.randn(28, 33, 128, generator=chance).to(dtype)
        keys = torch.randn(4, 5000 + 33, 128, generator=chance).to(dtype)
        mass = column_sums(queries, keys[:, :5000], keys[:, 5000:], 128**-0.5)
        there = column_sums(queries.to(device), keys[:, :5000].to(device), keys[:, 5000:].to(device), 128**-0.5)
        torch.testing.assert_close(there.cpu(), mass, atol=1e-5, rtol=1e-4)
        for keep in (50, 250, 1250):
            chosen = best_on_device(mass.to(device), keep)
            assert chosen.cpu().tolist() == best_tokens(mass, keep).tolist()
            tokens, _ = voted_on_device(chosen[:3], mass[:3].to(device), keep)
            assert tokens.cpu().tolist() == voted(chosen[:3].cpu().numpy(), mass[:3], keep).tolist()
