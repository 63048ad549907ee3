"""Bring your own loop: ``localize`` and ``Learner``."""

import copy
import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.core.unit import step_units
from layerwise.errors import Diverged, InvalidInput
from layerwise.ops.batch_norm import Normalisation
from tests.helpers import CLASSES, digits, learner, narrow, network, same_weights


def batch(size: int = 8) -> tuple[Tensor, Tensor]:
    images, labels = next(digits().train.batches(0))
    return images[:size], labels[:size]


def test_the_readme_example_trains_the_users_model_in_place() -> None:
    model = network("plain")
    before = copy.deepcopy(model)
    images, labels = batch()
    learner = layerwise.localize(
        model,
        sample=images,
        num_classes=10,
        loss="predsim",
        at="layer",
        optimizer=lambda parameters: torch.optim.Adam(parameters, lr=5e-4),
    )
    result = learner.step(images, labels)
    assert len(result.losses) == len(result.accuracies) == len(learner.units) == 2
    assert all(0 <= accuracy <= 100 for accuracy in result.accuracies)
    assert learner.model is model
    assert model(images).shape == (8, 10)
    changed = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True)
    ]
    assert all(changed)
    assert model.state_dict().keys() == before.state_dict().keys()


@pytest.mark.parametrize("size", [2, 3, 7, 16])
def test_batches_of_any_size_from_two(size: int) -> None:
    local = learner("resnet18")
    images, labels = batch(size)
    assert len(local.step(images, labels).losses) == len(local.units)


def test_state_holds_everything_and_loads_without_running_code() -> None:
    schedule: dict[str, Any] = {
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    }
    one = learner("vgg8b", **schedule)
    for _ in range(3):
        one.step(*batch())
    one.end_epoch()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other = learner("vgg8b", **schedule)
    other.load_state_dict(torch.load(file, weights_only=True))
    for local in (one, other):
        local.step(*batch())
        local.end_epoch()
    assert same_weights(one.model, other.model)
    assert [u.optimizer.param_groups[0]["lr"] for u in other.units if u.optimizer] == [
        0.25e-3
    ] * len(other.units)


def test_a_state_of_another_network_is_refused() -> None:
    with pytest.raises(InvalidInput, match="this learner has 3"):
        learner("plain").load_state_dict(learner("vgg8b").state_dict())
    local = learner("plain", "predsim")
    before = copy.deepcopy(local.model)
    plain, sgd = (
        learner("plain", "pred", seed=1),
        learner("plain", optimizer=lambda p: torch.optim.SGD(p, lr=0.1)),
    )
    incomplete = {key: value for key, value in local.state_dict().items() if key != "steps"}
    for state in (plain.state_dict(), sgd.state_dict(), incomplete):
        with pytest.raises(InvalidInput, match="does not fit this learner"):
            local.load_state_dict(state)
    assert same_weights(local.model, before)


def test_an_optimizer_of_choice_per_unit() -> None:
    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.1)

    def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters)

    by_name = learner("plain", optimizer={"conv1": sgd, "conv2": adam, "out": sgd})
    in_order = learner("plain", optimizer=[sgd, adam, sgd])
    for local in (by_name, in_order):
        assert [type(unit.optimizer) for unit in local.units] == [
            torch.optim.SGD,
            torch.optim.Adam,
            torch.optim.SGD,
        ]
    for wrong in ({"conv1": sgd}, [sgd, sgd]):
        with pytest.raises(InvalidInput, match="each of the 3 units"):
            learner("plain", optimizer=wrong)


def test_gradients_are_clipped_per_unit() -> None:
    norms: list[float] = []

    class Watcher(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            gradients = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(torch.cat([gradient.flatten() for gradient in gradients]).norm().item())

    learner("plain", optimizer=lambda parameters: Watcher(parameters, lr=0.0)).step(*batch())
    free = norms.copy()
    norms.clear()
    limit = sorted(free)[1]
    learner(
        "plain", optimizer=lambda parameters: Watcher(parameters, lr=0.0), clip_grad=limit
    ).step(*batch())
    assert norms == pytest.approx([min(norm, limit) for norm in free], rel=1e-3)


def test_frozen_parameters_stay_and_their_heads_become_probes() -> None:
    model = network("plain")
    for parameter in model.conv1.parameters():
        parameter.requires_grad_(False)
    before = model.conv1.weight.clone()
    local = layerwise.localize(model, batch()[0], CLASSES, loss="pred")
    head = local.units[0].loss.classifier.weight.clone()
    local.step(*batch())
    assert torch.equal(before, model.conv1.weight)
    assert not torch.equal(head, local.units[0].loss.classifier.weight)


def test_modes_follow_the_model_and_single_frozen_modules_stay_frozen() -> None:
    local = learner("resnet18")
    local.model.eval()
    images, labels = batch()
    local.step(images, labels)
    assert not any(module.training for unit in local.units for module in (unit.piece, unit.loss))
    local.model.train()
    frozen = next(module for module in local.model.modules() if isinstance(module, Normalisation))
    local.step(images, labels)
    frozen.eval()
    statistics = frozen.running_mean.clone()
    local.step(images, labels)
    assert not frozen.training
    assert torch.equal(statistics, frozen.running_mean)


class Stubborn(nn.Sequential):
    """Keeps its batch normalisation in evaluation mode whatever it is told, as is usual in
    fine-tuning.
    """

    def train(self, mode: bool = True) -> "Stubborn":
        super().train(mode)
        self[1].eval()
        return self


def test_a_model_that_freezes_parts_of_itself_has_the_last_word() -> None:
    model = Stubborn(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, CLASSES)
    ).train()
    local = layerwise.localize(model, batch()[0], CLASSES)
    for mode in (False, True):
        model.train(mode)
        local.step(*batch())
    assert not model[1].training
    assert model[0].training


@pytest.mark.parametrize("kind", [torch.int32, torch.uint8, torch.int64])
def test_labels_of_any_integer_type(kind: torch.dtype) -> None:
    images, labels = batch()
    assert (
        learner("plain").step(images, labels.to(kind)).losses
        == learner("plain").step(images, labels).losses
    )


def test_networks_of_double_precision() -> None:
    model = network("plain").double()
    images, labels = batch()
    result = layerwise.localize(model, images.double(), CLASSES).step(images.double(), labels)
    assert result.loss_tensor().isfinite().all()
    assert {weight.dtype for weight in model.parameters()} == {torch.float64}


def test_a_loss_of_the_users_own_with_options() -> None:
    class Distance(nn.Module):
        def __init__(self, site: layerwise.Site, weight: float = 1.0) -> None:
            super().__init__()
            self.weight, self.head = weight, nn.Linear(math.prod(site.shape), site.num_classes)

        def forward(self, features: Tensor, targets: layerwise.Targets) -> layerwise.Evaluated:
            logits = self.head(features.flatten(1))
            loss = self.weight * nn.functional.mse_loss(
                logits, nn.functional.one_hot(targets.labels, CLASSES).float()
            )
            return layerwise.Evaluated(loss, (logits.argmax(1) == targets.labels).sum())

    model, images = network("plain"), batch()[0]
    old = {"output_layer": "separate", "memory_format": None}
    local = layerwise.localize(model, images, CLASSES, loss=Distance, weight=2.0, **old)
    assert [type(unit.loss).__name__ for unit in local.units] == ["Distance", "Distance", "Output"]
    assert len(local.step(*batch()).losses) == 3
    with pytest.raises(
        InvalidInput, match=r"option 'wait' with loss 'Distance': it is unknown. Accepted: weight"
    ):
        layerwise.localize(model, images, CLASSES, loss=Distance, wait=2.0)


def test_defaults_of_localize() -> None:
    """Fused Adam, the output joined to the last unit, maps in channels-last, weights untouched."""
    model = narrow("vgg8b")
    strides = [parameter.stride() for parameter in model.parameters()]
    local = layerwise.localize(model, batch()[0], CLASSES)
    assert local.units[-1].name == "hidden.linear..output"
    assert all(type(unit.optimizer) is torch.optim.Adam for unit in local.units)
    settings = [unit.optimizer.param_groups[0] for unit in local.units if unit.optimizer]
    assert {(group["lr"], group["fused"]) for group in settings} == {(5e-4, True)}
    assert {unit.memory_format for unit in local.units} == {torch.channels_last}
    local.step(*batch())
    assert [parameter.stride() for parameter in model.parameters()] == strides


class Viewed(nn.Module):
    """A network that reshapes its maps by ``view``, which maps in channels-last do not have."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Linear(4 * 64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.out(x.view(x.size(0), -1))


@pytest.mark.parametrize("output_layer", ["joined", "separate"])
def test_a_unit_that_needs_contiguous_maps_gets_them(
    output_layer: str, capfd: pytest.CaptureFixture[str]
) -> None:
    model = Viewed()
    local = layerwise.localize(model, batch()[0], CLASSES, output_layer=output_layer)
    formats = [unit.memory_format for unit in local.units]
    assert formats[0] == torch.channels_last
    assert formats[-1] == torch.contiguous_format
    local.step(*batch())
    assert model.eval()(batch()[0]).shape == (len(batch()[0]), CLASSES)
    assert set(layerwise.set_memory_format(local, "channels-last")) == {"contiguous"}
    assert capfd.readouterr().err == ""  # what was tried in vain is not printed


class Counting:
    """Makes steps as recorded steps do, by the units alone, and counts."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.forgotten = 0

    def __call__(
        self, units: Any, images: Tensor, targets: layerwise.Targets, step: int
    ) -> list[layerwise.Evaluated]:
        self.steps.append(step)
        return step_units(units, images, targets, step)

    def forget(self) -> None:
        self.forgotten += 1


def test_steps_are_made_by_what_the_learner_is_given() -> None:
    plain, counted, counting = learner("resnet18"), learner("resnet18"), Counting()
    assert plain.make_step is step_units
    assert plain.captured is None
    counted.captured = counting
    assert counted.make_step is counted.captured is counting
    for _ in range(3):
        assert counted.step(*batch()).losses == plain.step(*batch()).losses
    assert counting.steps == [0, 1, 2]
    counted.load_state_dict(copy.deepcopy(plain.state_dict()))
    assert counting.forgotten == 1  # the optimizers' state lies elsewhere now
    counted.step_singly()
    assert counted.captured is None
    assert counted.step(*batch()).losses == plain.step(*batch()).losses
    assert counting.steps == [0, 1, 2]
    assert same_weights(counted.model, plain.model)


def test_localize_leaves_weights_statistics_and_modes_as_they_were() -> None:
    model = narrow("resnet18").eval()
    before = copy.deepcopy(model)
    layerwise.localize(model, torch.randn(4, 1, 8, 8), CLASSES)
    assert same_weights(model, before)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]


def test_random_numbers_of_the_user_are_left_alone() -> None:
    local = learner("resnet18", seed=3)
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    local.step(*batch())
    assert torch.equal(torch.rand(3), expected)


def test_mixed_precision_trains_float32_weights() -> None:
    local = learner("vgg8b", amp=torch.bfloat16)
    first = local.step(*batch()).losses
    for _ in range(10):
        last = local.step(*batch()).losses
    assert sum(last) < sum(first)
    assert {parameter.dtype for parameter in local.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("images", "labels", "words"),
    [
        (torch.randn(1, 1, 8, 8), torch.tensor([0]), "a batch of 1"),
        (
            torch.randn(4, 1, 8, 8),
            torch.tensor([0, 1, 2, 10]),
            "labels from 0 to 10: .* go from 0 to 9",
        ),
        (torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, -1]), "labels from -1 to 2"),
        (torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2]), "do not fit 4 images"),
        (torch.randn(4, 1, 8, 8), torch.rand(4), "one integer per image"),
        (torch.randn(4, 1, 9, 9), torch.tensor([0, 1, 2, 3]), r"had shape \(B, 1, 8, 8\)"),
        (
            torch.zeros(4, 1, 8, 8, dtype=torch.uint8),
            torch.tensor([0, 1, 2, 3]),
            "type torch.uint8: the sample had",
        ),
        (torch.randn(4, 1, 8, 8), [0, 1, 2, 3], "must be tensors"),
        (torch.full((4, 1, 8, 8), float("nan")), torch.tensor([0, 1, 2, 3]), "NaN or infinite"),
    ],
)
def test_bad_batches_change_nothing(images: Tensor, labels: Any, words: str) -> None:
    local = learner("plain")
    before = copy.deepcopy(local.model)
    with pytest.raises(InvalidInput, match=words):
        local.step(images, labels)
    assert same_weights(local.model, before)


def test_a_loss_that_is_not_finite_names_unit_and_step_before_the_update() -> None:
    local = learner("plain")
    local.step(*batch())
    with torch.no_grad():
        local.model.conv2.weight[0, 0, 0, 0] = float("inf")
    before = local.model.conv2.bias.clone()
    with pytest.raises(Diverged, match=r"unit 1 \(conv2\) is nan at step 1"):
        local.step(*batch())
    assert torch.equal(before, local.model.conv2.bias)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"clip_grad": -1.0}, "clip_grad=-1.0: it is not accepted. Give"),
        ({"clip_grad": float("nan")}, "clip_grad=nan: it is not accepted. Give"),
        ({"num_classes": 10.0}, "num_classes=10.0: it is not accepted. Give"),
        ({"amp": True}, "amp=True: it is not accepted. Give"),
        ({"seed": -1}, "seed=-1: it is not accepted. Give"),
        ({"scheduler": 3}, "scheduler=3: it is not accepted. Give"),
        ({"optimizer": lambda parameters: None}, "unit 'conv1': optimizer= made NoneType"),
        ({"optimizer": torch.optim.Adam([torch.zeros(1)])}, "a callable"),
        ({"loss": nn.CrossEntropyLoss()}, "Cannot use loss CrossEntropyLoss: .* Give a name"),
        ({"loss": lambda site: None}, "it made NoneType. Give a name"),
        ({"sample": torch.randn(1, 8)}, "cannot process the sample of shape"),
        ({"sample": torch.randn(8)}, "sample is not a batch"),
        ({"model": nn.Linear}, "model is type"),
    ],
)
def test_arguments_that_cannot_be_used(options: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {
        "model": network("plain"),
        "sample": batch()[0],
        "num_classes": CLASSES,
    }
    with pytest.raises(InvalidInput, match=words):
        layerwise.localize(**{**arguments, **options})


def test_a_step_without_gradients_is_refused() -> None:
    with torch.no_grad(), pytest.raises(InvalidInput, match="gradients are switched off"):
        learner("plain").step(*batch())


def test_what_a_loss_of_the_users_own_returns_is_checked() -> None:
    class Bare(nn.Module):
        def forward(self, features: Tensor, targets: layerwise.Targets) -> Tensor:
            return features.mean()

    with pytest.raises(InvalidInput, match=r"its forward returned a tensor of shape"):
        layerwise.localize(network("plain"), batch()[0], CLASSES, loss=lambda site: Bare()).step(
            *batch()
        )


def test_wrong_number_of_classes_is_refused() -> None:
    with pytest.raises(InvalidInput, match="Pass num_classes=10, or let"):
        layerwise.localize(network("plain"), batch()[0], num_classes=7)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu() -> None:
    model = network("resnet18").cuda()
    images, labels = (tensor.cuda() for tensor in batch())
    local = layerwise.localize(model, images, CLASSES, seed=0)
    result = local.step(images, labels)
    assert result.loss_tensor().device.type == "cuda"
    assert model(images).device.type == "cuda"
