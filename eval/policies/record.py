"""Record what the cache selects: many questions to many prefixes, with a real model."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from hf_contiguouskv import ContiguousKVCache, PrefixStore
from hf_contiguouskv.loading.key_source import KeySource
from hf_contiguouskv.model.support import require_support
from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.prefill.exact_prefill import geometry_of
from hf_contiguouskv.selection import ChunkScorer, ChunkScores, SelectionInput

from ..timing import machine
from .texts import Document, questions
from .trace import Pool, Trace, Workload


@contextmanager
def _overheard() -> Iterator[list[npt.NDArray[np.float32]]]:
    """Attention mass of the whole chunks, one array for each selection that is made while this context lasts."""
    heard: list[npt.NDArray[np.float32]] = []
    scorer_of = KeySource.scorer

    def scorer(source: KeySource, layer: int, device: torch.device) -> ChunkScorer:
        score = scorer_of(source, layer, device)

        def listen(inputs: SelectionInput) -> ChunkScores:
            scores = score(inputs)
            heard.append(scores.mass.sum(0).numpy())
            return scores

        return listen

    with mock.patch.object(KeySource, "scorer", scorer):
        yield heard


def _one_request(
    model: Any, cache: ContiguousKVCache, ids: torch.Tensor, heard: list[npt.NDArray[np.float32]]
) -> tuple[np.ndarray, ...]:
    """Ask one question; what `Pool` holds of it, without the leading axis."""
    heard.clear()
    cache.reset()
    with torch.no_grad():
        given = {cache_argument(model): cache}
        logits = model(input_ids=ids[None], use_cache=True, logits_to_keep=1, **given).logits
    int(logits[0, -1].argmax())
    layers = len(cache.layers)
    chunks = [cache.selected_chunks(layer) for layer in range(layers)]
    selected = np.array([one[0].numpy() for one in chunks if one is not None], dtype=np.uint16)
    # The default selects anew in every layer.
    assert len(heard) == layers
    mass = np.array(heard, dtype=np.float16)
    assert cache.timeline is not None
    identify, compute = np.zeros(layers, dtype=np.float32), np.zeros(layers, dtype=np.float32)
    for span in cache.timeline.spans:
        if span.kind == "identify":
            identify[span.layer] += span.end - span.start
        elif span.kind == "compute":
            # The first one, up to layer 0, began when the cache was reset; a later one of layer 0 replaces it.
            compute[span.layer] = span.end - span.start
    return selected, mass, identify, compute


def record(
    model: Any,
    tokenizer: Any,
    texts: list[Document],
    workloads: list[Workload],
    budget: float,
    fewest: int = 24,
    progress: bool = True,
) -> Trace:
    """Ask as many questions to each prefix as the most demanding of `workloads` does.

    Args:
        model, tokenizer: on the CPU; every layer with full attention.
        texts: the prefixes.
        workloads: requests are recorded so that none of these has to ask a question twice.
        budget: share of the chunks that is selected.
        fewest: requests to every prefix at least.
    """
    counts = np.max([np.bincount(load.prefixes(len(texts)), minlength=len(texts)) for load in workloads], axis=0)
    # Replays with other seeds ask for other prefixes more often.
    counts = np.maximum(counts, fewest)
    pools = []
    bar = tqdm(total=int(counts.sum()), desc="requests", disable=not progress, leave=False)
    with _overheard() as heard, bar:
        for number, (text, count) in enumerate(zip(texts, counts.tolist(), strict=True)):
            chance = np.random.default_rng([workloads[0].seed, 3, number])
            with tempfile.TemporaryDirectory() as folder, PrefixStore(Path(folder) / "store") as store:
                cache = ContiguousKVCache(model, text.ids, store=store, budget=budget, timeline=True)
                made = []
                for ids in questions(text, count, tokenizer, chance):
                    made.append(_one_request(model, cache, ids, heard))
                    bar.update()
                cache.close()
            pools.append(Pool(len(text.ids), *(np.stack(part) for part in zip(*made, strict=True))))
    about = {
        "geometry": geometry_of(require_support(model), 16).to_metadata(),
        "budget": budget,
        "seed": workloads[0].seed,
        "prefix_tokens": [len(text.ids) for text in texts],
        "recorded_requests": int(counts.sum()),
        "model": getattr(model, "source", type(model).__name__),
        "machine": machine(),
    }
    return Trace(pools, about)
