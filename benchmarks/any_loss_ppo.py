"""Proximal policy optimisation (Schulman et al., 2017), small, for environments with discrete actions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

ENVIRONMENTS, HORIZON = 16, 512
DISCOUNT, TRACE = 0.995, 0.95  # of rewards; of the advantage estimate (lambda)
PASSES, MINIBATCH, CLIP, ENTROPY = 4, 256, 0.2, 0.01


@dataclass(frozen=True)
class Experience:
    """Steps of all environments, flattened: (n, observation), (n,) each."""

    states: Tensor
    actions: Tensor
    log_probability: Tensor
    advantage: Tensor
    returns: Tensor


class Fleet:
    """Environments stepped side by side; each starts anew when its episode ends."""

    def __init__(self, name: str, count: int, seed: int) -> None:
        import gymnasium

        self.all = [gymnasium.make(name) for _ in range(count)]
        self.restart(seed)

    def restart(self, seed: int) -> None:
        """Begin anew; everything that happens follows from `seed` and the actions."""
        self.states = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(self.all)])

    def step(self, actions: Sequence[int]) -> tuple[np.ndarray, np.ndarray, list[tuple[int, np.ndarray]]]:
        """Rewards (k,), whether an episode ended (k,), and (environment, last state) of those cut by time."""
        rewards, ended = np.zeros(len(self.all), np.float32), np.zeros(len(self.all), bool)
        cut: list[tuple[int, np.ndarray]] = []
        for i, (env, action) in enumerate(zip(self.all, actions, strict=True)):
            self.states[i], reward, over, late, _ = env.step(action)
            rewards[i], ended[i] = float(reward), over or late
            if ended[i]:
                if not over:
                    cut.append((i, self.states[i].copy()))
                self.states[i] = env.reset()[0]
        return rewards, ended, cut


def network(inputs: int, outputs: int, width: int) -> nn.Sequential:
    """(n, inputs) to (n, outputs) over two hidden layers."""
    net = nn.Sequential(
        *(nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()),
        nn.Linear(width, outputs),
    )
    for layer, gain in zip(net[::2], (2**0.5, 2**0.5, 0.01 if outputs > 1 else 1.0), strict=True):
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)
    return net


def learn(
    name: str, width: int, rounds: int, lr: float = 7e-4, seed: int = 0
) -> tuple[nn.Sequential, nn.Sequential]:
    """A policy (observation to action logits) and a critic (observation to what is still to come).

    They learn from rounds x ENVIRONMENTS x HORIZON steps of experience.
    """
    fleet = Fleet(name, ENVIRONMENTS, seed)
    space: Any = fleet.all[0].action_space
    policy = network(fleet.states.shape[1], int(space.n), width)
    critic = network(fleet.states.shape[1], 1, width)
    parameters = [*policy.parameters(), *critic.parameters()]
    optimizer = torch.optim.Adam(parameters, lr, eps=1e-5)
    for number in range(rounds):
        optimizer.param_groups[0]["lr"] = lr * (1 - number / rounds)
        seen = gather(fleet, policy, critic, HORIZON)
        for _ in range(PASSES):
            for part in torch.randperm(len(seen.actions)).split(MINIBATCH):
                loss = objective(policy, seen, part)
                loss = loss + 0.5 * functional.mse_loss(critic(seen.states[part])[:, 0], seen.returns[part])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
                nn.utils.clip_grad_norm_(parameters, 0.5)
                optimizer.step()
    return policy, critic


def objective(policy: nn.Module, seen: Experience, part: Tensor) -> Tensor:
    """The clipped surrogate, negated, less an entropy bonus."""
    log_p = policy(seen.states[part]).log_softmax(1)
    chosen = log_p.gather(1, seen.actions[part][:, None])[:, 0]
    ratio = (chosen - seen.log_probability[part]).exp()
    advantage = seen.advantage[part]
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()
    return -gain + ENTROPY * (log_p.exp() * log_p).sum(1).mean()


@torch.no_grad()
def gather(fleet: Fleet, policy: nn.Module, critic: nn.Module, horizon: int) -> Experience:
    """`horizon` steps of every environment, with generalised advantages (Schulman et al., 2016)."""
    states, actions, logs, rewards, ends = [], [], [], [], []
    for _ in range(horizon):
        now = torch.from_numpy(fleet.states.copy()).float()
        log_p = policy(now).log_softmax(1)
        action = torch.multinomial(log_p.exp(), 1)
        reward, ended, cut = fleet.step(action[:, 0].tolist())
        for i, last in cut:  # time ran out: what would have come is the critic's guess
            reward[i] += DISCOUNT * float(critic(torch.from_numpy(last).float()[None]))
        states.append(now)
        actions.append(action[:, 0])
        logs.append(log_p.gather(1, action)[:, 0])
        rewards.append(torch.from_numpy(reward))
        ends.append(torch.from_numpy(ended).float())
    values = critic(torch.stack([*states, torch.from_numpy(fleet.states.copy()).float()]))[..., 0]
    advantage, later = torch.zeros(horizon, len(fleet.all)), torch.zeros(len(fleet.all))
    for t in reversed(range(horizon)):
        goes_on = 1 - ends[t]
        error = rewards[t] + DISCOUNT * goes_on * values[t + 1] - values[t]
        later = error + DISCOUNT * TRACE * goes_on * later
        advantage[t] = later
    returns = (advantage + values[:-1]).reshape(-1)
    spread = (advantage - advantage.mean()) / (advantage.std() + 1e-8)
    return Experience(torch.cat(states), torch.cat(actions), torch.cat(logs), spread.reshape(-1), returns)


@torch.no_grad()
def episodes(
    name: str, policy: nn.Module, count: int, seed: int, *, greedy: bool = True
) -> tuple[Tensor, Tensor]:
    """Total reward of `count` episodes, with seeds from `seed` on (count,), and the states visited (n, d)."""
    fleet = Fleet(name, count, seed)
    total, going = torch.zeros(count), torch.ones(count, dtype=torch.bool)
    visited = []
    policy.eval()
    while going.any():
        now = torch.from_numpy(fleet.states.copy()).float()
        visited.append(now[going])
        logits = policy(now)
        action = logits.argmax(1) if greedy else torch.multinomial(logits.softmax(1), 1)[:, 0]
        live = going.nonzero()[:, 0].tolist()
        for i in live:
            fleet.states[i], reward, over, late, _ = fleet.all[i].step(int(action[i]))
            total[i] += float(reward)
            going[i] = not (over or late)
    return total, torch.cat(visited)
