"""Long answers, and choosing again while they are written: recall by position, time per step, bytes read.

    python -m eval.long_answers rows --model qwen2.5-coder-0.5b --requests 8

The questions about one text are the rows of one batch, since a step of some rows takes little longer than one of a
single row. Bytes that were read are shared out evenly among them. What is in the folder already is not asked again.
`python -m eval positions` prints the table.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore, RequestStats
from hf_contiguouskv.model.transformers_internals import cache_argument

from .models import load_model
from .run_files import CONFIG, MACHINE, ROWS
from .running.stamp import stamp
from .systems.attention import ROOM, BufferedLayer, cache_of
from .systems.in_memory import prefill
from .tasks import Request, task_named

# A share, and after how many tokens chunks are chosen again (0: never). `None`: the whole cache, in memory.
Setting = tuple[float, int] | None


@contextmanager
def cache_for(model: Any, prefix_ids: torch.Tensor, rows: int, setting: Setting, store: PrefixStore) -> Iterator[Any]:
    """A cache that holds the prefix of all rows."""
    if setting is None:
        yield whole_cache(model, prefix_ids, rows)
        return
    share, every = setting
    config = ContiguousKVConfig(budget=share, reselect_every=every or None)
    with closing(ContiguousKVCache(model, prefix_ids, store=store, config=config)) as cache:
        yield cache


def whole_cache(model: Any, prefix_ids: torch.Tensor, rows: int) -> Any:
    """The whole prefix for each row, with room behind it, so that a step copies nothing."""
    layers, tokens = [], len(prefix_ids)
    for layer in prefill(model, prefix_ids).layers:
        _, kv_heads, _, head_dim = layer.keys.shape
        buffer = layer.keys.new_empty(2, rows, kv_heads, tokens + ROOM, head_dim)
        buffer[0, :, :, :tokens], buffer[1, :, :, :tokens] = layer.keys, layer.values
        layers.append(BufferedLayer(buffer, tokens))
    return cache_of(layers)


def prompts(requests: Sequence[Request], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask `(rows, n)` of requests that share a prefix; shorter questions are padded behind the prefix."""
    longest = max(len(one.suffix_ids) for one in requests)
    ids, mask = [], []
    for one in requests:
        padding = torch.full((longest - len(one.suffix_ids),), pad)
        ids.append(torch.cat([one.prefix_ids, padding, one.suffix_ids]))
        real = torch.ones(len(ids[-1]), dtype=torch.long)
        real[len(one.prefix_ids) : len(one.prefix_ids) + len(padding)] = 0
        mask.append(real)
    return torch.stack(ids), torch.stack(mask)


def answered(model: Any, tokenizer: Any, requests: Sequence[Request], cache: Any) -> tuple[list[str], dict[str, Any]]:
    """The answers to requests that share the prefix in `cache`, and what they took after their first token."""
    ids, mask = prompts(requests, tokenizer.pad_token_id)
    marks: list[tuple[float, int, int]] = []

    def note(*_: Any) -> None:
        stats = getattr(cache, "stats", None)
        known = stats if isinstance(stats, RequestStats) else RequestStats()
        marks.append((time.perf_counter(), known.bytes_read, known.reselections))

    hook = model.register_forward_hook(note)
    try:
        output = model.generate(
            ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=max(one.max_new_tokens for one in requests),
            do_sample=False,
            **{cache_argument(): cache},
        )
    finally:
        hook.remove()
    texts = [tokenizer.decode(row, skip_special_tokens=True).strip() for row in output[:, ids.shape[1] :]]
    (began, read, chosen), (ended, read_at_end, chosen_at_end) = marks[0], marks[-1]
    decoding = {
        "tokens": len(marks) - 1,
        "seconds": ended - began,
        "bytes_read": read_at_end - read,
        "reselections": chosen_at_end - chosen,
    }
    return texts, decoding


def _row(request: Request, setting: Setting) -> dict[str, Any]:
    """A row as those of a run, without its answer."""
    share, every = setting or (1.0, 0)
    return {
        "task": request.task,
        "number": request.number,
        "prefix": request.prefix,
        "prefix_key": hashlib.blake2b(request.prefix_ids.numpy().tobytes(), digest_size=8).hexdigest(),
        "prefix_tokens": len(request.prefix_ids),
        "suffix_tokens": len(request.suffix_ids),
        "about": dict(request.about),
        "system": "contiguouskv" if setting else "in_memory",
        "options": [f"reselect={every}"] if every else [],
        "budget": share,
        "state": "batch",
    }


def main(
    out: Annotated[Path, typer.Argument(help="folder of the rows")],
    model: Annotated[str | None, typer.Option(help="name or folder of the model")] = None,
    task: Annotated[str, typer.Option(help="a task whose requests have long answers")] = "register",
    requests: Annotated[int, typer.Option(help="requests")] = 8,
    share: Annotated[list[float] | None, typer.Option(help="shares of the prefix (repeatable)")] = None,
    every: Annotated[
        list[int] | None, typer.Option(help="tokens after which chunks are chosen again; 0: never (repeatable)")
    ] = None,
    host_bytes: Annotated[int, typer.Option(help="memory for chunks; 0: they are read each time")] = 2**30,
    seed: int = 0,
    dtype: str = "auto",
) -> None:
    """Answer all requests with the whole cache, and with each share and each way of choosing again."""
    # The whole cache at its best, as in `eval.running.run`: K and V are not repeated for each query head.
    os.environ.setdefault("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    lm, tokenizer = load_model(model, dtype=dtype)
    asked = task_named(task).requests(tokenizer, requests, seed)
    settings: list[Setting] = [None, *((one, n) for one in share or (0.05, 0.1, 0.25) for n in every or (0, 64, 16, 1))]
    out.mkdir(parents=True, exist_ok=True)
    about = {"model": lm.source, "dtype": lm.runs_in, "task": task, "seed": seed, "host_bytes": host_bytes}
    (out / CONFIG).write_text(json.dumps(about) + "\n")
    (out / MACHINE).write_text(json.dumps(stamp()) + "\n")
    file = out / ROWS
    done = {_key(json.loads(line)) for line in file.read_text().splitlines()} if file.is_file() else set()
    with PrefixStore(out / "store", host_bytes=host_bytes) as store:
        for _, group in groupby(asked, key=lambda one: one.prefix):
            same_text = list(group)
            for setting in settings:
                some = [one for one in same_text if _key(_row(one, setting)) not in done]
                if not some:
                    continue
                with cache_for(lm, some[0].prefix_ids, len(some), setting, store) as cache:
                    texts, decoding = answered(lm, tokenizer, some, cache)
                part = decoding | {"bytes_read": decoding["bytes_read"] / len(some)}
                more = {"batch": len(some), "decoding": part}
                rows = [_row(one, setting) | {"prediction": text} | more for one, text in zip(some, texts, strict=True)]
                with file.open("a") as written:
                    written.write("".join(json.dumps(row) + "\n" for row in rows))
                typer.echo(f"text {some[0].prefix}, {setting or 'whole cache'}")


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["task"], row["number"], row["system"], row["budget"], *row["options"]


if __name__ == "__main__":
    typer.run(main)
