"""The memory format of every unit's maps: contiguous or channels-last.

By default a fixed rule decides, the same on every machine of a kind, so that repeated runs choose
alike. A trial times a copy of each unit in both formats. It is made by request, and makes a step
1.5 to 7 % faster on some processors (docs/log.md).
"""

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from layerwise.core.learner import Learner
from layerwise.core.side_effects import modes_kept
from layerwise.core.unit import Activations, Unit, in_memory_format, precision
from layerwise.errors import InvalidInput, check_flags, choose
from layerwise.losses import Targets
from layerwise.utils.device import device_kind, device_of, synchronise

FORMATS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
MEMORY_FORMATS = [*FORMATS, "auto", "trial"]
TRIAL_BATCH = 16
REPETITIONS = 3  # in turn, after a first that is not counted
ADVANTAGE = 0.97  # share of the contiguous format's time below which channels-last is taken
REGISTER = 8  # float32 numbers of an AVX2 register


def set_memory_format(
    learner: Learner, memory_format: str = "auto", before: Any = None, weights: bool = True
) -> list[str]:
    """Set the memory format of every unit's maps, weights and optimizer state; values stay.

    Args:
        learner: the learner, changed in place.
        memory_format: ``contiguous`` or ``channels-last`` for all units, ``auto`` for the fixed
            rule, or ``trial``.
        before: the names that were returned when the run began, which ``auto`` and ``trial`` then
            keep to. Anything that is not a list of such names is ignored.
        weights: False leaves weights as they are. A step then takes as long, to 2 % (docs/log.md,
            2026-11-29), but predicted memory is of weights in the format.

    Returns:
        The name of each unit's format. A unit stays contiguous if it cannot compute in
        channels-last, such as one that begins with ``.view``, if what enters it is no maps (B, C,
        H, W), or if a CPU cannot do so safely.

    Raises:
        InvalidInput: the memory format is unknown, or ``before`` is of another number of units.
    """
    check_flags(weights=weights)
    names = computable(learner, memory_formats(learner, memory_format, before))
    for unit, name in zip(learner.units, names, strict=True):
        if weights:
            unit.set_memory_format(FORMATS[name])
        else:
            unit.memory_format = FORMATS[name]
    if weights and "channels-last" in names and not computes(learner):
        # the network as a whole meets maps that its units would have been given contiguous
        return set_memory_format(learner, "contiguous")
    return names


@torch.no_grad()
def computable(learner: Learner, names: Sequence[str]) -> list[str]:
    """The formats, with contiguous where a unit cannot compute in channels-last."""
    activations: Activations = (blank_sample(learner),)
    chosen = []
    for unit, name in zip(learner.units, names, strict=True):
        own = unit.memory_format
        try:
            unit.memory_format = FORMATS[name]
            following = passed(unit, activations)
        except RuntimeError:
            name, unit.memory_format = "contiguous", torch.contiguous_format
            following = passed(unit, activations)
        finally:
            unit.memory_format = own
        chosen.append(name)
        activations = following
    return chosen


@torch.no_grad()
def passed(unit: Unit, activations: Activations) -> Activations:
    """The output of a unit, without its hooks; running statistics and modes stay as they were."""
    with modes_kept(unit.piece), precision(activations, unit.amp):
        unit.piece.eval()
        passed_on: Activations = unit.piece.forward(
            *in_memory_format(activations, unit.memory_format)
        )
        return passed_on


@torch.no_grad()
def computes(learner: Learner) -> bool:
    """Whether the network itself can compute with its weights in their present formats."""
    with modes_kept(learner.model), precision((blank_sample(learner),), learner.units[0].amp):
        learner.model.eval()
        try:
            learner.model(blank_sample(learner))
        except RuntimeError:
            return False
    return True


def blank_sample(learner: Learner) -> Tensor:
    """Two black images as the network reads them, (2, C, H, W)."""
    device = device_of(learner.model)
    return torch.zeros(2, *learner.image_shape, device=device, dtype=learner.image_type)


lay_out = set_memory_format  # the earlier name


def memory_formats(learner: Learner, memory_format: str, before: Any = None) -> list[str]:
    """The names that ``set_memory_format`` returns, without setting anything."""
    choose("memory format", memory_format, MEMORY_FORMATS)
    device = device_kind(next(learner.model.parameters()))
    if memory_format in FORMATS:
        names = [memory_format] * len(learner.units)
    elif is_list_of_formats(before):
        names = checked_length(before, len(learner.units))
    elif memory_format == "trial" and device == "cpu":  # on a GPU it would time launches
        names = tried(learner)
    else:
        names = [by_rule(unit, device) for unit in learner.units]
    names = [
        "contiguous" if unit.entering.channels != 1 else name
        for unit, name in zip(learner.units, names, strict=True)
    ]
    if device == "cpu":
        names = [
            "contiguous" if endangered(unit) else name
            for unit, name in zip(learner.units, names, strict=True)
        ]
    return names


def is_list_of_formats(value: Any) -> bool:
    return (
        isinstance(value, list)
        and value != []
        and all(isinstance(name, str) and name in FORMATS for name in value)
    )


def checked_length(names: list[str], count: int) -> list[str]:
    """The names, if there is one per unit.

    Raises:
        InvalidInput: there is not.
    """
    if len(names) != count:
        raise InvalidInput(
            f"Cannot set the memory format: run.json names formats of {len(names)} units, and the "
            f"run has {count}. Restore run.json."
        )
    return names


def by_rule(unit: Unit, device: str) -> str:
    """Channels-last, but for the unit that reads the image in bfloat16 on a CPU.

    There, the weight gradient of a channels-last convolution of few input channels can take a
    hundred times as long.
    """
    reads_image = unit.index == 0
    return (
        "contiguous"
        if device == "cpu" and unit.amp is torch.bfloat16 and reads_image
        else "channels-last"
    )


def endangered(unit: Unit) -> bool:
    """Whether a CPU could read or write past its memory in channels-last."""
    return any(
        strides_few_channels(module) or isinstance(module, nn.GroupNorm)
        for part in (unit.piece, unit.loss)
        for module in part.modules()
    ) or calls_in_danger(unit.piece)


def strides_few_channels(module: nn.Module) -> bool:
    """Whether a module is a strided 1×1 convolution of fewer channels than a register holds.

    On processors with AVX2 alone, its weight gradient is wrong in channels-last, and what lies
    behind it is overwritten (github.com/uxlfoundation/oneDNN/issues/6035).
    """
    return (
        isinstance(module, nn.Conv2d)
        and module.kernel_size == (1, 1)
        and max(module.stride) > 1
        and module.in_channels // module.groups < REGISTER
    )


def calls_in_danger(piece: nn.Module) -> bool:
    """Whether a piece calls, by its function, what is in danger as a module.

    That is group normalisation, whose backward pass in channels-last ends the process where its
    input needs no gradient, as what enters a unit does not (PyTorch 2.13, on a CPU); and any
    strided convolution, since the size of a weight that is computed is not known.
    """
    nodes = piece.graph.nodes if isinstance(piece, fx.GraphModule) else ()
    return any(
        node.target in (F.group_norm, torch.group_norm)
        or (node.target in (F.conv2d, torch.conv2d) and is_strided(node))
        for node in nodes
    )


def is_strided(call: fx.Node) -> bool:
    """Whether a call of ``conv2d`` has a stride other than 1, or one that is computed."""
    stride = call.args[3] if len(call.args) > 3 else call.kwargs.get("stride", 1)
    return stride not in (1, (1,), [1], (1, 1), [1, 1])


def tried(learner: Learner) -> list[str]:
    """The faster format of each unit, by trial; an endangered unit is not tried."""
    images = blank_sample(learner)
    activations: Activations = (images,)
    names = []
    for unit in learner.units:
        names.append(
            "contiguous"
            if endangered(unit)
            else trial(unit, activations, learner.num_classes, images)
        )
        activations = passed(unit, activations)
    return names


def trial(unit: Unit, activations: Activations, num_classes: int, images: Tensor) -> str:
    """Time a copy of a unit on random maps in each format; the generator's state stays."""
    tensors = [value for value in activations if isinstance(value, Tensor)]
    if any(value.dim() != 4 for value in tensors):  # vectors have one format only
        return "contiguous"
    with torch.random.fork_rng(devices=[]):
        seconds = trial_seconds(unit, activations, num_classes, images)
    return (
        "channels-last"
        if seconds["channels-last"] < ADVANTAGE * seconds["contiguous"]
        else "contiguous"
    )


def trial_seconds(
    unit: Unit, activations: Activations, num_classes: int, images: Tensor
) -> dict[str, float]:
    """The least seconds of a forward and a backward pass of a copy of a unit, in each format."""
    batch = tuple(
        random_like(value) if isinstance(value, Tensor) else value for value in activations
    )
    device = batch[0].device
    labels = torch.arange(TRIAL_BATCH, device=device) % num_classes
    targets = Targets(labels, num_classes, images)
    copies = {name: copy_in(memory_format, unit) for name, memory_format in FORMATS.items()}
    seconds = {name: float("inf") for name in FORMATS}
    for repetition in range(REPETITIONS + 1):
        for name, copied in copies.items():
            measured = timed(copied, in_memory_format(batch, FORMATS[name]), targets)
            seconds[name] = min(seconds[name], measured) if repetition else seconds[name]
    return seconds


def copy_in(memory_format: torch.memory_format, unit: Unit) -> Unit:
    """A copy of a unit in a memory format, without an optimizer."""
    copied = Unit(
        unit.index,
        unit.name,
        *copy.deepcopy((unit.piece, unit.loss)),
        None,
        amp=unit.amp,
        feature=unit.feature,
        entering=unit.entering,
    )
    copied.train()
    copied.set_memory_format(memory_format)
    return copied


def random_like(value: Tensor) -> Tensor:
    """Random maps (``TRIAL_BATCH``, C, H, W) of the shape and type of these."""
    return torch.rand(TRIAL_BATCH, *value.shape[1:], device=value.device).to(value.dtype)


def timed(unit: Unit, batch: Activations, targets: Targets) -> float:
    """Seconds of a forward and a backward pass."""
    synchronise(targets.labels.device)
    begin = time.perf_counter()
    _, evaluated = unit.evaluate(batch, targets)
    if unit.parameters():
        evaluated.loss.backward()
    synchronise(targets.labels.device)
    return time.perf_counter() - begin


def summary(names: Sequence[str]) -> str:
    """The units' memory formats in words, for the line that says what was chosen."""
    count = sum(name == "channels-last" for name in names)
    if count in (0, len(names)):
        return "channels-last" if count else "contiguous"
    return f"channels-last in {count} of {len(names)} units"
