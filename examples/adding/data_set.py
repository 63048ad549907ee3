"""A data set of your own: --import data_set.py --data mine."""

import numpy as np

import layerwise


def read(folder):
    """Noisy stripes, across or upright. Your reader reads files in ``folder``, the --data-dir."""
    labels = np.arange(400) % 2
    stripes = np.indices((8, 8)) // 2 % 2 * 200
    noise = np.random.default_rng(0).integers(0, 56, (400, 8, 8))
    images = (stripes[labels] + noise).astype(np.uint8)
    return layerwise.Arrays(images[:, None], labels)  # a fifth is held out as the test images


layerwise.DATASETS["mine"] = layerwise.DataSet(
    read, layerwise.ImageFormat(("across", "upright"), channels=1, image_size=8)
)
