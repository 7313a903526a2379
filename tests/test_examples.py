"""Laws of the examples: rows join by id, what has changed is noticed, and no test row is ever trained on."""

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

from mmaudit.audit.dataset.dataset import Dataset, open_dataset
from mmaudit.audit.dataset.samples import read_samples
from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.audit.features.encode import EncodeTask, encode_dataset
from mmaudit.audit.features.encoded_samples import collect_encoded
from mmaudit.audit.features.matrix import Inputs
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.audit.workers import no_progress
from mmaudit.rebalance.manifest import COLUMNS, DROPPED_COLUMNS, Manifest
from mmaudit.train.examples import Examples, load_examples

N = 60
SPLITS = ["test" if number % 5 == 0 else "train" for number in range(N)]


@dataclass(frozen=True)
class Source:
    """A dataset on disk, encoded."""

    dataset: Dataset
    tasks: list[EncodeTask]


Write = Callable[..., Source]


def columns_of(**more: list[Any]) -> dict[str, list[Any]]:
    """Give 60 samples of the classes 3, 5 and 9 with vectors of two lengths, every fifth a test sample."""
    rng = np.random.default_rng(0)
    columns: dict[str, list[Any]] = {
        "id": [f"s{number:03d}" for number in range(N)],
        "label": [(3, 5, 9)[number % 3] for number in range(N)],
        "split": SPLITS,
        "audio": rng.standard_normal((N, 4)).tolist(),
        "visual": rng.standard_normal((N, 2)).tolist(),
    }
    return {**columns, **more}


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


def scores_of(source: Source, **more: Any) -> ScoreTable:
    """Give a score table of the source: its own ids, splits, groups and contents, and chance for confidence."""
    samples = read_samples(source.dataset, seed=0, test_fraction=0.2)
    rng = np.random.default_rng(1)
    scores = ScoreTable(
        sample_id=samples.sample_id,
        label=samples.label * 2 + 1,  # numbers with holes: examples number classes anew
        label_name=np.array([samples.class_names[one] for one in samples.label], dtype=object),
        modalities=("audio", "visual"),
        confidence=rng.random((len(samples), 2)).astype(np.float32),
        split=samples.split,
        group=samples.group,
        p_balanced=rng.random(len(samples)).astype(np.float32),
        content=collect_encoded(source.dataset, samples, source.tasks).content,
    )
    return replace(scores, **more)


def split_of(scores: ScoreTable, keep: Any = None) -> tuple[Manifest, pa.Table]:
    """Keep two of three samples, or the ones told."""
    n = len(scores)
    chosen = np.arange(n) % 3 > 0 if keep is None else np.asarray(keep)
    told: dict[str, Any] = {
        "subset": ["m"] * n,
        "bin": [None] * n,
        "rank": np.argsort(np.argsort(np.where(chosen, scores.gap, 2))),
        "weight": np.ones(n),
        "discrepancy": scores.discrepancy(),
        "reason": ["out"] * n,
        "score": np.zeros(n),
        "threshold": np.zeros(n),
    }
    scored = scores.to_arrow()
    kept, dropped = (
        pa.table(
            {name: pa.array(told[name], type_) if name in told else scored[name] for name, type_ in columns.items()}
        )
        for columns in (COLUMNS, DROPPED_COLUMNS)
    )
    left = dropped.filter(pa.array(~chosen))
    return Manifest(table=kept.filter(pa.array(chosen)), provenance={}), left


def load(source: Source, manifest: Manifest, dropped: pa.Table | None, **options: Any) -> Examples:
    settings = {"validation_fraction": 0.2, "seed": 0, **options}
    samples = read_samples(source.dataset, seed=0, test_fraction=0.2)
    statuses = collect_encoded(source.dataset, samples, source.tasks).statuses
    return load_examples(manifest, dropped, samples=samples, statuses=statuses, tasks=source.tasks, **settings)


def whole(inputs: Inputs) -> NDArray[Any]:
    return np.asarray(inputs.read(np.arange(inputs.num_rows)))


def ids(examples: Examples, split: str) -> set[str]:
    return set(examples.sample_id[examples.rows(split)])


def assert_equal(one: Examples, other: Examples) -> None:
    for field in fields(Examples):
        if field.name == "inputs":
            for a, b in zip(one.inputs, other.inputs, strict=True):
                np.testing.assert_array_equal(whole(a), whole(b))
        else:
            np.testing.assert_array_equal(getattr(one, field.name), getattr(other, field.name))


def test_rows_are_joined_by_id(write: Write) -> None:
    columns = columns_of()
    source = write(columns)
    manifest, dropped = split_of(scores_of(source))
    examples = load(source, manifest, dropped)
    assert examples.modalities == ("audio", "visual")
    assert len(examples.sample_id) == 40 + 4  # two of three, and the dropped among the twelve test samples
    assert examples.shapes == ((4,), (2,))
    audio, visual = (whole(each) for each in examples.inputs)
    for row, name in enumerate(examples.sample_id):
        number = int(name[1:])
        np.testing.assert_array_equal(audio[row], np.float32(columns["audio"][number]))
        np.testing.assert_array_equal(visual[row], np.float32(columns["visual"][number]))
        assert examples.class_names[examples.label[row]] == str(columns["label"][number])
        assert (examples.split[row] == "test") == (SPLITS[number] == "test")


def test_the_order_and_the_shards_of_the_source_do_not_matter(write: Write) -> None:
    columns = columns_of(group=[f"g{number % 9}" for number in range(N)])
    source = write(columns)
    manifest, dropped = split_of(scores_of(source))
    order = np.random.default_rng(3).permutation(N).tolist()
    moved = write(columns, order, shard_rows=7)
    assert_equal(load(source, manifest, dropped), load(moved, manifest, dropped))


def test_labels_are_numbered_from_nought(write: Write) -> None:
    source = write(columns_of())
    examples = load(source, *split_of(scores_of(source)))
    assert examples.class_names == ("3", "5", "9")
    assert set(examples.label.tolist()) == {0, 1, 2}
    assert examples.label.dtype == np.int64


def test_a_class_of_dropped_test_samples_alone_has_a_number_too(write: Write) -> None:
    source = write(columns_of())
    scores = scores_of(source)
    manifest, dropped = split_of(scores, keep=scores.label > 1)
    examples = load(source, manifest, dropped)
    assert examples.class_names == ("3", "5", "9")
    assert set(examples.label[examples.chosen].tolist()) == {1, 2}


def test_every_figure_stands_on_the_same_test_set(write: Write) -> None:
    source = write(columns_of())
    scores = scores_of(source)
    everyone = {f"s{number:03d}" for number in range(N) if SPLITS[number] == "test"}
    discrepancy = dict(zip(scores.sample_id, scores.discrepancy(), strict=True))
    for keep in (np.arange(N) % 3 > 0, np.arange(N) % 2 > 0, np.arange(N) > 20):
        manifest, dropped = split_of(scores, keep)
        examples = load(source, manifest, dropped)
        assert ids(examples, "test") == everyone
        kept = set(scores.sample_id[keep])
        assert set(examples.sample_id[examples.chosen]) == kept
        assert set(examples.sample_id[~examples.chosen]) == everyone - kept
        assert (ids(examples, "train") | ids(examples, "validation")) == kept - everyone
        assert sorted(examples.rank[examples.chosen]) == list(range(len(kept)))
        assert set(examples.rank[~examples.chosen]) == {-1}
        assert examples.discrepancy.tolist() == [discrepancy[name] for name in examples.sample_id]
        assert set(examples.weight.tolist()) == {1.0}


def test_without_the_dropped_rows_the_manifest_s_own_test_samples_are_the_test_set(write: Write) -> None:
    source = write(columns_of())
    manifest, dropped = split_of(scores_of(source))
    both, own = load(source, manifest, dropped), load(source, manifest, None)
    assert ids(own, "test") == set(both.sample_id[both.chosen & (both.split == "test")])
    assert ids(own, "test") < ids(both, "test")
    for split in ("train", "validation"):
        assert ids(own, split) == ids(both, split)


def test_a_changed_sample_is_named(write: Write) -> None:
    columns = columns_of()
    manifest, dropped = split_of(scores_of(write(columns)))
    columns["visual"][7] = [0.0, 0.0]
    columns["audio"][8] = [0.0] * 4
    columns["audio"][9] = [0.0] * 4  # a training sample that the manifest left out: nobody asks for it
    with pytest.raises(
        ManifestError, match=r"2 of 44 samples have changed .* \(the first: s007\); rescore with mmaudit score"
    ):
        load(write(columns), manifest, dropped)


def test_a_sample_that_is_not_needed_may_change(write: Write) -> None:
    columns = columns_of()
    source = write(columns)
    manifest, dropped = split_of(scores_of(source))
    before = load(source, manifest, dropped)
    columns["audio"][9] = [0.0] * 4
    assert_equal(load(write(columns), manifest, dropped), before)


def test_a_table_without_contents_is_not_checked(write: Write) -> None:
    columns = columns_of()
    manifest, dropped = split_of(scores_of(write(columns), content=None))
    columns["visual"][7] = [0.5, -0.5]
    examples = load(write(columns), manifest, dropped)
    assert whole(examples.inputs[1])[examples.sample_id == "s007"].tolist() == [[0.5, -0.5]]


def test_a_lost_sample_is_named(write: Write) -> None:
    columns = columns_of()
    manifest, dropped = split_of(scores_of(write(columns)))
    fewer = write(columns, [number for number in range(N) if number not in (4, 30)])
    with pytest.raises(ManifestError, match=r"2 of 44 samples .* not in its source \(the first: s004\); .*--data"):
        load(fewer, manifest, dropped)


def test_a_sample_that_cannot_be_used_is_named(write: Write) -> None:
    columns = columns_of()
    columns["visual"][7] = [float("nan"), 1.0]
    source = write(columns)
    manifest, dropped = split_of(scores_of(source))
    with pytest.raises(ManifestError, match="1 samples of the manifest have no usable visual \(the first: s007\)"):
        load(source, manifest, dropped)


def test_a_modality_that_the_source_leaves_out_is_nan(write: Write) -> None:
    columns = columns_of()
    for row in (7, 8, 30):
        columns["visual"][row] = None
    columns["audio"][25] = None
    source = write(columns)
    examples = load(source, *split_of(scores_of(source)))
    place = {name: row for row, name in enumerate(examples.sample_id)}
    assert {"s007", "s008", "s025", "s030"} <= place.keys()
    for matrix, column in zip(map(whole, examples.inputs), ("audio", "visual"), strict=True):
        assert matrix.dtype == np.float32
        for name, row in place.items():
            told = columns[column][int(name[1:])]
            expected = np.full(matrix.shape[1], np.nan) if told is None else told
            np.testing.assert_array_equal(matrix[row], np.float32(expected))


@pytest.mark.parametrize("grouped", [False, True])
def test_validation_is_cut_from_train_alone(write: Write, grouped: bool) -> None:
    groups = [f"g{number // 3 % 10}" for number in range(N)]
    source = write(columns_of(**({"group": groups} if grouped else {})))
    manifest, dropped = split_of(scores_of(source))
    cuts = set()
    for seed in range(6):
        examples = load(source, manifest, dropped, seed=seed)
        train, validation = ids(examples, "train"), ids(examples, "validation")
        told = {f"s{number:03d}" for number in range(N) if SPLITS[number] == "train"}
        assert train | validation == told & set(examples.sample_id)
        assert not train & validation
        assert len(validation) == pytest.approx(0.2 * len(told & set(examples.sample_id)), abs=4 if grouped else 0.5)
        if grouped:
            group = {name: groups[int(name[1:])] for name in examples.sample_id}
            assert not {group[name] for name in train} & {group[name] for name in validation}
        cuts.add(frozenset(validation))
        assert_equal(load(source, manifest, dropped, seed=seed), examples)
    assert len(cuts) > 1


def test_a_validation_split_of_the_source_is_kept(write: Write) -> None:
    names = ["validation" if number % 7 == 1 else split for number, split in enumerate(SPLITS)]
    source = write(columns_of(split=names))
    manifest, dropped = split_of(scores_of(source))
    examples = load(source, manifest, dropped)
    for name, split in zip(examples.sample_id, examples.split, strict=True):
        assert split == names[int(name[1:])]


def test_dropped_validation_samples_stay_out(write: Write) -> None:
    names = ["validation" if number % 7 == 1 else split for number, split in enumerate(SPLITS)]
    source = write(columns_of(split=names))
    manifest, dropped = split_of(scores_of(source))
    assert "validation" in dropped["split"].to_pylist()
    examples = load(source, manifest, dropped)
    assert ids(examples, "validation") <= set(manifest.strings("sample_id"))


def test_a_manifest_with_splits_of_its_own_is_trained_on(write: Write) -> None:
    """`split --resplit` cuts other splits than the source has: these are then the ones that count."""
    source = write(columns_of())
    manifest, dropped = split_of(scores_of(source))
    split = ["test" if name == "train" else "train" for name in manifest.table["split"].to_pylist()]
    place = manifest.table.column_names.index("split")
    table = manifest.table.set_column(place, "split", pa.array(split, pa.string()))
    with pytest.raises(ManifestError, match="have changed their split"):
        load(source, replace(manifest, table=table), dropped)
    provenance = {**manifest.provenance, "rule": {"resplit": "50/50"}}
    examples = load(source, replace(manifest, table=table, provenance=provenance), dropped)
    own = dict(zip(manifest.strings("sample_id"), split, strict=True))
    assert all(name == "test" for one, name in own.items() if one in ids(examples, "test") & own.keys())
    assert {one for one, name in own.items() if name == "test"} <= set(ids(examples, "test"))


@pytest.mark.parametrize("odd", ["holdout", None])
def test_an_unknown_split_is_refused(write: Write, odd: str | None) -> None:
    source = write(columns_of())
    scores = scores_of(source)
    split = np.array([odd if number == 1 else name for number, name in enumerate(SPLITS)], dtype=object)
    line = "have changed their split since the manifest was made" if odd else "has 'None', must be one of train, validation, test"
    with pytest.raises(ManifestError, match=line):
        load(source, *split_of(replace(scores, split=split)))


def test_one_modality_alone(write: Write) -> None:
    source = write(columns_of())
    examples = load(source, *split_of(scores_of(source)))
    visual = examples.only("visual")
    assert (visual.modalities, visual.shapes) == (("visual",), ((2,),))
    np.testing.assert_array_equal(whole(visual.inputs[0]), whole(examples.inputs[1]))
    with pytest.raises(ConfigError, match="--only vizual: did you mean visual"):
        examples.only("vizual")
