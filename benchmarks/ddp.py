"""The same job in one process and in two: the same plan, how far the weights differ, and the time.

    COMPRESS_DATA=... python benchmarks/ddp.py [KEY=VALUE ...]

The pretrained CIFAR-10 ResNet-20 on a part of the data, some removals. Two processes are started by torchrun
and talk through gloo, one thread each. In float64, where rounding cannot grow into another plan, and in
float32, where it can in a longer job.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.common import data_folder, write

CONFIG = """
version: 1
model:
  name: benchmarks.ddp:network
  kwargs: {{dtype: {dtype}}}
  input_shape: [3, 32, 32]
data:
  name: benchmarks.ddp:images
  kwargs: {{path: {images}}}
  mean: {mean}
  std: {std}
  batch_size: 32
  augment: flip_crop
device: cpu
prune: {{macs_ratio: 0.85, lr: 0.01, weight_decay: 0.0001, minibatches_per_step: 2, units_per_step: 20}}
"""


class Network(nn.Module):
    """The pretrained network, in a precision of its own."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(next(self.net.parameters()).dtype))


def network(dtype: str) -> nn.Module:
    import torch

    from compress.config import ModelConfig
    from compress.models import build_model

    weights = str(data_folder().resolve() / "weights" / "resnet20-12fca82f.th")
    config = ModelConfig(
        name="compress.zoo:cifar_resnet", kwargs={"depth": 20}, weights=weights, input_shape=[3, 32, 32]
    )
    return Network(build_model(config, Path()).to(getattr(torch, dtype)))


def images(path: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """What `main` took of CIFAR-10, once for all processes."""
    with np.load(path) as file:
        return {part: (file[f"{part}_images"], file[f"{part}_labels"]) for part in ("train", "test")}


def keep_images(path: Path, train: int = 1000, test: int = 200) -> None:
    from benchmarks import cifar10

    arrays = {}
    for part, n in (("train", train), ("test", test)):
        found = cifar10.read(data_folder(), part)
        arrays |= {f"{part}_images": found[0][:n], f"{part}_labels": found[1][:n]}
    np.savez(path, **arrays)


@dataclass(frozen=True)
class Job:
    dtype: str
    processes: int


def run(folder: Path, job: Job, overrides: list[str]) -> dict[str, Any]:
    """Prune; what came out, and in which folder."""
    from benchmarks import cifar10

    out = folder / f"{job.dtype}-{job.processes}"
    config = folder / f"{job.dtype}.yaml"
    given = {"dtype": job.dtype, "images": folder / "images.npz", "mean": cifar10.MEAN, "std": cifar10.STD}
    config.write_text(CONFIG.format(**given))
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(job.processes)]
    changes = [part for item in overrides for part in ("--set", item)]
    command = [*(start if job.processes > 1 else []), "-m", "compress", "run", str(config), *changes]
    path = str(Path(__file__).resolve().parent.parent)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    subprocess.run(
        [sys.executable, *command, "--until", "prune", "--out", str(out)], cwd=folder, env=env, check=True
    )
    found = json.loads((out / "prune.json").read_text())
    return {
        "dtype": job.dtype,
        "processes": job.processes,
        "prune_seconds": json.loads((out / "manifest.json").read_text())["stages"]["prune"]["seconds"],
        "units": found["units"],
        "losses": [step["loss"] for step in found["history"]],
        "accuracy": found["accuracy"]["value"],
        "folder": out,
    }


def compared(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
    """b against a. difference: the largest of two weights, against the largest weight of the tensor."""
    from safetensors.torch import load_file

    plans = [json.loads((row["folder"] / "plan.json").read_text())["axes"] for row in (a, b)]
    same, furthest = plans[0] == plans[1], None
    if same:
        first, second = (load_file(str(row["folder"] / "pruned.safetensors")) for row in (a, b))
        pairs = [(first[name].double(), second[name].double()) for name in first]
        furthest = max(float((x - y).abs().max() / x.abs().max().clamp_min(1e-12)) for x, y in pairs)
    return {"same_plan": same, "largest_difference": furthest}


def main() -> None:
    jobs = [Job(dtype, processes) for dtype in ("float64", "float32") for processes in (1, 2)]
    with tempfile.TemporaryDirectory() as place:
        keep_images(Path(place) / "images.npz")
        rows = [run(Path(place), job, sys.argv[1:]) for job in jobs]
        wide, narrow = compared(rows[0], rows[1]), compared(rows[2], rows[3])
    summary = {
        "processes": 2,
        "same_plan": wide["same_plan"],
        "removals": len(rows[0]["losses"]),
        "largest_difference": wide["largest_difference"],
        "float32": narrow,
        "prune_seconds": [round(row["prune_seconds"], 1) for row in rows],
    }
    write("ddp", summary, [{k: v for k, v in row.items() if k != "folder"} for row in rows])


if __name__ == "__main__":
    main()
