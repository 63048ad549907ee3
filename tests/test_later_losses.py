"""Losses beyond the contract against slow formulations: equal values and gradients, in float64."""

import copy
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from math import exp, log, sin
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.core.localize import localize
from layerwise.distributed import check_placeable
from layerwise.errors import InvalidInput
from layerwise.losses import LOSSES, Site, Targets, create_loss
from layerwise.losses.auglocal import Single, chosen_blocks, pyramid_depth
from layerwise.memory.accounting import persistent_bytes
from layerwise.models import create_model
from layerwise.training.declared_options import registries
from layerwise.utils.options import options_of
from tests.helpers import CLASSES, PreActivation, digits, learner, narrow, network, ticks

LABELS = torch.tensor([0, 1, 1, 3, 0, 2])
SHAPES = [(8, 4, 4), (8, 1, 1), (3, 5, 3), (2, 6, 6), (12,), (1,)]
IMAGE = (3, 6, 6)
LOOKING_AHEAD = "auglocal", "look-ahead"  # losses made of later blocks of a network


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def site(shape: tuple[int, ...], index: int = 0, count: int = 4, **given: Any) -> Site:
    return Site(index, count, shape, 4, image_shape=IMAGE, entering=shape, **given)


def compare(loss: nn.Module, slow: Callable[..., Tensor], shape: tuple[int, ...]) -> None:
    """Assert that value and gradients of features and weights are those of a slow formulation."""
    loss = loss.double()
    features = torch.randn(6, *shape, dtype=torch.float64, requires_grad=True)
    targets = Targets(LABELS, 4, torch.rand(6, *IMAGE, dtype=torch.float64))
    wanted = [features, *loss.parameters()]
    value = loss(features, targets).loss
    expected = slow(loss, features, targets)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    pairs = [torch.autograd.grad(x, wanted, allow_unused=True) for x in (value, expected)]
    for ours, theirs in zip(*pairs, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


# ---- slow layers: loops over examples, channels and pixels ----


def normalised(values: Tensor, layer: nn.Module) -> Tensor:
    """Batch normalisation of (B, C, …), channel by channel."""
    channels = []
    for channel in range(values.shape[1]):
        numbers = values[:, channel]
        mean = numbers.sum() / numbers.numel()
        variance = ((numbers - mean) ** 2).sum() / numbers.numel()
        scaled = (numbers - mean) / (variance + layer.eps) ** 0.5
        channels.append(scaled * layer.weight[channel] + layer.bias[channel])
    return torch.stack(channels, 1)


def convolved(maps: Tensor, layer: nn.Conv2d) -> Tensor:
    """A convolution, output pixel by output pixel."""
    size, stride, padding = layer.kernel_size[0], layer.stride[0], int(layer.padding[0])
    padded = F.pad(maps, [padding] * 4)
    each = maps.shape[1] // layer.groups
    ends = [padded.shape[side] - size + 1 for side in (2, 3)]
    rows = []
    for y in range(0, ends[0], stride):
        for x in range(0, ends[1], stride):
            window = padded[:, :, y : y + size, x : x + size]
            outputs = []
            for number, kernel in enumerate(layer.weight):
                first = number * layer.groups // len(layer.weight) * each
                total = (window[:, first : first + each] * kernel).sum((1, 2, 3))
                outputs.append(total if layer.bias is None else total + layer.bias[number])
            rows.append(torch.stack(outputs, 1))
    sides = [-(-end // stride) for end in ends]
    return torch.stack(rows, 2).unflatten(2, sides)


def pooled(maps: Tensor, sides: tuple[int, int]) -> Tensor:
    """Average pooling to so many pixels a side; windows overlap where sides do not divide."""
    height, width = maps.shape[2:]
    rows = []
    for i in range(sides[0]):
        top, bottom = i * height // sides[0], -(-(i + 1) * height // sides[0])
        for j in range(sides[1]):
            left, right = j * width // sides[1], -(-(j + 1) * width // sides[1])
            rows.append(maps[:, :, top:bottom, left:right].mean((2, 3)))
    return torch.stack(rows, 2).unflatten(2, sides)


def slow_entropy(logits: Tensor) -> Tensor:
    terms = []
    for row, label in zip(logits, LABELS, strict=True):
        terms.append(row.exp().sum().log() - row[label])
    return sum(terms, torch.zeros(())) / len(terms)


def layers_of(module: nn.Module) -> Iterator[Any]:
    """The layers that hold weights, in the order they were made."""
    kinds = nn.Conv2d, nn.Linear, nn.BatchNorm1d, nn.BatchNorm2d
    return (part for part in module.modules() if isinstance(part, kinds))


def block(values: Tensor, layers: Iterator[Any]) -> Tensor:
    """Convolution or linear layer, batch normalisation, ReLU."""
    layer = next(layers)
    values = convolved(values, layer) if values.dim() == 4 else values @ layer.weight.T
    return normalised(values, next(layers)).clamp(min=0)


def classified(values: Tensor, layers: Iterator[Any]) -> Tensor:
    layer = next(layers)
    return values.flatten(1) @ layer.weight.T + layer.bias


# ---- heads ----


def slow_convolutional(count: int, loss: nn.Module, features: Tensor, targets: Targets) -> Tensor:
    """DGL's cnn and greedy heads: convolutions, pooling to 2×2, normalisation, classifier."""
    layers, values = layers_of(loss), features
    for _ in range(count):
        values = block(values, layers)
    values = pooled(values, (2, 2)) if values.dim() == 4 else values
    return slow_entropy(classified(normalised(values, next(layers)), layers))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    ("loss", "options", "count"),
    [
        ("dgl-cnn", {}, 2),
        ("dgl-cnn", {"head_layers": 0}, 0),
        ("greedy", {}, 1),
        ("greedy", {"head_depth": 1}, 0),
        ("greedy", {"head_depth": 3, "head_width": 5}, 2),
    ],
)
def test_convolutional_heads(
    loss: str, options: dict[str, int], count: int, shape: tuple[int, ...]
) -> None:
    compare(create_loss(loss, site(shape), **options), partial(slow_convolutional, count), shape)


def slow_perceptron(resized: bool, loss: nn.Module, features: Tensor, targets: Targets) -> Tensor:
    layers, values = layers_of(loss), features
    maps = values.dim() == 4
    if resized:
        height, width = values.shape[2:] if maps else (1, 1)
        values = pooled(values, (-(-height // 4), -(-width // 4))) if maps else values
        for _ in range(3):
            values = block(values, layers)
    values = (pooled(values, (2, 2)) if maps else values).flatten(1)
    for _ in range(3):
        values = block(values, layers)
    return slow_entropy(classified(values, layers))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 9, 9)], ids=str)
@pytest.mark.parametrize(("loss", "resized"), [("dgl-mlp", False), ("dgl-mlp-sr", True)])
def test_perceptrons(loss: str, resized: bool, shape: tuple[int, ...]) -> None:
    compare(create_loss(loss, site(shape)), partial(slow_perceptron, resized), shape)


def slow_separable(residuals: int, loss: nn.Module, features: Tensor, targets: Targets) -> Tensor:
    layers, values = layers_of(loss), features

    def step(values: Tensor) -> Tensor:
        values = convolved(values, next(layers))
        return normalised(values, next(layers))

    if values.dim() == 2:
        return slow_entropy(classified(block(values, layers), layers))
    values = step(step(values).clamp(min=0)).clamp(min=0)
    for _ in range(residuals):
        before = values
        values = step(step(step(values).clamp(min=0)).clamp(min=0))
        values = values + before if values.shape == before.shape else values
    values = step(values).clamp(min=0)
    return slow_entropy(classified(values.mean((2, 3)), layers))


@pytest.mark.parametrize("shape", [(8, 4, 4), (2, 1, 1), (12,)], ids=str)
@pytest.mark.parametrize("residuals", [0, 1, 2])
def test_separable_head(residuals: int, shape: tuple[int, ...]) -> None:
    head = create_loss("separable", site(shape), head_layers=residuals)
    compare(head, partial(slow_separable, residuals), shape)


@pytest.mark.parametrize("side", [3, 5, 6, 9])
def test_separable_head_halves_odd_sides_to_one_pixel(side: int) -> None:
    head = create_loss("separable", site((16, side, side)), head_layers=8)
    sizes: list[int] = []
    for module in head.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda *given: sizes.append(given[-1].shape[-1]))
    head.logits(torch.randn(2, 16, side, side))
    assert sizes[-1] == 1


def test_separable_head_is_narrow_from_its_first_layer() -> None:
    """Its channels and strides are those of SEDONA's program."""
    head = create_loss("separable", site((64, 16, 16)), head_layers=3)
    layers = [layer for layer in head.modules() if isinstance(layer, nn.Conv2d)]
    narrow, depthwise = layers[:2]
    assert (narrow.in_channels, narrow.out_channels, narrow.kernel_size) == (64, 16, (1, 1))
    assert (depthwise.in_channels, depthwise.groups, depthwise.stride) == (16, 16, (2, 2))
    ends = [layer.out_channels for layer in layers if layer.kernel_size == (1, 1)]
    assert ends == [16, 64, 16, 64, 24, 96, 24, 512]
    assert [layer.stride[0] for layer in layers if layer.groups > 1] == [2, 1, 2, 1]


def slow_strided(depth: int, loss: nn.Module, features: Tensor, targets: Targets) -> Tensor:
    layers, values = layers_of(loss), features
    for _ in range(depth):
        if values.dim() == 4 and max(values.shape[2:]) <= 2:
            break
        values = block(values, layers)
    if values.dim() == 4:
        values = pooled(values, (min(values.shape[2], 2), min(values.shape[3], 2)))
    values = normalised(values, next(layers)).flatten(1)
    return slow_entropy(classified(values, layers))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 9, 9), (2, 6, 1)], ids=str)
@pytest.mark.parametrize("depth", [0, 1, 3])
def test_strided_head(depth: int, shape: tuple[int, ...]) -> None:
    compare(
        create_loss("strided", site(shape), head_depth=depth), partial(slow_strided, depth), shape
    )


def test_strided_head_doubles_channels_until_maps_are_small() -> None:
    def widths(side: int, factor: float) -> list[int]:
        head = create_loss(
            "strided", site((16, side, side)), head_depth=3, head_width_factor=factor
        )
        layers = [layer for layer in head.modules() if isinstance(layer, nn.Conv2d)]
        assert all(layer.stride == (2, 2) for layer in layers)
        return [layer.out_channels for layer in layers]

    assert widths(32, 2.0) == [32, 64, 128]
    assert widths(16, 0.25) == [4, 8, 16]
    assert widths(5, 2.0) == [32, 64]
    assert widths(2, 2.0) == []


def slow_lls(loss: nn.Module, features: Tensor, targets: Targets) -> Tensor:
    values = features
    if values.dim() == 4:
        values = pooled(values, (min(values.shape[2], 2), min(values.shape[3], 2)))
    rows = []
    for row in values.flatten(1):
        unit = row / (row**2).sum() ** 0.5
        frequencies = [50 + 462 * number / 3 for number in range(4)]
        rows.append(
            torch.stack([sum(x * sin(f * t) for t, x in enumerate(unit)) for f in frequencies])
        )
    return slow_entropy(torch.stack(rows))


@pytest.mark.parametrize("shape", [*SHAPES, (2, 9, 3)], ids=str)
def test_lls(shape: tuple[int, ...]) -> None:
    loss = create_loss("lls", site(shape))
    assert not [*loss.parameters(), *loss.state_dict()]
    compare(loss, slow_lls, shape)


# ---- infopro ----


def interpolated(maps: Tensor, sides: tuple[int, int]) -> Tensor:
    """Bilinear scaling whose corner pixels stay corners."""
    height, width = maps.shape[2:]
    rows = []
    for i in range(sides[0]):
        y = i * (height - 1) / (sides[0] - 1)
        top = min(int(y), max(height - 2, 0))
        bottom = min(top + 1, height - 1)
        for j in range(sides[1]):
            x = j * (width - 1) / (sides[1] - 1)
            left = min(int(x), max(width - 2, 0))
            right = min(left + 1, width - 1)
            down, across = y - top, x - left
            rows.append(
                (1 - down) * (1 - across) * maps[:, :, top, left]
                + (1 - down) * across * maps[:, :, top, right]
                + down * (1 - across) * maps[:, :, bottom, left]
                + down * across * maps[:, :, bottom, right]
            )
    return torch.stack(rows, 2).unflatten(2, sides)


def slow_infopro(
    weights: tuple[float, float], contrast: bool, loss: Any, features: Tensor, targets: Targets
) -> Tensor:
    layers = layers_of(loss.decoder)
    coarse = features
    if features.dim() == 2:
        coarse = classified(features, layers).unflatten(1, (12, 4, 4))
    decoded = convolved(block(interpolated(coarse, (6, 6)), layers), next(layers))
    images = targets.images
    if loss.mean is None:
        rebuilt = ((decoded - images) ** 2).sum() / images.numel()
    else:
        stored = images * 0.5 + 0.25
        share = 1 / (1 + (-decoded).exp())
        logs = stored * share.log() + (1 - stored) * (1 - share).log()
        rebuilt = -logs.sum() / images.numel()
    layers = layers_of(loss.embedding)
    vectors = block(features, layers)
    if vectors.dim() == 4:
        vectors = classified(vectors.mean((2, 3)), layers).clamp(min=0)
    outputs = vectors @ loss.classifier.weight.T + loss.classifier.bias
    task = slow_contrast(outputs) if contrast else slow_entropy(outputs)
    return weights[0] * rebuilt + weights[1] * task


def slow_contrast(outputs: Tensor) -> Tensor:
    unit = [row / (row**2).sum() ** 0.5 for row in outputs]
    total = torch.zeros(())
    for i, one in enumerate(unit):
        logits = [(one * other).sum() / 0.07 for other in unit]
        others = [j for j in range(len(unit)) if j != i]
        positives = [j for j in others if LABELS[j] == LABELS[i]]
        lowest = torch.stack([logits[j] for j in others]).exp().sum().log()
        for j in positives:
            total = total - (logits[j] - lowest) / len(positives)
    return total / len(unit)


@pytest.mark.parametrize("shape", [(4, 3, 3), (2, 1, 1), (5,)], ids=str)
@pytest.mark.parametrize("normalised_by", [None, ((0.25,) * 3, (0.5,) * 3)], ids=["mse", "bce"])
@pytest.mark.parametrize("contrast", [False, True], ids=["softmax", "contrast"])
def test_infopro(shape: tuple[int, ...], normalised_by: Any, contrast: bool) -> None:
    name = "infopro-contrast" if contrast else "infopro"
    place = site(shape, index=1, normalization=normalised_by)
    loss = create_loss(name, place, reconstruction=5, reconstruction_last=1, task=0.5)
    compare(loss, partial(slow_infopro, (3.0, 0.5), contrast), shape)


def test_infopros_weights_are_linear_up_to_the_last_unit_but_one() -> None:
    options = {"reconstruction": 6.0, "reconstruction_last": 0.0, "task": 0.0, "task_last": 3.0}
    heads = [create_loss("infopro", site((4, 3, 3), index, 5), **options) for index in range(4)]
    assert [head.weights() for head in heads] == [[6.0, 0.0], [4.0, 1.0], [2.0, 2.0], [0.0, 3.0]]


@pytest.mark.parametrize("name", ["infopro", "infopro-contrast"])
@pytest.mark.parametrize("last", [{}, {"reconstruction_last": 1.0}], ids=["all 0", "first 0"])
def test_infopro_without_any_weight_would_learn_nothing(name: str, last: dict[str, float]) -> None:
    with pytest.raises(InvalidInput, match="unit 0 with a weight of 0 for both"):
        create_loss(name, site((4, 3, 3)), reconstruction=0.0, task=0.0, **last)


# ---- biological ----


def matrix_of_cosines(rows: Tensor) -> Tensor:
    centred = [row - row.sum() / len(row) for row in rows]
    scaled = [row / (1e-8 + (row**2).sum() ** 0.5) for row in centred]
    return torch.stack([torch.stack([(a * b).sum() for b in scaled]) for a in scaled])


def slow_biological_sim(loss: Any, features: Tensor, targets: Targets) -> Tensor:
    values = features
    if values.dim() == 4 and values.shape[1] > 3 and values[0, 0].numel() > 1:
        flat = values.flatten(2)
        mean = flat.sum(2, keepdim=True) / flat.shape[2]
        values = (((flat - mean) ** 2).sum(2) / (flat.shape[2] - 1)) ** 0.5
    wanted = matrix_of_cosines(loss.projected[LABELS])
    return ((matrix_of_cosines(values.flatten(1)) - wanted) ** 2).sum() / 36


@pytest.mark.parametrize("shape", [(8, 4, 4), (3, 4, 4), (8, 1, 1), (12,)], ids=str)
def test_biological_sim(shape: tuple[int, ...]) -> None:
    compare(create_loss("biological-sim", site(shape)), slow_biological_sim, shape)


def test_biological_pred_returns_its_gradient_by_fixed_weights() -> None:
    loss = create_loss("biological-pred", site((5, 2, 2))).double()
    nn.init.normal_(loss.classifier.weight)
    features = torch.randn(6, 5, 2, 2, dtype=torch.float64, requires_grad=True)
    value = loss(features, Targets(LABELS, 4)).loss
    logits = features.flatten(1) @ loss.classifier.weight.T + loss.classifier.bias
    total = 0.0
    for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True):
        for number, sign in zip(row, loss.signs[label].tolist(), strict=True):
            share = 1 / (1 + exp(-number))
            total -= log(share) if sign else log(1 - share)
    assert value.item() == pytest.approx(total / logits.numel())
    value.backward()
    errors = (torch.sigmoid(logits) - loss.signs[LABELS]) / logits.numel()
    torch.testing.assert_close(features.grad.flatten(1), errors @ loss.feedback)
    torch.testing.assert_close(loss.classifier.weight.grad, errors.T @ features.flatten(1))
    torch.testing.assert_close(loss.classifier.bias.grad, errors.sum(0))
    assert set(loss.state_dict()) == {
        "classifier.weight", "classifier.bias", "signs", "feedback",
    }  # fmt: skip


# ---- terms ----


def test_terms_are_added_with_their_weights() -> None:
    shape = (4, 3, 3)
    plain = create_loss("pred", site(shape)).double()
    carrying = create_loss("pred", site(shape), transport=0.5, own_input=2.0).double()
    carrying.loss.load_state_dict(plain.state_dict())
    features, entered = torch.randn(2, 6, *shape, dtype=torch.float64).unbind()
    targets = Targets(LABELS, 4)
    transport = sum(((features - entered) ** 2).flatten().tolist()) / features.numel()
    normal, first, _, second, _ = carrying.terms["own_input"].decoder
    examples = []
    for example in features:
        deviation = (example.var(correction=0) + normal.eps) ** 0.5
        examples.append((example - example.mean()) / deviation)
    hidden = convolved(torch.stack(examples), first)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    own_input = ((convolved(hidden, second) - entered) ** 2).sum() / entered.numel()
    value = carrying(features, targets, entered).loss
    expected = plain(features, targets).loss + 0.5 * transport + 2 * own_input
    assert value.item() == pytest.approx(expected.item())


class Inplace(nn.Module):
    """Its second unit changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.relu, self.out = nn.ReLU(inplace=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.relu(self.one(x))).mean((2, 3)))


def test_terms_compare_with_what_entered_before_it_is_changed_in_place() -> None:
    images, options = torch.randn(4, 1, 8, 8), {"output_layer": "separate", "seed": 0}
    local = localize(
        Inplace(), images, CLASSES, "pred", at=["one", "two"], transport=1.0, **options
    )
    unit = local.units[1]
    entered = torch.randn(4, 4, 8, 8)
    before = entered.clone()
    targets = Targets(torch.arange(4), CLASSES)
    (passed,), (loss, _) = unit.evaluate((entered,), targets)
    expected = unit.loss.loss(passed, targets).loss + ((passed - before) ** 2).mean()
    torch.testing.assert_close(loss, expected)


# ---- auglocal ----


def test_auglocal_is_a_chain_of_later_blocks() -> None:
    model = narrow("resnet18", 0.0)
    local = localize(
        model, torch.zeros(2, 1, 8, 8), CLASSES, "auglocal", at="block", head_depth=2, pyramid=0.0
    )
    head = local.units[0].loss.double()
    held = {id(weight) for weight in model.parameters()}
    assert not held & {id(weight) for weight in head.parameters()}
    features = torch.randn(6, *model_shape(local, 0), dtype=torch.float64, requires_grad=True)
    value = head(features, Targets(LABELS, CLASSES)).loss
    # stem, then blocks 0 to 3: of 4 later blocks, the second and the last, and the output layer
    stages = copy.deepcopy(model).double().train().stages
    layers = iter(head.head)
    logits = features
    for wanted, stage in ((2, stages[1][0]), (4, stages[3][0])):
        if logits.shape[1] != stage.conv1.in_channels:
            conv, norm = next(layers)[:2]
            logits = normalised(convolved(logits, conv), norm)
        piece = next(layers).piece
        for ours, theirs in zip(piece.parameters(), stage.parameters(), strict=True):
            assert ours.shape == theirs.shape, wanted
            theirs.data.copy_(ours)
        logits = stage(logits)
    assert next(layers)(logits) is logits
    (output,) = layers_of(next(layers).piece)
    logits = logits.mean((2, 3)) @ output.weight.T + output.bias
    expected = F.cross_entropy(logits, LABELS)
    assert value.item() == pytest.approx(expected.item(), rel=1e-8)
    pairs = [torch.autograd.grad(loss, features)[0] for loss in (value, expected)]
    torch.testing.assert_close(*pairs, rtol=1e-6, atol=1e-10)


def model_shape(local: Any, index: int) -> tuple[int, ...]:
    activations: Any = (torch.zeros(2, 1, 8, 8),)
    for unit in local.units[: index + 1]:
        activations = unit.forward(activations)
    return tuple(activations[0].shape[1:])


def test_auglocals_blocks_are_those_published() -> None:
    # ResNet-110: stem and 54 blocks, d = 6; Python's rounding
    assert chosen_blocks(0, 55, 6) == [9, 18, 27, 36, 45, 54]
    assert chosen_blocks(1, 55, 6) == [round(1 + i * 53 / 6) for i in range(1, 7)]
    assert chosen_blocks(51, 55, 6) == [52, 53, 54]
    assert chosen_blocks(54, 55, 6) == []
    depths = [pyramid_depth(unit, 49, 6, 0.5) for unit in range(48)]
    assert depths[0] == 6
    assert depths[-1] == round(0.5 * 6 + 0.5)
    assert depths == sorted(depths, reverse=True)
    assert pyramid_depth(3, 9, 4, 0.0) == 4


def test_a_block_that_does_not_fit_gives_way_to_the_first_of_its_stage() -> None:
    """As in the published heads, whose blocks halve the maps where the width doubles."""
    model = create_model("resnet32", [2, 2, 2], width=1 / 8, in_chans=1, image_size=8)
    local = localize(model, torch.zeros(2, 1, 8, 8), CLASSES, "auglocal", at="block", head_depth=3)
    # behind the stem are six blocks, of which the second, fourth and last are chosen
    head = local.units[0].loss.head
    pieces = [layer.piece for layer in head if isinstance(layer, Single)]
    assert [shapes_of(piece) for piece in pieces[:3]] == [
        shapes_of(model.get_submodule(name)) for name in ("stages.0.1", "stages.1.0", "stages.2.0")
    ]
    assert not any(isinstance(layer, nn.Sequential) for layer in head)  # no projection


def shapes_of(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(weight.shape) for weight in module.parameters()]


@pytest.mark.parametrize("name", ["plain", "vgg8b", "resnet50", "branches"])
@pytest.mark.parametrize("at", ["layer", "block", 2])
def test_auglocal_fits_any_network(name: str, at: Any) -> None:
    local = learner(name, "auglocal", at=at)
    local.step(torch.rand(2, 1, 8, 8), torch.tensor([1, 1]))


class Numbers(nn.Module):
    """A size that is read early and used late, and a module with weights of its own."""

    def __init__(self, late: bool) -> None:
        super().__init__()
        self.late = late
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 7.0))
        self.out = nn.Linear(4 * 64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.one(x))
        count = x.size(0)
        x = F.relu(self.two(x) * self.scale)
        count = count if self.late else x.size(0)
        return self.out(x.view(count, -1))


def test_blocks_between_which_a_number_passes_are_copied_together() -> None:
    images, cut = torch.rand(2, 1, 8, 8), {"output_layer": "separate"}
    with pytest.raises(InvalidInput, match="unit 1: it ends inside the last block, out, and none"):
        localize(Numbers(late=True), images, CLASSES, "auglocal", **cut)
    local = localize(Numbers(late=False), images, CLASSES, "auglocal", **cut)
    local.step(torch.rand(6, 1, 8, 8), LABELS)
    assert [len(list(unit.loss.parameters())) for unit in local.units] == [5, 2, 0]


def test_auglocals_heads_are_drawn_anew_and_learn_where_the_network_is_frozen() -> None:
    model = network("resnet18")
    for weight in model.parameters():
        nn.init.constant_(weight, 0.5)
        weight.requires_grad_(False)
    local = localize(model, torch.rand(2, 1, 8, 8), CLASSES, "auglocal", check=False)
    matrices = [w for u in local.units for w in u.loss.parameters() if w.dim() > 1]
    assert matrices
    assert all(w.requires_grad and w.std() > 0 for w in matrices)


# ---- look-ahead ----


def ahead_of_stem(branches: str = "both", **options: Any) -> tuple[nn.Module, Any]:
    """A network, and the loss of its first unit, whose copies have weights of their own by now."""
    model = narrow("resnet18", 0.0).double()
    sample = torch.zeros(2, 1, 8, 8, dtype=torch.float64)
    options = {"at": "block", "branches": branches, **options}
    loss: Any = localize(model, sample, CLASSES, "look-ahead", **options).units[0].loss
    with torch.no_grad():
        for weight in loss.parameters():
            weight += 0.1 * torch.randn_like(weight)
    return model, loss.train()


@pytest.mark.parametrize("branches", ["both", "sum", "copy", "average"])
def test_look_ahead_mixes_a_trained_and_an_averaged_copy(branches: str) -> None:
    model, loss = ahead_of_stem(branches)
    scale = 1.0 if loss.scale is None else loss.scale.item()
    shares = {"both": (scale, 2 - scale), "sum": (1, 1), "copy": (1, 0), "average": (0, 1)}
    features = torch.randn(6, 4, 8, 8, dtype=torch.float64, requires_grad=True)
    blocks, outputs = [], []
    for share, name in zip(shares[branches], ("copy", "average"), strict=True):
        assert (name in loss.blocks) == (share != 0)
        if share:
            block = copy.deepcopy(model.stages[0][0]).train()  # behind the stem
            for own, theirs in zip(loss.blocks[name].parameters(), block.parameters(), strict=True):
                theirs.data.copy_(own)
            outputs.append(block(features))
            blocks.append((share, block))
    mixed = sum(share * output for (share, _), output in zip(blocks, outputs, strict=True))
    (classifier,) = layers_of(loss.loss)
    expected = F.cross_entropy(mixed.flatten(1) @ classifier.weight.T + classifier.bias, LABELS)
    value = loss(features, Targets(LABELS, CLASSES)).loss
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)

    trained = [*loss.blocks["copy"].parameters()] if "copy" in loss.blocks else []
    theirs = [*blocks[0][1].parameters()] if trained else []
    ours = torch.autograd.grad(value, [features, *trained], retain_graph=True)
    slow = torch.autograd.grad(expected, [features, *theirs], retain_graph=True)
    torch.testing.assert_close(ours, slow, rtol=1e-7, atol=1e-10)
    assert {id(weight) for weight in loss.parameters() if weight.requires_grad} == {
        id(weight)
        for weight in (*trained, *loss.loss.parameters(), loss.scale)
        if weight is not None
    }
    if branches == "both":
        of_mixed = torch.autograd.grad(expected, mixed, retain_graph=True)[0]
        by_hand = (of_mixed * (outputs[0] - outputs[1])).sum()
        torch.testing.assert_close(torch.autograd.grad(value, loss.scale)[0], by_hand)


def test_the_average_follows_the_network_once_per_update() -> None:
    local = learner("vgg8b", "look-ahead", at="block", average_momentum=0.9)
    units = [unit.loss for unit in local.units[:-1]]
    expected = [[weight.clone() for weight in loss.averages] for loss in units]
    for loss in units:
        assert all(map(torch.equal, loss.averages, loss.followed))
        assert all(map(torch.equal, loss.blocks["copy"].parameters(), loss.followed))
    for number, (images, labels) in enumerate(digits().train.batches(0)):
        before = [[weight.clone() for weight in loss.followed] for loss in units]
        update = number != 1  # the second batch is a part of the third
        local.step(images, labels, update=update)
        if update:  # a unit is updated before the next one is
            expected = [
                [0.9 * average + 0.1 * weight for average, weight in zip(*pair, strict=True)]
                for pair in zip(expected, before, strict=True)
            ]
    for loss, averages in zip(units, expected, strict=True):
        assert not all(map(torch.equal, loss.averages, loss.followed))
        torch.testing.assert_close([w.detach() for w in loss.averages], averages)


def test_the_average_of_a_block_that_does_not_learn_stays() -> None:
    local = learner("plain", "look-ahead")
    first: Any = local.units[0].loss
    before = [weight.clone() for weight in first.averages]
    trained = [weight.clone() for weight in first.blocks["copy"].parameters()]
    ticks("sequential", local, digits().train, epochs=1)
    assert all(map(torch.equal, before, first.averages))
    assert not any(map(torch.equal, trained, first.blocks["copy"].parameters()))
    assert not any(map(torch.equal, before, first.followed))  # trained later


def test_the_networks_weights_are_none_of_a_look_ahead() -> None:
    keys = list(network("resnet18").state_dict())
    local = learner("resnet18", "look-ahead", at="block", transport=0.1)
    own = {id(weight) for weight in local.model.parameters()}
    assert list(local.model.state_dict()) == keys
    for unit in local.units:
        held = {id(weight) for weight in unit.piece.parameters()}
        assert {id(weight) for weight in unit.held()} & own == held
        assert not own & {id(weight) for weight in unit.loss.parameters()}
    # a copy of all follows itself, and so does one that was written and read
    for other in (copy.deepcopy(local), pickle.loads(pickle.dumps(local.units))):
        copied = getattr(other, "units", other)
        weights = {id(weight) for unit in copied for weight in unit.piece.parameters()}
        heads = {id(weight) for unit in copied for weight in unit.loss.parameters()}
        for unit in copied[:-1]:
            assert {id(weight) for weight in unit.loss.loss.followed} <= weights - own
            assert {id(weight) for weight in unit.loss.loss.averages} <= heads


def test_both_copies_count_as_memory() -> None:
    size = {
        branches: persistent_bytes(learner("plain", "look-ahead", branches=branches))
        for branches in ("both", "sum", "copy", "average")
    }
    block = 4 * (6 * 6 * 9 + 6 + CLASSES * 97)  # conv2 and out, in float32
    assert size["sum"] - size["copy"] == block
    assert size["sum"] - size["average"] == block
    assert size["both"] - size["sum"] == 4 * 2  # two numbers s


@pytest.mark.parametrize("head_loss", ["dgl-mlp-sr", "infopro", "predsim", "lls"])
def test_any_loss_can_be_the_head_of_a_look_ahead(head_loss: str) -> None:
    local = learner("resnet18", "look-ahead", at="block", head_loss=head_loss)
    assert local.units[0].reads_images == (head_loss == "infopro")
    local.step(torch.rand(6, 1, 8, 8), LABELS)
    local = learner("plain", "look-ahead", head_loss="greedy", head_depth=1)
    assert len([*local.units[0].loss.loss.parameters()]) == 4


def test_ranks_refuse_to_look_ahead_at_weights_that_another_changes() -> None:
    with pytest.raises(
        InvalidInput, match=r"the loss of unit 0 \(conv1\) reads weights of a later"
    ):
        check_placeable(learner("plain", "look-ahead", transport=0.1))
    check_placeable(learner("plain", "look-ahead", branches="copy"))


class Dropping(nn.Module):
    """Its second block begins with a change of its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.dropout, self.out = nn.Dropout2d(0.5, inplace=True), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(F.leaky_relu(self.one(x)))
        return self.out(F.relu(self.two(x)).mean((2, 3)))


@pytest.mark.parametrize("loss", LOOKING_AHEAD)
def test_copies_of_blocks_leave_the_features_as_they_are(loss: str) -> None:
    cut = {"at": "block", "output_layer": "separate", "seed": 0}
    local = localize(Dropping(), torch.rand(2, 1, 8, 8), CLASSES, loss, **cut)
    features = torch.rand(6, 4, 8, 8)
    before = features.clone()
    head = local.units[0].loss.train()
    assert any(getattr(part, "changes_input", False) for part in head.modules())
    head(features, Targets(LABELS, CLASSES))
    assert torch.equal(features, before)


# ---- at the edges ----


@pytest.mark.parametrize("loss", [name for name in LOSSES if name not in (*LOOKING_AHEAD, "match")])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 5, 3), (2, 1, 4), (1,)], ids=str)
@pytest.mark.parametrize("labels", [[0, 1], [1, 1]], ids=str)
def test_batches_of_two_and_small_features_in_bfloat16(
    loss: str, shape: tuple[int, ...], labels: list[int]
) -> None:
    head = create_loss(loss, site(shape), transport=0.1, own_input=0.1)
    features = torch.randn(2, *shape, requires_grad=True)
    targets = Targets(torch.tensor(labels), 4, torch.rand(2, *IMAGE))
    with torch.autocast("cpu", torch.bfloat16):
        value, correct = head(features * 1, targets, torch.randn(2, *shape).bfloat16())
    assert value.dtype == torch.float32
    value.backward()
    assert torch.isfinite(value)
    assert 0 <= int(correct) <= 2
    assert torch.isfinite(features.grad).all()


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        ("dgl-cnn", {"head_layers": -1}, "head_layers -1: it is too small. Give 0 or more"),
        ("dgl-mlp", {"head_layers": -1}, "head_layers -1"),
        ("dgl-mlp-sr", {"head_layers": -1}, "head_layers -1"),
        ("separable", {"head_layers": -1}, "head_layers -1"),
        ("greedy", {"head_depth": 0}, "head_depth 0: it is too small. Give 1 or more"),
        ("greedy", {"head_width": 0}, "head_width 0"),
        ("greedy", {"head_depth": 1, "head_width": 9}, "head_width 9: it would change nothing"),
        ("infopro", {"task": -1.0}, "task -1.0: it is out of range"),
        ("infopro", {"reconstruction_last": float("nan")}, "reconstruction_last=nan"),
        ("biological-pred", {"decoder_dim": 0}, "decoder_dim 0"),
        ("biological-sim", {"decoder_dim": 0}, "decoder_dim 0"),
        ("pred", {"transport": -0.1}, "transport -0.1: it is out of range"),
        ("pred", {"own_input": float("inf")}, "own_input=inf"),
        ("auglocal", {}, "auglocal at unit 0: its site does not say what follows it"),
        ("auglocal", {"pyramid": 1.5}, "pyramid 1.5: it is out of range"),
        ("look-ahead", {}, "look-ahead at unit 0: its site does not say what follows it"),
        ("look-ahead", {"branches": "none"}, "branches 'none': it is unknown"),
        ("look-ahead", {"average_momentum": 1.5}, "average_momentum 1.5: it is out of range"),
        ("strided", {"head_depth": -1}, "head_depth -1: it is out of range. Give 0 or more, up to"),
        ("strided", {"head_depth": 99}, "head_depth 99"),
        ("strided", {"head_width_factor": 1e308}, r"head_width_factor 1e\+308: it is out of range"),
        ("strided", {"head_width_factor": 0.0}, "head_width_factor 0.0: it is out of range"),
        ("strided", {"head_width_factor": float("nan")}, "head_width_factor=nan"),
        ("lls", {"head_size": 0}, "head_size 0: it is too small. Give 1 or more"),
    ],
)
def test_refusals(loss: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        create_loss(loss, site((4, 3, 3)), **options)


@pytest.mark.parametrize("depth", [0, 2, 9])
def test_heads_deeper_than_the_network_are_refused(depth: int) -> None:
    with pytest.raises(InvalidInput, match=f"head_depth {depth}: the network has 2 blocks"):
        learner("plain", "auglocal", head_depth=depth)


@pytest.mark.parametrize("loss", LOOKING_AHEAD)
def test_a_unit_inside_the_last_block_has_no_later_ones(loss: str) -> None:
    with pytest.raises(InvalidInput, match=f"{loss} at unit 0: it ends inside the last block"):
        localize(PreActivation(), torch.rand(2, 1, 8, 8), CLASSES, loss)


@pytest.mark.parametrize(
    ("head_loss", "words"),
    [
        ("auglocal", "auglocal at unit 0: .* do not make it the head of another loss"),
        ("perd", "Did you mean 'pred'"),
    ],
)
def test_heads_that_a_look_ahead_cannot_have(head_loss: str, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        learner("plain", "look-ahead", head_loss=head_loss)


def test_infopro_refuses_what_is_no_image() -> None:
    with pytest.raises(InvalidInput, match=r"infopro at unit 0: it reconstructs images"):
        create_loss("infopro", Site(0, 2, (4,), 3, image_shape=(7,)))
    with pytest.raises(InvalidInput, match="normalization of 1 channels: images have 3"):
        create_loss("infopro", site((4,), normalization=((0.5,), (0.5,))))
    with pytest.raises(InvalidInput, match="the targets hold no images"):
        create_loss("infopro", site((4,)))(torch.rand(6, 4), Targets(LABELS, 4))


@pytest.mark.parametrize(
    "given",
    [0.5, (0.5, 0.2), ([0.5],), ([0.5], [0.0]), ([0.5], ["a"]), ([0.5], [0.2, 0.2])],
    ids=str,
)
@pytest.mark.parametrize("loss", ["pred", "infopro"])
def test_what_is_no_normalization_is_refused(loss: str, given: Any) -> None:
    with pytest.raises(InvalidInput, match="it is not a mean and standard deviation of"):
        learner("plain", loss, normalization=given)


class OwnOption(nn.Module):
    """A loss with an option that is named as a term, and any others."""

    def __init__(self, site: Site, *, transport: int = 3, **others: Any) -> None:
        super().__init__()
        self.transport, self.others = transport, others


def test_an_option_of_a_loss_goes_before_a_term_of_that_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert create_loss(OwnOption, site((4,)), transport=5).transport == 5
    monkeypatch.setitem(LOSSES, "own", OwnOption)
    options = options_of(registries()["loss"]["own"])
    assert (options["transport"].kind, options["own_input"].kind) == (int, float)


def test_terms_and_span_are_shown() -> None:
    table = str(learner("vgg8b", "pred", own_input=0.5, span=2))
    assert "Pred + 0.5 own_input" in table
    assert "span 2: a loss reaches its own unit and 1 before it" in table
    assert "Pred + 0.1 transport" in str(learner("resnet18", "pred", at="layer", transport=0.1))
