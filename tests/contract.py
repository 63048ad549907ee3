"""The promises of every network, loss, rule, measure and data set, each as a function of a name.

Tests call them with every entry of the registries, and with what is added from outside.
"""

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.core.split import split
from layerwise.data import DATASETS, Splits
from layerwise.distributed import distribute, whole, world
from layerwise.errors import InvalidInput
from layerwise.losses import Evaluated, Targets, predsim_lite
from layerwise.measures import MEASURES, heading_of
from layerwise.ops import batch_norm, pooling, small_conv, spatial_std, windowed_gradient
from layerwise.rules import RULES
from layerwise.rules.base import Position
from layerwise.rules.feature_cache import Keeping
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import prepare
from tests.helpers import CLASSES, digits, learner, network, same_weights, ticks


@dataclass
class Kernels:
    """How layers are computed.

    Attributes:
        amp: number type of forward passes; products of small convolutions are in bfloat16 alone.
        entered: how often each of the fast kernels was, by what it computes.
    """

    amp: torch.dtype | None = None
    entered: Counter[str] = field(default_factory=Counter)

    def precision(self) -> AbstractContextManager[None]:
        return torch.autocast("cpu", self.amp, enabled=self.amp is not None)


PLAIN = Kernels()


def few_digits(views: int | None = None) -> Splits:
    """Three batches of one size, which are computed to the same bits."""
    return digits(train_images=48, batch_size=16, views=views)


@contextmanager
def heads_of_few_pixels() -> Iterator[None]:
    """Heads that average features do so to 2 pixels a side, so that small maps have windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predsim_lite, "averaging", lambda shape, size: pooling.averaging(shape, 2))
        yield


@contextmanager
def forced_kernels() -> Iterator[Kernels]:
    """The kernels that are made for large maps and for a matrix unit, taken of maps of any size."""
    kernels = Kernels(torch.bfloat16)

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*given: Any) -> Any:
            kernels.entered[name] += 1
            return function(*given)

        return call

    with heads_of_few_pixels(), pytest.MonkeyPatch.context() as patch:
        for module, name, value in (
            (batch_norm, "LARGE_ELEMENTS", 0),
            (batch_norm, "PART_ELEMENTS", 1),
            (batch_norm, "MOST_PARTS", 4),
            (pooling, "LARGE_ELEMENTS", 0),
            (small_conv, "LEAST_WEIGHTS", 0),
            (small_conv, "has_matrix_unit", lambda: True),
            (spatial_std, "CACHED_ELEMENTS", 1),
            (spatial_std, "MOST_PARTS", 4),
        ):
            patch.setattr(module, name, value)
        for place, name, of in (
            (batch_norm, "write_gradient", "normalisation"),
            (small_conv, "weight_gradient", "products"),
            (spatial_std, "in_pieces", "deviation"),
            (windowed_gradient.WindowedGradient, "segments", "windows"),
        ):
            patch.setattr(place, name, counted(of, getattr(place, name)))
        yield kernels


# ---- networks, losses, rules ----


def units_compose_the_network(name: str, at: Any, training: bool, kernels: Kernels = PLAIN) -> None:
    model = network(name)
    images = torch.randn(4, 1, 8, 8)
    chain = split(model, at, sample=images)
    model.train(training)
    chain.train(training)
    outputs = []
    for version in (model, chain):
        torch.manual_seed(1)  # the same dropout
        with kernels.precision():
            outputs.append(version(images))
    assert torch.equal(outputs[0], outputs[1])
    owners = [id(parameter) for piece in chain.pieces for parameter in piece.parameters()]
    assert sorted(owners) == sorted(id(parameter) for parameter in model.parameters())


def one_unit_is_global_backpropagation(name: str, loss: str, kernels: Kernels = PLAIN) -> None:
    data = few_digits()
    local = learner(name, loss, at=RULES["global"].at, seed=None, amp=kernels.amp)
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
            with kernels.precision():
                error = F.cross_entropy(plain(images), labels)
            error.backward()
            optimizer.step()
    assert same_weights(local.model, plain)


def parallel_is_simultaneous(name: str, loss: Any, kernels: Kernels = PLAIN) -> None:
    """On as many ranks as there are; in a process alone all units are on its rank."""
    data = digits()  # five batches: more than are on their way
    together, on_ranks = (learner(name, loss, amp=kernels.amp) for _ in range(2))
    count = len(on_ranks.units)
    distribute(on_ranks, f"{count // 2},{count - count // 2}")
    ticks("parallel", on_ranks, data.train, epochs=1)
    with whole(on_ranks) as first:
        assert first == world().first
        if first:
            ticks("simultaneous", together, data.train, epochs=1)
            assert same_values(together.state_dict(), on_ranks.state_dict()), (name, loss)


def same_values(one: Any, other: Any) -> bool:
    """Whether two states hold the same, to the bit."""
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same_values(one[k], other[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same_values, one, other))
    return one == other


def cached_features_change_nothing(
    name: str, loss: str, folder: Path, kernels: Kernels = PLAIN
) -> None:
    data = few_digits(views=2)
    assert {len(indices) for indices in data.train.order(0)} == {16}
    plain = learner(name, loss, amp=kernels.amp)
    without = ticks("sequential", plain, data.train, epochs=2)
    for keeping in (Keeping(), Keeping(folder / "features")):
        caching = learner(name, loss, amp=kernels.amp)
        cached = ticks("sequential", caching, data.train, epochs=2, cache=True, keeping=keeping)
        assert [tick.result.losses for tick in without] == [tick.result.losses for tick in cached]
        assert same_weights(plain.model, caching.model)
        assert (cached[-1].kept_bytes > 0) == (keeping.file is None)
    assert without[-1].kept_bytes == 0
    assert not list(folder.iterdir())


def resumed_is_uninterrupted(
    name: str, rule: str, loss: Any, kernels: Kernels = PLAIN, span: int = 1
) -> None:
    data = few_digits()
    choices = {"at": RULES[rule].at or "layer", "amp": kernels.amp, "span": span}
    whole = learner(name, loss, **choices)
    history = ticks(rule, whole, data.train, epochs=2)
    assert [tick.ends_training for tick in history] == [False] * (len(history) - 1) + [True]
    resumable = [number for number, tick in enumerate(history[:-1]) if tick.resumable]
    stop = resumable[len(resumable) // 2]

    first = learner(name, loss, **choices)
    order = RULES[rule].order(first, data.train, 2, lambda done: 1 - done / 2, Position())
    for _ in range(stop + 1):
        tick = next(order)
    state = copy.deepcopy(first.state_dict())
    del order

    second = learner(name, loss, **choices)
    second.load_state_dict(state)
    ticks(rule, second, data.train, 2, tick.after)
    assert same_weights(whole.model, second.model)
    for unit, resumed in zip(whole.units, second.units, strict=True):
        assert same_weights(unit.loss, resumed.loss)


class Scaled(nn.Module):
    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss
        self.reads_input = getattr(loss, "reads_input", False)
        self.reads_images = getattr(loss, "reads_images", False)

    def forward(self, features: Tensor, targets: Targets, *entered: Tensor) -> Evaluated:
        loss, correct = self.loss(features, targets, *entered)
        return Evaluated(3 * loss + features.square().mean(), correct)


class Recorder(torch.optim.SGD):
    """Changes nothing and keeps the gradients it was given."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.0)
        self.gradients: list[Tensor] = []

    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        self.gradients = [p.grad.clone() for p in parameters if p.grad is not None]


def forced_kernels_give_the_same_gradients(
    name: str, loss: str, amp: torch.dtype | None, tolerance: float, span: int = 1
) -> None:
    """Each unit's gradient is that of the plain kernels, but for a share of its length."""
    images, labels = next(digits().train.batches(0))

    def gradients() -> list[Tensor]:
        local = learner(name, loss, optimizer=Recorder, amp=amp, span=span)
        local.step(images, labels)
        return [torch.cat([g.flatten() for g in u.optimizer.gradients]) for u in local.units]

    with heads_of_few_pixels():
        expected = gradients()
    with forced_kernels():
        computed = gradients()
    for plain, forced in zip(expected, computed, strict=True):
        assert (forced - plain).norm() <= tolerance * plain.norm()


def no_gradient_crosses_a_border(
    name: str, loss: Any, kernels: Kernels = PLAIN, span: int = 1
) -> None:
    """A loss reaches its own unit and those of its window before it, and no others."""
    images, labels = next(digits().train.batches(0))
    unchanged = learner(name, loss, optimizer=Recorder, amp=kernels.amp, span=span)

    def gradients(changed: int | None) -> list[list[Tensor]]:
        local = copy.deepcopy(unchanged)
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
            assert equal == (not 0 <= changed - index < span), (
                f"unit {index} when the loss of unit {changed} changed"
            )


def rule_and_loss_learn(rule: str, loss: Any, name: str = "plain", span: int = 1) -> None:
    data = digits(train_images=400, batch_size=40)
    local = learner(
        name, loss, span=span, optimizer=lambda weights: torch.optim.Adam(weights, lr=5e-3)
    )
    history = ticks(rule, local, data.train, epochs=8)
    for unit in range(len(local.units)):
        curve = [
            tick.result.losses[unit - tick.first]
            for tick in history
            if tick.first <= unit < tick.first + len(tick.result.losses)
        ]
        assert sum(curve[-5:]) < 0.9 * sum(curve[:5]), f"unit {unit}"
    local.model.eval()
    with torch.no_grad():
        correct = sum(int((local.model(x).argmax(1) == y).sum()) for x, y in data.test.in_order())
    assert correct / len(data.test.labels) > 3 / CLASSES


# ---- measures ----


@cache
def noisy_digits() -> tuple[Tensor, Tensor]:
    pixels, labels = load_digits(return_X_y=True)
    # so that no two distances or votes are equal by chance
    noise = np.random.default_rng(0).normal(size=pixels.shape)
    return torch.from_numpy(pixels + 3 * noise).float(), torch.from_numpy(labels).long()


def measure_keeps_its_promises(name: str) -> None:
    """The same number twice, nothing changed, nothing drawn; numbers where numbers can be."""
    features, labels = (values[:900] for values in noisy_digits())
    before, state = features.clone(), (torch.get_rng_state(), np.random.get_state()[1].copy())
    value = MEASURES[name](features, labels)
    assert isinstance(value, float)
    assert value == MEASURES[name](features, labels.int())
    assert torch.equal(features, before)
    assert torch.equal(state[0], torch.get_rng_state())
    assert np.array_equal(state[1], np.random.get_state()[1])
    assert MEASURES[name](features.bfloat16(), labels) == pytest.approx(value, rel=0.1)
    heading = heading_of(MEASURES[name])
    assert heading.strip() == heading
    assert "_" not in heading
    drawn = torch.Generator().manual_seed(0)
    for count, width in ((40, 2000), (400, 1)):  # more features than images; a single one
        numbers = torch.randn(count, width, generator=drawn)
        assert np.isfinite(MEASURES[name](numbers, torch.arange(count) % CLASSES))


def random_features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


# features and labels that cannot be measured, and words of the refusal
UNMEASURABLE = (
    (random_features(30, 4), torch.arange(30) % 3 * 2, "no image is of class 1"),
    (torch.ones(30, 4), torch.arange(30) % 3, "are the same"),
    (torch.full((30, 4), torch.nan), torch.arange(30) % 3, "NaN or infinite"),
    (random_features(3, 4), torch.tensor([0, 1, 9]), "3 images are fewer than the 10 classes"),
    (random_features(30, 4), torch.zeros(30).long(), "a single class"),
    (random_features(0, 4), torch.zeros(0).long(), "0 images are fewer"),
    (random_features(30, 4), torch.arange(29), "Give floating-point features"),
    (random_features(30, 4), torch.arange(30) % 3 - 1, "whole numbers from 0"),
    (random_features(30, 2, 2), torch.arange(30) % 3, "Give floating-point features"),
)


def measure_refuses(name: str, features: Tensor, labels: Tensor, sentence: str) -> None:
    with pytest.raises(InvalidInput, match=sentence):
        MEASURES[name](features, labels)


# ---- data sets ----


def entry_of_the_table_is_whole(name: str) -> None:
    dataset = DATASETS[name]
    names, images = dataset.format.class_names, dataset.expected()
    assert len(set(names)) == len(names) != 1
    assert images.channels in (1, 3)
    assert 0 < dataset.padding_at(images.image_size) < images.image_size
    assert dataset.expected(16).image_size == 16
    assert f"{images.image_size} pixels" in dataset.describe()


def data_set_is_as_its_entry_says(name: str, folder: Path) -> None:
    """Read twice it is the same: images of its format, every class in every part, none in two."""
    run = Run(data=name, batch_size=8, val_fraction=0.25, augment=False)
    splits, again = (prepare(run, Execution(data_dir=str(folder))).load_data() for _ in range(2))
    images = DATASETS[name].expected()
    assert splits.facts() == again.facts()
    parts = splits.train, splits.validation, splits.test
    shape = images.channels, images.image_size, images.image_size
    for part, repeated in zip(parts, (again.train, again.validation, again.test), strict=True):
        assert len(part.labels.unique()) == splits.num_classes
        batch, labels = next(iter(part.in_order()))
        assert batch.shape == (len(labels), *shape)
        assert torch.isfinite(batch).all()
        assert torch.equal(batch, next(iter(repeated.in_order()))[0])
