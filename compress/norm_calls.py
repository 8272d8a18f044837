"""Batch norms in train mode, caught on their way to torch.

Traced graphs call batch norm as an op, modules as a function. What asks for a minibatch's statistics, or
makes them those of several processes, meets both here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

_RUNNING, _REST = ("running_mean", "running_var"), ("training", "momentum", "eps")
_OP = ("input", "weight", "bias", *_RUNNING, *_REST, "cudnn_enabled")
_ARGUMENTS: dict[Any, tuple[str, ...]] = {
    torch.ops.aten.batch_norm.default: _OP,
    torch.batch_norm: _OP,
    functional.batch_norm: ("input", *_RUNNING, "weight", "bias", *_REST),
}
"""Names of the positional arguments of what graphs and modules call."""


class NormCalls(TorchFunctionMode):
    """Inside, `normed` answers the batch norms that are in train mode."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _ARGUMENTS:
            return func(*args, **(kwargs or {}))
        given = dict(zip(_ARGUMENTS[func], args, strict=False)) | (kwargs or {})
        return self.normed(func, given) if given.get("training") else func(**given)

    def normed(self, func: Any, given: dict[str, Any]) -> Any:
        """The result of a call of `func` with these arguments, by name."""
        raise TypeError(f"{type(self).__name__} does not say what a batch norm is")
