"""The planner: sizes are those of real segments and requests, and its pipeline is what a hand computes."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import FalconConfig, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, MixtralConfig, T5Config

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore
from hf_contiguouskv.errors import ConfigError, InputError, UnsupportedModelError
from hf_contiguouskv.model.configured_model import ConfiguredModel, configured_model, model_from_configuration
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.planning import full_loads
from hf_contiguouskv.planning.costs import Case, HostWork
from hf_contiguouskv.planning.forecast import floor_s, forecasts, slowest_storage_bytes_s, systems, with_floor
from hf_contiguouskv.planning.machine import ACCELERATORS, Machine, Storage, machine_with
from hf_contiguouskv.planning.pipeline import Ask, LayerStep, RequestSteps, timing
from hf_contiguouskv.planning.volumes import Volume, scattered

TOKENS = 1024
NAMES = [one.name for one in systems()]


def llama(**changes: Any) -> LlamaConfig:
    sizes = {
        "vocab_size": 50,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
    }
    return LlamaConfig(**sizes | changes)


@pytest.fixture(scope="module")
def model() -> ConfiguredModel:
    return configured_model(llama(), name="small")


@pytest.fixture(scope="module")
def large() -> ConfiguredModel:
    """Of the shape of Llama 3.1 8B."""
    config = llama(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
    )
    return configured_model(config, torch.bfloat16, "large")


def cpu(bytes_s: float = 1e9, latency_s: float = 0.0, readers: int = 8) -> Machine:
    """A machine whose host takes no time by itself."""
    speeds = {"flops_s": 1e9, "attention_flops_s": 1e9, "memory_s": 1e12}
    return Machine("cpu", **speeds, storage=Storage(bytes_s, latency_s), call_s=0.0, operation_s=0.0, readers=readers)


def request(*layers: LayerStep, **options: Any) -> RequestSteps:
    return RequestSteps(layers, 0.0, asking_s=0.0, **options)


# -- the model, by its configuration ----------------------------------------------------------------------------------


def test_a_configuration_says_what_a_real_model_says(model: ConfiguredModel) -> None:
    real = LlamaForCausalLM(llama())
    served = ServedModel(real)
    assert (model.shape.kv_heads, model.shape.head_dim, model.shape.dtype) == (2, 8, torch.float32)
    assert model.geometry(16) == served.geometry(16)
    assert model.query_heads == served.query_heads
    assert model.max_tokens == 4096
    # Queries, keys, values, output; gate, up, down.
    assert model.layer_weights == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    assert model.output_weights == 50 * 32


def test_the_counted_operations_are_those_that_torch_counts(model: ConfiguredModel) -> None:
    real = LlamaForCausalLM(llama())
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        real(torch.zeros(1, 20, dtype=torch.long), logits_to_keep=1)
    counts = counter.get_flop_counts()["Global"]
    products = sum(count for operation, count in counts.items() if "mm" in str(operation))
    assert 2 * (model.active_weights * 20 + model.output_weights) == pytest.approx(products, rel=0.01)


def test_a_token_uses_some_of_the_experts_and_many_tokens_read_all() -> None:
    options = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(num_hidden_layers=1, vocab_size=50, num_local_experts=8, num_experts_per_tok=2, **options)
    found = configured_model(config)
    experts = 8 * 3 * 32 * 64
    assert found.active_weights == found.layer_weights - experts * 3 / 4
    assert found.weights_read(1) == found.active_weights
    assert found.weights_read(100) == found.layer_weights


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (FalconConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=4), "computes attention itself"),
        (T5Config(), "makes no causal LM"),
        (llama(dtype="float8_e4m3fn"), "float8_e4m3fn"),
        (llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
    ],
)
def test_what_cannot_be_served_cannot_be_planned(config: Any, reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        configured_model(config)


def test_a_model_that_is_nowhere_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"cannot read the configuration .*config\.json"):
        model_from_configuration(str(tmp_path))


# -- bytes ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, torch.Tensor, Path]:
    """A model, a prompt whose prefix is stored, and the store."""
    real = LlamaForCausalLM(llama()).eval()
    ids = torch.randint(3, 50, (1, TOKENS + 24), generator=torch.Generator().manual_seed(0))
    path = tmp_path_factory.mktemp("planned")
    with PrefixStore(path) as store:
        ContiguousKVCache(real, ids[:, :TOKENS], store=store).close()
    return real, ids, path


def test_bytes_on_disk_are_those_of_the_written_segment(
    model: ConfiguredModel, served: tuple[Any, torch.Tensor, Path]
) -> None:
    real, ids, path = served
    compact = path.parent / "compact"
    with PrefixStore(compact) as store:
        ContiguousKVCache(real, ids[:, :TOKENS], store=store, config=ContiguousKVConfig(index_bits=2)).close()
    for found in forecasts(model, cpu(), TOKENS, 24):
        if found.system.startswith("contiguouskv"):
            (segment,) = (compact if "compact" in found.system else path).glob("segments/*/*.safetensors")
            assert found.disk_bytes == segment.stat().st_size
        elif found.disk_bytes:
            assert found.disk_bytes == 2 * 3 * 2 * 8 * 4 * TOKENS


@pytest.mark.parametrize(
    ("name", "budget", "index_bits"),
    [("contiguouskv", 0.25, 8), ("contiguouskv+compact", 0.25, 2), ("contiguouskv@1", 1.0, 8)],
)
def test_bytes_of_a_request_are_those_that_a_real_one_reads(
    model: ConfiguredModel,
    served: tuple[Any, torch.Tensor, Path],
    tmp_path: Path,
    name: str,
    budget: float,
    index_bits: Literal[8, 2],
) -> None:
    real, ids, path = served
    config = ContiguousKVConfig(budget=budget, index_bits=index_bits)
    if index_bits == 2:
        path = tmp_path / "compact"
        with PrefixStore(path) as store:
            ContiguousKVCache(real, ids[:, :TOKENS], store=store, config=config).close()
    with (
        PrefixStore(path, host_bytes=2**22) as store,
        ContiguousKVCache(real, ids[:, :TOKENS], store=store, config=config) as cache,
    ):
        real.generate(ids, cache=cache, max_new_tokens=1, min_new_tokens=1, do_sample=False)
        read = cache.stats.bytes_read
    (found,) = forecasts(model, cpu(), TOKENS, 24, [one for one in systems(budget) if one.name == name])
    # Direct reads begin and end at pages; these tensors are a few pages long.
    assert found.read_bytes <= read <= 1.1 * found.read_bytes
    assert found.used_bytes == 2 * 3 * 2 * 8 * 4 * TOKENS * budget


def test_a_layer_with_a_window_reads_what_the_window_sees() -> None:
    config = Gemma3TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=6,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        vocab_size=50,
        sliding_window=64,
    )
    found = configured_model(config)
    assert found.shape.layers.windows == (64, 64, 64, 64, 64, None)
    token = 2 * 16 * 4
    by_name = {one.system: one for one in forecasts(found, cpu(), TOKENS)}
    assert by_name["attentionstore"].read_bytes == token * (5 * 64 + TOKENS)
    # This library reads whole chunks, and of a window of 64 tokens the newest one is not stored.
    assert by_name["contiguouskv@1"].read_bytes == token * (5 * 64 + TOKENS)
    assert by_name["attentionstore"].disk_bytes == token * 6 * TOKENS


def test_scattered_pieces_are_read_as_a_simulation_reads_them() -> None:
    random.seed(0)
    pieces, share, size, gap = 20_000, 0.2, 1000, 2500
    chosen = [place for place in range(pieces) if random.random() < share]
    reads, nbytes = 1, size
    for before, place in itertools.pairwise(chosen):
        between = (place - before - 1) * size
        if between <= gap:
            nbytes += between + size
        else:
            reads, nbytes = reads + 1, nbytes + size
    found = scattered(len(chosen), share, size, gap)
    assert found.reads == pytest.approx(reads, rel=0.03)
    assert found.nbytes - found.reads * 4096 == pytest.approx(nbytes, rel=0.03)


# -- time -------------------------------------------------------------------------------------------------------------


def test_reads_hide_behind_compute_if_they_run_ahead() -> None:
    layers = [LayerStep(0.0, 1.0, first=Volume(10)) for _ in range(3)]
    machine = cpu(bytes_s=10.0)
    one_by_one = timing(request(*layers), machine)
    assert (one_by_one.ttft_s, one_by_one.waited_s) == (6.0, 3.0)
    ahead = timing(request(*layers, ahead=None), machine)
    assert (ahead.ttft_s, ahead.waited_s) == (4.0, 1.0)


def test_what_is_chosen_waits_for_a_round_trip() -> None:
    layer = LayerStep(0.0, 1.0, first=Volume(10), choose_s=0.5, asks=(Ask(0, Volume(20)),))
    # 2 + 1 for the keys, 0.5 to choose, 2 + 2 for the chunks, 1 to compute.
    assert timing(request(layer), cpu(bytes_s=10.0, latency_s=2.0)).ttft_s == 8.5


def test_a_leader_asks_for_the_layers_of_its_period() -> None:
    leader = LayerStep(0.0, 1.0, choose_s=0.5, asks=(Ask(0, Volume(10)), Ask(1, Volume(10))))
    # The second layer's chunks arrive while the first one computes.
    assert timing(request(leader, LayerStep(0.0, 1.0)), cpu(bytes_s=10.0)).ttft_s == 0.5 + 1 + 1 + 1


def test_short_reads_are_limited_by_how_many_are_under_way() -> None:
    layer = LayerStep(0.0, 0.0, first=Volume(10, reads=17))
    assert timing(request(layer), cpu(bytes_s=10.0, latency_s=1.0, readers=8)).ttft_s == 1 + (16 + 1) / 8
    assert timing(request(layer, in_flight=1), cpu(bytes_s=10.0, latency_s=1.0)).ttft_s == 1 + 16 + 1


def test_an_accelerator_computes_while_its_host_goes_on() -> None:
    machine = replace(cpu(bytes_s=10.0), bus_s=5.0)
    layers = [LayerStep(1.0, 3.0)] * 2
    assert timing(request(*layers), machine).ttft_s == 6.0
    # Read in 1 s, crossed in 2 s, computed in 3 s.
    assert timing(request(LayerStep(1.0, 3.0, first=Volume(10))), machine).ttft_s == 6.0
    # A choice makes the host wait: 3 s of the first layer, 1 to choose, 3 to compute.
    assert timing(request(layers[0], LayerStep(1.0, 3.0, choose_s=1.0)), machine).ttft_s == 7.0


def test_a_full_load_takes_what_a_hand_computes(model: ConfiguredModel) -> None:
    machine = replace(cpu(bytes_s=1e6, latency_s=1e-3), call_s=1e-6, operation_s=1e-5)
    case = Case(model, machine, TOKENS, 10)
    work = HostWork(9_950, 503, 151, 50)
    read = 1e-3 + 2 * 2 * 8 * 4 * TOKENS / 1e6
    products = 2 * 10 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64) / 1e9
    attention = 4 * (10 * TOKENS + 55) * 4 * 8 / 1e9
    host = 503 * 1e-6 + 151 * 1e-5
    before = 9_950 * 1e-6 + 2 * 50 * 32 / 1e9
    # The first read is under way while the request begins.
    asking = 10e-6
    expected = max(before + asking, asking + read) + 2 * (asking + read) + 3 * (products + attention + host)
    assert work.layer_s(machine) == pytest.approx(host)
    assert timing(full_loads.by_layers(case, overlap=False), machine).ttft_s == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    card=st.sampled_from([*ACCELERATORS, "none"]),
    tokens=st.integers(16, 100_000),
    disk=st.floats(1e7, 1e11),
    factor=st.floats(1.0, 100.0),
)
def test_faster_storage_never_takes_longer(
    large: ConfiguredModel, name: str, card: str, tokens: int, disk: float, factor: float
) -> None:
    (system,) = (one for one in systems() if one.name == name)

    def seconds(bytes_s: float, latency_s: float) -> float:
        storage = Storage(bytes_s, latency_s)
        machine = replace(cpu(), storage=storage)
        if card != "none":
            machine = machine_with(ACCELERATORS[card], storage, torch.bfloat16)
        return system.timing(Case(large, machine, tokens, 32)).ttft_s

    # (A faster disk makes it worth to read wider gaps, which costs some of the gain.)
    assert seconds(disk * factor, 1e-4) <= 1.05 * seconds(disk, 1e-4)
    assert seconds(disk, 1e-4) <= seconds(disk, 1e-3)


def test_a_slow_disk_decides_everything(large: ConfiguredModel) -> None:
    machine = machine_with(ACCELERATORS["h100"], Storage(1e7), torch.bfloat16)
    for found in forecasts(large, machine, 8192):
        if found.read_bytes:
            assert found.ttft_s == pytest.approx(found.read_bytes / 1e7, rel=0.15), found.system


def test_a_network_is_a_slower_disk_with_a_longer_way() -> None:
    storage = Storage(7e9, 1e-4, link_s=1e9, link_latency_s=1e-3)
    assert storage.bytes_s == 1e9
    assert storage.latency_s == pytest.approx(1.1e-3)
    assert Storage(5e8, link_s=1e9).bytes_s == 5e8


def test_no_system_is_faster_than_the_floor(large: ConfiguredModel) -> None:
    machine = machine_with(ACCELERATORS["a100"], Storage(7e9), torch.bfloat16)
    least = floor_s(large, machine)
    assert all(one.ttft_s > least for one in forecasts(large, machine, 4096))


def test_a_measured_floor_sets_the_price_of_calls(large: ConfiguredModel) -> None:
    machine = machine_with(ACCELERATORS["a100"], Storage(7e9), torch.bfloat16)
    slow = with_floor(large, machine, 0.1)
    assert floor_s(large, slow) == pytest.approx(0.1, rel=0.01)
    assert (slow.flops_s, slow.memory_s) == (machine.flops_s, machine.memory_s)
    with pytest.raises(InputError, match="other speeds of the machine are wrong"):
        with_floor(large, machine, 1e-6)


def test_it_says_from_which_length_on_a_system_is_faster(large: ConfiguredModel) -> None:
    machine = machine_with(ACCELERATORS["a100"], Storage(7e9), torch.bfloat16)
    for found in forecasts(large, machine, 4096):
        first = found.beats_recompute_from
        if found.system == "recompute":
            assert (first, found.speed_up) == (None, 1.0)
            continue
        assert first is not None
        (system,) = (one for one in systems() if one.name == found.system)
        (there,) = forecasts(large, machine, first, wanted=[system])
        (shorter,) = forecasts(large, machine, first * 8 // 9 - 1, wanted=[system])
        assert there.speed_up > 1 >= shorter.speed_up


def test_it_says_which_storage_is_too_slow(large: ConfiguredModel) -> None:
    case = Case(large, machine_with(ACCELERATORS["a100"], Storage(7e9), torch.bfloat16), 4096, 32)
    (system,) = (one for one in systems() if one.name == "attentionstore+overlap")
    least = slowest_storage_bytes_s(case, system)
    assert least is not None
    for share, faster in ((0.95, False), (1.05, True)):
        machine = replace(case.machine, storage=Storage(least * share))
        (found,) = forecasts(large, machine, 4096, wanted=[system])
        assert (found.speed_up > 1) is faster


@pytest.mark.parametrize(("prefix", "suffix"), [(0, 32), (32, 0), (4090, 32)])
def test_lengths_that_make_no_sense_are_refused(model: ConfiguredModel, prefix: int, suffix: int) -> None:
    with pytest.raises(InputError, match="token"):
        forecasts(model, cpu(), prefix, suffix)


def test_a_budget_must_be_a_share() -> None:
    with pytest.raises(ConfigError, match="budget"):
        systems(budget=1.5)
