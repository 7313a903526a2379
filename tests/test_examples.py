"""Tests of examples: rows join by id, changes of the source raise, and test rows are never trained on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from numpy.typing import NDArray

from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.audit.features.backbone_inputs import Backbone, InputLayout
from mmaudit.audit.features.encode import EncodeTask, encode_dataset
from mmaudit.audit.features.encoded_samples import collect_encoded
from mmaudit.audit.features.matrix import Inputs
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.audit.workers import no_progress
from mmaudit.rebalance.manifest import COLUMNS, DROPPED_COLUMNS, Manifest
from mmaudit.train.examples import Examples, load_examples

pytestmark = pytest.mark.usefixtures("quick_scores")

N = 60
SPLITS = ["test" if number % 5 == 0 else "train" for number in range(N)]


@dataclass(frozen=True)
class Source:
    """An encoded dataset on disk."""

    dataset: Dataset
    tasks: list[EncodeTask]


Write = Callable[..., Source]


def make_columns(**extra: list[Any]) -> dict[str, list[Any]]:
    """Build 60 samples of the classes 3, 5 and 9 with vectors of two lengths, every fifth a test sample."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {
        "id": [f"s{number:03d}" for number in range(N)],
        "label": [(3, 5, 9)[number % 3] for number in range(N)],
        "split": SPLITS,
        "audio": rng.standard_normal((N, 4)).tolist(),
        "visual": rng.standard_normal((N, 2)).tolist(),
    }
    return {**columns, **extra}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write columns in some order, open and encode them."""
    written: list[Path] = []

    def write_and_encode(
        columns: dict[str, list[Any]], order: list[int] | None = None, *, shard_rows: int = 25
    ) -> Source:
        rows = range(len(columns["id"])) if order is None else order
        path = tmp_path / f"{len(written)}.parquet"
        written.append(path)
        table = pa.table({name: [values[row] for row in rows] for name, values in columns.items()})
        pq.write_table(table, path, row_group_size=shard_rows)
        dataset = open_dataset(path)
        cache = tmp_path / f"{path.stem}-features"
        return Source(dataset, encode_dataset(dataset, cache, media=MediaConfig(), num_workers=0, progress=no_progress))

    return write_and_encode


def make_scores(source: Source, **changes: Any) -> ScoreTable:
    """Build a score table of the source with its ids, splits, groups and contents, and random confidences."""
    samples = read_samples(source.dataset, seed=0, test_fraction=0.2)
    rng = np.random.default_rng(1)
    scores = ScoreTable(
        sample_id=samples.sample_id,
        label=samples.label * 2 + 1,  # numbers with gaps: examples renumber the classes
        label_name=np.array([samples.class_names[code] for code in samples.label], dtype=object),
        modalities=("audio", "visual"),
        confidence=rng.random((len(samples), 2)).astype(np.float32),
        split=samples.split,
        group=samples.group,
        p_balanced=rng.random(len(samples)).astype(np.float32),
        content=collect_encoded(source.dataset, samples, source.tasks).content,
    )
    return replace(scores, **changes)


def make_manifest(scores: ScoreTable, keep: Any = None) -> tuple[Manifest, pa.Table]:
    """Keep two of three samples, or those of the mask."""
    n = len(scores)
    keep_mask = np.arange(n) % 3 > 0 if keep is None else np.asarray(keep)
    values: dict[str, Any] = {
        "subset": ["m"] * n,
        "bin": [None] * n,
        "rank": np.argsort(np.argsort(np.where(keep_mask, scores.gap, 2))),
        "weight": np.ones(n),
        "discrepancy": scores.discrepancy(),
        "reason": ["out"] * n,
        "score": np.zeros(n),
        "threshold": np.zeros(n),
    }
    scored = scores.to_arrow()
    manifest_table, dropped_table = (
        pa.table(
            {name: pa.array(values[name], type_) if name in values else scored[name] for name, type_ in columns.items()}
        )
        for columns in (COLUMNS, DROPPED_COLUMNS)
    )
    dropped_rows = dropped_table.filter(pa.array(~keep_mask))
    return Manifest(table=manifest_table.filter(pa.array(keep_mask)), provenance={}), dropped_rows


def load(source: Source, manifest: Manifest, dropped: pa.Table | None, **options: Any) -> Examples:
    settings = {"validation_fraction": 0.2, "seed": 0, **options}
    batches = None if dropped is None else [dropped]
    return load_examples(manifest, batches, dataset=source.dataset, tasks=source.tasks, **settings)


def read_all(inputs: Inputs) -> NDArray[Any]:
    return np.asarray(inputs.read(np.arange(inputs.num_rows)))


def ids(examples: Examples, split: str) -> set[str]:
    return set(examples.ids(examples.rows(split)))


def assert_equal(first: Examples, second: Examples) -> None:
    for field in fields(Examples):
        if field.name == "inputs":
            for a, b in zip(first.inputs, second.inputs, strict=True):
                np.testing.assert_array_equal(read_all(a), read_all(b))
        elif field.name == "sample_id":
            assert first.sample_id.equals(second.sample_id)
        else:
            np.testing.assert_array_equal(getattr(first, field.name), getattr(second, field.name))


def test_rows_are_joined_by_id(write: Write) -> None:
    columns = make_columns()
    source = write(columns)
    manifest, dropped = make_manifest(make_scores(source))
    examples = load(source, manifest, dropped)
    assert examples.modalities == ("audio", "visual")
    assert len(examples.sample_id) == 40 + 4  # two of three, and the dropped ones of twelve test samples
    assert examples.shapes == ((4,), (2,))
    audio, visual = (read_all(inputs) for inputs in examples.inputs)
    for row, name in enumerate(examples.ids()):
        number = int(name[1:])
        np.testing.assert_array_equal(audio[row], np.float32(columns["audio"][number]))
        np.testing.assert_array_equal(visual[row], np.float32(columns["visual"][number]))
        assert examples.class_names[examples.label[row]] == str(columns["label"][number])
        assert (examples.split[row] == "test") == (SPLITS[number] == "test")


def test_vectors_are_computed_in_one_thread_and_inputs_of_encoders_in_two(write: Write) -> None:
    source = write(make_columns())
    manifest, dropped = make_manifest(make_scores(source))
    examples = replace(load(source, manifest, dropped), backbones=(None, None))
    assert examples.num_threads == 1
    text = Backbone(model="hf:model", kind="text", version="", layout=InputLayout(name="input_ids", shape=(2, 2)))
    assert replace(examples, backbones=(text, None)).num_threads == 2
    assert replace(examples, shapes=((4,), (3, 8, 8))).num_threads == 2


def test_order_and_shards_of_the_source_do_not_matter(write: Write) -> None:
    columns = make_columns(group=[f"g{number % 9}" for number in range(N)])
    source = write(columns)
    manifest, dropped = make_manifest(make_scores(source))
    order = np.random.default_rng(3).permutation(N).tolist()
    moved = write(columns, order, shard_rows=7)
    assert_equal(load(source, manifest, dropped), load(moved, manifest, dropped))


def test_labels_are_numbered_from_0(write: Write) -> None:
    source = write(make_columns())
    examples = load(source, *make_manifest(make_scores(source)))
    assert examples.class_names == ("3", "5", "9")
    assert set(examples.label.tolist()) == {0, 1, 2}
    assert examples.label.dtype == np.int64


def test_class_of_dropped_test_samples_only_has_a_number(write: Write) -> None:
    source = write(make_columns())
    scores = make_scores(source)
    manifest, dropped = make_manifest(scores, keep=scores.label > 1)
    examples = load(source, manifest, dropped)
    assert examples.class_names == ("3", "5", "9")
    assert set(examples.label[examples.in_manifest].tolist()) == {1, 2}


def test_every_manifest_has_the_same_test_set(write: Write) -> None:
    source = write(make_columns())
    scores = make_scores(source)
    test_ids = {f"s{number:03d}" for number in range(N) if SPLITS[number] == "test"}
    discrepancy = dict(zip(scores.sample_id, scores.discrepancy(), strict=True))
    for keep in (np.arange(N) % 3 > 0, np.arange(N) % 2 > 0, np.arange(N) > 20):
        manifest, dropped = make_manifest(scores, keep)
        examples = load(source, manifest, dropped)
        assert ids(examples, "test") == test_ids
        kept_ids = set(scores.sample_id[keep])
        assert set(examples.ids(np.flatnonzero(examples.in_manifest))) == kept_ids
        assert set(examples.ids(np.flatnonzero(~examples.in_manifest))) == test_ids - kept_ids
        assert (ids(examples, "train") | ids(examples, "validation")) == kept_ids - test_ids
        assert sorted(examples.rank[examples.in_manifest]) == list(range(len(kept_ids)))
        assert set(examples.rank[~examples.in_manifest]) == {-1}
        assert examples.discrepancy.tolist() == [discrepancy[name] for name in examples.ids()]
        assert set(examples.weight.tolist()) == {1.0}


def test_without_dropped_rows_the_test_set_is_that_of_the_manifest(write: Write) -> None:
    source = write(make_columns())
    manifest, dropped = make_manifest(make_scores(source))
    with_dropped, without_dropped = load(source, manifest, dropped), load(source, manifest, None)
    assert ids(without_dropped, "test") == set(
        with_dropped.ids(np.flatnonzero(with_dropped.in_manifest & (with_dropped.split == "test")))
    )
    assert ids(without_dropped, "test") < ids(with_dropped, "test")
    for split in ("train", "validation"):
        assert ids(without_dropped, split) == ids(with_dropped, split)


def test_changed_samples_raise(write: Write) -> None:
    columns = make_columns()
    manifest, dropped = make_manifest(make_scores(write(columns)))
    columns["visual"][7] = [0.0, 0.0]
    columns["audio"][8] = [0.0] * 4
    columns["audio"][9] = [0.0] * 4  # a training sample outside the manifest: not checked
    with pytest.raises(
        ManifestError, match=r"2 of 44 samples have changed .* \(the first: s007\); rescore with mmaudit score"
    ):
        load(write(columns), manifest, dropped)


def test_unneeded_sample_may_change(write: Write) -> None:
    columns = make_columns()
    source = write(columns)
    manifest, dropped = make_manifest(make_scores(source))
    before = load(source, manifest, dropped)
    columns["audio"][9] = [0.0] * 4
    assert_equal(load(write(columns), manifest, dropped), before)


def test_table_without_contents_is_not_checked(write: Write) -> None:
    columns = make_columns()
    manifest, dropped = make_manifest(make_scores(write(columns), content=None))
    columns["visual"][7] = [0.5, -0.5]
    examples = load(write(columns), manifest, dropped)
    assert read_all(examples.inputs[1])[examples.ids() == "s007"].tolist() == [[0.5, -0.5]]


def test_missing_samples_raise(write: Write) -> None:
    columns = make_columns()
    manifest, dropped = make_manifest(make_scores(write(columns)))
    fewer = write(columns, [number for number in range(N) if number not in (4, 30)])
    with pytest.raises(ManifestError, match=r"2 of 44 samples .* not in its source \(the first: s004\); .*--data"):
        load(fewer, manifest, dropped)


def test_unusable_sample_raises(write: Write) -> None:
    columns = make_columns()
    columns["visual"][7] = [float("nan"), 1.0]
    source = write(columns)
    manifest, dropped = make_manifest(make_scores(source))
    with pytest.raises(ManifestError, match=r"1 samples of the manifest have no usable visual \(the first: s007\)"):
        load(source, manifest, dropped)


def test_missing_modality_is_nan(write: Write) -> None:
    columns = make_columns()
    for row in (7, 8, 30):
        columns["visual"][row] = None
    columns["audio"][25] = None
    source = write(columns)
    examples = load(source, *make_manifest(make_scores(source)))
    row_of_id = {name: row for row, name in enumerate(examples.ids())}
    assert {"s007", "s008", "s025", "s030"} <= row_of_id.keys()
    for matrix, column in zip(map(read_all, examples.inputs), ("audio", "visual"), strict=True):
        assert matrix.dtype == np.float32
        for name, row in row_of_id.items():
            cell = columns[column][int(name[1:])]
            expected = np.full(matrix.shape[1], np.nan) if cell is None else cell
            np.testing.assert_array_equal(matrix[row], np.float32(expected))


@pytest.mark.parametrize("grouped", [False, True])
def test_validation_is_cut_from_train_only(write: Write, grouped: bool) -> None:
    groups = [f"g{number // 3 % 10}" for number in range(N)]
    source = write(make_columns(**({"group": groups} if grouped else {})))
    manifest, dropped = make_manifest(make_scores(source))
    cuts = set()
    for seed in range(6):
        examples = load(source, manifest, dropped, seed=seed)
        train, validation = ids(examples, "train"), ids(examples, "validation")
        train_ids = {f"s{number:03d}" for number in range(N) if SPLITS[number] == "train"}
        assert train | validation == train_ids & set(examples.ids())
        assert not train & validation
        assert len(validation) == pytest.approx(0.2 * len(train_ids & set(examples.ids())), abs=4 if grouped else 0.5)
        if grouped:
            group = {name: groups[int(name[1:])] for name in examples.ids()}
            assert not {group[name] for name in train} & {group[name] for name in validation}
        cuts.add(frozenset(validation))
        assert_equal(load(source, manifest, dropped, seed=seed), examples)
    assert len(cuts) > 1


def test_validation_split_of_the_source_is_kept(write: Write) -> None:
    names = ["validation" if number % 7 == 1 else split for number, split in enumerate(SPLITS)]
    source = write(make_columns(split=names))
    manifest, dropped = make_manifest(make_scores(source))
    examples = load(source, manifest, dropped)
    for name, split in zip(examples.ids(), examples.split, strict=True):
        assert split == names[int(name[1:])]


def test_dropped_validation_samples_stay_out(write: Write) -> None:
    names = ["validation" if number % 7 == 1 else split for number, split in enumerate(SPLITS)]
    source = write(make_columns(split=names))
    manifest, dropped = make_manifest(make_scores(source))
    assert "validation" in dropped["split"].to_pylist()
    examples = load(source, manifest, dropped)
    assert ids(examples, "validation") <= set(manifest.strings("sample_id"))


def test_splits_of_a_resplit_manifest_are_used(write: Write) -> None:
    """`split --resplit` cuts other splits than the source has: those of the manifest are used."""
    source = write(make_columns())
    manifest, dropped = make_manifest(make_scores(source))
    split = ["test" if name == "train" else "train" for name in manifest.table["split"].to_pylist()]
    column = manifest.table.column_names.index("split")
    table = manifest.table.set_column(column, "split", pa.array(split, pa.string()))
    with pytest.raises(ManifestError, match="have changed their split"):
        load(source, replace(manifest, table=table), dropped)
    provenance = {**manifest.provenance, "recipe": {"resplit": "50/50"}}
    examples = load(source, replace(manifest, table=table, provenance=provenance), dropped)
    split_of_id = dict(zip(manifest.strings("sample_id"), split, strict=True))
    assert all(
        name == "test"
        for sample_id, name in split_of_id.items()
        if sample_id in ids(examples, "test") & split_of_id.keys()
    )
    assert {sample_id for sample_id, name in split_of_id.items() if name == "test"} <= set(ids(examples, "test"))


@pytest.mark.parametrize("unknown", ["holdout", None])
def test_unknown_split_raises(write: Write, unknown: str | None) -> None:
    source = write(make_columns())
    scores = make_scores(source)
    split = np.array([unknown if number == 1 else name for number, name in enumerate(SPLITS)], dtype=object)
    message = (
        "have changed their split since the manifest was made"
        if unknown
        else "has 'None', must be one of train, validation, test"
    )
    with pytest.raises(ManifestError, match=message):
        load(source, *make_manifest(replace(scores, split=split)))


def test_only_selects_one_modality(write: Write) -> None:
    source = write(make_columns())
    examples = load(source, *make_manifest(make_scores(source)))
    visual = examples.only("visual")
    assert (visual.modalities, visual.shapes) == (("visual",), ((2,),))
    np.testing.assert_array_equal(read_all(visual.inputs[0]), read_all(examples.inputs[1]))
    with pytest.raises(ConfigError, match="--only vizual: no such modality; did you mean visual"):
        examples.only("vizual")


def test_splits_that_the_data_do_not_state_are_those_of_the_manifest(write: Write) -> None:
    """A split that was cut would be another one after rows were added; the manifest's is kept."""
    columns = make_columns()
    del columns["split"]
    source = write(columns)
    scores = make_scores(source)
    before = load(source, *make_manifest(scores))
    more = {
        name: values + (values if name != "id" else [f"t{number:03d}" for number in range(N)])
        for name, values in columns.items()
    }
    grown = write(more)
    samples = read_samples(grown.dataset, seed=0, test_fraction=0.2)
    assert scores.split is not None
    assert samples.split[:N].tolist() != scores.split.tolist()
    assert_equal(load(grown, *make_manifest(scores)), before)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_the_test_samples_alone_are_those_of_all(write: Write, task: str) -> None:
    label = [(3, 5, 9)[number % 3] if SPLITS[number] != "test" else 5 for number in range(N)]
    labels = label if task == "classification" else [["a", "b"][: 1 + number % 2] for number in range(N)]
    columns = make_columns(label=labels)
    columns["visual"][5] = None
    path = write(columns)
    dataset = open_dataset(Path(path.dataset.source), DataConfig(task=task))
    source = Source(dataset, path.tasks)
    manifest, dropped = make_manifest(make_scores(source))
    everything, tested = load(source, manifest, dropped), load(source, manifest, dropped, only_test=True)
    rows = everything.rows("test")
    assert tested.ids().tolist() == everything.ids(rows).tolist()
    assert tested.class_names == everything.class_names  # of all rows, also where no test sample is of a class
    assert tested.rows("test").tolist() == list(range(len(rows)))
    for name in ("label", "discrepancy", "in_manifest", "present", *(["values"] if task == "multilabel" else [])):
        np.testing.assert_array_equal(getattr(tested, name), getattr(everything, name)[rows])
    for inputs, of_all in zip(tested.inputs, everything.inputs, strict=True):
        np.testing.assert_array_equal(read_all(inputs), of_all.read(rows))
