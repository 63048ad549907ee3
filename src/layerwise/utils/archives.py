"""Archives that PyTorch saved, checked before they are opened."""

import zipfile
from typing import BinaryIO


def refuse_damaged_archive(file: BinaryIO) -> None:
    """Compare an archive's checksums, which torch does not.

    Raises:
        ValueError: naming a damaged member, or one that is compressed and could fill the memory;
            torch writes none.
    """
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            if member.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{member.filename} is compressed")
        damaged = archive.testzip()
    if damaged:
        raise ValueError(f"the checksum of {damaged} differs")
