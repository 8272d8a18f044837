"""What the loop scores with: the expanded logits against their definition, and the loop that uses them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import randomise
from pipelines import start, stop_after
from torch import Tensor, nn
from torch.nn import functional

import compress
from compress import criteria, files
from compress.channelmap import ChannelMap, channel_map
from compress.errors import ConfigError, Interrupted
from compress.gated import Gated
from compress.scorers import Logits
from compress.shares import Share
from compress.task import CrossEntropy
from compress.trace import GraphNet, trace
from compress.zoo import cifar_resnet

N, CLASSES = 12, 7


def prepared(dtype: torch.dtype = torch.float64) -> tuple[GraphNet, ChannelMap, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(N, 3, 10, 10, generator=generator, dtype=dtype)
    model = randomise(cifar_resnet(8, width=4, classes=CLASSES)).eval()
    traced = trace(model, (x.float(),))
    return traced.net.to(dtype), channel_map(traced), (x, torch.arange(N) % CLASSES)


def test_shifts_are_differences_of_the_logits_derivatives() -> None:
    net, cmap, (x, y) = prepared()
    gated = Gated(net, cmap)
    log_p, shifts = criteria.logit_shifts(gated, x, y)
    logits = gated(x)
    columns = [torch.autograd.grad(c.sum(), gated.used, retain_graph=True)[0] for c in logits.T]
    jacobian = torch.stack(columns, 1)
    likeliest = logits.detach().scatter(1, y[:, None], -torch.inf).argsort(1, descending=True)[:, :-1]
    for n in range(N):
        assert torch.allclose(log_p[n].exp().sum(), torch.ones((), dtype=x.dtype))
        torch.testing.assert_close(shifts[n], jacobian[n, y[n]] - jacobian[n, likeliest[n]])


def test_changes_are_those_of_the_cross_entropy_however_large() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 30 * torch.randn(N, CLASSES, generator=generator, dtype=torch.float64)
    steps = torch.randn(N, CLASSES, 5, generator=generator, dtype=torch.float64)
    steps = steps * torch.tensor([1e-9, 1e-3, 1.0, 100.0, 1e4], dtype=torch.float64)
    y = torch.arange(N) % CLASSES
    log_p = logits.log_softmax(1)
    wrong = torch.stack([torch.tensor([c for c in range(CLASSES) if c != label]) for label in y])
    shifts = steps.gather(1, wrong[:, :, None].expand(-1, -1, 5)) - steps[torch.arange(N), y][:, None]
    found = criteria.loss_changes(torch.cat([log_p.gather(1, y[:, None]), log_p.gather(1, wrong)], 1), shifts)

    def loss(z: Tensor) -> Tensor:
        return functional.cross_entropy(z, y, reduction="none")

    for step in range(5):
        expected = loss(logits + steps[:, :, step]) - loss(logits)
        torch.testing.assert_close(found[:, step], expected, rtol=1e-5, atol=1e-13)


def test_fewer_classes_never_say_more_than_all_and_all_but_one_say_it_all() -> None:
    """Jensen: the exponential of a mean is at most the mean of exponentials."""
    net, cmap, (x, y) = prepared()
    gated = Gated(net, cmap)
    full = criteria.loss_changes(*criteria.logit_shifts(gated, x, y))
    sums = []
    for classes in range(CLASSES + 1):
        log_p, shifts = criteria.logit_shifts(gated, x, y, classes)
        assert shifts.shape[1] == min(classes + 1, CLASSES - 1)
        found = criteria.loss_changes(log_p, shifts)
        assert bool((found <= full + 1e-12).all())
        sums.append(float((full - found).sum()))
    assert sums[0] > sums[1] > sums[2] > 0
    torch.testing.assert_close(found, full)
    assert sums[-1] == pytest.approx(0, abs=1e-12)


def test_to_first_order_it_is_the_papers_estimate() -> None:
    """Small gates' worth: the loss bends so little that both say the same."""
    net, cmap, batch = prepared()
    with torch.no_grad():
        net.get_parameter("linear.weight").mul_(1e-5)
        net.get_parameter("linear.bias").mul_(1e-5)
    gated = Gated(net, cmap)
    paper = criteria.taylor(gated, batch, CrossEntropy())
    for classes in (0, 1, None):
        found = criteria.squared_mean(criteria.loss_changes(*criteria.logit_shifts(gated, *batch, classes)))
        torch.testing.assert_close(found, paper, rtol=1e-3, atol=float(paper.max()) * 1e-4)


def test_scoring_moves_nothing() -> None:
    net, cmap, batch = prepared(torch.float32)
    net.train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    CrossEntropy()(net, batch).backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters()}
    net.load_state_dict(before)
    scorer = Logits(net, cmap)
    scorer.accumulate(net, Share(batch))
    scores = scorer.scores()
    assert net.training
    assert scores.shape == (cmap.units,)
    assert float(scores.min()) > 0
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(torch.equal(p.grad, gradients[name]) for name, p in net.named_parameters())


def test_what_left_scores_nothing() -> None:
    net, cmap, batch = prepared(torch.float32)
    keep = np.arange(cmap.units) % 3 > 0
    compress.surgery.mask(net, cmap, keep)
    scorer = Logits(net, cmap)
    scorer.accumulate(net, Share(batch))
    scores = scorer.scores()
    assert float(np.abs(scores[~keep]).max()) == 0
    assert float(scores[keep].min()) > 0


def test_a_loss_of_its_own_is_refused() -> None:
    x = torch.randn(8, 4)
    with pytest.raises(
        ConfigError, match=r"prune\.criterion: logits needs a classifier.*another loss; use taylor"
    ):
        compress.prune(
            nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)),
            x,
            [x],
            lambda model, batch: model(batch).square().mean(),
            criterion="logits",
        )


@pytest.mark.slow
def test_a_run_by_logits_resumes_to_the_same_bytes(tmp_path: Path) -> None:
    for name in ("whole", "halves"):
        (tmp_path / name).mkdir()
    overrides = ["prune.criterion=logits"]
    start(tmp_path / "whole", overrides, until="prune")
    start(tmp_path / "halves", overrides, until="train")
    with pytest.raises(Interrupted, match="stopped after removal 2"):
        start(tmp_path / "halves", overrides, until="prune", should_stop=stop_after(3))
    assert not (tmp_path / "halves/run/prune.json").exists()
    start(tmp_path / "halves", overrides, until="prune")
    written = files.read_json(tmp_path / "whole/run/prune.json")
    assert written["criterion"] == "logits"
    for name in ("pruned.safetensors", "plan.json"):
        first, second = ((tmp_path / place / "run" / name).read_bytes() for place in ("whole", "halves"))
        assert first == second
