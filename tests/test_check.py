"""The comparison of units with the network at ``localize``."""

import copy
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise
from layerwise.core.check import compare_with_network
from layerwise.core.split import Chain, split
from layerwise.errors import CannotSplit, InvalidInput
from tests.helpers import CLASSES, FOREIGN, network

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv, self.drop = nn.Conv2d(4, 4, 3, padding=1), nn.Dropout(0.3)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        return self.out(self.drop(F.relu(self.conv(x))).mean((2, 3)))


class Replaced(nn.Module):
    """A piece that computes something else than what the network does there."""

    def __init__(self, piece: nn.Module, what: str) -> None:
        super().__init__()
        self.piece, self.what = piece, what

    def forward(self, *values: Any) -> Any:
        (x,) = self.piece(*values)
        if self.what == "output":
            return (x * 1.01,)
        if self.what == "training output" and self.training:
            return (x + 0.1,)
        if self.what == "evaluation output" and not self.training:
            return (x + 0.1,)
        if self.what == "gradient":
            return (0.5 * x + 0.5 * x.detach(),)
        if self.what == "no gradient":
            return (x.detach(),)
        if self.what == "buffer":
            for buffer in self.piece.buffers():
                buffer.data.add_(1)
        return (x,)


def replaced(model: nn.Module, unit: int, what: str) -> Chain:
    chain = split(model)
    pieces = list(chain.pieces)
    pieces[unit] = Replaced(pieces[unit], what)
    return Chain(pieces, chain.names)


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("output", "another output in training"),
        ("training output", "another output in training"),
        ("evaluation output", "another output in evaluation"),
        ("gradient", "other gradients in training mode; they part in unit 'stem'"),
        ("no gradient", "other gradients in training mode; they part in unit 'stem'"),
        ("buffer", "buffer in training mode; they part in unit 'stem'"),
    ],
)
def test_units_that_are_not_the_network_are_refused(what: str, words: str) -> None:
    model = Net()
    with pytest.raises(CannotSplit, match=f"{words}.*leaves=.*check=False"):
        compare_with_network(model, replaced(model, 0, what), IMAGES)


def test_the_first_layer_that_differs_is_named() -> None:
    model = Net()
    with pytest.raises(CannotSplit, match="they part in unit 'out', at module 'drop'"):
        compare_with_network(model, replaced(model, 1, "output"), IMAGES)


class Hidden(nn.Module):
    """A layer that tracing cannot see: how it scales depends on a global variable."""

    scale = 1.0

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * SCALES[int(type(x) is Tensor)]


SCALES = (1.0, 2.0)  # while traced, and otherwise


def hidden() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), Hidden(), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES),
    )  # fmt: skip


def test_what_tracing_does_not_see_is_refused_and_may_be_left_out_or_kept_whole() -> None:
    with pytest.raises(
        CannotSplit, match=r"part in unit '2.conv', at module '3'.*leaves=\['2'\].*check=False"
    ):
        layerwise.localize(hidden(), IMAGES, CLASSES)
    layerwise.localize(hidden(), IMAGES, CLASSES, check=False)
    layerwise.localize(hidden(), IMAGES, CLASSES, leaves=["2"])


@pytest.mark.parametrize("name", [*FOREIGN, "vgg8b", "resnet18", "resnet50"])
@pytest.mark.parametrize("sample", ["images", "zeros", "one"])
def test_networks_pass(name: str, sample: str) -> None:
    images = {"images": IMAGES, "zeros": torch.zeros(2, 1, 8, 8), "one": IMAGES[:1]}[sample]
    model = network(name)
    compare_with_network(model, split(model), images)


def test_everything_is_left_as_it_was() -> None:
    model = Net()
    model.conv.eval()
    model.stem.weight.grad = torch.ones_like(model.stem.weight)
    chain = split(model)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    generators = random.getstate(), torch.get_rng_state()
    images = IMAGES.clone()
    compare_with_network(model, chain, images)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert random.getstate() == generators[0]
    assert torch.equal(torch.get_rng_state(), generators[1])
    assert torch.equal(images, IMAGES)
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert list(gradients) == ["stem.weight"]
    assert bool((gradients["stem.weight"] == 1).all())


def test_dropout_on_a_late_skip_passes() -> None:
    class Skip(Net):
        def __init__(self) -> None:
            super().__init__()
            self.skip = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.stem(x))
            skip = F.dropout(self.skip(x), 0.5, self.training)
            x = self.conv(self.drop(F.relu(self.norm(x)))) + skip
            return self.out(x.mean((2, 3)))

    layerwise.localize(Skip(), IMAGES, CLASSES)


def test_frozen_layers_and_parts_kept_in_evaluation_pass() -> None:
    class Frozen(Net):
        def train(self, mode: bool = True) -> "Frozen":
            super().train(mode)
            self.norm.eval()
            return self

    model = Frozen()
    model.stem.requires_grad_(False)
    layerwise.localize(model, IMAGES, CLASSES)


def test_a_network_that_fails_in_training_is_refused() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                raise ValueError("no such mode")
            return x

    model = nn.Sequential(nn.Conv2d(1, 4, 8), nn.Flatten(), Fails(), nn.Linear(4, CLASSES)).eval()
    with pytest.raises(InvalidInput, match=r"in training mode it cannot process.*no such mode"):
        layerwise.localize(model, IMAGES, CLASSES, leaves=["2"])
    layerwise.localize(model, IMAGES, CLASSES, leaves=["2"], check=False)


def test_generators_of_modules_stay_and_others_are_named() -> None:
    class Noisy(nn.Module):
        def __init__(self, own: bool) -> None:
            super().__init__()
            generator = random.Random(0)
            self.draw = generator.random if own else lambda: generator.random()

        def forward(self, x: Tensor) -> Tensor:
            return x * self.draw()

    layers = nn.Conv2d(1, 4, 8), nn.Flatten(), nn.Linear(4, CLASSES)
    noisy = Noisy(True)
    layerwise.localize(nn.Sequential(layers[0], noisy, *layers[1:]), IMAGES, CLASSES)
    assert noisy.draw() == random.Random(0).random()
    with pytest.raises(CannotSplit, match=r"itself computes something else.*check=False"):
        layerwise.localize(nn.Sequential(layers[0], Noisy(False), *layers[1:]), IMAGES, CLASSES)
