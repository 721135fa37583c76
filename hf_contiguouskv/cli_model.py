"""Commands that need a model: fill a store with documents, and measure."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from .cache import ContiguousKVCache
from .cli import StorePath, app, human_bytes, messages_instead_of_tracebacks
from .config import ContiguousKVConfig
from .errors import InputError
from .store import PrefixStore

ModelName = Annotated[
    str | None, typer.Option("--model", help="Name or path of a causal LM.", show_default="SmolLM2-135M-Instruct")
]


@app.command()
@messages_instead_of_tracebacks
def warm(
    store: StorePath,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Text files.", show_default=False)],
    model: ModelName = None,
    chunk_size: Annotated[int, typer.Option(help="Tokens per chunk.")] = 16,
) -> None:
    """Compute the KV cache of text files, each a prefix of its own, and store it.

    The prefix is the tokenizer's encoding of the file, special tokens included.
    """
    from eval.models import load_model

    loaded, tokenizer = load_model(model)
    with PrefixStore(store) as opened:
        for file in files:
            ids = tokenizer(file.read_text(encoding="utf-8"), return_tensors="pt", verbose=False)["input_ids"]
            limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
            if limit is not None and ids.shape[1] > limit:
                raise InputError(f"{file} has {ids.shape[1]} tokens, more than the {limit} that the model can place")
            started = time.perf_counter()
            config = ContiguousKVConfig(chunk_size=chunk_size)
            with ContiguousKVCache(loaded, ids, store=opened, config=config) as cache:
                stats = cache.stats
            typer.echo(
                f"{file}: {stats.prefix_tokens:,} tokens, {stats.tokens_from_store:,} were stored, "
                f"{stats.tokens_prefilled:,} computed in {time.perf_counter() - started:.1f} s"
            )
        typer.echo(f"{opened.path}: {human_bytes(opened.stats.disk_bytes)}")


@app.command()
@messages_instead_of_tracebacks
def bench(
    model: ModelName = None,
    prefix_tokens: Annotated[int, typer.Option(help="Tokens of the stored prefix.")] = 8128,
    suffix_tokens: Annotated[int, typer.Option(help="Tokens of each request.")] = 32,
    budget: Annotated[float, typer.Option(help="Share of chunks, for the published method and ours.")] = 0.05,
    rounds: Annotated[int, typer.Option(help="Measured requests of each system.")] = 9,
    folder: Annotated[Path | None, typer.Option(help="Where to put the temporary store.")] = None,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers here.")] = None,
) -> None:
    """Measure time to first token, cold, every system interleaved in this one process."""
    try:
        from eval.bench import main
    except ImportError as error:
        raise InputError(f"bench needs the extra 'eval' (pip install 'hf-contiguouskv[eval]'): {error}") from error

    main(model, prefix_tokens, suffix_tokens, budget, rounds, folder, json_path)
