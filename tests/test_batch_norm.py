"""Batch normalisation, shortcut and leaky ReLU as one operation: against PyTorch's modules, and
what it refuses.
"""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from layerwise.core.localize import localize
from layerwise.core.memory_format import set_memory_format
from layerwise.models import create_model
from layerwise.models.resnet import BasicBlock
from layerwise.ops import batch_norm
from layerwise.ops.batch_norm import (
    SLOPE,
    ActivationGradient,
    Normalisation,
    NormalisedActivation,
    before_activation,
    overwriting,
    sole_readers,
)
from layerwise.ops.pooling import average_alone
from layerwise.profiling.profile import predict_peak
from layerwise.rules.feature_cache import Keeping, pass_through
from tests.helpers import learner

SHAPE = (6, 5, 4, 3)
WAYS = {"small": (1 << 21, 1 << 19), "in place": (0, 2 * 60), "in place, at once": (0, 1 << 19)}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    small, part = WAYS[request.param]
    monkeypatch.setattr(batch_norm, "LARGE_ELEMENTS", small)
    monkeypatch.setattr(batch_norm, "PART_ELEMENTS", part)
    return str(request.param)


def batch_norm_2d(norm: Normalisation, maps: Tensor) -> Tensor:
    """By PyTorch's module, with the same parameters and buffers."""
    twin = nn.BatchNorm2d(norm.num_features)
    twin._parameters, twin._buffers, twin.training = norm._parameters, norm._buffers, norm.training
    return twin(maps)


def plain(norm: NormalisedActivation, maps: Tensor, shortcut: Tensor | None) -> Tensor:
    normalised = batch_norm_2d(norm, maps)
    return F.leaky_relu(normalised if shortcut is None else normalised + shortcut, SLOPE)


def made(dtype: torch.dtype = torch.float64) -> NormalisedActivation:
    torch.manual_seed(0)
    norm = NormalisedActivation(SHAPE[1]).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return norm


def gradients(
    norm: NormalisedActivation, forward: Any, shortcut: bool, memory_format: torch.memory_format
) -> list[Tensor]:
    """The output, all gradients and the running statistics of a step."""
    torch.manual_seed(1)
    maps, added, weights = (
        torch.randn(SHAPE, dtype=norm.weight.dtype).contiguous(memory_format=memory_format)
        for _ in range(3)
    )
    leaves = [(3 + 2 * maps).requires_grad_(), *([added.requires_grad_()] if shortcut else [])]
    output = forward(norm, leaves[0] * 1, leaves[1] if shortcut else None)
    kept = output.detach().clone()
    (output * weights).sum().backward()
    found = [leaf.grad for leaf in (*leaves, norm.weight, norm.bias)]
    return [kept, *found, norm.running_mean, norm.running_var, norm.num_batches_tracked]


@pytest.mark.parametrize(
    "memory_format",
    [torch.contiguous_format, torch.channels_last],
    ids=["contiguous", "channels-last"],
)
@pytest.mark.parametrize("shortcut", [False, True], ids=["alone", "shortcut"])
def test_gradients_are_those_of_the_plain_modules(
    way: str, shortcut: bool, memory_format: torch.memory_format
) -> None:
    norm = made()
    expected = gradients(copy.deepcopy(norm), plain, shortcut, memory_format)
    found = gradients(norm, NormalisedActivation.__call__, shortcut, memory_format)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "memory_format",
    [torch.contiguous_format, torch.channels_last],
    ids=["contiguous", "channels-last"],
)
def test_without_an_activation_it_is_batch_normalisation(
    way: str, memory_format: torch.memory_format
) -> None:
    norm = Normalisation(SHAPE[1]).double()
    expected = gradients(
        copy.deepcopy(norm), lambda norm, maps, _: batch_norm_2d(norm, maps), False, memory_format
    )
    found = gradients(norm, lambda norm, maps, _: norm(maps), False, memory_format)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "memory_format",
    [torch.contiguous_format, torch.channels_last],
    ids=["contiguous", "channels-last"],
)
@pytest.mark.parametrize("pooled", [False, True])
def test_a_shortcut_that_is_normalised_too(
    pooled: bool, way: str, memory_format: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient is taken in parts, also where what comes back is one number per window."""
    handed = []

    def noted(gradient: ActivationGradient) -> Tensor:
        handed.append(gradient.shape)
        return before_activation(gradient.gradient, gradient.activated)

    monkeypatch.setattr(ActivationGradient, "whole", noted)
    found = []
    for plainly in (False, True):
        norms, torch_seed = (made(), Normalisation(SHAPE[1]).double()), torch.manual_seed(2)
        leaves = [
            torch.randn(SHAPE, dtype=torch.float64, generator=torch_seed).contiguous(
                memory_format=memory_format
            )
            for _ in norms
        ]
        one, other = (leaf.requires_grad_() for leaf in leaves)
        if plainly:
            output = plain(norms[0], one * 1, batch_norm_2d(norms[1], other * 1))
        else:
            output = norms[0](one * 1, norms[1](other * 1), spare=True)
        (average_alone(output, (2, 3)) if pooled else output).cos().sum().backward()
        found.append(
            [
                one.grad,
                other.grad,
                *(parameter.grad for norm in norms for parameter in norm.parameters()),
            ]
        )
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert all(shape[0] < SHAPE[0] for shape in handed) or way == "in place, at once"
    assert bool(handed) == (way != "small")


def test_the_gradient_of_a_shortcut_that_others_read_is_whole(way: str) -> None:
    norms, seen = (made(torch.float32), made(torch.float32)), []
    first = norms[0](torch.randn(SHAPE, requires_grad=True) * 1)
    second = norms[1](first * 2, first)
    second.grad_fn.register_hook(
        lambda given, _: seen.append(type(given[1])) if way != "small" else None
    )
    second.square().sum().backward()
    assert seen == ([] if way == "small" else [Tensor])


def test_a_normalised_shortcut_that_is_not_said_to_be_spare_stays(way: str) -> None:
    found = []
    for plainly in (False, True):
        norms = made(), Normalisation(SHAPE[1]).double()
        leaf = torch.linspace(-3, 2, 360, dtype=torch.float64).reshape(SHAPE).sin().requires_grad_()
        shortcut = batch_norm_2d(norms[1], leaf * 1) if plainly else norms[1](leaf * 1)
        output = plain(norms[0], leaf * 2, shortcut) if plainly else norms[0](leaf * 2, shortcut)
        (output.square() + 3 * shortcut).sum().backward()
        found.append((output, leaf.grad, norms[1].weight.grad))
    torch.testing.assert_close(*found)


def test_any_other_operation_gets_the_whole_gradient() -> None:
    gradient, activated = torch.randn(SHAPE), torch.randn(SHAPE)
    expected = torch.where(activated > 0, gradient, SLOPE * gradient)
    found = ActivationGradient(gradient, activated)
    torch.testing.assert_close(found + 0, expected)
    torch.testing.assert_close(torch.cat([part + 0 for part in found.segments(4)]), expected)


def test_the_gradient_is_written_over_the_maps(way: str) -> None:
    maps = torch.randn(SHAPE, requires_grad=True) * 1
    seen: list[Tensor] = []
    maps.register_hook(seen.append)
    made(torch.float32)(maps).square().sum().backward()
    assert (seen[0].data_ptr() == maps.data_ptr()) == (way != "small")


def test_a_gradient_of_one_number_expanded(way: str) -> None:
    maps, found = torch.randn(SHAPE, dtype=torch.float64), []
    for forward in (plain, NormalisedActivation.__call__):
        norm, leaf = made(), maps.clone().requires_grad_()
        forward(norm, leaf * 1, None).sum().backward()
        found.append((leaf.grad, norm.weight.grad, norm.bias.grad))
    torch.testing.assert_close(*found)


def test_maps_that_need_no_gradient_stay(way: str) -> None:
    maps = torch.randn(SHAPE)
    before, norm = maps.clone(), made(torch.float32)
    norm(maps).sum().backward()
    assert norm.weight.grad is not None
    assert torch.equal(maps, before)


def test_mixed_precision(way: str) -> None:
    found = []
    for forward in (plain, NormalisedActivation.__call__):
        norm, leaf = made(torch.float32), torch.linspace(-1, 1, 360).reshape(SHAPE).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = forward(norm, leaf.bfloat16(), None)
        assert output.dtype == torch.bfloat16
        (output.float() * leaf.detach().cos()).sum().backward()
        found.append((leaf.grad, norm.weight.grad, norm.bias.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02 * float(other.abs().max()))


@pytest.mark.parametrize("shortcut", [None, torch.ones(SHAPE)], ids=["alone", "shortcut"])
def test_outside_of_plain_training_it_is_the_plain_modules(shortcut: Tensor | None) -> None:
    for norm in (made(torch.float32).eval(), made(torch.float32)):
        maps, twin = torch.randn(SHAPE), copy.deepcopy(norm)
        assert torch.equal(norm(maps.clone(), shortcut), plain(twin, maps, shortcut))
        assert torch.equal(norm.running_var, twin.running_var)
        assert torch.equal(norm.num_batches_tracked, twin.num_batches_tracked)


@pytest.mark.parametrize("name", ["vgg8b", "resnet18", "resnet32"])
def test_synchronised_normalisation_leaves_the_function_as_it_is(name: str) -> None:
    """``convert_sync_batchnorm`` replaces every ``BatchNorm2d`` by a module that knows of no
    activation.
    """
    torch.manual_seed(0)
    network = create_model(name, width=1 / 16, image_size=8)
    network(torch.randn(8, 3, 8, 8))  # running statistics that are not those of the start
    network.eval()
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(network))
    images = torch.randn(4, 3, 8, 8)
    assert torch.equal(converted(images), network(images))
    count = sum(isinstance(module, NormalisedActivation) for module in network.modules())
    assert (
        count == sum(isinstance(module, NormalisedActivation) for module in converted.modules()) > 0
    )
    assert converted.state_dict().keys() == network.state_dict().keys()


def test_it_is_saved_as_batch_normalisation() -> None:
    norm, twin = Normalisation(4), nn.BatchNorm2d(4)
    assert list(norm.state_dict()) == list(twin.state_dict())
    twin(torch.randn(6, 4, 3, 3))
    norm.load_state_dict(twin.state_dict())
    maps = torch.randn(6, 4, 3, 3)
    assert torch.equal(norm.eval()(maps), twin.eval()(maps))


def test_a_second_backward_pass_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "LARGE_ELEMENTS", 0)
    output = made()(torch.randn(SHAPE, dtype=torch.float64).requires_grad_() * 1)
    output.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="asked for twice"):
        output.sum().backward()


def test_a_gradient_of_the_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_norm, "LARGE_ELEMENTS", 0)
    maps = torch.randn(SHAPE, dtype=torch.float64).requires_grad_()
    [gradient] = torch.autograd.grad(made()(maps * 1).square().sum(), maps, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_what_it_cannot_normalise_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        made()(torch.zeros(1, 5, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="expected 4D input"):
        made()(torch.zeros(6, 5, dtype=torch.float64))


@pytest.mark.parametrize(
    "memory_format",
    [torch.contiguous_format, torch.channels_last],
    ids=["contiguous", "channels-last"],
)
@pytest.mark.parametrize("shortcut", [False, True], ids=["alone", "shortcut"])
@pytest.mark.parametrize(
    ("of_maps", "of_weights"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64,) * 2,
    ],
    ids=str,
)
def test_it_can_write_over_its_maps(
    of_maps: torch.dtype,
    of_weights: torch.dtype,
    shortcut: bool,
    memory_format: torch.memory_format,
) -> None:
    norm = made(of_weights).eval()
    maps = torch.randn(SHAPE, dtype=of_maps).contiguous(memory_format=memory_format)
    added = torch.ones(SHAPE, dtype=of_maps) if shortcut else None
    with torch.no_grad():
        expected = norm(maps, added)
        with overwriting({norm}):
            found = norm(maps, added)
    assert torch.equal(found, expected)
    assert found.data_ptr() == maps.data_ptr()
    assert added is None or bool((added == 1).all())


@pytest.mark.parametrize(
    ("training", "passes_gradients", "named"),
    [(True, False, True), (False, True, True), (False, False, False)],
)
def test_elsewhere_maps_stay(training: bool, passes_gradients: bool, named: bool) -> None:
    norm = made(torch.float32).train(training)
    maps = torch.randn(SHAPE)
    before = maps.clone()
    with overwriting({norm} if named else {made()}), torch.set_grad_enabled(passes_gradients):
        norm(maps)
    with pytest.raises(KeyError), overwriting({norm}):
        raise KeyError
    with torch.no_grad():
        norm(maps)
    assert torch.equal(maps, before)


@pytest.mark.parametrize("name", ["vgg8b", "resnet18", "resnet50", "resnet32", "pre-activation"])
def test_a_network_says_which_maps_nothing_else_reads(name: str) -> None:
    for at in ("layer", "block", 1):
        for unit in learner(name, at=at).units:
            norms = {module for module in unit.piece.modules() if isinstance(module, Normalisation)}
            assert sole_readers(unit.piece) == norms


class Shared(nn.Module):
    """What the normalisation reads is also added to what it gives."""

    def __init__(self, convolves: bool) -> None:
        super().__init__()
        self.before, self.conv = (
            nn.Conv2d(1, 4, 3),
            nn.Conv2d(4, 4, 3, padding=1) if convolves else nn.Identity(),
        )
        self.norm, self.out = NormalisedActivation(4), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        before = self.before(images)
        maps = self.conv(before)
        return self.out(
            (self.norm(maps) + (maps if isinstance(self.conv, nn.Conv2d) else before)).mean((2, 3))
        )


@pytest.mark.parametrize("convolves", [True, False])
def test_maps_that_something_else_reads_are_none_of_them(convolves: bool) -> None:
    units = localize(Shared(convolves), torch.zeros(2, 1, 8, 8), 3, loss="pred").units
    assert not any(sole_readers(unit.piece) for unit in units)


def test_maps_that_a_hook_sees_are_none_of_them() -> None:
    [first, *_] = learner("vgg8b").units
    conv, norm = (
        next(m for m in first.piece.modules() if isinstance(m, kind))
        for kind in (nn.Conv2d, Normalisation)
    )
    assert sole_readers(first.piece) == {norm}
    for register in (
        conv.register_forward_hook,
        norm.register_forward_hook,
        norm.register_forward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert not sole_readers(first.piece)
        handle.remove()
    assert sole_readers(first.piece) == {norm}


@pytest.mark.parametrize("memory_format", ["contiguous", "channels-last"])
@pytest.mark.parametrize("amp", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["vgg8b", "resnet18", "resnet50", "resnet32"])
def test_frozen_units_pass_on_the_same(
    name: str, amp: torch.dtype | None, memory_format: str
) -> None:
    local = learner(name, amp=amp)
    set_memory_format(local, memory_format)
    local.train(False)
    activations: tuple[Tensor, ...] = (torch.randn(4, 1, 8, 8),)
    passed = pass_through(local.units, activations)
    with torch.no_grad():
        for unit in local.units:
            activations = unit.forward(activations)
    assert all(torch.equal(one, other) for one, other in zip(passed, activations, strict=True))


@pytest.mark.parametrize(("loss", "maps"), [("pred", 5), ("predsim-lite", 4)])
def test_few_maps_of_a_unit_are_alive_at_its_peak(loss: str, maps: int) -> None:
    """The batch, its copy in channels-last, the convolution's and its own output; by ``pred`` the
    gradient of that, whole.
    """
    one_map = 512 * 64 * 32 * 32 * 4  # bytes
    network = nn.Sequential(
        nn.Conv2d(64, 64, 3, padding=1), NormalisedActivation(64), nn.Conv2d(64, 10, 1)
    )
    network = nn.Sequential(*network, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    peak = predict_peak(network, (512, 64, 32, 32), 10, loss=loss, output_layer="separate")
    assert maps * one_map < peak < (maps + 0.4) * one_map


@pytest.mark.parametrize("cache", [False, True])
def test_few_maps_are_alive_where_units_learn_one_after_another(cache: bool) -> None:
    """Of a unit: what enters, the convolution's output and its own; frozen ones before it need no
    more.
    """
    one_map = 512 * 64 * 32 * 32 * 4  # bytes
    layers = [
        layer
        for inputs in (3, 64, 64)
        for layer in (nn.Conv2d(inputs, 64, 3, padding=1), NormalisedActivation(64))
    ]
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    options = {"cache": True, "keeping": Keeping(say=lambda line: None)} if cache else {}
    options |= {"loss": "predsim-lite", "output_layer": "separate"}
    peak = predict_peak(network, (512, 3, 32, 32), 10, "sequential", "channels-last", **options)
    assert 3 * one_map < peak < 3.4 * one_map


def test_a_hook_on_a_projecting_shortcut_keeps_what_it_saw() -> None:
    """Without one, the block's output is written over it."""
    block = BasicBlock(8, 32, 1, 0.0, "basic")
    images = torch.randn(4, 8, 128, 128)  # large enough for the fast layers
    seen: list[Tensor] = []
    block.shortcut.register_forward_hook(lambda *given: seen.append(given[-1]))
    with torch.no_grad():
        wanted = copy.deepcopy(block).shortcut(images)
    block(images.requires_grad_())
    torch.testing.assert_close(seen[-1].detach(), wanted)
