"""Tests of recipes: set operations, tolerances that write nothing if missed, and replay."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ConfigError, GateError, ManifestError, ScoreError
from mmaudit.audit.scores.table import ScoreTable, read_scores, write_scores
from mmaudit.audit.storage import write_json
from mmaudit.cli.splitting import replay
from mmaudit.rebalance.balanced import BalancedConfig
from mmaudit.rebalance.manifest import balance_path, dropped_path, read_dropped, read_manifest, read_provenance
from mmaudit.rebalance.recipe import Recipe, SplitResult, make_split, recipe_from_record
from mmaudit.rebalance.score_tables import open_scores

N = 400
AV = "audio:visual"


def table(n: int = N, *, seed: int = 0, **changes: Any) -> ScoreTable:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    columns: dict[str, Any] = {
        "sample_id": np.array([f"s{number:04d}" for number in range(n)], dtype=object),
        "label": label,
        "label_name": np.array([f"class {class_index}" for class_index in label], dtype=object),
        "modalities": ("audio", "visual"),
        "confidence": rng.beta(2, 2, (n, 2)).astype(np.float32),
        "split": rng.choice(np.array(["train", "test"], dtype=object), n, p=[0.75, 0.25]),
        "balance": rng.uniform(-1, 1, n).astype(np.float32),
        "p_balanced": rng.random(n).astype(np.float32),
        "provenance": {"fingerprint": "one"},
    }
    return ScoreTable(**{**columns, **changes})


class RunFolder:
    """A run folder with a score table and its manifests."""

    def __init__(self, folder: Path, scores: ScoreTable | None = None) -> None:
        self.folder = folder
        self.scores = folder / "scores.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        write_scores(table() if scores is None else scores, self.scores)
        write_json({}, folder / "run.json")

    def place(self, name: str) -> Path:
        return self.folder / "manifests" / f"{name}.parquet"

    def split(
        self, *, name: str | None = None, dry_run: bool = False, scores: Any = None, **recipe: Any
    ) -> SplitResult:
        return self.make(Recipe(**recipe), name=name, dry_run=dry_run, scores=scores)

    def make(
        self, recipe: Recipe, *, name: str | None = None, dry_run: bool = False, scores: Any = None
    ) -> SplitResult:
        source = scores or self.scores
        score_files = open_scores(source, seed=recipe.seed)
        file_name = source if isinstance(source, (str, Path)) else None
        return make_split(
            score_files, recipe, self.place, scratch=self.folder, name=name, scores=file_name, dry_run=dry_run
        )

    def of(self, name: str, **recipe: Any) -> str:
        """Write a manifest and return its path as a string."""
        return str(self.split(name=name, **recipe).path)

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def run_folder(tmp_path: Path) -> RunFolder:
    return RunFolder(tmp_path / "run")


def path_of(split: SplitResult) -> Path:
    assert split.path is not None
    return split.path


def ids(split: SplitResult | str) -> set[str]:
    path = Path(split) if isinstance(split, str) else path_of(split)
    return set(read_manifest(path).table["sample_id"].to_pylist())


def reasons(split: SplitResult) -> dict[str, str]:
    path = path_of(split)
    dropped = read_dropped(path, read_manifest(path))
    assert dropped is not None
    return dict(zip(dropped["sample_id"].to_pylist(), dropped["reason"].to_pylist(), strict=True))


def test_intersect_and_exclude_match_python_sets(run_folder: RunFolder) -> None:
    a = run_folder.of("a", subset="random:250")
    b = run_folder.of("b", subset="audio-preferred")
    c = run_folder.of("c", subset="most-balanced:100")
    audio, all_ids = ids(b), set(read_scores(run_folder.scores).sample_id)
    assert len(all_ids) == N
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"intersect": (a, b)}, ids(a) & ids(b)),
        ({"intersect": (a, b, c)}, ids(a) & ids(b) & ids(c)),
        ({"exclude": (a,)}, all_ids - ids(a)),
        ({"exclude": (a, b)}, all_ids - ids(a) - ids(b)),
        ({"intersect": (a,), "exclude": (b, c)}, ids(a) - ids(b) - ids(c)),
        ({"intersect": (a, a)}, ids(a)),
        ({"subset": "audio-preferred", "intersect": (a,)}, audio & ids(a)),
        (
            {"dominated": "visual:0.2", "exclude": (a, c)},
            ids(run_folder.of("d", dominated="visual:0.2")) - ids(a) - ids(c),
        ),
        ({"gmm": "balanced", "intersect": (a,)}, ids(run_folder.of("g", gmm="balanced")) & ids(a)),
    ]
    for number, (recipe, expected) in enumerate(cases):
        split = run_folder.split(name=f"case-{number}", **recipe)
        assert ids(split) == expected
        assert ids(split) | set(reasons(split)) == all_ids
        assert len(reasons(split)) == N - len(expected) == split.numbers["dropped"]


def test_excluded_rows_name_the_manifest(run_folder: RunFolder) -> None:
    a, b = run_folder.of("a", subset="random:250"), run_folder.of("b", subset="random:100", seed=5)
    reason_of_id = reasons(run_folder.split(subset="audio-preferred", intersect=(a,), exclude=(b,)))
    all_ids = set(read_scores(run_folder.scores).sample_id)
    assert {name for name, reason in reason_of_id.items() if reason == "not-in-a"} == all_ids - ids(a)
    assert {name for name, reason in reason_of_id.items() if reason == "in-b"} == ids(a) & ids(b)
    below_threshold = {name for name, reason in reason_of_id.items() if reason == "discrepancy-too-low"}
    assert below_threshold == (ids(a) - ids(b)) - ids(run_folder.of("p", subset="audio-preferred"))


def test_excluded_rows_do_not_influence_the_selection(run_folder: RunFolder) -> None:
    """A selection restricted to members equals one from a table of the members only."""
    a = run_folder.of("a", subset="random:250")
    scores = read_scores(run_folder.scores).to_arrow()
    pq.write_table(
        scores.filter(pa.array([name in ids(a) for name in scores["sample_id"].to_pylist()])), run_folder.folder / "few"
    )
    recipes: list[dict[str, Any]] = [
        {"balanced": BalancedConfig(bins=5)},
        {"balanced": BalancedConfig(bins=5, size=60)},
        {"subset": "most-balanced:30%"},
        {"subset": "random:50"},
        {"resplit": "80/8/12"},
        {"resplit": "80/20", "balanced": BalancedConfig(bins=5)},
    ]
    for number, recipe in enumerate(recipes):
        restricted = run_folder.split(name=f"w{number}", intersect=(a,), **recipe)
        reference = run_folder.split(name=f"a{number}", scores=run_folder.folder / "few", **recipe)
        first, second = (
            read_manifest(path_of(split)).table.drop_columns("subset") for split in (restricted, reference)
        )
        assert first.equals(second)
        assert len(first) > 10


def test_like_copies_counts_by_split_and_class(run_folder: RunFolder) -> None:
    a = run_folder.of("a", subset="visual-preferred")
    split = run_folder.split(subset="random", like=a)
    pairs = [
        Counter(zip(*(read_manifest(path).table[name].to_pylist() for name in ("split", "label")), strict=True))
        for path in (Path(a), path_of(split))
    ]
    assert pairs[0] == pairs[1]
    assert path_of(split).stem == "random-like-a"
    assert not ids(split) <= ids(a)
    with pytest.raises(ManifestError, match="random-like-a: too few samples available to draw as many"):
        run_folder.split(subset="random", like=a, exclude=(a,))


def test_default_names(run_folder: RunFolder) -> None:
    a, b = run_folder.of("a", subset="random:300"), run_folder.of("b", subset="random:100", seed=1)
    balanced = BalancedConfig(bins=4)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"balanced": balanced}, "balanced"),
        ({"balanced": balanced, "intersect": (a,)}, "balanced-in-a"),
        ({"balanced": balanced, "exclude": (b,)}, "balanced-without-b"),
        ({"subset": "audio-preferred", "intersect": (a,), "exclude": (b,)}, "audio-preferred-in-a-without-b"),
        ({"intersect": (a, b)}, "a-and-b"),
        ({"intersect": (a,), "exclude": (b,)}, "a-without-b"),
        ({"exclude": (b,)}, "all-without-b"),
        ({"intersect": (a,)}, "all-in-a"),
        ({"resplit": "80/20"}, "resplit"),
        ({"resplit": "80/20", "intersect": (a,)}, "resplit-in-a"),
    ]
    for recipe, name in cases:
        split = run_folder.split(dry_run=True, **recipe)
        assert split.numbers["name"] == name
    assert path_of(run_folder.split(name="mine", exclude=(b,))).stem == "mine"


def test_manifest_never_overwrites_its_inputs(run_folder: RunFolder) -> None:
    a = run_folder.of("balanced", subset="random:300")
    before = run_folder.files()
    for recipe in ({"intersect": (a,)}, {"exclude": (a,)}, {"subset": "random", "like": a}):
        with pytest.raises(ConfigError, match=r"balanced would overwrite the manifest that it is made from; .*--name"):
            run_folder.split(name="balanced", **recipe)
    assert run_folder.files() == before
    assert path_of(run_folder.split(balanced=BalancedConfig(bins=4), intersect=(a,))).stem == "balanced-in-balanced"


def test_manifests_of_other_data_raise(run_folder: RunFolder, tmp_path: Path) -> None:
    other_data = RunFolder(tmp_path / "other", table(provenance={"fingerprint": "two"}))
    larger_data = RunFolder(tmp_path / "more", table(N + 50))
    foreign, wide = (
        other_data.of("strange", subset="random:50"),
        larger_data.of("wide", exclude=(larger_data.of("x", subset="random:9"),)),
    )
    outside = len(ids(wide) - set(read_scores(run_folder.scores).sample_id))
    for recipe in ({"intersect": (foreign,)}, {"exclude": (foreign,)}, {"subset": "random", "like": foreign}):
        with pytest.raises(ManifestError, match=r"strange\.parquet was made from another dataset than these scores"):
            run_folder.split(**recipe)
    for recipe in ({"intersect": (wide,)}, {"exclude": (wide,)}, {"subset": "random", "like": wide}):
        with pytest.raises(ManifestError, match=f"{outside} of the {N + 41} samples of wide are not in these"):
            run_folder.split(**recipe)
    with pytest.raises(ManifestError, match="no such file"):
        run_folder.split(intersect=("nowhere.parquet",))


def test_size_that_misses_the_tolerance_raises_and_writes_nothing(run_folder: RunFolder) -> None:
    before = run_folder.files()
    hard = BalancedConfig(bins=10, size=300, tolerance=0.01)
    with pytest.raises(
        GateError, match=r"uniform 0\.01 not reached: 300 samples.* reach 0\.\d+; without --size, \d+ reach it"
    ) as error:
        run_folder.split(balanced=hard)
    reached = float(str(error.value).split("reach ")[1].split(";")[0])
    assert "nothing was written" in str(error.value)
    assert run_folder.files() == before
    free = run_folder.split(balanced=replace(hard, tolerance=None), dry_run=True).numbers
    assert reached == pytest.approx(max(free["distances"].values()), abs=1e-4)
    assert run_folder.split(balanced=replace(hard, tolerance=reached + 1e-3)).numbers["kept"] == 300


def test_weights_that_miss_the_tolerance_raise(run_folder: RunFolder) -> None:
    before = run_folder.files()
    light = BalancedConfig(bins=10, by="weight", max_weight=1.0, tolerance=0.05)
    with pytest.raises(GateError, match=r"weights up to 1 reach 0\.\d+ at best; raise split\.max_weight"):
        run_folder.split(balanced=light)
    assert run_folder.files() == before
    split = run_folder.split(balanced=replace(light, max_weight=1e6))
    assert max(split.numbers["distances"].values()) < 1e-6
    assert split.numbers["kept"] == N


KINDS: dict[str, dict[str, Any]] = {
    "balanced": {"balanced": BalancedConfig()},
    "balanced-exact": {"balanced": BalancedConfig(bins=6, tolerance=0.0), "seed": 7},
    "balanced-size": {"balanced": BalancedConfig(bins=0, size=77)},
    "balanced-weight": {"balanced": BalancedConfig(bins=8, by="weight", max_weight=4.0)},
    "balanced-grid": {"balanced": BalancedConfig(bins=3, grid=True)},
    "balanced-per-class": {"balanced": BalancedConfig(bins=4, per_class=True), "between": "visual:audio"},
    "preferred": {"subset": "audio-preferred"},
    "within": {"subset": "balanced:0.3"},
    "extreme": {"subset": "least-balanced:12.5%"},
    "random": {"subset": "random:100", "seed": 3},
    "dominated": {"dominated": "visual:0.2"},
    "gmm": {"gmm": "imbalanced", "posterior": 0.75},
    "resplit": {"resplit": "80/8/12"},
    "balanced-resplit": {"balanced": BalancedConfig(bins=4), "resplit": "70/30"},
    "like": {"subset": "random", "like": "a"},
    "sets": {"intersect": ("a", "b"), "exclude": ("c",)},
    "balanced-sets": {"balanced": BalancedConfig(bins=4), "intersect": ("a",), "resplit": "80/20"},
}


def split_all_kinds(run_folder: RunFolder) -> dict[str, SplitResult]:
    """Write a manifest of every kind."""
    inputs = {"a": "random:300", "b": "random:200", "c": "audio-preferred"}
    files = {name: run_folder.of(name, subset=text, seed=number) for number, (name, text) in enumerate(inputs.items())}
    splits = {}
    for name, options in KINDS.items():
        recipe = dict(options)
        for key in ("intersect", "exclude"):
            recipe |= {key: tuple(files[file_name] for file_name in recipe[key])} if key in recipe else {}
        recipe |= {"like": files[recipe["like"]]} if "like" in recipe else {}
        splits[name] = run_folder.split(name=name, **recipe)
    return splits


def test_dry_run_writes_nothing_and_returns_the_same_numbers(run_folder: RunFolder) -> None:
    splits = split_all_kinds(run_folder)
    before = run_folder.files()
    for name, split in splits.items():
        recipe = recipe_from_record(read_provenance(path_of(split))["recipe"], folder=path_of(split).parent)
        dry = run_folder.make(recipe, name=name, dry_run=True)
        assert dry.path is None
        assert dry.numbers == split.numbers
    assert run_folder.files() == before


def test_numbers_are_written_next_to_the_manifest(run_folder: RunFolder) -> None:
    for name, split in split_all_kinds(run_folder).items():
        path = path_of(split)
        numbers = json.loads(balance_path(path).read_text())
        assert balance_path(path).name == f"{name}.balance.json"
        assert numbers.pop("digest") == read_manifest(path).digest()
        assert numbers.pop("recipe") == read_provenance(path)["recipe"]
        assert numbers == json.loads(json.dumps(split.numbers))
        assert numbers["kept"] == len(read_manifest(path))
        assert numbers["kept"] + numbers["dropped"] == numbers["scored"] == N
        assert Counter(reasons(split).values()) == numbers["reasons"]


def test_replay_is_identical_after_moving_the_run(run_folder: RunFolder, tmp_path: Path) -> None:
    splits = split_all_kinds(run_folder)
    moved = tmp_path / "elsewhere" / "deep" / "run"
    shutil.copytree(run_folder.folder, moved)
    for folder in (run_folder.folder, moved):
        if folder == moved:
            shutil.rmtree(run_folder.folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for name in splits:
            replayed = replay(name, run=folder)
            assert replayed.identical, name
            assert replayed.differ == ()
            assert Path(replayed.scores).resolve() == (folder / "scores.parquet").resolve()
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert not [path for path in folder.rglob(".*")]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_replay_detects_a_changed_score(run_folder: RunFolder, name: str) -> None:
    path = path_of(only(run_folder, name))
    scores = read_scores(run_folder.scores)
    confidence = scores.confidence.copy()
    confidence[0, 0] = 1 - confidence[0, 0]
    write_scores(replace(scores, confidence=confidence), run_folder.scores)
    replayed = replay(path)
    assert not replayed.identical
    is_kept = scores.sample_id[0] in ids(str(path))
    assert (f"{name}.parquet" if is_kept else f"{name}.dropped.parquet") in replayed.differ


def only(run_folder: RunFolder, name: str) -> SplitResult:
    """Write a manifest of one kind, and its inputs."""
    recipe = dict(KINDS[name])
    files = {
        file_name: run_folder.of(file_name, subset="random:200", seed=seed) for seed, file_name in enumerate("abc")
    }
    for key in ("intersect", "exclude"):
        recipe |= {key: tuple(files[file_name] for file_name in recipe[key])} if key in recipe else {}
    recipe |= {"like": files["a"]} if "like" in recipe else {}
    return run_folder.split(name=name, **recipe)


def test_replay_detects_a_changed_input_manifest(run_folder: RunFolder) -> None:
    a = run_folder.of("a", subset="random:300")
    path = path_of(run_folder.split(name="m", exclude=(a,)))
    assert replay(path).identical
    run_folder.of("a", subset="random:299")
    assert replay(path).differ == ("m.parquet", "m.dropped.parquet")
    dropped_path(Path(a)).unlink()
    Path(a).unlink()
    with pytest.raises(ManifestError, match=r"no such file: .*a\.parquet"):
        replay(path)


def test_replay_needs_the_scores(run_folder: RunFolder, tmp_path: Path) -> None:
    path = path_of(run_folder.split(subset="audio-preferred"))
    moved = tmp_path / "away.parquet"
    run_folder.scores.rename(moved)
    with pytest.raises(
        ManifestError, match=r"score table .*scores\.parquet of the manifest not found; pass it with --scores"
    ):
        replay(path)
    with pytest.raises(ScoreError, match=r"score table .*nowhere\.parquet not found"):
        replay(path, scores=tmp_path / "nowhere.parquet")
    replayed = replay(path, scores=moved)
    assert (replayed.identical, replayed.scores) == (True, moved)
    dropped_path(path).unlink()
    assert replay(path, scores=moved).differ == (dropped_path(path).name,)


@pytest.mark.parametrize("how", ["folder", "glob", "files"])
def test_shards_are_replayed_from_their_recorded_path(run_folder: RunFolder, how: str) -> None:
    folder = run_folder.folder / "shards"
    folder.mkdir()
    scores = pq.read_table(run_folder.scores)
    for number in range(4):
        pq.write_table(scores.slice(number * 100, 100), folder / f"{3 - number}.parquet")
    sources: dict[str, Any] = {"folder": folder, "glob": str(folder / "*.parquet"), "files": sorted(folder.iterdir())}
    split = run_folder.split(balanced=BalancedConfig(bins=5), scores=sources[how])
    if how == "files":
        with pytest.raises(ManifestError, match=r"does not name the score tables .*; pass them with --scores"):
            replay(path_of(split))
        assert replay(path_of(split), scores=folder).identical
    else:
        assert replay(path_of(split)).identical


def test_manifest_without_recipe_raises(run_folder: RunFolder) -> None:
    for record in ({}, {"seed": 0}, {"scores": "x.parquet"}):
        with pytest.raises(ManifestError, match="the manifest records no recipe"):
            recipe_from_record(record, folder=run_folder.folder)


@pytest.fixture(scope="module")
def prepared_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, list[str]]:
    run_folder = RunFolder(tmp_path_factory.mktemp("recipes") / "run", table(60))
    return run_folder, [run_folder.of(name, subset="random:55", seed=seed) for seed, name in enumerate("ab")]


BALANCED = st.builds(
    BalancedConfig,
    bins=st.integers(0, 9).filter(lambda bins: bins != 1),
    tolerance=st.none() | st.just(1.0),
    size=st.none() | st.integers(20, 40),
    max_weight=st.floats(1, 20),
    grid=st.booleans(),
) | st.builds(BalancedConfig, by=st.just("weight"), bins=st.integers(2, 9), max_weight=st.floats(1, 20))
KIND: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.fixed_dictionaries({"balanced": BALANCED}),
    st.fixed_dictionaries({"subset": st.sampled_from(["audio-preferred", "balanced:0.5", "random:20%"])}),
    st.fixed_dictionaries({"dominated": st.sampled_from(["audio:0.1", "visual:0"])}),
    st.fixed_dictionaries({"gmm": st.sampled_from(["balanced", "imbalanced"]), "posterior": st.floats(0.3, 0.7)}),
    st.just({"subset": "random", "like": True}),
    st.just({}),
)


@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    KIND,
    st.integers(0, 2**32),
    st.none() | st.sampled_from([AV, "visual:audio", "audio"]),
    st.lists(st.integers(0, 1), max_size=2),
    st.none() | st.sampled_from(["80/20", "60/20/20"]),
)
def test_recipe_round_trips_through_the_manifest(
    prepared_run: tuple[RunFolder, list[str]],
    kind: dict[str, Any],
    seed: int,
    between: str | None,
    input_indices: list[int],
    resplit: str | None,
) -> None:
    run_folder, inputs = prepared_run
    if kind.get("like"):
        kind, input_indices, resplit = {**kind, "like": inputs[0]}, [], None
    if not (kind or input_indices):
        resplit = "80/20"
    intersect = tuple(inputs[index] for index in input_indices)
    if kind.get("balanced") is not None and kind["balanced"].size is not None:
        kind = {"balanced": replace(kind["balanced"], size=min(kind["balanced"].size, 20))}
    recipe = Recipe(seed=seed, between=between, intersect=intersect, resplit=resplit, **kind)
    path = path_of(run_folder.make(recipe, name="m"))
    record = json.loads(json.dumps(read_provenance(path)["recipe"]))
    parsed = recipe_from_record(record, folder=path.parent)
    assert absolute(parsed) == absolute(recipe)


def absolute(recipe: Recipe) -> Recipe:
    """Return the recipe with absolute paths."""
    return replace(
        recipe,
        like=None if recipe.like is None else str(Path(recipe.like).resolve()),
        intersect=tuple(str(Path(path).resolve()) for path in recipe.intersect),
        exclude=tuple(str(Path(path).resolve()) for path in recipe.exclude),
    )


def test_record_has_only_set_fields(run_folder: RunFolder) -> None:
    record = read_provenance(path_of(run_folder.split(subset="audio-preferred")))["recipe"]
    assert record == {
        "seed": 0,
        "subset": "audio-preferred",
        "posterior": 0.5,
        "scores": "../scores.parquet",
        "inputs": {},
    }
    a = run_folder.of("a", subset="random:300")
    record = read_provenance(path_of(run_folder.split(exclude=(a,))))["recipe"]
    assert record["exclude"] == ["a.parquet"]
    assert record["inputs"] == {"a.parquet": read_manifest(a).digest()}
    assert set(asdict(Recipe(subset="balanced"))) == {field.name for field in fields(Recipe)}


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {},
        "no subset, or several, requested: pass exactly one of --balanced, --subset, --dominated and --gmm",
    ),
    ({"subset": "balanced", "gmm": "balanced"}, "exactly one of"),
    ({"balanced": BalancedConfig(), "dominated": "audio:0.2"}, "exactly one of"),
    ({"like": "x", "subset": "balanced"}, "--like requires --subset random"),
    ({"like": "x", "resplit": "80/20"}, "--like requires --subset random"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_invalid_recipes_raise(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe(**options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"resplit": "80/x"}, ConfigError, "--resplit 80/x: not of the form"),
        ({"subset": "ballanced"}, ConfigError, "--subset ballanced: unknown subset; did you mean balanced"),
        ({"dominated": "visual"}, ConfigError, "not of the form MODALITY:T"),
        ({"gmm": "both"}, ConfigError, "--gmm both: unknown component"),
        ({"subset": "balanced", "between": "audio:text"}, ConfigError, "no modality 'text'"),
        ({"subset": "random:401"}, ConfigError, "requested 401 samples, available 400"),
        ({"balanced": BalancedConfig(size=401)}, ConfigError, "--size: requested 401 samples, available 400"),
        ({"dominated": "audio:0.999"}, ManifestError, "audio-dominated-0.999: none of the 400 scored samples"),
    ],
)
def test_invalid_options_raise_and_write_nothing(
    run_folder: RunFolder, options: dict[str, Any], error: Any, words: str
) -> None:
    before = run_folder.files()
    with pytest.raises(error, match=words):
        run_folder.split(**options)
    assert run_folder.files() == before


def test_empty_set_raises(run_folder: RunFolder) -> None:
    a = run_folder.of("a", subset="random:300")
    with pytest.raises(ManifestError, match="all: none of the 400 scored samples qualifies"):
        run_folder.split(intersect=(a,), exclude=(a,))
