"""A policy that lands a spacecraft, pruned by imitating its former self: mean return of 100 episodes.

The policy is learned by proximal policy optimisation. The loss that prunes and fine-tunes is the
Kullback-Leibler divergence from the original policy in the states that it visited; no reward is needed.
`any_loss_policy_gradient.py` prunes the same policy by its reward instead.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.any_loss_harness import Job, frozen, shown
from benchmarks.any_loss_ppo import episodes, learn
from benchmarks.common import note

ENVIRONMENT, QUICK = "LunarLander-v3", "CartPole-v1"
BATCH, TESTED = 256, 100


@dataclass(frozen=True)
class Trained:
    """A learned policy, its critic, the CPU seconds that took, and how it is measured."""

    name: str
    policy: nn.Sequential
    critic: nn.Sequential
    cpu_s: float
    episodes: int

    def quality(self, policy: nn.Module) -> dict[str, float]:
        """Mean return of episodes with fixed seeds and most probable actions, with its 95 % interval."""
        total = episodes(self.name, policy, self.episodes, seed=1_000_000)[0]
        mean, half = float(total.mean()), 1.96 * float(total.std()) / self.episodes**0.5
        return {"mean_return": mean, "low": mean - half, "high": mean + half, "worst": float(total.min())}

    def facts(self) -> dict[str, Any]:
        width = self.policy[0].out_features
        return {
            "model": f"actor with two hidden layers of {width}, learned by proximal policy optimisation",
            "quality": f"mean return of {self.episodes} episodes of {self.name}, fixed seeds, most probable "
            "actions",
        }


@cache
def trained(quick: bool) -> Trained:
    """The policy to prune: CartPole for a quick look, the lunar lander for the figures."""
    torch.manual_seed(0)
    started = time.process_time()
    name = QUICK if quick else ENVIRONMENT
    policy, critic = learn(name, 16 if quick else 128, 2 if quick else 120)
    found = Trained(name, policy, critic, time.process_time() - started, 5 if quick else TESTED)
    note(f"policy trained: {found.cpu_s:.0f} CPU s, {shown(found.quality(policy))}")
    return found


@dataclass(frozen=True)
class Imitate:
    """Mean KL divergence of the model's action probabilities from the original's, in nats."""

    original: nn.Module

    def __call__(self, model: nn.Module, states: Tensor) -> Tensor:
        wanted = self.original(states).log_softmax(1)
        return functional.kl_div(model(states).log_softmax(1), wanted, reduction="batchmean", log_target=True)


@lru_cache(maxsize=4)
def epoch(states: Tensor, number: int, count: int) -> list[Tensor]:
    """`count` batches of states, drawn at random."""
    rng = torch.Generator().manual_seed(number)
    return list(states[torch.randint(len(states), (count * BATCH,), generator=rng)].split(BATCH))


def job(quick: bool) -> tuple[Job, float]:
    """The trained policy with all that its pruning needs, and the CPU seconds its training took."""
    source = trained(quick)
    torch.manual_seed(1)
    seen = episodes(source.name, source.policy, 4 if quick else 100, seed=2_000_000, greedy=False)[1]
    return Job(
        name="policy",
        model=source.policy,
        example=seen[:2],
        batches=partial(epoch, seen, count=5 if quick else 50),
        loss=Imitate(frozen(source.policy)),
        quality=source.quality,
        measure="mean_return",
        larger_is_better=True,
        prune={"macs_ratio": 0.5 if quick else 0.1, "minibatches_per_step": 1 if quick else 10, "lr": 0.01},
        finetune_epochs=1 if quick else 10,
        finetune_lr=1e-3,
        facts={
            **source.facts(),
            "loss": "KL divergence from the original policy in states that it visited",
            "data": f"{len(seen)} states from episodes of the original policy",
        },
    ), source.cpu_s
