"""One call for those who want one: a model, data and a loss in, a dense smaller model out."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass, replace
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from compress import aim, distributed, graphfile, shares
from compress.budget import Look
from compress.budgeting import Budgeted, budgeted
from compress.channelmap import ChannelMap, PinnedChannels
from compress.config import BenchConfig, BudgetConfig, Config, GatesConfig
from compress.config_faults import translate
from compress.cost import Layer, class_counts, cost_model, layers
from compress.errors import ConfigError, ModelError
from compress.in_place import misfit, of_three, pinned_by_code
from compress.inspection import choices, inexact_because, keep_names, labelled
from compress.loop import Pruned, Step
from compress.loop import prune as prune_loop
from compress.models import refuse_pickled
from compress.names import first_line
from compress.parts import Whole, arguments, trace_parts
from compress.plan import Plan
from compress.program import load_program
from compress.proof import Verification, verify
from compress.schema import PruneConfig, Section, TrainConfig
from compress.screen import check_module, unwrapped
from compress.surgery import apply_plan, cut
from compress.task import Batch, Evaluation, Task, device_of
from compress.trace import GraphNet, Traced, eval_mode, from_program
from compress.train import Progress, TrainResult, train

C = TypeVar("C", bound=Section)


@dataclass(frozen=True)
class Result:
    """What a pruning did. macs and params: (before, after), of the part where there is one; one
    multiply-add is one MAC. unreached: parameters that no eval-mode computation reads. folded: weights that
    the model computes and that are plain parameters of the dense one. whole: the proof for the model around
    the part, None where all of it is pruned. looks: at the latency on the target, the last at this model.
    """

    plan: Plan
    reached: bool
    stop_reason: str
    macs: tuple[int, int]
    params: tuple[int, int]
    history: tuple[Step, ...]
    layers: tuple[Layer, ...]
    pinned: tuple[PinnedChannels, ...]
    unreached: tuple[str, ...]
    folded: tuple[str, ...]
    verification: Verification
    whole: Verification | None = None
    looks: tuple[Look, ...] = ()

    @property
    def macs_ratio(self) -> float:
        """The share of the MACs that is left."""
        return self.macs[1] / self.macs[0]

    @property
    def params_ratio(self) -> float:
        """The share of the parameters that is left."""
        return self.params[1] / self.params[0]

    def __str__(self) -> str:
        proofs = [self.verification] if self.whole is None else [self.verification, self.whole]
        proved = "exact" if all(p.passed and not p.inexact for p in proofs) else "not exact"
        error = max(p.relative_error for p in proofs)
        return (
            f"{self.macs_ratio:.1%} of the MACs, {self.params_ratio:.1%} of the parameters left "
            f"({self.stop_reason}); {proved}: relative error {error:.1e}"
        )


def prune(
    model: nn.Module,
    example_inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    part: str | Sequence[str] | None = None,
    latency: float | Mapping[str, Any] | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    in_place: bool = False,
    seed: int = 0,
    progress: Callable[[Step, float], None] = lambda step, target: None,
    **options: Any,
) -> tuple[nn.Module, Result]:
    """Prune a trained model by first-order Taylor importance while it trains on.

    example_inputs: what the model is called with, a tensor, a tuple of arguments or a dict of keyword
    arguments; dimension 0 of tensors is the batch. batches: an iterable that can be gone through
    again and has a length (a list, a DataLoader), or a function of the epoch (from 1) that gives one.
    loss: any callable of (model, batch) that gives a scalar, so that generators and policies can be
    pruned too. evaluate: larger is better; it gets the model in eval mode; needed for
    `max_accuracy_drop`. options: the keys of the config's `prune` section, with the same defaults
    (macs_ratio=0.5, criterion="taylor", lr=0.001, ...); align is 1 unless given, with a budget
    the target's.

    latency: in place of a ratio, the share of the unpruned latency that is to stay, or the keys of the
    config's `budget` section: {"latency_ms": 2.0, "target": "cpu-ort", "batch": 1}. Networks of other widths
    are measured on this machine first, and the last one is before it is taken.

    part: the dotted path of a submodule, or several: only those are traced, pruned and trained, on what
    they get when the model runs on the example. loss and evaluate get the whole model. What the
    part takes and returns keeps its shape.

    Returns the dense model and a Result. The dense model is a new graph with the same parameter names,
    or, with `part`, a copy of the model with the graph in the part's place; the given model is left as it
    was. With in_place=True it is the given model itself, trained and sliced, without the channels whose
    number its Python code fixes.

    Under torchrun, or in a process group of yours, all processes call this with the same batches and get the
    same; each works on its share of every batch, and the first reports progress. Raises CompressError.
    """
    config = _checked(PruneConfig, options, "compress.prune")
    distributed.begin()
    check_module(model)
    own, example = unwrapped(model), arguments(example_inputs)
    _check_trainable(own)
    subject = own if in_place else _copied(own)
    shares.spread(subject)
    parts = trace_parts(subject, [""] if part is None else [part] if isinstance(part, str) else part, example)
    kept = (*keep_names(parts.traced.net, config.keep), *parts.shared)
    label = partial(labelled, parts.traced, kept, config, in_place=in_place)
    traced, cmap = label()
    whole = Whole(subject, replace(parts, traced=traced), example)
    if in_place:
        cmap = pinned_by_code(cmap, lambda counted: label(counted=counted)[1], whole, traced.net)
    _check_prunable(cmap)
    budget = None if latency is None else _budgeted(latency, config, traced, cmap)
    where = (
        choices(config, cmap, 1 if config.align == "auto" else config.align)
        if budget is None
        else budget.where
    )
    if evaluate is None and config.max_accuracy_drop is not None:
        what = "max_accuracy_drop needs evaluate"
        raise ConfigError(what, "compress.prune", "give evaluate=FUNCTION of the model")

    measure = evaluate or (lambda net: float("nan"))
    task = whole.around(_task(batches, loss, measure, "compress.prune"))
    device = device_of(subject)
    with whole:
        done = prune_loop(
            traced.net, cmap, where, task, config, seed=seed, device=device, progress=progress,
            measure=budget.measure if budget else None,
        )  # fmt: skip
    dense, result = _cut_out(done, cmap, whole, traced, in_place=in_place)
    if not in_place:
        return dense, result
    apply_plan(result.plan, subject)
    return model, result


def _cut_out(
    done: Pruned, cmap: ChannelMap, whole: Whole, traced: Traced, *, in_place: bool
) -> tuple[nn.Module, Result]:
    """The dense model, proved, and tried as a plan for the user's module, which is left as it is."""
    dense, plan = cut(done.masked, cmap, done.keep)
    inexact = inexact_because(cmap)
    proof = verify(done.unmasked, done.masked, dense, traced.example, inexact=inexact)
    around = whole.proof(done.unmasked, done.masked, dense, inexact) if whole.is_part else None
    built = whole.built(dense)
    fault = misfit(whole.model, plan, built, of_three(whole))
    if in_place and fault is not None:
        raise fault
    if fault is not None and fault.where and not plan.hard_coded:
        plan = replace(plan, hard_coded=(fault.where,))  # apply_plan will refuse, and say why
    return built, _result(done, cmap, plan, traced, proof, around)


def _budgeted(
    latency: float | Mapping[str, Any], prune: PruneConfig, traced: Traced, cmap: ChannelMap
) -> Budgeted:
    """The budgets of a call, as those of a config."""
    given = {"latency_ratio": latency} if isinstance(latency, int | float) else dict(latency)
    budget = _checked(BudgetConfig, given, "compress.prune: latency")
    batch = budget.batch or 1
    none = {"name": "given"}
    config = Config.model_construct(
        version=1, model=none, data=none, prune=prune, budget=budget.model_copy(update={"batch": batch}),
        bench=BenchConfig(batches=[batch]), gates=GatesConfig(),
    )  # fmt: skip
    example = tuple(x for x in tree_leaves(traced.example) if isinstance(x, Tensor))
    return budgeted(aim.aimed(config), traced.net, cmap, example, run=None, folder=Path())


def finetune(
    model: nn.Module,
    batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    *,
    evaluate: Callable[[nn.Module], float] | None = None,
    teacher: nn.Module | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
    **options: Any,
) -> tuple[nn.Module, TrainResult]:
    """Train a model in place, such as the one that `prune` returned; returns it in eval mode.

    batches, loss and evaluate are as for `prune`. With evaluate the weights of the best epoch are kept,
    without it those of the last. options: the keys of the config's `finetune` section, with the same
    defaults (epochs=10, lr=0.01, optimizer="sgd", ema=0, ...); teacher: the model for distill={...}.
    checkpoint: a folder; a call that was stopped goes on from there to the same bits. Under
    torchrun it is as for `prune`. Raises CompressError.
    """
    config = _checked(TrainConfig, options, "compress.finetune")
    distributed.begin()
    _check_trainable(model)
    task = _task(batches, loss, evaluate, "compress.finetune")
    folder = Path(checkpoint) if checkpoint is not None else None
    # DistributedDataParallel would average the gradients that are summed here.
    own = model.module if isinstance(model, nn.parallel.DistributedDataParallel) else model
    done = train(
        own, task, config, seed=seed, device=device_of(model), checkpoint=folder, teacher=teacher,
        progress=progress,
    )  # fmt: skip
    return model, done


def save(
    net: nn.Module, path: str | Path, example_inputs: Tensor | Sequence[Any] | Mapping[str, Any]
) -> None:
    """Write a dense graph as `path`.graph.json and `path`.safetensors, or as one file where `path` ends in
    .pt2 (for torch.export): no code of the model's, no pickle.

    Raises ModelError (exit 4) for what is not a graph, and for graphs that take, return or call what another
    process does not have: classes of yours, operators of yours.
    """
    if not isinstance(net, GraphNet):
        fix = "save the graph in it, such as model.backbone; or its state_dict() and the plan's to_json()"
        raise ModelError(f"a {type(net).__name__} is not a graph", "compress.save", fix)
    args, kwargs = arguments(example_inputs)
    if Path(path).suffix == ".pt2":
        graphfile.save_program(net, args, kwargs, Path(path))
        return
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    graphfile.save(net, Path(path), [list(x.shape[1:]) for x in tensors])


def load(path: str | Path) -> GraphNet:
    """Read what `save` or a run wrote (`path` without its endings, or a .pt2); needs no source of the model.

    Raises ModelError (exit 4) for pickled and TorchScript models, which are code.
    """
    refuse_pickled(str(path), "compress.load")
    if Path(path).suffix == ".pt2":
        return from_program(load_program(Path(path)), ()).net
    return graphfile.load(Path(path))[0]


def _checked(section: type[C], options: dict[str, Any], call: str) -> C:
    try:
        return section(**options)
    except ValidationError as error:
        problem = translate(error, options, section)[0]
        place = ".".join(str(part) for part in problem.path)
        raise ConfigError(problem.what, f"{call}({place})", problem.fix) from None


def _result(
    done: Pruned,
    cmap: ChannelMap,
    plan: Plan,
    traced: Traced,
    proof: Verification,
    whole: Verification | None,
) -> Result:
    costs, counts = cost_model(cmap), class_counts(cmap, done.keep)
    macs, params = (
        (round(cost.total(costs.full)), round(cost.total(counts))) for cost in (costs.macs, costs.params)
    )
    return Result(
        plan,
        done.reached,
        done.stop_reason,
        macs,
        params,
        done.history,
        layers(cmap, done.keep),
        cmap.pinned,
        traced.unreached,
        tuple(name for name, _ in traced.folded),
        proof,
        whole,
        done.looks,
    )


def _check_trainable(model: nn.Module) -> None:
    parameters = dict(model.named_parameters())
    if not parameters:
        raise ModelError("the model has no parameters", type(model).__name__, "there is nothing to prune")
    name, first = next(iter(parameters.items()))
    if first.is_meta:
        what = "is on the meta device and holds no numbers"
        raise ModelError(what, name, "load the weights first: model.to_empty(device=...), load_state_dict")
    if not any(p.requires_grad for p in parameters.values()):
        what = "no parameter of the model requires gradients, so nothing can be ranked or trained"
        raise ModelError(what, type(model).__name__, "call model.requires_grad_(True)")


def _check_prunable(cmap: ChannelMap) -> None:
    """Where nothing can leave, say what holds the most channels, and where."""
    if cmap.units == 0 and cmap.pinned:
        most = max(cmap.pinned, key=lambda pin: pin.channels)
        what = f"the model has no prunable channel; of most, {most.channels}, this is why: {most.reason}"
        raise ModelError(what, most.source, "prune another part of the model, or rewrite that line")


def _copied(model: nn.Module) -> nn.Module:
    """A copy; results of earlier calls that modules remember (weight_norm's weight) are copied detached."""
    remembered = [x for m in model.modules() for x in vars(m).values() if isinstance(x, Tensor)]
    try:
        return copy.deepcopy(model, {id(x): x.detach().clone() for x in remembered if not x.is_leaf})
    except Exception as error:  # whatever the model's own __deepcopy__, or torch, makes of it
        fix = "prune it with in_place=True, or take what it remembers of earlier calls out of the modules"
        raise ModelError(f"cannot be copied: {first_line(error)[:80]}", type(model).__name__, fix) from error


def _task(
    batches: Iterable[Batch] | Callable[[int], Iterable[Batch]],
    loss: Callable[[nn.Module, Batch], Tensor],
    evaluate: Callable[[nn.Module], float] | None,
    name: str,
) -> Task:
    source = batches if callable(batches) else lambda epoch: batches
    first = source(1)
    if not isinstance(first, Sized):
        fix = "give a list, a DataLoader, or a function of the epoch"
        raise ConfigError("batches has no length", name, fix)
    looks = count(1)

    def train_batches(epoch: int, start: int) -> Iterator[Batch]:
        return islice(iter(source(epoch)), start, None)

    def measure(net: nn.Module, split: str) -> Evaluation:
        if evaluate is None:  # the latest is the best
            return Evaluation("epochs", float(next(looks)), 0.0, 0)
        with eval_mode(net):
            return Evaluation("value", evaluate(net), 0.0, 0)

    return Task(loss, train_batches, len(first), measure, 0, 0, 0, name=name)
