"""Arrays of numbers in MATLAB files of level 5, within a bound on memory.

A file is a header of 128 bytes and elements: a type, a length, and so many bytes. An array is an
element of four: flags, lengths of its axes, its name, its numbers, first axis fastest. It is often
compressed, as an element inside another.

https://www.mathworks.com/help/pdf_doc/matlab/matfile_format.pdf
"""

import struct
import zlib
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

MOST_BYTES = 2**28  # of an array; the largest published one has 225 MB
HEADER, TAG = 128, 8  # bytes
HEAD = 1024  # bytes in which an array's name must lie
MOST_ELEMENTS, MOST_AXES = 100, 8
INT32, MATRIX, COMPRESSED = 5, 14, 15  # types of elements
NUMBERS = {
    **{1: "i1", 2: "u1", 3: "<i2", 4: "<u2", 5: "<i4", 6: "<u4", 7: "<f4", 9: "<f8"},
    **{12: "<i8", 13: "<u8"},
}


def read_arrays(raw: bytes, names: Collection[str]) -> dict[str, NDArray[Any]]:
    """The named arrays of a MATLAB file.

    Raises:
        ValueError: it is none, one of the arrays is not in it, or one has more than ``MOST_BYTES``.
    """
    if raw[124:128] != b"\x00\x01IM":
        raise ValueError("it does not begin as a MATLAB file of level 5 does")
    arrays: dict[str, NDArray[Any]] = {}
    for kind, content in islice(elements(memoryview(raw)[HEADER:]), MOST_ELEMENTS):
        if kind == COMPRESSED:
            ((kind, head),) = first(elements(inflated(content, HEAD), whole=False), 1)
        else:
            head = content
        if kind == MATRIX and (name := array_name(head)) in names:
            if head is not content:
                ((_, content),) = first(elements(inflated(content, MOST_BYTES + HEAD)), 1)
            arrays[name] = array_of(content)
            if len(arrays) == len(names):
                return arrays
    raise ValueError(f"it has no {' and '.join(name for name in names if name not in arrays)}")


def inflated(content: memoryview, most: int) -> memoryview:
    """The first bytes of what is compressed.

    Raises:
        ValueError: it is damaged.
    """
    try:
        return memoryview(zlib.decompressobj().decompress(content, most))
    except zlib.error as error:
        raise ValueError(f"a part is damaged ({error})") from None


def elements(content: memoryview, whole: bool = True) -> Iterator[tuple[int, memoryview]]:
    """Type and bytes of every element.

    Args:
        whole: refuse an element that is cut short.

    Raises:
        ValueError: one is cut short.
    """
    place = 0
    while place < len(content):
        kind, size, begin = read_tag(content, place)
        if whole and begin + size > len(content):
            raise ValueError("it is cut short")
        yield kind, content[begin : begin + size]
        aligned = size if kind == COMPRESSED else -(-size // TAG) * TAG
        place += TAG + (aligned if begin == place + TAG else 0)


def read_tag(content: memoryview, place: int) -> tuple[int, int, int]:
    """Type and size of the element at a place, and where its bytes begin.

    Raises:
        ValueError: it is cut short.
    """
    if place + TAG > len(content):
        raise ValueError("it is cut short")
    kind, size = struct.unpack_from("<II", content, place)
    if kind >> 16:  # at most four bytes lie in the tag itself
        return kind & 0xFFFF, min(kind >> 16, 4), place + 4
    return kind, size, place + TAG


def array_name(matrix: memoryview) -> str:
    parts = elements(matrix, whole=False)
    return bytes(first(parts, 3)[2][1]).decode("latin1")


def array_of(matrix: memoryview) -> NDArray[Any]:
    """The array of an element's bytes.

    Raises:
        ValueError: they are not the array that they announce.
    """
    _, (axes_kind, axes), _, (kind, numbers) = first(elements(matrix), 4)
    if kind not in NUMBERS or axes_kind != INT32 or len(axes) > MOST_AXES * 4:
        raise ValueError("an array holds no numbers")
    shape = np.frombuffer(axes, "<i4").tolist()
    kind_of_numbers = np.dtype(NUMBERS[kind])
    if min(shape, default=0) < 0 or prod(shape) * kind_of_numbers.itemsize != len(numbers):
        raise ValueError("an array has not the numbers that it announces")
    if len(numbers) > MOST_BYTES:
        raise ValueError(f"an array has more than {MOST_BYTES} bytes")
    return np.frombuffer(numbers, kind_of_numbers).reshape(shape, order="F")


def first(parts: Iterator[tuple[int, memoryview]], count: int) -> Sequence[tuple[int, memoryview]]:
    """The first elements.

    Raises:
        ValueError: they are fewer.
    """
    taken = [part for part, _ in zip(parts, range(count), strict=False)]
    if len(taken) < count:
        raise ValueError("an array is cut short")
    return taken
