"""What ``compress doctor`` looks at."""

from __future__ import annotations

import importlib.metadata
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from compress import doctor
from compress.doctor import Check, Package

PROJECT = Path(__file__).parents[1] / "pyproject.toml"


def test_the_required_packages_are_those_of_the_project() -> None:
    project = tomllib.loads(PROJECT.read_text())["project"]
    wanted = [re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in project["dependencies"]]
    assert [m and (m[1], m[2]) for m in wanted] == [(p.name, p.least) for p in doctor.REQUIRED]
    least = ".".join(map(str, doctor.LEAST_PYTHON))
    assert project["requires-python"] == f">={least}"
    extras = project["optional-dependencies"]
    assert all(extra in extras for *_, extra in doctor.OPTIONAL)


@pytest.mark.parametrize(
    ("found", "least", "expected"),
    [
        ("2.14.1", "2.11", True),
        ("2.9.1", "2.11", False),
        ("2.14.1+cpu", "2.14.1", True),
        ("6", "6.0", True),
        ("6.0.0", "6", True),
        ("2.11rc1", "2.11", True),
        ("5.9", "6", False),
        ("", "1", False),
        ("unknown", "1", False),
    ],
)
def test_versions_compare_by_number(found: str, least: str, expected: bool) -> None:
    assert doctor.at_least(found, least) is expected


def test_everything_here_is_found(tmp_path: Path) -> None:
    checks = doctor.examine(tmp_path)
    named = {check.name: check for check in checks}
    assert named["numpy"] == Check("required", "numpy", "ok", importlib.metadata.version("numpy"))
    assert named["onnxruntime"].status == "ok"
    assert {"cpu", "threads", "processes", "memory", "disk"} <= named.keys()
    assert named["processes"].detail.startswith("torchrun shares the training: ")
    assert doctor.exit_code(checks) == 0
    assert doctor.as_dict(checks)["ready"] is True
    for check in checks:
        assert check.detail
        assert check.status == "ok" or check.fix, f"{check.name} is {check.status} without a fix"


def test_a_missing_requirement_has_a_fix_and_ends_with_6(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", (Package("no-such-package", "no_such_module", "1.2"),))
    checks = doctor.examine(tmp_path)
    assert checks[1] == Check(
        "required", "no-such-package", "missing", "not installed", "pip install 'no-such-package>=1.2'"
    )
    assert doctor.exit_code(checks) == 6
    assert doctor.as_dict(checks)["ready"] is False
    assert any(check.group == "runtimes" and "not looked at" in check.detail for check in checks)


def test_an_old_requirement_is_named_with_both_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(doctor, "REQUIRED", (Package("numpy", "numpy", "999"),))
    check = doctor.examine(tmp_path)[1]
    assert check.status == "missing"
    assert check.detail == f"{importlib.metadata.version('numpy')} is too old, 999 is needed"
    assert check.fix == "pip install 'numpy>=999'"


def test_an_optional_package_may_be_absent() -> None:
    check = doctor._optional("no-such-package", "no_such_module", "things", "demo")
    assert check.status == "off"
    assert check.fix == "pip install 'compress-release[demo]'"
    assert doctor.exit_code((check,)) == 0


def test_a_package_that_stands_in_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        if name == "onnxruntime-gpu":
            return "1.30"
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert doctor.version_of("onnxruntime") == "1.30"
    assert doctor.version_of("torch") == ""


def test_an_unusable_runtime_is_required_or_not() -> None:
    off = SimpleNamespace(name="tensorrt", usable=False)
    missing = SimpleNamespace(name="onnxruntime", usable=False)
    assert (doctor._state(off), doctor._state(missing)) == ("off", "missing")


def test_little_memory_and_disk_are_low_with_a_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import psutil

    memory = SimpleNamespace(available=2**30, total=4 * 2**30)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=2**29))
    low = {check.name: check for check in doctor._machine(tmp_path)}
    assert low["memory"].status == "low"
    assert low["memory"].detail == "1.0 GiB of 4.0 GiB free"
    assert low["disk"].status == "low"
    assert low["disk"].detail == "0.5 GiB free here"
    assert low["memory"].fix
    assert low["disk"].fix
    assert doctor.exit_code(tuple(low.values())) == 0


def test_a_check_that_fails_hides_no_other(tmp_path: Path) -> None:
    named = {check.name: check for check in doctor._machine(tmp_path / "not there")}
    assert named["disk"].status == "low"
    assert "FileNotFoundError" in named["disk"].detail
    assert named["memory"].status in ("ok", "low")
