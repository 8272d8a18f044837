"""The first thing a container does: an engine for the GPU that is here, built once and kept in a volume.

    python -m deploy.first_start COMMAND ...

builds an engine from the ONNX file that $COMPRESS_ONNX names, if it is set, into $COMPRESS_ENGINES
(/engines), under the GPU, the library's version and the file's hash, unless it is there; then COMMAND takes
its place, with the engine's path in $COMPRESS_ENGINE. $COMPRESS_BATCHES (1,8,32) is the least, best and most
of a batch; $COMPRESS_LIBRARY is tensorrt or tensorrt_rtx, by itself the one that is installed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deploy.errors import ArtifactError, DeployError, MeasureError, RunnerError

ONNX, ENGINES, ENGINE = "COMPRESS_ONNX", "COMPRESS_ENGINES", "COMPRESS_ENGINE"
BATCHES, LIBRARY = "COMPRESS_BATCHES", "COMPRESS_LIBRARY"
VOLUME, USUAL_BATCHES = "/engines", "1,8,32"


def place(volume: Path, here: Mapping[str, Any], onnx: Path, batches: Sequence[int]) -> Path:
    """Where the engine of an ONNX file lies in the volume: by GPU, library and content, not by its name."""
    try:
        with onnx.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ArtifactError(
            f"cannot be read: {error.strerror}", str(onnx), f"mount the file that {ONNX} names"
        ) from error
    gpu = _plain(f"{here['gpu']} {here['compute_capability']}")
    library = _plain(f"{here['library']} {here['library_version']}")
    return volume / gpu / library / f"{digest}-{'-'.join(map(str, batches))}.engine"


def prepare(onnx: Path, volume: Path, library: str, batches: tuple[int, int, int]) -> tuple[Path, bool]:
    """An engine for what is here, and whether it had to be built.

    One that is there is checked, not trusted: with another content than was built it is refused
    (ArtifactError), and one that no longer fits, after a change of the driver, is built again. Raises
    RunnerError without a GPU or library, and what `deploy.to_tensorrt.build` raises.
    """
    from deploy.engines import check, this_machine
    from deploy.to_tensorrt import EngineOptions, build

    here = this_machine(library)
    if here["gpu"] is None:
        raise RunnerError(
            "there is no GPU to build an engine for", ONNX, "start the container with --gpus all"
        )
    engine = place(volume, here, onnx, batches)
    if engine.exists():
        try:
            check(engine, here=here)
        except RunnerError as error:
            _say(str(error))
        else:
            return engine, False
    cache = engine.parent / "timing.cache" if library == "tensorrt" else None
    build(onnx, engine, library, EngineOptions(batches=batches), timing_cache=cache)
    return engine, True


def main(command: Sequence[str], env: Mapping[str, str]) -> int:
    """Prepare what `env` asks for and become `command`; returns only when that fails, with the exit code."""
    found = dict(env)
    try:
        if env.get(ONNX):
            found[ENGINE] = str(_engine(env))
    except DeployError as error:
        _say(f"error: {error}")
        return error.exit_code
    except OSError as error:
        _say(f"error: {error.filename}: {error.strerror}")
        return 7
    try:
        os.execvpe(command[0], list(command), found)
    except OSError as error:
        _say(f"error: {command[0]}: {error.strerror}")
        return 127


def _engine(env: Mapping[str, str]) -> Path:
    onnx, volume = Path(env[ONNX]), Path(env.get(ENGINES) or VOLUME)
    asked = env.get(BATCHES) or USUAL_BATCHES
    if not re.fullmatch(r"\d+,\d+,\d+", asked):
        raise MeasureError(f"{asked!r} is no range", BATCHES, "give LEAST,BEST,MOST")
    least, best, most = map(int, asked.split(","))
    engine, new = prepare(onnx, volume, env.get(LIBRARY) or _installed(), (least, best, most))
    _say(f"{'built' if new else 'found'} {engine}")
    return engine


def _installed() -> str:
    from deploy.to_tensorrt import LIBRARIES

    found = [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]
    if not found:
        raise RunnerError(
            "neither TensorRT nor TensorRT-RTX is installed", ONNX, "take an image that has one"
        )
    return found[0]


def _plain(said: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", said).strip("-.")


def _say(said: str) -> None:
    sys.stderr.write(said + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["compress", "--help"], os.environ))
