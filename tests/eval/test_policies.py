"""The policy comparison in small: recorded, replayed and reported; and its books add up."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from eval.policies.__main__ import app
from eval.policies.compare import plan, run_replays, run_tiers
from eval.policies.imitated_device import imitated_device
from eval.policies.record import record
from eval.policies.replay import Replay, fill_store, footprint, geometry_of, keys_bytes, replay, replay_together
from eval.policies.report import mean_time, ratio_of_times, tail_time, write, write_tiers
from eval.policies.texts import Document
from eval.policies.trace import Pool, Trace, Workload
from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.hardware.accelerator import opened_devices
from hf_contiguouskv.memory import POLICIES, blocks
from hf_contiguouskv.planning.read_plan import chunks_kept

LAYERS, CHUNK = 3, 16
# One chunk of one layer: K and V, 1 head, 16 tokens, 8 channels of 4 bytes.
EXTENT = 2 * 16 * 8 * 4


class Letters:
    """A tokenizer of letters."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 100 for letter in text]}

    def decode(self, ids: torch.Tensor) -> str:
        return "".join(chr(97 + int(number) % 26) for number in ids)


@pytest.fixture(scope="module")
def trace() -> Trace:
    """Three prefixes, and a few questions to each, asked of a tiny random model."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
    )
    model = LlamaForCausalLM(config).eval()
    texts = [Document(torch.randint(0, 100, (tokens,))) for tokens in (320, 200, 333)]
    return record(model, Letters(), texts, [Workload(requests=20)], budget=0.2, fewest=4, progress=False)


def test_a_recorded_request_holds_what_the_cache_selected(trace: Trace) -> None:
    assert [pool.tokens for pool in trace.pools] == [320, 200, 333]
    for pool in trace.pools:
        whole = pool.tokens // CHUNK
        kept = chunks_kept(0.2, whole)
        assert pool.selected.shape == (len(pool), LAYERS, kept)
        assert pool.mass.shape == (len(pool), LAYERS, whole)
        # Each voting query spreads a mass of 1.
        votes = pool.mass.astype(np.float32).sum(-1)
        np.testing.assert_allclose(votes, votes[:, :1].round().repeat(LAYERS, 1), rtol=0.01)
        assert votes.max() <= 1.01 * (ContiguousKVConfig().selection.queries or 0)
        # The first and the last are always kept; the others are rather those with much mass.
        assert (pool.selected[..., 0] == 0).all()
        assert (pool.selected[..., -1] == whole - 1).all()
        for mass, chunks in zip(pool.mass.reshape(-1, whole), pool.selected.reshape(-1, kept).tolist(), strict=True):
            others = set(range(whole)) - set(chunks)
            assert mass[chunks[1:-1]].mean() > mass[sorted(others)].mean()
        assert (pool.compute_s > 0).all()
        assert (pool.identify_s > 0).all()
    counts = np.bincount(Workload(requests=20).prefixes(3), minlength=3)
    assert [len(pool) for pool in trace.pools] == np.maximum(counts, 4).tolist()


def test_questions_to_one_prefix_select_different_chunks(trace: Trace) -> None:
    pool = max(trace.pools, key=len)
    assert len(np.unique(pool.selected.reshape(len(pool), -1), axis=0)) > 1


def test_a_trace_is_read_back_as_it_was_saved(trace: Trace, tmp_path: Path) -> None:
    trace.save(tmp_path / "trace.npz")
    other = Trace.load(tmp_path / "trace.npz")
    assert other.about == trace.about
    for one, two in zip(trace.pools, other.pools, strict=True):
        assert one.tokens == two.tokens
        for name in ("selected", "mass", "identify_s", "compute_s"):
            np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


def test_popular_prefixes_follow_zipf_and_drift_moves_them() -> None:
    steady = np.bincount(Workload(4000, drift=0.0).prefixes(10), minlength=10)
    ordered = np.sort(steady)[::-1]
    assert ordered[0] / ordered[1] == pytest.approx(2.0, rel=0.2)
    assert ordered[0] / ordered[9] == pytest.approx(10.0, rel=0.3)
    drifting = Workload(4000, drift=1.0, drift_every=1000).prefixes(10)
    leaders = [np.bincount(drifting[start : start + 1000]).argmax() for start in range(0, 4000, 1000)]
    assert len(set(leaders)) > 1
    assert not np.array_equal(Workload(50, seed=0).prefixes(10), Workload(50, seed=1).prefixes(10))


def test_a_pool_is_used_up_before_a_request_comes_again(trace: Trace) -> None:
    drawn = Workload(requests=60).draw(trace)
    for prefix, pool in enumerate(trace.pools):
        numbers = [number for which, number in drawn if which == prefix]
        for start in range(0, len(numbers) - len(pool) + 1, len(pool)):
            assert sorted(numbers[start : start + len(pool)]) == list(range(len(pool)))


def made_up(selections: list[list[int]]) -> Trace:
    """One prefix of ten chunks, and requests that select the same chunks in each layer."""
    selected = np.array(selections, dtype=np.uint16)[:, None].repeat(LAYERS, 1)
    mass = np.zeros((len(selections), LAYERS, 10), dtype=np.float16)
    np.put_along_axis(mass, selected.astype(np.int64), np.float16(1.0), axis=2)
    seconds = np.full((len(selections), LAYERS), 1e-3, dtype=np.float32)
    geometry = {
        "num_layers": str(LAYERS),
        "kv_heads": "1",
        "head_dim": "8",
        "dtype": "float32",
        "chunk_size": str(CHUNK),
        "layers_per_group": "1",
        "leader_layers": "0",
        "indexed_layers": "0,1,2",
    }
    return Trace([Pool(10 * CHUNK, selected, mass, seconds, seconds)], {"geometry": geometry, "budget": 0.3})


@pytest.mark.parametrize("reads", [True, False])
@pytest.mark.parametrize("policy", list(POLICIES))
def test_with_memory_for_all_only_first_uses_are_read(tmp_path: Path, policy: str, reads: bool) -> None:
    small = made_up([[0, 1, 9], [0, 1, 9], [0, 2, 9], [0, 1, 9]])
    store = fill_store(tmp_path, small)
    drawn = [(0, number) for number in range(4)]
    assert footprint(small, drawn) == {"chunks": 4 * LAYERS * EXTENT, "keys": LAYERS * 8 * (10 * CHUNK + 4)}
    outcome = replay(small, drawn, store, policy, 2**22, warm_up=1, timed=3 if reads else 0)
    keys = keys_bytes(small.pools[0], geometry_of(small))
    missed = LAYERS * EXTENT
    assert outcome.chunk_hit_rate == pytest.approx(8 / 9)
    assert outcome.key_hit_rate == 1.0
    assert outcome.byte_hit_rate == pytest.approx(1 - missed / (9 * LAYERS * EXTENT + 3 * keys))
    # Extents are smaller than pages here, so what is read is rounded up.
    assert (outcome.bytes_read >= missed / 3) if reads else (outcome.bytes_read == 0)
    assert outcome.peak_bytes <= 2**22


def test_without_memory_everything_is_read_each_time(tmp_path: Path) -> None:
    small = made_up([[0, 1, 9], [0, 1, 9]])
    outcome = replay(small, [(0, 0), (0, 1)], fill_store(tmp_path, small), "lru", 0, warm_up=0)
    assert (outcome.chunk_hit_rate, outcome.key_hit_rate, outcome.byte_hit_rate) == (0.0, 0.0, 0.0)


def test_what_a_device_keeps_is_counted_apart_from_what_the_host_keeps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_SMALLEST_PIECE", 4096)  # Memory of a device is taken in pieces.
    small = made_up([[0, 1, 9], [0, 1, 9], [0, 2, 9], [0, 1, 9]])
    store, drawn = fill_store(tmp_path, small), [(0, number) for number in range(4)]
    with imitated_device() as device:
        on_device = replay(small, drawn, store, "lru", 2**22, device, 2**22, warm_up=1)
        assert on_device.device_hit_rate == on_device.chunk_hit_rate == pytest.approx(8 / 9)
        # No room on the device: the host keeps what was read.
        on_host = replay(small, drawn, store, "lru", 2**22, device, 0, warm_up=1)
        assert (on_host.device_hit_rate, on_host.chunk_hit_rate) == (0.0, pytest.approx(8 / 9))
        assert on_host.key_hit_rate == 1.0, "keys that cross from the host are not read"
        nowhere = replay(small, drawn, store, "lru", 0, device, 0, warm_up=1)
        assert (nowhere.device_hit_rate, nowhere.chunk_hit_rate) == (0.0, 0.0)
    assert device not in opened_devices
    # On a CPU, device memory is none.
    alone = replay(small, drawn, store, "lru", 2**22, device_bytes=2**22, warm_up=1)
    assert (alone.device_hit_rate, alone.chunk_hit_rate) == (0.0, pytest.approx(8 / 9))


def test_a_larger_device_finds_more_and_the_host_finds_the_rest(
    trace: Trace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "_SMALLEST_PIECE", 4096)
    store, drawn = fill_store(tmp_path, trace), Workload(40, drift=0.0).draw(trace)
    whole = sum(footprint(trace, drawn).values())
    with imitated_device() as device:
        found = [
            replay(trace, drawn, store, "expected-use", int(0.4 * whole), device, int(share * whole), warm_up=5)
            for share in (0.0, 0.3, 0.6, 2.0)
        ]
    on_device = [one.device_hit_rate for one in found]
    assert on_device[0] == 0.0
    assert on_device == sorted(on_device)
    assert on_device[1] < on_device[2] < on_device[3]
    assert all(one.device_hit_rate <= one.chunk_hit_rate < 1.0 for one in found)
    assert found[0].chunk_hit_rate < found[-1].chunk_hit_rate


def test_replays_of_both_tiers_end_in_a_table_and_json(trace: Trace, tmp_path: Path) -> None:
    trace.about["text"] = "random"
    trace.save(tmp_path / "trace.npz")
    store, load = fill_store(tmp_path, trace), Workload(20, drift=0.0)
    shares = [(0.0, 0.3), (0.5, 0.3)]
    results = run_tiers(tmp_path / "trace.npz", store, load, ["expected-use"], shares, 5, progress=False)
    page, numbers = write_tiers(results, tmp_path / "out")
    assert json.loads(numbers.read_text())["rows"] == json.loads(json.dumps(results["rows"]))
    for row in results["rows"]:
        cells = " / ".join(f"**{row[name]:.1%}**" for name in ("device_hit_rate", "chunk_hit_rate", "byte_hit_rate"))
        assert f"| {cells} |" in page.read_text()


@pytest.mark.parametrize("share", ["0.1", "0.1:0.2:0.3", "a:b", "-1:0.5", "nan:0.5", "0.1:inf"])
def test_shares_of_both_tiers_are_two_numbers(trace: Trace, tmp_path: Path, share: str) -> None:
    trace.save(tmp_path / "trace.npz")
    found = CliRunner().invoke(app, ["tiers", "--folder", str(tmp_path), "--share", share])
    assert found.exit_code == 2
    assert "DEVICE:HOST" in found.output


def test_recorded_compute_is_slept_where_time_is_taken(tmp_path: Path) -> None:
    small = made_up([[0, 1, 9]])
    store = fill_store(tmp_path, small)
    drawn = [(0, 0)] * 6
    outcome = replay(small, drawn, store, "lru", 2**22, warm_up=0, timed=2, pace=20.0)
    assert len(outcome.ttft_s) == 2
    assert min(outcome.ttft_s) >= LAYERS * 1e-3 * 20.0


def test_replays_side_by_side_find_what_each_finds_alone(trace: Trace, tmp_path: Path) -> None:
    store = fill_store(tmp_path, trace)
    drawn = Workload(30, drift=0.5, drift_every=8).draw(trace)
    size = sum(footprint(trace, drawn).values()) // 2
    with Replay(trace, store, "lru", size) as lru, Replay(trace, store, "expected-use", size) as ours:
        together = replay_together([lru, ours], drawn, warm_up=5, timed=25, pace=0.0)
    assert len(together[0].ttft_s) == 25
    for found, policy in zip(together, ("lru", "expected-use"), strict=True):
        alone = replay(trace, drawn, store, policy, size, warm_up=5, timed=25)
        assert found.chunk_hit_rate == alone.chunk_hit_rate
        assert found.bytes_read == alone.bytes_read
    assert 0 < together[0].chunk_hit_rate < 1


def test_intervals_of_times_hold_the_figure_and_pair_the_requests() -> None:
    chance = np.random.default_rng(5)
    difficulty = chance.uniform(0.05, 0.5, 300)
    times, others = difficulty * 0.8, difficulty
    value, low, high = ratio_of_times(times, others)[:3]
    # Every request takes 0.8 of its time: paired, there is nothing uncertain about that.
    assert (value, low, high) == pytest.approx((0.8, 0.8, 0.8))
    for found in (mean_time(times), tail_time(times)):
        assert found.low < found.value < found.high
    assert mean_time(times)[0] == pytest.approx(times.mean())
    assert tail_time(times)[0] == pytest.approx(np.quantile(times, 0.95))


def test_replays_end_in_a_table_a_picture_and_json(trace: Trace, tmp_path: Path) -> None:
    trace.about["text"] = "random"
    store = fill_store(tmp_path, trace)
    scenarios = plan([0, 1], 2, Workload(16, drift=0.5, drift_every=8))
    trace.save(tmp_path / "trace.npz")
    policies, trace_path = ["lru", "expected-use"], tmp_path / "trace.npz"
    results = run_replays(trace_path, store, scenarios, policies, [0.25, 0.5], [0.75], 4, 4, 0.0, progress=False)
    # Two rounds of one scenario, three more for hit rates, and another size in all of them.
    assert len(results["rows"]) == 2 * 2 * (2 + 3) + 2 * 4
    assert {(row["drift"], row["seed"]) for row in results["rows"]} == {(0.5, 0), (0.5, 1), (0.0, 0), (0.0, 1)}
    for policy, share in (("lru", 0.25), ("lru", 0.5)):
        first, second = (
            row for row in results["rows"] if (row["policy"], row["share"], row["reads"]) == (policy, share, True)
        )
        assert first["chunk_hit_rate"] == second["chunk_hit_rate"]
    (tmp_path / "replay.json").write_text(json.dumps(results))
    out = tmp_path / "out"
    run = CliRunner().invoke(app, ["report", "--folder", str(tmp_path), "--into", str(out)])
    assert run.exit_code == 0, run.output
    text = (out / "policies.md").read_text()
    for share in ("25%", "50%"):
        for name in ("LRU", "expected use (ours)"):
            assert text.count(f"({share}) | {name} | ") == 1
    assert text.count("| no | ") == text.count("| yes | ") == 2 * 3
    assert (out / "policies.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((out / "policies.json").read_text()) == results
    assert write(results, out)[0] == out / "policies.md"
