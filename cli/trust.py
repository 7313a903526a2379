"""Signatures of runs and manifests that this user made on this machine.

Metadata decide what is opened and what runs only where run.json carries this user's signature for the folder it lies
in, and the manifest carries one for its path, its rows and its metadata.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..audit.errors import ManifestError, RunError, printable
from ..audit.hashing import file_digest, is_signed, sign
from ..audit.storage import read_json, write_json
from ..rebalance.checks import section
from ..rebalance.manifest import Digests, rows_of
from ..rebalance.recipe import balance_path

log = logging.getLogger("mmaudit")

_OF_SCORES = ("version", "fingerprint", "config", "modalities", "columns")  # of run.json, repeated in every manifest
_SIGNED = (*_OF_SCORES, "source", "code", "seed")
_MOST_TEXT = 200  # characters of a path in a message


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Where a manifest comes from.

    scores: what its metadata say of the scores. record: run.json, if this user made that run, and the manifest from its
    scores, on this machine; otherwise None, and `doubt` says why. source: the data's name when they were scored, for
    messages alone. is_own: whether this user made the manifest on this machine, from whatever scores. changed: "rows"
    or "metadata", where they are not those that this user signed.
    """

    path: Path
    scores: dict[str, Any]
    record: dict[str, Any] | None
    doubt: str
    source: str | None
    is_own: bool
    changed: str


def scores_section(record: dict[str, Any]) -> dict[str, Any]:
    """Return what a score table, and every manifest made from it, repeats of run.json: no path, no time."""
    return {key: record.get(key) for key in _OF_SCORES}


def signed_record(record: dict[str, Any], *, folder: Path, scores: Path) -> dict[str, Any]:
    """Return run.json's content with this user's signature for the folder and for the score table written there."""
    signature = {"folder": str(folder.resolve()), "scores": file_digest(scores)}
    code = sign(_record_content(record, signature))
    return record if code is None else {**record, "signature": {**signature, "hmac": code}}


def own_record(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Read run.json if this user wrote it, on this machine, in this folder; None, and why not, otherwise."""
    file = folder / "run.json"
    if not file.is_file():
        return None, "it does not lie in a run that you scored"
    try:
        record = read_json(file, error=RunError)
    except RunError as error:
        return None, str(error)
    signature = section(record, "signature")
    if not is_signed(_record_content(record, signature), signature.get("hmac")):
        return None, f"{file} is not signed by you on this machine, or was changed"
    if signature["folder"] != str(folder.resolve()):
        return None, f"the run was copied or moved here from {printable(signature['folder'])[:_MOST_TEXT]}"
    return record, ""


def sign_manifest(staged: Path, path: Path, *, run: Path, scores: Path | None) -> None:
    """Sign a manifest that `split` has just made, in NAME.balance.json; `scores` is the file it was made from, if any.

    It is written in `staged`, and signed for `path`, where it comes to lie.

    Only one that was made from the very table that the run's record is signed with is bound to that record.
    """
    record, doubt = own_record(run)
    table = run / "scores.parquet"
    if record is not None and (scores is None or scores.resolve() != table.resolve()):
        record, doubt = None, "it was made from other scores than its run's"
    if record is not None and file_digest(table) != record["signature"]["scores"]:
        record, doubt = None, f"{table} is not the table that was scored"
    stated = rows_of(staged)
    signature = {
        "rows": stated["digest"],
        "metadata": stated["metadata"],
        "run": None if record is None else record["signature"]["hmac"],
    }
    code = sign(_manifest_content(path, signature))
    if record is None:
        log.info("%s: commands that open its data will need --data, since %s", path, doubt)
    numbers = read_json(balance_path(staged), error=ManifestError)
    source = {} if record is None else {"source": record["source"]}
    signed = {} if code is None else {"signature": {**signature, "hmac": code}}
    write_json({**numbers, **source, **signed}, balance_path(staged))


def origin_of(path: Path, provenance: dict[str, Any], digests: Digests) -> Origin:
    """Return where a manifest comes from, given its metadata and the digests of what it holds now."""
    numbers = _numbers_of(path)
    signature, scores, folder = section(numbers, "signature"), section(provenance, "scores"), home_of(path)
    signed = is_signed(_manifest_content(path, signature), signature.get("hmac"))
    pairs = (("rows", digests.rows), ("metadata", digests.metadata))
    changed = " and ".join(name for name, digest in pairs if signed and digest != signature[name])
    record, doubt = own_record(folder)
    if record is not None and not signed:
        doubt = "mmaudit split did not sign it as made by you, here"
    elif record is not None and changed:
        doubt = f"its {changed} changed since you made it"
    elif record is not None and (signature["run"], scores) != (record["signature"]["hmac"], scores_section(record)):
        doubt = "it was made from other scores than its run's"
    source = numbers.get("source", _source_of(folder))
    return Origin(
        path=path,
        scores=scores,
        record=None if doubt else record,
        doubt=doubt,
        source=printable(source)[:_MOST_TEXT] if isinstance(source, str) else None,
        is_own=signed and not changed,
        changed=changed,
    )


def home_of(path: Path) -> Path:
    """Return the folder that a manifest's own metadata may lead to: its run's, or that it lies in outside a run."""
    folder = path.resolve().parent
    return folder.parent if folder.name == "manifests" and (folder.parent / "run.json").is_file() else folder


def _record_content(record: dict[str, Any], signature: dict[str, Any]) -> dict[str, Any]:
    content = {key: record.get(key) for key in _SIGNED}
    return {"signed": "run", **content, "folder": signature.get("folder"), "scores": signature.get("scores")}


def _manifest_content(path: Path, signature: dict[str, Any]) -> dict[str, Any]:
    stated = {key: signature.get(key) for key in ("rows", "metadata", "run")}
    return {"signed": "manifest", "path": str(path.resolve()), **stated}


def _numbers_of(path: Path) -> dict[str, Any]:
    """Read the numbers beside a manifest, {} where there are none that can be read."""
    try:
        return read_json(balance_path(path), error=ManifestError)
    except ManifestError:
        return {}


def _source_of(folder: Path) -> Any:
    try:
        return read_json(folder / "run.json", error=RunError).get("source")
    except RunError:
        return None
