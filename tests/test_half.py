"""fp16 and bf16: types where they belong, values close, and out of range means fp32, with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper, parser
from torch import Tensor, nn

from deploy.parity import compare, normal_inputs
from deploy.precision import convert
from deploy.runners import open_runner
from deploy.to_onnx import export
from tests.precision_nets import NETS, WEIGHTED, batches, distance, of_type, types

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", NETS)
def test_half_types_are_where_they_belong(
    exported: dict[str, Path], tmp_path: Path, name: str, precision: str
) -> None:
    found = convert(exported[name], tmp_path / "m.onnx", precision)
    model = onnx.load(tmp_path / "m.onnx")
    known, graph = types(model), model.graph
    for node in of_type(model, *WEIGHTED, "Add", "Relu", "Gelu"):
        assert {known[value] for value in (*node.input, *node.output)} == {HALF[precision]}, node.name
    for node in of_type(model, "Softmax", "LayerNormalization", "ReduceMean"):
        assert {known[value] for value in (node.input[0], *node.output)} == {TensorProto.FLOAT}, node.name
    for value in (*graph.input, *graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    kept = [
        node for node in graph.node if node.op_type != "Cast" and known[node.output[0]] == TensorProto.FLOAT
    ]
    assert found.nodes_kept == len(kept) == sum(found.why_kept.values())
    assert {reason.partition(":")[0] for reason in found.why_kept} == {node.op_type for node in kept}
    assert found.nodes_low > found.nodes_kept
    assert found.bytes < 0.75 * exported[name].stat().st_size or name != "resnet"
    assert [(entry.key, entry.value) for entry in model.metadata_props] == [("plan", name)]


def test_weights_keep_their_names_and_no_cast_is_made_twice(
    exported: dict[str, Path], tmp_path: Path
) -> None:
    convert(exported["vit"], tmp_path / "m.onnx", "fp16")
    model = onnx.load(tmp_path / "m.onnx")
    before = {tensor.name for tensor in onnx.load(exported["vit"]).graph.initializer}
    assert {tensor.name for tensor in model.graph.initializer} == before
    casts = [(node.input[0], node.attribute[0].i) for node in of_type(model, "Cast")]
    assert len(casts) == len(set(casts))
    # Input; two norms, the softmax and the mean, in and out; output.
    assert len(casts) == 1 + 2 * 4 + 1


@pytest.mark.parametrize("name", NETS)
def test_fp16_values_are_close_at_any_batch(exported: dict[str, Path], tmp_path: Path, name: str) -> None:
    convert(exported[name], tmp_path / "m.onnx", "fp16")
    reference, candidate = (open_runner("onnxruntime", p) for p in (exported[name], tmp_path / "m.onnx"))
    for parity in compare(reference.infer, candidate.infer, [NETS[name][1]], (1, 2, 5), 5e-3):
        assert parity.passed, parity
        assert parity.relative > 1e-6  # fp32 would do this well: something is rounded
    model = onnx.load(tmp_path / "m.onnx")
    weight = next(t for t in model.graph.initializer if len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float16(1.05), weight.name))
    onnx.save(model, tmp_path / "wrong.onnx")
    wrong = open_runner("onnxruntime", tmp_path / "wrong.onnx")
    (parity,) = compare(reference.infer, wrong.infer, [NETS[name][1]], (2,), 5e-3)
    assert not parity.passed


@pytest.mark.parametrize("name", ["vit", "mobile"])
def test_bf16_values_are_close(exported: dict[str, Path], tmp_path: Path, name: str) -> None:
    """By onnx's own evaluator: ONNX Runtime has no bf16 convolution for CPUs."""
    from onnx.reference import ReferenceEvaluator

    convert(exported[name], tmp_path / "m.onnx", "bf16")
    (x,) = normal_inputs([NETS[name][1]], 3, 0)
    (expected,) = open_runner("onnxruntime", exported[name]).infer((x,))
    (found,) = ReferenceEvaluator(str(tmp_path / "m.onnx")).run(None, {"input": x})
    assert found.dtype == np.float32
    assert 1e-4 < distance(expected, found) < 5e-2


def written(path: Path, text: str) -> Path:
    """A model in ONNX's text form, opset 20."""
    model = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 20]> {text}')
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)
    return path


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (
            "c = Constant <value = float {100000.0}> () a = Add(x, c) y = Sub(a, c)",
            "a constant is beyond 65504",
        ),
        ("c = Constant <value_float = 1e-7> () a = Relu(x) y = Add(a, c)", "a constant is below 6.1e-05"),
        ("a = Relu(x) y = Pow(a, a)", "Pow: sums of squares"),
        ("a = Shape(x) b = Cast <to = 1> (a) c = ReduceSum <keepdims=0> (b) y = Mul(x, c)", "Cast: ONNX has"),
    ],
    ids=["large", "small", "op", "made"],
)
def test_what_fp16_cannot_hold_stays_in_fp32(tmp_path: Path, body: str, why: str) -> None:
    source = written(tmp_path / "a.onnx", f"g (float[batch,4] x) => (float[batch,4] y) {{ {body} }}")
    found = convert(source, tmp_path / "b.onnx", "fp16")
    assert any(reason.startswith(why) for reason in found.why_kept), found
    assert found.nodes_kept + found.nodes_low == len(
        [n for n in onnx.load(source).graph.node if n.op_type not in ("Constant", "Shape")]
    )
    x = np.abs(normal_inputs([(4,)], 3, 0)[0]) + 1
    expected, values = (
        open_runner("onnxruntime", tmp_path / name).infer((x,))[0] for name in ("a.onnx", "b.onnx")
    )
    np.testing.assert_allclose(values, expected, rtol=3e-3, atol=0.02)


def test_infinite_constants_are_masks_and_may_be_half(tmp_path: Path) -> None:
    body = "c = Constant <value_floats = [0.0, -inf, 0.0, 0.0]> () a = Add(x, c) y = Softmax(a)"
    with np.errstate(over="raise"):
        source = written(tmp_path / "a.onnx", f"g (float[batch,4] x) => (float[batch,4] y) {{ {body} }}")
        found = convert(source, tmp_path / "b.onnx", "fp16")
    assert found.why_kept == {"Softmax: exponentials": 1}
    (values,) = open_runner("onnxruntime", tmp_path / "b.onnx").infer((normal_inputs([(4,)], 3, 0)[0],))
    assert np.isfinite(values).all()
    assert not values[:, 1].any()


def test_values_that_meet_both_types_and_the_output(tmp_path: Path) -> None:
    """r is an output, and read in half and in fp32; w is read in both types."""
    body = "r = Relu(x) a = Mul(r, w) b = Pow(r, w) y = Add(a, b)"
    ports = "(float[batch,2] x) => (float[batch,2] y, float[batch,2] r)"
    text = f"g {ports} <float[2] w = {{1.5, 2.0}}> {{ {body} }}"
    source = written(tmp_path / "a.onnx", text)
    convert(source, tmp_path / "b.onnx", "fp16")
    model = onnx.load(tmp_path / "b.onnx")
    known = types(model)
    assert [known[name] for name in ("w", "w_fp16")] == [TensorProto.FLOAT, TensorProto.FLOAT16]
    assert [(n.op_type, list(n.input)) for n in model.graph.node if "Cast" not in n.op_type] == [
        ("Relu", ["x_fp16"]),
        ("Mul", ["r_fp16", "w_fp16"]),
        ("Pow", ["r", "w"]),
        ("Add", ["a", "b_fp16"]),
    ]
    x = np.abs(normal_inputs([(2,)], 3, 0)[0])
    for a, b in zip(
        *(open_runner("onnxruntime", p).infer((x,)) for p in (source, tmp_path / "b.onnx")), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=3e-3)


class Loud(nn.Module):
    """Its first convolution reaches 1e5, which its weights do not show."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)
        with torch.no_grad():
            self.up.weight.mul_(2e5)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu()).mean((2, 3))


def test_calibration_keeps_what_overflows_fp16(tmp_path: Path) -> None:
    from onnx.reference import ReferenceEvaluator

    torch.manual_seed(0)
    export(Loud().eval(), torch.randn(2, 3, 8, 8), tmp_path / "a.onnx")
    (x,) = normal_inputs([(3, 8, 8)], 4, 5)
    convert(tmp_path / "a.onnx", tmp_path / "blind.onnx", "fp16")
    with np.errstate(over="ignore", invalid="ignore"):
        (blind,) = ReferenceEvaluator(str(tmp_path / "blind.onnx")).run(None, {"input": x})
    assert not np.isfinite(blind).all()
    found = convert(tmp_path / "a.onnx", tmp_path / "seen.onnx", "fp16", calibration=batches((3, 8, 8)))
    assert found.why_kept == {"ReduceMean: long sums": 1, "values beyond 32752 in calibration": 3}
    (expected,) = open_runner("onnxruntime", tmp_path / "a.onnx").infer((x,))
    (seen,) = ReferenceEvaluator(str(tmp_path / "seen.onnx")).run(None, {"input": x})
    assert distance(expected, seen) < 1e-3


def test_calibration_keeps_what_vanishes_in_fp16(tmp_path: Path) -> None:
    """1e-9 is zero in fp16; the constants themselves look harmless."""
    body = "a = Mul(x, c) b = Mul(a, c) d = Mul(b, c) e = Div(d, c) f = Div(e, c) y = Div(f, c)"
    text = f"g (float[batch,4] x) => (float[batch,4] y) <float[1] c = {{0.001}}> {{ {body} }}"
    source = written(tmp_path / "a.onnx", text)
    (x,) = normal_inputs([(4,)], 3, 0)
    found = convert(source, tmp_path / "b.onnx", "fp16", calibration=batches((4,)))
    # 1e-3 may be half, 1e-6 and 1e-9 may not.
    assert found.why_kept == {"values below 6.1e-05 in calibration": 4}
    (seen,) = open_runner("onnxruntime", tmp_path / "b.onnx").infer((x,))
    np.testing.assert_allclose(seen, x, rtol=5e-3)
