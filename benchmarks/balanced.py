"""Time and memory of the balanced split against polars; exit code 1 if a bound is missed.

Run with: python benchmarks/balanced.py [--rows N] [--large N] [--folder DIR]; it needs the extra "bench"
First a score table of N rows is written to DIR in shards. Both sides read and check it, count 20 bins by 30 classes by
3 splits, select by the rank of a hash in each cell, and write the kept and the dropped rows with the same columns; each
in its own process, alternating, three times. Polars ranks in memory; mmaudit must stay under 500 MB, and for ten times
the rows take at most 11 times as long with the same memory.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_SHARD = 1_000_000
MAX_RATIO = 1.0  # mmaudit's time / polars' time
MAX_MEGABYTES = 500
MAX_GROWTH, MAX_MEMORY_GROWTH = 11.0, 1.10
NUM_PAIRS = 3


def make_scores(folder: Path, num_rows: int) -> Path:
    """Write a score table whose discrepancy is far from uniform, in shards."""
    target = folder / f"scores-{num_rows}"
    if target.is_dir():
        return target
    staged = folder / f".scores-{num_rows}"
    staged.mkdir(parents=True, exist_ok=True)
    names = pa.array([f"class {number:02d}" for number in range(30)])
    splits = pa.array(["train", "validation", "test"])
    for first in range(0, num_rows, ROWS_PER_SHARD):
        rng = np.random.default_rng(first)
        n = min(ROWS_PER_SHARD, num_rows - first)
        label = rng.integers(0, 30, n).astype(np.int32)
        columns = {
            "sample_id": pa.array([f"clip_{number:09d}" for number in range(first, first + n)]),
            "label": label,
            "label_name": names.take(pa.array(label)),
            "split": splits.take(pa.array(rng.choice(3, n, p=[0.8, 0.1, 0.1]))),
            "confidence_audio": rng.beta(0.7, 0.5, n).astype(np.float32),
            "confidence_visual": rng.beta(0.5, 0.7, n).astype(np.float32),
            "balance": rng.uniform(-1, 1, n).astype(np.float32),
            "p_balanced": rng.uniform(0, 1, n).astype(np.float32),
        }
        pq.write_table(pa.table(columns), staged / f"part-{first // ROWS_PER_SHARD:05d}.parquet", compression="zstd")
    staged.rename(target)
    return target


def run_mmaudit(scores: Path, out: Path) -> dict[str, Any]:
    from mmaudit.rebalance.balanced import BalancedConfig
    from mmaudit.rebalance.recipe import Recipe, make_split
    from mmaudit.rebalance.score_tables import open_scores

    shards = open_scores(scores, seed=0)
    split = make_split(
        shards, Recipe(balanced=BalancedConfig()), lambda name: out / f"{name}.parquet", scratch=out, scores=scores
    )
    numbers = split.numbers
    return {"kept": numbers["kept"], "ks": [numbers["before"]["ks"], numbers["after"]["ks"]]}


def run_polars(scores: Path, out: Path) -> dict[str, Any]:
    """Run the split with polars' streaming engine: the same quotas and counts, ranks of a hash within each cell.

    The same checks are made, in the fastest way known: ranges, and no duplicate hash of an id. KS is computed from fine
    histograms of every class, before and after, as in mmaudit.
    """
    import polars as pl  # type: ignore[import-not-found, unused-ignore]

    from mmaudit.rebalance.balanced import fill_bins, share_among_classes

    rows = (
        pl.scan_parquet(scores / "*.parquet")
        .with_columns(discrepancy=pl.col("confidence_audio") - pl.col("confidence_visual"))
        .with_columns(
            bin=((pl.col("discrepancy").cast(pl.Float64) + 1) * 10).floor().clip(0, 19).cast(pl.Int16),
            gap=pl.col("discrepancy").abs(),
            key=pl.col("sample_id").hash(0),
        )
    )
    spans = {"confidence_audio": 0, "confidence_visual": 0, "p_balanced": 0, "balance": -1}
    checks = [pl.col(name).is_between(low, 1).all() for name, low in spans.items()]
    checked = rows.select(*checks, pl.col("key").n_unique().alias("ids"), pl.len().alias("rows"))
    summary = checked.collect(engine="streaming").row(0, named=True)
    if summary["ids"] != summary["rows"] or not all(summary[name] for name in spans):
        raise ValueError(f"not a valid score table: {summary}")
    cell = ["split", "bin", "label"]
    fine = ((pl.col("discrepancy").cast(pl.Float64) + 1) * 510).floor().clip(0, 1019).cast(pl.Int16).alias("fine")
    before = rows.with_columns(fine).group_by(*cell, "fine").len().collect(engine="streaming")
    counts = before.group_by(cell).agg(pl.col("len").sum())
    names = counts["split"].unique().sort().to_list()
    table = np.zeros((len(names), 20, 30), dtype=np.int64)
    split_index = [names.index(name) for name in counts["split"]]
    table[split_index, counts["bin"].to_numpy(), counts["label"].to_numpy()] = counts["len"].to_numpy()
    quotas = []
    for counts_of_split in table:
        by_bin = counts_of_split.sum(axis=1)
        quotas.append(share_among_classes(counts_of_split, fill_bins(by_bin, tolerance=0.05)))
    quota = np.stack(quotas)[split_index, counts["bin"].to_numpy(), counts["label"].to_numpy()]
    quotas_of = counts.select(cell).with_columns(threshold=pl.Series(quota.astype(np.float64)))
    ranked = rows.join(quotas_of.lazy(), on=cell).with_columns(
        place=pl.col("key").rank("ordinal").over(cell),
        score=(pl.col("key") // 2**32).cast(pl.Float64) * 2.0**-32,
        subset=pl.lit("balanced"),
        group=pl.lit(None, dtype=pl.String),
        content=pl.lit(None, dtype=pl.String),
        weight=pl.lit(1.0, dtype=pl.Float32),
    )
    shared = [
        "sample_id",
        "label",
        "label_name",
        "split",
        "subset",
        "bin",
        "discrepancy",
        "gap",
        "balance",
        "p_balanced",
    ]
    kept_rows = (
        ranked.filter(pl.col("place") <= pl.col("threshold"))
        .with_columns(rank=pl.col("balance").rank("min", descending=True).cast(pl.Int32) - 1)
        .select(*shared, "rank", "weight", "group", "content")
    )
    dropped_rows = ranked.filter(pl.col("place") > pl.col("threshold")).select(
        *shared, "group", "content", pl.lit("bin-full").alias("reason"), "score", "threshold"
    )
    files = [out / "kept.parquet", out / "dropped.parquet"]
    sinks = [rows.sink_parquet(file, lazy=True) for rows, file in zip((kept_rows, dropped_rows), files, strict=True)]
    pl.collect_all(sinks, engine="streaming")
    # Read again: collected together with the sinks, it would make the engine rank twice.
    after = pl.scan_parquet(files[0]).with_columns(fine).group_by(*cell, "fine").len().collect(engine="streaming")
    ks = [_ks(table.group_by("fine").agg(pl.col("len").sum()).sort("fine")) for table in (before, after)]
    return {"kept": pq.read_metadata(files[0]).num_rows, "ks": ks}


def _ks(histogram: Any) -> float:
    share = np.zeros(1_020)
    share[histogram["fine"].to_numpy()] = histogram["len"].to_numpy() / histogram["len"].sum()
    return float(np.abs(np.cumsum(share) - np.arange(1, 1_021) / 1_020).max())


def measure(name: str, scores: Path) -> dict[str, Any]:
    """Run one side in its own process; return seconds without the start of Python, peak megabytes and kept rows."""
    done = subprocess.run(
        [sys.executable, __file__, "--do", name, "--folder", str(scores)], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout))


def run_in_process(name: str, scores: Path) -> None:
    import resource

    with tempfile.TemporaryDirectory(dir=scores.parent) as out:
        started = time.perf_counter()
        result = {"mmaudit": run_mmaudit, "polars": run_polars}[name](scores, Path(out))
        seconds = time.perf_counter() - started
    megabytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({**result, "seconds": seconds, "megabytes": megabytes}))


def main(folder: Path, num_rows: int, num_large: int) -> int:
    scores = make_scores(folder, num_rows)
    pairs = [(measure("mmaudit", scores), measure("polars", scores)) for _ in range(NUM_PAIRS)]
    for mmaudit, polars in pairs:
        sides = (("mmaudit", mmaudit), ("polars", polars))
        texts = [f"{k} {v['seconds']:.2f} s, {v['megabytes']:.0f} MB, kept {v['kept']:,}" for k, v in sides]
        print(f"{num_rows:,} rows: {'; '.join(texts)}", flush=True)
    ratio = statistics.median(mmaudit["seconds"] / polars["seconds"] for mmaudit, polars in pairs)
    seconds = statistics.median(mmaudit["seconds"] for mmaudit, _ in pairs)
    megabytes = max(mmaudit["megabytes"] for mmaudit, _ in pairs)
    missed = [f"{ratio:.2f} times as long as polars"] * (ratio > MAX_RATIO)
    missed += [f"{megabytes:.0f} MB"] * (megabytes > MAX_MEGABYTES)
    print(f"ratio {ratio:.2f}, peak {megabytes:.0f} MB")
    if num_large:
        large = measure("mmaudit", make_scores(folder, num_large))
        growth, memory = large["seconds"] / seconds, large["megabytes"] / megabytes
        print(
            f"{num_large:,} rows: {large['seconds']:.1f} s, {growth:.1f} times as long; "
            f"{large['megabytes']:.0f} MB, {memory:.2f} times as much"
        )
        missed += [f"{growth:.1f} times as long"] * (growth > MAX_GROWTH * num_large / num_rows / 10)
        missed += [f"{memory:.2f} times the memory"] * (memory > MAX_MEMORY_GROWTH)
    print(f"missed: {', '.join(missed)}" if missed else "all bounds met")
    return int(bool(missed))


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--rows", type=int, default=10_000_000)
    options.add_argument("--large", type=int, default=100_000_000, help="0: skip")
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "mmaudit-bench")
    options.add_argument("--do", choices=["mmaudit", "polars"])
    arguments = options.parse_args()
    if arguments.do:
        run_in_process(arguments.do, arguments.folder)
    else:
        sys.exit(main(arguments.folder, arguments.rows, arguments.large))
