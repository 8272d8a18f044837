"""The convert stage: both ONNX files in further precisions, each measured on the test examples.

`further` makes files for other targets with the same `Source` and `variant`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from compress import aim, files
from compress.config import Config
from compress.errors import ConfigError
from compress.steps import Done, Work, evaluation, finite
from compress.task import move
from compress.trace import GraphNet

if TYPE_CHECKING:
    from deploy.runners import Array, Runner

MODELS = ("original", "dense")
AS_THEY_ARE = ("fp32", "tf32")  # the same file; tf32 is a matter of the engine
WRONG_HERE = {"fp8": "ONNX Runtime's CPU kernels compute fp8 pairs wrongly; measure it on the target"}
COMPARED = 512  # test examples on which a variant's outputs are compared with the fp32 file's


def wanted(config: Config) -> list[str]:
    """The precisions that need files of their own, sorted. `config` is aimed."""
    asked = {*config.export.precisions, config.bench.precision} - {*AS_THEY_ARE, "auto", None}
    return sorted(str(name) for name in asked)


def file_name(model: str, precision: str) -> str:
    """The ONNX file of a model in a precision."""
    return f"{model}.onnx" if precision in AS_THEY_ARE else f"{model}.{precision}.onnx"


def convert_stage(work: Work) -> Done:
    """Write the variants, and hold each against the fp32 file and the test examples."""
    plans = [(precision, model) for precision in wanted(work.config) for model in MODELS]
    runner = aim.target(work.config).runner
    rows, models = [], {name: source(work, name) for name in MODELS} if plans else {}
    for done, (precision, name) in enumerate(plans):
        work.events.progress("convert", done, len(plans), f"{name} {precision}")
        rows.append(variant(work, models[name], precision, file_name(name, precision), runner))
    outputs = [*(row["file"] for row in rows), work.write("convert.json", {"variants": rows})]
    return Done(outputs, ", ".join(map(described, rows)) or "no further precision is asked for")


def described(row: Mapping[str, Any]) -> str:
    """A variant's file and accuracy, in words."""
    value = row["accuracy"]["value"]
    return f"{row['file']} {'not measured' if value is None else f'{value:.2%}'}"


@dataclass(frozen=True)
class Source:
    """What all variants of a model are made from. calibration, inputs: batches of training and of test
    examples as the net is called with them. accuracy: of the fp32 network, as its stage measured it."""

    name: str
    net: GraphNet
    calibration: list[tuple[Array, ...]]
    inputs: list[tuple[Array, ...]]
    accuracy: dict[str, Any]


def source(work: Work, name: str) -> Source:
    """A model's net with its examples. Raises ConfigError for one that is not traced whole."""
    if work.read("train.json")["parts"] is not None:
        what = "only a model that is traced whole can be brought to other precisions"
        raise ConfigError(what, "export.precisions", "leave them out, and bench in fp32")
    net, stage = work.load(name), {"original": "train", "dense": "finetune"}[name]
    calibration = _seen(net, work.config.export.calibration_images, lambda given: _train_on(work, given))
    inputs = _seen(net, COMPARED, lambda given: work.task.evaluate(given, "test"))
    return Source(name, net, calibration, inputs, work.read(f"{stage}.json")["accuracy"])


def variant(work: Work, model: Source, precision: str, file: str, runner: str) -> dict[str, Any]:
    """Write `file`, a path in the run, for a kind of runner, and measure it with ONNX Runtime on this CPU."""
    from deploy import precision as precisions

    keep = work.config.export.keep_fp32
    plain, path = work.run / f"{model.name}.onnx", work.run / file
    with files.whole(path) as temporary:
        made = precisions.convert(
            plain, temporary, precision,
            calibration=model.calibration, keep=() if keep == "none" else keep, runner=runner,
        )  # fmt: skip
    row = {"model": model.name, "file": file, "runner": runner, **asdict(made)}
    row.pop("seconds")  # the same run gives the same files
    return row | _measured(work, model, plain, path, precision)


def _measured(work: Work, model: Source, plain: Path, path: Path, precision: str) -> dict[str, Any]:
    """A variant on test examples; failure: why it cannot be measured on this CPU."""
    from deploy import precision as precisions
    from deploy import runners
    from deploy.errors import DeployError

    unknown = model.accuracy | dict.fromkeys(("value", "loss", "wrong"))
    nothing = {"relative": None, "agreement": None, "compared": 0, "accuracy": unknown}
    if precision in WRONG_HERE:
        return nothing | {"failure": WRONG_HERE[precision]}
    with contextlib.ExitStack() as opened:
        try:
            reference, candidate = (runners.open_runner("onnxruntime", p) for p in (plain, path))
            opened.callback(candidate.close)
            opened.callback(reference.close)
            found = precisions.evaluate(reference, candidate, [(batch, None) for batch in model.inputs])
        except DeployError as error:
            return nothing | {"failure": error.what}
        accuracy = evaluation(work.task.evaluate(_Played(candidate, model.net), "test"))
    facts = {"relative": found.relative, "agreement": found.agreement, "compared": found.images}
    return finite(facts) | {"accuracy": accuracy, "failure": ""}


def _train_on(work: Work, net: nn.Module) -> None:
    for batch in work.task.train_batches(1, 0):
        work.task.loss(net, move(batch, torch.device("cpu")))


class _Enough(Exception):
    """Ends a pass over data from inside the model."""


class _Recorder(nn.Module):
    """Notes what the net is called with, and ends the pass with `_Enough` after `most` examples."""

    def __init__(self, net: GraphNet, most: int) -> None:
        super().__init__()
        self.net, self.most = net.eval(), most
        self.seen: list[tuple[Array, ...]] = []

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.seen.append(tuple(x.numpy() for x in flat))
        if sum(len(batch[0]) for batch in self.seen) >= self.most:
            raise _Enough
        return self.net(*args, **kwargs)


def _seen(net: GraphNet, most: int, work_with: Callable[[nn.Module], Any]) -> list[tuple[Array, ...]]:
    """The inputs of the first batches, at least `most` examples if there are so many."""
    recorder = _Recorder(net, most)
    with contextlib.suppress(_Enough):
        work_with(recorder)
    return recorder.seen


class _Played(nn.Module):
    """A runner in the place of a net, so that the task can measure it."""

    def __init__(self, runner: Runner, net: GraphNet) -> None:
        super().__init__()
        self.runner = runner
        self.structure = net.graph._codegen.pytree_info.out_spec  # type: ignore[attr-defined]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        flat = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = self.runner.infer(tuple(x.numpy() for x in flat))
        return pytree.tree_unflatten([torch.from_numpy(y) for y in outputs], self.structure)
