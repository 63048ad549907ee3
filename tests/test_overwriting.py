"""No command writes over a file that it did not make, and each over its own."""

from pathlib import Path

import pytest

from layerwise.cli import main
from tests.hostile import run_program

NETWORK = "vgg8 --hierarchy 1,1,1,1,1 --width 0.0625"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overwriting") / "run"
    words = f"train {NETWORK} --epochs 1 --train-images 40 --val-fraction 0 --device cpu"
    main([*words.split(), "--output", str(folder)])
    return folder


COMMANDS = {
    "separability": ("separability {run} --device cpu --measures fisher --csv {file}", ".csv"),
    "report": ("report {run} --output {file}", ".html"),
    "report, table": ("report {run} --output {folder}/page.html --csv {file}", ".csv"),
    "report, figures": ("report {run} --output {folder}/page.html --figures {folder}", ".svg"),
    "report, LaTeX": ("report {run} --output {folder}/page.html --latex {folder}", ".tex"),
    "profile": (f"profile {NETWORK} --batch-size 2 --rules global --figure {{file}}", ".svg"),
}
OTHERS = [b"", b"precious", b"name,depth\na,1\n", b"<html></html>", b"\0" * 5000]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("content", OTHERS)
def test_files_of_others_stay(command: str, content: bytes, run: Path, tmp_path: Path) -> None:
    words, end = COMMANDS[command]
    name = f"table-1-x{end}" if "LaTeX" in command else f"file{end}"
    file = tmp_path / name
    file.write_bytes(content)
    code, printed = run_program(*words.format(run=run, file=file, folder=tmp_path).split())
    assert code == 2
    assert "it exists and was not written by layerwise" in printed
    assert file.read_bytes() == content
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("command", ["separability", "report", "report, table"])
def test_files_of_their_own_are_replaced(command: str, run: Path, tmp_path: Path) -> None:
    words, end = COMMANDS[command]
    file = tmp_path / f"file{end}"
    arguments = words.format(run=run, file=file, folder=tmp_path).split()
    for _ in range(2):
        code, printed = run_program(*arguments)
        assert code is None, printed
        assert file.stat().st_size


@pytest.mark.parametrize("command", ["separability", "report", "profile"])
def test_links_are_replaced_and_not_written_through(
    command: str, run: Path, tmp_path: Path
) -> None:
    words, end = COMMANDS[command]
    precious, link = tmp_path / "precious", tmp_path / f"file{end}"
    precious.write_text("precious")
    link.symlink_to(precious)
    code, _ = run_program(*words.format(run=run, file=link, folder=tmp_path).split())
    assert code == 2
    assert precious.read_text() == "precious"
