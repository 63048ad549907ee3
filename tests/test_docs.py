"""Documents: every block of code runs, links and paths lead to files, README stays short.

A page's Python blocks share their names, in order. A block whose first line names a file is
written there, for ``--import``. Commands are parsed, and the cheap ones carried out. A block that
needs what is not here has a comment before it, ``<!-- not run: why -->``.
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import layerwise
from layerwise.cli import COMMANDS, main, parse
from layerwise.cli.values import read_config
from layerwise.utils import plugins

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [page for page in PAGES if page.name != "log.md"]  # it tells what was, not what is
LONGEST = {"lines": 120, "words": 900, "lines of Python": 15}  # of README
RUN = "runs/…"  # stands for a run's folder; here it is one
TINY = ["--width", "0.0625", "--epochs", "1", "--device", "cpu", "--output", RUN]
NOT_RUN = {("library.md", "needs a CUDA device")}
EXCUSE, FENCE = r"(?:<!-- not run: ([^\n]+) -->\n)?", r"^```(\w*)\n(.*?)^```"
BLOCK = re.compile(EXCUSE + FENCE, re.MULTILINE | re.DOTALL)
REGISTRIES: list[dict[str, Any]] = [
    layerwise.LOSSES,
    layerwise.RULES,
    layerwise.MEASURES,
    layerwise.DATASETS,
    layerwise.MODELS,
    plugins.IMPORTED,
]


def short(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    """A block of code; ``excuse`` says why it is not run."""

    excuse: str
    language: str
    code: str

    @property
    def file(self) -> str:
        """The file that it is the text of, or nothing."""
        named = re.match(r"# (\w+\.py)\n", self.code)
        return named[1] if named and self.language == "python" else ""


def blocks(page: Path) -> list[Block]:
    return [Block(*found.groups("")) for found in BLOCK.finditer(page.read_text())]


def commands(code: str) -> Iterator[list[str]]:
    """The words of every command of a shell block, without comments."""
    for line in code.splitlines():
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
            elif words:
                yield words
                words = []


def is_cheap(words: list[str]) -> bool:
    """Whether a command of the program ends within seconds."""
    ends_soon = words[0] in ("list", "show") or "--help" in words
    return ends_soon or (words[0] == "train" and " --epochs 1 " in f" {' '.join(words)} ")


def carry_out(words: list[str]) -> None:
    if "--help" not in words:
        return main(words)
    with pytest.raises(SystemExit) as leaving:
        main(words)
    assert leaving.value.code == 0


def check_command(words: list[str]) -> None:
    program, arguments = words[0], words[1:]
    if program == "layerwise":
        if is_cheap(arguments):
            carry_out(arguments)
        else:
            parse(arguments)
    elif program == "torchrun" and "layerwise" in arguments:  # tests/test_ranks_train.py starts it
        parse(arguments[arguments.index("layerwise") + 1 :])
    elif program == "torchrun":
        assert any((ROOT / word).is_file() for word in arguments), words
    elif program == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(arguments) <= set(targets)
    elif program == "python":
        assert (ROOT / arguments[0]).is_file(), words
    else:
        assert program in ("mkdir", "tar"), words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, and with every file that a page gives in full."""
    path = tmp_path_factory.mktemp("docs")
    for block in (block for page in PAGES for block in blocks(page)):
        if block.file:
            (path / block.file).write_text(block.code)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        main(["train", "vgg8", *TINY])
    return path


@pytest.fixture(autouse=True)
def unchanged() -> Iterator[None]:
    """What pages register and draw is forgotten after them."""
    before = [dict(registry) for registry in REGISTRIES]
    modules = set(sys.modules)
    with torch.random.fork_rng():
        yield
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.mark.parametrize("page", PAGES, ids=short)
def test_code_runs(
    page: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    names: dict[str, Any] = {}
    for block in blocks(page):
        assert block.language in ("python", "sh", "yaml", ""), block.language
        if block.language == "yaml":
            Path("config.yaml").write_text(block.code)
            assert read_config("config.yaml")
        elif block.language == "sh":
            for words in commands(block.code):
                check_command(words)
        elif block.language == "python" and not block.file and not block.excuse:
            exec(compile(block.code, page.name, "exec"), names)
    if page.parent == ROOT:  # its example ends with an accuracy
        accuracies = re.findall(r"^test accuracy ([\d.]+)%", capsys.readouterr().out, re.MULTILINE)
        assert len(accuracies) == 1
        assert float(accuracies[0]) > 80


def test_few_blocks_are_not_run() -> None:
    excused = {(page.name, block.excuse) for page in PAGES for block in blocks(page)}
    assert {(name, excuse) for name, excuse in excused if excuse} == NOT_RUN


@pytest.mark.parametrize("page", [*PAGES, ROOT / "results/README.md"], ids=short)
def test_links_and_paths_lead_to_files(page: Path) -> None:
    text = page.read_text()
    prose = BLOCK.sub("", text)
    linked = [link for link in re.findall(r"\]\(([^)#]+)\)", prose) if "://" not in link]
    assert [link for link in linked if not (page.parent / link).exists()] == []
    paths = set(re.findall(r"`((?:\w+/)+\w+\.py)\b", text))
    roots = ROOT, ROOT / "src/layerwise"
    added = re.compile(r"\w+/mine\.py")  # by the reader
    lost = [path for path in paths if not any((root / path).is_file() for root in roots)]
    assert [path for path in lost if not added.fullmatch(path)] == []


def test_every_page_is_listed() -> None:
    listed = set(re.findall(r"\]\((\w[\w-]*\.md)\)", (ROOT / "docs/README.md").read_text()))
    assert listed >= {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}


def test_every_command_is_told() -> None:
    told = {words[1] for block in blocks(ROOT / "docs/cli.md") for words in commands(block.code)}
    assert told >= COMMANDS.keys()


def test_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text()
    example = next(block.code for block in blocks(ROOT / "README.md") if block.language == "python")
    measured = {
        "lines": len(text.splitlines()),
        "words": len(text.split()),
        "lines of Python": len(example.splitlines()),
    }
    assert {name: n for name, n in measured.items() if n > LONGEST[name]} == {}
