"""Plain weights of a run on disk: of its last epoch, and of its best."""

import hashlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor, nn

from layerwise.errors import InvalidInput, reason_of
from layerwise.runs.digests import verify
from layerwise.runs.folder import (
    BEST,
    FACTS_DIGEST,
    LOGS,
    NEXT_BEST,
    RECORDS_DIGESTS,
    RESULT,
    STATE,
    WEIGHTS,
    WEIGHTS_DIGESTS,
    RunFolder,
)
from layerwise.training.meter import Meter
from layerwise.utils.files import (
    digest_of,
    read_file,
    refusing_disk_errors,
    replacing,
    sync_folder,
)


def save_weights(path: Path, model: nn.Module) -> str:
    """Write the plain network's weights under its own keys, and return the file's SHA-256."""
    content = weights_of(model)
    with replacing(path) as draft:
        draft.write_bytes(content)
    return hashlib.sha256(content).hexdigest()


def weights_of(model: nn.Module) -> bytes:
    """The plain network's weights as a file of them."""
    return save({name: tensor.cpu() for name, tensor in separate(model.state_dict()).items()})


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of a network's state, none of which shares its memory with another.

    A module that is registered twice has its weights under both names, which safetensors refuses.
    """
    seen, tensors = set[int](), {}
    for name, tensor in state.items():
        tensor = tensor.detach().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = tensor.clone() if storage in seen else tensor
        seen.add(storage)
    return tensors


def load_weights(path: Path, model: nn.Module, sha256: str) -> None:
    """Load weights into the plain network.

    Args:
        sha256: the digest the file must have.

    Raises:
        InvalidInput: the file is missing, damaged, altered, or of another network.
    """
    verify(path, sha256)
    try:
        model.load_state_dict(load(read_file(path)))
    except (
        Exception
    ) as error:  # safetensors has its own error class; a wrong network is a RuntimeError
        reason = reason_of(error)
        raise InvalidInput(f"Cannot load {path}: {reason}. Restore it, or train again.") from error


def settle_best(folder: RunFolder, meter: Meter) -> None:
    """Give the weights of a better epoch the name of the best, once a state names them.

    Those that no state names, since the process was killed before, are removed.
    """
    if not folder.has(NEXT_BEST):
        return
    with refusing_disk_errors(folder.path):
        if digest_of(folder.file(NEXT_BEST)) == meter.best.get("sha256"):
            folder.file(NEXT_BEST).replace(folder.file(BEST))
        else:
            folder.file(NEXT_BEST).unlink()
        sync_folder(folder.path)


def check_best(folder: RunFolder, meter: Meter, may_be_later: bool) -> None:
    """Refuse to go on without the weights of the best epoch that a state knows of.

    Args:
        may_be_later: whether the state is of a version that wrote a better epoch's weights over
            them before it saved. They are then as good, or are said to be missing in the end.

    Raises:
        InvalidInput: as said.
    """
    wanted = meter.best.get("sha256")
    if not meter.best or any(
        folder.has(name) and (may_be_later or digest_of(folder.file(name)) == wanted)
        for name in (NEXT_BEST, BEST)
    ):
        return
    what = "is not the file that the run wrote" if folder.has(BEST) else "has been removed"
    more = f" and {RESULT}" if folder.has(RESULT) else ""
    raise InvalidInput(
        f"Cannot go on with {folder.path}: {BEST} {what}. Restore it, or move {STATE}{more} away "
        "to train the run anew."
    )


def digests_of_files(folder: RunFolder, model: nn.Module, meter: Meter) -> dict[str, Any]:
    """Write the last weights, and give the digests of all files of a run that ends, for its result.

    The best epoch's weights are left out, and said to be, where they were lost in an earlier
    version's run.
    """
    weights = {WEIGHTS: save_weights(folder.file(WEIGHTS), model)}
    wanted = meter.best.get("sha256")
    if wanted and folder.has(BEST) and digest_of(folder.file(BEST)) == wanted:
        weights[BEST] = wanted
    elif meter.best:
        print(
            f"{folder.file(BEST)} is not of the best epoch, {meter.best['epoch']}, whose weights "
            "were lost",
            file=sys.stderr,
            flush=True,
        )
    records = [name for name in (STATE, *LOGS) if folder.has(name)]
    return {
        WEIGHTS_DIGESTS: weights,
        RECORDS_DIGESTS: {name: digest_of(folder.file(name)) for name in records},
        FACTS_DIGEST: folder.facts_digest(),
    }
