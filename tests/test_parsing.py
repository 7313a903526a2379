"""Tests of parsing JSON: values are finite, of limited depth and of the expected shape, or one line names the key."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmaudit.audit.errors import ConfigError, RunError
from mmaudit.audit.parsing import (
    MAX_DEPTH,
    RequiredKeys,
    Shape,
    build_config,
    check_shape,
    decode_text,
    fold_text,
    parse_data_json,
    parse_json,
)
from mmaudit.audit.storage import read_json
from mmaudit.cli.config import load_config

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3),
    max_leaves=10,
)


@given(VALUES)
def test_parse_inverts_dumps(value: Any) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "nested more than 64 levels deep"),
        ('{"a":' * 500 + "1" + "}" * 500, "nested more than 64 levels deep"),
        ("NaN", "nan is not a JSON number"),
        ('{"a": [1e999]}', "inf is not a JSON number"),
        ("9" * 5_000, "integer string conversion"),
        ('{"a": 18446744073709551616}', "integer of more than 64 bits"),
        (b"\xff\xfe{", "codec can't decode|Expecting value"),
        ("", "Expecting value"),
    ],
)
def test_invalid_json_raises_value_error(text: str | bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_maximum_depth_is_parsed() -> None:
    assert parse_data_json("[" * MAX_DEPTH + "]" * MAX_DEPTH) is not None
    with pytest.raises(ValueError, match="nested more than"):
        parse_data_json("[" * (MAX_DEPTH + 2) + "]" * (MAX_DEPTH + 2))


SHAPE: Shape = {"seed": int, "names": [str], "probe": {"width": float, "kind": (str, type(None))}}


@given(VALUES)
def test_check_shape_raises_only_value_error(value: Any) -> None:
    if not isinstance(value, dict):
        with pytest.raises(ValueError, match=r"the document is .*; it must be an object"):
            check_shape(value, SHAPE)
    else:
        check_shape(value, SHAPE)  # the shape has none of these keys


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ({"seed": "x"}, 'seed is "x"; it must be an integer'),
        ({"seed": True}, "seed is true; it must be an integer"),
        ({"names": "audio"}, "names is .*; it must be a list"),
        ({"names": ["audio", 5]}, r"names\[1\] is 5; it must be text"),
        ({"probe": []}, r"probe is \[\]; it must be an object"),
        ({"probe": {"width": None}}, r"probe\.width is null; it must be a number"),
        ({"probe": {"kind": 5}}, r"probe\.kind is 5; it must be text or null"),
        ({"probe": {"kind": "a\0b"}}, r"probe\.kind contains a NUL"),
    ],
)
def test_error_names_the_wrong_key(content: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_shape(content, SHAPE)
    check_shape({"seed": 3, "names": ["a"], "probe": {"width": 1, "kind": None}, "other": [[]]}, SHAPE)


def test_file_with_wrong_shape_raises_error(tmp_path: Any) -> None:
    path = tmp_path / "run.json"
    for text, reason in (("[1]", "the document is"), ('{"seed": []}', "seed is"), ("[" * 9_999, "nested")):
        path.write_text(text)
        with pytest.raises(RunError, match=rf"run\.json cannot be read: .*{reason}"):
            read_json(path, error=RunError, shape=SHAPE)


def test_complete_requires_all_keys_and_star_matches_other_keys() -> None:
    shape: Shape = {"before": RequiredKeys(ks=float), "distances": {"*": float}}
    check_shape({"before": {"ks": 1, "other": "x"}, "distances": {"train": 0.5}}, shape)
    with pytest.raises(ValueError, match="before lacks ks"):
        check_shape({"before": {}}, shape)
    with pytest.raises(ValueError, match=r'distances\.test is "x"; it must be a number'):
        check_shape({"distances": {"train": 0.5, "test": "x"}}, shape)


def test_keys_with_question_mark_are_optional() -> None:
    shape = RequiredKeys({"n": int, "branches?": {"*": RequiredKeys(accuracy=float)}, "*": str})
    for content in ({"n": 1}, {"n": 1, "branches": {}}, {"n": 1, "branches": {"fused": {"accuracy": 0.5}}, "x": "y"}):
        check_shape(content, shape)
    for content, reason in (
        ({}, "the document lacks n"),
        ({"n": 1, "branches": []}, "branches is"),
        ({"n": 1, "branches": {"fused": {}}}, r"branches\.fused lacks accuracy"),
        ({"n": 1, "x": 2}, "x is 2"),
    ):
        with pytest.raises(ValueError, match=reason):
            check_shape(content, shape)


def test_tuple_of_shapes_may_include_an_object() -> None:
    shape: Shape = {"calibration": (RequiredKeys(ece=float), type(None))}
    for calibration in (None, {"ece": 0.5}):
        check_shape({"calibration": calibration}, shape)
    value_of_reason: dict[str, Any] = {
        "calibration lacks ece": {},
        "calibration is 5": 5,
        r"calibration\.ece": {"ece": "x"},
    }
    for reason, value in value_of_reason.items():
        with pytest.raises(ValueError, match=reason):
            check_shape({"calibration": value}, shape)


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


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_text_is_decoded_by_its_mark(encoding: str) -> None:
    assert decode_text("a\nb\u00e9".encode(encoding)) == "a\nb\u00e9"
    for endian in ("le", "be"):
        assert decode_text("\ufeffa\u00e9".encode(f"utf-16-{endian}")) == "a\u00e9"


def test_text_of_other_encodings_is_named() -> None:
    with pytest.raises(ValueError, match=r"^line 2, byte 2 is not UTF-8: save it as UTF-8$"):
        decode_text("a\nb\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match="is not UTF-16"):
        decode_text("ab".encode("utf-16")[:-1])


def test_folded_text_has_no_case_blanks_or_form() -> None:
    assert fold_text("  Caf\u00e9\tDog ") == fold_text("cafe\u0301 dog")
    assert fold_text("dog") != fold_text("d og")
