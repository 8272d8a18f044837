"""A release against an earlier one: it may be worse by what is tolerated, and by no more.

Judged on intervals, as the other gates are. A baseline that is missing, or that was measured on another
machine, with other settings or on other data, decides nothing: that is inconclusive, and no pass.
Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deploy import gate
from deploy.gate import Gate, Interval
from deploy.values import entries, number, rows, section, span, text, times, visible, whole_number

GATES = ("baseline_accuracy", "baseline_latency", "baseline_size")
SETTINGS = ("target", "precision", "threads")
MACHINE = ("cpu", "architecture", "physical_cores", "logical_cpus", "avx512")
GPU = ("name", "compute_capability", "driver")
AGAIN = "Measure the baseline again as this release is measured."


@dataclass(frozen=True)
class Tolerances:
    """How much worse than the baseline a release may be.

    ``accuracy`` is an absolute share (0.01: one point); ``latency`` and ``size`` are relative (0.05: 5 %).
    """

    accuracy: float = 0.01
    latency: float = 0.05
    size: float = 0.02


def judge(
    results: Mapping[str, Any], baseline: Mapping[str, Any], gates: Mapping[str, Any], tolerated: Tolerances
) -> tuple[Gate, ...]:
    """Accuracy, latency and size of a release against those of an earlier one, a `Gate` for each.

    ``results`` and ``baseline`` are the contents of two results.json; ``gates`` (the config's section) says
    with which runner and batch size latency is judged.
    """
    return (
        _accuracy(results, baseline, tolerated.accuracy),
        _latency(results, baseline, gates, tolerated.latency),
        _size(results, baseline, tolerated.size),
    )


def missing(place: str) -> Gate:
    """What is judged where there is no baseline: nothing, so nothing passes."""
    why = f"There is no baseline at {visible(place)}, so nothing was compared with it. "
    return gate.missing("baseline", None, why + "Give a run, a release or a results.json; or none at first.")


def differences(
    results: Mapping[str, Any],
    baseline: Mapping[str, Any],
    runner: str,
    now: Mapping[str, Any],
    then: Mapping[str, Any],
) -> list[str]:
    """Why two latencies cannot be compared, in words; empty when machine, library and settings are the same.

    ``now`` and ``then`` are the two rows of latency. The system's kernel and the date may differ.
    """
    here, there = (section(section(of, "provenance"), "machine") for of in (results, baseline))
    pairs: list[tuple[str, Any, Any]] = [(name, now.get(name), then.get(name)) for name in SETTINGS]
    pairs += [(name, here.get(name), there.get(name)) for name in MACHINE]
    pairs.append(("GPUs", _gpus(here), _gpus(there)))
    mine, theirs = (_libraries(machine, runner) for machine in (here, there))
    pairs += [(name, mine.get(name), theirs.get(name)) for name in sorted({*mine, *theirs})]
    if not here or not there:
        return ["the machine of one of them is not recorded"]
    return [f"{name} is {_said(b)} there and {_said(a)} here" for name, a, b in pairs if a != b]


def _accuracy(results: Mapping[str, Any], baseline: Mapping[str, Any], tolerated: float) -> Gate:
    now, then = section(results, "accuracy"), section(baseline, "accuracy")
    data = [section(of, "data").get("test_fingerprint") for of in (results, baseline)]
    if now.get("metric") != then.get("metric") or not data[0] or data[0] != data[1]:
        why = "The baseline was evaluated by another metric or on other data. Evaluate it again on these."
        return gate.missing(GATES[0], tolerated, why)
    sizes = [n for n in (whole_number(now.get("n")), whole_number(then.get("n"))) if n is not None]
    pair = {
        "metric": now.get("metric"),
        "before": then.get("after"),
        "after": now.get("after"),
        "n": min(sizes) if len(sizes) == 2 else None,
        "flips": _flips(now, then),
        "majority": now.get("majority"),
        "share": now.get("share"),
    }
    advice = "tolerate more: --tolerate accuracy=..."
    judge = gate.judge_metric if now.get("share") is False else gate.judge_accuracy
    return _against(judge({"accuracy": pair}, tolerated, GATES[0], advice))


def _flips(now: Mapping[str, Any], then: Mapping[str, Any]) -> dict[str, int] | None:
    """Answers lost and gained since the baseline, where both say which examples they got wrong."""
    lists = [of.get("wrong") for of in (now, then)]
    if not all(isinstance(found, list) and all(type(n) is int for n in found) for found in lists):
        return None
    mine, theirs = ({*entries(of, "wrong")} for of in (now, then))
    return {"lost": len(mine - theirs), "gained": len(theirs - mine)}


def _latency(
    results: Mapping[str, Any], baseline: Mapping[str, Any], gates: Mapping[str, Any], tolerated: float
) -> Gate:
    runner, batch = str(gates.get("runner") or gate.DEFAULT_RUNNER), gate.gated_batch(results, gates)
    limit, found = 1 + tolerated, []
    for of, whose in ((results, ""), (baseline, "In the baseline: ")):
        dense = [row for row in rows(of, "latency") if row.get("model") == "dense"]
        row, why = gate.only(dense, runner, batch)
        if why:
            return gate.missing(GATES[1], limit, whose + why)
        found.append(row)
    different = differences(results, baseline, runner, *found)
    if different:
        why = f"The baseline's latency was measured otherwise: {'; '.join(different)}. {AGAIN}"
        return gate.missing(GATES[1], limit, why)
    slower, how = _paired(results, baseline, runner, batch), "each against the same original"
    if slower is None:
        slower, how = _unpaired(results, baseline, runner, batch, found), "on two occasions"
    if slower is None:
        why = f"A latency has too few or no valid samples for an interval. {AGAIN}"
        return gate.missing(GATES[1], limit, why)
    return _judged(slower, limit, f"with {visible(runner)}, batch {batch}", how)


def _judged(slower: Interval, limit: float, where: str, how: str) -> Gate:
    said = f"The median call takes {times(slower.value)} of the baseline's {where} (95 % interval "
    said += f"{span(slower.low, slower.high, times)}; {how}); the limit is {times(limit)}."
    decided: gate.Verdict = "inconclusive"
    if slower.high <= limit or slower.low > limit:
        decided = gate.side(slower.high <= limit)
    if decided == "fail":
        said += " Prune more, or tolerate more: --tolerate latency=..."
    if decided == "inconclusive":
        said += " The interval contains the limit: raise bench.repeats, quiet the machine, or tolerate more."
    return Gate(GATES[1], limit, slower.value, slower.low, slower.high, decided, said)


def _paired(
    results: Mapping[str, Any], baseline: Mapping[str, Any], runner: str, batch: int | None
) -> Interval | None:
    """How much longer a call takes, by the speed-ups over one and the same original; None if there is none.

    Original and dense model were timed in turns, so what the machine was doing on the two days cancels out.
    The interval is the widest that the two speed-ups' intervals allow.
    """
    originals = [_sha256(of, "original.onnx") for of in (results, baseline)]
    if originals[0] is None or originals[0] != originals[1]:
        return None
    ends = []
    for of in (results, baseline):
        row, _ = gate.only(rows(of, "speedup"), runner, batch)
        three = [number(row.get(key)) for key in ("low", "ratio", "high")]
        good = [x for x in three if x is not None and x > 0]
        if len(good) < 3 or good != sorted(good) or (whole_number(row.get("pairs")) or 0) < gate.MIN_PAIRS:
            return None
        ends.append(good)
    now, then = ends
    return Interval(then[1] / now[1], then[0] / now[2], then[2] / now[0])


def _unpaired(
    results: Mapping[str, Any], baseline: Mapping[str, Any], runner: str, batch: int | None,
    found: list[Mapping[str, Any]],
) -> Interval | None:  # fmt: skip
    """The same by the two medians; None when one has no interval. As above, the widest interval."""
    medians = []
    for of, row in zip((results, baseline), found, strict=True):
        samples = gate.valid_samples(row)
        pairs = whole_number(gate.only(rows(of, "speedup"), runner, batch)[0].get("pairs")) or 0
        one = gate.median_interval(samples, pairs) if samples else None
        if one is None:
            return None
        medians.append(one)
    now, then = medians
    return Interval(now.value / then.value, now.low / then.high, now.high / then.low)


def _size(results: Mapping[str, Any], baseline: Mapping[str, Any], tolerated: float) -> Gate:
    sizes = [section(section(of, "cost"), "onnx_bytes").get("after") for of in (results, baseline)]
    now, then = (whole_number(size) for size in sizes)
    if now is None or then is None or now < 1 or then < 1:
        why = "The size of an ONNX file was not measured. Export both models again."
        return gate.missing(GATES[2], 1 + tolerated, why)
    ratio, limit = now / then, 1 + tolerated
    said = f"The ONNX file has {now:,} bytes, the baseline's {then:,}: a ratio of {ratio:.3f} (exact, no "
    said += f"interval); the limit is {limit:g}."
    said += "" if ratio <= limit else " Prune more, or tolerate more: --tolerate size=..."
    return Gate(GATES[2], limit, ratio, None, None, gate.side(ratio <= limit), said)


def _against(found: Gate) -> Gate:
    said = f"Against the baseline: {found.message[:1].lower()}{found.message[1:]}"
    return Gate(found.name, found.limit, found.value, found.low, found.high, found.verdict, said)


def _gpus(machine: Mapping[str, Any]) -> list[tuple[Any, ...]]:
    return [tuple(gpu.get(key) for key in GPU) for gpu in rows(machine, "gpus")]


def _libraries(machine: Mapping[str, Any], runner: str) -> dict[str, Any]:
    """The versions of what the runner runs on: "torch" for torch_cuda, not torchvision."""
    family = runner.partition("_")[0]
    found = section(machine, "versions")
    return {
        name: v
        for name, v in found.items()
        if name == family or name.startswith((family + "-", family + "_"))
    }


def _sha256(results: Mapping[str, Any], name: str) -> str | None:
    listed = rows(section(results, "provenance"), "artifacts")
    return next((str(row["sha256"]) for row in listed if row.get("path") == name and row.get("sha256")), None)


def _said(value: Any) -> str:
    return visible(text(str(value) if value is not None else None, "not recorded"))
