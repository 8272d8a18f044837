"""The container's first step: one engine per GPU, library and file, built once; and the Dockerfile."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deploy import engines, first_start, to_tensorrt
from deploy.errors import ArtifactError, RunnerError

ROOT = Path(__file__).parent.parent
HERE = {
    "library": "tensorrt",
    "library_version": "11.4.0.106",
    "gpu": "NVIDIA L4 (PCIe)/x",
    "compute_capability": "8.9",
    "driver": "580.1",
    "platform": "Linux x86_64",
}
BATCHES = (1, 8, 32)


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "dense.onnx"
    path.write_bytes(b"a model")
    return path


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A machine with a GPU, where builds write what `deploy.to_tensorrt.build` does; what they were asked."""
    asked: list[dict[str, Any]] = []

    def build(onnx: Path, engine: Path, library: str, options: Any, *, timing_cache: Path | None) -> None:
        asked.append({"options": options, "timing_cache": timing_cache})
        engine.parent.mkdir(parents=True, exist_ok=True)
        engine.write_bytes(b"an engine")
        sidecar = {
            **HERE,
            "tool": engines.TOOL,
            "format": engines.FORMAT,
            "rebuild": "again",
            "engine": {"sha256": hashlib.sha256(b"an engine").hexdigest()},
            "options": {"version_compatible": False, "compute_capability": None},
        }
        to_tensorrt.sidecar_path(engine).write_text(json.dumps(sidecar))

    monkeypatch.setattr(engines, "this_machine", lambda library: {**HERE, "library": library})
    monkeypatch.setattr(to_tensorrt, "build", build)
    return asked


def test_an_engine_is_built_once(onnx: Path, tmp_path: Path, builds: list[dict[str, Any]]) -> None:
    volume = tmp_path / "engines"
    engine, new = first_start.prepare(onnx, volume, "tensorrt", BATCHES)
    assert new
    assert engine.parent == volume / "NVIDIA-L4-PCIe-x-8.9" / "tensorrt-11.4.0.106"
    assert first_start.prepare(onnx, volume, "tensorrt", BATCHES) == (engine, False)
    assert len(builds) == 1
    assert builds[0]["options"].batches == BATCHES
    assert builds[0]["timing_cache"] == engine.parent / "timing.cache"


@pytest.mark.parametrize("key", ["gpu", "compute_capability", "library", "library_version"])
def test_another_gpu_or_library_is_another_engine(onnx: Path, tmp_path: Path, key: str) -> None:
    other = {**HERE, key: "9.9"}
    assert first_start.place(tmp_path, HERE, onnx, BATCHES) != first_start.place(
        tmp_path, other, onnx, BATCHES
    )


def test_another_content_or_range_is_another_engine_and_another_name_is_not(
    onnx: Path, tmp_path: Path
) -> None:
    first = first_start.place(tmp_path, HERE, onnx, BATCHES)
    assert first_start.place(tmp_path, HERE, onnx, (1, 8, 64)) != first
    copy = Path(shutil.copy(onnx, tmp_path / "other.onnx"))
    assert first_start.place(tmp_path, HERE, copy, BATCHES) == first
    onnx.write_bytes(b"another model")
    assert first_start.place(tmp_path, HERE, onnx, BATCHES) != first


def test_a_changed_engine_is_refused_and_one_of_a_newer_driver_built_again(
    onnx: Path, tmp_path: Path, builds: list[dict[str, Any]], capfd: pytest.CaptureFixture[str]
) -> None:
    engine, _ = first_start.prepare(onnx, tmp_path, "tensorrt", BATCHES)
    sidecar = to_tensorrt.sidecar_path(engine)
    sidecar.write_text(sidecar.read_text().replace("580.1", "999.1"))
    assert first_start.prepare(onnx, tmp_path, "tensorrt", BATCHES) == (engine, True)
    assert "was built with driver 999.1, here is the older 580.1" in capfd.readouterr().err
    engine.write_bytes(b"something else")
    with pytest.raises(ArtifactError, match="is not the engine that") as refused:
        first_start.prepare(onnx, tmp_path, "tensorrt", BATCHES)
    assert refused.value.exit_code == 8
    assert len(builds) == 2


def test_without_a_gpu_it_says_how_to_start(
    onnx: Path, tmp_path: Path, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "this_machine", lambda library: {**HERE, "gpu": None})
    with pytest.raises(
        RunnerError, match=r"there is no GPU .*; start the container with --gpus all"
    ) as refused:
        first_start.prepare(onnx, tmp_path, "tensorrt", BATCHES)
    assert refused.value.exit_code == 6
    assert not builds


def test_the_command_gets_the_engine(
    onnx: Path, tmp_path: Path, builds: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(os, "execvpe", lambda *given: seen.append(given))
    env = {"COMPRESS_ONNX": str(onnx), "COMPRESS_ENGINES": str(tmp_path), "COMPRESS_LIBRARY": "tensorrt_rtx"}
    first_start.main(["serve", "--now"], {**env, "COMPRESS_BATCHES": "1,2,4"})
    ((file, command, found),) = seen
    assert (file, command) == ("serve", ["serve", "--now"])
    assert Path(found["COMPRESS_ENGINE"]).read_bytes() == b"an engine"
    assert found["COMPRESS_ENGINE"].endswith("-1-2-4.engine")
    assert builds[0]["timing_cache"] is None


@pytest.mark.slow
def test_a_real_engine_of_tensorrt_rtx_is_built_and_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="tensorrt_rtx is not installed")
    import torch

    from deploy.to_onnx import export

    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Flatten())
    model = export(net.eval(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx").path
    here = {**HERE, "library": "tensorrt_rtx", "library_version": str(trt.__version__)}
    monkeypatch.setattr(engines, "this_machine", lambda library: here)
    engine, new = first_start.prepare(model, tmp_path / "volume", "tensorrt_rtx", BATCHES)
    assert new
    assert engine.stat().st_size > 1000
    assert first_start.prepare(model, tmp_path / "volume", "tensorrt_rtx", BATCHES) == (engine, False)


def run(*command: str, **env: str) -> subprocess.CompletedProcess[str]:
    given = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), **env}
    words = [sys.executable, "-m", "deploy.first_start", *command]
    return subprocess.run(words, env=given, capture_output=True, text=True, check=False, cwd="/")


def test_without_a_model_the_command_is_all_there_is() -> None:
    done = run("sh", "-c", "echo $0 ${COMPRESS_ENGINE-none} $1; exit 5", "a b", "c")
    assert (done.returncode, done.stdout, done.stderr) == (5, "a b none c\n", "")


@pytest.mark.parametrize(
    ("env", "code", "said"),
    [
        ({"COMPRESS_BATCHES": "8"}, 3, "error: COMPRESS_BATCHES: '8' is no range; give LEAST,BEST,MOST"),
        ({"COMPRESS_LIBRARY": "tensort"}, 3, "error: tensort: unknown library"),
    ],
)
def test_what_is_asked_wrongly_is_one_line(onnx: Path, env: dict[str, str], code: int, said: str) -> None:
    done = run("true", COMPRESS_ONNX=str(onnx), **env)
    assert done.returncode == code
    assert done.stderr.startswith(said)
    assert len(done.stderr.splitlines()) == 1


def test_a_command_that_is_not_there_is_127() -> None:
    done = run("no-such-command")
    assert (done.returncode, done.stderr) == (127, "error: no-such-command: No such file or directory\n")


def test_a_model_that_is_not_mounted_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="cannot be read: No such file or directory; mount the file that"):
        first_start.place(tmp_path, HERE, tmp_path / "none.onnx", BATCHES)


# -- the Dockerfile -------------------------------------------------------------------------------------


def instructions() -> list[tuple[str, str]]:
    """Each instruction of the Dockerfile with its argument, lines joined, comments left out."""
    lines = [
        line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")
    ]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    pairs = [line.split(None, 1) for line in joined.splitlines() if line.strip()]
    return [(word, rest) for word, rest in pairs]


def stages() -> dict[str, list[tuple[str, str]]]:
    found: dict[str, list[tuple[str, str]]] = {"": []}
    name = ""
    for word, rest in instructions():
        if word == "FROM":
            name = rest.rpartition(" AS ")[2]
            assert re.fullmatch(r"\$\{[A-Z_]+\} AS [a-z]+", rest)
            found[name] = []
        found[name].append((word, rest))
    return found


def test_the_dockerfile_keeps_the_rules_that_matter() -> None:
    known = {"ARG", "FROM", "WORKDIR", "COPY", "RUN", "USER", "ENTRYPOINT", "CMD", "ENV", "VOLUME"}
    assert {word for word, _ in instructions()} <= known
    images = dict(rest.split("=", 1) for word, rest in stages()[""] if word == "ARG")
    assert set(images) == {"CPU_IMAGE", "GPU_IMAGE"}
    assert all(re.search(r":[0-9]", image) for image in images.values()), "an image without a version"
    for word, rest in instructions():
        if word == "WORKDIR":
            assert rest.startswith("/")
        if word in ("ENTRYPOINT", "CMD", "VOLUME"):
            assert all(isinstance(part, str) for part in json.loads(rest))
        if word == "RUN":
            assert "apt-get install" not in rest or "--no-install-recommends" in rest
            assert "apt-get install" not in rest or "rm -rf /var/lib/apt/lists/*" in rest
            assert not re.search(r"\bpip (install|wheel)\b", rest) or "--no-cache-dir" in rest
            assert not re.search(r"\b(sudo|cd|curl|wget)\b", rest)
            assert subprocess.run(["sh", "-n"], input=rest, text=True, check=False).returncode == 0
        if word == "COPY" and not rest.startswith("--from"):
            *sources, _ = shlex.split(rest)
            assert all((ROOT / source).exists() for source in sources)


def test_both_images_run_as_a_user_and_copy_from_a_stage_that_is_there() -> None:
    found = stages()
    assert list(found) == ["", "wheel", "cpu", "gpu"]
    for name in ("cpu", "gpu"):
        words = [word for word, _ in found[name]]
        assert [rest for word, rest in found[name] if word == "USER"] == ["compress"]
        assert words.index("USER") > max(place for place, word in enumerate(words) if word == "RUN")
        assert all("--from=wheel" in rest for word, rest in found[name] if word == "COPY")
    assert ("ENTRYPOINT", '["python", "-m", "deploy.first_start"]') in found["gpu"]
    assert ("ENV", f"COMPRESS_ENGINES={first_start.VOLUME}") in found["gpu"]
    assert ("VOLUME", json.dumps([first_start.VOLUME])) in found["gpu"]


def test_hadolint_finds_nothing() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed")
    done = subprocess.run(["hadolint", str(ROOT / "Dockerfile")], capture_output=True, text=True, check=False)
    assert done.stdout == ""
