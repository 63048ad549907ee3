"""Costs of a network with any hierarchy, counted exactly on networks without contents.

Weights and multiply-adds of every hierarchy are sums over its stages, so a few small networks give
them all. Memory and a step's work are predicted from the whole network, which takes seconds, and
so are computed only of the designs that are shown.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
from torch import nn

from layerwise.core.table import count
from layerwise.data import DATASETS
from layerwise.hierarchy import Design, Hierarchy, parse_hierarchy
from layerwise.models import published_hierarchy
from layerwise.profiling.predict import PredictedStep, predict_steps
from layerwise.profiling.trial_steps import trial_options
from layerwise.runs.run import Execution, Run
from layerwise.training.declared_options import with_rule
from layerwise.training.networks import build_network
from layerwise.training.prepare import prepare
from layerwise.utils.multiply_adds import MultiplyAdds


@dataclass(frozen=True)
class Cost:
    """Costs of a network of some design.

    Attributes:
        hierarchy: convolutions or blocks per stage.
        resolutions: pixels a side of the maps that each stage's last convolution gives.
        convolutions: in all, as a hierarchy counts them: a residual block is one.
        parameters: of the network.
        multiply_adds: of the forward pass on one image.
        head_parameters: of the local losses, which are dropped after training.
        local_step_multiply_adds: of a layer-wise step on a batch, heads included.
        global_step_multiply_adds: of a global step on a batch.
        local_activation_bytes: the most that a unit keeps of a batch for its backward pass.
        global_activation_bytes: what the whole network keeps.
        local_peak_bytes: of a layer-wise step, counted whole (see ``predict_steps``).
        global_peak_bytes: of a global step.
        downsample_after: where maps are halved; None: as published.
    """

    hierarchy: Hierarchy
    resolutions: tuple[int, ...]
    convolutions: int
    parameters: int
    multiply_adds: int
    head_parameters: int
    local_step_multiply_adds: int
    global_step_multiply_adds: int
    local_activation_bytes: int
    global_activation_bytes: int
    local_peak_bytes: int
    global_peak_bytes: int
    downsample_after: tuple[int, ...] | None = None

    @property
    def design(self) -> Design:
        return Design(self.hierarchy, self.downsample_after)

    def describe(self) -> dict[str, Any]:
        """As the command's JSON shows it."""
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in asdict(self).items()
        }


class Counted(NamedTuple):
    """Weights of a network, and multiply-adds of its forward pass on an image."""

    parameters: int
    multiply_adds: int


class Costs:
    """The costs of one network with any hierarchy, trained as a run says.

    Args:
        run: its hierarchy and rule do not matter.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.images = DATASETS[run.data].expected(run.image_size)
        self.stages = len(published_hierarchy(run.model))

    def cost(self, hierarchy: Hierarchy, downsample_after: tuple[int, ...] | None = None) -> Cost:
        """All costs of a design; its steps are predicted, which takes seconds."""
        design = Design(hierarchy, downsample_after)
        local, head_parameters = self._step(design, "simultaneous")
        whole, _ = self._step(design, "global")
        return Cost(
            hierarchy,
            self.resolutions if downsample_after is None else self._resolutions(design),
            sum(hierarchy),
            *self._counted(design),
            head_parameters,
            sum(local.multiply_adds.values()),
            sum(whole.multiply_adds.values()),
            max(local.saved_bytes.values()),
            max(whole.saved_bytes.values()),
            max(local.peaks().values()),
            max(whole.peaks().values()),
            downsample_after,
        )

    def amount(
        self, kind: str, hierarchy: Hierarchy, downsample_after: tuple[int, ...] | None = None
    ) -> int:
        """The amount that a budget of some kind (see ``budgets.KINDS``) limits."""
        design = Design(hierarchy, downsample_after)
        if kind == "convolutions":
            return sum(hierarchy)
        if kind == "memory":
            return max(self._step(design, "simultaneous")[0].peaks().values())
        counted = self._counted(design)
        return counted.parameters if kind == "parameters" else counted.multiply_adds

    def within_memory(self, designs: Iterable[Design], limit: float) -> Iterator[Design]:
        """Those designs whose layer-wise step needs at most so many bytes, in their order.

        Memory grows with every stage, so what has no fewer convolutions in any stage than a
        hierarchy that was too large is not looked at.
        """
        too_large: list[Hierarchy] = []
        for design in designs:
            stages = design.hierarchy
            if any(all(map(int.__ge__, stages, least)) for least in too_large):
                continue
            if self.amount("memory", stages, design.downsample_after) <= limit:
                yield design
            elif design.downsample_after is None:
                too_large.append(stages)

    @cached_property
    def resolutions(self) -> tuple[int, ...]:
        """Pixels a side of the maps of each stage's last convolution, halved as published."""
        return self._resolutions(Design((1,) * self.stages))

    def _resolutions(self, design: Design) -> tuple[int, ...]:
        model, sides = self._network(design), {}
        for number, stage in enumerate(model.stages):  # type: ignore[arg-type, union-attr, unused-ignore]
            convolutions = (module for module in stage.modules() if isinstance(module, nn.Conv2d))
            last = [layer for layer in convolutions if layer.kernel_size != (1, 1)][-1]
            last.register_forward_hook(
                lambda _, __, output, number=number: sides.update({number: output.shape[-2]})
            )
        self._pass(model)
        return tuple(sides[number] for number in range(self.stages))

    def _counted(self, design: Design) -> Counted:
        if design.downsample_after is not None:
            return self._count(design)
        total, stages = self._tables
        for number, (second, further) in zip(design.hierarchy, stages, strict=True):
            times = int(number > 1), max(number - 2, 0)
            total = add(total, second, times[0])
            total = add(total, further, times[1])
        return total

    @cached_property
    def _tables(self) -> tuple[Counted, list[tuple[Counted, Counted]]]:
        """Of one convolution per stage; and per stage, of a second and of each further one."""
        ones = (1,) * self.stages
        stages = []
        for stage in range(self.stages):
            first, second, third = (
                self._count(Design((*ones[:stage], number, *ones[stage + 1 :])))
                for number in (1, 2, 3)
            )
            stages.append((add(second, first, -1), add(third, second, -1)))
        return self._count(Design(ones)), stages

    @cache  # noqa: B019 — few of them, and they live as long as the command
    def _count(self, design: Design) -> Counted:
        model = self._network(design)
        with MultiplyAdds() as counter:
            self._pass(model)
        return Counted(count(model), counter.total)

    @cache  # noqa: B019
    def _step(self, design: Design, rule: str) -> tuple[PredictedStep, int]:
        """A step of the whole network, and the parameters of its heads."""
        run = self._run(design, rule)
        with torch.random.fork_rng(devices=[]):  # heads are made, and draw their weights
            learner = prepare(run, Execution(device="cpu")).make_learner(self.images)
        step = predict_steps(rule, learner, run.batch_size, trial_options(run), "auto")[0]
        return step, sum(count(unit.loss) for unit in learner.units)

    def _run(self, design: Design, rule: str) -> Run:
        return with_rule(with_design(self.run, design), rule)

    def _network(self, design: Design) -> nn.Module:
        with torch.device("meta"):
            return build_network(with_design(self.run, design), self.images).eval()

    def _pass(self, model: nn.Module) -> None:
        side = self.images.image_size
        with torch.no_grad():
            model(torch.empty(1, self.images.channels, side, side, device="meta"))


def add(amount: Counted, increment: Counted, times: int) -> Counted:
    """An amount with an increment so many times."""
    return Counted(*(a + times * b for a, b in zip(amount, increment, strict=True)))


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
