"""Separability at every depth of a trained run or of a network."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from layerwise.core.learner import Learner
from layerwise.core.outputs import Key
from layerwise.errors import InvalidInput, choose, names_in, raised
from layerwise.measures import MEASURES
from layerwise.measures.base import check_labels, parts
from layerwise.measures.depths import Depths, depths_of, network_depths, refuse_other_depth
from layerwise.measures.gains import losses_push
from layerwise.measures.over_depth import POOLED_TO, Row, measure_depths
from layerwise.measures.sample import Sample, sample_images
from layerwise.runs.folder import SEPARABILITY, RunFolder
from layerwise.runs.run import Execution
from layerwise.training.checkpoint import refuse_other_data
from layerwise.training.device import apply_execution
from layerwise.training.prepare import prepare
from layerwise.training.saved import compared_run, trained_depths

IMAGES = 10_000
SPLITS = ("test", "validation")
BATCH = 128  # images of a pair that pass the network at once


def separability(
    source: nn.Module | Learner | str | Path,
    data: tuple[Tensor, Tensor] | None = None,
    *,
    at: str | int | Sequence[str] = "layer",
    output_layer: str = "separate",
    leaves: Sequence[str] = (),
    output: Key = None,
    measures: Sequence[str] | None = None,
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
        data: for a network or a learner: held-out images (N, ...) as it reads them and labels (N,),
            4 or more of each class.
        at: for a network: where units end; see ``layerwise.split``. A run's and a learner's units
            are their own; those of a globally trained run are where its ``at`` would cut.
        output_layer: for a network: ``joined`` to the last unit, or ``separate``.
        leaves, output: for a network: modules to keep whole, and where its result holds the logits;
            see ``layerwise.split``.
        measures: names in ``layerwise.MEASURES``; gains are of the first. Default: all.
        against: a network as many units deep that reads the same images, to compare features with.
        pooled_to: features are average-pooled to at most so many numbers an image (or one per
            channel, where there are more).
        images: for a run: at most so many images, evenly over the classes.
        split: for a run: ``test`` or ``validation``.
        data_dir, device: for a run: where its data are and where to compute, if not as it was
            trained.

    Returns:
        A row per depth, the image first: ``index`` of the unit (the image: −1), ``name``, ``depth``
        (units passed), ``resolution`` [H, W] in pixels (None of vectors), ``channels``,
        ``pooled_resolution``, ``features`` (numbers an image after pooling); the measures by name
        (accuracies in percent; see their docstrings); ``gain``, the first measure less that of the
        row before, and ``gain_error``, its standard error if it is an accuracy; ``mismatched``,
        whether the gain is negative or nil while the unit's loss is active (None where that is
        not known; see ``gains.add_gains``). Where units have losses of their own,
        ``auxiliary_accuracy`` (percent) and ``auxiliary_loss``; with ``against``, ``cka``, 0 to 1.
        What cannot be measured of a unit is None, and ``refused`` says why.

    Raises:
        InvalidInput: the run has no saved state, the images cannot be measured on, or an argument
            is out of range.
        CannotSplit: the network cannot be cut.
    """
    names = list(MEASURES) if measures is None else names_in("measures", measures)
    if isinstance(source, nn.Module | Learner):
        if images is not IMAGES or split != "test" or data_dir or device:
            raise InvalidInput(
                "Cannot use images=, split=, data_dir= or device= here: they are of a run. Give "
                "the network's images and labels as data=."
            )
        sample = pair_sample(data)
        reference = (
            (depths_at(against, at, output_layer, sample, leaves, output), sample)
            if isinstance(against, nn.Module | Learner)
            else None
        )
        if against is not None and reference is None:
            raise InvalidInput(
                "Cannot use against=: a network is compared with a network. Load that of the run, "
                "or leave it out."
            )
        depths = depths_at(source, at, output_layer, sample, leaves, output)
        refuse_other_depth(depths, reference)
        return measure_depths(depths, sample, names, pooled_to, other=reference)
    if data is not None or not isinstance(against, str | Path | None):
        raise InvalidInput(
            "Cannot measure a run with these arguments: it is measured on its own data, and "
            "compared with another run. Leave out data=, and give folders."
        )
    folder = RunFolder(source)
    own = folder.execution()
    execution = replace(own, data_dir=data_dir or own.data_dir, device=device or own.device)
    result = separability_of_run(folder, execution, names, against, pooled_to, images, split)
    rows: list[Row] = result["units"]
    return rows


def separability_over_epochs(run: str | Path) -> list[Row]:
    """The rows of ``separability`` that a run measured while it trained, finished or not.

    It is measured by ``layerwise train --separability-every N``.

    Returns:
        A row per measured epoch and depth, in that order: the rows of ``separability``, and in each
        ``epoch``, ``split``, ``images`` and ``pooled_to``. ``pandas.DataFrame`` takes them as they
        are.

    Raises:
        InvalidInput: the folder is no run, or nothing was measured.
    """
    folder = RunFolder(run)
    folder.run()
    lines = folder.verified_log(SEPARABILITY)
    if not lines:
        raise InvalidInput(
            f"Cannot show {folder.path} over epochs: it was not measured while it trained. Train "
            "with --separability-every N, or measure it as it is by layerwise.separability."
        )
    return [
        {**facts, **row}
        for line in lines
        for facts in [{name: line[name] for name in line.keys() - {"units", "headings"}}]
        for row in line["units"]
    ]


def separability_of_run(
    folder: RunFolder,
    execution: Execution,
    measures: Sequence[str],
    against: str | Path | None = None,
    pooled_to: int = POOLED_TO,
    images: int = IMAGES,
    split: str = "test",
) -> dict[str, Any]:
    """Measures of a run, finished or not; ``units`` holds the rows of ``separability``.

    Raises:
        InvalidInput, CannotSplit: see ``separability``.
    """
    for name in measures:
        choose("measure", name, MEASURES)
    choose("split", split, SPLITS)
    prepared = prepare(folder.run(), execution)
    if split == "validation" and not prepared.run.val_fraction:
        refuse_validation(folder)
    apply_execution(prepared.device, execution)
    depths, epoch = trained_depths(folder, prepared.device)
    data = prepared.load_data()
    refuse_other_data(folder, data.facts())
    loader = data.test if split == "test" else data.validation
    if loader is None:
        refuse_validation(folder)
    sample = sample_images(loader, images, len(data.class_names))
    pair = compared_run(against, data.facts(), loader, images)[:2] if against is not None else None
    refuse_other_depth(depths, pair)
    began = time.perf_counter()
    pushing = losses_push(folder.verified_log()) if depths.heads else None
    rows = measure_depths(depths, sample, measures, pooled_to, other=pair, pushing=pushing)
    return {
        "run": str(folder.path),
        "model": prepared.run.model,
        "rule": prepared.run.rule,
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


def refuse_validation(folder: RunFolder) -> NoReturn:
    raise InvalidInput(
        f"Cannot measure {folder.path} on validation images: it held no images out. Give "
        "--split test."
    )


def depths_at(
    network: nn.Module | Learner,
    at: str | int | Sequence[str],
    output_layer: str,
    sample: Sample,
    leaves: Sequence[str],
    output: Key,
) -> Depths:
    if isinstance(network, Learner):
        return depths_of(network, at, output_layer)
    try:
        images = next(sample.batches())
        return network_depths(network, at, images, output_layer, leaves=leaves, output=output)
    except (RuntimeError, TypeError) as error:  # the network's own, of images that do not fit
        raise InvalidInput(
            f"Cannot measure the network on these images: its forward pass {raised(error)}. Give "
            "images as it reads them."
        ) from error


def pair_sample(data: Any) -> Sample:
    """Images and labels of the caller's own.

    Raises:
        InvalidInput: they are no such pair, or cannot be measured on.
    """
    if (
        not isinstance(data, tuple | list)
        or len(data) != 2
        or not all(isinstance(part, Tensor) for part in data)
    ):
        raise InvalidInput(
            "Cannot use data=: it is not a pair of tensors. Give (images, labels) of held-out "
            "images."
        )
    images, labels = data
    if (
        labels.shape != images.shape[:1]
        or labels.is_floating_point()
        or not len(labels)
        or int(labels.min()) < 0
    ):
        raise InvalidInput(
            f"Cannot use labels of shape {tuple(labels.shape)} and type {labels.dtype} with "
            f"{len(images)} images: they do not fit. Give one integer per image, from 0 on."
        )
    classes = int(labels.max()) + 1
    check_labels(labels, classes)
    parts(labels)
    # losses that compare the examples of a batch must not meet one class alone
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    order = order.to(images.device)
    return Sample(
        labels.long().to(images.device)[order],
        classes,
        lambda: (images[part] for part in order.tensor_split(-(-len(order) // BATCH))),
    )
