"""What each stage of a run does: read the files of the stage before, work, write its own.

Only files in the run's folder travel between stages. A stage returns the names of the files it wrote;
the pipeline hashes them and commits the stage to the manifest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compress import aim, checkpoint, distributed, files, graphfile, seeds, shares
from compress.budgeting import TABLE, Budgeted, budgeted
from compress.channelmap import ChannelMap
from compress.config import Config, TrainConfig
from compress.cost import class_counts, cost_model, layers
from compress.earlier import Earlier
from compress.errors import ConfigError, IntegrityError, TargetError
from compress.inspection import (
    Built,
    build,
    choices,
    inexact_because,
    kept_names,
    labelled,
    part_paths,
    pinned_rows,
)
from compress.launch import launched
from compress.loop import Pruned, Step
from compress.loop import prune as prune_loop
from compress.meter import Listener
from compress.parts import Whole
from compress.recalibration import Recalibration
from compress.select import Space
from compress.stages import STAGES
from compress.surgery import cut, verify
from compress.task import Evaluation, Task, build_task, check
from compress.trace import GraphNet, Traced
from compress.train import Progress, TrainResult, train


class Events(Protocol):
    """How a run talks. status: start, done, cached, skipped or stopped."""

    def stage(self, name: str, status: str, detail: str = "") -> None: ...
    def progress(self, stage: str, done: float, total: float, text: str = "") -> None: ...
    def note(self, text: str) -> None: ...
    def warn(self, text: str) -> None: ...


@dataclass(frozen=True)
class Done:
    """What a stage wrote (names in the run's folder), and the figure that matters most, in words."""

    outputs: list[str]
    detail: str = ""


@dataclass
class Work:
    """What the stages of one run share. folder: the config's; run: where the files go; whole: the user's
    model around the net that is worked on, where it is traced in parts; earlier: the release that the gates
    hold this one against."""

    config: Config
    folder: Path
    run: Path
    events: Events
    should_stop: Callable[[], bool]
    command: str = ""
    whole: Whole | None = None
    earlier: Earlier | None = None

    @cached_property
    def data(self) -> Task:
        """The task as the data give it."""
        return build_task(self.config.data, self.config.model, self.config.seed, self.folder)

    def listener(self, stage: str) -> Listener:
        """For what is measured within a stage."""
        return Listener(partial(self.events.progress, stage), self.events.note)

    @property
    def task(self) -> Task:
        """The task for nets as they are traced: of a model that is traced in parts, put in their places."""
        return self.data if self.whole is None else self.whole.around(self.data)

    @cached_property
    def built(self) -> Built:
        """The model, from its source."""
        return build(self.config.model, self.folder, self.config.seed, self.data.example)

    @contextmanager
    def around(self) -> Iterator[None]:
        """Within, nets of the parts of a model that is not traced whole stand in their places in it."""
        traced_whole = self.read("train.json")["parts"] is None
        with self.inside(None if traced_whole else self.built.whole):
            yield

    @contextmanager
    def inside(self, whole: Whole | None) -> Iterator[None]:
        """Within, the task puts nets in their places in `whole`, and nothing else of it trains."""
        if whole is None:
            yield
            return
        whole.model.to(self.device)
        shares.spread(whole.model)
        with whole:
            self.whole = whole
            try:
                yield
            finally:
                self.whole = None

    @cached_property
    def device(self) -> torch.device:
        name, found = self.config.device, torch.cuda.is_available()
        device = torch.device(("cuda" if found else "cpu") if name == "auto" else name)
        if device.type == "cuda" and distributed.size() > 1:
            device = _own_gpu(device)
            name = str(device)
        if device.type == "cuda" and not found:
            raise TargetError(
                "there is no CUDA device", "device", "device: auto takes what is there; see compress doctor"
            )
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise TargetError(
                f"there is no {name}", "device", f"CUDA devices here: {torch.cuda.device_count()}"
            )
        return device

    @cached_property
    def align(self) -> int:
        return aim.align(self.config)

    @cached_property
    def shapes(self) -> list[list[int]]:
        """Of the inputs of the run's nets, without the batch."""
        return graphfile.shapes(self.run / "original")

    def example(self) -> tuple[Tensor, ...]:
        """A batch of two of every input, of normal numbers, always the same."""
        generator = seeds.generator(self.config.seed, "example")
        return tuple(torch.randn((2, *shape), generator=generator) for shape in self.shapes)

    def load(self, name: str) -> GraphNet:
        return graphfile.load(self.run / name)[0]

    def traced(self, name: str) -> Traced:
        return Traced(self.load(name), self.example())

    def read(self, name: str) -> Any:
        return files.read_json(self.run / name)

    def write(self, name: str, document: Any) -> str:
        if distributed.is_main():
            files.write_json(self.run / name, document)
        return name

    def save(self, net: GraphNet, name: str) -> list[str]:
        net.eval().cpu()
        if not distributed.is_main():
            return []
        paths = graphfile.save(net, self.run / name, self.shapes)
        return [path.name for path in paths]

    def checkpoint(self, stage: str) -> Path:
        folder = self.run / "checkpoints" / stage
        if distributed.is_main():
            folder.mkdir(parents=True, exist_ok=True)
        return folder

    def test(self, net: nn.Module) -> dict[str, Any]:
        """Evaluate on the test split; wrong: the numbers of the examples it got wrong."""
        net.to(self.device)
        return evaluation(self.task.evaluate(net, "test"))


def _own_gpu(device: torch.device) -> torch.device:
    """The GPU of this process among those of its machine."""
    if device.index is not None:
        what = f"{device} is one GPU for {distributed.size()} processes"
        raise ConfigError(what, "device", "set it to cuda: each process takes one of its own")
    return torch.device("cuda", launched().local_rank)


def evaluation(found: Evaluation) -> dict[str, Any]:
    wrong = None if found.correct is None else torch.nonzero(~found.correct).flatten().tolist()
    loss = found.loss if math.isfinite(found.loss) else None
    return {
        "metric": found.metric, "value": found.value, "loss": loss, "n": found.n, "wrong": wrong,
        "majority": found.majority,
    }  # fmt: skip


def preflight(work: Work, stages: Sequence[str] = STAGES) -> None:
    """Find out before hours of training what would stop one of `stages` after them."""
    aim.check(work.config, here="bench" in stages, prunes="prune" in stages)
    if {"train", "prune", "finetune"} & {*stages}:
        assert work.device


# -- train --------------------------------------------------------------------------------------------


def train_stage(work: Work) -> Done:
    """Build and trace the model, train it if asked, and measure it."""
    built, config = work.built, work.config
    net, work.shapes = built.traced.net, built.shapes
    # What would end a later stage is told now, not after training.
    kept_names(net, config.model, config.prune.keep, built.whole)
    if built.whole is not None:
        _check_parts(work, built)
    history: TrainResult | None = None
    with work.inside(built.whole):
        check(net, work.task, config.model.input_shape)
        if config.train is not None and (config.train.epochs or config.train.recalibrate):
            history = _train(work, "train", net, config.train, None, None)
        accuracy = work.test(net)
    if built.whole is None:
        del work.built  # later stages read files
    document = {
        "data": {
            "train": work.data.n_train,
            "validation": work.data.n_validation,
            "test": work.data.n_test,
            "fingerprint": work.data.fingerprint,
            "test_fingerprint": work.data.test_fingerprint or work.data.fingerprint,
        },
        "accuracy": accuracy,
        "training": _training(history),
        "recalibration": _recalibration(history),
        "unreached": list(built.traced.unreached),
        "parts": None if built.whole is None else part_paths(config.model),
    }
    return Done([*work.save(net, "original"), work.write("train.json", document)], _figure(accuracy))


def _check_parts(work: Work, built: Built) -> None:
    finetune, why = work.config.finetune, built.why
    if finetune is not None and finetune.distill is not None:
        what = f"only a model that is traced whole can learn from the original, and here {why}"
        raise ConfigError(what, "finetune.distill", "set it to null")
    named = ", ".join(part_paths(work.config.model)) or "its tensors"
    work.events.note(f"pruned, exported and timed is {named} alone, inside the whole model: {why}")


def _figure(accuracy: Mapping[str, Any]) -> str:
    value = _shown(accuracy["value"], is_share=accuracy["wrong"] is not None)
    return f"{accuracy['metric']} {value} on {accuracy['n']:,} test examples"


def _shown(value: float, is_share: bool) -> str:
    return f"{value:.2%}" if is_share else f"{value:.4g}"


def _train(
    work: Work, stage: str, net: GraphNet, config: TrainConfig, teacher: nn.Module | None, state: Any
) -> TrainResult:
    best, shown = -math.inf, ""

    def show(now: Progress) -> None:
        if now.message:
            work.events.note(now.message)
        done = now.epoch - 1 + now.step / now.steps
        text = f"epoch {now.epoch}/{now.epochs}  loss {now.loss:.3f}" + (shown and f"  best {shown}")
        work.events.progress(stage, done, now.epochs, text)

    def evaluate(model: nn.Module, split: str) -> Evaluation:
        nonlocal best, shown
        found = work.task.evaluate(model, split)
        if found.value > best:
            best, shown = found.value, _shown(found.value, found.correct is not None)
        return found

    result = train(
        net,
        replace(work.task, evaluate=evaluate),
        config,
        seed=work.config.seed,
        device=work.device,
        checkpoint=work.checkpoint(stage),
        teacher=teacher,
        optimizer_state=state,
        should_stop=work.should_stop,
        progress=show,
    )
    if result.recalibration is not None and result.recalibration.norms:
        work.events.note(_recalibrated(result.recalibration, work.task.classes is not None))
    return result


def _recalibrated(found: Recalibration, is_share: bool) -> str:
    kept = "kept" if found.kept else "not kept"
    before, after = (_shown(value, is_share) for value in (found.before, found.after))
    moved = f"{before} to {after} on the validation examples, {kept}"
    return f"batch norms estimated anew over {found.minibatches} minibatches: {moved}"


def _training(result: TrainResult | None) -> dict[str, Any] | None:
    if result is None or not result.history:
        return None
    return {"history": [asdict(epoch) for epoch in result.history], "best_epoch": result.best_epoch}


def _recalibration(result: TrainResult | None) -> dict[str, Any] | None:
    if result is None or result.recalibration is None:
        return None
    return finite(asdict(result.recalibration))


# -- prune --------------------------------------------------------------------------------------------


def prune_stage(work: Work) -> Done:
    """Prune to the target, cut the channels out, and prove the result equal to the masked network."""
    traced = work.traced("original")
    with work.around():
        return _prune(work, traced)


def _prune(work: Work, traced: Traced) -> Done:
    config = work.config
    kept = kept_names(traced.net, config.model, config.prune.keep, work.whole)
    traced, cmap = labelled(traced, kept, config.prune)
    budget = _budgeted(work, traced, cmap)
    where = choices(config.prune, cmap, work.align) if budget is None else budget.where
    started = datetime.now(UTC)

    def show(step: Step, target: float) -> None:
        ratio = step.left(where.target.kind, cmap.units)
        text = f"MACs {step.macs_ratio:.1%}  units {step.units_kept}/{cmap.units}"
        if step.memory_ratio is not None:
            text = f"memory {step.memory_ratio:.1%}  {text}"
        if where.measured is not None:
            kind = where.measured.kind
            text = f"{kind} {step.left(kind, cmap.units):.1%}  {text}"
        work.events.progress("prune", min(1 - ratio, 1 - target), 1 - target, text)

    pruned = prune_loop(
        traced.net, cmap, where, work.task, config.prune, seed=config.seed, device=work.device,
        checkpoint=work.checkpoint("prune"), should_stop=work.should_stop, progress=show,
        measure=budget.measure if budget else None,
    )  # fmt: skip
    seconds = (datetime.now(UTC) - started).total_seconds()
    folded = [name for name, _ in traced.folded]
    facts = None if budget is None else budget.as_dict(pruned.keep, pruned.looks, pruned.look, pruned.gap)
    return _write_pruned(work, cmap, where, pruned, {"seconds": seconds, "folded": folded, "budget": facts})


def _budgeted(work: Work, traced: Traced, cmap: ChannelMap) -> Budgeted | None:
    """The config's budgets, with the target measured where they ask for latency or energy."""
    if work.config.budget is None:
        return None
    return budgeted(
        work.config, traced.net, cmap, work.example(), run=work.run, folder=work.folder,
        listener=work.listener("prune"),
    )  # fmt: skip


def _write_pruned(work: Work, cmap: ChannelMap, where: Space, pruned: Pruned, facts: dict[str, Any]) -> Done:
    dense, plan = cut(pruned.masked, cmap, pruned.keep)
    nets, inexact = (pruned.unmasked.cpu(), pruned.masked.cpu(), dense.cpu()), inexact_because(cmap)
    proof, whole = verify(*nets, work.example(), inexact=inexact), None
    if work.whole is not None:
        work.whole.model.cpu()
        whole = work.whole.proof(*nets, inexact)
        work.whole.model.to(work.device)
    for found in filter(None, (proof, whole)):
        if not found.passed:
            raise IntegrityError(
                f"the dense network differs from the masked one by {found.relative_error:.2e}, "
                f"and the mask moved the output by {found.movement:.2e}",
                "prune",
                "please report this model",
            )
    counts = class_counts(cmap, pruned.keep)
    kind, value, align = where.target.kind, where.target.ratio, work.align
    if where.measured is not None:
        value = facts["budget"][kind]["asked_ratio"]
    document = {
        "criterion": work.config.prune.criterion,
        "target": {"kind": f"{kind}_ratio", "value": value},
        "align": align,
        "reached": pruned.reached,
        "stop_reason": pruned.stop_reason,
        "units": {
            "total": cmap.units,
            "kept": int(pruned.keep.sum()),
            "pinned_channels": sum(p.channels for p in cmap.pinned),
        },
        "history": [asdict(step) for step in pruned.history],
        "cost": _costs(cmap, counts),
        "layers": [asdict(layer) for layer in layers(cmap, pruned.keep)],
        "pinned": pinned_rows(cmap),
        "verification": asdict(proof),
        "whole": None if whole is None else finite(asdict(whole)),
        "accuracy": work.test(dense),
        **facts,
    }
    outputs = [*work.save(dense, "pruned"), work.write("plan.json", plan.to_json())]
    outputs.append(_write_optimizer(work, pruned.optimizer, plan))
    outputs.append(work.write("prune.json", document))
    if where.measured is not None:
        outputs.append(TABLE)
    costs = _costs(cmap, counts)
    macs, params = (costs[kind]["after"] / costs[kind]["before"] for kind in ("macs", "params"))
    return Done(outputs, f"MACs {macs:.1%}, parameters {params:.1%} ({pruned.stop_reason})")


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row with null for numbers that JSON cannot hold."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def _costs(cmap: ChannelMap, counts: Any) -> dict[str, Any]:
    model = cost_model(cmap)
    return {
        "macs": {"before": round(model.macs.total(model.full)), "after": round(model.macs.total(counts))},
        "params": {
            "before": round(model.params.total(model.full)),
            "after": round(model.params.total(counts)),
        },
    }


def _write_optimizer(work: Work, state: Mapping[str, Mapping[str, Tensor]], plan: Any) -> str:
    from safetensors.torch import save_file

    from compress.surgery import carry_state

    carried = carry_state(state, plan)
    tensors = {
        f"optimizer/{name}/{key}": value.cpu().contiguous().clone()
        for name, entry in carried.items()
        for key, value in entry.items()
    }
    if distributed.is_main():
        with files.whole(work.run / "optimizer.safetensors") as temporary:
            save_file(tensors, str(temporary))
    return "optimizer.safetensors"


# -- finetune -----------------------------------------------------------------------------------------


def finetune_stage(work: Work) -> Done:
    """Train the dense network on, and save it three ways: graph and weights, and .pt2."""
    net, config = work.load("pruned"), work.config.finetune
    history: TrainResult | None = None
    with work.around():
        if config is not None and (config.epochs or config.recalibrate):
            teacher = work.load("original") if config.distill is not None else None
            state = _read_optimizer(work) if config.optimizer == "sgd" and config.momentum else None
            history = _train(work, "finetune", net, config, teacher, state)
        accuracy = work.test(net)
    document: dict[str, Any] = {
        "accuracy": accuracy,
        "training": _training(history),
        "recalibration": _recalibration(history),
    }
    for node in net.graph.nodes:
        node.meta["source"] = ""  # what is handed over carries none of the model's code
    outputs = work.save(net, "dense")
    if distributed.is_main():
        outputs += [_write_program(work, net), work.write("finetune.json", document)]
    return Done(outputs, _figure(document["accuracy"]))


def _read_optimizer(work: Work) -> dict[str, dict[str, Tensor]]:
    from safetensors.torch import load_file

    return checkpoint.by_parameter(load_file(str(work.run / "optimizer.safetensors")))


def _write_program(work: Work, net: GraphNet) -> str:
    """`dense.pt2`, for those who serve with torch.export."""
    return graphfile.save_program(net.cpu(), work.example(), {}, work.run / "dense.pt2").name
