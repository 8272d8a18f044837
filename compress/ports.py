"""How a part of a model is called, and its graph: nested arguments in, nested results out.

Everything inside the package works on one graph with flat tensors in and out; a `Port` knows how a part's
own arguments and results lie in them, and `split` cuts such a graph into one `GraphNet` per part.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from compress.errors import ModelError
from compress.trace import GraphNet, get_tensor, known_leaves, placeholders, put_tensor


@dataclass(frozen=True)
class Packing:
    """How tensors lie in nested values. leaves: every leaf, None where `tensors` says it is a tensor."""

    spec: pytree.TreeSpec
    tensors: tuple[bool, ...]
    leaves: tuple[Any, ...]

    def pack(self, tensors: Iterable[Any]) -> Any:
        """The nested value with these tensors in it."""
        return pytree.tree_unflatten(self.fill(tensors), self.spec)

    def fill(self, tensors: Iterable[Any]) -> list[Any]:
        """All leaves, with these in the place of the tensors."""
        rest = iter(tensors)
        return [next(rest) if own else leaf for own, leaf in zip(self.tensors, self.leaves, strict=True)]

    def unpack(self, value: Any) -> list[Tensor]:
        """The tensors of a value that is nested like this."""
        pairs = zip(pytree.tree_leaves(value), self.tensors, strict=True)
        return [leaf for leaf, own in pairs if own]

    @property
    def count(self) -> int:
        return sum(self.tensors)


def packing(value: Any, path: str, verb: str) -> tuple[Packing, list[Tensor]]:
    """How the tensors of `value`, which the module at `path` takes or returns, are packed; and the tensors.

    Raises ModelError (exit 4) where anything else than tensors in containers lies in it.
    """
    leaves, spec = known_leaves(value, path, verb)
    tensors = tuple(isinstance(leaf, Tensor) for leaf in leaves)
    plain = tuple(None if isinstance(leaf, Tensor) else leaf for leaf in leaves)
    return Packing(spec, tensors, plain), [leaf for leaf in leaves if isinstance(leaf, Tensor)]


@dataclass(frozen=True)
class Port:
    """A part's place in the model, and how it is called.

    given: its (args, kwargs); names: what its graph calls them. made: its result. shapes: of the traced
    tensors; any_size: its graph was seen to be right at another height and width too.
    """

    path: str
    names: tuple[str, ...]
    given: Packing
    made: Packing
    shapes: tuple[tuple[int, ...], ...]
    any_size: bool = True

    def inside(self, name: str) -> bool:
        """Whether a tensor or module of this name, in the whole model, lies in the part."""
        return not self.path or name == self.path or name.startswith(self.path + ".")

    def full(self, name: str) -> str:
        """The name in the whole model of a tensor of the part."""
        return f"{self.path}.{name}" if self.path else name


def argument_names(module: nn.Module, spec: pytree.TreeSpec) -> tuple[str, ...]:
    """Names of the arguments of a call packed as (args, kwargs): the signature's, the keywords'."""
    args, kwargs = spec.child(0), spec.child(1)
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    signature = inspect.signature(module.forward).parameters.values()
    known = [p.name for p in signature if p.kind in kinds][: args.num_children]
    extra = [f"argument_{i}" for i in range(len(known), args.num_children)]
    return (*known, *extra, *kwargs.context)


def split(net: GraphNet, ports: Sequence[Port]) -> dict[str, GraphNet]:
    """One graph for each part, in the mode of `net` and sharing its tensors, that is called like the part."""
    starts = [sum(p.given.count for p in ports[:i]) for i in range(len(ports))]
    ends = [sum(p.made.count for p in ports[:i]) for i in range(len(ports))]
    inputs = placeholders(net)
    results: Any = next(node for node in net.graph.nodes if node.op == "output").args[0]
    return {
        port.path: _part(net, port, inputs[a : a + port.given.count], results[b : b + port.made.count])
        for port, a, b in zip(ports, starts, ends, strict=True)
    }


def rebuilt(net: GraphNet, graph: fx.Graph, rename: Callable[[str], str]) -> GraphNet:
    """A net of `graph`, whose tensors are those of `net` under new names."""
    root = nn.Module()
    for node in graph.nodes:
        if node.op == "get_attr":
            value = get_tensor(net, str(node.target))
            node.target = rename(str(node.target))
            put_tensor(root, node.target, value)
        node.meta["module"] = rename(node.meta.get("module", ""))
    made = GraphNet(root, graph)
    made.training = net.training
    return made


def _part(net: GraphNet, port: Port, inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> GraphNet:
    graph = fx.Graph()
    own: dict[fx.Node, fx.Node] = {}
    for index, leaf in enumerate(port.given.fill(inputs)):
        is_tensor = isinstance(leaf, fx.Node)
        made = graph.placeholder(leaf.name if is_tensor else f"plain_{index}")
        made.meta = {"module": "", "source": "", "switch": False}
        if is_tensor:
            own[leaf] = made
    wanted = before([*results, *_effects(net, port, inputs)])
    for node in net.graph.nodes:
        if node in wanted and node not in own:
            own[node] = graph.node_copy(node, own.__getitem__)
    leaves = port.made.fill(own[node] for node in results)
    graph.output(tuple(leaves)).meta = {"module": "", "source": "", "switch": False}
    info = fx.graph._PyTreeInfo(list(port.names), port.given.spec, port.made.spec)
    graph._codegen = fx.graph._PyTreeCodeGen(info)
    part = rebuilt(net, graph, lambda name: name.removeprefix(port.full("")) if port.path else name)
    if not port.any_size or not all(port.given.tensors):
        part.register_forward_pre_hook(Guard(port), with_kwargs=True)
    return part


def before(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and all that they are computed from."""
    found: set[fx.Node] = set()
    todo = list(nodes)
    while todo:
        node = todo.pop()
        if node not in found:
            found.add(node)
            todo += node.all_input_nodes
    return found


def behind(graph: fx.Graph, first: Iterable[fx.Node]) -> set[fx.Node]:
    """These nodes and all that is computed from them."""
    found = set(first)
    for node in graph.nodes:
        if found & set(node.all_input_nodes):
            found.add(node)
    return found


def _effects(net: GraphNet, port: Port, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The part's nodes that write into a tensor, such as a counter among the buffers."""

    def of_the_part(node: fx.Node) -> bool:
        return node in inputs or (node.op == "get_attr" and port.inside(str(node.target)))

    writers = [
        node
        for node in net.graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
    ]
    return [writer for writer in writers if any(map(of_the_part, before([writer])))]


class Guard:
    """Before each call of a part's graph: plain arguments, and sizes where it has but one, are the traced."""

    def __init__(self, port: Port) -> None:
        self.port = port

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        port = self.port
        values = {**dict(zip(port.names, args, strict=False)), **kwargs}
        leaves = pytree.tree_leaves([values.get(name) for name in port.names])
        if len(leaves) != len(port.given.leaves):
            return  # the call itself says what is missing
        shapes = iter(port.shapes)
        for leaf, own, plain in zip(leaves, port.given.tensors, port.given.leaves, strict=True):
            if own:
                self._check_size(leaf, next(shapes))
            elif leaf != plain:
                what = f"was traced with {plain!r}, and now gets {leaf!r}"
                raise ModelError(what, port.path or "the model", "give as example what the model will get")

    def _check_size(self, x: Tensor, shape: tuple[int, ...]) -> None:
        if not self.port.any_size and tuple(x.shape[1:]) != shape[1:]:
            what = f"its graph holds for inputs of shape {list(shape[1:])}, and gets {list(x.shape[1:])}"
            fix = "give example inputs as large as those to come, no side of a feature map 1"
            raise ModelError(what, self.port.path, fix)
