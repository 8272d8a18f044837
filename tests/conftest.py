"""One thread per test process; real data through COMPRESS_DATA or a stated skip."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Latencies that a test measures stay with it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def compress_data() -> Path:
    """The folder of real data and weights that COMPRESS_DATA names."""
    folder = os.environ.get("COMPRESS_DATA")
    if not folder:
        pytest.skip("COMPRESS_DATA is not set: it names the folder with CIFAR-10 and pretrained weights")
    return Path(folder)


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The networks of tests/precision_nets.py, in fp32 ONNX, by name."""
    from tests.precision_nets import export_all

    return export_all(tmp_path_factory.mktemp("exported"))
