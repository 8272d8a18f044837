"""Export a model to one ATen graph that trains, evaluates and needs no source code.

`torch.export` traces in eval mode with a dynamic batch; `GraphNet` wraps the result as an ordinary
`nn.Module` with the original parameter names and a working train/eval switch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import re
import traceback
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from compress.errors import ModelError
from compress.names import code_line
from compress.screen import check_module, unwrapped

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)
_OURS = ("<", str(Path(torch.__file__).parent), __file__, str(Path(__file__).with_name("parts.py")))
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
    folded: weights of the net that the model computes, and the parameters it computes them from.
    """

    net: GraphNet
    example: tuple[Tensor, ...]
    unreached: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    folded: tuple[tuple[str, tuple[str, ...]], ...] = ()


def trace(model: nn.Module, example: Sequence[Tensor]) -> Traced:
    """Trace `model` on `example` (tensors whose dimension 0 is the batch).

    The net shares its parameters and buffers with the model, whose mode is restored. Wrappers around the
    model (torch.compile, DataParallel) are taken off, so names are its own. A batch norm that is in eval
    mode inside a model in train mode is frozen, and stays so. Raises ModelError (exit 4) as `check_module`
    does, and naming module and source line when the model cannot be exported or fixes the batch size.
    """
    model = unwrapped(model)
    check_module(model)
    inputs = tuple(_batch_of_two(x) for x in example)
    dynamic = tuple({0: torch.export.Dim.DYNAMIC} for _ in inputs)
    frozen = frozen_modules(model)
    with eval_mode(model):
        try:
            with export_errors(model):
                program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
        except ModelError as error:
            if "in output, which is not a known type" not in error.what:
                raise
            with torch.no_grad():
                known_leaves(model(*inputs), "", "returns")
            with export_errors(model):
                program = torch.export.export(model, inputs, dynamic_shapes=dynamic)
    return from_program(program, inputs, tied(model), frozen)


def known_leaves(value: Any, path: str, verb: str) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves and the structure of what the module at `path` ("" for the model) takes or returns.

    Dataclasses in it are made known to torch's pytrees. Raises ModelError (exit 4) for leaves that are
    neither tensors nor plain numbers, texts and the like.
    """
    leaves, spec = pytree.tree_flatten(value)
    unknown = {type(leaf) for leaf in leaves if dataclasses.is_dataclass(leaf)}
    for kind in unknown:
        torch.export.register_dataclass(kind)
    if unknown:
        return known_leaves(value, path, verb)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            what = f"{verb} something of class {type(leaf).__name__}, not only tensors in plain containers"
            fix = "choose a part inside it" if path else "use tuples, lists, dicts or dataclasses"
            raise ModelError(what, path or "the model", fix)
    return leaves, spec


def from_program(
    program: torch.export.ExportedProgram,
    example: Sequence[Tensor],
    aliases: Sequence[tuple[str, str]] = (),
    frozen: Collection[str] = (),
) -> Traced:
    """Wrap an exported program (eval mode) as a Traced model. frozen: modules that never train."""
    source = program.module(check_guards=False)
    graph = source.graph
    _inline_regions(source, graph)
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
        node.meta["switch"] &= node.meta["module"] not in frozen
    net = GraphNet(_ParameterTree(source, graph), graph)
    net.eval()
    counters = tuple(name for name in unreached if not name.endswith("num_batches_tracked"))
    return Traced(net, tuple(example), counters, tuple(aliases))


def _inline_regions(source: nn.Module, graph: fx.Graph) -> None:
    """Replace each region under no_grad, or with autocast switched off, by its nodes.

    What a no_grad region gives is detached, so gradients stop where they did. Raises ModelError for regions
    under autocast, whose casts the exporter does not write down, and for torch.cond and its like.
    """
    for node in list(graph.nodes):
        if not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        name, arguments = str(node.target), list(node.args)
        if name == "wrap_with_autocast" and not arguments[2]:
            detaches, region, given = False, arguments[4], arguments[5:]
        elif name == "wrap_with_set_grad_enabled":
            detaches, region, given = not arguments[0], arguments[1], arguments[2:]
        elif name == "wrap_with_autocast":
            fix = "take it out of forward, and put it around the calls of the model"
            inside = get_tensor(source, str(arguments[4].target)).graph.nodes
            raise ModelError("runs under torch.autocast inside the model", _first_line(inside), fix)
        else:
            fix = "prune the parts of the model without it: part=..."
            raise ModelError(f"torch.{name} cannot be followed", _first_line([node]), fix)
        made = _copied_nodes(source, graph, node, str(region.target), given, detaches)
        for user in list(node.users):
            user.replace_all_uses_with(made[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        graph.erase_node(region)


def _first_line(nodes: Iterable[fx.Node]) -> str:
    """The source line and the module of the first node that has one."""
    lines = [(source_line(node.meta.get("stack_trace") or ""), node) for node in nodes]
    line, node = next(((line, node) for line, node in lines if line), ("", None))
    stack = list((node.meta.get("nn_module_stack") or {}).values()) if node is not None else []
    return f"{line} in module {stack[-1][0]}" if stack and stack[-1][0] else line


def _copied_nodes(
    source: nn.Module, graph: fx.Graph, node: fx.Node, region: str, given: Sequence[Any], detaches: bool
) -> list[Any]:
    """Copy the region's nodes in front of `node`; returns what its results have become."""
    inner = get_tensor(source, region)
    _inline_regions(inner, inner.graph)
    own = dict(zip((n for n in inner.graph.nodes if n.op == "placeholder"), given, strict=True))
    results: Any = ()
    with graph.inserting_before(node):
        for step in inner.graph.nodes:
            if step.op == "output":
                results = fx.map_arg(step.args[0], own.__getitem__)
            elif step.op != "placeholder":
                own[step] = graph.node_copy(step, own.__getitem__)
                if step.op == "get_attr":
                    own[step].target = f"{region}.{step.target}"
        if detaches:
            stop = torch.ops.aten.detach.default
            results = [graph.call_function(stop, (x,)) if isinstance(x, fx.Node) else x for x in results]
    return list(results)


def frozen_modules(model: nn.Module) -> set[str]:
    """Modules in eval mode inside a model in train mode: their batch norms and dropouts are frozen."""
    return {name for name, module in model.named_modules() if model.training and not module.training}


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
    frames = [f for f in frames if not f[0].startswith("<")]  # code that torch generated
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
    elif isinstance(value, Tensor) and last not in vars(module):
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
def export_errors(model: nn.Module) -> Iterator[None]:
    """Turn whatever the exporter raises into one line with the model's module and source line."""
    chatter = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = chatter.level
    chatter.setLevel(logging.CRITICAL)  # it dumps the graph before raising, and prints it besides
    fix = (
        "check the input shape; where Python decides on data or sizes, prune the parts that do not: part=..."
    )
    try:
        with contextlib.redirect_stderr(io.StringIO()), model_errors(model, "cannot be traced", fix):
            yield
    finally:
        chatter.setLevel(level)


@contextlib.contextmanager
def model_errors(model: nn.Module, what: str, fix: str) -> Iterator[None]:
    """Turn whatever running the model's own code raises into one line with its module and source line."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:  # the exporter raises dozens of private types, user code anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else ""
        if " " not in reason:  # the name of an op, or nothing
            reason = f"{type(error).__name__} {reason}".rstrip()
        raise ModelError(
            f"{type(model).__name__} {what}: {reason[:300]}", _place(error, model), fix
        ) from error


def _place(error: Exception, model: nn.Module) -> str:
    """`file.py:12 code in module a.b` of the innermost frame of the model's own code; "" if there is none."""
    names = {id(module): name for name, module in model.named_modules()}
    line = module = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        module = names.get(id(frame.f_locals.get("self")), "") or module
        if not file.startswith(_OURS):
            line = code_line(file, number)
    return f"{line} in module {module}" if line and module else line
