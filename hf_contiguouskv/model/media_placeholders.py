"""The token ids of a multimodal model that stand for media: their K/V depend on more than the tokens.

Configurations name them in many ways (`image_token_id`, `video_token_index`, `audio_token_id` of a sub-config,
`image_patch_id`, lists such as `visual_indicator_token_ids`), so they are found by the words in a field's name. Only
ids whose embedding is replaced by features of the media count. The markers around them (`vision_start_token_id`,
`image_end_token_id`, `boi_token_id`) are embedded like words: their K/V depend on the tokens alone.
`tests/contract/test_placeholders.py` classifies every such field of the installed transformers and reports new ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from transformers import PretrainedConfig

MEDIA = frozenset({"image", "images", "img", "im", "video", "audio", "speech", "vision", "visual", "media", "frame"})
"""A field whose name has one of these words is about media."""

MARKERS = frozenset({"start", "end", "bos", "eos", "begin", "newline", "sep", "row", "col"})
"""A field whose name also has one of these words names a token beside the media, not one that stands for it."""

_HOLDS_IDS = re.compile(r"_(ids?|token_index|token_indices|token_idx)$")


@lru_cache(maxsize=4096)
def is_placeholder(field: str) -> bool:
    """Whether a field of this name holds ids of tokens whose embedding is replaced by features of media."""
    words = field.split("_")
    return _HOLDS_IDS.search(field) is not None and not MEDIA.isdisjoint(words) and MARKERS.isdisjoint(words)


def placeholder_ids(config: Any) -> dict[str, int]:
    """The ids of all tokens that stand for media.

    Args:
        config: config of a text-only or multimodal model; sub-configs (`vision_config`, `thinker_config`) are searched.

    Returns:
        field -> id, each id once, in the order found: `{"image_token_id": 151655,
        "vision_config.image_token_id": 200010, "visual_indicator_token_ids[0]": 151666}`. Empty for a text-only model.
        Fields that are missing, `None` or negative (a model without this kind of media) are left out.
    """
    found: dict[int, str] = {}
    for name, value in _fields(config, "", 0):
        many = isinstance(value, list | tuple)
        for position, token in enumerate(value if many else (value,)):
            if type(token) is int and token >= 0:
                found.setdefault(token, f"{name}[{position}]" if many else name)
    return {name: token for token, name in found.items()}


def _fields(config: Any, path: str, depth: int) -> Iterator[tuple[str, Any]]:
    """Names and values of placeholder fields: the config's own first, then those of its sub-configs."""
    own: Mapping[str, Any] = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    for name, value in own.items():
        if isinstance(name, str) and is_placeholder(name):
            yield path + name, value
    for name in () if isinstance(config, Mapping) else _aliases(config.__class__):
        if name not in own:
            yield path + name, getattr(config, name, None)
    if depth == 4:  # Configs are two or three levels deep; a config that contains itself would recurse forever.
        return
    for name, value in own.items():
        # A sub-config without a class in this transformers stays a dict, as in config.json.
        if isinstance(value, PretrainedConfig) or (isinstance(value, Mapping) and str(name).endswith("_config")):
            yield from _fields(value, f"{path}{name}.", depth + 1)


@lru_cache(maxsize=256)
def _aliases(kind: type) -> tuple[str, ...]:
    """Placeholder fields that a config class has beside those of its instances: properties and aliases."""
    names = (*getattr(kind, "attribute_map", {}), *dir(kind))
    return tuple(dict.fromkeys(name for name in names if is_placeholder(name)))
