"""Training that is interrupted in the middle and goes on to the same bits; 7 seconds.

The learner's state_dict holds the network, the heads and every unit's optimizer. With seed=, heads
and dropout masks depend on seed, unit and step alone. Writes state.pt.
"""

import torch
from sklearn.datasets import load_digits

import layerwise

EPOCHS = 4
digits = load_digits()
x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
y = torch.tensor(digits.target)


def new_learner():
    torch.manual_seed(0)
    network = layerwise.create_model("vgg8", width=1 / 8, in_chans=1, image_size=8, dropout=0.2)
    return layerwise.localize(network, x[:2], num_classes=10, seed=0)


def train(learner, epochs):
    for epoch in epochs:
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(epoch))
        for batch in order.split(64)[:-1]:
            learner.step(x[batch], y[batch])


uninterrupted, interrupted, resumed = new_learner(), new_learner(), new_learner()
train(uninterrupted, range(EPOCHS))
train(interrupted, range(EPOCHS // 2))
torch.save(interrupted.state_dict(), "state.pt")
resumed.load_state_dict(torch.load("state.pt", weights_only=True))
print(f"saved to state.pt and resumed after {resumed.steps} of {uninterrupted.steps} steps")
train(resumed, range(EPOCHS // 2, EPOCHS))
weights, again = (learner.model.state_dict() for learner in (uninterrupted, resumed))
print("bit-identical:", all(torch.equal(weights[name], again[name]) for name in weights))
