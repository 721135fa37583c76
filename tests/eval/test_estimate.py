"""What an estimate says follows from the work, and is told without false precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny_model import save_tiny_model

from eval import estimate
from eval.estimate import SAMPLE_TOKENS, Pace, about
from eval.models import load_model


def test_twice_the_tokens_take_twice_as_long_and_more_for_attention() -> None:
    pace = Pace(weights=1000, attended=10, seconds_per_multiplication=1e-6, token_s=1e-4)
    short, long = pace.forward_s(100), pace.forward_s(200)
    assert short == pytest.approx(100 * (1000 + 10 * 50) * 1e-6)
    assert long == pytest.approx(2 * short + 100 * 100 * 10 * 1e-6)
    # In pieces it is the same work.
    assert long == pytest.approx(short + pace.forward_s(100, before=100))


def test_one_token_takes_as_long_as_one_token_took() -> None:
    pace = Pace(weights=1000, attended=10, seconds_per_multiplication=1e-6, token_s=1.0)
    assert pace.forward_s(1) == 1.0
    assert pace.answer_s(5) == 5.0


@pytest.mark.parametrize(("alone", "expected"), [(100.0, (4.0, 0.25)), (0.125, (0.125, 0.125))])
def test_the_pace_is_that_of_the_best_short_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alone: float, expected: tuple[float, float]
) -> None:
    """`alone`: processor time of a single thread, which others cannot make longer."""
    model, _ = load_model(str(save_tiny_model(tmp_path)), dtype="float32")
    timed: list[tuple[int, int]] = []
    seconds = iter((9.0, 4.0, 9.0, 0.5, 0.25, 9.0))
    processor = iter((0.0, alone, 0.0, alone))

    def time_to_first_token(_: object, ids: torch.Tensor, __: object) -> tuple[float, int, None]:
        timed.append((ids.shape[1], torch.get_num_threads()))
        return next(seconds), 0, None

    monkeypatch.setattr(estimate, "time_to_first_token", time_to_first_token)
    monkeypatch.setattr(estimate.time, "thread_time", lambda: next(processor))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        pace = Pace.of(model, torch.ones(1, 1000, dtype=torch.int64))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert timed == [(tokens, threads) for tokens in (SAMPLE_TOKENS, 1) for threads in (2, 2, 1)]
    assert (pace.seconds_per_multiplication, pace.token_s) == (
        pytest.approx(expected[0] / (SAMPLE_TOKENS * (pace.weights + pace.attended * SAMPLE_TOKENS / 2))),
        expected[1],
    )
    # 3 layers of 4 heads of 12 channels: queries by keys, and shares by values.
    assert pace.attended == 2 * 3 * 4 * 12
    embeddings = model.get_input_embeddings().weight.numel()
    assert 0 < pace.weights <= model.num_parameters() - embeddings


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "about a second"),
        (3.4, "about 3 s"),
        (33.0, "about 35 s"),
        (95.0, "about 95 s"),
        (100.0, "about 2 min"),
        (1000.0, "about 17 min"),
    ],
)
def test_estimates_are_round(seconds: float, text: str) -> None:
    assert about(seconds) == text
