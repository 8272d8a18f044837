"""What a model must be before any work is spent on it: a plain module with float tensors on one device."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from compress.errors import ModelError


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside torch.compile's and DataParallel's wrappers, whose names carry no prefix of theirs."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        inner = model.module if isinstance(model, wrappers) else getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def check_module(model: nn.Module) -> None:
    """Refuse, before any work, what no trace could make trainable: exit 4, naming the module or tensor.

    TorchScript, quantized and lazy modules, tensors on several devices, batch norms without momentum (the
    graph has no counter to average by), and anything that is not an nn.Module.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"the model is a {type(model).__name__}, not a torch.nn.Module",
            fix="give the model itself; build it and load its weights with load_state_dict",
        )
    for name, module in model.named_modules():
        for fault, what, fix in _FAULTS:
            if fault(module):
                raise ModelError(what.format(type(module).__name__), name or type(model).__name__, fix)
    _check_tensors([*model.named_parameters(), *model.named_buffers()])


_FAULTS: tuple[tuple[Callable[[nn.Module], bool], str, str], ...] = (
    (
        lambda m: isinstance(m, torch.jit.ScriptModule),
        "is TorchScript, which carries no source to trace",
        "give the Python model it was made from, with the weights of its state_dict()",
    ),
    (
        lambda m: (
            ".quantized" in type(m).__module__
            and type(m).__module__.startswith("torch.")
            and type(m).__name__ != "FloatFunctional"  # plain arithmetic that may be quantized later
        ),
        "is a quantized {}, which cannot be trained",
        "prune the float model, and quantize the result",
    ),
    (
        lambda m: isinstance(m, nn.modules.batchnorm._NormBase) and m.momentum is None,
        "a batch norm with momentum=None cannot train in a graph",
        "give it a number, such as 0.1",
    ),
)


def _check_tensors(tensors: Sequence[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        if nn.parameter.is_lazy(tensor):
            raise ModelError("has no shape yet: the module is lazy", name, "run the model on a batch once")
        if tensor.is_quantized:
            raise ModelError("is quantized", name, "prune the float model, and quantize the result")
        first, device = tensors[0]
        if tensor.device != device.device:
            what = f"is on {tensor.device}, but {first} is on {device.device}"
            raise ModelError(what, name, "put the whole model on one device: model.to(device)")
