"""Tests of verify: unchanged manifests pass, and each change fails the check that names it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import ManifestError
from mmaudit.audit.features.encoded_samples import ContentHashes, content_hashes
from mmaudit.audit.parsing import provenance_section
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.audit.storage import PROVENANCE_KEY, write_json
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.manifest import (
    COLUMNS,
    RANGES,
    ROWS_KEY,
    SCHEMA_VERSION,
    balance_path,
    dropped_path,
    metadata_digest,
    read_provenance,
    read_stated_digests,
    table_digest,
)
from mmaudit.rebalance.score_tables import open_scores
from mmaudit.rebalance.selection import ExternalSort, select_rows
from mmaudit.rebalance.split import write_split
from mmaudit.rebalance.verify import CheckedFile, Verification, non_null_ids, verify_rows
from mmaudit.rebalance.verify_media import ContentComparison, check_media


def scores_of(num_samples: int = 60, *, seed: int = 0, **changes: Any) -> ScoreTable:
    rng = np.random.default_rng(seed)
    label = (np.arange(num_samples) % 3).astype(np.int32)
    columns: dict[str, Any] = {
        "sample_id": np.array([f"s{number:04d}" for number in range(num_samples)], dtype=object),
        "split": np.array(["test" if number % 5 == 0 else "train" for number in range(num_samples)], dtype=object),
        "provenance": {"fingerprint": "f0", "modalities": [{"name": "audio"}, {"name": "image"}]},
    }
    return ScoreTable(
        label=label,
        label_name=np.array([f"class-{class_index}" for class_index in label], dtype=object),
        modalities=("audio", "image"),
        confidence=rng.uniform(size=(num_samples, 2)).astype(np.float32),
        balance=rng.uniform(-1, 1, num_samples).astype(np.float32),
        p_balanced=rng.uniform(size=num_samples).astype(np.float32),
        **(columns | changes),
    )


def write(path: Path, table: ScoreTable | None = None, *, seed: int = 0, **config: Any) -> Path:
    """Write a balanced split of a score table."""
    score_files = open_scores(scores_of() if table is None else table, seed=seed)
    config = {"bins": 4, "tolerance": 0.0} | config
    rule = plan_balanced(score_files, BalancedConfig(**config))
    selection = select_rows(score_files, rule, scratch=path.parent)
    write_split(selection, path, name="balanced", recipe={"balanced": config})
    return path


def rewrite(
    path: Path, change: Callable[[pa.Table], pa.Table] | None = None, *, forge: bool = False, **provenance: Any
) -> None:
    """Change a file's rows or provenance; `forge` also updates the stated row count and digest."""
    table, stated = pq.read_table(path).replace_schema_metadata(None), read_stated_digests(path)
    table = table if change is None else change(table)
    if forge:
        stated |= {"rows": len(table), "digest": table_digest(table)}
    metadata = {PROVENANCE_KEY: json.dumps(read_provenance(path) | provenance), ROWS_KEY: json.dumps(stated)}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def with_cell(name: str, row: int, value: Any) -> Callable[[pa.Table], pa.Table]:
    """Return a change of one cell."""

    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value
        index, field = table.column_names.index(name), table.schema.field(name)
        return table.set_column(index, field, pa.array(values, field.type))

    return change


def verify(
    path: Path, *, contents: dict[str, ContentHashes] | None = None, fingerprint: str | None = None
) -> Verification:
    verification = verify_rows(path)
    comparison = None
    if contents is not None:
        comparison = ContentComparison(path)
        for hashes in contents.values():
            comparison.add([hashes])
    checks = check_media(path, contents=comparison, fingerprint=fingerprint)
    return replace(verification, checks=(*verification.checks, *checks))


def failed(verification: Verification) -> set[str]:
    return {check.name for check in verification.failed}


def detail(verification: Verification, name: str) -> str:
    return next(check.detail for check in verification.checks if check.name == name)


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    return write(tmp_path / "m.parquet")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A read-only manifest that hypothesis tests copy."""
    return write(tmp_path_factory.mktemp("source") / "m.parquet")


def copy_manifest(source: Path, folder: Path) -> Path:
    for path in (source, dropped_path(source)):
        shutil.copy(path, folder / path.name)
    return folder / source.name


@pytest.mark.parametrize("config", [{}, {"by": "weight"}, {"grid": True}, {"per_class": True}], ids=str)
def test_unchanged_manifest_passes(tmp_path: Path, config: dict[str, Any]) -> None:
    verification = verify(write(tmp_path / "m.parquet", **config), fingerprint="f0")
    assert verification.passed, verification.lines()
    assert [check.name for check in verification.checks if check.passed is None] in (["complete", "media"], ["media"])
    json.dumps(verification.to_dict(), allow_nan=False)
    assert len(verification.lines()) == len(verification.checks)


@given(data=st.data())
@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_changed_cell_is_detected(source: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = copy_manifest(source, tmp_path)
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
        verification = failed(verify(path))
        assert "dropped from" in verification
        assert "digest" not in verification


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
def test_changed_rows_are_detected(manifest: Path, change: Callable[[pa.Table], pa.Table], names: set[str]) -> None:
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
def test_value_out_of_range_is_named_despite_a_forged_digest(manifest: Path, name: str, value: float) -> None:
    rewrite(manifest, with_cell(name, 2, value), forge=True)
    verification = verify(manifest)
    sample = pq.read_table(manifest)["sample_id"][2]
    assert failed(verification) == {"ranges", "dropped from"}
    assert f"1 of {name} outside" in detail(verification, "ranges")
    assert f"{value:g} of sample {sample}" in detail(verification, "ranges")


def test_ranges_of_dropped_rows_are_checked(manifest: Path) -> None:
    rewrite(dropped_path(manifest), with_cell("gap", 0, 2.0), forge=True)
    assert failed(verify(manifest)) == {"dropped ranges"}


@pytest.mark.parametrize("name", ["sample_id", "label", "subset", "rank", "weight", "gap"])
def test_null_in_a_required_column_is_named(manifest: Path, name: str) -> None:
    rewrite(manifest, with_cell(name, 1, None))
    verification = verify(manifest)
    assert {"digest", "nulls"} <= failed(verification)
    assert detail(verification, "nulls") == f"1 of {name}"


def test_sample_both_kept_and_dropped_is_named(manifest: Path) -> None:
    name = pq.read_table(manifest)["sample_id"][5].as_py()
    rewrite(dropped_path(manifest), with_cell("sample_id", 0, name), forge=True)
    verification = verify(manifest)
    assert failed(verification) == {"disjoint"}
    assert f"1 samples are both kept and dropped (the first: {name})" == detail(verification, "disjoint")


def test_repeated_dropped_id_fails(manifest: Path) -> None:
    rewrite(dropped_path(manifest), lambda table: pa.concat_tables([table, table.slice(0, 1)]), forge=True)
    assert failed(verify(manifest)) == {"dropped ids"}


def test_label_with_two_names_fails(manifest: Path) -> None:
    rewrite(dropped_path(manifest), with_cell("label_name", 0, "dog"), forge=True)
    verification = verify(manifest)
    assert failed(verification) == {"labels"}
    assert "'dog'" in detail(verification, "labels")


def test_rows_of_another_subset_fail(manifest: Path) -> None:
    rewrite(dropped_path(manifest), with_cell("subset", 0, "random"), forge=True)
    assert failed(verify(manifest)) == {"subset"}


def test_changed_metadata_fail(manifest: Path) -> None:
    rewrite(manifest, rule={"balanced": {"bins": 4, "tolerance": 0.9}})
    verification = verify(manifest)
    assert failed(verification) == {"metadata", "dropped from"}
    assert "metadata changed: " in detail(verification, "metadata")
    assert "metadata" in detail(verification, "dropped from")


def test_added_metadata_fail(manifest: Path) -> None:
    table = pq.read_table(manifest)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"huggingface": b"{}"}), manifest)
    assert failed(verify(manifest)) == {"metadata"}


def test_rows_and_metadata_are_checked_separately(manifest: Path) -> None:
    rewrite(manifest, with_cell("gap", 0, 0.5))
    verification = verify(manifest)
    assert failed(verification) == {"digest"}
    assert detail(verification, "digest").startswith("rows changed: ")


def test_other_schema_version_is_named(manifest: Path) -> None:
    rewrite(manifest, schema="mmaudit.manifest/9")
    verification = verify(manifest)
    assert {"schema", "metadata"} <= failed(verification)
    assert "mmaudit.manifest/9" in detail(verification, "schema")


def test_column_of_another_type_is_named(manifest: Path) -> None:
    rewrite(manifest, lambda table: table.set_column(5, "bin", table["bin"].cast(pa.float64())))
    assert "bin is double, not int16" in detail(verify(manifest), "schema")


def test_file_rewritten_by_pandas_fails(manifest: Path) -> None:
    pd.read_parquet(manifest).to_parquet(manifest)
    verification = verify(manifest)
    assert {"schema", "rows", "digest"} <= failed(verification)
    assert "it was rewritten by another tool" in detail(verification, "schema")
    assert "not stated in the metadata" in detail(verification, "digest")
    assert "ids" not in failed(verification)


def test_dropped_rows_of_another_split_fail(manifest: Path, tmp_path: Path) -> None:
    other_manifest = write(tmp_path / "other.parquet", scores_of(seed=1))
    shutil.copy(dropped_path(other_manifest), dropped_path(manifest))
    assert "dropped from" in failed(verify(manifest))
    assert "another manifest" in detail(verify(manifest), "dropped from")


def test_missing_dropped_rows_are_skipped(manifest: Path) -> None:
    dropped_path(manifest).unlink()
    verification = verify(manifest)
    assert verification.passed
    assert detail(verification, "dropped") == "m.dropped.parquet not found"


def test_invalid_dropped_file_fails(manifest: Path) -> None:
    shutil.copy(manifest, dropped_path(manifest))
    verification = verify(manifest)
    assert {"dropped schema", "dropped from"} <= failed(verification)
    assert "lacks reason, score, threshold" in detail(verification, "dropped schema")


def test_kept_and_dropped_rows_add_up_to_the_scored(manifest: Path) -> None:
    evenness = {"distance": 0.0, "ks": 0.0, "positive": 0.5}
    numbers = {
        **{"name": "m", "between": "audio:visual", "bins": 1, "scored": 60, "kept": 0, "dropped": 0, "reasons": {}},
        **{
            "effective_size": 0.0,
            "before": evenness,
            "after": evenness,
            "distances": {},
            "splits": {},
            "counts_before": [0],
        },
        **{"counts_after": [0.0], "empty_bins": [], "classes": [], "shortages": [], "recipe": {}},
        "digest": read_stated_digests(manifest)["digest"],
    }
    write_json(numbers, balance_path(manifest))
    assert verify(manifest).passed
    assert "of 60 scored" in detail(verify(manifest), "complete")
    write_json(numbers | {"scored": 61_000}, balance_path(manifest))
    assert "of 61,000 scored" in detail(verify(manifest), "complete")
    write_json(numbers | {"scored": 61}, balance_path(manifest))
    assert failed(verify(manifest)) == {"complete"}
    write_json(numbers | {"digest": "0"}, balance_path(manifest))
    assert failed(verify(manifest)) == {"numbers"}
    balance_path(manifest).write_text("{")
    with pytest.raises(ManifestError, match=r"balance\.json cannot be read"):
        verify(manifest)


def test_other_fingerprint_fails(manifest: Path) -> None:
    verification = verify(manifest, fingerprint="f1")
    assert failed(verification) == {"fingerprint"}
    assert "f0" in detail(verification, "fingerprint")


def test_file_that_is_no_manifest_raises(manifest: Path, tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="no such file"):
        verify(tmp_path / "none.parquet")
    invalid = tmp_path / "other.parquet"
    pq.write_table(pa.table({"sample_id": ["a"]}), invalid)
    with pytest.raises(ManifestError, match="not a manifest: it lacks label"):
        verify(invalid)
    invalid.write_bytes(manifest.read_bytes()[:-100])
    with pytest.raises(ManifestError, match="cannot be read as Parquet"):
        verify(invalid)
    rewrite(manifest, lambda table: table.set_column(0, "sample_id", pa.array(np.arange(len(table)))))
    with pytest.raises(ManifestError, match="sample_id is int64, not string"):
        verify(manifest)


@given(data=st.data())
@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_flipped_byte_never_passes_with_other_rows(source: Path, tmp_path: Path, data: st.DataObject) -> None:
    path = copy_manifest(source, tmp_path)
    before, content = pq.read_table(path), bytearray(path.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        has_passed = verify(path).passed
    except ManifestError:
        return
    assert not has_passed or pq.read_table(path).equals(before)


# The media.


def open_clips(folder: Path) -> Dataset:
    return open_dataset(folder, DataConfig(id="id"))


def hashes_of(folder: Path) -> dict[str, ContentHashes]:
    return {hashes.sample_id: hashes for hashes in content_hashes(open_clips(folder))}


def write_scored_manifest(dataset: Dataset, path: Path) -> Path:
    """Write a manifest of all samples of a dataset."""
    samples = read_samples(dataset, seed=0, test_fraction=0.2)
    content = {hashes.sample_id: hashes.content for hashes in content_hashes(dataset)}
    table = scores_of(
        len(samples),
        sample_id=samples.sample_id,
        content=np.array([content[name] for name in samples.sample_id], dtype=object),
        paths=samples.paths.combine_chunks(),
    )
    return write(path, table, by="weight")


def test_changed_media_are_counted_and_named(clips: Path, tmp_path: Path) -> None:
    path = write_scored_manifest(open_clips(clips), tmp_path / "m.parquet")
    assert verify(path, contents=hashes_of(clips)).passed
    shutil.copy(clips / "5.wav", clips / "3.wav")
    verification = verify(path, contents=hashes_of(clips))
    assert failed(verification) == {"media"}
    expected = "1 of 24 samples' media changed since they were scored, the first: 003, 3.wav, 3.png"
    assert detail(verification, "media") == expected
    (clips / "2.png").unlink()
    expected = "2 of 24 samples' media changed since they were scored, the first: 002, no file 2.png"
    assert detail(verify(path, contents=hashes_of(clips)), "media") == expected


def test_samples_missing_in_the_source_are_named(clips: Path, tmp_path: Path) -> None:
    path = write_scored_manifest(open_clips(clips), tmp_path / "m.parquet")
    text = (clips / "metadata.csv").read_text().splitlines()
    (clips / "metadata.csv").write_text("\n".join([text[0], *text[3:]]))
    expected = "2 of 24 samples are no longer in the source, the first: 000"
    assert detail(verify(path, contents=hashes_of(clips)), "media") == expected


def test_content_hashes_may_be_passed(clips: Path, tmp_path: Path) -> None:
    path = write_scored_manifest(open_clips(clips), tmp_path / "m.parquet")
    contents = hashes_of(clips)
    assert verify(path, contents=contents).passed
    changed = replace(contents["001"], content="0" * 32, problem="no file 1.wav")
    verification = verify(path, contents=contents | {"001": changed})
    assert failed(verification) == {"media"}
    assert "the first: 001, no file 1.wav" in detail(verification, "media")
    assert "24 of 24 samples are no longer" in detail(verify(path, contents={}), "media")


def test_media_check_is_skipped_without_content_hashes(manifest: Path) -> None:
    verification = verify(manifest, contents={})
    assert verification.passed
    assert detail(verification, "media") == "the scores have no content hashes"


# The rows of one file.

N = 6
PROVENANCE = {"schema": f"mmaudit.manifest/{SCHEMA_VERSION}", "recipe": {"balanced": {"bins": 4}}}
COLUMN: dict[str, list[Any]] = {
    "sample_id": [f"s{row}" for row in range(N)],
    "label": [row % 2 for row in range(N)],
    "label_name": ["ab"[row % 2] for row in range(N)],
    "split": ["train"] * N,
    "subset": ["balanced"] * N,
    "bin": [row % 4 for row in range(N)],
    "rank": list(range(N)),
    "weight": [1.0] * N,
    "discrepancy": [0.0] * N,
    "gap": [0.0] * N,
    "balance": [None] * N,
    "p_balanced": [0.5] * N,
    "group": [None] * N,
    "content": [None] * N,
}


def write_rows(
    path: Path, changed: dict[str, list[Any]] | None = None, *, columns: dict[str, pa.DataType] = COLUMNS
) -> Path:
    """Write a file whose metadata match its rows."""
    table = pa.table({name: pa.array({**COLUMN, **(changed or {})}[name], type_) for name, type_ in columns.items()})
    metadata = {PROVENANCE_KEY: json.dumps(PROVENANCE).encode()}
    stated = {"rows": len(table), "digest": table_digest(table), "metadata": metadata_digest(metadata)}
    pq.write_table(table.replace_schema_metadata({**metadata, ROWS_KEY.encode(): json.dumps(stated).encode()}), path)
    return path


def checked(path: Path, provenance: dict[str, Any] = PROVENANCE) -> CheckedFile:
    file = CheckedFile(path, COLUMNS, provenance)
    with ExternalSort(file.num_rows, path.parent) as ids:
        file.read_all(ids, 0)
    return file


def failed_checks(file: CheckedFile) -> Iterator[str]:
    return (check.name for check in file.checks("") if not check.passed)


def test_valid_file_passes_every_check(tmp_path: Path) -> None:
    file = checked(write_rows(tmp_path / "m.parquet"))
    assert [check.name for check in file.checks("x ")] == [
        "x schema",
        "x rows",
        "x digest",
        "x metadata",
        "x nulls",
        "x ranges",
    ]
    assert all(check.passed for check in file.checks(""))
    assert (file.names_of_label, file.subsets) == ({0: {"a"}, 1: {"b"}}, {"balanced"})


@given(st.lists(st.none() | st.floats(-3, 3, width=32), min_size=N, max_size=N), st.sampled_from(["gap", "balance"]))
@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_values_out_of_range_and_nulls_are_counted(tmp_path: Path, values: list[Any], name: str) -> None:
    file = checked(write_rows(tmp_path / "m.parquet", {name: values}))
    low, high = RANGES[name].low, RANGES[name].high
    beyond = [value for value in values if value is not None and not low - 2e-6 <= value <= high + 2e-6]
    nulls = values.count(None) if name == "gap" else 0
    assert file.out_of_range[name] == len(beyond)
    assert file.nulls[name] == nulls
    assert set(failed_checks(file)) == {
        value for value, number in (("ranges", len(beyond)), ("nulls", nulls)) if number
    }


@pytest.mark.parametrize(
    ("recipe", "beyond"),
    [({}, 0), ({"bins": 4}, 0), ({"bins": 3}, 1), ({"bins": 2, "grid": True}, 0), ({"bins": 0}, 0)],
)
def test_largest_bin_follows_from_the_recipe(tmp_path: Path, recipe: dict[str, Any], beyond: int) -> None:
    file = checked(write_rows(tmp_path / "m.parquet"), {**PROVENANCE, "recipe": {"balanced": recipe}})
    assert file.out_of_range["bin"] == beyond


def test_rows_and_digest_are_compared_with_the_metadata(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.parquet")
    table = pq.read_table(path)
    pq.write_table(table.slice(1), path)
    assert set(failed_checks(checked(path))) == {"rows", "digest"} | {"ranges"}  # the last rank is past the last row
    pq.write_table(table.replace_schema_metadata(None), path)
    assert set(failed_checks(checked(path))) == {"schema", "rows", "digest", "metadata"}
    pq.write_table(table.set_column(5, "bin", table["bin"].cast(pa.int64())), path)
    assert set(failed_checks(checked(path))) == {"schema"} | {"digest"}


def test_missing_column_ends_the_checks(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.parquet", columns={name: type_ for name, type_ in COLUMNS.items() if name != "gap"})
    (check,) = CheckedFile(path, COLUMNS, PROVENANCE).checks("")
    assert (check.passed, check.detail) == (False, "m.parquet lacks gap: run mmaudit split again")


def test_invalid_columns_raise(tmp_path: Path) -> None:
    path = tmp_path / "m.parquet"
    pq.write_table(pa.table({"sample_id": [1]}), path)
    with pytest.raises(ManifestError, match="its sample_id is int64, not string"):
        CheckedFile(path, COLUMNS, {})
    pq.write_table(pa.table({"sample_id": ["a"], "gap": [[1]]}), path)
    with pytest.raises(ManifestError, match="its gap is list<"):
        CheckedFile(path, COLUMNS, {})


def test_missing_sections_and_null_ids() -> None:
    assert provenance_section({"recipe": {"a": 1}}, "recipe") == {"a": 1}
    assert provenance_section({"recipe": "a"}, "recipe") == provenance_section({}, "recipe") == {}
    assert non_null_ids(pa.chunked_array([["a", None, "b"]])).to_pylist() == ["a", "b"]
