"""Adding from outside: a loss, a rule, a measure, a data set and a network, each by the one file of
``examples/adding``, go through the program and through the contract like those that are listed.
"""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import layerwise
from layerwise.cli import main
from layerwise.errors import InvalidInput
from layerwise.utils import plugins
from layerwise.utils.options import options_of
from layerwise.utils.plugins import import_file, import_files
from tests import contract
from tests.contract import random_features
from tests.helpers import network

ADDING = Path(__file__).parents[1] / "examples" / "adding"
FILES = ("loss.py", "rule.py", "measure.py", "data_set.py", "network.py")
REGISTRIES = (
    layerwise.LOSSES,
    layerwise.RULES,
    layerwise.MEASURES,
    layerwise.DATASETS,
    layerwise.MODELS,
    plugins.IMPORTED,
)
OWN = ("loss.py", "measure.py")
BY_LOSS = (
    *("train", "vgg8b", "--data", "digits", "--width", "0.0625", "--loss", "mine"),
    *("--epochs", "2", "--train-images", "200", "--batch-size", "32"),
)
WATCHED = ("--separability-every", "1", "--separability-measures", "mine,nearest_class_mean")
HEADING = "spread of class means, %"  # of the measure
ENVIRONMENT = os.environ | {
    "PYTHONPATH": str(Path(layerwise.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
    "COLUMNS": "240",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder, outside the package, with the five files."""
    place = tmp_path_factory.mktemp("user")
    for name in FILES:
        shutil.copy(ADDING / name, place)
    return place


NO_TERMS = {"transport": 0.0, "own_input": 0.0}  # which any loss can carry


def words(*arguments: str, imports: tuple[str, ...] = FILES) -> list[str]:
    return [*arguments, *(word for name in imports for word in ("--import", name))]


def program(*arguments: str, imports: tuple[str, ...] = FILES) -> list[str]:
    return [sys.executable, "-m", "layerwise", *words(*arguments, imports=imports)]


def ended(folder: Path, *arguments: str, imports: tuple[str, ...] = FILES) -> Any:
    """A program that has ended, in the user's folder."""
    return subprocess.run(
        program(*arguments, imports=imports),
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@contextmanager
def registries_kept() -> Iterator[None]:
    """What is registered and imported in here is forgotten."""
    before = [dict(registry) for registry in REGISTRIES]
    modules, places = set(sys.modules), list(sys.path)
    try:
        yield
    finally:
        for registry, entries in zip(REGISTRIES, before, strict=True):
            registry.clear()
            registry.update(entries)
        for name in {Path(name).stem for name in FILES} & (set(sys.modules) - modules):
            del sys.modules[name]
        sys.path[:] = places


def output(folder: Path, *arguments: str, imports: tuple[str, ...] = FILES) -> str:
    """What a command prints in the user's folder; this process knows nothing of his before."""
    printed = io.StringIO()
    with registries_kept(), pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.chdir(folder)
        patch.setenv("COLUMNS", ENVIRONMENT["COLUMNS"])
        try:
            main(words(*arguments, imports=imports))
        except SystemExit as leaving:  # of --help
            assert not leaving.code  # noqa: PT017
    return printed.getvalue()


def written(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def by_loss(folder: Path) -> Path:
    """A run on digits by the loss alone, watched by the measure."""
    chosen = ("--temperature", "2", "--output", "runs/loss")
    done = ended(folder, *BY_LOSS, *chosen, *WATCHED, imports=OWN)
    assert done.returncode == 0, done.stderr
    return folder / "runs" / "loss"


@pytest.fixture(scope="module")
def by_all(folder: Path) -> Path:
    """A run by all five, stopped after an epoch or more and gone on with."""
    arguments = ("train", "mine", "--channels", "8", "--data", "mine", "--epochs", "20")
    chosen = ("--rule", "mine", "--repeats", "3", "--loss", "mine", "--output", "runs/all")
    run = folder / "runs" / "all"
    given = program(*arguments, *chosen, "--batch-size", "32", *WATCHED)
    training = subprocess.Popen(given, cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL)
    while not (run / "last.pt").exists():
        assert training.poll() is None
        time.sleep(0.01)
    training.send_signal(signal.SIGINT)
    assert training.wait(60) == 130
    assert not (run / "result.json").exists()

    refused = ended(folder, "train", "--resume", "runs/all", imports=())
    assert refused.returncode == 2
    assert refused.stderr.startswith("layerwise: Cannot use model 'mine'")
    assert "give its Python file with --import" in refused.stderr
    assert refused.stderr.count("\n") == 1
    begun = len((run / "log.jsonl").read_text().splitlines())
    output(folder, "train", "--resume", "runs/all")
    assert 1 <= begun < len((run / "log.jsonl").read_text().splitlines()) == 20
    return run


@pytest.mark.parametrize(
    ("kind", "name", "line"),
    [
        (
            "losses",
            "loss.py",
            "Cross-entropy of a linear classifier's logits at a temperature. [--temperature]",
        ),
        (
            "rules",
            "rule.py",
            "Every unit learns from every batch several times in a row. [--repeats]",
        ),
        ("measures", "measure.py", "Variance of the class means as a share of the features'"),
        ("datasets", "data_set.py", "2 classes, grey images of 8 pixels; crops with padding 1"),
        ("models", "network.py", "Two convolutions and a linear layer. [--channels]"),
    ],
)
def test_the_name_is_listed(kind: str, name: str, line: str, folder: Path) -> None:
    rows = output(folder, "list", kind, imports=(name,)).splitlines()
    [mine] = [row for row in rows if row.startswith("mine ")]
    assert mine.split(maxsplit=1)[1].startswith(line)


def test_help_has_the_options_with_their_texts(folder: Path) -> None:
    text = " ".join(output(folder, "train", "--help").split())
    assert "--temperature X mine: what the logits are divided by (default: 1.0)" in text
    assert "--repeats N mine: steps on each batch (default: 2)" in text
    assert "--channels N mine: of each convolution (default: 16)" in text


def test_the_record_has_the_options(by_loss: Path, by_all: Path) -> None:
    record = written(by_loss / "run.json")
    assert record["run"]["loss"] == "mine"
    assert record["run"]["loss_options"] == {"temperature": 2.0}
    assert record["options"]["loss"] == {"temperature": 2.0, **NO_TERMS}
    assert tuple(record["imported"]) == OWN
    record = written(by_all / "run.json")
    assert record["run"]["loss_options"] == {}
    assert record["options"] == {
        "model": {"channels": 8},
        "rule": {"repeats": 3},
        "loss": {"temperature": 1.0, **NO_TERMS},
    }
    result = written(by_all / "result.json")
    assert (result["hierarchy"], result["loss"]) == (None, "mine")


def test_the_option_reaches_the_loss(folder: Path, by_loss: Path) -> None:
    output(folder, *BY_LOSS, "--output", "runs/plain", imports=OWN)
    results = [written(by_loss.with_name(name) / "result.json") for name in ("loss", "plain")]
    assert results[0]["sha256"] != results[1]["sha256"]


def test_the_report_shows_all_of_it(folder: Path, by_loss: Path, by_all: Path) -> None:
    arguments = ("report", "runs/all", "runs/loss", "--csv", "runs.csv")
    text = output(folder, *arguments, imports=())  # it knows no registry
    assert text.startswith("2 runs read, 2 of them finished\n")
    page = (folder / "report.html").read_text()
    assert re.search(r">mine</td><td>mine</td><td>–</td><td>mine</td>", page)  # hierarchy: –
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    every, alone = json.loads(data[1])["runs"]
    assert every["config"] | {"repeats": 3, "channels": 8} == every["config"]
    assert alone["config"] | {"loss": "mine", "temperature": 2.0} == alone["config"]
    assert "--import loss.py --import measure.py" in alone["command"]
    for run in (every, alone):
        first, *others = run["separable"]["measures"].items()
        assert HEADING in dict([first, *others])
        assert any(panel["axis"] == HEADING for panel in run["units"])
    with (folder / "runs-separability.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert all(0 < float(line["mine"]) < 100 for line in lines)
    assert {line["run"] for line in lines} == {"all", "loss"}


def test_every_command_that_reads_a_run_knows_it(folder: Path, by_all: Path) -> None:
    result = written(by_all / "result.json")
    found = json.loads(output(folder, "evaluate", "runs/all", "--json").splitlines()[-1])
    assert found["test_accuracy"] == result["test_accuracy"]
    assert len(found["units"]) == len(result["units"]) == 2

    table = output(folder, "separability", "runs/all", "--measures", "mine", "--csv", "depth.csv")
    assert "spread of class" in table
    with (folder / "depth.csv").open() as file:
        assert [line["name"] for line in csv.DictReader(file)] == ["input", "0", "2..6"]

    Image.fromarray(np.zeros((8, 8), np.uint8)).save(folder / "black.png")
    assert re.match(
        r"black.png: (across|upright) ", output(folder, "predict", "runs/all", "black.png")
    )


def test_every_command_that_makes_a_run_knows_it(folder: Path) -> None:
    chosen = ("mine", "--channels", "4", "--loss", "mine", "--temperature", "2")
    assert re.search(
        r"^ +0 +0 +Conv2d +4×32×32 +Mine ", output(folder, "show", *chosen), re.MULTILINE
    )

    options = ("--image-size", "8", "--rules", "mine", "--batch-size", "16", "--json")
    profiled = json.loads(output(folder, "profile", *chosen, *options).splitlines()[-1])
    needs = profiled["rules"]["mine"]
    assert needs["seconds"] > 0  # measured in a process of its own
    assert needs["predicted_peak_bytes"] == pytest.approx(needs["peak_bytes"], rel=0.15)

    rules = ("--rules", "mine", "global", "--data", "mine", "--epochs", "1", "--output", "compared")
    compared = json.loads(output(folder, "compare", *chosen, *rules, "--json").splitlines()[-1])
    assert compared["rows"][0]["hierarchy"] == "mine"
    assert list(compared["rows"][0]["rules"]) == ["mine", "global"]


@pytest.mark.parametrize(
    ("before", "after", "words"),
    [
        ("temperature", "dropout", "Cannot offer --dropout of the loss 'mine'"),
        ("temperature", "streams", "Cannot offer --streams of the loss 'mine'"),
        ("temperature", "output", "Cannot offer --output of the loss 'mine'"),
        (": float = 1.0", ": float", "Cannot offer the option temperature of"),
        ("import layerwise", "import layer", "it raised ModuleNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_used_is_refused(
    before: str, after: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = folder / f"bad_{len(list(folder.iterdir()))}.py"
    name.write_text((ADDING / "loss.py").read_text().replace(before, after))
    with registries_kept(), pytest.raises(SystemExit) as leaving:
        main(["train", "--import", str(name), "--help"])
    assert leaving.value.code == 2
    assert words in capsys.readouterr().err


def test_a_file_runs_once_by_whichever_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # a process that measures for a later test runs the files that were imported, from elsewhere
    monkeypatch.setattr(plugins, "IMPORTED", dict(plugins.IMPORTED))
    Path("once_by_name.py").write_text("open('runs', 'a').write('x')\n")
    import_files(["once_by_name.py", "./once_by_name.py", str(tmp_path / "once_by_name.py")])
    assert Path("runs").read_text() == "x"


@pytest.mark.parametrize("name", ["copy.py", "torch.py"])
def test_a_file_named_as_a_module_is_refused(name: str, tmp_path: Path) -> None:
    before = sys.modules[name.removesuffix(".py")]
    shutil.copy(ADDING / "loss.py", tmp_path / name)
    with pytest.raises(InvalidInput, match="a module of that name is in use already"):
        import_files([str(tmp_path / name)])
    assert sys.modules[name.removesuffix(".py")] is before


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("depth", 1.0, "Cannot measure 'depth': another column has that name"),
        ("endless", float("inf"), "Cannot use measure 'endless': it gave inf"),
    ],
)
def test_a_measure_that_cannot_be_shown_is_refused(name: str, value: float, words: str) -> None:
    data = random_features(40, 1, 8, 8), torch.arange(40) % 10
    with registries_kept():
        layerwise.MEASURES[name] = lambda features, labels: value
        with pytest.raises(InvalidInput, match=words):
            layerwise.separability(network("plain"), data, measures=[name])


@pytest.mark.parametrize(
    ("declared", "option"),
    [
        ("temperature: float = 1.0", (float, False, 1.0)),
        ("temperature: 'float' = 1.0", (float, False, 1.0)),
        ("temperature: 'int | None' = None", (int, True, None)),
        ("temperature: 'Optional[int]' = None", (int, True, None)),
        ("temperature=1.0", (float, False, 1.0)),
        ("temperature: bool = False", (bool, False, False)),
        ("temperature: list = ()", None),
        ("temperature=None", None),
    ],
)
def test_an_option_is_what_the_signature_says(declared: str, option: Any) -> None:
    names: dict[str, Any] = {}
    exec(f"def factory(site, *, {declared}): ...", names)
    options = options_of(names["factory"])
    found = [(item.kind, item.optional, item.default) for item in options.values()]
    assert found == ([option] if option else [])


# ---- the contract ----


@pytest.fixture(scope="module")
def added(folder: Path) -> Iterator[None]:
    """The five are registered in this process."""
    with registries_kept():
        for name in FILES:
            import_file(folder / name)
        yield


@pytest.mark.usefixtures("added")
class TestContract:
    """What tests/test_contract.py asserts of every entry."""

    @pytest.mark.parametrize("training", [False, True], ids=["evaluating", "training"])
    @pytest.mark.parametrize("at", ["layer", "block", 1, 2])
    def test_network(self, at: Any, training: bool) -> None:
        contract.units_compose_the_network("mine", at, training)

    @pytest.mark.parametrize(
        ("network", "loss"), [("mine", "predsim"), ("vgg8b", "mine"), ("mine", "mine")]
    )
    def test_network_and_loss(self, network: str, loss: str, tmp_path: Path) -> None:
        contract.one_unit_is_global_backpropagation(network, loss)
        contract.cached_features_change_nothing(network, loss, tmp_path)
        contract.no_gradient_crosses_a_border(network, loss)

    def test_loss_by_forced_kernels(self) -> None:
        with contract.forced_kernels() as kernels:
            contract.one_unit_is_global_backpropagation("vgg8b", "mine", kernels)
            contract.no_gradient_crosses_a_border("vgg8b", "mine", kernels)
        assert kernels.entered["normalisation"]
        contract.forced_kernels_give_the_same_gradients("vgg8b", "mine", None, 1e-4)

    @pytest.mark.parametrize(
        ("network", "rule", "loss"),
        [
            *(("mine", rule, "predsim") for rule in layerwise.RULES),
            *(("plain", rule, "mine") for rule in ("simultaneous", "sequential", "parallel")),
            ("resnet18", "mine", "predsim"),
            ("mine", "mine", "mine"),
        ],
    )
    def test_rule(self, network: str, rule: str, loss: str) -> None:
        contract.resumed_is_uninterrupted(network, rule, loss)

    @pytest.mark.parametrize(
        ("rule", "loss"), [("mine", "predsim"), ("simultaneous", "mine"), ("sequential", "mine")]
    )
    def test_rule_and_loss_learn(self, rule: str, loss: str) -> None:
        contract.rule_and_loss_learn(rule, loss)

    def test_measure(self) -> None:
        contract.measure_keeps_its_promises("mine")

    @pytest.mark.parametrize(("features", "labels", "sentence"), contract.UNMEASURABLE)
    def test_measure_refuses(self, features: Tensor, labels: Tensor, sentence: str) -> None:
        contract.measure_refuses("mine", features, labels, sentence)

    def test_data_set(self, tmp_path: Path) -> None:
        contract.entry_of_the_table_is_whole("mine")
        contract.data_set_is_as_its_entry_says("mine", tmp_path)
