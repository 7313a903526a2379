"""Fine-tuning by Ray Train: each of its workers runs `finetune` as a process of torchrun does."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from ..audit.engine.executors import RayOptions
from ..audit.engine.ray_cluster import Site, num_slots, open_ray
from ..audit.engine.ray_pool import Messages
from ..audit.errors import ConfigError, MmauditError, RunError
from ..audit.locks import find_holders
from ..audit.parsing import RequiredKeys, check_shape, parse_json
from ..audit.remote.locks import remote_lock
from ..audit.remote.paths import RemotePath, is_url
from ..audit.remote.requests import call
from ..audit.storage import read_json, scratch_folder, write_json
from .provenance import SourceOptions, origin_of, source_config
from .remote_run import RemoteRun, lock_scope
from .run import Run
from .scoring import pairs
from .training_source import ManifestSource

log = logging.getLogger("mmaudit")

_TIMEOUT_SECONDS = 86_400  # of the process group: the first process may encode a whole dataset while the others wait
_STALE_SECONDS = 90.0  # after which the lock of a worker that was killed on another machine is stale
_RESULT = RequiredKeys(name=str, messages=[[(int, str)]])


def finetune_on_ray(
    arguments: Mapping[str, Any], options: RayOptions, *, run: Path, remote: RemoteRun | None = None
) -> str:
    """Train in as many processes as there are workers, and return the name of the fine-tuning.

    An interrupted training is resumed from its last epoch, also after a worker was lost: results do not depend on it.

    Args:
        arguments: Those of `finetune`.
        options: Resources of a worker and retries, cluster, and number of workers; None: as many as there is room for.
        run: Run folder, which all machines see.
        remote: The run at a URL, of which that is a working copy: workers have their own ones, and the first one
            publishes what it has trained.

    Raises:
        MmauditError: As a worker raised it; RunError where workers were lost on every retry.
    """
    config = options.config
    run.mkdir(parents=True, exist_ok=True)
    with scratch_folder(run) as folder, open_ray(options) as ray:
        num_workers = options.num_workers or max(1, num_slots(ray, config))
        marker, sink = folder / "marker", Sink.in_folder(folder) if remote is None else Sink.of(remote, folder.name)
        marker.write_text(folder.name, encoding="utf-8")
        mark = (str(marker), folder.name) if remote is None else None
        own = {
            "device": config.device,
            "num_workers": 0,
            "progress": False,
            "run": str(run) if remote is None else remote.url,
        }
        settings = {
            "arguments": {**arguments, **own},
            "site": Site.of(marker=mark, files=[arguments["data"]] if arguments.get("data") else []),
            "sink": sink,
        }
        log.info("training in %d processes on Ray", num_workers)
        for attempt in range(config.retries + 1):
            error = _fit(settings, options, num_workers=num_workers, storage=folder / "ray")
            if error is None:
                break
            if attempt == config.retries:
                raise RunError(f"the training failed {attempt + 1} times, the last time by {error}") from error
            log.info("the training is resumed on other workers: %s", error)
            _wait_for_locks(run, remote, arguments)
        result = sink.read()
    for level, text in result["messages"]:
        log.log(level, "%s", text)
    return str(result["name"])


@dataclass(frozen=True, slots=True, kw_only=True)
class Sink:
    """Where the first worker states what it has trained: a file, or an object at a URL, which is read once."""

    path: str

    @classmethod
    def in_folder(cls, folder: Path) -> Sink:
        """Return a file of a folder that all machines see."""
        return cls(path=str((folder / "result.json").absolute()))

    @classmethod
    def of(cls, remote: RemoteRun, name: str) -> Sink:
        """Return an object of a run that is not one of its files."""
        return cls(path=f"{remote.url}/.mmaudit/results/{name.lstrip('.')}.json")

    def write(self, content: dict[str, Any]) -> None:
        """Write the result."""
        if is_url(self.path):
            call(self.path, "pipe_file", json.dumps(content).encode())
        else:
            write_json(content, Path(self.path))

    def read(self) -> dict[str, Any]:
        """Read the result, and remove an object."""
        if not is_url(self.path):
            return read_json(Path(self.path), error=RunError, shape=_RESULT)
        content = parse_json(call(self.path, "cat_file"))
        call(self.path, "rm_file")
        check_shape(content, _RESULT)
        return dict(content)


def _fit(settings: Mapping[str, Any], options: RayOptions, *, num_workers: int, storage: Path) -> BaseException | None:
    """Run the processes once; return the error of one that was lost, and raise any other."""
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.train.v2.api.exceptions import TrainingFailedError

    config = options.config
    trainer = TorchTrainer(
        train_in_worker,
        train_loop_config=dict(settings),
        torch_config=TorchConfig(backend="nccl" if config.gpus else "gloo", timeout_s=_TIMEOUT_SECONDS),
        scaling_config=train.ScalingConfig(
            num_workers=num_workers,
            use_gpu=bool(config.gpus),
            resources_per_worker=config.resources,
            placement_strategy="PACK",
        ),
        run_config=train.RunConfig(
            name="finetune", storage_path=str(storage.absolute()), failure_config=train.FailureConfig(max_failures=0)
        ),
    )
    failed: tuple[type[BaseException], ...] = get_args(TrainingFailedError) or (TrainingFailedError,)  # union in 2.50
    try:
        trainer.fit()
    except failed as error:
        failures = getattr(error, "worker_failures", None) or {0: getattr(error, "controller_failure", error)}
        causes: list[BaseException] = [
            getattr(failures[rank], "_base_exc", failures[rank]) for rank in sorted(failures)
        ]
        for cause in causes:
            if isinstance(cause, MmauditError):
                raise cause from error
        return causes[0]  # a lost worker, or what the others raised without it
    return None


def arguments_elsewhere(run_dir: Run, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return arguments for machines that have this run at a URL, and trust what this one trusts."""
    manifest, init, config = (arguments[name] for name in ("manifest", "init", "config"))
    changed: dict[str, Any] = {}
    for option, value in (("manifest", manifest), ("init", init)):
        if value is not None and Path(value).is_file():
            raise ConfigError(
                f"--{option} {value}: with --engine ray and a run at a URL, pass the name of one in the run"
            )
    if isinstance(config, (str, Path)):
        changed["config"] = str(Path(config).absolute())
    if manifest is not None:
        options = SourceOptions(
            data=arguments["data"], encoder=pairs(arguments["encoder"]) or (), allow_outside=arguments["allow_outside"]
        )
        source = ManifestSource.open(run_dir.find_manifest(str(manifest)), run_dir, options)
        origin = origin_of(source.path, source.manifest.provenance, source.manifest.digests)
        data, _ = source_config(origin, options)
        named = options.data if options.data is not None or origin.record is None else origin.record["source"]
        changed |= {"data": named, "encoder": list(data.encoder), "allow_outside": data.allow_outside}
    return changed


def train_in_worker(settings: Mapping[str, Any]) -> None:
    """Run `finetune` as a process of those that Ray Train has started; the first one writes where its results are."""
    from .training import finetune

    settings["site"].enter()
    messages = Messages()
    log.addHandler(messages)
    log.setLevel(logging.INFO)
    try:
        name = finetune(**settings["arguments"]).name
    finally:
        log.removeHandler(messages)
    if os.environ["RANK"] == "0":
        settings["sink"].write({"name": name, "messages": messages.texts})


def _wait_for_locks(run: Path, remote: RemoteRun | None, arguments: Mapping[str, Any]) -> None:
    """Wait until the locks of workers that were lost are stale."""
    deadline = time.monotonic() + _STALE_SECONDS
    while find_holders(run, "finetune") and time.monotonic() < deadline:
        time.sleep(1)
    while remote is not None and time.monotonic() < deadline:
        with suppress(RunError), remote_lock(RemotePath(remote.url), lock_scope("finetune", arguments)):
            return
        time.sleep(1)
