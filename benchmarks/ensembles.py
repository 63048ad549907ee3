"""Ensembles of the local heads of trained runs, by weights over depth, of logits or probabilities.

    python benchmarks/ensembles.py runs/ensembles/* --csv results/ensembles.csv

A row per run: test accuracy of the last unit, of the head that is best on validation, and of the
weighted sum of all heads' logits or probabilities. Weights are equal, linear in depth (1, 2, 3, …),
or fitted: those with the smallest cross-entropy on the validation images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from layerwise.core.early_exit import can_end, exit_logits
from layerwise.core.learner import Learner
from layerwise.data import Loader
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, run_words
from layerwise.training.prepare import prepare
from layerwise.training.saved import trained_learner
from layerwise.utils.csv_text import csv_text, write_csv

STEPS = 200  # of the fit


@torch.no_grad()
def all_logits(learner: Learner, loader: Loader) -> tuple[Tensor, Tensor]:
    """Logits of all heads, (units, N, classes), and labels (N,)."""
    learner.train(False)
    logits, labels = list[Tensor](), list[Tensor]()
    for images, answers in loader.in_order():
        activations, heads = (images,), list[Tensor]()
        for unit in learner.units:
            activations = unit.forward(activations)
            if can_end(learner.units, unit):
                heads.append(exit_logits(learner.units, unit, activations).float())
        logits.append(torch.stack(heads))
        labels.append(answers)
    return torch.cat(logits, 1), torch.cat(labels)


def fitted(logits: Tensor, labels: Tensor) -> Tensor:
    """Weights of probabilities that sum to 1, with the smallest cross-entropy on a set."""
    scores = torch.zeros(len(logits), requires_grad=True)
    optimizer = torch.optim.Adam([scores], lr=0.1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        F.nll_loss(weighted(logits.softmax(2), scores.softmax(0)).log(), labels).backward()
        optimizer.step()
    return scores.softmax(0).detach()


def weighted(values: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("u,unc->nc", weights, values)


def accuracy(scores: Tensor, labels: Tensor) -> float:
    return round(100 * (scores.argmax(1) == labels).double().mean().item(), 2)


def row_of(path: str, data_dir: str) -> dict[str, object]:
    """The accuracies of a run, in percent."""
    folder = RunFolder(path)
    prepared = prepare(folder.run(), Execution(device="cpu", data_dir=data_dir))
    data = prepared.load_data()
    assert data.validation is not None
    learner = trained_learner(folder, prepared, data)
    held_out, answers = all_logits(learner, data.validation)
    logits, labels = all_logits(learner, data.test)
    shares = logits.softmax(2)
    alike = torch.ones(len(logits))
    linear = torch.arange(1.0, len(logits) + 1)
    best = max(range(len(logits)), key=lambda unit: accuracy(held_out[unit], answers))
    return {
        "run": run_words(prepared.run),
        "units": len(logits),
        "span": learner.span,
        "last unit": accuracy(logits[-1], labels),
        "best on validation": accuracy(logits[best], labels),
        "probabilities, alike": accuracy(weighted(shares, alike), labels),
        "probabilities, linear": accuracy(weighted(shares, linear), labels),
        "probabilities, fitted": accuracy(weighted(shares, fitted(held_out, answers)), labels),
        "logits, alike": accuracy(weighted(logits, alike), labels),
        "logits, linear": accuracy(weighted(logits, linear), labels),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="folders of finished runs by local losses")
    parser.add_argument("--data-dir", default="data", help="folder of the data set's files")
    parser.add_argument("--csv", type=Path, help="also write the table to this file")
    parsed = parser.parse_args(arguments)
    rows = [row_of(path, parsed.data_dir) for path in parsed.runs]
    if parsed.csv:
        write_csv(parsed.csv, tuple(rows[0]), rows)
    print(csv_text(tuple(rows[0]), rows), end="")


if __name__ == "__main__":
    main()
