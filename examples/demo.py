"""One document, three questions, four ways to the first token.

Step 1, in a process of its own, computes the KV cache of a document once and stores it. Step 2, in a new process and
with a cold page cache, answers questions about the document by recomputing it, by exact re-prefill from the store, by
the published method, and by this library's default, and prints how long each took to its first token.

    make demo                            # Python's own language reference, SmolLM2-135M-Instruct
    make demo DOC=notes.txt MODEL=...    # your document, your model
    python examples/demo.py --help
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

CONSOLE = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
DEFAULT_STORE = Path(__file__).resolve().parent.parent / ".cache" / "demo-store"
CHUNK = 16

# Sections of the language reference, shortest facts first, so that a short document holds some too.
TOPICS = """
    pass del bltin-null-object lambda assert power while truth global nonlocal booleans imaginary shifting continue
    break return bltin-ellipsis-object integers floating numbers unary bitwise for if in lists yield raise with try
    import context-managers async exceptions dict function class
"""
INSTRUCTION = "Read this document, then answer the question below with a sentence from it.\n\n"


@dataclass(frozen=True)
class Question:
    """A question, how the answer begins (small models need the hint), and words that a good answer contains."""

    text: str
    begins: str = ""
    expected: str = ""


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


@dataclass
class Answer:
    """What one system did with one question."""

    system: str
    question: str
    ttft_s: float
    text: str
    bytes_read: int = 0
    read_amplification: float = 0.0
    chunks_used: int = 0
    chunks_total: int = 0
    hits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Prompts:
    """Token ids: `prefix` is the chat template's beginning and the document; every prompt is prefix + question."""

    prefix: Any
    questions: list[Any]
    document_tokens: int
    cut: bool


def load(model_name: str | None) -> tuple[Any, Any]:
    """The model and its tokenizer (imported here, because the parent process needs neither)."""
    from eval.models import load_model

    return load_model(model_name)


def read_document(doc: Path | None) -> str:
    """The text of `doc`, or topics of Python's own language reference."""
    if doc is not None:
        return doc.read_text(encoding="utf-8", errors="replace").strip()
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name].strip() for name in TOPICS.split() if name in topics)


def build_prompts(tokenizer: Any, document: str, questions: tuple[Question, ...], limit: int) -> Prompts:
    """Tokenise the parts once, and join ids: tokenising the joined text again could merge tokens at the seam."""
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
    """What both processes agree on."""

    doc: Path | None
    model: str | None
    store: Path
    short: bool
    questions: tuple[Question, ...]

    @property
    def new_tokens(self) -> int:
        return 8 if self.short else 20

    def prompts(self, model: Any, tokenizer: Any) -> Prompts:
        """The same ids in both processes."""
        context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 8192))
        limit = min(context, 8192) - 128 - self.new_tokens
        return build_prompts(tokenizer, read_document(self.doc), self.questions, 1024 if self.short else limit)


def prepare(job: Job) -> None:
    """Step 1: compute the KV cache of the document and store it, unless it is stored already."""
    from hf_contiguouskv import ContiguousKVCache, PrefixStore

    CONSOLE.print("[bold]1. Prepare[/bold]: compute the document's KV cache once, and store it")
    model, tokenizer = load(job.model)
    prompts = job.prompts(model, tokenizer)
    CONSOLE.print(f"   model     {model.source}", soft_wrap=True)
    CONSOLE.print(f"   runs in   {str(model.dtype).removeprefix('torch.')} on {model.device}")
    CONSOLE.print(
        f"   document  {job.doc or 'the language reference in pydoc_data.topics'}: {prompts.document_tokens:,} tokens"
        + (", cut to fit" if prompts.cut else "")
    )
    with PrefixStore(job.store) as store:
        stored = store.match(model, prompts.prefix)
        if stored == prompts.document_tokens:
            CONSOLE.print(f"   store     all {stored:,} tokens were stored by an earlier run: nothing to compute")
            return
        start = time.perf_counter()
        ContiguousKVCache(model, prompts.prefix, store=store).close()
    size = sum(path.stat().st_size for path in segments(job.store))
    CONSOLE.print(
        f"   store     {prompts.document_tokens - stored:,} tokens computed and stored in "
        f"{time.perf_counter() - start:.1f} s; {size / 2**20:.0f} MiB in {job.store}"
    )


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


def ask(job: Job, json_path: Path | None) -> None:
    """Step 2: answer the questions with every system, each request cold, and print what it took."""
    import torch
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from eval.timing import interleave, machine
    from hf_contiguouskv import ContiguousKVConfig

    CONSOLE.print(
        "\n[bold]2. Ask[/bold], in a new process: every request opens the store anew and finds its files cold"
    )
    model, tokenizer = load(job.model)
    prompts = job.prompts(model, tokenizer)
    systems: dict[str, ContiguousKVConfig | None] = {
        "recompute": None,
        "exact re-prefill": ContiguousKVConfig(budget=1.0),
        "published method, 5%": ContiguousKVConfig.paper(0.05),
        "our default, 25%": ContiguousKVConfig(),
    }
    plan = [(name, 0, True) for name in systems]  # the first call of a kernel is slow: one request each is not counted
    plan += [(name, number, False) for number, name in interleave(list(systems), len(job.questions))]
    answers: list[Answer] = []
    resident: list[int] = []
    pages = 0
    columns = (TextColumn("   {task.description:<24}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with torch.inference_mode(), Progress(*columns, console=CONSOLE, transient=True) as progress:
        task = progress.add_task("", total=len(plan))
        for name, number, warm_up in plan:
            progress.update(task, description=name)
            still, pages = make_cold(job.store)
            answer = answer_question(model, tokenizer, job, prompts, name, systems[name], number)
            if not warm_up:
                resident.append(still)
                answers.append(answer)
            progress.advance(task)
    report(job, list(systems), answers)
    CONSOLE.print(
        f"   Cold: at most {max(resident)} of {pages:,} pages of the stored KV were in the page cache before\n"
        "   a request (mincore, after posix_fadvise); the library reads with O_DIRECT besides."
    )
    facts = machine()
    CONSOLE.print(
        f"   Machine: {facts['cpu']}, {facts['cores']} cores, {facts['memory_gib']} GiB; torch {facts['torch']}, "
        f"transformers {facts['transformers']}."
    )
    if json_path is not None:
        write_json(json_path, job, model, prompts, list(systems), answers, max(resident), pages, facts)
        CONSOLE.print(f"   Numbers written to {json_path}.")


def answer_question(
    model: Any, tokenizer: Any, job: Job, prompts: Prompts, name: str, config: Any, number: int
) -> Answer:
    """One request: time its first token, then let it finish its sentence."""
    import torch
    from transformers import DynamicCache

    from eval.timing import time_to_first_token
    from hf_contiguouskv import ContiguousKVCache, PrefixStore

    stores: list[PrefixStore] = []

    def from_store() -> Any:
        stores.append(PrefixStore(job.store))  # a new one has nothing in memory
        return ContiguousKVCache(model, prompts.prefix, store=stores[0], config=config)

    def from_nothing() -> Any:
        return DynamicCache(config=model.config)

    make_cache: Callable[[], Any] = from_nothing if config is None else from_store
    ids = prompts.questions[number]
    seconds, first, cache = time_to_first_token(model, ids, make_cache)
    try:
        answer = Answer(name, job.questions[number].text, seconds, "")
        if config is not None:
            stats = cache.stats
            answer.bytes_read, answer.read_amplification = stats.bytes_read, stats.read_amplification
            answer.chunks_used, answer.chunks_total = max(stats.chunks_used, default=0), stats.chunks_total
            answer.hits = dict(stats.hits)
        longer = torch.cat([ids, torch.tensor([[first]])], dim=1).to(model.device)
        output = model.generate(longer, past_key_values=cache, max_new_tokens=job.new_tokens - 1, do_sample=False)
        text: str = tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)
        answer.text = " ".join(text.split())
        return answer
    finally:
        if config is not None:
            cache.close()
        for store in stores:
            store.close()


def summary(names: list[str], answers: list[Answer]) -> dict[str, dict[str, Any]]:
    """Per system: TTFT (median and spread, seconds), speed-up against recompute, and what was read."""
    from eval.timing import median_spread

    rows: dict[str, dict[str, Any]] = {}
    for name in names:
        own = [answer for answer in answers if answer.system == name]
        rows[name] = {
            "ttft_s": median_spread(answer.ttft_s for answer in own).as_dict(),
            "bytes_read": median_spread(answer.bytes_read for answer in own).median,
            "read_amplification": median_spread(answer.read_amplification for answer in own).median,
            "chunks_used": own[0].chunks_used,
            "chunks_total": own[0].chunks_total,
        }
    base = rows[names[0]]["ttft_s"]["median"]
    for row in rows.values():
        row["speedup"] = base / row["ttft_s"]["median"]
    return rows


def report(job: Job, names: list[str], answers: list[Answer]) -> None:
    """The table of times, then the answers."""
    count = len(job.questions)
    table = Table(
        title=f"Time to first token, cold ({'one question' if count == 1 else f'median of {count} questions'})"
    )
    table.add_column("system", no_wrap=True)
    for title in ("TTFT ms", "speed-up", "read MiB", "read ampl.", "chunks"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, row in summary(names, answers).items():
        stored = bool(row["chunks_total"])
        table.add_row(
            name,
            f"{row['ttft_s']['median'] * 1e3:,.0f}",
            f"{row['speedup']:.1f}x",
            f"{row['bytes_read'] / 2**20:.1f}" if stored else "-",
            f"{row['read_amplification']:.2f}" if stored else "-",
            f"{row['chunks_used']} of {row['chunks_total']}" if stored else "-",
        )
    CONSOLE.print()
    CONSOLE.print(table)
    CONSOLE.print("   TTFT: from token ids to the first new id; look-up, opening the store and every read included.\n")
    for question in job.questions:
        CONSOLE.print(f"   [bold]{question.text}[/bold]  {question.begins} ...", markup=True)
        for name in names:
            text = next(a.text for a in answers if a.system == name and a.question == question.text)
            CONSOLE.print(f"     {name:<22}", end="")
            CONSOLE.print(f"... {text}", markup=False, no_wrap=True, overflow="ellipsis")
        if question.expected:
            CONSOLE.print(f"     {'the document':<22}... {question.expected} ...\n", markup=False)
        else:
            CONSOLE.print()


def write_json(
    path: Path,
    job: Job,
    model: Any,
    prompts: Prompts,
    names: list[str],
    answers: list[Answer],
    resident: int,
    pages: int,
    facts: dict[str, Any],
) -> None:
    """Everything that was printed, for programs."""
    found = {question.text: question.expected for question in job.questions if question.expected}
    numbers = {
        "machine": facts,
        "model": model.source,
        "prefix_tokens": prompts.document_tokens,
        "resident_pages_before_requests": resident,
        "pages": pages,
        "systems": summary(names, answers),
        "answers": [
            vars(answer) | {"has_expected_words": found[answer.question] in answer.text}
            if answer.question in found
            else vars(answer)
            for answer in answers
        ],
    }
    path.write_text(json.dumps(numbers, indent=2) + "\n")


def main(
    doc: Annotated[Path | None, typer.Option(exists=True, dir_okay=False, help="Any text file.")] = None,
    model: Annotated[str | None, typer.Option(help="A Hub name or a folder; default SmolLM2-135M-Instruct.")] = None,
    question: Annotated[list[str] | None, typer.Option(help="Ask this instead (may be repeated).")] = None,
    store: Annotated[Path, typer.Option(help="The store's folder.")] = DEFAULT_STORE,
    short: Annotated[
        bool, typer.Option("--short", help="A short document and one question, for a quick check.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the numbers to this file.")] = None,
    step: Annotated[str, typer.Option(hidden=True)] = "all",
) -> None:
    """Store a document's KV cache, then answer questions about it from a new process, cold."""
    if question:
        questions = tuple(Question(text) for text in question)
    elif doc is not None:
        questions = QUESTIONS_FOR_ANY_DOCUMENT[:1] if short else QUESTIONS_FOR_ANY_DOCUMENT
    else:
        questions = SHORT_QUESTIONS if short else QUESTIONS
    job = Job(doc, model, store, short, questions)
    if step == "prepare":
        prepare(job)
    elif step == "ask":
        ask(job, json_path)
    else:
        for each in ("prepare", "ask"):  # a process each, so that nothing is left in memory
            status = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--step", each], check=False).returncode
            if status:
                raise typer.Exit(status)


if __name__ == "__main__":
    typer.run(main)
