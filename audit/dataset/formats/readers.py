"""Choice of the reader by the format of the source."""

from __future__ import annotations

import glob
from pathlib import Path

from ...errors import DatasetError
from .folders import find_split_tables, plan_layout, plan_split_tables
from .saved import is_saved, looks_like_hub_name, plan_hub, plan_saved
from .tables import METADATA_NAMES, Plan, find_parquets, find_tables, plan_tables, splits_of
from .tars import find_tars, plan_tars


def plan_source(data: str, *, shard_rows: int, allow_outside: bool) -> Plan:
    """Plan the rows of a folder, a file, a glob, or a dataset of the hub; DatasetError if it is none of these."""
    path = Path(data)
    if path.is_dir():
        return _plan_folder(path, shard_rows=shard_rows, allow_outside=allow_outside)
    if tars := find_tars(data):
        return plan_tars(tars, shard_rows=shard_rows)
    if not path.exists() and not glob.has_magic(data) and looks_like_hub_name(data):
        return plan_hub(data, shard_rows=shard_rows)
    root, paths = find_tables(data)
    return plan_tables(root, paths, shard_rows=shard_rows)


def _plan_folder(folder: Path, *, shard_rows: int, allow_outside: bool) -> Plan:
    if is_saved(folder):
        return plan_saved(folder, shard_rows=shard_rows)
    if any((folder / name).is_file() for name in METADATA_NAMES):
        root, paths = find_tables(str(folder))
        return plan_tables(root, paths, shard_rows=shard_rows)
    if parts := find_split_tables(folder):
        return plan_split_tables(folder, parts, shard_rows=shard_rows)
    if tars := find_tars(str(folder)):
        return plan_tars(tars, shard_rows=shard_rows)
    if parquets := find_parquets(folder):
        return plan_tables(folder, parquets, shard_rows=shard_rows, splits=splits_of(parquets))
    plan = plan_layout(folder, shard_rows=shard_rows, allow_outside=allow_outside)
    if plan is None:
        find_tables(str(folder))  # raises an error that lists what a folder may contain
        raise DatasetError(f"{folder} has no readable files")
    return plan
