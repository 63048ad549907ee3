"""Loops of the user's own: schedules, optimizers, averages, copies and files of learners."""

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, lr_scheduler
from torch.optim.swa_utils import AveragedModel, update_bn

import layerwise
from layerwise.errors import InvalidInput
from layerwise.rules.base import set_rates
from tests.helpers import CLASSES, learner, network, same_weights

drawn = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(8, 1, 8, 8, generator=drawn), torch.arange(8) % CLASSES
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "one cycle": lambda made: lr_scheduler.OneCycleLR(made, 1e-2, total_steps=20),
    "warm-up, then cosine": lambda made: lr_scheduler.SequentialLR(
        made,
        [lr_scheduler.LinearLR(made, total_iters=2), lr_scheduler.CosineAnnealingLR(made, 9)],
        [2],
    ),
    "warm restarts": lambda made: lr_scheduler.CosineAnnealingWarmRestarts(made, 2),
    "steps": lambda made: lr_scheduler.MultiStepLR(made, [2, 4]),
    "function": lambda made: lr_scheduler.LambdaLR(made, lambda steps: 0.9**steps),
    "chained": lambda made: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(made), lr_scheduler.ExponentialLR(made, 0.9)], optimizer=made
    ),
    "plateau": lambda made: lr_scheduler.ReduceLROnPlateau(made, patience=0),
}


def rates(local: layerwise.Learner) -> list[float]:
    return [float(unit.optimizer.param_groups[0]["lr"]) for unit in local.units if unit.optimizer]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_of_any_kind_are_those_of_pytorch_and_go_on(schedule: str) -> None:
    local, resumed = (learner("plain", scheduler=SCHEDULES[schedule]) for _ in range(2))
    usual = torch.optim.Adam([nn.Parameter(torch.zeros(1))], lr=1e-3)
    expected = SCHEDULES[schedule](usual)
    metric = [1.0] if schedule == "plateau" else []
    for step in range(6):
        for each in (local, resumed):
            if step == 3 and each is resumed:
                file = io.BytesIO()
                torch.save(local.state_dict(), file)
                file.seek(0)
                resumed = learner("plain", scheduler=SCHEDULES[schedule])
                resumed.load_state_dict(torch.load(file, weights_only=True))
        if step < 3:
            local.step(IMAGES, LABELS)
            local.end_epoch(*metric)
        else:
            for each in (local, resumed):
                each.step(IMAGES, LABELS)
                each.end_epoch(*metric)
            assert rates(resumed) == rates(local)
        usual.step()
        expected.step(*metric)
        assert rates(local) == [usual.param_groups[0]["lr"]] * 3
    assert same_weights(local.model, resumed.model)


def test_schedules_that_count_steps() -> None:
    local = learner("plain", scheduler=SCHEDULES["steps"])
    for _ in range(2):
        local.step(IMAGES, LABELS)
        local.end_step()
    assert rates(local) == pytest.approx([1e-4] * 3)


def test_heads_keep_their_rate_or_the_schedule_is_refused() -> None:
    def ratios(schedule: Callable[[Any], Any]) -> list[float]:
        local = learner("plain", "pred", scheduler=schedule, head_lr_factor=0.1)
        groups = [unit.optimizer.param_groups for unit in local.units[:-1] if unit.optimizer]
        return [group[1]["lr"] / group[0]["lr"] for group in groups]

    for name in ("warm-up, then cosine", "warm restarts", "steps", "function", "plateau"):
        assert ratios(SCHEDULES[name]) == pytest.approx([0.1] * 2), name
    with pytest.raises(InvalidInput, match="head_lr_factor with OneCycleLR: it sets the rates"):
        ratios(SCHEDULES["one cycle"])

    def of_each(made: Any) -> Any:
        each = [1e-2, 1e-3][: len(made.param_groups)]
        return lr_scheduler.OneCycleLR(made, each, total_steps=20)

    assert ratios(of_each) == pytest.approx([0.1] * 2)


def test_an_autocast_around_steps_changes_nothing() -> None:
    """PyTorch keeps its copies of weights in bfloat16 until the outermost one ends."""
    plain, around = (learner("resnet18", "pred", amp=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        plain.step(IMAGES, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            around.step(IMAGES, LABELS)
    assert same_weights(plain.model, around.model)


def test_a_schedule_of_another_optimizer_is_refused() -> None:
    local = learner("plain", scheduler=SCHEDULES["steps"])
    local.units[1].optimizer = SGD(local.units[1].weights(), lr=0.1)
    with pytest.raises(InvalidInput, match=r"schedule of unit 1 \(conv2\): its optimizer was"):
        local.end_epoch()


def test_heads_may_have_settings_of_their_own() -> None:
    local = layerwise.localize(network("plain"), IMAGES, CLASSES, loss="pred", seed=0)
    for unit in local.units:
        groups = [
            {"params": unit.piece.parameters()},
            {"params": unit.loss.parameters(), "lr": 0.0},
        ]
        unit.optimizer = SGD(groups, lr=0.1, weight_decay=0.1)
    heads = [copy.deepcopy(unit.loss) for unit in local.units]
    before = local.model.conv1.weight.clone()
    local.step(IMAGES, LABELS)
    assert all(
        same_weights(*pair) for pair in zip(heads, (u.loss for u in local.units), strict=True)
    )
    assert not torch.equal(before, local.model.conv1.weight)


def test_a_setting_changed_by_hand_holds_from_the_next_step() -> None:
    local = learner("plain", optimizer=lambda weights: SGD(weights, lr=torch.tensor(0.1)))
    local.step(IMAGES, LABELS)
    for unit in local.units:
        unit.optimizer.param_groups[0]["lr"] = torch.tensor(0.0)
    before = copy.deepcopy(local.model)
    local.step(IMAGES, LABELS)
    assert same_weights(before, local.model)


def test_rules_set_rates_in_tensors() -> None:
    local = learner("plain", optimizer=lambda weights: SGD(weights, lr=torch.tensor(0.1)))
    for factor in (0.5, 0.25):
        set_rates(local.units, factor)
        assert rates(local) == pytest.approx([0.1 * factor] * 3)


def test_a_model_averaged_beside_it() -> None:
    local = learner("resnet18")
    averaged = AveragedModel(local.model)
    sums = None
    for _ in range(3):
        local.step(IMAGES, LABELS)
        averaged.update_parameters(local.model)
        weights = [weight.detach().clone() for weight in local.model.parameters()]
        sums = weights if sums is None else [a + b for a, b in zip(sums, weights, strict=True)]
    for mean, total in zip(averaged.module.parameters(), sums, strict=True):
        torch.testing.assert_close(mean, total / 3)
    update_bn([IMAGES], averaged)
    local.step(IMAGES, LABELS)  # none of it disturbs the learner
    assert averaged(IMAGES).isfinite().all()


def written(local: layerwise.Learner) -> layerwise.Learner:
    file = io.BytesIO()
    torch.save(local, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("amp", [None, torch.float16])
@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, lambda local: pickle.loads(pickle.dumps(local)), written],
    ids=["deepcopy", "pickle", "torch.save"],
)
def test_copies_go_on_alike_and_alone(copied: Callable[[Any], Any], amp: Any) -> None:
    steps = lr_scheduler.StepLR
    local = layerwise.localize(
        network("branches"), IMAGES, CLASSES, seed=0, amp=amp, scheduler=lambda o: steps(o, 1)
    )
    local.step(IMAGES, LABELS)
    twin = copied(local)
    for each in (twin, local):
        before = copy.deepcopy(local.model)
        each.step(IMAGES, LABELS)
        assert same_weights(before, local.model) == (each is twin)
    assert same_weights(twin.model, local.model)
    assert rates(twin) == rates(local)
    assert [unit.memory_format for unit in twin.units] == [u.memory_format for u in local.units]
    twin.model.out.weight = nn.Parameter(twin.model.out.weight.detach())
    with pytest.raises(InvalidInput, match=r"'out\.weight' was replaced"):
        twin.step(IMAGES, LABELS)
    local.step(IMAGES, LABELS)


def test_an_optimizer_that_cannot_be_made_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"unit 'conv1': optimizer= raised TypeError"):
        learner("plain", optimizer=lambda: None)


def test_weights_shared_with_a_module_outside() -> None:
    """Both optimizers act on them, each by its own gradients."""
    local, alone = learner("plain"), learner("plain")
    outside = nn.Sequential(local.model.conv1, nn.Flatten(), nn.LazyLinear(1))
    outside(IMAGES).mean().backward()
    for each in (local, alone):
        each.step(IMAGES, LABELS)
    assert same_weights(local.model, alone.model)
