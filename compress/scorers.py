"""What a pruning loop scores with: one object per criterion, asked after every minibatch's backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import numpy as np
from torch import Tensor

from compress.channelmap import ChannelMap
from compress.criteria import logit_shifts, loss_changes
from compress.errors import ConfigError
from compress.gated import Gated
from compress.importance import Average, Side, Taylor, magnitude_share, random
from compress.shares import Share
from compress.task import CrossEntropy, Task
from compress.trace import GraphNet, eval_mode

if TYPE_CHECKING:
    from compress.config import PruneConfig

CLASSES = 1
"""Wrong classes that `Logits` follows one by one; all others move as one (docs/criteria.md: the evidence)."""
OF_WEIGHTS = ("magnitude", "random")
"""Criteria that need no minibatches."""


class Scorer(Protocol):
    """accumulate: a process's share of one minibatch, between `backward()` and the optimizer's step. scores:
    (units,), and a new step begins. average: what the next step goes on from, None where it starts anew."""

    average: Tensor | None

    def accumulate(self, net: GraphNet, share: Share) -> None: ...
    def scores(self) -> np.ndarray: ...


class Logits(Average):
    """The change of the loss as a unit leaves, logits linear in its gate and the loss exact, averaged over
    a minibatch and squared; `criteria.logit_shifts` has the equation. Batch norms are in eval mode."""

    def __init__(self, net: GraphNet, cmap: ChannelMap, ema: float = 0.9, side: Side = "read") -> None:
        super().__init__(ema)
        self.gated = Gated(net, cmap, side).to(next(net.parameters()).device)

    def accumulate(self, net: GraphNet, share: Share) -> None:
        """Score (images, labels) with the weights that net has now; no gradient of theirs is touched."""
        images, labels = share.batch
        with eval_mode(self.gated):
            changes = loss_changes(*logit_shifts(self.gated, images, labels, CLASSES))
        self.add(share.averaged(changes.mean(0)).square())


class _OfWeights:
    """A criterion that looks at no data."""

    average: Tensor | None = None

    def __init__(self, measure: Callable[[], np.ndarray]) -> None:
        self.scores = measure

    def accumulate(self, net: GraphNet, share: Share) -> None:
        pass


def scorer(config: PruneConfig, net: GraphNet, cmap: ChannelMap, task: Task, *, seed: int) -> Scorer:
    """The scorer of the config's criterion.

    Raises ConfigError (exit 3) where it does not go with the task, ModelError (exit 4) where the model has
    no place for a gate.
    """
    name = config.criterion
    if name == "magnitude":
        return _OfWeights(lambda: magnitude_share(net, cmap))
    if name == "random":
        return _OfWeights(lambda: random(cmap, seed))
    if name == "taylor":
        return Taylor(cmap, config.ema, config.gates)
    if not isinstance(task.loss, CrossEntropy):
        what = (
            f"logits needs a classifier traced whole and its cross-entropy, and {task.name} has another loss"
        )
        raise ConfigError(what, "prune.criterion", "use taylor, which takes any loss")
    return Logits(net, cmap, config.ema, config.gates)
