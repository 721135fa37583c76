"""The card of a bundle: the page that people, and the Hugging Face Hub, see first."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from ...errors import InputError
from ..format import SegmentHeader

LIBRARY = "hf_contiguouskv"
TAGS = ["kv-cache", "prefix-caching", "transformers", "contiguouskv"]

_TEXT = """\
# Prefix KV cache

This folder holds the KV cache of {prefixes}, computed {by} and stored by
`hf_contiguouskv`. A prompt that begins with the same tokens, for the same model, needs no prefill for them.

{table}

{facts}

## Load it

```bash
contiguouskv import kv-store FOLDER            # a copy on this machine
contiguouskv import kv-store hf://OWNER/NAME   # from the Hugging Face Hub
```

```python
from hf_contiguouskv import ContiguousKVCache, PrefixStore
from hf_contiguouskv.store.bundle import import_bundle

with PrefixStore("kv-store") as store:
    print(import_bundle(store, "FOLDER"))
    cache = ContiguousKVCache(model, store=store, budget=1.0)
    model.generate(**prompt, cache=cache)  # before transformers 5.24: past_key_values=cache
```

Importing compares every byte with its checksum. Each `segments/*.safetensors` is a plain safetensors file, without
pickle, that any reader opens; `bundle.json` lists them.

## Before you share or use it

- It contains the token ids of the whole text, so anyone who has it can read the text.
- Checksums show that it arrived undamaged, not that it was computed honestly. Import what you would also trust to
  answer in the place of the text: keys and values can say something else than the tokens that they stand for.
{salt}"""

_SALT = (
    "- It comes from a store with a salt: only a store that is opened with the same `salt` finds its prefixes. "
    "The salt is not in here.\n"
)


def card_data(base_model: str | None) -> ModelCardData:
    """The front matter of the card.

    Args:
        base_model: the model's name on the Hub, `owner/name`; `None` leaves it out.

    Raises:
        InputError: `base_model` is no such name.
    """
    if base_model is not None:
        try:
            validate_repo_id(base_model)
        except HFValidationError as error:
            raise InputError(f"base_model must be a name on the Hub, such as 'owner/name': {error}") from None
    return ModelCardData(base_model=base_model, library_name=LIBRARY, tags=TAGS)


def card(headers: Sequence[SegmentHeader], sizes: Mapping[str, int], data: ModelCardData) -> str:
    """The whole page.

    Args:
        headers: of the segments, parents before children.
        sizes: bytes of each file, by key.
        data: from `card_data`.
    """
    continued = {header.parent for header in headers}
    ends = sum(header.key not in continued for header in headers)
    base = data.base_model
    facts = [f"- model fingerprint: {_several(header.fingerprint for header in headers)}"]
    facts.append(f"- tokens per chunk: {_several(str(header.geometry.chunk_size) for header in headers)}")
    facts.append(f"- {sum(sizes.values()):,} bytes in {len(headers)} segment{'s' * (len(headers) != 1)}")
    return f"---\n{data.to_yaml().strip()}\n---\n\n" + _TEXT.format(
        prefixes="a prefix" if ends == 1 else f"{ends} prefixes",
        by=f"with [{base}](https://huggingface.co/{base})" if base else "with the model of the fingerprint below",
        table="\n".join(_table(headers, sizes)),
        facts="\n".join(facts),
        salt=_SALT if any(header.salted for header in headers) else "",
    )


def _table(headers: Sequence[SegmentHeader], sizes: Mapping[str, int]) -> list[str]:
    lines = ["| segment | tokens | layers | type | bytes |", "|---|---|---|---|---|"]
    for header in headers:
        g = header.geometry
        begin = header.first_chunk * g.chunk_size
        lines.append(
            f"| `{header.key}` | {begin:,} to {begin + header.num_tokens:,} | {g.num_layers} | {g.dtype_name} | "
            f"{sizes[header.key]:,} |"
        )
    return lines


def _several(values: Iterable[str]) -> str:
    return ", ".join(f"`{value}`" for value in dict.fromkeys(values))
