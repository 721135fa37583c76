"""Long answers in batches: each row answers as alone, what was asked is not asked again, and rows become a table."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_model import save_tiny_model

from eval import long_answers
from eval.models import load_model
from eval.positions import figures
from eval.tasks.register import Register


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def task(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Register:
    """A small register in small text. (The tokenizer has a token for each byte.)"""
    (tmp_path / "nq_open").mkdir()
    passages = [f"This is passage {number} of a text about nothing at all." for number in range(60)]
    rows = [{"question": "?", "answers": ["?"], "documents": [{"title": "?", "text": passage}]} for passage in passages]
    (tmp_path / "nq_open" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = Register(rows=5, questions=2, asked=2, tokens=700, data_dir=tmp_path)
    monkeypatch.setattr(long_answers, "task_named", lambda name: found)
    monkeypatch.setenv("TRANSFORMERS_SDPA_FORCE_GQA", "1")
    return found


def rows_in(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]


def test_each_row_of_a_batch_answers_as_it_does_alone(folder: Path, task: Register, tmp_path: Path) -> None:
    out = tmp_path / "rows"
    options = {"model": str(folder), "requests": 3, "share": [1.0, 0.3], "every": [0, 4], "dtype": "float32"}
    long_answers.main(out, **options)
    rows = rows_in(out)
    assert len(rows) == 3 * 5
    model, tokenizer = load_model(str(folder), dtype="float32")
    for request in task.requests(tokenizer, 3):
        prompt = torch.cat([request.prefix_ids, request.suffix_ids])[None]
        output = model.generate(prompt, max_new_tokens=request.max_new_tokens, do_sample=False)
        alone = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        mine = [row for row in rows if row["number"] == request.number and row["budget"] == 1.0]
        assert [row["prediction"] for row in mine] == [alone] * 3  # In memory, and ours with all chunks.
        assert {row["batch"] for row in mine} == {2 if request.number < 2 else 1}
    steps = task.requests(tokenizer, 1)[0].max_new_tokens - 1
    for row in rows:
        chosen = row["budget"] == 0.3 and row["options"] == ["reselect=4"]
        assert row["decoding"]["reselections"] == (row["decoding"]["tokens"] // 4 if chosen else 0)
        assert 0 < row["decoding"]["tokens"] <= steps
    assert {one.answers for one in figures(rows)} == {3}
    before = (out / "rows.jsonl").read_text()
    long_answers.main(out, **options)
    assert (out / "rows.jsonl").read_text() == before
