"""The requests of a run: made, adapted to the model, and checked before anything is stored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from hf_contiguouskv.model.served_model import ServedModel

from .. import streams
from ..tasks import UNJUDGED, ChatTemplateError, OwnDataError, Request, TooFewRowsError, data_noted, task_named
from .config import RunConfig


class NotServedError(Exception):
    """The model cannot serve these requests, or not in these systems."""


@dataclass(frozen=True)
class Asked:
    """Requests of a run.

    Attributes:
        alone: requests of tasks and their metrics; requests with the same prefix are adjacent.
        streams: requests of each stream, in order.
        data: a digest of the data of each task and stream that loads data.
    """

    alone: list[tuple[Request, str]]
    streams: dict[str, list[Request]]
    data: dict[str, str]

    def by_name(self) -> dict[str, list[Request]]:
        """Requests of each task and stream."""
        found: dict[str, list[Request]] = {}
        for request, _ in self.alone:
            found.setdefault(request.task, []).append(request)
        return found | self.streams


def asked_of(config: RunConfig, tokenizer: Any) -> Asked:
    """All requests of a run; they begin with the tokenizer's BOS token, if it adds one to every text.

    Raises:
        NotServedError: a task has too few requests, or one that the tokenizer makes impossible.
    """
    alone: list[tuple[Request, str]] = []
    listed: dict[str, list[Request]] = {}
    data: dict[str, str] = {}
    for name in config.tasks:
        task = task_named(name, config.data_dir, config.prefixes)
        count = config.timed_requests if task.metric == UNJUDGED else config.requests
        try:
            with data_noted() as noted:
                found = task.requests(tokenizer, config.first + count, config.seed)[config.first :]
        except (TooFewRowsError, OwnDataError, ChatTemplateError) as error:
            raise NotServedError(f"{task.name}: {error}") from error
        if not found:
            raise NotServedError(f"{task.name} has no request from number {config.first} on")
        requests = _begun(found, tokenizer)
        alone += [(request, task.metric) for request in sorted(requests, key=lambda one: one.prefix)]
        data |= _digest_of(task.name, noted)
    for name in config.streams:
        with data_noted() as noted:
            listed[name] = _begun(_stream(name, config, tokenizer), tokenizer)
        data |= _digest_of(name, noted)
    return Asked(alone, listed, data)


def _digest_of(name: str, noted: dict[str, str]) -> dict[str, str]:
    """The digest of all data of a task or stream, by its name; nothing if it loaded no data."""
    if not noted:
        return {}
    return {name: hashlib.blake2b(repr(sorted(noted.items())).encode(), digest_size=8).hexdigest()}


def _stream(name: str, config: RunConfig, tokenizer: Any) -> list[Request]:
    common: dict[str, Any] = {"seed": config.seed, "data_dir": config.data_dir}
    if name == "shared_documents":
        return streams.shared_documents(
            tokenizer, documents=config.documents, requests=config.stream_requests, **common
        )
    turns = max(1, config.stream_requests // config.documents)
    return streams.conversations(tokenizer, conversations=config.documents, turns=turns, **common)


def _begun(requests: Sequence[Request], tokenizer: Any) -> list[Request]:
    """Requests that begin with a BOS token, if the model's tokenizer adds one."""
    begin = tokenizer("")["input_ids"]
    first = getattr(tokenizer, "bos_token_id", None)
    if first is None or begin[:1] != [first]:
        return list(requests)
    bos = torch.tensor([first], dtype=torch.int64)
    return [replace(one, prefix_ids=torch.cat([bos, one.prefix_ids])) for one in requests]


def questions_of(asked: Asked) -> dict[str, str]:
    """A digest of the token ids of each task's and stream's requests; it shows whether two runs asked the same."""
    found = {}
    for name, requests in asked.by_name().items():
        digest = hashlib.blake2b(digest_size=8)
        for request in requests:
            digest.update(request.prefix_ids.numpy().tobytes() + b"|" + request.suffix_ids.numpy().tobytes())
            digest.update(repr((request.answers, request.choices)).encode())
        found[name] = digest.hexdigest()
    return found


def chat_of(request: Request) -> Any:
    """The number of the conversation, equal for all turns of a chat, or else of the prefix."""
    return dict(request.about).get("conversation", request.prefix)


def token_bytes(model: Any) -> int:
    """Bytes of K and V of one token over all layers."""
    geometry = ServedModel(model).geometry(16)
    return 2 * geometry.num_layers * geometry.kv_heads * geometry.head_dim * geometry.itemsize


def require_served(model: Any, asked: Asked) -> None:
    """Check, before anything is stored, that the model can serve all requests.

    Raises:
        NotServedError: a prompt with its answer is longer than the model's context.
    """
    context = getattr(ServedModel(model).text_config, "max_position_embeddings", None)
    for name, requests in asked.by_name().items():
        longest = max((_length(one) for one in requests if one.computed), default=0)
        if context is not None and longest > context:
            raise NotServedError(
                f"{name} has a request of {longest} tokens with its answer, and the model takes {context}"
            )


def _length(request: Request) -> int:
    return len(request.prefix_ids) + len(request.suffix_ids) + request.max_new_tokens
