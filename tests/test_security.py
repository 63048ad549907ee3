"""SECURITY.md: each promise names a test that exists, and what holds them all."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`(tests/\w+\.py)::(\w+)`", (ROOT / "SECURITY.md").read_text(encoding="utf-8"))


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call in a module by the last two words of its name, such as ``torch.load``."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(".".join(ast.unparse(node.func).split(".")[-2:]), node) for node in nodes]


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_promises_are_held_by_tests_that_exist(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_promise_names_a_test() -> None:
    rows = re.findall(r"^\| (.*?) \| (.*?) \|$", (ROOT / "SECURITY.md").read_text(), re.MULTILINE)
    assert len(rows) > 10
    assert all("tests/" in tests for promise, tests in rows if promise != "promise")


def test_nothing_is_loaded_unsafely() -> None:
    """No call in the package can run code that a file holds, but those that --import asks for."""
    sources = sorted((ROOT / "src").rglob("*.py"))
    assert len(sources) > 50
    for path in sources:
        for name, call in calls(ast.parse(path.read_text(encoding="utf-8"))):
            words = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            place = f"{path.name}:{call.lineno}"
            if name == "torch.load":
                assert words.get("weights_only") == "True", place
            assert name not in UNSAFE, place
            assert name != "yaml.load" or ast.unparse(call.args[1]) == "Loader", place
            assert words.get("allow_pickle") in (None, "False"), place
            assert words.get("shell") in (None, "False"), place


UNSAFE = {
    *("pickle.load", "pickle.loads", "eval", "exec", "yaml.unsafe_load", "yaml.full_load"),
    *("os.system", "os.popen", "marshal.loads", "shelve.open", "jit.load", "joblib.load"),
    *("shutil.unpack_archive", "archive.extractall", "archive.extract", "tar.extractall"),
}
