"""Rows spread over a source, from which kinds are inferred."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmaudit.audit.dataset.dataset import DataConfig, open_dataset
from mmaudit.audit.dataset.formats import sample as samples
from mmaudit.audit.dataset.formats.sample import sample_positions, sample_row_groups, sample_rows, spread_positions
from mmaudit.audit.dataset.formats.tables import plan_files, plan_rows
from mmaudit.audit.storage import read_batches


def test_positions_are_spread_and_reproducible() -> None:
    assert spread_positions(5, 8) == [0, 1, 2, 3, 4]
    positions = spread_positions(10**8, 64)
    assert positions == spread_positions(10**8, 64)
    assert len(positions) == len(set(positions)) == 64
    assert positions[:16] == list(range(16))
    assert positions[-16:] == list(range(10**8 - 16, 10**8))
    between = positions[16:-16]
    assert between == sorted(between)
    assert max(between) - min(between) > 5 * 10**7
    assert spread_positions(10, 1) == [0]
    assert spread_positions(0, 4) == []


def sparse_rows(num_rows: int, first: int) -> pa.Table:
    """Return rows with media in memory whose column `late` is null before row `first`."""
    late = [None if row < first else f"{row}.wav" for row in range(num_rows)]
    return pa.table({"id": range(num_rows), "late": pa.array(late, pa.string()), "raw": [b"GIF89a"] * num_rows})


@pytest.mark.parametrize("first", [1_000, 4_998, 4_999])
def test_column_that_begins_late_has_values_in_the_sample(tmp_path: Path, first: int) -> None:
    rows = sparse_rows(5_000, first)
    pq.write_table(rows, tmp_path / "one.parquet")
    pq.write_table(rows, tmp_path / "many.parquet", row_group_size=100)
    pq.write_table(rows, tmp_path / "unknown.parquet", row_group_size=1_000, write_statistics=False)
    plans = [plan_files(tmp_path, [tmp_path / f"{name}.parquet"], shard_rows=9) for name in ("one", "many", "unknown")]
    for plan in (plan_rows(tmp_path, rows, shard_rows=256), *plans):
        assert plan.sample["late"].null_count < len(plan.sample) <= 32
        assert plan.sample.schema.equals(rows.schema)


def test_column_in_few_rows_of_the_middle_is_found_by_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a hundred row groups only those of the sample and the one with the value are opened."""
    late = [f"{row}.wav" if row == 4_321 else None for row in range(5_000)]
    rows = sparse_rows(5_000, 0).set_column(1, "late", pa.array(late, pa.string()))
    pq.write_table(rows, tmp_path / "d.parquet", row_group_size=50)
    opened = []
    read = read_batches

    def record(path: str, **options: Any) -> Any:
        opened.append(options["row_groups"])
        return read(path, **options)

    monkeypatch.setattr(samples, "read_batches", record)
    sample = sample_row_groups([(str(tmp_path / "d.parquet"), number, None) for number in range(100)], rows.schema)
    assert sample["late"].drop_null().to_pylist() == ["4321.wav"]
    assert len(opened) == 9
    assert opened[-1] == [86]


def test_sample_of_tables_is_that_of_their_rows() -> None:
    rows = sparse_rows(1_000, 700)
    first, second = sample_positions([rows.slice(0, 650), rows.slice(650)])
    assert [*first, *(650 + position for position in second)] == sample_positions([rows])[0]
    assert sample_rows(rows)["id"].to_pylist() == sample_positions([rows])[0]


def test_large_row_groups_are_not_read_to_their_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = pa.table({"id": range(1_000), "raw": [bytes([65 + row % 26]) * 5_000 for row in range(1_000)]})
    pq.write_table(rows, tmp_path / "d.parquet", row_group_size=1_000, use_dictionary=False, compression="none")
    monkeypatch.setattr(samples, "_SAMPLE_BYTES", 500_000)
    sample = sample_row_groups([(str(tmp_path / "d.parquet"), 0, "train")], rows.schema)
    assert len(sample) == 16
    assert max(sample["id"].to_pylist()) < 110
    assert set(sample["split"].to_pylist()) == {"train"}


NUM_CLIPS = 150


def write_table(media: Callable[[int], dict[str, bytes]], folder: Path) -> Path:
    folder.mkdir()
    rows = []
    for number in range(NUM_CLIPS):
        files = {f"{name}_file_name": f"{number}.{name}" for name in media(number)}
        for name, data in media(number).items():
            (folder / f"{number}.{name}").write_bytes(data)
        rows.append({"label": str(number % 2), **files})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def write_tar(media: Callable[[int], dict[str, bytes]], folder: Path) -> Path:
    folder.mkdir()
    with tarfile.open(folder / "d.tar", "w") as archive:
        for number in range(NUM_CLIPS):
            for name, data in {**media(number), "cls": str(number % 2).encode()}.items():
                member = tarfile.TarInfo(f"{number:03d}.{name}")
                member.size = len(data)
                archive.addfile(member, io.BytesIO(data))
    return folder / "d.tar"


def embedded(media: Callable[[int], dict[str, bytes]]) -> pa.Table:
    names = sorted({name for number in range(NUM_CLIPS) for name in media(number)})
    columns = {name: pa.array([media(row).get(name) for row in range(NUM_CLIPS)], pa.binary()) for name in names}
    return pa.table({"label": [str(row % 2) for row in range(NUM_CLIPS)], **columns})


def write_parquet(media: Callable[[int], dict[str, bytes]], folder: Path) -> Path:
    folder.mkdir()
    pq.write_table(embedded(media), folder / "d.parquet", row_group_size=20)
    return folder


def write_saved(media: Callable[[int], dict[str, bytes]], folder: Path) -> Path:
    datasets.Dataset(embedded(media)).save_to_disk(folder, num_shards=3)
    return folder


WRITERS = {"table": write_table, "tar": write_tar, "parquet": write_parquet, "saved": write_saved}


@pytest.mark.parametrize("source", WRITERS)
def test_sound_of_late_clips_is_read(tmp_path: Path, film: Callable[[bool], bytes], source: str) -> None:
    """The first hundred clips are silent films, as where a set is joined of two sources."""
    silent, loud = film(False), film(True)
    data = WRITERS[source](lambda number: {"mp4": loud if number >= 100 else silent}, tmp_path / "d")
    assert [modality.kind for modality in open_dataset(data).modalities] == ["audio", "video"]


@pytest.mark.parametrize("source", WRITERS)
def test_modality_that_is_null_at_first_is_read(tmp_path: Path, source: str) -> None:
    wav, png = b"RIFF\0\0\0\0WAVE", b"\x89PNG\r\n\x1a\n"
    data = WRITERS[source](lambda number: {"png": png, **({"wav": wav} if number >= 140 else {})}, tmp_path / "d")
    modalities = open_dataset(data, DataConfig(shard_rows=16)).modalities
    assert {modality.kind for modality in modalities} == {"audio", "image"}
