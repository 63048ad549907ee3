"""Arguments of ``localize`` that are refused before any unit is made."""

from math import inf, isfinite
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from layerwise.errors import InvalidInput, brief


def check_arguments(
    model: Any,
    sample: Any,
    num_classes: Any,
    clip_grad: float | None,
    amp: Any,
    seed: int | None,
    scheduler: Any,
    head_lr_factor: Any,
) -> None:
    """Refuse arguments of ``localize`` that would fail later or silently do something else."""
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        raise InvalidInput(
            f"Cannot localize the network: model is {type(model).__name__}. Give an instance of "
            "nn.Module, not yet compiled by torch.compile."
        )
    if torch.is_inference_mode_enabled() or any(
        p.is_inference() for p in model.parameters() if not is_lazy(p)
    ):
        raise InvalidInput(
            "Cannot localize the network: weights that are made in inference mode cannot learn. "
            "Make the network and its units outside of torch.inference_mode()."
        )
    if not isinstance(sample, Tensor) or sample.dim() < 2:
        raise InvalidInput(
            "Cannot localize the network: sample is not a batch. Give a tensor of images as the "
            "network is trained on, batch first."
        )
    if sample.is_nested or sample.layout is not torch.strided:
        raise InvalidInput(
            "Cannot localize the network: sample is a sparse or nested tensor. Give a dense one."
        )
    if not len(sample):
        raise InvalidInput(
            f"Cannot localize the network: sample holds no images, its shape is "
            f"{tuple(sample.shape)}. Give one or more."
        )
    if sample.is_meta and not any(p.is_meta for p in model.parameters()):
        raise InvalidInput(
            "Cannot localize the network: sample is on the device meta and has no values. Give "
            "images with values."
        )
    for name, value, valid, accepted in (
        (
            "num_classes",
            num_classes,
            is_whole(num_classes) and num_classes >= 2,
            "a whole number, 2 or more",
        ),
        (
            "clip_grad",
            clip_grad,
            clip_grad is None or (is_number(clip_grad) and 0 < clip_grad < inf),
            "a number above 0, or None",
        ),
        (
            "amp",
            amp,
            amp in (None, torch.bfloat16, torch.float16),
            "torch.bfloat16, torch.float16, or None",
        ),
        (
            "seed",
            seed,
            seed is None or (is_whole(seed) and seed >= 0),
            "a whole number, 0 or more, or None",
        ),
        (
            "scheduler",
            scheduler,
            scheduler is None or callable(scheduler),
            "a callable that makes one of an optimizer",
        ),
        (
            "head_lr_factor",
            head_lr_factor,
            is_number(head_lr_factor) and 0 < head_lr_factor < inf,
            "a number above 0",
        ),
    ):
        if not valid:
            raise InvalidInput(f"Cannot use {name}={value!r}: it is not accepted. Give {accepted}.")


def is_whole(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def check_normalization(normalization: Any) -> None:
    """Refuse what is not a mean and standard deviation of each channel.

    Raises:
        InvalidInput: as said.
    """
    if normalization is None:
        return
    try:
        mean, std = ([float(value) for value in values] for values in normalization)
        valid = len(mean) == len(std) and all(map(isfinite, mean)) and all(0 < s < inf for s in std)
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise InvalidInput(
            f"Cannot use normalization={brief(repr(normalization))}: it is not a mean and standard "
            "deviation of each channel. Give two lists of numbers, such as ([0.5], [0.25]), "
            "deviations above 0."
        )


def refuse_other_output(shape: tuple[int, ...], num_classes: int) -> None:
    """Refuse an output that is not one logit per class.

    Raises:
        InvalidInput: saying what the last layer has to give.
    """
    if shape == (num_classes,):
        return
    if len(shape) > 1:
        remedy = "Pool it, such as by x.mean((2, 3)), so that each image has one logit per class"
    elif shape in ((), (1,)):
        remedy = (
            f"Let its last layer give {num_classes} logits, one per class, also where there are two"
        )
    else:
        remedy = f"Pass num_classes={shape[0]}, or let its last layer give {num_classes} logits"
    raise InvalidInput(
        f"Cannot localize the network: its output has shape {shape} per image, not "
        f"({num_classes},). {remedy}."
    )
