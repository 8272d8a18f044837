"""One model of the sweep in a process of its own: a row that is printed as it grows.

The product's script and the peer's both run in this; nothing here knows how a model is pruned.
"""

from __future__ import annotations

import contextlib
import json
import logging
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import zoo_models
from benchmarks.zoo_models import Spec


class Row:
    """The row as it grows: every stage's seconds, its error, the peak memory."""

    def __init__(self, **known: Any) -> None:
        self.data: dict[str, Any] = {**known, "errors": {}}

    def tell(self, **found: Any) -> None:
        """Add fields and print the row."""
        self.data |= found
        self.data["peak_rss_mib"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
        sys.stdout.write(json.dumps(self.data) + "\n")
        sys.stdout.flush()

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage; what it raises is noted and goes on."""
        self.tell(stage=name)
        start = time.perf_counter()
        try:
            yield
        except Exception as error:
            self.data["errors"][name] = explain(error)
            raise
        finally:
            self.tell(**{f"{name}_s": round(time.perf_counter() - start, 3)})


def explain(error: Exception) -> str:
    """The error's class, its first line, and the innermost line of code."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or ["no message"]
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {lines[0][:300]} ({Path(frame.filename).name}:{frame.lineno})"


def alone(
    known: Callable[[Spec], dict[str, Any]],
    sweep: Callable[[Spec, Row], None],
    verdict: Callable[[dict[str, Any]], dict[str, Any]],
) -> None:
    """Sweep the model that the command line names, on one thread; print its row to the end."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    spec = zoo_models.find(sys.argv[1])
    row = Row(**known(spec))
    with contextlib.suppress(Exception):  # it stands in the row
        sweep(spec, row)
    row.tell(stage="done", **verdict(row.data))
