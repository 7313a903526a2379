"""Content hashes: equal to those of encoding, for any number of threads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.features.encode import encode_dataset
from mmaudit.audit.features.encoded_samples import collect_encoded, content_hashes
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.workers import no_progress


def open_clips(folder: Path) -> Dataset:
    return open_dataset(folder, DataConfig(id="id"))


@pytest.mark.parametrize("threads", [0, 3])
def test_hashes_of_media_equal_those_of_encoding(clips: Path, tmp_path: Path, threads: int) -> None:
    (clips / "4.wav").unlink()
    dataset = open_clips(clips)
    tasks = encode_dataset(dataset, tmp_path / "cache", media=MediaConfig(), num_workers=0, progress=no_progress)
    encoded = collect_encoded(dataset, read_samples(dataset, seed=0, test_fraction=0.2), tasks)
    all_hashes = list(content_hashes(dataset, num_threads=threads))
    assert [hashes.sample_id for hashes in all_hashes] == encoded.samples.sample_id.tolist()
    assert [hashes.content for hashes in all_hashes] == encoded.content.tolist()
    assert {hashes.sample_id: hashes.problem for hashes in all_hashes if hashes.problem} == {"004": "no file 4.wav"}
    selected_ids = [hashes.sample_id for hashes in content_hashes(dataset, only={"007", "011"})]
    assert selected_ids == ["007", "011"]


def test_hashes_of_vectors_equal_those_of_encoding(planted: Callable[..., Path], tmp_path: Path) -> None:
    dataset = open_dataset(planted(num_samples=30))
    tasks = encode_dataset(dataset, tmp_path / "cache", media=MediaConfig(), num_workers=0, progress=no_progress)
    encoded = collect_encoded(dataset, read_samples(dataset, seed=0, test_fraction=0.2), tasks)
    assert [hashes.content for hashes in content_hashes(dataset)] == encoded.content.tolist()
    assert [hashes.content for hashes in content_hashes(dataset, only={"s0003"})] == [encoded.content[3]]


def test_hash_depends_only_on_own_files(clips: Path) -> None:
    before = {hashes.sample_id: hashes.content for hashes in content_hashes(open_clips(clips))}
    (clips / "5.wav").write_bytes((clips / "3.wav").read_bytes())
    after = {hashes.sample_id: hashes.content for hashes in content_hashes(open_clips(clips))}
    assert [name for name in before if before[name] != after[name]] == ["005"]
