"""The benchmarks still fit the library: each is imported, and its command line explains itself."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_help(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    module = importlib.import_module(name)
    assert Path(module.__file__ or "").parent == FOLDER
    with pytest.raises(SystemExit) as left:
        module.main()
    assert left.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out
