"""Source formats: every reader gives the same samples of the same clips, and packages add readers."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets.table import InMemoryTable

from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.formats import READERS, plan_source
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import ConfigError, DatasetError

CLASSES = ["class-0", "class-1", "class-2"]
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "sound": datasets.Audio(decode=False),
        "sight": datasets.Image(decode=False),
        "label": datasets.ClassLabel(names=CLASSES),
    }
)
NUMBERS = {"train": range(18), "test": range(18, 24)}


def clip(source: Path, number: int) -> tuple[bytes, bytes]:
    return (source / f"{number}.wav").read_bytes(), (source / f"{number}.png").read_bytes()


def embedded(source: Path, numbers: range) -> pa.Table:
    """Return rows in the format of `datasets`: structs of bytes and path."""
    media = [clip(source, number) for number in numbers]
    columns = {
        "id": [f"{number:03d}" for number in numbers],
        "sound": [{"bytes": sound, "path": None} for sound, _ in media],
        "sight": [{"bytes": sight, "path": None} for _, sight in media],
        "label": [number % 3 for number in numbers],
    }
    return pa.table(columns, schema=FEATURES.arrow_schema)


def hub_parts(source: Path) -> datasets.DatasetDict:
    tables = {split: embedded(source, numbers) for split, numbers in NUMBERS.items()}
    return datasets.DatasetDict({split: datasets.Dataset(InMemoryTable(rows)) for split, rows in tables.items()})


def write_saved(source: Path, folder: Path) -> Path:
    hub_parts(source).save_to_disk(folder, num_shards={"train": 3, "test": 1})
    return folder


def write_parquet(source: Path, folder: Path) -> Path:
    rows = [
        table.append_column("split", [[split] * len(table)])
        for split, numbers in NUMBERS.items()
        for table in [embedded(source, numbers)]
    ]
    folder.mkdir()
    pq.write_table(pa.concat_tables(rows), folder / "d.parquet", row_group_size=7)
    return folder / "d.parquet"


def write_raw_parquet(source: Path, folder: Path) -> Path:
    """Write columns of bytes without declared features."""
    path = write_parquet(source, folder)
    rows = pq.read_table(path)
    for name in ("sound", "sight"):
        cells = pa.array([cell["bytes"] for cell in rows[name].to_pylist()], pa.large_binary())
        rows = rows.set_column(rows.schema.get_field_index(name), name, cells)
    names = pa.array([CLASSES[label] for label in rows["label"].to_pylist()])
    rows = rows.set_column(rows.schema.get_field_index("label"), "label", names).replace_schema_metadata(None)
    pq.write_table(rows, path)
    return path


def write_hub_folder(source: Path, folder: Path) -> Path:
    """Write the folder layout of a download from the hub."""
    (folder / "data").mkdir(parents=True)
    for split, numbers in NUMBERS.items():
        pq.write_table(embedded(source, numbers), folder / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "README.md").write_text("a card")
    return folder


def path_of_layout(split: str, number: int, modality: str) -> dict[str, str]:
    name, label = f"{number:03d}", f"class-{number % 3}"
    suffix = {"audio": "wav", "image": "png"}[modality]
    return {
        "together": f"{split}/{label}/{name}.{suffix}",
        "by modality": f"{modality}/{split}/{label}/{name}.{suffix}",
        "by split": f"{split}/{modality}/{label}/{name}.{suffix}",
    }


def write_layout(source: Path, folder: Path, layout: str) -> Path:
    for split, numbers in NUMBERS.items():
        for number in numbers:
            for modality, data in zip(("audio", "image"), clip(source, number), strict=True):
                path = folder / path_of_layout(split, number, modality)[layout]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    return folder


def write_split_tables(source: Path, folder: Path) -> Path:
    for split, numbers in NUMBERS.items():
        (folder / split).mkdir(parents=True)
        lines = ["id,audio_file_name,image_file_name,label"]
        for number in numbers:
            for suffix in ("wav", "png"):
                shutil.copy(source / f"{number}.{suffix}", folder / split)
            lines.append(f"{number:03d},{number}.wav,./{number}.png,class-{number % 3}")
        (folder / split / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder


def write_tars(source: Path, folder: Path, label: str) -> Path:
    folder.mkdir()
    for split, numbers in NUMBERS.items():
        for part, part_numbers in enumerate((numbers[:5], numbers[5:])):
            with tarfile.open(folder / f"{split}-{part:03d}.tar", "w") as archive:
                for number in part_numbers:
                    sound, sight = clip(source, number)
                    fields = {"label": f"class-{number % 3}", "id": f"{number:03d}"}
                    label_members = {"json": json.dumps(fields).encode(), "cls": str(number % 3).encode()}
                    for name, data in {"wav": sound, "png": sight, label: label_members[label]}.items():
                        member = tarfile.TarInfo(f"./{number:03d}.{name}")
                        member.size = len(data)
                        archive.addfile(member, io.BytesIO(data))
    return folder


def samples_of(data: Path | str, config: DataConfig | None = None) -> set[tuple[object, ...]]:
    """Return (number, label, split, audio, image) of every sample, read through pickled shards."""
    dataset = open_dataset(data, config)
    assert [modality.kind for modality in dataset.modalities] == ["audio", "image"]
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    names = [samples.class_names[label] for label in samples.label]
    cells = [row for shard in dataset.shards for row in media_of(dataset, pickle.loads(pickle.dumps(shard)))]
    numbers = [name[-3:] for name in samples.sample_id]
    return set(zip(numbers, names, samples.split, *zip(*cells, strict=True), strict=True))


def media_of(dataset: Dataset, shard: Any) -> list[list[bytes]]:
    rows = dataset.read(shard)
    return [[dataset.load(cells[m.column], m) for m in dataset.modalities] for cells in rows.to_pylist()]


@pytest.fixture(scope="module")
def expected(clip_source: Path) -> set[tuple[object, ...]]:
    return {
        (f"{number:03d}", f"class-{number % 3}", split, *clip(clip_source, number))
        for split, numbers in NUMBERS.items()
        for number in numbers
    }


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], list[Any]]:
    """Replace datasets.load_dataset by a fixed response, and record the requests."""

    def put(response: Any) -> list[Any]:
        requests: list[Any] = []

        def load(*arguments: Any) -> Any:
            requests.append(arguments)
            if isinstance(response, Exception):
                raise response
            return response

        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(datasets, "load_dataset", load)
        return requests

    return put


WRITERS: dict[str, tuple[str, Callable[[Path, Path], Path | str]]] = {
    "saved": ("saved", write_saved),
    "parquet": ("tables", write_parquet),
    "bytes alone": ("tables", write_raw_parquet),
    "folder of the hub": ("parquet-folder", write_hub_folder),
    "together": ("folders", lambda source, folder: write_layout(source, folder, "together")),
    "by modality": ("folders", lambda source, folder: write_layout(source, folder, "by modality")),
    "by split": ("folders", lambda source, folder: write_layout(source, folder, "by split")),
    "split tables": ("tables", write_split_tables),
    "tars": ("tars", lambda source, folder: write_tars(source, folder, "json")),
    "glob of tars": ("tars", lambda source, folder: f"{write_tars(source, folder, 'json')}/*.tar"),
    "hub": ("hub", lambda source, folder: "user/clips"),
}


def test_every_reader_has_a_source() -> None:
    assert {reader for reader, _ in WRITERS.values()} == set(READERS)


@pytest.mark.parametrize("kind", WRITERS)
def test_every_reader_gives_equal_samples(
    clip_source: Path,
    tmp_path: Path,
    expected: set[tuple[object, ...]],
    hub: Callable[[Any], list[Any]],
    kind: str,
) -> None:
    hub(hub_parts(clip_source))
    reader, write = WRITERS[kind]
    data = write(clip_source, tmp_path / "data")
    assert samples_of(data, DataConfig(shard_rows=4)) == expected
    assert samples_of(data, DataConfig(reader=reader, shard_rows=4)) == expected


@pytest.mark.parametrize("kind", WRITERS)
def test_every_reader_plans_all_rows_in_order(
    clip_source: Path, tmp_path: Path, hub: Callable[[Any], list[Any]], kind: str
) -> None:
    hub(hub_parts(clip_source))
    reader, write = WRITERS[kind]
    data = str(write(clip_source, tmp_path / "data"))
    plan = plan_source(data, reader=reader, shard_rows=4, allow_outside=False)
    names = plan.sample.column_names
    parts = [pickle.loads(pickle.dumps(shard)).read(names) for shard in plan.shards]
    assert [shard.index for shard in plan.shards] == list(range(len(parts)))
    assert [shard.num_rows for shard in plan.shards] == [len(part) for part in parts]
    assert [shard.first for shard in plan.shards] == [sum(map(len, parts[:index])) for index in range(len(parts))]
    assert all(part.schema.equals(plan.sample.schema) for part in parts)
    assert 0 < len(plan.sample) <= 64
    rows = pa.concat_tables(parts).to_pylist()
    positions = [rows.index(row) for row in plan.sample.to_pylist()]
    assert positions == sorted(set(positions))
    assert {positions[0], positions[-1]} == {0, len(rows) - 1}
    assert all(shard.read(names[::-1]).column_names == names[::-1] for shard in plan.shards[::-1])
    # The reader of class folders accepts any folder of media, and is therefore asked last.
    recognised = {name for name in READERS if name != "folders" and is_planned(name, data)}
    assert recognised == {reader} - {"folders"}


def is_planned(reader: str, data: str) -> bool:
    return READERS.load(reader)(data, shard_rows=4, allow_outside=False) is not None


def test_numeric_labels_of_tars_are_read(clip_source: Path, tmp_path: Path, expected: set[tuple[object, ...]]) -> None:
    data = write_tars(clip_source, tmp_path / "data", "cls")
    assert samples_of(data) == {(number, f"{str(label)[-1]}", *rest) for number, label, *rest in expected}


def test_hub_dataset_gives_equal_samples(
    clip_source: Path, tmp_path: Path, expected: set[tuple[object, ...]], hub: Callable[[Any], list[Any]]
) -> None:
    parts = hub_parts(clip_source)
    requests = hub(parts)
    assert samples_of("user/clips") == expected
    assert samples_of("clips:small") == expected
    assert requests == [("user/clips", None), ("clips", "small")]
    parts.save_to_disk(tmp_path / "saved")
    hub(datasets.load_from_disk(tmp_path / "saved"))
    assert samples_of("user/clips", DataConfig(shard_rows=5)) == expected


@pytest.mark.parametrize("from_disk", [True, False])
def test_selection_of_hub_dataset_is_read_in_order(
    clip_source: Path,
    tmp_path: Path,
    expected: set[tuple[object, ...]],
    hub: Callable[[Any], list[Any]],
    from_disk: bool,
) -> None:
    parts = hub_parts(clip_source)
    if from_disk:
        parts.save_to_disk(tmp_path / "saved")
        parts = datasets.load_from_disk(tmp_path / "saved")
    selected = {"train": [17, 3, 4], "test": [5, 0]}
    hub(datasets.DatasetDict({split: part.select(selected[split]) for split, part in parts.items()}))
    numbers = {"017", "003", "004", "023", "018"}
    assert samples_of("user/clips") == {sample for sample in expected if sample[0] in numbers}
    dataset = open_dataset("user/clips")
    assert read_samples(dataset, seed=0, test_fraction=0.2).sample_id.tolist() == ["017", "003", "004", "023", "018"]


def test_missing_hub_dataset_is_reported_in_one_line(hub: Callable[[Any], list[Any]]) -> None:
    hub(ConnectionError("Couldn't reach 'user/none' on the Hub\nmore"))
    with pytest.raises(DatasetError) as caught:
        open_dataset("user/none")
    assert str(caught.value) == (
        "no such folder or file: user/none; loading the dataset from the hub failed "
        "(ConnectionError: Couldn't reach 'user/none' on the Hub): "
        "check the name (user/name, or user/name:config), or download it and pass the folder"
    )


@pytest.mark.parametrize(
    "data", ["/none/such", "./none", "none.parquet", "a/b/c", "../none", "none*", "a b", "none.tar"]
)
def test_other_paths_are_not_loaded_from_hub(hub: Callable[[Any], list[Any]], data: str) -> None:
    requests = hub(AssertionError("asked"))
    with pytest.raises(DatasetError, match="no such folder or file"):
        open_dataset(data)
    assert requests == []


def test_unreachable_hub_is_reported_without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        DatasetError, match=r"no such folder or file: nowhere; on the hub: .* HF_HUB_OFFLINE=1 reads cached"
    ):
        open_dataset("nowhere")


def test_existing_folder_is_not_loaded_from_hub(
    clip_source: Path, monkeypatch: pytest.MonkeyPatch, hub: Callable[[Any], list[Any]]
) -> None:
    requests = hub(AssertionError("asked"))
    monkeypatch.chdir(clip_source.parent)
    assert open_dataset(clip_source.name).num_rows == 24
    assert requests == []


READER_MODULE = """
import json
from pathlib import Path

import pyarrow as pa

from mmaudit.audit.dataset.formats import Plan
from mmaudit.audit.dataset.formats.tables import plan_rows


def plan_json_array(data: str, *, shard_rows: int, allow_outside: bool) -> Plan | None:
    if not data.endswith(".json"):
        return None
    rows = pa.Table.from_pylist(json.loads(Path(data).read_text()))
    return plan_rows(Path(data).parent, rows, shard_rows=shard_rows)
"""


@pytest.fixture
def json_array(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package with a reader of JSON arrays, and write such an array."""
    site = tmp_path / "site"
    (site / "json_array-1.0.dist-info").mkdir(parents=True)
    (site / "json_array-1.0.dist-info" / "METADATA").write_text("Name: json-array\nVersion: 1.0\n")
    (site / "json_array-1.0.dist-info" / "entry_points.txt").write_text(
        "[mmaudit.readers]\njson-array = json_array:plan_json_array\nbroken = json_array:plan_none\n"
    )
    (site / "json_array.py").write_text(READER_MODULE)
    monkeypatch.syspath_prepend(site)
    monkeypatch.delitem(sys.modules, "json_array", raising=False)
    rows = [{"id": f"n{row}", "label": row % 2, "u": [row, 1.0], "v": [2.0, row]} for row in range(5)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return tmp_path / "rows.json"


def test_installed_reader_is_used_and_imported_only_by_name(json_array: Path) -> None:
    with pytest.raises(DatasetError, match=r"rows\.json is neither a folder nor a \.parquet"):
        open_dataset(json_array)
    assert "json_array" not in sys.modules
    dataset = open_dataset(json_array, DataConfig(reader="json-array", shard_rows=2))
    assert "json_array" in sys.modules
    assert [shard.num_rows for shard in dataset.shards] == [2, 2, 1]
    assert read_samples(dataset, seed=0, test_fraction=0.2).sample_id.tolist() == [f"n{row}" for row in range(5)]


def test_named_reader_that_does_not_fit_is_reported(json_array: Path) -> None:
    for reader in ("json-array", "tars"):
        with pytest.raises(DatasetError, match=f"is not of the format that data.reader = '{reader}' reads"):
            open_dataset(json_array.parent, DataConfig(reader=reader))
    with pytest.raises(ConfigError, match=r"data\.reader json-aray: no such name; did you mean json-array\?"):
        open_dataset(json_array, DataConfig(reader="json-aray"))
    with pytest.raises(ConfigError, match=r"data\.reader broken: json_array:plan_none cannot be loaded"):
        open_dataset(json_array, DataConfig(reader="broken"))
