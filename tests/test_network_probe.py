"""Network probes: no network scores its training rows, and an interrupted training resumes."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from mmaudit.audit.dataset.labels import Target
from mmaudit.audit.errors import ConfigError, DatasetError, ScoreError
from mmaudit.audit.features.encoders import StoredPictures
from mmaudit.audit.features.matrix import Inputs, MatrixInputs
from mmaudit.audit.hashing import hash_rank
from mmaudit.audit.probes.config import NetworkConfig
from mmaudit.audit.probes.crops import PictureView
from mmaudit.audit.probes.cross_fit import CrossFit
from mmaudit.audit.probes.folds import assign_folds
from mmaudit.audit.probes.network_probe import fit_network
from mmaudit.audit.probes.probe_set import Probe
from mmaudit.audit.workers import Progress, no_progress

SOUND, PICTURE, FRAMES = (16, 12), (8, 8, 3), (2, 8, 8, 3)
QUICK = NetworkConfig(epochs=2, batch_size=16, lr=0.05, min_crop=0.6, width=1 / 16)
THOROUGH = replace(QUICK, epochs=6, batch_size=8, lr=0.01, lr_step=4)
ROWS = np.arange(72)

Bytes = NDArray[Any]


def planted(
    shape: tuple[int, ...], *, num_rows: int = 72, dtype: Any = np.uint8, seed: int = 0
) -> tuple[Bytes, Target]:
    """Draw noise of 0 to 99, with one of three bands, or colours, raised by 100: that is the class."""
    rng = np.random.default_rng(seed)
    label = (np.arange(num_rows) % 3).astype(np.int32)
    levels = rng.integers(0, 100, (num_rows, *shape))
    for row, band in enumerate(label):
        where = slice(5 * band, 5 * band + 5) if len(shape) == 2 else (..., band)
        levels[row][where] += 100
    rows = levels.reshape(num_rows, -1).astype(dtype)
    return rows, Target(task="classification", label=label, num_outputs=3)


def cross(
    label: NDArray[np.int32],
    *,
    group: list[str] | None = None,
    fits: NDArray[np.bool_] | None = None,
    num_folds: int = 3,
    seed: int = 0,
) -> CrossFit:
    ids = np.array([f"s{number:03d}" for number in range(len(label))], dtype=object)
    fits = np.ones(len(label), dtype=bool) if fits is None else fits
    groups = None if group is None else np.array(group, dtype=object)
    fold, inner = (
        assign_folds(ids, label, groups, fits, num_folds=num_folds, seed=fold_seed) for fold_seed in (seed, seed + 99)
    )
    return CrossFit(fold=fold, inner=inner, fits=fits, key=hash_rank(ids, seed=seed, purpose="rows"))


def fit(
    rows: Bytes | Inputs,
    target: Target,
    *cross_fits: CrossFit,
    shape: tuple[int, ...] = PICTURE,
    config: NetworkConfig = QUICK,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress = no_progress,
    folder: Path | None = None,
    stored: StoredPictures | None = None,
) -> Probe:
    inputs = MatrixInputs(matrix=rows) if isinstance(rows, np.ndarray) else rows
    cross_fits = cross_fits or (cross(target.label),)
    view = PictureView(shape=shape, stored=stored)
    return fit_network(
        inputs, view, target, cross_fits, config=config, seed=seed, device=device, progress=progress, folder=folder
    )


def accuracy(probe: Probe, target: Target) -> float:
    logits = probe.logits(np.arange(len(target)))
    return float((logits.mean(axis=0).argmax(axis=1) == target.label).mean())


@pytest.fixture(scope="module")
def fitted() -> tuple[Bytes, Target, Probe]:
    """Fit probes of two repeats to pictures."""
    rows, target = planted(PICTURE)
    return rows, target, fit(rows, target, cross(target.label), cross(target.label, seed=1))


Fitted = tuple[Bytes, Target, Probe]


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        (SOUND, np.float32),
        pytest.param(PICTURE, np.uint8, marks=pytest.mark.slow),
        pytest.param(PICTURE, np.float32, marks=pytest.mark.slow),
        (FRAMES, np.uint8),
    ],
)
def test_planted_signal_is_found_out_of_fold(shape: tuple[int, ...], dtype: Any) -> None:
    rows, target = planted(shape, dtype=dtype)
    probe = fit(rows, target, cross(target.label, num_folds=2), shape=shape, config=THOROUGH)
    assert accuracy(probe, target) > 0.8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA; the test above is its CPU twin")
@pytest.mark.parametrize(
    ("shape", "dtype"), [(SOUND, np.float32), (PICTURE, np.uint8), (PICTURE, np.float32), (FRAMES, np.uint8)]
)
def test_planted_signal_is_found_in_bfloat16_on_a_gpu(shape: tuple[int, ...], dtype: Any) -> None:
    rows, target = planted(shape, dtype=dtype)
    probe = fit(rows, target, shape=shape, config=THOROUGH, device="cuda")
    assert accuracy(probe, target) > 0.8


@pytest.mark.slow
def test_planted_signal_is_found_in_bfloat16(fitted: Fitted) -> None:
    rows, target, exact = fitted
    assert accuracy(fit(rows, target, config=replace(THOROUGH, precision="bfloat16")), target) > 0.8
    rounded = fit(rows, target, config=replace(QUICK, precision="bfloat16"))
    assert not np.array_equal(rounded.logits(ROWS)[0], exact.logits(ROWS)[0])


@pytest.mark.slow  # their quick twins: test_planted_signal_is_found_out_of_fold, and weights in test_network_weights.py
def test_multilabel_and_regression_signals_are_found() -> None:
    rows, target = planted(PICTURE)
    values = np.stack([target.label != 2, target.label != 0], axis=1).astype(np.float32)
    several = replace(target, task="multilabel", num_outputs=2, values=values)
    logits = fit(rows, several, cross(target.label, num_folds=2), config=THOROUGH).logits(ROWS)[0]
    assert ((logits > 0) == (values > 0)).mean() > 0.8
    number = (5000 + 100 * target.label[:, None]).astype(np.float32)
    regression = replace(target, task="regression", num_outputs=1, values=number)
    slower = replace(THOROUGH, epochs=12, lr=0.005, lr_step=8)
    logits = fit(rows, regression, config=slower).logits(ROWS)[0]
    assert ((logits - number) ** 2).mean() < 0.5 * number.var()


def test_memorisation_helps_only_with_copies_in_other_folds() -> None:
    """Patches of random classes, each three times: out of fold, only copies are predictable."""
    rng = np.random.default_rng(0)
    patches = rng.integers(0, 255, (16, 2, 2, 3)).astype(np.uint8)
    rows = patches.repeat(4, axis=1).repeat(4, axis=2).reshape(16, 192).repeat(3, axis=0)
    label = (rng.permutation(16) % 2).astype(np.int32).repeat(3)
    target = Target(task="classification", label=label, num_outputs=2)
    config = replace(QUICK, epochs=15, lr=0.02, lr_step=9, min_crop=1.0, flip=False, width=1 / 8)
    together = cross(label, group=[f"g{row // 3}" for row in range(48)])
    separated = replace(together, fold=(together.fold + np.arange(48) % 3).astype(np.int16) % 3)
    assert accuracy(fit(rows, target, separated, config=config), target) > 0.85
    assert accuracy(fit(rows, target, together, config=config), target) < 0.75  # of 16 pictures: chance 0.5, sd 0.125


def test_logits_depend_on_neither_labels_nor_other_rows_of_their_fold(fitted: Fitted) -> None:
    rows, target, before = fitted
    cross_fit = cross(target.label)
    in_fold = cross_fit.fold == 1
    turned = replace(target, label=np.where(in_fold, (target.label + 1) % 3, target.label).astype(np.int32))
    changed_rows = rows.copy()
    spoiled, *_ = np.flatnonzero(in_fold)
    changed_rows[spoiled] = 255 - changed_rows[spoiled]
    logits = fit(changed_rows, turned, cross_fit).logits(ROWS)[0]
    same = in_fold & (spoiled != ROWS)
    np.testing.assert_array_equal(logits[same], before.logits(ROWS)[0][same])
    assert (np.abs(logits - before.logits(ROWS)[0])[~same].max(axis=1) > 0).all()


def test_rows_outside_fits_or_missing_do_not_change_the_logits() -> None:
    rows, target = planted(PICTURE, dtype=np.float32)
    fits = np.arange(72) % 5 != 0
    missing = np.isin(ROWS, [1, 2, 7])
    rows[missing] = np.nan
    cross_fit = cross(target.label, fits=fits)
    turned = replace(target, label=np.where(fits & ~missing, target.label, (target.label + 1) % 3).astype(np.int32))
    logits = fit(rows, target, cross_fit).logits(ROWS)[0]
    assert np.isfinite(logits).all()
    np.testing.assert_array_equal(logits, fit(rows, turned, cross_fit).logits(ROWS)[0])
    without_missing = fit(rows, target, replace(cross_fit, fits=fits & ~missing)).logits(ROWS)[0]
    np.testing.assert_array_equal(logits, without_missing)


def test_repeats_have_different_folds_and_the_last_epoch_is_the_logits(fitted: Fitted) -> None:
    _, target, probe = fitted
    logits, by_epoch = probe.logits(ROWS), probe.logits_by_epoch(ROWS)
    assert logits.dtype == by_epoch.dtype == np.float32
    assert logits.shape == (2, 72, 3)
    assert by_epoch.shape == (2, 72, 3)
    assert not np.array_equal(logits[0], logits[1])
    np.testing.assert_array_equal(by_epoch[-1], logits[0])
    rows_subset = np.array([70, 3, 3])
    np.testing.assert_array_equal(probe.logits(rows_subset), logits[:, rows_subset])
    np.testing.assert_array_equal(probe.logits_by_epoch(rows_subset), by_epoch[:, rows_subset])
    own = np.eye(3)[target.label]
    margin = [
        ((epoch_logits - epoch_logits.mean(axis=1, keepdims=True)) * own).sum(axis=1).mean()
        for epoch_logits in by_epoch
    ]
    assert margin[0] < margin[-1]


def test_chosen_epoch_is_one_of_the_recorded_epochs() -> None:
    rows, target = planted(PICTURE)
    cross_fit = cross(target.label)
    probe = fit(rows, target, cross_fit, config=replace(QUICK, choose_epoch=True, lr=0.3, epochs=5))
    same = (probe.logits_by_epoch(ROWS) == probe.logits(ROWS)).all(axis=2)
    epochs_of_fold = {
        fold: set(np.flatnonzero(same[:, cross_fit.fold == fold].all(axis=1)).tolist()) for fold in range(3)
    }
    assert all(epochs_of_fold.values())
    assert any(4 not in epochs for epochs in epochs_of_fold.values())  # at this rate, the last is not always the best


def test_holdout_rows_only_choose_the_epoch() -> None:
    rows, target = planted(PICTURE)
    cross_fit = cross(target.label)
    holdout_mask = cross_fit.inner == 0
    turned = replace(target, label=np.where(holdout_mask, (target.label + 1) % 3, target.label).astype(np.int32))
    probes = [
        fit(rows, fold_target, cross_fit, config=replace(QUICK, choose_epoch=True)) for fold_target in (target, turned)
    ]
    np.testing.assert_array_equal(probes[0].logits_by_epoch(ROWS), probes[1].logits_by_epoch(ROWS))
    no_holdout = replace(cross_fit, inner=np.ones(72, np.int16))
    plain = fit(rows, target, no_holdout)
    np.testing.assert_array_equal(
        fit(rows, target, no_holdout, config=replace(QUICK, choose_epoch=True)).logits(ROWS), plain.logits(ROWS)
    )


def test_logits_depend_on_the_seed_only(fitted: Fitted) -> None:
    rows, target, first = fitted

    def disturb(stage: str, done: int, total: int, *, detail: str = "") -> None:
        torch.rand(done)
        np.random.default_rng().random()

    torch.manual_seed(77)
    repeated = fit(rows, target, progress=disturb)
    np.testing.assert_array_equal(repeated.logits(ROWS)[0], first.logits(ROWS)[0])
    assert not np.array_equal(fit(rows, target, seed=1).logits(ROWS)[0], first.logits(ROWS)[0])


@pytest.mark.usefixtures("usual_threads")
def test_two_threads_give_the_same_bytes_each_time() -> None:
    rows, target = planted(PICTURE)
    counts: set[int] = set()

    def count(stage: str, done: int, total: int, *, detail: str = "") -> None:
        counts.add(torch.get_num_threads())

    first, second = (fit(rows, target, config=replace(QUICK, epochs=1), progress=count) for _ in range(2))
    assert counts == {2}
    np.testing.assert_array_equal(first.logits(ROWS), second.logits(ROWS))


def test_shuffling_the_rows_shuffles_the_logits(fitted: Fitted) -> None:
    rows, target, first = fitted
    order = np.random.default_rng(3).permutation(72)
    cross_fit = cross(target.label)
    moved = CrossFit(**{name: getattr(cross_fit, name)[order] for name in ("fold", "inner", "fits", "key")})
    logits = fit(rows[order], target.take(order), moved).logits(ROWS)[0]
    np.testing.assert_array_equal(logits, first.logits(ROWS)[0][order])


@dataclass
class Watched:
    """Inputs that record how they are read."""

    matrix: Bytes
    batches: list[frozenset[int]] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)

    @property
    def num_rows(self) -> int:
        return len(self.matrix)

    @property
    def num_features(self) -> int:
        return int(self.matrix.shape[1])

    def read(self, rows: NDArray[np.integer[Any]]) -> Bytes:
        self.batches.append(frozenset(rows.tolist()))
        self.threads.add(threading.get_ident())
        values: Bytes = self.matrix[rows]
        values.setflags(write=False)
        return values


def test_rows_are_read_in_batches_by_other_threads() -> None:
    rows, target = planted(PICTURE)
    watched, cross_fit = Watched(matrix=rows), cross(target.label)
    fit(watched, target, cross_fit)
    assert max(map(len, watched.batches)) == QUICK.batch_size
    assert threading.get_ident() not in watched.threads
    after_survey = watched.batches[5:]
    lessons = [batch for batch in after_survey if len({cross_fit.fold[row] for row in batch}) > 1]
    assert len(set(lessons)) == len(lessons) == 3 * 3 * QUICK.epochs  # each epoch has batches of its own
    times = np.bincount([row for batch in lessons for row in batch])
    np.testing.assert_array_equal(times, 2 * QUICK.epochs)  # in both networks that may


def test_networks_have_different_initial_weights() -> None:
    rows, target = planted(PICTURE)
    cross_fit = cross(target.label)
    still = replace(QUICK, epochs=1, batch_size=64, lr=1e-12, min_crop=1.0, flip=False)
    logits = fit(rows, target, cross_fit, cross_fit, config=still).logits(ROWS)
    assert np.abs(logits[1] - logits[0]).max(axis=1).min() > 1e-3


def test_learning_rate_falls_and_only_pictures_are_augmented(fitted: Fitted) -> None:
    rows, target, before = fitted
    slower = fit(rows, target, config=replace(QUICK, lr_step=1)).logits_by_epoch(ROWS)
    np.testing.assert_array_equal(slower[0], before.logits_by_epoch(ROWS)[0])
    assert not np.array_equal(slower[1], before.logits_by_epoch(ROWS)[1])
    for shape in (SOUND, PICTURE):
        rows, target = planted(shape)
        cropped, uncropped = (
            fit(rows, target, shape=shape, config=replace(QUICK, epochs=1, min_crop=min_crop)).logits(ROWS)
            for min_crop in (0.5, 1.0)
        )
        assert np.array_equal(cropped, uncropped) == (shape == SOUND)


class StopError(Exception):
    """Stands for Ctrl-C by the user."""


def stop_after(steps: int) -> Progress:
    def stop(stage: str, done: int, total: int, *, detail: str = "") -> None:
        if done > steps:
            raise StopError

    return stop


def test_resumed_training_gives_the_same_bytes(fitted: Fitted, tmp_path: Path) -> None:
    rows, target, uninterrupted = fitted
    cross_fits = cross(target.label), cross(target.label, seed=1)
    with pytest.raises(StopError):
        fit(rows, target, *cross_fits, folder=tmp_path, progress=stop_after(4 * QUICK.epochs + 1))
    remaining = sorted(tmp_path.iterdir())
    assert len(remaining) == 4
    assert all(path.suffix == ".npy" and not path.name.startswith(".") for path in remaining)
    steps: list[tuple[int, int, str]] = []

    def record(stage: str, done: int, total: int, *, detail: str = "") -> None:
        steps.append((done, total, detail))

    resumed = fit(rows, target, *cross_fits, folder=tmp_path, progress=record)
    # The stored folds come first and are not counted as steps, whose times give the remaining time.
    assert [(done, total) for done, total, _ in steps] == [(done, 12) for done in (8, 9, 10, 11, 12)]
    assert steps[0][2] == "repeat 2 of 2, fold 2 of 3, epoch 1 of 2"
    np.testing.assert_array_equal(resumed.logits(ROWS), uninterrupted.logits(ROWS))
    np.testing.assert_array_equal(resumed.logits_by_epoch(ROWS), uninterrupted.logits_by_epoch(ROWS))
    assert len(list(tmp_path.iterdir())) == 6


def test_stored_folds_are_reused_only_for_equal_inputs_and_settings(tmp_path: Path) -> None:
    rows, target = planted(PICTURE)
    quick = replace(QUICK, epochs=1)
    first = fit(rows, target, config=quick, folder=tmp_path)
    files = set(tmp_path.iterdir())
    touched = rows.copy()
    touched[5, 5] += 1
    relabelled = replace(target, label=target.label[::-1].copy())
    variants: list[dict[str, Any]] = [
        {"config": replace(quick, lr=0.04)},
        {"seed": 1},
        {"rows": touched},
        {"target": relabelled},
        {"cross_fit": cross(target.label, seed=5)},
    ]
    for variant in variants:
        options = {
            "rows": rows,
            "target": target,
            "cross_fit": cross(target.label),
            "config": quick,
            "seed": 0,
            **variant,
        }
        probe = fit(
            *(options[name] for name in ("rows", "target", "cross_fit")),
            config=options["config"],
            seed=options["seed"],
            folder=tmp_path,
        )
        new = set(tmp_path.iterdir()) - files
        assert len(new) == 3
        files |= new
        assert not np.array_equal(probe.logits(ROWS), first.logits(ROWS))
    fit(rows, target, cross(target.label), cross(target.label, seed=9), config=quick, folder=tmp_path)  # a round more
    assert len(set(tmp_path.iterdir()) - files) == 3


def test_damaged_file_raises(tmp_path: Path) -> None:
    rows, target = planted(PICTURE)
    quick = replace(QUICK, epochs=1)
    fit(rows, target, config=quick, folder=tmp_path)
    path = min(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DatasetError, match=rf"{path.name} is damaged .*: delete it to train its network again"):
        fit(rows, target, config=quick, folder=tmp_path)


def test_masked_inputs_raise(fitted: Fitted) -> None:
    rows, _, probe = fitted
    with pytest.raises(ConfigError, match=r"cannot score masked inputs, .*: set probe\.joint = false"):
        probe.logits(ROWS, inputs=MatrixInputs(matrix=rows))


def test_diverging_training_raises() -> None:
    rows, target = planted(PICTURE)
    with pytest.raises(ScoreError, match=r"repeat 0, fold 0 diverged in epoch 1: its loss is .*; lower network\.lr"):
        fit(rows, target, config=replace(QUICK, lr=1e30))


def test_too_few_rows_raise() -> None:
    rows, target = planted(PICTURE)
    cross_fit = cross(target.label, fits=ROWS < 1)
    with pytest.raises(ScoreError, match=r"network of fold \d has \d rows to train on, .*\(probe\.folds\)"):
        fit(rows, target, cross_fit)


def test_rows_of_another_shape_raise() -> None:
    rows, target = planted(PICTURE)
    with pytest.raises(ConfigError, match=r"shape \(7, 10\) have 70 numbers, but a row has 192"):
        fit(rows, target, shape=(7, 10))


def test_missing_transformers_raises_with_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    rows, target = planted(PICTURE)
    with pytest.raises(ConfigError, match=r'pip install "mmaudit\[hf\]"'):
        fit(rows, target)


def test_probe_of_stored_pictures_is_independent_of_row_order_and_learns_from_crops() -> None:
    rows, target = planted((12, 12, 3))
    sizes = np.tile(np.array([16, 12], "<u2").view(np.uint8), (len(rows), 1))
    stored = StoredPictures(num_frames=1, num_choices=1, side=12, is_sized=True)
    matrix = np.concatenate([rows, sizes], axis=1)
    own = cross(target.label, num_folds=2)
    options: dict[str, Any] = {"shape": (8, 8, 3), "stored": stored}
    assert accuracy(fit(matrix, target, own, config=THOROUGH, **options), target) > 0.6
    probe = fit(matrix, target, own, **options)
    order = np.random.default_rng(0).permutation(len(rows))
    moved = CrossFit(fold=own.fold[order], inner=own.inner[order], fits=own.fits[order], key=own.key[order])
    reordered = fit(matrix[order], target.take(order), moved, **options)
    np.testing.assert_array_equal(reordered.logits(np.argsort(order)), probe.logits(np.arange(len(rows))))


@pytest.mark.parametrize("name", ["imagenet", "none"])
def test_fixed_normalisation_changes_the_probe(name: str, fitted: Fitted) -> None:
    rows, target, probe = fitted
    other = fit(rows, target, config=replace(QUICK, normalise_pictures=name))
    assert not np.array_equal(other.logits(np.arange(4))[0], probe.logits(np.arange(4))[0])
    assert np.isfinite(other.logits(np.arange(len(rows)))).all()
