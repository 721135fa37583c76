"""Metrics against values worked out by hand, as functions and as `evaluate` modules loaded by path."""

from __future__ import annotations

import math
from pathlib import Path

import evaluate
import pytest
import torch

from eval.metrics import fidelity, metric_names, metric_path, scores


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("The Eiffel Tower.", ["eiffel tower"], 1.0),
        ("  an  EIFFEL tower ", ["x", "Eiffel Tower!"], 1.0),
        ("Eiffel", ["Eiffel Tower"], 0.0),
        ("", ["the"], 1.0),
    ],
)
def test_exact_match_ignores_case_punctuation_articles_and_space(
    prediction: str, answers: list[str], expected: float
) -> None:
    assert scores.exact_match(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Wilhelm Röntgen", ["Wilhelm Conrad Röntgen"], 2 * 2 / (2 + 3)),
        ("Wilhelm Röntgen", ["nobody", "wilhelm röntgen"], 1.0),
        ("a b b c", ["b b d"], 2 * 2 / (3 + 3)),  # "a" is an article.
        ("x", ["y"], 0.0),
        ("", ["y"], 0.0),
        ("the", ["an"], 1.0),
    ],
)
def test_f1_counts_words_that_both_have(prediction: str, answers: list[str], expected: float) -> None:
    assert scores.qa_f1(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        (" 48213. Yes", ["48213"], 1.0),
        ("4821", ["48213"], 0.0),
        ("ABCDE, fghij", ["abcde", "FGHIJ", "KLMNO"], 2 / 3),
    ],
)
def test_recall_is_the_share_of_needles_that_were_found(prediction: str, answers: list[str], expected: float) -> None:
    assert scores.needle_recall(prediction, answers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        (" It is the SECOND one.", ["first", "second"], 1.0),
        ("third", ["first", "second"], 0.0),
        ("third", [], 0.0),
    ],
)
def test_one_answer_of_several_is_enough(prediction: str, answers: list[str], expected: float) -> None:
    assert scores.contains_any(prediction, answers) == expected


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Paragraph 15.", ["Paragraph 15"], 1.0),
        ("Paragraph 15.", ["Paragraph 1"], 0.0),
        ("7 or 9", ["9"], 0.5),
        ("7 7 9", ["9", "7"], 2 / 3),
        ("seven", ["7"], 0.0),
        ("7", ["none"], 0.0),
    ],
)
def test_right_numbers_are_counted_among_all_that_are_said(
    prediction: str, answers: list[str], expected: float
) -> None:
    assert scores.right_numbers(prediction, answers) == pytest.approx(expected)


def test_rouge_l_is_the_f1_of_the_longest_common_subsequence() -> None:
    # "police ... the gunman" of the longer texts: three of four words, in order, on both sides.
    assert scores.rouge_l("police kill the gunman", ["police killed the gunman"]) == pytest.approx(0.75)
    assert scores.rouge_l("the gunman kill police", ["police killed the gunman"]) == pytest.approx(0.5)
    assert scores.rouge_l("a b", ["c d", "a b"]) == 1.0


def test_a_label_is_right_or_wrong() -> None:
    assert scores.accuracy("positive", ["positive"]) == 1.0
    assert scores.accuracy("negative", ["positive"]) == 0.0


def test_divergence_and_agreement_of_positions() -> None:
    reference = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0], [5.0, 1.0]])
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)], [7.0, 3.0]])
    expected = 0.75 * math.log(3) + 0.25 * math.log(1 / 3)
    torch.testing.assert_close(fidelity.divergence(reference, logits), torch.tensor([0.0, expected, 0.0]))
    assert fidelity.agreement(reference, logits).tolist() == [1.0, 0.0, 1.0]
    assert fidelity.divergence(reference.bfloat16(), logits.bfloat16()).dtype == torch.float32


@pytest.fixture(autouse=True)
def _modules_go_to_a_folder_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evaluate.config.HF_EVALUATE_CACHE", tmp_path)
    monkeypatch.setattr("evaluate.config.HF_METRICS_CACHE", tmp_path / "metrics")


@pytest.mark.parametrize("name", ["accuracy", "contains_any", "exact_match", "needle_recall", "qa_f1", "rouge_l"])
def test_modules_of_texts_give_the_mean_of_the_scores(name: str) -> None:
    module = evaluate.load(metric_path(name))
    predictions, references = ["red fox", "blue"], [["red fox"], ["green bird", "red"]]
    one = getattr(scores, name)
    expected = sum(one(*pair) for pair in zip(predictions, references, strict=True)) / 2
    assert module.compute(predictions=predictions, references=references) == {name: pytest.approx(expected)}
    assert expected == 0.5


def test_the_module_of_numbers_gives_the_mean_of_the_scores() -> None:
    module = evaluate.load(metric_path("right_numbers"))
    found = module.compute(predictions=["7 or 9", "Paragraph 3"], references=[["9"], ["Paragraph 3"]])
    assert found == {"right_numbers": pytest.approx(0.75)}


@pytest.mark.parametrize(("name", "function"), [("kl", fidelity.divergence), ("agreement", fidelity.agreement)])
def test_modules_of_logits_give_the_mean_over_all_positions(name: str, function: object) -> None:
    chance = torch.Generator().manual_seed(0)
    theirs, ours = ([torch.randn(positions, 7, generator=chance) for positions in (3, 1)] for _ in range(2))
    found = evaluate.load(metric_path(name)).compute(
        predictions=[table.tolist() for table in ours], references=[table.tolist() for table in theirs]
    )
    assert callable(function)
    expected = torch.cat([function(*pair) for pair in zip(theirs, ours, strict=True)]).mean()
    assert found == {name: pytest.approx(float(expected), rel=1e-5)}


def test_every_module_has_a_name_and_others_are_refused() -> None:
    texts = ["accuracy", "contains_any", "exact_match", "needle_recall", "qa_f1", "right_numbers", "rouge_l"]
    assert metric_names() == sorted([*texts, "agreement", "kl"])
    with pytest.raises(ValueError, match="metric must be one of"):
        metric_path("bleu")
