"""Made comparisons of methods on manifests, with controls, subsets and a missing modality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmaudit.train.comparison.verdicts import Comparison, Correctness, build_comparison
from mmaudit.train.difference import Condition

METHODS = ("joint", "ogm-ge: balancing.ogm.alpha=0.8", "bss-h+sum")


def made_comparison(
    *,
    methods: Sequence[str] = METHODS,
    manifests: Sequence[str] = ("all",),
    modalities: tuple[str, str] = ("audio", "visual"),
    num_seeds: int = 2,
    num_samples: int = 120,
    has_subsets: bool = True,
    has_probabilities: bool = False,
    diverged: Sequence[Condition] = (),
) -> Comparison:
    """Return a comparison of random predictions; later methods are better, and shuffled labels at chance."""
    rng = np.random.default_rng(0)
    discrepancy, label = rng.uniform(-1, 1, num_samples), rng.integers(0, 3, num_samples)
    subsets = {"all": np.ones(num_samples, dtype=bool)}
    if has_subsets:
        for name, signed in zip(modalities, (discrepancy, -discrepancy), strict=True):
            subsets |= {f"{name}-preferred": signed > 0}
            subsets |= {f"{name}-dominated-{threshold:g}": signed > threshold for threshold in (0.2, 0.4)}
        subsets |= {f"class:c{index}": label == index for index in range(3)}
    chances: dict[Condition, float] = {
        (manifest, method): 0.55 + 0.3 * index / len(methods)
        for manifest in manifests
        for index, method in enumerate(methods)
    }
    controls: dict[Condition, Condition] = {}
    for manifest in manifests:
        for method, chance in (
            (f"{modalities[0]} alone", 0.5),
            (f"{modalities[1]} alone", 0.55),
            ("shuffled labels", 0.05),
        ):
            chances[manifest, method] = chance
            controls[manifest, method] = (manifest, methods[0])
    chances[f"random-like-{manifests[0]}", methods[0]] = 0.55
    controls[f"random-like-{manifests[0]}", methods[0]] = (manifests[0], methods[0])
    correct: dict[Condition, Correctness] = {
        condition: (rng.random((num_seeds, num_samples)) < chance).astype(np.float64)
        for condition, chance in chances.items()
    }
    trainings: list[dict[str, Any]] = [
        {"manifest": condition[0], "method": condition[1], "seed": seed, "kind": "method", "status": status}
        | {"epochs": 4, "samples_seen": 1600}
        for condition in correct
        for seed, status in [*((seed, "finished") for seed in range(num_seeds)), (num_seeds, "diverged")]
        if (status == "diverged") == (condition in diverged and seed == num_seeds)
    ]
    return build_comparison(
        correct,
        name="made",
        baseline=methods[0],
        subsets=subsets,
        group=[f"g{index % 30}" for index in range(num_samples)],
        trainings=trainings,
        sample_id=np.arange(num_samples),
        controls=controls,
        label=label,
        probabilities={
            condition: rng.dirichlet(np.ones(3), (num_seeds, num_samples)).astype(np.float32)
            for condition in (correct if has_probabilities else ())
        },
        without={condition: {name: 0.6 * values for name in modalities} for condition, values in correct.items()},
        warnings=[f"{method} on {manifest} diverged" for manifest, method in diverged],
    )
