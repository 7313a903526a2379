"""Laws of a recipe: sets combine as sets do, a gate writes nothing, and what was made can be made again."""

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
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.errors import ConfigError, GateError, ManifestError, ScoreError
from mmaudit.audit.scores.table import ScoreTable, read_scores, write_scores
from mmaudit.audit.storage import write_json
from mmaudit.cli.manifests import replay
from mmaudit.rebalance.balanced import BalancedConfig
from mmaudit.rebalance.manifest import dropped_path, provenance_of, read_dropped, read_manifest
from mmaudit.rebalance.recipe import Recipe, Split, balance_path, make_split, recipe_of
from mmaudit.rebalance.score_tables import open_scores

N = 400
AV = "audio:visual"


def table(n: int = N, *, seed: int = 0, **more: Any) -> ScoreTable:
    rng = np.random.default_rng(seed)
    label = rng.integers(0, 3, n).astype(np.int32)
    columns: dict[str, Any] = {
        "sample_id": np.array([f"s{number:04d}" for number in range(n)], dtype=object),
        "label": label,
        "label_name": np.array([f"class {one}" for one in label], dtype=object),
        "modalities": ("audio", "visual"),
        "confidence": rng.beta(2, 2, (n, 2)).astype(np.float32),
        "split": rng.choice(np.array(["train", "test"], dtype=object), n, p=[0.75, 0.25]),
        "balance": rng.uniform(-1, 1, n).astype(np.float32),
        "p_balanced": rng.random(n).astype(np.float32),
        "provenance": {"fingerprint": "one"},
    }
    return ScoreTable(**{**columns, **more})


class Workshop:
    """A run folder with a score table, in which manifests are made."""

    def __init__(self, folder: Path, scores: ScoreTable | None = None) -> None:
        self.folder = folder
        self.scores = folder / "scores.parquet"
        folder.mkdir(parents=True, exist_ok=True)
        write_scores(table() if scores is None else scores, self.scores)
        write_json({}, folder / "run.json")

    def place(self, name: str) -> Path:
        return self.folder / "manifests" / f"{name}.parquet"

    def split(self, *, name: str | None = None, dry: bool = False, scores: Any = None, **recipe: Any) -> Split:
        return self.make(Recipe(**recipe), name=name, dry=dry, scores=scores)

    def make(self, recipe: Recipe, *, name: str | None = None, dry: bool = False, scores: Any = None) -> Split:
        source = scores or self.scores
        shards = open_scores(source, seed=recipe.seed)
        named = source if isinstance(source, (str, Path)) else None
        return make_split(shards, recipe, self.place, scratch=self.folder, name=name, scores=named, dry=dry)

    def of(self, name: str, **recipe: Any) -> str:
        """Make a manifest and give its file, as recipes name it."""
        return str(self.split(name=name, **recipe).path)

    def files(self) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in self.folder.rglob("*") if path.is_file()}


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    return Workshop(tmp_path / "run")


def path_of(made: Split) -> Path:
    assert made.path is not None
    return made.path


def ids(made: Split | str) -> set[str]:
    path = Path(made) if isinstance(made, str) else path_of(made)
    return set(read_manifest(path).table["sample_id"].to_pylist())


def reasons(made: Split) -> dict[str, str]:
    path = path_of(made)
    left = read_dropped(path, read_manifest(path))
    assert left is not None
    return dict(zip(left["sample_id"].to_pylist(), left["reason"].to_pylist(), strict=True))


def test_sets_combine_as_sets_do(shop: Workshop) -> None:
    a = shop.of("a", subset="random:250")
    b = shop.of("b", subset="audio-preferred")
    c = shop.of("c", subset="most-balanced:100")
    audio, everyone = ids(b), set(read_scores(shop.scores).sample_id)
    assert len(everyone) == N
    cases: list[tuple[dict[str, Any], set[str]]] = [
        ({"intersect": (a, b)}, ids(a) & ids(b)),
        ({"intersect": (a, b, c)}, ids(a) & ids(b) & ids(c)),
        ({"exclude": (a,)}, everyone - ids(a)),
        ({"exclude": (a, b)}, everyone - ids(a) - ids(b)),
        ({"intersect": (a,), "exclude": (b, c)}, ids(a) - ids(b) - ids(c)),
        ({"intersect": (a, a)}, ids(a)),
        ({"subset": "audio-preferred", "intersect": (a,)}, audio & ids(a)),
        ({"dominated": "visual:0.2", "exclude": (a, c)}, ids(shop.of("d", dominated="visual:0.2")) - ids(a) - ids(c)),
        ({"gmm": "balanced", "intersect": (a,)}, ids(shop.of("g", gmm="balanced")) & ids(a)),
    ]
    for number, (recipe, expected) in enumerate(cases):
        made = shop.split(name=f"case-{number}", **recipe)
        assert ids(made) == expected
        assert ids(made) | set(reasons(made)) == everyone
        assert len(reasons(made)) == N - len(expected) == made.numbers["dropped"]


def test_the_ruled_out_say_by_what(shop: Workshop) -> None:
    a, b = shop.of("a", subset="random:250"), shop.of("b", subset="random:100", seed=5)
    found = reasons(shop.split(subset="audio-preferred", intersect=(a,), exclude=(b,)))
    everyone = set(read_scores(shop.scores).sample_id)
    assert {one for one, reason in found.items() if reason == "not-in-a"} == everyone - ids(a)
    assert {one for one, reason in found.items() if reason == "in-b"} == ids(a) & ids(b)
    left = {one for one, reason in found.items() if reason == "discrepancy-too-low"}
    assert left == (ids(a) - ids(b)) - ids(shop.of("p", subset="audio-preferred"))


def test_the_ruled_out_have_no_part_in_what_is_chosen(shop: Workshop) -> None:
    """Among the members alone, a rule chooses what it would choose if there were no others."""
    a = shop.of("a", subset="random:250")
    some = read_scores(shop.scores).to_arrow()
    pq.write_table(some.filter(pa.array([one in ids(a) for one in some["sample_id"].to_pylist()])), shop.folder / "few")
    recipes: list[dict[str, Any]] = [
        {"balanced": BalancedConfig(bins=5)},
        {"balanced": BalancedConfig(bins=5, size=60)},
        {"subset": "most-balanced:30%"},
        {"subset": "random:50"},
        {"resplit": "80/8/12"},
        {"resplit": "80/20", "balanced": BalancedConfig(bins=5)},
    ]
    for number, recipe in enumerate(recipes):
        within = shop.split(name=f"w{number}", intersect=(a,), **recipe)
        alone = shop.split(name=f"a{number}", scores=shop.folder / "few", **recipe)
        one, other = (read_manifest(path_of(made)).table.drop_columns("subset") for made in (within, alone))
        assert one.equals(other)
        assert len(one) > 10


def test_like_counts_each_split_and_class_of_another(shop: Workshop) -> None:
    a = shop.of("a", subset="visual-preferred")
    made = shop.split(subset="random", like=a)
    pairs = [
        Counter(zip(*(read_manifest(path).table[name].to_pylist() for name in ("split", "label")), strict=True))
        for path in (Path(a), path_of(made))
    ]
    assert pairs[0] == pairs[1]
    assert path_of(made).stem == "random-like-a"
    assert not ids(made) <= ids(a)
    with pytest.raises(ManifestError, match="random-like-a: there are too few samples to draw as many"):
        shop.split(subset="random", like=a, exclude=(a,))


def test_names_say_what_and_in_what(shop: Workshop) -> None:
    a, b = shop.of("a", subset="random:300"), shop.of("b", subset="random:100", seed=1)
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
        made = shop.split(dry=True, **recipe)
        assert made.numbers["name"] == name
    assert path_of(shop.split(name="mine", exclude=(b,))).stem == "mine"


def test_no_manifest_overwrites_what_it_is_made_from(shop: Workshop) -> None:
    a = shop.of("balanced", subset="random:300")
    before = shop.files()
    for recipe in ({"intersect": (a,)}, {"exclude": (a,)}, {"subset": "random", "like": a}):
        with pytest.raises(ConfigError, match=r"balanced would overwrite the manifest that it is made from; .*--name"):
            shop.split(name="balanced", **recipe)
    assert shop.files() == before
    assert path_of(shop.split(balanced=BalancedConfig(bins=4), intersect=(a,))).stem == "balanced-in-balanced"


def test_manifests_of_other_data_are_refused(shop: Workshop, tmp_path: Path) -> None:
    other = Workshop(tmp_path / "other", table(provenance={"fingerprint": "two"}))
    more = Workshop(tmp_path / "more", table(N + 50))
    strange, wide = other.of("strange", subset="random:50"), more.of("wide", exclude=(more.of("x", subset="random:9"),))
    outside = len(ids(wide) - set(read_scores(shop.scores).sample_id))
    for recipe in ({"intersect": (strange,)}, {"exclude": (strange,)}, {"subset": "random", "like": strange}):
        with pytest.raises(ManifestError, match=r"strange\.parquet was made from another dataset than these scores"):
            shop.split(**recipe)
    for recipe in ({"intersect": (wide,)}, {"exclude": (wide,)}, {"subset": "random", "like": wide}):
        with pytest.raises(ManifestError, match=f"{outside} of the {N + 41} samples of wide are not among these"):
            shop.split(**recipe)
    with pytest.raises(ManifestError, match="no such file"):
        shop.split(intersect=("nowhere.parquet",))


def test_a_size_beyond_the_tolerance_is_refused_and_nothing_written(shop: Workshop) -> None:
    before = shop.files()
    hard = BalancedConfig(bins=10, size=300, tolerance=0.01)
    with pytest.raises(
        GateError, match=r"uniform of 0\.01 cannot be reached: 300 samples.* reach 0\.\d+; without --size"
    ) as told:
        shop.split(balanced=hard)
    reached = float(str(told.value).split("reach ")[1].split(";")[0])
    assert "nothing was written" in str(told.value)
    assert shop.files() == before
    free = shop.split(balanced=replace(hard, tolerance=None), dry=True).numbers
    assert reached == pytest.approx(max(free["distances"].values()), abs=1e-4)
    assert shop.split(balanced=replace(hard, tolerance=reached + 1e-3)).numbers["kept"] == 300


def test_weights_beyond_the_tolerance_are_refused(shop: Workshop) -> None:
    before = shop.files()
    light = BalancedConfig(bins=10, by="weight", max_weight=1.0, tolerance=0.05)
    with pytest.raises(GateError, match=r"the best that weights up to 1 reach is 0\.\d+; raise split\.max_weight"):
        shop.split(balanced=light)
    assert shop.files() == before
    made = shop.split(balanced=replace(light, max_weight=1e6))
    assert max(made.numbers["distances"].values()) < 1e-6
    assert made.numbers["kept"] == N


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


def made_all(shop: Workshop) -> dict[str, Split]:
    """Make a manifest of every kind."""
    inputs = {"a": "random:300", "b": "random:200", "c": "audio-preferred"}
    files = {name: shop.of(name, subset=text, seed=number) for number, (name, text) in enumerate(inputs.items())}
    found = {}
    for name, options in KINDS.items():
        told = dict(options)
        for key in ("intersect", "exclude"):
            told |= {key: tuple(files[each] for each in told[key])} if key in told else {}
        told |= {"like": files[told["like"]]} if "like" in told else {}
        found[name] = shop.split(name=name, **told)
    return found


def test_a_dry_run_writes_nothing_and_tells_the_same(shop: Workshop) -> None:
    made = made_all(shop)
    before = shop.files()
    for name, split in made.items():
        recipe = recipe_of(provenance_of(path_of(split))["rule"], folder=path_of(split).parent)
        dry = shop.make(recipe, name=name, dry=True)
        assert dry.path is None
        assert dry.numbers == split.numbers
    assert shop.files() == before


def test_the_numbers_lie_beside_the_manifest(shop: Workshop) -> None:
    for name, split in made_all(shop).items():
        path = path_of(split)
        numbers = json.loads(balance_path(path).read_text())
        assert balance_path(path).name == f"{name}.balance.json"
        assert numbers.pop("digest") == read_manifest(path).digest()
        assert numbers.pop("recipe") == provenance_of(path)["rule"]
        assert numbers == json.loads(json.dumps(split.numbers))
        assert numbers["kept"] == len(read_manifest(path))
        assert numbers["kept"] + numbers["dropped"] == numbers["scored"] == N
        assert Counter(reasons(split).values()) == numbers["reasons"]


def test_replay_is_identical_also_where_the_run_has_moved(shop: Workshop, tmp_path: Path) -> None:
    made = made_all(shop)
    moved = tmp_path / "elsewhere" / "deep" / "run"
    shutil.copytree(shop.folder, moved)
    for folder in (shop.folder, moved):
        if folder == moved:
            shutil.rmtree(shop.folder)
        before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for name in made:
            found = replay(name, run=folder)
            assert found["identical"], name
            assert found["differ"] == []
            assert Path(found["scores"]).resolve() == (folder / "scores.parquet").resolve()
        assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
        assert not [path for path in folder.rglob(".*")]


@pytest.mark.parametrize("name", sorted(KINDS))
def test_replay_tells_where_one_score_has_changed(shop: Workshop, name: str) -> None:
    path = path_of(only(shop, name))
    scores = read_scores(shop.scores)
    confidence = scores.confidence.copy()
    confidence[0, 0] = 1 - confidence[0, 0]
    write_scores(replace(scores, confidence=confidence), shop.scores)
    found = replay(path)
    assert not found["identical"]
    kept = scores.sample_id[0] in ids(str(path))
    assert (f"{name}.parquet" if kept else f"{name}.dropped.parquet") in found["differ"]


def only(shop: Workshop, name: str) -> Split:
    """Make a manifest of one kind, with what it is made from."""
    told = dict(KINDS[name])
    files = {each: shop.of(each, subset="random:200", seed=seed) for seed, each in enumerate("abc")}
    for key in ("intersect", "exclude"):
        told |= {key: tuple(files[each] for each in told[key])} if key in told else {}
    told |= {"like": files["a"]} if "like" in told else {}
    return shop.split(name=name, **told)


def test_replay_tells_where_a_manifest_it_was_made_from_has_changed(shop: Workshop) -> None:
    a = shop.of("a", subset="random:300")
    path = path_of(shop.split(name="m", exclude=(a,)))
    assert replay(path)["identical"]
    shop.of("a", subset="random:299")
    assert replay(path)["differ"] == ["m.parquet", "m.dropped.parquet"]
    dropped_path(Path(a)).unlink()
    Path(a).unlink()
    with pytest.raises(ManifestError, match=r"no such file: .*a\.parquet"):
        replay(path)


def test_replay_needs_the_scores(shop: Workshop, tmp_path: Path) -> None:
    path = path_of(shop.split(subset="audio-preferred"))
    away = tmp_path / "away.parquet"
    shop.scores.rename(away)
    with pytest.raises(
        ManifestError, match=r"score table .*scores\.parquet of the manifest not found; pass it with --scores"
    ):
        replay(path)
    with pytest.raises(ScoreError, match=r"no score table .*nowhere"):
        replay(path, scores=tmp_path / "nowhere.parquet")
    found = replay(path, scores=away)
    assert (found["identical"], found["scores"]) == (True, str(away))
    dropped_path(path).unlink()
    assert replay(path, scores=away)["differ"] == [dropped_path(path).name]


@pytest.mark.parametrize("how", ["folder", "glob", "files"])
def test_shards_are_replayed_as_they_were_named(shop: Workshop, how: str) -> None:
    folder = shop.folder / "shards"
    folder.mkdir()
    whole = pq.read_table(shop.scores)
    for number in range(4):
        pq.write_table(whole.slice(number * 100, 100), folder / f"{3 - number}.parquet")
    named: dict[str, Any] = {"folder": folder, "glob": str(folder / "*.parquet"), "files": sorted(folder.iterdir())}
    made = shop.split(balanced=BalancedConfig(bins=5), scores=named[how])
    if how == "files":
        with pytest.raises(ManifestError, match=r"does not name the score tables .*; name them with --scores"):
            replay(path_of(made))
        assert replay(path_of(made), scores=folder)["identical"]
    else:
        assert replay(path_of(made))["identical"]


def test_a_manifest_without_a_recipe_cannot_be_made_again(shop: Workshop) -> None:
    for record in ({}, {"seed": 0}, {"scores": "x.parquet"}):
        with pytest.raises(ManifestError, match="the manifest does not say how it was made"):
            recipe_of(record, folder=shop.folder)


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workshop, list[str]]:
    shop = Workshop(tmp_path_factory.mktemp("recipes") / "run", table(60))
    return shop, [shop.of(name, subset="random:55", seed=seed) for seed, name in enumerate("ab")]


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


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    KIND,
    st.integers(0, 2**32),
    st.none() | st.sampled_from([AV, "visual:audio", "audio"]),
    st.lists(st.integers(0, 1), max_size=2),
    st.none() | st.sampled_from(["80/20", "60/20/20"]),
)
def test_a_recipe_is_what_its_manifest_records(
    stocked: tuple[Workshop, list[str]],
    kind: dict[str, Any],
    seed: int,
    between: str | None,
    within: list[int],
    again: str | None,
) -> None:
    shop, inputs = stocked
    if kind.get("like"):
        kind, within, again = {**kind, "like": inputs[0]}, [], None
    if not (kind or within):
        again = "80/20"
    named = tuple(inputs[each] for each in within)
    if kind.get("balanced") is not None and kind["balanced"].size is not None:
        kind = {"balanced": replace(kind["balanced"], size=min(kind["balanced"].size, 20))}
    recipe = Recipe(seed=seed, between=between, intersect=named, resplit=again, **kind)
    path = path_of(shop.make(recipe, name="m"))
    record = json.loads(json.dumps(provenance_of(path)["rule"]))
    found = recipe_of(record, folder=path.parent)
    assert absolute(found) == absolute(recipe)


def absolute(recipe: Recipe) -> Recipe:
    """Name all files in full."""
    return replace(
        recipe,
        like=None if recipe.like is None else str(Path(recipe.like).resolve()),
        intersect=tuple(str(Path(each).resolve()) for each in recipe.intersect),
        exclude=tuple(str(Path(each).resolve()) for each in recipe.exclude),
    )


def test_a_recipe_records_only_what_was_said(shop: Workshop) -> None:
    record = provenance_of(path_of(shop.split(subset="audio-preferred")))["rule"]
    assert record == {
        "seed": 0,
        "subset": "audio-preferred",
        "posterior": 0.5,
        "scores": "../scores.parquet",
        "inputs": {},
    }
    a = shop.of("a", subset="random:300")
    record = provenance_of(path_of(shop.split(exclude=(a,))))["rule"]
    assert record["exclude"] == ["a.parquet"]
    assert record["inputs"] == {"a.parquet": read_manifest(a).digest()}
    assert set(asdict(Recipe(subset="balanced"))) == {field.name for field in fields(Recipe)}


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "say which samples: exactly one of --balanced, --subset, --dominated and --gmm, or --intersect"),
    ({"subset": "balanced", "gmm": "balanced"}, "exactly one of"),
    ({"balanced": BalancedConfig(), "dominated": "audio:0.2"}, "exactly one of"),
    ({"like": "x", "subset": "balanced"}, "--like goes with --subset random"),
    ({"like": "x", "resplit": "80/20"}, "--like goes with --subset random"),
]


@pytest.mark.parametrize(("options", "words"), WRONG)
def test_wrong_recipes_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Recipe(**options)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"resplit": "80/x"}, ConfigError, "--resplit 80/x: not of the form"),
        ({"subset": "ballanced"}, ConfigError, "--subset ballanced: no such subset; did you mean balanced"),
        ({"dominated": "visual"}, ConfigError, "not of the form MODALITY:T"),
        ({"gmm": "both"}, ConfigError, "--gmm both: no such side"),
        ({"subset": "balanced", "between": "audio:text"}, ConfigError, "no modality 'text'"),
        ({"subset": "random:401"}, ConfigError, "401 samples cannot be had: the largest is 400"),
        ({"balanced": BalancedConfig(size=401)}, ConfigError, "--size 401 cannot be had: the largest is 400"),
        ({"dominated": "audio:0.999"}, ManifestError, "audio-dominated-0.999: none of the 400 scored samples"),
    ],
)
def test_wrong_words_write_nothing(shop: Workshop, options: dict[str, Any], error: Any, words: str) -> None:
    before = shop.files()
    with pytest.raises(error, match=words):
        shop.split(**options)
    assert shop.files() == before


def test_a_set_without_samples_is_refused(shop: Workshop) -> None:
    a = shop.of("a", subset="random:300")
    with pytest.raises(ManifestError, match="all: none of the 400 scored samples qualifies"):
        shop.split(intersect=(a,), exclude=(a,))
