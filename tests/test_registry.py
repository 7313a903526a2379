import importlib
import sys
from pathlib import Path

import pytest

from mmaudit.audit.errors import ConfigError
from mmaudit.audit.registry import Entry, Registry


def registry() -> Registry:
    return Registry({"encode": Entry("encoder:JSONEncoder", "built in")}, package="json", group="t.group", option="--x")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install a package whose entry points are `extra`, `encode` (a built-in name) and `broken`."""
    (tmp_path / "t_plugin.py").write_text("def extra():\n    return 7\n")
    info = tmp_path / "t_plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: t-plugin\nVersion: 1\n")
    lines = ["[t.group]", "extra = t_plugin:extra", "encode = t_plugin:extra", "broken = t_plugin:absent"]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_built_in_method_is_loaded_by_name() -> None:
    import json

    assert registry().load("encode") is json.JSONEncoder
    assert list(registry()) == ["encode"]
    assert registry()["encode"].help == "built in"


def test_installed_method_is_imported_only_when_it_is_named(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry().names() == ("encode", "broken", "extra")
    assert "t_plugin" not in sys.modules
    assert registry().load("extra")() == 7
    monkeypatch.delitem(sys.modules, "t_plugin")


def test_built_in_method_precedes_an_installed_one_of_its_name(installed: Path) -> None:
    import json

    assert registry().load("encode") is json.JSONEncoder


def test_source_digest_follows_source_and_version_without_importing_them(installed: Path) -> None:
    sys.modules.pop("t_plugin", None)  # of another test
    assert registry().source_digest("encode") == ""
    digests = [registry().source_digest("extra")]
    (installed / "t_plugin.py").write_text("def extra():\n    return 8\n")
    digests.append(registry().source_digest("extra"))
    metadata = installed / "t_plugin-1.dist-info" / "METADATA"
    metadata.write_text("Metadata-Version: 2.1\nName: t-plugin\nVersion: 2\n")
    importlib.invalidate_caches()
    digests.append(registry().source_digest("extra"))
    (installed / "t_plugin.py").unlink()
    (installed / "t_plugin").mkdir()
    for name, content in (("__init__", "from .part import extra\n"), ("part", "def extra(): ...\n")):
        (installed / "t_plugin" / f"{name}.py").write_text(content)
    importlib.invalidate_caches()
    digests.append(registry().source_digest("extra"))
    (installed / "t_plugin" / "part.py").write_text("def extra(): return 1\n")
    digests.append(registry().source_digest("extra"))
    assert len({*digests}) == 5
    assert "t_plugin" not in sys.modules
    with pytest.raises(ConfigError, match="--x extr: no such name"):
        registry().source_digest("extr")


def test_unknown_and_broken_methods_are_config_errors(installed: Path) -> None:
    with pytest.raises(ConfigError, match="--x extr: no such name; did you mean extra"):
        registry().load("extr")
    with pytest.raises(ConfigError, match=r"--x broken: t_plugin:absent cannot be loaded: AttributeError: .*absent"):
        registry().load("broken")
    sys.modules.pop("t_plugin", None)


@pytest.mark.parametrize("line", ["raise RuntimeError('no\\ndriver')", "1 / 0", "def (", "import absent_module"])
def test_any_exception_on_import_is_a_config_error_in_one_line(installed: Path, line: str) -> None:
    (installed / "t_plugin.py").write_text(f"{line}\n")
    pattern = r"--x extra: t_plugin:extra cannot be loaded: (Runtime|ZeroDivision|Syntax|ModuleNotFound)Error: ."
    with pytest.raises(ConfigError, match=pattern) as caught:
        registry().load("extra")
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_interrupt_on_import_is_not_caught(installed: Path, error: type[BaseException]) -> None:
    (installed / "t_plugin.py").write_text(f"raise {error.__name__}\n")
    with pytest.raises(error):
        registry().load("extra")


def test_metadata_of_packages_are_read_for_names_that_are_not_built_in_only(monkeypatch: pytest.MonkeyPatch) -> None:
    groups: list[str] = []

    def read(*, group: str) -> tuple[()]:
        groups.append(group)
        return ()

    monkeypatch.setattr("mmaudit.audit.registry.entry_points", read)
    assert registry().offers("encode")
    registry().check("encode")
    registry().load("encode")
    assert groups == []
    assert not registry().offers("extra")
    assert groups == ["t.group"]
