"""Downsampling acceleration: convolutions moved from shallow to deep stages; 15 seconds.

Both hierarchies have eight residual blocks; both networks are trained layer-wise, from two seeds.
The paper (arXiv:2010.08038) reports such hierarchies as more accurate on CIFAR-10.
"""

from statistics import mean

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import layerwise

HIERARCHIES = {"base": (2, 2, 2, 2), "accelerated": (1, 1, 3, 3)}
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
x, x_test, y, y_test = train_test_split(images, torch.tensor(digits.target), random_state=0)


def trained_accuracy(hierarchy, seed, epochs=4):
    """Percent of the test images."""
    torch.manual_seed(seed)
    options = {"width": 1 / 8, "in_chans": 1, "image_size": 8}
    network = layerwise.create_model("resnet18", hierarchy, **options)
    learner = layerwise.localize(network, x[:2], num_classes=10, seed=seed)
    for _ in range(epochs):
        for batch in torch.randperm(len(x)).split(64)[:-1]:
            learner.step(x[batch], y[batch])
    return 100 * (network.eval()(x_test).argmax(1) == y_test).float().mean().item()


for name, hierarchy in HIERARCHIES.items():
    accuracies = [trained_accuracy(hierarchy, seed) for seed in (0, 1)]
    each = " and ".join(f"{accuracy:.1f}" for accuracy in accuracies)
    print(f"{name} {list(hierarchy)}: {mean(accuracies):.1f}% of the test images ({each})")
