"""What a config leaves open, its target decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress import aim, config
from compress.config import Config
from compress.errors import CompressError, ConfigError, TargetError

BASE = "version: 1\nmodel: {name: x:y, input_shape: [3, 8, 8]}\ndata: {name: mnist5k}\n"
BOARD = """
description = "my board"
runner = "onnxruntime"
precision = "int8"
align = 4
threads = 2
batches = [1, 3]
budget = {latency_ms = 2.5, speedup = 1.5}
"""


def read(text: str = "") -> Config:
    return config.loads(BASE + text)


def test_the_usual_target() -> None:
    found = aim.aimed(read())
    bench = found.bench
    assert (bench.runners, bench.precision, bench.batches, bench.threads) == (
        ["torch", "onnxruntime"], "fp32", [1, 32], 1,
    )  # fmt: skip
    assert (found.gates.runner, found.gates.latency_ms, found.gates.speedup) == ("onnxruntime", None, None)
    assert aim.aimed(found) == found


def test_a_gpu_is_measured_with_its_runner() -> None:
    found = aim.aimed(read("bench: {target: h100-fp16}"))
    assert found.bench.runners == ["torch_cuda", "tensorrt"]
    assert (found.bench.precision, found.bench.batches) == ("fp16", [1, 32, 256])
    assert found.gates.runner == "tensorrt"


def test_the_config_wins(tmp_path: Path) -> None:
    (tmp_path / "board.toml").write_text(BOARD)
    target = f"target: {tmp_path / 'board.toml'}"
    own = "batches: [8], threads: 4, precision: fp16, runners: [torch]"
    found = aim.aimed(read(f"bench: {{{target}, {own}}}\ngates: {{latency_ms: null, runner: torch}}"))
    assert (found.bench.batches, found.bench.threads, found.bench.precision) == ([8], 4, "fp16")
    assert (found.bench.runners, found.gates.runner) == (["torch"], "torch")
    assert (found.gates.latency_ms, found.gates.speedup) == (None, 1.5)  # one is off, the other the board's
    open_ = aim.aimed(read(f"bench: {{{target}}}"))
    assert (open_.gates.latency_ms, open_.gates.speedup, open_.bench.precision) == (2.5, 1.5, "int8")
    assert aim.align(open_) == 4
    assert aim.align(read(f"bench: {{{target}}}\nprune: {{align: 3}}")) == 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("gates: {speedup: 1.5, runner: torch_cuda}", "gates.runner: no runner of this name is measured"),
        ("gates: {speedup: 1.5, batch: 7}", "gates.batch: this batch size is not measured, found 7"),
    ],
)
def test_gates_on_what_the_target_does_not_measure(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        aim.aimed(read(text))
    assert str(caught.value).startswith(said)


def test_pycuda_is_looked_for_before_engines_are_built(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(aim.importlib.util, "find_spec", lambda name: None)
    asked = read("bench: {target: h100, engine: {buffers: pycuda}}")
    aim.check(asked, here=False)
    with pytest.raises(TargetError) as caught:
        aim.check(asked, here=True)
    assert str(caught.value) == (
        "bench.engine.buffers: pycuda is not installed; "
        "pip install 'compress-release[pycuda]', or set it to torch"
    )
    monkeypatch.setattr(aim.importlib.util, "find_spec", lambda name: name)
    aim.check(asked, here=True)


def test_streams_are_of_gpus() -> None:
    assert aim.aimed(read("bench: {target: h100, streams: 4}")).bench.streams == 4
    assert aim.on_gpu(aim.aimed(read("bench: {target: h100}"))) == ["torch_cuda", "tensorrt"]
    with pytest.raises(ConfigError) as caught:
        aim.aimed(read("bench: {streams: 4}"))
    assert str(caught.value) == (
        "bench.streams: streams are of GPUs, and torch, onnxruntime run on the CPU; "
        "set it to null, or bench on a GPU target"
    )


def test_another_gpu_than_the_targets_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    aim.check(read("bench: {target: h100}"), here=True)
    aim.check(read("bench: {target: l4}"), here=False)
    aim.check(read(), here=True)
    with pytest.raises(
        TargetError, match=r"^bench\.target: the target l4 is for L4, here is NVIDIA H100"
    ) as caught:
        aim.check(read("bench: {target: l4}"), here=True)
    assert caught.value.exit_code == 6


class TestBudget:
    def test_its_place_is_the_targets(self, tmp_path: Path) -> None:
        found = aim.aimed(read("budget: {latency_ratio: 0.5}"))
        assert found.budget is not None
        assert (found.budget.target, found.budget.batch) == ("cpu-ort", 32)
        place = aim.place(found)
        assert (place.target.name, place.precision, place.threads, place.batch) == ("cpu-ort", "fp32", 1, 32)
        (tmp_path / "board.toml").write_text(BOARD)
        other = (
            f"budget: {{latency_ms: 2, target: {tmp_path / 'board.toml'}, batch: 3}}\nbench: {{threads: 4}}"
        )
        place = aim.place(aim.aimed(read(other)))
        assert (place.target.name, place.precision, place.threads, place.batch) == ("board", "int8", 2, 3)
        assert aim.align(read(other)) == 4  # also where nothing is filled in yet
        own = aim.place(aim.aimed(read("budget: {latency_ms: 2}\nbench: {threads: 4, precision: int8}")))
        assert (own.precision, own.threads) == ("int8", 4)
        assert aim.aimed(aim.aimed(read(other))) == aim.aimed(read(other))

    @pytest.mark.parametrize(
        ("text", "asked"),
        [
            ("budget: {latency_ratio: 0.5}", (2.0 / 1.03, None, 32)),
            ("budget: {latency_ms: 3, batch: 1}", (None, 3.0 * 1.03, 1)),
            ("budget: {macs_ratio: 0.5}", (None, None, None)),
            ("budget: {latency_ratio: 0.5}\ngates: {batch: 1}", (2.0 / 1.03, None, 1)),
            ("budget: {latency_ratio: 0.5, batch: 32}\ngates: {batch: 1}", (None, None, 1)),
            ("budget: {latency_ratio: 0.5}\ngates: {speedup: 1.5}", (1.5, None, 32)),
            ("budget: {latency_ratio: 0.5}\ngates: {speedup: null}", (None, None, 32)),
            ("budget: {latency_ratio: 0.5, target: h100}", (None, None, None)),
        ],
    )
    def test_the_gate_asks_that_the_budget_is_met(
        self, text: str, asked: tuple[float | None, float | None, int | None]
    ) -> None:
        gates = aim.aimed(read(text)).gates
        assert (gates.speedup, gates.latency_ms, gates.batch) == pytest.approx(asked)

    @pytest.mark.parametrize(
        ("text", "judged"),
        [
            ("", True),
            ("prune: {max_accuracy_drop: 0.1}", False),
            ("prune: {max_loss_increase: 0.1}", False),
            ("prune: {max_loss_increase: 0.1}\ngates: {target: true}", True),
            ("gates: {target: false}", False),
        ],
    )
    def test_a_target_must_be_reached_unless_pruning_may_stop_before_it(
        self, text: str, judged: bool
    ) -> None:
        assert aim.aimed(read(text)).gates.target is judged

    def test_a_metric_of_its_own_units_takes_the_place_of_accuracy(self) -> None:
        assert aim.aimed(read("gates: {metric_drop: 5}")).gates.accuracy_drop is None
        assert aim.aimed(read("gates: {metric_drop: 5, accuracy_drop: 0.1}")).gates.accuracy_drop == 0.1

    def test_what_the_target_asks_still_holds(self, tmp_path: Path) -> None:
        (tmp_path / "board.toml").write_text(BOARD)
        bench = f"bench: {{target: {tmp_path / 'board.toml'}}}\n"
        gates = aim.aimed(read(f"{bench}budget: {{latency_ratio: 0.5}}")).gates
        assert (gates.speedup, gates.latency_ms, gates.batch) == (pytest.approx(2.0 / 1.03), 2.5, 3)
        gates = aim.aimed(read(f"{bench}budget: {{latency_ms: 2}}")).gates
        assert (gates.speedup, gates.latency_ms) == (1.5, 2.0 * 1.03)

    @pytest.mark.parametrize(
        ("text", "code", "said"),
        [
            (
                "batch: 7",
                3,
                "budget.batch: this batch size is not measured, found 7; add it to bench.batches",
            ),
            ("target: cpu-rot", 3, "budget.target: unknown target 'cpu-rot'; use cpu-ort, "),
            ("target: nowhere.toml", 3, "nowhere.toml: cannot read it: No such file or directory"),
            (
                "target: h100",
                6,
                "budget.target: h100 needs a CUDA device: latency is measured while pruning; "
                "prune where there is one; see compress doctor",
            ),
        ],
    )
    def test_what_cannot_be_measured_is_told_at_once(
        self, monkeypatch: pytest.MonkeyPatch, text: str, code: int, said: str
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        with pytest.raises(CompressError) as caught:
            aim.check(read(f"budget: {{latency_ms: 2, {text}}}"), here=True, prunes=True)
        assert str(caught.value).startswith(said)
        assert caught.value.exit_code == code
        if code == 6:
            aim.check(read(f"budget: {{latency_ms: 2, {text}}}"), here=True)  # only pruning needs the GPU

    def test_a_runner_that_tells_of_no_layers(self, tmp_path: Path) -> None:
        (tmp_path / "board.toml").write_text(BOARD.replace('"onnxruntime"', '"onnxruntime_cuda"'))
        with pytest.raises(ConfigError) as caught:
            aim.check(read(f"budget: {{latency_ms: 2, target: {tmp_path / 'board.toml'}}}"), here=False)
        assert str(caught.value) == (
            "budget.target: onnxruntime_cuda does not tell how long each layer takes; take a target of ONNX "
            "Runtime on the CPU, TensorRT or torch"
        )
        assert caught.value.exit_code == 3

    def test_another_gpu_than_the_budgets(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
        aim.check(read("budget: {latency_ms: 2, target: h100}"), here=True, prunes=True)
        with pytest.raises(
            TargetError, match=r"^budget\.target: the target l4 is for L4, here is NVIDIA H100"
        ):
            aim.check(read("budget: {latency_ms: 2, target: l4}"), here=True, prunes=True)
