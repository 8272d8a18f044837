"""An invented results.json: copies with less, other or hostile values; and what a reader sees of a page.

It is a test fixture: none of its numbers were measured.
"""

from __future__ import annotations

import copy
import random
from dataclasses import asdict
from html.parser import HTMLParser
from statistics import fmean, median, quantiles, stdev
from typing import Any

import pytest

from deploy import gate
from deploy.values import NBSP

GATES = {"accuracy_drop": 0.01, "speedup": 1.3, "size_ratio": 0.6, "parity": True, "runner": "onnxruntime"}


def resnet18_layers(rng: random.Random) -> list[dict[str, Any]]:
    """The 20 convolutions and the head of a ResNet-18, with invented kept counts."""
    found = [("conv1", 64, 118_013_952)]
    for stage, width in ((1, 64), (2, 128), (3, 256), (4, 512)):
        for block in (0, 1):
            found += [(f"layer{stage}.{block}.conv{i}", width, 115_605_504) for i in (1, 2)]
            if block == 0 and stage > 1:
                found.append((f"layer{stage}.0.downsample.0", width, 6_422_528))
    shared = {width: round(width * rng.uniform(0.55, 0.9) / 8) * 8 for width in (64, 128, 256, 512)}
    layers = []
    for name, width, macs in found:
        inner = name.endswith("conv1") and name != "conv1"
        after = max(8, round(width * rng.uniform(0.2, 0.7) / 8) * 8) if inner else shared[width]
        row = {"name": name, "kind": "conv2d", "before": width, "after": after, "macs_before": macs}
        layers.append(row | {"macs_after": int(macs * after / width * 0.7), "pinned": False})
    head = {"name": "fc", "kind": "linear", "before": 10, "after": 10, "macs_before": 5120}
    return [*layers, head | {"macs_after": 3200, "pinned": True}]


def latency_row(runner: str, model: str, batch: int, middle_ms: float, rng: random.Random) -> dict[str, Any]:
    samples = [
        round(middle_ms * (1 + abs(rng.gauss(0, 0.012)) + (rng.random() < 0.03) * 0.2), 5) for _ in range(900)
    ]
    cuts = quantiles(samples, n=100)
    cv = stdev(samples) / fmean(samples)
    return {
        "runner": runner,
        "model": model,
        "batch": batch,
        "threads": 1,
        "samples_ms": samples,
        "min": min(samples),
        "median": median(samples),
        "mean": fmean(samples),
        "p90": cuts[89],
        "p95": cuts[94],
        "p99": cuts[98],
        "max": max(samples),
        "cv": cv,
        "throughput_per_s": 1000 * batch / median(samples),
        "first_ms": samples[0] * 3.1,
        "warnings": ["coefficient of variation is 3.9 %, above 2.5 %"] if cv > 0.038 else [],
    }


def example() -> dict[str, Any]:
    """An invented but complete results.json: a ResNet-18 on CIFAR-10."""
    rng = random.Random(7)
    measured = {("torch", 1): (9.1, 6.4), ("torch", 32): (212.0, 118.0)}
    measured |= {("onnxruntime", 1): (6.2, 3.45), ("onnxruntime", 32): (171.0, 87.0)}
    latency, speedup = [], []
    for (runner, batch), (before, after) in measured.items():
        latency.append(latency_row(runner, "original", batch, before, rng))
        latency.append(latency_row(runner, "dense", batch, after, rng))
        ratio = latency[-2]["median"] / latency[-1]["median"]
        row = {"runner": runner, "batch": batch, "ratio": ratio, "low": ratio * 0.988, "high": ratio * 1.011}
        speedup.append(row | {"pairs": 20, "verdict": "faster"})
    steps = range(60)
    history = [
        {
            "step": i + 1,
            "minibatches": 10 * (i + 1),
            "units_kept": 2368 - 20 * (i + 1),
            "macs_ratio": 1 - 0.5 * ((i + 1) / 60) ** 0.9,
            "params_ratio": 1 - 0.61 * ((i + 1) / 60) ** 0.8,
            "loss": 0.11 + 0.25 * (i / 60) ** 2 + rng.uniform(0, 0.05),
            "accuracy": 0.951 - 0.06 * (i / 60) ** 2 - rng.uniform(0, 0.004) if i % 5 == 4 else None,
        }
        for i in steps
    ]
    epochs = [
        {
            "epoch": i + 1,
            "loss": 0.31 - 0.012 * i,
            "validation": 0.925 + 0.002 * i - 0.0008 * (i % 3),
            "validation_loss": 0.26 - 0.003 * i + 0.004 * (i % 2),
            "lr": 0.01 * (1 - i / 12),
            "seconds": 41.5,
        }
        for i in range(12)
    ]
    results: dict[str, Any] = {
        "schema_version": 1,
        "created": "2026-03-01T12:00:00Z",
        "command": "compress run compress.yaml --set prune.macs_ratio=0.5",
        "model": {"name": "torchvision:resnet18", "input_shape": [3, 32, 32], "parameters": 11_181_642},
        "data": {"name": "torchvision:CIFAR10", "train": 45_000, "validation": 5_000, "test": 10_000},
        "accuracy": {"metric": "top1", "before": 0.9512, "pruned": 0.8944, "after": 0.9481, "n": 10_000},
        "cost": {
            "macs": {"before": 1_814_073_344, "after": 905_101_312},
            "params": {"before": 11_181_642, "after": 4_360_802},
            "onnx_bytes": {"before": 44_781_223, "after": 17_501_006},
            "peak_rss_bytes": 1_402_331_136,
        },
        "pruning": {
            "criterion": "taylor",
            "target": {"kind": "macs_ratio", "value": 0.5},
            "align": 8,
            "reached": True,
            "stop_reason": "49.9 % of the MACs are left",
            "units": {"total": 2368, "kept": 1168, "pinned_channels": 13},
            "seconds": 214.5,
            "history": history,
        },
        "train": None,
        "finetune": {"history": epochs, "best_epoch": 12},
        "layers": resnet18_layers(rng),
        "pinned": [
            {
                "reason": "the channel dimension is the model's output",
                "op": "aten.linear",
                "source": "resnet.py:280 x = self.fc(x)",
                "channels": 10,
                "parameters": ["fc.weight", "fc.bias"],
            },
            {
                "reason": "the channel dimension is the model's input",
                "op": "aten.conv2d",
                "source": "resnet.py:268 x = self.conv1(x)",
                "channels": 3,
                "parameters": ["conv1.weight"],
            },
        ],
        "unreached": [],
        "folded": [],
        "verification": {
            "relative_error": 3.1e-15,
            "movement": 0.412,
            "dtype": "float64",
            "passed": True,
            "tolerance": 1e-5,
        },
        "parity": [
            {
                "model": model,
                "batch": batch,
                "max_abs": 2.1e-5,
                "relative": 1.4e-6 * batch,
                "tolerance": 1e-4,
                "argmax_agreement": 1.0,
                "passed": True,
            }
            for model in ("original", "dense")
            for batch in (1, 2, 7)
        ],
        "latency": latency,
        "speedup": speedup,
        "provenance": {
            "versions": {
                "compress-release": "0.1.0",
                "torch": "2.14.1",
                "onnx": "1.22.0",
                "onnxruntime": "1.27.0",
            },
            "machine": {
                "cpu": {"model": "Example CPU 9000", "cores": 8, "flags": ["avx2", "avx512f"]},
                "memory_bytes": 34_359_738_368,
                "os": "Linux 6.8",
                "gpu": None,
            },
            "seed": 0,
            "config": {"version": 1, "gates": GATES, "bench": {"batches": [1, 32], "repeats": 20}},
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "artifacts": [
                {"path": "original.onnx", "sha256": "4f" * 32, "bytes": 44_781_223},
                {"path": "dense.onnx", "sha256": "a9" * 32, "bytes": 17_501_006},
                {"path": "dense.pt2", "sha256": "07" * 32, "bytes": 17_900_112},
            ],
        },
    }
    results["data"]["fingerprint"] = "c3" * 32
    results["accuracy"] |= {"split": "test", "flips": {"lost": 131, "gained": 100}}
    return judged(results, GATES)


def judged(results: dict[str, Any], gates: dict[str, Any]) -> dict[str, Any]:
    found = gate.judge(results, gates)
    return results | {"gates": [asdict(one) for one in found], "verdict": gate.verdict(found)}


def light(results: dict[str, Any]) -> dict[str, Any]:
    """The results with few rows and samples, quick to draw."""
    few = copy.deepcopy({**results, "latency": results["latency"][:2], "speedup": results["speedup"][-1:]})
    few["layers"] = few["layers"][:2]
    few["pruning"]["history"] = few["finetune"]["history"] = []
    for row in few["latency"]:
        row["samples_ms"] = row["samples_ms"][:20]
    return few


def change(results: dict[str, Any], *path: Any, to: Any) -> dict[str, Any]:
    """A copy of the results with the value at ``path`` replaced."""
    changed = copy.deepcopy(results)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = to
    return changed


HOSTILE = [
    "<script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "</code></td></svg><script>alert(1)</script>",
    '" onload="alert(1)',
    "\x1b[31mred\x1b[0m\x07",
    "line\nbreak\r\n# heading | pipe\n---",
    "a | b | c",
    "`code` ``two`` ```three```",
    "[link](https://evil.example) ![i](https://evil.example/x.png)",
    "*bold* _it_ ~no~ $x^2$ $",
    "\u202eright to left\u2066 \ud800 \x00",
    "{{ 7 * 7 }} {% raw %}",
    "<!-- comment -->",
    'font-family:a;url(#x)" id="y',
    "@everyone www.evil.example #1",
    "C:\\path\\*.onnx",
    "-->]]>",
    "=cmd()",
]


def poisoned(value: Any, poison: str) -> Any:
    """Every text in the results, keys of free mappings included, carries the poison."""
    if isinstance(value, dict):
        return {key: poisoned(found, poison) for key, found in value.items()}
    if isinstance(value, list):
        return [poisoned(found, poison) for found in value]
    return value + poison if isinstance(value, str) else value


class Page(HTMLParser):
    """The tags with their attributes, and the text a reader sees."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


def seen(page: str) -> str:
    return Page(page).text.replace(NBSP, " ")


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return example()
