"""Where the time went, layer by layer, before and after: which layers did not get faster, and why.

Pure functions over measured layer times; `profilers` measures them. All times are in milliseconds per run of
the model, one multiply-add is one MAC.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from deploy.errors import MeasureError

REACHED = 0.8  # a layer that reaches this share of what its MACs promise is as fast as expected
SMALLER = 0.98  # below this share of its MACs a layer counts as pruned
OVERHEAD_CALLS = 3.0  # a layer that takes less than so many empty calls is too small to matter
OVERLAP = 0.02  # medians of parts may exceed the median of the whole by so much
TOLERANCE = 0.15  # by how much a profiled run may differ from the measured latency


@dataclass(frozen=True)
class NodeTime:
    """One kernel: the layer `name` it belongs to, its `op`, and the time of its calls in one run.

    `macs` and `bytes` (read and written) are of one run, None where the profiler does not tell; `channels`
    are (in, out) of the weight, with 1 for in where it is depthwise. `moves` is False for what only renames
    memory.
    """

    name: str
    op: str
    ms: float
    module: str = ""
    macs: int | None = None
    bytes: int | None = None
    channels: tuple[int, int] | None = None
    moves: bool = True


@dataclass(frozen=True)
class LayerTime:
    """One layer of one model: all its kernels in one run. `op` names them, `calls` counts them.

    `share` is of the run. The rest as in NodeTime; `channels` are those of the kernel with the most MACs.
    """

    name: str
    op: str
    calls: int
    ms: float
    share: float
    module: str = ""
    macs: int | None = None
    bytes: int | None = None
    channels: tuple[int, int] | None = None


@dataclass(frozen=True)
class Profile:
    """The layers of one model in the order they run, and the `run_ms` they are part of.

    `floor_ms` is what one call of a kernel costs whatever it computes; times are medians over `runs`.
    """

    source: str
    layers: tuple[LayerTime, ...]
    run_ms: float
    floor_ms: float
    runs: int

    @property
    def layers_ms(self) -> float:
        """The sum of all layers."""
        return sum(layer.ms for layer in self.layers)

    @property
    def outside_ms(self) -> float:
        """What a run takes outside the layers: starting kernels, allocating, the profiler itself."""
        return self.run_ms - self.layers_ms


@dataclass(frozen=True)
class LayerChange:
    """One row of the comparison; times and ratios are None where one of the models lacks the layer.

    `share` is of the run before. `macs_ratio` is after / before, of bytes for layers without MACs. `reason`
    is one of REASONS, `why` says it with numbers; both are empty for a layer as fast as its MACs promise.
    """

    layer: str
    op_before: str
    op_after: str
    before_ms: float | None
    after_ms: float | None
    share: float
    speedup: float | None
    macs_ratio: float | None
    reason: str = ""
    why: str = ""


@dataclass(frozen=True)
class Totals:
    """How the layers add up: `layers_ms + outside_ms == run_ms`.

    `measured_ms` is the latency without a profiler, `ratio` is run / measured; `agrees` if they differ by at
    most TOLERANCE. Both are None without a measurement.
    """

    layers_ms: float
    outside_ms: float
    run_ms: float
    measured_ms: float | None
    ratio: float | None
    agrees: bool | None


@dataclass(frozen=True)
class Facts:
    """What judging goes by: channels per block, the cost of an empty call, MACs per byte of the machine."""

    align: int
    floor_ms: float
    balance: float | None = None


def gather(nodes: Iterable[NodeTime], *, source: str, run_ms: float, runs: int) -> Profile:
    """Kernels of one run into layers, each kernel into one.

    Raises MeasureError without kernels, or if they take longer than their run: by up to OVERLAP medians may,
    then the run is their sum.
    The floor is the median of the kernels that move nothing, else the cheapest kernel; what was not run at
    all (a change of shape on a GPU) does not count.
    """
    nodes = tuple(nodes)
    total = sum(node.ms for node in nodes)
    if not nodes or run_ms <= 0 or total > run_ms * (1 + OVERLAP):
        raise MeasureError(
            f"{len(nodes)} kernels take {total:.4g} ms of a run of {run_ms:.4g} ms",
            "profile",
            "profile more runs",
        )
    run_ms = max(run_ms, total)
    rows: dict[str, list[NodeTime]] = {}
    for node in nodes:
        rows.setdefault(node.name, []).append(node)
    layers = tuple(_layer(found, run_ms) for found in rows.values())
    ran = sorted((node for node in nodes if node.ms > 0), key=lambda node: node.ms)
    still = [node.ms for node in ran if not node.moves]
    floor = still[len(still) // 2] if still else ran[0].ms if ran else 0.0
    return Profile(source, layers, run_ms, floor, runs)


def _layer(nodes: Sequence[NodeTime], run_ms: float) -> LayerTime:
    spent = sum(node.ms for node in nodes)
    largest = max(nodes, key=lambda node: (node.macs or 0, node.channels is not None))
    macs = [node.macs for node in nodes]
    moved = [node.bytes for node in nodes if node.bytes is not None]
    return LayerTime(
        name=nodes[0].name,
        op=" + ".join(dict.fromkeys(node.op for node in nodes)),
        calls=len(nodes),
        ms=spent,
        share=spent / run_ms,
        module=next((node.module for node in nodes if node.module), ""),
        macs=None if None in macs else sum(filter(None, macs)),
        bytes=sum(moved) if moved else None,
        channels=largest.channels,
    )


def totals(profile: Profile, measured_ms: float | None = None) -> Totals:
    """The profile's sums beside the latency that was measured without a profiler."""
    ratio = profile.run_ms / measured_ms if measured_ms else None
    return Totals(
        layers_ms=profile.layers_ms,
        outside_ms=profile.outside_ms,
        run_ms=profile.run_ms,
        measured_ms=measured_ms,
        ratio=ratio,
        agrees=None if ratio is None else abs(ratio - 1) <= TOLERANCE,
    )


def balance(*profiles: Profile) -> float | None:
    """MACs per byte above which a layer computes rather than moves, as measured; None where nothing tells.

    The most MACs per ms and the most bytes per ms that any layer here reached (a roofline's two slopes);
    layers that hardly outlast an empty call do not count.
    """
    rates: dict[str, float] = {"macs": 0.0, "bytes": 0.0}
    for profile in profiles:
        for layer in profile.layers:
            if layer.ms > OVERHEAD_CALLS * layer.calls * profile.floor_ms:
                rates["macs"] = max(rates["macs"], (layer.macs or 0) / layer.ms)
                rates["bytes"] = max(rates["bytes"], (layer.bytes or 0) / layer.ms)
    return rates["macs"] / rates["bytes"] if rates["macs"] and rates["bytes"] else None


def compare(
    before: Profile,
    after: Profile,
    *,
    align: int,
    macs_before: Mapping[str, float] | None = None,
    macs_after: Mapping[str, float] | None = None,
    machine_balance: float | None = None,
) -> tuple[LayerChange, ...]:
    """One row per layer, in the order of `before`; layers that only `after` has come last.

    `align`: channels the target computes in blocks of. `macs_before` and `macs_after`: MACs by module path,
    which go before the profiler's own. `machine_balance` None: the one that these profiles show.
    """
    facts = Facts(
        align,
        min(before.floor_ms, after.floor_ms),
        balance(before, after) if machine_balance is None else machine_balance,
    )
    old = {layer.name: _with_macs(layer, macs_before) for layer in before.layers}
    new = {layer.name: _with_macs(layer, macs_after) for layer in after.layers}
    rows = [_change(layer, new.get(name), facts) for name, layer in old.items()]
    return (*rows, *(_only_after(layer) for name, layer in new.items() if name not in old))


def _with_macs(layer: LayerTime, macs: Mapping[str, float] | None) -> LayerTime:
    if macs and layer.module and layer.module in macs:
        return replace(layer, macs=round(macs[layer.module]))
    return layer


def _only_after(layer: LayerTime) -> LayerChange:
    why = "only in the pruned model"
    return LayerChange(layer.name, "", layer.op, None, layer.ms, 0.0, None, None, "new", why)


def _change(before: LayerTime, after: LayerTime | None, facts: Facts) -> LayerChange:
    if after is None:
        row = LayerChange(before.name, before.op, "", before.ms, None, before.share, None, None)
        return replace(row, reason="gone", why="part of another layer, or removed")
    speedup = before.ms / after.ms if after.ms > 0 else None
    ratio = size_ratio(before, after)
    reason, why = judge(before, after, facts)
    return LayerChange(
        layer=before.name,
        op_before=before.op,
        op_after=after.op,
        before_ms=before.ms,
        after_ms=after.ms,
        share=before.share,
        speedup=speedup,
        macs_ratio=ratio,
        reason=reason,
        why=why,
    )


def size_ratio(before: LayerTime, after: LayerTime) -> float | None:
    """MACs after / before; of bytes for a layer without MACs; None where neither is known."""
    for old, new in ((before.macs, after.macs), (before.bytes, after.bytes)):
        if old and new is not None:
            return new / old
    return None


def judge(before: LayerTime, after: LayerTime, facts: Facts) -> tuple[str, str]:
    """Why a smaller layer is not faster: (reason, sentence), both empty if it is as fast as promised.

    In this order, the first that the facts support: too small to matter; channels that do not fill the
    target's blocks, where that or the kernel it forces accounts for the time; another kernel; memory.
    """
    ratio = size_ratio(before, after)
    if ratio is None or ratio >= SMALLER:
        return "not pruned", "size not known" if ratio is None else "not pruned"
    if after.ms * REACHED <= before.ms * ratio:
        return "", ""
    for reason, look in _LOOKS.items():
        if why := look(before, after, facts):
            return reason, why
    return "unexplained", _unexplained(before, after, ratio, facts)


def _overhead(before: LayerTime, after: LayerTime, facts: Facts) -> str:
    empty = facts.floor_ms * after.calls
    if after.ms >= OVERHEAD_CALLS * empty:
        return ""
    return f"too small to matter: {_micro(after.ms)}, where calling {_kernels(after)} costs {_micro(empty)}"


def _alignment(before: LayerTime, after: LayerTime, facts: Facts) -> str:
    if before.channels is None or after.channels is None or facts.align < 2:
        return ""
    odd = [count for count in after.channels if _odd(count, facts.align)]
    odd = [count for count in odd if count not in before.channels]
    if not odd:
        return ""
    if before.op != after.op:
        counts = " and ".join(map(str, odd))
        return f"{counts} channels do not fill blocks of {facts.align}: {after.op} instead of {before.op}"
    promised = math.prod(
        _padded(old, facts.align) / _padded(new, facts.align)
        for old, new in zip(before.channels, after.channels, strict=True)
    )
    if before.ms < REACHED * promised * after.ms:
        return ""
    padded = " and ".join(f"{count} channels run as {_padded(count, facts.align)}" for count in odd)
    return f"{padded}: blocks of {facts.align}"


def _odd(count: int, align: int) -> bool:
    return count > 1 and count % align != 0


def _padded(count: int, align: int) -> int:
    return 1 if count == 1 else -(-count // align) * align


def _kernel(before: LayerTime, after: LayerTime, facts: Facts) -> str:
    return "" if before.op == after.op else f"{after.op} instead of {before.op}"


def _memory(before: LayerTime, after: LayerTime, facts: Facts) -> str:
    moved = f"{after.bytes / before.bytes:.0%} of the bytes" if before.bytes and after.bytes else ""
    if not after.macs:
        return f"computes nothing but moves {moved or 'memory'}"
    if after.bytes and facts.balance is not None and after.macs / after.bytes < facts.balance:
        intensity = after.macs / after.bytes
        return f"{intensity:.3g} MACs per byte, the machine balances at {facts.balance:.3g}; {moved} are left"
    if after.channels is not None and after.channels[0] == 1:
        return f"depthwise: moves {moved or 'as much as it computes'}"
    return ""


_LOOKS = {
    "overhead": _overhead,
    "alignment": _alignment,
    "kernel switch": _kernel,
    "memory-bound": _memory,
}
REASONS = ("not pruned", *_LOOKS, "unexplained", "new", "gone")


def _unexplained(before: LayerTime, after: LayerTime, ratio: float, facts: Facts) -> str:
    said = f"{ratio:.0%} of the work in {after.ms / before.ms:.0%} of the time, by the same kernels"
    odd = [count for count in after.channels or () if _odd(count, facts.align)]
    return said + (
        f"; {', '.join(map(str, odd))} channels do not fill blocks of {facts.align}" if odd else ""
    )


def _kernels(layer: LayerTime) -> str:
    return "a kernel" if layer.calls == 1 else f"{layer.calls} kernels"


def _micro(ms: float) -> str:
    return f"{1e3 * ms:.3g} µs"


def document(
    before: Profile,
    after: Profile,
    rows: Sequence[LayerChange],
    *,
    measured_ms: tuple[float | None, float | None] = (None, None),
) -> dict[str, Any]:
    """The comparison for results.json: rows, totals of both models, and how much time each reason holds.

    `measured_ms` are the latencies of both without a profiler. `reasons`: milliseconds after, by reason.
    """
    reasons: dict[str, float] = {}
    for row in rows:
        if row.reason and row.after_ms is not None:
            reasons[row.reason] = reasons.get(row.reason, 0.0) + row.after_ms
    return {
        "source": before.source,
        "runs": min(before.runs, after.runs),
        "floor_ms": min(before.floor_ms, after.floor_ms),
        "balance_macs_per_byte": balance(before, after),
        "totals": {
            name: asdict(totals(profile, measured))
            for name, profile, measured in zip(("before", "after"), (before, after), measured_ms, strict=True)
        },
        "reasons": reasons,
        "rows": [asdict(row) for row in rows],
    }
