"""A command's result for people: the verdict first, then few numbers, then tables. JSON has all of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compress.console import STYLES, print_table, readable
from deploy.budget_view import memory_said, sentences
from deploy.budget_view import table as looked_at
from deploy.metric import metric_of
from deploy.values import (
    count,
    measured,
    milliseconds,
    number,
    percent,
    rows,
    scientific,
    section,
    shortened,
    span,
    text,
    times,
    whole_number,
)

if TYPE_CHECKING:
    from rich.console import Console

    from compress.doctor import Check

WORDS = {"pass": "PASS", "fail": "FAIL", "inconclusive": "INCONCLUSIVE", "no gates": "DONE"}
Data = Mapping[str, Any]


def line(console: Console, said: str = "", style: str = "") -> None:
    """One line, never wrapped by us."""
    console.print(readable(said), style=style or None, soft_wrap=True)


def verdict_line(console: Console, verdict: str, said: str) -> None:
    """``PASS  said``, the word in its colour."""
    from rich.text import Text

    word = WORDS.get(verdict, verdict.upper())
    style = STYLES.get(verdict, STYLES["pass"] if verdict == "no gates" else "bold")
    console.print(Text.assemble((word, style), "  ", readable(said)), soft_wrap=True)


# -- run ----------------------------------------------------------------------------------------------


def show_run(console: Console, results: Data, run: Path, *, details: bool = False) -> None:
    """Verdict, the five figures that matter most, every gate that did not pass, and where the files are."""
    verdict = text(results.get("verdict"), "no gates")
    gates = rows(results, "gates")
    verdict_line(console, verdict, _gates_said(gates))
    line(console)
    print_table(console, ("", "", ""), [("  " + a, b, c) for a, b, c in _figures(results)])
    shown = [gate for gate in gates if details or gate.get("verdict") != "pass"]
    if shown:
        line(console)
        cells = [
            ("  " + WORDS.get(str(g.get("verdict")), "?"), text(g.get("name")), text(g.get("message")))
            for g in shown
        ]
        print_table(console, ("", "", ""), cells, fold=2)
    files = [(word, run / name) for word, name in (("report", "report.html"), ("model", "dense.onnx"))]
    line(console)
    print_table(console, ("", ""), [(f"  {word}", path) for word, path in files if path.is_file()])


def _gates_said(gates: Sequence[Data]) -> str:
    if not gates:
        return "no gates are set"
    good = sum(gate.get("verdict") == "pass" for gate in gates)
    return f"{good} of {len(gates)} gates pass"


def _figures(results: Data) -> Iterable[tuple[str, str, str]]:
    found, cost = section(results, "accuracy"), section(results, "cost")
    before, after = number(found.get("before")), number(found.get("after"))
    if before is not None and after is not None:
        metric = metric_of(results)
        said = f"{metric.change(after - before, signed=True)}, on {count(found.get('n'))} test examples"
        word = "accuracy" if metric.is_share else metric.word
        yield word, f"{metric.form(before)} → {metric.form(after)}", said
    else:
        yield "accuracy", "not measured", ""
    yield "MACs", *_change(section(cost, "macs"), "")
    yield "parameters", *_change(section(cost, "params"), "")
    memory = section(section(section(results, "pruning"), "budget"), "memory")
    if memory:
        yield "peak activations", *_change(memory, "B")
    yield "ONNX file", *_change(section(cost, "onnx_bytes"), "B")
    yield "speed", *_speed(results)
    pruning = section(results, "pruning")
    if pruning.get("reached") is False:
        yield "target", "missed", text(pruning.get("stop_reason"), "")


def _change(pair: Data, unit: str) -> tuple[str, str]:
    before, after = whole_number(pair.get("before")), whole_number(pair.get("after"))
    if before is None or after is None or before <= 0:
        return "not measured", ""
    return shortened(before, after, unit), f"{percent(after / before, 1)} of the original"


def _speed(results: Data) -> tuple[str, str]:
    """The speed-up that the gates look at, else that of the last measurement."""
    from deploy.gate import gated_batch

    measured_rows = rows(results, "speedup")
    if not measured_rows:
        return "not measured", ""
    gates = section(section(section(results, "provenance"), "config"), "gates")
    batch, runner = gated_batch(results, gates), gates.get("runner")
    fitting = [r for r in measured_rows if r.get("runner") == runner and r.get("batch") == batch]
    row = (fitting or measured_rows)[-1]
    low, high = number(row.get("low")), number(row.get("high"))
    interval = f" (95 % interval {span(low, high, times)})" if low is not None and high is not None else ""
    where = f"{text(row.get('runner'))}, batch {text(row.get('batch'))}"
    return f"{measured(row.get('ratio'), times)} as fast", f"{where}{interval}"


def show_stages(console: Console, stages: Sequence[tuple[str, str, float]], run: Path) -> None:
    """What a dry run found."""
    print_table(console, ("stage", "status"), [(name, status) for name, status, _ in stages])
    line(console)
    line(console, f"dry run: nothing was changed in {run}")


def show_part(console: Console, stages: Sequence[tuple[str, str, float]], run: Path) -> None:
    """The end of a call that did not come to the report."""
    name, status, _ = stages[-1]
    state = "was done already" if status == "cached" else "done"
    line(console, f"stage {name} {state}; the files are in {run}")


# -- inspect and plan ---------------------------------------------------------------------------------


def show_inspect(console: Console, found: Data) -> None:
    """A model before anything is removed."""
    line(console, text(found.get("model")), "bold")
    line(
        console,
        f"{count(found.get('params'))} parameters, {_short(found.get('macs'))} MACs per example, "
        f"{count(found.get('units'))} units that can leave in {count(found.get('classes'))} classes",
    )
    total = max(1, int(found.get("macs") or 0))
    layers = [
        (
            row.get("name"),
            row.get("kind"),
            count(row.get("channels", row.get("before"))),
            _short(row.get("macs")),
            percent((number(row.get("macs")) or 0.0) / total, 1),
            "stays" if row.get("pinned") else "",
        )
        for row in rows(found, "layers")
    ]
    titled(console, "layers", ("layer", "kind", "channels", "MACs", "share", ""), layers, right=(2, 3, 4))
    couplings = [(count(row.get("units")), shorter(row["layers"])) for row in rows(found, "couplings")]
    titled(console, "layers that lose channels together", ("units", "layers"), couplings, right=(0,), fold=1)
    _pinned(console, found)
    unreached = [(name,) for name in found.get("unreached") or ()]
    titled(console, "parameters the traced graph does not reach", ("parameter",), unreached)
    folded = [(name,) for name in found.get("folded") or ()]
    titled(console, "weights that are computed, and become plain parameters", ("weight",), folded)
    titled(
        console,
        "what a target would leave (by weight magnitude)",
        ("MACs kept", "parameters kept", "units kept", ""),
        [_ratio_row(row) for row in rows(found, "ratios")],
        right=(0, 1, 2),
    )


def _ratio_row(row: Data) -> tuple[str, str, str, str]:
    kept = measured(row.get("macs_ratio"), lambda x: percent(x, 0))
    if not row.get("reachable"):
        return kept, "-", "-", f"out of reach: {text(row.get('why'), 'too little can leave')}"
    return kept, measured(row.get("params_ratio"), lambda x: percent(x, 1)), count(row.get("units")), ""


def _pinned(console: Console, found: Data) -> None:
    pinned = [
        (
            count(row.get("channels")),
            text(row.get("reason"), ""),
            text(row.get("op"), ""),
            shorter(row.get("parameters") or ()),
            text(row.get("source"), ""),
        )
        for row in rows(found, "pinned")
    ]
    heads = ("channels", "why", "operation", "parameters", "where")
    titled(console, "what stays as it is", heads, pinned, right=(0,), fold=3)


def shorter(names: Sequence[object]) -> str:
    """The first three names, and how many more there are; `--json` has all."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(map(str, names[:3])) + more


def titled(
    console: Console,
    title: str,
    heads: Sequence[str],
    cells: Sequence[Sequence[object]],
    *,
    right: Sequence[int] = (),
    fold: int | None = None,
) -> None:
    """A headed table after an empty line; nothing when there are no rows."""
    if cells:
        line(console)
        line(console, title, "bold")
        print_table(console, heads, cells, right=right, fold=fold)


def show_plan(console: Console, found: Data) -> None:
    """What would leave, and whether the target can be met."""
    target = section(found, "target")
    kind, value = str(target.get("kind")).removesuffix("_ratio"), number(target.get("value")) or 0.0
    words = {"macs": "MACs", "params": "parameters", "memory": "peak activation memory"}
    kind = words.get(kind, kind)
    least = measured(found.get("least"), lambda x: percent(x, 1))
    budget = section(found, "budget")
    looks = looked_at(budget)
    if found.get("reachable"):
        said = f"{percent(value, 1)} of the {kind} can be kept (the least possible is {least})"
        verdict_line(console, "ok", said)
    elif looks.rows:
        verdict_line(console, "fail", f"{percent(value, 1)} of the {kind}: no width allowed comes near it")
    else:
        verdict_line(console, "fail", f"{percent(value, 1)} of the {kind} is out of reach: {least} must stay")
    for said in (*sentences(budget), *memory_said(budget)):
        line(console, said)
    units = section(found, "units")
    facts = [
        ("  MACs", *_change(section(found, "macs"), "")),
        ("  parameters", *_change(section(found, "params"), "")),
        ("  units", f"{count(units.get('total'))} → {count(units.get('kept'))}", ""),
    ]
    print_table(console, ("", "", ""), facts)
    titled(console, "networks measured on the way", looks.headers, looks.rows, right=range(6))
    layers = [
        (
            row.get("name"),
            count(row.get("before")),
            count(row.get("after")),
            measured(_share(row), lambda x: percent(x, 0)),
            "stays" if row.get("pinned") else "",
        )
        for row in rows(found, "layers")
    ]
    heads = ("layer", "channels", "kept", "share", "")
    titled(console, "channels kept", heads, layers, right=(1, 2, 3))


def _share(row: Data) -> float | None:
    before, after = number(row.get("before")), number(row.get("after"))
    return after / before if before and after is not None else None


def _short(value: object) -> str:
    found = number(value)
    return "not measured" if found is None else shortened(found, found).partition(" → ")[0]


def show_study(console: Console, found: Data) -> None:
    """Every criterion's agreement with the truth, best first."""
    left, units = count(found.get("left_out")), count(found.get("units"))
    line(console, text(found.get("model"), ""), "bold")
    line(console, f"{left} of {units} units left out one by one, {count(found.get('images'))} test images")
    kinds = list(dict.fromkeys(row.get("truth") for row in rows(found, "rows")))
    by_name: dict[str, dict[Any, Data]] = {}
    for row in rows(found, "rows"):
        by_name.setdefault(text(row.get("criterion"), ""), {})[row.get("truth")] = row
    order = sorted(by_name, key=lambda name: -(number(by_name[name]["minibatch"].get("spearman")) or -1.0))

    def cell(row: Data, key: str) -> str:
        return measured(row.get(key), lambda x: f"{x:.2f}")

    heads = ("criterion", *map(str, kinds), "pearson", "kendall", "within layers")
    cells = [
        (
            name,
            *(cell(by_name[name][kind], "spearman") for kind in kinds),
            *(
                cell(by_name[name]["minibatch"], key)
                for key in ("pearson", "kendall", "spearman_within_layers")
            ),
        )
        for name in order
    ]
    title = "rank correlation (Spearman) with the squared change of the loss, summed up per ..."
    titled(console, title, heads, cells, right=tuple(range(1, len(heads))))


# -- compare, verify, doctor --------------------------------------------------------------------------


def show_compare(console: Console, found: Data) -> None:
    """Two artifacts: agreement first, then size and speed."""
    parity = rows(found, "parity")
    good = sum(bool(row.get("passed")) for row in parity)
    verdict = "pass" if found.get("passed") else "fail"
    verdict_line(console, verdict, f"the outputs agree at {good} of {len(parity)} batch sizes")
    files = [
        (key, count(section(found, key).get("bytes")), text(section(found, key).get("path"), ""))
        for key in "ab"
    ]
    titled(console, "files", ("", "bytes", "path"), files, right=(1,), fold=2)
    agreement = [
        (
            row.get("batch"),
            scientific(number(row.get("relative"))),
            scientific(number(row.get("tolerance"))),
            measured(row.get("argmax_agreement"), percent),
            "pass" if row.get("passed") else "fail",
        )
        for row in parity
    ]
    heads = ("batch", "relative error", "tolerance", "same class", "")
    titled(console, "agreement", heads, agreement, right=(0, 1, 2, 3))
    titled(
        console,
        "speed",
        ("batch", "a, median", "b, median", "a / b", "95 % interval", "b is"),
        [_speed_row(found, row) for row in rows(found, "speedup")],
        right=(0, 1, 2, 3, 4),
    )


def _speed_row(found: Data, row: Data) -> tuple[str, ...]:
    medians = {
        lat.get("model"): measured(lat.get("median"), milliseconds)
        for lat in rows(found, "latency")
        if lat.get("batch") == row.get("batch")
    }
    low, high = number(row.get("low")), number(row.get("high"))
    interval = span(low, high, times) if low is not None and high is not None else "none"
    return (
        text(row.get("batch")),
        medians.get("a", "not measured"),
        medians.get("b", "not measured"),
        measured(row.get("ratio"), times),
        interval,
        text(row.get("verdict"), ""),
    )


def show_problems(console: Console, problems: Sequence[object], run: Path) -> None:
    """One line per file that is not what was written."""
    if not problems:
        verdict_line(console, "ok", f"every file in {run} is what was written")
    for problem in problems:
        verdict_line(console, "fail", str(problem))


def show_checks(console: Console, checks: Sequence[Check]) -> None:
    """The doctor's findings by group, each lack with its fix."""
    for group in dict.fromkeys(check.group for check in checks):
        cells = [
            ("  " + check.status, check.name, check.detail, f"fix: {check.fix}" if check.fix else "")
            for check in checks
            if check.group == group
        ]
        line(console, group, "bold")
        print_table(console, ("", "", "", ""), cells, fold=3)
        line(console)
    lacking = [check.name for check in checks if check.status == "missing"]
    verdict = "fail" if lacking else "ok"
    verdict_line(console, verdict, f"missing: {', '.join(lacking)}" if lacking else "compress can work here")
