"""Run folders: paths, records, and what of a run is finished."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audit.errors import ConfigError, RunError, choices, printable
from ..audit.parsing import RequiredKeys, Shape, check_shape
from ..audit.remote.paths import is_url
from ..audit.scores.report_scores import read_report_scores
from ..audit.scores.table import ScoreTable, read_scores
from ..audit.storage import read_json, write_json
from .swap import complete_swaps

RUN_SCHEMA = "mmaudit.run/3"  # of run.json; another number means other keys
REPORT_ROWS = 200_000  # ours: of a table in parts; a share of so many rows has an interval of 0.002


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder. A file that exists is complete: it is written under a temporary name and renamed last."""

    folder: Path

    @classmethod
    def open(cls, folder: str | Path) -> Run:
        """Open a new or existing run folder; complete a replacement that was committed and then interrupted."""
        if is_url(str(folder)):
            raise RunError(f"{folder}: commands take a run at a URL by --run; this function takes a folder")
        complete_swaps(Path(folder))
        return cls(Path(folder))

    @property
    def record_file(self) -> Path:
        """Path of run.json, written last by score: config, versions, fingerprint, counts, seconds."""
        return self.folder / "run.json"

    @property
    def scores_file(self) -> Path:
        """Path of the score table, one row per scored sample."""
        return self.folder / "scores.parquet"

    @property
    def score_source(self) -> Path:
        """Path of the score table: a file, or the folder of its parts."""
        return parts if (parts := self.folder / "scores").is_dir() else self.scores_file

    def score_part(self, number: int) -> Path:
        """Return the path of a part of the score table of large data."""
        return self.folder / "scores" / f"part-{number:05d}.parquet"

    @property
    def shards_file(self) -> Path:
        """Path of the plan of parts."""
        return self.folder / "shards.json"

    @property
    def probes(self) -> Path:
        """Folder of the probes of a run in several parts or stages."""
        return self.folder / "probes"

    @property
    def stages(self) -> Path:
        """Folder of what passes between stages; removed when the run is finished."""
        return self.folder / "stages"

    @property
    def quarantine_file(self) -> Path:
        """Path of the quarantine table, one row per reason for not scoring a sample."""
        return self.folder / "quarantine.parquet"

    @property
    def mixture_file(self) -> Path:
        """Path of the gap mixture and its verdict."""
        return self.folder / "mixture.json"

    @property
    def recovery_file(self) -> Path:
        """Path of the recovery of the planted discrepancy, written by the demo only."""
        return self.folder / "recovery.json"

    @property
    def features(self) -> Path:
        """Folder of the feature cache; --overwrite keeps it, because its keys cover all of its inputs."""
        return self.folder / "features"

    @property
    def figures(self) -> Path:
        """Folder of the report's figures, PNG files."""
        return self.folder / "figures"

    @property
    def report_file(self) -> Path:
        """Path of the report, one self-contained page; report.json in the same folder holds its numbers."""
        return self.folder / "report.html"

    @property
    def manifests_folder(self) -> Path:
        """Folder of the manifests, each with its dropped rows and its statistics."""
        return self.folder / "manifests"

    def manifest(self, name: str) -> Path:
        """Return the path of a manifest by name."""
        return self.manifests_folder / f"{_checked_name(name)}.parquet"

    def manifests(self) -> list[Path]:
        """Return the paths of the manifests, sorted by name."""
        paths = self.manifests_folder.glob("*.parquet")
        return sorted(path for path in paths if not path.name.endswith(".dropped.parquet") and path.name[0] != ".")

    def finetune(self, name: str) -> Path:
        """Return the folder of a fine-tuning by name."""
        return self.folder / "finetune" / _checked_name(name)

    def comparison(self, name: str) -> Path:
        """Return the folder of a comparison by name."""
        return self.folder / "compare" / _checked_name(name)

    def finetunes(self) -> list[Path]:
        """Return the folders of finished fine-tunings, sorted by name."""
        folders = [path.parent for path in (self.folder / "finetune").glob("*/metrics.json")]
        return sorted(folder for folder in folders if folder.name[0] != ".")

    def comparisons(self) -> list[Path]:
        """Return what finished comparisons state for the report, compare/NAME/compare.json, sorted by name."""
        paths = (self.folder / "compare").glob("*/compare.json")
        return sorted(path for path in paths if path.parent.name[0] != ".")

    def is_scored(self) -> bool:
        """Return whether score has finished in this folder."""
        return self.record_file.exists()

    def record(self) -> dict[str, Any]:
        """Read run.json; raise RunError if the run is not scored."""
        if not self.is_scored():
            raise RunError(
                f"{self.folder} holds no finished run; create one with: mmaudit score DATA --run {self.folder}"
            )
        stated = read_json(self.record_file, error=RunError)
        if stated.get("schema") != RUN_SCHEMA and str(stated.get("schema")).startswith("mmaudit.run/"):
            raise RunError(
                f"{self.record_file} was written by mmaudit {printable(stated.get('version'))}, as "
                f"{printable(stated['schema'])} in place of {RUN_SCHEMA}; score it again with: mmaudit score DATA "
                f"--run {self.folder} --overwrite"
            )
        record = read_json(self.record_file, error=RunError, shape=_RECORD)
        _check_record(record, self.record_file)
        return record

    def write_record(self, record: dict[str, Any]) -> None:
        """Write run.json."""
        write_json(record, self.record_file)

    def recovery(self) -> dict[str, Any] | None:
        """Read recovery.json, which the demo writes; None if it does not exist."""
        if not self.recovery_file.exists():
            return None
        recovery = read_json(self.recovery_file, error=RunError, shape=_RECOVERY)
        if len(recovery["interval"]) != 2:
            raise RunError(f"{self.recovery_file} is damaged, its interval must have two bounds: remove it")
        return recovery

    def scores(self) -> ScoreTable:
        """Read the score table; raise RunError if the run is not scored."""
        self.record()
        return read_scores(self.score_source)

    def report_scores(self) -> ScoreTable:
        """Read what a report is made of: the score table, or a sample of one in parts; RunError without scores.

        Columns that no report needs are None.
        """
        self.record()
        return read_report_scores(self.score_source, max_rows=REPORT_ROWS)

    def check_folder(self) -> None:
        """Raise RunError if the folder holds something other than a run; a new or empty folder is accepted."""
        if self.folder.exists() and not self.folder.is_dir():
            raise RunError(f"{self.folder} is a file; pass a folder with --run")
        if not self.folder.exists() or self.is_scored():
            return
        own = {*SCORE_FILES, *REPORT_FILES, *MADE_FROM_SCORES, "features", "stages"}
        foreign = [path.name for path in self.folder.iterdir() if path.name not in own and path.name[0] != "."]
        if foreign:
            raise RunError(f"{self.folder} holds {sorted(foreign)[0]} and is not a run; pass another folder with --run")

    def check_links(self) -> None:
        """Raise RunError if a report would read or write through a link that leads out of the run folder."""
        names = [self.record_file, self.quarantine_file, self.mixture_file, self.recovery_file]
        names += [self.scores_file, self.score_source, *self.score_source.glob("*")]
        inside = [*self.manifests_folder.glob("*"), *(self.folder / "finetune").glob("*/*"), self.figures]
        inside += self.comparisons()
        root = self.folder.resolve()
        for path in (*names, *inside):
            if not path.resolve().is_relative_to(root):
                raise RunError(
                    f"{path} is a link out of {self.folder}, a run that was not made by you: remove the link"
                )

    def find_manifest(self, name: str) -> Path:
        """Return the path of a manifest, given by its path or by its name in this run."""
        path = Path(name)
        return path if path.exists() and not path.is_dir() else self.own_manifest(name)

    def own_manifest(self, name: str) -> Path:
        """Return the path of a manifest of this run by its name; raise RunError if it does not exist."""
        names = [path.stem for path in self.manifests()]
        if name in names:
            return self.manifest(name)
        if not names:
            raise RunError(
                f"no manifest {name}: {self.folder} has no manifests; create one with: mmaudit split --balanced"
            )
        raise RunError(f"no manifest {name}; {choices(name, names)}; create one with: mmaudit split --balanced")


def _check_record(record: dict[str, Any], file: Path) -> None:
    """Raise RunError if the probe report of run.json does not match its modalities."""
    names = [modality["name"] for modality in record["modalities"]]
    probe_report = record["probe_report"]
    probe_metrics = {probe_metric["name"]: probe_metric for probe_metric in probe_report["probe_metrics"]}
    gains = [gain["name"] for gain in probe_report["gains"]]
    unknown = {gain["name"] for gain in (*probe_report["controls"], probe_report["gain_over_best"])} - set(names)
    if not names or gains != names or not {*names, "fused"} <= probe_metrics.keys() or unknown:
        raise RunError(f"{file} is damaged: its probe_report does not match the modalities {', '.join(names)}; rescore")
    errors = [probe_metrics[name]["calibration"] for name in names]
    if any(error is None for error in errors) or len({error[key] is None for error in errors for key in _ECE}) != 1:
        raise RunError(f"{file} is damaged: its probe_report has no calibration for a modality; rescore")


_ECE = ("ece_before", "ece_after", "ece_floor")


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read metrics.json of a finished fine-tuning; raise RunError if it is damaged."""
    file = folder / "metrics.json"
    metrics = read_json(file, error=RunError, shape=_METRICS)
    all_samples, contribution = metrics["test"]["all"], metrics.get("contribution", {"n": 0})
    branches = all_samples.get("branches", {})
    incomplete = [name for name, subset in metrics["test"].items() if _lacks_branches(subset, branches)]
    if incomplete or ("fused" not in branches and all_samples["n"]):
        raise RunError(f"{file} is damaged, test.{(incomplete or ['all'])[0]} has no branches: train it again")
    task = metrics.get("task", "classification")
    _check_task_metrics(metrics, task, file)
    parts = {"contribution", "confusion"} if task == "classification" else {"contribution"}
    if contribution["n"] and not parts <= contribution.keys():
        raise RunError(f"{file} is damaged, its contribution is incomplete: train it again")
    return metrics


def _check_task_metrics(metrics: dict[str, Any], task: str, file: Path) -> None:
    """Raise RunError if the branches or the levels of chance lack metrics of the task."""
    from ..train.task_metrics import TASK_METRICS

    if task not in TASK_METRICS:
        raise RunError(f"{file} is damaged, its {choices(task, TASK_METRICS)}: train it again")
    nullable = dict.fromkeys(TASK_METRICS[task].keys, (float, _NULL))
    branch = RequiredKeys(_CLASS_BRANCH if task == "classification" else nullable)
    shape = {"chance": RequiredKeys(dict.fromkeys(TASK_METRICS[task].chance, float))}
    try:
        check_shape(metrics, {**shape, "test": {"*": {"branches": {"*": branch}}}})
    except ValueError as error:
        raise RunError(f"{file} cannot be read: {error}; it is damaged, or not written by mmaudit") from error


def _lacks_branches(subset: dict[str, Any], branches: Mapping[str, Any]) -> bool:
    return bool(subset["n"]) and subset.get("branches", {}).keys() != branches.keys()


_MAX_NAME_BYTES = 200  # file systems allow 255 bytes, and NAME.dropped.parquet and temporary names are longer


def _checked_name(name: str) -> str:
    """Return the name; raise ConfigError if it leads out of the run, is hidden, or names a table of dropped rows."""
    if len(name.encode("utf-8", "replace")) > _MAX_NAME_BYTES or printable(name) != name:
        raise ConfigError(f"--name {name[:40]!r}: a name has at most {_MAX_NAME_BYTES} bytes and no control characters")
    if not name or name[0] == "." or name.endswith(".dropped") or set(name) & set("/\\"):
        raise ConfigError(f"--name {name!r}: a name must not contain / or \\, begin with . or end in .dropped")
    return name


SCORE_FILES = (
    *("run.json", "scores.parquet", "scores", "quarantine.parquet", "mixture.json"),
    *("shards.json", "probes"),
)
REPORT_FILES = ("report.html", "report.json", "figures")
MADE_FROM_SCORES = ("applied", "compare", "finetune", "manifests", "recovery.json")

_NUMBER, _NULL = (float, type(None)), type(None)
_CALIBRATION = RequiredKeys(temperature=float, ece_before=_NUMBER, ece_after=_NUMBER, ece_floor=_NUMBER, num_rows=int)
_GAIN = RequiredKeys(name=str, gain=float, low=float, high=float)
_VALUE = RequiredKeys(name=str, value=float, low=float, high=float)
_PROBE_REPORT = RequiredKeys(
    metric=str,
    chance=RequiredKeys(uniform=float, majority=float),
    probe_metrics=[RequiredKeys(**_VALUE, loss=float, beats_prior=bool, calibration=(_CALIBRATION, _NULL))],
    gain_over_best=_GAIN,
    gains=[_GAIN],
    controls=[RequiredKeys(**_VALUE, num_rows=int, majority=float, leaks=bool)],
)
_RECORD: Shape = RequiredKeys(
    schema=str,
    version=str,
    source=str,
    fingerprint=str,
    seed=int,
    config=RequiredKeys(
        seed=int,
        data=RequiredKeys(task=str),
        media={},
        probe=RequiredKeys(repeats=int, learn_from=str),
        network={},
        mixture={},
    ),
    modalities=[RequiredKeys(name=str, column=str, kind=str, preprocessing=str)],
    columns={},
    code={},
    counts=RequiredKeys(input=int, scored=int, quarantined=int),
    quarantine={"*": int},
    num_classes=int,
    num_groups=(int, _NULL),
    num_folds=(int, _NULL),
    probe_report=_PROBE_REPORT,
    gap_verdict=str,
    class_check=RequiredKeys(verdict=str),
    label_leaks=[RequiredKeys(what=str, modality=str, message=str)],
    margin_check=RequiredKeys(num_permutations=int, num_bimodal=(int, _NULL), survives=bool),
    balanced_side=(RequiredKeys(n=int, all_correct=float, all_wrong=float), _NULL),
    halves=(RequiredKeys(num_rows=int, reason=str, reliability=[RequiredKeys(modality=str, r=float, z=float)]), _NULL),
    bisections=(
        RequiredKeys(
            num_rows=int, reason=str, errors=[RequiredKeys(modality=str, ahead=float, behind=float, lean=float)]
        ),
        _NULL,
    ),
    seconds={},
)
_INTERVAL = RequiredKeys(mean=float, low=float, high=float)
_SHARE = RequiredKeys(n=int, share=float, low=float, high=float)
_SUBSET = RequiredKeys({"n": int, "branches?": {"*": {"*": (float, _NULL)}}})
_CLASS_BRANCH = dict.fromkeys(("accuracy", "accuracy_low", "accuracy_high", "map", "macro_f1", "ece"), float)
_METRICS = RequiredKeys(
    {
        "manifest": (str, _NULL),
        "manifest_digest": str,
        "task?": str,
        "config": RequiredKeys({"seed": int, "finetune": {}, "data?": {}}),
        "made_from?": {},
        "code?": {},
        "counts": RequiredKeys(train=int, validation=int, test=int),
        "test": RequiredKeys({"all": _SUBSET, "*": _SUBSET}),
        "best_epoch": int,
        "chance": {"*": float},
        "test_labels_in_scores": bool,
        "contribution?": RequiredKeys(
            n=int,
            **{
                "contribution?": RequiredKeys(nobody=float, all=float, modalities={"*": _INTERVAL}),
                "confusion?": RequiredKeys(confused=_SHARE, synergy=_SHARE, confused_by={"*": _SHARE}),
            },
        ),
    }
)
_RECOVERY = RequiredKeys(spearman=float, interval=[float], right_signs=float, num_samples=int)
