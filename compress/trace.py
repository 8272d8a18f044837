"""Export a model to one ATen graph that trains, evaluates and needs no source code.

`torch.export` traces in eval mode with a dynamic batch; `GraphNet` wraps the result as an ordinary
`nn.Module` with the original parameter names and a working train/eval switch.
"""

from __future__ import annotations

import contextlib
import logging
import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from compress.errors import ModelError

# Position of the flag that says "training" in each op that behaves differently in the two modes.
TRAINING_FLAG = {
    "aten.batch_norm.default": 5,
    "aten.instance_norm.default": 5,
    "aten.dropout.default": 2,
    "aten.dropout_.default": 2,
    "aten.feature_dropout.default": 2,
    "aten.feature_dropout_.default": 2,
    "aten.alpha_dropout.default": 2,
}


class GraphNet(fx.GraphModule):
    """A traced network: ATen nodes, the original parameter names, and a train/eval switch.

    Nodes that change between the modes carry `node.meta["switch"] = True`; switching rewrites
    their training flag and regenerates the code (about a millisecond per hundred nodes).
    """

    def train(self, mode: bool = True) -> GraphNet:
        changed = False
        for node in self.graph.nodes:
            if node.meta.get("switch"):
                position = TRAINING_FLAG[str(node.target)]
                changed |= node.args[position] is not mode
                node.update_arg(position, mode)
        if changed:
            self.recompile()
        super().train(mode)
        return self


@dataclass(frozen=True)
class Traced:
    """A traced model.

    net: the graph, in eval mode. example: the input tensors it was traced with (batch of 2 or more).
    unreached: parameters and buffers of the model that no eval-mode computation reads.
    aliases: other names of tied parameters -> the name the graph uses.
    """

    net: GraphNet
    example: tuple[Tensor, ...]
    unreached: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()


def trace(model: nn.Module, example: Sequence[Tensor]) -> Traced:
    """Trace `model` on `example` (tensors whose dimension 0 is the batch).

    The net shares its parameters and buffers with the model, whose mode is restored. Raises ModelError
    (exit 4) naming the source line when the model cannot be exported, or when it fixes the batch size,
    and naming the module when a batch norm averages without momentum (the graph has no counter for it).
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.momentum is None:
            raise ModelError(
                "a batch norm with momentum=None cannot train in a graph",
                where=name,
                fix="give it a number, such as 0.1",
            )
    inputs = tuple(_batch_of_two(x) for x in example)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    with eval_mode(model), _export_errors(model):
        program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
    return from_program(program, inputs, tied(model))


def from_program(
    program: torch.export.ExportedProgram,
    example: Sequence[Tensor],
    aliases: Sequence[tuple[str, str]] = (),
) -> Traced:
    """Wrap an exported program (eval mode) as a Traced model."""
    source = program.module(check_guards=False)
    graph = source.graph
    tensors = [node for node in graph.nodes if node.op == "get_attr"]
    for node in tensors:  # the exporter picks any name of a tied parameter: use the first
        node.target = dict(aliases).get(str(node.target), node.target)
    reached = {str(node.target) for node in tensors if node.users}
    unreached = [str(node.target) for node in tensors if str(node.target) not in reached]
    for node in reversed(list(graph.nodes)):
        unused = node.op == "get_attr" or str(node.target) == "aten.sym_size.int"
        # The exporter's checks of dtype and device would forbid another precision or a GPU.
        if (unused and not node.users) or str(node.target) == "aten._assert_tensor_metadata.default":
            graph.erase_node(node)
    for node in graph.nodes:
        _slim_meta(node)
    net = GraphNet(_ParameterTree(source, graph), graph)
    net.eval()
    counters = tuple(name for name in unreached if not name.endswith("num_batches_tracked"))
    return Traced(net, tuple(example), counters, tuple(aliases))


def placeholders(net: GraphNet) -> list[fx.Node]:
    """The graph's inputs, in call order."""
    return [node for node in net.graph.nodes if node.op == "placeholder"]


def _slim_meta(node: fx.Node) -> None:
    """Keep only what later stages need: the module path, the source line, the mode switch."""
    stack = node.meta.get("nn_module_stack") or {}
    module = next(reversed(list(stack.values())))[0] if stack else ""
    source = node.meta.get("source") or source_line(node.meta.get("stack_trace") or "")
    position = TRAINING_FLAG.get(str(node.target))
    switch = position is not None and len(node.args) > position and node.args[position] is False
    node.meta = {"module": module, "source": source, "switch": switch}


def source_line(stack_trace: str) -> str:
    """`file.py:123 code` of the innermost frame outside torch, without its directory."""
    frames = re.findall(r'File "([^"]+)", line (\d+), in \S+\n\s*([^\n]*)', stack_trace)
    own = [f for f in frames if "/torch/" not in f[0].replace("\\", "/")] or frames
    if not own:
        return ""
    file, line, code = own[-1]
    return f"{Path(file).name}:{line} {code.strip()}"


class _ParameterTree(nn.Module):
    """Modules that hold exactly the tensors a graph reads, under their original dotted names."""

    def __init__(self, source: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        names = [str(node.target) for node in graph.nodes if node.op == "get_attr"]
        for name in dict.fromkeys(names):
            put_tensor(self, name, get_tensor(source, name))


def get_tensor(module: nn.Module, name: str) -> Any:
    """The parameter, buffer or constant with the dotted `name`."""
    *path, last = name.split(".")
    for part in path:
        module = getattr(module, part)
    return getattr(module, last)


def put_tensor(module: nn.Module, name: str, value: Any) -> None:
    """Set the parameter or buffer with the dotted `name`, making the modules on the way."""
    *path, last = name.split(".")
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, nn.Module())
        module = getattr(module, part)
    if isinstance(value, nn.Parameter):
        module.register_parameter(last, value)
    elif isinstance(value, Tensor):
        module.register_buffer(last, value)
    else:
        setattr(module, last, value)


def _batch_of_two(x: Tensor) -> Tensor:
    if not isinstance(x, Tensor) or x.dim() == 0:
        raise ModelError(
            "example inputs must be tensors with a batch dimension", fix="pass a tuple of tensors"
        )
    return x if x.shape[0] >= 2 else x.repeat(2, *[1] * (x.dim() - 1))


def tied(model: nn.Module) -> list[tuple[str, str]]:
    """(alias, canonical) for every parameter that has more than one name."""
    first: dict[int, str] = {}
    pairs = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            pairs.append((name, first[id(parameter)]))
        first.setdefault(id(parameter), name)
    return pairs


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode; afterwards it and each of its parts are in the mode they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train(modes[0][1])
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _export_errors(model: nn.Module) -> Iterator[None]:
    """Turn whatever the exporter raises into one line with the model's source line."""
    chatter = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = chatter.level
    chatter.setLevel(logging.CRITICAL)  # it dumps the graph before raising
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the exporter raises dozens of private types
        frames = [
            f
            for f in traceback.extract_tb(error.__traceback__)
            if "/torch/" not in f.filename.replace("\\", "/") and not f.filename.endswith("compress/trace.py")
        ]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} {frames[-1].line}" if frames else ""
        reason = next(
            (line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__
        )
        raise ModelError(
            f"{type(model).__name__} cannot be traced: {reason[:300]}",
            where=where,
            fix="check the input shape; data-dependent Python control flow needs torch.cond or a rewrite",
        ) from error
    finally:
        chatter.setLevel(level)
