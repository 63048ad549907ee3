"""Pickles of arrays, read without running anything that they name."""

import pickle
import pickletools
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from layerwise.errors import InvalidInput

Images = NDArray[np.uint8]


def refuse(where: object, problem: str) -> NoReturn:
    raise InvalidInput(f"{where} {problem}: fetch it again")


@contextmanager
def reading(where: object) -> Iterator[None]:
    """Turn whatever reading or decoding ``where`` raises into InvalidInput."""
    try:
        yield
    except InvalidInput:
        raise
    except Exception as error:  # the gzip, tar, pickle and .mat decoders promise no closed list of errors
        if isinstance(error, OSError) and error.strerror:
            raise InvalidInput(f"{where} cannot be read ({error.strerror}): make it readable to this user") from error
        refuse(where, f"is damaged or not what its name says ({type(error).__name__}: {' '.join(str(error).split())})")


class Recorded:
    """Stands in for what a pickled array is made of: keeps arguments and state, and does nothing with them.

    Real numpy constructors are never called on a file's arguments: a forged dtype could make them read foreign memory.
    """

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class Encoded(bytes):
    """Stands in for ``_codecs.encode``, by which Python 3 writes bytes in the old pickle protocols."""

    def __new__(cls, text: str, encoding: str) -> "Encoded":
        return super().__new__(cls, text.encode("latin1"))

    def __setstate__(self, state: Any) -> None:  # without it a pickle could set attributes of this class
        raise pickle.UnpicklingError("bytes have no state")


ALLOWED: dict[str, type] = {
    "numpy.core.multiarray._reconstruct": Recorded,
    "numpy._core.multiarray._reconstruct": Recorded,
    "numpy.ndarray": Recorded,
    "numpy.dtype": Recorded,
    "_codecs.encode": Encoded,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads dicts, lists, numbers, bytes and recorded arrays; any other name is refused before it is imported."""

    def __init__(self, raw: bytes, where: str) -> None:
        super().__init__(BytesIO(raw), encoding="bytes")
        self.where = where

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in ALLOWED:
            refuse(self.where, f"names {full!r}, which no array of images needs, and nothing was executed")
        return ALLOWED[full]


def check_instructions(raw: bytes, where: str) -> None:
    """Refuse pickles that crash Python while they are read: hashed values nested deeply, or a vast table of references.

    A pickled array takes six tuples, and the names of CIFAR-100 as Python 3 writes them take one each.
    """
    nested = 0
    for instruction, argument, _ in pickletools.genops(raw):
        nested += instruction.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")
        if nested > 1000 or ("PUT" in instruction.name and int(argument or 0) > len(raw)):
            refuse(where, "is nested or numbered as no file of images is")


def read_pickle(raw: bytes, where: str, *keys: bytes) -> list[Any]:
    """The values under ``keys`` of the pickled dict ``raw``, else InvalidInput."""
    with reading(where):
        check_instructions(raw, where)
        content = ArrayUnpickler(raw, where).load()
    if not isinstance(content, dict):
        refuse(where, "does not hold a dict")
    for key in keys:
        if key not in content:
            refuse(where, f"has no entry {key!r}")
    return [content[key] for key in keys]


def rows_of(data: object, where: str) -> Images:
    """(N, 3072) from a recorded array; numpy writes its state as version, shape, dtype, column-major or not, bytes."""
    match data:
        case Recorded(state=(_, (int(n), 3072), Recorded(arguments=("u1" | b"u1", *_)), column_major, bytes(raw))):
            if len(raw) == n * 3072:
                flat = np.frombuffer(raw, np.uint8)
                return np.ascontiguousarray(flat.reshape(3072, n).T) if column_major else flat.reshape(n, 3072)
    refuse(where, "does not hold its images as an (N, 3072) array of uint8")
