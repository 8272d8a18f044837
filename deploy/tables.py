"""The tables and facts of the report: results.json turned into texts, for both renderings.

Nothing here escapes markup: each rendering has one sink that does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deploy import gate
from deploy.metric import metric_of
from deploy.values import (
    NBSP,
    count,
    entries,
    measured,
    milliseconds,
    number,
    percent,
    points,
    rows,
    scientific,
    section,
    significant,
    span,
    text,
    thinned,
    times,
    whole_number,
)

NOT_MEASURED = "not measured"
NOT_RECORDED = "not recorded"
GATE_LABELS = {
    "target": "Pruning target",
    "accuracy_drop": "Accuracy drop",
    "metric_drop": "Drop of the metric",
    "speedup": "Speed-up",
    "latency_ms": "Latency p50",
    "size_ratio": "ONNX size ratio",
    "parity": "ONNX agrees with PyTorch",
    "baseline": "Baseline",
    "baseline_accuracy": "Accuracy drop since the baseline",
    "baseline_latency": "Latency p50 over the baseline's",
    "baseline_size": "ONNX size over the baseline's",
}
GATE_FORMS: dict[str, Callable[[float], str]] = {
    "target": lambda value: "reached" if value else "missed",
    "accuracy_drop": points,
    "speedup": times,
    "latency_ms": milliseconds,
    "size_ratio": significant,
    "parity": scientific,
    "baseline_accuracy": points,
    "baseline_latency": times,
}
COSTS = (("macs", "MACs"), ("params", "Parameters"), ("onnx_bytes", "ONNX file, bytes"))
LISTED_NAMES = 4


@dataclass(frozen=True)
class Table:
    """Texts in rows. ``kinds`` has a letter per column: t text, c code, r number, v verdict, m share kept.

    ``evenly``: of too many rows keep an even selection (a history) instead of the first ones.
    """

    headers: tuple[str, ...]
    kinds: str
    rows: tuple[tuple[str, ...], ...]
    evenly: bool = False

    def cut(self, most: int) -> Table:
        """The table with at most ``most`` rows."""
        chosen = thinned(len(self.rows), most) if self.evenly else range(min(most, len(self.rows)))
        return Table(self.headers, self.kinds, tuple(self.rows[i] for i in chosen), self.evenly)


def gate_label(row: Mapping[str, Any]) -> str:
    """What a gate is called on the page."""
    name = text(row.get("name"), "unnamed gate")
    return GATE_LABELS.get(name, name)


def gate_verdict(row: Mapping[str, Any]) -> str:
    """A gate's verdict; whatever is neither pass nor fail is inconclusive."""
    found = row.get("verdict")
    return str(found) if found in ("pass", "fail") else "inconclusive"


def interval(row: Mapping[str, Any], form: Callable[[float], str]) -> str:
    """The 95 % interval of a row, or "none"."""
    low, high = number(row.get("low")), number(row.get("high"))
    return "none" if low is None or high is None else span(low, high, form)


def model_word(row: Mapping[str, Any]) -> str:
    """The page calls the dense model what it is to the reader: the pruned one."""
    return "pruned" if row.get("model") == "dense" else text(row.get("model"))


def gates(results: Mapping[str, Any]) -> Table:
    """One row per gate, the message last."""
    body = []
    for row in rows(results, "gates"):
        name = str(row.get("name"))
        form = GATE_FORMS.get(name, significant)
        value, limit = measured(row.get("value"), form), number(row.get("limit"))
        bound = ("≥" if name == "speedup" else "≤") + NBSP
        shown = (value, interval(row, form), "none" if limit is None else bound + form(limit))
        body.append((gate_label(row), gate_verdict(row), *shown, text(row.get("message"))))
    headers = ("Gate", "Verdict", "Measured", "95 % interval", "Limit", "In words")
    return Table(headers, "tvrrrt", tuple(body))


def summary(results: Mapping[str, Any]) -> Table:
    """Original against pruned, one quantity per row."""
    body = [*_accuracy_rows(results)]
    cost = section(results, "cost")
    body += [_pair(label, section(cost, key), "before", "after") for key, label in COSTS]
    units = section(section(results, "pruning"), "units")
    body.append(_pair("Prunable units", units, "total", "kept"))
    speed = headline_speedup(results)
    runner, batch = (None, None) if speed is None else (speed.get("runner"), speed.get("batch"))
    found = [r for r in rows(results, "latency") if (r.get("runner"), r.get("batch")) == (runner, batch)]
    pair = {row.get("model"): row for row in found}
    where = f"{runner}, batch {batch}" if pair else ""
    for key, label in (("median", "Latency p50"), ("p99", "Latency p99")):
        both = [number(pair.get(model, {}).get(key)) for model in ("original", "dense")]
        body.append(_floats(f"{label} ({where})" if where else label, both[0], both[1]))
    memory = number(cost.get("peak_rss_bytes"))
    if memory is not None:
        body.append(("Peak memory of the run, bytes", "", f"{memory:,.0f}", "", ""))
    return Table(("", "Original", "Pruned", "Change", "Kept"), "trrrm", tuple(body))


def speedups(results: Mapping[str, Any]) -> Table:
    """Every measured speed-up."""
    body = []
    for row in rows(results, "speedup"):
        where = (text(row.get("runner")), text(row.get("batch")))
        found = (measured(row.get("ratio"), times), interval(row, times), text(row.get("pairs")))
        body.append((*where, *found, text(row.get("verdict"))))
    headers = ("Runner", "Batch", "Speed-up", "95 % interval", "Pairs", "The pruned model is")
    return Table(headers, "crrrrt", tuple(body))


def overall(results: Mapping[str, Any]) -> Table:
    """The pruned model in the target's precision against the original in fp32; empty in fp32."""
    body = []
    for row in rows(results, "overall"):
        where = (text(row.get("runner")), text(row.get("batch")), text(row.get("precision")))
        found = (measured(row.get("ratio"), times), interval(row, times), text(row.get("verdict")))
        body.append((*where, *found))
    return Table(
        ("Runner", "Batch", "Precision", "Speed-up", "95 % interval", "It is"), "crtrrt", tuple(body)
    )


def precisions(results: Mapping[str, Any]) -> Table:
    """Every variant of both models, measured on real data; last those that only other targets timed."""
    chosen, own = section(section(results, "choice"), "why"), rows(results, "variants")
    apart = {
        text(row.get("file")): row for found in rows(results, "others") for row in rows(found, "variants")
    }
    for row in own:
        apart.pop(text(row.get("file")), None)
    body = [_variant(row, chosen if row.get("model") == "dense" else {}) for row in own]
    body += [_variant(row, {}) for row in apart.values()]
    headers = ("File", "Model", "Precision", "Bytes", "Accuracy", "Largest error", "Same top-1", "Converted")
    return Table((*headers, "Kept in fp32", "Remark"), "cttrrrrrtt", tuple(body))


def _variant(row: Mapping[str, Any], why: Mapping[str, Any]) -> tuple[str, ...]:
    found = section(row, "accuracy")
    kept = "; ".join(f"{count(n)}: {reason}" for reason, n in section(row, "why_kept").items())
    return (
        text(row.get("file")), model_word(row), text(row.get("precision")), count(row.get("bytes")),
        measured(found.get("value"), percent), measured(row.get("relative"), scientific),
        measured(row.get("agreement"), percent), text(row.get("nodes_low")), kept or "none",
        text(row.get("failure"), text(why.get(str(row.get("precision"))), "")),
    )  # fmt: skip


def targets(results: Mapping[str, Any]) -> Table:
    """Every speed-up on every target: the config's, then those measured apart; empty without such."""
    apart = rows(results, "others")
    machine = section(section(results, "provenance"), "machine")
    body = []
    for found in [{**results, "machine": machine}, *apart] if apart else []:
        target = section(found, "target")
        head = (text(target.get("name")), _device(section(found, "machine")), text(target.get("precision")))
        medians = {
            tuple(text(row.get(key)) for key in ("runner", "batch", "model")): row.get("median")
            for row in rows(found, "latency")
        }
        for row in rows(found, "speedup"):
            place = text(row.get("runner")), text(row.get("batch"))
            both = (measured(medians.get((*place, name)), milliseconds) for name in ("original", "dense"))
            ratio = (measured(row.get("ratio"), times), interval(row, times), text(row.get("verdict")))
            body.append((*head, *place, *both, *ratio))
    headers = ("Target", "Machine", "Precision", "Runner", "Batch", "Original p50", "Pruned p50", "Speed-up")
    return Table((*headers, "95 % interval", "The pruned model is"), "cttcrrrrrt", tuple(body))


def _device(machine: Mapping[str, Any]) -> str:
    """The first GPU's name, else the CPU's."""
    gpus = rows(machine, "gpus")
    return text(gpus[0].get("name") if gpus else machine.get("cpu"))


def latency(results: Mapping[str, Any]) -> Table:
    """Percentiles of every measurement, in milliseconds."""
    keys = ("min", "median", "mean", "p90", "p95", "p99", "max")
    body = []
    for row in latency_rows(results):
        head = (text(row.get("runner")), text(row.get("batch")), model_word(row))
        spread = measured(row.get("cv"), lambda value: percent(value, 1))
        ends = (measured(row.get("throughput_per_s")), measured(row.get("first_ms")))
        samples = len(entries(row, "samples_ms"))
        notes = (f"{samples:,}", text(row.get("threads")), str(len(entries(row, "warnings")) or "none"))
        body.append((*head, *(measured(row.get(key)) for key in keys), spread, *ends, *notes))
    times = ("min", "p50", "mean", "p90", "p95", "p99", "max", "CV")
    rest = ("Per second", "First call", "Samples", "Threads", "Warnings")
    return Table(("Runner", "Batch", "Model", *times, *rest), "crt" + "r" * 13, tuple(body))


def latency_rows(results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The latency rows by runner (in the file's order) and batch, the original first."""
    found = rows(results, "latency")
    order = list(dict.fromkeys(str(row.get("runner")) for row in found))

    def place(row: Mapping[str, Any]) -> tuple[int, int, bool]:
        batch = whole_number(row.get("batch")) or 0
        return order.index(str(row.get("runner"))), batch, row.get("model") != "original"

    return sorted(found, key=place)


def latency_warnings(results: Mapping[str, Any]) -> list[str]:
    """Each warning with the measurement it belongs to."""
    return [
        f"{text(row.get('runner'))}, batch {text(row.get('batch'))}, {model_word(row)}: {warning}"
        for row in latency_rows(results)
        for warning in entries(row, "warnings")
    ]


def parity(results: Mapping[str, Any]) -> Table:
    """ONNX against PyTorch, per model and batch."""
    body = []
    for row in rows(results, "parity"):
        errors = [scientific(number(row.get(key))) for key in ("max_abs", "relative", "tolerance")]
        agreement = measured(row.get("argmax_agreement"), percent)
        word = "pass" if row.get("passed") is True else "fail"
        body.append((model_word(row), text(row.get("batch")), *errors, agreement, word))
    headers = ("Model", "Batch", "Largest error", "Relative error", "Tolerance", "Same top class", "Verdict")
    return Table(headers, "trrrrrv", tuple(body))


def layers(results: Mapping[str, Any]) -> Table:
    """Channels and MACs of each layer."""
    body = []
    for row in rows(results, "layers"):
        before, after = whole_number(row.get("before")), whole_number(row.get("after"))
        kept = "" if before is None or after is None or before < 1 else percent(after / before, 1)
        channels = [count(row.get(key)) for key in ("before", "after")]
        macs = [count(row.get(key)) for key in ("macs_before", "macs_after")]
        note = "pinned" if row.get("pinned") else ""
        body.append((text(row.get("name")), text(row.get("kind")), *channels, kept, *macs, note))
    headers = ("Layer", "Kind", "Channels before", "After", "Kept", "MACs before", "After", "Pinned")
    return Table(headers, "ctrrmrrt", tuple(body))


def pruning_history(results: Mapping[str, Any]) -> Table:
    """The numbers behind the pruning chart."""
    body, history = [], rows(section(results, "pruning"), "history")
    kept = {"macs_ratio": "MACs kept", "params_ratio": "Parameters kept"}
    asked = {
        "latency_ratio": "Latency kept, predicted",
        "energy_ratio": "Energy kept, predicted",
        "memory_ratio": "Peak activations kept",
    }
    kept |= {key: said for key, said in asked.items() if any(row.get(key) is not None for row in history)}
    for row in history:
        counts = [count(row.get(key)) for key in ("step", "minibatches", "units_kept")]
        shares = [measured(row.get(key), percent) for key in kept]
        value = measured(row.get("accuracy"), metric_of(results).form)
        body.append((*counts, *shares, measured(row.get("loss")), value))
    headers = ("Step", "Minibatches", "Units kept", *kept.values(), "Loss", _measure(results))
    return Table(headers, "r" * len(headers), tuple(body), evenly=True)


def epochs(results: Mapping[str, Any], stage: str) -> Table:
    """The numbers behind the chart of ``stage`` ("train" or "finetune")."""
    found = section(results, stage)
    body = []
    for row in rows(found, "history"):
        epoch = row.get("epoch")
        losses = [measured(row.get(key)) for key in ("loss", "validation_loss")]
        value = measured(row.get("validation"), metric_of(results).form)
        ends = (measured(row.get("lr"), lambda rate: f"{rate:.3g}"), measured(row.get("seconds")))
        best = "best" if epoch is not None and epoch == found.get("best_epoch") else ""
        body.append((count(epoch), *losses, value, *ends, best))
    value = f"Validation {_measure(results).lower()}"
    headers = ("Epoch", "Training loss", "Validation loss", value, "Learning rate")
    return Table((*headers, "Seconds", "Chosen"), "rrrrrrt", tuple(body), evenly=True)


def pinned(results: Mapping[str, Any]) -> Table:
    """What could not be pruned, why, and the source line that says so."""
    body = []
    for row in rows(results, "pinned"):
        names = [str(name) for name in entries(row, "parameters")]
        more = len(names) - LISTED_NAMES
        listed = ", ".join(names[:LISTED_NAMES]) + (f" and {more} more" if more > 0 else "")
        texts = [text(row.get(key), "not known") for key in ("reason", "op", "source")]
        body.append((count(row.get("channels")), *texts, listed or "none"))
    return Table(("Channels", "Why", "Operation", "Source", "Parameters"), "rtccc", tuple(body))


def artifacts(results: Mapping[str, Any]) -> Table:
    """Every file of the release with its size and sha256."""
    body = []
    for row in rows(section(results, "provenance"), "artifacts"):
        body.append((text(row.get("path")), count(row.get("bytes")), text(row.get("sha256"))))
    return Table(("File", "Bytes", "sha256"), "crc", tuple(body))


def flat(title: str, found: Mapping[str, Any]) -> Table:
    """A nested mapping as rows of dotted name and value."""
    return Table((title, "Value"), "tt", tuple(_flat(found, "", 0)))


def facts(results: Mapping[str, Any]) -> Table:
    """What was compressed, with which data and seed."""
    model, data, provenance = (section(results, key) for key in ("model", "data", "provenance"))
    shape = model.get("input_shape")
    sizes = ", ".join(f"{count(data.get(key))} {key}" for key in ("train", "validation", "test"))
    body = (
        ("Model", text(model.get("name"), NOT_RECORDED)),
        (
            "Input, without the batch",
            " × ".join(map(str, shape)) if isinstance(shape, list) else NOT_RECORDED,
        ),
        ("Data", f"{text(data.get('name'))} ({sizes})" if data else NOT_RECORDED),
        ("Data fingerprint", text(data.get("fingerprint"), NOT_RECORDED)),
        ("Recipe", text(section(provenance, "config").get("recipe"), "none")),
        ("Seed", text(provenance.get("seed"), NOT_RECORDED)),
        ("Commit", text(provenance.get("commit"), "none: not in a git checkout")),
        ("Created", text(results.get("created"), NOT_RECORDED)),
    )
    return Table(("Fact", "Value"), "tt", body)


def pruning_facts(results: Mapping[str, Any]) -> str:
    """How the pruning was done and why it stopped."""
    found = section(results, "pruning")
    if not found:
        return NOT_MEASURED
    target, units = section(found, "target"), section(found, "units")
    reached = "reached" if found.get("reached") is True else "not reached"
    said = f"Criterion: {text(found.get('criterion'))}. Target: {text(target.get('kind'))} "
    said += f"{text(target.get('value'))}, {reached} ({text(found.get('stop_reason'))}). Channel counts are "
    said += f"multiples of {text(found.get('align'))}. {count(units.get('kept'))} of "
    said += (
        f"{count(units.get('total'))} units stay, {count(units.get('pinned_channels'))} channels are pinned. "
    )
    return said + f"Pruning took {measured(found.get('seconds'))} s."


def verification(results: Mapping[str, Any]) -> tuple[str, str]:
    """Verdict and sentence: does the pruned model compute what the masked original computes?"""
    found = section(results, "verification")
    return _proof(found) if found else ("", NOT_MEASURED)


def _proof(found: Mapping[str, Any]) -> tuple[str, str]:
    error, tolerance = scientific(number(found.get("relative_error"))), number(found.get("tolerance"))
    said = f"The relative error is {error} in {text(found.get('dtype'))}; the tolerance is "
    moved = number(found.get("movement"))
    effect = "changes how many results there are"
    if moved is not None:
        effect = f"moves the output by {_three(moved)} of its size"
    said += f"{scientific(tolerance)}. Masking {effect}"
    if found.get("passed") is True and found.get("inexact"):
        because = f"Pruning through norms was asked for: {text(found['inexact'])}"
        return "inconclusive", f"{said}. {because}. The difference is what that costs before training."
    if found.get("passed") is True:
        return "pass", f"{said}, so the check is not empty."
    return "fail", f"{said}. The pruned model is not the model that was chosen. Do not ship it."


def around(results: Mapping[str, Any]) -> tuple[str, str]:
    """The same for the whole model around the pruned part; two empty texts where all of it is pruned."""
    if not section(results, "whole"):
        return "", ""
    state, said = _proof(section(results, "whole"))
    parts = ", ".join(map(text, entries(section(results, "model"), "parts")))
    return state, f"The whole model around {parts or 'the part'}: {said[0].lower()}{said[1:]}"


def headline_speedup(results: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The speed-up that the gates judge, else the one at the largest batch; None without a valid interval."""
    wanted = section(section(section(results, "provenance"), "config"), "gates")
    runner, batch = wanted.get("runner") or gate.DEFAULT_RUNNER, gate.gated_batch(results, wanted)

    def place(row: Mapping[str, Any]) -> tuple[bool, bool, int]:
        same = row.get("runner") == runner
        return same and row.get("batch") == batch, same, whole_number(row.get("batch")) or 0

    keys = ("ratio", "low", "high")
    good = [row for row in rows(results, "speedup") if all(number(row.get(key)) is not None for key in keys)]
    return max(good, key=place, default=None)


def _measure(results: Mapping[str, Any]) -> str:
    return "Accuracy" if metric_of(results).is_share else "Metric"


def _accuracy_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    found, metric = section(results, "accuracy"), metric_of(results)
    before, after, between = (number(found.get(key)) for key in ("before", "after", "pruned"))
    if before is None or after is None:
        return [("Accuracy", NOT_MEASURED, NOT_MEASURED, "", "")]
    label, form = f"{metric.title} ({text(found.get('split'))} set)", metric.form
    body: list[tuple[str, ...]] = [
        (label, form(before), form(after), metric.change(after - before, signed=True), "")
    ]
    if between is not None:
        change = metric.change(between - before, signed=True)
        body.append(("The same before fine-tuning", form(before), form(between), change, ""))
    return body


def _three(value: object) -> str:
    return measured(value, lambda found: significant(found, 3))


def _pair(label: str, pair: Mapping[str, Any], first: str, second: str) -> tuple[str, ...]:
    before, after = whole_number(pair.get(first)), whole_number(pair.get(second))
    if before is None or after is None or before < 1:
        return (label, NOT_MEASURED, NOT_MEASURED, "", "")
    change = ("+" if after > before else "") + count(after - before)
    return (label, count(before), count(after), change, percent(after / before, 1))


def _floats(label: str, before: float | None, after: float | None) -> tuple[str, ...]:
    if before is None or after is None or before <= 0:
        return (label, NOT_MEASURED, NOT_MEASURED, "", "")
    change = ("+" if after > before else "") + milliseconds(after - before)
    return (label, milliseconds(before), milliseconds(after), change, percent(after / before, 1))


def _flat(found: Mapping[str, Any], prefix: str, depth: int) -> list[tuple[str, str]]:
    body: list[tuple[str, str]] = []
    for key, value in found.items():
        if isinstance(value, Mapping) and depth < 8:
            body += _flat(value, f"{prefix}{key}.", depth + 1)
        elif isinstance(value, list | tuple):
            body.append((f"{prefix}{key}", ", ".join(map(str, value)) or "none"))
        else:
            body.append((f"{prefix}{key}", text(value, "none")))
    return body
