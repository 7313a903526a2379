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

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..audit.errors import TrainError
from ..audit.storage import write_text
from ..audit.threads import NETWORK_THREADS, fixed_threads
from ..audit.workers import Progress
from .balancing.balancer import build_balancer
from .balancing.config import BALANCERS
from .checkpoint import save_model, save_state, warm_start
from .config import LEAST_VALIDATION, FinetuneConfig, TrainConfig
from .distributed import SINGLE_PROCESS, DistributedContext
from .evaluate import evaluate_network
from .examples import Examples
from .network import FusionNet
from .optimizer import Optimization
from .sampling.sampler import build_sampler
from .setup import agreed, chance_of, identity_of, model_config_of, resume, set_up
from .tracking import open_trackers
from .training_data import NetworkReader, validate

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finetuned:
    """What fine-tuning left: metrics as they stand in metrics.json, and one record an epoch."""

    metrics: dict[str, Any]
    history: list[dict[str, float]]


@fixed_threads(NETWORK_THREADS)
def finetune_on(
    examples: Examples,
    folder: Path,
    *,
    config: TrainConfig,
    between: str,
    seed: int,
    device: str,
    progress: Progress,
    distributed: DistributedContext = SINGLE_PROCESS,
    init: Path | None = None,
) -> Finetuned:
    """Train on the manifest's training rows, select on validation, test once; go on where `folder`/state stops.

    The epoch kept is the one with the highest fused validation accuracy, the least validation loss among equals; the
    last one where there are fewer than LEAST_VALIDATION samples to choose by. `init`: a model file to begin with.
    Everything follows from examples, config and seed: the same batches in any number of processes, the same losses
    after an interruption at any step, and on one machine's CPU the same bytes (CUDA adds in no fixed order).
    Raises ManifestError where a split is empty, ConfigError where a modality or tracker that is named is not there,
    TrainError where the loss is no longer a number.
    """
    started = time.monotonic()
    settings = config.finetune
    training_data = set_up(examples, config, seed=seed, device=device, distributed=distributed)
    identity = identity_of(examples, training_data, init=init)
    torch.manual_seed(seed)
    net = FusionNet(model_config_of(examples, config)).to(device)
    training_data.standardise(net)
    if init is not None:
        warm_start(net, init)
    training_data.hold_standard(net)
    net.fix_encoders([examples.modalities.index(name) for name in config.optim.freeze])
    by_modality = BALANCERS[settings.balancing].sets_rates
    optimization = Optimization(net, config.optim, device=device, distributed=distributed, by_modality=by_modality)
    balancer = build_balancer(settings.balancing, net, optimization, config.balancing, epochs=settings.epochs)
    sampler = build_sampler(
        settings.sampling,
        training_data.pool,
        config.sampling,
        config.order,
        batch_size=settings.batch_size,
        seed=seed,
        distributed=distributed,
    )
    averaged = _averaged(net, config.optim.ema)
    tested = net if averaged is None else cast(FusionNet, averaged.module)
    reader = NetworkReader(training_data, net)
    if settings.compile:
        net.compile()

    # Where we are: after `step` steps of epoch `epoch`. A state that was left behind is gone on from.
    epoch, step = 1, 0
    total, seen = torch.zeros((), dtype=torch.float64, device=device), 0
    history: list[dict[str, float]] = []
    best = (-1.0, 0.0, 0)  # validation accuracy, minus validation loss, epoch
    best_weights = {name: tensor.clone() for name, tensor in tested.state_dict().items()}
    parts: dict[str, Any] = {"net": net, "update": optimization, "balancer": balancer, "sampler": sampler}
    if averaged is not None:
        parts["averaged"] = averaged
    state_file = folder / "state" / "last.pt"
    if (state := agreed(resume(state_file, identity, device=device), distributed, device=device)) is not None:
        for name, part in parts.items():
            part.load_state_dict(state[name])
        epoch, step, seen, history = state["epoch"], state["step"], state["seen"], state["history"]
        best = state["best"]
        if state["best_weights"] is not None:
            best_weights = state["best_weights"]
        else:
            best_weights = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        total.fill_(state["total"] if distributed.is_first else 0.0)  # it is summed over the processes
        log.info("resumed in epoch %d after %d steps", epoch, step)

    def save(epoch: int, step: int) -> None:
        distributed.sum_([whole := total.clone()])
        _share_buffers((net, tested), distributed)
        if distributed.is_first:
            place = {"identity": identity, "epoch": epoch, "step": step, "seen": seen, "total": float(whole)}
            states = {name: part.state_dict() for name, part in parts.items()}
            # The weights as they are now may be the best, and are not written twice then.
            weights = None if averaged is None and step == 0 and best[2] == epoch - 1 else best_weights
            chosen = {"history": history, "best": best, "best_weights": weights}
            save_state({**place, **states, **chosen}, state_file)

    chooses = len(training_data.validation) >= LEAST_VALIDATION
    if not chooses:
        few = len(training_data.validation)
        log.info("%d validation samples are too few to choose an epoch, or to stop by: the last one is taken", few)
    with ExitStack() as stack:
        trackers = open_trackers(settings.report_to if distributed.is_first else (), folder, stack=stack)
        while epoch <= settings.epochs and not _is_over(history, best, settings):
            if step == 0:
                sampler.begin_epoch(epoch, reader)
                balancer.begin_epoch(epoch, reader)
            lr = optimization.begin_epoch(epoch, epochs=settings.epochs)
            net.train()
            steps = sampler.steps(epoch, after=step)
            for batch in training_data.batches(steps, epoch=epoch, first=step + 1, ahead=not sampler.adaptive):
                step += 1
                optimization.begin_step(training_data.chance("step", epoch, step))
                batch = balancer.prepare(batch)
                outputs, loss = balancer.step(batch)
                sampler.observe(outputs, batch)
                if averaged is not None:
                    averaged.update_parameters(net)
                total += loss * batch.size
                seen += batch.size
                if settings.save_steps and step % settings.save_steps == 0:
                    save(epoch, step)
            distributed.sum_([total])
            _share_buffers((net, tested), distributed)  # before anybody reads the network
            train_loss = float(total) / max(seen, 1)
            if not math.isfinite(train_loss):
                raise TrainError(
                    f"training has diverged: the loss of epoch {epoch} is {train_loss}; lower --lr, or clip gradients "
                    "with --set optim.clip_norm=1"
                )
            found = validate(reader, net=tested)
            balancer.end_epoch(epoch, found)
            record = {"epoch": epoch, "steps": step, "samples": seen, "lr": lr, "train_loss": train_loss}
            record |= {"validation_loss": found.loss, "validation_accuracy": found.accuracy}
            record |= {**balancer.numbers(), **sampler.numbers()}
            history.append(record)
            for tell in trackers:
                tell(record)
            if not chooses or (found.accuracy, -found.loss) > best[:2]:
                best = (found.accuracy, -found.loss, epoch)
                best_weights = {name: tensor.clone() for name, tensor in tested.state_dict().items()}
            epoch, step, seen = epoch + 1, 0, 0
            total.zero_()
            if distributed.is_first:  # before the state: whoever goes on from that finds all lines up to it
                write_text("".join(json.dumps(each) + "\n" for each in history), folder / "history.jsonl")
            save(epoch, step)
            progress("finetune", epoch - 1, settings.epochs)

    net.load_state_dict(best_weights)
    if distributed.is_first:
        save_model(best_weights, folder / "model.safetensors", about=asdict(net.plan))
    metrics = {
        "counts": {name: len(getattr(training_data, name)) for name in ("train", "validation", "test")},
        "chance": chance_of(examples.label, training_data),
        "best_epoch": best[2],
        "num_parameters": sum(parameter.numel() for parameter in net.parameters()),
        "samples_seen": int(sum(each["samples"] for each in history)),
        "seconds": time.monotonic() - started,
        **evaluate_network(reader, training_data.test, examples, between=between, seed=seed),
    }
    return Finetuned(metrics=metrics, history=history)


def _averaged(net: FusionNet, decay: float) -> AveragedModel | None:
    """Keep a running mean of the weights, and of the buffers; None without a decay."""
    if not decay:
        return None
    return AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)  # type: ignore[no-untyped-call]


def _is_over(history: list[dict[str, float]], best: tuple[float, float, int], settings: FinetuneConfig) -> bool:
    """Tell whether training stops early: the best epoch is `patience` epochs ago."""
    return bool(settings.patience) and len(history) - best[2] >= settings.patience


def _share_buffers(nets: Iterable[FusionNet], distributed: DistributedContext) -> None:
    """Let all processes have the same running means: the mean of theirs."""
    floats = [buffer for net in set(nets) for buffer in net.buffers() if buffer.is_floating_point()]
    distributed.sum_(floats)
    for buffer in floats if distributed.world_size > 1 else ():
        buffer /= distributed.world_size
