"""Published settings: each is a run with the units that its program trains; options override it."""

import json
from dataclasses import replace
from math import cos, pi
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.cli import main, parse
from layerwise.cli.values import collect_both
from layerwise.data import ImageFormat
from layerwise.errors import InvalidInput
from layerwise.experiments.presets import Preset, choose_preset, presets
from layerwise.runs.run import Execution, Run
from layerwise.training.networks import build_network
from layerwise.training.optimizers import OPTIMIZERS
from layerwise.training.prepare import Prepared, prepare
from layerwise.training.schedule import decay

CPU = Execution(device="cpu")
PIXELS = 16
SMALL = ImageFormat(tuple("0123456789"), 1, PIXELS, normalization=((0.5,), (0.25,)))
DIGITS = ["--data", "digits", "--train-images", "40", "--batch-size", "20", "--epochs", "1"]
# a preset of each loss and each cut into many units
BUILT = (
    *("pred-vgg8b", "sim-vgg8b", "predsim-vgg11b", "greedy-sl-resnet32-k16", "infopro-resnet32-k8"),
    *("auglocal-resnet32-k16-d2", "dgl-resnet32-k16", "dgl-resnet50-k4", "sedona-resnet50-k4"),
)


def small(preset: Preset) -> Prepared:
    return prepare(replace(preset.run, width=1 / 16, image_size=PIXELS), CPU)


def run_of(*words: str) -> Run:
    return collect_both(parse(["train", *words]))[0]


def refusal(*words: str) -> str:
    parsed = parse(list(words))
    with pytest.raises(InvalidInput) as refused:
        parsed.run(parsed)
    return str(refused.value)


def test_every_preset_is_a_run_of_its_network() -> None:
    for name, preset in presets().items():
        assert small(preset).run.loss == preset.run.loss, name
        assert preset.model in name
        assert preset.source
        assert preset.error is None or (0 < preset.error < 100 and preset.figure), name


def paths_in_order(network: nn.Module) -> list[str]:
    """Paths of stem and blocks as they follow each other."""
    blocks = [
        f"stages.{n}.{m}" for n, stage in enumerate(network.stages) for m in range(len(stage))
    ]
    return ["stem", *blocks]


def test_residual_presets_cut_behind_as_many_blocks_as_their_program() -> None:
    for name, preset in presets().items():
        if preset.model.startswith("resnet"):
            with torch.device("meta"):
                order = paths_in_order(build_network(small(preset).run, SMALL))
            cuts = preset.run.at.split(",")
            assert [path for path in order if path in cuts] == cuts, name
            assert len(cuts) + 1 == preset.units, name


@pytest.mark.parametrize("name", BUILT)
def test_learner_has_the_units_of_the_program(name: str) -> None:
    preset = presets()[name]
    learner = small(preset).make_learner(SMALL)
    assert len(learner.units) == preset.units
    assert all(any(True for _ in unit.loss.parameters()) for unit in learner.units[:-1])


def test_options_override_a_preset() -> None:
    run = run_of("--preset", "infopro-resnet32-k4", "--epochs", "3", "--task", "1")
    assert (run.model, run.epochs, run.batch_size) == ("resnet32", 3, 1024)
    assert (run.loss_options["reconstruction"], run.loss_options["task"]) == (6.0, 1.0)


def test_another_loss_leaves_the_options_of_the_preset_s() -> None:
    run = run_of("--preset", "infopro-resnet32-k4", "--loss", "pred", "--decoder-dim", "64")
    assert (run.loss, dict(run.loss_options)) == ("pred", {"decoder_dim": 64})


def test_its_network_may_be_named() -> None:
    words = ["--preset", "predsim-vgg8b"]
    assert run_of("vgg8b", *words) == run_of(*words) == presets()["predsim-vgg8b"].run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_record_holds_what_was_published_and_what_was_changed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "greedy-sl-resnet32-k2"
    words = ["--width", "0.125", "--hierarchy", "1,2,1", "--device", "cpu"]
    main(["train", "--preset", name, *DIGITS, *words, "--output", "run"])
    record: dict[str, Any] = json.loads((folder / "run" / "run.json").read_text())
    preset = record["preset"]
    assert (preset["name"], preset["error"], preset["units"]) == (name, 10.30, 2)
    assert len(record["units"]) == 2
    assert "--epochs 1 against 160" in preset["changed"]
    assert not any(change.startswith("--loss ") for change in preset["changed"])
    printed = capsys.readouterr().out
    assert "published test error 10.30 ± 0.20 % of 5 runs (Table 2)" in printed
    assert printed.count("differs: ") == len(preset["differs"])
    assert "--preset" in refusal("train", "--resume", "run", "--preset", name)
    main(["train", "vgg8", *DIGITS, "--width", "0.0625", "--device", "cpu", "--output", "other"])
    assert "preset" not in json.loads((folder / "other" / "run.json").read_text())


def test_presets_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", "presets"])
    assert capsys.readouterr().out.count("\n") == len(presets())


def test_other_networks_and_names_are_refused(folder: Path) -> None:
    name = "infopro-resnet32-k4"
    assert "published for resnet32" in refusal("train", "resnet18", "--preset", name)
    Path("options.yaml").write_text("model: vgg8\n")
    assert "published for resnet32" in refusal("show", "--config", "options.yaml", "--preset", name)
    assert f"Did you mean '{name}'" in refusal("train", "--preset", "infopro-resnet32-4")
    assert "no such module" in refusal("show", "--preset", name, "--hierarchy", "1,1,1")
    assert not list(folder.glob("runs*"))
    assert choose_preset(name, None).units == 4


def test_cosine_is_that_of_the_published_programs() -> None:
    epochs, rise, rate = 160, 10, 0.8
    schedule = decay(Run(decay_milestones="cosine:0.0625"))
    for epoch in range(epochs):  # of theirs, the cosine is one epoch ahead
        risen = min(epoch / rise, 1.0)
        expected = rate * (1 + cos(pi * epoch / epochs)) / 2 * risen + 0.01 * (1 - risen)
        assert rate * schedule(epoch / epochs) == pytest.approx(expected, rel=1e-12)
    assert decay(Run(decay_milestones="cosine"))(0.0) == 1.0


@pytest.mark.parametrize("text", ["cosine:2", "cosine:-0.1", "cosine:half", "cosin"])
def test_schedules_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="shares of training"):
        decay(Run(decay_milestones=text))


def test_decay_rate_has_no_effect_on_a_cosine() -> None:
    words = ["--decay-milestones", "cosine", "--decay-rate", "0.1"]
    assert "would change nothing" in refusal("train", "vgg8", *words)


def test_nesterov_is_pytorch_s() -> None:
    weights = [nn.Parameter(torch.zeros(1))]
    for momentum in (0.9, 0.0):
        optimizer = OPTIMIZERS["nesterov"](Run(momentum=momentum))(weights)
        assert isinstance(optimizer, torch.optim.SGD)
        assert optimizer.defaults["nesterov"] == (momentum > 0)
