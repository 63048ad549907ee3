"""Orders of updates that change over training: groups that grow in number, laps."""

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from layerwise.cli import main
from layerwise.core.learner import Learner
from layerwise.errors import InvalidInput
from layerwise.profiling.predict import predict_steps
from layerwise.rules import RULES, Keeping, Position
from layerwise.rules.growing import Growth
from layerwise.runs.folder import WEIGHTS, RunFolder
from layerwise.runs.run import GLOBAL_RULES
from tests.helpers import digits, learner, network, same_weights, ticks
from tests.test_cli import last_json, refusal
from tests.test_windows import IMAGES, LABELS, follows_the_reach, make, without_dropout

HALVES = (1, 2, 0, 4, 5, 3)  # the reach of two groups of three units


def blocks(rule: str = "growing", **options: Any) -> Learner:
    return learner("resnet18", "pred", at=RULES[rule].at or "block", **options)


# ---- growing ----


def test_rules_of_one_unit_are_known_where_torch_is_not_read() -> None:
    assert set(GLOBAL_RULES) == {name for name, rule in RULES.items() if rule.at == 1}


def test_one_group_is_global_training() -> None:
    grouped, whole = (without_draws(at) for at in ("block", 1))
    before = copy.deepcopy(grouped.units[0].loss)
    history = ticks("growing", grouped, digits().train, epochs=2, groups_last=1)
    ticks("global", whole, digits().train, epochs=2)
    for ours, theirs in zip(grouped.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert len(history[0].result.accuracies) == len(grouped.units)
    assert not same_weights(grouped.units[0].loss, before)  # heads read along


def without_draws(at: str | int) -> Learner:
    torch.manual_seed(0)
    return make(without_dropout("resnet18"), at=at, loss="pred", memory_format=None)


def test_as_many_groups_as_units_is_simultaneous() -> None:
    grouped, plain = blocks(), blocks()
    ticks("growing", grouped, digits().train, 2, groups_first=len(plain.units))
    ticks("simultaneous", plain, digits().train, 2)
    assert same_weights(grouped.model, plain.model)


@pytest.mark.parametrize("loss", ["pred", "dgl-cnn"])
def test_in_between(loss: str) -> None:
    local = make(without_dropout("resnet18"), at="block", loss=loss, output_layer="separate")
    order = RULES["growing"].order(local, OneBatch(), 1, lambda done: 1.0, groups_first=2)
    follows_the_reach(local, HALVES, partial(next, order))
    assert local.reach == HALVES
    order.close()
    assert not local.windowed


class OneBatch:
    """A training set of one batch."""

    def __len__(self) -> int:
        return 1

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        yield IMAGES, LABELS


@pytest.mark.parametrize(
    ("growth", "groups"),
    [
        (Growth(1, 5, 0.5, 0.3), [1, 1, 1, 1, 1, 2, 3, 4, 5, 5]),
        (Growth(1, 5, 0.5, 0.0), [1, 1, 1, 1, 1, 5, 5, 5, 5, 5]),
        (Growth(2, 3, 0.0, 0.5), [3] * 10),
        (Growth(1, 9, 0.0, 0.8), [2, 2, 3, 4, 5, 6, 7, 8, 9, 9]),
        (Growth(4, 4, 0.1, 0.1), [4] * 10),
        (Growth(1, 5, 1.0, 0.0), [1] * 10),
    ],
)
def test_groups_over_training(growth: Growth, groups: list[int]) -> None:
    assert [growth.groups(epoch / 10) for epoch in range(10)] == groups


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"groups_first": 0}, "Cannot use groups_first 0: the chain has 6 units"),
        ({"groups_last": 7}, "Cannot use groups_last 7: the chain has 6 units"),
        ({"groups_first": 3, "groups_last": 2}, "it is below groups_first, 3"),
        ({"global_share": 0.8, "growth": 0.3}, "they are not shares of training"),
        ({"global_share": -0.1}, "they are not shares of training"),
        ({"growth": float("nan")}, "they are not shares of training"),
        ({"micro_batches": 0}, "Cannot use micro_batches 0"),
    ],
)
def test_groups_that_the_chain_has_not_are_refused(options: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInput, match=reason):
        ticks("growing", blocks(), digits().train, 1, **options)


def test_growing_in_float16_is_refused() -> None:
    with pytest.raises(InvalidInput, match="each unit scales its own loss"):
        ticks("growing", blocks(amp=torch.float16), digits().train, 1)


def test_growing_by_parts_and_resumed() -> None:
    resumed_in(3, "growing", 4, micro_batches=2, global_share=0.25, growth=0.5)


def resumed_in(epoch: int, rule: str, epochs: int, **options: Any) -> None:
    """Assert that a training stopped in the middle of an epoch goes on to the same bits."""
    data = digits(views=2)
    whole, first, second = (learner("vgg8b", "pred") for _ in range(3))
    history = ticks(rule, whole, data.train, epochs, **options)
    order = RULES[rule].order(first, data.train, epochs, lambda done: 1 - done / 2, **options)
    tick = next(tick for tick in order if tick.after == Position(epoch, 2))
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    rest = ticks(rule, second, data.train, epochs, tick.after, **options)
    assert same_weights(whole.model, second.model)
    assert [tick.after for tick in rest] == [tick.after for tick in history[-len(rest) :]]
    for ours, theirs in zip(whole.units, second.units, strict=True):
        assert same_weights(ours.loss, theirs.loss)


# ---- laps ----


@pytest.mark.parametrize("cached", [False, True])
def test_resumed_in_the_second_lap(cached: bool) -> None:
    units = len(learner("vgg8b", "pred").units)
    quiet = {"cache": True, "keeping": Keeping(say=lambda line: None)} if cached else {}
    resumed_in(units + 2, "sequential", 2, laps=2, **quiet)


def test_laps_with_cached_features_are_laps_without() -> None:
    data, keeping = digits(views=2), Keeping(say=lambda line: None)
    plain, caching = (learner("vgg8b", "pred") for _ in range(2))
    without = ticks("sequential", plain, data.train, epochs=4, laps=2)
    cached = ticks("sequential", caching, data.train, 4, laps=2, cache=True, keeping=keeping)
    assert [tick.result.losses for tick in without] == [tick.result.losses for tick in cached]
    assert same_weights(plain.model, caching.model)


def test_units_train_in_turn_in_every_lap() -> None:
    local = learner("plain", "pred")
    rates: list[float] = []
    order = RULES["sequential"].order(local, digits().train, 5, lambda done: 1 - done / 2, laps=2)
    turns = []
    for tick in order:
        if tick.ends_epoch:
            turns.append(tick.first)
            rates.append(local.units[tick.first].optimizer.param_groups[0]["lr"])
            others = [unit for unit in local.units if unit.index != tick.first]
            assert not any(unit.optimizer.state for unit in others)  # their moments are freed
    assert turns == [0, 0, 1, 1, 2, 2, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    own = [1e-3 * (1 - epoch / 10) for epoch in range(5)]
    assert rates == pytest.approx([*own[:2] * 3, *own[2:] * 3])
    assert tick.ends_training


@pytest.mark.parametrize("laps", [0, 3])
def test_laps_beyond_epochs_are_refused(laps: int) -> None:
    with pytest.raises(InvalidInput, match=f"Cannot use laps {laps}: a unit has 2 epochs"):
        ticks("sequential", learner("plain"), digits().train, 2, laps=laps)
    with pytest.raises(InvalidInput, match="the chain has one unit"):
        ticks("sequential", learner("plain", at=1), digits().train, 2, laps=2)


# ---- the program ----


TINY = ["resnet18", "--hierarchy", "1,1,1,1", "--width", "0.0625", "--at", "block"]
TINY += ["--loss", "pred"]
TRAIN = ["train", *TINY, "--train-images", "60", "--batch-size", "20", "--epochs", "2"]
TRAIN += ["--device", "cpu"]


@pytest.mark.parametrize(
    ("words", "options", "epochs"),
    [
        ("--span 1,1,2,2,3", {"span": "1,1,2,2,3"}, 2),
        ("--span 1,3=2", {"span": "1,3=2"}, 2),
        ("--span 2", {"span": 2}, 2),
        ("--rule growing --groups-last 3", {"groups_last": 3}, 2),
        ("--rule sequential --laps 2", {"laps": 2}, 10),
    ],
)
def test_runs_record_their_order(
    words: str, options: dict[str, Any], epochs: int, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = tmp_path / "run"
    main([*TRAIN, *words.split(), "--output", str(path)])
    folder = RunFolder(path)
    assert folder.run().rule_options == options
    assert len(folder.log()) == epochs
    weights = (path / WEIGHTS).read_bytes()
    for name in ("result.json", WEIGHTS):
        (path / name).unlink()
    main(["train", "--resume", str(path)])  # the last state, and nothing to do
    assert (path / WEIGHTS).read_bytes() == weights


def test_spans_of_units_are_shown_and_predicted(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", *TINY, "--span", "1,1,2,2,3", "--json"])
    assert last_json(capsys)["span"] == [1, 1, 2, 2, 3]
    profile = ["profile", *TINY, "--predict", "--rules", "simultaneous,growing,sequential"]
    main([*profile, "--span", "1,1,2,2,3", "--laps", "3", "--json"])
    rules = last_json(capsys)["rules"]
    local, windows = predicted("simultaneous", 1), predicted("simultaneous", [1, 1, 2, 2, 3])
    more = [windows.multiply_adds[unit] > local.multiply_adds[unit] for unit in range(5)]
    assert more == [False, False, True, True, True]
    assert len(rules["sequential"]["units"]) == 5
    assert rules["growing"]["multiply_adds"] > 0


def predicted(rule: str, span: Any) -> Any:
    local = make(without_dropout("resnet18"), at="block", loss="pred", span=span)
    [step] = predict_steps(rule, local, 16, {})
    return step


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--span 9", "Cannot use span 9: the chain has 5 units"),
        ("--span 1,2", "Cannot use span 1,2: it has 2 units, and the chain has 5"),
        ("--span one", "it is not a number of units"),
        ("--rule growing --groups-last 9", "Cannot use --groups-last 9: the chain has 5 units"),
        ("--rule growing --span 2", "Cannot use --span with the rule 'growing'"),
        ("--rule sequential --laps 3", "Cannot use laps 3: a unit has 2 epochs"),
        ("--laps 2", "Cannot use --laps with the rule 'simultaneous'"),
    ],
)
def test_refusals_on_the_command_line(
    words: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run"
    assert reason in refusal(capsys, *TRAIN, *words.split(), "--output", str(path))
    assert not path.exists()


def test_spans_in_a_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "spans.yaml"
    file.write_text("span: [1, 1, 2, 2, 3]\n")
    main(["show", *TINY, "--config", str(file), "--json"])
    assert last_json(capsys)["span"] == [1, 1, 2, 2, 3]


def test_a_term_that_compares_nothing_is_refused() -> None:
    with pytest.raises(InvalidInput, match="Cannot use transport: it would change nothing"):
        make(network("plain"), at="block", loss="pred", transport=0.1)
    make(network("plain"), at="block", loss="pred", own_input=0.1)
    for term in ("transport", "own_input"):
        with pytest.raises(InvalidInput, match="the chain is one unit, and the last one carries"):
            make(network("plain"), at=1, loss="pred", **{term: 0.1})
    make(network("plain"), at=1, loss="pred", transport=0)


@pytest.mark.parametrize("rule", ["simultaneous", "sequential"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int32])
def test_labels_of_any_integer_type_are_learned(rule: str, dtype: torch.dtype) -> None:
    losses = []
    for given in (torch.int64, dtype):
        data, local = digits(32), learner("plain", "predsim")
        data.train.labels = data.train.labels.to(given)
        losses.append([tick.result.loss_tensor() for tick in ticks(rule, local, data.train, 1)])
    assert losses[0]
    assert all(map(torch.equal, *losses))
