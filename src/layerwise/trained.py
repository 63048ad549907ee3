"""What can be done with a finished run: evaluate it again, show it images."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from layerwise.build import amp_type, build_learner, prepare_device
from layerwise.data import load_data
from layerwise.data.image_folder import read_image
from layerwise.errors import InvalidInput
from layerwise.evaluation import accuracy, unit_scores
from layerwise.memory_format import set_memory_format
from layerwise.models import create_model
from layerwise.runs import BEST, STATE, WEIGHTS, Execution, Run, RunFolder
from layerwise.states import load_state, load_weights, refuse_other_data

TOP = 5  # classes shown per image


def load_network(folder: RunFolder, best: bool) -> tuple[nn.Module, dict[str, Any]]:
    """The trained network of a run, and what the run knows of its data.

    Raises:
        InvalidInput: the run is not finished, or its files are damaged.
    """
    run, data = folder.run(), folder.facts()["data"]
    try:
        sound = len(data["mean"]) == len(data["std"]) == data["channels"] and min(data["std"]) > 0
        sound = sound and all(isinstance(name, str) for name in data["class_names"]) and sum(data["mean"]) >= 0
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise InvalidInput(f"{folder.path}: the data section of run.json was altered: restore it, or train again")
    name = BEST if best else WEIGHTS
    digests = folder.result()["sha256"]
    if name not in digests:
        raise InvalidInput(f"{folder.path} has no best epoch, since nothing was held out: leave out --best")
    classes = len(data["class_names"])
    sizes = run.width, classes, data["channels"], data["image_size"]
    network = create_model(run.model, run.hierarchy, *sizes, run.dropout, run.downsample_after)
    load_weights(folder.file(name), network, digests[name])
    return network.eval(), data


def evaluate(folder: RunFolder, execution: Execution, best: bool) -> dict[str, Any]:
    """Accuracy on the test and validation images, and of every unit on the test images where the last state is there."""
    run = folder.run()
    network, _ = load_network(folder, best)
    device = prepare_device(execution)
    data = load_data(run, execution, device)
    refuse_other_data(folder, data.facts())
    result: dict[str, Any] = {
        "run": str(folder.path),
        "weights": "best" if best else "last",
        "test_accuracy": accuracy(network.to(device), data.test, amp_type(run)),
        "val_accuracy": accuracy(network, data.validation, amp_type(run)) if data.validation else None,
    }
    print(f"test accuracy {result['test_accuracy']:.2f} % on {len(data.test.labels)} images")
    if result["val_accuracy"] is not None and data.validation is not None:
        print(f"validation accuracy {result['val_accuracy']:.2f} % on {len(data.validation.labels)} images")
    result["units"] = [] if best else evaluate_units(folder, run, data.test, data, device)
    for unit in result["units"]:
        print(f"  {unit['index']:3d} {unit['name']:<28} loss {unit['loss']:.4f}  accuracy {unit['accuracy']:6.2f} %")
    return result


def evaluate_units(folder: RunFolder, run: Run, images: Any, data: Any, device: torch.device) -> list[dict[str, Any]]:
    """Loss and accuracy of every unit by its own head; empty when the state that holds the heads has been removed."""
    if not folder.file(STATE).exists():
        return []
    learner = build_learner(run, data, device)
    set_memory_format(learner, "auto", folder.facts().get("layouts"))
    learner.load_state_dict(load_state(folder.file(STATE))["learner"])
    scores = unit_scores(learner, images, 0, len(learner.units) - 1)
    return [
        {"index": unit.index, "name": unit.name, "loss": score.loss, "accuracy": score.accuracy}
        for unit, score in zip(learner.units, scores, strict=True)
    ]


@torch.no_grad()
def predict(folder: RunFolder, images: list[str], best: bool) -> dict[str, Any]:
    """The likeliest classes of image files, scaled as in training."""
    network, data = load_network(folder, best)
    pixels = np.stack([read_image(Path(path), data["image_size"], data["channels"]) for path in images])
    mean, std = (torch.tensor(data[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    shares = torch.softmax(network((torch.from_numpy(pixels).float() - mean) / std), 1)
    top = min(TOP, shares.shape[1])
    predictions = []
    for path, (values, labels) in zip(images, zip(*(part.tolist() for part in shares.topk(top)), strict=True), strict=True):
        classes = [
            {"class": data["class_names"][label], "percent": 100 * value} for value, label in zip(values, labels, strict=True)
        ]
        predictions.append({"image": path, "classes": classes})
        print(f"{path}: " + ", ".join(f"{entry['class']} {entry['percent']:.1f} %" for entry in classes))
    return {"run": str(folder.path), "predictions": predictions}
