"""A graph on disk: `NAME.graph.json` (nodes, no code) and `NAME.safetensors` (weights, no pickle).

Loading needs neither the model's source code nor an exporter: nodes name ATen ops, which are looked up
in a fixed set of namespaces; anything else is refused. fx turns a graph into Python source and runs it, so
every name that reaches that source must be a plain name.
"""

from __future__ import annotations

import json
import math
import operator
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from compress import files
from compress.errors import IntegrityError, ModelError
from compress.trace import GraphNet, put_tensor

VERSION = 1
_NAMESPACES = ("aten", "torchvision")
_KINDS = ("placeholder", "get_attr", "call_function", "output")
_STRUCTURES = (None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict")
_FUNCTIONS = {
    f.__name__: f
    for f in (
        operator.getitem,
        operator.mul,
        operator.add,
        operator.sub,
        operator.floordiv,
        operator.mod,
        operator.neg,
    )
}
_TORCH = {
    str(v): v for v in vars(torch).values() if isinstance(v, torch.dtype | torch.memory_format | torch.layout)
}


def save(net: GraphNet, stem: Path, example_shapes: list[list[int]]) -> tuple[Path, Path]:
    """Write `stem`.graph.json and `stem`.safetensors; each appears whole or not at all.

    example_shapes: shapes of the traced inputs without their batch. Raises ModelError when the graph
    holds something that is not an ATen op.
    """
    from safetensors.torch import save_file

    info = _structure(net)
    document = {
        "version": VERSION,
        "inputs": example_shapes,
        "arguments": list(info.orig_args),
        "in_spec": _dumps(info.in_spec, "takes"),
        "out_spec": _dumps(info.out_spec, "returns"),
        "parameters": [name for name, _ in net.named_parameters()],
        "frozen": [name for name, p in net.named_parameters() if not p.requires_grad],
        "nodes": [_encode_node(node) for node in net.graph.nodes],
    }
    tensors = {name: t.detach().cpu().contiguous() for name, t in net.state_dict().items()}
    graph_path, weights_path = _paths(stem)
    with files.whole(weights_path) as temporary:
        save_file(tensors, str(temporary))
    files.write_json(graph_path, document)
    return graph_path, weights_path


def save_program(net: GraphNet, args: tuple[Any, ...], kwargs: dict[str, Any], path: Path) -> Path:
    """Write `path`, a .pt2 with a dynamic batch for those who serve with torch.export; whole or not at all.

    args, kwargs: what the network is called with; dimension 0 of tensors is the batch, of 2 or more.
    """
    info = _structure(net)
    for spec, verb in ((info.in_spec, "takes"), (info.out_spec, "returns")):
        assert spec is not None
        _dumps(spec, verb)
    batch: Any = pytree.tree_map(
        lambda x: {0: torch.export.Dim.DYNAMIC} if isinstance(x, Tensor) else None, (args, kwargs)
    )
    shapes = dict(zip(info.orig_args, (*batch[0], *batch[1].values()), strict=True))
    program = torch.export.export(net.eval(), args, kwargs, dynamic_shapes=shapes)
    with files.whole(path) as temporary, temporary.open("wb") as stream:
        torch.export.save(program, stream)
    return path


def _structure(net: GraphNet) -> Any:
    codegen = net.graph._codegen
    if not isinstance(codegen, fx.graph._PyTreeCodeGen):
        raise ModelError("the graph has no input structure", fix="trace the model with compress.trace")
    return codegen.pytree_info


def shapes(stem: Path) -> list[list[int]]:
    """The input shapes, without batch, of a graph that `save` wrote."""
    return [[int(s) for s in shape] for shape in files.read_json(_paths(stem)[0])["inputs"]]


def _paths(stem: Path) -> tuple[Path, Path]:
    return stem.with_name(stem.name + ".graph.json"), stem.with_name(stem.name + ".safetensors")


def load(stem: Path) -> tuple[GraphNet, list[list[int]]]:
    """Read a graph that `save` wrote: the network in eval mode, and its input shapes without batch.

    Raises IntegrityError when a file is damaged or names an op outside the known namespaces.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    graph_path, weights_path = _paths(stem)
    document = files.read_json(graph_path)
    try:
        tensors = load_file(str(weights_path))
    except (SafetensorError, OSError) as error:
        raise IntegrityError(f"cannot be read: {error}", str(weights_path), "write it again") from error
    try:
        return _decode(document, tensors), [[int(s) for s in shape] for shape in document["inputs"]]
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise IntegrityError(
            f"not a graph: {type(error).__name__} {error}", str(graph_path), "write it again"
        ) from error


def _decode(document: dict[str, Any], tensors: dict[str, Tensor]) -> GraphNet:
    if document["version"] != VERSION:
        raise ValueError(f"version {document['version']}, not {VERSION}")
    _check_names(document, tensors)
    root = nn.Module()
    parameters, frozen = set(document["parameters"]), set(document["frozen"])
    for name in [*document["parameters"], *(n for n in tensors if n not in parameters)]:
        tensor = tensors[name].clone()  # aligned in memory: kernels round differently where it is not
        put_tensor(root, name, nn.Parameter(tensor, name not in frozen) if name in parameters else tensor)
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}
    for entry in document["nodes"]:
        node = graph.create_node(
            entry["op"],
            _target(entry),
            tuple(_decode_argument(a, made) for a in entry["args"]),
            {k: _decode_argument(v, made) for k, v in entry["kwargs"].items()},
            name=entry["name"],
        )
        node.meta = {"module": entry["module"], "source": entry["source"], "switch": entry["switch"]}
        made[entry["name"]] = node
    specs = (pytree.treespec_loads(document[key]) for key in ("in_spec", "out_spec"))
    graph._codegen = fx.graph._PyTreeCodeGen(fx.graph._PyTreeInfo(document["arguments"], *specs))
    graph.lint()
    net = GraphNet(root, graph)
    net.eval()
    return net


def _check_names(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuse whatever could carry code into the Python source that fx makes of a graph."""
    plain = list(document["arguments"])
    for entry in document["nodes"]:
        if entry["op"] not in _KINDS:
            raise ValueError(f"node kind {entry['op']!r}")
        if entry["op"] == "get_attr" and entry["target"] not in tensors:
            raise ValueError(f"tensor {entry['target']!r} is not in the file of weights")
        plain += [entry["name"], *entry["kwargs"]]
        if entry["op"] == "placeholder":
            plain.append(entry["target"])
    for name in plain:
        if not name.isidentifier():
            raise ValueError(f"{name!r} is not a plain name")
    for name in tensors:
        if not name.isprintable() or set(name) & set("\"'\\"):
            raise ValueError(f"{name!r} is not a name of a tensor")
    for key in ("in_spec", "out_spec"):
        _check_structure(json.loads(document[key])[1])
    keywords = json.loads(document["in_spec"])[1]["children_spec"][
        1
    ]  # of (args, kwargs); fx writes them down
    for name in json.loads(keywords["context"]):
        if not isinstance(name, str) or not name.isidentifier():
            raise ValueError(f"{name!r} is not a plain name")


def _dumps(spec: pytree.TreeSpec, verb: str) -> str:
    """A structure as JSON. Raises ModelError for classes that a process without their source cannot make."""
    try:
        text = pytree.treespec_dumps(spec)
        _check_structure(json.loads(text)[1])
    except (NotImplementedError, ValueError) as error:
        what = f"the network {verb} {_first_class(spec)}, which cannot be written to a file without its code"
        raise ModelError(what, fix="use tuples, lists or dicts there") from error
    return text


def _first_class(spec: pytree.TreeSpec) -> str:
    """The name of the first type in a structure that is not a plain container."""
    plain = (None, tuple, list, dict, OrderedDict)
    found = [spec.context if spec.type is namedtuple else spec.type] if spec.type not in plain else []
    names = [kind.__name__ for kind in found] + [_first_class(child) for child in spec.children()]
    return next(filter(None, names), "")


def _check_structure(spec: dict[str, Any]) -> None:
    if spec["type"] not in _STRUCTURES:
        raise ValueError(f"a structure of type {spec['type']}")
    for child in spec["children_spec"]:
        _check_structure(child)


def _encode_node(node: fx.Node) -> dict[str, Any]:
    if node.op not in _KINDS:
        raise ModelError(
            f"{node.op} {node.target} cannot be written to a file", where=node.meta.get("source", "")
        )
    return {
        "op": node.op,
        "name": node.name,
        "target": _encode_target(node),
        "args": [_encode_argument(a) for a in node.args],
        "kwargs": {k: _encode_argument(v) for k, v in node.kwargs.items()},
        "module": node.meta.get("module", ""),
        "source": node.meta.get("source", ""),
        "switch": bool(node.meta.get("switch")),
    }


def _encode_target(node: fx.Node) -> str:
    target = node.target
    if node.op != "call_function":
        return str(target)
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return f"{target.namespace}::{target._schema.name.split('::')[1]}.{target._overloadname}"
    if _FUNCTIONS.get(getattr(target, "__name__", "")) is target:
        return f"operator::{target.__name__}"
    raise ModelError(f"{target} cannot be written to a file", where=node.meta.get("source", ""))


def _target(entry: dict[str, Any]) -> Any:
    if entry["op"] != "call_function":
        return entry["target"]
    namespace, _, name = entry["target"].partition("::")
    if namespace == "operator":
        return _FUNCTIONS[name]
    if namespace not in _NAMESPACES:
        raise ValueError(f"op {entry['target']} is not in {', '.join(_NAMESPACES)}")
    packet, _, overload = name.rpartition(".")
    found = getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    if not isinstance(found, torch._ops.OpOverload) or _opens_files(found):
        raise ValueError(f"{entry['target']} is not an op of a network")
    return found


def _opens_files(op: torch._ops.OpOverload) -> bool:
    return any(argument.name == "filename" for argument in op._schema.arguments)


def _encode_argument(argument: Any) -> Any:
    """Numbers and strings as they are, lists as lists, everything else as a one-key table."""
    if isinstance(argument, fx.Node):
        return {"node": argument.name}
    if isinstance(argument, float) and not math.isfinite(argument):
        return {"float": str(argument)}
    if argument is None or isinstance(argument, bool | int | float | str):
        return argument
    if isinstance(argument, list | tuple):
        return [_encode_argument(a) for a in argument]
    if isinstance(argument, torch.dtype | torch.memory_format | torch.layout):
        return {"torch": str(argument)}
    if isinstance(argument, torch.device):
        return {"device": argument.type}
    raise ModelError(f"an argument of type {type(argument).__name__} cannot be written to a file")


def _decode_argument(argument: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(argument, list):
        return [_decode_argument(a, made) for a in argument]
    if not isinstance(argument, dict):
        return argument
    ((kind, value),) = argument.items()
    if kind == "node":
        return made[value]
    if kind == "float":
        return float(value)
    return torch.device(value) if kind == "device" else _TORCH[value]
