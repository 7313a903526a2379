"""Comparisons of methods: verdicts, corrections by manifest, tables, and what rules out a verdict."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from mmaudit.audit.errors import ConfigError
from mmaudit.train.comparison.arrays import compare_predictions
from mmaudit.train.comparison.verdicts import Comparison, build_comparison
from mmaudit.train.difference import compare_correctness, holm
from mmaudit.train.evaluate import compute_metrics


def draws(chance: float, *, seeds: int = 5, n: int = 900, seed: int = 0) -> NDArray[np.bool_]:
    return np.random.default_rng([seed, int(1000 * chance)]).random((seeds, n)) < chance


def planted() -> Comparison:
    return compare_predictions({"joint": draws(0.6), "ours": draws(0.7), "worse": draws(0.5), "same": draws(0.601)})


def test_verdicts_follow_the_planted_differences() -> None:
    comparison = planted()
    assert comparison.summary["verdict"].tolist() == ["helps", "hurts", "no evidence"]
    assert comparison.summary["reference"].unique().tolist() == ["joint"]
    assert "ours: helps, +" in comparison.sentences()[0]
    assert "smallest effect this design shows with power .8:" in comparison.sentences()[2]


def test_baseline_is_the_first_method_or_the_chosen_one() -> None:
    comparison = compare_predictions({"joint": draws(0.6), "ours": draws(0.7)}, baseline="ours")
    assert comparison.summary[["method", "verdict"]].to_numpy().tolist() == [["joint", "hurts"]]


def test_p_is_corrected_for_the_methods_of_a_manifest_and_not_for_controls() -> None:
    correct = {("a", name): draws(chance).astype(float) for name, chance in (("joint", 0.6), ("x", 0.62), ("y", 0.63))}
    correct |= {("b", name): draws(chance).astype(float) for name, chance in (("joint", 0.6), ("x", 0.64))}
    correct["a", "audio alone"] = draws(0.4).astype(float)
    comparison = build_comparison(
        correct,
        name="test",
        baseline="joint",
        subsets={"all": np.ones(900, dtype=bool)},
        group=None,
        trainings=[],
        sample_id=np.arange(900),
        controls={("a", "audio alone"): ("a", "joint")},
    )
    summary = comparison.summary.set_index(["manifest", "method"])
    assert summary.loc["a"].loc[["x", "y"], "p_holm"].tolist() == holm(summary.loc["a"].loc[["x", "y"], "p"].tolist())
    assert summary.loc["b"]["p_holm"].tolist() == summary.loc["b"]["p"].tolist()
    assert summary.loc[("a", "audio alone"), "verdict"] == "worse"
    assert comparison.sentences()[-1].startswith("control audio alone on a: worse, -")
    assert comparison.difference("b/x", "a/y").mean == pytest.approx(draws(0.64).mean() - draws(0.63).mean())


def test_difference_is_that_of_the_correctness_also_on_a_subset() -> None:
    mask = np.arange(900) < 300
    group = [f"g{number % 30}" for number in range(900)]
    comparison = compare_predictions({"joint": draws(0.6), "ours": draws(0.7)}, subsets={"first": mask}, group=group)
    expected = compare_correctness(draws(0.7)[:, mask], draws(0.6)[:, mask], group=group[:300])
    assert comparison.difference("ours", "joint", subset="first") == expected
    row = comparison.summary.set_index("subset").loc["first"]
    assert (row["difference"], row["num_samples"], row["verdict"]) == (expected.mean, 300, "")
    assert np.isnan(row["p_holm"])


def test_labels_turn_predicted_classes_into_correctness() -> None:
    labels = np.arange(900) % 3
    classes = {"joint": np.where(draws(0.6), labels, 3), "ours": np.where(draws(0.7), labels, 3)}
    comparison = compare_predictions(classes, labels=labels)
    assert comparison.summary["difference"].tolist() == planted().summary["difference"].tolist()[:1]
    assert comparison.per_sample["ours/0"].tolist() == draws(0.7)[0].tolist()


@pytest.mark.parametrize(("seeds", "n", "words"), [(1, 900, "one training of all methods"), (5, 29, "29 test samples")])
def test_one_seed_or_few_samples_have_no_verdict(seeds: int, n: int, words: str) -> None:
    trained = {"joint": draws(0.2, seeds=seeds, n=n), "ours": draws(0.95, seeds=seeds, n=n)}
    comparison = compare_predictions(trained)
    assert comparison.summary["verdict"].tolist() == ["no verdict"]
    assert words in comparison.warnings[0]
    assert not compare_predictions({"joint": draws(0.2, n=30), "ours": draws(0.95, n=30)}).warnings


def test_tables_state_the_same_numbers() -> None:
    comparison = planted()
    row = comparison.table().iloc[1]
    assert row["verdict"] == "helps"
    for text in (comparison.to_markdown(), comparison.to_latex()):
        assert all(value in text for value in (row["difference"], row["95% interval"].strip("[]"), row["accuracy"]))
    assert comparison.table()["verdict"].tolist()[0] == "baseline"


def with_probabilities() -> tuple[dict[str, NDArray[np.float32]], NDArray[np.int64]]:
    """Return probabilities (4, 300, 3) of two methods, the second with more of the true class, and the labels."""
    rng = np.random.default_rng(0)
    label = np.arange(300) % 3
    probabilities = {}
    for method, share in (("joint", 0.2), ("ours", 0.4)):
        drawn = (1 - share) * rng.dirichlet(np.ones(3), (4, 300))
        drawn[:, np.arange(300), label] += share
        probabilities[method] = drawn.astype(np.float32)
    return probabilities, label


def test_probabilities_have_metrics_with_intervals() -> None:
    probabilities, label = with_probabilities()
    predicted = {method: values.argmax(axis=2) for method, values in probabilities.items()}
    comparison = compare_predictions(predicted, labels=label, probabilities=probabilities)
    assert len(comparison.metrics) == 8
    expected = [compute_metrics(run, label) for run in probabilities["ours"]]
    rows: list[Any] = comparison.metrics.query("method == 'ours'").to_dict("records")
    for row in rows:
        assert row["value"] == pytest.approx(np.mean([entry[row["metric"]] for entry in expected]))
        assert row["low"] < row["value"] < row["high"]
    assert comparison.runs.query("method == 'ours'")["map"].tolist() == pytest.approx([row["map"] for row in expected])
    assert comparison.summary.equals(compare_predictions(predicted, labels=label).summary)


def test_without_probabilities_only_accuracy_is_known() -> None:
    comparison = planted()
    assert comparison.metrics["metric"].unique().tolist() == ["accuracy"]
    assert comparison.metrics["value"].tolist()[:2] == [draws(0.6).mean(), draws(0.7).mean()]
    assert comparison.runs[["macro_f1", "map", "ece"]].isna().all(axis=None)
    assert comparison.missing.empty
    single = compare_predictions({"joint": draws(0.6, seeds=1), "ours": draws(0.7, seeds=1)}).metrics
    assert single[["low", "high"]].isna().all(axis=None)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"probabilities": {"other": np.ones((4, 300, 3))}}, "probabilities of other, which has no predictions"),
        ({"probabilities": {"ours": np.ones((4, 300))}}, r"shape \(4, 300\), not \(4, 300, classes\)"),
        ({"probabilities": {"ours": np.full((4, 300, 3), np.nan)}}, "probabilities of ours have values outside"),
        ({"labels": None}, "probabilities need labels"),
        ({"labels": np.arange(300)}, r"labels are not whole numbers in \[0, 3\)"),
        ({"labels": np.array(["a"] * 300)}, r"labels are not whole numbers in \[0, 3\)"),
    ],
)
def test_bad_probabilities_are_refused(changes: dict[str, Any], words: str) -> None:
    probabilities, label = with_probabilities()
    correct = {method: np.ones((4, 300)) for method in probabilities}
    with pytest.raises(ConfigError, match=words):
        compare_predictions(correct, **{"labels": label, "probabilities": probabilities, **changes})


def test_a_method_without_finished_trainings_is_left_out() -> None:
    """A method whose trainings all diverged is in the trainings alone; of one with a single one there is no verdict."""
    training: dict[str, Any] = {"manifest": "a", "method": "joint", "kind": "method", "status": "finished"}
    trainings = [training | {"seed": seed} for seed in range(5)]
    trainings += [training | {"seed": seed, "method": "ours", "status": "diverged"} for seed in range(4)]
    trainings += [training | {"seed": 4, "method": "ours"}]
    trainings += [training | {"seed": seed, "method": "worse", "status": "diverged"} for seed in range(5)]
    comparison = build_comparison(
        {("a", "joint"): draws(0.2).astype(float), ("a", "ours"): draws(0.9, seeds=1).astype(float)},
        name="test",
        baseline="joint",
        subsets={"all": np.ones(900, dtype=bool)},
        group=None,
        trainings=trainings,
        seeds={("a", "ours"): [4], ("a", "joint"): range(5)},
        sample_id=np.arange(900),
    )
    assert comparison.summary[["method", "verdict"]].to_numpy().tolist() == [["ours", "no verdict"]]
    assert len(comparison.runs) == 15
    assert comparison.runs["accuracy"].notna().sum() == 6
    assert comparison.runs.query("status == 'diverged'")["subset"].unique().tolist() == ["all"]
    assert "a/ours/4" in comparison.per_sample
    assert comparison.warnings[0].startswith("one training of a/ours: without several seeds")


def test_latex_escapes_names() -> None:
    text = compare_predictions({"a_b": draws(0.6), "50% {x} & y": draws(0.7)}).to_latex()
    assert r"a\_b" in text
    assert r"50\% \{x\} \& y" in text
    assert r"95\% interval" in text


def test_forest_plot_has_a_point_and_an_interval_per_comparison() -> None:
    axes = planted().plot().axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["ours", "worse", "same"]
    points = [line.get_xdata()[0] for line in axes.lines if line.get_marker() in ("^", "v", "o")]  # type: ignore[index]
    assert points == pytest.approx((100 * planted().summary["difference"]).tolist())
    assert len(axes.lines) == 7  # and zero


def test_result_as_json_has_no_nan() -> None:
    comparison = compare_predictions({"joint": draws(0.6, seeds=1), "ours": draws(0.7, seeds=1)})
    content = json.loads(json.dumps(comparison.to_dict(), allow_nan=False))
    assert content["summary"][0]["p"] is None
    assert content["verdicts"] == comparison.sentences()


@pytest.mark.parametrize(
    ("predictions", "options", "words"),
    [
        ({"joint": draws(0.6)}, {}, "1 method: a comparison needs at least two"),
        ({"joint": draws(0.6), "ours": draws(0.7)}, {"baseline": "joimt"}, "did you mean joint"),
        ({"joint": draws(0.6), "ours": draws(0.7, n=800)}, {}, "800"),
        ({"joint": draws(0.6), "ours": draws(0.7)[0]}, {}, r"ours has the shape \(900,\)"),
        ({"joint": draws(0.6), "ours": draws(0.7)}, {"labels": [0] * 800}, "labels have the shape"),
        ({"joint": draws(0.6), "ours": draws(0.7)}, {"subsets": {"few": [True]}}, "subset few is no mask"),
        ({"joint": draws(0.6), "ours": 2 * draws(0.7)}, {}, "outside"),
        ({"joint": draws(0.6), "ours": draws(0.7)}, {"group": ["a"] * 3}, "group has 3 values for 900"),
        ({"joint": draws(0.6), "ours": draws(0.7)}, {"sample_id": ["a"] * 3}, "sample_id has 3 values for 900"),
    ],
)
def test_bad_input_is_refused(predictions: object, options: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        compare_predictions(predictions, **options)  # type: ignore[arg-type]


def test_unknown_names_have_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean joint"):
        planted().difference("ours", "jiont")
    with pytest.raises(ConfigError, match="no subset al;"):
        planted().difference("ours", "joint", subset="al")
