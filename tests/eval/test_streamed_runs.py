"""Runs of streams: memory stays from request to request, within its share, and some answers are judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_running import config_of, label, rows_of
from tiny_model import save_tiny_model

from eval import streams
from eval.models import load_model
from eval.running import run
from eval.running.streamed import distinct_tokens
from eval.systems import SYSTEMS


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    return load_model(str(save_tiny_model(tmp_path_factory.mktemp("model"))), dtype="float32")


def test_streams_keep_memory_from_request_to_request(tmp_path: Path, loaded: tuple[Any, Any]) -> None:
    systems = ("attentionstore", "attentionstore_h2o", "attentionstore_h2o+lfu", "impress", "contiguouskv")
    config = config_of(
        tasks=(),
        streams=("shared_documents", "conversations"),
        systems=systems,
        budgets=(0.25,),
        stream_requests=6,
        documents=2,
        memory_share=0.5,
        judged_share=0.5,
    )
    rows = rows_of(run(config, tmp_path, progress=False, loaded=loaded))
    assert {row["stream"] for row in rows} == {"shared_documents", "conversations"}
    for stream in ("shared_documents", "conversations"):
        for system in systems:
            own = [row for row in rows if (label(row), row["stream"]) == (system, stream)]
            assert [row["number"] for row in own] == list(range(6))
            assert own[0]["stats"]["hits"]["host"] == 0
            assert own[0]["stats"]["hits"]["disk"] > 0
            # LRU forgets the first chunks of a text while it reads the last, if there is no room for both.
            if system != "attentionstore":
                assert sum(row["stats"]["hits"]["host"] for row in own) > 0, (system, stream)
            # Every second answer is judged.
            assert [row["score"] is not None for row in own] == [row["kl_answer"] is not None for row in own]
            assert [row["kl"] is not None for row in own] == [True, False] * 3
            for row in own[::2]:
                exact = system == "attentionstore"
                assert (abs(row["kl_answer"]) < 1e-5) is exact, (system, stream, row["number"])
            assert {row["state"] for row in own} == {"stream"}


def test_a_chat_is_counted_once(loaded: tuple[Any, Any]) -> None:
    chats = streams.conversations(loaded[1], conversations=2, turns=3, tokens=700, turn_tokens=200)
    longest = [max(len(one.prefix_ids) for one in chats if dict(one.about)["conversation"] == chat) for chat in (0, 1)]
    assert distinct_tokens(chats) == sum(longest) < sum(len(one.prefix_ids) for one in chats)
    documents = streams.shared_documents(loaded[1], documents=2, requests=5, tokens=1500)
    assert distinct_tokens(documents) == sum({one.prefix: len(one.prefix_ids) for one in documents}.values())


def test_a_system_keeps_no_more_of_a_stream_than_its_share(
    tmp_path: Path, loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds: list[int] = []
    make = SYSTEMS["contiguouskv"].make

    def watched(model: Any, place: Path, budget: float, options: Any, **store_options: Any) -> Any:
        bounds.append(store_options.get("host_bytes", 0))
        return make(model, place, budget, options, **store_options)

    monkeypatch.setitem(SYSTEMS, "contiguouskv", replace(SYSTEMS["contiguouskv"], make=watched))
    changes = {"tasks": (), "streams": ("conversations",), "systems": ("contiguouskv",), "memory_share": 0.25}
    config = config_of(**changes, stream_requests=4, documents=2, budgets=(0.25,))
    rows = rows_of(run(config, tmp_path, progress=False, loaded=loaded))
    # Once to see its states and once to warm up, with the usual memory; once for the stream. A chat's last turn holds
    # the others.
    longest: dict[int, int] = {}
    for row in rows:
        chat = row["about"]["conversation"]
        longest[chat] = max(longest.get(chat, 0), row["prefix_bytes"])
    assert bounds == [0, 0, sum(longest.values()) // 4]


@pytest.mark.parametrize("stream", ["shared_documents", "conversations"])
def test_flexgen_has_its_share_of_memory_in_a_stream(tmp_path: Path, loaded: tuple[Any, Any], stream: str) -> None:
    config = config_of(
        tasks=(),
        streams=(stream,),
        systems=("flexgen", "flexgen+host=0.5", "flexgen+host=0.9"),
        stream_requests=6,
        documents=2,
        memory_share=0.5,
        judged_share=0.5,
    )
    rows = rows_of(run(config, tmp_path, progress=False, loaded=loaded))
    read = {
        name: [
            row["stats"]["bytes_read"] / row["prefix_bytes"]
            for row in sorted(rows, key=lambda row: row["number"])
            if label(row) == name
        ]
        for name in ("flexgen", "flexgen+host=0.5", "flexgen+host=0.9")
    }
    assert [len(own) for own in read.values()] == [6, 6, 6]
    assert min(read["flexgen"]) > 0.95
    # (Shares are of whole pages, and prefixes of tests are short.)
    assert all(
        with_share < 0.85 * none for with_share, none in zip(read["flexgen+host=0.5"], read["flexgen"], strict=True)
    )
    # With more than there is room for, the first text has its share, and others have none.
    if stream == "shared_documents":
        assert min(read["flexgen+host=0.9"]) < 0.4
        assert max(read["flexgen+host=0.9"]) > 0.95
    assert all(abs(row["kl_answer"]) < 1e-4 for row in rows if row["kl_answer"] is not None)
