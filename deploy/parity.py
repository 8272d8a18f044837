"""Do two implementations of a model give the same outputs? On random inputs, at several batch sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deploy.errors import MeasureError
from deploy.runners import Array

Infer = Callable[[tuple[Array, ...]], Sequence[Array]]
Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Parity:
    """One comparison at one batch size.

    `max_abs` is max|a - b| and `relative` is max|a - b| / max|a|, each the worst of all outputs, with a the
    reference; infinite where they cannot be formed. `argmax_agreement` is the share of equal argmax over
    axis 1 of the first output, None where that axis has fewer than 2 entries. `reason` is empty if passed.
    """

    batch: int
    max_abs: float
    relative: float
    tolerance: float
    argmax_agreement: float | None
    passed: bool
    reason: str = ""


def compare(
    reference: Infer,
    candidate: Infer,
    input_shapes: Sequence[Sequence[int]],
    batches: Sequence[int],
    tolerance: float,
    seed: int = 0,
) -> tuple[Parity, ...]:
    """Run both on the same standard normal float32 inputs, once per batch size, and compare all outputs.

    `input_shapes` are without the batch axis. A pass is `relative <= tolerance`. A reference that could not
    show a difference (all its outputs zero or constant, or blind to its input) or that is not finite fails:
    such a comparison proves nothing. `Runner.infer` is an `Infer`. Raises MeasureError for an empty request.
    """
    if not batches or min(batches) < 1 or not input_shapes or not tolerance > 0:
        raise MeasureError(
            "nothing to compare", "parity", "give input shapes, batches of 1 or more, tolerance > 0"
        )
    return tuple(
        _compare_one(reference, candidate, input_shapes, batch, tolerance, seed) for batch in batches
    )


def normal_inputs(input_shapes: Sequence[Sequence[int]], batch: int, seed: int) -> tuple[Array, ...]:
    """Standard normal float32 arrays of shape (batch, *shape), the same for the same arguments."""
    random = np.random.default_rng([seed, batch])
    return tuple(random.standard_normal((batch, *shape), dtype=np.float32) for shape in input_shapes)


def _compare_one(
    reference: Infer,
    candidate: Infer,
    input_shapes: Sequence[Sequence[int]],
    batch: int,
    tolerance: float,
    seed: int,
) -> Parity:
    inputs = normal_inputs(input_shapes, batch, seed)
    # Copies: a runner may hand out the memory that its next run writes to.
    expected = [np.array(output, dtype=np.float64) for output in reference(inputs)]
    found = [np.array(output, dtype=np.float64) for output in candidate(inputs)]
    other = normal_inputs(input_shapes, batch, seed + 1)
    blind = all(
        np.array_equal(one, two) for one, two in zip(expected, map(np.asarray, reference(other)), strict=True)
    )
    reason = _incomparable(expected, found) or ("vacuous: the reference ignores its input" if blind else "")
    if reason:
        return Parity(batch, np.inf, np.inf, tolerance, None, False, reason)
    errors = [float(np.abs(a - b).max(initial=0.0)) for a, b in zip(expected, found, strict=True)]
    relative = max(_ratio(error, a) for error, a in zip(errors, expected, strict=True))
    passed = relative <= tolerance
    reason = "" if passed else f"relative error {relative:.3g} is above {tolerance:g}"
    return Parity(batch, max(errors), relative, tolerance, _agreement(expected[0], found[0]), passed, reason)


def _incomparable(expected: Sequence[Float64], found: Sequence[Float64]) -> str:
    """Why a comparison of these outputs would prove nothing, else ""."""
    shapes, others = [a.shape for a in expected], [b.shape for b in found]
    if shapes != others:
        return f"output shapes differ: {shapes} in the reference, {others} in the candidate"
    if not all(np.isfinite(a).all() for a in expected):
        return "the reference output is not finite"
    if not all(np.isfinite(b).all() for b in found):
        return "the candidate output is not finite"
    if all(_constant(a) for a in expected):
        return "vacuous: every reference output is constant"
    return ""


def _constant(a: Float64) -> bool:
    return a.size == 0 or not a.any() or (a.size > 1 and float(np.ptp(a)) == 0.0)


def _ratio(error: float, a: Float64) -> float:
    scale = float(np.abs(a).max(initial=0.0))
    if scale == 0.0:
        return 0.0 if error == 0.0 else np.inf
    return error / scale


def _agreement(a: Float64, b: Float64) -> float | None:
    if a.ndim < 2 or a.shape[1] < 2:
        return None
    return float((a.argmax(axis=1) == b.argmax(axis=1)).mean())
