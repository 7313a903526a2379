"""Test accuracy of every method on real data against its shuffled-label control; exit code 1 if one is not above it.

Run with: make methods DATA=FOLDER, or python benchmarks/methods.py FOLDER [--seeds 3] [--set NAME] [--only METHOD ...]
ravdess (by actor) and av-digits-graded are scored with probes that are not fitted on test samples, and all samples are
kept in one manifest. Every sampler is trained with the sum of losses and every balancer with uniform sampling, with the
same network, epochs and batches, over several seeds; and each modality alone. The control of a method is the same
training, with one seed, on labels shuffled among all but the test samples. Prints a Markdown table of test accuracy,
fused and of each branch, mean and standard deviation over seeds.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

import mmaudit
from mmaudit.audit.workers import no_progress
from mmaudit.cli.config import RunConfig, load_config
from mmaudit.cli.training import read_examples
from mmaudit.train.balancing.config import BALANCERS
from mmaudit.train.config import TrainConfig
from mmaudit.train.examples import Examples
from mmaudit.train.finetune import finetune_on
from mmaudit.train.sampling.config import SAMPLERS

# Schedules with the lengths of the papers are scaled to the 60 epochs of these trainings.
SETTINGS = [
    "probe.learn_from=train",
    "finetune.epochs=60",
    "order.grow_epochs=20",
    "balancing.ogm.last_epoch=60",
    "balancing.pmr.last_epoch=60",
]
PPO = "dus-rl, ppo"
EARLY = "gmm from epoch 3"  # the selected epoch is often within the default warm-up of 10


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    data: str
    modalities: tuple[str, ...]
    group: str


CASES = (
    Case(
        name="ravdess by actor",
        data="ravdess/ravdess.parquet",
        modalities=("audio=audio", "video=video"),
        group="actor",
    ),
    Case(
        name="av-digits-graded",
        data="av-digits-graded/av-digits-graded.parquet",
        modalities=("audio=audio", "image=image"),
        group="speaker",
    ),
)


def methods(modalities: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Return the settings of every training by its name in the table."""
    settings: dict[str, dict[str, Any]] = {f"{name} alone": {"only": name} for name in modalities}
    settings |= {name: {"balancing": name} for name in BALANCERS}
    settings |= {name: {"sampling": name, "balancing": "sum"} for name in SAMPLERS if name != "uniform"}
    return settings | {PPO: {"sampling": "dus-rl", "balancing": "sum"}, EARLY: {"balancing": "gmm"}}


def config_of(base: TrainConfig, name: str, settings: dict[str, Any]) -> TrainConfig:
    config = replace(base, finetune=replace(base.finetune, **settings))
    if name == PPO:
        dus = replace(config.sampling.dus, policy="ppo")
        return replace(config, sampling=replace(config.sampling, dus=dus))
    if name == EARLY:
        gmm = replace(config.balancing.gmm, warmup_epochs=2)
        return replace(config, balancing=replace(config.balancing, gmm=gmm))
    return config


def shuffle_labels(examples: Examples, seed: int) -> Examples:
    """Return the samples with the labels shuffled among training and validation samples."""
    label, rng = examples.label.copy(), np.random.default_rng(seed)
    fitted_rows = np.flatnonzero(examples.split != "test")
    label[fitted_rows] = label[rng.permutation(fitted_rows)]
    return replace(examples, label=label)


def accuracies(examples: Examples, config: TrainConfig, seed: int, between: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        result = finetune_on(
            examples, Path(folder), config=config, between=between, seed=seed, device="cpu", progress=no_progress
        )
    branches = result.metrics["test"]["all"]["branches"]
    return {name: metrics["accuracy"] for name, metrics in branches.items()}


def prepare(case: Case, data: Path, scratch: Path) -> tuple[Examples, TrainConfig]:
    words = [f"data.modality={list(case.modalities)}".replace("'", '"'), f'data.group="{case.group}"']
    config: RunConfig = load_config(settings=[*words, *SETTINGS])
    run = scratch / case.name
    mmaudit.score(str(data / case.data), run=run, config=config)
    mmaudit.split(run=run, subset="most-balanced:100%", name="everything", overwrite=True)
    return read_examples("everything", run=run, config=config), config.training()


def format_mean(values: list[float]) -> str:
    spread = stdev(values) if len(values) > 1 else 0.0
    return f"{fmean(values):.3f} ± {spread:.3f}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--controls", type=int, default=1)
    parser.add_argument("--set", choices=[case.name for case in CASES], default=None)
    parser.add_argument("--only", nargs="*", default=None)
    options = parser.parse_args()
    logging.getLogger("mmaudit").setLevel(logging.WARNING)
    torch.set_num_threads(1)  # as fast for networks of this size
    missed = 0
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            if options.set not in (None, case.name):
                continue
            examples, base = prepare(case, options.data, Path(scratch))
            names = examples.modalities
            print(f"\n{case.name}: {(examples.split == 'test').sum()} test samples, {options.seeds} seeds\n")
            print(f"| method | fused | {' | '.join(names)} | on shuffled labels | above it |")
            print("|---|---|" + "---|" * len(names) + "---|---|")
            for name, settings in methods(names).items():
                if options.only and name not in options.only:
                    continue
                config = config_of(base, name, settings)
                selected = examples.only(settings["only"]) if "only" in settings else examples
                between = ":".join(names[:2])
                seeds = range(options.seeds)
                runs = [accuracies(selected, config, seed, between) for seed in seeds]
                control = [
                    accuracies(shuffle_labels(selected, seed), config, seed, between)["fused"]
                    for seed in range(options.controls)
                ]
                above = min(accuracy_of["fused"] for accuracy_of in runs) > max(control)
                missed += not above
                cells = [
                    format_mean([accuracy_of[branch] for accuracy_of in runs]) if branch in runs[0] else "-"
                    for branch in names
                ]
                fused = format_mean([accuracy_of["fused"] for accuracy_of in runs])
                print(
                    f"| {name} | {fused} | {' | '.join(cells)} | {format_mean(control)} | {'yes' if above else 'NO'} |",
                    flush=True,
                )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
