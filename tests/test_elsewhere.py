"""Networks that are not listed: functions of files and modules, networks of libraries, weights of
plain models.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import layerwise
from layerwise.cli import main
from layerwise.errors import InvalidInput
from layerwise.models import weight_files
from layerwise.runs.command import command
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Run, run_name
from layerwise.utils import plugins

CODE = """
import torch
from torch import nn

def make_model(num_classes=10, in_chans=1):
    layers = nn.Conv2d(in_chans, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU()
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))

def hundred(): return make_model(100)
def features(): return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())
def nothing(): return 3
def fails(): raise ValueError("no\\nway")
def needy(num_classes, depth): return make_model(num_classes)
def sized(img_size, channels):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * img_size ** 2, 10))

class Answer:
    def __init__(self, logits): self.logits = logits

class Objects(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.network = make_model(num_classes)
    def forward(self, x): return Answer(self.network(x))

class Indices(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(64, 10)
    def forward(self, x): return self.embed(x).mean((1, 2, 3))

class Two(nn.Module):
    def forward(self, images, mask): return images

class Twice(nn.Module):
    def forward(self, x): return x.flatten(1)[:, :10], x

made = make_model()
number = 3
"""
TRAINED = (
    *("--loss", "pred", "--at", "block", "--epochs", "1", "--train-images", "40"),
    *("--batch-size", "20", "--device", "cpu"),
)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A user's folder, to work in, with a file of networks; what is imported is forgotten."""
    (tmp_path / "nets_of_mine.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    """Let the next command find files as a new process does."""
    plugins.IMPORTED.clear()
    plugins.MODULES.clear()
    sys.modules.pop("nets_of_mine", None)


def mine(function: str) -> str:
    return f"nets_of_mine.py:{function}"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line of a command that is refused, and leaves nothing on disk."""
    before = sorted(Path().rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        main(arguments)
    assert leaving.value.code == 2
    printed = capsys.readouterr().err
    assert printed.startswith("layerwise: ")
    assert printed.count("\n") == 1
    assert [path for path in sorted(Path().rglob("*")) if "__pycache__" not in str(path)] == before
    return printed


def test_a_function_of_a_file_is_trained_and_used_again(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["train", mine("make_model"), *TRAINED])
    (path,) = here.glob("runs/nets_of_mine.py-make_model-default-digits-simultaneous-pred-*")
    facts = RunFolder(path).facts()
    assert facts["run"]["model"] == mine("make_model")
    assert list(facts["imported"]) == ["nets_of_mine.py"]
    # a run's folder lets no code run: the user names the file again
    forget()
    for words in (["evaluate", str(path)], ["train", "--resume", str(path)]):
        assert "Give --import nets_of_mine.py" in refused(capsys, *words)
    main(["evaluate", str(path), "--import", str(here / "nets_of_mine.py"), "--json"])
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert scores["test_accuracy"] == RunFolder(path).result()["test_accuracy"]
    main(["train", mine("make_model"), *TRAINED, "--resume", "--output", str(path)])
    # and the file as it was
    forget()
    (here / "nets_of_mine.py").write_text(CODE + "\n")
    for words in (
        ["evaluate", str(path), "--import", "nets_of_mine.py"],
        ["train", "--resume", str(path), "--import", "nets_of_mine.py"],
    ):
        assert "nets_of_mine.py was changed since the run began" in refused(capsys, *words)


def test_every_command_takes_one(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["show", mine("Objects"), "--at", "block", "--loss", "pred"],
        ["audit", "nets_of_mine:make_model", "--at", "block", "--loss", "pred"],
        ["profile", mine("make_model"), "--predict", "--rules", "global"],
    ):
        if words[0] == "show":
            (here / "nets_of_mine.py").write_text(CODE.replace("in_chans=1", "in_chans=3"))
        main(words)
    assert "nets_of_mine" in plugins.IMPORTED
    config = here / "options.yaml"
    config.write_text("model: other.py:make\n")
    assert "--import other.py" in refused(capsys, "show", "--config", str(config))


def test_logits_are_found_in_an_object(here: Path) -> None:
    main(["train", mine("Objects"), *TRAINED, "--output", "run"])
    assert RunFolder("run").result()["test_accuracy"] >= 0
    weights = load_file(here / "run" / "model.safetensors")
    assert all(key.startswith("network.") for key in weights)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("nothing", "it made int, not a torch.nn.Module"),
        ("fails", "it raised ValueError (no way)"),
        ("needy", "it needs 'depth'"),
        ("features", "it has no classifier, since its output has shape (4, 6, 6)"),
        ("hundred", "Give --num-classes 10"),
        ("Indices", "for torch.float32 images of shape (1, 8, 8) it raised RuntimeError"),
        ("Two", "its forward takes 2 inputs (images, mask)"),
        ("Twice", "for 2 images it returns tuple"),
        ("make_modell", "Did you mean nets_of_mine.py:make_model?"),
        ("made", "it is Sequential, not a function"),
        ("number", "it is int, not a function"),
    ],
)
def test_what_makes_no_classifying_network_is_refused(
    here: Path, capsys: pytest.CaptureFixture[str], function: str, words: str
) -> None:
    assert words in refused(capsys, "train", mine(function), *TRAINED)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("nowhere.py:make", "there is no such file"),
        ("nets_of_mine.py", "none of its functions"),
        ("nets_of_nobody.part:make", "there is no such module"),
        ("tim:resnet18", "Did you mean timm:"),
        ("hf:", "no config.json"),
        (":", "it is unknown"),
    ],
)
def test_what_is_not_there_is_refused(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    model: str,
    words: str,
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", ModuleType("transformers"))
    assert words in refused(capsys, "train", model, *TRAINED)


@pytest.mark.parametrize("library", ["timm", "torchvision", "hf"])
def test_a_missing_library_names_its_extra(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    library: str,
) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(name=name.partition(".")[0])

    monkeypatch.setattr("layerwise.models.libraries.import_module", missing)
    printed = refused(capsys, "train", f"{library}:resnet18", *TRAINED)
    assert f"pip install 'layerwise[{library}]'" in printed


class PretendedTimm(ModuleType):
    """What this program asks timm for: names, and networks by them. It says nothing of timm's."""

    __version__ = "0"

    def list_models(self) -> list[str]:
        return ["resnet18", "vit"]

    def is_model(self, name: str) -> bool:
        return name.partition(".")[0] in self.list_models()

    def create_model(
        self, name: str, pretrained: bool, num_classes: int, **sizes: int
    ) -> nn.Module:
        if "img_size" in sizes and name != "vit":
            raise TypeError("unexpected keyword argument 'img_size'")
        assert not pretrained
        network = nn.Sequential(nn.Flatten(), nn.Linear(64 * sizes["in_chans"], num_classes))
        return nn.Sequential(nn.Upsample(sizes["img_size"]), *network) if name == "vit" else network


def test_names_of_a_library(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "timm", PretendedTimm("timm"))
    for name in ("timm:resnet18", "timm:resnet18.a1_in1k", "timm:vit"):
        network = layerwise.create_model(name, num_classes=7, in_chans=1, image_size=8)
        assert network(torch.zeros(2, 1, 8, 8)).shape == (2, 7)
    assert "Did you mean timm:resnet18?" in refused(capsys, "train", "timm:resnet19", *TRAINED)
    with pytest.raises(InvalidInput, match="no such option"):
        layerwise.create_model("timm:resnet18", width=0.5)


def test_names_of_folders_and_commands() -> None:
    name = run_name(Run(model="hf:some/folder/resnet-50"))
    assert name.startswith("hf-resnet-50-default-digits-")
    run = Run(model="folder/mine.py:make")
    words = command(run, ["folder/mine.py", "loss.py"])
    assert words == "layerwise train folder/mine.py:make --import loss.py"


@pytest.fixture
def hundred(here: Path) -> dict[str, Tensor]:
    """Weights of the same network for a hundred classes."""
    torch.manual_seed(1)
    network = layerwise.create_model(mine("make_model"), None, 1.0, 100, 1, 8)
    return dict(network.state_dict())


def loaded(path: str, **options: Any) -> tuple[dict[str, Tensor], list[str]]:
    said: list[str] = []
    options = {"in_chans": 1, "image_size": 8, "say": said.append, **options}
    network = layerwise.create_model(mine("make_model"), weights=path, **options)
    return dict(network.state_dict()), said


def test_weights_and_a_new_classifier(
    here: Path, hundred: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(hundred, "weights.safetensors")
    begin = ["train", mine("make_model"), *TRAINED, "--weights", "weights.safetensors"]
    printed = refused(capsys, *begin)
    assert "it has of other shape 7.weight (100×4 instead of 10×4), 7.bias" in printed
    assert "--num-classes" in printed
    assert "there are 10 classes" in refused(capsys, *begin, "--num-classes", "7")
    begin += ["--num-classes", "10", "--lr", "1e-30", "--output", "run"]
    main(begin)
    printed = capsys.readouterr().out
    assert "classifier: 7.bias, 7.weight; drawn anew" in printed
    trained = load_file("run/model.safetensors")
    assert torch.equal(trained["0.weight"], hundred["0.weight"])
    assert trained["7.weight"].shape == (10, 4)
    # stopped before its first saved state, it begins with them again
    Path("stopped").mkdir()
    shutil.copy("run/run.json", "stopped/run.json")
    main(["train", "--resume", "stopped"])
    assert torch.equal(load_file("stopped/model.safetensors")["0.weight"], hundred["0.weight"])
    # a run that goes on does not need the file, but takes no other one
    Path("weights.safetensors").rename("elsewhere")
    main([*begin, "--resume"])
    save_file({**hundred, "7.bias": torch.zeros(100)}, "weights.safetensors")
    assert "weights.safetensors was changed" in refused(capsys, *begin, "--resume")


def test_a_function_without_num_classes_gets_a_new_classifier(here: Path) -> None:
    said: list[str] = []
    network = layerwise.create_model(
        mine("hundred"), in_chans=1, image_size=8, new_classifier=True, say=said.append
    )
    assert network.get_submodule("7").out_features == 10
    assert said == ["new classifier: 7, 10 classes instead of 100"]
    sized = layerwise.create_model(mine("sized"), in_chans=2, image_size=4)
    assert sized.get_submodule("1").in_features == 32


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize(
    ("wrap", "lines"),
    [
        (lambda state: state, 1),
        (partial(prefixed, "module."), 2),
        (partial(prefixed, "module._orig_mod."), 3),
        (lambda state: {"state_dict": state, "epoch": 3}, 1),
    ],
)
def test_forms_of_a_state_dict(
    here: Path, hundred: dict[str, Tensor], wrap: Callable[[dict[str, Tensor]], Any], lines: int
) -> None:
    torch.save(wrap(hundred), "weights.pt")
    state, said = loaded("weights.pt", num_classes=100)
    assert all(torch.equal(state[key], hundred[key]) for key in state)
    assert len(said) == lines


def test_weights_for_colour_in_a_network_for_grey(here: Path, hundred: dict[str, Tensor]) -> None:
    colour = {**hundred, "0.weight": torch.randn(4, 3, 3, 3)}
    save_file(colour, "weights.safetensors")
    state, said = loaded("weights.safetensors", num_classes=100)
    assert torch.equal(state["0.weight"], colour["0.weight"].sum(1, keepdim=True))
    assert "0.weight is summed over red, green and blue" in said[0]


def test_weights_that_do_not_fit(here: Path, hundred: dict[str, Tensor]) -> None:
    strange = {f"other{number}": torch.zeros(1) for number in range(5)}
    del hundred["0.weight"]
    save_file({**hundred, **strange}, "weights.safetensors")
    with pytest.raises(InvalidInput) as refusal:
        loaded("weights.safetensors", num_classes=10, new_classifier=True)
    words = "it lacks 0.weight; it has strange other0, other1, other2 and 2 more."
    assert words in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"", "it is damaged"),
        (b"PK\x03\x04 no archive", "it is damaged"),
        (b"no weights", "it is damaged"),
        (b"\x80\x02\0\0\0\0\0\0{}", "it is damaged"),  # of safetensors, cut short
        (b"\x80\x02cos\nsystem\n", "it is damaged, or holds more than tensors"),
        ({"a": 3}, "not a table of tensors"),
        ([1, 2], "not a table of tensors"),
        ({"model": SimpleNamespace()}, "holds more than tensors"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, content: Any, words: str) -> None:
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(InvalidInput, match="Cannot load weights") as refusal:
        weight_files.read_weights(path)
    assert words in str(refusal.value)
