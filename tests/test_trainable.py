"""Whose gradients enter a step, which schedules advance, and what a user's own code raises."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise
from layerwise.cli import main
from layerwise.errors import InvalidInput
from layerwise.losses import Evaluated, Site, Targets
from layerwise.runs.folder import LOG, STATE, RunFolder
from tests.helpers import CLASSES, network, same_weights

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % CLASSES


def learner(**options: Any) -> layerwise.Learner:
    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    options.setdefault("optimizer", sgd)
    return layerwise.localize(network("plain"), IMAGES, CLASSES, seed=0, **options)


def test_gradients_of_others_never_enter_a_step() -> None:
    """A gradient penalty's or a saliency map's backward pass, and one of a loss of the user's."""
    alone, disturbed = learner(), learner()
    for local in (alone, disturbed):
        local.step(IMAGES, LABELS)
    F.cross_entropy(disturbed.model(IMAGES), LABELS).backward()
    for unit in disturbed.units:
        for parameter in unit.loss.parameters():
            parameter.grad = torch.ones_like(parameter)
    for local in (alone, disturbed):
        local.step(IMAGES, LABELS)
    assert same_weights(alone.model, disturbed.model)
    for one, another in zip(alone.units, disturbed.units, strict=True):
        assert same_weights(one.loss, another.loss)
    assert all(parameter.grad is None for parameter in disturbed.model.parameters())


def test_a_schedule_may_read_a_metric() -> None:
    local = learner(
        scheduler=lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, patience=0, factor=0.5
        )
    )
    with pytest.raises(InvalidInput, match=r"Cannot end the epoch: .* reads a metric. Give one"):
        local.end_epoch()
    for _ in range(3):
        local.end_epoch(1.0)
    rates = {unit.optimizer.param_groups[0]["lr"] for unit in local.units}
    assert rates == {0.025}


def test_a_scheduler_that_makes_none_is_refused() -> None:
    with pytest.raises(InvalidInput, match="Cannot use scheduler=: it made NoneType"):
        learner(scheduler=lambda optimizer: None)


class Faulty(nn.Module):
    def __init__(self, site: Site, *, divisor: int = 1) -> None:
        super().__init__()
        self.head = nn.Linear(site.shape[0], site.num_classes)
        self.divisor = divisor

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        scale = 1 / self.divisor
        logits = self.head(features.flatten(2).mean(2) if features.dim() > 2 else features)
        correct = torch.sum(logits.argmax(1) == targets.labels)
        return Evaluated(scale * F.cross_entropy(logits, targets.labels), correct)


def test_a_faulty_loss_is_refused_before_anything_is_learned() -> None:
    with pytest.raises(
        InvalidInput, match=r"Cannot compute the loss of unit 0 \(conv1\): it raised ZeroDivision"
    ):
        learner(loss=Faulty, divisor=0)
    state = torch.get_rng_state()
    learner(loss=Faulty, divisor=2)
    assert torch.equal(state, torch.get_rng_state())


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    return capsys.readouterr().err


SMALL = [
    "--width",
    "0.0625",
    "--hierarchy",
    "1,1,1,1",
    "--train-images",
    "60",
    "--batch-size",
    "16",
    "--epochs",
    "2",
]


def test_a_faulty_loss_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(layerwise.LOSSES, "faulty", Faulty)
    arguments = ["train", "resnet18", *SMALL, "--loss", "faulty", "--divisor", "0"]
    error = refusal([*arguments, "--output", str(tmp_path / "run")], capsys)
    assert error.startswith("layerwise: Cannot compute the loss of unit 0")
    assert not (tmp_path / "run").exists()


def test_a_faulty_measure_costs_no_epoch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def faulty(features: Tensor, labels: Tensor) -> float:
        """A measure that cannot be computed."""
        return float("x")

    monkeypatch.setitem(layerwise.MEASURES, "faulty", faulty)
    measured = ["--separability-every", "1", "--separability-measures", "faulty"]
    run = str(tmp_path / "run")
    images = ["--train-images", "200"]  # enough held out to measure on
    arguments = ["train", "resnet18", *SMALL, *images, *measured, "--output", run]
    error = refusal(arguments, capsys)
    assert "Cannot use measure 'faulty': it raised ValueError" in error
    folder = RunFolder(run)
    assert folder.file(STATE).exists()
    assert [record["epoch"] for record in folder.log(LOG)] == [1]
    main(["train", "--resume", run, "--separability-every", "0"])
    assert folder.finished
