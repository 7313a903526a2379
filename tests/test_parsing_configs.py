"""Tests of configs built from plain values: values fit their fields, or an error names the key."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from mmaudit.audit.errors import ConfigError
from mmaudit.audit.parsing import build_config
from mmaudit.cli.config import load_config


@dataclass(frozen=True, kw_only=True)
class Inner:
    """A section."""

    rate: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Every kind of field."""

    size: int = 1
    name: str | None = None
    rates: tuple[float, ...] = ()
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None


def test_valid_values_build_a_config() -> None:
    content = {"size": 3, "name": None, "rates": [1, 0.5], "inner": {"rate": 2}, "maybe": {"rate": 1}}
    expected = Outer(size=3, rates=(1.0, 0.5), inner=Inner(rate=2.0), maybe=Inner(rate=1.0))
    assert build_config(Outer, content, where="") == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"size": 2**63}, "config key size has 64 bits"),
        ({"size": 10**5_000}, "config key size has 16,610 bits"),
        ({"size": True}, "config key size is True; it must be of type int"),
        ({"size": 1.5}, "config key size is 1.5; it must be of type int"),
        ({"name": "a\0"}, "config key name contains a NUL character"),
        ({"name": "\ud800"}, "config key name is not UTF-8"),
        ({"name": {"a": 1}}, "config key name is a table; it must be of type str"),
        ({"rates": [0.5, float("nan")]}, "config key rates is nan; it must be a finite number"),
        ({"rates": 0.5}, "config key rates is 0.5; it must be a list"),
        ({"inner": {"rate": float("inf")}}, r"config key inner\.rate is inf; it must be a finite number"),
        ({"inner": {"rate": 10**400}}, r"config key inner\.rate has 1,329 bits"),
        ({"maybe": 5}, r"config key maybe is a section; set maybe\.KEY"),
        ({"nam": 5}, "no config key nam; did you mean name"),
    ],
)
def test_invalid_values_raise_error_naming_the_key(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        build_config(Outer, content, where="")
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a = " + "[" * 5_000 + "]" * 5_000, "nested too deep"),
        (".".join("a" * 20_000) + " = 1", "nested too deep"),
        ("seed = " + "9" * 5_000, "integer string conversion"),
        ("seed = ", "Invalid value"),
        ("seed = 99999999999999999999", "config key seed has 67 bits"),
        ("posterior = nan", "config key posterior is nan; it must be a finite number"),
        ("[probe]\nkind = [[[[1]]]]", r"config key probe\.kind is a list"),
    ],
)
def test_invalid_config_file_raises_error(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "c.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason):
        load_config(path)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ("seed=" + "9" * 5_000, "--set seed: its value cannot be read"),
        ("probe.kind=" + "[" * 5_000 + "]" * 5_000, r"--set probe\.kind: its value cannot be read: it is nested"),
        ("probe..folds=3", "no config key"),
        ("=3", "no config key"),
        ("probe=3", "config key probe is a section"),
        ("posterior=inf", "it must be a finite number"),
    ],
)
def test_invalid_setting_raises_error(setting: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        load_config(None, [setting])


def test_folder_as_config_raises_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="it is a folder, not a regular file"):
        load_config(tmp_path)
