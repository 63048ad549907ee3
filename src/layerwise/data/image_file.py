"""An image file as pixels: upright, opaque, 8 bits a channel, in bounded memory.

Pillow decodes it. What its ``convert`` would lose is done here: 16-bit, integer and float values
are scaled by their range, and transparent pixels are laid on grey.
"""

import os
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from layerwise.errors import InvalidInput
from layerwise.utils.printable import printable

MOST_PIXELS = 89_478_485  # Pillow's own bound against decompression bombs: 358 MB decoded
MOST_SCALED = MOST_PIXELS // 4  # of a picture that is scaled whole before its middle is cut out
HEAVY = {"JPEG2000": 4}  # decoders that take so many times the memory of others
BACKGROUND = (128, 128, 128)  # behind transparent pixels: black and white drawings both show on it
# they start another program (Ghostscript), or name files that Pillow recognises and cannot decode
NO_PICTURES = {"EPS", "WMF", "BUFR", "GRIB", "HDF5", "MPEG", "IPTC"}
LEAST_SHARE = 1 / 16  # of a range that a picture must exceed to be known by it: 12 of 16 bits
MAX_VALUE, SMAX_VALUE, BITS, PHOTOMETRIC = 281, 341, 258, 262  # tags of TIFF
WHITE_IS_ZERO = 0  # value of the last one


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in NO_PICTURES)


@cache
def endings() -> frozenset[str]:
    """The endings of file names of the formats that are read, such as ``.jpg``."""
    accepted = {*formats(), "MPO"}  # MPO is opened as a JPEG
    return frozenset(
        ending for ending, name in Image.registered_extensions().items() if name in accepted
    )


def read_image(path: str | Path, size: int, channels: int = 3) -> np.ndarray:
    """An image file as (channels, size, size) uint8.

    It is turned upright by its EXIF orientation. Its shorter side is scaled to ``size`` pixels, and
    the middle is cut out. Transparent pixels are laid on ``BACKGROUND``. Of several frames or
    pages, the first is read.

    Raises:
        InvalidInput: the file is not an image, is cut short, has more than ``MOST_PIXELS``, or
            holds numbers whose range cannot be told.
    """
    name = printable(path)
    refuse_other_files(path, name)
    try:
        with opened(path) as picture:
            image = decode(picture, size, channels)
    except InvalidInput as refusal:
        raise InvalidInput(f"Cannot read {name}: {refusal}") from None
    except Exception as error:  # decoders of damaged files raise nearly every class there is
        raise InvalidInput(
            f"Cannot read {name} as an image: {reason_of(error)}. Remove or replace it."
        ) from error
    pixels = np.asarray(image)
    return pixels.transpose(2, 0, 1).copy() if channels == 3 else pixels[None].copy()


def reason_of(error: Exception) -> str:
    """The words of an error, or its class where it has none."""
    if isinstance(error, Image.UnidentifiedImageError):
        return "no image format is recognised in it"
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return f"it has more than {MOST_PIXELS} pixels, and would take too much memory"
    words = printable(getattr(error, "strerror", None) or error).rstrip(".")
    return words or type(error).__name__


def refuse_other_files(path: str | Path, name: str) -> None:
    """Raise ``InvalidInput`` unless the path is that of a file: a pipe would be waited for."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        missing = isinstance(error, FileNotFoundError)
        reason = "it does not exist" if missing else getattr(error, "strerror", None) or error
        raise InvalidInput(
            f"Cannot read {name}: {reason}. Give the path of an image file."
        ) from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
        raise InvalidInput(f"Cannot read {name}: it is {kind}. Give the path of an image file.")


@contextmanager
def opened(path: str | Path) -> Iterator[Image.Image]:
    """The picture whose header has been read; warnings of odd metadata are not shown.

    Pillow's warning of a decompression bomb is an error, so that its bound is ``MOST_PIXELS``.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(path, formats=formats()) as picture:
            yield picture


def decode(picture: Image.Image, size: int, channels: int) -> Image.Image:
    """The middle square of the picture, upright, in mode RGB or L."""
    refuse_large(picture)
    # lets JPEG decode at a fraction of its size
    picture.draft("RGB", (2 * size, 2 * size))
    picture.load()
    refuse_large(picture)  # an icon tells its size only now
    turn_upright(picture)
    wanted = "RGB" if channels == 3 else "L"
    if picture.mode in ("I", "F") or picture.mode.startswith("I;"):
        return scaled_square(picture, size).convert(wanted)
    if picture.has_transparency_data:
        mode = "RGBA"
        square = cut_middle(picture if picture.mode == mode else picture.convert(mode), size)
        return on_background(square).convert(wanted)
    return cut_middle(picture if picture.mode == wanted else picture.convert(wanted), size)


def turn_upright(picture: Image.Image) -> None:
    """Turn the picture as its EXIF orientation says, where that can be read."""
    try:
        ImageOps.exif_transpose(picture, in_place=True)
    except MemoryError:
        raise
    except Exception:  # damaged metadata beside sound pixels
        return


def refuse_large(picture: Image.Image) -> None:
    """Raise ``InvalidInput`` for a picture that would take more memory than the bound."""
    width, height = picture.size
    most = MOST_PIXELS // HEAVY.get(picture.format or "", 1)
    if width * height > most:
        raise InvalidInput(
            f"it has {width} × {height} pixels, and at most {most} in all are read. Make it "
            "smaller."
        )


def cut_middle(image: Image.Image, size: int) -> Image.Image:
    """The middle square, its side scaled to ``size``."""
    scale = size / min(image.size)
    wide, high = (max(size, round(side * scale)) for side in image.size)
    left, top = (wide - size) // 2, (high - size) // 2
    right, bottom = left + size, top + size
    if wide * high <= MOST_SCALED:
        scaled = image.resize((wide, high), Image.Resampling.BILINEAR)
        return scaled.crop((left, top, right, bottom))
    # a long strip: scale the middle alone, which rounds otherwise in the last bit
    across, down = image.width / wide, image.height / high
    ends = min(right * across, image.width), min(bottom * down, image.height)
    box = (left * across, top * down, *ends)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def on_background(square: Image.Image) -> Image.Image:
    """A transparent picture laid on ``BACKGROUND``."""
    opaque = Image.new("RGBA", square.size, (*BACKGROUND, 255))
    opaque.alpha_composite(square)
    return opaque.convert("RGB")


def scaled_square(picture: Image.Image, size: int) -> Image.Image:
    """The middle of a picture of 16-bit, 32-bit or float values, with black to white as 0 to 255.

    Raises:
        InvalidInput: its range cannot be told.
    """
    numbers = picture.convert("I") if picture.mode.startswith("I;") else picture
    white = white_of(picture, extremes(numbers))
    values = np.asarray(cut_middle(numbers, size)) * np.float32(255 / white)
    if getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == WHITE_IS_ZERO:  # Pillow leaves it so
        values = 255 - values
    if not np.isfinite(values).all():
        raise InvalidInput("some of its values are no numbers. Save it as 8 or 16 bits.")
    return Image.fromarray(np.rint(values).clip(0, 255).astype(np.uint8))


def extremes(picture: Image.Image) -> tuple[float, float]:
    """The least and the largest value of a picture of one channel."""
    least, most = picture.getextrema()
    return float(least), float(most)  # type: ignore[arg-type]  # pairs are of other modes


def white_of(picture: Image.Image, values: tuple[float, float]) -> float:
    """The value of white: as the file states it, or the end of its number type.

    32-bit integers and floats are read in the ranges that programs write: 0 to 1 (floats), 0 to 255
    and 0 to 65535. A picture must exceed a sixteenth of the larger two to be known by.

    Raises:
        InvalidInput: the values tell none of these.
    """
    least, most = values
    if not np.isfinite(least + most) or least < 0:
        raise InvalidInput(
            f"its values go from {least:g} to {most:g}, not a range of brightness. Save it "
            "as 8 or 16 bits, from 0 for black."
        )
    if white := stated_white(picture, most):
        return white
    if picture.mode == "F" and most <= 1:
        return 1.0
    sixteen_bits = picture.mode.startswith("I;") or picture.format in ("PNG", "PPM", "JPEG2000")
    for white in (65535.0,) if sixteen_bits else (255.0, 65535.0):
        if most == 0 or white * LEAST_SHARE < most <= white:
            return white
    raise InvalidInput(
        f"its largest value is {most:g}, and its {'floats' if picture.mode == 'F' else 'integers'} "
        "could be larger, so its range of brightness is unknown (such as 12 bits in 16). Save it "
        "as 8 bits, or as 16 bits over their whole range."
    )


def stated_white(picture: Image.Image, most: float) -> float | None:
    """The value of white that a TIFF states: a largest value, or fewer than 16 bits."""
    tags = getattr(picture, "tag_v2", {})
    stated = [value for tag in (SMAX_VALUE, MAX_VALUE) for value in numbers_of(tags.get(tag))]
    bits = next(iter(numbers_of(tags.get(BITS))), 16)
    if picture.mode.startswith("I;") and bits < 16:
        stated.append(2.0**bits - 1)
    return next((value for value in stated if value > 0 and most <= value), None)


def numbers_of(value: object) -> list[float]:
    """The numbers of a TIFF tag, which may be absent, one or several."""
    values = value if isinstance(value, tuple) else (value,)
    return [float(item) for item in values if isinstance(item, int | float)]
