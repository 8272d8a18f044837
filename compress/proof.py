"""The proof of a cut: the dense model against the masked one, and how far the mask moved the outputs."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compress.trace import GraphNet


@dataclass(frozen=True)
class Verification:
    """The dense model against the masked one, and how far the mask moved the output.

    relative_error: max |masked - dense| / max |masked|. movement: max |unmasked - masked| / max |unmasked|.

    passed: the error is within tolerance and the mask moved the output at least 1,000 times as far
    (or nothing was removed, and the error is 0). inexact: why the two differ where that was asked for
    (`prune.inexact_norms`); then any finite error passes, and is what the request cost.
    """

    relative_error: float
    movement: float
    dtype: str
    tolerance: float
    passed: bool
    inexact: str = ""


def verify(
    original: nn.Module,
    masked: nn.Module,
    dense: nn.Module,
    inputs: Sequence[Any],
    named: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    tolerance: float = 1e-5,
    inexact: str = "",
) -> Verification:
    """Compare the dense model with the masked one in eval mode, and the masked with the unmasked.

    inputs: the arguments, tensors at any depth; named: those by keyword. Where the removed channels are
    silent on them (behind a ReLU, say), they are tried times -3 as well. The models are copied, cast to
    `dtype` (complex tensors to the complex of its width) and left as they were.
    """
    given = (tuple(inputs), dict(named or {}))
    error, movement = _compared((original, masked, dense), given, dtype)
    if movement < 1000 * error or movement == 0:  # what left was silent on these inputs: look at others
        far = pytree.tree_map_only(
            Tensor, lambda x: -3 * x if x.dtype.is_floating_point or x.is_complex() else x, given
        )
        error, movement = map(max, (error, movement), _compared((original, masked, dense), far, dtype))
    sizes = [sum(p.numel() for p in model.parameters()) for model in (original, dense)]
    vacuous = movement == 0 and sizes[1] < sizes[0]
    exact = error <= tolerance and movement >= 1000 * error and not vacuous
    passed = exact or (bool(inexact) and math.isfinite(error))
    return Verification(error, movement, str(dtype).removeprefix("torch."), tolerance, passed, inexact)


def relative_error(reference: Sequence[Tensor], other: Sequence[Tensor]) -> float:
    """max |a - b| / max |a| over all outputs; infinite where shapes differ or a number is not finite.

    For whole numbers and truth values: the share that differs.
    """
    worst = 0.0
    for a, b in zip(reference, other, strict=True):
        if a.shape != b.shape or not bool(torch.isfinite(a).all() and torch.isfinite(b).all()):
            return float("inf")
        if not a.numel():
            continue
        if a.is_floating_point() or a.is_complex():
            worst = max(worst, float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)))
        else:
            worst = max(worst, float((a != b).double().mean()))
    return worst


def _compared(models: Sequence[nn.Module], given: Any, dtype: torch.dtype) -> tuple[float, float]:
    """(error, movement) of the original, the masked and the dense model on these arguments."""
    a, b, c = (outputs(model, given, dtype) for model in models)
    return relative_error(b, c), relative_error(a, b)


def outputs(model: nn.Module, given: Any, dtype: torch.dtype) -> list[Tensor]:
    """The tensors that a copy of the model, cast to `dtype`, gives in eval mode; given: (args, kwargs)."""
    ready = copy.deepcopy(model).eval()
    ready._apply(lambda x: _widened(x, dtype))  # type: ignore[no-untyped-call]  # torch leaves it untyped
    for module in ready.modules():
        if isinstance(module, GraphNet):
            _widen_casts(module, dtype)
    args, kwargs = pytree.tree_map_only(Tensor, lambda x: _widened(x, dtype), given)
    with torch.no_grad():
        found = ready(*args, **kwargs)
    return [leaf.detach() for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    if x.is_complex():
        return x.to(dtype.to_complex())
    return x.to(dtype) if x.is_floating_point() else x


def _widen_casts(net: GraphNet, dtype: torch.dtype) -> None:
    """Let the casts that are written into the graph (a softmax in float32, say) be to `dtype` as well."""

    def cast(argument: Any) -> Any:
        if isinstance(argument, torch.dtype) and argument.is_floating_point:
            return dtype
        return dtype.to_complex() if isinstance(argument, torch.dtype) and argument.is_complex else argument

    for node in net.graph.nodes:
        node.args = tuple(cast(a) for a in node.args)
        node.kwargs = {key: cast(value) for key, value in node.kwargs.items()}
    net.recompile()
