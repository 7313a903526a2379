"""Where does a pretrained model lie, here or on the hub, and which version of it?"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from ..errors import ConfigError
from ..hashing import digest

_FILES = ("*.json", "*.txt", "*.model", "*.safetensors")  # no pickled weights, no code


def find_folder(name: str, *, whole: bool) -> Path:
    """Give a model's folder: one that is named, or that of a name on the hub, with `@revision` if there is one.

    From the hub come its config alone, or all of it if `whole`. Raises ConfigError for what cannot be had.
    """
    folder = local_folder(name)
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise ConfigError(f"folder {name} holds no config.json: it is no model of transformers")
        return folder
    return _hub_folder(name, whole)


def local_folder(name: str) -> Path | None:
    """Return the folder that a name stands for; None where there is none, as for a name on the hub."""
    folder = Path(name).expanduser()
    return folder if folder.is_dir() else None


@lru_cache(maxsize=16)
def _hub_folder(name: str, whole: bool) -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    model, _, revision = name.partition("@")
    try:
        if whole:
            return Path(snapshot_download(model, revision=revision or None, allow_patterns=list(_FILES)))
        return Path(hf_hub_download(model, "config.json", revision=revision or None)).parent
    except (OSError, ValueError) as error:  # theirs are of these two kinds
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"no folder {name!r} here, and no such model from the hub: {words}") from error


def folder_version(folder: Path) -> str:
    """Fingerprint a model: by its commit on the hub, else by the content of its folder, wherever that lies."""
    return folder.name if folder.parent.name == "snapshots" else _folder_digest(_stamps(folder))


def _stamps(folder: Path) -> tuple[tuple[str, int, int], ...]:
    files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".txt", ".model", ".safetensors"))
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@lru_cache(maxsize=16)
def _folder_digest(stamps: tuple[tuple[str, int, int], ...]) -> str:
    """Digest the content of these files, again only when one has changed: 350 MB of weights take half a second."""
    return digest(*(part for name, _, _ in stamps for part in (Path(name).name.encode(), Path(name).read_bytes())))
