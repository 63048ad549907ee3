"""Measures of features, each against scikit-learn or the plain formula on the same features.

What all of them promise is in test_contract.py.
"""

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.covariance import shrunk_covariance
from sklearn.linear_model import RidgeClassifier
from sklearn.neighbors import KNeighborsClassifier, NearestCentroid
from torch import Tensor

from layerwise.errors import InvalidInput
from layerwise.measures import MEASURES
from layerwise.measures.base import FOLDS, Accuracy, folds, parts
from layerwise.measures.cka import linear_cka
from layerwise.measures.fisher import SHRINKAGE
from layerwise.measures.linear_probe import STRENGTHS
from layerwise.measures.nearest_neighbours import NEIGHBOURS
from tests.contract import noisy_digits

CLASSES = 10
ACCURACIES = [name for name in MEASURES if isinstance(MEASURES[name], Accuracy)]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return noisy_digits()


def score(classifier: Any, features: Tensor, labels: Tensor, known: Tensor, held: Tensor) -> float:
    values, names = features.numpy().astype(np.float64), labels.numpy()
    return 100 * classifier.fit(values[known], names[known]).score(values[held], names[held])


def test_parts_are_of_every_class_and_share_no_image(digits: tuple[Tensor, Tensor]) -> None:
    labels = digits[1]
    divided = parts(labels)
    assert torch.equal(torch.cat(divided).sort().values, torch.arange(len(labels)))
    for part, share in zip(divided, (0.5, 0.1, 0.4), strict=True):
        expected = share * labels.bincount().double()
        assert torch.all((labels[part].bincount(minlength=CLASSES) - expected).abs() <= 1)
    assert all(torch.equal(one, other) for one, other in zip(divided, parts(labels), strict=True))


def test_linear_probe_is_ridge_regression(digits: tuple[Tensor, Tensor]) -> None:
    features, labels = digits
    fit, choose, held = parts(labels)
    values = features[fit].double()
    scale = float((values - values.mean(0)).square().sum() / features.shape[1])
    tried = [
        score(RidgeClassifier(alpha=s * scale), features, labels, fit, choose) for s in STRENGTHS
    ]
    best = STRENGTHS[int(np.argmax(tried))]
    expected = score(RidgeClassifier(alpha=best * scale), features, labels, fit, held)
    assert len(set(tried)) > 1
    assert MEASURES["linear_probe"](features, labels) == pytest.approx(expected, abs=1e-9)


def test_cross_fitted_probe_is_ridge_regression_on_every_fold(
    digits: tuple[Tensor, Tensor],
) -> None:
    features, labels = digits
    pieces = folds(labels)
    assert torch.equal(torch.cat(pieces).sort().values, torch.arange(len(labels)))
    assert all(
        torch.all((labels[piece].bincount() - labels.bincount() / FOLDS).abs() <= 1)
        for piece in pieces
    )
    right, chosen = 0.0, set()
    for number, held in enumerate(pieces):
        others = [pieces[(number + further) % FOLDS] for further in range(1, FOLDS)]
        choose, fit = others[0], torch.cat(others[1:])
        values = features[fit].double()
        scale = float((values - values.mean(0)).square().sum() / features.shape[1])
        tried = [
            score(RidgeClassifier(alpha=s * scale), features, labels, fit, choose)
            for s in STRENGTHS
        ]
        best = STRENGTHS[int(np.argmax(tried))]
        chosen.add(best)
        right += score(RidgeClassifier(alpha=best * scale), features, labels, fit, held) * len(held)
    assert len(chosen) > 1
    assert MEASURES["cross_fitted_probe"](features, labels) == pytest.approx(
        right / len(labels), abs=1e-9
    )


def test_nearest_class_mean_is_nearest_centroid(digits: tuple[Tensor, Tensor]) -> None:
    features, labels = digits
    fit, choose, held = parts(labels)
    expected = score(NearestCentroid(), features, labels, torch.cat([fit, choose]), held)
    assert MEASURES["nearest_class_mean"](features, labels) == pytest.approx(expected, abs=1e-9)


def test_nearest_neighbours_are_those_of_scikit_learn(digits: tuple[Tensor, Tensor]) -> None:
    features, labels = digits
    fit, choose, held = parts(labels)
    classifier = KNeighborsClassifier(NEIGHBOURS, algorithm="brute")
    expected = score(classifier, features, labels, torch.cat([fit, choose]), held)
    assert MEASURES["nearest_neighbours"](features, labels) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("factor", [1e20, 1e-24])
@pytest.mark.parametrize("name", ACCURACIES)
def test_accuracies_do_not_depend_on_the_scale(
    name: str, factor: float, digits: tuple[Tensor, Tensor]
) -> None:
    features, labels = digits
    plain = MEASURES[name](features, labels)
    assert MEASURES[name](features * factor, labels) == pytest.approx(plain, abs=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fisher_is_infinite_where_classes_are_points(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(79) % 4
    points = torch.randn(4, 6, dtype=dtype, generator=generator)[labels]
    with pytest.raises(InvalidInput, match="it is infinite"):
        MEASURES["fisher"](points, labels)


def test_fisher_is_its_formula(digits: tuple[Tensor, Tensor]) -> None:
    values, labels = digits[0].numpy().astype(np.float64), digits[1].numpy()
    within, between = np.zeros((64, 64)), np.zeros((64, 64))
    for label in range(CLASSES):
        members = values[labels == label]
        within += (members - members.mean(0)).T @ (members - members.mean(0)) / len(values)
        step = members.mean(0) - values.mean(0)
        between += len(members) / len(values) * np.outer(step, step)
    expected = np.trace(np.linalg.inv(shrunk_covariance(within, SHRINKAGE)) @ between)
    assert MEASURES["fisher"](*digits) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("images", [40, 500])
def test_effective_rank_is_the_entropy_of_singular_values(
    digits: tuple[Tensor, Tensor], images: int
) -> None:
    features, labels = digits[0][:images], digits[1][:images]
    values = features.numpy().astype(np.float64)
    singular = np.linalg.svd(values - values.mean(0), compute_uv=False)
    shares = singular[singular > 1e-9] / singular.sum()
    expected = np.exp(-np.sum(shares * np.log(shares)))
    assert MEASURES["effective_rank"](features, labels) == pytest.approx(expected, rel=1e-4)


def test_linear_cka_is_kernel_alignment(digits: tuple[Tensor, Tensor]) -> None:
    one = digits[0][:200]
    other = torch.relu(one @ torch.randn(64, 30, generator=torch.Generator().manual_seed(0)))
    centring = np.eye(200) - 1 / 200
    kernels = [
        centring @ (x @ x.T) @ centring for x in (one.double().numpy(), other.double().numpy())
    ]
    norms = np.linalg.norm(kernels[0]) * np.linalg.norm(kernels[1])
    assert linear_cka(one, other) == pytest.approx(
        np.sum(kernels[0] * kernels[1]) / norms, rel=1e-9
    )
    rotation = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(1))).Q
    assert linear_cka(one, 3 * one @ rotation + 5) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("name", [*ACCURACIES, "fisher"])
def test_separability_is_of_the_labels(name: str, digits: tuple[Tensor, Tensor]) -> None:
    features, labels = digits
    shuffled = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]
    assert MEASURES[name](features, labels) > 3 * MEASURES[name](features, shuffled)


def test_probes_need_some_images_of_each_class() -> None:
    with pytest.raises(InvalidInput, match=r"class 1 has 3 images, .* Give 4 or more"):
        MEASURES["linear_probe"](torch.randn(9, 4), torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 1]))
    with pytest.raises(InvalidInput, match="infinite"):
        MEASURES["fisher"](torch.arange(8.0).remainder(2).unsqueeze(1), torch.arange(8) % 2)
    for others, sentence in (
        (torch.ones(9, 4), "are the same"),
        (torch.randn(8, 4), "of 9 and of 8 images"),
    ):
        with pytest.raises(InvalidInput, match=sentence):
            linear_cka(torch.randn(9, 4), others)


@pytest.mark.parametrize("count", [8, 32, 128])
@pytest.mark.parametrize("active", [1, 2])
def test_a_nearly_dead_unit_is_measured(active: int, count: int) -> None:
    """Features that are zero for all images but a few, as behind a ReLU that has all but died."""
    labels = torch.arange(200) % 10
    for seed in range(6):
        torch.manual_seed(seed)
        features = torch.zeros(200, count)
        features[:active] = torch.rand(active, count)
        value = MEASURES["cross_fitted_probe"](features, labels)
        assert 10.0 - 100.0 * active / 200 <= value <= 10.0 + 100.0 * active / 200
