"""Tests of training data: its set-up, batches of the training rows, evaluation in eval mode, and trained copies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from training import QUICK, build_training_data, make_examples, with_options

from mmaudit.audit import row_arrays
from mmaudit.audit.errors import ConfigError, ManifestError
from mmaudit.audit.features.encoders import StoredPictures
from mmaudit.audit.features.matrix import MatrixInputs
from mmaudit.audit.hashing import digest
from mmaudit.audit.probes.crops import PictureView
from mmaudit.train import checkpoint
from mmaudit.train.batches import Batch, Step, split_order
from mmaudit.train.checkpoint import run_identity
from mmaudit.train.config import TrainConfig
from mmaudit.train.examples import Examples
from mmaudit.train.methods import resolve
from mmaudit.train.network import Outputs, separate_losses
from mmaudit.train.optimizer import SINGLE_PROCESS, DistributedContext
from mmaudit.train.store import Store
from mmaudit.train.training_data import NetworkReader, build_network, set_up, validate

torch.set_num_threads(1)


def confidence(outputs: Outputs, label: Tensor) -> Tensor:
    return outputs.confidence(label)


def fused_loss(outputs: Outputs, batch: Batch) -> Tensor:
    return batch.mean_fused(separate_losses(outputs, batch.label)[0])


@pytest.mark.parametrize("resident_mib", [0, 10])
def test_batches_have_the_training_rows_of_each_step(resident_mib: int) -> None:
    examples = make_examples(40)
    training_data, _ = build_training_data(examples, with_options(resident_mib=resident_mib))
    steps = [Step(rows=np.array([2, 0, 2])), Step(rows=np.array([5]))]
    for step, batch in zip(steps, training_data.batches(steps, epoch=1), strict=True):
        rows = training_data.train[step.rows]
        assert batch.label.tolist() == examples.label[rows].tolist()
        assert batch.rows.tolist() == step.rows.tolist()
        for actual, inputs in zip(batch.inputs, examples.inputs, strict=True):
            np.testing.assert_array_equal(actual, inputs.read(rows))


def batches_of(epoch: int, **options: Any) -> list[list[Batch]]:
    """Return the batches of an epoch in one or several processes, and read ahead or from the device: by step."""
    size = options.pop("world_size", 1)
    of_process = []
    for rank in range(size):
        distributed = DistributedContext(rank=rank, world_size=size) if size > 1 else SINGLE_PROCESS
        methods = resolve(with_options(batch_size=19, **options))
        data = set_up(make_examples(200), methods, seed=3, device="cpu", distributed=distributed)
        sampler = methods.sampler(
            data.pool, methods.config.order, methods.sampler_config, batch_size=19, seed=3, distributed=distributed
        )
        of_process.append(list(data.batches(sampler.steps(epoch), epoch=epoch)))
    return [list(step) for step in zip(*of_process, strict=True)]


@pytest.mark.parametrize("sampling", ["uniform", "bss-h", "class-balanced"])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_any_number_of_processes_reads_the_same_global_batches(sampling: str, world_size: int) -> None:
    """Read ahead in windows of a few batches or on the device: rows, inputs, labels and weights of a step are equal."""
    for epoch in (1, 5):
        expected = [step[0] for step in batches_of(epoch, sampling=sampling)]
        streamed = batches_of(epoch, sampling=sampling, world_size=world_size, resident_mib=0, read_ahead_mib=1)
        assert len(streamed) == len(expected) > 1
        for parts, whole in zip(streamed, expected, strict=True):
            assert torch.equal(torch.cat([part.rows for part in parts]), whole.rows)
            assert torch.equal(torch.cat([part.label for part in parts]), whole.label)
            assert torch.equal(torch.cat([part.loss_weight for part in parts], dim=1), whole.loss_weight)
            for modality, inputs in enumerate(whole.inputs):
                assert torch.equal(torch.cat([part.inputs[modality] for part in parts]), inputs)


@pytest.mark.parametrize("resident_mib", [0, 10])
def test_reading_uses_eval_mode_and_does_not_change_the_model(resident_mib: int) -> None:
    examples = make_examples(1500)
    training_data, net = build_training_data(examples, with_options(resident_mib=resident_mib, dropout=0.5))
    net.train()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    reader = NetworkReader(training_data, net)
    first, repeated = reader.read(confidence), reader.read(confidence)
    assert first.shape == (3, 750) == (3, reader.num_train)
    assert torch.equal(first, repeated)  # no dropout
    assert net.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    rows = np.array([7, 3, 700])
    torch.testing.assert_close(reader.read(confidence, rows=rows), first[:, rows])
    assert reader.read_validation(confidence).shape == (3, 375)


def test_validation_is_the_mean_over_validation_samples() -> None:
    examples = make_examples(200)
    training_data, net = build_training_data(examples)
    validation = validate(NetworkReader(training_data, net))
    net.eval()
    rows = training_data.validation
    with torch.no_grad():
        outputs = net([torch.from_numpy(inputs.read(rows)) for inputs in examples.inputs])
    label = torch.from_numpy(examples.label[rows])
    fused, unimodal = separate_losses(outputs, label)
    assert validation.loss == pytest.approx(float(fused.mean()), rel=1e-5)
    assert validation.unimodal_loss == pytest.approx(unimodal.mean(dim=1).tolist(), rel=1e-5)
    assert validation.metric == pytest.approx(float((outputs.fused.argmax(dim=1) == label).float().mean()))
    expected = (outputs.unimodal.argmax(dim=2) == label).float().mean(dim=1)
    assert validation.unimodal_metric == pytest.approx(expected.tolist())


def test_train_copy_does_not_change_the_model() -> None:
    training_data, net = build_training_data(make_examples(400))
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    reader = NetworkReader(training_data, net)
    copy, repeated = (reader.train_copy(fused_loss, epochs=3) for _ in range(2))
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    confidence_before, confidence_after = (reader.read(confidence, net=network)[0].mean() for network in (net, copy))
    assert confidence_after > confidence_before + 0.1
    assert all(torch.equal(p, q) for p, q in zip(copy.parameters(), repeated.parameters(), strict=True))


def test_pictures_are_standardised_by_channel_over_available_rows() -> None:
    """Frames of three channels, a spectrogram of one: means and deviations of the training rows."""
    rng = np.random.default_rng(0)
    frames = (rng.random((80, 2 * 4 * 4 * 3)) * 50 * np.tile([1, 2, 3], 32)).astype(np.float32)
    sound = (3 * rng.standard_normal((80, 30)) - 7).astype(np.float32)
    frames[::9] = np.nan
    examples = replace(
        make_examples(80),
        inputs=(MatrixInputs(matrix=sound), MatrixInputs(matrix=frames)),
        shapes=((5, 6), (2, 4, 4, 3)),
    )
    training_data, net = build_training_data(examples, replace(QUICK, width=0.0625))
    train = training_data.train
    state = net.state_dict()
    available = frames[train][~np.isnan(frames[train]).any(axis=1)].reshape(-1, 3)
    for modality, rows in ((0, sound[train].reshape(-1, 1)), (1, available)):
        np.testing.assert_allclose(state[f"encoders.{modality}.trunk.mean"].flatten(), rows.mean(axis=0), rtol=1e-4)
        np.testing.assert_allclose(state[f"encoders.{modality}.trunk.scale"].flatten(), rows.std(axis=0), rtol=1e-4)


def test_modality_absent_from_all_training_samples_raises() -> None:
    examples = make_examples(40)
    matrix = examples.inputs[1].read(np.arange(40)).copy()
    matrix[examples.split == "train"] = np.nan
    with pytest.raises(ManifestError, match="none of 20 training samples has the modality visual: train without it"):
        build_training_data(replace(examples, inputs=(examples.inputs[0], MatrixInputs(matrix=matrix))))


def test_derived_seed_depends_on_purpose_and_seed() -> None:
    training_data, _ = build_training_data(make_examples(40))
    seeds = {training_data.derive_seed("step", epoch, step) for epoch in range(5) for step in range(5)}
    assert len(seeds) == 25
    assert training_data.derive_seed("step", 1, 1) == build_training_data(make_examples(40))[0].derive_seed(
        "step", 1, 1
    )
    assert replace(training_data, seed=1).derive_seed("step", 1, 1) not in seeds


def test_modality_that_a_sample_lacks_is_masked_in_its_batch() -> None:
    """The values in its place change nothing, and the fused logits are those of the other modalities."""
    complete = make_examples(60)
    present = np.ones((60, 2), dtype=bool)
    present[::3, 0] = False
    readings = []
    for filler in (np.nan, 7.0):
        matrix = complete.inputs[0].read(np.arange(60)).copy()
        matrix[~present[:, 0]] = filler
        examples = replace(complete, inputs=(MatrixInputs(matrix=matrix), complete.inputs[1]), present=present)
        training_data, net = build_training_data(complete)
        training_data = replace(
            training_data, store=Store(examples.inputs, device="cpu", max_bytes=1 << 20), present=present
        )
        rows = np.arange(len(training_data.train))
        (batch,) = training_data.batches([Step(rows=rows)], epoch=1)
        available = present[training_data.train]
        assert batch.present is not None
        assert batch.present.tolist() == available.tolist()
        assert len(batch.inputs[0]) == available[:, 0].sum()
        assert float(batch.loss_weight[1][~torch.from_numpy(available[:, 0])].abs().sum()) == 0
        net.eval()
        with torch.no_grad():
            outputs = net(batch.inputs, batch.present)
        assert (outputs.features[0][~torch.from_numpy(available[:, 0])] == 0).all()
        read = NetworkReader(training_data, net).read(confidence)
        torch.testing.assert_close(read, outputs.confidence(batch.label), atol=1e-6, rtol=1e-5)
        readings.append(read)
    assert torch.equal(readings[0], readings[1])


def test_sample_without_any_modality_has_no_loss() -> None:
    step = Step(rows=np.array([0, 1, 1])).masked_by(np.array([[True, False], [False, False]]))
    assert step.present is not None
    assert step.fused is not None
    assert step.present.tolist() == [[True, False], [False, False], [False, False]]
    assert step.fused.tolist() == [True, False, False]
    everywhere = Step(rows=np.array([0]))
    assert everywhere.masked_by(np.ones((1, 2), dtype=bool)) is everywhere


def identity_of(examples: Examples, config: TrainConfig = QUICK, *, seed: int = 0, **options: Any) -> str:
    distributed = options.pop("distributed", SINGLE_PROCESS)
    training_data = set_up(examples, resolve(config), seed=seed, device="cpu", distributed=distributed)
    return run_identity(examples, training_data, init=options.pop("init", None))


@pytest.mark.parametrize(
    "options",
    [{"report_to": ("wandb",)}, {"save_steps": 5}],
)
def test_reporting_and_saving_do_not_change_the_identity(options: dict[str, Any]) -> None:
    assert identity_of(make_examples(), with_options(**options)) == identity_of(make_examples())


def test_identity_of_resident_matrices_is_that_of_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = identity_of(make_examples())
    monkeypatch.setattr(checkpoint, "_BLOCK_BYTES", 64)
    monkeypatch.setattr(row_arrays, "CHUNK_ROWS", 7)
    assert identity_of(make_examples()) == whole
    texts = ["a", "", "é", "bcd"]
    joined = checkpoint._Joined(np.arange(4).repeat(5), lambda rows: [texts[row].encode() for row in rows])
    assert digest(joined) == digest("\0".join(text for text in texts for _ in range(5)).encode())
    matrix, rows = torch.arange(60.0).reshape(20, 3), np.array([7, 3, 19, 0, 3])
    blocks = checkpoint._RowBytes(matrix, rows)
    assert digest(blocks) == digest(matrix[rows].numpy().tobytes())
    assert len(list(blocks.digest_blocks())) == 1


def test_number_of_processes_does_not_change_the_identity() -> None:
    assert identity_of(make_examples(), distributed=DistributedContext(rank=1, world_size=4)) == identity_of(
        make_examples()
    )


@pytest.mark.parametrize("name", ["content", "discrepancy", "balance", "p_balanced", "weight", "rank"])
def test_training_samples_change_the_identity(name: str) -> None:
    examples = make_examples()
    values = getattr(examples, name).copy()
    values[examples.rows("train")[0]] = "other" if name == "content" else 0.123
    if name == "rank":
        values[examples.rows("train")[0]] = 10**6
    assert identity_of(replace(examples, **{name: values})) != identity_of(examples)


def test_initial_weights_change_the_identity(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_bytes(name.encode())
    identities = {identity_of(make_examples(), init=init) for init in (None, tmp_path / "a", tmp_path / "b")}
    assert len(identities) == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ("audo",)}, "no modality audo; the modalities are audio, visual"),
        ({"modality_lr": ("text=0.1",)}, "no modality text; the modalities are audio, visual"),
    ],
)
def test_unknown_modality_raises(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        set_up(make_examples(), resolve(with_options(**options)), seed=0, device="cpu", distributed=SINGLE_PROCESS)


def test_pool_has_the_training_rows() -> None:
    examples = make_examples()
    training_data = set_up(examples, resolve(QUICK), seed=0, device="cpu", distributed=SINGLE_PROCESS)
    train = examples.rows("train")
    np.testing.assert_array_equal(training_data.train, train)
    for name in ("rank", "discrepancy", "balance", "p_balanced", "label"):
        np.testing.assert_array_equal(getattr(training_data.pool, name), getattr(examples, name)[train])
    assert (training_data.pool.num_classes, training_data.pool.num_modalities, len(training_data.pool)) == (
        4,
        2,
        len(train),
    )


@pytest.mark.parametrize(
    ("balancing", "fusion", "own_heads"),
    [
        ("joint", "concat", False),
        ("mmpareto", "concat", True),
        ("greedy", "mmtm", False),
        ("mla", "shared", False),
        ("lfm", "lfm", False),
        ("reconboost", "reconboost", False),
        ("inforeg", "concat", True),
        ("aug", "aug", False),
    ],
)
def test_method_gets_the_network_it_needs(balancing: str, fusion: str, own_heads: bool) -> None:
    config = build_network(make_examples(), resolve(with_options(balancing=balancing))).config
    assert (config.fusion, config.own_heads) == (fusion, own_heads)


def test_initialisation_changes_the_network_that_is_built() -> None:
    examples = make_examples()

    def first_bias(initialisation: str) -> Tensor:
        torch.manual_seed(0)
        net = build_network(examples, resolve(with_options(initialisation=initialisation)))
        return next(parameter for name, parameter in net.named_parameters() if name.endswith("layers.0.bias"))

    assert first_bias("default").any()
    assert not first_bias("xavier").any()


def test_stored_pictures_are_the_same_after_a_resume_and_with_any_number_of_readers() -> None:
    """Frames and crops follow from seed, epoch, step and id; tests and moments read the whole middle frame."""
    stored = StoredPictures(num_frames=1, num_choices=3, side=6, is_sized=True)
    view = PictureView(shape=(1, 4, 4, 3), stored=stored)
    rng = np.random.default_rng(0)
    matrix = rng.integers(0, 256, (80, stored.num_features)).astype(np.uint8)
    matrix[:, -4:] = np.array([8, 6], "<u2").view(np.uint8)
    examples = replace(
        make_examples(80),
        inputs=(make_examples(80).inputs[0], MatrixInputs(matrix=matrix)),
        shapes=(make_examples(80).shapes[0], view.shape),
        views=(None, view),
    )
    training_data, net = build_training_data(examples, replace(QUICK, width=0.0625))
    steps = split_order(np.arange(len(training_data.train)), batch_size=8)
    batches = [batch.inputs[1] for batch in training_data.batches(steps, epoch=2)]
    assert batches[0].shape == (8, 1, 3, 4, 4)
    resumed = [batch.inputs[1] for batch in training_data.batches(steps[2:], epoch=2, first_step=3, prefetch=False)]
    assert all(torch.equal(first, second) for first, second in zip(batches[2:], resumed, strict=True))
    later = [batch.inputs[1] for batch in training_data.batches(steps, epoch=3)]
    assert not torch.equal(batches[0], later[0])
    whole = view.whole(torch.from_numpy(matrix[training_data.train])).double()
    mean, scale = net.state_dict()["encoders.1.trunk.mean"], net.state_dict()["encoders.1.trunk.scale"]
    torch.testing.assert_close(mean.flatten(), whole.mean(dim=(0, 1, 3, 4)).float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scale.flatten(), whole.std(dim=(0, 1, 3, 4), correction=0).float(), rtol=1e-4, atol=1e-4)
    reader = NetworkReader(training_data, net)
    assert reader.read(confidence).shape[-1] == len(training_data.train)


def test_fixed_normalisation_is_that_of_the_settings() -> None:
    examples = make_examples(40)
    pictures = np.random.default_rng(0).integers(0, 256, (40, 48)).astype(np.uint8)
    examples = replace(
        examples, inputs=(examples.inputs[0], MatrixInputs(matrix=pictures)), shapes=(examples.shapes[0], (4, 4, 3))
    )
    _, net = build_training_data(examples, replace(QUICK, width=0.0625, normalise_pictures="imagenet"))
    mean = net.state_dict()["encoders.1.trunk.mean"].flatten()
    torch.testing.assert_close(mean, 255 * torch.tensor([0.485, 0.456, 0.406]))
