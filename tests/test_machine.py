"""The machine's description: JSON, true, and silent about who and where."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch

from deploy import machine


def test_it_describes_this_machine() -> None:
    found = json.loads(json.dumps(machine.describe(), allow_nan=False))
    assert found["memory_bytes"] == psutil.virtual_memory().total
    assert found["python"] == platform.python_version()
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["torch_threads"] == torch.get_num_threads()
    assert found["avx512"] == ("avx512f" in machine.cpu_flags())
    assert found["cpu"]
    assert 1 <= found["logical_cpus"] <= (os.cpu_count() or 1)


def test_it_names_no_user_host_or_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("USER", "zaphod")
    monkeypatch.setenv("HOME", "/home/zaphod")
    monkeypatch.setattr(platform, "node", lambda: "heart-of-gold")
    text = json.dumps(machine.describe())
    for secret in (
        "zaphod",
        "heart-of-gold",
        os.uname().nodename,
        str(Path.home()),
        sys.prefix,
        str(Path.cwd()),
    ):
        assert secret not in text


CPUINFO = (
    "processor\t: 0\nmodel name\t: Fast CPU @ 3: GHz\nflags\t\t: fpu sse avx512f\n\nmodel name\t: Other\n"
)


def test_cpu_facts_come_from_the_first_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: CPUINFO)
    assert machine.cpu_model() == "Fast CPU @ 3: GHz"
    assert machine.cpu_flags() == {"fpu", "sse", "avx512f"}


def test_a_system_without_cpuinfo_gives_no_flags_and_still_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert machine.cpu_flags() == frozenset()
    assert machine.cpu_model()


class NvmlError(Exception):
    pass


def nvml(fails: str = "") -> SimpleNamespace:
    """Stands in for pynvml with two devices; the function named `fails` raises."""

    def answer(name: str, value: object) -> object:
        def call(*_: object) -> object:
            if name == fails:
                raise NvmlError
            return value

        return call

    answers = {
        "nvmlInit": None,
        "nvmlShutdown": None,
        "nvmlDeviceGetCount": 2,
        "nvmlSystemGetDriverVersion": "580.1",
        "nvmlDeviceGetHandleByIndex": 0,
        "nvmlDeviceGetName": "NVIDIA H100",
        "nvmlDeviceGetMemoryInfo": SimpleNamespace(total=80 * 2**30),
        "nvmlDeviceGetCudaComputeCapability": (9, 0),
    }
    return SimpleNamespace(
        NVMLError=NvmlError, **{name: answer(name, value) for name, value in answers.items()}
    )


def test_gpus_by_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", nvml())
    expected = {
        "name": "NVIDIA H100",
        "memory_bytes": 80 * 2**30,
        "compute_capability": "9.0",
        "driver": "580.1",
    }
    assert machine.gpus() == [expected, expected]


@pytest.mark.parametrize("module", [None, nvml("nvmlInit"), nvml("nvmlDeviceGetName")])
def test_no_gpu_is_an_empty_list(module: SimpleNamespace | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert machine.gpus() == []


def git(folder: Path, *arguments: str) -> str:
    identity = "-c", "user.name=a", "-c", "user.email=a@b"
    done = subprocess.run(
        ["git", *identity, *arguments], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_commit_of_a_source_tree(tmp_path: Path) -> None:
    assert machine.commit(tmp_path) is None  # no repository
    git(tmp_path, "init", "-q")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "a.py").write_text("a")
    assert machine.commit(tmp_path / "package") is None  # no commit
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert machine.commit(tmp_path / "package") == head
    (tmp_path / "package" / "b.py").write_text("untracked files change nothing")
    assert machine.commit(tmp_path / "package") == head
    (tmp_path / "package" / "a.py").write_text("b")
    assert machine.commit(tmp_path / "package") == f"{head}-dirty"
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv" / "a.py").write_text("installed inside somebody's repository")
    assert machine.commit(tmp_path / "venv") is None


def test_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.commit(tmp_path) is None
