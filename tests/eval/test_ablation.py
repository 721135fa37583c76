"""Variants of selection and precision: the whole cache is the model itself, and rounding does what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import save_tiny_model
from transformers import AutoModelForCausalLM, DynamicCache
from words import Words

from eval.ablation.judge import VariantJudge
from eval.ablation.rounding import round_by_spread, round_keys, round_values
from eval.ablation.simulated import CHUNK, OBSERVERS, Simulation
from eval.ablation.summaries import SummaryScorer
from eval.ablation.table import as_markdown
from eval.ablation.variants import FULL, PACKED, PUBLISHED, SETS, Variant, at
from eval.tasks import Request
from eval.tasks.base import encode
from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore
from hf_contiguouskv.model.kv_geometry import KVGeometry
from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.selection import IndexedKeysScorer, SelectionInput
from hf_contiguouskv.store.packing import pack_values, unpack_values

CACHE = cache_argument()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def some_ids(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(seed))


PREFIX, SUFFIX = some_ids(200, 1), some_ids(40, 2)
NOTHING = torch.zeros(1, 0, dtype=torch.int64)


def test_the_full_variant_is_the_model_with_its_whole_cache(model: Any) -> None:
    rows = torch.stack([some_ids(4, 3), some_ids(4, 4)])
    with Simulation(model, PREFIX) as simulation:
        found = simulation.logits(FULL, SUFFIX, rows)
    for row, ids in zip(found, rows, strict=True):
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=PREFIX[None], **{CACHE: cache})
            expected = model(input_ids=torch.cat([SUFFIX, ids])[None], **{CACHE: cache}).logits[0]
        torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "config"),
    [
        (at(PACKED, 0.4), ContiguousKVConfig(budget=0.4)),
        (Variant("exact", share=0.4), ContiguousKVConfig(budget=0.4, payload="exact")),
        (at(PUBLISHED, 0.4), ContiguousKVConfig.paper(0.4)),
    ],
    ids=["packed", "exact payload", "published"],
)
def test_a_variant_answers_as_the_library_does(
    model: Any, tmp_path: Path, variant: Variant, config: ContiguousKVConfig
) -> None:
    with Simulation(model, PREFIX) as simulation:
        simulated = simulation.logits(variant, SUFFIX, NOTHING)[0]
        everything = simulation.logits(FULL, SUFFIX, NOTHING)[0]
    with (
        PrefixStore(tmp_path) as store,
        ContiguousKVCache(model, PREFIX, store=store, config=config) as cache,
        torch.no_grad(),
    ):
        real = model(input_ids=SUFFIX[None], **{CACHE: cache}).logits[0]
    scale = real.abs().max().item()
    torch.testing.assert_close(simulated, real, rtol=0, atol=1e-3 * scale)
    assert (everything - real).abs().max().item() > 10 * (simulated - real).abs().max().item()


def test_the_model_is_as_it_was_afterwards(model: Any) -> None:
    before = model.config._attn_implementation
    with pytest.raises(RuntimeError, match="on purpose"), Simulation(model, PREFIX):
        raise RuntimeError("on purpose")
    assert model.config._attn_implementation == before == "sdpa"


def test_four_bits_are_those_of_the_store() -> None:
    g = KVGeometry(1, 2, 64, torch.float32, indexed_layers=(0,), packed_layers=(0,))
    values = torch.randn(3, 2, CHUNK, 64, generator=torch.Generator().manual_seed(0))
    stored = torch.empty_like(values)
    unpack_values(pack_values(values), g, stored)
    torch.testing.assert_close(round_values(values, 4, 64), stored, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rounded_keys_are_within_half_a_step_of_their_group(bits: int) -> None:
    keys = torch.randn(2, 150, 8, generator=torch.Generator().manual_seed(0))
    rounded = round_keys(keys, bits, 64)
    for first in range(0, 150, 150 if bits == 8 else 64):
        part, near = keys[:, first : first + 150 if bits == 8 else first + 64], rounded[:, first : first + 64]
        near = rounded if bits == 8 else near
        spread = 2 * part.abs().amax(1) if bits == 8 else part.amax(1) - part.amin(1)
        step = spread / (2**bits - (2 if bits == 8 else 1))
        # The ends themselves are rounded to 8 bits.
        assert ((part - near).abs().amax(1) <= 0.51 * step + 0.01 * part.abs().amax(1)).all()
    assert round_keys(keys, 16, 64) is keys
    assert round_values(keys, 16, 64) is keys


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_rounding_by_spread_keeps_so_many_levels_of_each_channel(bits: int) -> None:
    keys = torch.randn(2, 40_000, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 9.0) + 3.0
    rounded = round_by_spread(keys, bits)
    for head in rounded:
        assert [len(channel.unique()) for channel in head.T] == [2**bits] * 8
    # What the best uniform quantiser loses of a normal distribution (Max 1960, table 2), as a part of its variance.
    lost = (keys - rounded).square().mean(1) / keys.var(1)
    torch.testing.assert_close(
        lost, torch.full_like(lost, {1: 0.3634, 2: 0.1188, 3: 0.0374, 4: 0.0115}[bits]), rtol=0.1, atol=0
    )
    assert torch.equal(round_by_spread(torch.full((1, 5, 2), 2.5), bits), torch.full((1, 5, 2), 2.5))


KEYS = torch.randn(2, 70, 8, generator=torch.Generator().manual_seed(5))
QUERIES = torch.randn(1, 6, 5, 8, generator=torch.Generator().manual_seed(6))


def peaks_of(power: float, peak: Callable[[torch.Tensor, torch.Tensor], float]) -> torch.Tensor:
    """Importance of the four whole chunks of `KEYS`, one head, query and chunk at a time."""
    importance = torch.zeros(4)
    for head in range(6):
        for query in (1, 4):
            row = [peak(QUERIES[0, head, query], KEYS[head // 3, 16 * j : 16 * j + 16]) for j in range(4)]
            importance += torch.tensor(row).mul(0.3).softmax(0).pow(power)
    return importance


@pytest.mark.parametrize("power", [1.0, 2.0])
@pytest.mark.parametrize(
    ("summary", "peak"),
    [
        ("every", lambda q, keys: float((keys @ q).max())),
        ("bounds", lambda q, keys: float(torch.maximum(q * keys.amin(0), q * keys.amax(0)).sum())),
        ("mean", lambda q, keys: float(keys.mean(0) @ q)),
        ("expected", lambda q, keys: float(keys.mean(0) @ q + 1.766 * (q**2 @ keys.var(0, correction=0)).sqrt())),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_summaries_score_as_one_by_one(summary: str, peak: Any, power: float) -> None:
    inputs = SelectionInput(QUERIES, KEYS[None, :, :5], [torch.tensor([1, 4])], torch.ones(1, 5, dtype=torch.bool), 0.3)
    found = SummaryScorer(KEYS, CHUNK, power, summary)(inputs)
    torch.testing.assert_close(found.importance[0], peaks_of(power, peak), rtol=1e-4, atol=1e-5)


def test_a_summary_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="summary must be one of every, bounds, mean, expected, got 'median'"):
        SummaryScorer(KEYS, CHUNK, 1.0, "median")


def test_an_exact_index_is_not_that_of_8_bits(model: Any) -> None:
    kinds = []
    with Simulation(model, PREFIX) as simulation:
        for bits in (16, 8):
            simulation.logits(replace(at(PACKED, 0.25), index_bits=bits), SUFFIX, NOTHING)
            kinds.append(type(simulation._scorer(0, CHUNK, slice(0, len(simulation._kv[0][0])))))
    assert kinds == [SummaryScorer, IndexedKeysScorer]


def kept(simulation: Simulation, variant: Variant) -> torch.Tensor:
    simulation.logits(variant, SUFFIX, NOTHING)
    return simulation._seen


def test_a_share_counts_the_same_in_tokens_as_in_chunks(model: Any) -> None:
    ours, whole = at(PACKED, 0.25), len(PREFIX) // CHUNK * CHUNK
    with Simulation(model, PREFIX) as simulation:
        kv_heads = len(simulation._kv[0][0])
        chunks = kept(simulation, ours)
        tokens = kept(simulation, replace(ours, unit="token"))
        per_head = kept(simulation, replace(ours, unit="token", per_head=True))
        both = kept(simulation, replace(ours, singles=0.5))
        hot = kept(simulation, replace(ours, hot=1.0))
    assert chunks[0, :whole].view(-1, CHUNK).float().mean(1).unique().tolist() == [0, 1]
    assert not torch.equal(chunks, tokens)
    for seen, rows in ((chunks, 1), (tokens, 1), (both, 1), (per_head, kv_heads), (hot, kv_heads)):
        assert seen.shape == (rows, len(PREFIX))
        assert seen[:, whole:].all(), "the partial last chunk is always seen"
        assert seen[:, :CHUNK].all() or seen is hot or seen is both
    counts = [seen[:, :whole].sum(1).unique().tolist() for seen in (chunks, tokens, both, per_head)]
    assert counts == [[3 * CHUNK]] * 4
    in_chunks = both[0, :whole].view(-1, CHUNK).sum(1)
    assert (in_chunks == CHUNK).any()
    assert ((in_chunks > 0) & (in_chunks < CHUNK)).any()
    # Hot tokens of the partial chunk are seen anyway.
    assert (hot.sum(1) <= 3 * CHUNK + len(PREFIX) - whole).all()


def test_hot_tokens_are_those_that_the_end_of_the_prefix_attends_to(model: Any) -> None:
    with Simulation(model, PREFIX) as simulation, torch.no_grad():
        kept(simulation, at(replace(PACKED, hot=1.0), 0.25))
        eager = AutoModelForCausalLM.from_config(model.config, attn_implementation="eager").eval()
        eager.load_state_dict(model.state_dict())
        weights = eager(input_ids=PREFIX[None], output_attentions=True).attentions[0][0]
    expected = weights[:, -OBSERVERS:].unflatten(0, (len(simulation._kv[0][0]), -1)).sum((1, 2))
    torch.testing.assert_close(simulation._heat[0], expected, rtol=1e-3, atol=1e-4)


def test_a_judge_finds_what_the_full_cache_says(model: Any) -> None:
    tokenizer = Words()
    suffix = encode(tokenizer, " who is it? it is")
    with Simulation(model, PREFIX) as simulation:
        likeliest = simulation.logits(FULL, suffix, NOTHING)[0, -1]
        numbers = {text: int(encode(tokenizer, f" {text}")) for text in ("a", "b", "c")}
        best = max(numbers, key=lambda text: float(likeliest[numbers[text]]))
        for answer in numbers:
            request = Request("t", 0, PREFIX, 0, suffix, (answer,), choices=tuple(numbers))
            judge = VariantJudge(simulation, tokenizer, request)
            assert judge.judge(FULL) == {"score": float(answer == best), "kl": 0.0, "kl_answer": 0.0}
            found = judge.judge(at(PUBLISHED, 0.1))
            assert min(found["kl"], found["kl_answer"]) > 0


def test_steps_lead_from_the_published_method_to_ours() -> None:
    steps = [replace(variant, name="") for variant in SETS["steps"]]
    assert steps[0] == replace(PUBLISHED, name="", share=0.25)
    assert steps[-1] == replace(PACKED, name="", share=0.25)
    ours, *others = (replace(variant, name="") for variant in SETS["without"])
    assert ours == steps[-1]
    left_out: list[str] = []
    for variant in others:
        differing = [
            field.name for field in fields(Variant) if getattr(variant, field.name) != getattr(ours, field.name)
        ]
        assert len(differing) == 1 or differing == ["key_bits", "value_bits"]
        left_out += differing
    ideas = {field.name for field in fields(Variant) if getattr(steps[0], field.name) != getattr(ours, field.name)}
    assert sorted(left_out) == sorted(ideas | {"recent"}), "every idea is left out once, and nothing else"


def test_another_share_takes_the_place_of_the_first_in_the_name() -> None:
    variant = at(at(PACKED, 0.25), 0.05)
    assert (variant.name, variant.share) == ("packed 5%", 0.05)


def test_all_variants_of_all_sets_can_be_run(model: Any) -> None:
    with Simulation(model, PREFIX) as simulation:
        for variants in SETS.values():
            assert len({variant.name for variant in variants}) == len(variants)
            for variant in variants:
                assert simulation.logits(variant, SUFFIX, NOTHING).isfinite().all()


def test_a_table_has_points_and_divergences_per_set(tmp_path: Path) -> None:
    def row(name: str, variant: str, task: str, number: int, score: float, kl: float) -> str:
        about = {"task": task, "number": number, "tokens": 9, "set": name, "variant": variant}
        return json.dumps(about | {"score": score, "kl": kl, "kl_answer": kl / 2})

    lines = []
    for number in range(2):
        for task in ("needle", "sst2"):
            lines.append(row("full", "full", task, number, 1.0, 0.0))
            lines.append(row("share", "some", task, number, float(number), 0.25 if task == "needle" else 0.5))
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(lines) + "\n")
    table = as_markdown([file])
    assert "### share" in table
    assert "| full, percent (requests) | 100.0 (2) | 100.0 (2) | 100.0 | | | | |" in table
    assert "| some | -50.0 | -50.0 | -50.0 | 0.2500 | 0.5000 | 0.1250 | 0.2500 |" in table
    with pytest.raises(ValueError, match="answered twice"):
        as_markdown([file, file])


def test_requests_of_several_seeds_count_together(tmp_path: Path) -> None:
    def rows(seed: int | None, score: float) -> str:
        about: dict[str, object] = {"task": "sst2", "number": 0, "tokens": 9} | ({} if seed is None else {"seed": seed})
        full = about | {"set": "full", "variant": "full", "score": 1.0, "kl": 0.0}
        some = about | {"set": "share", "variant": "some", "score": score, "kl": 0.5}
        return json.dumps(full) + "\n" + json.dumps(some) + "\n"

    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(rows(None, 0.0))
    new.write_text(rows(1, 1.0) + rows(2, 1.0) + rows(3, 1.0))
    table = as_markdown([old, new])
    assert "| full, percent (requests) | 100.0 (4) | 100.0 | | | | |" in table
    assert "| some | -25.0 | -25.0 |  | 0.5000 |  |  |" in table, "rows that lack the answer leave its cells empty"
    with pytest.raises(ValueError, match="answered twice"):
        as_markdown([new, new])
    new.write_text(rows(0, 1.0))
    with pytest.raises(ValueError, match="answered twice"):
        as_markdown([old, new])  # Seed 0 is what had no name.
