"""What a graph loses of a network's forward pass: kept by the units, or refused in words."""

import copy
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import layerwise
from layerwise.core.pieces import Reused
from layerwise.core.split import split
from layerwise.errors import CannotSplit, InvalidInput
from tests.helpers import CLASSES, narrow

IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(4)


class Net(nn.Module):
    """A stem, one block in the middle and an output layer."""

    def __init__(self, middle: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.conv = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.middle = nn.Identity() if middle is None else middle
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(F.relu(self.stem(x)))
        return self.out(F.relu(self.conv(x)).mean((2, 3)))


def with_weight(module: nn.Module) -> nn.Module:
    """A module that is not kept whole by itself, since it has a weight."""
    module.weight = nn.Parameter(torch.ones(()))
    return module


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def localize(model: nn.Module, **options: Any) -> layerwise.Learner:
    return layerwise.localize(
        model, IMAGES, CLASSES, loss="pred", optimizer=sgd, seed=0, memory_format=None, **options
    )


def trains_as_backpropagation(make: Callable[[], nn.Module], **options: Any) -> None:
    """Assert that a step of one unit is one of backpropagation."""
    model, plain = make(), make()
    localize(model, at=1, **options).step(IMAGES, LABELS)
    torch.manual_seed(1)
    F.cross_entropy(plain(IMAGES), LABELS).backward()
    sgd(list(plain.parameters())).step()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


# Gradient mode and autocast


class MeanWithoutGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mean, deviation = x.mean((2, 3), keepdim=True), x.std((2, 3), keepdim=True)
        return (x - mean) / (deviation + 1)


class ThresholdWithoutGradient(nn.Module):
    @torch.no_grad()
    def parts(self, x: Tensor) -> tuple[Tensor, ...]:
        return x.chunk(2, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.parts(x)
        return x - torch.cat((second, first), 1)


class Straight(nn.Module):
    """A gradient switched on again inside a context without one."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = x.abs().amax()
            with torch.enable_grad():
                x = x * 2
        return x / scale


@pytest.mark.parametrize("middle", [MeanWithoutGradient, ThresholdWithoutGradient, Straight])
def test_what_has_no_gradient_in_forward_has_none_in_units(middle: type[nn.Module]) -> None:
    trains_as_backpropagation(lambda: Net(middle()))
    trains_as_backpropagation(lambda: Net(middle()), leaves=["middle"])
    localize(Net(middle())).step(IMAGES, LABELS)


class FrozenStem(Net):
    def forward(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            x = F.relu(self.stem(x))
        return self.out(F.relu(self.conv(x)).mean((2, 3)))


def test_layers_without_gradient_are_not_trained() -> None:
    model = FrozenStem()
    before = copy.deepcopy(model.stem.state_dict())
    learner = localize(model)
    for _ in range(2):
        learner.step(IMAGES, LABELS)
    assert all(torch.equal(value, before[key]) for key, value in model.stem.state_dict().items())
    trains_as_backpropagation(FrozenStem)


class InPlaceWithoutGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x.clone().clamp_(max=1.0)
        return x


class Autocast(nn.Module):
    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.conv, self.enabled = nn.Conv2d(4, 4, 1), enabled

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.enabled):
            return self.conv(x).float()


@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_in_forward_is_refused_and_kept_in_leaves(enabled: bool) -> None:
    with pytest.raises(CannotSplit, match=r"'middle' switches autocast.*leaves=\['middle'\]"):
        split(Net(Autocast(enabled)))
    model = Net(Autocast(enabled))
    assert torch.equal(split(model, leaves=["middle"])(IMAGES), model(IMAGES))


def test_autocast_of_the_network_itself_names_a_remedy() -> None:
    class Whole(Net):
        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return super().forward(x)

    with pytest.raises(CannotSplit, match=r"network itself switches autocast.*module of their own"):
        split(Whole())


def test_units_made_under_other_contexts_are_the_same() -> None:
    expected = split(Net())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        chain = split(Net())
    assert chain.names == expected.names
    assert torch.equal(chain(IMAGES), expected(IMAGES))


def test_autocast_around_a_step_is_refused_unless_units_have_it() -> None:
    learner = localize(Net())
    before = copy.deepcopy(learner.model.state_dict())
    with (
        torch.autocast("cpu", torch.bfloat16),
        pytest.raises(InvalidInput, match=r"autocast is on.*amp=torch.bfloat16"),
    ):
        learner.step(IMAGES, LABELS)
    assert all(torch.equal(before[name], v) for name, v in learner.model.state_dict().items())
    inside, outside = (localize(Net(), amp=torch.bfloat16) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        inside.step(IMAGES, LABELS)
    outside.step(IMAGES, LABELS)
    for ours, theirs in zip(inside.model.parameters(), outside.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_inference_mode_is_refused() -> None:
    with torch.inference_mode(), pytest.raises(InvalidInput, match="in inference mode"):
        localize(Net())
    with torch.inference_mode():
        model = Net()
    with pytest.raises(InvalidInput, match="in inference mode"):
        localize(model)


# Random numbers


class Draws(nn.Module):
    """A scale or a way that is drawn while forward runs."""

    def __init__(self, draw: Callable[[], Any]) -> None:
        super().__init__()
        self.conv, self.draw = nn.Conv2d(4, 4, 1), draw

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * float(self.draw())


DRAWS: dict[str, Callable[[], Callable[[], Any]]] = {
    "random": lambda: lambda: random.gauss(0, 1),
    "random choice": lambda: lambda: random.choice((1, 2)),
    "numpy": lambda: lambda: np.random.rand(),
    "torch": lambda: lambda: torch.rand(1),
    "torch dropout": lambda: lambda: F.dropout(torch.ones(1)),
    "generator of Python": lambda: random.Random(0).random,
    "generator of NumPy": lambda: np.random.default_rng(0).random,
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", DRAWS)
def test_draws_in_forward_are_always_refused(name: str, training: bool) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    for _ in range(4):
        with pytest.raises(CannotSplit, match=r"leaves=\['middle'\]"):
            split(Net(Draws(DRAWS[name]())).train(training))
    torch.set_rng_state(states[2])
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    localize(Net(Draws(DRAWS[name]())).train(training), leaves=["middle"]).step(IMAGES, LABELS)


def test_tracing_leaves_generators_as_they_were() -> None:
    model = Net(Draws(random.random))
    before = random.getstate(), torch.get_rng_state()
    with pytest.raises(CannotSplit):
        split(model)
    assert random.getstate() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_a_way_taken_by_turns_is_refused() -> None:
    turns = iter(range(100))

    class Turns(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if next(turns) % 2 else x * 2

    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = x + 1 if next(turns) % 3 == 0 else x * 2
            return x

    for way in (Turns, Both):
        with pytest.raises(CannotSplit, match=r"another way.*'middle'"):
            split(Net(with_weight(way())))


# Attributes


class Reads(nn.Module):
    """A temperature, read each way in which code reads attributes."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.value, self.options = way, 2.0, {"value": 2.0}
        self.drop = nn.Dropout(0.0)

    @property
    def half(self) -> float:
        return self.value / 2

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "option":
            return x / self.options["value"]
        if self.way == "property":
            return x / self.half
        if self.way == "way":
            return x if self.value < 3 else -x
        if self.way == "rate":
            return F.dropout(x, self.drop.p, True)
        return x / self.value


def change(middle: Any, way: str) -> None:
    if way == "rate":
        middle.drop.p = 0.5
    middle.value = middle.options["value"] = 8.0


@pytest.mark.parametrize("way", ["number", "option", "property", "way", "rate"])
def test_a_change_of_what_forward_reads_is_refused_and_reaches_leaves(way: str) -> None:
    learner = localize(Net(Reads(way)))
    learner.step(IMAGES, LABELS)
    change(learner.model.middle, way)
    with pytest.raises(CannotSplit, match=r"of module 'middle.*has changed.*leaves=\['middle'\]"):
        learner.step(IMAGES, LABELS)
    model = Net(Reads(way))
    chain = split(model, leaves=["middle"])
    change(model.middle, way)
    outputs = []
    for network in (model, chain):
        torch.manual_seed(0)
        outputs.append(network(IMAGES))
    assert torch.equal(*outputs)


def test_attributes_that_forward_does_not_read_may_change() -> None:
    model = Net()
    learner = localize(model)
    model.epoch, model.conv.note = 3, "a note"  # type: ignore[assignment]
    learner.step(IMAGES, LABELS)
    copy.deepcopy(split(Net(Reads("option"))))(IMAGES)


class Parts(nn.Module):
    """A block with a layer, a parameter, a buffer and a tensor of its own."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.scale = nn.Conv2d(4, 4, 1), nn.Parameter(torch.ones(4, 1, 1))
        self.register_buffer("mean", torch.zeros(4, 1, 1))
        self.deviation = torch.ones(4, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv((x - self.mean) / self.deviation) * self.scale


@pytest.mark.parametrize("part", ["conv", "scale", "mean", "deviation"])
def test_parts_that_are_replaced_are_refused_and_changes_in_place_arrive(part: str) -> None:
    replacement = getattr(Parts(), part)
    learner = localize(Net(Parts()))
    learner.step(IMAGES, LABELS)
    setattr(learner.model.middle, part, replacement)
    with pytest.raises((CannotSplit, InvalidInput), match=r"middle.*(replaced|changed)"):
        learner.step(IMAGES, LABELS)
    model = Net(Parts())
    chain = split(model)
    with torch.no_grad():
        value = getattr(model.middle, part)
        (value.weight if isinstance(value, nn.Module) else value).fill_(0.5)
    assert torch.equal(chain(IMAGES), model(IMAGES))


class Listed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(4, 4, 1)])

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return self.out(F.relu(self.conv(x)).mean((2, 3)))


def test_a_layer_that_is_added_to_a_list_is_refused() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    learner = localize(model)
    model.append(nn.Softmax(1))
    with pytest.raises(CannotSplit, match=r"network itself.*has been replaced or added"):
        learner.step(IMAGES, LABELS)
    listed = Listed()
    learner = localize(listed)
    listed.note = nn.Linear(2, 2)  # is not called
    learner.step(IMAGES, LABELS)
    listed.blocks.append(nn.Conv2d(4, 4, 1))
    with pytest.raises(CannotSplit, match=r"network itself.*has been replaced or added"):
        learner.step(IMAGES, LABELS)


class Writes(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.calls = way, 0
        self.seen: list[Tensor] = []
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "counter":
            self.calls += 1
        elif self.way == "list":
            self.seen.append(x)
        elif self.way == "new":
            self.shape = x.shape
        else:
            self.last = x
        return x


@pytest.mark.parametrize("way", ["counter", "list", "new", "tensor"])
def test_attributes_that_forward_writes_are_refused_and_kept_in_leaves(way: str) -> None:
    model = Net(with_weight(Writes(way)))
    before = dict(vars(model.middle))
    with pytest.raises(CannotSplit, match=r"changes attribute .* 'middle'.*leaves=\['middle'\]"):
        split(model)
    assert vars(model.middle) == before
    assert model.middle.seen == []
    chain = split(model, leaves=["middle"])
    chain(IMAGES)
    assert vars(model.middle) != before or model.middle.seen


# Modules that are called at several places


class Shared(Net):
    def __init__(self, shared: nn.Module) -> None:
        super().__init__()
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(F.relu(self.stem(x)))
        return self.out(self.shared(F.relu(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize(
    ("shared", "name", "value"),
    [(nn.LeakyReLU(0.1), "negative_slope", 0.7), (nn.AlphaDropout(0.1), "p", 0.8)],
    ids=["slope", "dropout"],
)
def test_a_change_reaches_a_module_called_at_several_places(
    shared: nn.Module, name: str, value: float
) -> None:
    model = Shared(shared)
    chain = split(model)
    setattr(shared, name, value)
    outputs = []
    for network in (model, chain):
        torch.manual_seed(0)
        outputs.append(network(IMAGES))
    assert torch.equal(*outputs)


def test_a_leaf_called_at_several_places_writes_to_the_networks_own() -> None:
    model = Shared(Writes("counter"))
    split(model, leaves=["shared"])(IMAGES)
    assert model.shared.calls == 2


# Modes


class KeepsInEvaluation(Shared):
    """A network that keeps a normalisation and a dropout of its own in evaluation mode."""

    def __init__(self) -> None:
        super().__init__(nn.Dropout(0.5))
        self.middle = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.middle(F.relu(self.stem(x))))
        return self.out(self.shared(F.relu(self.conv(x))).mean((2, 3)))

    def train(self, mode: bool = True) -> "KeepsInEvaluation":
        super().train(mode)
        self.middle.eval()
        self.shared.eval()
        return self


@pytest.mark.parametrize("rule", ["simultaneous", "sequential"])
def test_what_a_network_keeps_in_evaluation_mode_stays_in_it(rule: str) -> None:
    learner = localize(KeepsInEvaluation().train())
    for index, unit in enumerate(learner.units):
        learner.train(only=None if rule == "simultaneous" else unit)
        drops = [m for m in unit.piece.modules() if isinstance(m, Reused)]
        assert not any(module.training for module in drops)
        assert len(drops) == (index > 0)
    assert not learner.model.middle.training
    mean = learner.model.middle.running_mean.clone()
    losses = learner.step(IMAGES, LABELS).losses
    assert torch.equal(mean, learner.model.middle.running_mean)
    assert losses == localize(KeepsInEvaluation().train()).step(IMAGES, LABELS).losses


# Buffers


class Whitened(nn.Module):
    table: Tensor

    def __init__(self, persistent: bool = True, buffer: bool = True) -> None:
        super().__init__()
        if buffer:
            self.register_buffer("table", torch.ones(4), persistent)
        else:
            self.table = torch.ones(4)

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.table * 2 + 1).rsqrt()
        return x * scale.view(1, self.table.shape[0], 1, 1)


@pytest.mark.parametrize("persistent", [True, False])
@pytest.mark.parametrize("buffer", [True, False], ids=["buffer", "attribute"])
def test_what_is_computed_from_buffers_is_computed_anew(persistent: bool, buffer: bool) -> None:
    model = Net(Whitened(persistent, buffer))
    chain = split(model)
    model.middle.table.copy_(torch.arange(4.0))
    assert torch.equal(chain(IMAGES), model(IMAGES))


def test_a_way_taken_by_a_buffers_value_is_refused() -> None:
    class Warm(Whitened):
        def forward(self, x: Tensor) -> Tensor:
            return x if self.table.sum() > 0 else -x

    with pytest.raises(CannotSplit, match=r"'middle' .*leaves=\['middle'\]"):
        split(Net(with_weight(Warm())))


# Hooks


class Block(nn.Sequential):
    def __init__(self, layers: int) -> None:
        super().__init__(*(nn.Conv2d(4, 4, 1) for _ in range(layers)), nn.ReLU())


def record(calls: list[Any]) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: Any, *_: Any) -> None:
        assert all(isinstance(value, Tensor) or value is None for value in inputs)
        calls.append(module)

    return hook


KINDS = ["forward_hook", "forward_pre_hook", "full_backward_hook"]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_a_module_of_one_layer_run(kind: str) -> None:
    calls: list[Any] = []
    model = Net(Block(1))
    getattr(model.middle, f"register_{kind}")(record(calls))
    learner = localize(model, check=False)
    calls.clear()
    learner.step(IMAGES, LABELS)
    assert calls == [model.middle]
    assert [unit.name for unit in learner.units] == ["stem", "middle", "conv..out"]


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_a_module_of_several_layers_are_refused_and_run_in_leaves(kind: str) -> None:
    calls: list[Any] = []
    model = Net(Block(2))
    getattr(model.middle, f"register_{kind}")(record(calls))
    with pytest.raises(CannotSplit, match=r"hooks .*'middle'.*leaves=\['middle'\]"):
        split(model)
    assert calls == []
    learner = localize(model, leaves=["middle"], check=False)
    calls.clear()
    learner.step(IMAGES, LABELS)
    assert calls == [model.middle]


def test_hooks_registered_later_are_refused_or_run() -> None:
    model = Net(Block(2))
    learner = localize(model)
    calls: list[Any] = []
    model.middle[0].register_forward_hook(record(calls))
    learner.step(IMAGES, LABELS)
    assert calls == [model.middle[0]]
    handle = model.middle.register_forward_hook(record(calls))
    with pytest.raises(CannotSplit, match=r"hooks .*'middle'.*leaves=\['middle'\]"):
        learner.step(IMAGES, LABELS)
    handle.remove()
    learner.step(IMAGES, LABELS)


@contextmanager
def hook_of_all(calls: list[Any]) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(record(calls))
    try:
        yield
    finally:
        handle.remove()


def test_hooks_are_given_no_stand_ins() -> None:
    calls: list[Any] = []
    with hook_of_all(calls):
        split(Net(Block(2)))
    assert calls == []
    model = Net()
    model.register_forward_hook(record(calls))
    with pytest.raises(CannotSplit, match="hooks are registered on the network itself"):
        split(model)


def test_hooks_of_tensors_are_refused() -> None:
    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x.retain_grad()
            return x

    with pytest.raises(CannotSplit, match=r"hook with a tensor.*leaves=\['middle'\]"):
        split(Net(with_weight(Watched())))
    split(Net(with_weight(Watched())), leaves=["middle"])(IMAGES).sum().backward()


# Changes in place


class Turned(nn.Module):
    """A weighted skip reads what the main path changes in place."""

    def __init__(self, change: Callable[[Tensor], Tensor], late: bool = False) -> None:
        super().__init__()
        self.skip, self.change, self.late = nn.Conv2d(4, 4, 1), change, late
        self.one, self.two = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 1
        skip = self.skip(x)
        x = self.two(self.change(self.one(self.change(x))))
        return x + skip


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "function": F.relu_,
    "argument": lambda x: F.leaky_relu(x, 0.1, inplace=True),
    "method": lambda x: x.mul_(3),
    "view": lambda x: x.view(x.shape).add_(1),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_in_place_behind_a_skip_is_refused_and_kept_in_leaves(name: str) -> None:
    with pytest.raises(CannotSplit, match=r"in place .*'middle.skip' reads before.*'middle'"):
        split(Net(Turned(CHANGES[name])))
    model = Net(Turned(CHANGES[name]))
    assert torch.equal(split(model, leaves=["middle"])(IMAGES), model(IMAGES))
    assert torch.equal(split(model, 1)(IMAGES), model(IMAGES))


def test_a_module_in_place_behind_a_skip_is_refused() -> None:
    with pytest.raises(CannotSplit, match="in place"):
        split(Net(Turned(nn.ReLU(inplace=True))))


# Modules without a forward pass to look into


def test_scripted_and_exported_modules_are_refused() -> None:
    block = Block(1).eval()
    scripted = [torch.jit.script(block), torch.jit.trace(block, torch.randn(2, 4, 8, 8))]
    for module in scripted:
        with pytest.raises(CannotSplit, match=r"'middle' is scripted.*leaves=\['middle'\]"):
            split(Net(module))
        model = Net(module)
        assert torch.equal(split(model, leaves=["middle"])(IMAGES), model(IMAGES))
        localize(model, leaves=["middle"]).step(IMAGES, LABELS)
    with pytest.raises(CannotSplit, match=r"network itself is scripted.*Give the module"):
        split(torch.jit.script(Net()))
    exported = torch.export.export(Net(), (IMAGES,))
    with pytest.raises(CannotSplit, match=r"is exported.*Give the module"):
        split(exported.module())
    with pytest.raises(InvalidInput, match="model is ExportedProgram"):
        localize(exported)


def test_lazy_layers_are_refused_until_they_have_weights() -> None:
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(CLASSES))
    with pytest.raises(CannotSplit, match=r"'0' \(LazyConv2d\) has no weights.*model\(sample\)"):
        localize(model)
    model(IMAGES)
    localize(model).step(IMAGES, LABELS)


def test_modules_without_weights_are_kept_whole_by_themselves() -> None:
    class Survive(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.rate = rate

        def forward(self, x: Tensor) -> Tensor:
            if self.training and self.rate:
                return x * torch.empty_like(x[:, :1, :1, :1]).bernoulli_(self.rate) / self.rate
            return x

    class Residual(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.conv, self.path = nn.Conv2d(4, 4, 1), Survive(rate)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.path(self.conv(x))

    class Blocks(nn.Sequential):
        pass

    model = Net(Blocks(Residual(0.5), Residual(0.5), Writes("counter"), Draws(random.random)))
    model.middle[3].conv = nn.Identity()
    learner = localize(model)
    assert len(learner.units) == 4
    calls = model.middle[2].calls
    learner.step(IMAGES, LABELS)
    assert model.middle[2].calls == calls + 1
    model.middle[0].path.rate = 0.01  # is read at every step
    chain = split(model.train())
    outputs = []
    for network in (model, chain):
        random.seed(0)
        torch.manual_seed(0)
        outputs.append(network(IMAGES))
    assert torch.equal(*outputs)


def test_numbers_that_depend_on_the_mode_follow_it() -> None:
    class Slope(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.leaky_relu(self.conv(x), 0.1 if self.training else 0.5)

    model = Net(Slope())
    chain = split(model)
    for training in (True, False):
        chain.train(training)
        model.train(training)
        assert torch.equal(chain(IMAGES), model(IMAGES))


# What passes between units


@pytest.mark.parametrize("at", ["layer", "block", 2])
@pytest.mark.parametrize("way", ["tensor_split", "hsplit"])
def test_blocks_that_end_in_parts(way: str, at: Any) -> None:
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            first, second = x.tensor_split(2, 1) if way == "tensor_split" else torch.hsplit(x, 2)
            return torch.cat((second, self.conv(first)), 1)

    model = Net(nn.Sequential(Parts(), Parts()))
    learner = localize(model, at=at)
    learner.step(IMAGES, LABELS)
    assert len(learner.units) > 1
    assert torch.equal(split(model, at, IMAGES)(IMAGES), model(IMAGES))


@pytest.mark.parametrize("attribute", ["dtype", "device", "shape"])
def test_facts_about_the_image_pass_between_units(attribute: str) -> None:
    class Asks(Net):
        def forward(self, x: Tensor) -> Tensor:
            fact = getattr(x, attribute)
            x = F.relu(self.conv(F.relu(self.stem(x)))).mean((2, 3))
            return self.out(x.to(fact) if attribute != "shape" else x.view(fact[0], -1))

    learner = localize(Asks())
    assert len(learner.units) == 2
    learner.step(IMAGES, LABELS)


class Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return -gradients[0]


class Lines(nn.Module):
    """A block whose forward pass runs some lines between its two layers."""

    def __init__(self, lines: Any) -> None:
        super().__init__()
        self.conv, self.again, self.lines = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), lines

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.lines(self.conv(x)))


def seeded_noise(x: Tensor) -> Tensor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return x + torch.randn_like(x)


@pytest.mark.parametrize(
    ("lines", "words"), [(lambda x: Reversed.apply(x), "Reversed"), (seeded_noise, "sets a seed")]
)
def test_own_backward_passes_and_seeds_in_forward_are_refused_and_kept(
    lines: Any, words: str
) -> None:
    model = nn.Sequential(Lines(lines), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    sample = torch.randn(2, 1, 8, 8)
    with pytest.raises(CannotSplit, match=rf"{words}.*leaves=\['0'\]"):
        split(model)
    layerwise.localize(model, sample, 3, leaves=["0"])
    assert "refuse" not in repr(vars(torch.autograd.Function)["apply"].__func__)


class Recomputing(nn.Module):
    """Blocks whose activations forward has recomputed in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, CLASSES)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        for block in self.blocks:
            features = checkpoint(block, features, use_reentrant=False)
        return self.out(features.mean((2, 3)))


def test_a_checkpointing_network_is_said_to_keep_its_activations() -> None:
    sample = torch.rand(2, 1, 8, 8)
    with pytest.warns(UserWarning, match=r"Units keep all activations.*torch\.utils\.checkpoint"):
        local = layerwise.localize(Recomputing(), sample, CLASSES, "pred")
    assert len(local.units) == 3
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layerwise.localize(narrow("resnet18"), sample, CLASSES, "pred")


def test_statistics_that_recomputing_updates_twice_are_refused_in_words() -> None:
    model, sample = Recomputing(), torch.rand(2, 1, 8, 8)
    model.blocks[0] = nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4))
    with pytest.raises(CannotSplit, match=r"other running statistics.*recomput.*check=False"):
        layerwise.localize(model, sample, CLASSES, "pred")
    with pytest.warns(UserWarning, match="Units keep all activations"):
        local = layerwise.localize(model, sample, CLASSES, "pred", check=False)
    local.step(sample, torch.tensor([0, 1]))
    assert model.blocks[0][1].num_batches_tracked == 1


def test_a_stack_that_is_kept_whole_is_named() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    stack, layers = nn.TransformerEncoder(layer, 2), nn.Sequential(layer, copy.deepcopy(layer))
    sample = torch.rand(2, 4, 8)
    for inside, count in ((stack, 2), (layers, 3)):
        model = nn.Sequential(nn.Linear(8, 8), inside, nn.Flatten(), nn.Linear(32, CLASSES))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            local = layerwise.localize(model, sample, CLASSES, "pred")
        assert len(local.units) == count
        assert any("stacks '1' is kept whole" in str(each.message) for each in said) == (count == 2)


class Scaled(Recomputing):
    pass


@pytest.mark.parametrize(
    "replace",
    [
        lambda model: setattr(
            model, "forward", lambda images: 0.1 * Recomputing.forward(model, images)
        ),
        lambda model: setattr(model, "__class__", Scaled),
    ],
)
@pytest.mark.filterwarnings("ignore:Units keep")
def test_a_replaced_forward_is_refused(replace: Callable[[nn.Module], None]) -> None:
    model, images = Recomputing(), torch.rand(4, 1, 8, 8)
    local = layerwise.localize(model, images, CLASSES, "pred")
    local.step(images, torch.arange(4))
    replace(model)
    with pytest.raises(CannotSplit, match="its forward, has been replaced"):
        local.step(images, torch.arange(4))


class Joining(nn.Module):
    def __init__(self, assigns: bool) -> None:
        super().__init__()
        self.assigns = assigns
        self.stem, self.out = nn.Conv2d(1, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.stem(images)
        if self.assigns:
            features[:, 0] = 0
        return self.out(features.mean((2, 3)))


class Placed(Joining):
    def forward(self, images: Tensor, places: Tensor) -> Tensor:
        return super().forward(images + places)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (Joining(assigns=True), "assigns to elements of a tensor"),
        (Placed(assigns=False), r"its forward takes 2 inputs \(images, places\)"),
    ],
)
def test_what_the_network_does_is_named(model: nn.Module, words: str) -> None:
    with pytest.raises(CannotSplit, match=words):
        layerwise.localize(model, torch.rand(4, 1, 8, 8), CLASSES, "pred")
