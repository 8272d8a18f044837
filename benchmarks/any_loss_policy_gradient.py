"""The lunar lander's policy again, pruned by its reward: the policy gradient is the only teacher.

The loss plays: the network that is being pruned acts in the environment, and what it earned says which
actions to prefer. Nothing of the original policy is used but its critic, for less noise.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.any_loss_harness import Job, frozen
from benchmarks.any_loss_policy import trained
from benchmarks.any_loss_ppo import Fleet, gather, objective

SIDE_BY_SIDE, STEPS = 8, 256


@dataclass(frozen=True)
class Reinforce:
    """The clipped surrogate on steps that the model itself has just taken: its gradient is the policy's.

    A batch is a seed for the environments.
    """

    fleet: Fleet
    critic: nn.Module
    steps: int

    def __call__(self, model: nn.Module, seed: int) -> Tensor:
        self.fleet.restart(seed)
        seen = gather(self.fleet, model, self.critic, self.steps)
        return objective(model, seen, torch.arange(len(seen.actions)))


def job(quick: bool) -> tuple[Job, float]:
    """The trained policy with all that its pruning needs, and the CPU seconds its training took."""
    source = trained(quick)
    count, steps = (3, 32) if quick else (25, STEPS)
    fleet = Fleet(source.name, 2 if quick else SIDE_BY_SIDE, 0)
    return Job(
        name="policy_gradient",
        model=source.policy,
        example=torch.zeros(2, source.policy[0].in_features),
        batches=lambda number: [100 * (number * count + i) for i in range(count)],
        loss=Reinforce(fleet, frozen(source.critic), steps),
        quality=source.quality,
        measure="mean_return",
        larger_is_better=True,
        prune={"macs_ratio": 0.5 if quick else 0.2, "minibatches_per_step": 1 if quick else 4, "lr": 0.001},
        finetune_epochs=1 if quick else 6,
        finetune_lr=3e-4,
        facts={
            **source.facts(),
            "loss": "clipped policy-gradient surrogate with entropy bonus, on steps the network itself takes",
            "data": f"{len(fleet.all)} x {steps} environment steps per minibatch",
        },
    ), source.cpu_s
