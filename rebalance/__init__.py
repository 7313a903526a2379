"""Subsets of a scored dataset, written as manifests; EXPORTERS are the other formats that a manifest is written in."""

from __future__ import annotations

from ..audit.registry import Entry, Registry

EXPORTERS = Registry(
    {
        "csv": Entry("export:Csv", "all columns as text, for spreadsheets and pandas"),
        "jsonl": Entry("export:JsonLines", "all columns, one JSON object per line"),
        "npy": Entry("export:SampleIds", "the sample ids in order, for numpy"),
        "ogm": Entry("export:OgmLists", "a folder of CLIP,LABEL lists by split, as the OGM-GE code reads them"),
        "webdataset": Entry("webdataset:WebDataset", "a folder of tar files by split, with the media"),
        "datasets": Entry("saved_dataset:SavedDataset", "a folder for datasets.load_from_disk"),
    },
    package=__name__,
    group="mmaudit.exporters",
    option="--format",
)
