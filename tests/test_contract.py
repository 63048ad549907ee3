"""The equalities that define correctness, over every registered network, loss and rule: to be
listed is to be tested.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.core.split import split
from layerwise.losses import LOSSES, Evaluated, Site, Targets, create_loss
from layerwise.rules import RULES
from layerwise.rules.base import Position
from layerwise.rules.feature_cache import Keeping
from tests.helpers import (
    CLASSES,
    NETWORKS,
    RULES_AND_LOSSES,
    SOME_NETWORKS,
    digits,
    learner,
    network,
    same_weights,
    ticks,
)

LOCAL_RULES = [name for name, rule in RULES.items() if rule.at is None]


@pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
@pytest.mark.parametrize("at", ["layer", "block", 1, 2])
@pytest.mark.parametrize("name", NETWORKS)
def test_units_composed_are_the_network(name: str, at: Any, training: bool) -> None:
    model = network(name)
    images = torch.randn(4, 1, 8, 8)
    chain = split(model, at, sample=images)
    model.train(training)
    chain.train(training)
    outputs = []
    for version in (model, chain):
        torch.manual_seed(1)  # the same dropout
        outputs.append(version(images))
    assert torch.equal(outputs[0], outputs[1])
    owners = [id(parameter) for piece in chain.pieces for parameter in piece.parameters()]
    assert sorted(owners) == sorted(id(parameter) for parameter in model.parameters())


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SOME_NETWORKS)
def test_one_unit_is_global_backpropagation(name: str, loss: str) -> None:
    data = digits()
    local = learner(name, loss, at=RULES["global"].at, seed=None)
    torch.manual_seed(5)
    ticks("global", local, data.train, epochs=2)

    plain = network(name)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-3)
    torch.manual_seed(5)
    for epoch in range(2):
        plain.train()
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - epoch / 2 / 2)
        for images, labels in data.train.batches(epoch):
            optimizer.zero_grad()
            F.cross_entropy(plain(images), labels).backward()
            optimizer.step()
    assert same_weights(local.model, plain)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SOME_NETWORKS)
@pytest.mark.parametrize("threads", [2, 3])
def test_parallel_is_simultaneous(name: str, loss: str, threads: int) -> None:
    data = digits()
    one, other = learner(name, loss), learner(name, loss)
    ticks("simultaneous", one, data.train, epochs=2)
    results = ticks("parallel", other, data.train, epochs=2, threads=threads)
    assert same_weights(one.model, other.model)
    assert [tick.resumable for tick in results] == [tick.ends_epoch for tick in results]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SOME_NETWORKS)
def test_sequential_with_cached_features_is_sequential_without(
    name: str, loss: str, tmp_path: Path
) -> None:
    data = digits(views=2)
    # batches of one size are computed to the same bits
    assert {len(indices) for indices in data.train.order(0)} == {16}
    plain, *others = learner(name, loss), learner(name, loss), learner(name, loss)
    without = ticks("sequential", plain, data.train, epochs=2)
    for other, keeping in zip(others, (Keeping(), Keeping(tmp_path / "features")), strict=True):
        cached = ticks("sequential", other, data.train, epochs=2, cache=True, keeping=keeping)
        assert [tick.result.losses for tick in without] == [tick.result.losses for tick in cached]
        assert same_weights(plain.model, other.model)
        assert (cached[-1].kept_bytes > 0) == (keeping.file is None)
    assert without[-1].kept_bytes == 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("rule", "loss"), RULES_AND_LOSSES)
@pytest.mark.parametrize("name", ["vgg8b", "resnet18", "plain"])
def test_interrupted_and_resumed_is_uninterrupted(name: str, rule: str, loss: str) -> None:
    data, at = digits(), RULES[rule].at or "layer"
    whole = learner(name, loss, at=at)
    history = ticks(rule, whole, data.train, epochs=2)
    resumable = [number for number, tick in enumerate(history[:-1]) if tick.resumable]
    stop = resumable[len(resumable) // 2]

    first = learner(name, loss, at=at)
    order = RULES[rule].order(first, data.train, 2, lambda done: 1 - done / 2, Position())
    for _ in range(stop + 1):
        tick = next(order)
    state = copy.deepcopy(first.state_dict())
    del order

    second = learner(name, loss, at=at)
    second.load_state_dict(state)
    ticks(rule, second, data.train, 2, tick.after)
    assert same_weights(whole.model, second.model)
    for one, other in zip(whole.units, second.units, strict=True):
        assert same_weights(one.loss, other.loss)


class Scaled(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        loss, correct = self.loss(features, targets)
        return Evaluated(3 * loss + features.square().mean(), correct)


class Recorder(torch.optim.SGD):
    """Changes nothing and keeps the gradients it was given."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.0)
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:
        self.gradients = [
            p.grad.clone()
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", SOME_NETWORKS)
def test_no_gradient_crosses_a_border(name: str, loss: str) -> None:
    images, labels = next(digits().train.batches(0))

    def gradients(changed: int | None) -> list[list[Tensor]]:
        local = learner(name, loss, optimizer=Recorder)
        for unit in local.units:
            if unit.index == changed:
                unit.loss = Scaled(unit.loss)
        local.step(images.requires_grad_(), labels)
        assert images.grad is None  # the image itself needs no gradient
        # none outlives its unit's step
        assert all(parameter.grad is None for parameter in local.model.parameters())
        return [unit.optimizer.gradients for unit in local.units]

    plain = gradients(None)
    assert all(plain)
    for changed in range(len(plain)):
        for index, (before, after) in enumerate(zip(plain, gradients(changed), strict=True)):
            equal = all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert equal == (index != changed), (
                f"unit {index} when the loss of unit {changed} changed"
            )


def cosine(a: list[float], b: list[float]) -> float:
    a, b = [v - sum(a) / len(a) for v in a], [v - sum(b) / len(b) for v in b]
    lengths = [1e-8 + sum(v * v for v in vector) ** 0.5 for vector in (a, b)]
    return max(
        -1.0, min(1.0, sum(x * y for x, y in zip(a, b, strict=True)) / lengths[0] / lengths[1])
    )


@pytest.mark.parametrize(
    "shape", [(8, 4, 4), (8, 5, 3), (3, 4, 4), (8, 1, 1), (12,), (2,)], ids=str
)
def test_predsim_is_a_loop_over_pairs(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    loss = create_loss("predsim", Site(0, 2, shape, 4), beta=0.7, decoder_dim=16)
    torch.nn.init.normal_(loss.pred.classifier.weight)
    features, labels = torch.randn(6, *shape), torch.tensor([0, 1, 1, 3, 0, 2])

    transformed = loss.sim.transform(features)
    vectors = []
    for example in transformed:
        if len(shape) == 3 and shape[0] > 3 and shape[1] * shape[2] > 1:
            rows = [channel.flatten().tolist() for channel in example]
            means = [sum(row) / len(row) for row in rows]
            vectors.append(
                [
                    (sum((v - m) ** 2 for v in r) / (len(r) - 1)) ** 0.5
                    for r, m in zip(rows, means, strict=True)
                ]
            )
        else:
            vectors.append(example.flatten().tolist())
    onehot = [[float(label == c) for c in range(4)] for label in labels]
    pairs = [(i, j) for i in range(6) for j in range(6)]
    sim = (
        sum((cosine(vectors[i], vectors[j]) - cosine(onehot[i], onehot[j])) ** 2 for i, j in pairs)
        / 36
    )

    pooled = features
    if len(shape) == 3:
        height, width, turn = 1, 1, True
        while shape[0] * -(-shape[1] // height) * -(-shape[2] // width) > 16 and (
            height < shape[1] or width < shape[2]
        ):
            height, width, turn = (2 * height, width, False) if turn else (height, 2 * width, True)
        pooled = torch.stack(
            [
                features[:, :, i : i + height, j : j + width].mean((2, 3))
                for i in range(0, shape[1], height)
                for j in range(0, shape[2], width)
            ],
            dim=2,
        )
    pred = F.cross_entropy(loss.pred.classifier(pooled.flatten(1)), labels)
    value, _ = loss(features, Targets(labels, 4))
    assert value.item() == pytest.approx(0.7 * sim + 0.3 * pred.item(), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("rule", LOCAL_RULES)
def test_every_rule_and_loss_learns(rule: str, loss: str) -> None:
    data = digits(train_images=400, batch_size=40)
    local = learner(
        "plain", loss, optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-3)
    )
    history = ticks(rule, local, data.train, epochs=8)
    for unit in range(len(local.units)):
        curve = [
            t.result.losses[unit - t.first]
            for t in history
            if t.first <= unit < t.first + len(t.result.losses)
        ]
        assert sum(curve[-5:]) < 0.9 * sum(curve[:5]), f"unit {unit}"
    local.model.eval()
    with torch.no_grad():
        correct = sum(int((local.model(x).argmax(1) == y).sum()) for x, y in data.test.in_order())
    assert correct / len(data.test.labels) > 3 / CLASSES
