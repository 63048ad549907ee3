"""Units that are frozen: what learns, what stays, in which mode, and what is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import layerwise
from layerwise.cli import main
from layerwise.data.loader import Share
from layerwise.errors import InvalidInput
from layerwise.memory.accounting import bytes_of
from layerwise.rules import RULES, Keeping, Position
from layerwise.rules.frozen_features import frozen_features, ordered
from tests.helpers import CLASSES, digits, learner, narrow, network, same_weights, ticks

drawn = torch.Generator().manual_seed(0)
IMAGES, LABELS = torch.randn(8, 1, 8, 8, generator=drawn), torch.arange(8) % CLASSES
FROZEN = ("stem", "stages.0")


def is_frozen(name: str) -> bool:
    return name.startswith(FROZEN)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.at is None])
def test_frozen_units_stay_whatever_the_rule(rule: str) -> None:
    local = learner("resnet18", "pred", "block", train_from="stages.1.0")
    before = copy.deepcopy(local.model.state_dict())
    local.model.train()
    ticks(rule, local, digits(views=1).train, epochs=2)
    changed = {
        name
        for name, value in local.model.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert changed == {name for name in before if not is_frozen(name)}


def test_behind_frozen_units_is_global_training_of_the_rest() -> None:
    """To the bit, with the frozen part in evaluation mode, also when the user calls train()."""
    torch.manual_seed(0)
    plain = narrow("resnet18", dropout=0.0)
    model = copy.deepcopy(plain)
    options: dict[str, Any] = {"at": ["stages.0.0"], "train_from": 1, "memory_format": None}
    local = layerwise.localize(model, IMAGES, CLASSES, optimizer=adam, **options)
    assert [unit.name for unit in local.units] == ["stages.1.0.conv1..output"]
    optimizer = adam([w for name, w in plain.named_parameters() if not is_frozen(name)])
    plain.train()
    for part in FROZEN:
        plain.get_submodule(part).eval()
    for _ in range(3):
        optimizer.zero_grad()
        F.cross_entropy(plain(IMAGES), LABELS).backward()
        optimizer.step()
        model.train()
        local.step(IMAGES, LABELS)
    assert same_weights(plain, model)
    assert all(map(torch.equal, plain.buffers(), model.buffers()))


def adam(weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(weights, lr=1e-3)


@pytest.mark.parametrize("rule", [name for name, rule in RULES.items() if rule.at is None])
def test_features_that_leave_frozen_units_are_computed_once(rule: str) -> None:
    """For each of two views, with the same bits as for every batch."""
    source = digits(train_images=48, batch_size=16, views=2).train
    plain, kept = (
        learner("resnet18", "pred", "block", train_from=2, amp=torch.bfloat16) for _ in range(2)
    )
    history = ticks(rule, plain, source, epochs=2)
    calls: list[int] = []
    kept.units[0].piece.frozen.register_forward_hook(lambda *_: calls.append(1))
    keeping = Keeping(say=lambda line: None)
    given = 2, lambda done: 1 - done / 2, Position()
    again = list(ordered(RULES[rule].order, kept, source, keeping, *given))
    assert [tick.result.losses for tick in history] == [tick.result.losses for tick in again]
    assert same_weights(plain.model, kept.model)
    assert again[-1].kept_bytes == 2 * 48 * 4 * 8 * 8 * 2
    assert sum(calls) == 1 + 2 * 3  # two images to see what leaves them, then every part once
    kept.model.eval()
    kept.train(False)
    images = source.images(torch.arange(4), 0)  # between ticks it reads images
    assert kept.units[0].piece(images)[0].shape == (4, 8, 4, 4)


def test_features_are_not_kept_where_they_cannot_be() -> None:
    lines: list[str] = []
    for given, views, limit in (
        ({"loss": "pred"}, None, None),  # images are augmented anew
        ({"loss": "infopro"}, 1, None),  # a loss reads images
        ({"loss": "pred", "own_input": 0.1}, 1, None),  # a term reads what enters
        ({"loss": "pred"}, 1, 100),  # there is no room
    ):
        local = learner("resnet18", at="block", train_from=2, **given)
        source = digits(train_images=48, batch_size=16, views=views).train
        keeping = Keeping(limit=limit, bound="the limit of 100 bytes", say=lines.append)
        assert frozen_features(local, source, keeping) is None
    assert len(lines) == 1
    assert "exceed the limit of 100 bytes" in lines[0]


def test_memory_is_that_of_the_units_that_learn() -> None:
    whole, upper = (learner("resnet18", "pred", "block", train_from=given) for given in (None, 2))
    frozen = [w for name, w in upper.model.named_parameters() if is_frozen(name)]
    held = {id(weight) for unit in upper.units for weight in unit.held()}
    assert not held & {id(weight) for weight in frozen}
    for local in (whole, upper):
        local.step(IMAGES, LABELS)
    states = [
        sum(
            bytes_of([value for value in state.values() if value.dim() > 0])
            for unit in local.units
            for state in (unit.optimizer.state.values() if unit.optimizer else ())
        )
        for local in (whole, upper)
    ]
    heads = [bytes_of(list(unit.loss.parameters())) for unit in whole.units[:2]]
    assert states[0] - states[1] == 2 * (bytes_of(frozen) + sum(heads))
    shape = (64, 1, 8, 8)
    options: dict[str, Any] = {"loss": "pred", "at": "block"}
    peaks = [
        layerwise.predict_peak(network("resnet18"), shape, CLASSES, train_from=given, **options)
        for given in (None, 2)
    ]
    assert peaks[1] < peaks[0]


def test_a_unit_is_given_by_number_or_name() -> None:
    names = [unit.name for unit in learner("resnet18", "pred", "block").units]
    for unit in (2, "2", names[2]):
        local = learner("resnet18", "pred", "block", train_from=unit)
        assert [unit.name for unit in local.units] == names[2:]
        assert [unit.index for unit in local.units] == list(range(len(names) - 2))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"train_from": 6}, "train from unit 6: the network has 6 units. Give 0 to 5"),
        ({"train_from": -1}, "train from unit -1"),
        ({"train_from": "stages.9"}, "stages.9"),
        ({"train_from": 1, "at": 1}, "the network is one unit"),
    ],
)
def test_units_that_are_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        learner("resnet18", "pred", **{"at": "block", **given})


def test_nothing_left_to_train_is_refused() -> None:
    model = network("plain")
    model.out.requires_grad_(False)
    with pytest.raises(InvalidInput, match="nothing is left to train"):
        layerwise.localize(model, IMAGES, CLASSES, "pred", output_layer="separate", train_from=2)


def test_another_learner_of_the_network_may_train_what_was_frozen() -> None:
    """Gradual unfreezing; also after a call that was refused."""
    model = narrow("resnet18")
    with pytest.raises(InvalidInput, match="predd"):
        layerwise.localize(model, IMAGES, CLASSES, "predd", at="block", train_from=2)
    for train_from, parts in ((2, ()), (1, FROZEN[1:]), (0, FROZEN)):
        before = copy.deepcopy(model.state_dict())
        local = layerwise.localize(
            model, IMAGES, CLASSES, "pred", at="block", train_from=train_from
        )
        for _ in range(2):  # classifiers begin at 0, so the first step changes them alone
            local.step(IMAGES, LABELS)
        changed = {
            part
            for part in FROZEN
            for name, value in model.named_parameters()
            if name.startswith(part) and not torch.equal(value, before[name])
        }
        assert changed == set(parts), train_from


def test_a_budget_of_memory_plans_and_leaves_nothing_frozen() -> None:
    model = narrow("resnet18")
    planned, plain = copy.deepcopy(model), copy.deepcopy(model)
    given: dict[str, Any] = {"loss": "pred", "train_from": 1, "seed": 0}
    local = layerwise.localize(planned, IMAGES, CLASSES, at="memory:430KB", **given)
    other = layerwise.localize(plain, IMAGES, CLASSES, at=local.plan.at, **given)
    for _ in range(2):
        local.step(IMAGES, LABELS)
        other.step(IMAGES, LABELS)
    assert same_weights(planned, plain)
    assert not same_weights(planned, model)
    assert all(weight.requires_grad for weight in planned.parameters())


def test_windows_behind_frozen_units() -> None:
    local = learner("resnet18", "pred", "block", train_from=2, span=2)
    before = copy.deepcopy(local.model.state_dict())
    for _ in range(2):
        local.step(IMAGES, LABELS)
    changed = {n for n, p in local.model.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n, _ in local.model.named_parameters() if not is_frozen(n)}


def test_an_audit_does_not_miss_frozen_weights() -> None:
    found = layerwise.audit(learner("resnet18", "pred", "block", train_from=2), IMAGES, LABELS)
    assert found.problem is None
    assert not found.dead
    assert not any(is_frozen(weight.name) for weight in found.weights)


def test_checkpointing_behind_frozen_units_is_refused() -> None:
    local = learner("resnet18", "pred", ["stages.0.0"], train_from=1)
    with pytest.raises(InvalidInput, match="behind frozen units by the rule 'checkpointed'"):
        ticks("checkpointed", local, digits().train, epochs=1)


def test_networks_that_end_in_heads_behind_frozen_units() -> None:
    local = learner("resnet18", "pred", "block", train_from=2)
    local.step(IMAGES, LABELS)
    local.model.eval()
    local.train(False)
    first, every = local.early_exit(1), local.ensemble()
    passed = local.units[0].piece(IMAGES)[0]
    torch.testing.assert_close(first(IMAGES), local.units[0].loss.logits(passed))
    assert every(IMAGES).exp().sum(1).tolist() == pytest.approx([1.0] * len(IMAGES), rel=1e-5)
    assert {f"stages.{stage}.0.conv1.weight" for stage in range(4)} <= {*every.state_dict()}


def test_kept_features_are_shared_as_images_are() -> None:
    source = digits(train_images=48, batch_size=16, views=1).train.shared(Share(1, 2))
    local = learner("resnet18", "pred", "block", train_from=2)
    features = frozen_features(local, source, Keeping(say=lambda line: None))
    assert features is not None
    pairs = zip(features.batches(0), source.batches(0), strict=True)
    for (given, labels), (_, wanted) in pairs:
        assert given.shape[0] == 8
        assert torch.equal(labels, wanted)


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a run as the teacher, which is then left out where it would change nothing."""
    tiny = ["--train-images", "40", "--batch-size", "20", "--epochs", "1", "--device", "cpu"]
    small = ["resnet18", "--width", "0.0625", "--hierarchy", "1,1,1,1", "--at", "block", *tiny]
    teacher, run = tmp_path / "teacher", tmp_path / "run"
    main(["train", *small, "--loss", "pred", "--output", str(teacher)])
    named = ["--teacher", str(teacher), "--train-from", "2"]
    main(["train", *small, "--loss", "match", *named, "--output", str(run)])
    main(["evaluate", str(run)])
    record = json.loads((run / "run.json").read_text())
    assert record["run"]["train_from"] == "2"
    assert record["units"][0] == "stages.1.0"
    assert "train_from" not in json.loads((teacher / "run.json").read_text())["run"]
    for options, words in (
        (["--loss", "pred", "--teacher", str(teacher)], "no unit's loss compares"),
        (["--loss", "match", "--teacher", str(tmp_path / "none")], "Cannot use the teacher"),
    ):
        with pytest.raises(SystemExit):
            main(["train", *small, *options, "--output", str(tmp_path / "refused")])
        assert words in capsys.readouterr().err
        assert not (tmp_path / "refused").exists()
