"""Every kind of model of the zoo is served exactly or refused with its reason, and `docs/models.md` says which.

A kind that the installed transformers does not have, or whose tiny model it cannot build, is skipped by name.
"""

from __future__ import annotations

import copy
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

from hf_contiguouskv import ContiguousKVConfig
from hf_contiguouskv.errors import UnsupportedModelError
from hf_contiguouskv.model.layer_windows import layer_windows
from hf_contiguouskv.model.transformers_internals import attention_function

from .model_zoo import KINDS, Kind, build
from .models import token_ids
from .references import assert_close, assert_same_generation, forward, generate, prefilled, visible_tokens
from .subject import ContiguousKVCache, PrefixStore

pytestmark = pytest.mark.needs_library

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "docs" / "models.md"
PINNED = re.search(r"^transformers==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]

# Above the ids of special tokens, below those of the placeholders.
PREFIX, OTHER_PREFIX = token_ids(83, seed=601) % 120 + 3, token_ids(83, seed=602) % 120 + 3
SUFFIX = token_ids(7, seed=603) % 120 + 3
PROMPT = torch.cat([PREFIX, SUFFIX], dim=1)
TOKENS = 4


def model_of(kind: Kind) -> Any:
    if not hasattr(hf, kind.model):
        pytest.skip(f"transformers {hf.__version__} has no {kind.model}")
    try:
        return build(kind)
    except Exception as error:
        if hf.__version__ == PINNED:
            raise
        pytest.skip(f"transformers {hf.__version__} cannot build a tiny {kind.name}: {error}")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.refused], ids=lambda kind: kind.name)
def test_a_kind_that_is_served_answers_exactly(store_path, kind):
    model = model_of(kind)
    expected = generate(model, PROMPT, prefilled(model, PREFIX), tokens=TOKENS)
    without_a_prefix = model.generate(
        PROMPT, do_sample=False, max_new_tokens=TOKENS, return_dict_in_generate=True, output_logits=True
    )
    assert_same_generation(without_a_prefix, expected)
    other = generate(model, PROMPT, prefilled(model, OTHER_PREFIX), tokens=1)
    assert not torch.allclose(other.logits[0], expected.logits[0], rtol=0.01, atol=0.01), "keys do not matter"
    with PrefixStore(store_path) as store:
        ContiguousKVCache(model, PREFIX, store=store).close()
        with ContiguousKVCache(model, PREFIX, store=store, budget=1.0) as exact:
            assert exact.stats.tokens_from_store == PREFIX.shape[1]
            assert_same_generation(generate(model, PROMPT, exact, tokens=TOKENS), expected)
        config = ContiguousKVConfig(budget=0.5, payload="exact")
        with ContiguousKVCache(model, PREFIX, store=store, config=config) as pruned:
            ours = [forward(model, SUFFIX, pruned), forward(model, SUFFIX[:, :1], pruned)]
            visible = {
                layer: visible_tokens(pruned.selected_chunks(layer), PREFIX.shape[1])
                for layer, window in enumerate(layer_windows(model))
                if window is None
            }
        for logits, masked in zip(ours, masked_forwards(model, visible, [SUFFIX, SUFFIX[:, :1]]), strict=True):
            assert_close(logits, masked)
        with ContiguousKVCache(model, PREFIX, store=store, budget=0.5) as packed:
            assert torch.isfinite(generate(model, PROMPT, packed, tokens=TOKENS).logits[-1]).all()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.refused], ids=lambda kind: kind.name)
def test_a_kind_that_is_refused_is_refused_with_its_reason(store_path, kind):
    model = model_of(kind)
    with PrefixStore(store_path) as store, pytest.raises(UnsupportedModelError) as refusal:
        ContiguousKVCache(model, PREFIX, store=store)
    assert kind.refused in str(refusal.value)
    assert kind.model in str(refusal.value)


# ---- the reference: the model's own attention, with the pruned tokens masked out ----


class _Masked(DynamicCache):
    """A cache whose prefix is hidden where `visible` (layer -> bool `[1, n]`) says so, from the attention of `base`."""

    active: _Masked | None = None

    def __init__(self, config: Any, base: str) -> None:
        super().__init__(config=config)
        self.base = base
        self.visible: dict[int, torch.Tensor] = {}
        self.layer = 0

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *args: Any, **options: Any) -> Any:
        # Attention comes next. Its module need not know the layer: some models go through their modules twice.
        _Masked.active, self.layer = self, layer_idx
        return super().update(key_states, value_states, layer_idx, *args, **options)


def _masked_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **options: Any
) -> Any:
    states = _Masked.active
    assert states is not None
    if states.layer in states.visible:
        visible = states.visible[states.layer]
        attention_mask = attention_mask.clone()
        hidden = ~visible[:, None, None, :]
        attention_mask[..., : visible.shape[1]].masked_fill_(hidden, torch.finfo(attention_mask.dtype).min)
    function = attention_function(states.base, module)
    return function(module, query, key, value, attention_mask, **options)


def masked_forwards(model: Any, visible: dict[int, torch.Tensor], blocks: list[torch.Tensor]) -> list[torch.Tensor]:
    """Logits of `blocks` after the prefix, of which each layer sees what is `visible` (bool `[1, n]`)."""
    AttentionInterface.register("masked_by_the_table", _masked_attention)
    AttentionMaskInterface.register("masked_by_the_table", eager_mask)
    twin = type(model)(copy.deepcopy(model.config)).eval()
    twin.load_state_dict(model.state_dict())
    twin.set_attn_implementation("masked_by_the_table")
    states = _Masked(twin.config, model.config.get_text_config(decoder=True)._attn_implementation)
    try:
        forward(twin, PREFIX, states)
        states.visible = visible
        return [forward(twin, block, states) for block in blocks]
    finally:
        _Masked.active = None


# ---- the table ----


def test_no_kind_is_listed_twice():
    names = [kind.name for kind in KINDS]
    assert sorted(names) == sorted(set(names))


def test_the_table_in_the_documentation_is_up_to_date():
    if hf.__version__ != PINNED:
        pytest.skip(f"the table is that of transformers {PINNED}, not {hf.__version__}")
    if os.environ.get("UPDATE_DOCS"):
        TABLE.write_text(table(), encoding="utf-8")
    assert TABLE.read_text(encoding="utf-8") == table(), "rewrite it: UPDATE_DOCS=1 make test TEST_ARGS=..."


@cache
def table() -> str:
    served = sorted((kind for kind in KINDS if not kind.refused), key=lambda kind: kind.name.casefold())
    text = [kind for kind in served if kind.model.endswith(("CausalLM", "LMHeadModel")) and not multimodal(kind)]
    media = [kind for kind in served if kind not in text]
    reasons = list(dict.fromkeys(kind.refused for kind in KINDS if kind.refused))
    lines = [
        "# Which models are served",
        "",
        "The library recognises a model by what it does, not by its name: it reads the configuration and watches",
        "the K/V of three tokens. So a kind that is missing here is tried like any other.",
        "`tests/contract/test_model_table.py` writes this list and checks every line of it with a tiny random model",
        f"and transformers {PINNED}:",
        "",
        "- **Served**: at `budget=1.0` with the prefix from disk, `generate` gives the tokens and logits that it",
        "  gives with a prefilled `DynamicCache` and without a prefix. Below 1.0, a forward gives the logits of the",
        "  model with the pruned tokens masked.",
        "- **Refused**: `UnsupportedModelError` at construction, with this reason in its message.",
        "",
        f"## Served: {len(text)} kinds of language models",
        "",
        *lines_of(text),
        "",
        f"## Served: {len(media)} kinds of multimodal models, on text",
        "",
        "A prefix that holds placeholders of images, video or audio is refused.",
        "",
        *lines_of(media),
        "",
        f"## Refused: {sum(kind.refused is not None for kind in KINDS)} kinds",
        "",
        "| reason | models |",
        "|---|---|",
        *(
            f"| … {reason} … | {', '.join(cell(kind) for kind in KINDS if kind.refused == reason)} |"
            for reason in reasons
        ),
    ]
    return "\n".join(lines) + "\n"


def multimodal(kind: Kind) -> bool:
    return any(name.endswith("_config") for name in kind.options)


def lines_of(kinds: list[Kind]) -> list[str]:
    rows = [cell(kind) for kind in kinds]
    columns = 3
    rows += [""] * (-len(rows) % columns)
    height = len(rows) // columns
    return [
        "| | | |",
        "|---|---|---|",
        *("| " + " | ".join(rows[row + column * height] for column in range(columns)) + " |" for row in range(height)),
    ]


def cell(kind: Kind) -> str:
    notes = [note for note in (kind.variant, kind.since and f"since transformers {kind.since}") if note]
    return f"`{kind.model}`" + (f" ({', '.join(notes)})" if notes else "")
