"""Every option of every command, as the parser has them, with values that programs trip on.

More examples: ``pytest --hypothesis-profile faults tests/test_hostile_arguments.py``.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from layerwise.cli import COMMANDS, build_parser, main
from tests.hostile import NUMBERS, TEXTS, assert_refused_or_done

TINY = ["--hierarchy", "1,1,1,1,1", "--width", "0.0625"]
NO_DATA = ["--data", "cifar10", "--data-dir", "nowhere", "--device", "cpu"]
# words of a command with which it does little, or ends where data are missing
BASES = {
    "train": ["vgg8", *TINY, *NO_DATA, "--output", "new"],
    "compare": ["vgg8", "--width", "0.0625", *NO_DATA, "--hierarchies", "1,1,1,1,1"],
    "reproduce": ["1", "--dry-run"],
    "report": ["nowhere"],
    "show": ["vgg8", *TINY],
    "audit": ["vgg8", *TINY, "--rule", "global"],
    "profile": ["vgg8", *TINY, "--predict", "--rules", "global"],
    "evaluate": ["nowhere"],
    "separability": ["nowhere"],
    "export": ["nowhere", "--format", "safetensors"],
    "accelerate": ["vgg8", "--width", "0.0625", "--dry-run"],
    "predict": ["nowhere", "image.png"],
    "list": ["losses"],
}
VALUES = st.one_of(
    st.sampled_from(NUMBERS),
    st.sampled_from(TEXTS),
    st.text(max_size=20),
    st.integers().map(str),
    st.floats().map(str),
)


def options(command: str) -> list[argparse.Action]:
    """The options of a command that take values."""
    subparsers = next(
        action
        for action in build_parser(command)._actions
        if isinstance(action, argparse._SubParsersAction)
    )
    actions: list[argparse.Action] = subparsers.choices[command]._actions
    return [action for action in actions if action.option_strings and action.nargs != 0]


OPTIONS = [
    (command, action.option_strings[-1]) for command in COMMANDS for action in options(command)
]


def test_every_command_has_words_to_be_tried_with() -> None:
    assert BASES.keys() == COMMANDS.keys()


@given(drawn=st.sampled_from(OPTIONS), value=VALUES, joined=st.booleans())
def test_options(drawn: tuple[str, str], value: str, joined: bool, empty_folder: Path) -> None:
    command, flag = drawn
    given_words = [f"{flag}={value}"] if joined else [flag, value]
    assert_refused_or_done(command, *BASES[command], *given_words)


@pytest.mark.parametrize("command", COMMANDS)
@given(words=st.lists(VALUES, min_size=1, max_size=3))  # none: the default network
def test_words(command: str, words: list[str], empty_folder: Path) -> None:
    assert_refused_or_done(command, *words, *BASES[command][1:])


OUT_OF_RANGE = ": it is out of range"
LONG = "digits is too large"


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        ("compare vgg8 --seeds 100000000", "seeds 100000000" + OUT_OF_RANGE),
        ("reproduce 1 --seeds 100000000", "seeds 100000000" + OUT_OF_RANGE),
        ("accelerate vgg8 --seeds 100000000", "--seeds 100000000" + OUT_OF_RANGE),
        ("accelerate vgg16 --budget convolutions=" + "9" * 31, "more than 20,000 hierarchies"),
        ("accelerate vgg8 --budget memory=1e400GB", "it is not a size"),
        ("show vgg8 --hierarchy 1,1,1,1,99999999999", "more than 1000 layers"),
        ("show vgg8 --classes " + "7" * 31, LONG),
        ("show vgg8 --width 100", "its weights alone take 177 GB"),
        ("show vgg8 --width 1e300", "width 1e+300" + OUT_OF_RANGE),
        ("profile vgg8 --batch-size 1" + "0" * 30, LONG),
        ("profile vgg8 --predict --image-size 1000000", "--image-size 1000000" + OUT_OF_RANGE),
        ("train vgg8 --epochs 1e400", "invalid int value: '1e400'"),
        (
            "train vgg8 --rule parallel --micro-batches -1000000000000",
            "micro_batches=-1000000000000 (option of the rule 'parallel')" + OUT_OF_RANGE,
        ),
        ("train vgg8 --rank-timeout 1000000000000", "1000000000000.0" + OUT_OF_RANGE),
        ("train vgg8 --run-ahead 1000000000000", "--run-ahead 1000000000000" + OUT_OF_RANGE),
        (
            "train vgg8 --rule checkpointed --segments 1000000000000",
            "segments=1000000000000 (option of the rule 'checkpointed')" + OUT_OF_RANGE,
        ),
        ("train vgg8 --cpu-threads 1000000000", "--cpu-threads 1000000000: this machine has"),
        ("train vgg8 --workers 1000000000", "workers 1000000000" + OUT_OF_RANGE),
        (
            "train vgg8 --similarity-channels 99999999999",
            "similarity_channels=99999999999 (option of the loss 'predsim')" + OUT_OF_RANGE,
        ),
        ("train vgg8 --beta nan", "beta=nan (option of the loss 'predsim'): it is not finite"),
        ("train vgg8 --lr " + "9" * 320, "lr inf: it is not finite"),
        ("train vgg8 --seed " + "9" * 320, LONG),
        ("train vgg8 --at=--", "--at=-- gives -- as a value"),
        ("separability nowhere --images 1" + "0" * 40, LONG),
    ],
)
def test_numbers_too_large_are_refused(
    words: str, refusal: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words.split())
    assert refusal in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--head-width-factor", "--transport"])
@pytest.mark.parametrize("number", ["nan", "inf"])
def test_options_of_a_loss_are_finite(
    flag: str, number: str, empty_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["train", "vgg8", "--loss", "strided", flag, number])
    assert "it is not finite. Give a number." in capsys.readouterr().err


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from(TEXTS),
)
NESTED = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
)
FIELDS = st.sampled_from(
    [
        "model",
        "hierarchy",
        "width",
        "epochs",
        "lr",
        "loss",
        "beta",
        "rule",
        "data",
        "seed",
        "at",
        "decay-milestones",
        "flip",
        "workers",
        "format",
        "run",
        "separability-measures",
    ]
)
CONFIGURATIONS = st.dictionaries(FIELDS, NESTED, max_size=4)


@given(values=CONFIGURATIONS, as_json=st.booleans())
def test_configuration(values: dict[str, Any], as_json: bool, empty_folder: Path) -> None:
    file = empty_folder / "config.yaml"
    text = json.dumps(values) if as_json else yaml.safe_dump(values, allow_unicode=False)
    file.write_text(text, errors="surrogatepass")
    assert_refused_or_done("train", "--config", str(file), *NO_DATA)


@given(content=st.binary(max_size=200))
def test_configuration_of_any_bytes(content: bytes, empty_folder: Path) -> None:
    file = empty_folder / "config.yaml"
    file.write_bytes(content)
    assert_refused_or_done("train", "--config", str(file), *NO_DATA)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "".join(f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 30)),
        "epochs: " + "9" * 5000,
        "epochs: !!python/object/apply:os.system ['touch x']",
        "epochs: !!int x",
        "? [a]\n: 1",
        "lr: .nan",
        "a: " + "x" * 10**6,
        "- " * 30_000,
    ],
)
def test_configuration_that_is_made_to_grow(text: str, empty_folder: Path) -> None:
    file = empty_folder / "config.yaml"
    file.write_text(text)
    assert_refused_or_done("train", "--config", str(file), *NO_DATA)
    assert not (empty_folder / "x").exists()


@pytest.fixture(scope="module")
def empty_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("empty")
        patch.chdir(folder)
        yield folder
