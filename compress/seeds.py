"""Randomness that depends on names, not on history.

Data order and augmentation come from ``derive(seed, epoch, ...)``, so that any batch can be made again
without making the ones before it. What a model draws while it trains (dropout) comes from the process's
generators, whose states travel in the checkpoint.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


def derive(*parts: int | str) -> int:
    """A 63-bit seed from ``parts``; the same on every machine, and unrelated for parts that differ."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded with ``derive(*parts)``."""
    return torch.Generator().manual_seed(derive(*parts))


def rng_state(device: torch.device | None = None) -> dict[str, Tensor]:
    """The global generators' states (torch, CUDA if ``device`` is, Python, NumPy) as uint8 tensors."""
    state = {"torch": torch.get_rng_state()}
    if device is not None and device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    version, words, gauss = random.getstate()
    state["python"] = _as_bytes(np.array([version, *words], dtype=np.int64))
    state["python_gauss"] = _as_bytes(np.array([] if gauss is None else [gauss], dtype=np.float64))
    _, keys, *rest = np.random.get_state(legacy=True)
    state["numpy"] = _as_bytes(np.asarray(keys, dtype=np.uint32))
    state["numpy_rest"] = _as_bytes(np.array(rest, dtype=np.float64))
    return state


def set_rng_state(state: Mapping[str, Tensor], device: torch.device | None = None) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(state["torch"].cpu())
    if device is not None and device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)
    version, *words = _from_bytes(state["python"], np.int64).tolist()
    gauss = _from_bytes(state["python_gauss"], np.float64).tolist()
    random.setstate((version, tuple(words), gauss[0] if gauss else None))
    position, has_gauss, cached = _from_bytes(state["numpy_rest"], np.float64).tolist()
    keys = _from_bytes(state["numpy"], np.uint32)
    np.random.set_state(("MT19937", keys, int(position), int(has_gauss), cached))


def seed_all(seed: int, device: torch.device | None = None) -> None:
    """Seed the global generators that `rng_state` knows."""
    torch.default_generator.manual_seed(seed)
    if device is not None and device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextmanager
def isolated(seed: int | None = None, device: torch.device | None = None) -> Iterator[None]:
    """Inside, the global generators start from ``seed`` (None: go on); afterwards they are as before."""
    cuda = device if device is not None and device.type == "cuda" else None
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    on_device = torch.cuda.get_rng_state(cuda) if cuda is not None else None
    try:
        if seed is not None:
            seed_all(seed, device)
        yield
    finally:
        torch.set_rng_state(before[0])
        random.setstate(before[1])
        np.random.set_state(before[2])
        if cuda is not None and on_device is not None:
            torch.cuda.set_rng_state(on_device, cuda)


def _as_bytes(array: np.ndarray) -> Tensor:
    return (
        torch.frombuffer(bytearray(array.tobytes()), dtype=torch.uint8)
        if array.size
        else torch.empty(0, dtype=torch.uint8)
    )


def _from_bytes(tensor: Tensor, dtype: type[np.generic]) -> np.ndarray:
    return np.frombuffer(tensor.cpu().numpy().tobytes(), dtype=dtype)
