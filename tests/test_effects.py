"""Options that would change nothing beside others are refused or said."""

import re
from pathlib import Path

import pytest

from layerwise.cli.effects import CONDITIONS, REFUSED
from layerwise.runs.ranges import RANGES, check_ranges
from layerwise.runs.run import Execution, Run
from layerwise.training.declared_options import registries
from layerwise.utils.options import options_of
from tests.hostile import run_program

HERE = ["--data", "cifar10", "--data-dir", "nowhere"]  # ends where data are missing


@pytest.mark.parametrize(
    "words",
    [
        "--no-augment --flip",
        "--no-augment --crop-padding 2",
        "--no-augment --cutout 2",
        "--no-augment --views 2",
        "--momentum 0.8",
        "--momentum 0.9",
        "--optimizer adamw --momentum 0.8",
        "--decay-milestones= --decay-rate 0.1",
        "--rule global --loss pred",
        "--rule global --loss predsim",
        "--rule checkpointed --loss sim",
        "--rule global --beta 0.5",
        "--rule global --beta 0",
        "--momentum 0",
        "--at 1 --decoder-dim 100",
        "--at 1 --loss pred",
        "--rule global --at block",
        "--rule checkpointed --at 3",
        "--rule growing --groups-first 2 --groups-last 2 --growth 0.5",
        "--rule global --loss-from 4=pred",
        "--at 1 --head-lr-factor 2",
        "--rule checkpointed --last-lr-factor 2",
    ],
)
def test_options_of_what_is_trained_are_refused(words: str) -> None:
    code, printed = run_program("train", *HERE, *words.split())
    assert code == 2
    assert (
        re.search(r"Cannot use (--[a-z-]+): it would change nothing, because", printed)[1] in words
    )


@pytest.mark.parametrize(
    ("words", "flag"),
    [
        ("--data digits --data-dir nowhere", "--data-dir"),
        ("--data digits --download", "--download"),
        ("--data digits --workers 1", "--workers"),
        ("--workers 1", "--workers"),
        ("--device cpu --graphs", "--graphs"),
        ("--device cpu --streams 2", "--streams"),
        ("--separability-measures fisher", "--separability-measures"),
        ("--no-sync-batch-norm", "--sync-batch-norm"),
        ("--rule global --output-layer separate", "--output-layer"),
    ],
)
def test_options_of_how_it_is_trained_are_said(words: str, flag: str) -> None:
    given = words.split() if "digits" in words else [*HERE, *words.split()]
    code, printed = run_program("train", "--train-images", "1", *given)  # too few: nothing is made
    assert code == 2
    assert f"{flag} changes nothing here: " in printed


@pytest.mark.parametrize(
    "words",
    [
        "train --optimizer sgd --momentum 0.8",
        "train --flip --cutout 2",
        "train --no-augment --no-flip",
        "train --rule global --lr 0.1",
        "train --at block --output-layer separate --beta 0.5",
        "compare --rules simultaneous global --loss pred --at block",
        "compare --rules global --lr 0.1",
    ],
)
def test_options_that_have_an_effect_are_taken_in_silence(words: str) -> None:
    code, printed = run_program(*words.split(), *HERE)
    assert code == 2
    assert "changes nothing" not in printed
    assert "Cannot find the data set" in printed


def test_a_comparison_of_global_trainings_has_no_local_loss() -> None:
    _, printed = run_program("compare", "--rules", "global", "checkpointed", "--loss", "sim", *HERE)
    assert "Cannot use --loss: it would change nothing" in printed


def test_a_configuration_file_may_serve_several_commands(tmp_path: Path) -> None:
    (tmp_path / "all.yaml").write_text("loss: pred\nmomentum: 0.5\n")
    words = ["--config", str(tmp_path / "all.yaml"), "--rule", "global"]
    _, printed = run_program("train", *HERE, *words)
    assert "--loss changes nothing here: " in printed
    assert "--momentum changes nothing here: " in printed
    assert "Cannot find the data set" in printed


def test_a_misspelt_measure_is_refused() -> None:
    code, printed = run_program("train", *HERE, "--separability-measures", "fischer")
    assert code == 2
    assert "Did you mean 'fisher'" in printed


@pytest.mark.parametrize(
    ("word", "words"),
    [
        ("--epoch", "Did you mean --epochs?"),
        ("--batchsize=3", "Did you mean --batch-size?"),
        ("--learning_rate", "Did you mean --learning-rate?"),
        ("more", "it takes no further word, but has 'more'"),
        ("--qqq", "needs --import FILE"),
    ],
)
def test_misspelt_options(word: str, words: str) -> None:
    code, printed = run_program("train", "vgg8", word)
    assert code == 2
    assert words in printed


def test_imports_are_not_asked_for_twice(tmp_path: Path) -> None:
    (tmp_path / "empty_plugin.py").write_text("")
    imported = ["--import", str(tmp_path / "empty_plugin.py")]
    _, printed = run_program("train", "vgg8", "--qqq", *imported)
    assert "The imported files declare none of that name" in printed
    _, printed = run_program("train", "vgg8", "--loss", "qqq", *imported)
    assert "The imported files add none of that name" in printed
    assert "--import" not in printed


def test_imported_files_import_their_neighbours(tmp_path: Path) -> None:
    (tmp_path / "neighbouring_plugin.py").write_text("from neighbour_of_plugin import value\n")
    (tmp_path / "neighbour_of_plugin.py").write_text("value = 1\n")
    code, _ = run_program("list", "losses", "--import", str(tmp_path / "neighbouring_plugin.py"))
    assert code is None


def test_an_argument_that_is_not_keyword_only_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import layerwise

    def network(num_classes, in_chans, image_size, depth=3):
        """A network."""

    monkeypatch.setitem(layerwise.MODELS, "positional", network)
    _, printed = run_program("train", *HERE)
    assert "depth of the model 'positional' is not offered as --depth" in printed
    assert "Put a * before it" in printed


def test_every_number_has_a_largest_one() -> None:
    elsewhere = {"dropout", "crop_padding", "cutout"}
    numbers = {
        name
        for kind in (Run, Execution)
        for name, annotation in kind.__annotations__.items()
        if annotation in (int, float, int | None, float | None)
    }
    assert numbers - elsewhere == RANGES.keys()
    check_ranges(Run(), Execution())


def test_conditions_name_options() -> None:
    declared = {name for factory in registries()["rule"].values() for name in options_of(factory)}
    names = {*Run.__annotations__, *Execution.__annotations__, *declared}
    assert {name for condition in CONDITIONS for name in condition.options} <= names
    assert names >= REFUSED
