"""Arguments of the library that are of a wrong type, contradict each other or change nothing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise import Diverged, InvalidInput
from layerwise.cli.train import command_to_resume
from layerwise.cli.values import read_config
from layerwise.core.learner import Learner
from layerwise.errors import first_line_of, last_line_of, raised, reason_of
from layerwise.rules import RULES
from layerwise.utils.plugins import IMPORTED
from tests.helpers import digits, learner, network, same_weights

IMAGES, LABELS = torch.rand(8, 1, 8, 8), torch.arange(8) % 10
ADAM = torch.optim.Adam


def one_cycle(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=20)


def by_steps(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize(
    ("saved", "now"),
    [(None, one_cycle), (one_cycle, None), (one_cycle, by_steps), (by_steps, one_cycle)],
)
def test_a_state_with_another_schedule_is_refused(saved: Any, now: Any) -> None:
    """OneCycleLR would fail at its next step, and others go on from a rate that is not theirs."""
    state = learner("plain", "pred", scheduler=saved).state_dict()
    local = learner("plain", "pred", scheduler=now)
    before = copy.deepcopy(local.state_dict())
    with pytest.raises(InvalidInput, match=r"schedule|OneCycleLR"):
        local.load_state_dict(state)
    assert str(local.state_dict()) == str(before)


def test_a_state_of_an_earlier_version_has_no_kinds_of_schedules() -> None:
    state = learner("plain", "pred", scheduler=by_steps).state_dict()
    del state["scheduler_kinds"]
    learner("plain", "pred", scheduler=by_steps).load_state_dict(state)


@pytest.mark.parametrize(
    "damage",
    [
        {"schedulers": [None]},
        {"schedulers": "none"},
        {"losses": []},
        {"losses": "none"},
        {"model": "none"},
        {"optimizers": [None] * 3},
        {"scalers": [1]},
        {"steps": -1},
        {"steps": "3"},
        {"progress": 7},
    ],
    ids=str,
)
def test_of_a_damaged_state_nothing_is_loaded(damage: dict[str, Any]) -> None:
    trained, local = learner("plain", "pred"), learner("plain", "pred")
    trained.step(IMAGES, LABELS)
    before = copy.deepcopy(local.model)
    with pytest.raises(InvalidInput, match="Cannot load the state"):
        local.load_state_dict({**trained.state_dict(), **damage})
    assert same_weights(local.model, before)
    assert local.steps == 0


@pytest.mark.parametrize("state", ["state.pt", None, 3])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(InvalidInput, match=type(state).__name__):
        learner("plain", "pred").load_state_dict(state)


def test_a_state_of_as_many_other_units_names_one() -> None:
    state = learner("vgg8b", "pred", at=3).state_dict()
    with pytest.raises(InvalidInput, match="the first that differs 'stages"):
        learner("plain", "pred").load_state_dict(state)


@pytest.mark.parametrize(
    ("sample", "said"),
    [
        (IMAGES[:0], "sample holds no images"),
        (IMAGES[0], "cannot process the sample of shape"),
        (IMAGES.to("meta"), "meta"),
    ],
    ids=["empty", "unbatched", "meta"],
)
def test_samples_that_are_no_batch(
    sample: Tensor, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    for at in ("layer", 2):
        with pytest.raises(InvalidInput, match=said):
            layerwise.localize(network("branches"), sample, 10, "pred", at=at)
    assert capfd.readouterr().err == ""


class Changing(nn.Module):
    """A loss of the user's own that changes the feature it is given."""

    def __init__(self, site: layerwise.Site) -> None:
        super().__init__()
        self.out = nn.Linear(site.shape[0], site.num_classes)

    def forward(self, features: Tensor, targets: layerwise.Targets) -> Any:
        logits = self.out(features.sub_(1.0).flatten(2).mean(2))
        loss = nn.functional.cross_entropy(logits, targets.labels)
        return loss, (logits.argmax(1) == targets.labels).sum()


def test_a_loss_that_changes_the_feature_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"unit 0 \(conv1\): it changes the unit's feature"):
        learner("plain", Changing)


def test_features_that_are_not_finite_are_no_images() -> None:
    local = learner("plain", "pred")
    steps = RULES["sequential"].order(local, digits().train, 1, lambda done: 1.0)
    for _ in range(len(digits().train)):
        next(steps)
    nn.init.constant_(local.model.conv1.weight, float("inf"))
    with pytest.raises(Diverged, match=r"enter unit 1 \(conv2\) are not finite"):
        next(steps)


class Misshapen(nn.Module):
    """Adds what does not fit, between its layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 8), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x.flatten(1)) + torch.zeros(3, 7))


def test_only_the_refusal_is_said_of_an_error_in_forward(
    capfd: pytest.CaptureFixture[str],
) -> None:
    """fx prints an error of its own modules, with all of its lines, before it raises it."""
    with pytest.raises(InvalidInput, match="cannot process the sample"):
        layerwise.localize(Misshapen(), IMAGES, 10, "pred")
    assert capfd.readouterr().err == ""


class Unannotated(nn.Module):
    """A loss of the user's own, whose option has a default and no annotation."""

    def __init__(self, site: layerwise.Site, *, squared=False) -> None:
        super().__init__()


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("update", lambda: learner("plain", "pred").step(IMAGES, LABELS, update="no")),
        ("check", lambda: learner("plain", "pred", check="no")),
        ("standardize", lambda: learner("plain", "match", standardize="no")),
        ("squared", lambda: learner("plain", Unannotated, squared="no")),
        ("weights", lambda: layerwise.set_memory_format(learner("plain", "pred"), weights="no")),
        ("new_classifier", lambda: layerwise.create_model("vgg8", new_classifier="no")),
        ("gather_examples", lambda: layerwise.replicate(None, gather_examples="no")),
        ("bfloat16_features", lambda: layerwise.distribute(None, bfloat16_features="no")),
        (
            "bfloat16_features",
            lambda: layerwise.audit(
                learner("plain", "pred"), IMAGES, LABELS, "parallel", bfloat16_features="no"
            ),
        ),
        (
            "cache",
            lambda: layerwise.predict_peak(
                network("plain"), IMAGES.shape, 10, "sequential", loss="pred", cache="no"
            ),
        ),
    ],
)
def test_text_is_no_boolean(name: str, call: Callable[[], Any]) -> None:
    with pytest.raises(InvalidInput, match=f"Cannot use {name}='?no"):
        call()


@pytest.mark.parametrize("name", ["images", "labels"])
def test_a_batch_on_another_device(name: str) -> None:
    batch = {"images": IMAGES, "labels": LABELS}
    batch[name] = batch[name].to("meta")
    with pytest.raises(InvalidInput, match=f"from {name} on meta: the network is on cpu"):
        learner("plain", "pred").step(**batch)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"leaves": "conv1"}, r"leaves='conv1'.*\['conv1'\]"),
        ({"leaves": 3}, "leaves=3"),
        ({"loss": {0: "pred", "out": "sim"}}, "key 0 in loss=: it is a number beside names"),
        ({"loss": {0: "pred", 1.5: "sim"}}, "key 1.5 in loss=: it is neither"),
        ({"optimizer": {0: ADAM, True: ADAM}}, "key True in optimizer=: it is neither"),
        ({"scheduler": torch.optim.lr_scheduler.StepLR}, "scheduler= raised TypeError"),
        ({"seed": True}, "seed=True"),
        ({"head_lr_factor": True}, "head_lr_factor=True"),
        ({"clip_grad": True}, "clip_grad=True"),
        ({"clip_grad": "1"}, "clip_grad='1'"),
        ({"loss": "strided", "head_depth": 0, "head_width_factor": 0.5}, "would change nothing"),
        (
            {"loss": "look-ahead", "branches": "copy", "average_momentum": 0.5},
            "would change nothing",
        ),
    ],
    ids=str,
)
def test_arguments_of_localize(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        learner("plain", **{"loss": "pred", **options})


@pytest.mark.parametrize("at", ["layer", "memory:1GB"])
def test_leaves_may_be_read_only_once(at: str) -> None:
    leaves = iter(["gate"])
    local = layerwise.localize(network("branches"), IMAGES, 10, "pred", at=at, leaves=leaves)
    assert local.leaves == ("gate",)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: layerwise.split(3), "model is int"),
        (lambda: layerwise.create_model(None), "name is NoneType"),
        (lambda: layerwise.audit(None, IMAGES, LABELS), "it is no learner"),
        (
            lambda: layerwise.audit(learner("plain", "pred"), IMAGES.numpy(), LABELS),
            "must be tensors",
        ),
        (lambda: layerwise.predict_peak(network("plain"), IMAGES, 10), "batch_shape=tensor"),
        (
            lambda: layerwise.separability(network("plain"), (IMAGES, LABELS), measures="fisher"),
            r"measures='fisher'.*\['fisher'\]",
        ),
    ],
    ids=["split", "create_model", "audit", "audit batch", "predict_peak", "separability"],
)
def test_arguments_of_other_functions(call: Callable[[], Any], said: str) -> None:
    with pytest.raises(InvalidInput, match=said) as refusal:
        call()
    assert "\n" not in str(refusal.value)


def test_a_metric_that_is_no_number() -> None:
    local: Learner = learner("plain", "pred", scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)
    with pytest.raises(InvalidInput, match="metric is str"):
        local.end_epoch("0.5")
    local.end_epoch(torch.tensor(0.5))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epochs: 1\nepochs: 2\n", "gives epochs twice"),
        ("batch-size: 8\nbatch_size: 16\n", "gives batch_size twice"),
        ("import: my_loss.py\n", "on the command line alone. Give --import there"),
    ],
)
def test_configuration_files(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    with pytest.raises(InvalidInput, match=said):
        read_config(str(file))


def test_the_command_that_goes_on_imports_what_the_run_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(IMPORTED, "my file.py", "digest")  # other tests have imported files too
    assert command_to_resume("runs/mine").startswith("layerwise train --resume runs/mine --import ")
    assert command_to_resume("runs/mine").endswith("--import 'my file.py'")


@pytest.mark.parametrize(
    ("error", "reason", "first_line", "in_a_sentence"),
    [
        (ValueError("one\n  two"), "one two", "one", "raised ValueError (one two)"),
        (AssertionError(), "AssertionError", "AssertionError", "raised AssertionError"),
        (KeyError("x" * 300), f"'{'x' * 199}", f"'{'x' * 199}", f"raised KeyError ('{'x' * 199})"),
    ],
)
def test_what_an_error_says_is_never_nothing(
    error: Exception, reason: str, first_line: str, in_a_sentence: str
) -> None:
    assert [reason_of(error), first_line_of(error), raised(error)] == [
        reason,
        first_line,
        in_a_sentence,
    ]
    assert last_line_of(error) == (str(error).split() or [first_line])[-1]


def test_an_optimizer_that_fails_without_a_word_is_refused_by_its_error() -> None:
    def wordless(parameters: Any) -> torch.optim.Optimizer:
        raise ValueError

    with pytest.raises(InvalidInput, match=r"raised ValueError at test_misuse.py, line "):
        learner("plain", optimizer=wordless)


def test_a_loss_whose_class_takes_no_site_is_refused_in_words() -> None:
    with pytest.raises(InvalidInput, match=r"making it for unit 0 raised TypeError .*site"):
        layerwise.localize(network("plain"), torch.rand(4, 1, 8, 8), 10, nn.CrossEntropyLoss)
