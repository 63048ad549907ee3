"""A network of your own, trained without global backpropagation and without changing it; 5 seconds.

Any module that torch.fx can trace goes in, here one with a residual branch. Every weighted layer
becomes a unit that learns from a loss of its own, and the network comes out trained.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn

import layerwise


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU())
        self.residual = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32))
        self.output = nn.Linear(32 * 4 * 4, 10)

    def forward(self, x):  # (B, 1, 8, 8)
        x = self.stem(x)
        x = torch.relu(x + self.residual(x))
        return self.output(nn.functional.max_pool2d(x, 2).flatten(1))


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
x, x_test, y, y_test = train_test_split(images, torch.tensor(digits.target), random_state=0)
torch.manual_seed(0)
network = Network()
learner = layerwise.localize(network, sample=x[:2], num_classes=10, seed=0)
for _ in range(10):
    for batch in torch.randperm(len(x)).split(64)[:-1]:
        result = learner.step(x[batch], y[batch])
for unit, accuracy in zip(learner.units, result.accuracies, strict=True):
    print(f"unit {unit.name}: {accuracy:.0f}% of the last batch by its own classifier")
correct = network.eval()(x_test).argmax(1) == y_test
print(f"network: {correct.float().mean():.1%} of the test images")
