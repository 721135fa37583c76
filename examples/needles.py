"""Needles in a haystack: does a pruned prefix still hold the one sentence that the question is about?

Each needle ("The secret number of Lisbon is 48213.") is hidden at a random depth of real text, which is stored as a
prefix. The full cache, the published method and the default answer the question. The table shows how many numbers are
right, how far the next-token distributions are from those of the full cache, and how many bytes were read.

    python examples/needles.py --needles 12 --tokens 2048
"""

from __future__ import annotations

import random
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from eval.documents import document_ids
from eval.dtypes import DtypeOption
from eval.models import load_model
from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore

CITIES = ("Lisbon", "Oslo", "Cairo", "Lima", "Quito", "Seoul", "Delhi", "Accra", "Turin", "Kyoto", "Perth", "Riga")
SYSTEMS = {
    "full": ContiguousKVConfig(budget=1.0),
    "published, 5%": ContiguousKVConfig.paper(0.05),
    "default, 5%": ContiguousKVConfig(budget=0.05),
    "published, 10%": ContiguousKVConfig.paper(0.10),
    "default, 10%": ContiguousKVConfig(budget=0.10),
    "published, 25%": ContiguousKVConfig.paper(0.25),
    "default, 25%": ContiguousKVConfig(budget=0.25),
}


def make_needle(tokenizer: Any, hay: torch.Tensor, chance: random.Random) -> tuple[torch.Tensor, torch.Tensor, str]:
    """A prefix with a needle, the question about it, and the number: int64 `(n,)`, `(q,)`, text."""

    def encode(text: str) -> torch.Tensor:
        return torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])

    city, number = chance.choice(CITIES), str(chance.randint(10000, 99999))
    at = chance.randrange(len(hay) // 10, len(hay) * 9 // 10)
    needle = encode(f"\nThe secret number of {city} is {number}. Remember it.\n")
    start = encode("<|im_start|>user\nRead this text. It hides a secret number.\n\n")
    prefix = torch.cat([start, hay[:at], needle, hay[at:]])
    question = (
        f"\n\nWhat is the secret number of {city}?<|im_end|>\n<|im_start|>assistant\nThe secret number of {city} is"
    )
    return prefix, encode(question), number


def main(
    needles: Annotated[int, typer.Option(help="Number of prefixes, with one needle each.")] = 24,
    tokens: Annotated[int, typer.Option(help="Tokens of each haystack.")] = 2048,
    model_name: Annotated[str | None, typer.Option("--model")] = None,
    dtype: DtypeOption = "auto",
    seed: int = 0,
) -> None:
    """Hide needles, ask for them, and compare the systems."""
    model, tokenizer = load_model(model_name, dtype=dtype)
    print(f"{model.source}; runs in {model.runs_in}")
    text = document_ids(tokenizer, tokens * 4)
    chance = random.Random(seed)
    right: dict[str, int] = defaultdict(int)
    divergence: dict[str, list[float]] = defaultdict(list)
    read: dict[str, float] = defaultdict(float)
    with tempfile.TemporaryDirectory() as folder:
        for _ in tqdm(range(needles), "needles", leave=False):
            begin = chance.randrange(3 * tokens)
            prefix, question, number = make_needle(tokenizer, text[begin : begin + tokens], chance)
            prompt = torch.cat([prefix, question])[None]
            exact: torch.Tensor | None = None
            for name, config in SYSTEMS.items():
                with (
                    PrefixStore(Path(folder) / "store") as store,
                    ContiguousKVCache(model, prefix, store=store, config=config) as cache,
                ):
                    with torch.no_grad():
                        # (transformers before 5.24 calls the argument `past_key_values`.)
                        logits = model(input_ids=question[None], cache=cache).logits[0].float()
                    cache.reset()
                    output = model.generate(prompt, cache=cache, max_new_tokens=8, do_sample=False)
                    read[name] += cache.stats.bytes_read
                log_probs = torch.log_softmax(logits, -1)
                exact = log_probs if exact is None else exact
                divergence[name].append(float((exact.exp() * (exact - log_probs)).sum(-1).mean()))
                right[name] += number in tokenizer.decode(output[0, prompt.shape[1] :])
    table = Table(
        "system", "numbers right", "KL to full (nats)", "MB read", title=f"{needles} needles in {tokens} tokens"
    )
    for name in SYSTEMS:
        kl = sum(divergence[name]) / needles
        table.add_row(name, f"{right[name] / needles:.0%}", f"{kl:.3f}", f"{read[name] / needles / 1e6:.1f}")
    Console(width=None if sys.stdout.isatty() else 90).print(table)


if __name__ == "__main__":
    typer.run(main)
