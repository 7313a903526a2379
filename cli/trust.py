"""Signatures of runs and manifests that this user made on this machine.

Metadata are trusted to name data to open and code to run only if run.json has this user's signature for its folder, and
the manifest has one for its path, rows and metadata.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audit.errors import ManifestError, RunError, printable
from ..audit.hashing import file_digest, is_signed, sign
from ..audit.storage import read_json, write_json
from ..rebalance.checks import provenance_section
from ..rebalance.manifest import Digests, read_stated_digests
from ..rebalance.recipe import balance_path

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


def signed_record(record: dict[str, Any], *, folder: Path, scores: Path) -> dict[str, Any]:
    """Return run.json with this user's signature for the folder and the score table in it."""
    signature = {"folder": str(folder.resolve()), "scores": file_digest(scores)}
    code = sign(_record_content(record, signature))
    return record if code is None else {**record, "signature": {**signature, "hmac": code}}


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
    table = run / "scores.parquet"
    if record is not None and (scores is None or scores.resolve() != table.resolve()):
        record, doubt = None, "it was not made from the scores of its run"
    if record is not None and file_digest(table) != record["signature"]["scores"]:
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
    elif record is not None and (signature["run"], scores) != (record["signature"]["hmac"], scores_section(record)):
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
    return {"signed": "run", **content, "folder": signature.get("folder"), "scores": signature.get("scores")}


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
