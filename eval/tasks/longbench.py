"""LongBench (Bai et al. 2024): real long documents with questions, in English.

The rows come from the authors' data set on the Hub, `zai-org/LongBench` (formerly `THUDM/LongBench`). It is loaded by a
script, which `datasets` no longer runs, so its `data.zip` is read instead; most copies without a script have other
fields or LongBench's prompts in their contexts. Local files are `<data_dir>/longbench/<subset>.jsonl`, exactly the
files of `data.zip`, with the fields `input`, `context`, `answers`, `length` (words), `dataset`, `language`,
`all_classes` and `_id`.

Differences from LongBench's own numbers: prompts use our words, instruction and context come first (as the shared
prefix), and `trec` takes the most likely of all classes instead of reading a label from a generated text.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .base import Request, answer_turn, encode, sample, user_turn
from .rows import HubSource, Row, load_rows


@dataclass(frozen=True)
class Subset:
    """Prompts and metric of one subset.

    Attributes:
        metric: judges the answers (a module of `eval.metrics`).
        max_new_tokens: limit on generated tokens, as in LongBench.
        instruction: text before the context.
        question: text after the context; `{input}` is the row's input without `begin` at its end.
        begin: beginning of the answer.
    """

    metric: str
    max_new_tokens: int
    instruction: str
    question: str
    begin: str = "Answer:"


_ASKED = "Question: {input}"
_DOCUMENTS = "Below are several documents. A question about them follows; reply with nothing but a short answer."

SUBSETS: dict[str, Subset] = {
    "narrativeqa": Subset("qa_f1", 128, "Read this story. A short phrase will do as reply to the question.", _ASKED),
    "qasper": Subset(
        "qa_f1",
        128,
        "This is a research paper. Reply to the question about it as briefly as you can: with a phrase, with yes or "
        'no, or with "unanswerable" if the paper does not say.',
        _ASKED,
    ),
    "multifieldqa_en": Subset("qa_f1", 64, "Study this text. The question after it wants a brief reply.", _ASKED),
    "hotpotqa": Subset("qa_f1", 32, _DOCUMENTS, _ASKED),
    "2wikimqa": Subset("qa_f1", 32, _DOCUMENTS, _ASKED),
    "musique": Subset("qa_f1", 32, _DOCUMENTS, _ASKED),
    "gov_report": Subset("rouge_l", 512, "This is an official report.", "Sum the report up on one page.", "Summary:"),
    "qmsum": Subset("rouge_l", 512, "These are the minutes of a meeting, word by word.", "Request: {input}"),
    "multi_news": Subset(
        "rouge_l", 512, "These news articles are about one event.", "Sum all of them up on one page.", "Summary:"
    ),
    "trec": Subset("accuracy", 1, "Questions, and the type of each:", "{input}", "Type:"),
    "triviaqa": Subset("qa_f1", 32, "Passages with questions, each answered in a few words:", "{input}"),
    "samsum": Subset("rouge_l", 128, "Dialogues, each summed up in a sentence or two:", "{input}", "Summary:"),
    "passage_count": Subset(
        "right_numbers",
        32,
        "Some of these paragraphs are copies of others.",
        "How many different paragraphs are there above, if copies count once? Reply with the number.",
        "There are",
    ),
    "passage_retrieval_en": Subset(
        "right_numbers",
        32,
        "Memorize these numbered paragraphs.",
        "This sums up one of the paragraphs:\n\n{input}\n\nWhich paragraph is it? Reply with its number.",
        "It is Paragraph",
    ),
}


@dataclass(frozen=True)
class LongBench:
    """One subset of LongBench.

    Attributes:
        subset: one of `SUBSETS`.
        max_tokens: maximum tokens of the prefix. The middle of a longer prefix is left out, as in LongBench, possibly
            with text that the answer needs; `Request.about` has the number of missing tokens (`cut_tokens`). The
            default leaves room for question and answer in the 8,192 tokens of the default model.
        data_dir: local data.
    """

    subset: str
    max_tokens: int = 7168
    data_dir: Path | str | None = None

    def __post_init__(self) -> None:
        if self.subset not in SUBSETS:
            raise ValueError(f"subset must be one of {sorted(SUBSETS)}, got {self.subset!r}")
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must be 2 at least, got {self.max_tokens}")

    @property
    def name(self) -> str:
        return f"longbench_{self.subset}"

    @property
    def metric(self) -> str:
        return SUBSETS[self.subset].metric

    @property
    def hub(self) -> HubSource:
        """Location of the rows on the Hub."""
        return HubSource(
            "zai-org/LongBench",
            lambda row: row,
            splits=((self.subset, f"data/{self.subset}.jsonl"),),
            archive="data.zip",
        )

    def requests(self, tokenizer: Any, count: int, seed: int = 0) -> list[Request]:
        """The first `count` requests; they share a prefix if their rows have the same context."""
        chance = random.Random(f"{self.name} {seed}")
        asked = SUBSETS[self.subset]
        prefixes: dict[str, tuple[int, torch.Tensor, int]] = {}
        found = []
        rows = load_rows("longbench", self.subset, self.data_dir, self.hub)
        for number, row in enumerate(sample(rows, count, chance)):
            context = row["context"]
            if context not in prefixes:
                prefixes[context] = (len(prefixes), *self._prefix(tokenizer, context))
            prefix, prefix_ids, cut = prefixes[context]
            found.append(
                Request(
                    self.name,
                    number,
                    prefix_ids,
                    prefix,
                    encode(tokenizer, self._suffix(row)),
                    tuple(row["answers"]),
                    tuple(row["all_classes"] or ()) if asked.metric == "accuracy" else (),
                    asked.max_new_tokens,
                    about=(("row", row["_id"]), ("words", row["length"]), ("cut_tokens", cut)),
                )
            )
        return found

    def _prefix(self, tokenizer: Any, context: str) -> tuple[torch.Tensor, int]:
        """Instruction and context, int64 `(n,)`, and the number of tokens left out of the middle."""
        text = f"{SUBSETS[self.subset].instruction}\n\n{context.strip()}"
        ids = encode(tokenizer, user_turn(text) if self._chat else text)
        cut = max(0, len(ids) - self.max_tokens)
        if cut:
            head = self.max_tokens // 2
            ids = torch.cat([ids[:head], ids[head + cut :]])
        return ids, cut

    def _suffix(self, row: Row) -> str:
        asked = SUBSETS[self.subset]
        # Inputs of the few-shot subsets end with the beginning of the answer.
        text = asked.question.format(input=row["input"].strip().removesuffix(asked.begin).rstrip())
        return answer_turn(f"\n\n{text}", asked.begin) if self._chat else f"\n{text}\n{asked.begin}"

    @property
    def _chat(self) -> bool:
        # Labels continue the text, as in our other few-shot tasks. A generated answer must know where to stop.
        return self.metric != "accuracy"


def longbench(subset: str, data_dir: Path | str | None = None) -> LongBench:
    """One subset, with at most 7,168 tokens of prefix.

    Raises:
        ValueError: no subset has this name.
    """
    return LongBench(subset, data_dir=data_dir)
