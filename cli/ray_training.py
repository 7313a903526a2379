"""Fine-tuning by Ray Train: each of its workers runs `finetune` as a process of torchrun does."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..audit.engine.executors import RayOptions
from ..audit.engine.ray_cluster import Site, num_slots, open_ray
from ..audit.engine.ray_pool import Messages
from ..audit.errors import MmauditError, RunError
from ..audit.locks import find_holders
from ..audit.parsing import RequiredKeys
from ..audit.storage import read_json, scratch_folder, write_json

log = logging.getLogger("mmaudit")

_TIMEOUT_SECONDS = 86_400  # of the process group: the first process may encode a whole dataset while the others wait
_STALE_SECONDS = 90.0  # after which the lock of a worker that was killed on another machine is stale
_RESULT = RequiredKeys(folder=str, messages=[[(int, str)]])


def finetune_on_ray(arguments: Mapping[str, Any], options: RayOptions, *, run: Path) -> Path:
    """Train in as many processes as there are workers, and return the folder of the fine-tuning.

    An interrupted training is resumed from its last epoch, also after a worker was lost: results do not depend on it.

    Args:
        arguments: Those of `finetune`.
        options: Resources of a worker and retries, cluster, and number of workers; None: as many as there is room for.
        run: Run folder, which all machines see.

    Raises:
        MmauditError: As a worker raised it; RunError where workers were lost on every retry.
    """
    config = options.config
    run.mkdir(parents=True, exist_ok=True)
    with scratch_folder(run) as folder, open_ray(options) as ray:
        num_workers = options.num_workers or max(1, num_slots(ray, config))
        result_file, marker = folder / "result.json", folder / "marker"
        marker.write_text(folder.name, encoding="utf-8")
        settings = {
            "arguments": {**arguments, "device": config.device, "num_workers": 0, "progress": False},
            "site": Site.of(marker=(str(marker), folder.name), files=()),
            "result_file": str(result_file.absolute()),
        }
        log.info("training in %d processes on Ray", num_workers)
        for attempt in range(config.retries + 1):
            error = _fit(settings, options, num_workers=num_workers, storage=folder / "ray")
            if error is None:
                break
            if attempt == config.retries:
                raise RunError(f"the training failed {attempt + 1} times, the last time by {error}") from error
            log.info("the training is resumed on other workers: %s", error)
            _wait_for_locks(run)
        result = read_json(result_file, error=RunError, shape=_RESULT)
    for level, text in result["messages"]:
        log.log(level, "%s", text)
    return Path(result["folder"])


def _fit(settings: Mapping[str, Any], options: RayOptions, *, num_workers: int, storage: Path) -> BaseException | None:
    """Run the processes once; return the error of one that was lost, and raise any other."""
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    config = options.config
    resources = {"CPU": config.cpus, "GPU": config.gpus, "memory": int(config.memory_gb * 1e9)}
    trainer = TorchTrainer(
        train_in_worker,
        train_loop_config=dict(settings),
        torch_config=TorchConfig(backend="nccl" if config.gpus else "gloo", timeout_s=_TIMEOUT_SECONDS),
        scaling_config=train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=bool(config.gpus),
            resources_per_worker={name: amount for name, amount in resources.items() if amount},
            placement_strategy="PACK",
        ),
        run_config=train.RunConfig(
            name="finetune", storage_path=str(storage.absolute()), failure_config=train.FailureConfig(max_failures=0)
        ),
    )
    try:
        trainer.fit()
    except train.TrainingFailedError as error:
        failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
        causes: list[BaseException] = [
            getattr(failures[rank], "_base_exc", failures[rank]) for rank in sorted(failures)
        ]
        for cause in causes:
            if isinstance(cause, MmauditError):
                raise cause from error
        return causes[0]  # a lost worker, or what the others raised without it
    return None


def train_in_worker(settings: Mapping[str, Any]) -> None:
    """Run `finetune` as a process of those that Ray Train has started; the first one writes where its results are."""
    from .training import finetune

    settings["site"].enter()
    messages = Messages()
    log.addHandler(messages)
    log.setLevel(logging.INFO)
    try:
        folder = finetune(**settings["arguments"]).folder
    finally:
        log.removeHandler(messages)
    if os.environ["RANK"] == "0":
        write_json({"folder": str(folder), "messages": messages.texts}, Path(settings["result_file"]))


def _wait_for_locks(run: Path) -> None:
    """Wait until the locks of workers that were lost are stale."""
    deadline = time.monotonic() + _STALE_SECONDS
    while find_holders(run, "finetune") and time.monotonic() < deadline:
        time.sleep(1)
