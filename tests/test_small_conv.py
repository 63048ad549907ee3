"""Convolutions of small maps as matrix products: the same numbers as PyTorch's, and only where they
are meant to be.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.ops import small_conv
from layerwise.ops.small_conv import MOST_PIXELS, WEIGHT_PIXELS, Convolution
from tests.helpers import same_weights

MEMORY_FORMATS = pytest.mark.parametrize(
    "memory_format",
    [torch.contiguous_format, torch.channels_last],
    ids=["contiguous", "channels-last"],
)


@pytest.fixture
def matrix_unit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor with a matrix unit, and products of convolutions of any width."""
    monkeypatch.setattr(small_conv, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(small_conv, "has_matrix_unit", lambda: True)


def plain(own: Convolution) -> nn.Conv2d:
    made = nn.Conv2d(own.in_channels, own.out_channels, 3, padding=1, bias=own.bias is not None)
    made.load_state_dict(own.state_dict())
    return made


def passes(layer: nn.Module, maps: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and gradients of a weighted sum of it."""
    leaf = maps.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(leaf * 1)
    (out.float() * weights).sum().backward()
    return [out.detach(), leaf.grad, *(parameter.grad for parameter in layer.parameters())]


@MEMORY_FORMATS
@pytest.mark.usefixtures("matrix_unit")
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 2), (1, 5), (3, 3), (4, 4), (2, 6)])
def test_the_numbers_are_those_of_pytorch(
    size: tuple[int, int], bias: bool, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    own = Convolution(5, 7, bias=bias)
    other = plain(own)
    for layer in (own, other):
        layer.to(memory_format=memory_format)  # type: ignore[call-overload, unused-ignore]
    maps = torch.randn(6, 5, *size).contiguous(memory_format=memory_format)
    weights = torch.randn(6, 7, *size)
    found, expected = passes(own, maps, weights), passes(other, maps, weights)
    for one, true in zip(found, expected, strict=True):
        assert one.dtype == true.dtype
        torch.testing.assert_close(one, true, rtol=3e-2, atol=6e-2)
    assert found[0].is_contiguous(memory_format=memory_format)
    assert found[1].is_contiguous(memory_format=memory_format)


def test_gradients_are_exact() -> None:
    torch.manual_seed(0)
    layer = Convolution(2, 3).double()
    maps = torch.randn(2, 2, 2, 3, dtype=torch.double, requires_grad=True)
    weight, bias = layer.weight, layer.bias
    assert torch.autograd.gradcheck(
        lambda *given: small_conv.Product.apply(*given, True), (maps, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda *given: small_conv.Product.apply(*given, None, False), (maps, weight)
    )


SMALL = {"pixels": WEIGHT_PIXELS, "amp": True, "training": True, "least": 0, "unit": True}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, True),
        ({"pixels": MOST_PIXELS}, True),
        ({"pixels": WEIGHT_PIXELS + 1}, False),
        ({"amp": False}, False),  # float32
        ({"unit": False}, False),
        ({"training": False}, False),  # evaluating, as PyTorch does
        ({"least": 1 << 20}, False),  # too narrow to make a difference
    ],
    ids=str,
)
def test_products_are_taken_where_they_pay(
    changed: dict[str, Any], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = SMALL | changed
    monkeypatch.setattr(small_conv, "LEAST_WEIGHTS", case["least"])
    monkeypatch.setattr(small_conv, "has_matrix_unit", lambda: case["unit"])
    layer = Convolution(4, 4, bias=False).train(case["training"])
    with torch.autocast("cpu", torch.bfloat16, enabled=case["amp"]):
        out = layer(torch.randn(2, 4, 1, case["pixels"]))
    assert ("Product" in type(out.grad_fn).__name__) == expected


@pytest.mark.usefixtures("matrix_unit")
@pytest.mark.parametrize("model", ["vgg16", "resnet18", "resnet50"])
def test_networks_learn_the_same(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network = layerwise.create_model(model, width=1 / 16, image_size=16)
    images, labels = torch.randn(12, 3, 16, 16), torch.arange(12) % 10
    found = []
    for unit in (True, False):
        monkeypatch.setattr(small_conv, "has_matrix_unit", lambda unit=unit: unit)
        learner = layerwise.localize(copy.deepcopy(network), images, 10, seed=0, amp=torch.bfloat16)
        losses = [learner.step(images, labels).losses for _ in range(2)]
        found.append((losses, learner.model))
    for one, other in zip(*(losses for losses, _ in found), strict=True):
        assert one == pytest.approx(other, rel=2e-2)
    # products were taken, which round differently
    assert not same_weights(found[0][1], found[1][1])


def test_the_layer_is_saved_and_cut_as_any_convolution() -> None:
    network = layerwise.create_model("vgg8b", width=1 / 16, image_size=8)
    assert {type(module) for module in network.modules() if isinstance(module, nn.Conv2d)} == {
        Convolution
    }
    learner = layerwise.localize(network, torch.zeros(2, 3, 8, 8), 10)
    assert [unit.name for unit in learner.units][:2] == ["stages.0.0.conv", "stages.0.1.conv"]
    assert "stages.0.0.conv.weight" in network.state_dict()
