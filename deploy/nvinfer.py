"""TensorRT 10.16 and 11 and TensorRT-RTX 1.7 by the names that all three have.

These libraries say None or False where others raise, and tell the reason to a logger; they may also take the
process down. So a network is compiled in a process of its own (`main`: a request on stdin, the answer on
stdout), and what the logger heard is quoted in the error that is raised.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deploy.availability import import_failure
from deploy.errors import ArtifactError, DeployError, ExportError, MeasureError, RunnerError
from deploy.runners import ENGINE_KINDS

LIBRARIES = ENGINE_KINDS
EXTRAS = {"tensorrt": "compress-release[tensorrt]", "tensorrt_rtx": "compress-release[tensorrt-rtx]"}
_QUOTED_LINES, _QUOTED_CHARACTERS, _KEPT_WARNINGS = 4, 900, 20
_ON_A_GPU = "build it on a machine with an NVIDIA GPU and driver"
# Words in a library's error -> whose fault it is, and what helps.
_CAUSES: tuple[tuple[str, type[DeployError], str], ...] = (
    ("cudaError", RunnerError, f"{_ON_A_GPU}, or name a compute capability (tensorrt_rtx)"),
    ("CUDA initialization failure", RunnerError, _ON_A_GPU),
    ("status == CUDA_SUCCESS", RunnerError, f"{_ON_A_GPU}, or without refit"),
    ("libnvinfer_lean", RunnerError, "build without version_compatible: the lean runtime is not installed"),
    ("workspace", ExportError, "raise workspace_mib"),
    ("OutOfMemory", RunnerError, "lower the largest batch or workspace_mib"),
    ("Turing", ExportError, "convert the model to fp16, or name another compute capability"),
)


def installed(library: str) -> None:
    """Raise MeasureError for a name that is none of LIBRARIES, RunnerError for one that is not installed."""
    if library not in LIBRARIES:
        raise MeasureError("unknown library", library, f"use one of {', '.join(LIBRARIES)}")
    if importlib.util.find_spec(library) is None:
        raise RunnerError("not installed", library, f"pip install '{EXTRAS[library]}'")


@functools.cache
def load(library: str) -> Any:
    """The library's module, imported here once it was imported in another process without harm."""
    installed(library)
    failure = import_failure(library)
    if failure:
        raise RunnerError(f"does not import: {failure}", library, f"reinstall '{EXTRAS[library]}'")
    return importlib.import_module(library)


def make_log(trt: Any) -> Any:
    """A logger for the library that keeps its `errors` and `warnings`, line by line, and prints nothing."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the base comes from an untyped library
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message)

    return Log()


def quote(lines: Sequence[str]) -> str:
    """The last lines that were logged, as one."""
    return " | ".join(lines[-_QUOTED_LINES:])[-_QUOTED_CHARACTERS:] or "no reason given"


def refusal(lines: Sequence[str], what: str, where: str) -> DeployError:
    """The error for what the library would not do: its own lines, and what helps where that is known."""
    said = quote(lines)
    for words, kind, fix in _CAUSES:
        if words in said:
            return kind(f"{what}: {said}", where, fix)
    return ExportError(f"{what}: {said}", where, "try another precision or another export.opset")


# -- building ------------------------------------------------------------------------------------------


def compile_network(request: Mapping[str, Any]) -> dict[str, Any]:
    """Compile `request["onnx"]`, write the engine to `request["plan"]` and say what it is.

    The other keys are the fields of deploy.to_tensorrt.EngineOptions, `library`, `timing_cache` (a path or
    None) and `inspect` (whether a GPU is here, which the inspector needs). Raises DeployError, OSError.
    """
    trt = _imported(request["library"])
    log, name = make_log(trt), Path(request["onnx"]).name
    builder = _builder(trt, log, request["library"])
    started = time.perf_counter()
    # The parser and the network must stay alive until the engine is built.
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    _parse(parser, network, request["onnx"])
    config = builder.create_builder_config()
    _configure(trt, config, request)
    inputs = _add_profile(builder, network, config, request["batches"])
    reused = _use_timing_cache(config, request)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refusal(log.errors, f"{request['library']} builds no engine", name)
    seconds = time.perf_counter() - started
    Path(request["plan"]).write_bytes(memoryview(plan))
    if reused is not None:
        cache = config.get_timing_cache()
        Path(request["plan"] + ".cache").write_bytes(memoryview(cache.serialize()))
    outputs = [_port(network.get_output(index)) for index in range(network.num_outputs)]
    flags = [flag for flag, value in trt.BuilderFlag.__members__.items() if config.get_flag(value)]
    return {
        "library_version": trt.__version__,
        "seconds": seconds,
        "inputs": inputs,
        "outputs": outputs,
        "flags": flags,
        "workspace_bytes": config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE),
        "builder_level": config.builder_optimization_level,
        "timing_cache": {None: None, True: "reused", False: "new"}[reused],
        "layers": _inspected(trt, log, plan, request) if request["inspect"] else None,
        "warnings": log.warnings[:_KEPT_WARNINGS],
    }


def _imported(library: str) -> Any:
    try:
        return importlib.import_module(library)
    except Exception as error:  # a broken installation can raise anything
        what = f"does not import: {type(error).__name__}: {error}"
        raise RunnerError(what, library, f"reinstall '{EXTRAS[library]}'") from error


def _builder(trt: Any, log: Any, library: str) -> Any:
    try:
        return trt.Builder(log)
    except Exception as error:  # TensorRT without a driver: the binding gets a null pointer
        what = f"starts no builder: {quote(log.errors or [str(error)])}"
        raise RunnerError(what, library, _ON_A_GPU) from error


def _parse(parser: Any, network: Any, onnx: str) -> None:
    """Read the ONNX file into the network, or raise with the parser's own words."""
    name = Path(onnx).name
    if not parser.parse_from_file(onnx):
        said = [_fault(parser.get_error(index)) for index in range(parser.num_errors)]
        if any("MODEL_DESERIALIZE_FAILED" in line for line in said):
            raise ArtifactError(f"is not ONNX: {quote(said)}", name, "export it again")
        raise ExportError(
            f"the parser refuses {quote(said)}", name, "leave that operator out of the model, or bench ONNX"
        )
    if not network.num_outputs:
        raise ArtifactError("is not ONNX: it has no outputs", name, "export it again")


def _fault(fault: Any) -> str:
    where = f"{fault.node_operator()} ({fault.node_name()}): " if fault.node_operator() else ""
    return f"{where}{fault.code().name}: {fault.desc()}"


def _configure(trt: Any, config: Any, request: Mapping[str, Any]) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the names of layers, for profiles
    wanted = {
        trt.BuilderFlag.TF32: request["tf32"],  # on unless cleared
        trt.BuilderFlag.REFIT: request["refit"],
        trt.BuilderFlag.VERSION_COMPATIBLE: request["version_compatible"],
    }
    for flag, on in wanted.items():
        (config.set_flag if on else config.clear_flag)(flag)
    if request["workspace_mib"] is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request["workspace_mib"] * 2**20)
    if request["builder_level"] is not None:
        config.builder_optimization_level = request["builder_level"]
    if request["compute_capability"] is not None:
        _choose_gpu(trt, config, request["compute_capability"])


def _choose_gpu(trt: Any, config: Any, wanted: str) -> None:
    """Build for a GPU that need not be here: "8.9", or "current"."""
    known = dict(trt.ComputeCapability.__members__)
    name = "CURRENT" if wanted == "current" else f"SM{wanted.replace('.', '')}"
    if name not in known:
        numbers = ", ".join(f"{key[2:-1]}.{key[-1]}" for key in known if key.startswith("SM"))
        raise RunnerError(
            f"builds for no GPU of compute capability {wanted}",
            f"tensorrt_rtx {trt.__version__}",
            f"use one of {numbers}",
        )
    config.num_compute_capabilities = 1
    config.set_compute_capability(known[name], 0)


def _add_profile(builder: Any, network: Any, config: Any, batches: Sequence[int]) -> list[dict[str, Any]]:
    """The range of batches of every input whose batch is open; returns the inputs, described."""
    profile = builder.create_optimization_profile()
    ports = [_port(network.get_input(index)) for index in range(network.num_inputs)]
    for port in ports:
        if -1 in port["shape"][1:]:
            raise ExportError(
                f"shape {port['shape']} is open in more than the batch",
                f"input {port['name']}",
                "export it with fixed sizes",
            )
        least, best, most = ([batch if size == -1 else size for size in port["shape"]] for batch in batches)
        port |= {"least": least, "best": best, "most": most}
        profile.set_shape(port["name"], least, best, most)
    config.add_optimization_profile(profile)
    return ports


def _port(tensor: Any) -> dict[str, Any]:
    return {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def _use_timing_cache(config: Any, request: Mapping[str, Any]) -> bool | None:
    """Whether an earlier build's timings are used; None without a cache, as TensorRT-RTX, which has none."""
    if request["timing_cache"] is None or request["library"] == "tensorrt_rtx":
        return None
    path = Path(request["timing_cache"])
    if path.is_file():
        cache = config.create_timing_cache(path.read_bytes())
        if cache is not None and config.set_timing_cache(cache, False):
            return True
    config.set_timing_cache(config.create_timing_cache(b""), False)  # there is none, or from another GPU
    return False


def _inspected(trt: Any, log: Any, plan: Any, request: Mapping[str, Any]) -> list[Any] | None:
    """The layers; None with a warning where the GPU at hand is not one that the engine is for."""
    try:
        return layers(open_engine(trt, plan, trusts_host_code=request["version_compatible"], log=log))
    except RunnerError as error:
        log.warnings.insert(0, f"layers were not inspected: {error.what}")
        return None


# -- running -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Opened:
    """An engine ready to run, with everything that must live as long as it."""

    trt: Any
    log: Any
    runtime: Any
    engine: Any
    context: Any


def open_engine(trt: Any, plan: Any, *, trusts_host_code: bool = False, log: Any = None) -> Opened:
    """Deserialize an engine: native code, so only one whose origin is known, and only with a driver here.

    `trusts_host_code`: a version-compatible engine brings its own runtime. Raises RunnerError.
    """
    log = log or make_log(trt)
    runtime = trt.Runtime(log)
    if trusts_host_code:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise RunnerError(f"the engine does not load: {quote(log.errors)}", trt.__name__)
    context = new_context(trt, engine)
    if context is None:
        raise RunnerError(f"the engine does not start: {quote(log.errors)}", trt.__name__)
    return Opened(trt, log, runtime, engine, context)


def new_context(trt: Any, engine: Any) -> Any:
    """A context to run the engine in, None if the library has none to give."""
    if trt.__name__ != "tensorrt_rtx":
        return engine.create_execution_context()
    # By default kernels for a new shape are compiled while others run: timings would change on the way.
    runtime_config = engine.create_runtime_config()
    eager = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    runtime_config.dynamic_shapes_kernel_specialization_strategy = eager
    return engine.create_execution_context(runtime_config)


def layers(opened: Opened) -> list[Any]:
    """The engine inspector's list of layers, in the library's own words."""
    inspector = opened.engine.create_engine_inspector()
    inspector.execution_context = opened.context
    document = json.loads(inspector.get_engine_information(opened.trt.LayerInformationFormat.JSON))
    return list(document["Layers"])


def make_profiler(trt: Any) -> Any:
    """A profiler whose `times` are milliseconds by layer name, in order of execution; a run adds to them."""

    class Profiler(trt.IProfiler):  # type: ignore[misc]  # the base comes from an untyped library
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)
            self.times: dict[str, float] = {}

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.times[layer_name] = self.times.get(layer_name, 0.0) + ms

    return Profiler()


# -- the process of its own ----------------------------------------------------------------------------


def main() -> None:
    """Answer one request. Whatever the library prints goes to stderr: stdout is for the answer."""
    answer = os.dup(1)
    os.dup2(2, 1)
    try:
        reply: dict[str, Any] = compile_network(json.load(sys.stdin))
    except DeployError as error:
        reply = {"error": type(error).__name__, "args": [error.what, error.where, error.fix]}
    except OSError as error:
        reply = {"error": "OSError", "args": [error.errno, error.strerror]}
    with os.fdopen(answer, "w", encoding="utf-8") as stdout:
        json.dump(reply, stdout)
