"""A gradient kept as one number per window: the same numbers as average pooling's own, wherever it
ends up.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.losses import Site, Targets, create_loss
from layerwise.ops import batch_norm, pooling
from layerwise.ops.batch_norm import NormalisedActivation
from layerwise.ops.windowed_gradient import Average, WindowedGradient

MEMORY_FORMATS = pytest.mark.parametrize(
    "memory_format",
    [torch.contiguous_format, torch.channels_last],
    ids=["contiguous", "channels-last"],
)


def sized(kernel: tuple[int, int], memory_format: torch.memory_format) -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 5, 4 * kernel[0], 3 * kernel[1]).contiguous(memory_format=memory_format)


@MEMORY_FORMATS
@pytest.mark.parametrize("kernel", [(1, 1), (2, 2), (3, 3), (3, 5), (7, 2), (8, 8), (49, 11)])
def test_the_whole_is_the_gradient_of_average_pooling(
    kernel: tuple[int, int], memory_format: torch.memory_format
) -> None:
    maps = sized(kernel, memory_format).requires_grad_()
    averages = F.avg_pool2d(maps, kernel)
    assert torch.equal(Average.apply(maps, kernel, True), averages)
    gradient = torch.randn_like(averages)
    [expected] = torch.autograd.grad(averages, maps, gradient)
    [dense] = torch.autograd.grad(Average.apply(maps, kernel, False), maps, gradient)
    assert type(dense) is Tensor
    assert torch.equal(dense, expected)
    with torch.no_grad():
        found = Average.backward(Context(maps, kernel, memory_format), gradient)[0]
    assert found.shape == expected.shape
    assert torch.equal(found.whole(), expected)
    assert found.whole().is_contiguous(memory_format=memory_format)
    segments = [segment.whole() for segment in found.segments(2)]
    assert [len(segment) for segment in segments] == [2, 1]
    assert torch.equal(torch.cat(segments), expected)


class Context:
    """What ``Average.forward`` leaves for the backward pass."""

    def __init__(
        self, maps: Tensor, kernel: tuple[int, int], memory_format: torch.memory_format
    ) -> None:
        self.shape, self.area, self.memory_format = maps.shape, kernel[0] * kernel[1], memory_format
        self.windowed = True


@pytest.mark.parametrize("twice", [False, True], ids=["read once", "read twice"])
@pytest.mark.parametrize(
    "operation", [torch.relu, torch.sigmoid, lambda maps: maps * 1, lambda maps: maps.flip(0)[1:]]
)
def test_any_other_operation_gets_the_whole(operation: Any, twice: bool) -> None:
    found = []
    for average in (F.avg_pool2d, lambda maps, kernel: Average.apply(maps, kernel, True)):
        leaf = sized((2, 2), torch.contiguous_format).requires_grad_()
        maps = operation(leaf)
        (average(maps, (2, 2)).square().sum() + (maps.cos().sum() if twice else 0)).backward()
        assert type(leaf.grad) is Tensor
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_a_leaf_gets_a_gradient_that_an_optimizer_can_use() -> None:
    leaf = nn.Parameter(sized((2, 2), torch.contiguous_format))
    before = leaf.detach().clone()
    Average.apply(leaf, (2, 2), True).sum().backward()
    torch.optim.SGD([leaf], lr=1.0).step()
    torch.testing.assert_close(leaf.detach(), before - 0.25)


@MEMORY_FORMATS
@pytest.mark.parametrize("shortcut", [False, True], ids=["alone", "shortcut"])
def test_a_unit_with_the_cheap_head_learns_the_same(
    shortcut: bool, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch_norm, "LARGE_ELEMENTS", 0)
    monkeypatch.setattr(batch_norm, "PART_ELEMENTS", 2 * 8 * 16 * 16)
    labels = torch.arange(6) % 3
    found, windowed = [], []
    for small in (1 << 30, 0):  # the whole gradient; the windowed one
        monkeypatch.setattr(pooling, "LARGE_ELEMENTS", small)
        torch.manual_seed(0)
        norm, loss = (
            NormalisedActivation(8),
            create_loss("predsim-lite", Site(0, 2, (8, 16, 16), 3)),
        )
        maps, added = (
            torch.randn(6, 8, 16, 16).contiguous(memory_format=memory_format).requires_grad_()
            for _ in range(2)
        )
        features = norm(maps * 1, added if shortcut else None)
        assert features.grad_fn is not None
        features.register_hook(lambda gradient: windowed.append(type(gradient) is WindowedGradient))
        loss(features, Targets(labels, 3)).loss.backward()
        parameters = [
            parameter.grad for module in (norm, loss) for parameter in module.parameters()
        ]
        found.append([maps.grad, *([added.grad] if shortcut else []), *parameters])
    assert windowed == [False, True]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_windows_that_overhang_are_left_to_average_pooling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "LARGE_ELEMENTS", 0)
    maps = torch.randn(2, 3, 10, 8, requires_grad=True)
    assert torch.equal(pooling.average_alone(maps, (4, 4)), pooling.average(maps, (4, 4)))
    assert "Average" not in type(pooling.average_alone(maps, (4, 4)).grad_fn).__name__
    assert "Average" in type(pooling.average_alone(maps, (5, 4)).grad_fn).__name__
    assert pooling.average_alone(maps, None) is maps


def test_a_gradient_of_the_gradient_has_its_history() -> None:
    maps = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def penalty(average: Any) -> list[Tensor]:
        loss = (average(maps).flatten(2).mean(2) @ weight).square().sum()
        [gradient] = torch.autograd.grad(loss, maps, create_graph=True)
        return list(torch.autograd.grad(gradient.square().sum(), (maps, weight)))

    pairs = zip(
        penalty(lambda maps: Average.apply(maps, (2, 2), True)),
        penalty(lambda maps: F.avg_pool2d(maps, 2)),
        strict=True,
    )
    for own, wanted in pairs:
        torch.testing.assert_close(own, wanted)
