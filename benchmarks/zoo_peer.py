"""One model of the sweep through Torch-Pruning's high-level API: one JSON line on stdout per finished stage.

    PYTHON-WITH-TORCH-PRUNING benchmarks/zoo_peer.py GROUP:NAME

Group Taylor importance, global ratio 0.5, channels rounded to 8, what writes the outputs ignored, heads
told and attention unfused as in its own examples. Exact: the pruned model against the unpruned one in
which the removed output channels are zero. It never imports the package that it is compared with.
"""

from __future__ import annotations

import contextlib
import copy
import math
import os
import sys
from pathlib import Path
from typing import Any

os.environ["TIMM_FUSED_ATTN"] = "0"  # its advice: pruned heads and fused attention do not go together
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import zoo_models
from benchmarks.zoo_models import Spec
from benchmarks.zoo_process import Row, alone

RATIO = 0.5
ROUND_TO = 8
TOLERANCE = 1e-4

Removed = dict[tuple[str, int], set[int]]
"""(parameter, dimension) -> the indices that left."""


def sweep(spec: Spec, row: Row) -> None:
    import torch

    with row.stage("build"):
        whole = zoo_models.build(spec)
        zoo_models.randomise(whole)
        model = zoo_models.part(spec, whole)
        inputs = zoo_models.inputs(spec, model)
        with contextlib.suppress(ValueError):
            zoo_models.calibrate(model, inputs)
        for p in model.parameters():
            p.requires_grad_(True)
        masked = copy.deepcopy(model)
        with torch.no_grad():
            before = tensors(model(*inputs))
        macs = counted(model, inputs)
    with row.stage("prune"):
        removed = prune(model, inputs)
    with row.stage("forward"), torch.no_grad():
        after = tensors(model(*inputs))
        works = [x.shape for x in after] == [x.shape for x in before]
    row.tell(forward=works, macs_ratio=round(counted(model, inputs) / max(macs, 1), 4))
    with row.stage("verify"), torch.no_grad():
        zero(masked, removed)
        wanted = tensors(masked(*inputs))
        error, moved = distance(wanted, after), distance(before, wanted)
    fine = math.isfinite(error)
    row.tell(error=error if fine else None, movement=moved if math.isfinite(moved) else None)
    row.tell(exact=works and fine and error <= TOLERANCE)


def tensors(found: Any) -> list[Any]:
    import torch

    return [x for x in torch.utils._pytree.tree_leaves(found) if isinstance(x, torch.Tensor)]


def distance(reference: list[Any], other: list[Any]) -> float:
    """max |a - b| / max |a|, the worst of all outputs."""
    if [a.shape for a in reference] != [b.shape for b in other]:
        return math.inf
    pairs = list(zip(reference, other, strict=True))
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-30)) for a, b in pairs)


def counted(model: Any, inputs: tuple[Any, ...]) -> float:
    """MACs by torch's FLOP counter, on the meta device where attention is one op."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    for device in ("meta", "cpu"):
        try:
            with torch.no_grad(), FlopCounterMode(display=False) as counter:
                copy.deepcopy(model).to(device)(*(x.to(device) for x in inputs))
            return float(counter.get_total_flops()) / 2
        except (RuntimeError, NotImplementedError):
            continue
    return 0.0


def prune(model: Any, inputs: tuple[Any, ...]) -> Removed:
    """One global step; which slices of which parameters left."""
    import torch_pruning as tp  # type: ignore[import-not-found]  # of the environment that runs this
    from torch import nn

    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        attention = getattr(module, "qkv", None) or getattr(module, "qkv_proj", None)
        if isinstance(attention, nn.Linear | nn.Conv2d) and hasattr(module, "num_heads"):
            heads[attention] = module.num_heads
        elif isinstance(module, nn.MultiheadAttention):
            heads[module] = module.num_heads
    gradients(model, inputs)
    pruner = tp.pruner.BasePruner(
        model,
        example_inputs=inputs if len(inputs) > 1 else inputs[0],
        importance=tp.importance.GroupTaylorImportance(),
        global_pruning=True,
        pruning_ratio=RATIO,
        ignored_layers=writers_of_outputs(model, inputs),
        round_to=ROUND_TO,
        num_heads=heads,
    )
    names = {module: name for name, module in model.named_modules()}
    parameters = {id(p): name for name, p in model.named_parameters()}
    removed: Removed = {}
    for group in pruner.step(interactive=True):
        note(group, pruner, names, parameters, removed)
        group.prune()
    restate(model, pruner, heads)
    return removed


def gradients(model: Any, inputs: tuple[Any, ...]) -> None:
    """Gradients of the squared distance to random targets; zero where there are none, which it needs."""
    import torch

    generator = torch.Generator().manual_seed(5)
    total = torch.zeros(())
    for x in tensors(model(*inputs)):
        if x.is_floating_point() and x.requires_grad:
            scaled = x / x.detach().abs().mean().clamp_min(1e-12)
            total = total + (scaled - torch.randn(x.shape, generator=generator)).square().mean()
    torch.autograd.backward(total)
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad


def writers_of_outputs(model: Any, inputs: tuple[Any, ...]) -> list[Any]:
    """The layers whose channels are channels of an output."""
    from torch import nn

    owner: dict[Any, Any] = {}
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d)

    def remember(module: Any, _: Any, output: Any) -> None:
        if output.grad_fn is not None:
            owner[output.grad_fn] = module

    hooks = [m.register_forward_hook(remember) for m in model.modules() if isinstance(m, kinds)]
    stack = [x.grad_fn for x in tensors(model(*inputs))]
    for hook in hooks:
        hook.remove()
    found, seen = [], set()
    while stack:
        step = stack.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if step in owner:
            found.append(owner[step])
        else:
            stack += [before for before, _ in step.next_functions]
    return list(dict.fromkeys(found))


def note(group: Any, pruner: Any, names: Any, parameters: dict[int, str], removed: Removed) -> None:
    """Remember which output channels of which layers the group is about to take."""
    from torch import nn

    for dep, indices in group:
        layer = dep.target.module
        if not pruner.DG.is_out_channel_pruning_fn(dep.handler):
            continue
        chosen = {int(i) for i in indices}
        if isinstance(layer, nn.Parameter):
            known = {id(u.parameters): u.pruning_dim for u in pruner.DG.unwrapped_parameters}
            dim = known.get(id(layer), layer.dim() - 1)
            removed.setdefault((parameters[id(layer)], dim), set()).update(chosen)
            continue
        for leaf, p in layer.named_parameters(recurse=False):
            name = f"{names[layer]}.{leaf}" if names[layer] else leaf
            dim = 1 if isinstance(layer, nn.modules.conv._ConvTransposeNd) and p.dim() > 1 else 0
            removed.setdefault((name, dim), set()).update(i for i in chosen if i < p.shape[dim])


def restate(model: Any, pruner: Any, heads: dict[Any, int]) -> None:
    """What its examples put right by hand after pruning: heads, head widths, the hidden width of ViT."""
    for module in model.modules():
        attention = getattr(module, "qkv", None) or getattr(module, "qkv_proj", None)
        if attention is not None and attention in heads and hasattr(module, "num_heads"):
            module.num_heads = pruner.num_heads[attention]
            width = attention.weight.shape[0] // 3
            module.head_dim = width // module.num_heads
            if hasattr(module, "attn_dim"):
                module.attn_dim = width
    if hasattr(model, "conv_proj") and hasattr(model, "hidden_dim"):
        model.hidden_dim = model.conv_proj.out_channels


def zero(model: Any, removed: Removed) -> None:
    """Zero the removed slices of the unpruned model."""
    import torch

    parameters = dict(model.named_parameters())
    for (name, dim), indices in removed.items():
        parameters[name].index_fill_(dim, torch.tensor(sorted(indices), dtype=torch.int64), 0)


def verdict(data: dict[str, Any]) -> dict[str, Any]:
    """ok: the pruned model runs, its outputs have the shapes they had, at least 30 % of the MACs are gone."""
    through = data.get("forward") is True and "verify" not in data["errors"]
    removed = data.get("macs_ratio", 1.0) <= 0.7
    return {"through": through, "removed_30_percent": removed, "ok": through and removed}


if __name__ == "__main__":
    alone(lambda spec: {"tool": "torch_pruning", "key": spec.key}, sweep, verdict)
