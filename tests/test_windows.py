"""Overlapping windows against a slow formulation: every loss differentiated by itself."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES, Targets
from layerwise.models import list_models
from tests.helpers import CLASSES, narrow, network

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % CLASSES
RATE = 0.1


class Changes(nn.Module):
    """A network whose units change what enters them in place, without batch statistics."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.out, self.relu = nn.Linear(4, CLASSES), nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.two(self.relu(self.one(x)))
        return self.out(self.relu(x).mean((2, 3)))


def without_dropout(name: str) -> nn.Module:
    return narrow(name, 0.0) if name in list_models() else network(name)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=RATE)


def make(model: nn.Module, **options: Any) -> Learner:
    return localize(model, IMAGES, CLASSES, optimizer=sgd, seed=0, check=False, **options)


def slow_gradients(learner: Learner, span: int) -> list[dict[nn.Parameter, Tensor]]:
    """Gradients of each unit's weights: of its own loss and of those of span − 1 units behind.

    Each loss is computed from activations that are detached where its window begins.
    """
    targets = Targets(LABELS, CLASSES, IMAGES)
    units = learner.units
    with torch.no_grad():
        entering = [(IMAGES,)]
        for unit in units:
            entering.append(unit.forward(entering[-1]))
    sums: list[dict[nn.Parameter, Tensor]] = [{} for _ in units]
    for last, unit in enumerate(units):
        first = max(last - span + 1, 0)
        activations = tuple(v.clone() if isinstance(v, Tensor) else v for v in entering[first])
        for earlier in units[first:last]:
            activations = earlier.forward(activations)
        _, (loss, _) = unit.evaluate(activations, targets)
        owners = {
            weight: index
            for index in range(first, last + 1)
            for weight in units[index].parameters()
        }
        # in one call, since some losses overwrite their maps in it
        found = torch.autograd.grad(loss, list(owners), allow_unused=True)
        for (weight, index), gradient in zip(owners.items(), found, strict=True):
            if gradient is not None:
                sums[index][weight] = sums[index].get(weight, torch.zeros(())) + gradient
    return sums


def updates(learner: Learner) -> list[list[Tensor]]:
    """What a step takes off the weights of each unit, divided by the rate."""
    before = [[weight.detach().clone() for weight in unit.weights()] for unit in learner.units]
    learner.step(IMAGES, LABELS)
    return [
        [(was - weight.detach()) / RATE for weight, was in zip(unit.weights(), held, strict=True)]
        for unit, held in zip(learner.units, before, strict=True)
    ]


def follows_the_sum(learner: Learner, span: int) -> None:
    """Assert that a step is the slow one of a copy."""
    learner.train()
    slow = copy.deepcopy(learner)
    expected = slow_gradients(slow, span)
    for unit, sums, moved in zip(slow.units, expected, updates(learner), strict=True):
        scale = max((float(gradient.abs().max()) for gradient in sums.values()), default=1.0)
        for weight, update in zip(unit.weights(), moved, strict=True):
            wanted = sums.get(weight, torch.zeros_like(weight))
            torch.testing.assert_close(update, wanted, atol=1e-4 * max(scale, 1e-2), rtol=1e-3)


@pytest.mark.parametrize("span", [1, 2, 3])
@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("resnet18", "layer"),
        ("resnet18", "block"),
        ("vgg8b", "layer"),
        ("pre-activation", "layer"),
    ],
)
def test_windows_follow_the_sum_of_the_losses_that_reach_a_unit(
    name: str, at: str, span: int
) -> None:
    model = without_dropout(name)
    cut = {"output_layer": "separate"} if name == "pre-activation" else {}
    follows_the_sum(make(model, at=at, loss="pred", span=span, **cut), span)


@pytest.mark.parametrize("options", [{"transport": 0.5, "own_input": 0.5}, {}])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_can_be_windowed(loss: str, options: dict[str, float]) -> None:
    model = without_dropout("resnet18")
    follows_the_sum(make(model, at="block", loss=loss, span=2, **options), 2)


def test_a_span_of_all_units_reaches_the_first() -> None:
    learner = make(without_dropout("resnet18"), at="block", loss="pred", span=5)
    follows_the_sum(learner, 5)


def test_a_unit_that_changes_its_input_in_place_may_be_windowed() -> None:
    follows_the_sum(make(Changes(), at=["one", "two"], output_layer="separate", span=2), 2)


def test_frozen_layers_pass_gradients_on() -> None:
    learner = make(without_dropout("resnet18"), at="block", loss="pred", span=2)
    for weight in learner.units[1].piece.parameters():
        weight.requires_grad_(False)
    follows_the_sum(learner, 2)


def test_parts_of_a_batch_are_a_batch() -> None:
    whole, parted = (
        make(Changes(), at="layer", loss="pred", output_layer="separate", span=2) for _ in range(2)
    )
    whole.step(IMAGES, LABELS)
    parted.step(IMAGES[:6], LABELS[:6], update=False)
    parted.step(IMAGES[6:], LABELS[6:])
    for ours, theirs in zip(whole.model.parameters(), parted.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("span", [0, 6, 10**20])
def test_a_span_beyond_the_chain_is_refused(span: int) -> None:
    with pytest.raises(InvalidInput, match=f"Cannot use span {span}: the chain has 5 units"):
        make(without_dropout("resnet18"), at="block", span=span)
