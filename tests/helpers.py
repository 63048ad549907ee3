"""Small real data and small networks that several tests use."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.data import Loader, Splits
from layerwise.losses import LOSSES
from layerwise.models import create_model, hierarchical, published_hierarchy
from layerwise.rules import RULES
from layerwise.rules.base import Position, Tick
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import prepare

# losses with fast layers of this library, tested by every rule and with forced kernels
EVERYWHERE = ("pred", "sim", "predsim", "predsim-lite")
# of them those tested on every network; predsim is made of pred and sim, and computes both
WHOLE = ("predsim", "predsim-lite")
# losses whose heads are of PyTorch's layers, tested on few networks
ON_FEW = tuple(loss for loss in LOSSES if loss not in EVERYWHERE)
READING = ("auglocal", "infopro")  # beside features: blocks behind the unit, and images

# a network that is one unit learns from its output, whatever the local loss
RULES_AND_LOSSES = [
    (rule, loss)
    for rule in RULES
    for loss in EVERYWHERE
    if RULES[rule].at is None or loss == "predsim"
]

CLASSES = 10


@cache
def digits(train_images: int = 80, batch_size: int = 16, views: int | None = None) -> Splits:
    run = Run(data="digits", train_images=train_images, batch_size=batch_size, views=views)
    return prepare(run, Execution()).load_data()


def narrow(name: str, dropout: float = 0.2) -> nn.Module:
    """A network of the registry for 8-pixel grey images; of those with a hierarchy one layer or
    block per stage, a few channels wide, so that those of one family become the same.
    """
    if name not in hierarchical():  # such as one that a test has registered
        return create_model(name, in_chans=1, image_size=8)
    hierarchy = [1] * len(published_hierarchy(name))
    return create_model(name, hierarchy, width=1 / 16, in_chans=1, image_size=8, dropout=dropout)


class Plain(nn.Module):
    """A network that knows nothing of this library and decides about dropout by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 6, 3, padding=1)
        self.out = nn.Linear(6 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(F.relu(self.conv1(x)), 0.3, training=self.training)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.out(x.view(x.size(0), -1))


class PreActivation(nn.Module):
    """Pre-activation residual blocks, a learned shortcut computed before the main branch, and two
    skips alive at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 6, 3, padding=1)
        self.shortcut = nn.Conv2d(6, 8, 1, stride=2)
        self.norm1, self.norm2, self.norm3 = nn.BatchNorm2d(6), nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.conv1 = nn.Conv2d(6, 8, 3, stride=2, padding=1)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        early = F.avg_pool2d(x, 8)
        short = self.shortcut(x)
        x = self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))
        x = x + short
        x = x + self.conv3(F.relu(self.norm3(x)))
        x = x.mean((2, 3))
        return self.out(x) + early.mean((1, 2, 3)).unsqueeze(1)


class Branches(nn.Module):
    """Parallel branches joined by concatenation, and a gate (squeeze and excitation)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(inplace=True)
        )
        self.left = nn.Conv2d(6, 4, 1)
        self.right = nn.Sequential(nn.Conv2d(6, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 8), nn.Sigmoid()
        )
        self.out = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.cat([self.left(x), self.right(x)], 1)
        x = x * self.gate(x)[:, :, None, None]
        return self.out(x.mean((2, 3)))


FOREIGN: dict[str, Callable[[], nn.Module]] = {
    "plain": Plain,
    "pre-activation": PreActivation,
    "branches": Branches,
}
# one of each that narrow() makes the same
FAMILIES = ("vgg8", "vgg8b", "resnet18", "resnet32", "resnet50")
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    **{name: partial(narrow, name) for name in FAMILIES},
    **FOREIGN,
}
SOME_NETWORKS = ("vgg8b", "resnet18", "resnet50", "plain", "pre-activation")  # for slower tests


def network(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name]() if name in NETWORKS else narrow(name)


def learner(
    name: str, loss: Any = "predsim", at: Any = "layer", seed: int | None = 0, **options: Any
) -> Learner:
    options.setdefault("output_layer", "separate")
    options.setdefault("memory_format", None)
    options.setdefault("check", False)  # the contract asserts it of every network
    options.setdefault("optimizer", lambda parameters: torch.optim.Adam(parameters, lr=1e-3))
    return localize(
        network(name), torch.zeros(2, 1, 8, 8), CLASSES, loss=loss, at=at, seed=seed, **options
    )


def ticks(
    rule: str,
    learner: Learner,
    loader: Loader,
    epochs: int,
    start: Position | None = None,
    **options: Any,
) -> list[Tick]:
    """Carry a rule to its end with a learning rate that falls."""
    return list(
        RULES[rule].order(
            learner, loader, epochs, lambda done: 1 - done / 2, start or Position(), **options
        )
    )


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    states = one.state_dict(), other.state_dict()
    return states[0].keys() == states[1].keys() and all(
        torch.equal(states[0][key], states[1][key]) for key in states[0]
    )
