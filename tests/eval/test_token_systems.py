"""AS+H2O and IMPRESS answer as slow, independent readings of them do; they read what they say, and no more."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_llama import some_ids, tiny_llama
from token_references import attending, blocks_of, h2o, impress, weights_of
from transformers import DynamicCache

from eval.systems import AttentionStoreH2O, Impress, NotStoredError, State
from eval.systems.impress import UsedAndImportant, probe_heads
from eval.systems.token_scores import column_sums, similar_enough, similarity, tokens_kept, voted
from eval.systems.token_system import observed_importance
from eval.systems.units import Nodes, UnitLayout
from hf_contiguouskv.memory.history import Uses
from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.store.format import KVGeometry

CACHE = cache_argument()

LAYERS, HEADS, KV_HEADS, HEAD_DIM = 3, 6, 2, 8
PREFIX = 200  # Three units of 64 tokens, and a part of one.
UNIT_BYTES = 64 * HEAD_DIM * 4


@pytest.fixture(scope="module")
def model() -> Any:
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
    return found


PREFIX_IDS, SUFFIX_IDS = some_ids(PREFIX, 1), some_ids(6, 2)
PROMPT = torch.cat([PREFIX_IDS, SUFFIX_IDS])


def logits_of(model: Any, cache: Any) -> torch.Tensor:
    """Of all suffix tokens behind a cached prefix, `(q, vocabulary)`."""
    with torch.no_grad():
        return model(input_ids=SUFFIX_IDS[None], **{CACHE: cache}).logits[0]


def reference(model: Any, choose: Any) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=PREFIX_IDS[None], **{CACHE: cache})
        with attending(model, PREFIX, choose):
            return model(input_ids=SUFFIX_IDS[None], **{CACHE: cache}).logits[0]


def served(system: Any, model: Any) -> tuple[torch.Tensor, Any]:
    cache = system.cache(PREFIX_IDS)
    logits = logits_of(model, cache)
    return logits, system.finish(cache)


BUDGETS = (0.05, 0.25, 0.5)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("budget", BUDGETS)
def test_h2o_chooses_what_a_slow_reading_of_it_chooses(
    model: Any, tmp_path: Path, budget: float, overlap: bool
) -> None:
    with AttentionStoreH2O(model, tmp_path, budget, overlap=overlap) as system:
        system.store(PREFIX_IDS)
        logits, _ = served(system, model)
    torch.testing.assert_close(logits, reference(model, h2o(budget)), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("probes", ["first", "groups"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_impress_chooses_what_a_slow_reading_of_it_chooses(
    model: Any, tmp_path: Path, budget: float, probes: str, reorder: bool
) -> None:
    agreed: list[bool] = []
    heads = {"first": [0, 1, 2], "groups": [0, 3]}[probes]
    expected = reference(model, impress(budget, heads, agreed))
    assert agreed[1]
    if budget > 0.05:
        assert not all(agreed), "no layer in which probe heads disagree was tested"
    with Impress(model, tmp_path, budget, probes=probes, reorder=reorder) as system:
        assert system.name == ("impress" if probes == "first" else "impress+groups")
        system.store(PREFIX_IDS)
        cache = system.cache(PREFIX_IDS)
        logits = logits_of(model, cache)
        assert system.agreed == sum(agreed)
        system.finish(cache)
        assert system.details() == {"agreed": sum(agreed) / LAYERS}
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)


def stored_blocks(model: Any, system: Impress, lengths: tuple[int, ...]) -> list[list[list[int]]]:
    """The blocks of each layer, of a prefix that grew in turns to `lengths`."""
    found: list[list[list[int]]] = [[] for _ in range(LAYERS)]
    for begin, end in pairwise((0, *lengths)):
        _, importance = observed_importance(model, PREFIX_IDS[:end])
        for blocks, mass in zip(found, importance, strict=True):
            blocks += blocks_of((system.order(mass[begin:end]) + begin).tolist())
    return found


@pytest.mark.parametrize("reorder", [False, True])
@pytest.mark.parametrize("probes", ["first", "groups"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_whole_blocks_are_those_of_a_slow_reading(
    model: Any, tmp_path: Path, budget: float, probes: str, reorder: bool
) -> None:
    heads = {"first": [0, 1, 2], "groups": [0, 3]}[probes]
    with Impress(model, tmp_path, budget, probes=probes, reorder=reorder, blocks=True) as system:
        assert system.name == ("impress+blocks" if probes == "first" else "impress+blocks+groups")
        blocks = stored_blocks(model, system, (PREFIX,))
        expected = reference(model, impress(budget, heads, [], blocks))
        system.store(PREFIX_IDS)
        logits, stats = served(system, model)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    kept = {0.05: 64, 0.25: 64, 0.5: 128}[budget]
    assert stats.bytes_used == LAYERS * 2 * KV_HEADS * kept * HEAD_DIM * 4


SYSTEMS: dict[str, Callable[..., Any]] = {
    "attentionstore_h2o": AttentionStoreH2O,
    "impress": Impress,
    "impress+groups": lambda *arguments, **options: Impress(*arguments, probes="groups", **options),
    "impress+blocks": lambda *arguments, **options: Impress(*arguments, blocks=True, **options),
}


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_the_whole_budget_is_the_whole_cache(model: Any, tmp_path: Path, name: str) -> None:
    with SYSTEMS[name](model, tmp_path, 1.0) as system:
        system.store(PREFIX_IDS)
        logits, stats = served(system, model)
    with torch.no_grad():
        expected = model(input_ids=PROMPT[None]).logits[0, PREFIX:]
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=2e-4)
    assert stats.bytes_used == LAYERS * 2 * KV_HEADS * PREFIX * HEAD_DIM * 4


@pytest.mark.parametrize("name", list(SYSTEMS))
@pytest.mark.parametrize("eviction", ["lru", "lfu", None])
def test_answers_do_not_depend_on_what_is_in_memory(
    model: Any, tmp_path: Path, name: str, eviction: str | None
) -> None:
    """With room for a few units only, requests evict each other's; with enough, the second reads nothing."""
    options = {} if eviction is None else {"eviction": eviction}
    few, other = {"host_bytes": 64 * 1024}, some_ids(150, 5)
    with SYSTEMS[name](model, tmp_path / "a", 0.1, **options) as system:
        for ids in (PREFIX_IDS, other):
            system.store(ids)
        first, cold = served(system, model)
        again, warm = served(system, model)
        torch.testing.assert_close(first, again, atol=0, rtol=0)
        assert cold.bytes_read > 0
        assert cold.hits["host"] == 0
        assert (warm.bytes_read, warm.hits["disk"]) == (0, 0)
        assert warm.hits["host"] == cold.hits["disk"]
        system.enter(State.COLD, PREFIX_IDS)
        assert served(system, model)[1].bytes_read == cold.bytes_read
    with SYSTEMS[name](model, tmp_path / "a", 0.1, **options, **few) as system:
        for _ in range(3):
            torch.testing.assert_close(served(system, model)[0], first, atol=0, rtol=0)
            cache = system.cache(other)
            with torch.no_grad():
                model(input_ids=SUFFIX_IDS[None], **{CACHE: cache})
            system.finish(cache)
        assert system.opened().inner.memory.host.peak_bytes <= 64 * 1024


def test_h2o_reads_all_keys_and_the_values_that_it_chose(model: Any, tmp_path: Path) -> None:
    with AttentionStoreH2O(model, tmp_path, 0.02) as system:
        system.store(PREFIX_IDS)
        _, stats = served(system, model)
    keys = LAYERS * KV_HEADS * 4 * UNIT_BYTES
    assert stats.bytes_identified == keys
    # Four tokens of each head, in as many units or fewer.
    assert keys < stats.bytes_read < 2 * keys
    assert stats.bytes_used == LAYERS * 2 * KV_HEADS * 4 * HEAD_DIM * 4


def test_impress_reads_the_keys_of_its_probe_heads_only_where_they_agree(model: Any, tmp_path: Path) -> None:
    half = LAYERS * 4 * UNIT_BYTES
    with Impress(model, tmp_path, 0.25) as system:
        system.store(PREFIX_IDS)
        cache = system.cache(PREFIX_IDS)
        logits_of(model, cache)
        agreed = system.agreed
        stats = system.finish(cache)
    assert 0 < agreed < LAYERS
    # Of one KV head everywhere; of the other as well where probe heads disagree.
    assert stats.bytes_identified == half + (LAYERS - agreed) * 4 * UNIT_BYTES


def test_generation_goes_on_from_what_was_chosen(model: Any, tmp_path: Path) -> None:
    for system in (AttentionStoreH2O(model, tmp_path, 1.0), Impress(model, tmp_path, 1.0)):
        with system:
            system.store(PREFIX_IDS)
            arguments = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
            cache = system.cache(PREFIX_IDS)
            found = model.generate(PROMPT[None], **arguments, **{CACHE: cache})
            system.finish(cache)
            assert torch.equal(found, model.generate(PROMPT[None], **arguments))


def test_what_was_not_stored_is_refused(model: Any, tmp_path: Path) -> None:
    with AttentionStoreH2O(model, tmp_path, 0.1) as system:
        system.store(PREFIX_IDS)
        system.store(PREFIX_IDS)  # Twice is once.
        assert len(system.files()) == 1
        with pytest.raises(NotStoredError, match="200 tokens"):
            system.cache(some_ids(PREFIX, 9))
        cache = system.cache(PREFIX_IDS)
        with pytest.raises(ValueError, match="one row"), torch.no_grad():
            model(input_ids=SUFFIX_IDS.repeat(2, 1), **{CACHE: cache})
        system.finish(cache)


def test_column_sums_against_loops() -> None:
    chance = torch.Generator().manual_seed(3)
    queries = torch.randn(HEADS, 5, HEAD_DIM, generator=chance)
    keys = torch.randn(KV_HEADS, 40 + 5, HEAD_DIM, generator=chance)
    found = column_sums(queries, keys[:, :40], keys[:, 40:], HEAD_DIM**-0.5)
    torch.testing.assert_close(found.double(), weights_of(queries, keys, 40).sum(1), atol=1e-5, rtol=1e-5)


def test_similarity_and_votes_by_hand() -> None:
    chosen = np.array([[0, 1, 2, 3], [2, 3, 4, 5], [0, 1, 2, 3]])
    assert similarity(chosen) == pytest.approx((2 / 6 + 1 + 2 / 6) / 3)
    assert similarity(chosen[:1]) == 1.0
    assert similar_enough(100, 10) == pytest.approx((10 / 190) ** 0.6)
    mass = torch.zeros(3, 8)
    mass[:, 1], mass[:, 5] = 1.0, 2.0
    # Two and three have three votes, one and zero two each, of which one has more mass.
    assert voted(chosen, mass, 3).tolist() == [1, 2, 3]
    assert voted(chosen, mass, 5).tolist() == [0, 1, 2, 3, 5]


def test_votes_are_those_of_a_slow_reading() -> None:
    chance = np.random.default_rng(1)
    for _ in range(200):
        rows, tokens = int(chance.integers(1, 5)), int(chance.integers(1, 40))
        keep = int(chance.integers(1, tokens + 1))
        # Few different numbers, so that there are many ties.
        mass = torch.from_numpy(chance.integers(0, 4, (rows, tokens)).astype(np.float32))
        chosen = np.stack([np.sort(chance.choice(tokens, keep, replace=False)) for _ in range(rows)])
        ranked = sorted(
            range(tokens), key=lambda token: (-int((chosen == token).sum()), -float(mass[:, token].sum()), token)
        )
        assert voted(chosen, mass, keep).tolist() == sorted(ranked[:keep])
        pairs = [len(set(one) & set(other)) for one, other in combinations(chosen.tolist(), 2)]
        expected = np.mean([pair / (2 * keep - pair) for pair in pairs]) if pairs else 1.0
        assert similarity(chosen) == pytest.approx(expected)


def test_expected_similarity_is_that_of_random_choices() -> None:
    chance = np.random.default_rng(0)
    found = [similarity(np.stack([chance.choice(400, 40, replace=False) for _ in range(2)])) for _ in range(400)]
    assert np.mean(found) == pytest.approx(similar_enough(400, 40, exponent=1.0), rel=0.05)


def test_budgets_are_shares_of_tokens() -> None:
    assert [tokens_kept(200, budget) for budget in (0.001, 0.05, 0.051, 1.0)] == [1, 10, 11, 200]


def test_probe_heads() -> None:
    assert probe_heads(9, 3, "first").tolist() == [0, 1, 2]
    assert probe_heads(9, 3, "groups").tolist() == [0, 3, 6]
    assert probe_heads(2, 1, "first").tolist() == [0, 1]
    with pytest.raises(ValueError, match="probes must be"):
        probe_heads(9, 3, "best")


def test_nodes_say_where_units_are() -> None:
    """Two nodes of ten and five tokens, in units of four: three blocks and two."""
    layout = UnitLayout(KVGeometry(1, KV_HEADS, HEAD_DIM, torch.float32), 4, apart=(0,))
    nodes = Nodes(layout, (10, 5))
    keys = torch.arange(15.0)[None, :, None].expand(KV_HEADS, 15, HEAD_DIM) + torch.tensor([0.0, 100.0])[:, None, None]
    stored = [layout.arranged(keys[:, part], keys[:, part] + 1000) for part in (slice(0, 10), slice(10, 15))]
    all_keys, all_values = (torch.cat([one[kind] for one in stored])[:, :, 0] for kind in (0, 1))
    # Of each node the keys of head 0 first, then those of the other head.
    assert all_keys.tolist() == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 0, 0], [100, 101, 102, 103], [104, 105, 106, 107], [108, 109, 0, 0],
        [10, 11, 12, 13], [14, 0, 0, 0], [110, 111, 112, 113], [114, 0, 0, 0],
    ]  # fmt: skip
    assert nodes.keys_apart().tolist() == [0, 1, 2, 6, 7]
    joined = nodes.joined(torch.cat([one[0] for one in stored])[nodes.keys_apart()])
    assert joined.shape == (1, 5 * 4, HEAD_DIM)
    assert nodes.places is not None
    assert joined[0, nodes.places, 0].tolist() == list(range(15))
    assert all_keys[nodes.other_keys(np.array([0, 2, 4]))][:, 0].tolist() == [100, 108, 114]
    assert all_values[nodes.values(np.array([1, 3]))][:, 0].tolist() == [1004, 1104, 1010, 1110]
    assert Nodes(layout, (15,)).places is None


@pytest.mark.parametrize("name", list(SYSTEMS))
def test_a_prefix_that_grows_uses_what_is_there(model: Any, tmp_path: Path, name: str) -> None:
    """As in a chat: each turn adds a node to what is stored, and finds in memory what the turn before has used."""
    lengths = (100, 130, PREFIX)
    choose: dict[str, Callable[[Any], Any]] = {
        "attentionstore_h2o": lambda _: h2o(0.25),
        "impress": lambda _: impress(0.25, [0, 1, 2], []),
        "impress+groups": lambda _: impress(0.25, [0, 3], []),
        # Each turn's tokens fill blocks of their own: the last one of a turn is not full.
        "impress+blocks": lambda system: impress(0.25, [0, 1, 2], [], stored_blocks(model, system, lengths)),
    }
    with SYSTEMS[name](model, tmp_path, 0.25) as system:
        for tokens in lengths:
            system.store(PREFIX_IDS[:tokens])
            before = len(system.files())
            system.store(PREFIX_IDS[:tokens])
            assert len(system.files()) == before
            cache = system.cache(PREFIX_IDS[:tokens])
            logits = logits_of(model, cache)
            stats = system.finish(cache)
            assert (stats.hits["host"] > 0) is (tokens > 100)
        assert before == 3
        # In the order of the text, so the choice is that of the prefix in one piece.
        torch.testing.assert_close(logits, reference(model, choose[name](system)), atol=2e-4, rtol=2e-4)


def test_the_most_important_tokens_are_stored_first(model: Any, tmp_path: Path) -> None:
    importance = torch.tensor([0.1, 0.5, 0.2, 0.5])
    assert Impress(model, tmp_path / "a", 0.1).order(importance).tolist() == [1, 3, 2, 0]
    assert Impress(model, tmp_path / "b", 0.1, reorder=False).order(importance).tolist() == [0, 1, 2, 3]


def test_importance_is_what_the_last_tokens_look_at(model: Any) -> None:
    cache, importance = observed_importance(model, PREFIX_IDS)
    assert cache.get_seq_length() == PREFIX
    for layer, mass in zip(cache.layers, importance, strict=True):
        assert layer.keys.shape[2] == PREFIX
        assert torch.isinf(mass[-64:]).all()
        # Each of 64 queries of six heads gives one in all, part of it to the last tokens themselves.
        assert 0 < float(mass[:-64].sum()) < 64 * HEADS
    short, importance = observed_importance(model, PREFIX_IDS[:20])
    assert short.get_seq_length() == 20
    assert all(torch.isinf(mass).all() for mass in importance)


def test_nodes_have_names_of_their_own() -> None:
    layout = UnitLayout(KVGeometry(1, KV_HEADS, HEAD_DIM, torch.float32), 64, apart=(0,))
    ids = PREFIX_IDS.numpy()
    names = {
        Nodes(layout, tokens).ids(one).tobytes()
        for one, tokens in (
            (ids, (200,)),
            (ids[:-1], (199,)),
            (np.append(ids[:-1], 5), (200,)),
            (ids, (128, 72)),
            (ids, (200,)),
        )
    }
    assert len(names) == 4
    whole, grown = Nodes(layout, (128,)).ids(ids[:128]), Nodes(layout, (128, 72)).ids(ids)
    assert len(grown) == KV_HEADS * 4 * 32
    assert np.array_equal(whole, grown[: len(whole)])
    with pytest.raises(ValueError, match="even"):
        UnitLayout(layout.geometry, 5, apart=(0,))


def test_blocks_are_worth_their_uses_times_their_share() -> None:
    one = np.ones(2)
    uses = Uses(np.array([0.5, 0.1]), one, one * 5, one, one, 1.0, 5)
    assert UsedAndImportant().worth(uses).tolist() == [0.5, 0.1]
