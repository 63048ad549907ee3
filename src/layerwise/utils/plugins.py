"""Python files of the user's own, run before a command so that what they hold can be named.

Only the user names them, on the command line or in Python: a run's folder or a configuration file
never lets one run.
"""

import contextlib
import hashlib
import os
import sys
from collections.abc import Iterable
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from layerwise.errors import InvalidInput, brief, raised

# files and modules that were run -> SHA-256 of their files, for a run's record
IMPORTED: dict[str, str] = {}
MODULES: dict[str, ModuleType] = {}  # what they hold, by the same names


def import_files(names: Iterable[str]) -> None:
    """Run Python files, or modules such as ``package.module``, each once.

    Raises:
        InvalidInput: one cannot be read, or raises an error.
    """
    for name in names:
        if name not in IMPORTED and not any(is_one_file(name, other) for other in IMPORTED):
            is_module = is_module_name(name)
            MODULES[name] = import_installed(name) if is_module else import_file(Path(name))
            source = file_of_module(name) if is_module else Path(name)
            IMPORTED[name] = hashlib.sha256(source.read_bytes()).hexdigest()


def is_one_file(name: str, other: str) -> bool:
    """Whether two spellings name one file."""
    with contextlib.suppress(OSError):
        return os.path.samefile(name, other)
    return False


def is_module_name(name: str) -> bool:
    """Whether a name is that of a module, such as ``package.module``, rather than of a file."""
    parts = name.split(".")
    return all(map(str.isidentifier, parts)) and parts[-1] != "py" and not Path(name).is_file()


def imported_as(name: str) -> str | None:
    """The name by which a file was imported: the same, or else that of a file called alike.

    A run goes on from another folder, or with its file elsewhere.
    """
    if name in IMPORTED:
        return name
    alike = [path for path in IMPORTED if Path(path).name == Path(name).name]
    return alike[-1] if alike else None


def refuse_unasked(name: str) -> NoReturn:
    """Refuse to run code that a run's folder or a configuration file names.

    Raises:
        InvalidInput: saying how the user lets it run.
    """
    raise InvalidInput(
        f"Cannot use {brief(name)}: it is code, which runs only if the command line names it. Give "
        f"--import {brief(name)} if you trust it."
    )


def stems() -> set[str]:
    """Names of the modules that files were run as."""
    return {Path(path).stem for path in IMPORTED}


def import_installed(name: str) -> ModuleType:
    """Import a module by name, as Python finds it from the working folder.

    Raises:
        InvalidInput: there is none, or it raises an error.
    """
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that nothing installed is hidden
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if not error.name or not f"{name}.".startswith(f"{error.name}."):
            raise refusal(name, error) from error
        raise InvalidInput(
            f"Cannot import {brief(name)}: there is no such module. Give a module's name, such as "
            "package.module, or the path of a Python file."
        ) from None
    except (Exception, SystemExit) as error:
        raise refusal(name, error) from error


def file_of_module(name: str) -> Path:
    """The file of an imported module.

    Raises:
        InvalidInput: it has none.
    """
    source = MODULES[name].__file__
    if source is None or not Path(source).is_file():
        raise InvalidInput(
            f"Cannot import {name}: it is not a file of Python code. Give the module that holds "
            "the function."
        )
    return Path(source)


def import_file(path: Path) -> ModuleType:
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
        raise refusal(path, error) from error
    return module


def refusal(name: str | Path, error: BaseException) -> InvalidInput:
    return InvalidInput(f"Cannot import {name}: it {raised(error)}. Correct it.")
