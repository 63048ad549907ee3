"""What is printed: on any terminal, into closed or full files, and never what would steer one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from layerwise.cli import main
from layerwise.utils.printable import printable
from layerwise.utils.terminal import visible
from tests.hostile import run_program

PROGRAM = [sys.executable, "-m", "layerwise"]
EVIL = "\x1b]0;owned\x07\x1b[2Jcat\u202e\r\x9b1m"


@pytest.mark.parametrize(
    ("redirected", "code", "words"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, "simultaneous"),
        (">&- 2>&-", 0, ""),
        ("<&-", 0, "simultaneous"),
        (">/dev/full", 2, "Cannot write to standard output: No space left on device"),
        ("2>/dev/full", 0, "simultaneous"),
        ("| head -c 1", 0, "s"),
    ],
)
def test_closed_and_full_streams(redirected: str, code: int, words: str) -> None:
    command = f"{sys.executable} -m layerwise list rules {redirected}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception" not in done.stderr


@pytest.mark.parametrize("redirected", ["2>&-", "2>/dev/full"])
def test_a_refusal_that_nobody_can_read_still_has_its_code(redirected: str) -> None:
    command = f"{sys.executable} -m layerwise list nothing {redirected}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


LISTED, REFUSED = (["list", "losses"], 0), (["train", "résnet18"], 2)


@pytest.mark.parametrize(
    ("settings", "command"),
    [
        ({"PYTHONIOENCODING": "ascii"}, LISTED),
        ({"PYTHONIOENCODING": "ascii"}, REFUSED),
        ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, REFUSED),
        ({"PYTHONIOENCODING": "latin-1"}, LISTED),
    ],
)
def test_terminals_without_the_characters(
    settings: dict[str, str], command: tuple[list[str], int]
) -> None:
    words, code = command
    done = subprocess.run(
        [*PROGRAM, *words], capture_output=True, env=os.environ | settings, timeout=60
    )
    assert done.returncode == code
    assert b"Traceback" not in done.stderr
    assert b"\\" in done.stdout + done.stderr or "latin" in str(settings)


def test_half_a_character_can_be_printed() -> None:
    assert printable("a\ud800b\udce9") == r"a\ud800b\xe9"
    assert printable("Ärger") == "Ärger"


def test_visible_text_steers_nothing() -> None:
    text = visible(EVIL)
    assert text.isprintable()
    assert "cat" in text
    assert visible("Ärger\t2×2\n") == "Ärger\t2×2\n"
    assert visible("日本　語\xa0x") == "日本　語\xa0x"


@pytest.fixture(scope="module")
def evil_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose class names hold escapes, in a folder whose name does."""
    folder = tmp_path_factory.mktemp("evil")
    names = [f"{EVIL}{number}" for number in range(3)]
    (folder / "evil_data.py").write_text(
        "import numpy as np\nimport layerwise\n"
        "def read(folder):\n"
        "    labels = np.arange(60) % 3\n"
        "    images = np.random.default_rng(0).integers(0, 256, (60, 1, 8, 8), dtype=np.uint8)\n"
        "    return layerwise.Arrays(images, labels)\n"
        f"names = {names!r}\n"
        "layerwise.DATASETS['evil'] = layerwise.DataSet(\n"
        "    read, layerwise.ImageFormat(tuple(names), channels=1, image_size=8))\n"
    )
    run = folder / f"run{EVIL.replace('/', '')}"
    words = "vgg8 --hierarchy 1,1,1,1,1 --width 0.0625 --epochs 1 --data evil --device cpu"
    main(["train", *words.split(), "--import", str(folder / "evil_data.py"), "--output", str(run)])
    return run


@pytest.mark.parametrize("command", ["predict", "evaluate", "separability", "report", "train"])
def test_names_of_others_are_never_printed_raw(command: str, evil_run: Path) -> None:
    from PIL import Image

    imported = ["--import", str(evil_run.parent / "evil_data.py")]
    picture = evil_run.parent / "picture.png"
    Image.new("L", (8, 8)).save(picture)
    page = evil_run.parent / "page.html"
    words = {
        "predict": [str(evil_run), str(picture)],
        "evaluate": [str(evil_run), "--device", "cpu"],
        "separability": [str(evil_run), "--device", "cpu", "--measures", "fisher"],
        "report": [str(evil_run.parent), "--output", str(page)],
        "train": ["--resume", str(evil_run)],
    }[command]
    code, printed = run_program(command, *words, *imported)
    assert code in (None, 0), printed
    assert not set(printed) & set("\x1b\x07\x9b\u202e\r"), printed
    if command == "predict":
        assert "cat" in printed


def test_errors_of_imported_files_are_never_printed_raw(tmp_path: Path) -> None:
    (tmp_path / "raises.py").write_text(f"raise ValueError({EVIL!r})")
    code, printed = run_program("list", "losses", "--import", str(tmp_path / "raises.py"))
    assert code == 2
    assert "cat" in printed
    assert not set(printed) & set("\x1b\x07\x9b\u202e\r")


def test_json_holds_names_as_they_are(evil_run: Path) -> None:
    """Escaped as JSON escapes them, so that a program reads what was written."""
    page = str(evil_run.parent / "page.html")
    code, printed = run_program("report", str(evil_run), "--output", page, "--json")
    assert code is None
    assert json.loads(printed.splitlines()[-1])["runs"] == 1
    assert not set(printed) & set("\x1b\x07\x9b\u202e\r")
