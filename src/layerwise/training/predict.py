"""Image files that are shown to a trained network, a batch at a time."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from layerwise.core.outputs import logits_of
from layerwise.data.image_file import read_image
from layerwise.errors import InvalidInput
from layerwise.runs.folder import RunFolder
from layerwise.training.networks import load_network
from layerwise.utils.printable import decodable, printable

TOP = 5  # classes shown per image
BATCH = 16  # images that pass the network at once


def predict(folder: RunFolder, images: Sequence[str], best: bool) -> dict[str, Any]:
    """The likeliest classes of image files, scaled as in training.

    A file that cannot be read is named, and the others are gone on with. It is listed under
    ``refused`` with the reason.
    """
    network, data = load_network(folder, best)
    result: dict[str, Any] = {"run": str(folder.path), "predictions": [], "refused": []}
    for start in range(0, len(images), BATCH):
        paths, pixels = [], []
        for path in images[start : start + BATCH]:
            try:
                pixels.append(read_image(path, data["image_size"], data["channels"]))
                paths.append(path)
            except InvalidInput as refusal:
                result["refused"].append({"image": decodable(path), "reason": str(refusal)})
                if len(images) > 1:  # the command says the only one itself
                    print(f"layerwise: {refusal}", file=sys.stderr, flush=True)
        if paths:
            result["predictions"] += likeliest(network, data, paths, np.stack(pixels))
    return result


@torch.no_grad()
def likeliest(
    network: nn.Module, data: dict[str, Any], paths: Sequence[str], pixels: np.ndarray
) -> list[dict[str, Any]]:
    """The likeliest classes of each image, printed in a line and returned."""
    mean, std = (torch.tensor(data[key]).view(1, -1, 1, 1) for key in ("mean", "std"))
    logits = logits_of(network((torch.from_numpy(pixels).float() - mean) / std))
    shares = torch.softmax(logits, 1)
    predictions = []
    for path, row in zip(paths, shares, strict=True):
        classes = top_classes(row, data["class_names"])
        predictions.append({"image": decodable(path), "classes": classes})
        named = (f"{printable(entry['class'])} {entry['percent']:.1f} %" for entry in classes)
        print(f"{printable(path)}: {', '.join(named)}")
    return predictions


def top_classes(shares: Tensor, names: Sequence[str]) -> list[dict[str, Any]]:
    """Names and shares in percent of the likeliest classes."""
    values, labels = shares.topk(min(TOP, len(shares)))
    return [
        {"class": names[label], "percent": 100 * value}
        for value, label in zip(values.tolist(), labels.tolist(), strict=True)
    ]
