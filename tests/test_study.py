"""The study of criteria against units that are really left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers import randomise
from torch import Tensor
from torch.nn import functional

from compress import criteria
from compress.channelmap import ChannelMap, channel_map
from compress.errors import DataError
from compress.gated import Gated
from compress.study import TRUTHS, Study, study
from compress.trace import GraphNet, trace
from compress.zoo import cifar_resnet


def prepared() -> tuple[GraphNet, ChannelMap, list[tuple[Tensor, Tensor]]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 10, 10)
    traced = trace(randomise(cifar_resnet(8, width=4, classes=5)).eval(), (x,))
    batches = [
        (torch.randn(8, 3, 10, 10, generator=generator), torch.randint(0, 5, (8,), generator=generator))
        for _ in range(3)
    ]
    return traced.net, channel_map(traced), batches


def test_truths_are_what_leaving_units_out_does() -> None:
    net, cmap, batches = prepared()
    seen: list[int] = []
    found = study(net, cmap, batches, progress=seen.append)
    changes = [criteria.leave_out(Gated(net, cmap), x, y).double().numpy() for x, y in batches]
    assert seen == [1, 2, 3]
    assert found.images == 24
    assert tuple(found.truths) == TRUTHS
    together = np.concatenate(changes)
    assert np.allclose(found.truths["mean"], together.mean(0) ** 2)
    assert np.allclose(found.truths["minibatch"], np.mean([c.mean(0) ** 2 for c in changes], axis=0))
    assert np.allclose(found.truths["example"], (together**2).mean(0))
    for name, values in found.scores.items():
        assert values.shape == (cmap.units,), name
        assert np.isfinite(values).all(), name
    plain = [
        criteria.taylor(Gated(net, cmap), batch, lambda m, b: functional.cross_entropy(m(b[0]), b[1]))
        for batch in batches
    ]
    assert np.allclose(found.scores["taylor"], torch.stack(plain).mean(0), rtol=1e-5)
    assert np.allclose(found.scores["taylor, writing side"], found.scores["taylor"], rtol=1e-3)  # all is ReLU


def test_some_units_only() -> None:
    net, cmap, batches = prepared()
    few, every = study(net, cmap, batches, units=[5, 1, 9]), study(net, cmap, batches)
    assert few.units.tolist() == [1, 5, 9]
    for name, values in few.scores.items():
        assert np.allclose(values, every.scores[name][few.units]), name
    for kind, values in few.truths.items():
        assert np.allclose(values, every.truths[kind][few.units])


def test_the_network_is_left_as_it_was() -> None:
    net, cmap, batches = prepared()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    study(net, cmap, batches[:1])
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_correlations() -> None:
    generator = np.random.default_rng(0)
    truth = generator.random(40)
    classes = np.repeat([0, 1], 20)
    scores = {"same": truth**3, "opposite": -truth, "other": generator.random(40), "flat": np.ones(40)}
    rows = Study(scores, {"mean": truth}, classes, np.arange(40), 1).correlations()
    found = {row["criterion"]: row for row in rows}
    assert found["same"]["spearman"] == found["same"]["kendall"] == pytest.approx(1)
    assert found["same"]["spearman_within_layers"] == pytest.approx(1)
    assert found["same"]["pearson"] < 1
    assert found["opposite"]["pearson"] == found["opposite"]["spearman"] == pytest.approx(-1)
    assert abs(found["other"]["spearman"]) < 0.5
    assert found["flat"]["spearman"] is None


def test_how_many_images_suffice() -> None:
    net, cmap, batches = prepared()
    found = study(net, cmap, batches)
    rows = {(row["criterion"], row["minibatches"]): row for row in found.samples()}
    assert {count for _, count in rows} == {1, 2, 3}
    assert [rows["taylor", count]["images"] for count in (1, 2, 3)] == [8, 16, 24]
    whole = {row["criterion"]: row["spearman"] for row in found.correlations() if row["truth"] == "minibatch"}
    assert rows["taylor", 3]["spearman"] == pytest.approx(whole["taylor"])
    assert rows["the truth", 3]["spearman"] == pytest.approx(1)
    assert rows["the truth", 1]["spearman"] < 0.999
    assert "magnitude L2" not in {name for name, _ in rows}


def test_the_expanded_logits_come_closer_to_the_truth_than_the_expanded_loss() -> None:
    net, cmap, batches = prepared()
    with torch.no_grad():
        net.get_parameter("linear.weight").mul_(20)  # confident, so that the loss bends
    found = study(net, cmap, batches)
    truth = found.truths["minibatch"]
    far = {name: np.abs(found.scores[name] - truth).sum() for name in ("taylor", "logits, all classes")}
    assert far["logits, all classes"] < 0.7 * far["taylor"]
    spearman = {(row["criterion"], row["truth"]): row["spearman"] for row in found.correlations()}
    assert spearman["logits, all classes", "minibatch"] > 0.9
    assert spearman["random", "minibatch"] < 0.5


def test_no_examples() -> None:
    net, cmap, _ = prepared()
    with pytest.raises(DataError, match="no examples to study"):
        study(net, cmap, [])
