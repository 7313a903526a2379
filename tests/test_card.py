"""Tests of dataset cards: numbers match the manifest, and any names are escaped."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ManifestError, printable
from mmaudit.audit.scores.table import ScoreTable
from mmaudit.rebalance.balanced import BalancedConfig, plan_balanced
from mmaudit.rebalance.card import MAX_SHORTAGES, code_span, dataset_card, escape_markdown, markdown_table
from mmaudit.rebalance.manifest import balance_path, dropped_path, read_stated_digests
from mmaudit.rebalance.score_tables import open_scores
from mmaudit.rebalance.selection import select_rows
from mmaudit.rebalance.split import write_split

PROVENANCE = {
    "version": "9.8.7",
    "fingerprint": "f00d",
    "source": "data",
    "config": {"seed": 5, "probe": {"kind": "auto", "folds": 4, "repeats": 2, "learn_from": "all", "lr": 0.1}},
    "modalities": [{"name": "audio", "column": "a", "kind": "audio", "encoder": "resnet18"}],
}
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=30)


def make(
    folder: Path, classes: tuple[str, ...] = ("rain", "dog", "guitar"), n: int = 300, **changes: Any
) -> tuple[Path, dict[str, Any]]:
    rng = np.random.default_rng(1)
    label = (np.arange(n) % len(classes)).astype(np.int32)
    table = ScoreTable(
        sample_id=np.array([f"s{number}" for number in range(n)], dtype=object),
        label=label,
        label_name=np.array(classes, dtype=object)[label],
        modalities=("audio", "visual"),
        confidence=rng.beta(2, 2, (n, 2)).astype(np.float32),
        split=np.array([("train", "test")[number % 4 == 0] for number in range(n)], dtype=object),
        provenance={**PROVENANCE, **changes},
    )
    score_files = open_scores(table, seed=5)
    rule = plan_balanced(score_files, BalancedConfig(bins=10, tolerance=0.1))
    selection = select_rows(score_files, rule, scratch=folder / "scratch")
    recipe = {"balanced": {"bins": 10, "tolerance": 0.1}, "seed": 5}
    path = folder / "even.parquet"
    numbers = write_split(selection, path, name="even", recipe=recipe, num_bins=10)
    curve = [{"tolerance": 0.0, "size": 20, "distance": 0.0}, {"tolerance": 0.1, "size": 120, "distance": 0.09}]
    return path, {**numbers, "name": "even", "recipe": recipe, "curve": curve}


def write_numbers(path: Path, numbers: dict[str, Any]) -> None:
    """Write NAME.balance.json of a manifest, as `mmaudit split` does."""
    text = json.dumps({"digest": read_stated_digests(path)["digest"], **numbers})
    balance_path(path).write_text(text, encoding="utf-8")


def card_of(path: Path, numbers: dict[str, Any], *, file_name: str | None = None) -> str:
    """Return the card of a manifest with these numbers, of a copy if a file name is given."""
    if file_name is not None:
        path = Path(shutil.copy(path, path.with_name(file_name)))
    write_numbers(path, numbers)
    return dataset_card(path)


def tables(text: str) -> list[list[list[str]]]:
    """Read the Markdown tables as lists of rows of cells, without the line of dashes."""
    tables_, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        elif rows:
            tables_.append([row for row in rows if not set("".join(row)) <= set("-:")])
            rows = []
    return tables_


def test_numbers_match_the_split_stats(tmp_path: Path) -> None:
    path, numbers = make(tmp_path)
    text = card_of(path, numbers)
    measures, bins, curve = tables(text)
    measure = {row[0]: row[1:] for row in measures[1:]}
    assert measure["samples"] == [str(numbers["scored"]), str(numbers["kept"])]
    for column, when in enumerate(("before", "after")):
        assert float(measure["total-variation distance to uniform (0 = uniform)"][column]) == round(
            numbers[when]["distance"], 3
        )
        assert float(measure["Kolmogorov-Smirnov distance to uniform (0 = uniform)"][column]) == round(
            numbers[when]["ks"], 3
        )
        positive = float(measure["share of audio-preferred samples"][column].removesuffix("%"))
        assert positive == pytest.approx(100 * numbers[when]["positive"], abs=0.051)
    assert [int(row[1]) for row in bins[1:]] == numbers["counts_before"]
    assert [int(row[2]) for row in bins[1:]] == numbers["counts_after"]
    assert bins[1][0] == "-1.00 to -0.80"
    assert bins[-1][0] == "+0.80 to +1.00"
    bars = [len(row[3]) for row in bins[1:]]
    assert sorted(bars) == [bars[index] for index in np.argsort(numbers["counts_after"], kind="stable")]
    assert all((bar > 0) == (count > 0) for bar, count in zip(bars, numbers["counts_after"], strict=True))
    assert curve[1:] == [["0", "20", "0.000"], ["0.1", "120", "0.090"]]


def test_worst_class_and_shortages_are_listed(tmp_path: Path) -> None:
    path, numbers = make(tmp_path)
    text = card_of(path, numbers)
    worst = max(numbers["classes"], key=lambda entry: float(entry["distance_after"]))
    assert f"Of 3 classes, **{worst['name']}** is the least uniform: distance {worst['distance_after']:.3f}" in text
    lines = [line for line in text.splitlines() if "where a uniform share is" in line]
    assert 0 < len(lines) == min(MAX_SHORTAGES, len(numbers["shortages"]))
    assert lines[0].startswith(f"- {numbers['shortages'][0]['class']} has {numbers['shortages'][0]['has']} samples")


def test_recipe_and_provenance_are_listed(tmp_path: Path) -> None:
    path, numbers = make(tmp_path)
    text = card_of(path, numbers)
    record = read_stated_digests(path)
    for line in (
        "- mmaudit: `9.8.7`",
        "- recipe: `balanced.bins=10, balanced.tolerance=0.1, seed=5`",
        "- seed: `5`",
        "- probes: `kind=auto, folds=4, repeats=2, learn_from=all`",
        "- encoders: `audio=resnet18`",
        "- dataset fingerprint: `f00d`",
        "- schema: `mmaudit.manifest/3`",
        f"- row digest: `{record['digest']}`",
    ):
        assert line in text.splitlines()
    vectors = {"name": "audio", "column": "a", "kind": "features", "encoder": "statistics"}
    path, numbers = make(tmp_path / "vectors", modalities=[vectors])
    assert "- encoders: `audio=vectors as they are`" in card_of(path, numbers).splitlines()
    assert "The probes were trained on all splits, including the test split" in text
    assert "arXiv 2302.10912" in text


def test_dropped_rows_are_counted_if_their_file_exists(tmp_path: Path) -> None:
    path, numbers = make(tmp_path)
    (reason, count), = numbers["reasons"].items()  # fmt: skip
    assert f"Dropped: {count} `{reason}`. `even.dropped.parquet` lists each with" in card_of(path, numbers)
    other_manifest, _ = make(tmp_path / "other", n=200)
    shutil.copy(dropped_path(other_manifest), dropped_path(path))
    with pytest.raises(ManifestError, match="holds the rows dropped from another manifest: run mmaudit split again"):
        card_of(path, numbers)
    dropped_path(path).unlink()
    assert "Dropped" not in card_of(path, numbers)


def test_numbers_are_read_from_the_same_folder(tmp_path: Path) -> None:
    path, numbers = make(tmp_path)
    without = dataset_card(path)
    assert tables(without) == []
    assert "Its balance numbers were not found" in without
    assert "### How it was made" in without
    write_numbers(path, numbers)
    assert len(tables(dataset_card(path))) == 3
    assert "No numbers" not in dataset_card(path)


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("before", {}, "before lacks distance, ks, positive"),
        ("counts_before", ["x"], r"counts_before\[0\] is .x.; it must be an integer"),
        ("counts_before", [1], "does not have 10 bins"),
        ("classes", [{"name": 5}], r"classes\[0\] lacks before"),
        ("curve", 5, "curve is 5; it must be a list"),
        ("distances", {"train": None}, r"distances\.train is null; it must be a number"),
        ("scored", "many", "scored is .many.; it must be an integer"),
    ],
)
def test_invalid_numbers_raise_and_name_the_key(tmp_path: Path, key: str, value: object, reason: str) -> None:
    path, numbers = make(tmp_path)
    write_numbers(path, {**numbers, key: value})
    with pytest.raises(ManifestError, match=reason):
        dataset_card(path)


def test_numbers_of_another_manifest_raise(tmp_path: Path) -> None:
    path, numbers = make(tmp_path)
    with pytest.raises(ManifestError, match="run mmaudit split again"):
        card_of(path, {**numbers, "kept": numbers["kept"] + 1})
    with pytest.raises(ManifestError, match="run mmaudit split again"):
        card_of(path, {**numbers, "digest": "another"})
    assert card_of(path, {**numbers, "digest": read_stated_digests(path)["digest"]}) == card_of(path, numbers)
    with pytest.raises(ManifestError, match="lacks after, classes"):
        card_of(path, {name: value for name, value in numbers.items() if name not in ("after", "classes")})
    with pytest.raises(ManifestError, match="no such file"):
        dataset_card(tmp_path / "none.parquet")


def test_loading_code_of_the_card_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, numbers = make(tmp_path)
    text = card_of(path, numbers)
    code = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)[0]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    loads = [line for line in code.splitlines() if "pd" in line]  # `datasets` would keep a copy in a cache at home
    exec("\n".join(loads), names)
    assert isinstance(names["frame"], pd.DataFrame)
    assert len(names["frame"]) == numbers["kept"]
    assert 'load_dataset("parquet", data_files="even.parquet")' in code
    assert "mmaudit verify even.parquet " in text
    assert "mmaudit replay 'my set.parquet' " in card_of(path, numbers, file_name="my set.parquet")


@pytest.mark.parametrize("name", ["\x85|.parquet", "a\x1b[31m.parquet", "a\u2028b.parquet"])
def test_file_name_is_written_on_one_line(tmp_path: Path, name: str) -> None:
    path, numbers = make(tmp_path)
    text = card_of(path, numbers, file_name=name)
    assert not set(text) & {"\x85", "\x1b", "\u2028"}
    loads = next(line for line in text.split("\n") if line.startswith("frame = "))
    assert json.loads(loads.removeprefix("frame = pd.read_parquet(").removesuffix(")")) == name


def test_card_has_one_section_and_no_front_matter(tmp_path: Path) -> None:
    path, numbers = make(tmp_path)
    lines = card_of(path, numbers).splitlines()
    assert lines[0] == "## Modality balance"
    assert [line for line in lines if line.startswith("## ")] == ["## Modality balance"]
    assert "---" not in lines
    assert f"{numbers['kept']} of {numbers['scored']} scored samples" in lines[2]
    assert "between **audio** and **visual**" in lines[2]


def test_effective_size_is_shown_for_weights(tmp_path: Path) -> None:
    path, numbers = make(tmp_path)
    assert "effective size" not in card_of(path, {**numbers, "effective_size": float(numbers["kept"])})
    measure = {row[0]: row[2] for row in tables(card_of(path, {**numbers, "effective_size": 12.4}))[0]}
    assert measure["effective size of the weighted samples"] == "12"


def test_distance_by_other_features_is_shown_if_measured(tmp_path: Path) -> None:
    path, numbers = make(tmp_path)
    halves = {"num_rows": 80, "kept": 40.0, "selected": 0.05, "measured": 0.213, "chance": 0.08}
    text = card_of(path, {**numbers, "halves": halves})
    assert "Selected by half of the features and measured by the other half: 0.213 (0.080 by chance" in text
    assert "by half of the features" not in card_of(path, {**numbers, "halves": None})


@settings(max_examples=examples(30), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(texts, min_size=2, max_size=4, unique=True), texts.filter(lambda text: "/" not in text))
def test_any_names_keep_tables_and_fences_intact(tmp_path: Path, classes: list[str], file_name: str) -> None:
    path, numbers = make(tmp_path, tuple(classes), n=80)
    numbers["distances"] = {**numbers["distances"], "a|b": 0.5}
    text = card_of(path, numbers, file_name=f"{file_name}.parquet")
    plain = card_of(path, {**numbers, "classes": [{**entry, "name": "x"} for entry in numbers["classes"]]})
    assert [[len(row) for row in table] for table in tables(text)] == [
        [len(row) for row in table] for table in tables(plain)
    ]
    assert len([line for line in text.split("\n") if line.startswith("```")]) == 6
    assert r"a\|b" in text


# Markdown.


@given(texts)
def test_escaped_names_read_as_they_are(name: str) -> None:
    text = escape_markdown(name)
    assert len(text.splitlines()) <= 1
    assert not re.search(r"(?<!\\)(?:\\\\)*[|<*`_]", text)
    assert re.sub(r"\\(.)", r"\1", text) == printable(" ".join(name.split()))


@given(st.text("` ab\n", max_size=12))
def test_a_code_span_ends_only_where_it_ends(text: str) -> None:
    written, unescaped = code_span(text), " ".join(text.split())
    (fence,) = re.findall("^`+", written)
    inner = written[len(fence) :].removesuffix(fence)
    assert fence not in re.findall("`+", inner)
    assert inner.removeprefix(" ").removesuffix(" ") == unescaped


@pytest.mark.parametrize("name", ["a|b", "`x`", "# head", "<script>", "$x$", "a\x1b[31mb", "\u202eb", "a\n- forged"])
def test_a_name_stays_one_cell_of_a_table(name: str) -> None:
    (row,) = markdown_table(("what", "n"), [(escape_markdown(name), "1")])[2:]
    assert len(row.splitlines()) == 1
    assert len(re.findall(r"(?<!\\)\|", row)) == 3
    assert not set(row) & set("\x1b\u202e")
    assert "<script>" not in row


def test_a_table_has_its_numbers_on_the_right() -> None:
    written = markdown_table(("what", "n", ""), [("a", "1", "x")])
    assert written == ["| what | n |  |", "| --- | ---: | --- |", "| a | 1 | x |"]
