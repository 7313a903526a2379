"""Methods of a comparison as text, epochs at equal samples seen, and shuffled labels."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from training import make_examples

from mmaudit.audit.errors import ConfigError
from mmaudit.rebalance.curriculum import OrderConfig
from mmaudit.train.comparison import cells
from mmaudit.train.comparison.cells import (
    MethodSpec,
    anti_curriculum,
    class_and_missing_subsets,
    parse_method,
    planned_epochs,
    shuffle_labels,
)
from mmaudit.train.config import FinetuneConfig, TrainConfig


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("joint", {"balancing": "joint"}),
        ("bss-h+sum", {"sampling": "bss-h", "balancing": "sum"}),
        ("late+ogm-ge+uniform", {"sampling": "uniform", "balancing": "ogm-ge", "fusion": "late"}),
        ("ogm-ge: balancing.ogm.alpha=0.8", {"balancing": "ogm-ge", "settings": ("balancing.ogm.alpha=0.8",)}),
        (
            "joint: optim.lr=1e-4, finetune.hidden=8 optim.freeze=['a', 'b']",
            {"balancing": "joint", "settings": ("optim.lr=1e-4", "finetune.hidden=8", "optim.freeze=['a', 'b']")},
        ),
        ("preset:ogm-ge-cremad", {"preset": "ogm-ge-cremad"}),
        ("preset:ogm-ge-cremad: optim.lr=0.1", {"preset": "ogm-ge-cremad", "settings": ("optim.lr=0.1",)}),
    ],
)
def test_method_is_read_from_its_text(text: str, expected: dict[str, object]) -> None:
    assert parse_method(f" {text} ") == MethodSpec(name=text, **expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("ogm-gee", "no method ogm-gee; did you mean ogm-ge"),
        ("preset:ogm-cremad", "no preset ogm-cremad; did you mean"),
        ("joint+sum", "joint and sum are both of the kind balancing"),
        ("joint: alpha", "'alpha' is not of the form SECTION.KEY=VALUE"),
        ("joint and sum", "not of the form NAME"),
        ("", "not of the form NAME"),
    ],
)
def test_wrong_methods_are_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parse_method(text)


def test_folders_of_methods_differ_and_are_plain() -> None:
    texts = ["joint", "bss-h+sum", "joint: optim.lr=0.1", "joint: optim.lr=0.2", "joint: optim.freeze=['../a']"]
    folders = [parse_method(text).folder for text in texts]
    assert folders[:2] == texts[:2]
    assert len(set(folders)) == len(texts)
    assert not [folder for folder in folders if set(folder) & set("/ :'\\")]


def test_opposite_order_is_the_control_of_curricula_alone() -> None:
    opposite = anti_curriculum(parse_method("bss-h+sum"), sampling="bss-h")
    assert opposite is not None
    assert (opposite.sampling, opposite.balancing) == ("anti-curriculum", "sum")
    assert anti_curriculum(parse_method("joint"), sampling="uniform") is None


@pytest.mark.parametrize(
    ("num_train", "budget", "epochs"), [(100, 600, 6), (90, 600, 7), (600, 600, 1), (1000, 600, 1)]
)
def test_epochs_read_at_least_the_budget(num_train: int, budget: int, epochs: int) -> None:
    assert planned_epochs(TrainConfig(), num_train=num_train, budget=budget) == epochs


@pytest.mark.parametrize("grow_epochs", [1, 4, 40])
def test_epochs_of_a_curriculum_count_its_shares(grow_epochs: int) -> None:
    order = OrderConfig(grow_epochs=grow_epochs)
    config = TrainConfig(finetune=FinetuneConfig(sampling="bss-h"), order=order)
    epochs = planned_epochs(config, num_train=1000, budget=6000)
    seen = [int(1000 * order.share(epoch)) for epoch in range(1, epochs + 1)]
    assert sum(seen) >= 6000 > sum(seen[:-1])


def test_shuffled_labels_keep_the_counts_and_the_test_labels() -> None:
    examples = make_examples()
    shuffled = shuffle_labels(examples, seed=0)
    for split in ("train", "validation"):
        rows = examples.rows(split)
        assert np.bincount(shuffled.label[rows]).tolist() == np.bincount(examples.label[rows]).tolist()
    train, test = examples.rows("train"), examples.rows("test")
    assert (shuffled.label[train] != examples.label[train]).mean() > 0.3
    assert shuffled.label[test].tolist() == examples.label[test].tolist()
    assert shuffle_labels(examples, seed=1).label.tolist() != shuffled.label.tolist()


def test_shuffled_method_is_the_same_method_on_shuffled_labels() -> None:
    text = "bss-h+sum: finetune.hidden=64"
    plain, shuffled = parse_method(text), parse_method(f"shuffled:{text}")
    assert shuffled.shuffled
    assert replace(shuffled, name=plain.name, shuffled=False) == plain
    assert shuffled.folder != plain.folder
    with pytest.raises(ConfigError, match="joint"):
        parse_method("shuffled:joit")


def test_subsets_of_classes_and_missing_modalities(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    examples = make_examples()
    present = examples.present.copy()
    test = examples.rows("test")
    present[test[:4], 1] = False
    present[examples.rows("train")[:4], 0] = False  # in no test sample
    label = np.repeat([0, 1, 2, 3], [2, 8, 5, 15])  # of the 30 test samples
    labels = examples.label.copy()
    labels[test] = label
    examples = replace(examples, present=present, label=labels)
    masks = class_and_missing_subsets(examples, test)
    assert list(masks) == ["class:a", "class:b", "class:c", "class:d", "missing:visual"]
    assert np.array_equal(masks["class:c"], label == 2)
    assert np.flatnonzero(masks["missing:visual"]).tolist() == [0, 1, 2, 3]
    monkeypatch.setattr(cells, "MAX_CLASSES", 2)
    with caplog.at_level(logging.INFO, logger="mmaudit"):
        assert list(class_and_missing_subsets(examples, test)) == ["class:a", "class:d", "missing:visual"]
    assert "the 1 rarest and the 1 most frequent of 4 among the test samples" in caplog.text
