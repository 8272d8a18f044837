"""The figures of a run as OpenMetrics text (version 1.0.0), which GitLab and Prometheus read.

Every family has HELP, TYPE and, where there is one, UNIT; what was not measured has no sample. No time
stamps: a server adds its own. Standard library only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from deploy import gate, tables
from deploy.metric import metric_of
from deploy.values import number, rows, section, text, visible

VERDICTS = ("pass", "fail", "inconclusive", "no gates")
MODELS = (("before", "original"), ("after", "pruned"))
COSTS = {
    "macs": ("compress_macs", "", "Multiply-accumulate operations per example."),
    "params": ("compress_parameters", "", "Parameters of the model."),
    "onnx_bytes": ("compress_onnx_bytes", "bytes", "Size of the ONNX file."),
}
PERCENTILES = ("median", "p90", "p99")
Sample = tuple[Mapping[str, object], float | None]


@dataclass(frozen=True)
class Family:
    """One metric family: samples are (labels, value); those without a value are left out."""

    name: str
    kind: str
    unit: str
    about: str
    samples: Iterable[Sample]


def render(results: Mapping[str, Any]) -> str:
    """The content of results.json as one exposition, ``# EOF`` last."""
    families = (_release(results), _verdict(results), *_gates(results), *_costs(results), *_accuracy(results))
    return "".join(map(_family, (*families, *_speeds(results)))) + "# EOF\n"


def _release(results: Mapping[str, Any]) -> Family:
    labels = {
        "model": text(section(results, "model").get("name"), "unknown"),
        "data": text(section(results, "data").get("name"), "unknown"),
        "commit": text(section(results, "provenance").get("commit"), "unknown"),
    }
    return Family("compress_release", "info", "", "What was measured.", [(labels, 1.0)])


def _verdict(results: Mapping[str, Any]) -> Family:
    found = text(results.get("verdict"), "no gates")
    samples = [({"compress_verdict": word}, float(word == found)) for word in VERDICTS]
    return Family("compress_verdict", "stateset", "", "The verdict over all gates.", samples)


def _gates(results: Mapping[str, Any]) -> list[Family]:
    named = [
        ({"gate": text(row.get("name"), "unnamed")}, row) for row in _once(rows(results, "gates"), ("name",))
    ]
    passed = [(labels, float(tables.gate_verdict(row) == "pass")) for labels, row in named]
    found = [Family("compress_gate_passed", "gauge", "", "1 for a gate that passes, else 0.", passed)]
    for key in ("value", "low", "high", "limit"):
        about = f"The {key} of a gate, in the unit of its name (accuracy as a share)."
        samples = [(labels, number(row.get(key))) for labels, row in named]
        found.append(Family(f"compress_gate_{key}", "gauge", "", about, samples))
    return found


def _costs(results: Mapping[str, Any]) -> list[Family]:
    cost = section(results, "cost")
    return [
        Family(
            name, "gauge", unit, about, [({"model": m}, number(section(cost, key).get(w))) for w, m in MODELS]
        )
        for key, (name, unit, about) in COSTS.items()
    ]


def _accuracy(results: Mapping[str, Any]) -> list[Family]:
    found, drop = section(results, "accuracy"), gate.accuracy_drop(results)
    metric = text(found.get("metric"), "unknown")
    is_share = metric_of(results).is_share
    name, unit = ("compress_accuracy_ratio", "ratio") if is_share else ("compress_metric", "")
    samples = [({"model": m, "metric": metric}, number(found.get(which))) for which, m in MODELS]
    ends = [] if drop is None else [(end, getattr(drop, end)) for end in ("low", "value", "high")]
    fell = [({"metric": metric, "end": end}, value) for end, value in ends]
    about = "How far the metric fell, with its 95 % interval from low to high."
    return [
        Family(name, "gauge", unit, "The metric on the test data.", samples),
        Family("compress_accuracy_drop_ratio", "gauge", "ratio", about, fell),
    ]


def _speeds(results: Mapping[str, Any]) -> list[Family]:
    speed = [
        ({**_where(row), "end": end}, number(row.get(key)))
        for row in _once(rows(results, "speedup"), WHERE)
        for end, key in (("low", "low"), ("value", "ratio"), ("high", "high"))
    ]
    calls = [
        ({**_where(row), "model": tables.model_word(row), "statistic": key}, _seconds(row.get(key)))
        for row in _once(rows(results, "latency"), (*WHERE, "model"))
        for key in PERCENTILES
    ]
    about = "Latency of the original over that of the pruned model, with its 95 % interval from low to high."
    return [
        Family("compress_speedup_ratio", "gauge", "ratio", about, speed),
        Family("compress_latency_seconds", "gauge", "seconds", "Time of one call.", calls),
    ]


WHERE = ("target", "runner", "precision", "batch", "threads")


def _where(row: Mapping[str, Any]) -> dict[str, object]:
    return {key: row[key] for key in WHERE if row.get(key) is not None}


def _once(found: list[Mapping[str, Any]], keys: tuple[str, ...]) -> list[Mapping[str, Any]]:
    """The first row of each place: a sample that is there twice would make the whole text invalid."""
    places = {tuple(str(row.get(key)) for key in keys): row for row in reversed(found)}
    return list(reversed(places.values()))


def _seconds(value: object) -> float | None:
    found = number(value)
    return None if found is None else found / 1e3


def _family(family: Family) -> str:
    suffix = "_info" if family.kind == "info" else ""
    lines = [f"# TYPE {family.name} {family.kind}"]
    lines += [f"# UNIT {family.name} {family.unit}"] if family.unit else []
    lines.append(f"# HELP {family.name} {family.about}")
    lines += [
        f"{family.name}{suffix}{_labels(labels)} {value!r}"
        for labels, value in family.samples
        if value is not None
    ]
    return "\n".join(lines) + "\n"


def _labels(labels: Mapping[str, object]) -> str:
    return "{" + ",".join(f'{name}="{_escaped(str(value))}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    """A label's value: on one printable line, then as the format escapes it (backslash and quote)."""
    return visible(value).replace("\\", "\\\\").replace('"', '\\"')
