"""Which token ids of a multimodal model stand for media; and every field of transformers that might be one."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from hf_contiguouskv.model.media_placeholders import MEDIA, is_placeholder, placeholder_ids

MODELS = Path(hf.__file__).parent / "models"


def names(text: str) -> frozenset[str]:
    return frozenset(text.split())


STAND_FOR_MEDIA = names("""
    audio_delay_token_id audio_latent_token_id audio_pad_token_id audio_prompt_token_id audio_token_id audio_token_index
    image_patch_id image_token_id image_token_index video_token_id video_token_index visual_indicator_token_ids
""")

EMBEDDED_LIKE_WORDS = names("""
    audio_bos_token_id audio_end_token_id audio_eos_token_id audio_prompt_bos_token_id audio_start_token_id
    audio_stream_bos_id audio_stream_eos_id boa_token_id boi_token_id boi_token_index document_token_id eoa_token_id
    eoa_token_index eoi_token_id eoi_token_index frame_end_token_id frame_start_token_id im_end_id im_end_token_id
    im_newline_id im_start_id im_start_token_id image_bos_token_id image_end_id image_end_token_id image_start_id
    image_start_token_id low_res_image_start_token_id newline_id slice_end_id slice_start_id timestamp_token_id
    video_end_token_id video_start_token_id vision_end_token_id vision_start_token_id
""")
"""Markers beside the media, and tokens that are told apart by the model for another reason."""

OF_ANOTHER_VOCABULARY = names("""
    codebook_eos_token_id codebook_pad_token_id codec_bos_id codec_eos_token_id codec_nothink_id codec_pad_id
    codec_think_bos_id codec_think_eos_id speaker_id tts_bos_token_id tts_codec_end_token_id tts_codec_mask_token_id
    tts_codec_pad_token_id tts_codec_start_token_id tts_eos_token_id tts_pad_token_id tts_text_end_token_id
    tts_text_pad_token_id tts_text_start_token_id t2u_bos_token_id t2u_decoder_start_token_id t2u_eos_token_id
    t2u_pad_token_id
""")
"""Of the code words of an audio codec, or of the text that a speech decoder is given."""

OF_TEXT = names("""
    assistant_token_id blank_token_id bos_token_id cls_token_id decoder_start_token_id end_token_id eod_token_id
    eos_token_id forced_eos_token_id mask_token_id pad_token_id pred_token_id question_token_id sep_token_id
    start_token_id system_token_id user_token_id
""")

KNOWN = STAND_FOR_MEDIA | EMBEDDED_LIKE_WORDS | OF_ANOTHER_VOCABULARY | OF_TEXT
ABBREVIATIONS = MEDIA | {"boi", "eoi", "boa", "eoa", "mm", "codec", "codebook", "tts", "t2u", "slice", "document"}
ID_LIKE = re.compile(r"_token_(ids?|index|indices|idx)$")


def test_the_installed_transformers_has_no_field_for_token_ids_that_is_not_classified():
    """A new one belongs in one of the lists above; if it stands for media, `is_placeholder` has to know it."""
    fields = {name for name in fields_of_configs() if ID_LIKE.search(name) or about_media(name)}
    assert len(fields) > 50, "the fields of the configurations were not found"
    unknown = {name: sorted(fields_of_configs()[name]) for name in fields - KNOWN}
    assert not unknown, f"transformers {hf.__version__} has fields of token ids that are new to us: {unknown}"


@pytest.mark.parametrize("field", sorted(KNOWN))
def test_the_rule_agrees_with_the_classification(field):
    assert is_placeholder(field) == (field in STAND_FOR_MEDIA)


def test_every_token_that_a_model_replaces_with_features_is_a_placeholder():
    """Models look for their placeholders with `input_ids == self.config.<field>`, whatever it is called."""
    fields = fields_compared_with_input_ids()
    assert len(fields) > 3, "the comparisons were not found"
    # The model tells these apart for another reason: another constant as embedding, or where a span begins.
    others = OF_TEXT | EMBEDDED_LIKE_WORDS
    unknown = {name: sorted(fields[name]) for name in fields.keys() - others if not is_placeholder(name)}
    assert not unknown, f"transformers {hf.__version__} compares input ids with fields that are new to us: {unknown}"


def about_media(name: str) -> bool:
    return name.endswith(("_id", "_ids")) and not ABBREVIATIONS.isdisjoint(name.split("_"))


@cache
def fields_of_configs() -> dict[str, set[str]]:
    """Every attribute that a configuration of the installed transformers declares or sets -> the models."""
    found: dict[str, set[str]] = {}
    for path in MODELS.glob("*/configuration_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = None
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                name = node.target.id
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                name = node.attr
            elif isinstance(node, ast.arg):
                name = node.arg
            elif isinstance(node, ast.FunctionDef) and any("property" in ast.unparse(d) for d in node.decorator_list):
                name = node.name
            if name is not None:
                found.setdefault(name.lstrip("_"), set()).add(path.parent.name)
    return found


@cache
def fields_compared_with_input_ids() -> dict[str, set[str]]:
    comparison = re.compile(r"\binput_ids\s*==\s*self\.(?:[a-z_]+\.)*([a-z_0-9]+)")
    found: dict[str, set[str]] = {}
    for path in MODELS.glob("*/modeling_*.py"):
        for name in comparison.findall(path.read_text(encoding="utf-8")):
            if name.endswith(("_id", "_ids", "_index")):
                found.setdefault(name, set()).add(path.parent.name)
    return found


def config(name: str, **options: Any) -> Any:
    kind = getattr(hf, name, None)
    if kind is None:
        pytest.skip(f"transformers {hf.__version__} has no {name}")
    return kind(**options)


DECLARED: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "text only": ("LlamaConfig", {}, {}),
    "an image": ("LlavaConfig", {"image_token_index": 7}, {"image_token_index": 7}),
    "image and video": (
        "Qwen2_5_VLConfig",
        {"image_token_id": 7, "video_token_id": 8, "vision_start_token_id": 9},
        {"image_token_id": 7, "video_token_id": 8},
    ),
    "image and audio, markers beside them": (
        "Gemma3nConfig",
        {"image_token_id": 7, "audio_token_id": 8, "boi_token_id": 9, "eoi_token_id": 10, "boa_token_id": 11},
        {"image_token_id": 7, "audio_token_id": 8},
    ),
    "one id under three names": ("Molmo2Config", {"image_patch_id": 7}, {"image_patch_id": 7}),
    "in the sub-configs": (
        "Phi4MultimodalConfig",
        {"vision_config": {"image_token_id": 7}, "audio_config": {"audio_token_id": 8}},
        {"vision_config.image_token_id": 7, "audio_config.audio_token_id": 8},
    ),
    "a list": (
        "Ovis2Config",
        {"image_token_id": 7, "visual_indicator_token_ids": [8, 9]},
        {"image_token_id": 7, "visual_indicator_token_ids[0]": 8, "visual_indicator_token_ids[1]": 9},
    ),
    "in a vocabulary": ("ChameleonConfig", {"vocabulary_map": {"<image>": 7, "word": 8}}, {"image_token_id": 7}),
    "no such token": ("InstructBlipVideoConfig", {"video_token_index": None}, {}),
    "a negative id": ("PerceptionLMConfig", {"image_token_id": -1, "video_token_id": 8}, {"video_token_id": 8}),
}


@pytest.mark.parametrize("case", DECLARED)
def test_the_ids_that_a_configuration_declares_are_found_with_their_names(case):
    name, options, expected = DECLARED[case]
    assert placeholder_ids(config(name, **options)) == expected


def test_a_field_that_only_a_saved_configuration_has_is_found():
    saved = config("LlamaConfig", img_context_token_id=7, vision_config={"video_token_id": 8, "hidden_size": 9})
    assert placeholder_ids(saved) == {"img_context_token_id": 7, "vision_config.video_token_id": 8}


@pytest.mark.parametrize("nothing", [None, object(), {}, 5], ids=["None", "an object", "a dict", "a number"])
def test_what_is_no_configuration_has_no_placeholders(nothing):
    assert placeholder_ids(nothing) == {}


def test_a_configuration_that_holds_itself_has_an_end():
    saved = config("LlamaConfig", image_token_id=7)
    saved.text_config = saved
    assert placeholder_ids(saved) == {"image_token_id": 7}
