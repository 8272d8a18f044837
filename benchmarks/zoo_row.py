"""One model of the architecture sweep, in a process of its own: one JSON line on stdout per finished stage.

    python benchmarks/zoo_row.py GROUP:NAME

The last line is the row. A stage that fails leaves its error in the row; later stages that need its
result are left out.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import zoo_models
from benchmarks.zoo_models import Spec
from benchmarks.zoo_process import Row, alone

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from compress.channelmap import ChannelMap
    from compress.parts import Whole
    from compress.trace import GraphNet, Traced

TARGET = 0.5  # share of the MACs that is to stay
ALIGN = 8  # kept channels are multiples of it, as the peer's round_to
LARGEST_FLOAT64 = 400_000_000  # parameters; above, the check in float64 is left out for memory
TOLERANCE = 1e-5
TOLERANCE_FLOAT64 = 1e-11
TOLERANCE_PARITY = 1e-4
MOVEMENT = 1000
PINS = 8


def sweep(spec: Spec, row: Row) -> None:
    """All stages of one model."""
    import torch

    with row.stage("build"):
        model = zoo_models.build(spec)
        zoo_models.randomise(model)
        subject = zoo_models.part(spec, model)
        inputs = zoo_models.inputs(spec, subject)
        with contextlib.suppress(ValueError):  # one value per channel: the random statistics stay
            zoo_models.calibrate(subject, inputs)
        with torch.no_grad():
            sound = all(bool(x.isfinite().all()) for x in tensors(subject(*inputs)))
    size = sum(p.numel() for p in subject.parameters())
    row.tell(inputs=[list(x.shape) for x in inputs], params=size, finite=sound)
    traced, around = traced_by(row, spec, model, inputs)
    traced, cmap = labelled(row, traced)
    keep = chosen(row, traced, cmap)
    masked, dense = surgery(row, traced, cmap, keep)
    compared(row, traced, masked, dense, size)
    if around is not None:
        whole(row, around, (traced.net, masked, dense))
    del masked, model, subject, around
    for stage in (train, export):
        with contextlib.suppress(Exception):
            stage(row, dense, traced.example)


def tensors(found: Any) -> list[Tensor]:
    """Every tensor of a nested output."""
    import torch

    return [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]


def traced_by(
    row: Row, spec: Spec, model: nn.Module, inputs: tuple[Tensor, ...]
) -> tuple[Traced, Whole | None]:
    """Trace, with the share of it that is torch.export itself; for a part, the model around it as well."""
    import torch

    from compress.parts import Whole, arguments, trace_parts
    from compress.trace import trace

    spent, around = [], None
    run = torch.export.export

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return run(*args, **kwargs)
        finally:
            spent.append(time.perf_counter() - start)

    with row.stage("trace"):
        torch.export.export = timed
        try:
            if spec.part:
                example = arguments(zoo_models.whole_inputs(spec))
                parts = trace_parts(model, [spec.part], example)
                traced, around = parts.traced, Whole(model, parts, example)
            else:
                traced = trace(model, inputs)
        finally:
            torch.export.export = run
    nodes = len(traced.net.graph.nodes)
    row.tell(traced=True, torch_export_s=round(sum(spent), 3), nodes=nodes)
    return traced, around


def whole(row: Row, around: Whole, nets: tuple[GraphNet, GraphNet, GraphNet]) -> None:
    """The whole model around its pruned part."""
    with row.stage("whole"):
        found = around.proof(*nets)
    row.tell(
        whole_error=finite(found.relative_error),
        whole_movement=finite(found.movement),
        exact=row.data["exact"] and found.passed,
    )


def labelled(row: Row, traced: Traced) -> tuple[Traced, ChannelMap]:
    from compress.channelmap import channel_map
    from compress.folding import folded

    with row.stage("label"):
        traced = folded(traced)
        cmap = channel_map(traced)
    pins = sorted(cmap.pinned, key=lambda p: -p.channels)
    row.tell(
        units=cmap.units,
        folded=len(traced.folded),
        pinned_channels=sum(p.channels for p in pins),
        pinned=[
            {"reason": p.reason, "op": p.op, "source": p.source, "channels": p.channels} for p in pins[:PINS]
        ],
    )
    return traced, cmap


def chosen(row: Row, traced: Traced, cmap: ChannelMap) -> np.ndarray:
    """Scores of one random minibatch, and the least important units down to the target."""
    import numpy as np

    from compress.cost import class_counts, cost_model
    from compress.select import Target, remove, space

    with row.stage("score"):
        scores = taylor(traced, cmap)
    with row.stage("select"):
        least = narrowest(cmap)
        target = Target("macs", max(TARGET, min(least * (1 + 1e-9), 1 - 1e-9)))
        selection = remove(scores, np.ones(cmap.units, dtype=bool), space(cmap, target, align=ALIGN))
        costs, counts = cost_model(cmap), class_counts(cmap, selection.keep)
    row.tell(
        macs=round(costs.macs.total(costs.full)),
        least_macs_ratio=round(least, 4),
        macs_ratio=round(costs.ratio("macs", counts), 4),
        params_ratio=round(costs.ratio("params", counts), 4),
        units_removed=int((~selection.keep).sum()),
    )
    return selection.keep


def narrowest(cmap: ChannelMap) -> float:
    """The least share of the MACs that selection can reach."""
    import numpy as np

    from compress.cost import cost_model
    from compress.select import Target, space

    widest = space(cmap, Target("macs", 1 - 1e-12), align=ALIGN)
    return cost_model(cmap).ratio("macs", np.array([level[0] for level in widest.levels]))


def taylor(traced: Traced, cmap: ChannelMap) -> np.ndarray:
    """First-order Taylor scores: squared distance of the outputs to random targets."""
    import torch

    from compress.importance import Taylor

    importance = Taylor(cmap)
    torch.autograd.backward(distance(traced.net(*traced.example)))
    importance.accumulate(traced.net)
    traced.net.zero_grad(set_to_none=True)
    return importance.scores()


def distance(found: Any) -> Tensor:
    """Mean squared distance of all outputs, each scaled to unit size, to standard normal numbers."""
    import torch

    generator = torch.Generator().manual_seed(5)
    total = torch.zeros(())
    for x in tensors(found):
        if x.is_floating_point() and x.requires_grad:
            scaled = x / x.detach().abs().mean().clamp_min(1e-12)
            total = total + (scaled - torch.randn(x.shape, generator=generator)).square().mean()
    return total


def surgery(row: Row, traced: Traced, cmap: ChannelMap, keep: np.ndarray) -> tuple[GraphNet, GraphNet]:
    from compress.surgery import cut, mask

    with row.stage("mask"):
        masked = copy.deepcopy(traced.net)
        mask(masked, cmap, keep)
    with row.stage("surgery"):
        dense, _ = cut(traced.net, cmap, keep)
    row.tell(cut=True, params_after=sum(p.numel() for p in dense.parameters()))
    return masked, dense


def compared(row: Row, traced: Traced, masked: GraphNet, dense: GraphNet, size: int) -> None:
    """Masked against dense in float32 and float64; above the tolerance, float32's own rounding counts."""
    import torch

    from compress.proof import verify

    with row.stage("verify"):
        nets = (traced.net, masked, dense, traced.example)
        single = verify(*nets, dtype=torch.float32, tolerance=TOLERANCE)
        row.tell(error_float32=finite(single.relative_error), movement=finite(single.movement))
        moved = single.movement >= MOVEMENT * single.relative_error and 0 < single.movement < math.inf
        exact = moved and single.relative_error <= TOLERANCE
        if moved and not exact and size <= LARGEST_FLOAT64:
            rounding = rounded(masked, traced.example)
            exact = single.relative_error <= 2 * rounding
            row.tell(rounding_float32=finite(rounding))
        if size <= LARGEST_FLOAT64:
            double = verify(*nets, dtype=torch.float64, tolerance=TOLERANCE_FLOAT64)
            exact = exact and double.passed
            row.tell(error_float64=finite(double.relative_error))
        else:
            row.tell(float64=f"left out above {LARGEST_FLOAT64} parameters")
        row.tell(exact=exact, macs_counted=counted(traced, dense))


def rounded(net: GraphNet, inputs: Sequence[Tensor]) -> float:
    """How far float32 alone moves the outputs, against float64."""
    import torch

    from compress.proof import outputs, relative_error

    single, wide = (outputs(net, (tuple(inputs), {}), dtype) for dtype in (torch.float32, torch.float64))
    return relative_error(wide, [x.double() for x in single])


def finite(value: float) -> float | None:
    """The number, None where it is infinite or not a number: JSON has neither."""
    return value if math.isfinite(value) else None


def counted(traced: Traced, dense: GraphNet) -> float | None:
    """macs_ratio as torch's FLOP counter has it, on the meta device where attention is one op."""
    from torch.utils.flop_counter import FlopCounterMode

    totals: list[int] = []
    try:
        for net in (traced.net, dense):
            with FlopCounterMode(display=False) as counter:
                copy.deepcopy(net).to("meta")(*(x.to("meta") for x in traced.example))
            totals.append(counter.get_total_flops())
    except (RuntimeError, NotImplementedError):  # a graph that makes tensors on a device of its own
        return None
    return round(totals[1] / max(totals[0], 1), 4)


def train(row: Row, dense: GraphNet, inputs: tuple[Tensor, ...]) -> None:
    """One SGD step in train mode: a finite loss, and parameters that change."""
    import torch

    with row.stage("train"):
        net = copy.deepcopy(dense).train()
        before = {name: p.detach().clone() for name, p in net.named_parameters()}
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
        loss = distance(net(*inputs))
        torch.autograd.backward(loss)
        optimizer.step()
        changed = sum(not torch.equal(before[name], p) for name, p in net.named_parameters())
        fine = math.isfinite(float(loss)) and all(bool(p.isfinite().all()) for p in net.parameters())
    row.tell(trains=bool(fine and changed), parameters_changed=round(changed / max(len(before), 1), 3))


def export(row: Row, dense: GraphNet, inputs: tuple[Tensor, ...]) -> None:
    """ONNX by the product's exporter; parity through ONNX Runtime at a batch other than the traced one."""
    from deploy.parity import compare
    from deploy.runners import open_runner
    from deploy.to_onnx import export as to_onnx

    dense.eval()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        with row.stage("export"):
            to_onnx(dense, inputs, path)
        row.tell(exported=True)
        with row.stage("parity"):
            reference, candidate = open_runner("torch", dense), open_runner("onnxruntime", path)
            shapes = [list(x.shape[1:]) for x in inputs]
            found = compare(reference.infer, candidate.infer, shapes, (3,), TOLERANCE_PARITY)[0]
        row.tell(parity=found.passed, parity_error=finite(found.relative), parity_reason=found.reason)


def verdict(data: dict[str, Any]) -> dict[str, Any]:
    """through: every stage held with a unit removed. ok: and 30 % of the MACs gone or a reason recorded."""
    stages = ("traced", "cut", "exact", "trains", "exported", "parity")
    through = all(data.get(stage) is True for stage in stages) and data.get("units_removed", 0) > 0
    removed = data.get("macs_ratio", 1.0) <= 0.7
    return {
        "through": through,
        "removed_30_percent": removed,
        "ok": through and (removed or bool(data.get("pinned"))),
    }


if __name__ == "__main__":
    alone(lambda spec: {"key": spec.key, "family": spec.family, "part": spec.part}, sweep, verdict)
