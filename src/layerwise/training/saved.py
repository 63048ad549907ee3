"""Saved runs: evaluated again, loaded to be measured."""

import hashlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from layerwise.core.learner import Learner
from layerwise.core.memory_format import blank_sample, set_memory_format
from layerwise.data import ImageFormat, Loader, Splits
from layerwise.errors import InvalidInput, first_line_of
from layerwise.measures.depths import Depths, depths_of, network_depths, without_heads
from layerwise.measures.sample import Sample, sample_images
from layerwise.runs.digests import resuming
from layerwise.runs.folder import LOGS, RESULT, STATE, WEIGHTS, RunFolder
from layerwise.runs.run import Execution
from layerwise.training.checkpoint import (
    load_state,
    position_of,
    refuse_other_data,
    refuse_other_state,
)
from layerwise.training.device import apply_execution
from layerwise.training.evaluate import accuracy, unit_scores
from layerwise.training.exits import measure_exits
from layerwise.training.networks import data_of, image_format, load_network
from layerwise.training.origins import refuse_changed_code
from layerwise.training.prepare import Prepared, prepare
from layerwise.training.sound_state import check_learner_state
from layerwise.training.weights import weights_of

# facts of images that a network reads, in words
OF_IMAGES = {"class_names": "classes", "image_size": "size", "channels": "number of channels"}


def evaluate(folder: RunFolder, execution: Execution, best: bool) -> dict[str, Any]:
    """Accuracy of a finished run on the test and validation images, in percent.

    Where the last state is there, every unit is evaluated on the test images too.
    """
    network, _ = load_network(folder, best)
    prepared = prepare(folder.run(), execution)
    apply_execution(prepared.device, execution)
    data = prepared.load_data()
    refuse_other_data(folder, data.facts())
    result: dict[str, Any] = {
        "run": str(folder.path),
        "weights": "best" if best else "last",
        "test_accuracy": accuracy(network.to(prepared.device), data.test, prepared.amp),
        "val_accuracy": accuracy(network, data.validation, prepared.amp)
        if data.validation
        else None,
    }
    result |= {"units": []} if best else evaluate_units(folder, prepared, data)
    print(f"test accuracy {result['test_accuracy']:.2f} % on {len(data.test.labels)} images")
    if result["val_accuracy"] is not None and data.validation is not None:
        print(
            f"validation accuracy {result['val_accuracy']:.2f} % on {len(data.validation.labels)} "
            "images"
        )
    for unit in result["units"]:
        print(
            f"  {unit['index']:3d} {unit['name']:<28} loss {unit['loss']:.4f}  accuracy "
            f"{unit['accuracy']:6.2f} %"
        )
    if "best_exit" in result:
        chosen = result["best_exit"]
        print(
            f"the head best on validation, of unit {chosen['index']}: "
            f"{chosen['test_accuracy']:.2f} %"
        )
    if "ensemble" in result:
        print(f"ensemble of the local heads {result['ensemble']['test_accuracy']:.2f} %")
    return result


def evaluate_units(folder: RunFolder, prepared: Prepared, data: Splits) -> dict[str, Any]:
    """Loss and accuracy of every unit by its own head, on the test images, and the early exits.

    ``units`` is empty when the state that holds the heads has been removed; see ``measure_exits``
    for the rest.
    """
    if not folder.has(STATE):
        return {"units": []}
    learner = trained_learner(folder, prepared, data)
    scores = unit_scores(learner, data.test, 0, len(learner.units) - 1)
    units = [
        {"index": unit.index, "name": unit.name, "loss": score.loss, "accuracy": score.accuracy}
        for unit, score in zip(learner.units, scores, strict=True)
    ]
    return {"units": units, **measure_exits(learner, data.test, data.validation)}


def trained_learner(folder: RunFolder, prepared: Prepared, images: ImageFormat) -> Learner:
    """The learner of a run, with the weights and heads of its last state.

    Raises:
        InvalidInput: see ``load_learner``.
    """
    learner = prepared.make_learner(images)
    set_memory_format(learner, "auto", folder.facts().get("layouts"))
    load_learner(folder, learner)
    return learner


def load_learner(folder: RunFolder, learner: Learner) -> int:
    """Load a run's last state into its learner, and return the epochs that it had finished.

    Raises:
        InvalidInput: the state is damaged, of another run or, of a finished run, not the one that
            it ended with.
    """
    refuse_changed_code(folder)
    if folder.has(RESULT):
        folder.verify(STATE)
    state = load_state(folder.file(STATE))
    refuse_other_state(folder, state)
    if not folder.has(RESULT):  # which names the digests of a finished run's files
        for name, mark in dict(state.get("marks", {})).items():
            if name in LOGS:
                folder.lines[name].lost(mark)
    try:
        check_learner_state(state["learner"], learner)
        learner.load_state_dict(state["learner"])
        epochs = position_of(*state["position"]).epoch
    except InvalidInput:
        raise
    except Exception as error:  # made by something else, it can be wrong in any way
        reason = first_line_of(error)
        raise InvalidInput(
            f"Cannot use {folder.file(STATE)}: it is not a state of this program ({reason}). "
            "Restore it, or move it away."
        ) from error
    refuse_other_weights(folder, learner.model)
    return epochs


def refuse_other_weights(folder: RunFolder, network: nn.Module) -> None:
    """Refuse a state of a finished run whose weights are not those that the run wrote.

    Raises:
        InvalidInput: as said.
    """
    wanted = folder.result()["sha256"].get(WEIGHTS) if folder.has(RESULT) else None
    if wanted is not None and hashlib.sha256(weights_of(network)).hexdigest() != wanted:
        raise InvalidInput(
            f"Cannot use {folder.file(STATE)}: its weights are not those of {WEIGHTS}, so it is of "
            "another training. Restore it, or move it away."
        )


def trained_depths(folder: RunFolder, device: torch.device) -> tuple[Depths, int]:
    """A run's units with the weights saved last, and how many epochs it had finished.

    Raises:
        InvalidInput: the run has no saved state, or it is damaged.
    """
    facts = folder.facts()
    if not folder.has(STATE) and not folder.has(RESULT):
        raise InvalidInput(
            f"Cannot measure {folder.path}: it has no saved state ({STATE} is not there). Train it "
            f"for an epoch at least, with {resuming(folder.path)}."
        )
    prepared = replace(prepare(folder.run(), Execution()), device=device)
    run = prepared.run
    learner = prepared.make_learner(image_format(data_of(folder)))
    if folder.has(STATE):
        set_memory_format(learner, "auto", facts.get("layouts"))
        epochs = load_learner(folder, learner)
        return depths_of(learner, prepared.own_cut, run.output_layer), epochs
    # the state has been removed, and with it the heads
    network, _ = load_network(folder, best=False)
    depths = network_depths(
        network.to(device), prepared.own_cut, blank_sample(learner), run.output_layer, prepared.amp
    )
    return depths, folder.result()["epochs"]


def compared_run(
    against: str | Path, facts: Mapping[str, Any], loader: Loader, images: int
) -> tuple[Depths, Sample, int]:
    """The run to compare features with, the images as its network reads them, and its epochs.

    Random generators are left alone.

    Args:
        against: its folder.
        facts: of the data that ``loader`` gives; see ``Splits.facts``.
        images: how many at most; see ``sample_images``.

    Raises:
        InvalidInput: the run cannot be measured, or its network reads images of another kind.
    """
    reference = RunFolder(against)
    its = data_of(reference)
    for fact in OF_IMAGES:
        if facts[fact] != its[fact]:
            raise InvalidInput(
                f"Cannot compare with {reference.path}: it was trained on other images, of other "
                f"{OF_IMAGES[fact]}. Compare runs of one data set and image size."
            )
    device = loader.labels.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        depths, epoch = trained_depths(reference, device)
    scaled = Loader(
        loader.pixels, loader.labels, its["mean"], its["std"], loader.image_size, loader.batch_size
    )
    return without_heads(depths), sample_images(scaled, images, len(facts["class_names"])), epoch
