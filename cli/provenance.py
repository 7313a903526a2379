"""Provenance of runs and manifests: signatures, metadata, and opening of their source data.

Metadata are trusted to name data to open and code to run only if run.json has this user's signature for its folder, and
the manifest has one for its path, rows and metadata.
"""

from __future__ import annotations

import logging
import platform
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..audit.errors import ConfigError, ManifestError, MmauditError, RunError, choices, printable
from ..audit.hashing import digest, file_digest, is_signed, sign
from ..audit.parsing import build_config, provenance_section
from ..audit.remote.paths import is_url, source_path
from ..audit.scores.table import RANGES, SCHEMA_VERSION
from ..audit.storage import read_json, write_json
from ..rebalance.manifest import Digests, Manifest, ManifestFile, balance_path, read_stated_digests
from .config import RunConfig, without_none
from .run import RUN_SCHEMA, Run

if TYPE_CHECKING:
    from ..audit.dataset.dataset import DataConfig, Dataset
    from ..audit.engine.merging import Audit
    from ..audit.scores.mixture import Mixture

# What opens data or encodes is imported inside functions: a split needs signatures only, and no memory for torch.
log = logging.getLogger("mmaudit")

_SCORE_KEYS = ("version", "fingerprint", "config", "modalities", "columns")  # of run.json, repeated in manifests
_SIGNED_KEYS = (*_SCORE_KEYS, "source", "code", "seed")
_MAX_TEXT = 200  # characters of a path in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Origin of a manifest.

    Args:
        path: the manifest.
        scores: section `scores` of its metadata.
        record: run.json, if this user made that run, and the manifest from its scores, on this machine; else None.
        doubt: why `record` is None; "" if it is not.
        source: name of the data at scoring, for messages only.
        is_own: whether this user made the manifest on this machine, from any scores.
        changed: "rows", "metadata" or both, if they differ from those that this user signed; else "".
    """

    path: Path
    scores: dict[str, Any]
    record: dict[str, Any] | None
    doubt: str
    source: str | None
    is_own: bool
    changed: str


def scores_section(record: dict[str, Any]) -> dict[str, Any]:
    """Return the keys of run.json that its score table and manifests repeat: no paths, no times."""
    return {key: record.get(key) for key in _SCORE_KEYS}


def signed_record(
    record: dict[str, Any], *, folder: Path, scores: Path, earlier: Sequence[dict[str, str]] = ()
) -> dict[str, Any]:
    """Return run.json with this user's signature for the folder and the score table in it.

    earlier: Signature (`hmac`), `fingerprint` and `version` of the records before rows were appended.
    """
    signature: dict[str, Any] = {"folder": str(folder.resolve()), "scores": scores_digest(scores)}
    signature |= {"earlier": list(earlier)} if earlier else {}
    code = sign(_record_content(record, signature))
    return record if code is None else {**record, "signature": {**signature, "hmac": code}}


def scores_digest(path: Path) -> str:
    """Return the digest of a score table: of its file, or over those of its parts."""
    if not path.is_dir():
        return file_digest(path)
    return digest(*(f"{file.name} {file_digest(file)}".encode() for file in sorted(path.glob("*.parquet"))))


def own_record(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Read run.json if this user wrote it on this machine, in this folder; else return None and the reason."""
    file = folder / "run.json"
    if not file.is_file():
        return None, "it is not in a run that you scored"
    try:
        record = read_json(file, error=RunError)
    except RunError as error:
        return None, str(error)
    signature = provenance_section(record, "signature")
    if not is_signed(_record_content(record, signature), signature.get("hmac")):
        return None, f"{file} was not signed by you on this machine, or has changed"
    if signature["folder"] != str(folder.resolve()):
        return None, f"the run was copied or moved from {printable(signature['folder'])[:_MAX_TEXT]}"
    return record, ""


def sign_manifest(staged: Path, path: Path, *, run: Path, scores: Path | None) -> None:
    """Sign a manifest that `split` made, in NAME.balance.json.

    Only a manifest made from the table that run.json is signed with is bound to that run.json.

    Args:
        staged: the manifest as written.
        path: its final path, which is signed.
        run: the run folder.
        scores: the file it was made from, if any.
    """
    record, doubt = own_record(run)
    table = Run(run).score_source
    if record is not None and (scores is None or scores.resolve() != table.resolve()):
        record, doubt = None, "it was not made from the scores of its run"
    if record is not None and scores_digest(table) != record["signature"]["scores"]:
        record, doubt = None, f"{table} is not the score table that the run was signed with"
    digests = read_stated_digests(staged)
    signature = {
        "rows": digests["digest"],
        "metadata": digests["metadata"],
        "run": None if record is None else record["signature"]["hmac"],
    }
    code = sign(_manifest_content(path, signature))
    if record is None:
        log.info("%s: commands that open its data will require --data, since %s", path, doubt)
    balance_numbers = read_json(balance_path(staged), error=ManifestError)
    source = {} if record is None else {"source": record["source"]}
    signed = {} if code is None else {"signature": {**signature, "hmac": code}}
    write_json({**balance_numbers, **source, **signed}, balance_path(staged))


def origin_of(path: Path, provenance: dict[str, Any], digests: Digests) -> Origin:
    """Return the origin of a manifest, given its metadata and the digests of its current content."""
    balance_numbers = _balance_numbers(path)
    signature, scores, folder = (
        provenance_section(balance_numbers, "signature"),
        provenance_section(provenance, "scores"),
        trusted_folder(path),
    )
    signed = is_signed(_manifest_content(path, signature), signature.get("hmac"))
    pairs = (("rows", digests.rows), ("metadata", digests.metadata))
    changed = " and ".join(name for name, digest in pairs if signed and digest != signature[name])
    record, doubt = own_record(folder)
    if record is not None and not signed:
        doubt = "it was not signed by you on this machine"
    elif record is not None and changed:
        doubt = f"its {changed} changed since it was made"
    elif record is not None and not _is_of_run(signature["run"], scores, record):
        doubt = "it was not made from the scores of its run"
    source = balance_numbers.get("source", _source_of(folder))
    return Origin(
        path=path,
        scores=scores,
        record=None if doubt else record,
        doubt=doubt,
        source=printable(source)[:_MAX_TEXT] if isinstance(source, str) else None,
        is_own=signed and not changed,
        changed=changed,
    )


def trusted_folder(path: Path) -> Path:
    """Return the folder within which a manifest's metadata may name files: its run's, or its own outside a run."""
    folder = path.resolve().parent
    return folder.parent if folder.name == "manifests" and (folder.parent / "run.json").is_file() else folder


def _record_content(record: dict[str, Any], signature: dict[str, Any]) -> dict[str, Any]:
    content = {key: record.get(key) for key in _SIGNED_KEYS}
    signed: dict[str, Any] = {key: signature[key] for key in ("folder", "scores", "earlier") if key in signature}
    return {"signed": "run", **content, "folder": None, "scores": None, **signed}


def earlier_records(record: dict[str, Any]) -> list[dict[str, str]]:
    """Return the signatures of a record that this user signed, and of those before rows were appended to the run."""
    own = {"hmac": record["signature"]["hmac"], "fingerprint": record["fingerprint"], "version": record["version"]}
    return [*record["signature"].get("earlier", []), own]


def _is_of_run(run: Any, scores: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether a manifest's signed run and scores are those of a record, or of the run before rows were appended."""
    return any(
        run == entry["hmac"]
        and scores == {**scores_section(record), "fingerprint": entry["fingerprint"], "version": entry["version"]}
        for entry in earlier_records(record)
    )


def _manifest_content(path: Path, signature: dict[str, Any]) -> dict[str, Any]:
    digests = {key: signature.get(key) for key in ("rows", "metadata", "run")}
    return {"signed": "manifest", "path": str(path.resolve()), **digests}


def _balance_numbers(path: Path) -> dict[str, Any]:
    """Read NAME.balance.json of a manifest; {} if missing or unreadable."""
    try:
        return read_json(balance_path(path), error=ManifestError)
    except ManifestError:
        return {}


def _source_of(folder: Path) -> Any:
    try:
        return read_json(folder / "run.json", error=RunError).get("source")
    except RunError:
        return None


_LIBRARIES = ("numpy", "scipy", "torch", "scikit-learn", "pyarrow", "av", "pillow")  # those that results depend on


def check_config(run_dir: Run, record: dict[str, Any], dataset: Dataset, config: RunConfig) -> None:
    """Raise RunError if the run was made with another config; the message names the first key that differs."""
    differing = [
        f"{section}.{key} is {record['config'][section].get(key)!r} in the run and {value!r} now"
        for section, content in config.scoring_config().items()
        if isinstance(content, dict)
        for key, value in content.items()
        if record["config"][section].get(key) != value
    ]
    if record["modalities"] != (modalities := described_modalities(dataset, config)):
        differing.append(f"the modalities are {_names(record['modalities'])} in the run and {_names(modalities)} now")
    if record["config"]["seed"] != config.seed:
        differing.insert(0, f"seed is {record['config']['seed']} in the run and {config.seed} now")
    if differing:
        raise RunError(
            f"{run_dir.folder} is a run of another config: {differing[0]}; pass another --run, or --overwrite"
        )


def record_of(dataset: Dataset, audit: Audit, config: RunConfig, *, seconds: dict[str, float]) -> dict[str, Any]:
    """Return the content of run.json."""
    from ..audit.features.encoders import encoder_location

    num_quarantined = len({row.sample_id for row in audit.quarantined})
    return {
        "schema": RUN_SCHEMA,
        "version": __version__,
        "versions": {"python": platform.python_version()} | {name: version(name) for name in _LIBRARIES},
        "source": absolute_source(dataset.source),
        "fingerprint": audit.fingerprint,
        "seed": config.seed,
        "config": config.scoring_config(),
        "modalities": described_modalities(dataset, config),
        "columns": asdict(dataset.columns),
        "code": {modality.encoder: encoder_location(modality.encoder) for modality in dataset.modalities},
        "counts": {"input": dataset.num_rows, "scored": audit.num_scored, "quarantined": num_quarantined},
        "quarantine": dict(Counter(row.reason.value for row in audit.quarantined).most_common()),
        "num_classes": audit.num_classes,
        "num_groups": audit.num_groups,
        "num_folds": audit.num_folds,
        "probe_report": audit.probe_report.to_json(),
        "gap_verdict": _verdict(audit.mixture),
        "class_check": audit.class_check.to_json(),
        "label_leaks": [asdict(leak) for leak in audit.label_leaks],
        "margin_check": audit.margin_check.to_json(),
        "balanced_side": audit.balanced_side,
        "halves": None if audit.halves is None else audit.halves.to_json(),
        "bisections": None if audit.bisections is None else audit.bisections.to_json(),
        "seconds": seconds,
    }


def score_provenance(record: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of the score table: the part of run.json without paths or values that differ between runs."""
    ranges = {name: {"range": span, "meaning": meaning} for name, (span, meaning) in RANGES.items()}
    return {"schema": f"mmaudit.scores/{SCHEMA_VERSION}", **scores_section(record), "ranges": ranges}


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceOptions:
    """What the user passes to open a manifest's source.

    A manifest that this user made on this machine needs none of it; any other needs all that it would open or run.

    Args:
        data: the data, in place of the source in the metadata.
        encoder: encoders that may be imported or loaded, as MODALITY=NAME.
        allow_outside: whether media paths may lead outside the data folder.
    """

    data: str | Path | None = None
    encoder: Sequence[str] = ()
    allow_outside: bool = False


def open_encodable(data: str | Path, config: DataConfig, *, lengths: Mapping[str, int] | None = None) -> Dataset:
    """Open a dataset, and check that the encoder of each modality exists and reads the modality's kind.

    lengths: see open_dataset.
    """
    from ..audit.dataset.dataset import open_dataset
    from ..audit.features.encoders import check_encoder

    dataset = open_dataset(data, config, lengths=lengths)
    for modality in dataset.modalities:
        check_encoder(modality)
    return dataset


def open_source(origin: Origin, options: SourceOptions, *, encoders: bool = True) -> tuple[Dataset, RunConfig]:
    """Open the data a manifest was made from, read as at scoring, and return them with the config of that score.

    With `encoders=False` no encoder is looked up, and nothing is imported. Raises ManifestError for a manifest that
    this user did not make on this machine, unless the data, and the encoders that are code or models, are passed.
    """
    scores = origin.scores
    if "modalities" not in scores or "config" not in scores:
        raise ManifestError(
            f"{origin.path} does not record how its data were read, so its scores are not mmaudit's; "
            "score the data with mmaudit score, and split that run"
        )
    config, scored_config = source_config(origin, options, encoders=encoders)
    source = options.data if options.data is not None or origin.record is None else origin.record["source"]
    try:
        return open_encodable(str(source), config), scored_config
    except MmauditError as error:
        mend = "" if options.data is not None else "; if it moved, pass --data"
        raise ManifestError(f"the manifest's source cannot be opened: {error}{mend}") from error


def source_config(origin: Origin, options: SourceOptions, *, encoders: bool = True) -> tuple[DataConfig, RunConfig]:
    """Return how data are read as at scoring, and the config of that score; raise ManifestError as open_source does."""
    modalities = _scored_modalities(origin)
    scored_config = build_config(RunConfig, without_none(provenance_section(origin.scores, "config")), where="")
    encoder_names = _scored_encoders(origin, options) if encoders else {}
    _check_named(origin, options, encoder_names)
    _check_reader(origin, scored_config.data.reader)
    config = replace(
        scored_config.data,
        modality=tuple(f"{entry['name']}={entry['column']}:{entry['kind']}" for entry in modalities),
        encoder=tuple(f"{name}={encoder}" for name, encoder in encoder_names.items()),
        allow_outside=options.allow_outside or (origin.record is not None and scored_config.data.allow_outside),
    )
    return config, scored_config


def _scored_modalities(origin: Origin) -> list[dict[str, str]]:
    """Return the name, column, kind and encoder of each modality in a manifest's metadata."""
    keys = ("name", "column", "kind", "encoder")
    entries = origin.scores["modalities"]
    if isinstance(entries, list) and all(isinstance(entry, dict) for entry in entries):
        modalities = [{key: entry.get(key) for key in keys} for entry in entries]
        if all(isinstance(value, str) for entry in modalities for value in entry.values()):
            return modalities
    raise ManifestError(f"{origin.path}: its metadata hold no valid modalities: split the run again")


def _check_named(origin: Origin, options: SourceOptions, encoders: dict[str, str]) -> None:
    """Raise ManifestError if the data, or encoders that are code or models, must be passed by the user and are not."""
    scored = _scored_modalities(origin)
    confirmed = _named_encoders(options)
    doubts = {m["name"]: _doubt(m["encoder"], origin) for m in scored if encoders and m["name"] not in confirmed}
    refused = [f"--encoder {printable(f'{name}={encoders[name]}')}" for name, doubt in doubts.items() if doubt]
    unnamed = [f"--data {origin.source or 'DATA'}"] if options.data is None and origin.record is None else []
    if not unnamed and not refused:
        return
    doubt = origin.doubt or next(filter(None, doubts.values()))
    source = f"its source was {origin.source}: " if unnamed and origin.source else ""
    trust = ", if you trust what it names" if refused else ""
    raise ManifestError(
        f"{origin.path} is not trusted to name data or code, since {doubt}; "
        f"{source}pass {' '.join(unnamed + refused)}{trust}"
    )


def _check_reader(origin: Origin, reader: str) -> None:
    """Raise ManifestError if metadata that are not this user's name the reader of an installed package."""
    from ..audit.dataset.formats import READERS

    if origin.record is None and reader not in ("auto", *READERS):
        raise ManifestError(
            f"{origin.path} is not trusted to name the reader {printable(reader)} of an installed package, since "
            f"{origin.doubt}: score the data again, and split that run"
        )


def _named_encoders(options: SourceOptions) -> dict[str, str]:
    """Return the encoders that the user passed, by modality."""
    return dict(text.partition("=")[::2] for text in options.encoder)


def _scored_encoders(origin: Origin, options: SourceOptions) -> dict[str, str]:
    """Return the encoders of the score by modality; raise ConfigError if the user passed other ones."""
    scored = {entry["name"]: entry["encoder"] for entry in _scored_modalities(origin)}
    for modality, encoder in _named_encoders(options).items():
        if modality not in scored:
            raise ConfigError(f"--encoder {modality}={encoder}: no modality {modality!r}; {choices(modality, scored)}")
        if encoder != scored[modality]:
            raise ConfigError(
                f"--encoder {modality}={encoder}: the samples were scored with {printable(scored[modality])}: "
                "pass that encoder, or score the data again"
            )
    return scored


def _doubt(encoder: str, origin: Origin) -> str:
    """Return why an encoder that is code or a model must be passed by the user; "" if it need not be."""
    from ..audit.features.encoders import ENCODERS, encoder_location

    if encoder in ENCODERS:
        return ""
    if origin.record is None:
        return origin.doubt
    scored_location, current_location = origin.record["code"].get(encoder), encoder_location(encoder)
    if scored_location == current_location:
        return ""
    return f"{encoder} was {scored_location} when the run was scored and is {current_location} now"


def saw_test_labels(manifest: Manifest | ManifestFile) -> bool:
    """Return whether the probes behind a manifest's scores were fitted on test samples too."""
    config = manifest.provenance.get("scores", {}).get("config", {})
    return bool(config.get("probe", {}).get("learn_from") != "train")


def described_modalities(dataset: Dataset, config: RunConfig) -> list[dict[str, Any]]:
    """Return the modalities with the fingerprints of their preprocessing, as run.json has them."""
    from ..audit.features.encoders import preprocessing

    return [{**asdict(item), "preprocessing": preprocessing(item, config.media)} for item in dataset.modalities]


def _names(modalities: list[dict[str, Any]]) -> str:
    """Format modalities as for --modality, each with the start of the fingerprint of its preprocessing."""
    return ", ".join(f"{m['name']}={m['column']}:{m['kind']} ({m['preprocessing'][:6]})" for m in modalities)


def _verdict(mixture: Mixture) -> str:
    if mixture.bimodal:
        return "two or more modes; p_balanced is the posterior of the mixture"
    return f"not bimodal ({'; '.join(mixture.reasons)}); p_balanced is the rule gap <= {mixture.threshold:g}"


def absolute_source(source: str) -> str:
    """Return the absolute path of a source on disk; the name of a Hugging Face dataset is returned unchanged."""
    from ..audit.dataset.formats.saved import looks_like_hub_name

    if is_url(source) and not source.startswith("file://"):
        return source
    source = str(source_path(source))
    on_disk = Path(source).exists() or not looks_like_hub_name(source)
    return str(Path(source).absolute()) if on_disk else source
