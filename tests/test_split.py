"""Where networks are cut, what passes a cut, what is refused, and networks of other kinds than the
paper's.
"""

import copy
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise
from layerwise.core.cuts import balance, block_cuts, multiply_adds
from layerwise.core.layers import Network
from layerwise.core.split import Chain, split
from layerwise.core.trace import trace_network
from layerwise.errors import CannotSplit
from layerwise.losses import Targets
from layerwise.models import create_model
from tests.helpers import CLASSES, PreActivation, narrow

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
VGG8B = [
    f"stages.{stage}.{unit}.conv"
    for stage, unit in ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (3, 0))
]


def published(name: str) -> nn.Module:
    """A network of the paper, full depth and few channels, for 8-pixel grey images."""
    torch.manual_seed(0)
    return create_model(name, width=1 / 16, in_chans=1, image_size=8, dropout=0.2)


def activation_shapes(chain: Chain, images: Tensor = IMAGES) -> list[list[tuple[int, ...]]]:
    """The shapes without the batch of all tensors that leave each piece, found by running the
    pieces.
    """
    shapes, activations = [], (images,)
    for piece in chain.pieces:
        activations = piece(*activations)
        shapes.append(
            [tuple(value.shape[1:]) for value in activations if isinstance(value, Tensor)]
        )
    return shapes


def features(chain: Chain, images: Tensor = IMAGES) -> list[tuple[int, ...]]:
    return [shapes[0] for shapes in activation_shapes(chain, images)]


def parameter_names(model: nn.Module, piece: nn.Module) -> set[str]:
    owned = {id(parameter) for parameter in piece.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in owned}


# Units and their names


def test_layers_of_vgg() -> None:
    assert split(published("vgg8b"), "layer").names == (*VGG8B, "hidden.linear", "output")


def test_layers_and_blocks_of_resnet() -> None:
    blocks = [f"stages.{stage}.{block}" for stage in range(4) for block in range(2)]
    convolutions = [f"{block}.conv{number}" for block in blocks for number in (1, 2)]
    assert split(published("resnet18"), "layer").names == ("stem.conv", *convolutions, "output")
    assert split(published("resnet18"), "block").names == ("stem.conv", *blocks, "output")


@pytest.mark.parametrize("at", ["layer", "block"])
def test_without_skips_every_layer_is_a_block(at: str) -> None:
    assert split(published("vgg8b"), at).names == (*VGG8B, "hidden.linear", "output")


@pytest.mark.parametrize("at", ["layer", "block", 1, 2, 3, 5, ["stages.0", "stages.2"]])
@pytest.mark.parametrize("name", ["vgg8b", "resnet18", "resnet32"])
def test_names_are_unique_and_in_number(name: str, at: Any) -> None:
    chain = split(published(name), at, IMAGES)
    assert len(set(chain.names)) == len(chain.names) == len(chain) == len(chain.pieces)
    assert all(chain.names)
    if isinstance(at, int):
        assert len(chain) == at


def test_one_unit_is_the_whole_network() -> None:
    assert split(published("resnet18"), 1).names == ("network",)


@pytest.mark.parametrize(
    ("name", "paths", "names"),
    [
        (
            "vgg8b",
            ["stages.0", "stages.2"],
            ("stages.0", "stages.1.0.conv..stages.2.0.conv", "stages.3.0.conv..output"),
        ),
        (
            "vgg8b",
            ["stages.2", "stages.0"],
            ("stages.0", "stages.1.0.conv..stages.2.0.conv", "stages.3.0.conv..output"),
        ),
        ("vgg8b", ["stages.0", "stages.0"], ("stages.0", "stages.1.0.conv..output")),
        ("vgg8b", ["stages.0.1.conv"], ("stages.0", "stages.1.0.conv..output")),
        ("vgg8b", ["stages.0.1.norm"], ("stages.0", "stages.1.0.conv..output")),
        ("vgg8b", ["hidden", "output"], ("stages.0.0.conv..hidden.linear", "output")),
        ("vgg8b", ["output"], ("network",)),
        (
            "resnet18",
            ["stem", "stages.1.0"],
            ("stem.conv", "stages.0.0.conv1..stages.1.0.conv2", "stages.1.1.conv1..output"),
        ),
        (
            "resnet18",
            ["stages.1.0.conv1"],
            ("stem.conv..stages.1.0.conv1", "stages.1.0.conv2..output"),
        ),
    ],
)
def test_paths_end_units(name: str, paths: list[str], names: tuple[str, ...]) -> None:
    assert split(published(name), paths).names == names


def test_all_blocks_by_path_are_blocks() -> None:
    model = published("resnet18")
    blocks = ["stem", *(f"stages.{stage}.{block}" for stage in range(4) for block in range(2))]
    by_path, by_block = split(model, blocks[::-1]), split(model, "block")
    assert by_path.names == by_block.names
    assert activation_shapes(by_path.eval()) == activation_shapes(by_block.eval())


class Blocks(nn.Module):
    """Pre-activation blocks as modules: a block's last convolution meets the next one's norm."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
            self.norm2, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one, self.two, self.out = (
            nn.Conv2d(1, 4, 3),
            Blocks.Block(),
            Blocks.Block(),
            nn.Linear(4, CLASSES),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.two(self.one(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("at", "names"),
    [("block", ("stem", "one", "two", "out")), (["one", "two"], ("stem..one.conv2", "two", "out"))],
)
def test_a_block_ends_where_one_tensor_leaves_it(at: Any, names: tuple[str, ...]) -> None:
    model = Blocks()
    chain = split(model, at)
    assert chain.names == names
    assert all(len(shapes) == 1 for shapes in activation_shapes(chain))
    two = {name for name, _ in model.named_parameters() if name.startswith("two.")}
    assert parameter_names(model, chain.pieces[-2]) == two


# What passes a cut


def test_features_are_taken_before_dropout_and_pooling() -> None:
    model = published("vgg8b")
    assert features(split(model)) == [
        *[(8, 8, 8), (16, 8, 8)],  # the pooling of 2 × 2 pixels comes after the feature
        *[(16, 4, 4), (32, 4, 4)],
        *[(32, 2, 2), (32, 1, 1), (64,), (10,)],
    ]
    dropouts = [
        sum(isinstance(module, nn.modules.dropout._DropoutNd) for module in piece.modules())
        for piece in split(model).pieces
    ]
    assert dropouts == [0, 1, 1, 1, 1, 1, 1, 1]


class Functional(nn.Module):
    """Pooling, dropout and reshaping by functions and methods, decided by ``self.training``."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)
        self.out = nn.Linear(6 * 4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout2d(F.max_pool2d(F.relu(self.conv1(x)), 2), 0.5, self.training)
        x = F.adaptive_avg_pool2d(F.dropout(F.relu(self.conv2(x)), training=self.training), 2)
        return self.out(x.view(x.size(0), -1))


def test_features_are_taken_before_functional_dropout_and_pooling() -> None:
    assert features(split(Functional())) == [(4, 8, 8), (6, 4, 4), (10,)]


def test_between_blocks_passes_one_tensor_and_inside_a_block_two() -> None:
    model = published("resnet18")
    assert [len(shapes) for shapes in activation_shapes(split(model))] == [1, *[2, 1] * 8, 1]
    assert [len(shapes) for shapes in activation_shapes(split(model, "block"))] == [1] * 10
    shapes = activation_shapes(split(model))
    assert shapes[1] == [(4, 8, 8), (4, 8, 8)]
    assert shapes[5] == [(8, 4, 4), (4, 8, 8)]  # the input of the shortcut's convolution passes
    assert shapes[6] == [(8, 4, 4)]


@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_a_shortcut_learns_with_its_blocks_last_convolution(name: str) -> None:
    model = published(name)
    chain = split(model)
    shortcuts = [
        path
        for path, module in model.named_modules()
        if path.endswith("shortcut") and list(module.parameters())
    ]
    assert len(shortcuts) == (3 if name == "resnet18" else 4)
    for path in shortcuts:
        block = path.removesuffix(".shortcut")
        last = "conv2" if name == "resnet18" else "conv3"
        piece = chain.pieces[chain.names.index(f"{block}.{last}")]
        norm = last.replace("conv", "norm")
        kinds = (f"{path}.0.weight", f"{path}.1.weight", f"{path}.1.bias")
        assert parameter_names(model, piece) == {
            *kinds,
            f"{block}.{last}.weight",
            f"{block}.{norm}.weight",
            f"{block}.{norm}.bias",
        }


def test_a_shortcut_that_forward_computes_first_learns_with_its_blocks_last_convolution() -> None:
    model = PreActivation()
    chain = split(model)
    owner = {
        name
        for piece in chain.pieces
        for name in parameter_names(model, piece)
        if "shortcut.weight" in parameter_names(model, piece)
    }
    assert owner == {
        "shortcut.weight",
        "shortcut.bias",
        "conv2.weight",
        "conv2.bias",
        "norm3.weight",
        "norm3.bias",
    }
    # two skips are alive at once
    assert [len(shapes) for shapes in activation_shapes(chain)] == [3, 3, 3, 2, 1]


def test_a_free_shortcut_passes_subsampled() -> None:
    shapes = dict(
        zip(
            split(published("resnet32")).names,
            activation_shapes(split(published("resnet32"))),
            strict=True,
        )
    )
    assert shapes["stages.0.4.conv2"] == [(1, 8, 8)]
    assert shapes["stages.1.0.conv1"] == [(2, 4, 4), (2, 4, 4)]
    assert shapes["stages.2.0.conv1"] == [(4, 2, 2), (4, 2, 2)]


def test_pieces_hold_the_networks_own_modules() -> None:
    model = published("resnet18")
    before = [*model.state_dict()]
    chain = split(model)
    convolution: Any = next(
        module for module in chain.pieces[3].modules() if isinstance(module, nn.Conv2d)
    )
    assert convolution is model.stages[0][1].conv1
    assert [*model.state_dict()] == before
    chain.train()(IMAGES)
    assert int(model.stem.norm.num_batches_tracked) == 1


# Training and evaluation


@pytest.mark.parametrize("training", [False, True])
def test_functional_dropout_follows_its_unit(training: bool) -> None:
    model = Functional().train(training)
    chain = split(model)
    assert chain.training == training
    assert torch.equal(chain(IMAGES), chain(IMAGES)) != training  # as the model, from the beginning
    chain.train(not training)
    assert torch.equal(chain(IMAGES), chain(IMAGES)) == training
    chain.eval()
    chain.pieces[1].train()  # dropout behind the first convolution belongs to the second unit
    first = chain.pieces[0](IMAGES)
    assert torch.equal(first[0], chain.pieces[0](IMAGES)[0])
    assert not torch.equal(chain.pieces[1](*first)[0], chain.pieces[1](*first)[0])


def test_dropout_in_evaluation_only() -> None:
    class Contrary(Functional):
        def forward(self, x: Tensor) -> Tensor:
            x = F.dropout(F.relu(self.conv1(x)), 0.5, not self.training)
            return self.out(F.adaptive_avg_pool2d(self.conv2(x), 2).flatten(1))

    chain = split(Contrary())
    assert torch.equal(chain.train()(IMAGES), chain(IMAGES))
    assert not torch.equal(chain.eval()(IMAGES), chain(IMAGES))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("at", ["layer", 3])
def test_modes_are_as_before(training: bool, at: Any) -> None:
    model = published("resnet18").train(training)
    model.stages[1][0].norm1.train(not training)
    modes = {name: module.training for name, module in model.named_modules()}
    before = copy.deepcopy(model.state_dict())
    split(model, at, IMAGES)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_modes_are_as_before_after_a_refusal() -> None:
    model = Functional().eval()
    model.conv1.train()
    with pytest.raises(CannotSplit):
        split(model, ["conv3"])
    assert [model.training, model.conv1.training, model.conv2.training] == [False, True, False]


def test_one_dropout_shared_by_units_has_a_mode_in_each() -> None:
    model = narrow("resnet18", dropout=0.5)
    chain = split(model).eval()
    first = chain.pieces[0](IMAGES)  # its dropout belongs to the next unit
    chain.pieces[2].train()
    second = chain.pieces[1](*first)
    assert torch.equal(second[0], chain.pieces[1](*first)[0])
    assert not torch.equal(chain.pieces[2](*second)[0], chain.pieces[2](*second)[0])


# A number of units


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize(
    "costs", [[5, 1, 1, 1, 1, 5], [1, 2, 3, 4, 5, 6], [6, 0, 0, 0, 0, 1], [1] * 6, [0] * 6], ids=str
)
def test_balance_is_the_best_of_all_choices(costs: list[float], count: int) -> None:
    def dearest(lasts: Sequence[int]) -> float:
        return max(
            sum(costs[a:b]) for a, b in pairwise([0, *(last + 1 for last in lasts), len(costs)])
        )

    chosen = balance(costs, count)
    assert len(chosen) == count - 1
    assert chosen == sorted(set(chosen))
    assert dearest(chosen) == min(
        dearest(lasts) for lasts in combinations(range(len(costs) - 1), count - 1)
    )


@pytest.mark.parametrize("count", [2, 3, 4, 5])
@pytest.mark.parametrize("name", ["vgg8b", "resnet18"])
def test_units_in_number_balance_multiply_adds(name: str, count: int) -> None:
    model = published(name)
    network = Network(*trace_network(model))
    costs = multiply_adds(network, IMAGES)
    order = list(network.graph.nodes)

    def dearest(cuts: Sequence[Any]) -> float:
        place = network.place(cuts)
        return max(
            sum(costs[node] for node in order if place[node] == unit)
            for unit in range(len(cuts) + 1)
        )

    best = min(dearest(cuts) for cuts in combinations(block_cuts(network), count - 1))
    chain, activations, found = split(model, count, IMAGES), (IMAGES[:2],), []
    for piece in chain.eval().pieces:
        counter = torch.utils.flop_counter.FlopCounterMode(display=False)
        with counter, torch.no_grad():
            activations = piece(*activations)
        found.append(counter.get_total_flops() / 2)
    assert max(found) == best > 0


def test_more_units_than_blocks_cut_inside_blocks() -> None:
    model = narrow("resnet18")
    assert len(split(model, "block")) == 6
    assert len(split(model, 6, IMAGES)) == 6
    assert split(model, 10, IMAGES).names == split(model, "layer").names


# Refusals


class Net(nn.Module):
    """Two convolutions and a classifier; the refused networks below differ in one thing each."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, padding=1),
            nn.Linear(4, CLASSES),
        )

    def forward(self, x: Tensor) -> Any:
        return self.out(self.b(F.relu(self.a(x))).mean((2, 3)))


class Unused(Net):
    def __init__(self) -> None:
        super().__init__()
        self.old = nn.Linear(3, 3)


class CalledTwice(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3)))


class NormalisesTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(4, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.a(x)))
        return self.out(F.relu(self.norm(self.b(x))).mean((2, 3)))


class Tied(Net):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv2d(4, 4, 3, padding=1)
        self.c.weight = self.b.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.c(F.relu(self.b(F.relu(self.a(x))))).mean((2, 3)))


class BareTwice(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.out((self.gamma * self.b(self.gamma * self.a(x))).mean((2, 3)))


class Decides(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) if x.sum() > 0 else self.conv(-x)


class DataDependent(Net):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.ReLU(), Decides())

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.inner(self.a(x))).mean((2, 3)))


class RootDecides(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if x.sum() > 0 else super().forward(-x)


class Tuple(Net):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x), x


class Dictionary(Net):
    def forward(self, x: Tensor) -> Any:
        return {"scores": super().forward(x)}


class TwoInputs(Net):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return super().forward(x + y)


class Constant(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.out.bias


class OtherLayerInTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = F.relu(x) if self.training else F.silu(x)
        return self.out(self.b(x).mean((2, 3)))


class OtherWayAtTheEndOfAModule(Net):
    """The way parts inside of a module, whose last operation one of the modes leaves out."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return x * 2 if self.training else x

    def __init__(self) -> None:
        super().__init__()
        self.twice = self.Twice()

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.b(self.twice(self.a(x))).mean((2, 3)))


class OtherWayBetweenLayersOfAList(Net):
    """The list itself is never called, so it has no way of its own."""

    def __init__(self, extra: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        for layer in self.layers:
            x = layer(x)
            if self.training:
                x = x * 1.1 + 0.1
        return self.out(x.mean((2, 3)))


class LayerInTrainingAlone(Net):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        if self.training:
            x = self.extra(x)
        return self.out(self.b(x).mean((2, 3)))


class OtherActivationInTraining(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x = F.relu(x) if self.training else F.gelu(x)
        return self.out(self.b(x).mean((2, 3)))


class DiscardedFunction(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        F.relu_(x)
        return self.out(self.b(x).mean((2, 3)))


class DiscardedMethod(Net):
    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        x.mul_(2)
        return self.out(self.b(x).mean((2, 3)))


class DiscardedModule(Net):
    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.relu(x)
        return self.out(self.b(x).mean((2, 3)))


class WritesBuffer(Net):
    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x)


class ReplacesBuffer(WritesBuffer):
    def forward(self, x: Tensor) -> Tensor:
        self.calls = self.calls + 1
        return Net.forward(self, x)


class Noise(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.randn(1))


@pytest.mark.parametrize(
    ("make", "at", "words"),
    [
        (Unused, "layer", r"'old.weight' and 1 more would belong to no unit, .*Remove the module"),
        (
            CalledTwice,
            "layer",
            r"'b.weight' is used in units 1, 2, .*weights of its own, or cut so that all uses",
        ),
        (CalledTwice, "block", r"'b.weight' is used in units 1, 2, .*at=\['a'"),
        (Tied, "layer", r"'b.weight' is used in units 1, 2, .*Give each layer weights of its own"),
        (
            NormalisesTwice,
            "layer",
            r"module 'norm', which holds running statistics, is used in units 0, 1",
        ),
        (BareTwice, "layer", r"'gamma' is used in units 0, 1"),
        (
            DataDependent,
            "layer",
            r"module 'inner.1' \(Decides\) cannot be traced: .*leaves=\['inner.1'\]",
        ),
        (RootDecides, "layer", "the network itself cannot be traced: .*without control flow"),
        (TwoInputs, "layer", r"its forward takes 2 inputs \(x, y\)"),
        (Tuple, "layer", "does not return one tensor .* return the logits alone"),
        (Dictionary, "layer", "does not return one tensor .* return the logits alone"),
        (Constant, "layer", "does not return one tensor that depends on its input"),
        (OtherLayerInTraining, "layer", "takes another way in training than in evaluation"),
        (
            OtherWayBetweenLayersOfAList,
            "layer",
            "in the network itself, .*move that part into",
        ),
        (
            LayerInTrainingAlone,
            "layer",
            "in the network itself, .*move that part into",
        ),
        (OtherWayAtTheEndOfAModule, "layer", r"in module 'twice', .*leaves=\['twice'\]"),
        (OtherActivationInTraining, "layer", "takes another way in training than in evaluation"),
        (
            DiscardedFunction,
            "layer",
            "'relu_' in the network itself changes a tensor in place .*Use its result",
        ),
        (
            DiscardedMethod,
            "layer",
            "'mul_' in the network itself changes a tensor in place .*Use its result",
        ),
        (DiscardedModule, "layer", "in module 'relu' changes a tensor in place .*Use its result"),
        (WritesBuffer, "layer", "writes to buffer 'calls'.*or update it outside of forward"),
        (ReplacesBuffer, "layer", "writes to buffer 'calls'"),
        (Noise, "layer", "draws random numbers from PyTorch without its input.*torch.randn_like"),
        (
            lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(1)),
            "layer",
            "no weighted layer .*Pass the module that holds",
        ),
        (Net, ["c"], "Cannot cut behind 'c': .*Name a module that holds such layers, like 'a'"),
        (Net, ["a", "c"], "Cannot cut behind 'c'"),
        (Net, [""], "Cannot cut behind ''"),
        (
            Net,
            "layers",
            "at='layers': it names no place to cut. Give 'layer', 'block', 'module', a number",
        ),
        (Net, "a", "at='a': it names no place"),
        (Net, [], r"at=\[\]: it names no place"),
        (Net, [1, 2], r"at=\[1, 2\]: it names no place"),
        (Net, None, "at=None: it names no place"),
        (Net, True, "at=True: it names no place"),
        (Net, 2.5, "at=2.5: it names no place"),
        (Net, 0, "Cannot split into 0 units: the network has 3 weighted layers"),
        (Net, -1, "into -1 units"),
        (Net, 4, "into 4 units: the network has 3 weighted layers. Choose 1 to 3"),
        (
            lambda: narrow("resnet18"),
            11,
            "into 11 units: the network has 10 weighted layers. Choose 1 to 10",
        ),
        (
            lambda: narrow("resnet18"),
            ["stages.1.0.shortcut"],
            "'stages.1.0.shortcut': it is not a module on the main path",
        ),
        (
            lambda: narrow("vgg8"),
            ["stages.0.0", "stages.0.1"],
            "unit 1 would hold no weighted layer, .*Leave one of them out",
        ),
    ],
)
def test_refusals(make: Callable[[], nn.Module], at: Any, words: str) -> None:
    with pytest.raises(CannotSplit, match=words):
        split(make(), at, IMAGES)


@pytest.mark.parametrize("count", [2, 3])
def test_a_number_of_units_needs_a_sample(count: int) -> None:
    with pytest.raises(
        CannotSplit,
        match=f"at={count}: multiply-adds are balanced.*Pass sample=, a batch of images",
    ):
        split(Net(), count)


def test_a_refused_network_keeps_its_buffers() -> None:
    for make in (WritesBuffer, ReplacesBuffer):
        model = make()
        buffer = model.calls
        with pytest.raises(CannotSplit):
            split(model)
        assert model.calls is buffer
        assert int(buffer) == 0


@pytest.mark.parametrize("make", [CalledTwice, Tied, BareTwice])
def test_weights_may_be_shared_inside_a_unit(make: type[Net]) -> None:
    model = make()
    chain = split(model, 1)
    assert torch.equal(chain(IMAGES), model(IMAGES))
    assert len(list(chain.parameters())) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "leaves",
    [["inner.1"], ["inner"], (path for path in ["inner.1"])],
    ids=["itself", "parent", "generator"],
)
def test_control_flow_is_kept_whole_by_leaves(leaves: Any) -> None:
    model = DataDependent()
    chain = split(model, "layer", leaves=leaves)
    assert len(chain) == 4
    assert chain.names[1] in ("inner.1", "inner")
    for images in (IMAGES, -IMAGES):
        assert torch.equal(chain(images), model(images))


# Networks of other kinds


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.one = nn.Conv2d(4, 3, 1)
        self.three = nn.Sequential(
            nn.Conv2d(4, 3, 1), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1)
        )
        self.pool = nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.Conv2d(4, 2, 1))
        self.out = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = F.leaky_relu(torch.cat([self.one(x), self.three(x), self.pool(x), x], 1))
        return self.out(x.mean((2, 3)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Conv2d(1 + 3 * number, 3, 3, padding=1) for number in range(4)
        )
        self.out = nn.Linear(13, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        seen = [x]
        for layer in self.layers:
            seen.append(F.relu(layer(torch.cat(seen, 1))))
        return self.out(torch.cat(seen, 1).mean((2, 3)))


class SqueezeExcitation(nn.Module):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.squeeze, self.excite = nn.Linear(6, 3), nn.Linear(3, 6)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.conv(x))
            gate = torch.sigmoid(self.excite(F.relu(self.squeeze(y.mean((2, 3))))))
            return F.relu(x + y * gate[:, :, None, None])

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = (
            nn.Conv2d(1, 6, 3, padding=1),
            nn.Sequential(self.Block(), self.Block()),
        )
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(self.stem(x)).mean((2, 3)))


class MobileNet(nn.Module):
    class Block(nn.Sequential):
        def __init__(self, width: int) -> None:
            super().__init__(
                *[
                    nn.Conv2d(width, 2 * width, 1, bias=False),
                    nn.BatchNorm2d(2 * width),
                    nn.ReLU6(inplace=True),
                ],
                *[
                    nn.Conv2d(2 * width, 2 * width, 3, padding=1, groups=2 * width, bias=False),
                    nn.BatchNorm2d(2 * width),
                ],
                *[
                    nn.ReLU6(inplace=True),
                    nn.Conv2d(2 * width, width, 1, bias=False),
                    nn.BatchNorm2d(width),
                ],
            )

        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 4, 3, 2, 1),
            nn.BatchNorm2d(4),
            nn.ReLU6(True),
            self.Block(4),
            self.Block(4),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(4, CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.adaptive_avg_pool2d(self.features(x), 1).flatten(1))


class ConvNeXt(nn.Module):
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.depthwise, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.LayerNorm(4)
            self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
            self.gamma = nn.Parameter(torch.full((4,), 0.1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
            y = self.gamma * self.down(F.gelu(self.up(y)))
            return x + y.permute(0, 3, 1, 2)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(1, 4, 2, 2), nn.Sequential(self.Block(), self.Block())
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.stem(x)).mean([-2, -1])))


class UNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, 2, 1)
        self.bottom = nn.Conv2d(6, 6, 3, 2, 1)
        self.up2, self.up1 = nn.ConvTranspose2d(6, 6, 2, 2), nn.Conv2d(12, 4, 3, padding=1)
        self.last, self.out = nn.Conv2d(8, 4, 3, padding=1), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        one = F.relu(self.down1(x))
        two = F.relu(self.down2(one))
        y = F.relu(self.up2(F.relu(self.bottom(two))))
        y = F.relu(self.up1(torch.cat([y, two], 1)))
        y = F.relu(self.last(torch.cat([F.interpolate(y, scale_factor=2), one], 1)))
        return self.out(y.mean((2, 3)))


class BareWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(12, 64) / 8)
        self.second = nn.Parameter(torch.randn(CLASSES, 12) / 4)
        self.bias = nn.Parameter(torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(F.linear(x.flatten(1), self.first))
        return F.linear(x, self.second, self.bias)


class Buffers(nn.Module):
    """A buffer and a constant used in forward, a fixed kernel that is no layer to train, a weight
    made from a parameter.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.3]))
        self.register_buffer("blur", torch.ones(4, 1, 2, 2) / 4)
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.weight = nn.Parameter(torch.randn(CLASSES, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.conv1((x - self.mean) / torch.tensor(0.5)))
        x = F.conv2d(x, self.blur, stride=2, groups=4)
        x = F.relu(self.conv2(x)) - self.mean
        return F.linear(x.mean((2, 3)), self.weight / self.weight.norm(dim=1, keepdim=True))


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.out = nn.Linear(4 * 16, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.stem(x)))
        y = self.conv2(self.relu(self.conv1(x)))
        y += x
        y = self.drop(F.max_pool2d(F.relu(y, inplace=True), 2))
        return self.out(y.view(y.size(0), -1))


class Sizes(nn.Module):
    """Sizes read from tensors, in views and as ends of slices."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(2, 4, 3, padding=1)
        self.out = nn.Linear(4 * 64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch, _, height, _ = x.shape
        x = F.relu(self.conv1(x.mT))
        x = F.relu(self.conv2(x[:, : x.shape[1] // 2]))
        return self.out(x.reshape(batch, 4 * height * x.size(-1)))


def sequential() -> nn.Module:
    return nn.Sequential(
        *[nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.PReLU(), nn.MaxPool2d(2), nn.Dropout(0.3)],
        *[
            nn.Conv2d(4, 6, 2),
            nn.InstanceNorm2d(6, affine=False),
            nn.Tanh(),
            nn.Flatten(),
            nn.Linear(6 * 4, CLASSES),
        ],
    )


def linear() -> nn.Module:
    return nn.Linear(64, CLASSES)


BLOCK = ("depthwise", "up", "down")
OTHERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "inception": (Inception, ["stem", "three.0", "three.2", "out"]),
    "dense": (Dense, ["layers.0", "layers.1", "layers.2", "layers.3", "out"]),
    "squeeze and excitation": (
        SqueezeExcitation,
        ["stem", "blocks.0", "blocks.1", "out"],  # a gate belongs to the unit that it scales
    ),
    "mobilenet": (
        MobileNet,
        ["features.0", *(f"features.{i}.{j}" for i in (3, 4) for j in (0, 3, 6)), "classifier.1"],
    ),
    "convnext": (
        ConvNeXt,
        ["stem", *(f"blocks.{i}.{layer}" for i in range(2) for layer in BLOCK), "head"],
    ),
    "u-net": (UNet, ["down1", "down2", "bottom", "up2", "up1", "last", "out"]),
    "sequential": (sequential, ["0", "5", "9"]),
    "linear": (linear, ["network"]),
    "bare weight": (BareWeight, ["network#0", "network#1"]),
    "buffers": (Buffers, ["conv1", "conv2", "network"]),
    "in place": (InPlace, ["stem", "conv1", "conv2", "out"]),
    "sizes": (Sizes, ["conv1", "conv2", "out"]),
    "pre-activation blocks": (
        Blocks,
        ["stem", "one.conv1", "one.conv2", "two.conv1", "two.conv2", "out"],
    ),
    "functional": (Functional, ["conv1", "conv2", "out"]),
}


def other(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return OTHERS[name][0](), IMAGES.flatten(1) if name == "linear" else IMAGES


@pytest.mark.parametrize("name", OTHERS)
def test_layers_of_other_networks(name: str) -> None:
    assert list(split(other(name)[0]).names) == OTHERS[name][1]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("at", ["layer", "block", 1])
@pytest.mark.parametrize("name", OTHERS)
def test_other_networks_composed_are_the_network(name: str, at: Any, training: bool) -> None:
    model, images = other(name)
    chain = split(model, at, images)
    model.train(training)
    chain.train(training)
    outputs = []
    for version in (model, chain):
        torch.manual_seed(1)  # the same dropout
        outputs.append(version(images.clone()))
    assert torch.equal(outputs[0], outputs[1])
    owners = [id(parameter) for piece in chain.pieces for parameter in piece.parameters()]
    assert sorted(owners) == sorted(id(parameter) for parameter in model.parameters())
    if at == "block":
        assert all(len(shapes) == 1 for shapes in activation_shapes(chain, images))


@pytest.mark.parametrize("at", ["layer", "block"])
@pytest.mark.parametrize("name", OTHERS)
def test_every_parameter_of_other_networks_learns_locally(name: str, at: str) -> None:
    model, images = other(name)
    labels = torch.arange(len(images))
    kept = images.clone()

    def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-2)

    learner = layerwise.localize(model, images, CLASSES, loss="pred", at=at, optimizer=adam, seed=0)
    # the heads start at zero, so only they and the output layer learn in the first step
    learner.step(images, labels)
    before = copy.deepcopy(dict(model.named_parameters()))
    learner.step(images, labels)
    still = [
        name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])
    ]
    assert still == []
    assert torch.equal(images, kept)


@pytest.mark.parametrize(
    ("output_layer", "at", "joined"),
    [
        ("separate", "layer", False),
        ("separate", 3, True),  # some layers before the output layer are in its unit
        ("separate", 1, True),
        ("joined", "layer", True),
        ("joined", ["hidden.linear"], False),  # it names the layer before the output layer
    ],
)
def test_an_output_layer_is_joined_where_its_unit_holds_another(
    output_layer: str, at: Any, joined: bool
) -> None:
    model = layerwise.create_model("vgg8", width=1 / 16, in_chans=1, image_size=8)
    sample = torch.rand(4, 1, 8, 8)
    chain = split(model, at, sample, output_layer=output_layer)
    assert chain.joined == joined
    local = layerwise.localize(
        model, sample, CLASSES, "predsim", at, output_layer=output_layer, check=False
    )
    labels = torch.arange(4)
    logits = model.train()(sample)
    plain = F.cross_entropy(logits, labels)
    value = local.units[-1].loss(logits, Targets(labels, CLASSES)).loss
    assert value.item() == pytest.approx(plain.item() * (1.0 if joined else 0.01), rel=1e-5)
