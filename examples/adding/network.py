"""A network of your own: layerwise train mine --import network.py --channels 8."""

from torch import nn

import layerwise


def mine(num_classes, in_chans, image_size, *, channels: int = 16):
    """Two convolutions and a linear layer.

    Args:
        channels: of each convolution.
    """
    return nn.Sequential(
        nn.Conv2d(in_chans, channels, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * channels, num_classes),
    )


layerwise.MODELS["mine"] = mine
