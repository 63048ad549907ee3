"""Separability over depth and epochs: of runs, of networks, and while training, which it must not
change.
"""

import csv
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import layerwise
from layerwise.analysis.separability import separability_of_run
from layerwise.cli import main
from layerwise.core.learner import Learner
from layerwise.core.split import split
from layerwise.errors import InvalidInput
from layerwise.measures import MEASURES, Accuracy, heading_of
from layerwise.measures import over_depth as probing
from layerwise.measures.base import percent
from layerwise.measures.depths import Depths, depths_of, network_depths, places_of
from layerwise.measures.gains import add_gains, losses_push
from layerwise.measures.over_depth import groups, measure_depths
from layerwise.measures.sample import Sample, sample_images
from layerwise.measures.watch import Watch
from layerwise.rules import RULES
from layerwise.runs.folder import SEPARABILITY, STATE, WEIGHTS, RunFolder
from layerwise.runs.headings import HEADINGS
from layerwise.runs.run import Execution, Run
from layerwise.training import loop as train_module
from layerwise.training.evaluate import unit_scores
from layerwise.training.loop import Interrupted, train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress
from tests.helpers import CLASSES, digits, learner, network, ticks

SMALL = Run(
    model="resnet18",
    hierarchy="1,1,1,1",
    width=1 / 16,
    batch_size=64,
    train_images=300,
    epochs=3,
    lr=1e-3,
    dropout=0.1,
)
UNITS = 9  # the output layer is joined to the last
WATCHING = Execution(device="cpu", separability_every=2)
COLUMNS = {
    "index",
    "name",
    "depth",
    "resolution",
    "channels",
    "pooled_resolution",
    "features",
    "gain",
    "gain_error",
    "mismatched",
}


def carry_out(run: Run, path: Path, execution: Execution, resume: bool = False) -> RunFolder:
    folder = RunFolder(path)
    train(prepare(run, execution), folder, resume, Progress())
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A layer-wise and a global run, both measured while they trained."""
    folder = tmp_path_factory.mktemp("runs")
    rules = "simultaneous", "global"
    return {
        rule: carry_out(replace(SMALL, rule=rule), folder / rule, WATCHING).path for rule in rules
    }


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    main(["separability", *arguments, "--device", "cpu", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as leaving:
        main(["separability", *arguments])
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert captured.err.startswith("layerwise: ")
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("rule", ["simultaneous", "global"])
def test_the_command_measures_every_depth(
    rule: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = command(capsys, str(runs[rule]), "--csv", str(tmp_path / "table.csv"))
    rows = result["units"]
    assert (result["epoch"], result["split"], result["images"], result["pooled_to"]) == (
        3,
        "test",
        360,
        1024,
    )
    assert [row["name"] for row in rows[:2]] == ["input", "stem.conv"]
    assert [row["index"] for row in rows] == list(range(-1, UNITS))
    for row in rows:
        assert set(row) >= COLUMNS | set(MEASURES)
        assert all(math.isfinite(row[name]) for name in MEASURES)
    assert rows[1]["gain"] == rows[1]["linear_probe"] - rows[0]["linear_probe"]
    local = rule == "simultaneous"
    assert all(("auxiliary_accuracy" in row) == local for row in rows[1:])
    assert all(isinstance(row["mismatched"], bool) == local for row in rows[1:])
    with (tmp_path / "table.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [float(row["fisher"]) for row in table] == [row["fisher"] for row in rows]
    assert table[0]["resolution"] == "8×8"


def test_the_command_prints_a_table(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        [
            "separability",
            str(runs["simultaneous"]),
            "--measures",
            "nearest_class_mean",
            "--split",
            "validation",
        ]
    )
    printed = capsys.readouterr().out
    assert all(
        text in printed
        for text in ("stages.3.0.conv2", "nearest class mean, %", "gain", "at most 1024 numbers")
    )
    assert "fisher" not in printed


def test_runs_are_compared_at_the_same_depth(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    own, other = str(runs["simultaneous"]), str(runs["global"])
    itself = command(capsys, own, "--against", own, "--measures", "nearest_class_mean")["units"]
    assert all(row["cka"] == pytest.approx(1) for row in itself)
    rows = command(capsys, own, "--against", other, "--measures", "nearest_class_mean")["units"]
    assert rows[0]["cka"] == pytest.approx(1)
    assert all(0 <= row["cka"] < 0.9999 for row in rows[1:])


def test_the_heads_accuracy_is_that_of_evaluation() -> None:
    data, local = digits(), learner("resnet18")
    ticks("simultaneous", local, data.train, epochs=1)
    sample = sample_images(data.test, 10_000, CLASSES)
    rows = measure_depths(depths_of(local, "layer"), sample, ["nearest_class_mean"])
    scores = unit_scores(local, data.test, 0, len(local.units) - 1)
    for row, score in zip(rows[1:], scores, strict=True):
        assert row["auxiliary_accuracy"] == pytest.approx(score.accuracy)


def test_features_are_the_units_outputs_pooled_and_memory_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = network("resnet18").eval()
    data = digits()
    sample = sample_images(data.test, 200, CLASSES)
    images = torch.cat(list(sample.batches()))
    chain = split(model, "layer")
    activations: tuple[Any, ...] = (images,)
    depths = depths_of(learner("resnet18", at=1), "layer")
    depths.model.load_state_dict(model.state_dict())
    whole = measure_depths(depths, sample, list(MEASURES), pooled_to=40)
    for row, piece in zip(whole[1:], chain.pieces, strict=True):
        with torch.no_grad():
            activations = piece(*activations)
        features = activations[0]
        if features.dim() == 4:
            features = nn.functional.adaptive_avg_pool2d(features, row["pooled_resolution"])
        assert row["features"] == features.flatten(1).shape[1] <= max(40, row["channels"])
        assert row["effective_rank"] == pytest.approx(
            MEASURES["effective_rank"](features.flatten(1), sample.labels), rel=1e-3
        )
    passes: list[Any] = []
    features_of = probing.features_of

    def counted(*given: Any) -> Any:
        passes.append(given[2])
        return features_of(*given)

    monkeypatch.setattr(probing, "features_of", counted)
    monkeypatch.setattr(probing, "MEMORY", 4 * 200 * 100)
    assert measure_depths(depths, sample, list(MEASURES), pooled_to=40) == whole
    assert len(passes) > 2
    assert all(sum(math.prod(place.pooled) for place in group) <= 100 for group in passes)


def test_resnet50_on_ten_thousand_images_takes_one_pass() -> None:
    model = layerwise.create_model("resnet50")
    images = torch.zeros(2, 3, 32, 32)
    depths = network_depths(model, "layer", images)
    places = places_of(depths, Sample(torch.arange(2), 2, lambda: iter([images])), 1024)
    assert len(places) == 51
    assert len(list(groups(places, 10_000))) == 1


def test_images_are_drawn_evenly_and_alike() -> None:
    sample = sample_images(digits().test, 105, CLASSES)
    assert set(sample.labels.bincount().tolist()) == {10, 11}
    again = sample_images(digits().test, 105, CLASSES)
    assert all(
        torch.equal(one, other)
        for one, other in zip(sample.batches(), again.batches(), strict=True)
    )


@pytest.mark.parametrize("rule", RULES)
def test_measuring_changes_no_bit_of_training(rule: str, tmp_path: Path) -> None:
    run = replace(SMALL, rule=rule, epochs=2, train_images=120)
    plain = carry_out(run, tmp_path / "plain", Execution(device="cpu"))
    watched = carry_out(run, tmp_path / "watched", replace(WATCHING, separability_every=1))
    assert plain.file(WEIGHTS).read_bytes() == watched.file(WEIGHTS).read_bytes()
    assert not plain.file(SEPARABILITY).exists()
    for one, other in zip(plain.log(), watched.log(), strict=True):
        assert one["units"] == other["units"]
    records = watched.log(SEPARABILITY)
    assert [record["epoch"] for record in records] == [record["epoch"] for record in watched.log()]
    for record in records:
        assert set(record) == {"epoch", "split", "pooled_to", "images", "headings", "units"}
        assert (record["units"][0]["index"], record["units"][0]["name"]) == (-1, "input")
        assert "auxiliary_accuracy" not in record["units"][-1]  # it is in the log
        # those behind have not begun
        learned = (record["epoch"] + 1) // 2 if rule == "sequential" else UNITS
        assert len(record["units"]) == 1 + learned


@pytest.mark.parametrize("at", ["layer", 1])
def test_measuring_leaves_weights_modes_and_generators_as_they_were(at: Any) -> None:
    local = learner("resnet18", at=at)
    watch = watch_of(local)
    local.train()
    local.model.stages[0].eval()  # frozen by its owner
    modes = {
        module: module.training
        for unit in local.units
        for part in (unit.piece, unit.loss)
        for module in part.modules()
    }
    modes |= {module: module.training for module in local.model.modules()}
    before, state = (
        {name: value.clone() for name, value in local.model.state_dict().items()},
        torch.get_rng_state(),
    )
    watch.record(1, len(local.units) - 1, [])
    assert all(module.training == mode for module, mode in modes.items())
    assert all(torch.equal(value, before[name]) for name, value in local.model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_a_resumed_run_keeps_one_line_per_epoch(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = RunFolder(runs["simultaneous"])
    assert whole.run() == SMALL
    assert [record["epoch"] for record in whole.log(SEPARABILITY)] == [2, 3]  # and at the end
    folder = RunFolder(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train_module, "save", stop_after(2, train_module.save))
        with pytest.raises(Interrupted):
            carry_out(SMALL, folder.path, WATCHING)
    # measured, but the state is of epoch 1
    assert [record["epoch"] for record in folder.log(SEPARABILITY)] == [2]
    half_trained = separability_of_run(folder, WATCHING, ["fisher"])
    assert (half_trained["epoch"], len(half_trained["units"])) == (1, 1 + UNITS)
    carry_out(SMALL, folder.path, WATCHING, resume=True)
    assert folder.file(SEPARABILITY).read_text() == whole.file(SEPARABILITY).read_text()


def watch_of(local: Learner) -> Watch:
    data = digits()
    assert data.validation is not None
    return Watch(depths_of(local, "layer"), data.validation, "validation", CLASSES)


def stop_after(epoch: int, save: Callable[..., None]) -> Callable[..., None]:
    def saving(*given: Any) -> None:
        if given[-1].epoch >= epoch:
            raise Interrupted("as if killed before the state was saved")
        save(*given)

    return saving


def test_a_python_call_measures_a_network_and_a_run(runs: dict[str, Path]) -> None:
    data = digits()
    images, labels = torch.cat([images for images, _ in data.test.in_order()]), data.test.labels
    local = learner("plain")
    rows = layerwise.separability(local.model, (images, labels), measures=["fisher"])
    assert [row["name"] for row in rows] == ["input", "conv1", "conv2", "out"]
    with_heads = layerwise.separability(
        local, (images, labels), measures=["fisher"], against=local.model
    )
    assert [row["fisher"] for row in with_heads] == [row["fisher"] for row in rows]
    assert all(row["cka"] == pytest.approx(1) for row in with_heads)
    assert "auxiliary_accuracy" in with_heads[1]
    assert (
        len(layerwise.separability(local.model, (images, labels), at=2, measures=["fisher"])) == 3
    )
    of_run = layerwise.separability(runs["global"], measures=["fisher"], images=200, device="cpu")
    assert [row["depth"] for row in of_run] == list(range(1 + UNITS))


def test_a_run_without_its_state_is_measured_by_its_weights(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for rule, path in runs.items():
        copy = tmp_path / rule
        copy.mkdir()
        for file in path.iterdir():
            if file.name != STATE:
                (copy / file.name).write_bytes(file.read_bytes())
        whole, bare = (
            command(capsys, str(folder), "--measures", "fisher")["units"] for folder in (path, copy)
        )
        assert [row["fisher"] for row in bare] == pytest.approx(
            [row["fisher"] for row in whole], rel=1e-3
        )
        assert "auxiliary_accuracy" not in bare[1]


def test_a_unit_that_died_does_not_hide_the_others() -> None:
    local = learner("plain")
    nn.init.zeros_(local.model.conv2.weight)
    nn.init.constant_(local.model.conv2.bias, -1.0)
    record = watch_of(local).record(1, 2, [])
    assert record["units"][2]["linear_probe"] is None
    assert "are the same" in record["units"][2]["refused"]
    assert record["units"][3]["gain"] is None
    assert record["units"][1]["linear_probe"] > 0
    json.dumps(record, allow_nan=False)


def test_mismatched_is_no_gain_under_a_loss_that_pushes() -> None:
    right = [hits(500), hits(600), hits(605), hits(550), hits(550)]
    rows = [{"index": index - 1, "linear_probe": percent(one)} for index, one in enumerate(right)]
    add_gains(rows, "linear_probe", right, {0: True, 1: True, 2: True, 3: False})
    # 5 won and none lost is a gain
    assert [row["mismatched"] for row in rows] == [None, False, False, True, False]
    log = [
        {"units": [{"index": index, "loss": loss} for index, loss in enumerate((2.0, 2.0, -1.0))]},
        {"units": [{"index": 1, "loss": 0.01}, {"index": 2, "loss": -3.0}]},  # such as a likelihood
    ]
    assert losses_push(log) == {0: True, 1: False, 2: True}


def hits(count: int) -> torch.Tensor:
    return torch.arange(1000) < count


def test_a_gain_of_images_won_and_lost_by_chance_is_none() -> None:
    before = hits(500)
    now = torch.roll(hits(500), 100) | hits(10)  # 100 won, 90 lost
    rows: list[dict[str, Any]] = [
        {"index": index - 1, "linear_probe": percent(one)}
        for index, one in enumerate([before, now])
    ]
    add_gains(rows, "linear_probe", [before, now], {0: True})
    assert rows[1]["gain"] == pytest.approx(1.0)
    difference = 100 * (now.double() - before.double())
    assert rows[1]["gain_error"] == pytest.approx(float(difference.std()) / 1000**0.5)
    assert rows[1]["mismatched"] is True


def test_a_measure_that_is_no_accuracy_has_no_error() -> None:
    rows: list[dict[str, Any]] = [
        {"index": index - 1, "fisher": value} for index, value in enumerate([1.0, 1.5, 1.5])
    ]
    add_gains(rows, "fisher", [None] * 3, {0: True, 1: True})
    assert [row["gain_error"] for row in rows] == [None] * 3
    assert [row["mismatched"] for row in rows] == [None, False, True]


def test_what_was_measured_while_training_is_a_table(runs: dict[str, Path]) -> None:
    rows = layerwise.separability_over_epochs(runs["simultaneous"])
    assert [(row["epoch"], row["depth"]) for row in rows] == [
        (epoch, depth) for epoch in (2, 3) for depth in range(1 + UNITS)
    ]
    assert {(row["split"], row["pooled_to"]) for row in rows} == {("validation", 256)}
    assert not any(isinstance(value, dict) for row in rows for value in row.values())
    lines = RunFolder(runs["simultaneous"]).log(SEPARABILITY)
    assert [row["linear_probe"] for row in rows] == [
        unit["linear_probe"] for line in lines for unit in line["units"]
    ]


def test_other_measures_can_be_watched(tmp_path: Path) -> None:
    chosen = replace(WATCHING, separability_every=1, separability_measures="fisher, effective_rank")
    folder = carry_out(replace(SMALL, epochs=1), tmp_path / "run", chosen)
    rows = layerwise.separability_over_epochs(folder.path)
    assert all(row["fisher"] > 0 for row in rows)
    assert not any("linear_probe" in row for row in rows)
    assert rows[1]["gain"] == rows[1]["fisher"] - rows[0]["fisher"]
    with pytest.raises(InvalidInput, match="Did you mean 'fisher'"):  # before anything is trained
        carry_out(SMALL, tmp_path / "other", replace(WATCHING, separability_measures="fischer"))
    assert not (tmp_path / "other").exists()
    unwatched = carry_out(replace(SMALL, epochs=1), tmp_path / "unwatched", Execution(device="cpu"))
    with pytest.raises(InvalidInput, match="was not measured while it trained"):
        layerwise.separability_over_epochs(unwatched.path)


@pytest.mark.parametrize("rule", ["simultaneous", "sequential"])
def test_features_are_compared_with_another_run_while_training(
    rule: str, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = replace(SMALL, rule=rule, epochs=1, dropout=0.2)
    comparing = replace(WATCHING, separability_every=1, separability_against=str(runs["global"]))
    plain = carry_out(run, tmp_path / "plain", Execution(device="cpu"))
    watched = carry_out(run, tmp_path / "watched", comparing)
    # also of dropout's random numbers
    assert plain.file(WEIGHTS).read_bytes() == watched.file(WEIGHTS).read_bytes()
    rows = layerwise.separability_over_epochs(watched.path)
    assert all(
        row["cka"] == pytest.approx(1) if row["index"] < 0 else 0 <= row["cka"] < 0.9999
        for row in rows
    )
    settings = [
        "--against",
        str(runs["global"]),
        "--split",
        "validation",
        "--pooled-to",
        "256",
        "--measures",
        "linear_probe",
    ]
    assert {(line["against"], line["against_epoch"]) for line in watched.log(SEPARABILITY)} == {
        (str(runs["global"]), 3)
    }
    after = command(capsys, str(watched.path), *settings)["units"]
    assert [row["cka"] for row in rows[-len(after) :]] == pytest.approx(
        [row["cka"] for row in after]
    )


def test_what_cannot_be_compared_is_refused_before_training(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    against = str(runs["global"])
    for execution, run, sentence in (
        (replace(WATCHING, separability_against=str(tmp_path / "none")), SMALL, "none"),
        (
            replace(WATCHING, separability_against=against),
            replace(SMALL, hierarchy="1,1,1,2"),
            "have no depths in common",
        ),
        (
            replace(WATCHING, separability_against=against),
            replace(SMALL, image_size=4),
            "other images, of other size",
        ),
        (
            Execution(device="cpu", separability_against=against),
            SMALL,
            "Give both, or leave it out",
        ),
    ):
        with pytest.raises(InvalidInput, match=sentence):
            carry_out(run, tmp_path / "refused", execution)
        assert not (tmp_path / "refused").exists()


def test_headings_are_of_every_measure() -> None:
    own = {name: heading_of(measure) for name, measure in MEASURES.items()}
    assert {**own, "auxiliary_accuracy": "auxiliary accuracy, %", "cka": "CKA"} == HEADINGS
    for name, measure in MEASURES.items():
        assert own[name].endswith("%") == isinstance(measure, Accuracy)


def test_bad_input_is_refused(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = str(runs["simultaneous"])
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "run.json").write_bytes((runs["simultaneous"] / "run.json").read_bytes())
    short, cpu = replace(SMALL, epochs=1, train_images=100), Execution(device="cpu")
    other = carry_out(replace(short, hierarchy="1,1,1,2"), tmp_path / "other", cpu).path
    small = carry_out(replace(short, image_size=4), tmp_path / "small", cpu).path
    open_run = carry_out(replace(short, val_fraction=0.0), tmp_path / "open", cpu).path
    for arguments, sentence in (
        ([str(begun)], "it has no saved state"),
        ([str(tmp_path / "absent")], "it is not a run"),
        ([good, "--measures", "linear_prob"], "Did you mean 'linear_probe'"),
        ([good, "--measures", ""], "Cannot use measure ''"),
        ([good, "--split", "train"], "Cannot use split 'train'"),
        ([good, "--images", "9"], "9 images are fewer than the 10 classes"),
        ([good, "--images", "35"], "Give 4 or more of each class"),
        ([good, "--pooled-to", "0"], "--pooled-to 0: it is too small"),
        ([good, "--csv", str(tmp_path / "absent" / "table.csv")], "a folder that does not exist"),
        ([good, "--against", str(other)], "9 and 11 units"),
        ([good, "--against", str(small)], "other images, of other size"),
        ([str(open_run), "--split", "validation"], "it held no images out"),
    ):
        assert sentence in refusal(capsys, *arguments)
    with pytest.raises(
        InvalidInput, match=r"Cannot use separability_every -1: it is out of range. Give 0 or more"
    ):
        carry_out(SMALL, tmp_path / "negative", replace(WATCHING, separability_every=-1))
    # before anything is trained
    with pytest.raises(InvalidInput, match="Give 4 or more of each class"):
        carry_out(replace(SMALL, val_fraction=0.01), tmp_path / "few", WATCHING)
    assert not (tmp_path / "few").exists()


def test_bad_data_of_a_network_is_refused(runs: dict[str, Path]) -> None:
    model, images = network("plain"), torch.randn(40, 1, 8, 8)
    labels = torch.arange(40) % CLASSES
    for data, sentence in (
        (None, "not a pair of tensors"),
        ((images, labels[:-1]), "one integer per image"),
        ((images, labels.float()), "one integer per image"),
        ((images, labels % 2 * 2), "no image is of class 1"),
        ((images[:5], torch.tensor([0, 1, 2, 3, 9])), "5 images are fewer than the 10 classes"),
        ((torch.ones_like(images), labels), "features of all 40 images are the same"),
    ):
        with pytest.raises(InvalidInput, match=sentence):
            layerwise.separability(model, data)
    with pytest.raises(InvalidInput, match="no measure is given"):
        layerwise.separability(model, (images, labels), measures=[])
    with pytest.raises(InvalidInput, match="compared with a network"):
        layerwise.separability(model, (images, labels), against=str(runs["global"]))
    with pytest.raises(InvalidInput, match="Leave out data="):
        layerwise.separability(runs["global"], (images, labels))


class FromBytes(torch.nn.Module):
    """A network that takes images as they are stored."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = torch.nn.Conv2d(3, 4, 3, stride=4), torch.nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        features = self.conv(x.float() / 255).relu()
        result: torch.Tensor = self.out(features.mean((2, 3)))
        return result


def test_images_of_bytes_are_measured() -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=generator)
    rows = layerwise.separability(FromBytes(), (images, torch.arange(40) % 2))
    assert len(rows) > 1


def test_maps_are_pooled_and_vectors_are_not() -> None:
    local = learner("vgg8b")
    depths: Depths = depths_of(local, "layer")
    places = places_of(depths, sample_images(digits().test, 100, CLASSES), 16)
    assert places[0].shape == (1, 8, 8)
    assert places[0].pooled == (1, 4, 4)
    assert places[-1].pooled == (CLASSES,)


def test_the_order_of_images_does_not_matter_to_heads_that_compare_them() -> None:
    """Images sorted by class would let the similarity loss compare a class with itself alone."""
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.rand(600, 1, 8, 8, generator=generator), torch.arange(600) % CLASSES
    local = learner("plain", "sim")
    accuracies = []
    for order in (torch.arange(600), labels.argsort(stable=True)):
        rows = layerwise.separability(
            local, (images[order], labels[order]), measures=["nearest_class_mean"]
        )
        accuracies.append(rows[1]["auxiliary_accuracy"])
    assert accuracies[1] == pytest.approx(accuracies[0], abs=6)


class Named(nn.Module):
    """A network whose logits are one of several outputs, and not called so."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Conv2d(6, 6, 3), nn.ReLU())
        self.head = nn.Linear(6, CLASSES)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        features = self.body(images)
        return {"features": features, "scores": self.head(features.mean((2, 3)))}


def test_a_network_can_be_told_its_logits_and_what_to_keep_whole() -> None:
    data = torch.rand(60, 1, 8, 8), torch.arange(60) % CLASSES
    with pytest.raises(ValueError, match="output="):
        layerwise.separability(Named(), data)
    rows = layerwise.separability(Named(), data, output="scores", measures=["fisher"])
    assert [row["name"] for row in rows] == ["input", "body.0", "body.2", "head"]
    whole = layerwise.separability(
        Named(), data, output="scores", leaves=["body"], measures=["fisher"]
    )
    assert [row["name"] for row in whole] == ["input", "body", "head"]
