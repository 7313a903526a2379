"""Tests of the command line: bad input gives a one-line error with a remedy and an exit code, and no partial files."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from mmaudit.audit.dataset.dataset import DataConfig
from mmaudit.audit.errors import ConfigError
from mmaudit.cli.demo import KeypadConfig, write_keypad
from mmaudit.cli.main import app

pytestmark = pytest.mark.usefixtures("quick_scores")

QUICK = ["--repeats", "1", "--num-workers", "0", "--set", "probe.folds=2"]


def mmaudit(*words: str | Path) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def output_of(result: Result) -> str:
    """Return the printed text as one line, without wrapping."""
    return re.sub(r"[\s│]+", " ", result.output)


@pytest.fixture(scope="module")
def keypad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_keypad(tmp_path_factory.mktemp("keypad"), config=KeypadConfig(num_samples=80), seed=0)


@pytest.fixture(scope="module")
def scored(keypad: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a balanced manifest; read-only."""
    run = tmp_path_factory.mktemp("scored") / "run"
    assert mmaudit("score", keypad, "--run", run, *QUICK).exit_code == 0
    assert mmaudit("split", "--balanced", "--tolerance", "0.2", "--run", run).exit_code == 0
    return run


@pytest.fixture
def data(keypad: Path, tmp_path: Path) -> Path:
    """A writable copy of the dataset."""
    return Path(shutil.copytree(keypad, tmp_path / "data"))


def edit_metadata(data: Path, *, drop: str | None = None, rows: dict[int, dict[str, str]] | None = None) -> None:
    with (data / "metadata.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    for index, change in (rows or {}).items():
        table[index].update(change)
    names = [name for name in table[0] if name != drop]
    with (data / "metadata.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(table)


def write_features(path: Path, *, num_rows: int = 60, bad: dict[int, list[float]] | None = None) -> Path:
    rng = np.random.default_rng(0)
    label = np.arange(num_rows) % 3
    vectors = [(rng.standard_normal(4) + label[row]).tolist() for row in range(num_rows)]
    for row, vector in (bad or {}).items():
        vectors[row] = vector
    columns = {
        "id": pa.array([f"s{row}" for row in range(num_rows)]),
        "label": pa.array(label),
        "sound": pa.array(vectors, pa.list_(pa.float32())),
        "sight": pa.array([rng.standard_normal(3).tolist() for _ in range(num_rows)], pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["score", "nowhere"], "no such folder or file: nowhere"),
        (["score", "DATA", "--label", "lable"], "--label lable: no such column; did you mean label?"),
        (["score", "DATA", "--group", "speaker"], "--group speaker: no such column"),
        (
            ["score", "DATA", "--modality", "a=audio_file_nam"],
            "no column 'audio_file_nam'; did you mean audio_file",
        ),
        (["score", "DATA", "--modality", "a=audio_file_name:sond"], "no kind 'sond'"),
        (["score", "DATA", "--modality", "audio_file_name"], "not of the form NAME=COLUMN[:KIND]"),
        (["score", "DATA", "--modality", "audio=audio_file_name"], "only one modality, audio=audio_file_name:audio"),
        (["score", "DATA", "--set", "probe.fold=3"], "no config key probe.fold; did you mean probe.folds?"),
        (["score", "DATA", "--set", "probe.folds=1"], "probe.folds is 1; it must be at least 2"),
        (["score", "DATA", "--config", "absent.toml"], "config file not found: absent.toml"),
        (["score", "DATA", "--learn-from", "trian"], "probe.learn_from is 'trian'; did you mean train?"),
        (["score", "DATA", "--device", "gpu"], "--device gpu: not available; use auto, cpu"),
        (["split", "--balanced", "--run", "nowhere"], "nowhere holds no finished run; create one with: mmaudit score"),
        (["split", "--run", "SCORED"], "exactly one of --balanced, --subset, --dominated and --gmm"),
        (["split", "--run", "SCORED", "--subset", "audio-prefered"], "did you mean audio-preferred?"),
        (["split", "--run", "SCORED", "--dominated", "image"], "not of the form MODALITY:T"),
        (["split", "--run", "SCORED", "--gmm", "balancd"], "did you mean balanced?"),
        (
            ["split", "--run", "SCORED", "--balanced", "--between", "audio:imag"],
            "no modality 'imag'; did you mean",
        ),
        (
            ["split", "--run", "SCORED", "--balanced", "--size", "100000"],
            "--size: requested 100000 samples, available 80",
        ),
        (
            ["split", "--run", "SCORED", "--balanced", "--tolerance", "2"],
            "split.tolerance is 2.0; it must lie in [0, 1]",
        ),
        (
            ["split", "--run", "SCORED", "--balanced", "--scores", "absent.parquet"],
            "score table absent.parquet not found",
        ),
        (["finetune", "--run", "SCORED", "--manifest", "balancd"], "no manifest balancd; did you mean balanced?"),
        (["finetune", "--run", "SCORED", "--manifest", "balanced", "--sampling", "bssh"], "did you mean bss-h?"),
        (
            ["finetune", "--run", "SCORED", "--manifest", "balanced", "--keep-posterior", "2"],
            "finetune.keep_posterior is 2.0; it must lie in [0, 1]",
        ),
        (["report", "--run", "nowhere"], "nowhere holds no finished run"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(words: list[str], line: str, keypad: Path, scored: Path) -> None:
    before = sorted(path for path in scored.rglob("*"))
    result = mmaudit(*(str(keypad) if word == "DATA" else str(scored) if word == "SCORED" else word for word in words))
    assert result.exit_code == 2
    assert line in output_of(result)
    assert "Traceback" not in result.output
    assert sorted(path for path in scored.rglob("*")) == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["scor"], "Did you mean 'score'?"),
        (["score", "x", "--grop", "y"], "No such option: --grop"),
        (["split", "--balancd"], "--balanced"),
        (["score"], "pass the data to score, or files of vectors with labels"),
        (["evaluate"], "Missing argument"),
    ],
)
def test_unknown_command_or_option_suggests_the_nearest(words: list[str], line: str) -> None:
    result = mmaudit(*words)
    assert result.exit_code == 2
    assert line in output_of(result)


def test_missing_label_column_is_refused(data: Path, tmp_path: Path) -> None:
    edit_metadata(data, drop="label")
    result = mmaudit("score", data, "--run", tmp_path / "run")
    assert result.exit_code == 2
    assert "no label column among id, audio_file_name, image_file_name" in output_of(result)
    assert not (tmp_path / "run").exists()


def test_duplicate_ids_are_refused(data: Path, tmp_path: Path) -> None:
    with (data / "metadata.csv").open(newline="") as file:
        first = next(csv.DictReader(file))["id"]
    edit_metadata(data, rows={1: {"id": first}})
    result = mmaudit("score", data, "--run", tmp_path / "run")
    assert result.exit_code == 2
    assert f"1 ids are repeated in id ({first})" in output_of(result)
    assert not (tmp_path / "run" / "run.json").exists()


def test_damaged_media_are_quarantined_with_their_reason(data: Path, tmp_path: Path) -> None:
    with (data / "metadata.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    sounds = [data / row["audio_file_name"] for row in rows]
    images = [data / row["image_file_name"] for row in rows]
    sounds[0].unlink()
    sounds[1].write_bytes(sounds[1].read_bytes()[: sounds[1].stat().st_size // 2])
    sounds[2].write_bytes(b"")
    header = sounds[3].read_bytes()[:44]
    sounds[3].write_bytes(header + bytes(sounds[3].stat().st_size - 44))
    images[4].write_bytes(b"no picture")
    images[5].write_bytes(images[5].read_bytes()[:-40])
    edit_metadata(data, rows={6: {"label": "seen once"}, 7: {"image_file_name": ""}, 8: {"label": ""}})
    run = tmp_path / "run"
    result = mmaudit("score", data, "--run", run, *QUICK, "--json")
    assert result.exit_code == 0
    counts = json.loads(result.stdout)["counts"]
    assert counts["input"] == 80 == counts["scored"] + counts["quarantined"]
    quarantine = pq.read_table(run / "quarantine.parquet").to_pylist()
    reasons = {row["sample_id"]: (row["modality"], row["reason"]) for row in quarantine}
    expected = [
        ("audio", "missing"),
        ("audio", "truncated"),
        ("audio", "empty"),
        ("audio", "silent"),
        ("image", "corrupt"),
        ("image", "truncated"),
        (None, "rare-class"),
        ("image", "missing"),
        (None, "no-label"),
    ]
    assert reasons == dict(zip((row["id"] for row in rows), expected, strict=False))
    assert counts["quarantined"] == len(expected)
    assert all(row["detail"] for row in quarantine)


def test_bad_vectors_are_quarantined_with_their_reason(tmp_path: Path) -> None:
    data = write_features(tmp_path / "set.parquet", bad={3: [1.0, float("nan"), 0.0, 0.0], 7: [1.0, 2.0]})
    run = tmp_path / "run"
    assert mmaudit("score", data, "--run", run, *QUICK).exit_code == 0
    reasons = {row["sample_id"]: row["reason"] for row in pq.read_table(run / "quarantine.parquet").to_pylist()}
    assert reasons == {"s3": "not-finite", "s7": "wrong-length"}
    assert len(pq.read_table(run / "scores.parquet")) == 58


def test_finished_run_is_not_rewritten(keypad: Path, scored: Path) -> None:
    stamp = (scored / "scores.parquet").stat().st_mtime_ns
    result = mmaudit("score", keypad, "--run", scored, *QUICK)
    assert result.exit_code == 0
    assert (scored / "scores.parquet").stat().st_mtime_ns == stamp


def test_run_of_another_config_is_refused(keypad: Path, scored: Path) -> None:
    result = mmaudit("score", keypad, "--run", scored, *QUICK, "--seed", "7")
    assert result.exit_code == 2
    assert "seed is 0 in the run and 7 now; pass another --run, or --overwrite" in output_of(result)
    result = mmaudit("score", keypad, "--run", scored, *QUICK, "--set", "data.keep_duplicates=true")
    assert result.exit_code == 2
    assert "data.keep_duplicates is False in the run and True now; pass another --run" in output_of(result)


def test_run_of_other_data_requires_overwrite(data: Path, scored: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(scored, tmp_path / "run"))
    edit_metadata(data, rows={0: {"label": "9"}, 1: {"label": "9"}})
    result = mmaudit("score", data, "--run", run, *QUICK)
    assert result.exit_code == 2
    assert "was made from other data" in output_of(result)
    assert mmaudit("score", data, "--run", run, *QUICK, "--overwrite").exit_code == 0
    assert not (run / "manifests").exists()  # manifests of the old scores are removed


def test_folder_with_other_files_is_refused_as_run(keypad: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    result = mmaudit("score", keypad, "--run", tmp_path, *QUICK)
    assert result.exit_code == 2
    assert "holds thesis.tex and is not a run" in output_of(result)


def test_changed_source_is_refused(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert mmaudit("score", data, "--run", run, *QUICK).exit_code == 0
    assert mmaudit("split", "--balanced", "--tolerance", "0.2", "--run", run).exit_code == 0
    files = pq.read_table(run / "manifests" / "balanced.parquet")["audio_file_name"].to_pylist()
    shutil.copy(data / files[1], data / files[0])
    result = mmaudit("finetune", "--manifest", "balanced", "--run", run, "--epochs", "1")
    assert result.exit_code == 2
    assert "have changed their content since the manifest was made" in output_of(result)
    shutil.move(data, tmp_path / "moved")
    missing = mmaudit("finetune", "--manifest", "balanced", "--run", run, "--epochs", "1")
    assert missing.exit_code == 2
    assert "no such folder or file" in output_of(missing)
    assert "pass --data" in output_of(missing)
    assert not (run / "finetune").exists()


def test_moved_data_are_opened_with_data_option(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert mmaudit("score", data, "--run", run, *QUICK).exit_code == 0
    assert mmaudit("split", "--balanced", "--tolerance", "0.2", "--run", run).exit_code == 0
    moved = shutil.move(data, tmp_path / "moved")
    options = ["--manifest", "balanced", "--run", str(run), "--data", str(moved)]
    result = mmaudit("finetune", *options, "--epochs", "2", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["test"]["all"]["n"] > 0


def test_score_table_of_another_tool_can_be_split(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    table = {
        "sample_id": [f"s{row}" for row in range(200)],
        "label": rng.integers(0, 4, 200).tolist(),
        "confidence_text": rng.random(200, dtype=np.float32),
        "confidence_image": rng.random(200, dtype=np.float32),
    }
    pq.write_table(pa.table(table), tmp_path / "theirs.parquet")
    scores, run = tmp_path / "theirs.parquet", tmp_path / "run"
    result = mmaudit("split", "--balanced", "--scores", scores, "--run", run, "--json")
    assert result.exit_code == 0
    summary = json.loads(result.stdout)
    assert summary["kept"] + summary["dropped"] == 200
    assert summary["after"]["distance"] <= 0.05


def test_split_prints_number_of_kept_samples(scored: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(scored, tmp_path / "run"))
    path = run / "manifests" / "balanced.parquet"
    before = path.read_bytes()
    refused = mmaudit("split", "--balanced", "--run", run)
    assert refused.exit_code == 2
    assert f"{path} exists: pass another --name, or --overwrite" in output_of(refused)
    assert path.read_bytes() == before
    assert mmaudit("split", "--balanced", "--run", run, "--dry-run").exit_code == 0
    result = mmaudit("split", "--balanced", "--run", run, "--overwrite")
    num_kept = len(pq.read_table(run / "manifests" / "balanced.parquet"))
    assert f"balanced: kept {num_kept} of 80 samples (audio:image)" in output_of(result)
    assert "samples kept by tolerance 0: " in output_of(result)


def test_paths_of_tables_in_several_folders_start_from_their_folder(keypad: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        table = pa.table({"id": [f"{name}{row}" for row in range(4)], "label": [0, 1, 0, 1]})
        for column, end in (("sound_file_name", "wav"), ("sight_file_name", "png")):
            table = table.append_column(column, pa.array([f"{row}.{end}" for row in range(4)]))
        pq.write_table(table, tmp_path / name / "metadata.parquet")
    result = mmaudit("score", tmp_path / "*" / "metadata.parquet", "--run", tmp_path / "run")
    assert result.exit_code == 2
    assert "no sample has a usable sound; the first: missing, no file a/0.wav" in output_of(result)


@pytest.mark.parametrize("name", ["fused", "chance", "rest", "all"])
def test_reserved_modality_names_are_refused(keypad: Path, tmp_path: Path, name: str) -> None:
    words = ["--modality", f"{name}=audio_file_name", "--modality", "image=image_file_name"]
    result = mmaudit("score", keypad, "--run", tmp_path / "run", *words)
    assert result.exit_code == 2
    assert f"a modality is called '{name}'" in output_of(result)


def test_short_captions_are_scored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    label = np.arange(200) % 4
    words = np.array(["red", "green", "blue", "black"])
    captions = np.where(rng.random(200) < 0.8, words[label], rng.choice(words, 200))
    table = {
        "id": [f"s{row}" for row in range(200)],
        "label": label,
        "caption": [f"a {word} ball on grass" for word in captions],
        "sight": pa.array((rng.standard_normal((200, 3)) + label[:, None]).tolist(), pa.list_(pa.float32())),
    }
    pq.write_table(pa.table(table), tmp_path / "captions.parquet")
    result = mmaudit("score", tmp_path / "captions.parquet", "--run", tmp_path / "run", *QUICK, "--json")
    assert result.exit_code == 0
    probe_metrics = json.loads(result.stdout)["probe_report"]["probe_metrics"]
    assert next(probe["value"] for probe in probe_metrics if probe["name"] == "caption") > 0.7


def test_failed_overwrite_keeps_the_old_run(data: Path, scored: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(scored, tmp_path / "run"))
    with (data / "metadata.csv").open(newline="") as file:
        size = len(list(csv.DictReader(file)))
    edit_metadata(data, rows={row: {"label": f"alone {row}"} for row in range(size)})
    assert mmaudit("score", data, "--run", run, *QUICK, "--overwrite").exit_code == 2
    assert (run / "scores.parquet").read_bytes() == (scored / "scores.parquet").read_bytes()
    assert (run / "manifests" / "balanced.parquet").exists()


def test_finetune_refuses_changed_labels(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert mmaudit("score", data, "--run", run, *QUICK).exit_code == 0
    assert mmaudit("split", "--balanced", "--tolerance", "0.2", "--run", run).exit_code == 0
    ids = pq.read_table(run / "manifests" / "balanced.parquet")["sample_id"].to_pylist()
    with (data / "metadata.csv").open(newline="") as file:
        rows = {row["id"]: number for number, row in enumerate(csv.DictReader(file))}
    edit_metadata(data, rows={rows[ids[0]]: {"label": "9"}, rows[ids[1]]: {"label": "8"}})
    result = mmaudit("finetune", "--manifest", "balanced", "--run", run, "--epochs", "1")
    assert result.exit_code == 2
    assert "have changed their label since the manifest was made" in output_of(result)


def write_table(path: Path, **columns: list[object]) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def drawn(n: int, *, seed: int) -> list[object]:
    return list(np.random.default_rng(seed).standard_normal((n, 9)).tolist())


def test_random_split_of_actors_fails_the_leakage_gate(tmp_path: Path) -> None:
    """A split like CREMA-D's common list: clips of 91 actors assigned to train and test at random."""
    rng = np.random.default_rng(0)
    actors = rng.permutation(np.repeat(np.arange(1001, 1092), 30))
    n = len(actors)
    table = write_table(
        tmp_path / "list.parquet",
        id=[f"{actor}_{row:05d}" for row, actor in enumerate(actors)],
        label=[row % 6 for row in range(n)],
        actor=actors.tolist(),
        recording=rng.integers(0, 91, n).tolist(),
        split=["test" if row % 4 == 0 else "train" for row in range(n)],
        audio=(rng.standard_normal((n, 9)) + rng.standard_normal((91, 9))[actors - 1001]).tolist(),
        visual=drawn(n, seed=2),
    )
    result = mmaudit("check", table, "--run", tmp_path / "run")
    assert result.exit_code == 3
    assert "column 'recording': 91 of 91 test values also in train" in output_of(result)
    assert "91 of 91 test actors also in train" in output_of(result)
    summary = json.loads(mmaudit("check", table, "--run", tmp_path / "run", "--json").stdout)
    assert [finding["what"] for finding in summary["leakage"]["findings"]] == ["groups"]


def test_check_passes_clean_splits_and_prints_unusable_samples(tmp_path: Path) -> None:
    audio = drawn(60, seed=1)
    audio[7] = None
    table = write_table(
        tmp_path / "clean.parquet",
        id=[f"s{row}" for row in range(60)],
        label=[row % 3 for row in range(60)],
        actor=[row % 20 for row in range(60)],
        split=["test" if row % 20 < 5 else "train" for row in range(60)],
        audio=audio,
        visual=drawn(60, seed=2),
    )
    result = mmaudit("check", table, "--run", tmp_path / "run")
    assert result.exit_code == 0
    assert "59 of 60 samples are usable" in output_of(result)
    assert "unusable: 1 x missing, audio: s7 (audio is null)" in output_of(result)
    assert "no leaks found" in output_of(result)


def test_ingest_writes_metadata_and_prints_missing_clips(tmp_path: Path) -> None:
    for folder, ending in (("AudioWAV", "wav"), ("VideoFlash", "flv")):
        (tmp_path / folder).mkdir()
        for actor in (1001, 1002):
            (tmp_path / folder / f"{actor}_DFA_ANG_XX.{ending}").write_bytes(b"something")
    (tmp_path / "VideoFlash" / "1002_DFA_ANG_XX.flv").unlink()
    result = mmaudit("ingest", "cremad", tmp_path)
    assert result.exit_code == 0
    assert "you have 1 of 7,442" in output_of(result)
    assert pq.read_table(tmp_path / "metadata.parquet")["id"].to_pylist() == ["1001_DFA_ANG_XX", "1002_DFA_ANG_XX"]
    misspelt = mmaudit("ingest", "cremda", tmp_path)
    assert misspelt.exit_code == 2
    assert "did you mean cremad?" in output_of(misspelt)


def test_all_stages_accept_a_missing_modality(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    columns: dict[str, list[object]] = {"id": [f"s{row:03d}" for row in range(90)], "label": [r % 3 for r in range(90)]}
    for name in ("a", "b", "c"):
        clear = (2 * np.eye(3)[np.arange(90) % 3] + rng.standard_normal((90, 3))).tolist()
        columns[name] = [None if name == "a" and row % 5 == 0 else clear[row] for row in range(90)]
    run = tmp_path / "run"
    result = mmaudit("score", write_table(tmp_path / "d.parquet", **columns), "--run", run, *QUICK)
    assert result.exit_code == 0
    assert "scored 90 of 90 samples" in output_of(result)
    scores = pq.read_table(run / "scores.parquet")
    assert scores["confidence_a"].null_count == 18
    assert scores["gap"].null_count == 0
    split = mmaudit("split", "--balanced", "--between", "a:b", "--tolerance", "0.4", "--run", run)
    assert split.exit_code == 0
    dropped = pq.read_table(run / "manifests" / "balanced.dropped.parquet")
    assert dropped["reason"].to_pylist().count("missing-modality") == 18
    gmm = mmaudit("split", "--subset", "balanced:0.9", "--between", "b:c", "--name", "all", "--run", run)
    assert gmm.exit_code == 0
    trained = mmaudit("finetune", "--manifest", "all", "--epochs", "2", "--run", run, "--num-workers", "0")
    assert trained.exit_code == 0


@pytest.mark.parametrize(
    ("words", "mend"),
    [
        (["--task", "regresion"], "did you mean regression?"),
        (["--encoder", "image=resnet19"], "did you mean resnet18?"),
        (["--encoder", "sight=resnet18"], "no modality 'sight'"),
        (["--encoder", "image"], "not of the form MODALITY=ENCODER"),
        (["--set", "probe.kind=mpl"], "did you mean mlp?"),
    ],
)
def test_unknown_choices_suggest_the_nearest(keypad: Path, tmp_path: Path, words: list[str], mend: str) -> None:
    result = mmaudit("score", keypad, "--run", tmp_path / "run", *words, *QUICK)
    assert result.exit_code == 2
    assert mend in output_of(result)


def test_check_and_score_share_data_options(keypad: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Options override settings; options that are not passed do not change them."""
    configs: list[DataConfig] = []

    def stop(data: str, config: DataConfig) -> None:
        configs.append(config)
        raise ConfigError("stopped")

    values = {"task": "multilabel", "label": "y", "id": "name", "group": "who", "split": "none"}
    options_of_values = [word for name, value in values.items() for word in (f"--{name}", value)]
    lists = ["--modality", "a=x", "--modality", "b=z", "--encoder", "a=resnet18", "--allow-outside"]
    settings = ["--set", "data.label='l'", "--set", "data.encoder=['b=resnet18']", "--set", "data.allow_outside=true"]
    for name, module in (("check", "checking"), ("score", "scoring")):
        monkeypatch.setattr(f"mmaudit.cli.{module}.open_encodable", stop)
        for options in (["--set", "data.label='l'", *options_of_values, *lists], settings, []):
            assert output_of(mmaudit(name, keypad, *options)).strip() == "error: stopped"
    checked, scored = configs[:3], configs[3:]
    assert checked == scored
    first, second, third = checked
    assert {name: getattr(first, name) for name in values} == values
    assert (first.modality, first.encoder, first.allow_outside) == (("a=x", "b=z"), ("a=resnet18",), True)
    assert second == replace(third, label="l", encoder=("b=resnet18",), allow_outside=True)
    assert third == DataConfig()
