"""Laws of score tables from probabilities of other models: the formulas of the audit, and checks of every input."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import log_loss

from mmaudit.audit import metrics
from mmaudit.audit.errors import ConfigError, MmauditError, ScoreError
from mmaudit.audit.scores.sample_scores import score_probabilities
from mmaudit.audit.scores.table import ScoreTable, read_scores, write_scores
from mmaudit.cli.splitting import split as write_split

NUM_ROWS, NUM_CLASSES = 200, 3


def draw_probabilities(
    seed: int, *, sharpness: float = 2.0
) -> tuple[dict[str, NDArray[np.float32]], NDArray[np.int32]]:
    """Draw probabilities (n, k) of two modalities that are often right about labels (n,)."""
    rng = np.random.default_rng(seed)
    label = rng.integers(0, NUM_CLASSES, NUM_ROWS).astype(np.int32)
    logits = rng.normal(size=(2, NUM_ROWS, NUM_CLASSES)) + sharpness * np.eye(NUM_CLASSES)[label]
    exponentials = np.exp(logits)
    probabilities = (exponentials / exponentials.sum(axis=2, keepdims=True)).astype(np.float32)
    return {"audio": probabilities[0], "video": probabilities[1]}, label


def test_columns_follow_the_formulas() -> None:
    probabilities, label = draw_probabilities(0)
    scores = score_probabilities(probabilities, label)
    audio, video = probabilities.values()
    rows = np.arange(NUM_ROWS)
    np.testing.assert_allclose(scores.confidence, np.stack([audio[rows, label], video[rows, label]], axis=1), rtol=1e-5)
    np.testing.assert_allclose(scores.discrepancy(), audio[rows, label] - video[rows, label], atol=1e-6)
    assert scores.loss is not None
    assert scores.entropy is not None
    assert scores.margin is not None
    assert scores.confidence_fused is not None
    assert scores.similarity is not None
    exact = audio.astype(np.float64)
    expected = log_loss(label, exact / exact.sum(axis=1, keepdims=True))
    assert float(scores.loss[:, 0].mean()) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(scores.entropy[:, 1], -(video * np.log(video)).sum(axis=1), rtol=1e-4)
    ordered = np.sort(audio, axis=1)
    np.testing.assert_allclose(scores.margin[:, 0], ordered[:, -1] - ordered[:, -2], atol=1e-6)
    np.testing.assert_array_equal(scores.prediction, np.stack([audio.argmax(axis=1), video.argmax(axis=1)], axis=1))
    fused = np.sqrt(audio.astype(np.float64) * video)
    np.testing.assert_allclose(
        scores.confidence_fused, (fused / fused.sum(axis=1, keepdims=True))[rows, label], rtol=1e-4
    )
    np.testing.assert_array_equal(scores.prediction_fused, fused.argmax(axis=1))
    np.testing.assert_allclose(scores.similarity, metrics.similarity([audio, video]), rtol=1e-5)


@given(st.integers(0, 1000))
@settings(max_examples=examples(20))
def test_swapped_modalities_negate_the_discrepancy_and_leave_the_gap(seed: int) -> None:
    probabilities, label = draw_probabilities(seed)
    scores = score_probabilities(probabilities, label)
    swapped = score_probabilities(dict(reversed(probabilities.items())), label)
    np.testing.assert_array_equal(swapped.discrepancy(), -scores.discrepancy())
    np.testing.assert_array_equal(swapped.gap, scores.gap)
    np.testing.assert_array_equal(swapped.p_balanced, scores.p_balanced)


def test_a_missing_modality_is_a_row_of_nan() -> None:
    probabilities, label = draw_probabilities(1)
    text = probabilities["audio"].copy()
    text[5] = np.nan
    scores = score_probabilities({**probabilities, "text": text}, label)
    assert scores.present[5].tolist() == [True, True, False]
    assert scores.present.sum() == 3 * NUM_ROWS - 1
    assert scores.prediction is not None
    assert scores.prediction[5, 2] == -1
    with pytest.raises(ScoreError, match="1 samples have fewer than two values of confidence"):
        score_probabilities({"video": probabilities["video"], "text": text}, label)


def test_labels_may_be_names_of_classes() -> None:
    probabilities, label = draw_probabilities(2)
    classes = ["cat", "dog", "owl"]
    names = [classes[number] for number in label]
    by_name = score_probabilities(probabilities, names, classes=classes)
    by_number = score_probabilities(probabilities, label, classes=classes)
    assert by_name.to_arrow().equals(by_number.to_arrow())
    assert by_name.label_name.tolist() == names


def test_test_samples_choose_nothing() -> None:
    probabilities, label = draw_probabilities(3)
    splits = ["test" if row % 4 == 0 else "train" for row in range(NUM_ROWS)]
    changed = {name: values.copy() for name, values in probabilities.items()}
    changed["audio"][::4] = changed["audio"][::4][:, [1, 2, 0]]
    first, second = (score_probabilities(values, label, splits=splits) for values in (probabilities, changed))
    train = np.array(splits) == "train"
    for name in ("p_balanced", "balance"):
        np.testing.assert_array_equal(getattr(first, name)[train], getattr(second, name)[train])


def test_the_table_can_be_written_and_split(tmp_path: Path) -> None:
    probabilities, label = draw_probabilities(4, sharpness=1.0)
    ids = [f"clip {row}" for row in range(NUM_ROWS)]
    scores = score_probabilities(probabilities, label, ids=ids, groups=[f"g{row % 20}" for row in range(NUM_ROWS)])
    write_scores(scores, tmp_path / "scores.parquet")
    assert read_scores(tmp_path / "scores.parquet").to_arrow().equals(scores.to_arrow())
    for options in ({"balanced": True}, {"subset": "most-balanced:10%"}, {"gmm": "balanced"}):
        summary = write_split(
            run=tmp_path / "run", scores=tmp_path / "scores.parquet", name=next(iter(options)), **options
        )
        assert summary.num_scored == NUM_ROWS
        assert summary.num_kept + summary.numbers["dropped"] == NUM_ROWS


def _with(**changes: Any) -> ScoreTable:
    probabilities, label = draw_probabilities(5)
    arguments: dict[str, Any] = {"probabilities": probabilities, "labels": label, **changes}
    return score_probabilities(arguments.pop("probabilities"), arguments.pop("labels"), **arguments)


def _damaged(row: int, values: list[float]) -> dict[str, NDArray[np.float32]]:
    probabilities, _ = draw_probabilities(5)
    probabilities["video"][row] = values
    return probabilities


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"probabilities": {"audio": draw_probabilities(5)[0]["audio"]}}, MmauditError, "only one modality, audio"),
        ({"probabilities": {"a/b": np.ones((2, 2)), "c": np.ones((2, 2))}}, ConfigError, "must not contain"),
        ({"probabilities": {"a": np.ones(3), "b": np.ones(3)}}, ScoreError, r"shape \(3,\); \(n, k\)"),
        ({"probabilities": {"a": np.ones((2, 1)), "b": np.ones((2, 1))}}, ScoreError, r"shape \(2, 1\)"),
        (
            {"probabilities": {"a": np.full((2, 2), 0.5), "b": np.full((3, 2), 0.5)}},
            ScoreError,
            r"of b have shape \(3, 2\), those of the first modality \(2, 2\)",
        ),
        ({"probabilities": _damaged(7, [2.0, -1.0, 0.0])}, ScoreError, "video: row 7 has the least value -1"),
        ({"probabilities": _damaged(7, [0.5, 0.2, 0.1])}, ScoreError, "row 7 .* the sum 0.8; .* softmax"),
        ({"probabilities": _damaged(7, [np.inf, 0, 0])}, ScoreError, "row 7"),
        ({"probabilities": _damaged(7, [np.nan, 0.5, 0.5])}, ScoreError, "row 7 is NaN in part"),
        ({"labels": [0, 1]}, ScoreError, r"labels have shape \(2,\); \(200,\) needed"),
        ({"labels": [3] * NUM_ROWS}, ScoreError, "label 3 is no class; the probabilities have the classes 0 to 2"),
        ({"labels": [-1] * NUM_ROWS}, ScoreError, "label -1 is no class"),
        ({"labels": ["dgo"] * NUM_ROWS, "classes": ["cat", "dog", "owl"]}, ScoreError, "did you mean dog"),
        ({"classes": ["cat", "dog", "cat"]}, ScoreError, "two classes are called cat"),
        ({"classes": ["cat", "dog"]}, ScoreError, "classes has 2 entries; 3 needed"),
        ({"ids": ["a"] * NUM_ROWS}, ScoreError, "199 duplicate sample ids"),
        ({"groups": ["a"]}, ScoreError, "groups has 1 entries; 200 needed"),
        ({"splits": ["holdout"] * NUM_ROWS}, ScoreError, "must be one of train, validation, test"),
    ],
)
def test_wrong_input_is_refused_with_its_place(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _with(**changes)
