"""Where in depth and when in training the classes become separable, as a picture; 14 seconds.

A deep network is trained by local losses and by global backpropagation. After every epoch, a linear
probe reads the classes from each unit's features. Writes separability_map.png.
"""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import layerwise

EPOCHS = 6
digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
labels = torch.tensor(digits.target)
x, x_test, y, y_test = train_test_split(images, labels, test_size=0.4, random_state=0)
figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for axes, (title, at) in zip(panels, {"layer-wise": "layer", "global": 1}.items(), strict=True):
    torch.manual_seed(0)
    network = layerwise.create_model("resnet18", width=1 / 8, in_chans=1, image_size=8)
    learner = layerwise.localize(network, x[:2], 10, at=at, seed=0)
    accuracies = []  # (epochs, depths)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(x)).split(64)[:-1]:
            learner.step(x[batch], y[batch])
        rows = layerwise.separability(network, (x_test, y_test), measures=["linear_probe"])
        accuracies.append([row["linear_probe"] for row in rows])
    extent = (-0.5, len(rows) - 0.5, 0.5, EPOCHS + 0.5)
    options = {"extent": extent, "origin": "lower", "aspect": "auto", "vmin": 50, "vmax": 100}
    drawn = axes.imshow(accuracies, cmap="cividis", **options)
    axes.set(title=title, xlabel="depth, units (0: the image)", xticks=range(0, len(rows), 3))
    print(f"{title}: {max(accuracies[-1]):.1f}% at best, {accuracies[-1][-1]:.1f}% at the output")
panels[0].set_ylabel("epoch")
figure.colorbar(drawn, ax=panels, label="accuracy of a linear probe, %", extend="min")
figure.savefig("separability_map.png", dpi=150)
print("written: separability_map.png")
