"""Functions on the inputs of a model's forward that a cache with a prefix needs before it can serve them.

They take the forward's arguments by name. They cut tokens that are already cached, move left padding after the prefix,
and determine which rows and queries count.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..errors import InputError
from ..model.transformers_internals import CACHE_NAMES
from ..request.rows import NextTokens, Rows

# Forward arguments that do not change K and V beyond the effect of token ids, mask and positions.
ORDINARY_INPUTS = frozenset(
    (
        "input_ids",
        "attention_mask",
        "position_ids",
        *CACHE_NAMES,
        "use_cache",
        "logits_to_keep",
        "labels",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "cache_position",
    )
)


@dataclass(frozen=True)
class Prompt:
    """A prompt of ordinary form that starts an empty cache.

    Attributes:
        ids: int64 `(batch, length)`.
        pads: number of left-padding tokens per row.
    """

    ids: torch.Tensor
    pads: list[int]

    def row(self, index: int) -> torch.Tensor:
        """The real tokens of one row, int64 `(n,)`."""
        return self.ids[index, self.pads[index] :]


def foreign_inputs(inputs: dict[str, Any], multimodal: bool) -> list[str]:
    """Names of arguments that may change K and V beyond the effect of token ids, mask and positions.

    Empty values do not count: `None`, an empty container (vision-language models get an empty `mm_encoder_outputs` with
    every text), and token types that are all zero if the model is `multimodal`, where zero means text. (GPT-2 adds an
    embedding for type zero.) Objects that `generate` passes on to the model by accident, such as the tokenizer of
    `stop_strings`, do not count either.
    """
    return [
        name
        for name, value in inputs.items()
        if name not in ORDINARY_INPUTS
        and not _says_nothing(value)
        and not (multimodal and name.endswith("token_type_ids") and torch.is_tensor(value) and not bool(value.any()))
    ]


def _says_nothing(value: Any) -> bool:
    if value is None or isinstance(value, PreTrainedTokenizerBase):
        return True
    if isinstance(value, Mapping):
        return all(one is None for one in value.values())
    return isinstance(value, list | tuple) and len(value) == 0


def ordinary_prompt(inputs: dict[str, Any], multimodal: bool = False) -> Prompt | str:
    """The prompt in `inputs`, or why its KV may differ from that of its tokens at positions 0, 1, 2, ...

    Args:
        inputs: the forward's arguments by name.
        multimodal: whether the model takes media (see `foreign_inputs`).
    """
    ids, mask, positions = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("position_ids")
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[1] == 0:
        return "embeddings instead of token ids" if inputs.get("inputs_embeds") is not None else "no token ids"
    foreign = foreign_inputs(inputs, multimodal)
    if foreign:
        return f"arguments that may change K/V: {', '.join(sorted(foreign))}"
    batch, length = ids.shape
    pads = [0] * batch
    if mask is not None:
        if not isinstance(mask, torch.Tensor) or mask.shape != ids.shape:
            return "an attention mask that is not one column for each token"
        real = mask.to(torch.bool).cpu()
        counted = real.long().sum(1)
        left_padded = torch.arange(length)[None, :] >= (length - counted)[:, None]
        if not torch.equal(real, left_padded) or int(counted.min()) == 0:
            return "an attention mask that hides more than left padding"
        pads = (length - counted).tolist()
    if positions is None:
        return "padding without position ids" if any(pads) else Prompt(ids, pads)
    if positions.shape[-1] != length or positions.ndim not in (2, 3):
        return "position ids of another shape than the tokens"
    expected = (torch.arange(length)[None, :] - torch.tensor(pads)[:, None]).clamp_min(0)
    # Multimodal RoPE has several rows of positions, (kinds, batch, n), which are equal for a text.
    shown = positions.cpu().expand(*positions.shape[:-2], batch, -1)
    counts = torch.arange(length)[None, :] >= torch.tensor(pads)[:, None]
    if not bool(((shown == expected) | ~counts).all()):
        return "position ids that do not count the tokens"
    return Prompt(ids, pads)


def repeats_cached(inputs: dict[str, Any], cached: int) -> bool | None:
    """Whether `input_ids` repeat the whole prompt, although its first `cached` tokens are in the cache.

    Args:
        inputs: the forward's arguments by name.
        cached: tokens in the cache, prefix and suffix.

    Returns:
        what mask or positions say; `None`: neither says where these tokens belong.
    """
    ids, mask, positions = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("position_ids")
    if cached == 0 or not isinstance(ids, torch.Tensor) or ids.shape[1] < 1:
        return False
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        return mask.shape[1] == ids.shape[1]
    if isinstance(positions, torch.Tensor) and positions.ndim in (2, 3):
        return bool((positions[..., 0] == 0).all())
    return None if mask is None else False


def text_positions(inputs: dict[str, Any], cached: int) -> torch.Tensor:
    """Positions of new text tokens after `cached` text tokens: int64, in the shape that the model passes.

    Padding does not count. Without a mask over all tokens, no token is padding.
    """
    ids, mask, given = inputs.get("input_ids"), inputs.get("attention_mask"), inputs.get("position_ids")
    states = ids if isinstance(ids, torch.Tensor) else inputs["inputs_embeds"]
    batch, length = states.shape[:2]
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)[:, -length:]
    else:
        positions = torch.arange(cached, cached + length, device=states.device).expand(batch, -1)
    if isinstance(given, torch.Tensor) and given.ndim == 3:
        return positions.expand(given.shape[0], -1, -1)
    return positions


def cut_cached(inputs: dict[str, Any], cached: int) -> None:
    """Remove the first `cached` columns from every argument with one column per new token (not from the mask)."""
    length = inputs["input_ids"].shape[1]
    inputs["input_ids"] = inputs["input_ids"][:, cached:]
    for name, value in inputs.items():
        along = name == "position_ids" or name.endswith("token_type_ids")
        if along and isinstance(value, torch.Tensor) and value.shape[-1] == length:
            inputs[name] = value[..., cached:]


def sees_everything(inputs: dict[str, Any]) -> bool:
    """Whether the attention mask hides no token from later tokens. `False` for a single new token per row with a mask,
    because transformers then drops the mask itself."""
    mask = inputs.get("attention_mask")
    if mask is None:
        return True
    return isinstance(mask, torch.Tensor) and mask.ndim == 2 and not decoding(inputs) and bool(mask.all())


def decoding(inputs: dict[str, Any]) -> bool:
    """Whether the forward passes one token per row."""
    ids = inputs.get("input_ids")
    return isinstance(ids, torch.Tensor) and ids.shape[1] == 1


def uncut_prefix(inputs: dict[str, Any], prefix_ids: torch.Tensor) -> None:
    """Put the prefix back into inputs of a left-padded batch that were cut to the columns after it.

    If a row has `p` columns of padding in the mask, its cut ids are `p` columns that repeat the prefix, then its
    suffix. (A block of a chunked prefill may end before the suffix.)
    """
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    prefix = prefix_ids.to(ids.device)
    pads = pads_before_prefix(mask).tolist()
    columns = len(prefix) + ids.shape[1]
    rows = [torch.cat([row.new_zeros(p), prefix, row[p:]])[:columns] for row, p in zip(ids, pads, strict=True)]
    inputs["input_ids"] = torch.stack(rows)
    if inputs.get("position_ids") is not None:
        inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp_min(0)


def pads_before_prefix(mask: torch.Tensor) -> torch.Tensor:
    """Number of zeros at the beginning of each row of a 2D mask, int64 `(batch,)`."""
    return (mask.to(torch.bool).long().cumsum(1) == 0).sum(1)


def mask_behind_prefix(mask: torch.Tensor, prefix_tokens: int, more_follows: bool = False) -> torch.Tensor:
    """The 2D mask with left padding moved between prefix and suffix, as in the cache.

    A row `[pad * p][prefix][suffix]` becomes `[prefix][pad * p][suffix]`. The model gets the columns after the first
    `prefix_tokens` as input; the first `p` of these repeat tokens of the prefix and must stay hidden.

    Args:
        mask: `(batch, columns)`, nonzero for real tokens.
        prefix_tokens: tokens of the prefix.
        more_follows: whether this is a block of a prompt that goes on (chunked prefill); its columns may all be
            padding.

    Raises:
        InputError: a row is too short to begin with the prefix.
    """
    pads = pads_before_prefix(mask)
    if int(pads.max()) == 0:
        return mask
    if int(pads.max()) + prefix_tokens >= mask.shape[1] and not more_follows:
        raise InputError(
            f"a row of the batch has {mask.shape[1] - int(pads.max())} tokens; it must begin with the prefix of "
            f"{prefix_tokens} tokens and have at least one more"
        )
    columns = torch.arange(mask.shape[1], device=mask.device)[None, :]
    moved = (columns >= prefix_tokens) & (columns < prefix_tokens + pads[:, None])
    in_prefix = columns < prefix_tokens
    return torch.where(moved, 0, torch.where(in_prefix & (pads[:, None] > 0), 1, mask)).to(mask.dtype)


def drafts_in(inputs: dict[str, Any], generate_begins: bool, in_answer: bool) -> int:
    """How many of the tokens that a forward passes, at their end, are drafts of assisted decoding.

    Args:
        inputs: the forward's arguments.
        generate_begins: whether this is the first forward of a `generate` call: it wants logits of the drafts.
        in_answer: whether it is a later one, past the prompt: it passes one token and then drafts.
    """
    if in_answer:
        return _new_states(inputs).shape[1] - 1
    wanted = inputs.get("logits_to_keep", 1) if generate_begins else 1
    return wanted - 1 if isinstance(wanted, int) and wanted > 1 else 0


def next_tokens(inputs: dict[str, Any], cached: int, drafts: int) -> NextTokens:
    """What a forward passes after the first suffix tokens, when `cached` columns of the suffix are cached."""
    batch, new = _new_states(inputs).shape[:2]
    mask = inputs.get("attention_mask")
    is_plain = isinstance(mask, torch.Tensor) and mask.ndim == 2
    return NextTokens(batch, cached, new, drafts, mask if is_plain else None)


def _new_states(inputs: dict[str, Any]) -> torch.Tensor:
    ids = inputs.get("input_ids")
    found: torch.Tensor = ids if isinstance(ids, torch.Tensor) else inputs["inputs_embeds"]
    return found


def rows_of(inputs: dict[str, Any], cached: int, drafts: int) -> Rows:
    """The distinct rows, and which of their suffix tokens are real and which vote.

    Args:
        inputs: the forward's arguments, after `cut_cached` and `mask_behind_prefix`.
        cached: tokens in the cache before this forward.
        drafts: number of draft tokens of assisted decoding at the end, which never vote.
    """
    ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    states = ids if isinstance(ids, torch.Tensor) else inputs["inputs_embeds"]
    batch, length = states.shape[:2]
    visible = torch.ones(batch, length, dtype=torch.bool)
    if isinstance(mask, torch.Tensor) and mask.ndim == 2:
        if mask.shape[1] != cached + length:
            raise InputError(
                f"attention_mask has {mask.shape[1]} columns, expected {cached + length}: one for each of the "
                f"{cached} cached and {length} new tokens"
            )
        visible = mask[:, cached:].to(torch.bool).cpu()
    voting = visible.clone()
    if drafts:
        voting[:, -drafts:] = False
    if batch == 1:
        first = torch.zeros(1, dtype=torch.long)
        return Rows(first, first, voting, visible)
    if not isinstance(ids, torch.Tensor):
        return Rows(torch.arange(batch), torch.arange(batch), voting, visible)
    # Padding tokens may differ between rows that are otherwise equal.
    content = torch.cat([ids.cpu().masked_fill(~visible, -1), visible.long()], dim=1)
    # In order of first appearance, so that if all rows differ, the distinct rows are the batch's rows in order.
    first_of: dict[bytes, int] = {}
    for row in range(batch):
        first_of.setdefault(content[row].numpy().tobytes(), row)
    position = {key: number for number, key in enumerate(first_of)}
    of_batch = torch.tensor([position[content[row].numpy().tobytes()] for row in range(batch)])
    representatives = torch.tensor(list(first_of.values()))
    return Rows(representatives, of_batch, voting[representatives], visible[representatives])
