"""Trace parts of a model together, on what they get when the whole model runs once.

The result is one graph with flat tensors in and out, under the names that the whole model gives its
parameters, so that labels, surgery, costs and plans are those of any other model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compress import seeds
from compress.errors import ConfigError, ModelError, did_you_mean
from compress.ports import Port, argument_names, packing, rebuilt, split
from compress.screen import check_module
from compress.trace import (
    GraphNet,
    Traced,
    eval_mode,
    export_errors,
    from_program,
    frozen_modules,
    model_errors,
    tied,
)

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
_HOW = "a tuple holds the arguments, a dict the keywords: ([image, image],) is one list of images"


@dataclass(frozen=True)
class Parts:
    """Parts traced together. traced: one graph, flat tensors in and out, with the whole model's names.

    shared: parameters that the rest of the model reads too, so that they must stay as they are.
    """

    traced: Traced
    ports: tuple[Port, ...]
    shared: tuple[str, ...]


def arguments(example: Tensor | Sequence[Any] | Mapping[str, Any]) -> Arguments:
    """(args, kwargs) of an example: one tensor, a tuple of arguments, or a dict of keyword arguments."""
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}


def trace_parts(model: nn.Module, paths: Sequence[str], example: Arguments) -> Parts:
    """Trace the submodules at `paths` (dotted; "" is the model) on what they get when `model` runs once.

    The net shares its tensors with the model, which is left as it was. Raises ConfigError (exit 3) when
    there is no such submodule, ModelError (exit 4) when the model does not run on the example or does not
    call the part, or when the part takes or returns anything but tensors in plain containers, or cannot
    be traced.
    """
    modules = _submodules(model, paths)
    with buffers_kept(model):
        calls = _calls(model, modules, example)
        ports, inputs = [], []
        for path, (given, made) in calls.items():
            packed, tensors = packing(given, path, "takes")
            tensors = _batch_of_two(tensors, path)
            names, shapes = argument_names(modules[path], packed.spec), tuple(tuple(x.shape) for x in tensors)
            ports.append(Port(path, names, packed, packing(made, path, "returns")[0], shapes))
            inputs.append(tensors)
        traced = _trace(model, modules, ports, inputs)
        pairs = zip(split(traced.net, ports).values(), ports, inputs, strict=True)
        sized = tuple(_sized(modules[port.path], graph, port, given) for graph, port, given in pairs)
    return Parts(traced, sized, _shared(model, ports))


# -- what the parts are and get ---------------------------------------------------------------------------


def _submodules(model: nn.Module, paths: Sequence[str]) -> dict[str, nn.Module]:
    names = [name for name, _ in model.named_modules()]
    for path in paths:
        if path not in names:
            raise ConfigError(f"the model has no module {path!r}", "part", did_you_mean(path, names[1:]))
        outer = next((other for other in paths if path.startswith(other + ".")), None)
        if outer is not None:
            raise ConfigError(f"{path} lies inside {outer}", "part", f"leave {path} out")
        try:
            check_module(model.get_submodule(path))
        except ModelError as error:
            where = ".".join(filter(None, (path, error.where)))
            raise ModelError(error.what, where, error.fix) from error
    return {path: model.get_submodule(path) for path in paths}


def _calls(model: nn.Module, modules: Mapping[str, nn.Module], example: Arguments) -> dict[str, list[Any]]:
    """path -> [(args, kwargs), result] of the first call of each module, in the order of `modules`."""
    found: dict[str, list[Any]] = {path: [] for path in modules}

    def before(path: str, args: Any, kwargs: Any) -> None:
        if not found[path]:  # cloned: what comes after may overwrite its input
            found[path].append(pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)))

    def after(path: str, result: Any) -> None:
        if len(found[path]) == 1:
            found[path].append(result)

    with hooks() as add:
        for path, module in modules.items():
            start = lambda _, args, kwargs, path=path: before(path, args, kwargs)  # noqa: E731
            add(module.register_forward_pre_hook(start, with_kwargs=True))
            add(module.register_forward_hook(lambda _, args, result, path=path: after(path, result)))
        run(model, example)
    idle = [path for path, call in found.items() if len(call) < 2]
    if idle:
        what = f"the model does not call {idle[0]} on the example inputs"
        raise ModelError(what, "part", "choose a module that its forward calls")
    return found


def run(model: nn.Module, example: Arguments) -> Any:
    """What the model gives on the example, in eval mode, without gradients, with the same random numbers."""
    fails = model_errors(model, "fails on its example inputs", _HOW)
    with eval_mode(model), torch.no_grad(), seeds.isolated(0), fails:
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, example)
        return model(*args, **kwargs)


def _batch_of_two(tensors: list[Tensor], path: str) -> list[Tensor]:
    if not tensors or tensors[0].dim() == 0:
        what = "takes no tensor with a batch dimension first"
        raise ModelError(what, path or "the model", "example inputs must be tensors with a batch dimension")
    if tensors[0].shape[0] > 1:
        return tensors
    return [x.repeat(2, *[1] * (x.dim() - 1)) if x.dim() and x.shape[0] == 1 else x for x in tensors]


def _shared(model: nn.Module, ports: Sequence[Port]) -> tuple[str, ...]:
    """Parameters of the parts that something outside them holds too."""
    tensors = list(model.named_parameters(remove_duplicate=False))
    parts = {id(model.get_submodule(port.path)) for port in ports}
    paths = [n for n, m in model.named_modules(remove_duplicate=False) if id(m) in parts]
    inner = [any(not path or name.startswith(path + ".") for path in paths) for name, _ in tensors]
    outer = {id(tensor) for (_, tensor), own in zip(tensors, inner, strict=True) if not own}
    return tuple(name for (name, t), own in zip(tensors, inner, strict=True) if own and id(t) in outer)


# -- the graph --------------------------------------------------------------------------------------------


class _Bundle(nn.Module):
    """Several modules as one: flat tensors in, flat tensors out."""

    def __init__(self, modules: Iterable[nn.Module], ports: Sequence[Port]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(modules)
        self.ports = tuple(ports)

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        made: list[Tensor] = []
        rest = iter(tensors)
        for module, port in zip(self.parts, self.ports, strict=True):
            args, kwargs = port.given.pack(rest)
            made += port.made.unpack(module(*args, **kwargs))
        return made


def _trace(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    ports: Sequence[Port],
    inputs: Sequence[Sequence[Tensor]],
) -> Traced:
    bundle = _Bundle(modules.values(), ports)
    stems = {f"parts.{i}": port.path for i, port in enumerate(ports)}

    def renamed(name: str) -> str:
        stem = ".".join(name.split(".")[:2])
        return ".".join(filter(None, (stems[stem], name[len(stem) + 1 :]))) if stem in stems else name

    with eval_mode(model):
        program = _export(model, bundle, inputs, spatial="" not in modules)
    try:
        traced = from_program(program, [x for given in inputs for x in given], tied(bundle))
    except ModelError as error:
        line, _, module = error.where.partition(" in module ")
        where = " in module ".join(filter(None, (line, renamed(module))))
        raise ModelError(error.what, where, error.fix) from error
    net = rebuilt(traced.net, traced.net.graph, renamed)
    frozen = frozen_modules(model)
    for node in net.graph.nodes:
        node.meta["switch"] &= node.meta["module"] not in frozen
    aliases = tuple((renamed(a), renamed(b)) for a, b in traced.aliases)
    return Traced(net, traced.example, tuple(map(renamed, traced.unreached)), aliases)


def _export(
    model: nn.Module, bundle: _Bundle, inputs: Sequence[Sequence[Tensor]], spatial: bool
) -> torch.export.ExportedProgram:
    """Height and width may vary where the exporter can follow: a detector's images differ in size."""
    flat = tuple(x for given in inputs for x in given)
    for loose in (True, False) if spatial else (False,):
        sizes = tuple(s for given in inputs for s in _dynamic(given, loose))
        with contextlib.suppress(ModelError) if loose else contextlib.nullcontext(), export_errors(model):
            return torch.export.export(bundle, flat, dynamic_shapes=(sizes,))
    raise AssertionError("the last attempt returns or raises")


def _dynamic(inputs: Sequence[Tensor], spatial: bool) -> Iterator[dict[int, Any]]:
    for x in inputs:
        batch = x.dim() > 0 and x.shape[0] == inputs[0].shape[0]
        dims = [d for d in range(2, x.dim()) if spatial and x.dim() >= 4 and x.shape[d] > 1]
        yield ({0: torch.export.Dim.DYNAMIC} if batch else {}) | dict.fromkeys(dims, torch.export.Dim.AUTO)


# -- checks -----------------------------------------------------------------------------------------------


def _sized(module: nn.Module, graph: GraphNet, port: Port, inputs: Sequence[Tensor]) -> Port:
    """Compare a part's graph with the module at another batch, and at twice the height and width."""
    if not port.path:
        return port
    batch = inputs[0].shape[0]
    more = [torch.cat([x, x[:1]]) if x.dim() and x.shape[0] == batch else x for x in inputs]
    if not _agree(module, graph, port, more):
        what = "has a graph that is wrong for another batch size"
        raise ModelError(what, port.path, "its batch size is written into its code")
    larger = [x.repeat(1, 1, *[2] * (x.dim() - 2)) if x.dim() >= 4 else x for x in inputs]
    return replace(port, any_size=_agree(module, graph, port, larger))


def _agree(module: nn.Module, graph: GraphNet, port: Port, inputs: Sequence[Tensor]) -> bool:
    """Whether both give the same on these inputs; True where the module itself does not take them."""
    example = port.given.pack(inputs)
    try:
        theirs = run(module, example)
    except ModelError:
        return True
    try:
        return same(theirs, run(graph, example))
    except ModelError:
        return False


def _rounded(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, 1e-3, 1e-5, equal_nan=True)


def same(a: Any, b: Any, close: Callable[[Tensor, Tensor], bool] = _rounded) -> bool:
    """Whether two nested values hold the same numbers, up to rounding or to what `close` takes for it."""
    ours, theirs = pytree.tree_leaves(a), pytree.tree_leaves(b)
    return len(ours) == len(theirs) and all(
        isinstance(y, Tensor) and x.shape == y.shape and close(x, y)
        for x, y in zip(ours, theirs, strict=True)
        if isinstance(x, Tensor)
    )


@contextlib.contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """Afterwards the buffers are what they were, whatever running the model did to them."""
    before = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in before and before[name].shape == buffer.shape:
                    buffer.copy_(before[name])


@contextlib.contextmanager
def hooks() -> Iterator[Any]:
    """Gives a function that takes hooks, which are removed afterwards."""
    with contextlib.ExitStack() as stack:
        yield lambda handle: stack.callback(handle.remove)
