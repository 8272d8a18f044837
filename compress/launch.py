"""Which of several processes this one is, as torchrun says in the environment; without importing torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """rank: this process, of ``size``; local_rank: its number on this machine, that of its GPU."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def several(self) -> bool:
        return self.size > 1


def launched(env: Mapping[str, str] = os.environ) -> Launch:
    """What torchrun says; one process where it did not start this one.

    Job schedulers set some of these variables for programs that know nothing of each other: all count.
    """
    values = [env.get(name, "") for name in VARIABLES]
    if not env.get("MASTER_ADDR") or not all(value.isascii() and value.isdigit() for value in values):
        return Launch()
    return Launch(*(int(value) for value in values[:3]))
