"""Sources of the samples of a training: a manifest, or data without scores."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from ..audit.dataset.dataset import Dataset
from ..audit.dataset.formats import READERS
from ..audit.dataset.modalities import Modality
from ..audit.engine.row_data import read_encoded
from ..audit.engine.selection import fingerprint
from ..audit.errors import Quarantined, RunError, printable
from ..audit.features.backbone_inputs import with_backbone_inputs
from ..audit.features.encode import EncodeTask, encode_dataset
from ..audit.features.encoders import ENCODERS
from ..audit.parsing import build_config, plain
from ..audit.workers import Progress
from ..rebalance.manifest import Manifest, ManifestFile, read_dropped_batches
from ..train.examples import DROPPED_ROWS, Examples, load_examples
from ..train.methods import resolve
from ..train.unscored import unscored_manifest
from .config import NETWORK_FIELDS, TRAINING_SECTIONS, Given, RunConfig, preset_content, preset_record
from .effects import scored_settings, with_scored_network
from .provenance import (
    SourceOptions,
    absolute_source,
    described_modalities,
    open_encodable,
    open_source,
    origin_of,
    own_record,
    saw_test_labels,
)
from .run import Run

log = logging.getLogger("mmaudit")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedSource:
    """The samples of a training, and what metrics.json states of them.

    between: the two modalities, "first:second", whose discrepancy defines the subsets. quarantined: samples of data
    without scores that cannot be used; those of a manifest are in the run. modalities: of data without scores, by which
    their media settings have an effect.
    """

    examples: Examples
    manifest: Manifest | ManifestFile
    between: str
    made_from: dict[str, Any]
    saw_test_labels: bool = False
    quarantined: Sequence[Quarantined] = ()
    modalities: tuple[Modality, ...] = ()

    @property
    def digest(self) -> str:
        """Digest of the samples."""
        return self.manifest.digest()


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedSource:
    """A dataset and its encoded shards, as manifests made from it are joined with."""

    dataset: Dataset
    tasks: list[EncodeTask]


@dataclass(frozen=True, slots=True, kw_only=True)
class ManifestSource:
    """A manifest of a run, or a manifest file."""

    path: Path
    manifest: Manifest | ManifestFile
    run_dir: Run
    options: SourceOptions

    @classmethod
    def open(cls, path: Path, run_dir: Run, options: SourceOptions) -> ManifestSource:
        """Open the manifest; its rows and its data are read by `load`."""
        return cls(path=path, manifest=ManifestFile.open(path), run_dir=run_dir, options=options)

    @property
    def name(self) -> str | None:
        """Name of the manifest."""
        return self.path.stem

    def media_settings(self) -> dict[str, Any]:
        """Return how the samples are read, as sections `data` and `media`: as when they were scored."""
        scores = self.manifest.provenance.get("scores", {})
        encoders = [f"{entry['name']}={entry['encoder']}" for entry in scores.get("modalities", [])]
        return {"data": {"encoder": encoders}, "media": scores.get("config", {}).get("media", {})}

    def scored_settings(self) -> dict[str, Any]:
        """Return the config of the scores as plain values, {} if it is not recorded."""
        return scored_settings(self.manifest.provenance)

    def task(self, config: RunConfig) -> str:
        """Return the task of the scores."""
        return str(self.scored_settings().get("data", {}).get("task", "classification"))

    def with_network(self, config: RunConfig, given: Given) -> RunConfig:
        """Return the config with the networks' width and normalisation of the scores, where none is given."""
        return with_scored_network(config, given, self.scored_settings())

    def digest(self, config: RunConfig, *, num_workers: int, progress: Progress) -> str:
        """Return the digest of the samples, without opening the data."""
        return self.manifest.digest()

    def load(self, config: RunConfig, *, num_workers: int, progress: Progress, only_test: bool = False) -> LoadedSource:
        """Open the manifest's source, encode what the run's cache lacks, and load the training and test samples.

        Media that are unchanged since the run cached their vectors, by path, size and times, are not opened.
        only_test: Load the test samples alone.
        """
        source = self.read(config, num_workers=num_workers, progress=progress)
        return self.join(source, config, only_test=only_test)

    def read(self, config: RunConfig, *, num_workers: int, progress: Progress) -> EncodedSource:
        """Open the manifest's source and encode what the run's cache lacks."""
        origin = origin_of(self.path, self.manifest.provenance, self.manifest.digests)
        dataset, scored_config = open_source(origin, self.options)
        dataset = with_backbone_inputs(dataset, config.finetune.end_to_end)
        tasks = encode_dataset(
            dataset,
            self.run_dir.features,
            media=scored_config.media,
            num_workers=num_workers,
            progress=progress,
            # Others could have planted vectors in the cache.
            trust_unchanged=own_record(self.run_dir.folder)[0] is not None,
        )
        return EncodedSource(dataset=dataset, tasks=tasks)

    def join(self, source: EncodedSource, config: RunConfig, *, only_test: bool = False) -> LoadedSource:
        """Load the training and test samples of the manifest from its source."""
        dropped = read_dropped_batches(self.path, self.manifest, columns=DROPPED_ROWS)
        if dropped is None:
            log.info(
                "no dropped rows of %s found: test metrics are on the manifest's own test samples only", self.path.name
            )
        examples = load_examples(
            self.manifest,
            dropped,
            dataset=source.dataset,
            tasks=source.tasks,
            validation_fraction=config.finetune.validation_fraction,
            seed=config.seed,
            only_test=only_test,
        )
        provenance = self.manifest.provenance
        return LoadedSource(
            examples=examples,
            manifest=self.manifest,
            between=str(provenance.get("between", ":".join(examples.modalities[:2]))),
            made_from=provenance,
            saw_test_labels=saw_test_labels(self.manifest),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class UnscoredSource:
    """Data without scores: all usable samples are trained and tested on."""

    data: str | Path
    run_dir: Run
    device: str

    @property
    def name(self) -> None:
        """None: there is no manifest."""
        return

    def media_settings(self) -> dict[str, Any]:
        """Return {}: the samples are read by the training's own settings."""
        return {}

    def scored_settings(self) -> dict[str, Any]:
        """Return {}: there are no scores."""
        return {}

    def task(self, config: RunConfig) -> str:
        """Return the task by the settings."""
        return config.data.task

    def digest(self, config: RunConfig, *, num_workers: int, progress: Progress) -> str:
        """Return the digest of the samples, which reads them all."""
        return self.load(config, num_workers=num_workers, progress=progress).digest

    def load(self, config: RunConfig, *, num_workers: int, progress: Progress, only_test: bool = False) -> LoadedSource:
        """Open the data, encode what the run's cache lacks, and load all usable samples, or the test samples alone."""
        dataset = open_encodable(self.data, config.data)
        trained = with_backbone_inputs(dataset, config.finetune.end_to_end)
        tasks = encode_dataset(
            trained,
            self.run_dir.features,
            media=config.media,
            num_workers=num_workers,
            device=self.device,
            progress=progress,
        )
        encoded = read_encoded(trained, tasks, seed=config.seed, test_fraction=config.data.test_fraction)
        num_rows, origin = len(encoded.samples), fingerprint(encoded)
        if dataset.columns.split is None:
            log.info("no split column: %d of %d samples are held out as test", encoded.samples.is_test.sum(), num_rows)
        manifest, quarantined = unscored_manifest(encoded, keep_duplicates=config.data.keep_duplicates)
        del encoded
        num_quarantined = pc.count_distinct(quarantined.table["sample_id"]).as_py()
        if num_quarantined:
            log.warning("%d of %d samples cannot be used: see quarantine.parquet", num_quarantined, num_rows)
        examples = load_examples(
            manifest,
            None,
            dataset=trained,
            tasks=tasks,
            validation_fraction=config.finetune.validation_fraction,
            seed=config.seed,
            only_test=only_test,
        )
        made_from = {
            "source": absolute_source(dataset.source),
            "fingerprint": origin,
            "modalities": described_modalities(dataset, config),
            "columns": asdict(dataset.columns),
            "counts": {"input": num_rows, "used": len(manifest), "quarantined": num_quarantined},
            "quarantine": dict(Counter(row.reason.value for row in quarantined).most_common()),
        }
        return LoadedSource(
            examples=examples,
            manifest=manifest,
            between=":".join(examples.modalities[:2]),
            made_from=made_from,
            quarantined=quarantined,
            modalities=dataset.modalities,
        )


def reopened_config(
    config: RunConfig, made_from: dict[str, Any], options: SourceOptions, *, name: str
) -> tuple[str | Path, RunConfig]:
    """Return the data of a fine-tuning without a manifest and the config that reads them, to test it again.

    A file of the run may be another user's: the data, and encoders that are code or models, must be passed. Raises
    RunError where one is not.
    """
    confirmed = dict(text.partition("=")[::2] for text in options.encoder)
    recorded = {entry["name"]: entry["encoder"] for entry in made_from.get("modalities", [])}
    needed = [
        f"--encoder {printable(modality)}={printable(encoder)}"
        for modality, encoder in recorded.items()
        if encoder not in ENCODERS and confirmed.get(modality) != encoder
    ]
    if options.data is None:
        needed.insert(0, f"--data {printable(made_from.get('source', 'DATA'))}")
    if needed:
        raise RunError(f"{name} was trained on data without a manifest: pass {' '.join(needed)}")
    if config.data.reader not in ("auto", *READERS):
        raise RunError(f"{name} names the reader {printable(config.data.reader)} of a package: train it again")
    assert options.data is not None
    return options.data, replace(config, data=replace(config.data, allow_outside=options.allow_outside))


def training_settings(config: RunConfig, source: ManifestSource | UnscoredSource) -> dict[str, Any]:
    """Return the settings that a fine-tuning depends on, as plain values by section.

    Those of reading the samples are left out of a manifest's: its metadata state them.
    """
    reading = () if source.name is not None else ("data", "media")
    network = {name: getattr(config.network, name) for name in NETWORK_FIELDS}
    return {**{name: plain(config)[name] for name in ("seed", *TRAINING_SECTIONS, *reading)}, "network": network}


def record_preset(name: str, config: RunConfig, source: ManifestSource | UnscoredSource) -> dict[str, Any]:
    """Return the record of a preset in metrics.json; warn of media settings in which a manifest's scores differ."""
    own = resolve_methods(build_config(RunConfig, preset_content(name), where=""))
    used = {**training_settings(config, source), **source.media_settings(), "seed": own.seed}
    of_preset = training_settings(own, source)
    if source.name is not None:
        of_preset |= {"data": {"encoder": list(own.data.encoder)}, "media": plain(own.media)}
    record = preset_record(name, decisive_settings(of_preset), decisive_settings(used))
    differing = [key for key in record["changed"] if key.startswith(("media.", "data.encoder"))]
    if source.name is not None and differing:
        log.warning(
            "%s was scored with other settings than those of --preset %s, which have no effect here: %s; score with "
            "mmaudit score --preset %s",
            source.name,
            name,
            ", ".join(differing),
            name,
        )
    return record


def resolve_methods(config: RunConfig) -> RunConfig:
    """Return the config with the names and all constants of the methods in use."""
    resolved = resolve(config.training()).config
    return replace(config, **{name: getattr(resolved, name) for name in ("finetune", "sampling", "balancing")})


def decisive_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Remove settings that have no effect on the weights: trackers, checkpoints, resident memory."""
    without_effect = ("report_to", "save_steps", "resident_mib", "read_ahead_mib", "gradient_checkpointing")
    finetune_settings = {key: value for key, value in settings.get("finetune", {}).items() if key not in without_effect}
    return {**settings, "finetune": finetune_settings}
