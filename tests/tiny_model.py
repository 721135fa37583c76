"""A tiny random model with a tokenizer, in a folder: for tests of programs that load a model by name."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eval.models import SMOLLM2_CHAT_TEMPLATE

END_OF_TEXT, TURN_BEGINS, TURN_ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def tiny_tokenizer(context: int = 8192) -> PreTrainedTokenizerFast:
    """One token per byte of UTF-8 and three special ones (259 in all), with the chat template of SmolLM2.

    Args:
        context: tokens that the tokenizer says the model can take.
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = (END_OF_TEXT, TURN_BEGINS, TURN_ENDS)
    vocabulary = {token: number for number, token in enumerate((*special, *letters))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_ENDS,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_BEGINS],
        chat_template=SMOLLM2_CHAT_TEMPLATE,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )


def save_tiny_model(folder: Path, *, layers: int = 3, context: int = 8192, seed: int = 0) -> Path:
    """Save a random Llama (grouped-query attention, float32, well under 1 MB) and its byte-level tokenizer.

    Weights are large enough that attention differs from token to token and the likeliest token stands out.

    Args:
        folder: where to; made if it does not exist.
        layers: of the model.
        context: tokens that it can take (`max_position_embeddings`).
        seed: of the weights.

    Returns:
        `folder`, which `eval.models.load_model` and `from_pretrained` take.
    """
    tokenizer = tiny_tokenizer(context)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
