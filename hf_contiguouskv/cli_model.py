"""Commands that need a model: fill a store with documents, and measure."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from tqdm import tqdm

from .cache import ContiguousKVCache
from .cli_app import AsJson, StorePath, app, messages_instead_of_tracebacks
from .cli_output import human_bytes, print_json
from .config import ContiguousKVConfig
from .errors import InputError, StoreError
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
    as_json: AsJson = False,
) -> None:
    """Compute the KV cache of text files, each a prefix of its own, and store it.

    The prefix is the tokenizer's encoding of the file, special tokens included.
    """
    config = ContiguousKVConfig(chunk_size=chunk_size)
    texts = {file: _text_of(file) for file in files}  # Before the model, which takes longer to load.
    loaded, tokenizer = _load_model(model)
    limit = getattr(loaded.config.get_text_config(), "max_position_embeddings", None)
    done: list[dict[str, Any]] = []
    one_shows_its_own = True if len(texts) == 1 else None  # (None: only where stderr is a terminal.)
    with PrefixStore(store) as opened, tqdm(total=len(texts), unit="file", disable=one_shows_its_own) as bar:
        for file, text in texts.items():
            ids = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
            if limit is not None and ids.shape[1] > limit:
                raise InputError(f"{file} has {ids.shape[1]} tokens, more than the {limit} that the model can place")
            started = time.perf_counter()
            with ContiguousKVCache(loaded, ids, store=opened, config=config) as cache:
                stats = cache.stats
            seconds = time.perf_counter() - started
            done.append(
                {
                    "file": str(file),
                    "tokens": stats.prefix_tokens,
                    "tokens_from_store": stats.tokens_from_store,
                    "tokens_computed": stats.tokens_prefilled,
                    "seconds": seconds,
                }
            )
            if not as_json:
                bar.write(
                    f"{file}: {stats.prefix_tokens:,} tokens, {stats.tokens_from_store:,} were stored, "
                    f"{stats.tokens_prefilled:,} computed in {seconds:.1f} s",
                    file=sys.stdout,
                )
            bar.update()
        numbers = opened.stats
    if as_json:
        print_json(
            {
                "files": done,
                "segment_bytes": numbers.segment_bytes,
                "disk_bytes": numbers.disk_bytes,
                "write_failures": numbers.write_failures,
            }
        )
    else:
        typer.echo(f"{opened.path}: {human_bytes(numbers.disk_bytes)}")
    if numbers.write_failures:
        raise StoreError(f"{numbers.write_failures} of {len(done)} could not be stored")


def _text_of(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text: {error}") from None
    if not text:
        raise InputError(f"{file} is empty")
    return text


def _load_model(name: str | None) -> tuple[Any, Any]:
    try:
        from eval.models import ModelNotAvailableError, load_model
    except ImportError as error:
        raise InputError(f"warm needs the package 'eval' of this project beside the library: {error}") from error
    try:
        return load_model(name)
    except ModelNotAvailableError as error:
        raise InputError(str(error)) from error


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
