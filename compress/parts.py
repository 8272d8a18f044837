"""Prune a part of a model inside the whole: graphs in the place of its modules, and a proof around them.

A detector cannot be exported whole, but its backbone and its heads can: `trace_parts` traces them, `Whole`
runs the user's own model on their graphs. The whole model itself, path "", is the part that takes keywords
and dictionaries.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress.errors import ModelError
from compress.part_trace import Arguments, Parts, arguments, buffers_kept, hooks, run, same, trace_parts
from compress.ports import Port, split
from compress.proof import Verification, verify
from compress.task import CrossEntropy, Evaluation, Task
from compress.trace import GraphNet, frozen_modules, get_tensor, placeholders, put_tensor


class Whole:
    """The user's model with graphs in the place of its parts, as long as the `with` block lasts.

    Nothing outside the parts is trained. Inside, `fitted` runs on any net of all parts; afterwards `model`
    has its own modules back.
    """

    def __init__(self, model: nn.Module, parts: Parts, example: Arguments) -> None:
        self.model, self.ports, self.example, self.shared = model, parts.ports, example, parts.shared
        self.nets = split(parts.traced.net, parts.ports)
        self.own = {path: model.get_submodule(path) for path in self.nets}
        self.is_part = "" not in self.nets
        self.known: WeakKeyDictionary[nn.Module, dict[str, GraphNet]] = WeakKeyDictionary()
        self.traced = parts.traced.net
        self.known[self.traced] = self.nets
        self.resting = _resting(model, parts.ports)
        self.frozen = frozen_modules(model) | self._norms()

    def __enter__(self) -> Whole:
        if self.is_part:
            self._check()
            _place(self.model, self.nets)
        for parameter in self.resting:
            parameter.requires_grad_(False)
        return self

    def __exit__(self, *_: object) -> None:
        if self.is_part:
            _place(self.model, self.own)
        self.nets = self.known[self.traced]
        for parameter in self.resting:
            parameter.requires_grad_(True)

    def around(self, task: Task) -> Task:
        """The task for nets of all parts: its loss and its measure get the model that is `fitted` to them."""

        def loss(net: nn.Module, batch: Any) -> Tensor:
            with self.graph_errors():
                return task.loss(self.fitted(net), batch)

        def few(n: int) -> Callable[[nn.Module], Evaluation]:
            assert task.few is not None
            evaluate = task.few(n)
            return lambda net: evaluate(self.fitted(net))

        fitted = replace(
            task,
            loss=loss,
            evaluate=lambda net, split: task.evaluate(self.fitted(net), split),
            few=few if task.few is not None else None,
        )
        if isinstance(task.loss, CrossEntropy) and not self.is_part and _maps_one_to_one(self.traced):
            return replace(fitted, loss=task.loss)  # nothing to fit, and criteria may look at its logits
        return fitted

    def fitted(self, net: nn.Module) -> nn.Module:
        """The model with a net of all parts in it, in its mode; what is frozen stays in eval mode.

        net: the traced one, or any cut or copy of it.
        """
        assert isinstance(net, GraphNet)
        if net not in self.known:
            self.known[net] = split(net, self.ports)
        self.nets = self.known[net]
        for port in self.ports:
            own = self.nets[port.path]
            for name in _tensor_names(own):
                put_tensor(
                    own, name, get_tensor(net, port.full(name) if _has(net, port.full(name)) else name)
                )
        if not self.is_part:
            return self.nets[""].train(net.training)
        _place(self.model, self.nets)
        self.model.train(net.training)
        for name, module in self.model.named_modules():
            if name in self.frozen:
                module.training = False
        return self.model

    def built(self, net: GraphNet) -> nn.Module:
        """A copy of the model, in eval mode, with `net` (any cut of the traced one) as its parts."""
        nets = split(net, self.ports)
        if not self.is_part:
            return nets[""].eval()
        whole = copy.deepcopy(self.model)
        _place(whole, nets)
        return whole.eval()

    def proof(self, unmasked: GraphNet, masked: GraphNet, dense: GraphNet, inexact: str = "") -> Verification:
        """The whole model around each of three nets, on the example: in float64 where its code takes that.

        A detector may find nothing: where its result does not move, what the modules outside the parts
        compute on the way is compared too.
        """
        try:
            return self._compare((unmasked, masked, dense), torch.float64, inexact)
        except (RuntimeError, TypeError):  # the code outside the parts has its own idea of precision
            return self._compare((unmasked, masked, dense), torch.float32, inexact)

    def _compare(self, nets: Sequence[GraphNet], dtype: torch.dtype, inexact: str) -> Verification:
        original, masked, dense = (self.built(net) for net in nets)
        found = verify(original, masked, dense, *self.example, dtype=dtype, inexact=inexact)
        if found.movement:
            return found
        original, masked, dense = (_Watched(m, self.ports) for m in (original, masked, dense))
        return verify(original, masked, dense, *self.example, dtype=dtype, inexact=inexact)

    @contextlib.contextmanager
    def graph_errors(self) -> Iterator[None]:
        """An attribute of the part that its graph does not have, as one line."""
        try:
            yield
        except AttributeError as error:
            if not isinstance(error.obj, GraphNet):
                raise
            owner = next((path for path, net in self.nets.items() if net is error.obj), "")
            what = f"has no {error.name} as a graph, and the model or the loss asks for it"
            raise ModelError(
                what, owner or "the model", "prune parts inside it, which are only called"
            ) from error

    def _norms(self) -> set[str]:
        """Batch norms outside the parts, whose statistics stay as they are too."""
        kind = nn.modules.batchnorm._NormBase
        named = [name for name, module in self.model.named_modules() if isinstance(module, kind)]
        return {name for name in named if not any(port.inside(name) for port in self.ports)}

    def _check(self) -> None:
        """The model runs on the graphs of its parts, calls them, and computes what it did."""
        with buffers_kept(self.model):
            before = run(self.model, self.example)
            called: set[str] = set()
            with hooks() as add:
                for path, net in self.nets.items():
                    add(net.register_forward_hook(lambda *_, path=path: called.add(path)))
                _place(self.model, self.nets)
                try:
                    after = run(self.model, self.example)
                finally:
                    _place(self.model, self.own)
        idle = [path for path in self.nets if path not in called]
        if idle or not same(before, after):
            what = "is held by the model in another place too" if idle else "has a graph that differs from it"
            raise ModelError(what, (idle or list(self.nets))[0], "choose another part")


class _Watched(nn.Module):
    """Runs a model; gives its result and those of all the modules without children outside the parts."""

    def __init__(self, model: nn.Module, ports: Sequence[Port]) -> None:
        super().__init__()
        self.model, self.ports = model, tuple(ports)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        seen: list[Any] = []
        with hooks() as add:
            for name, module in self.model.named_modules():
                if not any(port.inside(name) for port in self.ports) and not list(module.children()):
                    add(module.register_forward_hook(lambda module, given, made: seen.append(made)))
            return self.model(*args, **kwargs), seen


def _resting(model: nn.Module, ports: Sequence[Port]) -> list[nn.Parameter]:
    """Parameters outside the parts that require gradients."""
    inside = {id(p) for port in ports for p in model.get_submodule(port.path).parameters()}
    return [p for p in model.parameters() if p.requires_grad and id(p) not in inside]


def _place(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for path, module in modules.items():
        now = model.get_submodule(path)
        if now is module:
            continue
        for name in [n for n, m in model.named_modules(remove_duplicate=False) if m is now]:
            model.set_submodule(name, module)  # a part may have more names than one


def _tensor_names(net: GraphNet) -> list[str]:
    return list(dict.fromkeys(str(node.target) for node in net.graph.nodes if node.op == "get_attr"))


def _has(net: nn.Module, name: str) -> bool:
    """Constants of the trace have the same name in a part's graph and in that of all parts."""
    try:
        get_tensor(net, name)
    except AttributeError:
        return False
    return True


__all__ = ["Arguments", "Parts", "Whole", "arguments", "trace_parts"]


def _maps_one_to_one(net: GraphNet) -> bool:
    """Whether a traced net takes one tensor and gives one."""
    return len(placeholders(net)) == 1 and len(tree_leaves(net.graph.output_node().args)) == 1
