"""Losses that differ per unit, options that change over training, rates of heads and last units."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.core.cuda_graphs import settings_of
from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.core.unit import Unit
from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES, Changing, Evaluated, Pred, Targets
from layerwise.losses.terms import TERMS
from layerwise.profiling.trial_steps import trial_images
from layerwise.rules import set_rates
from layerwise.runs.folder import STATE, WEIGHTS, RunFolder
from layerwise.runs.formats import run_from
from layerwise.runs.run import Run, described, run_name
from layerwise.training.loop import train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress
from layerwise.utils.options import Options, changing_options
from tests.helpers import digits, learner, same_weights, ticks
from tests.hostile import run_program
from tests.test_train import CPU, SMALL, carry_out, digest

NETWORK = "pre-activation"  # without dropout, which a loop by hand would draw otherwise
UNITS = ["stem", "conv1", "conv2", "conv3", "out"]
BATCHES = [
    (
        torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(number)),
        torch.arange(8) % 5,
    )
    for number in range(3)
]
# every option of a loss that may change, and the terms beside one loss
CHANGING = [(loss, name) for loss, kind in LOSSES.items() for name in changing_options(kind)]
CHANGING += [("pred", name) for name in TERMS]
VGG = ["vgg8b", "--hierarchy", "1,1,1,1", "--width", "0.0625", "--image-size", "8"]


def falling(progress: float) -> float:
    return 0.9 * (1 - progress)


def by_hand(local: Learner, loss_of: Callable[[Unit, Tensor, Targets, int], Tensor]) -> Learner:
    """A copy that has learned from ``BATCHES`` by PyTorch alone."""
    twin = copy.deepcopy(local)
    for number, (images, labels) in enumerate(BATCHES):
        activations: Any = (images,)
        for unit in twin.units:
            unit.optimizer.zero_grad()
            activations = unit.piece(*activations)
            loss_of(unit, activations[0], Targets(labels, 10, images), number).backward()
            unit.optimizer.step()
            activations = tuple(value.detach() for value in activations)
    return twin


def learned(local: Learner, progress: Callable[[int], float] = lambda number: 0.0) -> Learner:
    for number, batch in enumerate(BATCHES):
        local.set_progress(progress(number))
        local.step(*batch)
    return local


def weights_of(local: Learner) -> dict[str, Tensor]:
    heads = {
        f"{unit.index}.{name}": value
        for unit in local.units
        for name, value in unit.loss.state_dict().items()
    }
    return {**local.model.state_dict(), **heads}


def assert_close(one: Learner, other: Learner) -> None:
    torch.testing.assert_close(weights_of(one), weights_of(other), rtol=1e-4, atol=1e-6)


# losses per unit


@pytest.mark.parametrize(
    "given",
    [
        ["dgl-mlp", "dgl-mlp", "pred", "pred", "pred"],
        {name: LOSSES["dgl-mlp" if name in UNITS[:2] else "pred"] for name in reversed(UNITS)},
        {2: "pred", 0: "dgl-mlp"},
    ],
    ids=["in order", "by name", "by number"],
)
def test_every_form_gives_each_unit_its_own_loss(given: Any) -> None:
    local = learner(NETWORK, given, head_layers=1)
    assert [unit.name for unit in local.units] == UNITS
    names = [type(unit.loss).__name__ for unit in local.units]
    assert names == ["DglMlp", "DglMlp", "Pred", "Pred", "Output"]
    # an option goes to the losses that declare it: one hidden layer instead of three
    assert sum(isinstance(part, nn.Linear) for part in local.units[0].loss.modules()) == 2


def test_units_of_several_losses_learn_as_units_made_by_hand() -> None:
    local = learner(NETWORK, {0: "dgl-mlp", 2: "pred", 3: "predsim"}, beta=0.5)
    twin = by_hand(local, lambda unit, features, targets, _: unit.loss(features, targets).loss)
    assert_close(learned(local), twin)
    for index, loss in ((0, "dgl-mlp"), (2, "pred"), (3, "predsim")):
        head = learner(NETWORK, loss).units[index].loss
        assert same_weights(learner(NETWORK, {0: "dgl-mlp", index: loss}).units[index].loss, head)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"loss": ["pred"] * 2}, "does not give each of the 5 units a name or a callable"),
        ({"loss": {1: "pred"}}, "does not give each of the 5 units"),
        ({"loss": {"stem": "pred"}}, "does not give each of the 5 units"),
        ({"loss": {"stem": "pred"}}, "'conv1' has none"),
        ({"loss": dict.fromkeys([*UNITS, "stom"], "pred")}, "'stom': it is unknown. Did you mean"),
        ({"loss": 5}, "does not give each of the 5 units"),
        ({"loss": {0: "pred", 5: "sim"}}, "another loss at unit 5: the network has 5 units"),
        ({"loss": {0: "pred", 2: "sin"}}, "loss 'sin': it is unknown. Did you mean 'sim'"),
        ({"loss": {0: "pred", 2: "sim"}, "beta": 0.5}, "'beta' with loss 'pred', 'sim': it is un"),
    ],
)
def test_losses_that_do_not_fit_the_units_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        learner(NETWORK, **options)


def test_optimizers_take_the_same_forms() -> None:
    slow, fast = (lambda weights, lr=lr: torch.optim.SGD(weights, lr=lr) for lr in (0.1, 1.0))
    local = learner(NETWORK, "pred", optimizer={0: slow, 4: fast})
    rates = [unit.optimizer.param_groups[0]["lr"] for unit in local.units]
    assert rates == [0.1, 0.1, 0.1, 0.1, 1.0]


# options that change over training


def test_an_annealed_weight_is_that_of_a_loop_by_hand() -> None:
    sgd = {"optimizer": lambda weights: torch.optim.SGD(weights, lr=0.1)}
    local = learner(NETWORK, "predsim", beta=falling, **sgd)

    def loss_of(unit: Unit, features: Tensor, targets: Targets, number: int) -> Tensor:
        beta = 0.9 * (1 - number / 2)
        if unit.name == "out":
            return (1 - beta) * F.cross_entropy(features, targets.labels)
        sim, pred = unit.loss.sim(features, targets), unit.loss.pred(features, targets)
        return beta * sim.loss + (1 - beta) * pred.loss

    twin = by_hand(local, loss_of)
    assert_close(learned(local, lambda number: number / 2), twin)


@pytest.mark.parametrize(("loss", "name"), CHANGING)
def test_every_option_has_the_value_of_its_moment(loss: str, name: str) -> None:
    changing = learner(NETWORK, loss, at=3, **{name: lambda progress: 0.2 + progress / 2})
    constant = learner(NETWORK, loss, at=3, **{name: 0.45})
    before = settings_of(changing.units)
    assert settings_of(changing.units) == before
    changing.set_progress(0.5)
    assert settings_of(changing.units) != before  # steps recorded on a GPU are recorded anew
    assert_equal(learned(changing, lambda _: 0.5), learned(constant))


def assert_equal(one: Learner, other: Learner) -> None:
    assert all(map(torch.equal, weights_of(one).values(), weights_of(other).values()))


def test_a_term_may_begin_at_nothing() -> None:
    local = learner(NETWORK, "pred", own_input=lambda progress: progress)
    assert_equal(learned(local, lambda _: 1.0), learned(learner(NETWORK, "pred", own_input=1.0)))


def test_text_is_a_linear_change() -> None:
    local = learner(NETWORK, "predsim", beta="0.9..0.5")
    values = []
    for progress in (0.0, 0.5, 1.0):
        local.set_progress(progress)
        values.append([unit.loss.beta for unit in local.units])
    assert values == [[0.9] * 5, [pytest.approx(0.7)] * 5, [0.5] * 5]


class Softened(Pred):
    """A loss of a user's own.

    Args:
        temperature: divisor of the logits.
    """

    temperature = Changing(lambda value: value > 0, "a number above 0")
    seen: list[float] = []  # noqa: RUF012

    def __init__(self, site, *, temperature: float = 1.0, activation=torch.relu, size: int = 1):
        super().__init__(site)
        self.temperature, self.activation = temperature, activation

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        loss, correct = super().forward(self.activation(features), targets)
        if self.training:
            self.seen.append(self.temperature)
        return Evaluated(loss / self.temperature, correct)


@pytest.mark.parametrize("rule", ["simultaneous", "sequential", "parallel"])
def test_rules_set_the_progress_of_every_epoch(rule: str) -> None:
    local = learner(NETWORK, Softened, at=3, temperature=lambda progress: 1 + progress)
    Softened.seen.clear()
    data = digits(train_images=32).train
    ticks(rule, local, data, 4)
    units, steps = 2, len(data)
    values = [1.0, 1.25, 1.5, 1.75]
    if rule == "sequential":
        expected = [value for _ in range(units) for value in values for _ in range(steps)]
    else:
        expected = [value for value in values for _ in range(units * steps)]
    assert Softened.seen == expected


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"beta": lambda progress: 1 - progress}, "beta 1.0: it is out of range. Give a number fr"),
        ({"beta": "0.5..1"}, "beta 1.0: it is out of range"),
        ({"beta": lambda progress: 0.1 - (progress == 0.5)}, "beta -0.9: it is out of range"),
        ({"beta": lambda progress: None}, "beta over training: its function raised TypeError"),
        ({"beta": "0.5..x"}, r"beta '0.5..x': it is not a linear change"),
        ({"transport": lambda progress: -progress}, "transport -1.0: it is out of range"),
        ({"decoder_dim": lambda progress: 9}, "decoder_dim over training: it is read when the"),
        ({"decoder_dim": lambda progress: 9}, "; beta, transport, own_input may change"),
        ({"loss": Softened, "size": lambda progress: 1}, "; temperature, transport, own_input may"),
    ],
)
def test_changes_that_cannot_be_are_refused_before_training(
    options: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidInput, match=words):
        learner(NETWORK, **{"loss": "predsim", **options})


def test_what_only_fails_during_training_is_refused_there() -> None:
    local = learner(NETWORK, "predsim", beta=lambda progress: 0.1 + (progress == 0.75))
    with pytest.raises(InvalidInput, match=r"beta 1\.1: it is out of range"):
        local.set_progress(0.75)
    with pytest.raises(InvalidInput, match=r"progress 1\.5: it is not a share of training"):
        local.set_progress(1.5)
    with pytest.raises(InvalidInput, match="progress half: it is not a share of training"):
        local.set_progress("half")


def test_options_of_a_head_go_to_it_and_change_with_it() -> None:
    layers = (nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 8))
    network, losses = nn.Sequential(*layers, nn.Linear(8, 10)), {0: "look-ahead", 1: "dgl-cnn"}
    first, second, _ = localize(network, torch.rand(2, 1, 8, 8), 10, losses, head_layers=1).units
    assert isinstance(first.loss.loss, Pred)
    assert len(second.loss.head) == 5
    local = learner("plain", "look-ahead", head_loss="predsim", beta=falling)
    local.set_progress(0.5)
    assert local.units[0].loss.loss.beta == 0.45
    with pytest.raises(InvalidInput, match="'head_layers' with loss 'look-ahead': it is unknown"):
        learner("plain", "look-ahead", head_layers=1)


def test_a_callable_option_that_is_no_number_stays_as_it_is() -> None:
    assert learner(NETWORK, Softened, activation=torch.tanh).units[0].loss.activation is torch.tanh


def test_a_state_keeps_the_progress() -> None:
    local = learned(learner(NETWORK, "predsim", beta=falling), lambda number: number / 4)
    other = learner(NETWORK, "predsim", beta=falling)
    other.load_state_dict(local.state_dict())
    assert [unit.loss.beta for unit in other.units] == [0.45] * 5
    assert "progress" not in learner(NETWORK, "pred").state_dict()


# rates


def test_heads_learn_at_their_own_rate() -> None:
    sgd = {"optimizer": lambda weights: torch.optim.SGD(weights, lr=0.1)}
    whole, scaled = (learner(NETWORK, "pred", **sgd, head_lr_factor=factor) for factor in (1, 3))
    before = weights_of(copy.deepcopy(whole))
    for local in (whole, scaled):
        set_rates(local.units, 0.5)
        local.units[0].step((BATCHES[0][0],), Targets(BATCHES[0][1], 10), 0)
    assert len(whole.units[0].optimizer.param_groups) == 1
    for name, value in weights_of(scaled).items():
        factor = 3 if name.startswith("0.classifier") else 1  # the head of unit 0
        moved = weights_of(whole)[name] - before[name]
        torch.testing.assert_close(value - before[name], factor * moved)
    scaled.load_state_dict(copy.deepcopy(scaled.state_dict()))
    assert [group["lr"] for group in scaled.units[0].optimizer.param_groups] == [0.05, 0.05 * 3]


@pytest.mark.parametrize("how", [{"loss": "lls"}, {"loss": "pred", "at": 1}])
def test_a_rate_of_heads_without_weights_is_refused(how: dict[str, Any]) -> None:
    with pytest.raises(InvalidInput, match=r"head_lr_factor=2\.0: it would change nothing"):
        learner(NETWORK, **how, head_lr_factor=2.0)


def test_schedules_of_pytorch_keep_the_factor() -> None:
    schedule = lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)  # noqa: E731
    local = learner(NETWORK, "pred", head_lr_factor=2.0, scheduler=schedule)
    local.step(*BATCHES[0])
    local.end_epoch()
    rates = [group["lr"] for group in local.units[0].optimizer.param_groups]
    assert rates == [pytest.approx(1e-4), pytest.approx(2e-4)]


def test_the_last_unit_learns_at_its_own_rate() -> None:
    run = replace(SMALL, head_lr_factor=2.0, last_lr_factor=0.5, lr=0.1)
    images = trial_images(run)
    first, *_, last = prepare(run, CPU).make_learner(images).units
    assert [group["lr"] for group in first.optimizer.param_groups] == [0.1, 0.2]
    assert [group["lr"] for group in last.optimizer.param_groups] == [0.05]
    (whole,) = prepare(replace(run, rule="global"), CPU).make_learner(images).units
    assert [group["lr"] for group in whole.optimizer.param_groups] == [0.1]


# runs

ALL = replace(
    SMALL,
    model="vgg8b",
    loss_from="2=predsim,3=infopro",
    at="5",
    loss="dgl-mlp",
    loss_options=Options({"beta": "0.9..0.1", "head_layers": 1, "own_input": "0.0..0.1"}),
    head_lr_factor=2.0,
    last_lr_factor=0.5,
    epochs=2,
    output_layer="separate",
)


class StopAt(Progress):
    """Stops a training as a kill would, after some batches."""

    def __init__(self, count: int) -> None:
        self.count = count

    def tick(self, tick: Any, meter: Any) -> None:
        self.count -= 1
        if not self.count:
            raise KeyboardInterrupt


@pytest.mark.parametrize("rule", ["simultaneous", "sequential"])
def test_a_run_goes_on_through_changes_to_the_same_bits(rule: str, tmp_path: Path) -> None:
    run = replace(ALL, rule=rule)
    carry_out(run, tmp_path / "whole")
    folder = RunFolder(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):  # in the second epoch; the state is that of the first
        train(prepare(run, CPU), folder, False, StopAt(6))
    assert folder.has(STATE)
    assert folder.run() == run
    carry_out(run, folder.path, resume=True)
    assert digest(folder.file(WEIGHTS)) == digest(tmp_path / "whole" / WEIGHTS)
    losses = [
        [[unit["loss"] for unit in record["units"]] for record in RunFolder(tmp_path / name).log()]
        for name in ("whole", "cut")
    ]
    assert losses[0] == losses[1]


def test_a_run_is_that_of_the_command(tmp_path: Path) -> None:
    words = ["--loss", "pred", "--loss-from", "2=predsim", "--loss-from", "3 = dgl-mlp"]
    words += ["--beta", "0.9..0.5", "--epochs", "1", "--train-images", "40", "--device", "cpu"]
    words += ["--output", str(tmp_path / "run"), "--batch-size", "16", "--json"]
    main_words = ["train", *VGG, *words]
    assert run_program(*main_words)[0] is None
    run = RunFolder(tmp_path / "run").run()
    assert run.loss_from == "2=predsim,3=dgl-mlp"
    assert run.loss_options == {"beta": "0.9..0.5"}
    assert run_from(described(run), 3, "here") == run
    code, printed = run_program("show", "--json", *VGG, *words[:8])
    assert code is None, printed
    units = json.loads(printed.splitlines()[-1])["units"]
    assert [unit["loss"] for unit in units[:4]] == ["Pred", "Pred", "PredSim", "DglMlp"]
    profile = ["profile", "--predict", "--rules", "simultaneous,global", "--json"]
    code, printed = run_program(*profile, *VGG, *words[:8])
    assert code is None, printed
    heads = json.loads(printed.splitlines()[-1])["rules"]["simultaneous"]["head_parameters"]
    assert heads == sum(unit["head_parameters"] for unit in units)
    code, printed = run_program(*main_words, "--resume", "--loss-from", "4=sim")
    assert code == 2
    assert "another run (--loss-from 2=predsim,3=dgl-mlp,4=sim against 2=predsim,3=dg" in printed


def test_runs_without_these_options_have_the_names_they_had() -> None:
    assert run_name(Run()) == "resnet18-default-digits-simultaneous-predsim-seed0-3cb4dc"
    later = run_name(replace(Run(), loss_from="4=pred"))
    assert later.startswith("resnet18-default-digits-simultaneous-predsim-pred-seed0-")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--loss-from 4", "Cannot use --loss-from '4': it is not a unit and a loss"),
        ("--loss-from 4=", "--loss-from '4=': it is not a unit and a loss"),
        ("--loss-from 0=pred", "its units do not increase"),
        ("--loss-from 3=pred --loss-from 2=sim", "its units do not increase"),
        ("--loss-from 2=sin", "loss 'sin': it is unknown. Did you mean 'sim'"),
        ("--loss-from 99=sim", "another loss at unit 99: the network has 5 units. Give 0 to 4"),
        ("--loss-from 2=sim --head-layers 1", "--head-layers with the loss 'predsim', 'sim'"),
        ("--beta 0.5..1", "beta 1.0: it is out of range"),
        ("--beta 0.5..", "beta=0.5.. (option of the loss 'predsim'): it is not a linear change"),
        ("--beta x", "invalid number value: 'x'"),
        ("--loss auglocal --pyramid 0..1", "argument --pyramid: 0..1 would change"),
        ("--head-lr-factor 0", "--head-lr-factor 0.0: it is out of range. Give a number above 0"),
        ("--last-lr-factor nan", "--last-lr-factor nan: it is not finite"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    words: str, said: str, tmp_path: Path
) -> None:
    folder = ["--output", str(tmp_path / "run"), "--device", "cpu"]
    code, printed = run_program("train", *VGG, *folder, *words.split())
    assert code == 2
    assert said in printed.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_losses_to_compare_say_themselves_what_follows(tmp_path: Path) -> None:
    words = ["--losses", "pred,sim", "--loss-from", "2=pred", "--output", str(tmp_path)]
    code, printed = run_program("compare", "vgg8b", *words)
    assert code == 2
    assert "Cannot use --loss-from with --losses: both say what is trained" in printed
