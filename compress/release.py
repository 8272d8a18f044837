"""The stages that hand over: export, report, gate. They read files of the run and know deploy."""

from __future__ import annotations

import math
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from compress import config as configuration
from compress import files, manifest, measuring
from compress.steps import Done, Work, finite

# -- export -------------------------------------------------------------------------------------------


def export_stage(work: Work) -> Done:
    """Write both networks as ONNX and compare each with PyTorch."""
    from deploy import parity, runners, to_onnx

    config, rows, outputs = work.config.export, [], []
    for done, name in enumerate(("original", "dense")):
        work.events.progress("export", done, 2, name)
        net, path = work.load(name), work.run / f"{name}.onnx"
        with files.whole(path) as temporary:
            to_onnx.export(
                net, work.example(), temporary, opset=config.opset, metadata={"model": work.config.model.name}
            )
        outputs.append(path.name)
        ours, theirs = runners.open_runner("torch", net), runners.open_runner("onnxruntime", path)
        found = parity.compare(
            ours.infer, theirs.infer, work.shapes, config.batches, config.tolerance,
            work.config.seed,
        )  # fmt: skip
        theirs.close()
        ours.close()
        rows += [{"model": name, **finite(asdict(row))} for row in found]
    document = {
        "parity": rows,
        "onnx_bytes": {n: (work.run / f"{n}.onnx").stat().st_size for n in ("original", "dense")},
    }
    worst = max((math.inf if row["relative"] is None else row["relative"] for row in rows), default=0.0)
    return Done([*outputs, work.write("export.json", document)], f"largest relative error {worst:.1e}")


# -- report and gate ----------------------------------------------------------------------------------


def report_stage(work: Work) -> Done:
    """Put every stage's figures into results.json, judge the gates, and write the report."""
    from deploy import report

    results = gather(work)
    results |= judged(work, results)
    pages = report.render(results)
    files.write_text(work.run / "report.html", pages.html)
    files.write_text(work.run / "report.md", pages.markdown)
    return Done([work.write("results.json", results), "report.html", "report.md"], results["verdict"])


def gather(work: Work) -> dict[str, Any]:
    """results.json without gates and verdict."""
    from deploy import machine

    before, pruned, after = work.read("train.json"), work.read("prune.json"), work.read("finetune.json")
    exported, bench = work.read("export.json"), work.read("bench.json")
    config = work.config
    sizes = exported["onnx_bytes"]
    shipped = _shipped(work, bench["target"]["precision"])
    artifacts = {n: f for record in manifest.load(work.run).values() for n, f in record.outputs.items()}
    return {
        "schema_version": 1,
        "created": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "command": work.command,
        "model": {
            "name": config.model.name,
            "input_shape": list(config.model.input_shape),
            "parts": before["parts"],
            "parameters": pruned["cost"]["params"]["before"],
        },
        "data": {"name": config.data.name, **before["data"]},
        "accuracy": _accuracy(
            before["accuracy"], pruned["accuracy"], shipped["accuracy"] if shipped else after["accuracy"]
        ),
        "cost": {
            **pruned["cost"],
            "onnx_bytes": {
                "before": sizes["original"],
                "after": shipped["bytes"] if shipped else sizes["dense"],
            },
            "peak_rss_bytes": _peak_rss_bytes(),
        },
        "pruning": {
            k: v
            for k, v in pruned.items()
            if k not in ("cost", "layers", "pinned", "folded", "verification", "whole", "accuracy")
        },
        "train": before["training"],
        "finetune": after["training"],
        "recalibration": after["recalibration"],
        "layers": pruned["layers"],
        "pinned": pruned["pinned"],
        "unreached": before["unreached"],
        "folded": pruned["folded"],
        "verification": pruned["verification"],
        "whole": pruned["whole"],
        "parity": exported["parity"],
        "latency": bench["latency"],
        "speedup": bench["speedup"],
        "overall": bench["overall"],
        "streams": bench.get("streams", []),
        "target": bench["target"],
        "choice": bench["choice"],
        "engines": bench["engines"],
        "profile": bench["profile"],
        "variants": _variants(work, bench),
        "others": measuring.others(work),
        "provenance": {
            "versions": machine.versions(),
            "machine": bench["machine"],
            "seed": config.seed,
            "config": configuration.to_dict(config),
            "commit": machine.commit(work.folder),
            "artifacts": [{"path": name, **facts} for name, facts in artifacts.items()],
        },
    }


def _variants(work: Work, bench: dict[str, Any]) -> list[dict[str, Any]]:
    """The run's own files in further precisions, then those that only the bench stage needed."""
    own: list[dict[str, Any]] = work.read("convert.json")["variants"]
    known = {row["file"] for row in own}
    return [*own, *(row for row in bench.get("variants", ()) if row["file"] not in known)]


def _shipped(work: Work, precision: str) -> dict[str, Any] | None:
    """The dense model's variant in the target's precision; None where that is the fp32 file."""
    rows = work.read("convert.json")["variants"]
    return next((r for r in rows if (r["model"], r["precision"]) == ("dense", precision)), None)


def _accuracy(before: dict[str, Any], pruned: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    flips = None
    if before["wrong"] is not None and after["wrong"] is not None:
        old, new = set(before["wrong"]), set(after["wrong"])
        flips = {"lost": len(new - old), "gained": len(old - new)}
    return {
        "metric": before["metric"], "before": before["value"], "pruned": pruned["value"],
        "after": after["value"], "n": after["n"], "split": "test", "flips": flips, "wrong": after["wrong"],
        "majority": before.get("majority"), "share": before["wrong"] is not None,
    }  # fmt: skip


def _peak_rss_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # Windows has none
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def gate_stage(work: Work) -> Done:
    """The verdict as a file of its own: what a pipeline reads."""
    document = judged(work, work.read("results.json"))
    return Done([work.write("gate.json", document)], document["verdict"])


def judged(work: Work, results: dict[str, Any]) -> dict[str, Any]:
    """Verdict and gates, those against an earlier release among them if there is one to compare with."""
    from deploy import gate

    limits, against = work.config.gates.model_dump(), work.earlier
    found = [*gate.judge(results, limits), *(against.judge(results, limits) if against else ())]
    return {
        "verdict": gate.verdict(found),
        "gates": [finite(asdict(one)) for one in found],
        "baseline": against.as_dict() if against else None,
    }
