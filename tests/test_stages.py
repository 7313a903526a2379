"""Tests of the stages of scoring: parts, arrays of processes and interrupted runs give the bytes of one process."""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from clusters import submit, write_commands
from conftest import gaussian_table
from in_memory import Scored, score_in_memory

import mmaudit
from mmaudit.audit.dataset.dataset import DataConfig, Dataset, open_dataset
from mmaudit.audit.engine import stages
from mmaudit.audit.engine.fitting import NetworkSettings
from mmaudit.audit.engine.plan import PartsConfig
from mmaudit.audit.errors import ConfigError, RunError
from mmaudit.audit.media.files import MediaConfig
from mmaudit.audit.probes.config import NetworkConfig, ProbeConfig
from mmaudit.cli import run as run_module
from mmaudit.cli import scoring, staging
from mmaudit.cli.config import RunConfig
from mmaudit.cli.run import Run
from mmaudit.cli.scoring import score
from mmaudit.cli.splitting import split

QUICK = ProbeConfig(folds=2, repeats=1, l2_penalties=(1e-2,), control=False)
CONFIG = replace(RunConfig(), probe=QUICK, parts=PartsConfig(rows=20))
N = 120


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "planted.parquet"
    pq.write_table(gaussian_table(num_samples=N), path, row_group_size=15)
    return path


write_report = scoring._write_report


pytestmark = pytest.mark.usefixtures("no_reports")


@pytest.fixture(scope="module")
def local(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in eight parts by one process; read-only."""
    run = tmp_path_factory.mktemp("local") / "run"
    score(data, run=run, config=CONFIG, num_workers=0)
    return run


def files(folder: Path) -> dict[str, bytes]:
    """Return the content of all files but the feature cache, run.json, which has times, and the report."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    contents = {str(path.relative_to(folder)): path.read_bytes() for path in paths}
    left_out = ("features/", "run.json", "report.", "figures/")
    return {name: content for name, content in contents.items() if not name.startswith(left_out)}


def check_same(run: Path, expected: Path) -> None:
    assert files(run) == files(expected)
    records = [Run(folder).record() for folder in (run, expected)]
    for record in records:
        del record["seconds"], record["signature"]
    assert records[0] == records[1]


def run_stages(data: Path, run: Path, count: int) -> None:
    """Run all stages, the processes of a stage in reverse order."""
    for stage in staging.STAGES:
        shards = [f"{number}/{count}" for number in range(count, 0, -1)]
        for shard in shards if stage in staging.BY_PART else [None]:
            score(data, run=run, config=CONFIG, num_workers=0, stage=stage, shard=shard)


def test_parts_are_one_table(data: Path, local: Path, tmp_path: Path) -> None:
    score(data, run=tmp_path / "run", config=replace(CONFIG, parts=PartsConfig()), num_workers=0)
    whole, parts = Run(tmp_path / "run"), Run(local)
    assert whole.scores_file.exists()
    assert not parts.scores_file.exists()
    assert len(list((local / "scores").glob("part-*.parquet"))) == 8
    assert not parts.stages.exists()
    assert parts.scores().sample_id.tolist() == whole.scores().sample_id.tolist()
    for first, second in zip(parts.scores().to_arrow(), whole.scores().to_arrow(), strict=True):
        if pa.types.is_floating(first.type):
            np.testing.assert_allclose(first.to_numpy(), second.to_numpy(), atol=1e-6)
        else:
            assert first.equals(second)
    assert parts.mixture_file.read_bytes() == whole.mixture_file.read_bytes()
    assert parts.record()["counts"] == whole.record()["counts"]


@pytest.mark.slow
def test_later_commands_read_parts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "REPORT_ROWS", 50)
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "_write_report", write_report)
        result = score(data, run=tmp_path, config=CONFIG, num_workers=0)
    assert any("those of 50 of 120 samples" in text for text in result.warnings)
    manifest = split(run=tmp_path, config=CONFIG, subset="balanced:0.9", name="even").manifest
    kept = pq.read_table(manifest)["sample_id"].to_pylist()
    scores = result.scores
    assert sorted(kept) == sorted(scores.sample_id[scores.gap <= 0.9].tolist())
    assert mmaudit.verify("even", run=tmp_path).passed
    finished = mmaudit.finetune("even", run=tmp_path, config=CONFIG, num_workers=0, epochs=1)
    assert finished.folder.exists()


def test_report_of_parts_is_made_of_a_sample(local: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    all_ids = Run(local).scores().sample_id.tolist()
    assert Run(local).report_scores().sample_id.tolist() == all_ids
    monkeypatch.setattr(run_module, "REPORT_ROWS", 50)
    sample = Run(local).report_scores().sample_id.tolist()
    assert len(sample) == 50
    assert [name for name in all_ids if name in sample] == sample


def test_runs_in_parts_are_compared(local: Path) -> None:
    agreement = mmaudit.diff(local, local)
    assert isinstance(agreement, mmaudit.ScoreAgreement)
    assert f"{N}" in "\n".join(agreement.lines())


def test_arrays_give_the_bytes_of_one_process(data: Path, local: Path, tmp_path: Path) -> None:
    run_stages(data, tmp_path, 3)
    check_same(tmp_path, local)


@pytest.mark.slow
def test_row_tables_written_by_processes_give_the_same_bytes(
    data: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "PROCESS_ROWS", 0)
    score(data, run=tmp_path, config=CONFIG, num_workers=2)
    check_same(tmp_path, local)


def test_processes_that_write_row_tables_get_a_pickled_job(
    data: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The quick twin of the last test: a job is pickled with the work, and the parts by the number of workers."""
    used = []

    def run_pickled(work: Any, parts: Any, *, num_workers: int) -> Any:
        used.append(num_workers)
        return map(pickle.loads(pickle.dumps(work)), pickle.loads(pickle.dumps(parts)))

    monkeypatch.setattr(stages, "run_tasks", run_pickled)
    score(data, run=tmp_path, config=CONFIG, num_workers=2, stage="encode")
    monkeypatch.setattr(stages, "PROCESS_ROWS", N)
    score(data, run=tmp_path / "other", config=CONFIG, num_workers=2, stage="encode")
    assert used == [0, 0, 2, 2]
    assert files(tmp_path / "other" / "stages") == files(tmp_path / "stages")


@pytest.mark.parametrize("in_parts", [False, True])
def test_large_probes_are_not_kept(in_parts: bool, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether results are in memory or in files."""
    monkeypatch.setattr(staging, "_MAX_PROBE_BYTES", 1_000)
    config = CONFIG if in_parts else replace(CONFIG, parts=PartsConfig())
    score(data, run=tmp_path / "run", config=config, num_workers=0)
    assert not (tmp_path / "run" / "probes").exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 7])
def test_other_numbers_of_processes_do_too(count: int, data: Path, local: Path, tmp_path: Path) -> None:
    run_stages(data, tmp_path, count)
    check_same(tmp_path, local)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["slurm", "kubernetes"])
def test_scripts_of_a_plan_give_the_bytes_of_one_process(kind: str, data: Path, local: Path, tmp_path: Path) -> None:
    """Each task of an array is a process, the last one first; commands of the cluster are replaced."""
    settings = [f"probe.{name}={value}" for name, value in (("folds", 2), ("repeats", 1), ("control", "false"))]
    settings += ["probe.l2_penalties=[1e-2]", "parts.rows=20"]
    run = tmp_path / "run"
    plan = mmaudit.plan(
        data, run=run, slurm=kind == "slurm", kubernetes=kind == "kubernetes", tasks=3, settings=settings
    )
    assert (plan.num_parts, plan.num_tasks) == (8, 3)
    commands = write_commands(tmp_path / "bin", mmaudit=f'exec {sys.executable} -m mmaudit --quiet "$@"')
    done = submit(plan.script, commands, MMAUDIT_NUM_WORKERS="0")
    assert done.returncode == 0, done.stderr
    check_same(run, local)


def test_stages_in_the_wrong_order_are_refused(data: Path, tmp_path: Path) -> None:
    for stage, missing in (("fit", "encode"), ("score", "encode"), ("merge", "fit")):
        with pytest.raises(RunError, match=f"run the stage that writes it again, --stage {missing}"):
            score(data, run=tmp_path / stage, config=CONFIG, num_workers=0, stage=stage)
    with pytest.raises(ConfigError, match="did you mean score"):
        score(data, run=tmp_path / "run", stage="scores")
    with pytest.raises(ConfigError, match="run by shard, the others at once"):
        score(data, run=tmp_path / "run", stage="fit", shard="1/2")


def test_unfinished_run_of_another_config_is_refused(data: Path, tmp_path: Path) -> None:
    score(data, run=tmp_path, config=CONFIG, num_workers=0, stage="encode", shard="1/2")
    for changed in (replace(CONFIG, seed=1), replace(CONFIG, parts=PartsConfig(rows=30))):
        with pytest.raises(RunError, match="pass another folder with --run, or --overwrite"):
            score(data, run=tmp_path, config=changed, num_workers=0, stage="encode", shard="2/2")
    score(data, run=tmp_path, config=replace(CONFIG, seed=1), num_workers=0, overwrite=True)
    assert Run(tmp_path).record()["seed"] == 1


class Killed(BaseException):
    """A kill, after which no code runs."""


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("_score", 3),
        ("finish_part", 2),
        pytest.param("fit", 0, marks=pytest.mark.slow),
        pytest.param("merge", 0, marks=pytest.mark.slow),
    ],
)
def test_rerun_finishes_what_was_killed(
    name: str, after: int, data: Path, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, num_calls = getattr(stages, name), [0]

    def die(*values: Any, **options: Any) -> Any:
        num_calls[0] += 1
        if num_calls[0] > after:
            raise Killed
        return original(*values, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stages, name, die)
        with pytest.raises(Killed):
            score(data, run=tmp_path, config=CONFIG, num_workers=0)
    assert not Run(tmp_path).is_scored()
    assert not Run(tmp_path).score_source.exists()
    num_scored = len(list((tmp_path / "stages/scores").glob("*.arrow")))
    assert num_scored == {"_score": 3, "fit": 0}.get(name, 8)
    counted: list[int] = []
    with monkeypatch.context() as patch:
        scored = stages._score

        def count(*values: Any) -> Any:
            counted.append(1)
            return scored(*values)

        patch.setattr(stages, "_score", count)
        score(data, run=tmp_path, config=CONFIG, num_workers=0)
    assert len(counted) == 8 - num_scored
    check_same(tmp_path, local)


def test_damaged_part_is_scored_again(data: Path, local: Path, tmp_path: Path) -> None:
    for stage in ("encode", "fit", "score"):
        score(data, run=tmp_path, config=CONFIG, num_workers=0, stage=stage)
    os.truncate(tmp_path / "stages/scores/part-00001.arrow", 100)
    (tmp_path / "stages/measured/part-00002.json").unlink()
    with pytest.raises(RunError, match=r"part-00001\.arrow is missing or damaged"):
        score(data, run=tmp_path, config=CONFIG, num_workers=0, stage="merge")
    score(data, run=tmp_path, config=CONFIG, num_workers=0, stage="score", shard="2/2")
    score(data, run=tmp_path, config=CONFIG, num_workers=0)  # without a stage it finishes them
    check_same(tmp_path, local)


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A csv file of 60 rows that name .npy files, in six parts."""
    rng, n = np.random.default_rng(0), 60
    lines = ["id,label,a,b"]
    for row in range(n):
        for name in "ab":
            np.save(tmp_path / f"{name}{row}.npy", rng.standard_normal(9).astype(np.float32) + row % 2)
        lines.append(f"s{row},{row % 2},a{row}.npy,b{row}.npy")
    (tmp_path / "d.csv").write_text("\n".join(lines))
    return tmp_path / "d.csv"


MEDIA = replace(CONFIG, data=DataConfig(shard_rows=5), parts=PartsConfig(rows=10))


def score_media(data: Path, run: Path, *stages: str | None) -> None:
    for stage in stages or (None,):
        score(data, run=run, config=MEDIA, num_workers=0, stage=stage)


def replace_file(data: Path, row: int) -> None:
    np.save(data.parent / f"a{row}.npy", np.full(9, 3.0, np.float32))


def test_changed_media_are_encoded_again(media: Path, tmp_path: Path) -> None:
    score_media(media, tmp_path / "run", "encode")
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/stages/status").glob("*.arrow")}
    assert len(before) == 6
    replace_file(media, 20)
    with pytest.raises(RunError, match=r"part 2 have changed since they were encoded: run --stage encode again"):
        score_media(media, tmp_path / "run", "fit")
    score_media(media, tmp_path / "run", "encode")
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "run/stages/status").glob("*.arrow")}
    assert [name for name in sorted(after) if after[name] != before[name]] == ["part-00002.arrow"]
    (media.parent / "b50.npy").unlink()  # a run without stages notices it, too
    score_media(media, tmp_path / "run")
    score_media(media, tmp_path / "other")
    check_same(tmp_path / "run", tmp_path / "other")


def test_media_that_change_after_the_fit_are_refused(media: Path, tmp_path: Path) -> None:
    score_media(media, tmp_path / "run", "encode", "fit")
    status, content = (media.parent / "a20.npy").stat(), (media.parent / "a20.npy").read_bytes()
    for before, refused in (((), ("encode", "fit", "score", None)), (("score",), ("merge", None))):
        score_media(media, tmp_path / "run", *before or ("encode",))
        replace_file(media, 20)
        for stage in refused:
            with pytest.raises(RunError, match=r"rows 20 to 24 name has changed .* restore it, or pass --overwrite"):
                score_media(media, tmp_path / "run", stage)
        (media.parent / "a20.npy").write_bytes(content)
        os.utime(media.parent / "a20.npy", ns=(status.st_atime_ns, status.st_mtime_ns))


def test_media_that_change_between_stages_of_an_append_are_noticed(media: Path, tmp_path: Path) -> None:
    lines = media.read_text()
    media.write_text("\n".join(lines.splitlines()[:41]))
    score_media(media, tmp_path / "run")
    media.write_text(lines)
    append: dict[str, Any] = {"run": tmp_path / "run", "config": MEDIA, "num_workers": 0, "append": True}
    score(media, stage="encode", **append)
    replace_file(media, 50)
    with pytest.raises(RunError, match=r"part 5 have changed since they were encoded"):
        score(media, stage="fit", **append)
    score(media, stage="encode", **append)
    score(media, stage="fit", **append)
    replace_file(media, 51)
    for stage in ("encode", "score", "merge"):
        with pytest.raises(RunError, match=r"rows 50 to 54 name has changed"):
            score(media, stage=stage, **append)


def test_media_are_not_opened_to_compare_them(media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    score_media(media, tmp_path / "run", "encode")
    monkeypatch.setattr(Dataset, "load", None)
    score_media(media, tmp_path / "run", "encode", "fit", "score", "merge")


def in_memory(data: Path, folder: Path, *, part_rows: int, probe: ProbeConfig = QUICK) -> Scored:
    networks = NetworkSettings(config=NetworkConfig(), media=MediaConfig(), folder=folder / "networks")
    dataset = open_dataset(data, DataConfig(modality=("a=a", "b=b", "c=c")))
    return score_in_memory(dataset, features=folder, probe=probe, networks=networks, parts=PartsConfig(rows=part_rows))


def test_part_may_lack_a_modality_or_all_samples(tmp_path: Path) -> None:
    rng, n = np.random.default_rng(0), 80
    columns: dict[str, Any] = {"id": [f"s{row}" for row in range(n)], "label": [row % 2 for row in range(n)]}
    for name in ("a", "b", "c"):
        columns[name] = (rng.standard_normal((n, 3)) + np.eye(2, 3)[np.arange(n) % 2]).tolist()
    columns["c"][10:20] = [None] * 10  # the second part
    columns["label"][30:40] = [None] * 10  # the fourth
    pq.write_table(pa.table(columns), tmp_path / "d.parquet", row_group_size=10)
    parts = in_memory(tmp_path / "d.parquet", tmp_path / "f", part_rows=10)
    whole = in_memory(tmp_path / "d.parquet", tmp_path / "f", part_rows=100)
    assert len(parts.scores) == len(whole.scores) == 70
    assert parts.scores.sample_id.tolist() == whole.scores.sample_id.tolist()
    np.testing.assert_allclose(parts.scores.confidence, whole.scores.confidence, atol=1e-6)
    assert parts.quarantined == whole.quarantined
    assert parts.balanced_side == whole.balanced_side
