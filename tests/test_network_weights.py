"""Tests of the weights of network probes: read from files, they score a run's own data as the run did, and others."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import picture, vectors
from grown import QUICK, check_close, files, write
from safetensors.torch import load_file, save_file

from mmaudit.audit.errors import RunError
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.probes.config import NetworkConfig
from mmaudit.audit.probes.crops import PictureView
from mmaudit.audit.probes.network_probe import fit_network
from mmaudit.audit.probes.network_weights import NetworkInputs, NetworkProbe, score_by_weights
from mmaudit.audit.scores.table import read_scores
from mmaudit.audit.workers import no_progress
from mmaudit.cli import staging
from mmaudit.cli.applying import apply
from mmaudit.cli.config import RunConfig
from mmaudit.cli.run import Run
from mmaudit.cli.scoring import score

pytestmark = pytest.mark.usefixtures("quick_scores")

N, SHAPE = 36, (8, 8, 3)
SMALL = NetworkConfig(epochs=3, batch_size=8, lr=0.05, min_crop=0.6, width=1 / 32)
CONFIG = replace(
    RunConfig(),
    probe=replace(QUICK, folds=2),
    network=replace(SMALL, epochs=2),
    media=MediaConfig(network_size=8),
    data=replace(RunConfig().data, encoder=("image=resnet18",)),
)


def table(num_rows: int = N) -> pa.Table:
    """Return rows of a class, in groups of three, with vectors and pictures in the colour of the class."""
    rng = np.random.default_rng(0)
    label = np.arange(num_rows) // 3 % 2
    features = np.eye(9)[label] * 2 + rng.standard_normal((num_rows, 9))
    return pa.table(
        {
            "id": [f"s{row:03d}" for row in range(num_rows)],
            "label": label,
            "group": [f"g{row // 3}" for row in range(num_rows)],
            "audio": vectors(features),
            "image": [picture(int(value), rng) for value in label],
        }
    )


def fitted(task: str, folder: Path, config: NetworkConfig = SMALL) -> tuple[NetworkProbe, NetworkInputs, Any, Any]:
    from test_network_probe import cross, planted

    rows, target = planted(SHAPE, num_rows=N)
    if task == "regression":
        target = replace(target, task=task, num_outputs=1, values=(50 + 9.0 * target.label[:, None]).astype(np.float32))
    cross_fits = [cross(target.label), cross(target.label, seed=1)]
    inputs, view = MatrixInputs(matrix=rows), PictureView(shape=SHAPE)
    options: dict[str, Any] = {"config": config, "seed": 0, "device": "cpu", "progress": no_progress}
    probe = fit_network(inputs, view, target, cross_fits, folder=folder, keep_weights=True, **options)
    assert isinstance(probe, NetworkProbe)
    return probe, NetworkInputs(rows=inputs, view=view, config=config, device="cpu"), cross_fits, target


@pytest.mark.parametrize(("task", "choose_epoch"), [("classification", False), ("regression", True)])
def test_weights_give_the_outputs_of_the_fit(task: str, choose_epoch: bool, tmp_path: Path) -> None:
    config = replace(SMALL, choose_epoch=choose_epoch)
    probe, inputs, cross_fits, target = fitted(task, tmp_path, config)
    assert probe.weights is not None
    assert [len(of_folds) for of_folds in probe.weights] == [3, 3]
    again = score_by_weights(inputs, cross_fits, probe.weights, num_outputs=target.num_outputs)
    np.testing.assert_array_equal(again.by_repeat, probe.by_repeat)
    np.testing.assert_array_equal(again.by_epoch, probe.by_epoch)
    part = np.arange(5, 30, 2)
    taken = replace(inputs, rows=MatrixInputs(matrix=inputs.rows.read(part)))
    of_part = score_by_weights(
        taken, [item.take(part) for item in cross_fits], probe.weights, num_outputs=target.num_outputs
    )
    np.testing.assert_allclose(of_part.by_repeat, probe.by_repeat[:, part], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(of_part.by_epoch, probe.by_epoch[:, part], rtol=1e-5, atol=1e-5)


def test_size_on_disk_is_that_of_the_networks(tmp_path: Path) -> None:
    """A network of the first repeat has the weights after each of three epochs, the last of them final."""
    probe, inputs, _, target = fitted("classification", tmp_path)
    assert probe.weights is not None
    state = inputs.build(num_outputs=target.num_outputs, seed=0).state_dict()
    num_bytes = sum(value.nbytes for value in state.values())
    for repeat, times in ((0, 3), (1, 1)):
        tensors = load_file(probe.weights[repeat][0])
        assert sum(value.nbytes for value in tensors.values()) == times * num_bytes


def test_outputs_of_a_version_without_weights_are_used_again(tmp_path: Path) -> None:
    first, *_ = fitted("classification", tmp_path)
    assert first.weights is not None
    first.weights[1][2].unlink()
    again, *_ = fitted("classification", tmp_path)
    assert again.weights is None
    np.testing.assert_array_equal(again.by_repeat, first.by_repeat)


def test_damaged_files_and_those_of_other_networks_are_named(tmp_path: Path) -> None:
    probe, inputs, cross_fits, target = fitted("classification", tmp_path)
    assert probe.weights is not None
    file = probe.weights[0][1]
    content = file.read_bytes()
    tensors = {name: value.clone() for name, value in load_file(file).items()}  # of a file that is written again
    stated = {"mmaudit": '{"centre": 0.0, "scale": 1.0}'}

    def check(message: str) -> None:
        with pytest.raises(RunError, match=message) as raised:
            score_by_weights(inputs, cross_fits, probe.weights or (), num_outputs=target.num_outputs)
        assert "\n" not in str(raised.value)

    file.write_bytes(content[:-5])
    check(rf"{file.name} cannot be read")
    file.write_bytes(b"\x80\x04K\x01.")  # a pickle
    check(rf"{file.name} cannot be read")
    save_file(tensors, file)
    check(rf"{file.name} cannot be read")  # without the units of the outputs
    name = "epoch 0/head.weight"
    save_file({**tensors, name: torch.zeros(3, 3)}, file, metadata=stated)
    check(rf"{file.name} is of another network: {name} is F32 \[3, 3\], not F32 \[3, 16\]")
    save_file({**tensors, name: tensors[name].double()}, file, metadata=stated)
    check(rf"{name} is F64")
    save_file({key: value for key, value in tensors.items() if key != name}, file, metadata=stated)
    check(rf"{name} is missing")
    save_file({**tensors, "epoch 3/head.bias": torch.zeros(3)}, file, metadata=stated)
    check(r"epoch 3/head\.bias is added")
    file.unlink()
    check(rf"{file.name} cannot be read")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 rows, whose data `data/a.parquet` can grow by six; read-only."""
    folder = tmp_path_factory.mktemp("networks")
    write(table().slice(0, 30), folder / "data" / "a.parquet")
    score(folder / "data" / "*.parquet", run=folder / "run", config=CONFIG, num_workers=0)
    return folder / "run"


def append(folder: Path) -> None:
    score(folder / "data" / "*.parquet", run=folder / "run", config=CONFIG, num_workers=0, append=True)


def scores_of(folder: Path) -> pa.Table:
    return read_scores(Run(folder).score_source).to_arrow()


def test_own_data_have_their_own_scores(run: Path, tmp_path: Path) -> None:
    names = {path.name for path in (run / "probes").iterdir()}
    networks = {f"image={repeat}-{fold}.safetensors" for repeat in (0, 1) for fold in (0, 1)}
    probes = {"audio.safetensors", "image.safetensors", "state.json", "keys.parquet", "contents.parquet"}
    assert names == networks | probes
    assert not {"by_repeat", "by_epoch"} & load_file(run / "probes" / "image.safetensors").keys()
    result = apply(run, run.parent / "data" / "a.parquet", num_workers=0, out=tmp_path / "own")
    assert scores_of(result.folder).equals(scores_of(run))
    write(table().slice(0, 20), tmp_path / "few.parquet")
    few = apply(run, tmp_path / "few.parquet", num_workers=0, out=tmp_path / "few")
    check_close(scores_of(few.folder), scores_of(run).slice(0, 20))


def test_rows_are_appended_in_two_steps_as_in_one(run: Path, tmp_path: Path) -> None:
    for name, steps in (("once", [6]), ("twice", [2, 6])):
        shutil.copytree(run.parent, tmp_path / name)
        for step in steps:
            write(table().slice(30, step), tmp_path / name / "data" / "b.parquet")
            append(tmp_path / name)
    once, twice = (scores_of(tmp_path / name / "run") for name in ("once", "twice"))
    check_close(twice, once)
    assert once.slice(0, 30).equals(scores_of(run))
    assert len(once) == N
    assert (once["confidence_image"].slice(30).to_numpy() > 0).all()


def test_stages_publish_the_probes_of_one_process(run: Path, tmp_path: Path) -> None:
    for stage in staging.STAGES:
        score(run.parent / "data" / "*.parquet", run=tmp_path / "run", config=CONFIG, num_workers=0, stage=stage)
    assert files(tmp_path / "run" / "probes") == files(run / "probes")
    assert scores_of(tmp_path / "run").equals(scores_of(run))


def test_a_run_without_weights_is_refused(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shutil.copytree(run.parent, tmp_path / "set")
    lost = tmp_path / "set" / "run" / "probes" / "image=1-0.safetensors"
    lost.unlink()
    with pytest.raises(RunError, match="lacks weights of the networks of image: score the data again"):
        append(tmp_path / "set")
    for file in (tmp_path / "set" / "run" / "features" / "networks").glob("*.safetensors"):
        file.unlink()
    score(
        tmp_path / "set" / "data" / "*.parquet",
        run=tmp_path / "set" / "run",
        config=CONFIG,
        num_workers=0,
        overwrite=True,
    )
    assert "kept no weights, so that no other rows can be scored" in caplog.text
    assert not (tmp_path / "set" / "run" / "probes" / "state.json").exists()
    with pytest.raises(RunError, match="keeps no probes"):
        append(tmp_path / "set")


def test_weights_are_not_stored_twice(run: Path) -> None:
    """They are second names of the files by which an interrupted training goes on."""
    kept = {path.stat().st_ino for path in (run / "features" / "networks").glob("*.safetensors")}
    assert {path.stat().st_ino for path in (run / "probes").glob("image=*")} == kept
