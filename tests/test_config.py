"""Tests of the config: TOML round trips, and errors that suggest the right key or value."""

from __future__ import annotations

import sys
from dataclasses import asdict, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmaudit.audit.dataset.dataset import DataConfig
from mmaudit.audit.errors import ConfigError
from mmaudit.audit.parsing import build_config, plain
from mmaudit.audit.probes.config import ProbeConfig
from mmaudit.cli.config import RunConfig, load_config, to_toml
from mmaudit.rebalance.balanced import BalancedConfig
from mmaudit.train import FUSIONS
from mmaudit.train.balancing.mslr import MSLR_MODES
from mmaudit.train.config import FinetuneConfig, OptimConfig
from mmaudit.train.sampling import SAMPLERS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)
POSITIVE = st.floats(1e-9, 1e9)
CONFIGS = st.builds(
    RunConfig,
    seed=st.integers(0, 2**31),
    data=st.builds(
        DataConfig,
        modality=st.lists(TEXT, max_size=3).map(tuple),
        id=st.none() | TEXT,
        group=st.none() | st.just("none"),
        allow_outside=st.booleans(),
        test_fraction=st.floats(0.01, 0.99),
    ),
    probe=st.builds(ProbeConfig, folds=st.integers(2, 99), l2_penalties=st.lists(POSITIVE, min_size=1).map(tuple)),
    split=st.builds(
        BalancedConfig,
        bins=st.integers(2, 99),
        tolerance=st.floats(0, 1),
        size=st.none() | st.integers(1, 99),
        max_weight=st.floats(1, 99),
        grid=st.booleans(),
    ),
    posterior=st.floats(0, 1),
    finetune=st.builds(
        FinetuneConfig,
        fusion=st.sampled_from(["auto", *FUSIONS]),
        sampling=st.sampled_from(sorted(SAMPLERS)),
        balancing=st.just("sum"),
        keep_posterior=st.none() | st.floats(0, 1),
    ),
    optim=st.builds(OptimConfig, lr=POSITIVE, modality_lr=st.sampled_from([(), ("audio=0.5",)])),
    sampling=st.fixed_dictionaries({}, optional={"bss": st.fixed_dictionaries({"beta": st.floats(0.01, 1)})}),
    balancing=st.fixed_dictionaries({"mslr": st.fixed_dictionaries({"mode": st.sampled_from(MSLR_MODES)})}),
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(CONFIGS)
def test_write_then_read_is_equality(tmp_path: Path, config: RunConfig) -> None:
    (tmp_path / "c.toml").write_text(to_toml(plain(config)), encoding="utf-8")
    assert load_config(tmp_path / "c.toml") == config


@given(CONFIGS)
def test_config_equals_its_settings(config: RunConfig) -> None:
    """Every key can be set by `--set SECTION.KEY=VALUE`."""
    written = tomllib.loads(to_toml(plain(config)))
    given_settings = [f"{key}={written.pop(key)}" for key in ("seed", "posterior")]
    assert load_config(None, [*given_settings, *settings_in(written)]) == config


def settings_in(content: dict[str, Any], *, where: str = "") -> list[str]:
    """Return `SECTION.KEY=VALUE` of all values, at every depth."""
    settings_ = []
    for key, value in content.items():
        name = f"{where}{key}"
        settings_ += settings_in(value, where=f"{name}.") if isinstance(value, dict) else [f"{name}={toml_of(value)}"]
    return settings_


def toml_of(value: Any) -> str:
    return tomli_w.dumps({"v": value}).removeprefix("v = ").strip()


def test_no_settings_give_the_default_config() -> None:
    assert load_config() == RunConfig()


def test_toml_holds_every_key_with_a_value() -> None:
    written = tomllib.loads(to_toml(plain(RunConfig())))
    for section in fields(RunConfig):
        value = getattr(RunConfig(), section.name)
        if is_dataclass(value):
            keys = {field.name for field in fields(value) if getattr(value, field.name) is not None}
            assert set(written[section.name]) == keys
        else:
            assert written[section.name] == value


def test_optional_keys_default_to_none() -> None:
    """TOML has no null, so a None that is not the default could not be written."""
    sections = [getattr(RunConfig(), field.name) for field in fields(RunConfig)]
    sections += [
        getattr(section, field.name) for section in sections if is_dataclass(section) for field in fields(section)
    ]
    hints = [field for section in sections if is_dataclass(section) for field in fields(section)]
    optional = [field for field in hints if "None" in str(field.type)]
    assert optional
    assert all(field.default is None for field in optional)


def test_settings_override_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("seed = 3\n[probe]\nfolds = 7\nrepeats = 2\n[optim]\nlr = 1\n")
    config = load_config(tmp_path / "c.toml", ["probe.folds=4", "probe.folds=5", "split.tolerance=0"])
    expected = RunConfig(
        seed=3,
        probe=ProbeConfig(folds=5, repeats=2),
        split=BalancedConfig(tolerance=0.0),
        optim=OptimConfig(lr=1.0),
    )
    assert config == expected
    assert type(config.optim.lr) is type(config.split.tolerance) is float  # integers are accepted as floats


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("data.label=emotion", "emotion"),
        ("data.label='emotion'", "emotion"),
        ('data.label="two words"', "two words"),
        ("data.label=two words", "two words"),
        ("data.label=a=b", "a=b"),
        ("data.label=", ""),
        (" data.label =x", "x"),
    ],
)
def test_bare_word_is_a_string(setting: str, value: str) -> None:
    assert load_config(None, [setting]).data.label == value


def test_list_becomes_a_tuple() -> None:
    config = load_config(None, ["data.modality=['a=x', 'b=y:audio']", "probe.l2_penalties=[1, 0.5]"])
    assert config.data.modality == ("a=x", "b=y:audio")
    assert config.probe.l2_penalties == (1.0, 0.5)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("prob.folds=3", r"no config key prob; did you mean probe\? \(available: seed, data,"),
        ("probe.fold=3", r"no config key probe.fold; did you mean probe.folds\?"),
        ("probe.folds.x=3", "config key probe.folds is .*; it must be of type int"),
        ("sede=3", r"no config key sede; did you mean seed\?"),
        ("zzz=3", "no config key zzz; available: seed, data"),
        ("=3", "no config key ; available"),
        ("probe.folds", "--set probe.folds: not of the form SECTION.KEY=VALUE, such as probe.folds=10"),
        ("probe=3", "config key probe is a section; set probe.KEY"),
        ("probe.folds=many", "config key probe.folds is 'many'; it must be of type int"),
        ("probe.folds=3.0", "config key probe.folds is 3.0; it must be of type int"),
        ("probe.folds=true", "config key probe.folds is True; it must be of type int"),
        ("optim.lr=true", "config key optim.lr is True; it must be of type float"),
        ("optim.lr='1'", "config key optim.lr is '1'; it must be of type float"),
        ("data.allow_outside=1", "config key data.allow_outside is 1; it must be of type bool"),
        ("data.id=7", "config key data.id is 7; it must be of type str"),
        ("split.size=all", "config key split.size is 'all'; it must be of type int"),
        ("data.modality=a=x", "config key data.modality is 'a=x'; it must be a list"),
        ("data.modality=[1]", "config key data.modality is 1; it must be of type str"),
        ("probe.l2_penalties=['a']", "config key probe.l2_penalties is 'a'; it must be of type float"),
        ("probe.folds=1", "probe.folds is 1; it must be at least 2"),
    ],
)
def test_invalid_setting_is_refused(setting: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load_config(None, [setting])


@pytest.mark.parametrize("first", ["seed=1", "seed='x'"])
def test_value_cannot_be_used_as_section(first: str) -> None:
    with pytest.raises(ConfigError, match=r"--set seed\.x: seed is not a section"):
        load_config(None, [first, "seed.x=2"])


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"seed = ", "c.toml is not TOML: "),
        (b"\xff\xfe", "c.toml is not TOML: "),
        (b"[probe]\nfols = 3", r"no config key probe.fols; did you mean probe.folds\?"),
        (b"probe = 3", "config key probe is a section"),
        (b"[[probe]]\nfolds = 3", "config key probe is a section"),
        (b"[probe.folds]\nx = 3", "config key probe.folds is .* of type int"),
    ],
)
def test_invalid_file_is_refused(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "c.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "c.toml")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path / "none.toml", "config file not found: "), (tmp_path, "it is a folder")):
        with pytest.raises(ConfigError, match=words):
            load_config(path)


def test_keywords_override_settings_and_these_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAUDIT_PROBE_FOLDS", "3")
    monkeypatch.setenv("MMAUDIT_FINETUNE_EPOCHS", "7")
    monkeypatch.setenv("MMAUDIT_DATA_ENCODER", "['a=resnet18']")
    config = load_config(settings={"probe.folds": 4}, keywords={"finetune.hidden": 9, "finetune.epochs": None})
    assert (config.probe.folds, config.finetune.epochs, config.finetune.hidden) == (4, 7, 9)
    assert config.data.encoder == ("a=resnet18",)
    assert load_config(None, ["probe.folds=5"], {"probe.folds": 6}).probe.folds == 6


def test_environment_sets_constants_of_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAUDIT_BALANCING_OGM_ALPHA", "0.7")
    monkeypatch.setenv("MMAUDIT_SAMPLING_DUS_EVERY_STEPS", "2")
    config = load_config(settings={"balancing.pmr.alpha": 2})
    assert config.balancing == {"ogm": {"alpha": 0.7}, "pmr": {"alpha": 2}}
    assert config.sampling == {"dus": {"every_steps": 2}}


def test_a_given_config_is_not_changed_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMAUDIT_PROBE_FOLDS", "3")
    config = RunConfig(data=DataConfig(modality=("a", "b")))
    assert load_config(config) == config
    assert load_config(config, keywords={"finetune.epochs": 3}) == replace(config, finetune=FinetuneConfig(epochs=3))


def test_unknown_variable_is_warned_about_and_a_wrong_value_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MMAUDIT_PROBE_FOLD", "3")
    with caplog.at_level("WARNING", "mmaudit"):
        assert load_config() == RunConfig()
    assert "MMAUDIT_PROBE_FOLD is not a setting" in caplog.text
    monkeypatch.setenv("MMAUDIT_PROBE_FOLDS", "many")
    with pytest.raises(ConfigError, match=r"probe\.folds is 'many'; it must be of type int"):
        load_config()


def test_plain_returns_json_values() -> None:
    config = RunConfig(data=DataConfig(modality=("a", "b")))
    content = plain(config)
    assert content["data"]["modality"] == ["a", "b"]
    assert content["probe"]["l2_penalties"] == list(config.probe.l2_penalties)
    assert content["split"]["size"] is None
    assert content.keys() == asdict(config).keys()
    assert (
        build_config(DataConfig, {k: v for k, v in content["data"].items() if v is not None}, where="") == config.data
    )


def test_scoring_config_holds_only_its_own_sections() -> None:
    config = RunConfig()
    assert config.scoring_config().keys() == {"seed", "data", "media", "probe", "network", "mixture"}
    changed = replace(config, split=BalancedConfig(bins=3), finetune=FinetuneConfig(epochs=1))
    assert changed.scoring_config() == config.scoring_config()
    assert replace(config, seed=1).scoring_config() != config.scoring_config()
    assert replace(config, probe=ProbeConfig(folds=3)).scoring_config() != config.scoring_config()
