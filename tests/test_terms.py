"""Hashed terms of texts: words of any script, and their sparse and dense vectors."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.sparse import csr_array
from sklearn.preprocessing import normalize

from mmaudit.audit.errors import Reason, UnusableError
from mmaudit.audit.features.vectors import (
    NUM_TERMS,
    count_terms,
    keep_buckets,
    project_terms,
    text_terms,
    text_words,
    weigh_terms,
)
from mmaudit.audit.media.files import MediaConfig

CONFIG = MediaConfig()


def same(first: str, second: str) -> bool:
    return bool(text_terms(first, CONFIG).tolist() == text_terms(second, CONFIG).tolist())


@given(text=st.text())
def test_case_and_blanks_do_not_matter(text: str) -> None:
    try:
        terms = text_terms(text, CONFIG)
    except UnusableError as error:
        assert error.reason is Reason.EMPTY  # noqa: PT017
        return
    assert terms.dtype == np.uint32
    assert (np.diff(terms.astype(np.int64)) >= 0).all()
    assert terms.max() < NUM_TERMS
    np.testing.assert_array_equal(text_terms(f" {text.casefold()}\n.", CONFIG), terms)


def test_words_of_any_script_are_terms() -> None:
    assert same("GROSSE Straße, Ärger!", "große STRASSE ärger!")
    assert same("Жёлтый ДОМ", "жёлтый дом")
    assert same("cafe\u0301", "caf\u00e9")
    assert same("\uff28\uff45\uff4c\uff4c\uff4f", "hello")
    assert same("dog bites man", "man bites dog")
    assert not same("dog bites man", "dog bites men")
    assert len(text_terms("हिन्दी", CONFIG)) == 1  # vowel signs do not split it
    assert len(text_terms("한국어 문장", CONFIG)) == 2  # Hangul has blanks between words


@pytest.mark.parametrize(
    ("text", "words", "num_terms"),
    [
        ("我爱你", ["我", "爱", "你"], 5),  # three characters, two pairs
        ("iPhone很好", ["iphone", "很", "好"], 4),
        ("カメラ", ["カ", "メ", "ラ"], 5),
        ("ดีมาก", ["ด", "ี", "ม", "า", "ก"], 9),
        ("𠮷野", ["𠮷", "野"], 3),
        ("really?! 很好！", ["really", "?", "!", "很", "好", "!"], 7),
        ("ok \U0001f600", ["ok", "\U0001f600"], 2),
    ],
)
def test_characters_of_scripts_without_blanks_are_words_and_pairs(text: str, words: list[str], num_terms: int) -> None:
    assert text_words(text) == words
    assert len(text_terms(text, CONFIG)) == num_terms


@pytest.mark.parametrize("text", ["", "  \n", "?! ... --"])
def test_text_without_words_is_empty(text: str) -> None:
    with pytest.raises(UnusableError, match=f"no words in {len(text)} characters") as caught:
        text_terms(text, CONFIG)
    assert caught.value.reason is Reason.EMPTY


def test_terms_do_not_depend_on_the_process() -> None:
    program = (
        "from mmaudit.audit.features.vectors import text_terms; from mmaudit.audit.media.files import MediaConfig;"
        "print(text_terms('The quick brown fox', MediaConfig()).tolist())"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(sys.path)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert outputs == {f"{text_terms('The quick brown fox', CONFIG).tolist()}\n".encode()}


TEXTS = ("a cat sat", "a dog sat there a dog", "birds")
RAW = np.array([[1, 1, 1, 0, 0, 0], [1 + np.log(2), 0, 1, 1 + np.log(2), 1, 0], [0, 0, 0, 0, 0, 1]])


def columns(rows: NDArray[np.float32]) -> list[tuple[float, ...]]:
    return sorted(tuple(np.round(column.astype(np.float64), 4).tolist()) for column in rows.T if column.any())


def test_weights_equal_sklearn_without_idf() -> None:
    terms = [text_terms(text, CONFIG) for text in TEXTS]
    counts = count_terms(np.concatenate(terms), np.array([len(row) for row in terms]))
    expected = columns(normalize(RAW))
    weights = weigh_terms(counts)
    # Not by weights[:, numbers], for which scipy makes an array of NUM_TERMS columns.
    numbers, column = np.unique(weights.indices, return_inverse=True)
    weights = csr_array((weights.data, column, weights.indptr), shape=(len(TEXTS), len(numbers)))
    assert columns(weights.toarray()) == expected
    assert columns(project_terms(counts, 1024)) == expected


def test_row_without_terms_is_zero() -> None:
    counts = count_terms(np.array([3, 3, 7], np.uint32), np.array([0, 2, 1]))
    assert weigh_terms(counts)[[0]].nnz == 0
    np.testing.assert_array_equal(project_terms(counts, 2), [[0, 0], [0, 1], [0, 1]])


def test_terms_of_some_buckets_are_kept() -> None:
    counts = count_terms(np.array([3, 3, 8, 13, 4], np.uint32), np.array([3, 1, 1]))
    kept = keep_buckets(counts, 5, np.array([3, 0]))
    assert [kept[[row]].indices.tolist() for row in range(3)] == [[3, 8], [13], []]
    assert kept.data.tolist() == [2, 1, 1]
    np.testing.assert_array_equal(project_terms(kept, 5)[:, [1, 2, 4]], 0)
