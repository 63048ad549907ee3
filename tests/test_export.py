"""Trained networks as files, early exits, and the ensemble of local heads."""

import json
import shutil
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from layerwise.cli import main
from layerwise.core.early_exit import can_end, exit_logits
from layerwise.core.learner import Learner
from layerwise.core.localize import localize
from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES, Evaluated, Pred, Site, Targets
from layerwise.losses.site import classifies
from layerwise.report.page.charts import Names
from layerwise.report.page.embedded import early_exits
from layerwise.runs.folder import RunFolder
from layerwise.runs.records import read_run
from layerwise.runs.run import Execution
from layerwise.training import export_formats
from layerwise.training.export_formats import EXPORT_FORMATS
from layerwise.training.networks import load_network
from layerwise.training.prepare import prepare
from layerwise.training.saved import trained_learner
from tests.helpers import CLASSES, SOME_NETWORKS, learner
from tests.hostile import run_program

NETWORK = "vgg8 --hierarchy 1,1,1,1,1 --width 0.0625 --epochs 1 --train-images 80 --device cpu"
WITHOUT_LOGITS = ("sim", "infopro-contrast", "biological-sim")
needs_onnx = pytest.mark.skipif(
    any(find_spec(package) is None for package in EXPORT_FORMATS["onnx"].packages),
    reason="needs onnx, onnxscript and onnxruntime",
)
FORMATS = [pytest.param(name, marks=[needs_onnx] * (name == "onnx")) for name in EXPORT_FORMATS]


def trained(folder: Path, *words: str) -> Path:
    main(["train", *NETWORK.split(), *words, "--output", str(folder)])
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("export") / "run", "--loss", "predsim")


def network_of(run: Path, part: int | str | None) -> torch.nn.Module:
    """The network of a run, its first units, or its ensemble."""
    folder = RunFolder(run)
    if part is None:
        return load_network(folder, best=False)[0]
    prepared = prepare(folder.run(), Execution(device="cpu"))
    made = trained_learner(folder, prepared, prepared.load_data())
    return made.early_exit(part) if isinstance(part, int) else made.ensemble()


def part_words(part: int | str | None) -> list[str]:
    if part is None:
        return []
    return ["--units", str(part)] if isinstance(part, int) else ["--ensemble"]


def loaded(name: str, file: Path, network: nn.Module) -> Callable[[Tensor], Tensor]:
    """What a stranger loads of a file."""
    if name == "torch-export":
        return torch.export.load(file).module()
    if name == "onnx":
        return export_formats.load_onnx(file, network)
    network.load_state_dict(load_file(file))
    return network


@pytest.mark.parametrize("part", [None, 2, "ensemble"])
@pytest.mark.parametrize("name", FORMATS)
def test_a_file_computes_what_the_network_computes(
    name: str, part: int | str | None, run: Path, tmp_path: Path
) -> None:
    file = tmp_path / "file.pt2"
    words = ["export", str(run), "--format", name, "--output", str(file), "--json"]
    code, printed = run_program(*words, *part_words(part))
    assert code is None, printed
    assert list(tmp_path.iterdir()) == [file]
    result = json.loads(printed.splitlines()[-1])
    assert result["largest_difference"] <= 1e-5
    network = network_of(run, part)
    compute = loaded(name, file, network_of(run, part))
    for count in (1, 2, 5):  # the size of a batch is open
        images = torch.randn(count, 1, 8, 8)
        with torch.no_grad():
            torch.testing.assert_close(compute(images), network(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("units", [None, 2])
def test_weights_have_the_networks_own_names(units: int | None, run: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    words = ["export", str(run), "--format", "safetensors", "--output", str(file)]
    main([*words, *(["--units", str(units)] if units else [])])
    with safe_open(file, "pt") as opened:
        names, facts = set(opened.keys()), json.loads(opened.metadata()["layerwise"])
    own = set(network_of(run, None).state_dict())
    if units is None:
        assert names == own
    else:
        assert {name for name in names if not name.startswith("local_head.")} < own
        heads = names - own
        assert heads == {f"local_head.loss.pred.classifier.{part}" for part in ("weight", "bias")}
    assert (facts["model"], facts["units"], facts["channels"]) == ("vgg8", units, 1)
    assert len(facts["mean"]) == len(facts["std"]) == 1


def test_nothing_is_overwritten(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "nowhere")
    for path in (file, link):
        words = ["export", str(run), "--format", "safetensors", "--output", str(path)]
        code, printed = run_program(*words)
        assert code == 2
        assert "it exists, and nothing is overwritten" in printed
    assert file.read_text() == "precious"
    assert sorted(tmp_path.iterdir()) == [file, link]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--format tflite", "Accepted: safetensors, torch-export, onnx"),
        ("--format safetensors --units 99", "Give a whole number from 1 to"),
        ("--format safetensors --units 0", "Give a whole number from 1 to"),
        ("--format safetensors --units 2 --best", "local heads of the best epoch are not saved"),
        ("--format safetensors --ensemble --best", "Cannot use --ensemble with --best"),
        ("--format safetensors --ensemble --units 2", "Cannot use --units with --ensemble"),
        ("--format safetensors --images 1", "Give 2 or more"),
        ("--format safetensors --output nowhere/file", "a folder that does not exist"),
        ("--format safetensors --output .", "it is a folder"),
        ("", "--format"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(
    words: str, reason: str, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, printed = run_program("export", str(run), *words.split())
    assert code == 2
    assert reason in printed
    assert len(printed.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_runs_that_cannot_be_exported(run: Path, tmp_path: Path) -> None:
    begun, headless = tmp_path / "begun", tmp_path / "headless"
    for copy, lost in ((begun, "result.json"), (headless, "last.pt")):
        shutil.copytree(run, copy)
        (copy / lost).unlink()
    globally = trained(tmp_path / "global", "--rule", "global")
    file = tmp_path / "file"
    for path, words, reason in (
        (begun, [], "it has none yet. Finish it with --resume"),
        (headless, ["--units", "2"], "last.pt, which holds the local heads, has been removed"),
        (globally, ["--units", "1"], "by the rule 'global', and has no local heads"),
        (headless, ["--ensemble"], "Cannot use --ensemble"),
    ):
        code, printed = run_program(
            *("export", str(path), "--format", "safetensors", "--output", str(file), *words)
        )
        assert code == 2
        assert reason in printed
        assert not file.exists()
    for path in (headless, globally):  # the whole network needs no heads
        main(["export", str(path), "--format", "safetensors", "--output", str(file)])
        file.unlink()
    assert "ensemble" not in RunFolder(globally).result()


def test_a_missing_package_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_formats, "find_spec", lambda name: None)
    file = tmp_path / "file"
    code, printed = run_program("export", str(run), "--format", "onnx", "--output", str(file))
    assert code == 2
    assert "pip install 'layerwise[onnx]'" in printed
    assert not file.exists()


@pytest.mark.parametrize("change", [1e-3, float("nan")])
def test_a_file_that_computes_something_else_is_not_left(
    change: float, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = EXPORT_FORMATS["safetensors"]
    wrong = replace(chosen, load=lambda path, network: lambda images: network(images) + change)
    monkeypatch.setitem(EXPORT_FORMATS, "safetensors", wrong)
    file = tmp_path / "file"
    code, printed = run_program(
        "export", str(run), "--format", "safetensors", "--output", str(file)
    )
    assert code == 2
    assert "its outputs differ from the network's by up to" in printed
    assert list(tmp_path.iterdir()) == []


def head_logits(learner: Learner, images: Tensor) -> list[Tensor | None]:
    """The logits of every unit's own head; None where it has none."""
    learner.train(False)
    activations, logits = (images,), list[Tensor | None]()
    with torch.no_grad():
        for unit in learner.units:
            activations = unit.forward(activations)
            able = can_end(learner.units, unit)
            logits.append(exit_logits(learner.units, unit, activations) if able else None)
    return logits


@pytest.mark.parametrize("loss", LOSSES)
def test_logits_are_those_that_a_loss_counts(loss: str) -> None:
    made = learner("resnet18", loss, at="block", output_layer="joined", own_input=0.1)
    images, labels = torch.randn(16, 1, 8, 8), torch.arange(16) % CLASSES
    made.step(images, labels)
    logits = head_logits(made, images)
    able = [index for index, value in enumerate(logits) if value is not None]
    assert able == ([len(logits) - 1] if loss in WITHOUT_LOGITS else [*range(len(logits))])
    activations, targets = (images,), Targets(labels, CLASSES, images)
    with torch.no_grad():
        for unit, value in zip(made.units, logits, strict=True):
            activations, (_, correct) = unit.evaluate(activations, targets)
            if value is not None:
                assert torch.sum(value.argmax(1) == labels) == correct
    ending = made.early_exit(able[0] + 1)
    torch.testing.assert_close(ending(images), logits[able[0]])
    kinds = [name for module in ending.modules() for name in module._modules]
    assert not {"sim", "decoder", "terms"} & set(kinds)  # what only training reads is left out


@pytest.mark.parametrize("loss", WITHOUT_LOGITS)
def test_a_loss_without_logits_ends_no_network(loss: str) -> None:
    made = learner("resnet18", loss, at="block", output_layer="joined")
    with pytest.raises(InvalidInput, match=rf"has no logits.* give one of {len(made.units)},"):
        made.early_exit(1)


@pytest.mark.parametrize("name", SOME_NETWORKS)
def test_an_early_exit_is_a_network_of_its_own(name: str) -> None:
    made = learner(name, "pred")
    images = torch.randn(4, 1, 8, 8)
    logits = head_logits(made, images)
    for count in sorted({1, len(made.units) // 2 or 1, len(made.units)}):
        ending = made.early_exit(count)
        assert not ending.training
        torch.testing.assert_close(ending(images), logits[count - 1])
    torch.testing.assert_close(ending(images), made.model(images))
    before = ending(images)
    made.train(True)
    made.step(images, torch.arange(4))
    torch.testing.assert_close(ending(images), before)  # it learns no more


@pytest.mark.parametrize("name", SOME_NETWORKS)
def test_the_ensemble_is_a_network_of_its_own(name: str) -> None:
    made = learner(name, "pred")
    images = torch.randn(4, 1, 8, 8)
    whole = made.ensemble()
    assert not whole.training
    probabilities = [logits.softmax(1) for logits in head_logits(made, images)]
    torch.testing.assert_close(whole(images).exp(), torch.stack(probabilities).mean(0))
    names = set(whole.state_dict()) - set(made.model.state_dict())
    assert {name.partition(".")[0] for name in names} == {"local_heads"}


def test_an_ensemble_leaves_out_units_that_do_not_classify() -> None:
    made = learner("plain", {0: "sim", 1: "pred"})
    images = torch.randn(4, 1, 8, 8)
    units = made.units
    expected = torch.stack(
        [made.early_exit(count)(images).softmax(1) for count in range(2, len(units) + 1)]
    ).mean(0)
    torch.testing.assert_close(made.ensemble()(images).exp(), expected)
    with pytest.raises(InvalidInput, match="no unit but the last classifies"):
        learner("plain", "sim").ensemble()


@pytest.mark.parametrize("units", [0, 3.0, True, "2", 99])
def test_a_number_of_units_is_checked(units: object) -> None:
    made = learner("plain", "pred")
    with pytest.raises(InvalidInput, match="Give a whole number from 1 to 3"):
        made.early_exit(units)


class Smoothed(nn.Module):
    """A loss of the network's output that has no method for logits, which it is given."""

    def forward(self, logits: Tensor, targets: Targets) -> Evaluated:
        loss = nn.functional.cross_entropy(logits, targets.labels, label_smoothing=0.1)
        return Evaluated(loss, torch.sum(logits.argmax(1) == targets.labels))


class WithOutput(Pred):
    """A classifier's loss with an output of its own."""

    @staticmethod
    def output(site: Site) -> nn.Module:
        return Smoothed()


def test_the_networks_own_output_needs_no_head() -> None:
    made = learner("plain", WithOutput)
    images = torch.randn(2, 1, 8, 8)
    whole = made.early_exit(len(made.units))
    torch.testing.assert_close(whole(images), made.model.eval()(images))
    assert whole.state_dict().keys() == made.model.state_dict().keys()


def test_a_networks_own_names_are_not_taken() -> None:
    layers = {"local_head": nn.Conv2d(1, 4, 3), "end": nn.Flatten(), "out": nn.Linear(144, CLASSES)}
    sample = torch.randn(2, 1, 8, 8)
    made = localize(nn.Sequential(OrderedDict(layers)), sample, CLASSES, output_layer="separate")
    ending = made.early_exit(1)
    torch.testing.assert_close(ending(sample), head_logits(made, sample)[0])
    names = {name.partition(".")[0] for name in ending.state_dict()}
    assert names == {"local_head", "local_head_"}


class Named(nn.Module):
    """A loss of a user's own, in which logits is something else."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.logits = nn.Linear(3, site.num_classes)

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        logits = self.logits(features.flatten(1))
        loss = nn.functional.cross_entropy(logits, targets.labels)
        return Evaluated(loss, torch.sum(logits.argmax(1) == targets.labels))


class Wrong(Named):
    """A loss whose method gives no logits."""

    def __init__(self, site: Site) -> None:
        nn.Module.__init__(self)
        self.head = nn.Linear(site.shape[0], 3)

    def logits(self, features: Tensor) -> Tensor:
        return self.head(features.mean((2, 3)))

    def forward(self, features: Tensor, targets: Targets) -> Evaluated:
        return Evaluated(self.logits(features).square().mean(), torch.tensor(0))


def test_a_loss_of_ones_own() -> None:
    assert not classifies(Named(Site(0, 2, (3,), CLASSES)))
    with pytest.raises(InvalidInput, match=r"they have shape \(2, 3\), not \(B, 10\)"):
        learner("plain", Wrong)


def test_the_result_has_every_exit_and_the_ensemble(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(run)
    result = folder.result()
    exits, ensemble = result["exits"], result["ensemble"]
    assert [row["name"] for row in exits] == folder.facts()["units"]
    assert exits[-1]["test_accuracy"] == pytest.approx(result["test_accuracy"], abs=0.3)
    main(["evaluate", str(run), "--device", "cpu", "--json"])
    evaluated = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (evaluated["exits"], evaluated["ensemble"]) == (exits, ensemble)
    for unit, row in zip(evaluated["units"], exits, strict=True):
        assert unit["accuracy"] == pytest.approx(row["test_accuracy"])
    data = prepare(folder.run(), Execution(device="cpu")).load_data()
    votes, networks = torch.zeros(len(data.test.labels), CLASSES), []
    images = torch.cat([images for images, _ in data.test.in_order()])
    with torch.no_grad():
        for number in range(1, len(exits) + 1):
            networks.append(network_of(run, number))
            votes += networks[-1](images).softmax(1)
    share = 100 * (votes.argmax(1) == data.test.labels).double().mean().item()
    assert ensemble["test_accuracy"] == pytest.approx(share, abs=0.3)
    for network, row in zip(networks, exits, strict=True):
        with FlopCounterMode(display=False) as counter:
            network(images[:1])
        assert row["multiply_adds"] == counter.get_total_flops() // 2
    assert ensemble["multiply_adds"] > exits[-1]["multiply_adds"]


def test_the_head_best_on_validation_is_named_and_written(run: Path, tmp_path: Path) -> None:
    folder = RunFolder(run)
    result = folder.result()
    data = prepare(folder.run(), Execution(device="cpu")).load_data()
    images, labels = map(torch.cat, zip(*data.validation.in_order(), strict=True))
    for row in result["exits"]:
        with torch.no_grad():
            right = network_of(run, row["index"] + 1)(images).argmax(1) == labels
        share = 100 * right.double().mean().item()
        assert row["val_accuracy"] == pytest.approx(share, abs=100 / len(labels))
    best = max(row["val_accuracy"] for row in result["exits"])
    first = next(row for row in result["exits"] if row["val_accuracy"] == best)
    assert result["best_exit"] == first
    file = tmp_path / "file"
    words = ["export", str(run), "--format", "safetensors", "--units", "best", "--json"]
    code, printed = run_program(*words, "--output", str(file))
    assert code is None, printed
    assert json.loads(printed.splitlines()[-1])["units"] == first["index"] + 1


def test_no_head_is_best_without_validation_images(run: Path, tmp_path: Path) -> None:
    without = trained(tmp_path / "run", "--loss", "pred", "--val-fraction", "0")
    result = RunFolder(without).result()
    assert "best_exit" not in result
    assert not any("val_accuracy" in row for row in result["exits"])
    words = ["export", str(without), "--format", "safetensors", "--output", str(tmp_path / "file")]
    code, printed = run_program(*words, "--units", "best")
    assert code == 2
    assert "Cannot use --units best" in printed
    code, printed = run_program(*words, "--units", "worst")
    assert code == 2
    assert not (tmp_path / "file").exists()


def test_the_report_shows_the_exits(run: Path) -> None:
    record, names = read_run(run)[0], Names()
    result, shown = record.result or {}, early_exits(record, names)
    assert shown is not None
    labels = names.listed()[shown["names"]]
    assert labels == (*record.facts["units"], "ensemble of all heads")
    assert shown["multiply_adds"][-1] == result["ensemble"]["multiply_adds"]
    for change in ({"exits": 3}, {"ensemble": None}, {"ensemble": {"test_accuracy": "x"}}):
        assert early_exits(replace(record, result={**result, **change}), names) is None
    odd = {"exits": [7, {"name": "x"}, *result["exits"]]}
    assert early_exits(replace(record, result={**result, **odd}), names) == shown


NETWORKS = """
import torch
from torch import nn
class Net(nn.Module):
    def __init__(self, num_classes, in_chans):
        super().__init__()
        self.a, self.b = nn.Conv2d(in_chans, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.c = self.b
        self.out = nn.Linear(4, num_classes)
    def forward(self, x):
        features = self.c(self.b(self.a(x).relu()).relu()).mean((2, 3))
        return {"logits": self.out(features), "features": features}
def net(num_classes, in_chans, image_size):
    return Net(num_classes, in_chans)
"""


@pytest.mark.parametrize("name", FORMATS)
def test_a_module_registered_twice_and_more_than_logits(name: str, tmp_path: Path) -> None:
    source, file = tmp_path / "own.py", tmp_path / "file"
    source.write_text(NETWORKS)
    run = tmp_path / "run"
    tiny = "--rule global --train-images 40 --batch-size 20 --epochs 1 --device cpu"
    main(["train", f"{source}:net", *tiny.split(), "--output", str(run)])
    main(["export", str(run), "--format", name, "--output", str(file)])
    weights = load_file(run / "model.safetensors")
    assert torch.equal(weights["b.weight"], weights["c.weight"])
    assert file.stat().st_size > 0


def test_units_whose_loss_is_compiled_end_networks() -> None:
    local = learner("plain", "pred", output_layer="separate")
    compiled: Any = torch.compile(local.units[0].loss)
    local.units[0].loss = compiled
    assert local.early_exit(1)(torch.rand(2, 1, 8, 8)).shape == (2, CLASSES)
