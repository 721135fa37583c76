"""Record what the cache selects: many questions to many prefixes, with a real model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from hf_contiguouskv import ContiguousKVCache, PrefixStore
from hf_contiguouskv.loading.key_loader import KeyLoader
from hf_contiguouskv.model.fingerprint import model_fingerprint
from hf_contiguouskv.model.served_model import ServedModel
from hf_contiguouskv.model.transformers_internals import cache_argument
from hf_contiguouskv.request.chunk_strategy import ChunkStrategy
from hf_contiguouskv.request.strategy import RequestContext
from hf_contiguouskv.selection import ChunkScorer, ChunkScores, SelectionInput
from hf_contiguouskv.store.attached_prefix import AttachedPrefix
from hf_contiguouskv.store.format import KVGeometry

from ..timing import machine
from .texts import Document, questions
from .trace import Pool, Trace, Workload


class Listening:
    """The library's own method on a stored prefix, which tells what attention looks at.

    Args:
        model: whose prefix.
        store: of the prefix.

    Attributes:
        heard: attention mass of the whole chunks, float32 `(whole_chunks,)`: one for each selection that was made.
    """

    def __init__(self, model: Any, store: PrefixStore) -> None:
        self._model = model
        self._store = store
        self.heard: list[npt.NDArray[np.float32]] = []

    def attach(self, ids: torch.Tensor, geometry: KVGeometry) -> AttachedPrefix:
        stored = self._store.inner.lookup(
            model_fingerprint(self._model), ids.numpy(), geometry.chunk_size, geometry=geometry
        )
        assert stored is not None
        return AttachedPrefix.of(stored, len(ids))

    def strategy(self, context: RequestContext) -> ChunkStrategy:
        return ChunkStrategy(context, self._scorer)

    def _scorer(self, keys: KeyLoader, layer: int) -> ChunkScorer:
        score = keys.scorer(layer)

        def listen(inputs: SelectionInput) -> ChunkScores:
            scores = score(inputs)
            self.heard.append(scores.mass.sum(0).numpy())
            return scores

        return listen


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
    # The default selects in every layer.
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
    with bar:
        for number, (text, count) in enumerate(zip(texts, counts.tolist(), strict=True)):
            chance = np.random.default_rng([workloads[0].seed, 3, number])
            with tempfile.TemporaryDirectory() as folder, PrefixStore(Path(folder) / "store") as store:
                ContiguousKVCache(model, text.ids, store=store, budget=budget).close()
                method = Listening(model, store)
                cache = ContiguousKVCache(model, text.ids, store=store, budget=budget, timeline=True, method=method)
                made = []
                for ids in questions(text, count, tokenizer, chance):
                    made.append(_one_request(model, cache, ids, method.heard))
                    bar.update()
                cache.close()
            pools.append(Pool(len(text.ids), *(np.stack(part) for part in zip(*made, strict=True))))
    about = {
        "geometry": ServedModel(model).geometry(16).to_metadata(),
        "budget": budget,
        "seed": workloads[0].seed,
        "prefix_tokens": [len(text.ids) for text in texts],
        "recorded_requests": int(counts.sum()),
        "model": getattr(model, "source", type(model).__name__),
        "machine": machine(),
    }
    return Trace(pools, about)
