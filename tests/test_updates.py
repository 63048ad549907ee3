"""Orders of updates from Python, with one's own loader."""

import copy
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import layerwise
from layerwise.core.learner import Learner
from layerwise.errors import InvalidInput
from layerwise.rules import RULES, Position
from tests.helpers import digits, learner, network, same_weights, ticks

OPTIONS: dict[str, dict[str, Any]] = {"sequential": {"laps": 2}, "growing": {"groups_first": 2}}


def one_epoch() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return list(digits().train.batches(0))


def made(rule: str, **options: Any) -> Learner:
    return learner("vgg8b", "pred", at=RULES[rule].at or "layer", **options)


@pytest.mark.parametrize("rule", RULES)
def test_a_loader_trains_as_the_program_does(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches, ours, theirs = one_epoch(), made(rule), made(rule)
    options = OPTIONS.get(rule, {})
    data = digits().train
    monkeypatch.setattr(
        type(data), "batches", lambda self, epoch, start=0: iter(one_epoch_of(batches, start))
    )
    expected = ticks(rule, theirs, data, 2, **options)
    found = list(
        layerwise.updates(ours, batches, 2, rule, schedule=lambda done: 1 - done / 2, **options)
    )
    assert [tick.after for tick in found] == [tick.after for tick in expected]
    assert [tick.result.losses for tick in found] == [tick.result.losses for tick in expected]
    assert same_weights(ours.model, theirs.model)


def one_epoch_of(batches: list[Any], start: int) -> list[Any]:
    return batches[start:]


def test_simultaneous_updates_are_steps() -> None:
    images, labels = (torch.cat(each) for each in zip(*one_epoch(), strict=True))
    loader = DataLoader(TensorDataset(images, labels), batch_size=16)
    ours, theirs = made("simultaneous"), made("simultaneous")
    for tick in layerwise.updates(ours, loader, 2):
        assert tick.ends_epoch == (tick.after.batch == 0)
    for _ in range(2):
        for batch in loader:
            theirs.step(*batch)
    assert same_weights(ours.model, theirs.model)


@pytest.mark.parametrize("rule", ["simultaneous", "sequential"])
def test_going_on_gives_the_same_bits(rule: str) -> None:
    batches = one_epoch()
    whole, first, second = (made(rule) for _ in range(3))
    list(layerwise.updates(whole, batches, 2, rule))
    for tick in layerwise.updates(first, batches, 2, rule):
        if tick.after == Position(1, 3):
            break
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    list(layerwise.updates(second, batches, 2, rule, start=tick.after))
    assert same_weights(whole.model, second.model)


def test_nothing_is_learned_before_it_is_iterated_over() -> None:
    local = made("simultaneous")
    before = copy.deepcopy(local.model)
    layerwise.updates(local, one_epoch(), 1)
    assert same_weights(local.model, before)


@pytest.mark.parametrize(
    ("loader", "arguments", "words"),
    [
        ([], {}, "batches"),
        (iter([1]), {}, "it has no length. Give a DataLoader"),
        ([torch.zeros(2, 1, 8, 8)], {}, "a batch of type Tensor: it is no pair"),
        ([({"x": 1}, 2)], {}, "it is no pair of tensors"),
        (None, {"rule": "none"}, "rule 'none'"),
        (None, {"epochs": 0}, "epochs"),
        (None, {"epochs": 1.5}, "epochs=1.5: it is no whole number"),
        (None, {"rule": "global"}, r"as one. Make the learner by localize\(…, at=1\)"),
        (None, {"rule": "sequential", "cache": True}, "option of the rule sequential 'cache'"),
        (None, {"lapses": 2}, "option of the rule simultaneous 'lapses'"),
        (None, {"rule": "sequential", "laps": 2}, "Cannot use laps 2"),
    ],
)
def test_what_is_refused(loader: Any, arguments: dict[str, Any], words: str) -> None:
    given = one_epoch() if loader is None else loader
    with pytest.raises(InvalidInput, match=words):
        list(layerwise.updates(made("simultaneous"), given, **{"epochs": 1, **arguments}))


@pytest.mark.parametrize("length", [4, 6])
def test_another_number_of_batches_than_the_length_is_refused(length: int) -> None:
    class Loader:
        def __len__(self) -> int:
            return length

        def __iter__(self) -> Any:
            return iter(one_epoch())

    assert len(one_epoch()) == 5
    with pytest.raises(InvalidInput, match=f"its length is {length}"):
        list(layerwise.updates(made("simultaneous"), Loader(), 1))


def test_a_learner_with_a_scheduler_is_refused() -> None:
    local = layerwise.localize(
        network("plain"),
        torch.zeros(2, 1, 8, 8),
        10,
        "pred",
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1),
    )
    with pytest.raises(InvalidInput, match="give schedule= here"):
        layerwise.updates(local, one_epoch(), 1)
