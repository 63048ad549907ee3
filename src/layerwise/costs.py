"""What a network costs with any hierarchy: weights, multiply-adds and memory, counted exactly on networks without contents.

A convolution costs what its place in its stage decides: the first of a stage, one in the middle, the last. So a few small
networks are counted, and every hierarchy of the same network is a sum (of memory between steps, weights and work) or a maximum
(of what a unit needs while it steps). Tests compare the sums with what is counted of the whole network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from layerwise.build import build_learner
from layerwise.data import FOLDER_SIZE
from layerwise.data import ImageFormat as Images
from layerwise.hierarchy import Design, Hierarchy, parse_hierarchy
from layerwise.models import MODELS, create_model, published_hierarchy
from layerwise.models.resnet import ResNet
from layerwise.prediction import predict_steps
from layerwise.profile import count
from layerwise.rehearsal import options_of
from layerwise.runs import Run

# data set -> classes, channels, pixels a side. Of a folder of images the classes are not known before it is read.
IMAGES = {
    "digits": (10, 1, 8),
    "cifar10": (10, 3, 32),
    "cifar100": (100, 3, 32),
    "mnist": (10, 1, 28),
    "fashion-mnist": (10, 1, 28),
    "kmnist": (10, 1, 28),
    "svhn": (10, 3, 32),
    "folder": (10, 3, FOLDER_SIZE),
}
SCALARS = 12  # bytes that a step holds for every unit in the chain, and again for every one before: loss and counts
ONLY, FIRST, MIDDLE, LAST = "only", "first", "middle", "last"  # a convolution's or block's place in its stage


@dataclass(frozen=True)
class Cost:
    """What a network with a hierarchy costs.

    Attributes:
        hierarchy: convolutions or blocks per stage; resolutions: pixels a side of the maps that each stage's last one gives.
        convolutions: in all, as a hierarchy counts them: a residual block is one.
        parameters: of the network; head_parameters: of the local losses, which are not kept after training.
        multiply_adds: of the forward pass on one image.
        local_step_multiply_adds: of a layer-wise step on a batch, heads included; global_step_multiply_adds: of a global one.
        local_activation_bytes: the most that a unit keeps for its backward pass, of a batch; global_activation_bytes: that the
            whole network keeps.
        local_peak_bytes, global_peak_bytes: of a step, counted whole (see ``predict_peak``). What is None was not computed.
        downsample_after: where maps are halved; None: as published.
    """

    hierarchy: Hierarchy
    resolutions: tuple[int, ...]
    convolutions: int
    parameters: int
    multiply_adds: int
    global_step_multiply_adds: int
    downsample_after: tuple[int, ...] | None = None
    head_parameters: int | None = None
    local_step_multiply_adds: int | None = None
    local_activation_bytes: int | None = None
    local_peak_bytes: int | None = None
    global_activation_bytes: int | None = None
    global_peak_bytes: int | None = None

    @property
    def design(self) -> Design:
        return Design(self.hierarchy, self.downsample_after)

    def describe(self) -> dict[str, Any]:
        """As the command's JSON shows it."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


class UnitCost(NamedTuple):
    """Of one unit's step on a batch: see ``PredictedStep``; ``transient`` is its peak without what stays between steps."""

    persistent: int
    transient: int
    multiply_adds: int
    saved: int
    head_parameters: int


class Counted(NamedTuple):
    """Of one network: weights, and multiply-adds of the forward pass on an image."""

    parameters: int
    multiply_adds: int


class Costs:
    """The costs of one network with any hierarchy, trained as a run says.

    Args:
        run: its hierarchy and rule do not matter.
    """

    def __init__(self, run: Run) -> None:
        classes, channels, size = IMAGES[run.data]
        self.run = run
        self.images = Images(tuple(map(str, range(classes))), channels, run.image_size or size)
        self.stages = len(published_hierarchy(run.model))

    def cost(self, hierarchy: Hierarchy, downsample_after: tuple[int, ...] | None = None, steps: bool = True) -> Cost:
        """Everything but what needs the whole network in global training.

        Where maps are halved as published it takes no time once the first was counted. Otherwise the whole network is looked
        at, which takes seconds for what a layer-wise step needs; without ``steps`` that is left out.
        """
        design = Design(hierarchy, downsample_after)
        counted = self._counted(design)
        forward = counted.multiply_adds * self.run.batch_size
        cost = Cost(
            hierarchy,
            self.resolutions if downsample_after is None else self._resolutions(design),
            sum(hierarchy),
            counted.parameters,
            counted.multiply_adds,
            3 * forward - self._first_layers[hierarchy[0] == 1] * self.run.batch_size,
            downsample_after,
        )
        if downsample_after is not None and not steps:
            return cost
        groups = list(self._groups(design))
        return replace(
            cost,
            head_parameters=sum(unit.head_parameters * times for units, times in groups for unit in units),
            local_step_multiply_adds=sum(unit.multiply_adds * times for units, times in groups for unit in units),
            local_activation_bytes=max(unit.saved for units, times in groups if times for unit in units),
            local_peak_bytes=peak(groups),
        )

    def with_global_memory(self, cost: Cost) -> Cost:
        """The cost with the memory of a global step, for which the whole network is looked at: about a second."""
        run = self._run(cost.design, "global")
        step = predict_steps("global", build_learner(run, self.images, torch.device("cpu")), run.batch_size, {}, "auto")[0]
        return replace(cost, global_activation_bytes=step.saved_bytes[0], global_peak_bytes=step.peaks()[0])

    def amount(self, kind: str, hierarchy: Hierarchy, downsample_after: tuple[int, ...] | None = None) -> int:
        """What a budget of some kind (see ``budgets.KINDS``) counts; only memory needs the local losses."""
        if kind == "convolutions":
            return sum(hierarchy)
        design = Design(hierarchy, downsample_after)
        if kind == "memory":
            return peak(list(self._groups(design)))
        counted = self._counted(design)
        return counted.parameters if kind == "parameters" else counted.multiply_adds

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Pixels a side of the maps that the last convolution of each stage gives, halved as published."""
        return self._resolutions(Design((1,) * self.stages))

    def _resolutions(self, design: Design) -> tuple[int, ...]:
        model, found = self._network(design), {}
        for number, stage in enumerate(model.stages):  # type: ignore[arg-type, union-attr, unused-ignore]
            last = [module for module in stage.modules() if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)][-1]
            last.register_forward_hook(lambda _, __, output, number=number: found.update({number: output.shape[-2]}))
        self._pass(model)
        return tuple(found[number] for number in range(self.stages))

    def _counted(self, design: Design) -> Counted:
        if design.downsample_after is not None:
            return self._count(design)
        tables = self._tables
        total = tables[0]
        for number, (second, further) in zip(design.hierarchy, tables[1], strict=True):
            more = [(number > 1) * a + max(number - 2, 0) * b for a, b in zip(second, further, strict=True)]
            total = Counted(total.parameters + more[0], total.multiply_adds + more[1])
        return total

    @cached_property
    def _tables(self) -> tuple[Counted, list[tuple[Counted, Counted]]]:
        """Of one convolution per stage; and per stage, what a second and what each further one add."""
        ones = (1,) * self.stages
        stages = []
        for stage in range(self.stages):
            one, two, three = (self._count(Design((*ones[:stage], number, *ones[stage + 1 :]))) for number in (1, 2, 3))
            stages.append((subtract(two, one), subtract(three, two)))
        return self._count(Design(ones)), stages

    @cache  # noqa: B019 — few of them, and they live as long as the command
    def _count(self, design: Design) -> Counted:
        model = self._network(design)
        with FlopCounterMode(display=False) as counter:
            self._pass(model)
        return Counted(count(model), counter.get_total_flops() // 2)

    @cached_property
    def _first_layers(self) -> tuple[int, int]:
        """Multiply-adds on an image of the convolution without an input gradient: where its stage has several, and only it."""
        works: list[int] = []

        def note(layer: nn.Module, _: Any, output: torch.Tensor) -> None:
            works.append(layer.weight.numel() * output[0, 0].numel())  # type: ignore[operator]

        for first in (2, 1):
            model = self._network(Design((first, *(1,) * (self.stages - 1))))
            next(module for module in model.modules() if isinstance(module, nn.Conv2d)).register_forward_hook(note)
            self._pass(model)
        return works[0], works[1]

    def _groups(self, design: Design) -> Iterator[tuple[list[UnitCost], int]]:
        """Units in order, and how often they come one after the other."""
        if design.downsample_after is not None:
            yield [unit for _, unit in self._predicted(design)], 1
            return
        before, stages, after = self._places
        yield before, 1
        for number, places in zip(design.hierarchy, stages, strict=True):
            if number > 1:
                yield places[FIRST], 1
                yield places[MIDDLE], number - 2
            yield places[LAST if number > 1 else ONLY], 1
        yield after, 1

    @cached_property
    def _places(self) -> tuple[list[UnitCost], list[dict[str, list[UnitCost]]], list[UnitCost]]:
        """The units before the stages, those of every place in every stage, and those after."""
        before: list[UnitCost] = []
        after: list[UnitCost] = []
        stages: list[dict[str, list[UnitCost]]] = [{} for _ in range(self.stages)]
        for number in (2,) if MODELS[self.run.model][0] is ResNet else (1, 3):  # of a ResNet all blocks but the first are alike
            before, after = [], []
            outside = before
            for name, cost in self._predicted(Design((number,) * self.stages)):
                path = name.split(".")
                if path[0] == "stages":
                    stages[int(path[1])].setdefault(place(int(path[2]), number), []).append(cost)
                    outside = after
                else:
                    outside.append(cost)
        for places in stages:
            places.setdefault(ONLY, places[FIRST])
            places.setdefault(MIDDLE, places[LAST])
        return before, stages, after

    def _predicted(self, design: Design) -> Iterator[tuple[str, UnitCost]]:
        """A network's units, each by the name of its layer."""
        run = self._run(design, "simultaneous")
        with torch.random.fork_rng(devices=[]):  # heads are made, and draw their weights
            learner = build_learner(run, self.images, torch.device("cpu"))
        step = predict_steps(run.rule, learner, run.batch_size, options_of(run), "auto")[0]
        peaks = step.peaks()
        for number, index in enumerate(step.units):
            unit = learner.units[index]
            transient = peaks[index] - step.persistent_bytes - SCALARS * (number + len(step.units))
            work, saved = step.multiply_adds[index], step.saved_bytes[index]
            yield unit.name, UnitCost(step.unit_bytes[index], transient, work, saved, count(unit.loss))

    def _run(self, design: Design, rule: str) -> Run:
        return replace(with_design(self.run, design), rule=rule)

    def _network(self, design: Design) -> nn.Module:
        run, images = self.run, self.images
        sizes = run.width, len(images.class_names), images.channels, images.image_size
        with torch.device("meta"):
            return create_model(run.model, design.hierarchy, *sizes, downsample_after=design.downsample_after).eval()

    def _pass(self, model: nn.Module) -> None:
        with torch.no_grad():
            model(torch.empty(1, self.images.channels, self.images.image_size, self.images.image_size, device="meta"))


def peak(groups: Sequence[tuple[Sequence[UnitCost], int]]) -> int:
    """Bytes that a step needs at once: what stays between steps, and the most that a unit needs beside it."""
    persistent = transient = passed = 0
    chain = sum(len(units) * times for units, times in groups)
    for units, times in groups:
        passed += len(units) * times
        persistent += sum(unit.persistent for unit in units) * times
        for after, unit in enumerate(reversed(units), start=1) if times else ():  # of those alike, the last holds the most
            transient = max(transient, unit.transient + SCALARS * (passed - after + chain))
    return persistent + transient


def place(position: int, number: int) -> str:
    """The place of a stage's convolution or block among so many."""
    if number == 1:
        return ONLY
    return FIRST if position == 0 else LAST if position == number - 1 else MIDDLE


def subtract(one: Counted, other: Counted) -> Counted:
    return Counted(one.parameters - other.parameters, one.multiply_adds - other.multiply_adds)


def with_design(run: Run, design: Design) -> Run:
    """The same training of another network of the family."""
    halvings = design.downsample_after
    return replace(
        run,
        hierarchy=",".join(map(str, design.hierarchy)),
        downsample_after=None if halvings is None else ",".join(map(str, halvings)),
    )


def base_hierarchy(run: Run) -> Hierarchy:
    """The run's hierarchy, or the one its network was published with."""
    return parse_hierarchy(run.hierarchy) if run.hierarchy else published_hierarchy(run.model)
