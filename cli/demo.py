"""Demo: a synthetic dataset with planted modality discrepancy, and the recovery of that discrepancy.

Images are scikit-learn's bundled handwritten digits, sounds the telephone tones (DTMF, ITU-T Q.23) of their keys. The
quality of each sample's sound and image is random; their difference is the planted discrepancy.
"""

from __future__ import annotations

import math
import wave
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..audit.errors import ConfigError, RunError, ScoreError
from ..audit.hashing import hash_rank

if TYPE_CHECKING:
    from ..audit.scores.table import ScoreTable

from ..audit.locks import write_lock
from ..audit.storage import write_json
from .config import load_config
from .reporting import report
from .run import Run
from .scoring import score
from .splitting import split
from .training import finetune

Floats = NDArray[np.float64]
Row = dict[str, Any]

VERSION = 1  # increased when the same config and seed give other bytes
NUM_DIGITS = 1_797  # images that scikit-learn bundles
MIN_SAMPLES = 20  # two of each digit: a class of one cannot be cross-fitted
LOW_TONES, HIGH_TONES = (697, 770, 852, 941), (1209, 1336, 1477)  # Hz, the rows and columns of the keypad
KEYS = ((3, 1), *((key // 3, key % 3) for key in range(9)))  # row and column of 0, 1, .. 9

KINDS = ("sound", "sight", "both", "neither")  # the modalities of good quality
SHARES = (0.3, 0.3, 0.2, 0.2)  # a quarter each would leave a fifth fewer samples beyond 0.8 on either side
BETA = (3.0, 0.8)  # distribution of a good quality, mean 0.79; a poor one is 1 minus it; both cover all of [0, 1]

# Signal-to-noise ratio at quality 0, where a probe is near chance, and at quality 1, where it is confident. Confidence
# rises over the whole range, so the order can be recovered (Spearman 0.89 for seeds 0 .. 2; 0.87 with 400 samples).
SOUND_DB = (-22.0, 8.0)
SIGHT_DB = (-20.0, 26.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class KeypadConfig:
    """Size of the dataset and format of its files.

    Args:
        num_samples: number of samples; None: all 1,797. Fewer are taken evenly over the digits, each unchanged.
        sample_rate: Hz; 8,000 is the telephone's.
        seconds: length of a sound.
        image_size: height and width in pixels.
    """

    num_samples: int | None = None
    sample_rate: int = 8_000
    seconds: float = 0.5
    image_size: int = 32

    def __post_init__(self) -> None:
        """Raise ConfigError for a value outside the limits of a dataset that can be scored."""
        limits = {
            "num_samples": (MIN_SAMPLES, NUM_DIGITS),
            "sample_rate": (4_000, 96_000),  # the highest tone is 1,477 Hz
            "seconds": (0.1, 10.0),
            "image_size": (8, 1_024),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                raise ConfigError(f"keypad.{name} is {value}; must be in {low} .. {high}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recovery:
    """Recovery of the planted discrepancy by the scores.

    Args:
        spearman: rank correlation with the planted discrepancy, in [-1, 1]; 1: the same order.
        interval: its 95% interval.
        right_signs: share of samples whose estimated sign is the planted one, among those of which only the sound or
            only the image is good, in [0, 1].
        num_samples: number of samples compared.
    """

    spearman: float
    interval: tuple[float, float]
    right_signs: float
    num_samples: int


def write_keypad(folder: Path, *, config: KeypadConfig, seed: int) -> Path:
    """Write folder/data, a dataset of sounds and images, and folder/truth.parquet, which no audit reads.

    The same seed gives the same bytes. A complete dataset is not rewritten; metadata.csv is written last and marks it
    as complete. Returns folder/data; raises RunError if the folder holds other data.
    """
    from sklearn.datasets import load_digits

    data, made_from = folder / "data", {"keypad": VERSION, "seed": seed, **asdict(config)}
    if _is_complete(folder, made_from):
        return data
    (data / "metadata.csv").unlink(missing_ok=True)  # marks the dataset as incomplete until it is written again
    for name in ("audio", "image"):
        (data / name).mkdir(parents=True, exist_ok=True)
    digits = load_digits()
    names = [f"keypad-{index:04d}" for index in range(len(digits.target))]
    rows_used = _select_rows(names, digits.target, num_samples=config.num_samples, seed=seed)
    rows, num_bytes = [], 0
    for index in rows_used:
        # One random stream per sample: a sample is the same in a dataset of any size.
        rng = np.random.default_rng(int(hash_rank([names[index]], seed=seed, purpose="keypad")[0]))
        truth = _draw_truth(rng)
        sound = _tone(int(digits.target[index]), snr_db=truth["snr_db"], config=config, rng=rng)
        sight = _picture(digits.images[index], noise=truth["picture_noise"], size=config.image_size, rng=rng)
        num_bytes += _write_wav(data / "audio" / f"{names[index]}.wav", sound, sample_rate=config.sample_rate)
        num_bytes += _write_png(data / "image" / f"{names[index]}.png", sight)
        rows.append({"sample_id": names[index], **truth})
    _write_tables(folder, rows, digits.target[rows_used], provenance={**made_from, "num_bytes": num_bytes})
    return data


def recovery(truth: Path, scores: ScoreTable) -> Recovery:
    """Compare the discrepancy audio - image with the planted one, over the ids that are in both tables.

    The interval is Fisher's, with the variance (1 + r^2 / 2) / (n - 3) of Bonett & Wright (2000).
    Raises ScoreError if fewer than 20 ids are in common, or all discrepancies are equal.
    """
    from scipy.stats import spearmanr

    from ..audit.storage import read_parquet

    table, _ = read_parquet(truth, error=ScoreError)
    truth_row = {name: row for row, name in enumerate(table["sample_id"].to_pylist())}
    common = [(row, truth_row[name]) for row, name in enumerate(scores.sample_id) if name in truth_row]
    if len(common) < MIN_SAMPLES:
        raise ScoreError(f"{len(common)} scored samples are in {truth}: score the data folder next to it")
    scored, planted_rows = np.array(common).T
    estimated = scores.discrepancy("audio:image")[scored]
    planted = table["discrepancy"].to_numpy()[planted_rows]
    one_good = np.isin(np.array(table["kind"].to_pylist())[planted_rows], ("sound", "sight"))
    if np.ptp(estimated) == 0 or not one_good.any():
        raise ScoreError(
            f"nothing to recover in {len(common)} samples: estimated or planted discrepancies are all equal"
        )
    spearman = float(spearmanr(planted, estimated).statistic)
    return Recovery(
        spearman=spearman,
        interval=_interval(spearman, len(common)),
        right_signs=float((np.sign(estimated) == np.sign(planted))[one_good].mean()),
        num_samples=len(common),
    )


def _is_complete(folder: Path, made_from: Row) -> bool:
    """Return whether the folder already holds this dataset: the settings, every file, and the total of their bytes."""
    from ..audit.storage import read_parquet

    data, truth = folder / "data", folder / "truth.parquet"
    if not (data / "metadata.csv").is_file():
        return False
    table, stored = read_parquet(truth, error=RunError) if truth.is_file() else (None, {})
    if table is None or {name: stored.get(name) for name in made_from} != made_from:
        contents = f"a demo dataset of seed {stored['seed']}, other settings" if "keypad" in stored else "other data"
        raise RunError(f"{folder} holds {contents}: pass another folder, or remove this one")
    names = table["sample_id"].to_pylist()
    files = [data / kind / f"{name}{end}" for kind, end in (("audio", ".wav"), ("image", ".png")) for name in names]
    return all(map(Path.is_file, files)) and sum(file.stat().st_size for file in files) == stored["num_bytes"]


def _select_rows(names: list[str], label: NDArray[np.int64], *, num_samples: int | None, seed: int) -> NDArray[np.intp]:
    """Return the rows of a dataset of this size, ascending: the first of each digit by hash, then the second, etc."""
    key = hash_rank(names, seed=seed, purpose="keypad size")
    rank = np.empty(len(label), dtype=np.int64)
    for digit in range(10):
        members = np.flatnonzero(label == digit)
        rank[members[np.argsort(key[members])]] = np.arange(len(members))
    return np.sort(np.lexsort((key, rank))[:num_samples])


def _draw_truth(rng: np.random.Generator) -> Row:
    """Draw one row of truth.parquet without its id; `picture_noise` is in standard deviations of the image."""
    kind = str(rng.choice(KINDS, p=SHARES))
    good = rng.beta(*BETA, 2)
    sound = float(good[0] if kind in ("sound", "both") else 1 - good[0])
    sight = float(good[1] if kind in ("sight", "both") else 1 - good[1])
    return {
        "kind": kind,
        "discrepancy": sound - sight,
        "sound_quality": sound,
        "sight_quality": sight,
        "snr_db": float(np.interp(sound, (0, 1), SOUND_DB)),
        "picture_noise": float(10 ** (-np.interp(sight, (0, 1), SIGHT_DB) / 20)),
    }


def _tone(digit: int, *, snr_db: float, config: KeypadConfig, rng: np.random.Generator) -> Floats:
    """Return a key's two tones in white noise, (t,) in [-1, 1]; `snr_db` is the ratio of powers while it is pressed."""
    seconds, (row, column) = config.seconds, KEYS[digit]
    key_seconds = seconds * rng.uniform(0.6, 0.9)
    begin = rng.uniform(0, seconds - key_seconds)
    time = np.arange(round(seconds * config.sample_rate)) / config.sample_rate
    ramp = np.clip(np.minimum(time - begin, begin + key_seconds - time) / 0.005, 0, 1)  # 5 ms, to avoid clicks
    phases = rng.uniform(0, 2 * np.pi, 2)
    angles = 2 * np.pi * time * np.array([[LOW_TONES[row]], [HIGH_TONES[column]]]) + phases[:, None]
    clean = ramp * np.sin(angles).sum(axis=0)  # of power 1 while the key is pressed
    noisy = clean + rng.standard_normal(len(time)) * 10 ** (-snr_db / 20)
    return np.asarray(noisy / np.abs(noisy).max() * 10 ** (rng.uniform(-18, -1) / 20))  # peak at -18 .. -1 dBFS


def _picture(pixels: Floats, *, noise: float, size: int, rng: np.random.Generator) -> Floats:
    """Return a digit (8, 8) near the centre of an image (size, size), in [-1, 1]; noise lowers its contrast."""
    from PIL import Image

    margin = size // 16
    side = size - 2 * margin
    drawn = Image.fromarray(pixels.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    y_offset, x_offset = rng.integers(0, 2 * margin, 2, endpoint=True)
    clean = np.zeros((size, size))
    clean[y_offset : y_offset + side, x_offset : x_offset + side] = np.asarray(drawn)
    clean = (clean - clean.mean()) / clean.std()
    noisy = clean + rng.standard_normal(clean.shape) * noise
    return np.asarray(noisy / np.abs(noisy).max() * rng.uniform(0.6, 1))


def _write_wav(path: Path, sound: Floats, *, sample_rate: int) -> int:
    """Write 16-bit mono sound; return the file size in bytes."""
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, sample_rate, len(sound), "NONE", ""))
        file.writeframes(np.round(sound * 32_767).astype("<i2").tobytes())
    return path.stat().st_size


def _write_png(path: Path, sight: Floats) -> int:
    """Write an 8-bit grey image; return the file size in bytes."""
    from PIL import Image

    Image.fromarray(np.round(127.5 + 127.5 * sight).astype(np.uint8)).save(path)
    return path.stat().st_size


def _write_tables(folder: Path, rows: list[Row], label: NDArray[np.int64], *, provenance: Row) -> None:
    """Write truth.parquet, then metadata.csv, each atomically."""
    import pyarrow as pa

    from ..audit.storage import write_parquet, write_text

    write_parquet(pa.Table.from_pylist(rows), folder / "truth.parquet", provenance=provenance)
    lines = ["id,audio_file_name,image_file_name,label"]
    for row, digit in zip(rows, label, strict=True):
        lines.append("{0},audio/{0}.wav,image/{0}.png,{1}".format(row["sample_id"], digit))
    write_text("\n".join([*lines, ""]), folder / "data" / "metadata.csv")


def _interval(spearman: float, num_samples: int) -> tuple[float, float]:
    """Return the 95% interval of a rank correlation."""
    centre = math.atanh(min(max(spearman, -1 + 1e-12), 1 - 1e-12))
    half_width = 1.96 * math.sqrt((1 + spearman**2 / 2) / (num_samples - 3))
    return math.tanh(centre - half_width), math.tanh(centre + half_width)


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """Result of `demo`.

    Attributes:
        recovery: How well the scores recovered the planted discrepancy.
        num_kept: Samples in the balanced split.
        distance: Its distance to uniform, in [0, 1].
        report: The report, an HTML page.
    """

    recovery: Recovery
    num_kept: int
    distance: float
    report: Path

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON values."""
        return {
            "recovery": asdict(self.recovery),
            "kept": self.num_kept,
            "distance": self.distance,
            "report": str(self.report),
        }


def demo(
    folder: str | Path = "mmaudit-demo", *, num_samples: int | None = None, seed: int = 0, progress: bool = True
) -> DemoResult:
    """Generate a dataset with known imbalance, run all stages on it, and report how well it was recovered.

    No probe is fitted on a test sample, so that the fine-tunings can be compared.

    Args:
        folder: Folder to write; the run is folder/run.
        num_samples: Number of samples, at least 20; by default all 1797.
        seed: Random seed.
        progress: Show a progress bar in a terminal or notebook.

    Returns:
        The recovery of the planted discrepancy, the size and distance to uniform of the balanced split, and the path
        of the report.

    Raises:
        ConfigError: num_samples is outside 20 .. 1,797.
        RunError: The folder holds other data.

    Example:
        >>> mmaudit.demo().recovery.spearman
    """
    with write_lock(Path(folder), command="mmaudit demo"):
        run_dir = Run.open(Path(folder) / "run")
        config = load_config(settings={"seed": seed, "probe.learn_from": "train"})
        data = write_keypad(Path(folder), config=KeypadConfig(num_samples=num_samples), seed=seed)
        score(data, run=run_dir.folder, config=config, progress=progress)
        recovered = recovery(Path(folder) / "truth.parquet", run_dir.scores())
        numbers = asdict(recovered)
        write_json({**numbers, "interval": list(numbers["interval"])}, run_dir.recovery_file)
        balanced = split(run=run_dir.folder, seed=seed, balanced=True, overwrite=True)
        split(run=run_dir.folder, seed=seed, gmm="balanced", overwrite=True)
        for sampling in ("uniform", "bss-h"):
            finetune("balanced", run=run_dir.folder, seed=seed, sampling=sampling, progress=progress)
        page = report(run=run_dir.folder).page
    return DemoResult(recovery=recovered, num_kept=balanced.num_kept, distance=balanced.distance, report=page)
