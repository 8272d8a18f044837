"""Throughput over several CUDA streams as a table of the report: it is no inverse of a latency."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.tables import Table
from deploy.values import measured, rows, section, text


def table(results: Mapping[str, Any]) -> Table:
    """Examples per second of both models, on the config's target and on others; empty where nobody asked."""
    body = []
    for found in (results, *rows(results, "others")):
        target, pairs = text(section(found, "target").get("name")), _pairs(found)
        for place, pair in pairs.items():
            per_s = (measured(pair.get(model, {}).get("per_s")) for model in ("original", "dense"))
            why = {text(row.get("failure"), ""): None for row in pair.values()}
            body.append((target, *place, *per_s, "; ".join(filter(None, why))))
    headers = ("Target", "Runner", "Precision", "Batch", "Streams", "Original, per second")
    return Table((*headers, "Pruned, per second", "Remark"), "cctrrrrt", tuple(body))


def _pairs(found: Mapping[str, Any]) -> dict[tuple[str, ...], dict[str, Mapping[str, Any]]]:
    """The rows of both models, by runner, precision, batch and number of streams."""
    pairs: dict[tuple[str, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows(found, "streams"):
        place = tuple(text(row.get(key)) for key in ("runner", "precision", "batch", "streams"))
        pairs.setdefault(place, {})[str(row.get("model"))] = row
    return pairs
