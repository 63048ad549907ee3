"""What the contract does not say of losses: options, pooling, outputs, refusals."""

from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES, Output, Pred, Site, Targets, create_loss
from layerwise.losses.biological import BiologicalPred
from layerwise.losses.sim import count_nearest
from layerwise.losses.site import classifies
from layerwise.losses.terms import declaring_terms
from layerwise.ops.pooling import pooling_kernel
from layerwise.ops.spatial_std import spatial_deviation
from layerwise.utils.options import options_of


@pytest.mark.parametrize(
    ("shape", "limit", "kernel"),
    [
        ((256, 32, 32), 2048, (16, 8)),  # 256 · 2 · 4
        ((128, 32, 32), 2048, (8, 8)),
        ((512, 4, 4), 2048, (2, 2)),
        ((512, 4, 4), 8192, None),
        ((512,), 64, None),
        ((64, 5, 3), 64, (5, 3)),
        ((9000, 2, 2), 4096, (2, 2)),  # cannot get smaller than the channels
    ],
)
def test_pooling_halves_height_then_width(
    shape: tuple[int, ...], limit: int, kernel: tuple[int, int] | None
) -> None:
    assert pooling_kernel(shape, limit) == kernel


@pytest.mark.parametrize("loss", LOSSES)
def test_the_last_unit_learns_by_cross_entropy_of_the_networks_own_logits(loss: str) -> None:
    logits, labels = torch.randn(8, 5), torch.randint(0, 5, (8,))
    head = create_loss(loss, Site(3, 4, (5,), 5))
    value, correct = head(logits, Targets(labels, 5))
    # 1 − β, as the published program scales it
    scale = 0.01 if loss in ("predsim", "predsim-lite") else 1.0
    assert isinstance(head, Output)
    assert not list(head.parameters())
    assert value.item() == pytest.approx(scale * F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert int(correct) == int((logits.argmax(1) == labels).sum())


@pytest.mark.parametrize("loss", ["pred", "biological-pred"])
def test_a_classifier_starts_undecided(loss: str) -> None:
    head: Any = create_loss(loss, Site(0, 2, (6, 4, 4), 10))
    assert not head.classifier.weight.any()
    logits = head.logits(torch.randn(5, 6, 4, 4))
    assert torch.equal(logits, logits[:1].expand(5, 10))  # the bias alone


def test_labels_similarity_is_computed_once_per_batch() -> None:
    targets = Targets(torch.tensor([0, 1, 0]), 3)
    assert targets.similarity is targets.similarity
    assert torch.allclose(
        targets.similarity,
        torch.tensor([[1.0, -0.5, 1.0], [-0.5, 1.0, -0.5], [1.0, -0.5, 1.0]]),
        atol=1e-6,
    )


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
        ("predsin", (4,), {}, "Cannot use loss 'predsin': it is unknown. Did you mean 'predsim'"),
        ("predsim", (4,), {"beta": 1.5}, "beta 1.5: it is out of range"),
        (
            "predsim",
            (4,),
            {"gamma": 1},
            "option 'gamma' with loss 'predsim': it is unknown. Accepted: beta, decoder_dim",
        ),
        ("sim", (4,), {"beta": 0.5}, "Accepted: similarity_size, similarity_channels"),
        ("pred", (4,), {"decoder_dim": 0}, "decoder_dim 0: it is too small"),
        ("pred", (4, 7), {}, "maps \\(C, H, W\\) or vectors"),
    ],
)
def test_refusals(loss: str, shape: tuple[int, ...], options: dict[str, float], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        create_loss(loss, Site(0, 2, shape, 3), **options)


def test_options_of_another_type_are_refused() -> None:
    for loss, factory in LOSSES.items():
        for name in options_of(declaring_terms(factory)).keys() - {"head_loss"}:
            words = rf"Cannot use {name}=\[1\] \(option of the loss '{loss}'\): it is not of type"
            with pytest.raises(InvalidInput, match=words):
                create_loss(loss, Site(0, 2, (4, 3, 3), 3), **{name: [1]})


def test_numbers_of_numpy_and_callables_in_place_of_names_are_options_too() -> None:
    site = Site(0, 2, (4, 3, 3), 3)
    assert create_loss("predsim", site, beta=np.float32(0.5)).beta == 0.5
    assert len(create_loss("dgl-cnn", site, head_layers=np.int64(1)).head) == 5
    with pytest.raises(InvalidInput, match="its site does not say what follows"):
        create_loss("look-ahead", site, head_loss=Pred)


def test_a_single_example_has_no_nearest() -> None:
    assert count_nearest(torch.ones(1, 1), Targets(torch.zeros(1, dtype=torch.long), 3)) == 0


class Scaled(Pred):
    def __init__(self, site: Site, *, scale: float = 1.0) -> None:
        super().__init__(site)


def test_the_output_of_a_loss_of_ones_own_is_plain_whatever_its_options() -> None:
    logits, targets = torch.randn(4, 3), Targets(torch.tensor([0, 1, 2, 0]), 3)
    output = create_loss(Scaled, Site(1, 2, (3,), 3), scale=7.0)
    assert output(logits, targets).loss == F.cross_entropy(logits, targets.labels)


@pytest.mark.parametrize("loss", ["pred", "biological-pred", "biological-sim"])
@pytest.mark.parametrize("tokens", [False, True])
def test_heads_of_a_network_in_bfloat16(loss: str, tokens: bool) -> None:
    torch.manual_seed(0)
    head = create_loss(loss, Site(0, 2, (8, 5, 1), 3, tokens=tokens))
    features, targets = torch.randn(6, 8, 5, 1), Targets(torch.arange(6) % 3, 3)
    features = features.bfloat16()
    exact = head(features.float(), targets).loss
    rounded, correct = head.bfloat16()(features.requires_grad_(), targets)
    rounded.backward()
    assert torch.isclose(rounded.float(), exact, rtol=0.02)
    assert 0 <= correct <= 6
    assert bool(features.grad.isfinite().all())


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("shape", [(5, 7, 9, 6), (3, 2, 1, 2), (40, 300, 8, 8)])
def test_the_deviation_over_space_is_that_of_torch(
    shape: tuple[int, ...], memory_format: torch.memory_format
) -> None:
    maps = (
        torch.randn(shape, dtype=torch.float64)
        .contiguous(memory_format=memory_format)
        .requires_grad_()
    )
    weights = torch.randn(shape[:2], dtype=torch.float64)
    expected = maps.std((2, 3))
    (gradient,) = torch.autograd.grad((expected * weights).sum(), maps)
    found = spatial_deviation(maps * 1)
    assert torch.allclose(found, expected)
    (found_gradient,) = torch.autograd.grad((found * weights).sum(), maps)
    assert torch.allclose(found_gradient, gradient)


def test_the_deviation_over_space_of_rounded_maps_is_computed_in_float32() -> None:
    maps = 100 + torch.randn(4, 3, 16, 16).bfloat16()
    found = spatial_deviation(maps.clone())
    assert found.dtype == torch.float32
    assert torch.allclose(found, maps.float().std((2, 3)), rtol=1e-5)


def test_the_deviation_over_space_refuses_a_second_backward_pass() -> None:
    maps = torch.randn(2, 3, 4, 4, requires_grad=True)
    total = spatial_deviation(maps * 1).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="asked for twice"):
        total.backward()


def test_predsim_lite_is_predsim_on_averaged_features() -> None:
    """Where nothing is left out (channels are few enough), only the averaging differs."""
    features, targets = torch.randn(6, 5, 16, 16), Targets(torch.tensor([0, 1, 2, 0, 1, 2]), 3)
    lite = create_loss("predsim-lite", Site(0, 2, (5, 16, 16), 3))
    exact = create_loss("predsim", Site(0, 2, (5, 8, 8), 3), similarity_size=4)
    exact.load_state_dict(lite.state_dict())
    assert torch.equal(lite(features, targets).loss, exact(F.avg_pool2d(features, 2), targets).loss)


def test_predsim_lite_mixes_wide_features_into_few_channels() -> None:
    head = create_loss("predsim-lite", Site(0, 2, (2048, 4, 4), 10))
    assert [tuple(weight.shape) for weight in head.sim.parameters()] == [
        (256, 2048, 1, 1),
        (256, 256, 3, 3),
    ]
    exact = create_loss("predsim", Site(0, 2, (32, 4, 4), 10))
    assert [tuple(weight.shape) for weight in exact.sim.parameters()] == [(32, 32, 3, 3)]


@pytest.mark.parametrize("option", ["head_size", "similarity_size", "similarity_channels"])
def test_predsim_lite_refuses_nothing_at_all(option: str) -> None:
    with pytest.raises(InvalidInput, match=f"{option} 0: it is too small"):
        create_loss("predsim-lite", Site(0, 2, (8, 4, 4), 10), **{option: 0})


@pytest.mark.parametrize("value", [0.1, -3.3, 7e4])
@pytest.mark.parametrize("side", [3, 5, 7, 8, 14])
def test_a_constant_channel_deviates_by_nothing(side: int, value: float) -> None:
    maps = torch.randn(4, 3, side, side)
    maps[:, 1], maps[2] = value, -value
    own, wanted = maps.clone().requires_grad_(), maps.clone().requires_grad_()
    # the gradient is written over the maps, as nothing else reads them
    deviation = spatial_deviation(own * 1.0)
    expected = wanted.double().std((2, 3))
    assert (deviation[:, 1] == 0).all()
    assert (deviation[2] == 0).all()
    torch.testing.assert_close(deviation, expected.float())
    deviation.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(own.grad, wanted.grad)


@pytest.mark.parametrize("loss", ["sim", "predsim", "lls", "infopro-contrast", "biological-sim"])
def test_an_example_without_features_has_no_gradient(loss: str) -> None:
    """A length of 0 has no direction, and a tiny one no gradient as large as its inverse."""
    torch.manual_seed(0)
    site = Site(0, 3, (6,), 4, image_shape=(3, 4, 4), entering=(6,))
    head = create_loss(loss, site)
    features = torch.randn(8, 6)
    features[0], features[1] = 0.0, 1e-8
    features.requires_grad_()
    images = torch.rand(8, 3, 4, 4)
    head(features, Targets(torch.arange(8) % 4, 4, images)).loss.backward()
    gradient = features.grad
    assert gradient is not None
    assert bool(gradient.isfinite().all())
    assert gradient[2:].abs().max() > 0
    assert gradient[:2].abs().max() < 10 * gradient[2:].abs().max()


@pytest.mark.parametrize(("task", "learns"), [(0.0, False), (1.0, True)])
def test_a_classifier_without_weight_is_none(task: float, learns: bool) -> None:
    site = Site(0, 3, (6,), 4, image_shape=(3, 4, 4))
    assert classifies(create_loss("infopro", site, task=task, task_last=1.0)) == learns
    assert not classifies(create_loss("infopro-contrast", site))


def test_feedback_is_as_large_as_the_weights_of_a_new_layer() -> None:
    head = create_loss("biological-pred", Site(0, 3, (400,), 4))
    assert isinstance(head, BiologicalPred)
    assert head.feedback.abs().max() <= 0.05
    assert head.feedback.std().item() == pytest.approx(0.05 / 3**0.5, rel=0.02)
    assert not head.classifier.bias.any()
