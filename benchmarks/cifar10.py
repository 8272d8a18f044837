"""CIFAR-10 from the folder that COMPRESS_DATA names: lossless WebP mosaics in zip files."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.common import data_folder

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # what the pretrained weights were trained with


def read(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 (n, 3, 32, 32) and labels int64 (n,) of "train" (50,000) or "test" (10,000)."""
    images, labels = [], []
    for shard in sorted((folder / "cifar10").glob(f"cifar10_{split}_*.zip")):
        with zipfile.ZipFile(shard) as archive:
            for name in sorted(n for n in archive.namelist() if n.endswith(".webp")):
                mosaic = np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB"))
                tiles = mosaic.reshape(10, 32, 10, 32, 3).transpose(0, 2, 4, 1, 3)
                images.append(tiles.reshape(-1, 3, 32, 32))
            labels.append(np.frombuffer(archive.read("labels.bin"), np.uint8))
    return np.concatenate(images), np.concatenate(labels).astype(np.int64)


def splits() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Both splits, as a config's `data.name` wants them."""
    folder = data_folder()
    return {"train": read(folder, "train"), "test": read(folder, "test")}
