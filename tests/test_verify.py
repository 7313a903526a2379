"""Laws of verify: what was written holds, and whatever is changed afterwards is found, by the check that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import ManifestError
from mmaudit.audit.features.encoded_samples import content_hashes
from mmaudit.audit.parquet import KEY
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.audit.storage import write_json
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.manifest import ROWS_KEY, digest_of, dropped_path, provenance_of, rows_of
from mmaudit.rebalance.recipe import balance_path
from mmaudit.rebalance.score_tables import open_scores
from mmaudit.rebalance.selection import select_rows
from mmaudit.rebalance.split import write_split
from mmaudit.rebalance.verify import Verification, verify


def scores_of(num_samples: int = 60, *, seed: int = 0, **more: Any) -> ScoreTable:
    rng = np.random.default_rng(seed)
    label = (np.arange(num_samples) % 3).astype(np.int32)
    columns: dict[str, Any] = {
        "sample_id": np.array([f"s{number:04d}" for number in range(num_samples)], dtype=object),
        "split": np.array(["test" if number % 5 == 0 else "train" for number in range(num_samples)], dtype=object),
        "provenance": {"fingerprint": "f0", "modalities": [{"name": "audio"}, {"name": "image"}]},
    }
    return ScoreTable(
        label=label,
        label_name=np.array([f"class-{one}" for one in label], dtype=object),
        modalities=("audio", "image"),
        confidence=rng.uniform(size=(num_samples, 2)).astype(np.float32),
        balance=rng.uniform(-1, 1, num_samples).astype(np.float32),
        p_balanced=rng.uniform(size=num_samples).astype(np.float32),
        **(columns | more),
    )


def write(path: Path, table: ScoreTable | None = None, *, seed: int = 0, **config: Any) -> Path:
    """Make a balanced split of a score table."""
    shards = open_scores(scores_of() if table is None else table, seed=seed)
    config = {"bins": 4, "tolerance": 0.0} | config
    rule = plan_balanced(shards, BalancedConfig(**config))
    chosen = select_rows(shards, rule, scratch=path.parent)
    write_split(chosen, path, name="balanced", recipe={"balanced": config})
    return path


def rewrite(
    path: Path, change: Callable[[pa.Table], pa.Table] | None = None, *, forge: bool = False, **provenance: Any
) -> None:
    """Change a file's rows or provenance; `forge`: its metadata then tell the rows and digest of what is there."""
    table, about = pq.read_table(path).replace_schema_metadata(None), rows_of(path)
    table = table if change is None else change(table)
    if forge:
        about |= {"rows": len(table), "digest": digest_of(table)}
    told = {KEY: json.dumps(provenance_of(path) | provenance), ROWS_KEY: json.dumps(about)}
    pq.write_table(table.replace_schema_metadata(told), path)


def with_cell(name: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    """Put a value into one cell."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        place, field = table.column_names.index(name), table.schema.field(name)
        return table.set_column(place, field, pa.array(values, field.type))

    return change


def failed(found: Verification) -> set[str]:
    return {check.name for check in found.failed}


def detail(found: Verification, name: str) -> str:
    return next(check.detail for check in found.checks if check.name == name)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write(tmp_path / "m.parquet")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A manifest to be copied, for hypothesis; read only."""
    return write(tmp_path_factory.mktemp("source") / "m.parquet")


def copied(source: Path, folder: Path) -> Path:
    for path in (source, dropped_path(source)):
        shutil.copy(path, folder / path.name)
    return folder / source.name


@pytest.mark.parametrize("config", [{}, {"by": "weight"}, {"grid": True}, {"per_class": True}], ids=str)
def test_what_was_written_holds(tmp_path: Path, config: dict[str, Any]) -> None:
    found = verify(write(tmp_path / "m.parquet", **config), fingerprint="f0")
    assert found.held, found.lines()
    assert [check.name for check in found.checks if check.held is None] in (["complete", "media"], ["media"])
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.lines()) == len(found.checks)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_change_of_any_cell_is_found(source: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = copied(source, tmp_path)
    file = data.draw(st.sampled_from([path, dropped_path(path)]))
    table = pq.read_table(file)
    name = data.draw(st.sampled_from(table.column_names))
    row = data.draw(st.integers(0, len(table) - 1))
    type_ = table.schema.field(name).type
    text = pa.types.is_string(type_)
    value = data.draw(st.none() | (st.text(max_size=5) if text else st.integers(-3, 300)))
    old = table[name][row].as_py()
    assume(value != old)
    rewrite(file, with_cell(name, row, value))
    which = "digest" if file == path else "dropped digest"
    assert which in failed(verify(path))
    if file == path:
        rewrite(file, forge=True)
        found = failed(verify(path))
        assert "dropped from" in found
        assert "digest" not in found


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda table: table.slice(1), {"rows", "digest"}),
        (lambda table: table.slice(0, 0), {"rows", "digest"}),
        (lambda table: pa.concat_tables([table, table.slice(3, 1)]), {"rows", "digest", "ids"}),
        (lambda table: table.take(np.arange(len(table))[::-1]), {"digest"}),
        (lambda table: table.drop_columns(["group"]).append_column("group", table["split"]), {"digest"}),
    ],
    ids=["removed", "all removed", "repeated", "reordered", "replaced"],
)
def test_a_change_of_rows_is_found(manifest: Path, change: Callable[[pa.Table], pa.Table], names: set[str]) -> None:
    rewrite(manifest, change)
    assert failed(verify(manifest)) - {"ranges"} == names  # a rank may now be past the last row


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("bin", 4),
        ("bin", -1),
        ("rank", -1),
        ("rank", 10_000),
        ("weight", 0.0),
        ("weight", -1.0),
        ("weight", float("nan")),
        ("weight", float("inf")),
        ("discrepancy", 1.01),
        ("gap", -0.01),
        ("gap", float("nan")),
        ("balance", -1.5),
        ("p_balanced", 1.5),
    ],
)
def test_a_value_out_of_its_range_is_named_even_where_the_digest_is_forged(
    manifest: Path, name: str, value: float
) -> None:
    rewrite(manifest, with_cell(name, 2, value), forge=True)
    found = verify(manifest)
    sample = pq.read_table(manifest)["sample_id"][2]
    assert failed(found) == {"ranges", "dropped from"}
    assert f"1 of {name} outside" in detail(found, "ranges")
    assert f"{value:g} of sample {sample}" in detail(found, "ranges")


def test_a_dropped_row_is_held_to_its_ranges_too(manifest: Path) -> None:
    rewrite(dropped_path(manifest), with_cell("gap", 0, 2.0), forge=True)
    assert failed(verify(manifest)) == {"dropped ranges"}


@pytest.mark.parametrize("name", ["sample_id", "label", "subset", "rank", "weight", "gap"])
def test_a_null_where_a_value_must_be_is_named(manifest: Path, name: str) -> None:
    rewrite(manifest, with_cell(name, 1, None))
    found = verify(manifest)
    assert {"digest", "nulls"} <= failed(found)
    assert detail(found, "nulls") == f"1 of {name}"


def test_a_sample_both_kept_and_dropped_is_named(manifest: Path) -> None:
    name = pq.read_table(manifest)["sample_id"][5].as_py()
    rewrite(dropped_path(manifest), with_cell("sample_id", 0, name), forge=True)
    found = verify(manifest)
    assert failed(found) == {"disjoint"}
    assert f"1 samples are both kept and dropped (the first: {name})" == detail(found, "disjoint")


def test_an_id_that_was_dropped_twice_is_named(manifest: Path) -> None:
    rewrite(dropped_path(manifest), lambda table: pa.concat_tables([table, table.slice(0, 1)]), forge=True)
    assert failed(verify(manifest)) == {"dropped ids"}


def test_a_label_has_one_name_in_both_files(manifest: Path) -> None:
    rewrite(dropped_path(manifest), with_cell("label_name", 0, "dog"), forge=True)
    found = verify(manifest)
    assert failed(found) == {"labels"}
    assert "'dog'" in detail(found, "labels")


def test_rows_of_another_subset_are_found(manifest: Path) -> None:
    rewrite(dropped_path(manifest), with_cell("subset", 0, "random"), forge=True)
    assert failed(verify(manifest)) == {"subset"}


def test_other_metadata_are_found(manifest: Path) -> None:
    rewrite(manifest, rule={"balanced": {"bins": 4, "tolerance": 0.9}})
    found = verify(manifest)
    assert failed(found) == {"metadata", "dropped from"}
    assert "metadata changed: " in detail(found, "metadata")
    assert "metadata" in detail(found, "dropped from")


def test_metadata_that_another_tool_adds_are_found(manifest: Path) -> None:
    table = pq.read_table(manifest)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"huggingface": b"{}"}), manifest)
    assert failed(verify(manifest)) == {"metadata"}


def test_rows_and_metadata_are_told_apart(manifest: Path) -> None:
    rewrite(manifest, with_cell("gap", 0, 0.5))
    found = verify(manifest)
    assert failed(found) == {"digest"}
    assert detail(found, "digest").startswith("rows changed: ")


def test_another_schema_is_named(manifest: Path) -> None:
    rewrite(manifest, schema="mmaudit.manifest/9")
    found = verify(manifest)
    assert {"schema", "metadata"} <= failed(found)
    assert "mmaudit.manifest/9" in detail(found, "schema")


def test_a_column_of_another_type_is_named(manifest: Path) -> None:
    rewrite(manifest, lambda table: table.set_column(5, "bin", table["bin"].cast(pa.float64())))
    assert "bin is double, not int16" in detail(verify(manifest), "schema")


def test_pandas_loses_the_metadata_and_that_is_said(manifest: Path) -> None:
    pd.read_parquet(manifest).to_parquet(manifest)
    found = verify(manifest)
    assert {"schema", "rows", "digest"} <= failed(found)
    assert "it was rewritten by another tool" in detail(found, "schema")
    assert "not stated in the metadata" in detail(found, "digest")
    assert "ids" not in failed(found)


def test_the_dropped_rows_of_another_split_are_found(manifest: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.parquet", scores_of(seed=1))
    shutil.copy(dropped_path(other), dropped_path(manifest))
    assert "dropped from" in failed(verify(manifest))
    assert "another manifest" in detail(verify(manifest), "dropped from")


def test_without_dropped_rows_there_is_nothing_to_compare(manifest: Path) -> None:
    dropped_path(manifest).unlink()
    found = verify(manifest)
    assert found.held
    assert detail(found, "dropped") == "m.dropped.parquet not found"


def test_a_file_of_dropped_rows_that_is_none_is_named(manifest: Path) -> None:
    shutil.copy(manifest, dropped_path(manifest))
    found = verify(manifest)
    assert {"dropped schema", "dropped from"} <= failed(found)
    assert "lacks reason, score, threshold" in detail(found, "dropped schema")


def test_kept_and_dropped_are_all_that_were_scored(manifest: Path) -> None:
    evenness = {"distance": 0.0, "ks": 0.0, "positive": 0.5}
    numbers = {
        **{"name": "m", "between": "audio:visual", "bins": 1, "scored": 60, "kept": 0, "dropped": 0, "reasons": {}},
        **{"effective_size": 0.0, "before": evenness, "after": evenness, "distances": {}, "counts_before": [0]},
        **{"counts_after": [0.0], "empty_bins": [], "classes": [], "shortages": [], "recipe": {}},
        "digest": rows_of(manifest)["digest"],
    }
    write_json(numbers, balance_path(manifest))
    assert verify(manifest).held
    assert "of 60 scored" in detail(verify(manifest), "complete")
    write_json(numbers | {"scored": 61}, balance_path(manifest))
    assert failed(verify(manifest)) == {"complete"}
    write_json(numbers | {"digest": "0"}, balance_path(manifest))
    assert failed(verify(manifest)) == {"numbers"}
    balance_path(manifest).write_text("{")
    with pytest.raises(ManifestError, match=r"balance\.json cannot be read"):
        verify(manifest)


def test_another_fingerprint_is_drift(manifest: Path) -> None:
    found = verify(manifest, fingerprint="f1")
    assert failed(found) == {"fingerprint"}
    assert "f0" in detail(found, "fingerprint")


def test_what_is_no_manifest_is_refused(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        verify(tmp_path / "none.parquet")
    other = tmp_path / "other.parquet"
    pq.write_table(pa.table({"sample_id": ["a"]}), other)
    with pytest.raises(ManifestError, match="not a manifest: it lacks label"):
        verify(other)
    other.write_bytes(manifest.read_bytes()[:-100])
    with pytest.raises(ManifestError, match="cannot be read as Parquet"):
        verify(other)
    rewrite(manifest, lambda table: table.set_column(0, "sample_id", pa.array(np.arange(len(table)))))
    with pytest.raises(ManifestError, match="sample_id is int64, not string"):
        verify(manifest)


@given(data=st.data())
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_byte_of_a_file_can_be_spoiled_so_that_other_rows_pass(
    source: Path, tmp_path: Path, data: st.DataObject
) -> None:
    path = copied(source, tmp_path)
    before, content = pq.read_table(path), bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        held = verify(path).held
    except ManifestError:
        return
    assert not held or pq.read_table(path).equals(before)


# The media.


def open_clips(folder: Path) -> Dataset:
    return open_dataset(folder, DataConfig(id="id"))


def scored(dataset: Dataset, path: Path) -> Path:
    """Make a manifest of all of a dataset's samples."""
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    content = {each.sample_id: each.content for each in content_hashes(dataset)}
    table = scores_of(
        len(samples),
        sample_id=samples.sample_id,
        content=np.array([content[name] for name in samples.sample_id], dtype=object),
        paths=samples.paths.combine_chunks(),
    )
    return write(path, table, by="weight")


def test_media_that_have_changed_are_counted_and_named(clips: Path, tmp_path: Path) -> None:
    path = scored(open_clips(clips), tmp_path / "m.parquet")
    assert verify(path, dataset=open_clips(clips)).held
    shutil.copy(clips / "5.wav", clips / "3.wav")
    found = verify(path, dataset=open_clips(clips), num_threads=2)
    assert failed(found) == {"media"}
    said = "1 of 24 samples' media changed since they were scored, the first: 003, 3.wav, 3.png"
    assert detail(found, "media") == said
    (clips / "2.png").unlink()
    said = "2 of 24 samples' media changed since they were scored, the first: 002, no file 2.png"
    assert detail(verify(path, dataset=open_clips(clips)), "media") == said


def test_samples_that_are_gone_from_the_source_are_named(clips: Path, tmp_path: Path) -> None:
    path = scored(open_clips(clips), tmp_path / "m.parquet")
    text = (clips / "metadata.csv").read_text().splitlines()
    (clips / "metadata.csv").write_text("\n".join([text[0], *text[3:]]))
    said = "2 of 24 samples are no longer in the source, the first: 000"
    assert detail(verify(path, dataset=open_clips(clips)), "media") == said


def test_other_modalities_than_were_scored_are_named(clips: Path, tmp_path: Path) -> None:
    path = scored(open_clips(clips), tmp_path / "m.parquet")
    config = DataConfig(id="id", modality=("image=image_file_name:image", "audio=audio_file_name:audio"))
    found = verify(path, dataset=open_dataset(clips, config))
    assert "opened as image, audio, but scored as audio, image" in detail(found, "media")


def test_contents_may_be_given(clips: Path, tmp_path: Path) -> None:
    dataset = open_clips(clips)
    path = scored(dataset, tmp_path / "m.parquet")
    contents = {each.sample_id: each for each in content_hashes(dataset)}
    assert verify(path, contents=contents).held
    other = replace(contents["001"], content="0" * 32, problem="no file 1.wav")
    found = verify(path, contents=contents | {"001": other})
    assert failed(found) == {"media"}
    assert "the first: 001, no file 1.wav" in detail(found, "media")
    assert "24 of 24 samples are no longer" in detail(verify(path, contents={}), "media")


def test_scores_without_contents_have_no_media_to_compare(manifest: Path) -> None:
    found = verify(manifest, contents={})
    assert found.held
    assert detail(found, "media") == "the scores have no content hashes"
