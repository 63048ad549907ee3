"""The package as users install it: built, installed into an empty environment and used there.

Nothing is fetched: the environment reads its dependencies from this one.
"""

import csv
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LARGEST = 1_200_000  # bytes of an archive
SMALL = ["--width", "0.0625", "--hierarchy", "1,1,1,1", "--epochs", "1", "--train-images", "100"]
SMALL += ["--device", "cpu", "--output", "runs/run"]


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> dict[str, Path]:
    """A wheel and a source archive of this tree."""
    folder = tmp_path_factory.mktemp("dist")
    call([sys.executable, "-m", "hatchling", "build", "-d", str(folder)], ROOT)
    return {"wheel": next(folder.glob("*.whl")), "source": next(folder.glob("*.tar.gz"))}


@pytest.fixture(scope="module")
def stated() -> str:
    version: str = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    return version


class Environment:
    """An environment that has the dependencies of this one, and not this one's layerwise."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "environment"
        venv.create(self.folder, symlinks=True)
        self.empty = folder / "empty"  # to run in: nothing can be imported from here
        self.empty.mkdir()
        asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(self.call("python", "-c", asked).strip())
        # .pth files in the folder named here, such as that of an editable install, have no effect
        (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))

    def call(self, program: str, *arguments: str) -> str:
        return call([str(self.folder / "bin" / program), *arguments], self.empty)

    def install(self, archive: Path) -> None:
        pip = [sys.executable, "-m", "pip", "--python", str(self.folder / "bin" / "python")]
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed"]
        call([*pip, "install", *options, str(archive)], self.empty)

    def installed(self) -> tuple[Path, str]:
        """Where layerwise is imported from, and its version."""
        asked = "import layerwise; print(layerwise.__file__, layerwise.__version__, sep='|')"
        file, version = self.call("python", "-c", asked).strip().split("|")
        return Path(file), version


def call(command: list[str], folder: Path) -> str:
    """The output of a command that ends well."""
    inherited = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    environment = inherited | {"OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    return ended.stdout


def test_archives_hold_package_alone(archives):
    source = ROOT / "src"
    paths = [path.relative_to(source) for path in source.rglob("*") if path.is_file()]
    expected = {path.as_posix() for path in paths if "__pycache__" not in path.parts}
    with zipfile.ZipFile(archives["wheel"]) as wheel:
        held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert {Path(name).suffix for name in held} >= {".py", ".csv", ".html", ".css", ".js"}
    with tarfile.open(archives["source"]) as packed:
        files = {name.split("/", 1)[1] for name in packed.getnames()}
    assert {f"src/{name}" for name in expected} <= files
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "pyproject.toml"} <= files
    assert not [name for name in files if name.startswith(("results/", "docs/images/"))]
    assert max(path.stat().st_size for path in archives.values()) < LARGEST


def test_wheel_works(archives, stated, tmp_path):
    environment = Environment(tmp_path)
    environment.install(archives["wheel"])
    file, version = environment.installed()
    assert file.is_relative_to(environment.folder)
    assert version == stated
    assert "resnet18" in environment.call("layerwise", "list", "models").split()
    environment.call("python", "-m", "layerwise", "train", "resnet18", *SMALL)
    environment.call("layerwise", "report", "runs", "--csv", "runs.csv")
    run = environment.empty / "runs" / "run"
    assert 0 <= json.loads((run / "result.json").read_text())["test_accuracy"] <= 100
    assert (run / "model.safetensors").stat().st_size > 10_000
    page = (environment.empty / "report.html").read_text()
    assert "runs/run" in page
    assert "86.94" in page  # of the paper's tables, a file in the package
    with (environment.empty / "runs.csv").open() as lines:
        assert [line["model"] for line in csv.DictReader(lines)] == ["resnet18"]


def test_source_archive_works(archives, stated, tmp_path):
    environment = Environment(tmp_path)
    environment.install(archives["source"])
    file, version = environment.installed()
    assert file.is_relative_to(environment.folder)
    assert version == stated


def test_version_of_bare_copy(tmp_path):
    (tmp_path / "layerwise").symlink_to(ROOT / "src" / "layerwise")
    told = "import layerwise; print(layerwise.__version__)"
    assert call([sys.executable, "-S", "-c", told], tmp_path).strip() == "0+unknown"


def test_import_does_not_wait_for_the_version():
    told = "import sys, layerwise; print('importlib.metadata' in sys.modules)"
    assert call([sys.executable, "-S", "-c", told], ROOT / "src").strip() == "False"


def test_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "type", "authors", "license"} <= citation.keys()
    works = citation["references"]
    assert [work["year"] for work in works] == [2020, 2019]
    for work in works:
        assert {"type", "title", "authors", "url"} <= work.keys()
        assert all({"family-names", "given-names"} == author.keys() for author in work["authors"])
    assert "version" not in citation  # pyproject.toml alone states it


def test_changelog_tells_of_this_version(stated):
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    headings = [line for line in lines if line.startswith("## ")]
    assert headings[0].startswith("## [Unreleased]")
    assert any(f"[{stated}]" in line for line in headings)
