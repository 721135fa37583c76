"""Commands that need a model: fill a store with documents, and measure."""

from __future__ import annotations

import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from tqdm import tqdm

from ..cache.contiguous_cache import ContiguousKVCache
from ..config import ContiguousKVConfig
from ..errors import InputError, StoreError
from ..store import PrefixStore
from ..wording import escaped
from .app import AsJson, StorePath, app, complain, described, messages_instead_of_tracebacks, open_store
from .output import human_bytes, print_json, say

Dtype = Literal["auto", "bfloat16", "float16", "float32"]
ModelName = Annotated[
    str | None, typer.Option("--model", help="Name or path of a causal LM.", show_default="SmolLM2-135M-Instruct")
]


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
    model: ModelName = None,
    dtype: Annotated[
        Dtype,
        typer.Option(help="Of model and KV; only a model of the same dtype finds them. auto: as the model was saved."),
    ] = "auto",
    chunk_size: Annotated[int, typer.Option(help="Tokens per chunk.")] = 16,
    as_json: AsJson = False,
) -> None:
    """Compute the KV cache of text files, each a prefix of its own, and store it.

    The prefix is the tokenizer's encoding of the file: special tokens included, line ends as they are. A file that is
    missing, empty, not UTF-8 or too long is reported, the others are stored, and the exit status is 1.
    """
    config = ContiguousKVConfig(chunk_size=chunk_size)
    texts, refused = _read(files)  # Before the model, which takes longer to load.
    found: dict[str, Any] = {"files": []}
    if texts:
        loaded, tokenizer = _load_model(model, dtype)
        found["dtype"] = str(loaded.dtype).removeprefix("torch.")
        # One file has a bar of its own. (None: a bar only where stderr is a terminal.)
        no_bar = True if len(texts) == 1 else None
        with open_store(store) as opened, tqdm(total=len(texts), unit="file", disable=no_bar) as bar:
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


def _load_model(name: str | None, dtype: Dtype) -> tuple[Any, Any]:
    """The model and its tokenizer; for `"auto"` in the dtype that `from_pretrained(name)` gives everybody."""
    try:
        from eval.models import ModelNotAvailableError, load_model
    except ImportError as error:
        raise InputError(f"warm needs the package 'eval' of this project beside the library: {error}") from error
    try:
        return load_model(name, dtype="own" if dtype == "auto" else dtype)
    except ModelNotAvailableError as error:
        raise InputError(" ".join(str(error).split())) from error


@app.command()
@messages_instead_of_tracebacks
def bench(
    model: ModelName = None,
    dtype: Annotated[Dtype, typer.Option(help="Of model and KV; auto: what is fast on this machine.")] = "auto",
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
        from eval.models import ModelNotAvailableError
    except ImportError as error:
        raise InputError(f"bench needs the extra 'eval' (pip install 'hf-contiguouskv[eval]'): {error}") from error
    try:
        main(model, prefix_tokens, suffix_tokens, budget, rounds, folder, json_path, dtype)
    except ModelNotAvailableError as error:
        raise InputError(" ".join(str(error).split())) from error
