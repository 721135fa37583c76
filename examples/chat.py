"""Chat about one document. The document's KV cache is stored once, and each turn is stored when it is over.

Each answer reads only the chunks of document and conversation that its question attends to. While you read it, the turn
is computed exactly and stored, so that later questions find it, also in another process. Questions are read from
standard input, one per line, until it ends:

    python examples/chat.py notes.txt
    printf 'Who wrote this?\\nWhen?\\n' | python examples/chat.py notes.txt --store kv-store --budget 0.1
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from demo import CONSOLE, DEFAULT_STORE, build_prompts, read_document
from transformers import TextStreamer

from eval.dtypes import DtypeOption
from eval.models import ModelNotAvailableError, load_model
from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore
from hf_contiguouskv.errors import ContiguousKVError

CHAT_STORE = DEFAULT_STORE.with_name("chat-store")
# Tokens of the context reserved for the conversation, and the most tokens used of a long document.
CONVERSATION_TOKENS = 1024
DOCUMENT_TOKENS = 8192


class TimedStreamer(TextStreamer):
    """Prints an answer as its tokens arrive.

    Attributes:
        first_token: time of the first new token, in seconds of `time.perf_counter`; `None` before it.
    """

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.first_token: float | None = None

    def put(self, value: torch.Tensor) -> None:
        """Called by `generate` with the prompt, then with each new token."""
        if not self.next_tokens_are_prompt and self.first_token is None:
            self.first_token = time.perf_counter()
        super().put(value)


class Chat:
    """A conversation about a document, as one growing row of token ids.

    Args:
        model, tokenizer: the model that answers, and its tokenizer.
        store: holds the KV of the document and the turns.
        config: decides which chunks an answer reads.
        document: the document's text.
        max_new_tokens: limit on new tokens per answer.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        store: PrefixStore,
        config: ContiguousKVConfig,
        document: str,
        max_new_tokens: int,
    ) -> None:
        self._model = model
        self._tokenizer = tokenizer
        self._store = store
        self._config = config
        self._max_new_tokens = max_new_tokens
        self._context = int(getattr(model.config.get_text_config(), "max_position_embeddings", DOCUMENT_TOKENS))
        room = min(DOCUMENT_TOKENS, self._context) - CONVERSATION_TOKENS
        prompts = build_prompts(tokenizer, document, (), room)
        self.ids: list[int] = prompts.prefix[0].tolist()
        self.cut = prompts.cut
        self._after_question, self._after_answer = _between_messages(tokenizer)
        self._before_question = "\n\nQuestion: "

    def keep(self) -> tuple[int, float]:
        """Store the conversation so far, computed exactly. Returns the number of computed tokens, and seconds."""
        start = time.perf_counter()
        ids = torch.tensor(self.ids)
        computed = len(ids) - self._store.match(self._model, ids)
        if computed:
            ContiguousKVCache(self._model, ids, store=self._store, config=self._config).close()
        return computed, time.perf_counter() - start

    def prompt(self, question: str) -> list[int]:
        """Token ids of the conversation plus this question. Parts are joined as ids, so the stored part still
        matches."""
        text = f"{self._before_question}{question}{self._after_question}"
        added: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return self.ids + added

    def has_room(self, prompt: list[int]) -> bool:
        """Whether an answer to `prompt` fits into the model's context."""
        return len(prompt) + self._max_new_tokens <= self._context

    def answer(self, prompt: list[int]) -> str:
        """Print the answer to a prompt as it arrives. Returns a line about time, chunks and bytes."""
        streamer = TimedStreamer(self._tokenizer)
        ids = torch.tensor([prompt])
        start = time.perf_counter()
        with ContiguousKVCache(self._model, torch.tensor(self.ids), store=self._store, config=self._config) as cache:
            output = self._model.generate(
                ids.to(self._model.device),
                attention_mask=torch.ones_like(ids).to(self._model.device),
                cache=cache,  # transformers before 5.24: past_key_values
                max_new_tokens=self._max_new_tokens,
                do_sample=False,
                pad_token_id=self._tokenizer.pad_token_id or self._tokenizer.eos_token_id,
                streamer=streamer,
            )
            stats = cache.stats
        said: list[int] = output[0].tolist()
        if said[-1] == self._tokenizer.eos_token_id:
            said.pop()  # the text between messages contains this token
        self.ids, self._before_question = said, self._after_answer
        first = (streamer.first_token or time.perf_counter()) - start
        return (
            f"first token after {first * 1e3:,.0f} ms; read {stats.bytes_read / 2**20:.1f} MiB, "
            f"used {max(stats.chunks_used, default=0)} of {stats.chunks_total} chunks"
        )


def _between_messages(tokenizer: Any) -> tuple[str, str]:
    """The chat template's text between a question and its answer, and between an answer and the next question."""
    if not tokenizer.chat_template:
        return "\nAnswer: ", "\n\nQuestion: "
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": f"<<message {number}>>"} for number, role in enumerate(roles)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    _, _, rest = text.partition("<<message 1>>")
    after_answer, _, after_question = rest.partition("<<message 2>>")
    return after_question, after_answer


def main(
    document: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Any text file.")],
    store: Annotated[Path, typer.Option(help="The store's folder.")] = CHAT_STORE,
    model: Annotated[str | None, typer.Option(help="A Hub name or a folder; default SmolLM2-135M-Instruct.")] = None,
    budget: Annotated[float, typer.Option(help="Share of the stored tokens that an answer uses; 1.0 is exact.")] = 0.1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Limit on new tokens per answer.")] = 100,
    dtype: DtypeOption = "auto",
) -> None:
    """Chat about a document; questions are read from standard input, one per line."""
    try:
        config = ContiguousKVConfig(budget=budget)
        text = read_document(document)
        if not text:
            raise typer.BadParameter(f"{document} is empty")
        loaded, tokenizer = load_model(model, dtype=dtype)
    except (ContiguousKVError, ModelNotAvailableError) as error:
        raise typer.BadParameter(str(error)) from error
    CONSOLE.print(f"{loaded.source}; runs in {loaded.runs_in}", markup=False, soft_wrap=True)
    with PrefixStore(store) as opened:
        chat = Chat(loaded, tokenizer, opened, config, text, max_new_tokens)
        computed, seconds = chat.keep()
        size = f"{len(chat.ids):,} tokens{', cut to fit' if chat.cut else ''}"
        done = (
            f"{computed:,} of them computed and stored in {seconds:.1f} s" if computed else "stored by an earlier run"
        )
        CONSOLE.print(f"{document}: {size}; {done} ({store})", markup=False, soft_wrap=True)
        while (question := _next_question()) is not None:
            prompt = chat.prompt(question)
            if not chat.has_room(prompt):
                CONSOLE.print("The conversation fills the model's context: start a new one.")
                break
            line = chat.answer(prompt)
            computed, seconds = chat.keep()
            stored = f"turn of {computed} tokens stored in {seconds * 1e3:,.0f} ms" if computed else "turn was stored"
            CONSOLE.print(f"[{line}; {stored}]", markup=False, soft_wrap=True)


def _next_question() -> str | None:
    """The next non-empty line; `None` at the end of standard input."""
    while True:
        if sys.stdin.isatty():
            print("\n> ", end="", flush=True)
        line = sys.stdin.readline()
        if not line:
            return None
        if question := line.strip():
            if not sys.stdin.isatty():
                print(f"\n> {question}", flush=True)
            return question


if __name__ == "__main__":
    typer.run(main)
