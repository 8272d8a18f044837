"""Several processes as one: who writes, what they agree on, and how it ends when one of them fails.

All of it does nothing where there is one process. Tensors travel through the process group of torchrun or of
the user; decisions and single numbers through a group of their own, on the CPU, where waiting may take long
(process 0 measures, the others wait) and no GPU has to be idle for a number.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from compress.errors import ConfigError, ResourceError, TargetError
from compress.launch import launched
from compress.names import first_line

TIMEOUT = timedelta(minutes=30)  # for tensors: training steps, evaluations and checkpoints lie between
PATIENCE = timedelta(days=7)  # for decisions: a benchmark of process 0 may lie between
LAST_WORD = timedelta(seconds=20)  # for the process that failed first to say why
_control: tuple[Any, Any] | None = None  # the default group, and the one for decisions that belongs to it
_store: Any = None  # where the processes of a command leave word to each other, groups working or not


def size() -> int:
    """How many processes work together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """Whether this process writes, locks and talks."""
    return rank() == 0


def begin() -> None:
    """Join the processes that torchrun started, if it did; each takes the GPU of its local rank.

    Nothing happens where a process group is there already. Raises TargetError (exit 6) and ResourceError
    (exit 7).
    """
    global _store
    at = launched()
    if not at.several or (dist.is_available() and dist.is_initialized()):
        return
    if not dist.is_available():
        raise TargetError("this PyTorch cannot work in several processes", "torch.distributed")
    from torch.distributed.rendezvous import rendezvous

    backend = "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available():
        backend = "cpu:gloo,cuda:nccl"
    if at.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(at.local_rank)
    try:
        store, number, count = next(rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(backend, store=store, rank=number, world_size=count, timeout=TIMEOUT)
    except (RuntimeError, ValueError, OSError) as error:
        fix = "start all of them with the same torchrun command"
        raise ResourceError(f"the processes do not meet: {first_line(error)}", "torchrun", fix) from error
    _store = dist.PrefixStore("compress", store)  # type: ignore[attr-defined]  # it is public


def end() -> None:
    """Wait for the others, and leave the group that `begin` joined."""
    global _store, _control
    if _store is not None:
        barrier()
        dist.destroy_process_group()
        _store = _control = None


# -- sums and decisions -------------------------------------------------------------------------------


@contextmanager
def answering() -> Iterator[None]:
    """Where another process is gone or silent, say so in one line (exit 7)."""
    try:
        yield
    except RuntimeError as error:  # whatever the backend raises; its words are of sockets
        fix = "see what it said; the same command goes on from the last checkpoint"
        raise ResourceError("another process of this run has ended, or is silent", "torchrun", fix) from error


def _group() -> Any:
    global _control
    world = dist.group.WORLD
    if _control is None or _control[0] is not world:
        _control = (world, dist.new_group(backend="gloo", timeout=PATIENCE))
    return _control[1]


def summed(values: Tensor) -> Tensor:
    """The sum over all processes of a tensor of the CPU, in place."""
    if size() > 1:
        with answering():
            dist.all_reduce(values, group=_group())
    return values


def any_of(flag: bool) -> bool:
    """Whether it is so in any process: all of them stop, or none."""
    return bool(summed(torch.tensor(int(flag)))) if size() > 1 else flag


def from_main(values: np.ndarray) -> np.ndarray:
    """The numbers that process 0 has, float64, in every process."""
    if size() == 1:
        return values
    found = torch.from_numpy(np.array(values, dtype=np.float64))
    with answering():
        dist.broadcast(found, 0, group=_group())
    return found.numpy()


def barrier() -> None:
    """Wait until all processes are here."""
    any_of(False)


def agree(
    text: str, what: str, fix: str = "start it with the same files, data and versions on every machine"
) -> None:
    """Raise ConfigError (exit 3) unless all processes have the same text; ``what`` says what differs."""
    if size() > 1:
        own = np.frombuffer(hashlib.sha256(text.encode()).digest(), dtype=np.uint8).astype(np.float64)
        if any_of(not np.array_equal(from_main(own), own)):
            raise ConfigError(f"{what} differs between the processes", "torchrun", fix)


@torch.no_grad()
def spread(tensors: Iterable[Tensor]) -> None:
    """Give the tensors of every process the bits that process 0 has."""
    if size() == 1:
        return
    own = [tensor for tensor in tensors if tensor.numel()]
    for device in dict.fromkeys(tensor.device for tensor in own):
        here = [tensor for tensor in own if tensor.device == device]
        data = torch.cat([t.detach().contiguous().reshape(-1).view(torch.uint8) for t in here])
        with answering():
            dist.broadcast(data, 0)
        if not is_main():
            for tensor, part in zip(here, torch.split(data, [t.nbytes for t in here]), strict=True):
                tensor.copy_(part.clone().view(tensor.dtype).reshape(tensor.shape))


def reduce_gradients(tensors: Iterable[Tensor]) -> None:
    """Sum the gradients of these tensors over all processes; call it after `backward`.

    A tensor without a gradient counts as 0, and has none afterwards where no process has one: the optimizer
    leaves it alone then, as in one process.
    """
    if size() == 1:
        return
    kinds: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in {id(t): t for t in tensors}.values():
        kinds.setdefault((tensor.dtype, tensor.device), []).append(tensor)
    for (dtype, device), own in kinds.items():
        real = torch.empty(0, dtype=dtype).real.dtype  # no backend adds complex numbers
        given = torch.tensor([t.grad is not None for t in own], dtype=real, device=device)
        flat = torch.cat([*(_flat(tensor) for tensor in own), given])
        with answering():
            dist.all_reduce(flat)
        *parts, given = torch.split(flat, [*(t.nbytes // given.itemsize for t in own), len(own)])
        for tensor, part, known in zip(own, parts, given.tolist(), strict=True):
            tensor.grad = part.view(dtype).reshape(tensor.shape) if known else None


def _flat(tensor: Tensor) -> Tensor:
    grad = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad.detach()
    grad = (grad.to_dense() if grad.is_sparse else grad).contiguous().reshape(-1)
    return torch.view_as_real(grad).reshape(-1) if grad.is_complex() else grad


# -- how a command ends -------------------------------------------------------------------------------


def fails_first() -> bool:
    """Whether this process is the first of a command to fail: it alone says why.

    All processes fail together (a config that is wrong), or one does and takes the others with it.
    """
    if _store is None:  # they have not met
        return launched().rank == 0
    try:
        return bool(_store.compare_set("failed", "", str(rank())) == str(rank()).encode())
    except RuntimeError:  # the store ended with the process that kept it
        return False


def leave_code(code: int) -> None:
    """Say what all processes end with, after the reason was given."""
    with _silently():
        if _store is not None:
            _store.set("code", str(code))


def code_left(own: int) -> int:
    """What the process that failed first ends with; ``own`` where that cannot be told."""
    with _silently():
        if _store is not None:
            _store.wait(["code"], LAST_WORD)
            return int(_store.get("code"))
    return own


@contextmanager
def _silently() -> Iterator[None]:
    try:
        yield
    except RuntimeError:  # there is nobody left to tell, or to ask
        return
