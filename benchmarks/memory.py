"""Peak memory of scoring 1,000,000 rows of two modalities of 512 features, 30 classes.

The dataset is written in chunks to a scratch folder (4 GB, and as much again for the feature cache), the command
`mmaudit score` runs on it, and the largest resident set of that process and of its workers is read from the system.
Prints a Markdown row; the exit code is 1 if it is not under 3 GB. `--rows N` uses fewer rows.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NUM_FEATURES, NUM_CLASSES, PIECE = 512, 30, 20_000
MAX_GB = 3.0


def write(path: Path, num_rows: int) -> None:
    """Write Gaussian clusters per class; the class signal of each modality varies by sample at random."""
    rng = np.random.default_rng(0)
    means = rng.standard_normal((2, NUM_CLASSES, NUM_FEATURES)).astype(np.float32) * 0.12
    vector = pa.list_(pa.float32(), NUM_FEATURES)
    schema = pa.schema([("id", pa.string()), ("label", pa.int32()), ("audio", vector), ("visual", vector)])
    with pq.ParquetWriter(path, schema, compression="none", use_dictionary=["label"]) as writer:
        for start in range(0, num_rows, PIECE):
            n = min(PIECE, num_rows - start)
            label = rng.integers(0, NUM_CLASSES, n).astype(np.int32)
            clear = rng.random((2, n, 1), dtype=np.float32) * 2
            columns = [clear[m] * means[m][label] + rng.standard_normal((n, NUM_FEATURES), np.float32) for m in (0, 1)]
            arrays = [pa.FixedSizeListArray.from_arrays(pa.array(matrix.ravel()), NUM_FEATURES) for matrix in columns]
            ids = pa.array([f"s{row:07d}" for row in range(start, start + n)])
            writer.write_table(pa.table([ids, pa.array(label), *arrays], schema=schema))


def main(num_rows: int) -> int:
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch) / "million.parquet"
        write(data, num_rows)
        started = time.perf_counter()
        command = [sys.executable, "-m", "mmaudit", "score", str(data), "--run", f"{scratch}/run", "--json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        seconds = time.perf_counter() - started
        resident = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9
        record = json.loads(done.stdout)
    spent = ", ".join(f"{stage} {value:.0f} s" for stage, value in record["seconds"].items())
    print("| rows x features x modalities | largest resident set | seconds | scored |")
    print("|---|---|---|---|")
    print(
        f"| {num_rows:,} x {NUM_FEATURES} x 2 | {resident:.2f} GB (bound {MAX_GB:g}) | {seconds:.0f} ({spent}) "
        f"| {record['counts']['scored']:,} |"
    )
    return int(resident >= MAX_GB)


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[sys.argv.index("--rows") + 1]) if "--rows" in sys.argv else 1_000_000))
