"""The pipeline file's schema: every section, key, default and bound, in one place.

The descriptions are shown in the JSON Schema and in the generated ``compress.yaml``. Values are strict: text
is never read as a number, nor a number as true or false. Ratios are the share that is kept.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from compress.recipes import RECIPES, with_recipe

LARGEST = 2**31 - 1
RATIOS = ("macs_ratio", "params_ratio", "units_ratio")

Place = tuple[str | int, ...]


def fault(what: str, fix: str = "", place: Place = ()) -> PydanticCustomError:
    """A validator's own complaint; ``place`` is relative to the value that it validates."""
    context = {"what": what, "fix": fix, "place": place}
    return PydanticCustomError("plain", "{what}; {fix}", context)


def _printable(text: str) -> str:
    if not text.isprintable():
        raise fault("holds a character that cannot be printed", "remove it")
    return text


def _exactly_one(value: Any) -> Any:
    if type(value) in (bool, float):  # Literal[1] takes True and 1.0 for 1
        raise fault(f"expected 1, found {str(value).lower()}", "write version: 1")
    return value


def _pattern(text: str) -> str:
    if text.startswith("re:"):
        try:
            re.compile(text[3:])
        except (re.error, RecursionError, OverflowError) as error:
            raise fault(f"not a valid regular expression ({error})", "check what follows re:") from None
    return text


def _device(text: str) -> str:
    if not re.fullmatch(DEVICE, text):
        raise fault(f'expected "auto", "cpu" or "cuda", found "{text[:60]}"', "for one GPU of many: cuda:1")
    return text


def _empty(value: Any) -> Any:
    return {} if value is None else value  # "prune:" with all its keys commented out


DEVICE = r"auto|cpu|cuda(:[0-9]{1,3})?"
Name = Annotated[str, Field(min_length=1), AfterValidator(_printable)]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Ratio = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
BelowOne = Annotated[float, Field(ge=0, lt=1)]
Counts = Annotated[list[Count], Field(min_length=1)]
FilledIn = BeforeValidator(_empty)


class Section(BaseModel):
    """A part of the config: read-only, strict, no unknown keys, finite numbers only."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    """The trained model to compress."""

    name: Name = Field(description="torchvision:NAME, timm:NAME, package.module:function, or a .pt2 file")
    weights: Name | None = Field(
        default=None, description="a .safetensors, .pt or .pth file, or a name such as DEFAULT"
    )
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments for the function of name")
    part: Name | Annotated[list[Name], Field(min_length=1)] | None = Field(
        default=None,
        description="prune only this submodule, or a list, e.g. backbone or [body, neck]",
    )
    input_shape: Counts = Field(description="one input without the batch, e.g. [3, 224, 224]")


class DataConfig(Section):
    """The data it is pruned, fine-tuned and judged on."""

    name: Name = Field(
        description="mnist5k, torchvision:NAME, package.module:function, or a folder of images"
    )
    root: Name = Field(default="data", description="where data sets lie")
    batch_size: Count = Field(default=128, description="images per training step")
    mean: list[float] | None = Field(default=None, description="per channel, subtracted from images in 0..1")
    std: list[Positive] | None = Field(default=None, description="per channel, divides the images")
    augment: Literal["none", "flip_crop", "trivial_augment", "imagenet"] = Field(
        default="none",
        description="none, flip_crop, trivial_augment or imagenet (crops of 8 to 100 %)",
    )
    validation: float = Field(
        default=0.1, gt=0, le=0.5, description="share of the training images held out to choose by"
    )
    train_limit: Count | None = Field(default=None, description="use this many training images at most")
    test_limit: Count | None = Field(default=None, description="use this many test images at most")
    kwargs: dict[str, Any] = Field(default_factory=dict, description="arguments for the function of name")


class DistillConfig(Section):
    """Learning from the original model's outputs as well as from the labels."""

    alpha: Fraction = Field(
        default=0.5, description="weight of the original's outputs against the labels, 0 to 1"
    )
    temperature: Positive = Field(default=4.0, description="softens both outputs")


class TrainConfig(Section):
    """Training by gradient descent: used for train and for finetune."""

    epochs: int = Field(
        default=10, ge=0, le=LARGEST, description="passes over the training images; 0 skips it"
    )
    optimizer: Literal["sgd", "adamw"] = Field(default="sgd", description="sgd or adamw")
    lr: Positive = Field(default=0.01, description="learning rate at its highest")
    momentum: BelowOne = Field(default=0.9, description="of sgd")
    weight_decay: NotNegative = Field(default=1e-4, description="pull of the weights towards zero")
    schedule: Literal["cosine", "step", "constant"] = Field(
        default="cosine", description="cosine, step or constant"
    )
    step_epochs: Count = Field(default=10, description="schedule step: epochs between two falls of the rate")
    step_gamma: float = Field(default=0.1, gt=0, le=1, description="schedule step: factor of each fall")
    warmup_epochs: NotNegative = Field(default=0.0, description="epochs of linear rise to lr")
    label_smoothing: BelowOne = Field(default=0.0, description="0 is off")
    distill: DistillConfig | None = Field(
        default=None, description="{alpha: 0.5, temperature: 4} learns from the original too"
    )
    ema: BelowOne = Field(
        default=0.0, description="evaluate and keep running averages of the weights, of this decay; 0 is off"
    )
    recalibrate: int = Field(
        default=0, ge=0, le=LARGEST, description="minibatches to estimate batch norms anew from; 0 is off"
    )
    amp: Literal["auto", "off", "bf16", "fp16"] = Field(
        default="auto", description="mixed precision: auto, off, bf16, fp16"
    )

    @model_validator(mode="after")
    def _warm_up_fits(self) -> TrainConfig:
        if self.epochs and self.warmup_epochs > self.epochs:
            what = f"must be at most epochs ({self.epochs}), found {self.warmup_epochs:g}"
            raise fault(what, place=("warmup_epochs",))
        return self


class PruneConfig(Section):
    """Which channels leave, and how many; exactly one of the three ratios."""

    macs_ratio: Ratio | None = Field(
        default=None, description="share of multiply-adds kept (0.5 if no ratio is given)"
    )
    params_ratio: Ratio | None = Field(default=None, description="or: share of parameters kept")
    units_ratio: Ratio | None = Field(default=None, description="or: share of channel groups kept")
    criterion: Literal["taylor", "logits", "magnitude", "random"] = Field(
        default="taylor", description="taylor (any loss), logits (classifiers), magnitude or random"
    )
    gates: Literal["read", "write"] = Field(
        default="read", description="score a channel where it is read (exact) or where it is written"
    )
    minibatches_per_step: Count = Field(
        default=10, description="batches that scores are summed over between removals"
    )
    units_per_step: Count | None = Field(
        default=None, description="channel groups removed at once; null: 2 % of them"
    )
    lr: Positive = Field(default=0.001, description="learning rate while pruning")
    momentum: BelowOne = Field(default=0.9, description="momentum while pruning")
    weight_decay: NotNegative = Field(default=0.0, description="weight decay while pruning")
    ema: BelowOne = Field(default=0.9, description="how much of the last step's scores is kept")
    align: Count | Literal["auto"] = Field(
        default="auto", description="channels kept: multiples of this; auto: by bench.target"
    )
    min_keep: Fraction = Field(default=0.1, description="least share of each layer's channels that stays")
    rank: Literal["importance", "importance_per_cost"] = Field(
        default="importance_per_cost",
        description="per what the ratio counts that it saves, or importance alone",
    )
    keep: list[Annotated[Name, AfterValidator(_pattern)]] = Field(
        default_factory=list, description='parameters not to prune: names, or "re:PATTERN"'
    )
    attention: Literal["heads", "dims"] = Field(
        default="heads", description="whole heads leave, or (dims) the same dimensions of every head"
    )
    grouped_convs: Literal["auto", "offsets", "groups"] = Field(
        default="auto", description="the same offset of every group leaves, or whole groups; auto: the finer"
    )
    fold_weights: bool = Field(
        default=True, description="computed weights (weight norm, standardisation) become plain ones"
    )
    inexact_norms: bool = Field(
        default=False, description="prune through LayerNorm and RMSNorm although that changes the result"
    )
    max_loss_increase: NotNegative | None = Field(
        default=None, description="stop early when the loss rises by more"
    )
    max_accuracy_drop: Fraction | None = Field(
        default=None, description="stop early when accuracy falls by more, e.g. 0.05"
    )

    @model_validator(mode="before")
    @classmethod
    def _default_ratio(cls, data: Any) -> Any:
        if isinstance(data, dict) and all(data.get(ratio) is None for ratio in RATIOS):
            return {**data, "macs_ratio": 0.5}
        return data

    @model_validator(mode="after")
    def _one_ratio(self) -> PruneConfig:
        given = [ratio for ratio in RATIOS if getattr(self, ratio) is not None]
        if len(given) > 1:
            what = f"give only one of {', '.join(RATIOS)}; found {' and '.join(given)}"
            raise fault(what, "set the others to null", place=(given[-1],))
        return self


class BudgetConfig(Section):
    """What the pruned model may cost, all at once, in place of prune's one ratio."""

    latency_ms: Positive | None = Field(default=None, description="largest latency on the target")
    latency_ratio: Ratio | None = Field(default=None, description="or: share of the original's latency")
    energy_ratio: Ratio | None = Field(
        default=None, description="or: share of the original's energy per call, by the target's own counter"
    )
    macs_ratio: Ratio | None = Field(default=None, description="and: share of multiply-adds kept")
    params_ratio: Ratio | None = Field(default=None, description="and: share of parameters kept")
    memory_ratio: Ratio | None = Field(
        default=None, description="and: share kept of the activations that lie in memory at once"
    )
    target: Name | None = Field(default=None, description="where that is measured; null: bench.target")
    batch: Count | None = Field(
        default=None, description="at which batch size; null: gates.batch, or the largest of bench.batches"
    )
    table: Name | None = Field(
        default=None, description="file of measured latencies, to share; null: in the user's cache"
    )

    @model_validator(mode="after")
    def _something_is_asked(self) -> BudgetConfig:
        measured = [key for key in ("latency_ms", "latency_ratio", "energy_ratio") if getattr(self, key)]
        if len(measured) > 1:
            what = "give only one of latency_ms, latency_ratio and energy_ratio"
            raise fault(f"{what}; found {' and '.join(measured)}", place=(measured[-1],))
        if not (measured or self.macs_ratio or self.params_ratio or self.memory_ratio):
            limits = "latency_ms, latency_ratio, energy_ratio, macs_ratio, params_ratio or memory_ratio"
            raise fault("must name a limit", f"give {limits}")
        return self

    @property
    def has_latency(self) -> bool:
        """Whether it limits latency."""
        return self.latency_ms is not None or self.latency_ratio is not None

    @property
    def is_measured(self) -> bool:
        """Whether it limits what has to be measured on the target."""
        return self.has_latency or self.energy_ratio is not None


class ExportConfig(Section):
    """The ONNX file."""

    opset: Count | None = Field(default=None, description="ONNX operator set; null: the exporter's own")
    tolerance: Positive = Field(default=1e-4, description="largest relative error, ONNX against PyTorch")
    batches: Counts = Field(default=[1, 2, 7], description="batch sizes at which the two are compared")
    precisions: list[Literal["fp16", "bf16", "int8", "fp8"]] = Field(
        default_factory=list, description="ONNX files of these too: fp16, bf16, int8, fp8"
    )
    calibration_images: Count = Field(
        default=512, description="training images that int8 and fp8 are calibrated on"
    )
    keep_fp32: Literal["first_last", "none"] | list[Name] = Field(
        default="first_last",
        description="layers without int8 and fp8: first_last, none, or a list",
    )


class EngineConfig(Section):
    """How TensorRT and TensorRT-RTX build (null leaves it to them) and run."""

    workspace_mib: Count | None = Field(default=None, description="most scratch memory, MiB")
    builder_level: int | None = Field(
        default=None, ge=0, le=5, description="0 builds fast, 5 takes long for a fast engine"
    )
    refit: bool = Field(default=False, description="weights can be replaced in the engine later")
    version_compatible: bool = Field(default=False, description="later versions of the library run it too")
    compute_capability: Name | None = Field(
        default=None, description='tensorrt_rtx: for this GPU, such as "8.9"'
    )
    buffers: Literal["torch", "pycuda"] = Field(
        default="torch", description="whose memory and stream an engine runs with: torch, pycuda"
    )


class BenchConfig(Section):
    """How latency is measured."""

    target: Name = Field(
        default="cpu-ort", description="the hardware it is for: a target's name, or a .toml file"
    )
    precision: Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8", "auto"] | None = Field(
        default=None,
        description="what is measured; auto: the fastest that is accurate; null: the target's",
    )
    batches: Counts | None = Field(default=None, description="batch sizes; null: the target's")
    repeats: int = Field(
        default=20, ge=3, le=LARGEST, description="interleaved pairs, original against dense"
    )
    seconds: Positive = Field(default=1.0, le=3600, description="least time per runner, batch and model")
    threads: Count | None = Field(default=None, description="CPU threads; null: the target's")
    runners: Annotated[list[Name], Field(min_length=1)] | None = Field(
        default=None, description="what runs the model; null: PyTorch and the target's runner"
    )
    streams: int | None = Field(
        default=None, ge=1, le=64, description="CUDA streams to measure throughput with, apart; null: do not"
    )
    engine: EngineConfig = Field(
        default_factory=EngineConfig, description="of TensorRT: {workspace_mib: 1024, builder_level: 5, ...}"
    )


class GatesConfig(Section):
    """What must hold before the model may ship; null switches a gate off."""

    target: bool | None = Field(
        default=None, description="pruning reached its ratio or budget; null: unless prune.max_* may stop it"
    )
    accuracy_drop: Fraction | None = Field(
        default=0.01, description="largest fall of accuracy, 0.01 is one point"
    )
    metric_drop: Positive | None = Field(
        default=None, description="or: largest fall of a measure that is no share, in its own units"
    )
    speedup: Positive | None = Field(
        default=None, description="least original / dense median latency, e.g. 1.5"
    )
    latency_ms: Positive | None = Field(default=None, description="largest median latency")
    runner: Name | None = Field(
        default=None, description="whose latency the gates look at; null: the target's runner"
    )
    batch: Count | None = Field(
        default=None, description="at which batch size; null: the largest of bench.batches"
    )
    size_ratio: Positive | None = Field(
        default=None, description="largest dense / original size of the ONNX file"
    )
    parity: bool = Field(default=True, description="ONNX must agree with PyTorch within export.tolerance")


class Config(Section):
    """compress.yaml: what to compress, how, and what must hold before it may ship."""

    version: Annotated[Literal[1], BeforeValidator(_exactly_one)] = Field(
        description="1, the version of this file's format"
    )
    recipe: Literal["molchanov2019", "modern"] | None = Field(
        default=None, description="molchanov2019 or modern: values for prune and finetune where you give none"
    )
    model: Annotated[ModelConfig, FilledIn] = Field(description="the trained model to compress")
    data: Annotated[DataConfig, FilledIn] = Field(description="the data it is pruned and judged on")
    train: TrainConfig | None = Field(
        default=None, description="train the model first; the same keys as finetune"
    )
    prune: Annotated[PruneConfig, FilledIn] = Field(
        default_factory=PruneConfig, description="which channels leave, and how many"
    )
    budget: BudgetConfig | None = Field(
        default=None, description="{latency_ms: 2.0} and the like, in place of prune.macs_ratio"
    )
    finetune: TrainConfig | None = Field(
        default_factory=TrainConfig, description="training after pruning; null skips it"
    )
    export: Annotated[ExportConfig, FilledIn] = Field(
        default_factory=ExportConfig, description="the ONNX file"
    )
    bench: Annotated[BenchConfig, FilledIn] = Field(
        default_factory=BenchConfig, description="how latency is measured"
    )
    gates: Annotated[GatesConfig, FilledIn] = Field(
        default_factory=GatesConfig, description="what must hold before it may ship; null switches a gate off"
    )
    seed: int = Field(default=0, ge=0, le=2**32 - 1, description="every random choice follows from it")
    device: Annotated[str, AfterValidator(_device)] = Field(
        default="auto", description="auto, cpu or cuda", json_schema_extra={"pattern": f"^({DEVICE})$"}
    )
    out: Name = Field(default="run", description="the folder that a run works in")

    @model_validator(mode="before")
    @classmethod
    def _follow_the_recipe(cls, data: Any) -> Any:
        name = data.get("recipe") if isinstance(data, dict) else None
        return with_recipe(data, RECIPES[name]) if isinstance(name, str) and name in RECIPES else data

    @model_validator(mode="before")
    @classmethod
    def _one_target(cls, data: Any) -> Any:
        prune = data.get("prune") if isinstance(data, dict) and data.get("budget") is not None else None
        given = [ratio for ratio in RATIOS if isinstance(prune, dict) and prune.get(ratio) is not None]
        if given:
            what = f"there is a budget too, which takes the place of {given[0]}"
            raise fault(what, "remove one of the two", place=("prune", given[0]))
        return data

    @model_validator(mode="after")
    def _budget_goes_first(self) -> Config:
        if self.budget is None or all(getattr(self.prune, ratio) is None for ratio in RATIOS):
            return self
        prune = self.prune.model_copy(update=dict.fromkeys(RATIOS))
        return self.model_copy(update={"prune": prune})

    @model_validator(mode="after")
    def _channels_fit(self) -> Config:
        for key in ("mean", "std"):
            values, shape = getattr(self.data, key), self.model.input_shape
            if values is not None and len(shape) == 3 and len(values) not in (1, shape[0]):
                what = (
                    f"expected {shape[0]} numbers, one per channel of model.input_shape, found {len(values)}"
                )
                raise fault(what, place=("data", key))
        return self

    @model_validator(mode="after")
    def _gates_are_measured(self) -> Config:
        gates, bench = self.gates, self.bench
        if gates.speedup is None and gates.latency_ms is None:
            return self
        if None not in (gates.runner, bench.runners) and gates.runner not in (bench.runners or ()):
            what = f'no runner of this name is measured, found "{gates.runner}"'
            raise fault(what, "add it to bench.runners", place=("gates", "runner"))
        if None not in (gates.batch, bench.batches) and gates.batch not in (bench.batches or ()):
            what = f"this batch size is not measured, found {gates.batch}"
            raise fault(what, "add it to bench.batches", place=("gates", "batch"))
        return self
