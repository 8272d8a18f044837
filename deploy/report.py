"""The report: results.json as one page that convinces, or warns, a colleague; and a short Markdown version.

`render` is a pure function of the results: the same results give the same bytes. The page holds everything it
needs (no script, no network, a strict content security policy). Whatever was not measured is said to be so.
Every text passes one sink per format, which escapes control characters and markup.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy import budget_view, charts, gate, profile_view, streams_view, tables
from deploy.metric import metric_of
from deploy.tables import NOT_MEASURED, NOT_RECORDED
from deploy.values import (
    entries,
    percent,
    points,
    rows,
    section,
    shortened,
    span,
    text,
    times,
    visible,
    whole_number,
)

if TYPE_CHECKING:
    from jinja2 import Environment

SCHEMA_VERSION = 1
HTML_BYTES = 500 * 1024
MARKDOWN_BYTES = 60_000  # a comment on GitHub holds 65,536 characters
# Most rows of a table and most characters of a text: the next pair is tried when the result is too large.
HTML_LIMITS = ((400, 400), (120, 160), (24, 60))
MARKDOWN_LIMITS = ((150, 300), (30, 120), (8, 50))
BLOCK = 40  # a block of config or command may be this many times longer than a text
WORDS = {"pass": "PASS", "fail": "FAIL", "inconclusive": "INCONCLUSIVE", "no gates": "NO GATES"}
NOUNS = {"macs": "MACs", "params": "parameters", "onnx_bytes": "ONNX bytes"}
PLAIN = re.compile(r"[A-Za-z0-9 _.,:;/\-+=()\[\]{}'\"*#?!~^%$×·…]+")


@dataclass(frozen=True)
class Report:
    """The two renderings: ``html`` is a whole page under 500 KiB, ``markdown`` fits a job summary."""

    html: str
    markdown: str


def render(results: Mapping[str, Any]) -> Report:
    """Both renderings of the content of results.json.

    Raises MeasureError when the results were written in another version of the format.
    """
    _check_version(results)
    page = view(results) | {"charts": _charts(results)}
    return Report(
        html=_fitting("report.html.j2", page, HTML_LIMITS, HTML_BYTES), markdown=render_markdown(results)
    )


def render_markdown(
    results: Mapping[str, Any],
    limits: Sequence[tuple[int, int]] = MARKDOWN_LIMITS,
    most: int = MARKDOWN_BYTES,
) -> str:
    """The Markdown alone, without charts, with the widest ``limits`` that keep it within ``most`` bytes.

    Raises MeasureError as `render` does.
    """
    _check_version(results)
    return _fitting("report.md.j2", view(results), limits, most)


def _check_version(results: Mapping[str, Any]) -> None:
    if results.get("schema_version") != SCHEMA_VERSION:
        from deploy.errors import MeasureError  # only where it is needed

        what = f"schema_version is {results.get('schema_version')!r}, this release reads {SCHEMA_VERSION}"
        raise MeasureError(what, "results.json", "write the results again with this release")


def view(results: Mapping[str, Any]) -> dict[str, Any]:
    """Everything the templates say, as plain texts and tables."""
    gates, provenance = rows(results, "gates"), section(results, "provenance")
    profile = section(results, "profile")
    budget = section(section(results, "pruning"), "budget")
    verdict = _verdict(gates)
    config = provenance.get("config")
    return {
        "verdict": verdict,
        "word": WORDS[verdict],
        "lead": _lead(results),
        "gate_line": _gate_line(gates),
        "tiles": _tiles(results),
        "notes": _notes(results, verdict),
        "model": text(section(results, "model").get("name")),
        "data": text(section(results, "data").get("name")),
        "created": text(results.get("created")),
        "command": text(results.get("command"), NOT_RECORDED),
        "gates": tables.gates(results),
        "summary": tables.summary(results),
        "speedups": tables.speedups(results),
        "overall": tables.overall(results),
        "precisions": tables.precisions(results),
        "targets": tables.targets(results),
        "streams": streams_view.table(results),
        "profile": profile_view.table(profile) if profile else None,
        "profile_said": profile_view.sentences(profile) if profile else [],
        "latency": tables.latency(results),
        "warnings": tables.latency_warnings(results),
        "parity": tables.parity(results),
        "verification": tables.verification(results),
        "around": tables.around(results),
        "layers": tables.layers(results),
        "thinnest": _thinnest(results),
        "pruning": " ".join([tables.pruning_facts(results), *budget_view.memory_said(budget)]),
        "pruning_history": tables.pruning_history(results),
        "budget": budget_view.table(budget),
        "budget_said": budget_view.sentences(budget),
        "stages": [
            (name, title, tables.epochs(results, name))
            for name, title in (("train", "Training before pruning"), ("finetune", "Fine-tuning"))
            if name == "finetune" or results.get(name)
        ],
        "pinned": tables.pinned(results),
        "unreached": [str(name) for name in entries(results, "unreached")],
        "folded": [str(name) for name in entries(results, "folded")],
        "facts": tables.facts(results),
        "artifacts": tables.artifacts(results),
        "versions": tables.flat("Package", section(provenance, "versions")),
        "machine": tables.flat("Part", section(provenance, "machine")),
        "config": json.dumps(config, indent=1, ensure_ascii=False, default=str) if config else "",
        "not_measured": NOT_MEASURED,
    }


def _charts(results: Mapping[str, Any]) -> dict[str, str]:
    profile = section(results, "profile")
    return {**charts.draw(results), "profile": profile_view.chart(profile) if profile else ""}


def _verdict(gates: Sequence[Mapping[str, Any]]) -> gate.Overall:
    """The verdict follows from the gates shown, whatever else the results may say."""
    found = {tables.gate_verdict(row) for row in gates}
    if not found:
        return "no gates"
    if "fail" in found:
        return "fail"
    return "pass" if found == {"pass"} else "inconclusive"


def _gate_line(gates: Sequence[Mapping[str, Any]]) -> str:
    if not gates:
        return "No gate was set, so nothing was judged."
    labels: dict[str, list[str]] = {"fail": [], "inconclusive": [], "pass": []}
    for row in gates:
        labels[tables.gate_verdict(row)].append(tables.gate_label(row))
    if len(labels["pass"]) == len(gates):
        return "The gate passes." if len(gates) == 1 else f"All {len(gates)} gates pass."
    said = [
        f"{word.capitalize()}: {', '.join(labels[word])}."
        for word in ("fail", "inconclusive")
        if labels[word]
    ]
    return " ".join([*said, f"{len(labels['pass'])} of {len(gates)} gates pass."])


def _lead(results: Mapping[str, Any]) -> str:
    """One sentence with the main numbers; what is missing is named after it."""
    said, missing = [], []
    row, fall, metric = tables.headline_speedup(results), gate.fall(results), metric_of(results)
    if row is None:
        missing.append("speed-up")
    else:
        span = f"95 % interval {tables.interval(row, times)}"
        where = f"{text(row.get('runner'))}, batch {text(row.get('batch'))}"
        said.append(f"runs {times(row['ratio'])} as fast ({span}; {where})")
    if fall is None:
        missing.append("accuracy")
    else:
        change = f"{'loses' if fall > 0 else 'gains'} {metric.change(abs(fall))} of {metric.word}"
        said.append(change if fall else f"keeps its {metric.word}")
    changes = {noun: _change(results, key) for key, noun in NOUNS.items()}
    missing += [noun for noun, change in changes.items() if change is None]
    fewer = [
        f"{percent(abs(change), 1)} {'fewer' if change <= 0 else 'more'} {noun}"
        for noun, change in changes.items()
        if change is not None
    ]
    said += [f"has {_listed(fewer)}"] if fewer else []
    sentence = f"The pruned model {_listed(said)}." if said else "No number was measured."
    return sentence + (f" Not measured: {', '.join(missing)}." if missing and said else "")


def _tiles(results: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(label, value, detail) of the main numbers."""
    row, drop = tables.headline_speedup(results), gate.accuracy_drop(results)
    found, metric, fall = section(results, "accuracy"), metric_of(results), gate.fall(results)
    tiles = [("Speed-up", NOT_MEASURED, ""), ("Accuracy", NOT_MEASURED, "")]
    if row is not None:
        where = f"{text(row.get('runner'))}, batch {text(row.get('batch'))}"
        tiles[0] = ("Speed-up", times(row["ratio"]), f"{tables.interval(row, times)}; {where}")
    if fall is not None:
        width = span(-drop.high, -drop.low, lambda x: points(x, signed=True)) + "; " if drop else ""
        pair = f"{metric.form(found['before'])} → {metric.form(found['after'])}"
        tiles[1] = (metric.title, metric.change(-fall, signed=True), f"{width}{pair}")
    for key, label in (("macs", "MACs"), ("params", "Parameters"), ("onnx_bytes", "ONNX file")):
        change, pair_of = _change(results, key), section(section(results, "cost"), key)
        if change is None:
            tiles.append((label, NOT_MEASURED, ""))
            continue
        unit = "B" if key == "onnx_bytes" else ""
        value = ("+" if change > 0 else "") + percent(change, 1)
        tiles.append((label, value, shortened(pair_of["before"], pair_of["after"], unit)))
    return tiles


def _notes(results: Mapping[str, Any], verdict: str) -> list[str]:
    """What a reader must know before believing the numbers."""
    notes, stated = [], results.get("verdict")
    if isinstance(stated, str) and stated != verdict:
        said = f"The results file says “{stated}”, but its gates say “{verdict}”"
        notes.append(f"{said}. This page follows the gates.")
    why = gate.untold(section(results, "accuracy"))
    if why:
        notes.append(f"{why[:1].upper()}{why[1:]}.")
    parts = ", ".join(map(text, entries(section(results, "model"), "parts")))
    if parts:
        notes.append(
            f"Pruned, exported and timed is {parts} alone, as the model cannot be traced whole; "
            "the accuracy is that of the whole model."
        )
    if (
        section(results, "verification").get("passed") is False
        or section(results, "whole").get("passed") is False
    ):
        notes.append("The pruned model does not compute what the masked original computes. Do not ship it.")
    failed = sum(row.get("passed") is not True for row in rows(results, "parity"))
    if failed:
        notes.append(
            f"Parity checks that fail: {failed}. An ONNX file does not compute what PyTorch computes."
        )
    pruning = section(results, "pruning")
    if pruning.get("reached") is False:
        notes.append(f"Pruning stopped before its target: {text(pruning.get('stop_reason'))}.")
    measured = rows(results, "latency")
    warned = sum(bool(entries(row, "warnings")) for row in measured)
    if warned:
        notes.append(
            f"Latency measurements with a warning: {warned} of {len(measured)}. See the latency section."
        )
    unreached = len(entries(results, "unreached"))
    if unreached:
        notes.append(f"Parameters outside the traced graph: {unreached}. They are listed under “Pinned”.")
    folded = len(entries(results, "folded"))
    if folded:
        notes.append(
            f"Weights that the model computed and that were fine-tuned as plain ones: {folded}. "
            "They are listed under “Pinned”."
        )
    return notes


def _change(results: Mapping[str, Any], key: str) -> float | None:
    """The relative change of a cost (-0.5: half is gone), None when it was not measured."""
    pair = section(section(results, "cost"), key)
    before, after = whole_number(pair.get("before")), whole_number(pair.get("after"))
    return None if before is None or after is None or before < 1 else after / before - 1


def _thinnest(results: Mapping[str, Any]) -> str:
    found = sorted(charts.layer_bars(results), key=lambda bar: (bar.after / bar.before, bar.name))
    said = [f"{bar.name} keeps {bar.after:,} of {bar.before:,}" for bar in found if bar.after < bar.before]
    if not found:
        return NOT_MEASURED
    return f"Thinnest: {'; '.join(said[:3])}." if said else "No layer lost channels."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _fitting(template: str, view: dict[str, Any], limits: Sequence[tuple[int, int]], most: int) -> str:
    """The template rendered with the widest limits that keep it within ``most`` bytes."""
    rendered = ""
    for max_rows, max_text in limits:
        found = environment(template == "report.md.j2", max_text).get_template(template)
        rendered = found.render(view, max_rows=max_rows)
        if len(rendered.encode()) <= most:
            break
    return rendered


@cache  # compiling a template takes longer than filling it
def environment(markdown: bool, max_text: int) -> Environment:
    """A Jinja2 environment in which every text not marked as safe goes through the format's sink."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    def sink(value: object) -> object:
        if isinstance(value, Markup):
            return value
        said = _clipped(visible(str(value)), max_text)
        return Markup(_markdown(said)) if markdown else said

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=sink,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "svg": Markup,  # only for what deploy.charts drew
        "share": _share,
        "lines": lambda said: Markup.escape(_block(said, BLOCK * max_text)),
        "fence": lambda said: Markup(fenced(said, BLOCK * max_text)),
        "code": lambda said: Markup(_code(_clipped(visible(str(said)), max_text))),
    }
    return environment


def _share(said: str) -> str:
    """The width of a meter: "41.3 %" as "41.3%", at most the whole."""
    found = re.match(r"\d+(\.\d+)?", said)
    return f"{min(100.0, float(found[0])) if found else 0.0:g}%"


def _clipped(said: str, most: int) -> str:
    return said if len(said) <= most else said[: most - 1] + "…"


def _block(said: str, most: int) -> str:
    """Several lines, each made printable."""
    return _clipped("\n".join(visible(line) for line in said.split("\n")), most)


def _markdown(said: str) -> str:
    """A text with everything escaped that Markdown or GitHub would act on: markup, links and mentions."""
    said = said.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    said = re.sub(r"([\\`*_\[\]|~$#])", r"\\\1", said)
    said = re.sub(r"^(\d+(?=[.)]\s)|(?=[-+=]))", r"\1\\", said)
    # A word joiner breaks an address or a mention without changing how it looks.
    return re.sub(r"(://|www\.|@)", lambda found: f"{found[1][:-1]}&#8288;{found[1][-1]}&#8288;", said)


def _code(said: str) -> str:
    """A code span; as HTML with every sign escaped when it holds something that could end the span."""
    if PLAIN.fullmatch(said) and said == said.strip():
        return f"`{said}`"
    return "<code>" + re.sub(r"[^\w ]", lambda sign: f"&#{ord(sign[0])};", said) + "</code>"


def fenced(said: str, most: int = BLOCK * MARKDOWN_LIMITS[0][1]) -> str:
    """At most ``most`` characters in a fenced block, its fence longer than any run of backticks inside."""
    said = _block(said, most)
    longest = max((len(run) for run in re.findall(r"`+", said)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}\n{said}\n{fence}"
