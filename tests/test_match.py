"""The loss match: features beside a teacher's, by hand; which teacher and module; refusals."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

import layerwise
from layerwise.core.frozen import Frozen
from layerwise.errors import CannotSplit, InvalidInput
from layerwise.losses import Output, Site, create_loss
from tests.helpers import CLASSES, Plain, digits, learner, network, ticks

drawn = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(8, 1, 8, 8, generator=drawn), torch.arange(8) % CLASSES
SGD = {"optimizer": lambda weights: torch.optim.SGD(weights, lr=0.1)}


def features_of(model: nn.Module, paths: list[str]) -> list[Tensor]:
    """What leaves some modules of a network in evaluation mode."""
    features: list[Tensor] = []
    handles = [
        model.get_submodule(path).register_forward_hook(lambda *given: features.append(given[-1]))
        for path in paths
    ]
    with torch.no_grad():
        model.eval()(IMAGES)
    for handle in handles:
        handle.remove()
    return features


@pytest.mark.parametrize("standardize", [False, True])
def test_losses_are_errors_to_the_teachers_features(standardize: bool) -> None:
    teacher = network("resnet18", seed=1)
    paths = [f"stages.{stage}.0" for stage in range(4)]
    wanted = features_of(teacher, paths)
    local = learner("resnet18", "match", "block", teacher=teacher, standardize=standardize, **SGD)
    computed = features_of(local.model, paths)
    local.model.eval()
    losses = local.step(IMAGES, LABELS).losses
    for loss, student, target in zip(losses[1:], computed, wanted, strict=False):
        square = (student - target) ** 2
        if standardize:
            variance = target.var((0, 2, 3), keepdim=True, correction=0)
            square = square / variance.clamp(min=0.01 * variance.mean())
        assert loss == pytest.approx(square.mean().item(), rel=1e-4)
    with torch.no_grad():
        soft = teacher(IMAGES).softmax(1)
        assert losses[-1] == pytest.approx(
            F.cross_entropy(network("resnet18").eval()(IMAGES), soft).item(), rel=1e-4
        )


def count_calls(local: layerwise.Learner) -> list[int]:
    """A list that grows by one whenever a piece of the teacher is called."""
    calls: list[int] = []
    for unit in local.units:
        for piece in unit.loss.pieces:
            piece.register_forward_pre_hook(lambda *_, n=unit.index: calls.append(n))
    return calls


@pytest.mark.parametrize("span", [1, 2])
def test_a_step_costs_one_forward_pass_of_the_teacher(span: int) -> None:
    local = learner("resnet18", "match", teacher=network("resnet18", seed=1), span=span)
    calls = count_calls(local)
    local.step(IMAGES, LABELS)
    assert calls == list(range(len(local.units)))


def test_unit_after_unit_computes_no_more_of_the_teacher_than_it_needs() -> None:
    local = learner("plain", "match", teacher=network("plain", seed=1))
    calls, data = count_calls(local), digits(train_images=32, batch_size=16, views=1)
    ticks("sequential", local, data.train, epochs=1, cache=True)
    assert calls == [0, 0, 0, 1, 0, 1, 0, 1, 2, 0, 1, 2]


def test_a_teacher_stays_as_it_is_and_is_no_part_of_states_and_optimizers() -> None:
    teacher = network("resnet18", seed=1)
    before = copy.deepcopy(teacher.state_dict())
    local = learner("resnet18", "match", "block", teacher=teacher)
    kept = [buffer.clone() for unit in local.units for buffer in unit.loss.buffers()]
    ticks("simultaneous", local, digits().train, epochs=1)
    assert all(torch.equal(value, before[key]) for key, value in teacher.state_dict().items())
    now = [buffer for unit in local.units for buffer in unit.loss.buffers()]
    assert all(map(torch.equal, kept, now))
    assert not any(unit.loss.state_dict() for unit in local.units)  # of equal shapes: no head
    held = {id(weight) for unit in local.units for weight in unit.held()}
    assert held == {id(weight) for weight in local.model.parameters()}


def test_a_network_that_is_its_own_teacher_learns_labels_beside() -> None:
    local = learner("plain", "match", **SGD)
    plain = learner("plain", "pred", **SGD)
    local.model.eval(), plain.model.eval()  # without dropout, nothing has moved yet
    first, again = (each.step(IMAGES, LABELS).losses for each in (local, plain))
    assert first == pytest.approx(again)
    state = copy.deepcopy(local.state_dict())
    assert all(type(unit.loss) is not Output for unit in local.units[:-1])
    other = learner("plain", "match", **SGD)
    with torch.no_grad():
        for buffer in other.units[0].loss.buffers():
            buffer.zero_()  # as if it had begun from other weights
    other.load_state_dict(state)
    other.model.eval()
    assert local.step(IMAGES, LABELS).losses == other.step(IMAGES, LABELS).losses


class Wide(nn.Module):
    """A teacher of other modules, channels and sizes than ``Plain``."""

    def __init__(self, classes: int = CLASSES) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 9, 3, 2, 1), nn.BatchNorm2d(9), nn.ReLU())
        self.body = nn.Sequential(nn.Conv2d(9, 12, 3, padding=1), nn.ReLU(inplace=True))
        self.out = nn.Linear(12, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.stem(x)).mean((2, 3)))


PAIRS = {"conv1": "stem", "conv2": "body"}


def test_a_teacher_of_another_kind() -> None:
    torch.manual_seed(1)
    teacher = Wide()
    local = learner("plain", "match", teacher=layerwise.Teacher(teacher, PAIRS))
    assert [unit.loss.projection.weight.shape[:2] for unit in local.units[:2]] == [(9, 6), (12, 6)]
    wanted = features_of(teacher, list(PAIRS.values()))
    local.model.eval()
    student = features_of(local.model, ["conv1", "conv2"])
    losses = local.step(IMAGES, LABELS).losses
    for loss, unit, mine, target in zip(losses, local.units, student, wanted, strict=False):
        fresh = learner("plain", "match", teacher=layerwise.Teacher(teacher, PAIRS))
        projection = fresh.units[unit.index].loss.projection
        pooled = F.adaptive_avg_pool2d(mine.relu(), 4)
        assert loss == pytest.approx(F.mse_loss(projection(pooled), target).item(), rel=1e-4)


def test_a_pruned_network_is_repaired() -> None:
    data = digits(train_images=400, batch_size=40)
    model = network("resnet18")
    before = copy.deepcopy(model)
    for name, module in model.named_modules():
        if name.endswith("conv1"):
            prune.ln_structured(module, "weight", amount=0.5, n=2, dim=0)
    local = layerwise.localize(
        model, IMAGES, CLASSES, "match", "block", teacher=before, **adam(5e-3)
    )
    history = ticks("simultaneous", local, data.train, epochs=3)
    assert sum(history[-1].result.losses[1:5]) < 0.7 * sum(history[0].result.losses[1:5])


def adam(rate: float) -> dict[str, Any]:
    return {"optimizer": lambda weights: torch.optim.Adam(weights, lr=rate)}


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (Plain, "teacher=: it is type"),
        (lambda x: x, "teacher=: it is function"),
        (layerwise.Teacher(Wide(), {"conv1": "stem"}), "no features for unit 'conv2'"),
        (layerwise.Teacher(Wide(), {**PAIRS, "conv3": "body"}), "has no unit 'conv3'"),
        (layerwise.Teacher(Wide(), {**PAIRS, "conv2": "head"}), "no module 'head' for unit"),
        (layerwise.Teacher(Wide(), {**PAIRS, "conv2": "body.1"}), "holds no weights"),
        (layerwise.Teacher(Wide(7), PAIRS), r"shape \(7,\) per image, and the network's has"),
        (network("resnet18"), "it has 10 units, and the network has 3"),
    ],
)
def test_teachers_that_are_refused(teacher: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        learner("plain", "match", teacher=teacher)


def test_a_teacher_that_cannot_be_cut_is_refused_as_the_teacher() -> None:
    class Branching(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x if x.sum() > 0 else -x)

    with pytest.raises(CannotSplit, match="Cannot use the teacher"):
        learner("plain", "match", teacher=Branching())


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        ("pred", {"teacher": Wide()}, "no unit's loss compares anything"),
        ("match", {"label_weight": -1.0}, "label_weight -1.0: it is out of range"),
        ("match", {"match_weight": float("nan")}, "match_weight=nan"),
        ("match", {"label_weight": 1.0, "head_loss": "match"}, "its site names no teacher"),
        ("look-ahead", {"head_loss": "match"}, "its site names no teacher"),
        ("match", {"label_weight": 0.0, "decoder_dim": 9}, "without labels there is no head"),
        (
            "match",
            {"label_weight": 0.0, "head_loss": "sim"},
            "head_loss with match: without labels",
        ),
        ("match", {"label_weight": 0.0, "match_weight": 0.0}, "nothing would be learned"),
    ],
)
def test_options_that_are_refused(loss: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        learner("plain", loss, **options)


def test_without_localize_nothing_is_known_of_a_teacher() -> None:
    with pytest.raises(InvalidInput, match="match at unit 0: its site names no teacher"):
        create_loss("match", Site(0, 2, (4,), CLASSES))


class Shifting(Plain):
    """It changes its images in place, or with ``kept`` a copy of them."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - 0.5 if self.kept else x.sub_(0.5))


def test_images_stay_as_given_where_the_network_changes_its_input() -> None:
    losses = []
    for kept in (True, False):
        torch.manual_seed(0)
        images = IMAGES.clone()
        model = Shifting(kept).eval()
        local = layerwise.localize(model, images, CLASSES, "match", seed=0, label_weight=0.0)
        losses.append(local.step(images, LABELS).losses)
        assert torch.equal(images, IMAGES)
    assert losses[0] == losses[1]
    assert losses[0][0] == 0.0


def test_targets_without_images_are_refused() -> None:
    local = learner("plain", "match")
    with pytest.raises(InvalidInput, match="hold no images to show the teacher"):
        local.units[0].loss(torch.zeros(2, 6, 8, 8), layerwise.Targets(LABELS[:2], CLASSES))


def test_a_teacher_for_the_units_that_learn() -> None:
    """Frozen units are compared with nothing; those behind them with the same modules as before."""
    teacher = network("resnet18", seed=1)
    whole, upper = (
        learner("resnet18", "match", "block", teacher=teacher, **given, **SGD)
        for given in ({}, {"train_from": 2})
    )
    whole.model.eval(), upper.model.eval()
    assert isinstance(upper.units[0].piece.frozen, Frozen)
    expected = whole.step(IMAGES, LABELS).losses[2:]
    assert upper.step(IMAGES, LABELS).losses[:1] == pytest.approx(expected[:1], rel=1e-4)
