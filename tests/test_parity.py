"""Parity: small errors pass, real ones and meaningless comparisons fail."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from deploy.errors import MeasureError
from deploy.parity import compare, normal_inputs
from deploy.runners import Array, open_runner
from deploy.to_onnx import export

WEIGHT = np.random.default_rng(0).standard_normal((4, 3))
Inputs = tuple[Array, ...]


def linear(inputs: Inputs) -> Sequence[Array]:
    return (inputs[0] @ WEIGHT,)


def test_equal_functions_pass_with_error_zero() -> None:
    found = compare(linear, linear, [(4,)], [1, 2, 7], 1e-4)
    assert [parity.batch for parity in found] == [1, 2, 7]
    for parity in found:
        assert (parity.max_abs, parity.relative, parity.argmax_agreement) == (0.0, 0.0, 1.0)
        assert parity.passed
        assert parity.reason == ""


def test_errors_follow_their_definitions() -> None:
    (x,) = normal_inputs([(4,)], 7, 3)
    a = x @ WEIGHT
    (found,) = compare(linear, lambda inputs: (linear(inputs)[0] * 1.01,), [(4,)], [7], 1e-4, seed=3)
    assert found.max_abs == pytest.approx(0.01 * np.abs(a).max())
    assert found.relative == pytest.approx(0.01)
    assert found.argmax_agreement == 1.0
    assert not found.passed
    assert found.reason == "relative error 0.01 is above 0.0001"
    (loose,) = compare(linear, lambda inputs: (linear(inputs)[0] * 1.01,), [(4,)], [7], 0.02, seed=3)
    assert loose.passed


def test_argmax_agreement_counts_flips() -> None:
    (found,) = compare(linear, lambda inputs: (-linear(inputs)[0],), [(4,)], [50], 10.0)
    assert found.argmax_agreement == 0.0
    (single,) = compare(lambda i: (i[0][:, :1],), lambda i: (i[0][:, :1],), [(4,)], [2], 1e-4)
    assert single.argmax_agreement is None


@pytest.mark.parametrize(
    ("reference", "candidate", "reason"),
    [
        (lambda i: (i[0] * 0,), lambda i: (i[0] * 0,), "vacuous: every reference output is constant"),
        (lambda i: (i[0] * 0 + 3,), lambda i: (i[0] * 0 + 3,), "vacuous: every reference output is constant"),
        (lambda i: (WEIGHT,), lambda i: (WEIGHT,), "vacuous: the reference ignores its input"),
        (lambda i: (i[0] * np.nan,), linear, "output shapes differ: [(2, 4)] in the reference, [(2, 3)]"),
        (lambda i: (i[0] @ WEIGHT * np.nan,), linear, "the reference output is not finite"),
        (linear, lambda i: (linear(i)[0] * np.inf,), "the candidate output is not finite"),
        (linear, lambda i: (linear(i)[0] * np.nan,), "the candidate output is not finite"),
        (linear, lambda i: (*linear(i), *linear(i)), "output shapes differ"),
    ],
    ids=["zero", "constant", "blind", "shape", "nan", "inf", "nan candidate", "count"],
)
def test_what_proves_nothing_fails(reference: object, candidate: object, reason: str) -> None:
    (found,) = compare(reference, candidate, [(4,)], [2], 1e9)  # type: ignore[arg-type]  # lambdas in a table
    assert not found.passed
    assert found.reason.startswith(reason)
    assert found.relative == np.inf


def test_one_regression_value_is_not_called_constant() -> None:
    (found,) = compare(lambda i: (i[0].sum(1),), lambda i: (i[0].sum(1),), [(4,)], [1], 1e-6)
    assert found.passed


def test_the_worst_output_decides() -> None:
    def two(inputs: Inputs) -> Sequence[Array]:
        return linear(inputs)[0], inputs[0] * 1e-6

    def second_wrong(inputs: Inputs) -> Sequence[Array]:
        return linear(inputs)[0], inputs[0] * 1.1e-6

    (found,) = compare(two, second_wrong, [(4,)], [3], 1e-3)
    assert found.relative == pytest.approx(0.1, rel=1e-6)
    assert not found.passed


def test_a_reference_that_reuses_its_output_memory_is_compared_all_the_same() -> None:
    buffer = np.zeros((2, 3))

    def reusing(inputs: Inputs) -> Sequence[Array]:
        np.matmul(inputs[0], WEIGHT, out=buffer)
        return (buffer,)

    (found,) = compare(reusing, reusing, [(4,)], [2], 1e-9)
    assert found.passed


def test_inputs_are_normal_seeded_and_nonzero() -> None:
    one, two = normal_inputs([(3, 8, 8), (5,)], 16, 0)
    assert (one.shape, two.shape) == ((16, 3, 8, 8), (16, 5))
    assert {one.dtype, two.dtype} == {np.dtype(np.float32)}
    assert abs(float(one.std()) - 1) < 0.05
    assert one.all()
    np.testing.assert_array_equal(one, normal_inputs([(3, 8, 8)], 16, 0)[0])
    assert not np.array_equal(one, normal_inputs([(3, 8, 8)], 16, 1)[0])


@pytest.mark.parametrize(("batches", "tolerance"), [([], 1e-4), ([0], 1e-4), ([1], 0.0), ([1], float("nan"))])
def test_an_empty_request_is_refused(batches: list[int], tolerance: float) -> None:
    with pytest.raises(MeasureError, match=r"^parity: nothing to compare; give input shapes"):
        compare(linear, linear, [(4,)], batches, tolerance)


def test_a_convolutional_model_agrees_in_onnxruntime_and_a_changed_weight_shows(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    model = nn.Sequential(*layers).eval()
    path = export(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx").path
    reference, candidate = open_runner("torch", model), open_runner("onnxruntime", path)
    found = compare(reference.infer, candidate.infer, [(3, 8, 8)], [1, 2, 7], 1e-4)
    assert all(parity.passed and parity.relative < 1e-5 for parity in found)
    with torch.no_grad():
        model.get_parameter("0.weight")[0] *= 1.5
    assert not any(p.passed for p in compare(reference.infer, candidate.infer, [(3, 8, 8)], [1, 2, 7], 1e-4))
