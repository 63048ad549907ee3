"""Python files of the user's own, run before a command so that what they register can be named."""

import hashlib
import sys
from collections.abc import Iterable
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from layerwise.errors import InvalidInput

IMPORTED: dict[str, str] = {}  # files that were run -> their SHA-256, for a run's record


def import_files(paths: Iterable[str]) -> None:
    """Run Python files, each once.

    Raises:
        InvalidInput: a file cannot be read, or raises an error.
    """
    for path in paths:
        if path not in IMPORTED:
            import_file(Path(path))
            IMPORTED[path] = hashlib.sha256(Path(path).read_bytes()).hexdigest()


def stems() -> set[str]:
    """Names of the modules that files were run as."""
    return {Path(path).stem for path in IMPORTED}


def import_file(path: Path) -> None:
    """Run a Python file as a module of its name.

    Raises:
        InvalidInput: it is no Python file, has the name of one of Python's modules, or raises an
            error.
    """
    if path.stem in sys.stdlib_module_names or path.stem in sys.modules.keys() - stems():
        raise InvalidInput(
            f"Cannot import {path}: a module of that name is in use already. Rename the file."
        )
    if not path.is_file():
        raise InvalidInput(f"Cannot import {path}: there is no such file. Give a Python file.")
    specification = spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise InvalidInput(
            f"Cannot import {path}: it is not a Python file. Give one, such as a.py."
        )
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.append(folder)  # for its neighbours; last, so that they hide no installed module
    module = module_from_spec(specification)
    sys.modules[path.stem] = module
    try:
        specification.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's code runs here: anything can be raised
        del sys.modules[path.stem]
        reason = " ".join(str(error).split())[:200]
        raise InvalidInput(
            f"Cannot import {path}: it raised {type(error).__name__} ({reason}). Correct it."
        ) from error
