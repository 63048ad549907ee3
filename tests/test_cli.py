"""The command line: what it prints, and how it refuses."""

import json
import shutil
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from layerwise.cli import COMMANDS, evaluate, main, parse, profile
from layerwise.cli.options import by_option
from layerwise.cli.train import command_to_resume
from layerwise.cli.values import collect_both, images_of
from layerwise.losses import LOSSES
from layerwise.measures import MEASURES
from layerwise.models import list_models
from layerwise.rules import RULES
from layerwise.runs.digests import resuming
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run, described
from layerwise.training.declared_options import registries
from layerwise.utils.options import Options
from layerwise.utils.terminal import warning_text

SMALL = [
    "--hierarchy",
    "1,1,1,1",
    "--width",
    "0.0625",
    "--train-images",
    "60",
    "--batch-size",
    "16",
    "--epochs",
    "1",
    "--device",
    "cpu",
]
CACHE = "--rule sequential --cache --views 1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "run"
    main(["train", "resnet18", *SMALL, "--output", str(path)])
    return path


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run a command that must be refused: exit code 2, one sentence or paragraph on stderr, nothing
    of a traceback.
    """
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    captured = capsys.readouterr()
    assert leaving.value.code == 2
    assert captured.err.startswith("layerwise: ")
    assert captured.err.count("\n") == 1
    assert "Traceback" not in captured.err
    return captured.err


def last_json(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert isinstance(result, dict)
    return result


def test_help_answers_without_torch() -> None:
    began = time.monotonic()
    for program in (["-m", "layerwise"], ["-c", "from layerwise.cli import main; main()"]):
        code = [sys.executable, "-X", "importtime", *program, "--help"]
        output = subprocess.run(code, capture_output=True, text=True, check=True)
        assert "train a network by local losses" in output.stdout
        imported = {line.rsplit("|", 1)[-1].strip() for line in output.stderr.splitlines()}
        assert not {"torch", "numpy", "sklearn", "rich"} & imported
    assert time.monotonic() - began < 20  # hangs only; speed is measured elsewhere


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_train_prints_units_and_one_json_object(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "resnet18", *SMALL, "--output", str(tmp_path / "run"), "--json"])
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    keys = {
        "run",
        "model",
        "hierarchy",
        "rule",
        "loss",
        "epochs",
        "test_accuracy",
        "val_accuracy",
        "seconds",
    }
    assert keys | {"images_per_second", "peak_memory_bytes", "units"} <= set(result)
    assert {"name", "loss", "accuracy"} <= set(result["units"][0])
    assert sum("stages.0.0.conv1" in line for line in lines[:-1]) == 1


def test_a_default_that_is_spelled_out_makes_no_other_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["train", "resnet18", *SMALL])
    main(["train", "resnet18", *SMALL, "--beta", "0.99", "--resume"])
    [path] = (tmp_path / "runs").iterdir()
    assert RunFolder(path).run().loss_options == {}


def test_resume_by_folder_returns_the_result(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--resume", str(run), "--json"])
    assert last_json(capsys)["run"] == str(run)


def test_a_configuration_file_gives_defaults(
    tmp_path: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(
        "width: 0.0625\nhierarchy: [1, 1, 1, 1]\ntrain-images: 60\nbatch_size: 16\nepochs: "
        "3\nlr: 5e-4\ndevice: cpu\n"
    )
    main(
        [
            "train",
            "resnet18",
            "--config",
            str(config),
            "--epochs",
            "1",
            "--output",
            str(tmp_path / "run"),
            "--json",
        ]
    )
    result = last_json(capsys)
    assert result["epochs"] == 1
    main(
        [
            "train",
            "--config",
            str(run / "run.json"),
            "--output",
            str(tmp_path / "again"),
            "--device",
            "cpu",
            "--json",
        ]
    )
    assert last_json(capsys)["sha256"] == result["sha256"]


@pytest.mark.parametrize(
    ("options", "count", "loss"),
    [
        ("", 9, "PredSim"),
        ("--output-layer separate", 10, "PredSim"),
        ("--at 3 --loss sim", 3, "Sim"),
    ],
)
def test_show_lists_the_units(
    options: str, count: int, loss: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["show", "resnet18", *SMALL[:4], "--classes", "7", *options.split()]
    main([*arguments, "--json"])
    printed = capsys.readouterr().out
    units = json.loads(printed.splitlines()[-1])["units"]
    assert [unit["index"] for unit in units] == list(range(count))
    assert {unit["loss"] for unit in units[:-1]} == {loss}
    assert all(unit["name"] in printed for unit in units)


# what a run's configuration file says of images that are read from a folder
RECORDED: dict[str, Any] = {
    "format": 3,
    "run": described(Run("vgg8", model_options=Options(width=0.0625), data="folder")),
    "data": {
        "class_names": ["cat", "dog"],
        "channels": 1,
        "image_size": 24,
        "mean": [9.0],
        "std": [9.0],
    },
}


@pytest.mark.parametrize(
    ("config", "options", "shape", "classes"),
    [
        (None, "", (3, 32, 32), 10),
        (None, "--classes 7 --image-size 16", (3, 16, 16), 7),
        (None, "--data digits", (1, 8, 8), 10),
        (None, "--data digits --image-size 16 --classes 3", (1, 16, 16), 3),
        ({"data": "cifar100", "image_size": 16}, "", (3, 16, 16), 100),
        ({**RECORDED, "data": {}}, "", (3, 64, 64), 10),
        (RECORDED, "", (1, 24, 24), 2),
        (RECORDED, "--image-size 16", (1, 16, 16), 2),
        (RECORDED, "--data cifar100", (3, 32, 32), 100),
    ],
)
def test_images_that_are_supposed_are_those_of_the_run_or_the_data_set(
    config: dict[str, Any] | None,
    options: str,
    shape: tuple[int, ...],
    classes: int,
    tmp_path: Path,
) -> None:
    given = ["show", "vgg8", *options.split()]
    if config is not None:
        (tmp_path / "run.json").write_text(json.dumps(config))
        given += ["--config", str(tmp_path / "run.json")]
    parsed = parse(given)
    images = images_of(parsed, collect_both(parsed)[0])
    assert (images.channels, images.image_size, images.image_size) == shape
    assert images.num_classes == classes


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 10**9},
        {"channels": -3},
        {"image_size": 0},
        {"image_size": True},
        {"class_names": "cat"},
        {"mean": ["x"]},
    ],
)
def test_a_run_whose_data_were_altered_is_refused(
    change: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {**RECORDED["data"], **change}
    (tmp_path / "run.json").write_text(json.dumps({**RECORDED, "data": data}))
    words = refusal(capsys, "show", "--config", str(tmp_path / "run.json"))
    assert "its data section was altered. Restore it, or give --data" in words


def test_images_of_a_preset_are_those_that_it_was_published_for() -> None:
    parsed = parse(["show", "--preset", "pred-vgg8b-cifar100"])
    assert images_of(parsed, collect_both(parsed)[0]).num_classes == 100


def test_commands_that_read_no_data_suppose_those_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.json").write_text(json.dumps(RECORDED))
    config = ["--config", str(tmp_path / "run.json"), "--json"]
    results = {}
    for command in ("show", "audit", "profile --predict --rules global"):
        main([*command.split(), *config])
        printed = capsys.readouterr()
        assert "data changes nothing" not in printed.err
        results[command.split()[0]] = json.loads(printed.out.splitlines()[-1])
    first = results["show"]["units"][0]
    assert first["feature"] == "4×24×24"
    assert first["parameters"] == 4 * 9 + 4 + 2 * 4  # a convolution of one channel, its norm
    assert results["profile"]["image_size"] == 24
    assert results["audit"]["problem"] is None


def test_options_that_a_command_leaves_out_are_options() -> None:
    """A name that was changed elsewhere would leave nothing out."""
    declared = {name for registry in registries().values() for name in by_option(registry)}
    names = {item.name for kind in (Run, Execution) for item in fields(kind)} | declared
    assert names >= evaluate.TRAINING | profile.NOT_PROFILED | profile.NOT_EXECUTED


MINE = """
from layerwise.losses import LOSSES
from layerwise.losses.pred import Pred

class Mine(Pred):
    "Prediction, so many times."

    def __init__(self, site, *, strength: float = 1.0):
        super().__init__(site)
        self.strength = strength

    def forward(self, features, targets):
        result = super().forward(features, targets)
        return result._replace(loss=self.strength * result.loss)

LOSSES["mine"] = Mine
"""


def test_an_imported_file_adds_a_loss_and_its_option(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    imported = ["--import", str(tmp_path / "mine.py")]
    try:
        output = ["--output", str(tmp_path / "run")]
        loss = ["--loss", "mine", "--strength", "0.5"]
        main(["train", "resnet18", *imported, *SMALL, *loss, *output])
        main(["list", "losses", *imported])
        assert "Prediction, so many times. [--strength" in capsys.readouterr().out
    finally:
        LOSSES.pop("mine", None)
    folder = RunFolder(tmp_path / "run")
    assert folder.run().loss_options == {"strength": 0.5}
    assert str(tmp_path / "mine.py") in folder.facts()["imported"]
    (tmp_path / "broken.py").write_text("1 / 0")
    for name, words in (
        (
            "broken.py",
            "it raised ZeroDivisionError (division by zero) at broken.py, line 1. Correct it.",
        ),
        ("none.py", "there is no such file"),
    ):
        assert words in refusal(capsys, "list", "losses", "--import", str(tmp_path / name))


def test_evaluate_repeats_the_results_numbers(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = json.loads((run / "result.json").read_text())
    main(["evaluate", str(run), "--device", "cpu", "--json"])
    evaluated = last_json(capsys)
    assert evaluated["test_accuracy"] == result["test_accuracy"]
    assert evaluated["val_accuracy"] == result["val_accuracy"]
    assert [unit["name"] for unit in evaluated["units"]] == [
        unit["name"] for unit in result["units"]
    ]
    main(["evaluate", str(run), "--best", "--device", "cpu", "--json"])
    assert last_json(capsys)["test_accuracy"] == result["best_test_accuracy"]


def test_predict_names_the_five_likeliest_classes(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("a.png", "b.jpg"):
        Image.new("RGB", (20, 30), (90, 10, 200)).save(tmp_path / name)
    main(["predict", str(run), str(tmp_path / "a.png"), str(tmp_path / "b.jpg"), "--json"])
    predictions = last_json(capsys)["predictions"]
    assert len(predictions) == 2
    for prediction in predictions:
        shares = [entry["percent"] for entry in prediction["classes"]]
        assert len(shares) == 5
        assert shares == sorted(shares, reverse=True)
        assert {entry["class"] for entry in prediction["classes"]} <= set("0123456789")


def test_compare_trains_all_and_skips_what_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*SMALL[2:], "--output", str(tmp_path), "--json", "--seeds", "2"]
    main(["compare", "resnet18", "--hierarchies", "1,1,1,1", "2,1,1,1", *options])
    table = last_json(capsys)
    assert [row["hierarchy"] for row in table["rows"]] == ["[1,1,1,1]", "[2,1,1,1]"]
    assert len(table["runs"]) == 8
    row = table["rows"][0]
    local, globally = row["rules"]["simultaneous"], row["rules"]["global"]
    assert row["gap"]["simultaneous"] == pytest.approx(
        globally["test_accuracy"] - local["test_accuracy"]
    )
    assert local["seeds"] == 2
    assert local["deviation"] is not None
    main(["compare", "resnet18", "--hierarchies", "1,1,1,1", "2,1,1,1", *options])
    output = capsys.readouterr().out
    assert output.count("already finished") == 8
    assert json.loads(output.splitlines()[-1]) == table


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("models", list_models()),
        ("losses", list(LOSSES)),
        ("rules", list(RULES)),
        ("datasets", ["digits"]),
        ("measures", list(MEASURES)),
    ],
)
def test_list(what: str, names: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["list", what, "--json"])
    output = capsys.readouterr().out
    assert set(names) <= set(json.loads(output.splitlines()[-1])[what])
    assert output.count("--own-input") == (what == "losses")  # said once of all


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train resnet81 {small}", "Did you mean 'resnet18'"),
        ("train resnet18 {small} --loss predsin", "Did you mean 'predsim'"),
        ("train resnet18 {small} --rule sequental", "Did you mean 'sequential'"),
        ("train resnet18 {small} --data cifar", "Did you mean 'cifar10'"),
        ("train resnet18 {small} --hierarchy 1,1", "has 2 stages, resnet18 has 4"),
        ("train resnet18 {small} --hierarchy 1,0,1,1", "positive whole numbers"),
        ("train resnet18 {small} --hierarchy 1,-1,1,1", "positive whole numbers"),
        ("train resnet18 {small} --hierarchy one,two", "positive whole numbers"),
        ("train resnet18 {small} --hierarchy 1,1.5,1,1", "positive whole numbers"),
        (
            "train resnet18 {small} --batch-size 1",
            "Cannot use --batch-size 1: it is out of range. Give 2 or more",
        ),
        ("train resnet18 {small} --epochs ten", "invalid int value: 'ten'"),
        ("train resnet18 {small} --loss dgl-cnn --head-layers 2..3", "this option cannot"),
        ("train resnet18 {small} --lr 1..2", "this option cannot; give one number"),
        ("train resnet18 {small} --epoch-count 3", "it has no option"),
        (
            "train resnet18 {small} --device tpu",
            "Cannot use device 'tpu': it is neither a CPU nor a CUDA GPU. Give cpu, cuda",
        ),
        ("train resnet18 {small} --device cuda:99", "Cannot use device 'cuda:99': torch sees"),
        (
            "train resnet18 {small} --config {tmp}/none.yaml",
            "none.yaml: No such file or directory. Give the path of",
        ),
        ("train resnet18 {small} --data mnist --data-dir {tmp}", "--download"),
        ("train --resume {tmp}/none", "is not a run"),
        ("evaluate {tmp}", "is not a run"),
        ("predict {run} {tmp}/none.png", "it does not exist"),
        ("list modles", "Did you mean 'models'"),
        ("compare resnet18 {small2} --hierarchies 1,1,1,1 1,1,1", "has 3 stages"),
        (
            "compare resnet18 {small2} --hierarchies 1,1,1,1 --rules simultaneous glob",
            "Cannot use rule 'glob': it is unknown",
        ),
        ("trian resnet18", "invalid choice: 'trian'"),
        (
            "train resnet18 {small} --seed 99999999999999999999999",
            "Cannot use seed 99999999999999999999999: it is out of range. Give 0 or more",
        ),
        ("train resnet18 {small} --at ²", "Cannot end a unit at '²': resnet18 has no such module"),
        (
            "train resnet18 {small} --no-augment --cutout 2",
            "Cannot use --cutout: it would change nothing, because --no-augment",
        ),
        ("train --resume {run} --lr 0.1", "Cannot change --lr of a run"),
        (
            "compare resnet18 {small2} --rules simultaneous global --cache --views 1",
            "It belongs to sequential. Leave it out.",
        ),
        (
            "train resnet18 {small} --cache-dir .",
            "Cannot use --cache-dir without --cache: there are no features to keep. Give --cache",
        ),
        (
            "train resnet18 {small} --cache-limit 1GB",
            "Cannot use --cache-limit without --cache: there are no features to keep. Give --cache",
        ),
        (
            "train resnet18 {small} --rule sequential --cache",
            "without --views every epoch has new augmentations of each image. Give --views",
        ),
        (
            "train resnet18 {small} --memory-format nhwc",
            "Cannot use memory format 'nhwc': it is unknown",
        ),
        ("train resnet18 {small} --layout nhwc", "Cannot use memory format 'nhwc': it is unknown"),
        (
            "train resnet18 {small} {cache} --cache-dir {tmp}/none",
            "/none': it is not a folder that can be written to. Make it",
        ),
        (
            "train resnet18 {small} {cache} --cache-dir {run}/run.json",
            "is not a folder that can be written to",
        ),
        (
            "train resnet18 {small} {cache} --cache-limit 4",
            "Cannot use --cache-limit '4': it is not a size. Give a number above 0 with",
        ),
        ("train resnet18 {small} {cache} --cache-limit 0GB", "'0GB': it is not a size"),
        ("train resnet18 {small} {cache} --cache-limit=-1GB", "'-1GB': it is not a size"),
        ("train resnet18 {small} {cache} --cache-limit 4GiX", "'4GiX': it is not a size"),
        ("train resnet18 {small} {cache} --cache-limit ²GB", "'²GB': it is not a size"),
        ("", "required: COMMAND"),
        ("--json train resnet18", "--json comes before the command. Put it after the command"),
        ("train resnet18 {small} --output=", "it is empty; name a folder"),
        ("compare resnet18 {small2} --output=", "it is empty; name a folder"),
        ("reproduce 5 --output=", "it is empty; name a folder"),
        ("accelerate resnet18 --output=", "it is empty; name a folder"),
        ("train --resume", "--resume alone names no run"),
        ("train resnet18 {small} --output {run}/run.json/x", "run.json is a file"),
        ("train resnet18 {small} --loss pred --teacher {run}", "no unit's loss compares"),
        ("show resnet18 --at 01 --beta 0.5", "Cannot use --beta: it would change nothing"),
        ("evaluate {run} --replicas 2", "it has no option '--replicas'"),
        ("separability {run} --csv /proc/x.csv", "/proc takes no files"),
        ("report {run} --csv .", "Cannot write --csv .: it is a folder"),
        ("report {run} --output {tmp}/r.html --csv /proc/x.csv", "/proc takes no files"),
        ("report {run} --output {tmp}/r.html --figures {run}/run.json/x", "run.json is a file"),
        ("report {run} --output {tmp}/r.html --latex {run}/run.json/x", "run.json is a file"),
        ("train --resume {run} --separability-every 1", "Measure it with: layerwise separability"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(
    arguments: str,
    words: str,
    run: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if "/proc" in arguments and not Path("/proc").exists():
        pytest.skip("a system without /proc")
    if "cuda" in arguments and torch.cuda.device_count() > 99:
        pytest.skip("a very large machine")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    text = arguments.format(
        small=" ".join(SMALL), small2=" ".join(SMALL[2:]), tmp=tmp_path, run=run, cache=CACHE
    )
    assert words in refusal(capsys, *text.split())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epochs: [1\n", "config.yaml as YAML: "),
        ("- 1\n", "config.yaml: it holds no options"),
        ("epohcs: 3\n", "Did you mean 'epochs'"),
        ("epochs: many\n", "config.yaml: 'many' is not of type int"),
        ("amp: 1\n", "config.yaml: 1 is not of type bool"),
        ('{"epochs": 1, "epochs": 2}', "config.yaml as YAML: it gives epochs twice"),
    ],
)
def test_bad_configuration_files(
    text: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_text(text)
    assert words in refusal(
        capsys,
        "train",
        "--config",
        str(tmp_path / "config.yaml"),
        "--output",
        str(tmp_path / "run"),
    )
    assert not (tmp_path / "run").exists()


def test_options_of_a_finished_run_are_said_to_change_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", "--resume", str(run), "--save-every", "3"])
    assert f"--save-every changes nothing here: {run} is finished" in capsys.readouterr().err


def test_the_command_that_began_a_run_resumes_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    begin = ["train", *SMALL]  # of the default network
    main(begin)
    main([*begin, "--resume"])
    assert "Cannot" not in capsys.readouterr().err


def test_a_rule_in_a_file_that_a_command_does_not_read_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.yaml").write_text("rule: sequential\n")
    with pytest.raises(SystemExit):
        main(["compare", *SMALL[2:], "-c", str(tmp_path / "c.yaml"), "--rules", "none"])
    assert "rule changes nothing here" in capsys.readouterr().err


def test_a_run_of_another_machine_can_be_looked_at(run: Path, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    shutil.copytree(run, copied)
    facts = json.loads((copied / "run.json").read_text())
    facts["execution"] |= {"cpu_threads": 10**6, "separability_measures": "mine", "log": "mine"}
    (copied / "run.json").write_text(json.dumps(facts))
    main(["export", str(copied), "--format", "safetensors", "-o", str(tmp_path / "file")])
    main(["evaluate", str(copied)])


def test_altered_weights_are_refused(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in run.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (copy / "model.safetensors").write_bytes(weights)
    assert "since its SHA-256 differs" in refusal(capsys, "evaluate", str(copy), "--device", "cpu")
    (copy / "result.json").write_text("{")
    assert "Cannot read" in refusal(capsys, "evaluate", str(copy), "--device", "cpu")


def test_a_warning_of_the_program_is_one_line_and_others_name_their_source():
    where = (UserWarning, RunFolder.__init__.__code__.co_filename, 3)
    assert warning_text("Slow.", *where) == "layerwise: Slow.\n"
    assert __file__ in warning_text("Slow.", UserWarning, __file__, 3)


NETWORKS = """
import sys
import torch
from torch import nn

class Small(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))

class Frozen(Small):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)

class Empty(Small):
    def __init__(self):
        super().__init__()
        nn.init.constant_(self[3].weight, float("nan"))

class Ends(Small):
    def forward(self, images):
        sys.exit(0)

class Divides(Small):
    def forward(self, images):
        return super().forward(images) / (len(self) - 4 and 1 or 1 // 0)

def double():
    return Small().double()

def meta():
    with torch.device("meta"):
        return Small()

def fails():
    raise ValueError("a bad thing")
"""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("Frozen", ["none of its weights learns"]),
        ("Empty", ["its weight 3.weight holds numbers that are not finite"]),
        ("Ends", ["raised SystemExit (0)", "faulty_networks.py, line 22"]),
        (
            "Divides",
            ["raised ZeroDivisionError", "faulty_networks.py, line 26", "Correct its forward."],
        ),
        ("double", ["Its weights are torch.float64"]),
        ("meta", ["other than meta"]),
        ("fails", ["raised ValueError (a bad thing) at faulty_networks.py, line 36"]),
        ("", ["faulty_networks.py has no function ''"]),
        ("strange", ["has no function 'strange'. Name one"]),
    ],
)
def test_what_is_wrong_in_code_of_the_users_own_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, name: str, words: list[str]
) -> None:
    (tmp_path / "faulty_networks.py").write_text(NETWORKS)
    run = tmp_path / "run"
    model = f"{tmp_path / 'faulty_networks.py'}:{name}"
    said = refusal(
        capsys, "train", model, "--loss", "pred", "--epochs", "1", "--device", "cpu", "-o", str(run)
    )
    assert all(word in said for word in words), said
    assert not run.exists()


def test_a_command_to_resume_is_one_even_for_a_folder_named_like_an_option(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("layerwise.cli.train.IMPORTED", [])
    for words in (command_to_resume("-out 2"), resuming(Path("-out 2"))):
        assert words == "layerwise train --resume './-out 2'"


def test_resuming_where_nothing_was_begun_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    said = refusal(capsys, "train", "--resume", "--output", str(tmp_path / "mistyped"))
    assert "no run was begun there" in said
    assert not (tmp_path / "mistyped").exists()


def test_a_teacher_of_other_images_is_refused(
    run: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for part in ("a", "b"):
        (tmp_path / "data" / part).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (8, 8), (number, 0, 9)).save(
                tmp_path / "data" / part / f"{number}.png"
            )
    said = refusal(
        capsys,
        *("train", "resnet18", "--width", "0.0625", "--image-size", "8", "--loss", "match"),
        *("--data", "folder", "--data-dir", str(tmp_path / "data"), "--teacher", str(run)),
        *("--device", "cpu", "--output", str(tmp_path / "new")),
    )
    assert "it reads images of 1 channel, and these have 3" in said


@pytest.mark.parametrize("text", ["0.5..", "..0.5"])
def test_half_a_linear_change_is_refused(capsys: pytest.CaptureFixture[str], text: str) -> None:
    said = refusal(capsys, "train", "resnet18", "--loss", "predsim", f"--beta={text}")
    assert "is not a linear change" in said


@pytest.mark.parametrize("command", ["evaluate", "separability", "export", "predict"])
def test_an_empty_name_of_a_run_is_refused(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    more = {"export": ("--format", "safetensors", "out"), "predict": ("image.png",)}
    assert "it is empty" in refusal(capsys, command, "", *more.get(command, ()))
