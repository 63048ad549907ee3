"""What is wrong with the files of a run, in words, for readers of many. No torch."""

from collections.abc import Iterable, Mapping
from typing import Any

from layerwise.errors import InvalidInput
from layerwise.runs.folder import LOG, RESULT, SEPARABILITY, RunFolder
from layerwise.runs.lines import is_number
from layerwise.utils.files import open_file


def read_result(folder: RunFolder) -> tuple[dict[str, Any] | None, dict[str, str], list[str]]:
    """A run's result, its files that are not those that it wrote, and problems in words.

    Raises:
        InvalidInput: the configuration was altered since, so that the numbers are of another run.
    """
    if not folder.has(RESULT):
        damaged = damaged_files(folder, [])
        return None, damaged, list(damaged.values())
    try:
        result = folder.result()
        check_accuracy(result)
    except InvalidInput as error:
        damaged = damaged_files(folder, [])
        return None, damaged, [*damaged.values(), str(error)]
    folder.verify_facts(result)
    damaged = damaged_files(folder, folder.needed_files())
    return result, damaged, list(damaged.values())


def damaged_files(folder: RunFolder, written: Iterable[str]) -> dict[str, str]:
    """Files of a run that are not those that it wrote, each with what is wrong.

    Args:
        written: names of those that its result has a digest of and needs.
    """
    damaged = {}
    for name in dict.fromkeys((LOG, SEPARABILITY, *written)):
        try:
            if folder.has(name):
                open_file(folder.file(name)).close()
            if name in written:
                folder.verify(name)
        except (InvalidInput, OSError) as error:
            damaged[name] = str(error)
    return damaged


def check_accuracy(result: Mapping[str, Any]) -> None:
    """Refuse a result without the number that is shown.

    Raises:
        InvalidInput: as said.
    """
    if not is_number(result.get("test_accuracy")):
        raise InvalidInput(f"{RESULT} has no test accuracy")
    if not 0 <= result["test_accuracy"] <= 100:
        raise InvalidInput(
            f"{RESULT} has a test accuracy of {result['test_accuracy']:g}, not a percentage"
        )
