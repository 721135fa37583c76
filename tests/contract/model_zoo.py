"""A tiny random model of as many decoder architectures of transformers as is practical, and what to expect of each.

Their configurations call sizes by different names, so `SIZES` has them all, and a configuration is given those that it
declares. Two layers of width 64 with heads of 16: hundredths of a second each.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers as hf
from packaging.version import Version

from .models import PAD, VOCABULARY, quiet

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "word_embed_proj_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rotary_dim": 8,
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "decoder_ffn_dim"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("n_positions", "max_position_embeddings"), 1024),
    "sliding_window": 24,
    "query_pre_attn_scalar": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
}

# Why a kind is refused, in the words of the error.
ENCODER_DECODER = "is an encoder-decoder model"
NOT_CAUSAL = "has attention that is not causal: the K/V of a token depend on tokens after it"
OWN_POSITIONS = "counts positions from its padding token"
LATENT = "keeps latent (compressed) K/V and expands them after they are stored"
ALIBI = "adds an ALiBi bias"
OWN_FUNCTION = "computes attention itself instead of by the attention interface of transformers"
CHANGED = "changes its K/V after storing them"
TWICE = "computes attention 2 times"
BIASED_MASK = "adds a bias to its attention mask"
RECURRENT = "keeps a recurrent state"
CONVOLUTION = "keeps the state of a convolution instead of the K/V of each token"
INDEXED = "chooses the tokens to attend to by an index that it caches beside its K/V"
COMPRESSED = "compresses the K/V of several tokens into one"
CHUNKED = "attends within chunks of tokens"
SHARED = "use the K/V of other layers"
CROSS_ATTENTION = "has layers that attend to images instead of text"
SHAPES = "K and V must have one shape in all layers"
NO_CACHE = "takes no KV cache in its forward"


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes:
        model: name of its class in transformers.
        options: of its configuration, beside `SIZES`; `...` leaves out one of those.
        refused: why it cannot be served, in words of the error; `None` if it is served.
        variant: what tells it from another kind of the same class.
        since: the release of transformers with which it came to be served, if an older supported one refuses it.
    """

    model: str
    options: dict[str, Any] = field(default_factory=dict)
    refused: str | None = None
    variant: str = ""
    since: str = ""

    @property
    def name(self) -> str:
        return f"{self.model} ({self.variant})" if self.variant else self.model


def served(model: str, variant: str = "", **options: Any) -> Kind:
    return Kind(model, options, None, variant)


def served_since(release: str, before: str, model: str, **options: Any) -> Kind:
    """Served from this release of transformers on, and refused for the reason `before` by older ones."""
    new = Version(hf.__version__) >= Version(release)
    return Kind(model, options, None if new else before, since=release)


def refused(reason: str, model: str, variant: str = "", **options: Any) -> Kind:
    return Kind(model, options, reason, variant)


_MLA: dict[str, Any] = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": ...,
}
_LINEAR: dict[str, Any] = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
_MIXED = ["sliding_attention", "full_attention"]
_MAMBA: dict[str, Any] = {"mamba_d_state": 8, "mamba_n_heads": 8, "mamba_d_head": 16, "mamba_expand": 2}
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
}
_VISION: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "out_hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "projection_dim": 64,
    "fullatt_block_indexes": [0],
    "deepstack_visual_indexes": [0],
}
# Of the placeholders, above all ids that the tests draw.
_IMAGE, _VIDEO = VOCABULARY - 1, VOCABULARY - 2


def _vision_language(text: str, vision: str = "", **text_options: Any) -> dict[str, Any]:
    vision_config = _VISION | ({"model_type": vision} if vision else {})
    text_config = {"model_type": text} | _TEXT | text_options
    return {"text_config": text_config, "vision_config": vision_config}


def _mrope(section: list[int]) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": section}}


# fmt: off
KINDS: tuple[Kind, ...] = (
    # ---- text ----
    served("AfmoeForCausalLM", layer_types=_MIXED),
    served("ApertusForCausalLM"),
    served("ArceeForCausalLM"),
    served("BeamForCausalLM", layer_types=_MIXED),
    served("BertLMHeadModel", "is_decoder=True", is_decoder=True),
    served("BioGptForCausalLM"),
    served("BitNetForCausalLM"),
    served_since("5.24", OWN_FUNCTION, "CodeGenForCausalLM"),
    served("Cohere2ForCausalLM", layer_types=_MIXED),
    served("Cohere2MoeForCausalLM", layer_types=_MIXED),
    served("CohereForCausalLM"),
    served("CTRLLMHeadModel", dff=96),
    served("CwmForCausalLM", layer_types=_MIXED),
    served("Dots1ForCausalLM", layer_types=_MIXED),
    served("Emu3ForCausalLM"),
    served("Ernie4_5ForCausalLM"),
    served("Ernie4_5_MoeForCausalLM"),
    served("Exaone4ForCausalLM", layer_types=_MIXED),
    served("ExaoneMoeForCausalLM", layer_types=_MIXED),
    served("FlexOlmoForCausalLM"),
    served("FlintForCausalLM", layer_types=_MIXED),
    served("Gemma2ForCausalLM", layer_types=_MIXED),
    served("Gemma3ForCausalLM", layer_types=_MIXED),
    served("GemmaForCausalLM"),
    served("Glm4ForCausalLM"),
    served("Glm4MoeForCausalLM"),
    served("GlmForCausalLM"),
    served("GPT2LMHeadModel"),
    served("GPTBigCodeForCausalLM", multi_query=True),
    served_since("5.24", OWN_FUNCTION, "GPTJForCausalLM"),
    served("GPTNeoXForCausalLM"),
    served("GptOssForCausalLM", layer_types=_MIXED),
    served("GraniteForCausalLM"),
    served("GraniteMoeForCausalLM"),
    served("GraniteMoeSharedForCausalLM"),
    served("GraniteMoeSWAForCausalLM"),
    served("GraniteSWAForCausalLM"),
    served("HeliumForCausalLM"),
    served("HunYuanDenseV1ForCausalLM"),
    served("HunYuanMoEV1ForCausalLM"),
    served("HYV3ForCausalLM"),
    served("HrmTextForCausalLM"),
    served("HyperCLOVAXForCausalLM"),
    served("Jais2ForCausalLM"),
    served("Kolibri1ForCausalLM", layer_types=_MIXED),
    served("LagunaForCausalLM", layer_types=_MIXED),
    served("LlamaForCausalLM"),
    served("MellumForCausalLM", layer_types=_MIXED),
    served("MiniMaxM2ForCausalLM"),
    served("MinistralForCausalLM", layer_types=_MIXED),
    served("Ministral3ForCausalLM", sliding_window=None),
    served("MistralForCausalLM", sliding_window=None),
    served("MistralForCausalLM", "all layers with a window"),
    served("MixtralForCausalLM", sliding_window=None),
    served("ModernBertDecoderForCausalLM", layer_types=_MIXED, local_attention=24),
    served("NanoChatForCausalLM"),
    served("NemotronForCausalLM"),
    served("Olmo2ForCausalLM"),
    served("Olmo3ForCausalLM", layer_types=_MIXED),
    served("OlmoForCausalLM"),
    served("OlmoeForCausalLM"),
    served("OPTForCausalLM"),
    served("PersimmonForCausalLM"),
    served("Phi3ForCausalLM", sliding_window=None),
    served("PhiForCausalLM"),
    served("PhimoeForCausalLM", sliding_window=None),
    served("Qwen2ForCausalLM"),
    served("Qwen2MoeForCausalLM"),
    served("Qwen3ForCausalLM"),
    served("Qwen3MoeForCausalLM"),
    served("SeedOssForCausalLM"),
    served("SmolLM3ForCausalLM", no_rope_layer_interval=2),
    served("SolarOpenForCausalLM"),
    served("StableLmForCausalLM"),
    served("Starcoder2ForCausalLM", sliding_window=None),
    served("VaultGemmaForCausalLM", layer_types=_MIXED),
    # ---- vision-language models, on text ----
    served("AriaForConditionalGeneration", image_token_index=_IMAGE, **_vision_language("aria_text")),
    served("AyaVisionForConditionalGeneration", image_token_index=_IMAGE,
           **_vision_language("cohere2", "siglip_vision_model", layer_types=_MIXED, sliding_window=24)),
    served("ChameleonForConditionalGeneration", vq_config={"embed_dim": 8, "base_channels": 32, "num_embeddings": 16},
           vocabulary_map={"<image>": _IMAGE}),
    served("FuyuForCausalLM", image_token_id=_IMAGE, text_config={"model_type": "persimmon"} | _TEXT),
    served("Gemma3ForConditionalGeneration", image_token_index=_IMAGE, mm_tokens_per_image=4,
           **_vision_language("gemma3_text", "siglip_vision_model", layer_types=_MIXED, sliding_window=24)),
    served("Glm4vForConditionalGeneration", image_token_id=_IMAGE, video_token_id=_VIDEO,
           **_vision_language("glm4v_text", **_mrope([2, 3, 3]))),
    served("Idefics3ForConditionalGeneration", image_token_id=_IMAGE, **_vision_language("llama")),
    served("InternVLForConditionalGeneration", image_token_id=_IMAGE, **_vision_language("qwen2")),
    served("LlavaForConditionalGeneration", image_token_index=_IMAGE,
           **_vision_language("llama", "clip_vision_model")),
    served("LlavaNextForConditionalGeneration", image_token_index=_IMAGE,
           **_vision_language("llama", "clip_vision_model")),
    served("LlavaOnevisionForConditionalGeneration", image_token_index=_IMAGE, video_token_index=_VIDEO,
           **_vision_language("qwen2", "siglip_vision_model")),
    served("Mistral3ForConditionalGeneration", image_token_index=_IMAGE,
           **_vision_language("mistral", "pixtral", sliding_window=None)),
    served("Ovis2ForConditionalGeneration", image_token_id=_IMAGE, visual_indicator_token_ids=[_VIDEO],
           **_vision_language("qwen2")),
    served("Qwen2AudioForConditionalGeneration", audio_token_index=_IMAGE, text_config={"model_type": "qwen2"} | _TEXT,
           audio_config={"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32}),
    served("Qwen2VLForConditionalGeneration", image_token_id=_IMAGE, video_token_id=_VIDEO,
           **_vision_language("qwen2_vl_text", **_mrope([2, 3, 3]))),
    served("Qwen2_5_VLForConditionalGeneration", image_token_id=_IMAGE, video_token_id=_VIDEO,
           **_vision_language("qwen2_5_vl_text", **_mrope([2, 3, 3]))),
    served("Qwen3VLForConditionalGeneration", image_token_id=_IMAGE, video_token_id=_VIDEO,
           **_vision_language("qwen3_vl_text", **_mrope([4, 2, 2]))),
    served("SmolVLMForConditionalGeneration", image_token_id=_IMAGE, **_vision_language("llama")),
    # ---- refused ----
    refused(ENCODER_DECODER, "BartForConditionalGeneration"),
    refused(ENCODER_DECODER, "T5ForConditionalGeneration"),
    refused(NOT_CAUSAL, "BertLMHeadModel", "not made a decoder"),
    refused(NOT_CAUSAL, "PaliGemmaForConditionalGeneration", image_token_index=_IMAGE,
            **_vision_language("gemma", "siglip_vision_model")),
    refused(NOT_CAUSAL, "GemmaForCausalLM", "bidirectional", use_bidirectional_attention=True),
    refused(OWN_POSITIONS, "RobertaForCausalLM", "is_decoder=True", is_decoder=True),
    refused(CROSS_ATTENTION, "MllamaForConditionalGeneration", image_token_index=_IMAGE,
            **_vision_language("mllama_text_model", cross_attention_layers=[1])),
    refused(LATENT, "DeepseekV2ForCausalLM", **_MLA),
    refused(LATENT, "DeepseekV3ForCausalLM", **_MLA),
    refused(LATENT, "MiniCPM3ForCausalLM", **_MLA),
    refused(LATENT, "Glm4MoeLiteForCausalLM", **_MLA),
    refused(ALIBI, "BloomForCausalLM"),
    refused(ALIBI, "FalconForCausalLM", "with ALiBi", alibi=True),
    refused(ALIBI, "MptForCausalLM"),
    refused(OWN_FUNCTION, "FalconForCausalLM", "with RoPE"),
    refused(OWN_FUNCTION, "GPTNeoForCausalLM", attention_types=[[["global", "local"], 1]]),
    refused(OWN_FUNCTION, "XGLMForCausalLM", attention_heads=4),
    refused(CHANGED, "JetMoeForCausalLM"),
    refused(TWICE, "DiffLlamaForCausalLM"),
    refused(BIASED_MASK, "DogeForCausalLM"),
    refused(INDEXED, "DeepseekV32ForCausalLM", **_MLA, index_n_heads=2, index_head_dim=16),
    refused(INDEXED, "MiniMaxM3VLForCausalLM", layer_types=["full_attention", "minimax_m3_sparse"]),
    refused(COMPRESSED, "DeepseekV4ForCausalLM"),
    refused(RECURRENT, "BambaForCausalLM", **_MAMBA, attn_layer_indices=[1]),
    refused(RECURRENT, "FalconH1ForCausalLM", **_MAMBA, mamba_d_ssm=128),
    refused(RECURRENT, "FalconMambaForCausalLM", state_size=8),
    refused(RECURRENT, "GraniteMoeHybridForCausalLM", **_MAMBA, layer_types=["linear_attention", "full_attention"]),
    refused(RECURRENT, "InklingForCausalLM"),
    refused(RECURRENT, "JambaForCausalLM", attn_layer_period=2, attn_layer_offset=1, mamba_d_state=8),
    refused(CONVOLUTION, "Lfm2ForCausalLM", layer_types=["conv", "full_attention"]),
    refused(RECURRENT, "KimiLinearForCausalLM", **_MLA),
    refused(CONVOLUTION, "Lfm2MoeForCausalLM", layer_types=["conv", "full_attention"]),
    refused(RECURRENT, "Mamba2ForCausalLM", state_size=8, num_heads=8, head_dim=16),
    refused(RECURRENT, "MambaForCausalLM", state_size=8),
    refused(RECURRENT, "MiniMaxForCausalLM", layer_types=["linear_attention", "full_attention"]),
    refused(RECURRENT, "NemotronHForCausalLM"),
    refused(RECURRENT, "OlmoHybridForCausalLM", layer_types=["linear_attention", "full_attention"]),
    refused(RECURRENT, "Qwen3_5ForCausalLM", **_LINEAR),
    refused(RECURRENT, "Qwen3NextForCausalLM", **_LINEAR),
    refused(RECURRENT, "RecurrentGemmaForCausalLM", block_types=["recurrent", "attention"], sliding_window=...),
    refused(RECURRENT, "RwkvForCausalLM", attention_hidden_size=64),
    refused(RECURRENT, "xLSTMForCausalLM", head_dim=...),
    refused(RECURRENT, "Zamba2ForCausalLM", layer_types=["linear_attention", "hybrid"]),
    refused(RECURRENT, "ZambaForCausalLM", num_hidden_layers=4, layer_types=["linear_attention", "hybrid"] * 2),
    refused(SHARED, "Gemma3nForCausalLM", num_hidden_layers=4, intermediate_size=[96] * 4, laurel_rank=8,
            vocab_size_per_layer_input=VOCABULARY, hidden_size_per_layer_input=16, num_kv_shared_layers=2,
            layer_types=_MIXED * 2, activation_sparsity_pattern=[0.0] * 4),
    refused(SHAPES, "Gemma4ForCausalLM", layer_types=_MIXED, hidden_size_per_layer_input=0,
            num_kv_shared_layers=0, global_head_dim=32),
    refused(SHAPES, "MiMoV2FlashForCausalLM"),
    refused(CHUNKED, "Llama4ForCausalLM", attention_chunk_size=32, intermediate_size_mlp=96),
    refused(NO_CACHE, "OpenAIGPTLMHeadModel"),
    refused(NO_CACHE, "XLNetLMHeadModel", d_inner=96),
)
# fmt: on


def declared(config_class: type) -> set[str]:
    """The fields that a configuration class knows."""
    fields = set(getattr(config_class, "__dataclass_fields__", {})) | set(getattr(config_class, "attribute_map", {}))
    return fields | set(inspect.signature(config_class.__init__).parameters)


def build(kind: Kind, *, seed: int = 0) -> Any:
    """The model in float32 and eval mode, with weights that make a wrong key show.

    Raises `AttributeError` if the installed transformers has no such class, and what its configuration raises.
    """
    model_class = getattr(hf, kind.model)
    known = declared(model_class.config_class)
    sizes = {name: value for name, value in SIZES.items() if name in known and name not in kind.options}
    options = {name: value for name, value in kind.options.items() if value is not ...}
    config = model_class.config_class(**sizes, **options)
    torch.manual_seed(seed)
    model = model_class(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            # Many configurations have no scale for their random weights, and some biases and norms begin as nothing.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.15 * noise if parameter.ndim > 1 else parameter + 0.05 * noise)
    quiet(model)
    return model
