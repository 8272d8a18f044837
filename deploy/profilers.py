"""Layer times from the runtimes' own profilers: ONNX Runtime's, torch's, TensorRT's.

Several models are profiled in turns, and times are medians over the quieter half of a model's runs: a busy
spell of the machine spoils neither.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from deploy.errors import ArtifactError, MeasureError, RunnerError
from deploy.layer_names import CONTRACTIONS, Node, OnnxLayers, Place, place_nodes
from deploy.profile import NodeTime, Profile, compare, document, gather
from deploy.runners import Array

if TYPE_CHECKING:
    from torch import nn

WARM_UP_RUNS = 3
# These only rename memory: what they take is the cost of a call.
RENAMING = frozenset(("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Constant"))
_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def profile_onnx(
    models: Mapping[str, Path], inputs: Sequence[Array], *, runs: int = 20, threads: int = 1
) -> dict[str, Profile]:
    """ONNX Runtime's profiler on the CPU, for each model on the same inputs, in turns.

    `runs` (2 or more) after a warm-up; kernels as the runtime's optimiser made them. On a GPU this profiler
    times the launches, so that one is refused: use TensorRT's or torch's there. Raises MeasureError for fewer
    runs, ArtifactError for a file that onnxruntime cannot load.
    """
    if runs < 2 or not models:
        raise MeasureError(f"{runs} runs of {len(models)} models", "profile", "profile 2 runs or more")
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: _OrtSession(path, Path(folder), threads) for name, path in models.items()}
        for _ in range(WARM_UP_RUNS + runs):
            for session in sessions.values():
                session.run(inputs)
        return {name: session.profile() for name, session in sessions.items()}


class _OrtSession:
    """A session that profiles, and the graph that it executes."""

    def __init__(self, path: Path, folder: Path, threads: int) -> None:
        import onnxruntime

        if not path.is_file():
            raise ArtifactError("no such file", str(path), "export the model first")
        self._path, self._graph_file = path, Path(tempfile.mkdtemp(dir=folder)) / "graph.onnx"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.log_severity_level = 4
        options.enable_profiling = True
        options.profile_file_prefix = str(self._graph_file.with_suffix(""))
        options.optimized_model_filepath = str(self._graph_file)
        try:
            self._session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime's classes live in a private module
            what = f"onnxruntime cannot load it: {error}"
            raise ArtifactError(what, str(path), "export the model again") from error

    def run(self, inputs: Sequence[Array]) -> None:
        names = [port.name for port in self._session.get_inputs()]
        try:
            self._session.run(None, dict(zip(names, inputs, strict=True)))
        except Exception as error:  # onnxruntime's classes live in a private module
            raise RunnerError(f"the run failed: {error}", "onnxruntime") from error

    def profile(self) -> Profile:
        import onnx

        events = json.loads(Path(self._session.end_profiling()).read_text(encoding="utf-8"))
        exported = onnx.load(self._path, load_external_data=False).graph
        executed = onnx.load(self._graph_file, load_external_data=False).graph
        return read_ort(events, exported, executed)


def read_ort(events: Sequence[Mapping[str, Any]], exported: Any, executed: Any) -> Profile:
    """ONNX Runtime's profile (its JSON, times in µs) of a graph that was exported as `exported`.

    `executed` is the optimised graph; the runtime's nodes come in its order.
    """
    runs = _ort_runs(events)[WARM_UP_RUNS:]
    if not runs:
        raise MeasureError("no run in the profile", "profile", f"make more than {WARM_UP_RUNS} runs")
    quiet = _quiet([run[0] for run in runs])
    kept = [runs[i] for i in quiet]
    layers = OnnxLayers(exported)
    places = layers.of_optimised(executed)
    if any(len(nodes) != len(executed.node) for _, nodes in kept):
        raise MeasureError("the profile does not fit the graph", "profile", "report this with the model")
    times = []
    for i, (place, covered) in enumerate(places):
        ms = median(nodes[i]["dur"] for _, nodes in kept) / 1e3
        weight = next(filter(None, map(layers.weight, covered)), None)
        times.append(_ort_node(executed.node[i], kept[0][1][i]["args"], place, ms, weight))
    run_ms = median(run for run, _ in kept) / 1e3
    return gather(times, source="onnxruntime", run_ms=run_ms, runs=len(kept))


def _ort_runs(events: Sequence[Mapping[str, Any]]) -> list[tuple[float, list[Mapping[str, Any]]]]:
    """For each run its time in µs and its nodes in order; nodes inside a loop count as the loop."""
    spans = [event for event in events if event.get("name") == "model_run"]
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_time")]
    nodes = sorted(nodes, key=lambda event: (event["ts"], -event["dur"]))
    found = []
    for span in sorted(spans, key=lambda event: event["ts"]):
        inside: list[Mapping[str, Any]] = []
        end = span["ts"]
        for event in nodes:
            if end <= event["ts"] <= span["ts"] + span["dur"]:
                inside.append(event)
                end = event["ts"] + event["dur"]
        found.append((float(span["dur"]), inside))
    return found


def _quiet(values: Sequence[float]) -> list[int]:
    """The indices of the faster half."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    return sorted(order[: -(-len(order) // 2)])


def _ort_node(
    node: Any, facts: Mapping[str, Any], place: Place, ms: float, weight: tuple[tuple[int, ...], bool] | None
) -> NodeTime:
    blocked = " (blocked)" if node.domain == "com.microsoft.nchwc" and node.op_type == "Conv" else ""
    sizes = (facts.get(key) for key in ("activation_size", "parameter_size", "output_size"))
    return NodeTime(
        name=place.name,
        op=node.op_type + blocked,
        ms=ms,
        module=place.module,
        macs=_onnx_macs(node, facts, weight),
        bytes=sum(int(size or 0) for size in sizes),
        channels=None if weight is None else _channels(*weight),
        moves=node.op_type not in RENAMING,
    )


def _channels(dims: tuple[int, ...], out_first: bool) -> tuple[int, int]:
    """(in, out) of a weight of shape (out, in, ...) or (..., in, out)."""
    return (dims[1], dims[0]) if out_first else (dims[-2], dims[-1])


def _onnx_macs(
    node: Any, facts: Mapping[str, Any], weight: tuple[tuple[int, ...], bool] | None
) -> int | None:
    """MACs from the shapes of one call: the weight's own size, not that of a padded copy."""
    op = node.op_type
    if op not in CONTRACTIONS:
        return 0
    inputs, outputs = (_shapes(facts.get(f"{side}_type_shape")) for side in ("input", "output"))
    if not inputs or not outputs:
        return None
    if weight is None:
        return math.prod(outputs[0]) * inputs[0][-1] if "MatMul" in op else None
    if "Conv" not in op:
        return math.prod(outputs[0][:-1]) * math.prod(weight[0])
    place = inputs[0] if op == "ConvTranspose" else outputs[0]
    last = any(entry.name == "channels_last" and entry.i for entry in node.attribute)
    return math.prod(place) // place[-1 if last else 1] * math.prod(weight[0])


def _shapes(listed: Any) -> list[list[int]]:
    return [shape for entry in listed or () for shape in entry.values()]


def profile_torch(
    models: Mapping[str, nn.Module], inputs: Sequence[Array], *, runs: int = 20, device: str = "cpu"
) -> dict[str, Profile]:
    """torch's profiler, for each model on the same inputs, in turns; on "cuda" the time of the kernels.

    The model runs as its exported graph, op by op, which is what eager execution does. `runs` (2 or more)
    follow a warm-up. Raises MeasureError for fewer runs.
    """
    if runs < 2 or not models:
        raise MeasureError(f"{runs} runs of {len(models)} models", "profile", "profile 2 runs or more")
    import torch

    tensors = tuple(torch.from_numpy(array).to(device) for array in inputs)
    graphs = {name: _TorchGraph(module, tensors, device) for name, module in models.items()}
    with _torch_profiler(device) as found:
        for number in range(WARM_UP_RUNS + runs):
            for name, graph in graphs.items():
                graph.run(f"{name}/{number}")
    times = read_torch(found.key_averages(), on_gpu=device != "cpu")
    kept = [str(number) for number in range(WARM_UP_RUNS, WARM_UP_RUNS + runs)]
    return {name: graph.profile([times[f"{name}/{run}"] for run in kept]) for name, graph in graphs.items()}


def _torch_profiler(device: str) -> Any:
    """The profiler in Python; the one in C++, which writes notes to stderr, only where kernels are timed."""
    import torch

    if device == "cpu":
        return torch.autograd.profiler.profile(use_kineto=False)
    kinds = (torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=kinds)


class _TorchGraph:
    """A model as a graph of ATen ops that runs node by node under the profiler."""

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...], device: str) -> None:
        import copy

        import torch
        from torch import fx

        graph = module if isinstance(module, fx.GraphModule) else torch.export.export(module, inputs).module()
        self._module: Any = copy.deepcopy(graph).to(device)
        self._inputs, self._device = inputs, device
        self._calls = [node for node in self._module.graph.nodes if node.op == "call_function"]
        self._facts = self._measure_facts()

    def _measure_facts(self) -> dict[str, dict[str, Any]]:
        import torch
        from torch.utils.flop_counter import FlopCounterMode

        facts: dict[str, dict[str, Any]] = {}

        def look(node: Any, run: Callable[[], Any], given: Sequence[Any]) -> Any:
            with FlopCounterMode(display=False) as counter:
                made = run()
            held = [x for x in given if isinstance(x, torch.Tensor)]
            own = [x for x in _tensors(made) if all(x.data_ptr() != y.data_ptr() for y in held)]
            moved = sum(x.nbytes for x in (*held, *own)) if own else 0
            facts[node.name] = {"macs": counter.get_total_flops() // 2, "bytes": moved}
            return made

        self._interpret(look)
        return facts

    def _interpret(self, around: Callable[[Any, Callable[[], Any], Sequence[Any]], Any]) -> None:
        import torch
        from torch import fx

        class Walk(fx.Interpreter):
            def run_node(self, n: fx.Node) -> Any:
                if n.op != "call_function":
                    return super().run_node(n)
                given = [self.env[x] for x in n.all_input_nodes]
                return around(n, lambda: super(Walk, self).run_node(n), given)

        with torch.inference_mode():
            Walk(self._module).run(*self._inputs)

    def run(self, label: str) -> None:
        """One run in a scope of this name, each node in one named "LABEL:node"."""
        import torch
        from torch.profiler import record_function

        def scope(node: Any, run: Callable[[], Any], given: Sequence[Any]) -> Any:
            with record_function(f"run:{label}:{node.name}"):
                return run()

        with record_function(f"run:{label}:"):
            self._interpret(scope)
            if self._device != "cpu":
                torch.cuda.synchronize()

    def profile(self, runs: Sequence[Mapping[str, float]]) -> Profile:
        """The profile from the nodes' milliseconds in each run; "" is the whole run."""
        kept = [runs[i] for i in _quiet([run[""] for run in runs])]
        usual = {name: median(run.get(name, 0.0) for run in kept) for name in kept[0]}
        places = place_nodes([self._node(node) for node in self._calls])
        times = [
            self._time(node, place, usual.get(node.name, 0.0))
            for node, place in zip(self._calls, places, strict=True)
        ]
        return gather(times, source=f"torch, {self._device}", run_ms=usual[""], runs=len(kept))

    def _node(self, node: Any) -> Node:
        index = {call: i for i, call in enumerate(self._calls)}
        held = [str(x.target) for x in node.all_input_nodes if x.op == "get_attr"]
        module = next((name.rpartition(".")[0] for name in held if "." in name), "")
        return Node(_aten(node), tuple(index[x] for x in node.all_input_nodes if x in index), module)

    def _time(self, node: Any, place: Place, ms: float) -> NodeTime:
        facts, channels, op = self._facts[node.name], None, _aten(node)
        if op in CONTRACTIONS:
            held = [x for x in node.all_input_nodes if x.op == "get_attr"]
            dims = next((tuple(_attribute(self._module, x.target).shape) for x in held), ())
            channels = (dims[1], dims[0]) if len(dims) > 1 else None
        return NodeTime(
            name=place.name,
            op=op,
            ms=ms,
            module=place.module,
            macs=facts["macs"],
            bytes=facts["bytes"],
            channels=channels,
            moves=facts["bytes"] > 0,
        )


def read_torch(averages: Sequence[Any], *, on_gpu: bool) -> dict[str, dict[str, float]]:
    """Label -> node -> milliseconds, from torch's key_averages(); "" is the whole run.

    On a GPU a node's time is that of the kernels it started, and a run lasts until the last one has ended.
    """
    found: dict[str, dict[str, float]] = {}
    for event in averages:
        if not event.key.startswith("run:"):
            continue
        label, _, node = event.key.removeprefix("run:").rpartition(":")
        spent = event.device_time_total if on_gpu and node else event.cpu_time_total
        times = found.setdefault(label, {})
        # A range on the device may be listed beside the one on the host, without a time on the latter.
        times[node] = max(times.get(node, 0.0), spent / 1e3)
    return found


def _aten(node: Any) -> str:
    """ "conv2d" for aten.conv2d.default, "getitem" for Python's."""
    schema = getattr(node.target, "_schema", None)
    return str(schema.name.rpartition("::")[2] if schema else getattr(node.target, "__name__", node.target))


def _attribute(module: Any, path: Any) -> Any:
    for part in str(path).split("."):
        module = getattr(module, part)
    return module


def _tensors(value: Any) -> list[Any]:
    import torch

    return [x for x in torch.utils._pytree.tree_leaves(value) if isinstance(x, torch.Tensor)]


def profile_engine(runner: Any, onnx: Path, inputs: Sequence[Array], *, runs: int = 20) -> Profile:
    """TensorRT's profiler on an open runner of an engine that was built from `onnx`."""
    from onnx import load

    runner.prepare(inputs)
    times, whole = runner.layer_times(WARM_UP_RUNS + runs)
    return read_tensorrt(times, whole, runner.layers(), load(onnx, load_external_data=False).graph)


def read_tensorrt(
    runs: Sequence[Mapping[str, float]],
    run_ms: Sequence[float],
    inspected: Sequence[Mapping[str, Any]],
    exported: Any,
) -> Profile:
    """TensorRT's layers of each run by name (what its IProfiler told), and the ms of each run, as a profile.

    `inspected` are the "Layers" of the engine inspector's JSON (detailed verbosity), whose metadata name the
    ONNX nodes; a layer without metadata is looked for by its own name, parts joined by " + ".
    """
    pairs = list(zip(runs, run_ms, strict=True))[WARM_UP_RUNS:]
    if not pairs:
        raise MeasureError("no run in the profile", "profile", f"make more than {WARM_UP_RUNS} runs")
    kept = [pairs[i] for i in _quiet([whole for _, whole in pairs])]
    facts = {str(row.get("Name")): row for row in inspected if isinstance(row, Mapping)}
    layers = OnnxLayers(exported)
    times = []
    for name in kept[0][0]:
        ms = median(run.get(name, 0.0) for run, _ in kept)
        row = facts.get(name, {})
        nodes = _ONNX_NODE.findall(str(row.get("Metadata", ""))) or re.split(r" \+ |, ", name)
        place = layers.of_names(nodes) or Place(name)
        kind = str(row.get("LayerType", "")) or "kernel"
        times.append(NodeTime(place.name, kind, ms, place.module))
    whole = median(total for _, total in kept)
    return gather(times, source="tensorrt", run_ms=whole, runs=len(kept))


def compare_onnx(
    original: Path,
    dense: Path,
    inputs: Sequence[Array],
    *,
    align: int,
    threads: int = 1,
    runs: int = 20,
    macs: tuple[Mapping[str, float] | None, Mapping[str, float] | None] = (None, None),
    measured_ms: tuple[float | None, float | None] = (None, None),
) -> dict[str, Any]:
    """The per-layer part of results.json: both files profiled in turns on the CPU, compared, and judged.

    `macs` by module path and `measured_ms` (the latency without a profiler) are those of both models.
    """
    found = profile_onnx({"original": original, "dense": dense}, inputs, runs=runs, threads=threads)
    before, after = found["original"], found["dense"]
    rows = compare(before, after, align=align, macs_before=macs[0], macs_after=macs[1])
    return document(before, after, rows, measured_ms=measured_ms)
