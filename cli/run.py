"""Run folders: paths, records, and what is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audit.errors import ConfigError, RunError, choices
from ..audit.parsing import Complete, Shape
from ..audit.scores.table import ScoreTable, read_scores
from ..audit.storage import read_json, write_json
from .swap import complete_swaps


@dataclass(frozen=True, slots=True)
class Run:
    """A folder whose files are complete if they exist: each is written under a temporary name and renamed last."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open a run folder, new or not; a replacement of it that was committed and interrupted is completed."""
        complete_swaps(Path(folder))
        return cls(Path(folder))

    @property
    def record_file(self) -> Path:
        """run.json, written last by score: config, versions, fingerprint, counts, seconds."""
        return self.folder / "run.json"

    @property
    def scores_file(self) -> Path:
        """One row a scored sample."""
        return self.folder / "scores.parquet"

    @property
    def quarantine_file(self) -> Path:
        """One row for each reason not to score a sample."""
        return self.folder / "quarantine.parquet"

    @property
    def mixture_file(self) -> Path:
        """The gap mixture and its verdict."""
        return self.folder / "mixture.json"

    @property
    def recovery_file(self) -> Path:
        """How well planted truth was recovered: the demo's alone."""
        return self.folder / "recovery.json"

    @property
    def features(self) -> Path:
        """The feature cache; it survives --overwrite, because it knows what it was made from."""
        return self.folder / "features"

    @property
    def figures(self) -> Path:
        """The report's figures, as PNG files."""
        return self.folder / "figures"

    @property
    def report_file(self) -> Path:
        """The report, one self-contained page; report.json beside it has its numbers."""
        return self.folder / "report.html"

    @property
    def manifests_folder(self) -> Path:
        """The manifests, each with its dropped rows and its numbers."""
        return self.folder / "manifests"

    def manifest(self, name: str) -> Path:
        """Give the file of a manifest by name."""
        return self.manifests_folder / f"{_checked(name)}.parquet"

    def manifests(self) -> list[Path]:
        """List the manifests there are, by name."""
        found = self.manifests_folder.glob("*.parquet")
        return sorted(path for path in found if not path.name.endswith(".dropped.parquet") and path.name[0] != ".")

    def finetune(self, name: str) -> Path:
        """Give the folder of a fine-tuning by name."""
        return self.folder / "finetune" / _checked(name)

    def finetunes(self) -> list[Path]:
        """List the folders of finished fine-tunings, by name."""
        folders = [path.parent for path in (self.folder / "finetune").glob("*/metrics.json")]
        return sorted(folder for folder in folders if folder.name[0] != ".")

    def is_scored(self) -> bool:
        """Tell whether score has finished here."""
        return self.record_file.exists()

    def record(self) -> dict[str, Any]:
        """Read run.json. Raises RunError where nothing has been scored."""
        if not self.is_scored():
            raise RunError(
                f"{self.folder} holds no finished run; make one with: mmaudit score DATA --run {self.folder}"
            )
        record = read_json(self.record_file, error=RunError, shape=_RECORD)
        _check_record(record, self.record_file)
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        """Write run.json."""
        write_json(record, self.record_file)

    def recovery(self) -> dict[str, Any] | None:
        """Read recovery.json, which the demo writes; None where there is none."""
        if not self.recovery_file.exists():
            return None
        recovery = read_json(self.recovery_file, error=RunError, shape=_RECOVERY)
        if len(recovery["interval"]) != 2:
            raise RunError(f"{self.recovery_file} is damaged, its interval has no two ends: remove it")
        return recovery

    def scores(self) -> ScoreTable:
        """Read the score table. Raises RunError where nothing has been scored."""
        self.record()
        return read_scores(self.scores_file)

    def check_place(self) -> None:
        """Refuse a folder that holds something else than a run. A new or empty one is fine."""
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"{self.folder} is a file; name a folder with --run")
        if not self.folder.exists() or self.is_scored():
            return
        own = {*SCORE_FILES, *REPORT_FILES, *MADE_FROM_SCORES, "features"}
        strangers = [path.name for path in self.folder.iterdir() if path.name not in own and path.name[0] != "."]
        if strangers:
            raise RunError(f"{self.folder} holds {sorted(strangers)[0]} and is no run; name another folder with --run")

    def check_links(self) -> None:
        """Raise RunError for a file that a report would read or write through a link out of the run folder."""
        names = [self.record_file, self.scores_file, self.quarantine_file, self.mixture_file, self.recovery_file]
        inside = [*self.manifests_folder.glob("*"), *(self.folder / "finetune").glob("*/*"), self.figures]
        home = self.folder.resolve()
        for path in (*names, *inside):
            if not path.resolve().is_relative_to(home):
                raise RunError(f"{path} is a link out of {self.folder}, a run that you did not make: remove it")

    def find_manifest(self, name: str) -> Path:
        """Give the file of a manifest, named by its path or by its name in this run."""
        path = Path(name)
        return path if path.exists() and not path.is_dir() else self.own_manifest(name)

    def own_manifest(self, name: str) -> Path:
        """Return the file of a manifest of this run by its name; RunError where there is none."""
        known = [path.stem for path in self.manifests()]
        if name in known:
            return self.manifest(name)
        if not known:
            raise RunError(f"no manifest {name}: {self.folder} has none yet; make one with: mmaudit split --balanced")
        raise RunError(f"no manifest {name}; {choices(name, known)}; make one with: mmaudit split --balanced")


def _check_record(record: dict[str, Any], file: Path) -> None:
    """Raise RunError where the probe report of run.json is not of its modalities."""
    names = [modality["name"] for modality in record["modalities"]]
    probe_report = record["probe_report"]
    probe_metrics = {probe_metric["name"]: probe_metric for probe_metric in probe_report["probe_metrics"]}
    gains = [gain["name"] for gain in probe_report["gains"]]
    unknown = {gain["name"] for gain in (*probe_report["controls"], probe_report["gain_over_best"])} - set(names)
    if not names or gains != names or not {*names, "fused"} <= probe_metrics.keys() or unknown:
        raise RunError(f"{file} is damaged: its probe_report is not of the modalities {', '.join(names)}; rescore")
    errors = [probe_metrics[name]["calibration"] for name in names]
    if any(error is None for error in errors) or len({error[key] is None for error in errors for key in _ECE}) != 1:
        raise RunError(f"{file} is damaged: its probe_report lacks the calibration of a modality; rescore")


_ECE = ("ece_before", "ece_after")


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read metrics.json of a finished fine-tuning; RunError where it is damaged."""
    file = folder / "metrics.json"
    metrics = read_json(file, error=RunError, shape=_METRICS)
    all_samples, contribution = metrics["test"]["all"], metrics.get("contribution", {"n": 0})
    branches = all_samples.get("branches", {})
    lacking = [name for name, subset in metrics["test"].items() if _lacks_branches(subset, branches)]
    if lacking or ("fused" not in branches and all_samples["n"]):
        raise RunError(f"{file} is damaged, test.{(lacking or ['all'])[0]} lacks branches: train it anew")
    if contribution["n"] and not {"contribution", "confusion"} <= contribution.keys():
        raise RunError(f"{file} is damaged, its contribution lacks a part: train it anew")
    return metrics


def _lacks_branches(subset: dict[str, Any], branches: Mapping[str, Any]) -> bool:
    return bool(subset["n"]) and subset.get("branches", {}).keys() != branches.keys()


_MAX_NAME = 200  # bytes: file systems allow 255, and NAME.dropped.parquet and temporary names are longer


def _checked(name: str) -> str:
    """Refuse a name that would lead out of the run, be hidden, or be taken for dropped rows."""
    if len(name.encode("utf-8", "replace")) > _MAX_NAME or "\0" in name:
        raise ConfigError(f"--name {name[:40]!r}: a name has at most {_MAX_NAME} bytes, and no NUL")
    if not name or name[0] == "." or name.endswith(".dropped") or set(name) & set("/\\"):
        raise ConfigError(f"--name {name!r}: a name holds no / or \\, and neither begins with . nor ends in .dropped")
    return name


SCORE_FILES = ("run.json", "scores.parquet", "quarantine.parquet", "mixture.json")
REPORT_FILES = ("report.html", "report.json", "figures")
MADE_FROM_SCORES = ("finetune", "manifests", "recovery.json")

_NUMBER, _NULL = (float, type(None)), type(None)
_CALIBRATION = Complete(temperature=float, ece_before=_NUMBER, ece_after=_NUMBER, num_rows=int)
_GAIN = Complete(name=str, gain=float, low=float, high=float)
_VALUE = Complete(name=str, value=float, low=float, high=float)
_LEDGER = Complete(
    metric=str,
    chance=float,
    probe_metrics=[Complete(**_VALUE, loss=float, calibration=(_CALIBRATION, _NULL))],
    gain_over_best=_GAIN,
    gains=[_GAIN],
    controls=[Complete(**_VALUE, num_rows=int, chance=float, leaks=bool)],
)
_RECORD: Shape = Complete(
    schema=str,
    version=str,
    source=str,
    fingerprint=str,
    seed=int,
    config=Complete(
        seed=int, data=Complete(task=str), media={}, probe=Complete(repeats=int, learn_from=str), network={}, mixture={}
    ),
    modalities=[Complete(name=str, column=str, kind=str, preprocessing=str)],
    columns={},
    code={},
    counts=Complete(input=int, scored=int, quarantined=int),
    quarantine={"*": int},
    classes=int,
    groups=(int, _NULL),
    folds=(int, _NULL),
    probe_report=_LEDGER,
    verdict=str,
    class_check=Complete(verdict=str),
    seconds={},
)
_INTERVAL = Complete(mean=float, low=float, high=float)
_SHARE = Complete(n=int, share=float, low=float, high=float)
_BRANCH = Complete(dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "map", "macro_f1", "ece"), float))
_SUBSET = Complete({"n": int, "branches?": {"*": _BRANCH}})
_METRICS = Complete(
    {
        "manifest": str,
        "manifest_digest": str,
        "config": Complete({"seed": int, "finetune": {}, "data?": {}}),
        "counts": Complete(train=int, validation=int, test=int),
        "test": Complete({"all": _SUBSET, "*": _SUBSET}),
        "best_epoch": int,
        "chance": Complete(majority=float),
        "test_labels_in_scores": bool,
        "contribution?": Complete(
            n=int,
            **{
                "contribution?": Complete(nobody=float, all=float, modalities={"*": _INTERVAL}),
                "confusion?": Complete(confused=_SHARE, synergy=_SHARE, confused_by={"*": _SHARE}),
            },
        ),
    }
)
_RECOVERY = Complete(spearman=float, interval=[float], right_signs=float, num_samples=int)
