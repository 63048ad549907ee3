"""A smaller student from a trained network, unit by unit and without labels; 10 seconds.

Each unit learns to have the features of the teacher's unit (loss "match"), with a learned 1×1
convolution in between, since it has half of the channels. Unit after unit trains to the end.
"""

from functools import partial

import torch

import layerwise
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import prepare

DIGITS = {"hierarchy": (1, 1, 1, 1), "in_chans": 1, "image_size": 8}
data = prepare(Run(data="digits", batch_size=32), Execution()).load_data()
sample = torch.zeros(2, 1, 8, 8)


def accuracy(network):
    network.eval()
    pairs = [(network(x).argmax(1), y) for x, y in data.test.in_order()]
    return torch.cat([guess == label for guess, label in pairs]).float().mean()


def train(network, rule, epochs, **options):
    adam = partial(torch.optim.Adam, lr=3e-3)
    learner = layerwise.localize(network, sample, 10, optimizer=adam, seed=0, **options)
    for _ in layerwise.RULES[rule].order(learner, data.train, epochs, lambda done: 1 - done):
        pass
    weights = sum(weight.numel() for weight in network.parameters())
    return f"{accuracy(network):.1%} with {weights:,} weights"


torch.manual_seed(0)
teacher = layerwise.create_model("resnet18", width=1 / 8, **DIGITS)
print("teacher:", train(teacher, "global", 6, at=1))
student = layerwise.create_model("resnet18", width=1 / 16, **DIGITS)
options = {"loss": "match", "teacher": teacher, "at": "block"}
print("student:", train(student, "sequential", 4, **options))
