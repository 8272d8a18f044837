"""Precisions: one file to six, what each costs, which one to take, and one line for each refusal."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import Tensor, nn

from deploy.errors import ArtifactError, DeployError, ExportError, MeasureError
from deploy.parity import normal_inputs
from deploy.precision import (
    PRECISIONS,
    TOLERANCES,
    Choice,
    Converted,
    Evaluation,
    Variant,
    choose,
    convert,
    evaluate,
)
from deploy.runners import Array, open_runner
from deploy.to_onnx import export
from tests.helpers import randomise
from tests.precision_nets import NETS, batches, distance, run_plainly

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCE = """
import sys
from pathlib import Path
from deploy.parity import normal_inputs
from deploy.precision import convert
for precision in sys.argv[3:]:
    calibration = (normal_inputs([(3, 16, 16)], 8, seed) for seed in range(2))
    convert(Path(sys.argv[1]), Path(sys.argv[2], precision + ".onnx"), precision, calibration=calibration)
"""


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_fp32_and_tf32_are_the_same_bytes(exported: dict[str, Path], tmp_path: Path, precision: str) -> None:
    found = convert(exported["resnet"], tmp_path / "m.onnx", precision)
    content = (tmp_path / "m.onnx").read_bytes()
    assert content == exported["resnet"].read_bytes()
    assert replace(found, seconds=0.0) == Converted(precision, len(content), 0, 20)
    assert found.seconds > 0


def test_equal_requests_give_equal_bytes(exported: dict[str, Path], tmp_path: Path) -> None:
    """In processes with other hash seeds; nothing is printed, and nothing of the machine is inside."""
    made = {}
    for seed in ("0", "1"):
        folder = tmp_path / "zaphod" / seed
        folder.mkdir(parents=True)
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(REPOSITORY)}
        command = [sys.executable, "-c", SOURCE, str(exported["mobile"]), str(folder), *PRECISIONS]
        done = subprocess.run(command, env=environment, capture_output=True, check=True, timeout=120)
        assert (done.stdout, done.stderr) == (b"", b"")
        made[seed] = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert made["0"] == made["1"]
    assert sorted(made["0"]) == sorted(f"{precision}.onnx" for precision in PRECISIONS)
    for content in made["0"].values():
        for trace in (b"zaphod", str(tmp_path).encode(), b"/tmp", sys.prefix.encode(), b".py"):
            assert trace not in content


def shaped(*shape: int) -> list[tuple[Array, ...]]:
    return [(np.zeros(shape, np.float32),)]


@pytest.mark.parametrize(
    ("precision", "given", "text"),
    [
        ("int4", {}, "unknown precision int4; use one of fp32, tf32, fp16, bf16, int8, fp8"),
        ("int8", {}, "m.onnx: int8 needs batches to calibrate on; give calibration data"),
        ("int8", {"calibration": []}, "calibration: no batches to calibrate on; give at least one"),
        ("fp16", {"calibration": iter(())}, "calibration: no batches to calibrate on; give at least one"),
        (
            "fp8",
            {"calibration": shaped(2, 3, 8, 16)},
            "calibration batch 0: shape [2, 3, 8, 16] does not fit input input ['any', 3, 16, 16]; "
            "calibrate on what the model is fed with",
        ),
        (
            "int8",
            {"calibration": [shaped(2, 3, 16, 16)[0] * 2]},
            "calibration batch 0: 2 arrays for 1 inputs; give one array per input",
        ),
        (
            "int8",
            {"calibration": [*shaped(2, 3, 16, 16), (np.full((2, 3, 16, 16), np.nan, np.float32),)]},
            "calibration batch 1: holds NaN or infinity for input input; clean the data first",
        ),
        (
            "int8",
            {"calibration": [(np.zeros((2, 3, 16, 16), np.int64),)]},
            "calibration batch 0: is int64, input input is float32; convert the data first",
        ),
        (
            "int8",
            {"calibration": shaped(2, 3, 16, 16), "keep": ["hed"]},
            "keep hed: no node or module of the model has this name; did you mean head?",
        ),
        (
            "int8",
            {"calibration": shaped(2, 3, 16, 16), "keep": ["patch", "qkv", "out", "mlp", "head"]},
            "nothing to quantise: all 8 layers with weights stay in fp32; keep fewer layers",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_refusals(
    exported: dict[str, Path], tmp_path: Path, precision: str, given: dict[str, Any], text: str
) -> None:
    (tmp_path / "m.onnx").write_bytes(b"as it was")
    with pytest.raises(ExportError) as caught:
        convert(exported["vit"], tmp_path / "m.onnx", precision, **given)
    assert str(caught.value) == text
    assert caught.value.exit_code == 4
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("m.onnx", b"as it was")]


def refused(kind: type[DeployError], source: Path, out: Path, precision: str = "fp16", **given: Any) -> str:
    with pytest.raises(kind) as caught:
        convert(source, out, precision, **given)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{source.parent}/", "").replace(f"{out.parent}/", "")


def test_files_that_cannot_be_converted(exported: dict[str, Path], tmp_path: Path) -> None:
    out, damaged = tmp_path / "out.onnx", tmp_path / "damaged.onnx"
    assert (
        refused(ArtifactError, tmp_path / "no.onnx", out) == "no.onnx: no such file; export the model first"
    )
    damaged.write_bytes(exported["vit"].read_bytes()[:5000])
    for precision in ("fp32", "fp16"):
        text = refused(ArtifactError, damaged, out, precision)
        assert text.startswith("damaged.onnx: is not valid ONNX: ")
        assert text.endswith("; export it again")
    convert(exported["vit"], tmp_path / "half.onnx", "fp16")
    for precision in PRECISIONS:
        text = refused(ArtifactError, tmp_path / "half.onnx", out, precision, calibration=[])
        assert text == "half.onnx: holds FLOAT16 weights already; start from the fp32 export"
    text = refused(ExportError, exported["vit"], exported["vit"], "fp16")
    assert text == "vit.onnx: would overwrite the fp32 model; write to another file"
    text = refused(ArtifactError, exported["vit"], tmp_path / "half.onnx" / "out.onnx")
    assert text == "out.onnx: cannot be written: Not a directory; check the folder"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged.onnx", "half.onnx"]


def test_a_branch_is_refused(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("y", 1, ["batch"])
    body = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "body", [], [value])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=helper.make_tensor("c", 9, [], [True])),
        helper.make_node("If", ["c"], ["y"], "branch", then_branch=body, else_branch=body),
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, ["batch"])], [value])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), tmp_path / "a.onnx")
    text = refused(ExportError, tmp_path / "a.onnx", tmp_path / "b.onnx")
    assert text == "branch: If holds a graph of its own; use fp32 or tf32"


class Words(nn.Module):
    """Whole numbers beside an image: a table, a convolution, and a layer that reads both."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv = nn.Embedding(7, 8), nn.Conv2d(3, 8, 3)
        self.mix, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, image: Tensor, word: Tensor) -> Tensor:
        return self.head(self.mix(self.conv(image).mean((2, 3)) + self.table(word)).relu())


@pytest.mark.parametrize("precision", ["fp16", "int8"])
def test_several_inputs_of_other_types(tmp_path: Path, precision: str) -> None:
    image, words = np.ones((4, 3, 6, 6), np.float32), np.array([0, 6, 3, 3])
    example = torch.from_numpy(image), torch.from_numpy(words)
    export(randomise(Words()).eval(), example, tmp_path / "a.onnx")
    convert(tmp_path / "a.onnx", tmp_path / "b.onnx", precision, calibration=[(image, words)])
    ports = onnx.load(tmp_path / "b.onnx").graph.input
    assert [port.type.tensor_type.elem_type for port in ports] == [1, 7]
    expected, found = (
        open_runner("onnxruntime", tmp_path / name).infer((image, words))[0] for name in ("a.onnx", "b.onnx")
    )
    assert 1e-6 < distance(expected, found) < 0.05


def test_weights_that_are_listed_as_inputs(tmp_path: Path) -> None:
    """As files of old exporters do."""
    ports = [helper.make_tensor_value_info(*port) for port in (("input", 1, ["batch", 4]), ("w", 1, [4, 3]))]
    weight = numpy_helper.from_array(np.random.default_rng(0).random((4, 3), np.float32), "w")
    out = helper.make_tensor_value_info("y", 1, ["batch", 3])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["input", "w"], ["y"])], "g", ports, [out], [weight]
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "a.onnx")
    (x,) = normal_inputs([(4,)], 5, 0)
    for precision in ("fp16", "int8", "fp8"):
        convert(tmp_path / "a.onnx", tmp_path / "b.onnx", precision, calibration=[(x,)], keep=())
        assert [port.name for port in onnx.load(tmp_path / "b.onnx").graph.input] == ["input"]
        assert distance(x @ numpy_helper.to_array(weight), run_plainly(tmp_path / "b.onnx", x)) < 0.1


# What it costs, and which one to take


class Fixed:
    """A runner that gives what it was told, one batch after the other."""

    def __init__(self, *outputs: Array) -> None:
        self._outputs = iter(outputs)

    def infer(self, inputs: Any) -> tuple[Array, ...]:
        return (next(self._outputs),)


ONE = np.array([[4.0, 1.0], [0.0, 2.0]])
TWO = np.array([[1.0, 3.0]])
X = (np.zeros((2, 1), np.float32),)


def test_evaluation_counts_over_all_batches() -> None:
    flipped = np.array([[3.1, 3.0]])
    labels = [np.array([0, 0]), np.array([1])]
    found = evaluate(Fixed(ONE, TWO), Fixed(ONE, flipped), [(X, labels[0]), (X, labels[1])])  # type: ignore[arg-type]
    assert found == Evaluation(3, pytest.approx(2.1 / 4.0), pytest.approx(2 / 3), 1, 2)
    assert found.drop == pytest.approx(1 / 3)
    blind = evaluate(Fixed(ONE, TWO), Fixed(ONE, flipped), [(X, None), (X, None)])  # type: ignore[arg-type]
    assert (blind.correct, blind.correct_reference) == (None, None)
    assert blind.drop == pytest.approx(1 / 3)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_are_infinitely_far(bad: float) -> None:
    spoiled = ONE.copy()
    spoiled[1, 1] = bad
    found = evaluate(Fixed(ONE, TWO), Fixed(spoiled, TWO), [(X, None), (X, None)])  # type: ignore[arg-type]
    assert found.relative == np.inf


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ([], "evaluation: no batches to evaluate on; give batches, with labels for all or for none"),
        ([(X, np.array([0, 1])), (X, None)], "evaluation: some batches have no labels; give batches"),
        (
            [(X, np.array([0]))],
            "evaluation: labels of shape [1] for [2] predictions; give one label per image",
        ),
    ],
)
def test_evaluations_that_mean_nothing(data: Any, text: str) -> None:
    with pytest.raises(MeasureError) as caught:
        evaluate(Fixed(ONE, ONE), Fixed(ONE, ONE), data)  # type: ignore[arg-type]
    assert str(caught.value).startswith(text)
    assert caught.value.exit_code == 3


def test_other_outputs_are_refused() -> None:
    with pytest.raises(MeasureError, match=r"evaluation: outputs \[\(1, 2\)\] instead of \[\(2, 2\)\]"):
        evaluate(Fixed(ONE), Fixed(TWO), [(X, None)])  # type: ignore[arg-type]


def variant(name: str, latency_ms: float, correct: int = 900, relative: float = 0.0) -> Variant:
    return Variant(name, latency_ms, Evaluation(1000, relative, 0.99, correct, 900))


def test_the_fastest_inside_is_chosen_and_each_other_has_its_reason() -> None:
    rows = [
        variant("int8", 1.0, correct=885),
        variant("fp32", 4.0),
        variant("tf32", 3.96),
        variant("fp16", 2.0, correct=899),
        Variant("bf16", failure="TensorRT has no bf16 on this GPU"),
        variant("fp8", 0.5, relative=2.3),
    ]
    assert choose(rows, 0.01) == Choice(
        "fp16",
        {
            "fp32": "4 ms, not faster than fp16 with 2 ms",
            "tf32": "3.96 ms, not faster than fp16 with 2 ms",
            "fp16": "the fastest inside, 2 ms",
            "bf16": "TensorRT has no bf16 on this GPU",
            "int8": "1.50 points of top-1 lost, 1.00 are tolerated",
            "fp8": "outputs differ by 2.3 of the largest, 0.3 is tolerated",
        },
    )
    assert choose(rows, 0.02).name == "int8"
    assert choose([*rows[:3], Variant("fp16")], 0.0).why["fp16"] == "not measured"


def test_without_labels_changed_predictions_count() -> None:
    rows = [
        Variant("fp32", 4.0, Evaluation(1000, 0.0, 1.0)),
        Variant("int8", 1.0, Evaluation(1000, 0.05, 0.98)),
    ]
    assert choose(rows, 0.01).why["int8"] == "2.00 points of top-1 changed, 1.00 are tolerated"
    assert choose(rows, 0.02).name == "int8"


def test_what_is_hardly_faster_is_not_worth_it() -> None:
    assert choose([variant("fp32", 1.0), variant("fp16", 0.99)], 0.01).name == "fp32"
    assert choose([variant("fp32", 1.0), variant("fp16", 0.97)], 0.01).name == "fp16"


def test_no_variant_inside_is_an_error() -> None:
    with pytest.raises(MeasureError) as caught:
        choose([Variant("fp16", failure="no kernel"), Variant("int8")], 0.01)
    assert str(caught.value) == (
        "precision: no precision is inside (fp16: no kernel; int8: not measured); allow more"
    )


def test_every_precision_has_a_tolerance() -> None:
    assert tuple(TOLERANCES) == PRECISIONS


# Engines


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_tensorrt_rtx_builds_every_precision(exported: dict[str, Path], tmp_path: Path, name: str) -> None:
    """Strongly typed engines, built without a GPU."""
    reason = "tensorrt_rtx is not installed, or does not import"
    tensorrt = pytest.importorskip("tensorrt_rtx", reason=reason, exc_type=ImportError)
    sizes = {}
    for precision in PRECISIONS:
        out = tmp_path / f"{precision}.onnx"
        convert(exported[name], out, precision, calibration=batches(NETS[name][1]))
        sizes[precision] = built(tensorrt, out, NETS[name][1])
    assert all(size > 0 for size in sizes.values()), sizes
    if name == "resnet":  # the others are too small for weights to count
        assert sizes["fp16"] < 0.75 * sizes["fp32"]


def built(tensorrt: Any, path: Path, shape: tuple[int, ...]) -> int:
    """Size of the engine in bytes; fails with the library's own words."""

    class Logger(tensorrt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            tensorrt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= tensorrt.ILogger.Severity.ERROR:
                self.lines.append(message)

    logger = Logger()
    builder = tensorrt.Builder(logger)
    network = builder.create_network(1 << int(tensorrt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = tensorrt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(path)), [parser.get_error(i).desc() for i in range(parser.num_errors)]
    profile = builder.create_optimization_profile()
    profile.set_shape("input", *((batch, *shape) for batch in (1, 4, 8)))
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    assert engine is not None, logger.lines
    return int(engine.nbytes)
