"""One machine reads a document, another one answers from what it stored. Each is a process with a folder of its own.

The shared store is a folder by default; give `s3://bucket/folder`, `gs://...` or `az://...` with credentials in the
environment for a real one. Needs the extra `object`:

    python examples/two_machines.py --doc notes.txt --question 'Who wrote this?'
    python examples/two_machines.py --store s3://bucket/folder
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from eval.documents import reference_text
from eval.dtypes import DtypeOption
from eval.models import load_model
from eval.timing import time_to_first_token
from hf_contiguouskv import ContiguousKVCache, PrefixStore


def prompt_of(tokenizer: Any, text: str, question: str, tokens: int) -> tuple[Any, Any]:
    """Token ids of the document, `[n]`, and of document and question, `[1, n + m]`."""
    document = tokenizer(text[: 8 * tokens], return_tensors="pt", verbose=False)["input_ids"][0, :tokens]
    asked = tokenizer(f"\n\nQuestion: {question}\nAnswer:", return_tensors="pt")["input_ids"]
    import torch

    return document, torch.cat([document.unsqueeze(0), asked], dim=1)


def store_document(address: str, folder: Path, text: str, tokens: int, model_name: str | None, dtype: str) -> None:
    """What the first machine does."""
    model, tokenizer = load_model(model_name, dtype=dtype)
    document, _ = prompt_of(tokenizer, text, "", tokens)
    with PrefixStore(address, cache=folder) as store:
        began = time.perf_counter()
        ContiguousKVCache(model, document, store=store).close()
        computed = time.perf_counter() - began
        store.flush()
        sent = store.stats.remote
        print(
            f"machine one: {len(document):,} tokens computed and stored in {computed:.1f} s; "
            f"{sent['published']} segments sent, {sent['published_by_others']} were there"
        )


def answer(
    address: str, folder: Path, text: str, question: str, tokens: int, model_name: str | None, dtype: str
) -> None:
    """What the second machine does: it has never seen the document."""
    model, tokenizer = load_model(model_name, dtype=dtype)
    document, ids = prompt_of(tokenizer, text, question, tokens)
    with PrefixStore(address, cache=folder) as store:
        seconds, _, cache = time_to_first_token(
            model, ids, lambda: ContiguousKVCache(model, document, store=store), max_new_tokens=12
        )
        counts = store.stats.remote
        print(
            f"machine two: {cache.stats.tokens_from_store:,} tokens found, {cache.stats.tokens_prefilled} computed, "
            f"{counts['bytes_read'] / 1e6:.1f} MB read over the network; 12 new tokens after {seconds:.2f} s"
        )
        cache.close()


def main(
    store: Annotated[str | None, typer.Option(help="Address of the shared store; default: a temporary folder.")] = None,
    doc: Annotated[Path | None, typer.Option(help="Text file; default: Python's language reference.")] = None,
    question: Annotated[str, typer.Option(help="About the document.")] = "What is this about?",
    tokens: Annotated[int, typer.Option(help="Of the document.")] = 2048,
    model_name: Annotated[str | None, typer.Option("--model", help="Name or folder; default: SmolLM2-135M.")] = None,
    dtype: DtypeOption = "auto",
) -> None:
    """One machine stores, the other answers."""
    text = reference_text() if doc is None else doc.read_text(encoding="utf-8")
    context = multiprocessing.get_context("spawn")  # (A forked process could not talk to the engine.)
    with tempfile.TemporaryDirectory() as folder:
        address = store or f"file://{folder}/shared"
        for target, arguments in (
            (store_document, (address, Path(folder, "one"), text, tokens, model_name, dtype)),
            (answer, (address, Path(folder, "two"), text, question, tokens, model_name, dtype)),
        ):
            process = context.Process(target=target, args=arguments)
            process.start()
            process.join()
            if process.exitcode:
                raise typer.Exit(process.exitcode)


if __name__ == "__main__":
    typer.run(main)
