"""Networks of all kinds: what fx alone cannot trace, gates, drop path, parts, auxiliary heads,
objects as outputs. Small members of each, written here, since their libraries don't import
everywhere.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import layerwise
from layerwise.core import head_memory
from layerwise.core.cuts import COARSEST, equal_cuts, multiply_adds
from layerwise.core.layers import Network
from layerwise.core.split import split
from layerwise.core.trace import trace_network
from layerwise.errors import CannotSplit, InvalidInput
from layerwise.losses import LOSSES
from tests.helpers import CLASSES

IMAGES = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def localize(model: nn.Module, **options: Any) -> layerwise.Learner:
    """A learner from two images, so that a step on six shows that the batch's size is open."""
    return layerwise.localize(
        model, IMAGES[:2], CLASSES, loss=options.pop("loss", Norm), optimizer=sgd, seed=0,
        memory_format=None, **options,
    )  # fmt: skip


class Norm(nn.Module):
    """A local loss for features of any shape."""

    def __init__(self, site: layerwise.Site) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features: Tensor, targets: layerwise.Targets) -> layerwise.Evaluated:
        loss = (features * self.scale).square().mean()
        return layerwise.Evaluated(loss, torch.zeros((), dtype=torch.long))


def equals_at_any_batch(model: nn.Module, **options: Any) -> None:
    """Assert that composed units are the network, to the bit, at batch sizes that were not seen."""
    learner = localize(model.eval(), **options)
    for size in (1, 3, 6):
        activations: tuple[Any, ...] = (IMAGES[:size],)
        for unit in learner.units:
            activations = unit.piece(*activations)
        assert torch.equal(activations[0], model(IMAGES[:size]))
    model.train()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    learner.step(IMAGES, LABELS)
    assert all(not torch.equal(before[name], value) for name, value in model.named_parameters())


# What fx alone cannot trace


class Windows(nn.Module):
    """Attention in windows of 2 × 2: sizes are compared, folded into the batch and out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(6, 18, bias=False), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:  # (B, H, W, C)
        batch, height, width, channels = x.shape
        if height % 2 or width % 2:
            x = F.pad(x, (0, 0, 0, width % 2, 0, height % 2))
        x = x.view(batch, height // 2, 2, width // 2, 2, channels).transpose(2, 3)
        x = x.reshape(-1, 4, channels)
        parts = self.qkv(x).reshape(x.shape[0], 4, 3, 2, channels // 2).permute(2, 0, 3, 1, 4)
        q, k, v = parts.unbind(0)
        scores = (q * (channels // 2) ** -0.5 @ k.transpose(-2, -1)).softmax(-1)
        x = self.proj((scores @ v).transpose(1, 2).reshape(x.shape[0], 4, channels))
        whole = int(x.shape[1] ** 0.5)
        assert whole * whole == 4
        x = x.view(batch, height // 2, width // 2, whole, whole, channels).transpose(2, 3)
        return x.reshape(batch, height, width, channels)


class Tokens(nn.Module):
    """A class token and positions, made from sizes; blocks read their sizes in loops."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token = nn.Conv2d(1, 6, 2, 2), nn.Parameter(torch.randn(1, 1, 6))
        self.blocks = nn.ModuleList([Windows(), Windows()])
        self.norms = nn.ModuleList([nn.LayerNorm(6), nn.LayerNorm(6)])
        self.out = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        if (channels, height, width) != (1, 8, 8):
            raise ValueError("other images")
        x = self.patches(x).permute(0, 2, 3, 1)
        places = torch.arange(x.size(1), device=x.device, dtype=x.dtype)
        x = x + places[None, :, None, None] + torch.zeros(batch, 1, 1, 6, device=x.device)
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + block(norm(x))
        x = torch.cat((self.token.expand(batch, -1, -1), x.flatten(1, 2)), 1)
        return self.out(x.mean(1))


@pytest.mark.parametrize("at", ["layer", "block", "module", 3])
def test_networks_that_compute_with_sizes(at: Any) -> None:
    torch.manual_seed(0)
    with pytest.raises(CannotSplit, match="cannot be traced"):
        split(Tokens())
    equals_at_any_batch(Tokens(), at=at)


def test_units_of_known_sizes_refuse_others() -> None:
    chain = split(Tokens(), sample=IMAGES)
    with pytest.raises(InvalidInput, match=r"\(1, 6, 8\).*sizes of its sample, \(1, 8, 8\)"):
        chain(IMAGES[:, :, :6])


class Decides(nn.Module):
    """A network whose way depends on the batch's size, on values, or on sizes alone."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv, self.out = way, nn.Conv2d(1, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.way == "batch" and x.shape[0] > 4:
            x = x * 2
        if self.way == "more than any" and x.shape[0] > 1000:
            x = x * 2
        if self.way == "values" and x.sum() > 0:
            x = x * 2
        if self.way == "loop":
            x = torch.stack([x[index] for index in range(x.shape[0])])
        return self.out(x.mean((2, 3)))


def test_a_way_by_sizes_that_are_open_is_refused() -> None:
    with pytest.raises(CannotSplit, match="depends on the values of a tensor"):
        split(Decides("values"), sample=IMAGES)
    with pytest.raises(CannotSplit, match="number of images"):
        split(Decides("loop"), sample=IMAGES)
    chain = split(Decides("batch"), sample=IMAGES)
    with pytest.raises(InvalidInput, match="takes another way"):
        chain(IMAGES[:4])
    model = Decides("more than any")
    assert torch.equal(split(model, sample=IMAGES)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("refused", [False, True])
def test_tracing_leaves_nothing_in_the_network(refused: bool) -> None:
    class Keeps(Tokens):
        def forward(self, x: Tensor) -> Tensor:
            self.last = x if refused else None
            return super().forward(x)

    model = Keeps() if refused else Tokens()
    before, zeros = dict(vars(model)), torch.zeros
    if refused:
        with pytest.raises(CannotSplit, match="changes attribute 'last'"):
            split(model, sample=IMAGES)
    else:
        split(model, sample=IMAGES)
    assert vars(model) == before
    assert torch.zeros is zeros
    torch.save(model.state_dict() if refused else model, io.BytesIO())
    if refused:
        assert not any(isinstance(value, torch.fx.Proxy) for value in vars(model).values())


# Gates


class Gate(nn.Module):
    """Squeeze and excitation."""

    def __init__(self, way: str = "product") -> None:
        super().__init__()
        self.way, self.reduce, self.expand = way, nn.Conv2d(4, 2, 1), nn.Conv2d(2, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()
        return x.mul(scale) if self.way == "method" else scale.expand_as(x) * x


class Gated(nn.Module):
    """Residual blocks whose last normalisation starts at zero and is scaled by a gate."""

    class Block(nn.Module):
        def __init__(self, way: str) -> None:
            super().__init__()
            self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
            self.norm, self.gate = nn.BatchNorm2d(4), Gate(way)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(x + self.gate(self.norm(self.conv2(F.relu(self.conv1(x))))))

    def __init__(self, way: str = "product") -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.blocks = nn.Sequential(Gated.Block(way), Gated.Block(way))
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


@pytest.mark.parametrize("way", ["product", "method"])
def test_a_gate_belongs_to_the_unit_that_it_scales(way: str) -> None:
    names = [
        *("stem", "blocks.0.conv1", "blocks.0.conv2..blocks.0.gate.expand"),
        *("blocks.1.conv1", "blocks.1.conv2..blocks.1.gate.expand", "out"),
    ]
    assert list(split(Gated(way)).names) == names
    assert list(split(Gated(way), "block").names) == ["stem", "blocks.0", "blocks.1", "out"]
    assert len(split(Gated(way), 6, IMAGES)) == 6
    with pytest.raises(CannotSplit, match=r"into 7 units.*a gate counted with what it scales"):
        split(Gated(way), 7, IMAGES)


def test_gates_that_start_at_zero_learn() -> None:
    torch.manual_seed(0)
    model = Gated()
    learner = localize(model, loss="pred")
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    for _ in range(4):
        learner.step(IMAGES, LABELS)
    still = [name for name, weight in model.named_parameters() if torch.equal(before[name], weight)]
    assert all(name.endswith("conv2.bias") for name in still)  # a normalisation follows


def test_a_feature_that_is_constant_is_said() -> None:
    class Dead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)
            self.conv, self.out = nn.Conv2d(4, 4, 3), nn.Linear(4, CLASSES)
            nn.init.zeros_(self.norm.weight)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.conv(self.norm(self.stem(x))).mean((2, 3)))

    with pytest.warns(UserWarning, match="'stem', 'conv' are the same for all images") as said:
        layerwise.localize(Dead(), IMAGES[:2], CLASSES, output_layer="separate")
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        localize(Gated())


@pytest.mark.parametrize("has_instructions", [True, False])
@pytest.mark.parametrize("at", ["layer", "memory:1GB"])
def test_slow_mixed_precision_is_said(
    has_instructions: bool, at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwise.core.doubts.has_bfloat16", lambda device: has_instructions)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        layerwise.localize(Gated(), IMAGES[:2], CLASSES, "pred", at)
        assert not said
        layerwise.localize(Gated(), IMAGES[:2], CLASSES, "pred", at, amp=torch.bfloat16)
    assert [(str(each.message)[:23], each.filename) for each in said] == [
        ("Mixed precision is slow", __file__)
    ] * (not has_instructions)


# Drop path and parts


class DropPath(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        return x * x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(0.5)


class Shuffled(nn.Module):
    """Half of the channels pass; then channels are shuffled; a path is dropped by chance."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.conv1, self.conv2 = way, nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 3, padding=1)
        self.drop = DropPath()

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "unbind":
            first, second = x.unflatten(1, (2, 2)).unbind(1)
        else:
            first, second = x.chunk(2, 1) if self.way == "chunk" else x.split(2, dim=1)
        x = torch.cat((first, self.drop(self.conv2(F.relu(self.conv1(second))))), 1)
        batch, channels, height, width = x.size()
        return x.view(batch, 2, channels // 2, height, width).transpose(1, 2).flatten(1, 2)


@pytest.mark.parametrize("at", ["layer", "block", "module", 2])
@pytest.mark.parametrize("way", ["chunk", "split", "unbind"])
def test_no_cut_lies_behind_parts(way: str, at: Any) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), Shuffled(way), Shuffled(way), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, CLASSES),
    )  # fmt: skip
    chain = split(model.eval(), at, IMAGES)
    assert torch.equal(chain(IMAGES), model(IMAGES))
    localize(model.train(), at=at).step(IMAGES, LABELS)
    if at in ("block", "module"):
        assert chain.names == ("0", "1", "2", "5")


# Outputs


class Named(NamedTuple):
    logits: Tensor
    early: Tensor | None = None


@dataclass
class Object:
    loss: Tensor | None
    logits: Tensor


class Auxiliary(nn.Module):
    """An auxiliary head that is used in training alone, and a result of some kind."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any], always: bool) -> None:
        super().__init__()
        self.give, self.always = give, always
        self.stem, self.conv = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3)
        self.early = nn.Sequential(
            nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Flatten()
        )
        self.classify, self.out = nn.Linear(144, CLASSES), nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Any:
        x = F.relu(self.stem(x))
        early = self.classify(F.relu(self.early(x))) if self.training or self.always else None
        x = self.out(F.relu(self.conv(x)).mean((2, 3)))
        return x if early is None else self.give(x, early)


@pytest.mark.parametrize(
    ("give", "key"),
    [
        (lambda logits, early: (early, logits), 1),
        (lambda logits, early: Named(logits, early), "logits"),
        (lambda logits, early: {"out": logits, "aux": early}, "out"),
    ],
)
def test_auxiliary_heads_stay_untrained_and_are_named(give: Any, key: Any) -> None:
    model = Auxiliary(give, always=False)
    with pytest.warns(UserWarning, match=rf"output {key!r} alone: 'early.0', 'classify"):
        learner = localize(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learner.step(IMAGES, LABELS)
    still = [k for k, value in model.state_dict().items() if torch.equal(before[k], value)]
    assert {name.partition(".")[0] for name in still} == {"early", "classify"}
    assert split(model).output == key


OUTPUTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Any]] = {
    "dictionary": (lambda logits, early: {"early": early, "logits": logits}, "logits"),
    "tuple": (lambda logits, early: (logits, early), 0),
    "list": (lambda logits, early: [early, logits], -1),
    "named tuple": (lambda logits, early: Named(logits, early), "logits"),
    "dataclass": (lambda logits, early: Object(None, logits), "logits"),
}


@pytest.mark.parametrize("kind", OUTPUTS)
@pytest.mark.filterwarnings("ignore:Units train")
def test_logits_are_taken_out_of_an_object(kind: str) -> None:
    give, output = OUTPUTS[kind]
    model = Auxiliary(give, always=True)
    if output == "logits":  # what is called so is found without being named
        assert split(model).output == output
    else:
        words = rf"several values.*\(2×{CLASSES}\).*output="
        with pytest.raises(CannotSplit, match=words):
            localize(model)
    with pytest.raises(InvalidInput, match=r"output='scores': .* has no such part"):
        localize(model, output="scores")
    learner = localize(model, output=output)
    learner.step(IMAGES, LABELS)
    assert [unit.name for unit in learner.units] == ["stem", "conv..out"]


# Cuts at modules, and into equal units


class Wrapped(nn.Module):
    """A network inside another, of stages that are modules with lists of blocks."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1))

        def forward(self, x: Tensor) -> Tensor:
            return x + self.layers(x)

    class Stage(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.Sequential(Wrapped.Block(), Wrapped.Block())
            self.down = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.blocks(x))

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stages = nn.Conv2d(1, 4, 3), nn.ModuleList([Wrapped.Stage()])
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
        return self.out(x.mean((2, 3)))


def test_module_cuts_end_with_blocks_and_not_inside_them() -> None:
    blocks = ("stem..stages.0.blocks.0.layers.2", "stages.0.blocks.1.layers")
    assert split(Wrapped(), "module").names == (*blocks, "stages.0.down", "out")
    lone = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(CannotSplit, match=r"at='module'.*Give at='layer'"):
        split(lone, "module")


class Parallel(nn.Module):
    """Two long branches between a stem and an output, as in HRNet: one block holds all."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, CLASSES)
        self.left = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(8)))
        self.right = nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        return self.out((self.left(x) + self.right(x)).mean((2, 3)))


def test_equal_units_are_cut_inside_a_block_that_holds_all() -> None:
    network = Network(*trace_network(Parallel()))
    place = network.place(equal_cuts(network, 3, IMAGES))
    costs = [0.0] * 3
    for node, cost in multiply_adds(network, IMAGES).items():
        costs[place[node]] += cost
    assert max(costs) < COARSEST * sum(costs) / 3


# Heads


def test_heads_that_outgrow_memory_are_refused_before_they_are_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Conv2d(1, 300, 1), nn.Flatten(), nn.Linear(19200, CLASSES))
    options: dict[str, Any] = {"loss": "predsim", "output_layer": "separate", "check": False}
    localize(model, **options)
    monkeypatch.setattr(head_memory, "device_memory", lambda device: 10**7)
    with pytest.raises(InvalidInput, match=r"heads of loss 'predsim'.*13.* MB.*loss='pred'"):
        localize(model, **options)
    monkeypatch.setattr(head_memory, "device_memory", lambda device: 10**3)
    with pytest.raises(InvalidInput, match="Cut fewer units"):
        localize(model, **options)


@pytest.mark.parametrize("loss", ["pred", "infopro"])
def test_heads_are_reckoned_as_they_are_made(loss: str) -> None:
    layers = (nn.Conv2d(1, 6, 3), nn.Conv2d(6, 8, 3), nn.Flatten(), nn.Linear(128, 16))
    model = nn.Sequential(*layers, nn.Linear(16, CLASSES))
    units = localize(model, loss=loss, own_input=0.1, output_layer="separate").units
    shapes, options = [unit.feature.read for unit in units], [{"own_input": 0.1}] * 4
    reckoned = head_memory.head_parameters([loss] * 4, shapes, (1, 8, 8), CLASSES, options)
    assert reckoned == sum(weight.numel() for unit in units for weight in unit.loss.parameters())


@pytest.mark.parametrize("loss", ["strided", LOSSES["strided"]])  # as a run gives it
def test_heads_whose_bytes_cannot_be_counted_are_refused_before_they_are_made(loss: Any) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 700), nn.ReLU(), nn.Linear(700, CLASSES))
    with pytest.raises(InvalidInput, match=r"Cannot make the heads of loss 'strided'.* TB, and"):
        localize(
            model,
            loss=loss,
            output_layer="separate",
            head_depth=16,
            head_width_factor=100.0,
        )


def test_a_sample_that_does_not_fit_is_refused_where_work_is_counted() -> None:
    with pytest.raises(InvalidInput, match=r"Cannot count multiply-adds.*\(6, 3, 8, 8\)"):
        split(Parallel(), 3, IMAGES.expand(-1, 3, -1, -1))


@pytest.mark.parametrize("of_tensors", [False, True])
def test_lists_of_numbers_pass_between_units_and_lists_of_tensors_do_not(of_tensors: bool) -> None:
    class Sizes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3)

        def forward(self, x: Tensor, sizes: Any) -> tuple[Tensor, Any]:
            x = self.conv(x)
            return x, [x] if of_tensors else [*x.shape[2:]]

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.one, self.two = nn.Conv2d(1, 4, 1), Sizes(), Sizes()
            self.out = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            x, sizes = self.one(self.stem(x), None)
            x, sizes = self.two(x, sizes)
            return self.out(x.mean((2, 3)) / sizes[0])

    options: dict[str, Any] = {"leaves": ["one", "two"], "output_layer": "separate"}
    if of_tensors:
        with pytest.raises(InvalidInput, match="would pass"):
            localize(Listed(), **options)
    else:
        localize(Listed(), **options).step(IMAGES, LABELS)
