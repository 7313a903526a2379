"""Fine-tuning: the training loop."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..audit.errors import TrainError
from ..audit.storage import write_text
from ..audit.workers import Progress
from .checkpoint import common_state, resume, run_identity, save_model, save_state, warm_start
from .config import MIN_VALIDATION_SAMPLES, FinetuneConfig, TrainConfig
from .custom_network import check_first_pass
from .evaluate import evaluate_network, sets_without, values_by_set
from .examples import Examples, in_fixed_threads
from .methods import resolve
from .network import FusionNet
from .optimizer import SINGLE_PROCESS, DistributedContext, Optimization
from .predictions import predict
from .task_metrics import TASK_METRICS, chance_levels
from .tracking import open_trackers
from .training_data import NetworkReader, build_network, set_up, validate

log = logging.getLogger("mmaudit")

_STATE = Path("state", "last.pt")  # in the folder of a run


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """Result of a fine-tuning: the metrics of metrics.json, one record per epoch, fused test predictions.

    branches: test predictions by each modality alone.
    without: per modality, the value of each test prediction with that modality absent, (n,): whether a class is right.
    """

    metrics: dict[str, Any]
    history: list[dict[str, float]]
    predictions: NDArray[np.float32]
    branches: dict[str, NDArray[np.float32]]
    without: dict[str, NDArray[np.float32]]


@in_fixed_threads
def finetune_on(
    examples: Examples,
    folder: Path | None,
    *,
    config: TrainConfig,
    between: str,
    seed: int,
    device: str,
    progress: Progress,
    distributed: DistributedContext = SINGLE_PROCESS,
    init: Path | None = None,
    max_samples: int | None = None,
) -> Finetuned:
    """Train on the manifest's training rows, select on validation, test once; resume from `folder`/state.

    The selected epoch has the best validation metric of the tested answer (accuracy of classes, MAP of label sets, mean
    absolute error of numbers), then the lowest validation loss; with `keep = "last"`, or fewer than
    MIN_VALIDATION_SAMPLES validation samples, it is the last one.

    Everything follows from examples, config and seed: the same batches in any number of processes, the same losses
    after an interruption at any step, and on one machine's CPU the same bytes (CUDA adds in no fixed order).

    Args:
        examples: Samples with features, labels and splits.
        folder: Folder of the run; receives state, history.jsonl and model.safetensors. None: nothing is written, nor
            resumed or tracked.
        config: All settings.
        between: The two modalities, "first:second", whose discrepancy defines the subsets of the test metrics.
        seed: Seed of all random numbers.
        device: Device of this process.
        progress: Called after every epoch.
        distributed: Rank and number of processes.
        init: A model file whose weights are the start.
        max_samples: End training after the step in which so many samples were read, also within an epoch.

    Returns:
        Test metrics, history and test predictions.

    Raises:
        ManifestError: A split is empty.
        ConfigError: A modality, method or tracker does not exist, or two settings contradict each other.
        TrainError: The loss is not finite.
    """
    started = time.monotonic()
    methods = resolve(config)
    config, settings = methods.config, methods.config.finetune
    training_data = set_up(examples, methods, seed=seed, device=device, distributed=distributed)
    identity = "" if folder is None else run_identity(examples, training_data, init=init)
    torch.manual_seed(seed)
    net = build_network(examples, methods).to(device)
    training_data.standardise(net)
    if init is not None:
        warm_start(net, init)
    training_data.standardize_resident(net)
    reader = NetworkReader(training_data, net)
    first_rows = training_data.train[: 2 * distributed.world_size]
    check_first_pass(net, lambda function: reader.read_samples(function, first_rows))
    net.freeze_encoders([examples.modalities.index(name) for name in config.optim.freeze])
    by_modality = methods.balancer.sets_rates
    part_size = settings.batch_size if settings.accumulate > 1 else None
    optimization = Optimization(
        net, config.optim, device=device, distributed=distributed, by_modality=by_modality, part_size=part_size
    )
    balancer = methods.balancer(net, optimization, methods.balancer_config, epochs=settings.epochs)
    sampler = methods.sampler(
        training_data.pool,
        config.order,
        methods.sampler_config,
        batch_size=settings.step_size,
        seed=seed,
        distributed=distributed,
    )
    averaged = _averaged(net, config.optim.ema)
    tested = net if averaged is None else cast(FusionNet, averaged.module)
    if settings.compile:
        net.compile()

    # Position: after `step` steps of epoch `epoch`. A saved state is resumed.
    epoch, step = 1, 0
    total, num_seen, num_rows = torch.zeros((), dtype=torch.float64, device=device), 0, 0  # rows: of this process
    history: list[dict[str, float]] = []
    metric = TASK_METRICS[examples.task]
    best = (-math.inf, 0.0, 0)  # validation metric, high = good; minus validation loss; epoch
    best_weights = {name: tensor.clone() for name, tensor in tested.state_dict().items()}
    components: dict[str, Any] = {"net": net, "update": optimization, "balancer": balancer, "sampler": sampler}
    if averaged is not None:
        components["averaged"] = averaged
    saved = None if folder is None else resume(folder / _STATE, identity, device=device)
    if (state := common_state(saved, distributed, device=device)) is not None:
        for name, component in components.items():
            component.load_state_dict(state[name])
        epoch, step, num_seen, history = state["epoch"], state["step"], state["seen"], state["history"]
        num_rows = state["rows"] if distributed.is_first else 0
        best = state["best"]
        best_weights = {name: tensor.clone() for name, tensor in (state["best_weights"] or net.state_dict()).items()}
        total.fill_(state["total"] if distributed.is_first else 0.0)  # summed over the processes
        log.info("resumed in epoch %d after %d steps", epoch, step)

    def save(folder: Path, epoch: int, step: int) -> None:
        distributed.sum_([summed_loss := total.clone()])
        rows = _sum_rows(num_rows, distributed, device=device)
        _share_buffers((net, tested), distributed)
        if distributed.is_first:
            position = {"identity": identity, "epoch": epoch, "step": step, "seen": num_seen, "rows": rows}
            states = {name: component.state_dict() for name, component in components.items()}
            # If the current weights are the best ones they are not written twice.
            weights = None if averaged is None and step == 0 and best[2] == epoch - 1 else best_weights
            results = {"total": float(summed_loss), "history": history, "best": best, "best_weights": weights}
            save_state({**position, **states, **results}, folder / _STATE)

    num_validation = len(training_data.validation)
    selects_best = settings.keep == "best" and num_validation >= MIN_VALIDATION_SAMPLES
    if settings.keep == "best" and not selects_best:
        log.info("%d validation samples are too few to select an epoch or stop early: using the last", num_validation)
    with ExitStack() as stack:
        trackers = []
        if folder is not None and settings.report_to and distributed.is_first:
            trackers = open_trackers(settings.report_to, folder, stack=stack)
        progress("finetune", epoch - 1, settings.epochs)
        while epoch <= settings.epochs and not _is_over(history, best, settings):
            samples_left = math.inf if max_samples is None else max_samples - _samples_seen(history)
            if samples_left <= 0:
                break
            if step == 0:
                sampler.begin_epoch(epoch, reader)
                balancer.begin_epoch(epoch, reader)
            lr = optimization.begin_epoch(epoch, epochs=settings.epochs)
            net.train()
            steps = sampler.steps(epoch, after=step)
            for batch in training_data.batches(steps, epoch=epoch, first_step=step + 1, prefetch=not sampler.adaptive):
                step += 1
                optimization.begin_step(training_data.derive_seed("step", epoch, step))
                batch = balancer.prepare(batch)
                outputs, loss = balancer.step(batch)
                sampler.observe(outputs, batch)
                if averaged is not None:
                    averaged.update_parameters(net)
                total += loss * batch.size
                num_seen += batch.size
                num_rows += sum(map(len, batch.inputs))
                if num_seen >= samples_left:
                    break
                if folder is not None and settings.save_steps and step % settings.save_steps == 0:
                    save(folder, epoch, step)
            distributed.sum_([total])
            _share_buffers((net, tested), distributed)  # before the network is evaluated
            train_loss = float(total) / max(num_seen, 1)
            if not math.isfinite(train_loss):
                raise _diverged(f"the loss of epoch {epoch} is {train_loss}")
            rows = _sum_rows(num_rows, distributed, device=device)
            record = {"epoch": epoch, "steps": step, "samples": num_seen, "rows_read": rows, "lr": lr}
            record["train_loss"] = train_loss
            result = (0.0, 0.0)  # validation metric, high = good, and minus validation loss
            if num_validation:
                validation = validate(reader, net=tested)
                result = (metric.sign * validation.metric, -validation.loss)
                balancer.end_epoch(epoch, validation)
                record |= {"validation_loss": validation.loss, f"validation_{metric.main}": validation.metric}
            record |= {**balancer.epoch_metrics(), **sampler.epoch_metrics()}
            history.append(record)
            for log_record in trackers:
                log_record(record)
            if not selects_best or result > best[:2]:
                best = (*result, epoch)
                best_weights = {name: tensor.clone() for name, tensor in tested.state_dict().items()}
            epoch, step, num_seen, num_rows = epoch + 1, 0, 0, 0
            total.zero_()
            if folder is not None:
                if distributed.is_first:  # before the state, so that a resume finds all lines up to it
                    write_text("".join(json.dumps(record) + "\n" for record in history), folder / "history.jsonl")
                save(folder, epoch, step)
            progress("finetune", epoch - 1, settings.epochs)

    net.load_state_dict(best_weights)
    if folder is not None and distributed.is_first:
        save_model(best_weights, folder / "model.safetensors", about=asdict(net.config))
    predictions = predict(reader, training_data.test, examples.modalities)
    if not np.isfinite(predictions["fused"]).all():  # by the last step, whose loss is that before it
        raise _diverged(f"predictions of epoch {best[2]} are not finite")
    values = values_by_set(reader, training_data.test, seed=seed)
    metrics = {
        "counts": {name: len(getattr(training_data, name)) for name in ("train", "validation", "test")},
        "chance": chance_levels(
            examples.task,
            train=examples.target[training_data.train],
            test=examples.target[training_data.test],
            num_classes=int(examples.label.max()) + 1,
        ),
        "best_epoch": best[2],
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "samples_seen": _samples_seen(history),
        "rows_read": int(sum(record["rows_read"] for record in history)),
        "seconds": time.monotonic() - started,
        **evaluate_network(
            reader,
            training_data.test,
            examples,
            between=between,
            seed=seed,
            predictions=predictions,
            values=values,
        ),
    }
    without = {name: values[rest] for name, rest in zip(examples.modalities, sets_without(net), strict=True)}
    fused = predictions.pop("fused")
    return Finetuned(metrics=metrics, history=history, predictions=fused, branches=predictions, without=without)


def _diverged(reason: str) -> TrainError:
    return TrainError(f"training has diverged: {reason}; lower --lr, or clip gradients with --set optim.clip_norm=1")


def _samples_seen(history: list[dict[str, float]]) -> int:
    return int(sum(record["samples"] for record in history))


def _sum_rows(num_rows: int, distributed: DistributedContext, *, device: str) -> int:
    """Return the number of rows of single modalities that all processes read."""
    distributed.sum_([total := torch.tensor(num_rows, dtype=torch.float64, device=device)])
    return int(total)


def _averaged(net: FusionNet, decay: float) -> AveragedModel | None:
    """Return a running mean of the weights and buffers; None without a decay."""
    if not decay:
        return None
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]


def _is_over(history: list[dict[str, float]], best: tuple[float, float, int], settings: FinetuneConfig) -> bool:
    """Whether training stops early: the best epoch is `patience` epochs ago."""
    return bool(settings.patience) and len(history) - best[2] >= settings.patience


def _share_buffers(nets: Iterable[FusionNet], distributed: DistributedContext) -> None:
    """Replace the buffers by their means over all processes."""
    floats = [buffer for net in set(nets) for buffer in net.buffers() if buffer.is_floating_point()]
    distributed.sum_(floats)
    for buffer in floats if distributed.world_size > 1 else ():
        buffer /= distributed.world_size
