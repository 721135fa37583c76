"""Many questions about one document: in one batch, and one after the other.

All rows of a batch share the document's stored KV; each row reads and uses the chunks that its own question attends to.
Questions differ in length, so rows are padded on the left, as `generate` requires. Both ways open the store again with
cold files. Answers, times and bytes are printed side by side. In float32 both ways give the same answers; bfloat16
rounds batches differently, so a small model may choose other words (with any cache):

    python examples/batch_questions.py notes.txt --question 'Who wrote this?' --question 'When?'
    python examples/batch_questions.py notes.txt --file questions.txt --budget 0.25 --json answers.json
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from demo import CONSOLE, DEFAULT_STORE, Prompts, build_prompts, make_cold, read_document
from demo_report import Question
from rich.table import Table
from transformers.generation.streamers import BaseStreamer

from eval.dtypes import DtypeOption, dtype_name
from eval.models import ModelNotAvailableError, load_model
from eval.timing import interleave, median_spread
from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore
from hf_contiguouskv.errors import ContiguousKVError

BATCH_STORE = DEFAULT_STORE.with_name("batch-store")
DOCUMENT_TOKENS = 7936
BATCH, ALONE = "one batch", "one after the other"


@dataclass(frozen=True)
class Run:
    """All questions answered once.

    Attributes:
        first_token_s: seconds until the first question has its first token; in a batch, all questions have theirs then.
        last_first_token_s: seconds until the last question has its first token.
        seconds: seconds until all answers are complete.
        bytes_read: bytes read from storage, page rounding included.
        answers: the answers, in the order of the questions.
    """

    first_token_s: float
    last_first_token_s: float
    seconds: float
    bytes_read: int
    answers: list[str]


class FirstToken(BaseStreamer):
    """Records when the first new tokens of a `generate` call arrive: `at`, in seconds of `time.perf_counter`."""

    def __init__(self) -> None:
        self.at: float | None = None
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with each row of new tokens."""
        if self._prompt_seen and self.at is None:
            self.at = time.perf_counter()
        self._prompt_seen = True

    def end(self) -> None:
        """Do nothing."""


@dataclass(frozen=True)
class Questioner:
    """Asks questions about a stored document.

    Attributes:
        model, tokenizer: the model that answers, and its tokenizer.
        prompts: the document's ids, and one prompt per question.
        config: decides which chunks an answer uses.
        folder: the store's folder.
        max_new_tokens: limit on new tokens per answer.
    """

    model: Any
    tokenizer: Any
    prompts: Prompts
    config: ContiguousKVConfig
    folder: Path
    max_new_tokens: int

    def run(self, groups: list[list[int]]) -> Run:
        """Open the store with cold files, and answer groups of questions in order, each group as one batch."""
        make_cold(self.folder)
        found: dict[int, str] = {}
        firsts, read = [], 0
        start = time.perf_counter()
        with PrefixStore(self.folder) as store:
            for group in groups:
                at, bytes_read, answers = self._answer(store, group)
                firsts.append(at - start)
                read += bytes_read
                found |= dict(zip(group, answers, strict=True))
        seconds = time.perf_counter() - start
        return Run(firsts[0], firsts[-1], seconds, read, [found[number] for number in sorted(found)])

    def _answer(self, store: PrefixStore, group: list[int]) -> tuple[float, int, list[str]]:
        """One `generate` call: time of the first tokens, bytes read, and the answers."""
        inputs = self._padded([self.prompts.questions[number][0].tolist() for number in group])
        clock = FirstToken()
        with ContiguousKVCache(self.model, self.prompts.prefix, store=store, config=self.config) as cache:
            output = self.model.generate(
                **{name: value.to(self.model.device) for name, value in inputs.items()},
                cache=cache,  # transformers before 5.24: past_key_values
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                streamer=clock,
            )
            read = cache.stats.bytes_read
        new = output[:, inputs["input_ids"].shape[1] :]
        texts = self.tokenizer.batch_decode(new, skip_special_tokens=True)
        return clock.at or time.perf_counter(), read, [text.strip() for text in texts]

    def _padded(self, rows: list[list[int]]) -> dict[str, torch.Tensor]:
        """`input_ids` and `attention_mask`, int64 `(rows, longest)`, padded on the left."""
        padded = self.tokenizer.pad({"input_ids": rows}, padding_side="left", return_tensors="pt")
        return {"input_ids": padded["input_ids"], "attention_mask": padded["attention_mask"]}


def read_questions(question: list[str] | None, file: Path | None) -> list[str]:
    """The questions of the command line, then the non-empty lines of the file.

    Raises:
        typer.BadParameter: there are no questions.
    """
    lines = [] if file is None else file.read_text(encoding="utf-8").splitlines()
    found = [text.strip() for text in [*(question or []), *lines] if text.strip()]
    if not found:
        raise typer.BadParameter("no questions: give --question (once or more), or --file with one on each line")
    return found


def print_tables(questions: list[str], runs: dict[str, list[Run]]) -> None:
    """Print answers side by side, then median times."""
    answers = Table(title="Answers", show_lines=True)
    answers.add_column("question", ratio=2)
    answers.add_column(BATCH, ratio=3)
    answers.add_column(ALONE, ratio=3)
    for number, question in enumerate(questions):
        together, alone = (" ".join(runs[name][0].answers[number].split()) for name in (BATCH, ALONE))
        answers.add_row(*(_plain(cell) for cell in (question, together, "the same" if alone == together else alone)))
    rounds = len(runs[BATCH])
    times = Table(title=f"Time, cold ({'one round' if rounds == 1 else f'median of {rounds} rounds'})")
    times.add_column("", no_wrap=True)
    for title in ("first token, s", "last first token, s", "all answers, s", "read, MiB"):
        times.add_column(title, justify="right")
    for name, own in runs.items():
        times.add_row(
            name,
            *(f"{_median(own, field):,.2f}" for field in ("first_token_s", "last_first_token_s", "seconds")),
            f"{_median(own, 'bytes_read') / 2**20:,.1f}",
        )
    CONSOLE.print(answers)
    CONSOLE.print(times)


def _plain(text: str) -> str:
    """`text`, escaped so that rich finds no markup in it."""
    return text.replace("[", r"\[")


def _median(runs: list[Run], field: str) -> float:
    return median_spread(getattr(run, field) for run in runs).median


def main(
    document: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Any text file.")],
    question: Annotated[list[str] | None, typer.Option(help="May be repeated.")] = None,
    file: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Text file with a question on each line.")
    ] = None,
    store: Annotated[Path, typer.Option(help="The store's folder.")] = BATCH_STORE,
    model: Annotated[str | None, typer.Option(help="A Hub name or a folder; default SmolLM2-135M-Instruct.")] = None,
    budget: Annotated[float, typer.Option(help="Share of the document that an answer uses; 1.0 is exact.")] = 0.1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit on new tokens per answer.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; each asks all questions both ways.")] = 3,
    dtype: DtypeOption = "auto",
    json_path: Annotated[Path | None, typer.Option("--json", help="Write answers and numbers to this file.")] = None,
) -> None:
    """Answer questions about a document in one batch, and one after the other."""
    try:
        config = ContiguousKVConfig(budget=budget)
        asked = read_questions(question, file)
        text = read_document(document)
        if not text:
            raise typer.BadParameter(f"{document} is empty")
        loaded, tokenizer = load_model(model, dtype=dtype)
    except (ContiguousKVError, ModelNotAvailableError) as error:
        raise typer.BadParameter(str(error)) from error
    CONSOLE.print(f"{loaded.source}; runs in {loaded.runs_in}", markup=False, soft_wrap=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    context = int(getattr(loaded.config.get_text_config(), "max_position_embeddings", DOCUMENT_TOKENS))
    longest = max(len(tokenizer(one)["input_ids"]) for one in asked)
    room = min(DOCUMENT_TOKENS, context - max_new_tokens - longest - 64)
    prompts = build_prompts(tokenizer, text, tuple(Question(one) for one in asked), room)
    with PrefixStore(store) as opened:  # computes the document, unless an earlier run has stored it
        ContiguousKVCache(loaded, prompts.prefix, store=opened).close()
    questioner = Questioner(loaded, tokenizer, prompts, config, store, max_new_tokens)
    everything = list(range(len(asked)))
    ways = {BATCH: [everything], ALONE: [[number] for number in everything]}
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for way in ([everything], [[0]]):
        questioner.run(way)  # the first call of a kernel is slow
    for _, name in interleave(list(ways), rounds):
        runs[name].append(questioner.run(ways[name]))
    CONSOLE.print(
        f"{len(asked)} questions about {document}: {prompts.document_tokens:,} tokens"
        f"{', cut to fit' if prompts.cut else ''}, budget {budget:.0%}",
        markup=False,
        soft_wrap=True,
    )
    print_tables(asked, runs)
    if json_path is not None:
        numbers = {
            "document": str(document),
            "prefix_tokens": prompts.document_tokens,
            "budget": budget,
            "model": loaded.source,
            "dtype": dtype_name(loaded.dtype),
            "questions": asked,
            "runs": {name: [asdict(run) for run in own] for name, own in runs.items()},
        }
        json_path.write_text(json.dumps(numbers, indent=2) + "\n")
        CONSOLE.print(f"Written to {json_path}.", markup=False, soft_wrap=True)


if __name__ == "__main__":
    typer.run(main)
