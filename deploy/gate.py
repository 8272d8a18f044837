"""Gates: which numbers a release must reach, judged on intervals and never on missing data.

`judge` takes the results of a run and the limits, and gives one `Gate` per limit. A gate passes only when its
measurement is there, is finite and resolves the limit. What it cannot resolve is "inconclusive", and the
message says what would resolve it. Standard library only: a verdict needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Literal

from deploy.metric import metric_of
from deploy.values import (
    count,
    entries,
    metric_word,
    milliseconds,
    number,
    percent,
    points,
    rows,
    scientific,
    section,
    span,
    times,
    visible,
    whole_number,
)

Verdict = Literal["pass", "fail", "inconclusive"]
Overall = Literal["pass", "fail", "inconclusive", "no gates"]

Z95 = 1.959963984540054  # two-sided 95 % point of the normal distribution
MIN_PAIRS = 5  # fewer interleaved pairs cannot show how much the machine itself varies
RESOLUTION = 3.0  # an accuracy interval wider than ± 3 limits says nothing about the limit
MAX_BLOCKS = 200  # bounds the work; 200 stretches already place the median between ranks 43 % and 57 %
GATE_KEYS = ("target", "accuracy_drop", "metric_drop", "speedup", "latency_ms", "size_ratio", "parity")
NO_LIMIT = ("target", "parity")
OPTION_KEYS = ("runner", "batch")
DEFAULT_RUNNER = "onnxruntime"


@dataclass(frozen=True)
class Gate:
    """One judged limit, with the 95 % interval from ``low`` to ``high`` where there is one.

    ``target`` is 1 where it was reached and else 0, ``accuracy_drop`` is a fraction, ``metric_drop`` in
    the metric's own units, ``speedup`` and ``size_ratio`` are ratios, ``latency_ms`` is in milliseconds,
    ``parity`` is a relative error.
    """

    name: str
    limit: float | None
    value: float | None
    low: float | None
    high: float | None
    verdict: Verdict
    message: str


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval; ``low <= value <= high``."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        return (self.high - self.low) / 2


def judge(results: Mapping[str, Any], gates: Mapping[str, Any]) -> tuple[Gate, ...]:
    """One `Gate` for each limit set in ``gates`` (the config's section; None or False leaves a gate out).

    ``results`` is the content of results.json. Raises MeasureError for a gate that does not exist, or a
    limit that is no finite number.
    """
    unknown = sorted(str(key) for key in gates if key not in GATE_KEYS + OPTION_KEYS)
    if unknown:
        raise _error(f"there is no gate '{visible(unknown[0])}'", "use one of " + ", ".join(GATE_KEYS))
    judged = []
    for name in GATE_KEYS:
        limit = gates.get(name)
        if limit is None or limit is False:
            continue
        if name not in NO_LIMIT and number(limit) is None:
            raise _error(f"the limit of {name} is {visible(repr(limit))}", "give a finite number")
        judged.append(_judge_one(name, results, gates))
    return tuple(judged)


def verdict(gates: Sequence[Gate]) -> Overall:
    """The verdict over all gates: the worst one counts; "no gates" when there is none."""
    found = {gate.verdict for gate in gates}
    if not found:
        return "no gates"
    if "fail" in found:
        return "fail"
    return "pass" if found == {"pass"} else "inconclusive"


def exit_code(gates: Sequence[Gate]) -> int:
    """0 when every gate passes (or none was set), else 5: an inconclusive gate is no permission to ship."""
    return 0 if verdict(gates) in ("pass", "no gates") else 5


def accuracy_drop(results: Mapping[str, Any]) -> Interval | None:
    """How far the accuracy fell (a fraction; negative for a gain) with its interval; None if not measured, or
    if what was measured is no share of right answers.

    With flips, both models answered the same examples: the adjusted Wald interval of Bonett and Price (2012,
    doi:10.3102/1076998611411915) for paired proportions. It adds one to each flip count, so that it
    keeps an honest width when few or no examples flip. Without flips the two models are treated as
    independent, which is wider.
    """
    found = section(results, "accuracy")
    before, after = number(found.get("before")), number(found.get("after"))
    n = whole_number(found.get("n"))
    if before is None or after is None or n is None or n < 1 or not (0 <= before <= 1 and 0 <= after <= 1):
        return None
    if not metric_of(results).is_share:
        return None
    if found.get("flips") is None:
        return _independent(before, after, n)
    lost, gained = (whole_number(section(found, "flips").get(key)) for key in ("lost", "gained"))
    if lost is None or gained is None or min(lost, gained) < 0 or lost + gained > n:
        return None
    if abs((lost - gained) / n - (before - after)) > 0.5 / n + 1e-6:
        return None  # the flips contradict the accuracies: one of them is wrong
    return _paired(lost, gained, n)


def fall(results: Mapping[str, Any]) -> float | None:
    """How far the metric fell, in its own units; None where that was not measured or cannot be so."""
    if metric_of(results).is_share:
        drop = accuracy_drop(results)
        return None if drop is None else drop.value
    before, after = (number(section(results, "accuracy").get(key)) for key in ("before", "after"))
    return None if before is None or after is None else before - after


def untold(accuracy: Mapping[str, Any]) -> str:
    """Why the original's accuracy says nothing of what is lost, and what to look at; "" where it does say.

    What always giving the most frequent answer would get (``majority``, where it is known) has to lie below
    the 95 % interval of Wilson (1927, doi:10.1080/01621459.1927.10502953).
    """
    before, majority = number(accuracy.get("before")), number(accuracy.get("majority"))
    n = whole_number(accuracy.get("n"))
    if before is None or majority is None or n is None or n < 1 or not 0 <= before <= 1:
        return ""
    z, spread = Z95**2 / n, before * (1 - before) / n
    low = (before + z / 2 - math.sqrt(Z95**2 * spread + z**2 / 4)) / (1 + z)
    if low > majority:
        return ""
    said = f"the original's {percent(before)} on {n:,} examples cannot be told from always giving the most "
    said += f"frequent answer ({percent(majority)}): check model.weights, the order of the classes, "
    return said + "data.mean and data.std, or train it first"


def median_interval(samples_ms: Sequence[float], blocks: int) -> Interval | None:
    """The median with an interval that allows for drift: samples in time order, in ``blocks`` stretches.

    The interval runs between order statistics of the stretches' medians (binomial; no shape assumed), so
    neighbouring samples may depend on each other. None with fewer than 5 stretches; with exactly 5
    its coverage is 93.8 %.
    """
    n, k = len(samples_ms), min(blocks, len(samples_ms), MAX_BLOCKS)
    if k < MIN_PAIRS:
        return None
    middles = sorted(median(samples_ms[i * n // k : (i + 1) * n // k]) for i in range(k))
    rank, tail = 0, 1
    while (tail + math.comb(k, rank + 1)) / 2**k <= 0.025:
        rank += 1
        tail += math.comb(k, rank)
    value = median(samples_ms)
    return Interval(value, min(value, middles[rank]), max(value, middles[k - 1 - rank]))


def gated_batch(results: Mapping[str, Any], gates: Mapping[str, Any]) -> int | None:
    """The batch size that the speed gates judge: the config's, else the largest asked for or measured."""
    batch = whole_number(gates.get("batch"))
    if batch is not None:
        return batch
    asked = entries(section(section(section(results, "provenance"), "config"), "bench"), "batches")
    runner = gates.get("runner") or DEFAULT_RUNNER
    found = [row.get("batch") for row in rows(results, "latency") if row.get("runner") == runner]
    sizes = [whole_number(x) for x in [*asked, *found]]
    return max((size for size in sizes if size is not None), default=None)


def _judge_one(name: str, results: Mapping[str, Any], gates: Mapping[str, Any]) -> Gate:
    if name == "target":
        return _judge_target(results)
    if name == "parity":
        return _judge_parity(results)
    limit = float(gates[name])
    if name == "accuracy_drop":
        return judge_accuracy(results, limit, name, "raise gates.accuracy_drop")
    if name == "metric_drop":
        return judge_metric(results, limit, name, "raise gates.metric_drop")
    if name == "size_ratio":
        return _judge_size(results, limit)
    runner, batch = str(gates.get("runner") or DEFAULT_RUNNER), gated_batch(results, gates)
    return (_judge_speedup if name == "speedup" else _judge_latency)(results, limit, runner, batch)


def _judge_target(results: Mapping[str, Any]) -> Gate:
    pruning = section(results, "pruning")
    reached, why = pruning.get("reached"), visible(str(pruning.get("stop_reason") or "no reason is recorded"))
    if not isinstance(reached, bool):
        return missing("target", None, "Whether pruning reached its target is not recorded. Prune again.")
    if reached:
        return Gate("target", None, 1.0, None, None, "pass", f"{why[:1].upper()}{why[1:]}.")
    said = f"Pruning stopped short of its target: {why}. Ask for less, or set gates.target to false "
    return Gate("target", None, 0.0, None, None, "fail", said + "where less will do.")


def judge_accuracy(results: Mapping[str, Any], limit: float, name: str, advice_of: str) -> Gate:
    """The gate ``name`` over the drop in ``results``; ``advice_of`` ends a fail's message."""
    found, drop = section(results, "accuracy"), accuracy_drop(results)
    if drop is None:
        return missing(name, limit, _why_no_accuracy(found))
    said, advice = f"{_accuracy_words(found, drop)}; the limit is {points(limit)}.", ""
    if drop.high <= limit or drop.low > limit:  # the whole interval lies on one side
        decided = side(drop.high <= limit)
    elif drop.half_width > RESOLUTION * limit:
        decided, advice = "inconclusive", _more_examples(int(found["n"]), drop.half_width, limit)
    else:
        decided = side(drop.value <= limit + 1e-12)
    if decided == "fail":
        advice = f" Prune less, fine-tune longer, or {advice_of}."
    why = untold(found)
    if decided == "pass" and why:
        decided, advice = "inconclusive", f" But {why}."
    return Gate(name, limit, drop.value, drop.low, drop.high, decided, said + advice)


def judge_metric(results: Mapping[str, Any], limit: float, name: str, advice_of: str) -> Gate:
    """The gate ``name`` over the fall of a metric in its own units: one figure each, so without interval."""
    found, metric = section(results, "accuracy"), metric_of(results)
    before, after = number(found.get("before")), number(found.get("after"))
    if before is None or after is None:
        return missing(name, limit, _why_no_accuracy(found))
    drop = before - after
    verb = "falls" if drop > 0 else "rises"
    change = f"{verb} by {metric.change(abs(drop))}" if drop else "does not change"
    said = f"{visible(metric.title)} {change}, from {metric.form(before)} to {metric.form(after)} on "
    said += f"{count(found.get('n'))} examples (one figure each, no interval); the limit is "
    said += f"{metric.change(limit)}."
    decided = side(drop <= limit + 1e-12 * max(1.0, abs(before)))
    advice = "" if decided == "pass" else f" Prune less, fine-tune longer, or {advice_of}."
    return Gate(name, limit, drop, None, None, decided, said + advice)


def _judge_speedup(results: Mapping[str, Any], limit: float, runner: str, batch: int | None) -> Gate:
    where = f"{visible(runner)}, batch {batch}"
    row, why = only(rows(results, "speedup"), runner, batch)
    ratio, low, high = (number(row.get(key)) for key in ("ratio", "low", "high"))
    if ratio is None or low is None or high is None or low > high:
        why = why or f"The speed-up with {where} has no valid interval. Measure it again."
        return missing("speedup", limit, why)
    said = f"{times(ratio)} as fast with {where} (95 % interval {span(low, high, times)}); "
    said += f"the limit is {times(limit)}."
    pairs = whole_number(row.get("pairs")) or 0
    if pairs < MIN_PAIRS:
        decided: Verdict = "inconclusive"
        said += f" {pairs} interleaved pairs are too few: set bench.repeats to {MIN_PAIRS} or more."
    elif low >= limit or high < limit:
        decided = side(low >= limit)
    else:
        decided = "inconclusive"
        said += " The interval contains the limit: raise bench.repeats, quiet the machine, or lower"
        said += " gates.speedup."
    if decided == "fail":
        said += " Prune more, choose a larger batch, or lower gates.speedup."
    return Gate("speedup", limit, ratio, low, high, decided, said)


def _judge_latency(results: Mapping[str, Any], limit: float, runner: str, batch: int | None) -> Gate:
    where = f"{visible(runner)}, batch {batch}"
    dense = [row for row in rows(results, "latency") if row.get("model") == "dense"]
    row, why = only(dense, runner, batch)
    samples = valid_samples(row)
    if not samples:
        why = why or f"The latency with {where} has no valid samples. Measure it again."
        return missing("latency_ms", limit, why)
    pairs = whole_number(only(rows(results, "speedup"), runner, batch)[0].get("pairs")) or 0
    found = median_interval(samples, pairs)
    if found is None:
        said = (
            f"{len(samples)} samples in {pairs} interleaved pairs with {where} are too few for an interval: "
        )
        said += f"set bench.repeats to {MIN_PAIRS} or more and measure again."
        return Gate("latency_ms", limit, median(samples), None, None, "inconclusive", said)
    said = f"The median call takes {milliseconds(found.value)} with {where} (95 % interval "
    said += f"{span(found.low, found.high, milliseconds)}); the limit is {limit:g} ms."
    if found.high <= limit or found.low > limit:
        decided = side(found.high <= limit)
        said += "" if decided == "pass" else " Prune more, use a smaller batch, or raise gates.latency_ms."
    else:
        decided = "inconclusive"
        said += " The interval contains the limit: raise bench.repeats, quiet the machine, or raise"
        said += " gates.latency_ms."
    return Gate("latency_ms", limit, found.value, found.low, found.high, decided, said)


def _judge_size(results: Mapping[str, Any], limit: float) -> Gate:
    size = section(section(results, "cost"), "onnx_bytes")
    before, after = whole_number(size.get("before")), whole_number(size.get("after"))
    if before is None or after is None or before < 1 or after < 1:
        why = "The sizes of the two ONNX files were not measured. Export both models again."
        return missing("size_ratio", limit, why)
    ratio = after / before
    said = f"The ONNX file goes from {before:,} to {after:,} bytes, a ratio of {ratio:.3f} (exact, no "
    said += f"interval); the limit is {limit:g}." + (
        "" if ratio <= limit else " Prune more, or raise gates.size_ratio."
    )
    return Gate("size_ratio", limit, ratio, None, None, side(ratio <= limit), said)


def _judge_parity(results: Mapping[str, Any]) -> Gate:
    checks = rows(results, "parity")
    if not any(row.get("model") == "dense" for row in checks):
        why = "The pruned model's ONNX file was not compared with PyTorch. Run the parity check."
        return missing("parity", None, why)
    found = [(number(row.get("relative")), number(row.get("tolerance")), row) for row in checks]
    bad = [one for one in found if one[2].get("passed") is False or _above(one[0], one[1])]
    if bad:
        error, tolerance, row = bad[0]
        said = f"The {visible(str(row.get('model')))} model's ONNX file differs from PyTorch at batch "
        said += f"{visible(str(row.get('batch')))}: relative error {scientific(error)}, tolerance "
        said += f"{scientific(tolerance)} ({len(bad)} of {len(checks)} checks fail, no interval). "
        said += "Do not ship it; set another export.opset and compare again."
        return Gate("parity", tolerance, error, None, None, "fail", said)
    good = [(e, t) for e, t, row in found if e is not None and t is not None and row.get("passed") is True]
    if len(good) < len(checks):
        return missing("parity", None, "A parity check has no finite result. Run the parity check again.")
    error, tolerance = max(good, key=lambda pair: pair[0] / pair[1] if pair[1] > 0 else pair[0])
    said = f"ONNX and PyTorch agree in all {len(checks)} checks: relative error at most {scientific(error)}, "
    said += f"tolerance {scientific(tolerance)} (no interval)."
    return Gate("parity", tolerance, error, None, None, "pass", said)


def side(good: bool) -> Verdict:
    """Pass or fail, where the whole interval lies on one side of the limit."""
    return "pass" if good else "fail"


def _above(error: float | None, tolerance: float | None) -> bool:
    return error is not None and tolerance is not None and error > tolerance


def _paired(lost: int, gained: int, n: int) -> Interval:
    p_lost, p_gained = (lost + 1) / (n + 2), (gained + 1) / (n + 2)
    middle = p_lost - p_gained
    half = Z95 * math.sqrt((p_lost + p_gained - middle**2) / (n + 2))
    return _around((lost - gained) / n, middle - half, middle + half)


def _independent(before: float, after: float, n: int) -> Interval:
    # Agresti and Caffo (2000): one right and one wrong answer added to each model.
    p, q = (before * n + 1) / (n + 2), (after * n + 1) / (n + 2)
    half = Z95 * math.sqrt((p * (1 - p) + q * (1 - q)) / (n + 2))
    return _around(before - after, p - q - half, p - q + half)


def _around(value: float, low: float, high: float) -> Interval:
    """The interval cut to what a difference of two shares can be, and holding its value."""
    return Interval(value, max(-1.0, min(value, low)), min(1.0, max(value, high)))


def valid_samples(row: Mapping[str, Any]) -> list[float]:
    """A row's samples in milliseconds; empty when any of them is no valid time."""
    found = [number(x) for x in entries(row, "samples_ms")]
    good = [x for x in found if x is not None and x > 0]
    return good if len(good) == len(found) else []


def only(found: list[Mapping[str, Any]], runner: str, batch: int | None) -> tuple[Mapping[str, Any], str]:
    """The one row of a runner and batch, or an empty row and the reason why there is none."""
    fitting = [row for row in found if row.get("runner") == runner and row.get("batch") == batch]
    if len(fitting) == 1 and batch is not None:
        return fitting[0], ""
    where = f"runner {visible(runner)}" + ("" if batch is None else f" and batch {batch}")
    if len(fitting) > 1:
        return {}, f"{len(fitting)} measurements claim to be those of {where}. Measure again."
    return {}, f"No measurement with {where}. Add them to bench.runners and bench.batches, and measure."


def _accuracy_words(found: Mapping[str, Any], drop: Interval) -> str:
    metric, flips = visible(metric_word(found.get("metric"))), section(found, "flips")
    verb = "falls" if drop.value > 0 else "rises"
    change = "does not change" if drop.value == 0 else f"{verb} by {points(abs(drop.value))}"
    pairing = f"{flips['lost']:,} answers lost, {flips['gained']:,} gained" if flips else "not paired"
    width = f"95 % interval of the drop {span(drop.low, drop.high, points)}"
    return f"{metric[:1].upper()}{metric[1:]} {change} on {found['n']:,} examples ({width}; {pairing})"


def _more_examples(n: int, half_width: float, limit: float) -> str:
    enough = points(math.ceil(1e4 * half_width / RESOLUTION) / 1e4)
    if limit <= half_width * 1e-4:
        return f" No test set of a usual size resolves it: use a limit of {enough} or more."
    needed = math.ceil(n * (half_width / (RESOLUTION * limit)) ** 2)
    return f" {n:,} examples are too few for this limit: use about {needed:,}, or a limit of {enough}."


def _why_no_accuracy(found: Mapping[str, Any]) -> str:
    if number(found.get("before")) is None or number(found.get("after")) is None:
        return "The accuracy before and after was not measured. Evaluate both models on the test set."
    if found.get("share") is False:
        what = visible(metric_of({"accuracy": found}).title)
        said = f"{what} is no share of right answers, so its fall has no interval: set gates.metric_drop, "
        return said + "in its own units, in place of gates.accuracy_drop."
    if whole_number(found.get("n")) is None:
        return "The number of test examples is missing, so there is no interval. Evaluate both models again."
    said = "The accuracies, the number of examples and the flips contradict each other (an accuracy is a "
    said += "share of right answers; lost minus gained flips is the drop). Evaluate both models again."
    return said


def missing(name: str, limit: float | None, why: str) -> Gate:
    """What was not measured is inconclusive."""
    return Gate(name, limit, None, None, None, "inconclusive", why)


def _error(what: str, fix: str) -> Exception:
    from deploy.errors import MeasureError  # only where it is needed

    return MeasureError(what, "gates", fix)
