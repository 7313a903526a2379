"""False claims of an audit on data with known answers; exit 1 if one is more frequent than its bound.

Run with: python benchmarks/honesty.py [--datasets N] [TABLE ...]; all tables in less than ten minutes on two cores.
Every table draws datasets, or scores, of which the answer is known, and counts what mmaudit claims of them. A table is
a function that yields rows, in TABLES by its name; the intervals of coverage.py are one of them.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import coverage
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from mmaudit.audit.dataset.dataset import open_dataset
from mmaudit.audit.engine.stages import finished_parts, run_all
from mmaudit.audit.metrics import confidence, gap, is_dominated, mean_interval
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.audit.scores.gap_checks import permute_within_classes
from mmaudit.audit.scores.mixture import MixtureConfig, fit_mixture
from mmaudit.audit.scores.stability import BisectionAudit, HalfAudit, intervals_of_sets
from mmaudit.audit.scores.table import ScoreTable, scores_of_table
from mmaudit.audit.workers import no_progress
from mmaudit.cli.config import RunConfig
from mmaudit.cli.run import Run
from mmaudit.cli.staging import open_job
from mmaudit.rebalance.balanced import BalancedConfig
from mmaudit.rebalance.recipe import Recipe, make_split
from mmaudit.rebalance.score_tables import open_scores

NUM_CLASSES, NUM_FEATURES = 4, 12
PROBE = ProbeConfig(kind="linear", repeats=1, joint=False, control=False, halves=False, l2_penalties=(1e-2, 1e-1))

Floats = NDArray[np.float64]


class Row(NamedTuple):
    """One row of a table: what was measured, the value as text, the bound as text, and whether it is met."""

    quantity: str
    value: str
    bound: str
    met: bool


class Scored(NamedTuple):
    """What is read of the results of scoring."""

    scores: ScoreTable
    halves: HalfAudit | None
    bisections: BisectionAudit | None


def draw_features(rng: np.random.Generator, n: int, *, strength: Floats, noise: float = 1.0) -> dict[str, Any]:
    """Draw two modalities of features around the same class means, at distances (n, 2), so that neither is better."""
    label = rng.integers(0, NUM_CLASSES, n)
    columns: dict[str, Any] = {"id": [f"s{row:05d}" for row in range(n)], "label": label.tolist()}
    means = np.eye(NUM_CLASSES, NUM_FEATURES)[label] + np.eye(NUM_CLASSES, NUM_FEATURES, k=NUM_CLASSES)[label]
    for index, name in enumerate(("audio", "image")):
        features = strength[:, index, None] * means + noise * rng.standard_normal((n, NUM_FEATURES))
        columns[name] = features.astype(np.float32).tolist()
    return columns


def audit(columns: dict[str, Any], probe: ProbeConfig, *, seed: int) -> Scored:
    """Score a dataset with these columns."""
    config = RunConfig(probe=probe, seed=seed)
    with tempfile.TemporaryDirectory() as name:
        pq.write_table(pa.table(columns), Path(name) / "d.parquet")
        dataset = open_dataset(Path(name) / "d.parquet")
        run = Run(Path(name) / "run")
        job = open_job(run, dataset, config, device="cpu", num_workers=0, progress=no_progress)
        results, merged, _ = run_all(job)
        table = pa.concat_tables([table for _, table, _ in finished_parts(job, merged.whole)])
        scores = scores_of_table(table, {"paths": dataset.path_columns}, where="the score table")
        return Scored(scores=scores, halves=results.halves, bisections=results.bisections)


def leans(num_datasets: int) -> Iterator[Row]:
    """Yield how often a lean is claimed where the modalities are equal over datasets."""
    for n in (100, 300):
        narrow = wide = 0
        for seed in range(num_datasets):
            columns = draw_features(np.random.default_rng([n, seed]), n, strength=np.full((n, 2), 1.2))
            result = audit(columns, replace(PROBE, thorough=True), seed=seed)
            values = result.scores.discrepancy()
            ahead, behind = is_dominated(values, 0.2), is_dominated(-values, 0.2)
            usual = mean_interval(ahead.astype(np.float64) - behind, None)
            assert result.bisections is not None
            error = result.bisections.to_json()["errors"][0]
            lean = intervals_of_sets(error, share_ahead=ahead.mean(), share_behind=behind.mean())["lean"]
            narrow += not usual["low"] <= 0 <= usual["high"]
            wide += not lean["low"] <= 0 <= lean["high"]
        yield Row(f"lean claimed for these probes, n = {n}", share_of(narrow, num_datasets), "none", met=True)
        limit = 0.05 + 2 * np.sqrt(0.05 * 0.95 / num_datasets)
        bound = f"at most {limit:.2f}"
        yield Row(
            f"lean of the set claimed, n = {n}", share_of(wide, num_datasets), bound, wide <= limit * num_datasets
        )


def reliability(num_datasets: int) -> Iterator[Row]:
    """Yield the correlation by halves of the features in noise, and where samples differ in quality."""
    n = 300
    kinds: dict[str, Callable[[np.random.Generator], Floats]] = {
        "equal quality (0)": lambda rng: np.full((n, 2), 1.2),
        "weak differences": lambda rng: 1.2 + rng.uniform(-0.8, 0.8, (n, 2)),
        "one modality carries each sample": lambda rng: 3 * np.eye(2)[rng.integers(0, 2, n)],
    }
    for kind, strength in kinds.items():
        values = []
        for seed in range(num_datasets):
            rng = np.random.default_rng([7, seed])
            result = audit(draw_features(rng, n, strength=strength(rng)), replace(PROBE, halves=True), seed=seed)
            assert result.halves is not None
            values.append((result.halves.reliability[0].r, result.halves.reliability[0].z))
        r, z = np.mean([value[0] for value in values]), sum(value[1] > 3 for value in values)
        met = {"e": abs(r) < 0.05 and z <= 1 + 0.01 * num_datasets, "w": True, "o": r > 0.4}[kind[0]]
        bound = {"e": "0 within .05", "w": "none", "o": "above .4"}[kind[0]]
        yield Row(f"r, {kind}", f"{r:.3f}, z > 3 in {share_of(z, num_datasets)}", bound, bool(met))


def modes(num_datasets: int) -> Iterator[Row]:
    """Yield how often a gap of one mode, few values or two groups is called bimodal, and by how many seeds."""
    n, shapes = 2_000, gap_shapes()
    for name, (draw, is_bimodal) in shapes.items():
        verdicts = [
            fit_mixture(draw(np.random.default_rng([3, seed]), n), seed=seed).bimodal for seed in range(num_datasets)
        ]
        count = sum(verdicts)
        met = count == num_datasets if is_bimodal else count <= 0.05 * num_datasets
        yield Row(f"bimodal: {name}", share_of(count, num_datasets), "all" if is_bimodal else "at most .05", met)
    large = np.random.default_rng(0)
    values = np.concatenate([large.normal(0.3, 0.1, 715_000), large.normal(0.62, 0.08, 285_000)]).clip(0, 1)
    bound = fit_mixture(values).dip  # at the border: a subsample of 10,000 was on either side by chance
    near = MixtureConfig(min_dip=bound * 0.999)
    seeds = {fit_mixture(values, config=near, seed=seed).bimodal for seed in range(10)}
    yield Row("verdicts over 10 seeds, 10^6 rows at the border", str(len(seeds)), "1", len(seeds) == 1)
    probabilities, label = independent_probes(np.random.default_rng(1), n, accuracy=(0.7, 0.7))
    given = confidence(probabilities, label)
    check = permute_within_classes(
        given, label, config=MixtureConfig(), seed=0, bimodal=fit_mixture(gap(given)).bimodal
    )
    text = f"{check.num_bimodal} of {check.num_permutations}"
    yield Row("modes remain in random pairings, overconfident independent probes", text, "most", check.survives)


Shape = tuple[Callable[[np.random.Generator, int], Floats], bool]


def gap_shapes() -> dict[str, Shape]:
    """Return ways to draw gaps, and whether they have two modes."""
    return {
        "half-normal": (lambda rng, n: np.abs(rng.normal(0, 0.2, n)).clip(0, 1), False),
        "uniform": (lambda rng, n: rng.random(n), False),
        "four atoms": (lambda rng, n: rng.choice([0.0, 0.3, 0.6, 0.9], n), False),
        "two groups": (
            lambda rng, n: np.where(rng.random(n) < 0.6, rng.normal(0.2, 0.07, n), rng.normal(0.75, 0.07, n)).clip(
                0, 1
            ),
            True,
        ),
    }


def independent_probes(
    rng: np.random.Generator, n: int, *, accuracy: tuple[float, float]
) -> tuple[list[NDArray[np.float32]], NDArray[np.int32]]:
    """Draw class probabilities of two overconfident probes that are right and wrong independently of each other."""
    label = rng.integers(0, NUM_CLASSES, n).astype(np.int32)
    probabilities = []
    for share in accuracy:
        predicted = np.where(rng.random(n) < share, label, (label + rng.integers(1, NUM_CLASSES, n)) % NUM_CLASSES)
        top = 1 - 0.3 * rng.random(n)
        values = np.repeat(((1 - top) / (NUM_CLASSES - 1))[:, None], NUM_CLASSES, axis=1)
        values[np.arange(n), predicted] = top
        probabilities.append(values.astype(np.float32))
    return probabilities, label


def balanced_splits(num_datasets: int) -> Iterator[Row]:
    """Yield the distance to uniform of balanced splits by the half of the features that selects, and by the other."""
    n = 1_000
    for name, strength in (("equal quality", 1.2), ("one modality carries each sample", 3.0)):
        rng = np.random.default_rng(5)
        quality = np.full((n, 2), strength) if name[0] == "e" else strength * np.eye(2)[rng.integers(0, 2, n)]
        result = audit(draw_features(rng, n, strength=quality), replace(PROBE, halves=True), seed=0)
        with tempfile.TemporaryDirectory() as folder:
            files, recipe = open_scores(result.scores, seed=0), Recipe(balanced=BalancedConfig())
            path = Path(folder)
            split = make_split(files, recipe, lambda stem: path / f"{stem}.parquet", scratch=path, dry_run=True)  # noqa: B023
        halves = split.numbers["halves"]
        text = ", ".join(f"{key} {halves[key]:.3f}" for key in ("selected", "measured", "chance"))
        yield Row(f"distance to uniform, {name}", text, "none", met=True)


def intervals(num_datasets: int) -> Iterator[Row]:
    """Yield the coverage of the intervals, as coverage.py measures it."""
    for name, kind, covered in coverage.measure(10 * num_datasets):
        text = " / ".join(f"{value:.3f}" for value in covered)
        yield Row(f"coverage, {name}, groups: {kind}", text, ".90 to 1", all(value >= 0.9 for value in covered))


TABLES: dict[str, Callable[[int], Iterator[Row]]] = {
    "leans": leans,
    "reliability": reliability,
    "modes": modes,
    "balanced_splits": balanced_splits,
    "intervals": intervals,
}


def share_of(count: int, total: int) -> str:
    return f"{count} of {total} ({count / total:.2f})"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--datasets", type=int, default=40, help="datasets drawn for each row")
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"any of {', '.join(TABLES)}; by default all")
    options = parser.parse_args()
    unknown = set(options.tables) - set(TABLES)
    if unknown:
        parser.error(f"no table {sorted(unknown)[0]}; {', '.join(TABLES)}")
    missed = 0
    for name in options.tables or TABLES:
        start = time.monotonic()
        print(f"\n{name}\n\n| quantity | measured | bound | met |\n|---|---|---|---|")
        for row in TABLES[name](options.datasets):
            missed += not row.met
            print(f"| {row.quantity} | {row.value} | {row.bound} | {'yes' if row.met else 'NO'} |", flush=True)
        print(f"\n{time.monotonic() - start:.0f} s")
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
