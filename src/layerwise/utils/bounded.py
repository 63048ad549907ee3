"""Files of others, read within bounds: of size, of depth, of numbers. No torch."""

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from layerwise.errors import brief

MOST_CONFIGURATION = 10 * 2**20  # bytes of a run's JSON that is given as configuration
MOST_YAML = 64 * 2**10  # bytes: 1,500 lines of options; YAML is read slowly
HEAD = 4096  # bytes of a file that say whose it is
LARGEST = 2**63  # of whole numbers, which numbers in files and torch's tensors stay below


def read_head(path: Path, most: int = HEAD) -> bytes:
    """The first bytes of a regular file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no regular file (a pipe would be waited for).
    """
    number = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    with open(number, "rb") as file:
        if not stat.S_ISREG(os.fstat(number).st_mode):
            raise ValueError("it is not a regular file")
        return file.read(most)


def read_bounded(path: Path, most: int) -> bytes:
    """Content of a regular file of at most so many bytes.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger, or it is no regular file (a pipe would be waited for).
    """
    content = read_head(path, most + 1)
    if len(content) > most:
        raise ValueError(f"it has more than {most} bytes")
    return content


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text whose numbers are of a usual size.

    Raises:
        ValueError: it is no JSON, or nested too deep, gives a name twice, or a whole number does
            not fit into 64 bits.
    """
    try:
        return json.loads(text, parse_int=whole_number, object_pairs_hook=table)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON table, whose names are given once each.

    Raises:
        ValueError: one is given twice.
    """
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"it gives {brief(name)} twice")
        values[name] = value
    return values


def whole_number(text: str) -> int:
    """A whole number that fits into 64 bits.

    Raises:
        ValueError: it does not, or it is no whole number.
    """
    number = int(text)
    if abs(number) >= LARGEST:
        raise ValueError("a whole number is too large")
    return number


def read_options(path: Path) -> Any:
    """The value of a configuration file: JSON, or YAML without aliases.

    Aliases (``*name``) are refused, since a few lines of them stand for billions of values.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large or no YAML; the message says where.
    """
    content = read_bounded(path, MOST_CONFIGURATION)
    if content.lstrip()[:1] == b"{":
        try:
            return parse_json(content)
        except ValueError:
            if len(content) > MOST_YAML:
                raise
    if len(content) > MOST_YAML:
        raise ValueError(f"it has more than {MOST_YAML} bytes")
    return parse_yaml(content.decode())


def parse_yaml(text: str) -> Any:
    """The value of a YAML text without aliases.

    Raises:
        ValueError: it is none.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise ValueError("it has an alias (*), which a file of options needs not")
            return super().compose_node(parent, index)

        def compose_mapping_node(self, anchor: Any) -> Any:
            node = super().compose_mapping_node(anchor)
            keys = [key.value for key, _ in node.value if isinstance(key.value, str)]
            if twice := [key for key in keys if keys.count(key) > 1]:
                raise ValueError(f"it gives {brief(twice[0])} twice")
            return node

    try:
        return yaml.load(text, Loader)
    except RecursionError:
        raise ValueError("it is nested too deep") from None
    except Exception as error:  # tags (!!int x) let a text choose its reader: all can be raised
        raise ValueError(str(error) or type(error).__name__) from None


def values_in(value: Any) -> Iterator[Any]:
    """The plain values in nested lists and tables, keys among them."""
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            waiting += item
        else:
            yield item


def refuse_strange(value: Any) -> None:
    """Refuse numbers and texts that no option has.

    Raises:
        ValueError: a whole number does not fit into 64 bits, or a text cannot be a file's name.
    """
    for item in values_in(value):
        if isinstance(item, int) and abs(item) >= LARGEST:
            raise ValueError("a whole number is too large")
        if isinstance(item, str):
            refuse_unnameable(item)


def refuse_unnameable(text: str) -> None:
    """Refuse a text that the system takes for no file's name.

    Raises:
        ValueError: it holds a zero byte, or half of a character.
    """
    try:
        encoded = os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("a text holds half of a character") from None
    if b"\0" in encoded:
        raise ValueError("a text holds a zero byte")
