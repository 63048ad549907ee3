"""Amounts of memory in words."""

import re
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Context, Decimal
from typing import NewType

from layerwise.errors import InvalidInput, brief

Bytes = NewType("Bytes", int)  # of arguments that no option of the same name stands for
SIZES = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}  # decimal, as disks are sold
BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_size(name: str, text: str) -> int:
    """Bytes that a text such as 500MB, 1.5GB or 4GiB stands for.

    Raises:
        InvalidInput: it is no number above 0 with a unit.
    """
    match = re.fullmatch(r"([0-9]{1,18}(?:\.[0-9]+)?) ?([a-z]*)", text.strip(), re.IGNORECASE)
    size = int(Decimal(match[1]) * {**SIZES, **BINARY}.get(match[2].upper(), 0)) if match else 0
    if size < 1:
        raise InvalidInput(
            f"Cannot use {name} {brief(repr(text))}: it is not a size. Give a number above 0 with "
            "one of the units B, kB, MB, GB, TB, KiB, MiB, GiB or TiB, such as 500MB or 1.5GiB."
        )
    return size


def format_size(size: int, up: bool = False) -> str:
    """Three digits and a decimal unit.

    Args:
        up: round up, so that the size suffices where a sentence asks for as much.
    """
    digits = Context(prec=3, rounding=ROUND_CEILING if up else ROUND_HALF_EVEN).create_decimal(size)
    unit = max(
        (unit for unit in SIZES if SIZES[unit] <= digits), key=SIZES.__getitem__, default="B"
    )
    shown = f"{digits / SIZES[unit]:f}"
    shown = shown.rstrip("0").rstrip(".") if "." in shown else shown
    return f"{shown} {unit.replace('K', 'k')}"
