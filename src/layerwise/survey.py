"""Separability at every depth of a trained run or of a network: a Python call, and the command ``layerwise separability``."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.build import build_learner, parse_cut, prepare_device
from layerwise.data import ImageFormat, load_data
from layerwise.data.loader import Loader
from layerwise.errors import InvalidInput, choose
from layerwise.gains import losses_push
from layerwise.learner import Learner
from layerwise.measures import MEASURES, check_labels, parts
from layerwise.memory_format import set_memory_format
from layerwise.probing import (
    POOLED_TO,
    Depths,
    Row,
    Sample,
    depths_of,
    measure_depths,
    network_depths,
    sample_images,
    without_heads,
)
from layerwise.runs import SEPARABILITY, STATE, Execution, RunFolder
from layerwise.states import load_state, refuse_other_data
from layerwise.trained import load_network

IMAGES = 10_000
SPLITS = ("test", "validation")
BATCH = 128  # images of a pair that pass the network at once


def separability(
    source: nn.Module | Learner | str | Path,
    data: tuple[Tensor, Tensor] | None = None,
    *,
    at: str | int | Sequence[str] = "layer",
    measures: Sequence[str] = tuple(MEASURES),
    against: nn.Module | Learner | str | Path | None = None,
    pooled_to: int = POOLED_TO,
    images: int = IMAGES,
    split: str = "test",
    data_dir: str | None = None,
    device: str | None = None,
) -> list[Row]:
    """Measure how separable the classes are in the image and at every unit's output of a network.

    Args:
        source: a network, a learner, or the folder of a run.
        data: for a network or a learner: held-out images (N, ...) as it reads them and labels (N,), 4 or more of each class.
        at: for a network: where units end; see ``layerwise.split``. A run's and a learner's units are their own; those of a
            globally trained run are where its ``at`` would cut.
        measures: names in ``layerwise.MEASURES``; gains are of the first.
        against: a network as many units deep that reads the same images, to compare features with.
        pooled_to: features are average-pooled to at most so many numbers an image (or one per channel, where there are more).
        images: for a run: at most so many images, evenly over the classes.
        split: for a run: ``test`` or ``validation``.
        data_dir, device: for a run: where its data are and where to compute, if not as it was trained.

    Returns:
        A row per depth, the image first: ``index`` of the unit (the image: −1), ``name``, ``depth`` (units passed),
        ``resolution`` [H, W] in pixels (None of vectors), ``channels``, ``pooled_resolution``, ``features`` (numbers an image
        after pooling); the measures by name (accuracies in percent; see their docstrings); ``gain``, the first measure less
        that of the row before, and ``gain_error``, its standard error if it is an accuracy; ``mismatched``, whether the gain is
        negative or nil while the unit's loss still pushes (None where that is not known; see ``gains.add_gains``). Where units
        have losses of their own, ``auxiliary_accuracy`` (percent) and ``auxiliary_loss``; with ``against``, ``cka``, 0 to 1.
        What cannot be measured of a unit is None, and ``refused`` says why.

    Raises:
        InvalidInput: the run has no saved state, the images cannot be measured on, or an argument is out of range.
        CannotSplit: the network cannot be cut.
    """
    if isinstance(source, nn.Module | Learner):
        sample = pair_sample(data)
        other = (depths_at(against, at, sample), sample) if isinstance(against, nn.Module | Learner) else None
        if against is not None and other is None:
            raise InvalidInput("a network is compared with a network: load that of the run given as against=, or leave it out")
        depths = depths_at(source, at, sample)
        refuse_other_depth(depths, other)
        return measure_depths(depths, sample, measures, pooled_to, other=other)
    if data is not None or not isinstance(against, str | Path | None):
        raise InvalidInput("a run is measured on its own data and compared with a run: leave out data=, and give folders")
    folder = RunFolder(source)
    own = folder.execution()
    execution = replace(own, data_dir=data_dir or own.data_dir, device=device or own.device)
    rows: list[Row] = survey(folder, execution, measures, against, pooled_to, images, split)["units"]
    return rows


def separability_over_epochs(run: str | Path) -> list[Row]:
    """What was measured of a run's features while it trained (``--separability-every N``), finished or not.

    Returns:
        A row per measured epoch and depth, in that order: the rows of ``separability``, and in each ``epoch``, ``split``,
        ``images`` and ``pooled_to``. ``pandas.DataFrame`` takes them as they are.

    Raises:
        InvalidInput: the folder is no run, or nothing was measured.
    """
    folder = RunFolder(run)
    folder.run()
    lines = folder.log(SEPARABILITY)
    if not lines:
        raise InvalidInput(
            f"{folder.path} was not measured while it trained: train with --separability-every N, or measure it as it is by "
            "layerwise.separability"
        )
    return [{**line, **row} for units, line in ((line.pop("units"), line) for line in lines) for row in units]


def survey(
    folder: RunFolder,
    execution: Execution,
    measures: Sequence[str],
    against: str | Path | None = None,
    pooled_to: int = POOLED_TO,
    images: int = IMAGES,
    split: str = "test",
) -> dict[str, Any]:
    """Measure a run, finished or not, and say of what and how; ``units`` holds the rows of ``separability``.

    Raises:
        InvalidInput, CannotSplit: see ``separability``.
    """
    for name in measures:
        choose("measure", name, MEASURES)
    choose("split", split, SPLITS)
    run, device = folder.run(), prepare_device(execution)
    depths, epoch = trained_depths(folder, device)
    data = load_data(run, execution, device)
    refuse_other_data(folder, data.facts())
    loader = data.test if split == "test" else data.validation
    if loader is None:
        raise InvalidInput(f"{folder.path} held no images out for validation: give --split test")
    sample = sample_images(loader, images, len(data.class_names))
    pair = compared_run(against, data.facts(), loader, images)[:2] if against is not None else None
    refuse_other_depth(depths, pair)
    began = time.perf_counter()
    pushing = losses_push(folder.log()) if depths.heads else None
    rows = measure_depths(depths, sample, measures, pooled_to, other=pair, pushing=pushing)
    return {
        "run": str(folder.path),
        "model": run.model,
        "rule": run.rule,
        "epoch": epoch,
        "split": split,
        "images": len(sample.labels),
        "scored_images": len(parts(sample.labels).score),
        "pooled_to": pooled_to,
        "measures": list(measures),
        "against": str(against) if against is not None else None,
        "seconds": time.perf_counter() - began,
        "units": rows,
    }


def trained_depths(folder: RunFolder, device: torch.device) -> tuple[Depths, int]:
    """A run's units with the weights saved last, and how many epochs it had finished.

    Raises:
        InvalidInput: the run has no saved state, or it is damaged.
    """
    run, facts = folder.run(), folder.facts()
    if not folder.file(STATE).exists() and not folder.finished:
        raise InvalidInput(
            f"{folder.path} has no saved state ({STATE} is not there): train it for an epoch at least, with layerwise train "
            f"--resume {folder.path}"
        )
    data = facts["data"]
    images = ImageFormat(tuple(data["class_names"]), data["channels"], data["image_size"])
    learner = build_learner(run, images, device)
    if folder.file(STATE).exists():
        state = load_state(folder.file(STATE))
        set_memory_format(learner, "auto", facts.get("layouts"))
        learner.load_state_dict(state["learner"])
        return depths_of(learner, parse_cut(run.at)), state["position"][0]
    network, _ = load_network(folder, best=False)  # the state has been removed, and with it the heads
    sample = torch.zeros(2, *learner.image_shape, device=device)
    depths = network_depths(network.to(device), parse_cut(run.at), sample, learner.units[0].amp)
    return depths, folder.result()["epochs"]


def depths_at(network: nn.Module | Learner, at: str | int | Sequence[str], sample: Sample) -> Depths:
    if isinstance(network, Learner):
        return depths_of(network, at)
    return network_depths(network, at, next(sample.batches()))


def pair_sample(data: Any) -> Sample:
    """Images and labels of the caller's own.

    Raises:
        InvalidInput: they are no such pair, or cannot be measured on.
    """
    if not isinstance(data, tuple | list) or len(data) != 2 or not all(isinstance(part, Tensor) for part in data):
        raise InvalidInput("data= is not a pair of tensors: give (images, labels) of held-out images")
    images, labels = data
    if labels.shape != images.shape[:1] or labels.is_floating_point() or not len(labels) or int(labels.min()) < 0:
        raise InvalidInput(
            f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit {len(images)} images: give one integer "
            "per image, from 0 on"
        )
    classes = int(labels.max()) + 1
    check_labels(labels, classes)
    parts(labels)
    return Sample(labels.long().to(images.device), classes, lambda: iter(images.tensor_split(-(-len(images) // BATCH))))


def compared_run(against: str | Path, facts: Mapping[str, Any], loader: Loader, images: int) -> tuple[Depths, Sample, int]:
    """The run to compare features with, a set's images scaled as its network reads them, and how many epochs it had finished.

    Random generators are left alone.

    Args:
        against: its folder.
        facts: of the data that ``loader`` gives; see ``Splits.facts``.
        images: how many at most; see ``sample_images``.

    Raises:
        InvalidInput: the run cannot be measured, or its network reads images of another kind.
    """
    other = RunFolder(against)
    its = other.facts()["data"]
    for fact in ("class_names", "image_size", "channels"):
        if facts[fact] != its[fact]:
            raise InvalidInput(
                f"{other.path} was trained on other images (its {fact.replace('_', ' ')} differs): compare runs of one data "
                "set and image size"
            )
    device = loader.labels.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        depths, epoch = trained_depths(other, device)
    scaled = Loader(loader.pixels, loader.labels, its["mean"], its["std"], loader.image_size, loader.batch_size)
    return without_heads(depths), sample_images(scaled, images, len(facts["class_names"])), epoch


def refuse_other_depth(depths: Depths, other: tuple[Depths, Sample] | None) -> None:
    if other is not None and len(other[0].units) != len(depths.units):
        raise InvalidInput(
            f"networks of {len(depths.units)} and {len(other[0].units)} units have no depths in common to compare: give one "
            "with as many units"
        )
