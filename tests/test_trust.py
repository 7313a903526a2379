"""Tests of trust: data and code named only by an untrusted manifest are not opened or run; own runs need no option."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from mmaudit.audit.errors import RunError
from mmaudit.audit.features import encoders as functions
from mmaudit.audit.storage import PROVENANCE_KEY, read_json, write_json
from mmaudit.cli.main import app
from mmaudit.rebalance import EXPORTERS
from mmaudit.rebalance.manifest import (
    ROWS_KEY,
    balance_path,
    dropped_path,
    metadata_digest,
    read_provenance,
    read_stated_digests,
    table_digest,
)

pytestmark = pytest.mark.usefixtures("no_reports")

CANARY = "a private file of the user"
ENCODER = "import numpy as np\n\ndef mean(decoded, media):\n    return np.asarray(decoded, float).mean(axis=(0, 1))\n"
HOSTILE = "from pathlib import Path\nPath({mark!r}).write_text('ran')\n\ndef run(*_):\n    return [1.0, 2.0]\n"
QUICK = ("--num-workers", "0", "--device", "cpu")
SHORT = ("--repeats", "1", "--set", "probe.kind=linear", "--set", "probe.folds=2", "--set", "probe.gaussian=false")
TRAIN = (*QUICK, "--epochs", "1", "--set", "finetune.hidden=8")


def mmaudit(*words: str | Path) -> tuple[int, str]:
    """Run a command; return its exit code, and its printed text as one line."""
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, re.sub(r"[\s│]+", " ", result.output)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory, clip_source: Path) -> Path:
    """A user's folder: data, the user's own encoder, and a run with a manifest and a fine-tuning."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(clip_source, folder / "data")
    (folder / "encoder_of_trust.py").write_text(ENCODER)
    (folder / "canary.wav").write_text(CANARY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        words = ("--encoder", "image=encoder_of_trust:mean", "--id", "id", *SHORT)
        for command in (
            ("score", folder / "data", "--run", folder / "run", *words, *QUICK),
            ("split", "--subset", "most-balanced:100%", "--name", "all", "--run", folder / "run"),
            ("finetune", "-m", "all", "--run", folder / "run", "--name", "tuned", *TRAIN),
        ):
            assert mmaudit(*command)[0] == 0
    return folder


@pytest.fixture(autouse=True)
def in_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(home)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    assert not (home / "ran").exists()  # hostile code was run
    assert not [name for name in sys.modules if name.startswith("hostile")]


def rewrite(path: Path, change: Callable[[dict[str, Any]], None], rows: Callable[[pa.Table], pa.Table]) -> None:
    """Change a manifest's metadata and rows as an attacker would, with matching digests."""
    table, provenance = rows(pq.read_table(path)), read_provenance(path)
    change(provenance)
    metadata = {PROVENANCE_KEY: json.dumps(provenance, sort_keys=True).encode()}
    recorded = {
        **read_stated_digests(path),
        "digest": table_digest(table),
        "rows": len(table),
        "metadata": metadata_digest(metadata),
    }
    pq.write_table(table.replace_schema_metadata({**metadata, ROWS_KEY.encode(): json.dumps(recorded).encode()}), path)
    numbers = read_json(balance_path(path), error=RunError)
    write_json({**numbers, "digest": recorded["digest"]}, balance_path(path))
    table = pq.read_table(dropped_path(path))
    recorded = {"dropped_from": recorded["digest"], "digest": table_digest(table), "rows": len(table)}
    dropped_recorded = json.dumps({**recorded, "metadata": metadata_digest(metadata)})
    dropped_metadata = {**metadata, ROWS_KEY.encode(): dropped_recorded.encode()}
    pq.write_table(table.replace_schema_metadata(dropped_metadata), dropped_path(path))


def keep_metadata(provenance: dict[str, Any]) -> None:
    """Do not change the metadata."""


def name_encoder(encoder: str) -> Callable[[dict[str, Any]], None]:
    """Return a change of the metadata that names an encoder for the images and allows paths outside."""

    def change(provenance: dict[str, Any]) -> None:
        scores = provenance["scores"]
        scores["modalities"][1]["encoder"] = encoder
        scores["config"]["data"] |= {"encoder": [f"image={encoder}"], "allow_outside": True}
        scores["source"] = "/"
        provenance["recipe"]["scores"] = "../../../../../../../etc/passwd"

    return change


def point_sounds_to(path: str) -> Callable[[pa.Table], pa.Table]:
    """Return a change of the rows that sets every sound to this path."""

    def change(table: pa.Table) -> pa.Table:
        index = table.column_names.index("audio_file_name")
        return table.set_column(index, "audio_file_name", pa.array([path] * len(table)))

    return change


def foreign_manifest(home: Path, folder: Path, encoder: str, path: str) -> Path:
    """Write a hostile manifest into a folder, as received from another person."""
    folder.mkdir()
    for name in ("all.parquet", "all.dropped.parquet", "all.balance.json"):
        shutil.copy(home / "run" / "manifests" / name, folder / name)
    rewrite(folder / "all.parquet", name_encoder(encoder), point_sounds_to(path))
    return folder / "all.parquet"


def commands(manifest: Path, out: Path) -> list[list[str | Path]]:
    """Return every command that reads a manifest."""
    run: list[str | Path] = ["--run", out / "run"]
    exports: list[list[str | Path]] = [
        ["export", manifest, "--format", name, "--out", out / f"out.{name}", "--json", *run] for name in EXPORTERS
    ]
    return [
        ["verify", manifest, *run],
        ["finetune", "-m", manifest, *run, *TRAIN],
        ["evaluate", "tuned", "-m", manifest, "--run", "run", *QUICK],
        ["diff", manifest, "run/manifests/all.parquet", *run],
        ["card", manifest, *run],
        ["replay", manifest, *run],
        ["order", manifest, *run],
        *exports,
    ]


def files_with_canary(folder: Path) -> list[str]:
    """Return the files below a folder that contain the private text."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [str(path) for path in files if CANARY.encode() in path.read_bytes()]


def test_own_run_needs_no_further_options(home: Path, tmp_path: Path) -> None:
    done = {
        command[0]: mmaudit(*command)
        for command in (
            ("verify", "all", "--run", "run"),
            ("finetune", "-m", "all", "--run", "run", "--name", "again", *TRAIN),
            ("evaluate", "tuned", "--run", "run", *QUICK),
            ("replay", "all", "--run", "run"),
            ("report", "--run", "run", "--json"),
            ("export", "all", "--run", "run", "--format", "webdataset", "--out", tmp_path / "tars", "--json"),
        )
    }
    assert {name: code for name, (code, _) in done.items()} == dict.fromkeys(done, 0), done
    assert "passed signature: made by you on this machine" in done["verify"][1]
    assert list((tmp_path / "tars").glob("*.tar"))


def test_reading_commands_import_no_encoder(home: Path, tmp_path: Path) -> None:
    """Not even the user's own encoder; checked in a separate process."""
    program = f"""
import sys
from mmaudit.cli import manifests, splitting, verifying
assert verifying.verify("all", run="run").failed_gate == ""
manifests.diff("all", "all", run="run")
manifests.card("all", run="run")
assert splitting.replay("all", run="run").identical
manifests.export("all", run="run", format="webdataset", out={str(tmp_path / "tars")!r})
assert "encoder_of_trust" not in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=home, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("encoder", ["hostile_{}:run", "hf:/etc"])
def test_hostile_manifest_runs_and_opens_nothing(home: Path, tmp_path: Path, encoder: str) -> None:
    encoder = encoder.format(tmp_path.name)
    (home / f"{encoder.partition(':')[0]}.py").write_text(HOSTILE.format(mark=str(home / "ran")))
    manifest = foreign_manifest(home, tmp_path / "foreign", encoder, str(home / "canary.wav"))
    for command in commands(manifest, tmp_path):
        code, printed = mmaudit(*command)
        assert code in (0, 2, 3), printed
        assert CANARY not in printed
        if command[0] in ("verify", "finetune", "evaluate") or "webdataset" in command:
            assert code == 2
            assert "its source was" in printed
        with_data = (*command, "--data", home / "data")
        if command[0] in ("finetune", "evaluate"):
            code, printed = mmaudit(*with_data)
            assert code == 2
            assert f"pass --encoder image={encoder}, if you trust what it names" in printed
    assert mmaudit("verify", manifest, "--data", home / "data", "--run", tmp_path / "run")[0] == 0
    assert not files_with_canary(tmp_path)
    for path in home.glob("hostile*.py"):
        path.unlink()
    (home / "hf.py").unlink(missing_ok=True)


def test_hostile_manifest_imports_no_reader(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_reader-1.dist-info").mkdir()
    (tmp_path / "hostile_reader-1.dist-info" / "METADATA").write_text("Name: hostile-reader\nVersion: 1\n")
    entry_points = "[mmaudit.readers]\nhostile = hostile_reader:run\n"
    (tmp_path / "hostile_reader-1.dist-info" / "entry_points.txt").write_text(entry_points)
    (tmp_path / "hostile_reader.py").write_text(HOSTILE.format(mark=str(home / "ran")))
    monkeypatch.syspath_prepend(tmp_path)
    manifest = foreign_manifest(home, tmp_path / "foreign", "statistics", str(home / "canary.wav"))
    rewrite(
        manifest,
        lambda provenance: provenance["scores"]["config"]["data"].update(reader="hostile"),
        lambda table: table,
    )
    code, printed = mmaudit("verify", manifest, "--data", home / "data")
    assert code == 2
    assert "is not trusted to name the reader hostile of an installed package" in printed


def test_text_of_data_is_not_executed_by_a_function_in_metadata(home: Path, tmp_path: Path) -> None:
    """No code file is needed for an attack: cProfile.run executes its argument."""
    data = Path(shutil.copytree(home / "data", tmp_path / "data"))
    table = pa.csv.read_csv(data / "metadata.csv")
    text = f"open({str(home / 'ran')!r}, 'w')"
    pa.csv.write_csv(table.append_column("text", pa.array([text] * len(table))), data / "metadata.csv")
    manifest = foreign_manifest(home, tmp_path / "foreign", "cProfile:run", "0.wav")

    def reads_text(provenance: dict[str, Any]) -> None:
        provenance["scores"]["modalities"][1] |= {"name": "text", "column": "text", "kind": "text"}

    rewrite(manifest, reads_text, lambda rows: rows)
    words = (manifest, "--run", tmp_path / "run", "--data", data)
    code, printed = mmaudit("finetune", "-m", *words, *TRAIN)
    assert code == 2
    assert "pass --encoder text=cProfile:run, if you trust what it names" in printed
    assert mmaudit("verify", *words)[0] in (0, 3)
    assert mmaudit("export", *words, "--format", "webdataset", "--out", tmp_path / "tars", "--json")[0] == 0


@pytest.mark.parametrize("path", ["../canary.wav", "ABSOLUTE", "link.wav", "linked/canary.wav"])
def test_paths_outside_the_data_need_allow_outside(home: Path, tmp_path: Path, path: str) -> None:
    data = tmp_path / "data"
    shutil.copytree(home / "data", data)
    shutil.copy(home / "canary.wav", tmp_path / "canary.wav")
    (data / "link.wav").symlink_to(tmp_path / "canary.wav")
    (data / "linked").symlink_to(tmp_path)
    target = str(home / "canary.wav") if path == "ABSOLUTE" else path
    manifest = foreign_manifest(home, tmp_path / "foreign", "statistics", target)
    export = ("export", manifest, "--format", "webdataset", "--out", tmp_path / "tars", "--data", data, "--json")
    code, printed = mmaudit(*export)
    assert code == 2
    assert "leads outside" in printed
    assert "--allow-outside" in printed
    assert not (tmp_path / "tars").exists()
    assert mmaudit(*export, "--allow-outside")[0] == 0
    tars = list((tmp_path / "tars").glob("*.tar"))
    assert any(CANARY.encode() in path.read_bytes() for path in tars)


def untrusted_run(home: Path, folder: Path, how: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a run folder whose manifest this user did not make on this machine."""
    run = Path(shutil.copytree(home / "run", folder / "copied"))
    if how == "moved":
        run = run.rename(folder / "moved")
    elif how != "copied":
        run = Path(shutil.copytree(home / "run", home / "spoiled", dirs_exist_ok=True))
        if how == "another user":
            monkeypatch.setenv("XDG_STATE_HOME", str(folder / "of-another-user"))
        elif how == "no state folder":
            monkeypatch.setenv("XDG_STATE_HOME", str(home / "canary.wav"))
    return run


@pytest.mark.parametrize("how", ["copied", "moved", "another user", "no state folder"])
def test_untrusted_run_needs_data_and_encoder(
    home: Path, tmp_path: Path, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = untrusted_run(home, tmp_path, how, monkeypatch)
    hint = f"its source was {home / 'data'}: pass --data {home / 'data'}"
    for command in (
        ("verify", "all"),
        ("export", "all", "--format", "webdataset", "--out", tmp_path / "tars", "--json"),
    ):
        code, printed = mmaudit(*command, "--run", run)
        assert (code, hint in printed) == (2, True), printed
        assert mmaudit(*command, "--run", run, "--data", home / "data")[0] == 0
    tune = ("finetune", "-m", "all", "--run", run, "--name", "of-another", *TRAIN)
    for words in (tune, ("evaluate", "tuned", "--run", run, *QUICK)):
        code, printed = mmaudit(*words, "--encoder", "image=encoder_of_trust:mean")
        assert (code, hint in printed) == (2, True), printed
        code, printed = mmaudit(*words, "--data", home / "data")
        assert (code, "pass --encoder image=encoder_of_trust:mean" in printed) == (2, True), printed
        for encoder in ("image=statistics", "sound=statistics"):
            assert mmaudit(*words, "--data", home / "data", "--encoder", encoder)[0] == 2
    assert mmaudit(*tune, "--data", home / "data", "--encoder", "image=encoder_of_trust:mean")[0] == 0
    assert mmaudit("replay", "all", "--run", run)[0] == 0
    assert mmaudit("report", "--run", run)[0] == 0
    shutil.rmtree(home / "spoiled", ignore_errors=True)


@pytest.fixture
def own_manifest(home: Path) -> Iterator[Path]:
    """A manifest of the user's own run, which the test may edit."""
    assert mmaudit("split", "--subset", "most-balanced:100%", "--name", "spoiled", "--run", "run")[0] == 0
    path = home / "run" / "manifests" / "spoiled.parquet"
    yield path
    for file in (path, dropped_path(path), balance_path(path)):
        file.unlink()


@pytest.mark.parametrize("part", ["rows", "metadata"])
def test_edited_manifest_is_not_trusted(home: Path, tmp_path: Path, own_manifest: Path, part: str) -> None:
    """Even if its recorded digests were adapted."""
    if part == "rows":
        rewrite(own_manifest, keep_metadata, point_sounds_to("../canary.wav"))
    else:
        rewrite(own_manifest, name_encoder("hostile_code:run"), lambda table: table)
    code, printed = mmaudit("verify", "spoiled", "--run", "run")
    assert code == 3
    assert f"FAILED signature: its {part} changed since it was made" in printed
    for command in (
        ("export", "spoiled", "--format", "webdataset", "--out", tmp_path / "tars"),
        ("finetune", "-m", "spoiled", *TRAIN),
    ):
        code, printed = mmaudit(*command, "--run", "run")
        assert code == 2
        assert f"its {part} changed since it was made" in printed
    assert not files_with_canary(tmp_path)


def test_invalid_signature_is_not_trusted(home: Path, own_manifest: Path) -> None:
    numbers = read_json(balance_path(own_manifest), error=RunError)
    other_signature = read_json(home / "run" / "manifests" / "all.balance.json", error=RunError)["signature"]
    for signature in (None, {}, "x", other_signature, {**numbers["signature"], "hmac": "0" * 64}):
        write_json({**numbers, "signature": signature}, balance_path(own_manifest))
        code, printed = mmaudit("finetune", "-m", "spoiled", "--run", "run", *TRAIN)
        assert code == 2
        assert "it was not signed by you on this machine" in printed
    balance_path(own_manifest).write_text("{")
    assert mmaudit("finetune", "-m", "spoiled", "--run", "run", *TRAIN)[0] == 2


@pytest.mark.parametrize("key", ["source", "config", "code"])
def test_edited_run_json_is_not_trusted(home: Path, key: str) -> None:
    file = home / "run" / "run.json"
    before = file.read_bytes()
    record = read_json(file, error=RunError)
    write_json({**record, key: "/" if key == "source" else {}}, file)
    code, printed = mmaudit("verify", "all", "--run", "run")
    file.write_bytes(before)
    assert code == 2
    assert "run.json was not signed by you on this machine, or has changed" in printed


def test_manifest_of_another_table_is_bound_to_no_source(home: Path, tmp_path: Path) -> None:
    """Even if the table is a copy of the run's own."""
    shutil.copy(home / "run" / "scores.parquet", tmp_path / "scores.parquet")
    words = ("--subset", "most-balanced:100%", "--name", "others", "--overwrite", "--run", "run")
    assert mmaudit("split", "--scores", tmp_path / "scores.parquet", *words)[0] == 0
    code, printed = mmaudit("export", "others", "--run", "run", "--format", "webdataset", "--out", tmp_path / "tars")
    assert code == 2
    assert "it was not made from the scores of its run" in printed
    assert mmaudit("replay", "others", "--run", "run")[0] == 0  # the recipe is the user's own
    table = home / "run" / "scores.parquet"
    before = table.read_bytes()
    pq.write_table(pq.read_table(table), table)
    assert mmaudit("split", *words)[0] == 0
    table.write_bytes(before)
    code, printed = mmaudit("finetune", "-m", "others", "--run", "run", *TRAIN)
    assert (code, "it was not made from the scores of its run" in printed) == (2, True), printed


def test_another_module_of_the_encoder_name_is_not_imported(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder may hold a module with the name of the user's own."""
    (tmp_path / "encoder_of_trust.py").write_text(HOSTILE.format(mark=str(home / "ran")))
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(home))])
    monkeypatch.delitem(sys.modules, "encoder_of_trust")
    functions.load_function.cache_clear()
    monkeypatch.chdir(tmp_path)
    code, printed = mmaudit("finetune", "-m", "all", "--run", home / "run", "--name", "hijacked", *TRAIN)
    assert code == 2
    assert "encoder_of_trust:mean was" in printed
    assert "encoder_of_trust" not in sys.modules


def test_foreign_finetune_cannot_name_a_manifest_outside_its_run(home: Path, tmp_path: Path) -> None:
    tuned = Path(shutil.copytree(home / "run" / "finetune" / "tuned", tmp_path / "tuned"))
    metrics = read_json(tuned / "metrics.json", error=RunError)
    write_json({**metrics, "manifest": str(home / "run" / "manifests" / "all.parquet")}, tuned / "metrics.json")
    code, printed = mmaudit("evaluate", tuned, "--run", tmp_path / "run", *QUICK)
    assert code == 2
    assert "no manifest " in printed


@pytest.mark.parametrize(
    "name", ["recovery.json", "manifests/x.balance.json", "finetune/tuned/history.jsonl", "figures"]
)
def test_report_of_a_foreign_run_reads_no_file_outside(home: Path, tmp_path: Path, name: str) -> None:
    run = Path(shutil.copytree(home / "run", tmp_path / "run"))
    shutil.rmtree(run / "figures", ignore_errors=True)
    (run / name).unlink(missing_ok=True)
    private = tmp_path / "private"
    (run / name).parent.mkdir(exist_ok=True)
    if name == "figures":
        private.mkdir()
        (private / "picture.png").write_text(CANARY)
    else:
        private.write_text(json.dumps({"token": CANARY}))
    (run / name).symlink_to(private)
    code, printed = mmaudit("report", "--run", run)
    assert code == 2
    assert "is a link out of" in printed
    assert CANARY not in printed
    assert files_with_canary(tmp_path) == [str(path) for path in (private / "picture.png", private) if path.is_file()]


def test_report_escapes_names_of_a_foreign_run(home: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(home / "run", tmp_path / "run"))
    table = pq.read_table(run / "scores.parquet")
    script = "<script>alert(1)</script>"
    for column in ("sample_id", "label_name", "audio_file_name"):
        values = [f"{script}{value}" for value in table[column].to_pylist()]
        table = table.set_column(table.column_names.index(column), column, pa.array(values))
    pq.write_table(table, run / "scores.parquet")
    record = read_json(run / "run.json", error=RunError)
    write_json({**record, "source": script}, run / "run.json")
    assert mmaudit("report", "--run", run)[0] == 0
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<script" not in page
    assert "&lt;script&gt;alert(1)" in page


def test_moved_data_give_same_bytes(home: Path, tmp_path: Path) -> None:
    """No hashed or compared file contains a path, a time or a duration."""
    data, run = tmp_path / "deep" / "copied", tmp_path / "another-run"
    shutil.copytree(home / "data", data, copy_function=shutil.copyfile)  # other times
    words = ("--encoder", "image=encoder_of_trust:mean", "--id", "id", *SHORT, *QUICK)
    assert mmaudit("score", data, "--run", run, *words)[0] == 0
    assert mmaudit("split", "--subset", "most-balanced:100%", "--name", "all", "--run", run)[0] == 0
    names = ["scores.parquet", "quarantine.parquet", "mixture.json"]
    names += ["manifests/all.parquet", "manifests/all.dropped.parquet"]
    for name in names:
        first, second = (folder / name for folder in (home / "run", run))
        assert first.read_bytes() == second.read_bytes(), name
        for folder in (home, run, data):
            assert str(folder).encode() not in first.read_bytes()
    numbers = read_json(home / "run" / "manifests" / "all.balance.json", error=RunError)
    assert numbers["source"] == str(home / "data")  # for messages only, in a file that is not compared
