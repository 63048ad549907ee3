"""The audit of locality: what is as declared passes, and every way to cheat is found."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise
from layerwise.cli import main
from layerwise.core import audit as audit_module
from layerwise.core.audit import audit_steps
from layerwise.core.learner import Learner
from layerwise.core.locality import Audit
from layerwise.core.localize import localize
from layerwise.core.reach import reach_of_span
from layerwise.core.windows import step_windows
from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES, Evaluated, Pred, Targets
from layerwise.rules import RULES
from layerwise.runs.folder import RunFolder
from tests.helpers import CLASSES, network

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4) // 2
TINY = ["--hierarchy", "1,1,1,1", "--width", "0.0625", "--image-size", "8"]


def make(model: nn.Module, loss: Any = "pred", **options: Any) -> Learner:
    return localize(model, IMAGES, CLASSES, loss=loss, check=False, seed=0, **options)


def audit(learner: Learner) -> Audit:
    return audit_steps(learner, IMAGES, LABELS)


@pytest.fixture
def no_slow_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is as declared is found so in a few steps, without trying each loss."""

    def refuse(probe: Any) -> None:
        raise AssertionError("each loss was tried")

    monkeypatch.setattr(audit_module, "of_each_loss", refuse)


@pytest.mark.usefixtures("no_slow_way")
@pytest.mark.parametrize("span", [1, 2])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_is_as_local_as_declared(loss: str, span: int) -> None:
    found = audit(make(network("resnet18"), loss, at="block", span=span))
    count = len(found.units)
    assert found.problem is None
    assert found.leaks == []
    assert [found.weights[number].name for number in found.dead] == []
    assert [found.reaches(k) for k in range(count)] == [
        list(range(max(k - span + 1, 0), k + 1)) for k in range(count)
    ]
    assert (found.isolated, found.span) == ((count, 1) if span == 1 else (1, 2))
    assert found.statistics_updates == 1


@pytest.mark.usefixtures("no_slow_way")
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_as_local_as_declared(rule: str) -> None:
    at = RULES[rule].at or "block"
    found = layerwise.audit(make(network("vgg8b"), at=at), IMAGES, LABELS, rule=rule)
    assert found.problem is None
    assert found.isolated == (1 if rule == "growing" else len(found.units))  # it begins globally
    assert not found.dead
    assert found.peak_bytes is not None


@pytest.mark.parametrize(
    ("images", "options", "words"),
    [
        (torch.rand(4, 2, 8, 8), {"rule": "sequential"}, "the learner reads"),
        (IMAGES, {"foo": 1}, "option of the rule simultaneous: 'foo'"),
        (IMAGES, {"batch_size": 1}, "Cannot use batch_size=1"),
        (IMAGES, {"batch_size": "a"}, "no number of images"),
    ],
)
def test_what_cannot_be_audited_is_refused(
    images: Tensor, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        layerwise.audit(make(network("plain")), images, LABELS, **options)


def test_the_quick_way_and_the_slow_way_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = make(network("pre-activation"), span=2, at="block")
    quick = audit(learner)
    monkeypatch.setattr(audit_module, "as_declared", lambda probe: None)
    assert audit(learner) == quick


def test_a_whole_network_of_windows_is_one_part() -> None:
    learner = make(network("plain"))
    learner.span = len(learner.units)
    found = audit(learner)
    assert (found.isolated, found.span) == (1, len(learner.units))
    assert found.problem is None


def test_exponents_tell_all_losses_apart() -> None:
    for count in (1, 120, 121, 200):
        rounds = audit_module.distinct_exponents(range(count))
        codes = [tuple(exponents[k] for exponents in rounds) for k in range(count)]
        assert len(set(codes)) == count
        assert all(0 not in code for code in codes)


# ---- cheats ----


class Keeper(nn.Module):
    """A loss whose second unit also differentiates the graph that the first one left."""

    kept: Tensor | None = None

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.loss, self.index = Pred(site), site.index

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        if self.index == 0:
            Keeper.kept = features
            return self.loss(features.detach(), targets)
        loss, correct = self.loss(features, targets)
        return Evaluated(loss + 0.1 * Keeper.kept.square().mean(), correct)


class Whole(nn.Module):
    """A loss that recomputes the network from the images and learns from its output."""

    model: Any = None

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.loss = Pred(site)

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        loss, correct = self.loss(features, targets)
        return Evaluated(
            loss + F.cross_entropy(Whole.model(targets.images), targets.labels), correct
        )


class Shared(nn.Module):
    """A loss whose head is the network's own output layer."""

    model: Any = None

    def __init__(self, site: Any) -> None:
        super().__init__()
        self.out = Shared.model.out

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        pooled = F.adaptive_avg_pool2d(features, 4).flatten(1)
        logits = self.out(pooled)
        return Evaluated(F.cross_entropy(logits, targets.labels), logits.argmax(1).eq(0).sum())


class Backward(Whole):
    """A loss that differentiates the network by itself and returns something harmless."""

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        if torch.is_grad_enabled():
            F.cross_entropy(Whole.model(targets.images), targets.labels).backward()
        return self.loss(features, targets)


class Writer(Whole):
    """A loss that changes a weight of another unit, with no gradient at all."""

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        with torch.no_grad():
            Whole.model.out.weight += 0.01
        return self.loss(features, targets)


def cheating(loss: type[nn.Module]) -> tuple[Learner, Audit]:
    """A learner whose losses cheat from the time that it is made, and its audit."""
    model = network("plain")
    Whole.model = Shared.model = model
    learner = make(model, loss, output_layer="separate")
    return learner, audit(learner)


def test_a_loss_that_keeps_a_graph_is_found() -> None:
    _, found = cheating(Keeper)
    assert found.reaches(1) == [0, 1]
    assert {name for loss, name in found.leaks if loss == 1} == {"conv1.weight", "conv1.bias"}
    # its own loss does not reach them, and the other's gradient comes too late for an update
    assert {found.weights[n].name for n in found.dead} == {"conv1.weight", "conv1.bias"}
    assert found.isolated == len(found.units) - 1
    assert "The loss of unit 1 (conv2) reaches conv1" in found.problem


def test_a_loss_that_recomputes_the_network_is_found() -> None:
    _, found = cheating(Whole)
    assert found.span == len(found.units)
    assert found.isolated == 1
    assert found.leaks


def test_a_head_that_shares_the_output_layer_is_found() -> None:
    _, found = cheating(Shared)
    assert {name for _, name in found.leaks} == {"out.weight", "out.bias"}
    assert found.isolated == 1


@pytest.mark.parametrize("loss", [Backward, Writer])
def test_learning_from_something_else_than_the_losses_is_found(loss: type[nn.Module]) -> None:
    learner, found = cheating(loss)
    names = {found.weights[number].name for number in found.stray}
    assert "out.weight" in names
    assert "something else than the losses" in found.problem
    assert found.isolated == 1
    assert "out.weight" in str(found) or "conv1.weight" in str(found)
    before = copy.deepcopy(learner.model.state_dict())
    assert audit(learner) == found
    assert all(torch.equal(before[key], value) for key, value in learner.model.state_dict().items())


def test_windows_beyond_the_declared_span_are_found() -> None:
    learner = make(network("plain"))

    def wider(*given: Any, **options: Any) -> Any:
        return step_windows(*given, **options, reach=reach_of_span(2, len(learner.units)))

    learner.plain_step = wider  # as a rule of the user's own that says it has span 1
    found = audit(learner)
    assert (found.declared_span, found.span) == (1, 2)
    assert found.problem is not None


def test_dead_parameters_are_found() -> None:
    model = network("plain")
    with torch.no_grad():
        model.conv2.weight.zero_()
        model.conv2.bias.fill_(-1.0)  # behind a ReLU, so that nothing passes
    learner = make(model, output_layer="separate")
    model.unused = nn.Linear(2, 2)
    found = audit(learner)
    names = {found.weights[number].name for number in found.dead}
    assert {"unused.weight", "unused.bias", "conv2.weight", "conv2.bias"} <= names
    assert "conv1.weight" not in names
    assert "dead parameters: conv2.weight" in str(found)


# ---- the learner stays as it is ----


def state_of(learner: Learner) -> list[Any]:
    draws = torch.get_rng_state()
    return [draws, *learner.model.state_dict().values()] + [
        value for unit in learner.units for value in unit.loss.state_dict().values()
    ]


@pytest.mark.parametrize("options", [{}, {"span": 2}, {"amp": torch.float16, "clip_grad": 0.1}])
def test_the_learner_stays_as_it_is(options: dict[str, Any]) -> None:
    learners = [make(network("resnet18"), "predsim", at="block", **options) for _ in range(2)]
    for learner in learners:
        learner.train()
        if not options:
            learner.step(IMAGES, LABELS, update=False)  # a part of a batch, which waits
    learner, same = learners
    torch.manual_seed(3)
    before, attributes = copy.deepcopy(state_of(learner)), [dict(vars(u)) for u in learner.units]
    audit(learner)
    assert all(map(torch.equal, before, state_of(learner)))
    assert [vars(unit) for unit in learner.units] == attributes
    results = []
    for each in (learner, same):
        torch.manual_seed(3)
        results.append([each.step(IMAGES, LABELS).losses for _ in range(2)])
    assert results[0] == results[1]
    assert all(map(torch.equal, state_of(learner), state_of(same)))


def test_gradients_of_others_stay() -> None:
    learner = make(network("plain"))
    weight = next(learner.model.parameters())
    weight.grad = torch.ones_like(weight)
    audit(learner)
    assert torch.equal(weight.grad, torch.ones_like(weight))
    assert not weight._backward_hooks


def test_a_batch_that_cannot_be_used_is_refused() -> None:
    learner = make(network("plain"))
    with pytest.raises(InvalidInput, match="batch of 1"):
        audit_steps(learner, IMAGES[:1], LABELS[:1])
    with pytest.raises(InvalidInput, match="another span"):
        layerwise.audit(learner, IMAGES, LABELS, span=2)


# ---- the program ----


def test_a_run_has_the_audit_in_its_record_and_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", "resnet18", *TINY[:4], "--epochs", "1", "--train-images", "40"]
    words += ["--batch-size", "20", "--at", "block", "--dropout", "0.2", "--output"]
    main([*words, str(tmp_path / "audited")])
    monkeypatch.setattr("layerwise.training.description.audit_session", lambda data, learner: None)
    main([*words, str(tmp_path / "plain")])
    files = [(tmp_path / run / "model.safetensors").read_bytes() for run in ("audited", "plain")]
    assert files[0] == files[1]
    facts = RunFolder(tmp_path / "audited").facts()
    found = facts["audit"]
    assert found["units"] == found["isolated"] == len(facts["units"])
    assert (found["span"], found["statistics_updates"], found["problem"]) == (1, 1, None)
    assert found["dead"] == []


def test_the_command_prints_what_each_loss_reaches(capsys: pytest.CaptureFixture[str]) -> None:
    main(["audit", "resnet18", *TINY, "--loss", "pred", "--at", "block", "--span", "2", "--json"])
    *lines, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert (result["isolated"], result["span"], result["problem"]) == (1, 2, None)
    assert result["losses"][2]["reaches"] == [1, 2]
    assert 0 < result["kept_bytes"] < result["peak_bytes"]
    assert "span: 2 (declared: 2)" in "\n".join(lines)


CHEAT = """
from layerwise.losses import LOSSES, Evaluated, Pred

class Sharing(Pred):
    first = None
    def __init__(self, site):
        super().__init__(site)
        Sharing.first = Sharing.first or self
        self.other = Sharing.first if Sharing.first is not self else None

    def forward(self, features, targets):
        loss, correct = super().forward(features, targets)
        extra = 0.0
        if self.other is not None:
            extra = sum(weight.square().sum() for weight in self.other.parameters())
        return Evaluated(loss + extra, correct)

LOSSES["sharing"] = Sharing
"""


def test_the_command_fails_where_locality_is_not_as_declared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(CHEAT)
    words = ["audit", "resnet18", *TINY, "--loss", "sharing", "--at", "block"]
    try:
        with pytest.raises(SystemExit) as left:
            main([*words, "--import", str(tmp_path / "mine.py")])
    finally:
        LOSSES.pop("sharing", None)
    assert left.value.code == 1
    said = capsys.readouterr()
    assert said.err.startswith("layerwise: The loss of unit 1 ")
    assert "in head 0, which is outside its span of 1" in said.err
    assert "leaks: The loss of unit 1" in said.out
