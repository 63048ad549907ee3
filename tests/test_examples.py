"""Examples: each runs in an empty folder, and prints and writes what it promises.

They run as they are, but that most train for fewer epochs.
"""

import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch.random import fork_rng

import layerwise

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(path.name for path in EXAMPLES.glob("*.py"))
LINES = 40  # of an example at most
CHANCE = 10.0  # percent of digits


def run(*arguments: str, folder: Path) -> str:
    """The output of Python, run as a user would in a folder of its own."""
    environment = os.environ | {
        "PYTHONPATH": str(Path(layerwise.__file__).parents[1]),
        "MPLBACKEND": "Agg",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *arguments]
    ended = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


def percents(output: str) -> list[float]:
    """Numbers followed by a percent sign, in order."""
    return [float(number) for number in re.findall(r"([\d.]+)%", output)]


@pytest.fixture
def output(tmp_path, monkeypatch, capsys):
    """What an example prints in this process, where PyTorch has been imported; shortened."""

    def run_here(name, epochs, fewer):
        text = (EXAMPLES / name).read_text()
        assert text.count(epochs) == 1
        (tmp_path / name).write_text(text.replace(epochs, fewer))
        monkeypatch.chdir(tmp_path)
        with fork_rng():
            runpy.run_path(name, run_name="__main__")
        return capsys.readouterr().out

    return run_here


def test_examples_listed():
    listed = re.findall(r"^\| \[(\w+\.py)\]", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_example_short(name):
    text = (EXAMPLES / name).read_text()
    assert len(text.splitlines()) <= LINES
    assert re.match(r'"""[^"]+ \d+ seconds\.\n', text)


def test_your_own_network(output):
    lines = output("your_own_network.py", "range(10)", "range(4)").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "unit stem.0",
        "unit residual.0..output",
        "network",
    ]
    assert percents(lines[-1])[0] > 80


def test_your_own_loss(output):
    lines = output("your_own_loss.py", "range(8)", "range(2)").splitlines()
    assert [line.split(":")[0] for line in lines] == ["smoothing 0.0", "smoothing 0.3"]
    accuracies = percents("\n".join(lines))
    assert min(accuracies) > 2 * CHANCE
    assert accuracies[0] != accuracies[1]  # the option reached the loss


def test_your_own_loss_on_the_command_line(tmp_path):
    """As the example's docstring says it, of a small network; importing the file trains nothing."""
    file = EXAMPLES / "your_own_loss.py"
    promised = re.search(r"layerwise (train .*)", file.read_text())[1].split()
    assert promised[1:3] == ["--import", file.name]
    promised[2] = str(file)
    small = "--width 0.0625 --hierarchy 1,1,1,1 --train-images 60 --batch-size 20 --epochs 1"
    command = ["-m", "layerwise", *promised, *small.split(), "--device", "cpu", "--output", "run"]
    assert "smoothing 0.3:" not in run(*command, folder=tmp_path)
    run_file = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run_file["run"]["loss"] == "smoothed"
    assert run_file["run"]["loss_options"] == {"smoothing": 0.3}
    assert (tmp_path / "run" / "result.json").exists()


def test_memory_limit(output):
    lines = output("memory_limit.py", "range(12)", "range(7)").splitlines()
    pattern = r"([\w-]+): batches of (\d+), which need ([\d.]+) of ([\d.]+) MB"
    fits = [re.fullmatch(pattern, line).groups() for line in lines[:-1]]
    batches = {rule: int(size) for rule, size, _, _ in fits}
    assert list(batches) == ["global", "checkpointed", "sequential", "simultaneous"]
    assert all(float(need) <= float(limit) for _, _, need, limit in fits)
    assert batches["simultaneous"] > batches["global"]
    assert lines[-1].startswith("trained by simultaneous updates")
    assert percents(lines[-1])[0] > 2 * CHANCE


def test_separability_map(output, tmp_path):
    lines = output("separability_map.py", "EPOCHS = 6", "EPOCHS = 2").splitlines()
    assert [line.split(":")[0] for line in lines[:2]] == ["layer-wise", "global"]
    assert all(50 < percents(line)[0] <= 100 for line in lines[:2])
    assert lines[2] == "written: separability_map.png"
    with Image.open(tmp_path / "separability_map.png") as picture:
        width, height = picture.size
        assert width > 2 * height > 800
        assert len(picture.convert("RGB").getcolors(2**24)) > 100  # a map, not an empty frame


def test_accelerate(output):
    lines = output("accelerate.py", "epochs=4", "epochs=2").splitlines()
    accuracies = {line.split(":")[0]: percents(line)[0] for line in lines}
    assert list(accuracies) == ["base [2, 2, 2, 2]", "accelerated [1, 1, 3, 3]"]
    assert min(accuracies.values()) > 2 * CHANCE


def test_resume(output, tmp_path):
    lines = output("resume.py", "EPOCHS = 4", "EPOCHS = 2").splitlines()
    assert lines == ["saved to state.pt and resumed after 28 of 56 steps", "bit-identical: True"]
    assert (tmp_path / "state.pt").stat().st_size > 10_000


def test_distil(output):
    lines = output("distil.py", '"sequential", 4', '"sequential", 1').splitlines()
    lines = [line for line in lines if not line.startswith("cache")]
    assert [line.split(":")[0] for line in lines] == ["teacher", "student"]
    teacher, student = percents("\n".join(lines))
    assert teacher > 80
    assert student > 2 * CHANCE


def test_repair(output):
    trained, pruned, repaired = percents(output("repair.py", "512, 10", "512, 5"))
    assert trained > 90
    assert pruned < 60
    assert repaired > max(80, pruned)
