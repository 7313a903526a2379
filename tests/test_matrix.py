"""Features in memory, in chunks, and of several modalities together."""

from __future__ import annotations

import numpy as np

from mmaudit.audit.features.matrix import (
    JointInputs,
    MatrixInputs,
    Numbers,
    TermInputs,
    chunks,
    has_terms,
    in_memory,
    read_terms,
    reading_order,
)
from mmaudit.audit.features.vectors import NUM_TERMS, count_terms

RNG = np.random.default_rng(0)


def test_joint_inputs_concatenate_features_and_masked_parts_are_nan() -> None:
    first, second = RNG.standard_normal((2, 5, 3)).astype(np.float32)
    joint = JointInputs(parts=(MatrixInputs(matrix=first), MatrixInputs(matrix=second)))
    rows = np.array([4, 0])
    np.testing.assert_array_equal(joint.read(rows), np.hstack([first, second])[rows])
    assert joint.num_features == 6
    masked = joint.mask(frozenset({0})).read(rows)
    assert np.isnan(masked[:, :3]).all()
    np.testing.assert_array_equal(masked[:, 3:], second[rows])


def test_chunks_partition_rows_within_max_bytes() -> None:
    inputs = MatrixInputs(matrix=np.zeros((5_000, 8), np.float32))
    parts = list(chunks(inputs, max_bytes=4 * 8 * 300))
    assert [len(part) for part in parts[:-1]] == [300] * (len(parts) - 1)
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(5_000))
    assert list(chunks(inputs, np.zeros(0, np.intp))) == []


def test_texts_are_read_as_vectors_or_as_terms_beside_the_numbers() -> None:
    counts = count_terms(np.array([3, 3, 40, 7], np.uint32), np.array([2, 1, 0, 1]))
    present = np.array([True, True, False, True])
    text = TermInputs(counts=counts, present=present, num_buckets=16)
    numbers = MatrixInputs(matrix=np.ones((4, 3), np.float32))
    joint = JointInputs(parts=(text, numbers, text))
    rows = np.array([3, 0, 2])
    assert joint.num_features == 35
    assert (joint.num_numbers, Numbers(inputs=joint).num_features) == (3, 3)
    np.testing.assert_array_equal(joint.read(rows), np.hstack([text.read(rows), numbers.read(rows), text.read(rows)]))
    np.testing.assert_array_equal(Numbers(inputs=joint).read(rows), numbers.read(rows))
    terms = read_terms(joint, rows)
    assert terms is not None
    assert terms.shape == (3, 2 * NUM_TERMS)
    assert [(row.indices % NUM_TERMS).tolist() for row in (terms[[0]], terms[[1]], terms[[2]])] == [[7, 7], [3, 3], []]
    masked = read_terms(joint.mask(frozenset({0})), rows)
    assert masked is not None
    assert masked.shape == terms.shape
    assert masked[[0]].indices.tolist() == [NUM_TERMS + 7]
    by_number, by_term = joint.parts_of_columns(np.array([0, NUM_TERMS - 1, NUM_TERMS, 2 * NUM_TERMS - 1]))
    assert (by_number.tolist(), by_term.tolist()) == ([1, 1, 1], [0, 0, 2, 2])
    assert np.isnan(text.read(np.array([2]))).all()
    assert (has_terms(joint), has_terms(numbers), has_terms(JointInputs(parts=(numbers,)))) == (True, False, False)
    held = in_memory(joint, rows)
    np.testing.assert_array_equal(held.read(np.arange(3)), joint.read(rows))
    assert reading_order(Numbers(inputs=joint), rows).tolist() == [1, 2, 0]
