"""Weights of a plain model from a file: safetensors, or a ``state_dict`` that PyTorch saved.

No code in a file is ever run.
"""

import pickle
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load as load_table
from torch import Tensor, nn

from layerwise.errors import InvalidInput, brief, first_line_of
from layerwise.models.classifier import Say
from layerwise.utils.archives import refuse_damaged_archive
from layerwise.utils.files import open_file
from layerwise.utils.words import few

PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, and trainers
HOLDERS = ("state_dict", "model_state_dict", "model")  # where checkpoints of training have weights
ZIP = b"PK"  # begins the files of torch.save, but for those before version 1.6
TABLE = b"{"  # in safetensors, behind the eight bytes of its length
MOST_NAMED = 3  # weights in a refusal
COUNTERS = "num_batches_tracked"  # of batch normalisation, which old files lack


def read_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a file, by their keys.

    Raises:
        InvalidInput: the file is not there, is damaged, or holds something else than weights.
    """
    try:
        state = read_state(path)
    except FileNotFoundError:
        raise InvalidInput(
            f"Cannot load weights from {path}: there is no such file. Give a file of safetensors, "
            "or one that torch.save wrote from a state_dict."
        ) from None
    except InvalidInput:
        raise
    except Exception as error:  # a file of others can fail in torch, zip, pickle or safetensors
        reason = first_line_of(error)
        if isinstance(error, pickle.UnpicklingError):  # whose advice is to trust the file
            reason = "not tensors alone"
        raise InvalidInput(
            f"Cannot load weights from {path}: it is damaged, or holds more than tensors "
            f"({reason}). Give a file of safetensors, or of torch.save(model.state_dict(), …)."
        ) from error
    return checked_weights(path, state)


def read_state(path: Path) -> Any:
    with open_file(path) as file:
        head = file.read(9)
        file.seek(0)
        if head[8:] == TABLE:
            return load_table(file.read())
        if head.startswith(ZIP):
            refuse_damaged_archive(file)
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def checked_weights(path: Path, state: Any) -> dict[str, Tensor]:
    """The table of tensors in what a file held, also where a checkpoint has it under a name."""
    if isinstance(state, Mapping):
        held = next((state[key] for key in HOLDERS if isinstance(state.get(key), Mapping)), state)
        if held and all(isinstance(value, Tensor) for value in held.values()):
            return {str(key): value for key, value in held.items()}
    raise InvalidInput(
        f"Cannot load weights from {path}: it is not a table of tensors by name. Give a file of "
        "safetensors, or of torch.save(model.state_dict(), …)."
    )


def load_weights(
    name: str,
    network: nn.Module,
    path: str | Path,
    classifier: Collection[str] = (),
    say: Say = lambda line: None,
) -> None:
    """Load a file's weights into a network.

    Args:
        name: what the network is called in refusals.
        classifier: names of weights that stay as they were drawn where the file has none, or others
            in shape.
        say: is given a line about every change on the way.

    Raises:
        InvalidInput: the file cannot be read, or its weights do not fit; the network is unchanged.
    """
    own = network.state_dict()
    state = without_prefix(read_weights(Path(path)), own, say)
    state |= in_grey(state, own, say)
    fits = {key: key in state and state[key].shape == own[key].shape for key in own}
    drawn = [key for key in classifier if not fits[key]]
    left_out = {*drawn, *(key for key in own if key not in state and key.endswith(COUNTERS))}
    wrong = misfits(state, own, left_out)
    if wrong:
        raise InvalidInput(
            f"Cannot load {path} into {name}: {'; '.join(wrong)}. Give the weights of this network"
            + (
                ", or --num-classes (in Python new_classifier=True) where only the classifier "
                "differs."
                if not classifier
                else "."
            )
        )
    with torch.no_grad():
        network.load_state_dict({key: state[key] for key in own if fits[key]}, strict=False)
    if classifier:
        words = "drawn anew" if drawn else "as in the file"
        say(f"classifier: {', '.join(sorted(classifier)[:MOST_NAMED])}; {words}")
    say(f"weights of {path}")


def without_prefix(
    state: dict[str, Tensor], own: Mapping[str, Tensor], say: Say
) -> dict[str, Tensor]:
    """The weights by the network's keys, without what wrappers put in front of all of them."""
    for prefix in PREFIXES * 2:  # one wrapper can be around another
        if all(key.startswith(prefix) for key in state) and not any(
            key.startswith(prefix) for key in own
        ):
            say(f"the prefix {prefix!r} is taken off the names of the weights")
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def in_grey(state: Mapping[str, Tensor], own: Mapping[str, Tensor], say: Say) -> dict[str, Tensor]:
    """Weights of a first convolution for colour images, as one for grey images has them.

    Summed over the colours they compute of a grey image what they would of it in three channels.
    """
    grey = {
        key: state[key].sum(1, keepdim=True)
        for key, value in own.items()
        if key in state
        and (value.dim(), state[key].dim()) == (4, 4)
        and (value.shape[1], state[key].shape[1]) == (1, 3)
    }
    for key in grey:
        say(f"{key} is summed over red, green and blue, since images are grey")
    return grey


def misfits(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], left_out: Collection[str]
) -> list[str]:
    """What does not fit, in words: weights that are missing, strange, or of another shape."""
    wanted = [key for key in own if key not in left_out]
    missing = [key for key in wanted if key not in state]
    shapes = [
        f"{key} ({shape_of(state[key])} instead of {shape_of(own[key])})"
        for key in wanted
        if key in state and state[key].shape != own[key].shape
    ]
    strange = sorted(state.keys() - own.keys())
    words = (("it lacks", missing), ("it has strange", strange), ("it has of other shape", shapes))
    return [f"{text} {few(names, MOST_NAMED, brief)}" for text, names in words if names]


def shape_of(value: Tensor) -> str:
    return "×".join(map(str, value.shape)) or "a number"
