"""Tests of the samplers for other loops: orders of finetune, any world size, exact resume, and errors of ids."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from manifests import make_manifest
from torch.utils.data import DataLoader

from mmaudit import ManifestBatchSampler, ManifestSampler
from mmaudit.audit.errors import ConfigError, DatasetError, ManifestError
from mmaudit.rebalance.curriculum import OrderConfig, epoch_order, id_keys
from mmaudit.rebalance.manifest import Manifest

MANIFEST = make_manifest(300)
IDS = np.random.default_rng(1).permutation([f"s{number:03d}" for number in range(320)])  # 20 are in no manifest
SPLIT = dict(zip(MANIFEST.strings("sample_id"), MANIFEST.strings("split"), strict=True))
SAMPLINGS = ("uniform", "bss-h", "anti-curriculum", "balanced-first", "weighted", "posterior", "class-balanced")


def opened(sampling: str = "bss-h", **options: Any) -> ManifestSampler:
    return ManifestSampler(MANIFEST, ids=IDS, sampling=sampling, **options)


def names(indices: Any) -> list[str]:
    return [str(IDS[index]) for index in indices]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_only_training_samples_are_drawn(sampling: str) -> None:
    drawn = set(names(opened(sampling)))
    assert drawn
    assert {SPLIT[name] for name in drawn} == {"train"}
    assert {SPLIT[name] for name in names(opened(sampling, split="test"))} == {"test"}


@pytest.mark.parametrize(
    ("sampling", "order"),
    [
        ("uniform", "shuffled"),
        ("bss-h", "curriculum"),
        ("anti-curriculum", "anti-curriculum"),
        ("weighted", "weighted"),
    ],
)
def test_epoch_e_is_the_order_of_epoch_e_plus_1(sampling: str, order: str) -> None:
    rows = np.flatnonzero(MANIFEST.strings("split") == "train")
    ids = MANIFEST.strings("sample_id")[rows]
    sampler = opened(sampling, seed=3)
    for epoch in (0, 7, 45):
        sampler.set_epoch(epoch)
        expected = epoch_order(
            rank=MANIFEST.table["rank"].to_numpy()[rows],
            balance=MANIFEST.numbers("balance")[rows],
            key=id_keys(ids),
            config=OrderConfig(order=order),
            seed=3,
            epoch=epoch + 1,
        )
        assert names(sampler) == ids[expected].tolist()


def test_the_order_depends_on_ids_only() -> None:
    shuffled = np.random.default_rng(2).permutation(len(IDS))
    sampler = ManifestSampler(MANIFEST, ids=IDS[shuffled], sampling="bss-h")
    assert [IDS[shuffled][index] for index in sampler] == names(opened())
    rows = MANIFEST.table.take(np.random.default_rng(3).permutation(len(MANIFEST)))
    assert names(ManifestSampler(Manifest(table=rows, provenance={}), ids=IDS, sampling="bss-h")) == names(opened())


def test_a_curriculum_grows_and_passes_go_on_to_the_next_epoch() -> None:
    sampler = opened()
    lengths = [len(list(sampler)) for _ in range(41)]
    assert lengths == [len(sampler.order(epoch)) for epoch in range(41)]
    assert lengths[0] == int(180 * OrderConfig().share(1))
    assert lengths[-1] == 180
    assert (sampler.epoch, sampler.next_epoch) == (40, 41)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_number_of_processes_has_the_same_ids_in_every_step(world_size: int) -> None:
    alone = list(ManifestBatchSampler(opened(), 12))
    parts = [list(ManifestBatchSampler(opened(num_replicas=world_size, rank=rank), 12)) for rank in range(world_size)]
    assert {len(part) for part in parts} == {len(alone)}
    for step, together in enumerate(zip(*parts, strict=True)):
        assert set(alone[step]) == set().union(*together)
        if len(alone[step]) >= world_size:
            assert sum(map(len, together)) == len(alone[step])
    strided = [
        list(DataLoader(IDS.tolist(), 12 // world_size, sampler=opened(num_replicas=world_size, rank=rank)))
        for rank in range(world_size)
    ]
    assert {len(part) for part in strided} == {len(alone)}
    assert [set().union(*step) for step in zip(*strided, strict=True)] == [set(names(step)) for step in alone]


def test_a_last_step_smaller_than_the_processes_repeats_its_samples() -> None:
    manifest = make_manifest(9, splits=("train",))
    ids = manifest.strings("sample_id")
    options: dict[str, Any] = {"ids": ids, "validation_fraction": 0, "num_replicas": 4}
    parts = [list(ManifestBatchSampler(ManifestSampler(manifest, rank=rank, **options), 4)) for rank in range(4)]
    last = [part[-1] for part in parts]
    assert [len(part) for part in parts] == [3] * 4
    assert len({tuple(batch) for batch in last}) == 1
    samples = [list(ManifestSampler(manifest, rank=rank, **options)) for rank in range(4)]
    assert Counter(index for part in samples for index in part) == Counter(
        {**dict.fromkeys(range(9), 1), last[0][0]: 4}
    )


def test_drop_last_leaves_out_a_smaller_step() -> None:
    steps = list(ManifestBatchSampler(opened("uniform"), 50))
    batches = ManifestBatchSampler(opened("uniform"), 50, drop_last=True)
    assert [len(step) for step in steps] == [50, 50, 50, 30]
    assert len(batches) == 3
    assert list(batches) == steps[:3]


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_a_state_resumes_exactly_also_with_other_processes(sampling: str) -> None:
    whole = list(ManifestBatchSampler(opened(sampling), 12))
    sampler = opened(sampling)
    stream = iter(ManifestBatchSampler(sampler, 12))
    done = [next(stream), next(stream)]
    state = sampler.state_dict()
    assert state["position"] == 24
    parts = []
    for rank in range(3):
        other = opened(sampling, num_replicas=3, rank=rank)
        other.load_state_dict(state)
        other.set_epoch(0)  # as a loop that resumes does
        parts.append(list(ManifestBatchSampler(other, 12)))
    assert [set().union(*step) for step in zip(*parts, strict=True)] == [set(step) for step in whole[len(done) :]]
    sampler.load_state_dict(state)
    assert [index for index in sampler] == [index for step in whole[2:] for index in step]
    assert (sampler.epoch, sampler.next_epoch) == (0, 1)


@pytest.mark.parametrize("sampling", ["uniform", "bss-h"])
def test_a_loop_that_stops_after_the_last_step_goes_on_to_the_next_epoch(sampling: str) -> None:
    """Lightning counts the steps and asks for no more; the length is then that of the next epoch."""
    for build in (lambda sampler: sampler, lambda sampler: ManifestBatchSampler(sampler, 4)):
        sampler = opened(sampling)
        stream = build(sampler)
        for epoch in range(3):
            num = len(stream)
            steps = iter(stream)
            assert len([next(steps) for _ in range(num)]) == num
            assert sampler.epoch == epoch
            assert sampler.position == len(sampler.order())
        state = sampler.state_dict()
        sampler.set_epoch(sampler.epoch)
        assert len(stream) == num
        sampler.load_state_dict(state)
        sampler.set_epoch(2)
        assert list(stream) == []  # of epoch 2 nothing is left
        sampler.load_state_dict(state)
        assert list(stream)
        assert sampler.epoch == 3


def test_another_epoch_or_pass_starts_from_the_beginning() -> None:
    sampler = opened("uniform")
    next(iter(sampler))
    state = sampler.state_dict()
    sampler.load_state_dict(state)
    sampler.set_epoch(1)
    assert len(list(sampler)) == 180
    stream = iter(sampler)
    next(stream)
    assert len(list(sampler)) == 180


@pytest.mark.parametrize(
    "options", [{"seed": 1}, {"sampling": "uniform"}, {"split": "test"}, {"settings": {"order.start": 0.2}}]
)
def test_a_state_of_another_order_raises(options: dict[str, Any]) -> None:
    state = opened().state_dict()
    with pytest.raises(ConfigError, match="state of the sampler is of another"):
        opened(**options).load_state_dict(state)


def test_ids_may_be_any_column_or_read_from_the_samples() -> None:
    expected = names(opened())
    samples = [{"clip": name} for name in IDS]
    by_field = ManifestSampler(MANIFEST, samples, id_of="clip", sampling="bss-h")
    by_function = ManifestSampler(MANIFEST, samples, id_of=lambda sample: sample["clip"], sampling="bss-h")
    columns = [pa.array(IDS), pa.chunked_array([IDS[:100], IDS[100:]]), pa.array(IDS).dictionary_encode()]
    for ids in (list(IDS), *columns):
        assert names(ManifestSampler(MANIFEST, ids=ids, sampling="bss-h")) == expected
    assert names(by_field) == names(by_function) == expected


def test_numbers_are_ids_too() -> None:
    manifest = make_manifest(10, splits=("train",))
    table = manifest.table.set_column(0, "sample_id", pa.array([str(number) for number in range(10)]))
    sampler = ManifestSampler(Manifest(table=table, provenance={}), ids=np.arange(10)[::-1], validation_fraction=0)
    assert sorted(sampler) == list(range(10))


def test_rows_that_the_dataset_lacks_raise_unless_allowed() -> None:
    train = [name for name, split in SPLIT.items() if split == "train"]
    ids = [name for name in IDS if name not in train[:5]]
    with pytest.raises(ManifestError, match=rf"lacks 5 of the manifest's 180 rows \({', '.join(train[:3])}\)"):
        ManifestSampler(MANIFEST, ids=ids)
    assert len(ManifestSampler(MANIFEST, ids=ids, allow_missing=True)) == 175
    test_ids = [name for name in IDS if SPLIT.get(name) != "test"]
    assert len(ManifestSampler(MANIFEST, ids=test_ids)) == 180  # rows of other splits are not needed


def test_wrong_ids_raise() -> None:
    with pytest.raises(ManifestError, match=r"none of the manifest's 180 rows.*s000.*the dataset's 0, 1, 2"):
        ManifestSampler(MANIFEST, ids=range(300))
    with pytest.raises(DatasetError, match=r"2 ids of the dataset occur more than once, 3 rows too many"):
        ManifestSampler(MANIFEST, ids=[*IDS, IDS[0], IDS[0], IDS[1]])
    with pytest.raises(DatasetError, match="1 of 321 ids of the dataset are null"):
        ManifestSampler(MANIFEST, ids=[*IDS, None])
    for ids in ([["a"], ["b"]], [0.5, 1.5], ["a", 1]):
        with pytest.raises(DatasetError, match="strings or integers"):
            ManifestSampler(MANIFEST, ids=ids)
    with pytest.raises(DatasetError, match="320 ids for a dataset of 2 samples"):
        ManifestSampler(MANIFEST, [1, 2], ids=IDS)
    for options in ({}, {"ids": IDS, "id_of": "x"}, {"id_of": "x"}):
        with pytest.raises(ConfigError, match="pass"):
            ManifestSampler(MANIFEST, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": "bss"}, "sampling bss: .*uniform"),
        ({"sampling": "bss-l"}, "evaluates the model in training.*weighted"),
        ({"sampling": "dus-h"}, "selects samples of single modalities"),
        ({"settings": {"order.strat": 0.2}}, r"no config key order\.strat"),
        ({"settings": {"optim.lr": 0.2}}, r"setting optim\.lr"),
        ({"settings": {"sampling.bss.bata": 0.2}}, r"no config key sampling\.bss\.bata"),
        ({"rank": 2, "num_replicas": 2}, "rank 2 of 2"),
    ],
)
def test_wrong_settings_raise(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        opened(**{"sampling": "bss-h", **options})
    with pytest.raises(ConfigError, match="counted from 0"):
        opened().set_epoch(-1)
    with pytest.raises(ConfigError, match="at least one sample each"):
        ManifestBatchSampler(opened(num_replicas=4), 3)


def test_missing_scores_raise() -> None:
    nulls = pa.nulls(len(MANIFEST), pa.float32())
    index = MANIFEST.table.column_names.index("p_balanced")
    manifest = Manifest(table=MANIFEST.table.set_column(index, "p_balanced", nulls), provenance={})
    with pytest.raises(ManifestError, match="180 of 180 training samples have none"):
        ManifestSampler(manifest, ids=IDS, sampling="posterior")


def test_torchs_limit_of_2_to_the_24_rows_does_not_hold() -> None:
    """torch.multinomial raises for so many weights; an order by keys does not. The join, of seconds, is left out."""
    n = 2**24 + 1
    with pytest.raises(RuntimeError, match="2\\^24"):
        torch.multinomial(torch.ones(1).expand(n), 1)
    key = np.arange(n, dtype=np.uint64)
    config = OrderConfig(start=1e-6, grow_epochs=10**9)
    order = epoch_order(rank=np.arange(n, dtype=np.int32), key=key, config=config, seed=0, epoch=1)
    assert 0 < len(order) < 2**12


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, mmaudit; assert 'ManifestSampler' in dir(mmaudit); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
