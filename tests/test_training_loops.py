"""The guide to other training loops, run with the real libraries on small data."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from manifests import encode_manifest, make_manifest
from torch import nn
from torch.utils.data import DataLoader

import mmaudit

PAGE = Path(__file__).resolve().parents[1] / "docs" / "howto" / "training-loop.md"
SECTIONS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))
MANIFEST = make_manifest(300)
IDS = MANIFEST.strings("sample_id").tolist()
GROWING: dict[str, Any] = {"sampling": "bss-h", "settings": {"order.grow_epochs": 3}}

pytestmark = pytest.mark.filterwarnings("ignore")  # those of other libraries are theirs


@pytest.fixture(scope="module")
def folder(clip_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with mmaudit-run: a manifest of the clips, and their vectors."""
    folder = tmp_path_factory.mktemp("loops")
    run = folder / "mmaudit-run"
    manifest = encode_manifest(clip_source, run)
    (run / "manifests").mkdir()
    metadata = {b"mmaudit": json.dumps({"schema": "mmaudit.manifest/3", **manifest.provenance}).encode()}
    pq.write_table(manifest.table.replace_schema_metadata(metadata), run / "manifests" / "balanced.parquet")
    return folder


def run_section(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the code of a section in a folder."""
    code = "".join(re.findall(r"^```python\n(.*?)^```$", SECTIONS[title], re.MULTILINE | re.DOTALL))
    monkeypatch.chdir(folder)
    exec(compile(code, title, "exec"), {"__name__": "script"})


@pytest.mark.parametrize(
    "title",
    ["A plain loop", "torchdata", "accelerate", "transformers", "Lightning", "Balancing methods in your own loop"],
)
def test_the_guide_runs(title: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_section(title, folder, monkeypatch)


def test_the_guide_names_every_method() -> None:
    from mmaudit.train.balancing import BALANCERS

    section = SECTIONS["Balancing methods in your own loop"]
    assert not [name for name in BALANCERS if f"`{name}`" not in section]


class Rows(torch.utils.data.Dataset[dict[str, Any]]):
    """Rows that name their index."""

    def __len__(self) -> int:
        return len(IDS)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"x": torch.full((3,), float(index)), "labels": torch.tensor(index % 3), "index": index}


def open_loader(mode: str, **options: Any) -> Any:
    """Open a loader of a growing curriculum, by a sampler or by a batch sampler."""
    sampler = mmaudit.ManifestSampler(MANIFEST, ids=IDS, **GROWING)
    loader = options.pop("loader", DataLoader)
    if mode == "sampler":
        return loader(Rows(), batch_size=16, sampler=sampler, **options)
    return loader(Rows(), batch_sampler=mmaudit.ManifestBatchSampler(sampler, 16), **options)


def expected(num_epochs: int) -> list[list[int]]:
    sampler = mmaudit.ManifestSampler(MANIFEST, ids=IDS, **GROWING)
    return [sampler.order(epoch).tolist() for epoch in range(num_epochs)]


def indices(loader: Any) -> Iterator[int]:
    for batch in loader:
        yield from batch["index"].tolist()


@pytest.mark.parametrize("mode", ["sampler", "batch sampler"])
def test_accelerate_draws_the_epochs(mode: str) -> None:
    from accelerate import Accelerator

    loader = Accelerator(cpu=True).prepare(open_loader(mode))
    assert [list(indices(loader)) for _ in range(4)] == expected(4)


@pytest.mark.parametrize("mode", ["sampler", "batch sampler"])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_torchdata_resumes_exactly(mode: str, num_workers: int) -> None:
    from torchdata.stateful_dataloader import StatefulDataLoader

    loader = open_loader(mode, loader=StatefulDataLoader, num_workers=num_workers)
    batches = iter(loader)
    first = [index for _ in range(2) for index in next(batches)["index"].tolist()]
    state = loader.state_dict()
    resumed = open_loader(mode, loader=StatefulDataLoader, num_workers=num_workers)
    resumed.load_state_dict(state)
    assert [first + list(indices(resumed)), list(indices(resumed))] == expected(2)


@pytest.mark.parametrize("mode", ["sampler", "batch sampler"])
def test_lightning_draws_the_epochs(mode: str) -> None:
    import lightning

    epochs: dict[int, list[int]] = {}

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def training_step(self, batch: Any, index: int) -> Any:
            epochs.setdefault(self.current_epoch, []).extend(batch["index"].tolist())
            return self.layer(batch["x"]).sum()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    trainer = lightning.Trainer(
        max_epochs=3,
        reload_dataloaders_every_n_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    trainer.fit(Module(), open_loader(mode))
    assert [epochs[epoch] for epoch in range(3)] == expected(3)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # WebDataset leaves its files open
def test_webdataset_and_datasets_filter(tmp_path: Path) -> None:
    import datasets
    import webdataset

    keep = mmaudit.keep(MANIFEST, id_of=lambda sample: sample["json"]["sample_id"])
    with webdataset.TarWriter(str(tmp_path / "clips.tar")) as tar:
        for number, name in enumerate(IDS):
            tar.write({"__key__": f"k{number}", "json": json.dumps({"sample_id": name}).encode()})
    pipeline = webdataset.WebDataset(str(tmp_path / "clips.tar"), shardshuffle=False).decode().select(keep)
    assert {sample["json"]["sample_id"] for sample in pipeline} == keep.ids
    rows = datasets.Dataset(pa.table({"clip": IDS, "x": np.arange(len(IDS))}))
    assert set(rows.filter(mmaudit.keep(MANIFEST, id_of="clip"))["clip"]) == keep.ids
