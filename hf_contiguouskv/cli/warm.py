"""`contiguouskv warm`: compute the KV of documents and store it, ahead of time."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import typer
from tqdm import tqdm

from ..cache.contiguous_cache import ContiguousKVCache
from ..config import ContiguousKVConfig, IndexBits
from ..errors import InputError, StoreError
from ..store import PrefixStore
from ..wording import escaped, quoted
from .app import AsJson, CacheFolder, StorePath, app, open_store
from .messages import complain, described, messages_instead_of_tracebacks
from .output import human_bytes, print_json, say

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


@dataclass(frozen=True)
class WarmedFile:
    """A file whose KV is in the store now.

    Attributes:
        file: its path.
        tokens: of all of it.
        tokens_from_store: how many of them were stored before.
        tokens_computed: how many were not.
        seconds: to compute and store them.
    """

    file: str
    tokens: int
    tokens_from_store: int
    tokens_computed: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.tokens:,} tokens, {self.tokens_from_store:,} were stored, "
            f"{self.tokens_computed:,} computed in {self.seconds:.1f} s"
        )


@app.command()
@messages_instead_of_tracebacks
def warm(
    store: StorePath,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Text files.", show_default=False)],
    model: Annotated[str, typer.Option(help="Name or path of a causal LM.")] = DEFAULT_MODEL,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Of model and KV; only a model of the same dtype finds them. auto: as the model was saved."),
    ] = "auto",
    chunk_size: Annotated[int, typer.Option(help="Tokens per chunk.")] = 16,
    index_bits: Annotated[
        int, typer.Option(metavar="8|2", help="Bits per number of the key index (see ContiguousKVConfig).")
    ] = 8,
    layers_per_group: Annotated[
        int, typer.Option(help="Layers whose exact chunks lie side by side (see ContiguousKVConfig).")
    ] = 1,
    cache: CacheFolder = None,
    as_json: AsJson = False,
) -> None:
    """Compute the KV cache of text files, each a prefix of its own, and store it.

    The prefix is the tokenizer's encoding of the file: special tokens included, line ends as they are. A file that is
    missing, empty, not UTF-8 or too long is reported, the others are stored, and the exit status is 1.
    """
    config = ContiguousKVConfig(
        chunk_size=chunk_size, index_bits=cast(IndexBits, index_bits), layers_per_group=layers_per_group
    )
    texts, refused = _read(files)  # Before the model, which takes longer to load.
    found: dict[str, Any] = {"files": []}
    if texts:
        loaded, tokenizer = load_model(model, dtype)
        found["dtype"] = str(loaded.dtype).removeprefix("torch.")
        # One file has a bar of its own. (None: a bar only where stderr is a terminal.)
        no_bar = True if len(texts) == 1 else None
        with open_store(store, cache) as opened, tqdm(total=len(texts), unit="file", disable=no_bar) as bar:
            for file, text in texts.items():
                try:
                    ids = _ids_of(file, text, loaded, tokenizer)
                except InputError as error:
                    refused[file] = error
                else:
                    warmed = _store(file, ids, loaded, opened, config)
                    found["files"].append(asdict(warmed))
                    if not as_json:
                        bar.write(escaped(str(warmed)), file=sys.stdout)
                bar.update()
            numbers = opened.stats
        for name in ("segment_bytes", "disk_bytes", "write_failures"):
            found[name] = getattr(numbers, name)
        if not as_json:
            own = " (the model's own)" if dtype == "auto" else ""
            say(f"{opened.path}: {human_bytes(numbers.disk_bytes)}, KV in {found['dtype']}{own}")
    failure = None
    if found.get("write_failures"):
        failure = StoreError(f"{found['write_failures']} of {len(found['files'])} could not be stored")
        found["error"] = described(failure)
    if as_json:
        failed = [{"file": str(file), "error": described(error)} for file, error in refused.items()]
        print_json(found | {"failed": failed})
    for problem in [*refused.values(), *([failure] if failure else [])]:
        complain(problem)
    if failure or refused:
        raise typer.Exit(2 if failure else 1)


def _read(files: list[Path]) -> tuple[dict[Path, str], dict[Path, Exception]]:
    """The texts of files, each once, and what is wrong with those that have none."""
    texts: dict[Path, str] = {}
    refused: dict[Path, Exception] = {}
    for file in dict.fromkeys(files):
        try:
            # As bytes: reading text would make one line end of all kinds, and the ids would be those of another text.
            texts[file] = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            refused[file] = InputError(f"{file} is not UTF-8 text: {error}")
        except OSError as error:
            refused[file] = error
        else:
            if not texts[file]:
                del texts[file]
                refused[file] = InputError(f"{file} is empty")
    return texts, refused


def _ids_of(file: Path, text: str, model: Any, tokenizer: Any) -> torch.Tensor:
    """The token ids of a text, int64 `(1, n)`.

    Raises:
        InputError: there are none, or more than the model can take.
    """
    ids: torch.Tensor = tokenizer(text, return_tensors="pt", verbose=False)["input_ids"]
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and ids.shape[1] > limit:
        raise InputError(f"{file} has {ids.shape[1]} tokens, more than the {limit} that the model can place")
    if not ids.shape[1]:
        raise InputError(f"{file} has no tokens")
    return ids


def _store(file: Path, ids: torch.Tensor, model: Any, store: PrefixStore, config: ContiguousKVConfig) -> WarmedFile:
    started = time.perf_counter()
    with ContiguousKVCache(model, ids, store=store, config=config) as cache:
        stats = cache.stats
    seconds = time.perf_counter() - started
    return WarmedFile(str(file), stats.prefix_tokens, stats.tokens_from_store, stats.tokens_prefilled, seconds)


def load_model(name: str, dtype: Dtype) -> tuple[Any, Any]:
    """The model in evaluation mode, and its tokenizer; for `"auto"` in the dtype that `from_pretrained(name)` gives."""
    from transformers import AutoModelForCausalLM, AutoTokenizer  # (Slow to import; the other commands do without.)

    try:
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype if dtype == "auto" else getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:  # (ValueError: a folder with a configuration of no known model.)
        reason = " ".join(str(error).split())
        raise InputError(
            f"cannot load the model {quoted(name)}: {reason}; give --model a folder that `save_pretrained` wrote, or "
            "a Hub name that is reachable or already downloaded"
        ) from error
    return model.eval(), tokenizer
