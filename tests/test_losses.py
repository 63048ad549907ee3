"""What the contract does not say of losses: options, pooling, outputs, refusals."""

import pytest
import torch
from torch.nn import functional as F

from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES, Output, Site, Targets, create_loss
from layerwise.losses.pred import pooling_kernel


@pytest.mark.parametrize(
    ("shape", "limit", "kernel"),
    [
        ((256, 32, 32), 2048, (16, 8)),  # 256 · 2 · 4
        ((128, 32, 32), 2048, (8, 8)),
        ((512, 4, 4), 2048, (2, 2)),
        ((512, 4, 4), 8192, (1, 1)),
        ((64, 5, 3), 64, (5, 3)),
        ((9000, 2, 2), 4096, (2, 2)),  # cannot get smaller than the channels
    ],
)
def test_pooling_halves_height_then_width(shape: tuple[int, int, int], limit: int, kernel: tuple[int, int]) -> None:
    assert pooling_kernel(shape, limit) == kernel


@pytest.mark.parametrize("loss", LOSSES)
def test_the_last_unit_learns_by_cross_entropy_of_the_networks_own_logits(loss: str) -> None:
    logits, labels = torch.randn(8, 5), torch.randint(0, 5, (8,))
    head = create_loss(loss, Site(3, 4, (5,), 5))
    value, correct = head(logits, Targets(labels, 5))
    scale = 0.01 if loss in ("predsim", "predsim-lite") else 1.0  # 1 − β, as the published program scales it
    assert isinstance(head, Output)
    assert not list(head.parameters())
    assert value.item() == pytest.approx(scale * F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert int(correct) == int((logits.argmax(1) == labels).sum())


def test_a_classifier_starts_undecided() -> None:
    head = create_loss("pred", Site(0, 2, (6, 4, 4), 10))
    value, _ = head(torch.randn(5, 6, 4, 4), Targets(torch.arange(5), 10))
    assert value.item() == pytest.approx(torch.log(torch.tensor(10.0)).item(), abs=0.6)  # the bias is PyTorch's default


def test_labels_similarity_is_computed_once_per_batch() -> None:
    targets = Targets(torch.tensor([0, 1, 0]), 3)
    assert targets.similarity is targets.similarity
    assert torch.allclose(targets.similarity, torch.tensor([[1.0, -0.5, 1.0], [-0.5, 1.0, -0.5], [1.0, -0.5, 1.0]]), atol=1e-6)


def test_sim_counts_nearest_neighbours_of_the_same_class() -> None:
    head = create_loss("sim", Site(0, 2, (4,), 2))
    torch.nn.init.eye_(head.transform.weight)
    features = torch.tensor([[1.0, 0, 0, 0], [0.9, 0.1, 0, 0], [0, 0, 1.0, 0], [0, 0, 0.9, 0.1]])
    assert int(head(features, Targets(torch.tensor([0, 0, 1, 1]), 2)).correct) == 4
    assert int(head(features, Targets(torch.tensor([0, 1, 0, 1]), 2)).correct) == 0


def test_gradients_are_finite_where_features_are_constant() -> None:
    head = create_loss("predsim", Site(0, 2, (6, 4, 4), 3))
    features = torch.zeros(4, 6, 4, 4, requires_grad=True)
    head(features, Targets(torch.tensor([0, 1, 2, 0]), 3)).loss.backward()
    assert features.grad is not None
    assert bool(torch.isfinite(features.grad).all())


@pytest.mark.parametrize(
    ("loss", "shape", "options", "words"),
    [
        ("predsin", (4,), {}, "did you mean 'predsim'"),
        ("predsim", (4,), {"beta": 1.5}, "beta 1.5 is out of range"),
        ("predsim", (4,), {"gamma": 1}, "no option 'gamma': accepted: beta, decoder_dim, head_channels"),
        ("sim", (4,), {"beta": 0.5}, "accepted: head_channels"),
        ("pred", (4,), {"decoder_dim": 0}, "decoder_dim 0 is too small"),
        ("pred", (4, 7), {}, "maps \\(C, H, W\\) or vectors"),
    ],
)
def test_refusals(loss: str, shape: tuple[int, ...], options: dict[str, float], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        create_loss(loss, Site(0, 2, shape, 3), **options)
