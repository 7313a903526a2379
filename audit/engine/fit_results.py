"""Results of the stage `fit`: in memory, or in files that other processes read."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from ..features.encoders import is_network
from ..hashing import file_digest
from ..probes.probe_set import ProbeSet
from ..probes.saved_probes import load_probes, read_calibrations, save_probes
from ..scores.probe_report import Control
from ..scores.stability import BisectionAudit, HalfAudit, LeanError, Reliability
from .fitting import Fitted, picture_view
from .plan import Part
from .scoring import PartRows, part_inputs, take_probes
from .selection import Selection, quarantined_tables, read_selection, selection_record, selection_tables

if TYPE_CHECKING:
    from .stages import ScoringJob


def is_fitted(job: ScoringJob) -> bool:
    """Return whether all that the stage `fit` writes is there, complete: its tables, and the probes."""
    if not all(job.store.has(name) for name in ("keys", "contents", "quarantined", "halves", "usable", "selection")):
        return False
    return bool(_probe_digests(job) == job.store.counts("selection").get("probes"))


def _probe_digests(job: ScoringJob) -> dict[str, str]:
    return {file.name: file_digest(file) for file in sorted(job.probes.glob("*.safetensors"))}


def save_fit(job: ScoringJob, selection: Selection, fitted: Fitted) -> None:
    """Write the results of the stage `fit` for other processes; the table `selection` is written last."""
    save_probes(fitted.probe_set, selection.cross_fits[0], job.probes)
    halves, samples, rows = fitted.halves, *selection_tables(selection)
    columns = {}
    if halves is not None and halves.confidences is not None:
        columns = {
            f"{half} {index}": values
            for half, confidence in zip("ab", halves.confidences, strict=True)
            for index, values in enumerate(confidence.T)
        }
    job.store.write("halves", pa.table(columns), counts={"halves": None if halves is None else halves.to_json()})
    job.store.write("usable", rows)
    job.store.write_pieces("quarantined", quarantined_tables(selection))
    counts = {
        "selection": selection_record(selection),
        "controls": [control.to_json() for control in fitted.controls],
        "num_features": [calibrated.inputs.num_features for calibrated in fitted.probe_set.probes],
        "bisections": None if fitted.bisections is None else fitted.bisections.to_json(),
        "probes": _probe_digests(job),
    }
    job.store.write("selection", samples, counts=counts)


@dataclass(frozen=True, kw_only=True)
class FitResults:
    """Results of the stage `fit`, kept in memory or read from the files of `save_fit`."""

    job: ScoringJob
    kept: tuple[Selection, Fitted] | None = None

    @cached_property
    def selection(self) -> Selection:
        """What is scored."""
        if self.kept is not None:
            return self.kept[0]
        store = self.job.store
        record = store.counts("selection")["selection"]
        return read_selection(store.read("selection"), store.read("usable"), store.read("quarantined"), record)

    @cached_property
    def halves(self) -> HalfAudit | None:
        """Audit by halves of the features."""
        if self.kept is not None:
            return self.kept[1].halves
        table, stated = self.job.store.read("halves"), self.job.store.counts("halves")["halves"]
        if stated is None:
            return None
        first, second = (
            np.stack([table[f"{half} {index}"].to_numpy() for index in range(len(self.job.names))], axis=1)
            if table.num_columns
            else None
            for half in "ab"
        )
        reliability = tuple(Reliability(**row) for row in stated.pop("reliability"))
        confidences = None if first is None or second is None else (first, second)
        return HalfAudit(**stated, reliability=reliability, confidences=confidences)

    @cached_property
    def controls(self) -> tuple[Control, ...]:
        """Probes of shuffled labels."""
        if self.kept is not None:
            return self.kept[1].controls
        return tuple(Control.from_json(row) for row in self.job.store.counts("selection")["controls"])

    @cached_property
    def bisections(self) -> BisectionAudit | None:
        """Audits of halves of the samples."""
        if self.kept is not None:
            return self.kept[1].bisections
        stated = self.job.store.counts("selection")["bisections"]
        if stated is None:
            return None
        return BisectionAudit(**{**stated, "errors": tuple(LeanError(**row) for row in stated["errors"])})

    @cached_property
    def num_features(self) -> list[int]:
        """Number of features of each modality."""
        if self.kept is not None:
            return [calibrated.inputs.num_features for calibrated in self.kept[1].probe_set.probes]
        return list(self.job.store.counts("selection")["num_features"])

    def calibrations(self) -> dict[str, Any]:
        """Return the calibration of each probe by name."""
        if self.kept is None:
            return read_calibrations(self.job.probes, self.job.names)
        probe_set = self.kept[1].probe_set
        joint = [] if probe_set.joint is None else [probe_set.joint]
        return {calibrated.name: calibrated.calibration for calibrated in (*probe_set.probes, *joint)}

    def probe_set(self, part: Part, rows: PartRows) -> ProbeSet:
        """Return the probes of the samples of a part."""
        tasks, sizes = self.job.tasks(part), self.num_features
        inputs = part_inputs(self.job.dataset, tasks, rows.status, rows.row, num_features=sizes)
        if self.kept is not None:
            return take_probes(self.kept[1].probe_set, rows.samples, inputs)
        selection, settings = self.selection, self.job.networks
        networks = [
            (picture_view(modality, settings.media), settings.config) if is_network(modality) else None
            for modality in self.job.dataset.modalities
        ]
        return load_probes(
            self.job.probes,
            self.job.names,
            inputs=inputs,
            present=np.stack([matrix.present for matrix in inputs], axis=1),
            target=selection.target.take(rows.samples),
            cross_fits=[cross_fit.take(rows.samples) for cross_fit in selection.cross_fits],
            samples=rows.samples,
            device=self.job.device,
            networks=networks,
            progress=self.job.progress,
        )
