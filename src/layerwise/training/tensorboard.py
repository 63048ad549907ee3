"""An epoch's numbers for TensorBoard, for those who watch a training live (``--log tensorboard``).

Training does not change.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

from layerwise.errors import InvalidInput, choose
from layerwise.runs.folder import RunFolder

FOLDER = "tensorboard"  # in the run's
LOGS = ("tensorboard",)
# a unit's numbers in the log -> what TensorBoard groups them by
OF_UNITS = {
    "loss": "loss",
    "accuracy": "accuracy",
    "val_loss": "validation loss",
    "val_accuracy": "validation accuracy",
}
OF_EPOCHS = {
    "test_accuracy": "accuracy/test",
    "val_accuracy": "accuracy/validation",
    "images_per_second": "images per second",
}

Log = Callable[[dict[str, Any]], None]


def check_log(name: str | None) -> None:
    """Refuse a log that could not be written in the end.

    Raises:
        InvalidInput: there is none of this name, or what writes it is not installed.
    """
    if name is not None and choose("log", name, LOGS) and find_spec("tensorboard") is None:
        raise InvalidInput(
            "Cannot write --log tensorboard: TensorBoard is not installed. Install it with pip "
            "install 'layerwise[tensorboard]', or leave --log out."
        )


@contextmanager
def open_log(name: str | None, folder: RunFolder, epochs: int) -> Iterator[Log]:
    """Writer of an epoch's record, as ``log.jsonl`` has it; without a name it does nothing.

    Args:
        epochs: how many are done; what was written of later ones, before a kill, is no longer
            shown.
    """
    if name is None:
        yield lambda record: None
        return
    if folder.file(FOLDER).is_symlink():
        raise InvalidInput(
            f"Cannot write {folder.file(FOLDER)}: it is a link. Move it away, or leave --log out."
        )
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(folder.file(FOLDER)), purge_step=epochs + 1) as writer:

        def write(record: dict[str, Any]) -> None:
            for tag, value in scalars(record):
                writer.add_scalar(tag, value, record["epoch"])
            writer.flush()

        yield write


def scalars(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The names and values of what an epoch's record holds."""
    for key, tag in OF_EPOCHS.items():
        if record[key] is not None:
            yield tag, record[key]
    for unit in record["units"]:
        for key, group in OF_UNITS.items():
            if key in unit:
                yield f"{group}/{unit['index']:03d} {unit['name']}", unit[key]
