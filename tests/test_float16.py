"""Mixed precision in float16: each unit scales its loss, and a scale belongs to the state."""

import copy
import io
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

import layerwise
from layerwise.core.cuda_graphs import refuse_scaling
from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES
from layerwise.rules import RULES
from tests import contract
from tests.helpers import CLASSES, digits, learner, network, same_weights, ticks

drawn = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(12, 1, 8, 8, generator=drawn), torch.arange(12) % CLASSES


def scaled(name: str = "plain", **options: Any) -> layerwise.Learner:
    """A learner whose scale overflows nowhere, so that no step is skipped."""
    local = learner(name, amp=torch.float16, **options)
    for unit in local.units:
        unit.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=10)
    return local


def scales(local: layerwise.Learner) -> list[float]:
    return [unit.scaler.get_scale() for unit in local.units if unit.scaler is not None]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["vgg8b", "resnet18"])
def test_it_learns(name: str, loss: str) -> None:
    local = scaled(name, loss=loss)
    first = local.step(IMAGES, LABELS).losses
    for _ in range(15):
        last = local.step(IMAGES, LABELS).losses
    assert sum(last) < sum(first)
    assert {weight.dtype for weight in local.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", ["vgg8b", "resnet18"])
def test_kernels_for_large_maps_give_the_same_gradients(
    name: str, loss: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = partial(torch.amp.GradScaler, init_scale=2.0**8)  # so that no step is skipped
    monkeypatch.setattr(torch.amp, "GradScaler", small)
    contract.forced_kernels_give_the_same_gradients(name, loss, torch.float16, 2e-2)


def test_gradients_too_small_for_float16_arrive() -> None:
    """A loss scaled down to 1e-6 has gradients that float16 rounds to 0, unless it is scaled up."""

    class Small(nn.Module):
        def __init__(self, site: layerwise.Site) -> None:
            super().__init__()
            self.loss = layerwise.Pred(site)

        def forward(self, features: Any, targets: layerwise.Targets) -> layerwise.Evaluated:
            loss, correct = self.loss(features, targets)
            return layerwise.Evaluated(1e-6 * loss, correct)

    changed = []
    for scaling in (True, False):
        local = scaled(loss=Small, optimizer=lambda weights: SGD(weights, lr=1e4))
        unit = local.units[0]
        before = unit.loss.loss.classifier.weight.clone()
        if not scaling:
            unit.scaler = None
        local.step(IMAGES, LABELS)
        changed.append((unit.loss.loss.classifier.weight != before).float().mean())
    assert changed[0] > 0.95
    assert changed[1] < 0.5


def test_an_overflow_skips_its_unit_alone() -> None:
    local = scaled(optimizer=lambda weights: Adam(weights, lr=1e-3, fused=True))
    local.step(IMAGES, LABELS)
    scaler = local.units[1].scaler
    assert scaler is not None
    scaler.update(2.0**40)  # products with it are infinite in float16
    before = [[weight.clone() for weight in unit.weights()] for unit in local.units]
    local.step(IMAGES, LABELS)
    stayed = [
        all(torch.equal(*pair) for pair in zip(weights, unit.weights(), strict=True))
        for weights, unit in zip(before, local.units, strict=True)
    ]
    assert stayed == [False, True, False]
    assert scales(local)[1] == 2.0**39


def test_gradients_are_clipped_as_they_are_without_scaling() -> None:
    norms: list[float] = []

    class Watcher(SGD):
        def step(self, closure: Any = None) -> None:
            gradients = [weight.grad.flatten() for weight in self.param_groups[0]["params"]]
            norms.append(torch.cat(gradients).norm().item())

    for clip_grad in (None, 0.001):
        options = {"optimizer": lambda weights: Watcher(weights, lr=0.0), "clip_grad": clip_grad}
        scaled(**options).step(IMAGES, LABELS)
        learner("plain", **options).step(IMAGES, LABELS)
    assert norms[:3] == pytest.approx(norms[3:6], rel=0.02)
    assert norms[6:] == pytest.approx([0.001] * 6, rel=0.01)


def test_parts_of_batches_are_scaled_alike() -> None:
    whole, parts = (scaled("branches", loss="pred", optimizer=lambda w: SGD(w, 0.1)) for _ in "ab")
    for local in (whole, parts):
        local.model.eval()  # batch statistics would be of a part
    whole.step(IMAGES, LABELS)
    parts.step(IMAGES[:4], LABELS[:4], update=False)
    parts.step(IMAGES[4:], LABELS[4:])
    for weight, expected in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, rtol=1e-2, atol=2e-4)
    assert scales(parts) == scales(whole)


# those of which units do not share losses
@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "growing"])
def test_a_scale_belongs_to_the_state(rule: str) -> None:
    data, choices = digits(), {"at": RULES[rule].at or "layer"}
    first, second = scaled("vgg8b", **choices), scaled("vgg8b", **choices)
    for unit in first.units:
        unit.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    ticks(rule, first, data.train, epochs=1)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert scales(second) == scales(first) != scales(scaled("vgg8b", **choices))
    for local in (first, second, copy.deepcopy(first)):
        local.train()
        local.step(IMAGES, LABELS)
    assert same_weights(first.model, second.model)


def test_states_without_scales_are_read() -> None:
    """A run begun in float32 or bfloat16 may go on in float16."""
    plain, local = learner("plain"), scaled()
    local.load_state_dict(plain.state_dict())
    local.step(IMAGES, LABELS)
    assert "scalers" not in plain.state_dict()


def test_its_memory_is_predicted_as_that_of_bfloat16() -> None:
    peaks = [
        layerwise.predict_peak(
            network("resnet18"),
            (64, 1, 8, 8),
            CLASSES,
            "simultaneous",
            amp=amp,
            optimizer=lambda weights: Adam(weights, fused=False),
        )
        for amp in (torch.float16, torch.bfloat16)
    ]
    assert peaks[0] == pytest.approx(peaks[1], rel=0.1)


def test_its_steps_are_not_recorded() -> None:
    with pytest.raises(RuntimeError, match="scaled by numbers that steps change"):
        refuse_scaling(scaled().units)
    refuse_scaling(learner("plain").units)


def test_weights_of_float16_are_refused() -> None:
    with pytest.raises(InvalidInput, match=r"Cannot use amp=torch.float16: the weights are of"):
        layerwise.localize(network("plain").half(), IMAGES.half(), CLASSES, amp=torch.float16)
