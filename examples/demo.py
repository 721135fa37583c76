"""One document, three questions, four ways to the first token.

Step 1 computes the KV cache of a document once and stores it. Step 2 runs in a new process with a cold page cache. It
answers questions about the document by recomputing it (for one question only, because that is slow), by exact
re-prefill from the store, by the published method, and by this library's default, and prints each time to first token.

    make demo                            # Python's own language reference, SmolLM2-135M-Instruct
    make demo DOC=notes.txt MODEL=...    # your document, your model
    python examples/demo.py --help
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from demo_report import Answer, Question, print_report, write_json
from rich.console import Console

CONSOLE = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
DEFAULT_STORE = Path(__file__).resolve().parent.parent / ".cache" / "demo-store"
CHUNK = 16
RECOMPUTE = "recompute"
# (A copy of `eval.dtypes.DtypeOption`. That module imports torch, and `--help` should not wait for it.)
DtypeOption = Annotated[
    Literal["auto", "bfloat16", "float16", "float32"],
    typer.Option("--dtype", help="Dtype of model and KV; auto: the fastest on this machine."),
]

# Sections of the language reference, shortest facts first, so that a short document also holds some.
TOPICS = """
    pass del bltin-null-object lambda assert power while truth global nonlocal booleans imaginary shifting continue
    break return bltin-ellipsis-object integers floating numbers unary bitwise for if in lists yield raise with try
    import context-managers async exceptions dict function class
"""
INSTRUCTION = "Read this document, then answer the question below with a sentence from it.\n\n"
QUESTIONS = (
    Question(
        "How tightly does the power operator bind?", "The power operator binds more tightly than", "unary operators"
    ),
    Question("What are lambda expressions used for?", "Lambda expressions are used to", "create anonymous functions"),
    Question("What is a global statement?", 'The "global" statement is a declaration which', "holds for the entire"),
)
SHORT_QUESTIONS = (
    Question("What does the document say about the pass statement?", '"pass" is a null operation', "nothing happens"),
)
QUESTIONS_FOR_ANY_DOCUMENT = (
    Question("What is this document about?", "This document is about"),
    Question("What does the document say first?", "The document begins with"),
    Question("How does the document end?", "The document ends with"),
)


@dataclass(frozen=True)
class Prompts:
    """Token ids: `prefix` is the beginning of the chat template and the document; each prompt is prefix + question."""

    prefix: Any
    questions: list[Any]
    document_tokens: int
    cut: bool


def read_document(doc: Path | None) -> str:
    """The text of `doc`, or topics of Python's own language reference."""
    if doc is not None:
        return doc.read_text(encoding="utf-8", errors="replace").strip()
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in TOPICS.split() if name in topics)


def build_prompts(tokenizer: Any, document: str, questions: tuple[Question, ...], limit: int) -> Prompts:
    """Tokenise the parts once and join their ids, because tokenising the joined text could merge tokens at a
    boundary."""
    import torch

    def encode(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    seam = "<<the document goes here>>"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": INSTRUCTION + seam}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    else:
        text = f"{tokenizer.bos_token or ''}{INSTRUCTION}{seam}\nAnswer: "
    before, _, after = text.partition(seam)
    head, body = encode(before), encode(document)
    room = (limit - len(head)) // CHUNK * CHUNK - len(head) % CHUNK
    cut = len(body) > room
    prefix = head + (body[:room] if cut else body)
    tails = [encode(f"\n\nQuestion: {question.text}{after}{question.begins}") for question in questions]
    return Prompts(torch.tensor([prefix]), [torch.tensor([prefix + tail]) for tail in tails], len(prefix), cut)


@dataclass(frozen=True)
class Job:
    """Settings that both steps share."""

    doc: Path | None
    model: str | None
    dtype: str
    store: Path
    short: bool
    questions: tuple[Question, ...]

    @property
    def new_tokens(self) -> int:
        return 8 if self.short else 20

    def load(self) -> tuple[Any, Any, Prompts]:
        """The model, its tokenizer, and the prompts; equal in both processes."""
        from eval.models import load_model

        model, tokenizer = load_model(self.model, dtype=self.dtype)
        context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 8192))
        limit = 1024 if self.short else min(context, 8192) - 128 - self.new_tokens
        return model, tokenizer, build_prompts(tokenizer, read_document(self.doc), self.questions, limit)


def prepare(job: Job) -> str:
    """Step 1: compute the KV cache of the document and store it, unless it is already stored.

    Returns:
        The name of the model's dtype.
    """
    from eval.dtypes import dtype_name
    from eval.estimate import Pace, about
    from hf_contiguouskv import ContiguousKVCache, PrefixStore

    CONSOLE.print("[bold]1. Prepare[/bold]: compute the document's KV cache once, and store it")
    model, _, prompts = job.load()
    CONSOLE.print(f"   model     {model.source}", soft_wrap=True)
    CONSOLE.print(f"   runs in   {model.runs_in}", soft_wrap=True)
    CONSOLE.print(
        f"   document  {job.doc or 'the language reference in pydoc_data.topics'}: {prompts.document_tokens:,} tokens"
        + (", cut to fit" if prompts.cut else "")
    )
    with PrefixStore(job.store) as store:
        stored = store.match(model, prompts.prefix)
        if stored == prompts.document_tokens:
            CONSOLE.print(f"   store     all {stored:,} tokens were stored by an earlier run: nothing to compute")
            return dtype_name(model.dtype)
        missing = prompts.document_tokens - stored
        estimate = Pace.of(model, prompts.prefix).forward_s(missing, stored)
        CONSOLE.print(f"   compute   {missing:,} tokens, {about(estimate)}")
        start = time.perf_counter()
        ContiguousKVCache(model, prompts.prefix, store=store).close()
    size = sum(path.stat().st_size for path in segments(job.store))
    CONSOLE.print(
        f"   store     {missing:,} tokens computed and stored in {time.perf_counter() - start:.1f} s; "
        f"{size / 2**20:.0f} MiB in {job.store}"
    )
    return dtype_name(model.dtype)


def segments(store: Path) -> list[Path]:
    """The files that hold KV."""
    return sorted(store.rglob("*.safetensors"))


def make_cold(store: Path) -> tuple[int, int]:
    """Drop the store's files from the page cache; returns `(pages still resident, pages in all)` of the KV files."""
    from eval.timing import drop_page_cache, resident_pages

    drop_page_cache(path for path in store.rglob("*") if path.is_file() and not path.name.endswith("-shm"))
    page = os.sysconf("SC_PAGE_SIZE")
    files = segments(store)
    return sum(map(resident_pages, files)), sum(-(-path.stat().st_size // page) for path in files)


@dataclass(frozen=True)
class Step:
    """One request of step 2: its system, its question, whether it counts, and its estimated seconds."""

    system: str
    question: int
    counts: bool
    seconds: float


def steps(job: Job, systems: list[str], prompts: Prompts, pace: Any) -> list[Step]:
    """The requests, with systems in turn. `RECOMPUTE` gets only one question: on a slow machine it takes minutes."""
    from eval.timing import interleave

    document = prompts.document_tokens
    suffix = max(ids.shape[1] for ids in prompts.questions) - document
    first = {name: pace.forward_s(suffix, document) for name in systems}
    first[RECOMPUTE] = pace.forward_s(document + suffix)
    # The first call of a kernel is slow, so each system has one uncounted request. (`pace` has warmed up `RECOMPUTE`.)
    found = [Step(name, 0, False, first[name]) for name in systems if name != RECOMPUTE]
    for number, name in interleave(systems, len(job.questions)):
        if name != RECOMPUTE or number == 0:
            found.append(Step(name, number, True, first[name] + pace.answer_s(job.new_tokens)))
    return found


def ask(job: Job, json_path: Path | None) -> None:
    """Step 2: answer the questions with every system, each request cold, and print the times."""
    import torch
    from tqdm import tqdm

    from eval.dtypes import dtype_name
    from eval.estimate import Pace, about
    from eval.timing import machine
    from hf_contiguouskv import ContiguousKVConfig

    CONSOLE.print("\n[bold]2. Ask[/bold], in a new process: every request opens the store again, with cold files")
    model, tokenizer, prompts = job.load()
    systems: dict[str, ContiguousKVConfig | None] = {
        RECOMPUTE: None,
        "exact re-prefill": ContiguousKVConfig(budget=1.0),
        "published method, 5%": ContiguousKVConfig.paper(0.05),
        "our default, 25%": ContiguousKVConfig(),
    }
    plan = steps(job, list(systems), prompts, Pace.of(model, prompts.prefix))
    expected_s = sum(step.seconds for step in plan)
    once_s = next(step.seconds for step in plan if step.system == RECOMPUTE)
    CONSOLE.print(
        f"   {len(plan)} requests, {about(expected_s)}: {about(once_s)} to recompute the document for one question, "
        "the rest for\n   requests that find it stored"
    )
    answers: list[Answer] = []
    resident: list[int] = []
    pages = 0
    shown = "   {desc:<22} {percentage:3.0f}%|{bar:30}| {elapsed} of " + about(expected_s)
    with torch.inference_mode(), tqdm(total=expected_s, bar_format=shown, leave=False) as bar:
        for number, step in enumerate(plan):
            bar.set_description_str(step.system)
            still, pages = make_cold(job.store)
            # The one slow request moves the bar with each layer.
            layers = model.config.get_text_config().num_hidden_layers
            answer = answer_question(
                model, tokenizer, job, prompts, step, systems[step.system], partial(bar.update, step.seconds / layers)
            )
            bar.update(sum(one.seconds for one in plan[: number + 1]) - bar.n)
            if step.counts:
                resident.append(still)
                answers.append(answer)
    print_report(CONSOLE, job.questions, list(systems), answers)
    CONSOLE.print(
        f"   Cold: at most {max(resident)} of {pages:,} pages of the stored KV were in the page cache before\n"
        "   a request (mincore, after posix_fadvise); the library also reads with O_DIRECT."
    )
    facts = machine()
    CONSOLE.print(
        f"   Machine: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; {dtype_name(model.dtype)}; "
        f"torch {facts['torch']}, transformers {facts['transformers']}."
    )
    if json_path is not None:
        about_run = {
            "machine": facts,
            "model": model.source,
            "dtype": dtype_name(model.dtype),
            "prefix_tokens": prompts.document_tokens,
            "resident_pages_before_requests": max(resident),
            "pages": pages,
        }
        write_json(json_path, job.questions, list(systems), answers, about_run)
        CONSOLE.print(f"   Numbers written to {json_path}.")


def answer_question(
    model: Any, tokenizer: Any, job: Job, prompts: Prompts, step: Step, config: Any, layer_done: Callable[[], Any]
) -> Answer:
    """One request: time its first token, then let it finish its sentence if it counts.

    Args:
        config: the cache's configuration; `None` recomputes the document.
        layer_done: called after each recomputed layer of the document.
    """
    import torch
    from transformers import DynamicCache

    from eval.timing import time_to_first_token
    from hf_contiguouskv import ContiguousKVCache, PrefixStore

    class Watched(DynamicCache):
        """Calls `layer_done` after each layer of a prompt."""

        def update(self, keys: Any, *arguments: Any, **options: Any) -> Any:
            found = super().update(keys, *arguments, **options)
            if keys.shape[-2] > 1:
                layer_done()
            return found

    stores: list[PrefixStore] = []

    def from_store() -> Any:
        stores.append(PrefixStore(job.store))  # a new store has nothing in memory
        return ContiguousKVCache(model, prompts.prefix, store=stores[0], config=config)

    def from_nothing() -> Any:
        return Watched(config=model.config)

    make_cache: Callable[[], Any] = from_nothing if config is None else from_store
    ids = prompts.questions[step.question]
    seconds, first, cache = time_to_first_token(model, ids, make_cache)
    try:
        answer = Answer(step.system, job.questions[step.question].text, seconds, "")
        if config is not None:
            stats = cache.stats
            answer.bytes_read, answer.read_amplification = stats.bytes_read, stats.read_amplification
            answer.chunks_used, answer.chunks_total = max(stats.chunks_used, default=0), stats.chunks_total
            answer.hits = dict(stats.hits)
        if step.counts:
            longer = torch.cat([ids, torch.tensor([[first]])], dim=1).to(model.device)
            # (transformers before 5.24 calls the argument `past_key_values`.)
            output = model.generate(
                longer,
                attention_mask=torch.ones_like(longer),
                cache=cache,
                max_new_tokens=job.new_tokens - 1,
                do_sample=False,
            )
            text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
            answer.text = " ".join(text.split())
        return answer
    finally:
        if config is not None:
            cache.close()
        for store in stores:
            store.close()


def main(
    doc: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Any text file.")] = None,
    model: Annotated[str | None, typer.Option(help="A Hub name or a folder; default SmolLM2-135M-Instruct.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Question to ask instead (may be repeated).")] = None,
    store: Annotated[Path, typer.Option(help="The store's folder.")] = DEFAULT_STORE,
    short: Annotated[
        bool, typer.Option("--short", help="A short document and one question, for a quick check.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    dtype: DtypeOption = "auto",
    step: Annotated[str, typer.Option(hidden=True)] = "prepare",
) -> None:
    """Store a document's KV cache, then answer questions about it from a new process, cold."""
    if question:
        questions = tuple(Question(text) for text in question)
    elif doc is not None:
        questions = QUESTIONS_FOR_ANY_DOCUMENT[:1] if short else QUESTIONS_FOR_ANY_DOCUMENT
    else:
        questions = SHORT_QUESTIONS if short else QUESTIONS
    job = Job(doc, model, dtype, store, short, questions)
    if step == "ask":
        ask(job, json_path)
        return
    runs_in = prepare(job)
    sys.stdout.flush()
    # Replace this process by a new program, so that nothing stays in memory. Both steps use the same dtype.
    os.execv(sys.executable, [sys.executable, __file__, *sys.argv[1:], "--step", "ask", "--dtype", runs_in])


if __name__ == "__main__":
    typer.run(main)
