"""Overlapping windows against a slow formulation: every loss differentiated by itself."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.core.reach import reach_of_span
from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES, Targets
from layerwise.models import list_models
from tests.helpers import CLASSES, narrow, network, same_weights

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


def slow_gradients(learner: Learner, reach: Sequence[int]) -> list[dict[nn.Parameter, Tensor]]:
    """Gradients of each unit's weights: the sum of those of all losses that reach it.

    Each loss is computed from activations that are detached where its window begins; one that
    reaches no unit, from a detached feature.
    """
    targets = Targets(LABELS, CLASSES, IMAGES)
    units = learner.units
    with torch.no_grad():
        entering = [(IMAGES,)]
        for unit in units:
            entering.append(unit.forward(entering[-1]))
    sums: list[dict[nn.Parameter, Tensor]] = [{} for _ in units]
    for last, unit in enumerate(units):
        first = reach[last]
        activations = tuple(
            v.clone() if isinstance(v, Tensor) else v for v in entering[min(first, last)]
        )
        for earlier in units[first:last]:
            activations = earlier.forward(activations)
        _, (loss, _) = unit.evaluate(activations, targets)
        if first > last:
            owners = dict.fromkeys(unit.loss.parameters(), last)
        else:
            owners = {
                weight: index
                for index in range(first, last + 1)
                for weight in units[index].parameters()
            }
        # in one call, since some losses overwrite their maps in it
        found = torch.autograd.grad(loss, list(owners), allow_unused=True) if owners else ()
        for (weight, index), gradient in zip(owners.items(), found, strict=True):
            if gradient is not None:
                sums[index][weight] = sums[index].get(weight, torch.zeros(())) + gradient
    return sums


def updates(learner: Learner, step: Callable[[], Any]) -> list[list[Tensor]]:
    """What a step takes off the weights of each unit, divided by the rate."""
    before = [[weight.detach().clone() for weight in unit.weights()] for unit in learner.units]
    step()
    return [
        [(was - weight.detach()) / RATE for weight, was in zip(unit.weights(), held, strict=True)]
        for unit, held in zip(learner.units, before, strict=True)
    ]


def window(span: int | Sequence[int], count: int) -> list[int]:
    """The first unit that each loss reaches, by its span."""
    spans = [span] * count if isinstance(span, int) else span
    return [max(index - number + 1, 0) for index, number in enumerate(spans)]


def follows_the_sum(learner: Learner, span: int | Sequence[int]) -> None:
    """Assert that a step is the slow one of windows of these spans."""
    follows_the_reach(learner, window(span, len(learner.units)))


def follows_the_reach(
    learner: Learner, reach: Sequence[int], step: Callable[[], Any] | None = None
) -> None:
    """Assert that a step, by default the learner's own, is the slow one of a copy."""
    learner.train()
    learner.step(IMAGES, LABELS)  # some heads begin at zero, and reach nothing in the first
    slow = copy.deepcopy(learner)
    expected = slow_gradients(slow, reach)
    moves = updates(learner, step or partial(learner.step, IMAGES, LABELS))
    for unit, sums, moved in zip(slow.units, expected, moves, strict=True):
        scale = max((float(gradient.abs().max()) for gradient in sums.values()), default=1.0)
        for weight, update in zip(unit.weights(), moved, strict=True):
            if not weight.requires_grad and unit.reads_later_weights:
                continue  # an average of other weights
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


@pytest.mark.parametrize("span", [[1, 1, 3, 1, 2], [1, 2, 1, 4, 1], [2, 1, 2, 3, 3]], ids=str)
def test_every_unit_may_have_a_span_of_its_own(span: list[int]) -> None:
    learner = make(without_dropout("resnet18"), at="block", loss="pred", span=span)
    follows_the_sum(learner, span)


@pytest.mark.parametrize("loss", ["pred", "auglocal", "infopro", "biological-sim"])
def test_heads_may_learn_alone(loss: str) -> None:
    reach = (1, 0, 3, 4, 2)  # groups of two and three units
    learner = make(without_dropout("resnet18"), at="block", loss=loss)
    learner.reach = reach
    follows_the_reach(learner, reach)


def test_a_window_beside_units_alone() -> None:
    """Units that learn alone in a chain with windows learn as they do without, to the bit."""
    windowed, plain = (
        make(network("resnet18"), at="block", loss="pred", span=span)
        for span in ([1, 1, 1, 2, 1], 1)
    )
    for learner in (windowed, plain):
        for _ in range(2):  # heads begin at zero, and reach nothing in the first
            learner.step(IMAGES, LABELS)
    for index, (ours, theirs) in enumerate(zip(windowed.units, plain.units, strict=True)):
        assert same_weights(ours.piece, theirs.piece) == (index != 2)
        assert same_weights(ours.loss, theirs.loss)


def test_gradients_have_the_memory_format_of_their_weights() -> None:
    """PyTorch's fused optimizers read both as they lie in memory."""
    models = [network("resnet18") for _ in range(2)]
    for model, memory_format in zip(models, ("contiguous", "channels-last"), strict=True):
        learner = localize(
            model, IMAGES, CLASSES, "dgl-cnn", at="block", seed=0, check=False,
            memory_format=memory_format, span=2,
            optimizer=lambda weights: torch.optim.SGD(weights, lr=RATE, fused=True),
        )  # fmt: skip
        learner.step(IMAGES, LABELS)
        learner.step(IMAGES, LABELS)
    for ours, theirs in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-4)


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


class Added(nn.Module):
    """A layer whose weight is the sum of two, which get one gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = (nn.Parameter(torch.randn(4, 1, 8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.conv2d(x, self.one + self.two).flatten(1)


@pytest.mark.parametrize("clip_grad", [None, 1e-3])
def test_weights_that_are_added_up_are_clipped_and_averaged_once(clip_grad: float | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Added(), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, CLASSES))
    options: dict[str, Any] = {"loss": "pred", "output_layer": "separate", "clip_grad": clip_grad}
    at = ["0", "2"]
    whole = make(model, at=at, span=2, **options)
    for weight in (weight for unit in whole.units for weight in unit.loss.parameters()):
        nn.init.normal_(weight)  # at 0, a head passes no gradient on
    parted = copy.deepcopy(whole)
    parted.step(IMAGES[:2], LABELS[:2], update=False)
    parted.step(IMAGES[2:4], LABELS[2:4], update=False)
    parted.step(IMAGES[4:], LABELS[4:])
    updated = updates(whole, lambda: whole.step(IMAGES, LABELS))
    for ours, theirs in zip(whole.model.parameters(), parted.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)
    for unit in updated if clip_grad else ():
        norm = torch.cat([value.flatten() for value in unit]).norm()
        torch.testing.assert_close(norm, torch.tensor(clip_grad), rtol=1e-2, atol=0.0)


@pytest.mark.parametrize("span", [0, 6, 10**20, [1, 1, 6, 1, 1], [1, 1, 0, 1, 1]])
def test_a_span_beyond_the_chain_is_refused(span: int | list[int]) -> None:
    number = span if isinstance(span, int) else span[2]
    with pytest.raises(InvalidInput, match=f"Cannot use span {number}: the chain has 5 units"):
        make(without_dropout("resnet18"), at="block", span=span)


@pytest.mark.parametrize(
    ("text", "reach"),
    [
        ("2", (0, 0, 1, 2, 3)),
        ("1,1,2, 2,3", (0, 1, 1, 2, 2)),
        ("1,3=2", (0, 1, 2, 2, 3)),
        ("2,1=1,4=3", (0, 1, 2, 3, 2)),
        ("4=5", (0, 1, 2, 3, 0)),
    ],
)
def test_spans_as_text(text: str, reach: tuple[int, ...]) -> None:
    assert reach_of_span(text, 5) == reach


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1,1,2", "Cannot use span 1,1,2: it has 3 units, and the chain has 5"),
        ("1,5=2", "it names units 0, 5, and the chain has 0 to 4"),
        ("1,3=2,2=1", "it names units 0, 3, 2"),
        ("1,3=9", "Cannot use span 9: the chain has 5 units"),
        *(
            (text, "it is not a number of units")
            for text in ("", "a", "1,,2", "3=", "1=2=3", "1=1,2")
        ),
        ("9" * 5000, "it is not a number of units"),
        (True, "Cannot use span True: it is not a number of units"),
    ],
)
def test_other_text_is_refused(text: str, reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        reach_of_span(text, 5)


@pytest.mark.parametrize(
    ("reach", "reason"),
    [
        ((0, 1, 2), "it is not of this chain"),
        ((0, 1, 2, 5, 4), "it is not of this chain"),
        ((0, 1, 3, 3, 4), "no loss reaches unit 2"),
    ],
)
def test_a_reach_by_which_a_unit_would_not_learn_is_refused(
    reach: tuple[int, ...], reason: str
) -> None:
    learner = make(without_dropout("resnet18"), at="block")
    with pytest.raises(InvalidInput, match=reason):
        learner.reach = reach
