"""The largest batch that a memory limit allows, by each rule, known before training; 11 seconds.

layerwise.predict_peak counts the bytes of a training step without making it: weights, heads,
gradients, optimizer state, activations. The network is then trained with the batch that fits.
"""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import layerwise

LIMIT = 5_000_000  # bytes
SIZES = (256, 128, 64, 32)


def predicted(network, batch_size, rule):
    return layerwise.predict_peak(network, (batch_size, 1, 8, 8), 10, rule, loss="pred")


digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
x, x_test, y, y_test = train_test_split(images, torch.tensor(digits.target), random_state=0)
torch.manual_seed(0)
options = {"hierarchy": (3, 1, 1, 1), "width": 1 / 8, "in_chans": 1, "image_size": 8}
network = layerwise.create_model("resnet18", **options)
for rule in ("global", "checkpointed", "sequential", "simultaneous"):
    needs = ((size, predicted(network, size, rule)) for size in SIZES)
    size, need = next((size, need) for size, need in needs if need <= LIMIT)
    print(f"{rule}: batches of {size}, which need {need / 1e6:.1f} of {LIMIT / 1e6:.1f} MB")
learner = layerwise.localize(network, x[:2], 10, loss="pred", seed=0)
for _ in range(12):
    for batch in torch.randperm(len(x)).split(size)[:-1]:
        learner.step(x[batch], y[batch])
accuracy = (network.eval()(x_test).argmax(1) == y_test).float().mean()
print(f"trained by {rule} updates: {accuracy:.1%} of the test images")
