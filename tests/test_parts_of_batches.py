"""A batch that comes in parts is learned from as a whole, and nothing of it outlives a failure."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise
from layerwise.cli import main
from layerwise.errors import Diverged, InvalidInput
from layerwise.rules import RULES, Position
from layerwise.runs.folder import RunFolder
from tests.helpers import CLASSES, digits, learner, same_weights, ticks

drawn = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(12, 1, 8, 8, generator=drawn), torch.arange(12) % CLASSES
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda weights: torch.optim.Adam(weights, lr=1e-3, eps=1e-3, fused=True),
}


def network() -> nn.Module:
    """A network without batch statistics and random draws."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(1, 6, 3, padding=1), nn.Conv2d(6, 6, 3, padding=1)
    output = nn.Linear(6 * 16, CLASSES)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), output)


def local(**options: Any) -> layerwise.Learner:
    options = {"loss": "pred", "optimizer": OPTIMIZERS["sgd"], "seed": 0} | options
    return layerwise.localize(network(), IMAGES, CLASSES, **options)


def step_in_parts(parted: layerwise.Learner, *sizes: int) -> list[layerwise.StepResult]:
    parts = list(zip(IMAGES.split(list(sizes)), LABELS.split(list(sizes)), strict=True))
    results = [parted.step(*part, update=False) for part in parts[:-1]]
    return [*results, parted.step(*parts[-1])]


def assert_close(one: layerwise.Learner, another: layerwise.Learner) -> None:
    for unit, twin in zip(one.units, another.units, strict=True):
        for weight, expected in zip(unit.weights(), twin.weights(), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("clip_grad", [None, 0.05])
@pytest.mark.parametrize("at", ["layer", 1])
@pytest.mark.parametrize("sizes", [(4, 4, 4), (2, 7, 3), (6, 6)], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parts_learn_as_the_whole_batch(
    optimizer: str, sizes: tuple[int, ...], at: Any, clip_grad: float | None
) -> None:
    options = {"optimizer": OPTIMIZERS[optimizer], "clip_grad": clip_grad, "at": at}
    whole, parts = local(**options), local(**options)
    before = copy.deepcopy(parts.model)
    for _ in range(2):
        result = whole.step(IMAGES, LABELS)
        results = step_in_parts(parts, *sizes)
    assert not same_weights(before, parts.model)
    assert_close(parts, whole)
    mean = sum(part.loss_tensor() * part.size for part in results) / len(IMAGES)
    torch.testing.assert_close(mean, result.loss_tensor(), rtol=1e-4, atol=1e-6)
    assert (whole.steps, parts.steps) == (2, 2 * len(sizes))


def test_one_part_is_a_plain_step_to_the_bit() -> None:
    plain, given = local(), local()
    plain.step(IMAGES, LABELS)
    step_in_parts(given, 12)
    assert same_weights(plain.model, given.model)


def test_weights_stay_until_the_last_part() -> None:
    parts = local()
    before = copy.deepcopy(parts.model)
    parts.step(IMAGES, LABELS, update=False)
    assert same_weights(parts.model, before)
    assert all(weight.grad is None for unit in parts.units for weight in unit.weights())


def test_gradients_between_parts_never_enter() -> None:
    """Those of a saliency map; and ``model.zero_grad`` takes nothing away."""
    alone, disturbed = local(), local()
    for each in (alone, disturbed):
        each.step(IMAGES[:6], LABELS[:6], update=False)
        if each is disturbed:
            pictures = IMAGES.clone().requires_grad_()
            F.cross_entropy(each.model(pictures), LABELS).backward()
            assert pictures.grad is not None
            each.model.zero_grad()
            F.cross_entropy(each.model(pictures), LABELS).backward()
        each.step(IMAGES[6:], LABELS[6:])
    assert same_weights(alone.model, disturbed.model)


class Failing(nn.Module):
    """A loss whose value or forward pass can be spoiled."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss, self.factor = loss, 1.0
        self.error: BaseException | None = None

    def forward(self, features: Tensor, targets: layerwise.Targets) -> layerwise.Evaluated:
        if self.error is not None:
            raise self.error
        loss, correct = self.loss(features, targets)
        return layerwise.Evaluated(loss * self.factor, correct)


@pytest.mark.parametrize("error", [None, KeyboardInterrupt(), MemoryError()])
def test_a_failed_part_takes_the_others_with_it(error: BaseException | None) -> None:
    """A later step is as if none of them had been."""
    plain, failed = local(), local()
    spoiled = failed.units[1].loss = Failing(failed.units[1].loss)
    spoiled.factor, spoiled.error = float("nan"), error
    failed.units[1].loss = spoiled.loss
    failed.step(IMAGES[:6], LABELS[:6], update=False)
    failed.units[1].loss = spoiled
    with pytest.raises(Diverged if error is None else type(error)):
        failed.step(IMAGES[6:], LABELS[6:], update=False)
    spoiled.factor, spoiled.error = 1.0, None
    for each in (plain, failed):
        each.step(IMAGES, LABELS)
    assert same_weights(plain.model, failed.model)


def test_parts_can_be_forgotten() -> None:
    plain, forgetful = local(), local()
    forgetful.step(IMAGES[:6], LABELS[:6], update=False)
    forgetful.zero_grad()
    for each in (plain, forgetful):
        each.step(IMAGES, LABELS)
    assert same_weights(plain.model, forgetful.model)


def test_no_state_is_saved_between_parts() -> None:
    parts = local()
    state = copy.deepcopy(parts.state_dict())
    parts.step(IMAGES[:6], LABELS[:6], update=False)
    with pytest.raises(InvalidInput, match=r"Cannot save the state: gradients of parts .* wait"):
        parts.state_dict()
    parts.load_state_dict(state)  # weights of before: the parts belong to others
    parts.state_dict()
    plain = local()
    for each in (plain, parts):
        each.step(IMAGES, LABELS)
    assert same_weights(plain.model, parts.model)


def test_a_copy_between_parts_goes_on_alike() -> None:
    parts = local()
    parts.step(IMAGES[:6], LABELS[:6], update=False)
    copied = copy.deepcopy(parts)
    for each in (parts, copied):
        each.step(IMAGES[6:], LABELS[6:])
    assert same_weights(parts.model, copied.model)
    assert_close(copied, parts)


def test_layers_frozen_between_parts_stay() -> None:
    parts = local()
    parts.step(IMAGES[:6], LABELS[:6], update=False)
    parts.model[2].requires_grad_(False)
    before, first = parts.model[2].weight.clone(), parts.model[0].weight.clone()
    parts.step(IMAGES[6:], LABELS[6:])
    assert torch.equal(before, parts.model[2].weight)
    assert not torch.equal(first, parts.model[0].weight)


def test_every_part_has_dropout_of_its_own() -> None:
    """The same part twice is not the part alone: the masks differ. Steps are repeatable."""

    class Drops(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.drop = nn.Linear(64, 32), nn.Dropout(0.5)
            self.out = nn.Linear(32, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.drop(torch.relu(self.first(x.flatten(1)))))

    def after(*updates: bool) -> nn.Module:
        drops = layerwise.localize(Drops(), IMAGES, CLASSES, loss="pred", seed=0)
        for update in updates:
            drops.step(IMAGES, LABELS, update=update)
        return drops.model

    assert same_weights(after(False, True), after(False, True))
    assert not same_weights(after(False, True), after(True))


@pytest.mark.parametrize("rule", ["simultaneous", "global"])
def test_rules_compute_batches_in_parts(rule: str) -> None:
    data = digits()
    whole, parts = (local(at=RULES[rule].at or "layer") for _ in range(2))
    expected = ticks(rule, whole, data.train, epochs=1)
    computed = ticks(rule, parts, data.train, epochs=1, micro_batches=3)
    assert [tick.result.size for tick in computed] == [tick.result.size for tick in expected]
    assert [tick.after for tick in computed] == [tick.after for tick in expected]
    assert_close(parts, whole)
    for tick, wanted in zip(computed, expected, strict=True):
        assert tick.result.losses == pytest.approx(wanted.result.losses, rel=1e-3)
        assert tick.result.accuracies == pytest.approx(wanted.result.accuracies)


def test_parts_have_two_images_at_least() -> None:
    """Asked for more parts than pairs of images, a rule makes as many as there are pairs."""
    data, many = digits(), local()
    ticks("simultaneous", many, data.train, epochs=1, micro_batches=100)
    assert many.steps == sum(len(indices) // 2 for indices in data.train.order(0))
    with pytest.raises(InvalidInput, match="Cannot use micro_batches 0: it is too small"):
        ticks("simultaneous", many, data.train, epochs=1, micro_batches=0)


def test_parts_take_less_memory() -> None:
    peaks = [
        layerwise.predict_peak(network(), (256, 1, 8, 8), CLASSES, "global", **options)
        for options in ({}, {"micro_batches": 4})
    ]
    assert peaks[1] < 0.6 * peaks[0]


def test_training_in_parts_is_gone_on_with() -> None:
    """Also with dropout and batch statistics, from inside an epoch."""
    data = digits()
    whole, first, second = (learner("vgg8b") for _ in range(3))
    ticks("simultaneous", whole, data.train, epochs=2, micro_batches=2)
    order = RULES["simultaneous"].order(
        first, data.train, 2, lambda done: 1 - done / 2, Position(), micro_batches=2
    )
    for _ in range(3):
        tick = next(order)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    ticks("simultaneous", second, data.train, 2, tick.after, micro_batches=2)
    assert same_weights(whole.model, second.model)


def test_the_program_computes_batches_in_parts(tmp_path: Path) -> None:
    run = ["train", "vgg8", "--width", "0.0625", "--train-images", "60", "--batch-size", "16"]
    folder = RunFolder(tmp_path / "run")
    main([*run, "--epochs", "1", "--micro-batches", "2", "--output", str(folder.path)])
    assert folder.finished
    assert folder.run().rule_options == {"micro_batches": 2}
