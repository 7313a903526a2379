"""Tests of the demo data: same seed gives same bytes, noise follows quality, no truth in the data folder."""

from __future__ import annotations

import math
import os
import wave
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import spearmanr

from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import ConfigError, RunError, ScoreError
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.cli.demo import KeypadConfig, recovery, write_keypad

CONFIG = KeypadConfig(num_samples=300)
SMALL = replace(CONFIG, num_samples=40)
# The tones of the keys by ITU-T Q.23, in Hz.
DTMF = {
    "1": (697, 1209), "2": (697, 1336), "3": (697, 1477),
    "4": (770, 1209), "5": (770, 1336), "6": (770, 1477),
    "7": (852, 1209), "8": (852, 1336), "9": (852, 1477),
    "0": (941, 1336),
}  # fmt: skip
Floats = NDArray[np.float64]


@pytest.fixture(scope="module")
def keypad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("keypad")
    assert write_keypad(folder, config=CONFIG, seed=0) == folder / "data"
    return folder


def truth_of(folder: Path) -> pa.Table:
    return pq.read_table(folder / "truth.parquet")


def column(folder: Path, name: str) -> NDArray[Any]:
    return np.array(truth_of(folder)[name].to_pylist())


def rows(folder: Path) -> list[dict[str, str]]:
    lines = [line.split(",") for line in (folder / "data" / "metadata.csv").read_text().splitlines()]
    return [dict(zip(lines[0], line, strict=True)) for line in lines[1:]]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def sound(folder: Path, row: dict[str, str]) -> tuple[Floats, int]:
    with wave.open(str(folder / "data" / row["audio_file_name"])) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2") / 32_768, file.getframerate()


def picture(folder: Path, row: dict[str, str]) -> Floats:
    with Image.open(folder / "data" / row["image_file_name"]) as image:
        return np.asarray(image, dtype=np.float64)


def tone_share(wave_: Floats, rate: int, tones: tuple[int, int]) -> float:
    """Return the share of a sound's power within 10 Hz of its two tones, which is signal but for spectral leakage."""
    power = np.abs(np.fft.rfft(wave_ * np.hanning(len(wave_)))) ** 2
    frequency = np.fft.rfftfreq(len(wave_), 1 / rate)
    near = np.min([np.abs(frequency - tone) for tone in tones], axis=0) <= 10
    return float(power[near].sum() / power.sum())


def scores(sample_id: NDArray[Any], discrepancy: Floats) -> ScoreTable:
    """Return a score table with this discrepancy audio - image."""
    confidence = np.stack([0.5 + discrepancy / 2, 0.5 - discrepancy / 2], axis=1).astype(np.float32)
    return ScoreTable(
        sample_id=sample_id.astype(object),
        label=np.zeros(len(sample_id), np.int32),
        label_name=np.full(len(sample_id), "0", dtype=object),
        modalities=("audio", "image"),
        confidence=confidence,
    )


def test_same_seed_gives_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        write_keypad(tmp_path / name, config=SMALL, seed=seed)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")
    another_seed = contents(tmp_path / "c")
    assert all(another_seed.get(name) != content for name, content in contents(tmp_path / "a").items())


def test_smaller_dataset_is_a_subset_of_a_larger_one(keypad: Path, tmp_path: Path) -> None:
    write_keypad(tmp_path, config=SMALL, seed=0)
    large = contents(keypad / "data")
    assert all(large[name] == content for name, content in contents(tmp_path / "data").items() if name[-4:] != ".csv")


def test_digits_have_equal_counts(keypad: Path) -> None:
    label, counts = np.unique([row["label"] for row in rows(keypad)], return_counts=True)
    assert label.tolist() == sorted(DTMF)
    assert set(counts) == {30}


def test_demo_data_open_as_audio_and_image(keypad: Path) -> None:
    dataset = open_dataset(keypad / "data")
    assert [modality.name for modality in dataset.modalities] == ["audio", "image"]
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    assert samples.sample_id.tolist() == truth_of(keypad)["sample_id"].to_pylist()
    assert samples.class_names == tuple("0123456789")


def test_data_folder_holds_no_truth(keypad: Path) -> None:
    assert list(rows(keypad)[0]) == ["id", "audio_file_name", "image_file_name", "label"]
    expected = {row[name] for row in rows(keypad) for name in ("audio_file_name", "image_file_name")}
    assert set(contents(keypad / "data")) == expected | {"metadata.csv"}
    assert {row["id"] for row in rows(keypad)} == {Path(name).stem for name in expected}


def test_file_sizes_follow_the_config(tmp_path: Path) -> None:
    config = KeypadConfig(num_samples=20, sample_rate=16_000, seconds=0.25, image_size=48)
    write_keypad(tmp_path, config=config, seed=0)
    wave_, rate = sound(tmp_path, rows(tmp_path)[0])
    assert (len(wave_), rate) == (4_000, 16_000)
    assert picture(tmp_path, rows(tmp_path)[0]).shape == (48, 48)


def test_clean_sounds_peak_at_the_tones_of_their_key(keypad: Path) -> None:
    clean = np.flatnonzero(column(keypad, "snr_db") > 0)
    assert {rows(keypad)[index]["label"] for index in clean} == set(DTMF)
    for index in clean:
        row = rows(keypad)[index]
        wave_, rate = sound(keypad, row)
        power = np.abs(np.fft.rfft(wave_))
        frequency = np.fft.rfftfreq(len(wave_), 1 / rate)
        low, high = (float(frequency[band][power[band].argmax()]) for band in (frequency < 1_075, frequency >= 1_075))
        assert (low, high) == pytest.approx(DTMF[row["label"]], abs=5)


def test_discrepancy_is_difference_of_qualities_and_covers_its_range(keypad: Path) -> None:
    sound_quality, sight_quality = column(keypad, "sound_quality"), column(keypad, "sight_quality")
    for quality in (sound_quality, sight_quality):
        assert quality.min() >= 0
        assert quality.max() <= 1
        assert np.histogram(quality, 10, (0, 1))[0].min() > 0
    discrepancy = column(keypad, "discrepancy")
    np.testing.assert_array_equal(discrepancy, sound_quality - sight_quality)
    assert np.histogram(discrepancy, 10, (-1, 1))[0].min() >= 5


def test_kinds_match_qualities(keypad: Path) -> None:
    kind = column(keypad, "kind")
    for name, sound_good, sight_good in (
        ("sound", True, False), ("sight", False, True), ("both", True, True), ("neither", False, False),
    ):  # fmt: skip
        assert (kind == name).mean() > 0.12
        assert (column(keypad, "sound_quality")[kind == name].mean() > 0.5) == sound_good
        assert (column(keypad, "sight_quality")[kind == name].mean() > 0.5) == sight_good


def test_tone_share_follows_sound_quality(keypad: Path) -> None:
    shares = np.array([tone_share(*sound(keypad, row), DTMF[row["label"]]) for row in rows(keypad)])
    snr_db = column(keypad, "snr_db")
    assert spearmanr(column(keypad, "sound_quality"), snr_db).statistic == pytest.approx(1)
    assert spearmanr(snr_db, shares).statistic > 0.97
    # The key is down for 0.3 .. 0.45 s of 0.5, and 10 Hz around each tone hold 1 % of the noise: at 0 dB, by powers,
    # the tones have about (0.75 + 0.01) / 1.75 = 0.43 of the whole (a window in the middle sees somewhat more).
    level = np.abs(snr_db) < 2
    assert 0.3 < shares[level].mean() < 0.65
    assert shares[snr_db < -20].max() < 0.1


def test_picture_noise_follows_sight_quality(keypad: Path) -> None:
    # Noise varies between adjacent pixels, an enlarged digit does not.
    pictures = [picture(keypad, row) for row in rows(keypad)]
    roughness = np.array([np.abs(np.diff(pixels, 2)).mean() / pixels.std() for pixels in pictures])
    noise = column(keypad, "picture_noise")
    assert spearmanr(column(keypad, "sight_quality"), noise).statistic == pytest.approx(-1)
    assert spearmanr(noise, roughness).statistic > 0.9


def test_complete_dataset_is_not_rewritten(tmp_path: Path) -> None:
    write_keypad(tmp_path, config=SMALL, seed=0)
    for file in tmp_path.rglob("*.*"):
        os.utime(file, (1, 1))
    write_keypad(tmp_path, config=SMALL, seed=0)
    assert {file.stat().st_mtime for file in tmp_path.rglob("*.*")} == {1}


@pytest.mark.parametrize("lost", ["data/metadata.csv", "data/audio", "data/image"])
def test_incomplete_dataset_is_completed(tmp_path: Path, lost: str) -> None:
    write_keypad(tmp_path, config=SMALL, seed=0)
    expected = contents(tmp_path)
    path = tmp_path / lost
    (next(path.iterdir()) if path.is_dir() else path).unlink()
    write_keypad(tmp_path, config=SMALL, seed=0)
    assert contents(tmp_path) == expected


def test_other_data_are_not_overwritten(tmp_path: Path) -> None:
    write_keypad(tmp_path, config=SMALL, seed=0)
    before = contents(tmp_path)
    with pytest.raises(RunError, match="a demo dataset of seed 0"):
        write_keypad(tmp_path, config=SMALL, seed=1)
    (tmp_path / "truth.parquet").unlink()
    with pytest.raises(RunError, match="other data"):
        write_keypad(tmp_path, config=SMALL, seed=0)
    assert set(before) - set(contents(tmp_path)) == {"truth.parquet"}


def test_config_outside_limits_is_refused() -> None:
    for options in ({"num_samples": 19}, {"num_samples": 1_798}, {"sample_rate": 2_000}, {"image_size": 4}):
        with pytest.raises(ConfigError, match=f"keypad.{next(iter(options))}"):
            KeypadConfig(**options)


def test_recovery_of_truth_is_one_and_of_its_negative_minus_one(keypad: Path) -> None:
    names, planted = column(keypad, "sample_id"), column(keypad, "discrepancy")
    same = recovery(keypad / "truth.parquet", scores(names, planted))
    negated = recovery(keypad / "truth.parquet", scores(names, -planted))
    assert same.spearman == pytest.approx(1)
    assert negated.spearman == pytest.approx(-1)
    assert (same.right_signs, negated.right_signs, same.num_samples) == (1, 0, 300)


def test_recovery_joins_by_id(keypad: Path) -> None:
    names, planted = column(keypad, "sample_id"), column(keypad, "discrepancy")
    rows_ = np.random.default_rng(0).permutation(len(names))[:100]
    recovered = recovery(keypad / "truth.parquet", scores(names[rows_], planted[rows_]))
    assert recovered.spearman == pytest.approx(1)
    assert recovered.num_samples == 100


def test_interval_is_fishers_and_contains_the_correlation(keypad: Path) -> None:
    names, planted = column(keypad, "sample_id"), column(keypad, "discrepancy")
    noisy = np.clip(planted + np.random.default_rng(0).normal(0, 0.4, len(planted)), -1, 1)
    recovered = recovery(keypad / "truth.parquet", scores(names, noisy))
    low, high = recovered.interval
    assert low < recovered.spearman < high
    half_width = 1.96 * math.sqrt((1 + recovered.spearman**2 / 2) / 297)
    assert math.atanh(high) - math.atanh(low) == pytest.approx(2 * half_width)


def test_incomparable_scores_are_refused(keypad: Path) -> None:
    names, planted = column(keypad, "sample_id"), column(keypad, "discrepancy")
    unknown_ids = np.array([f"other-{index}" for index in range(len(names))])
    with pytest.raises(ScoreError, match="0 scored samples"):
        recovery(keypad / "truth.parquet", scores(unknown_ids, planted))
    with pytest.raises(ScoreError, match="nothing to recover"):
        recovery(keypad / "truth.parquet", scores(names, np.zeros(len(names))))
