"""Repetitions of a learner's steps that update nothing, while gradients are noted."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.core.frozen import frozen_weights
from layerwise.core.learner import Learner
from layerwise.core.locality import Weight
from layerwise.core.side_effects import modes_kept, states_kept
from layerwise.core.unit import Activations, Unit
from layerwise.losses import Evaluated
from layerwise.utils.device import device_of

ANY_SEED = 0  # of draws from the global generators, so that every repetition has the same
SMALL = 0.01  # what stands in the place of 0 in weights

Steps = Callable[[], Iterable[Any]]
# (number of a weight, index of the unit whose optimizer was given the gradient) -> the sum of the
# gradient's magnitudes, for each time; without a unit: of each gradient that autograd brought
Sizes = dict[tuple[int, int | None], list[float]]


class Recorder(Optimizer):
    """An optimizer that notes the gradients that it is given, and updates nothing."""

    def __init__(self, unit: Unit, note: Callable[[Tensor, int | None, Tensor], None]) -> None:
        super().__init__(unit.held(), {"lr": 0.0})
        self.unit_index, self.note = unit.index, note

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.note(weight, self.unit_index, weight.grad)


class Probe:
    """Repetitions of a learner's steps in which losses count with factors of choice.

    Attributes:
        weights: the trainable parameters.
        reach: the declared one, of the last step that was made, since a rule may set it.
        updated: numbers of the weights that an optimizer was given a gradient of.
        stray: numbers of those that were changed, though no optimizer changes any, or that had a
            gradient while no loss counted.
        statistics_updates: see ``Audit``.
        exact: whether two equal computations give the same bits.
    """

    def __init__(self, learner: Learner, make_steps: Steps) -> None:
        self.learner, self.make_steps, self.reach = learner, make_steps, learner.reach
        pairs = list(trainable(learner))
        self.weights = [weight for weight, _ in pairs]
        self.parameters = [parameter for _, parameter in pairs]
        parts = [learner.model, *(unit.loss for unit in learner.units)]
        everything = [parameter for part in parts for parameter in part.parameters()]
        learning = set(map(id, self.parameters))
        # a loss may change some, such as an average of other weights
        self.frozen = [parameter for parameter in everything if id(parameter) not in learning]
        self.updated, self.stray = set[int](), set[int]()
        self.statistics_updates = 0
        self.exact = device_of(learner.model).type == "cpu"
        self._numbers = {id(parameter): n for n, parameter in enumerate(self.parameters)}
        self._sizes: dict[tuple[int, int | None], list[Tensor]] = {}

    @contextmanager
    def entered(self) -> Iterator["Probe"]:
        """Watch the weights, whose values and gradients are given back at the end."""
        own = [parameter.detach().clone() for parameter in self.parameters]
        self._frozen_values = [parameter.detach().clone() for parameter in self.frozen]
        gradients = [parameter.grad for parameter in self.parameters]
        handles = [
            parameter.register_hook(lambda gradient, p=parameter: self.note(p, None, gradient))
            for parameter in self.parameters
        ]
        try:
            self._values = [
                without_zeros(parameter, value)
                for parameter, value in zip(self.parameters, own, strict=True)
            ]
            yield self
        finally:
            for handle in handles:
                handle.remove()
            for parameter, value, gradient in zip(self.parameters, own, gradients, strict=True):
                with torch.no_grad():
                    parameter.copy_(value)
                parameter.grad = gradient

    def note(self, weight: Tensor, unit: int | None, gradient: Tensor) -> None:
        number = self._numbers.get(id(weight))
        if number is not None:  # not one that was frozen when the audit began
            gradient = gradient.detach()
            dense = gradient.coalesce().values() if gradient.is_sparse else gradient
            real = dense.abs() if dense.is_complex() else dense
            size = torch.linalg.vector_norm(real, 1, dtype=torch.float64)
            self._sizes.setdefault((number, unit), []).append(size)

    def sizes(self, factors: Mapping[int, float]) -> Sizes:
        """Sizes of all gradients of the learner's steps.

        Args:
            factors: by which losses count, by the index of their unit; others do not count.
        """
        self._sizes = {}
        with everything_kept(self.learner):
            torch.manual_seed(ANY_SEED)
            for parameter in self.parameters:
                parameter.grad = None
            steps = iter(self.make_steps())  # a rule may make copies of the learner first
            for unit in self.learner.units:
                vars(unit).update(self.replacements(unit, factors.get(unit.index, 0.0)))
            before = batches_tracked(self.learner.model)
            for _ in steps:
                self.reach = self.learner.reach
            after = batches_tracked(self.learner.model)
            updates = [late - early for early, late in zip(before, after, strict=True)]
            self.statistics_updates = max([self.statistics_updates, *updates])
        self.restore_values()
        result = {
            key: torch.stack(sizes).tolist() if len(sizes) > 1 else [float(sizes[0])]
            for key, sizes in self._sizes.items()
        }
        self.updated |= {n for (n, unit), s in result.items() if unit is not None and any(s)}
        return result

    def replacements(self, unit: Unit, factor: float) -> dict[str, Any]:
        """Attributes of a unit whose loss counts with a factor and that updates nothing."""
        evaluate = unit.evaluate

        def scaled(*given: Any) -> tuple[Activations, Evaluated]:
            passed, evaluated = evaluate(*given)
            if evaluated.loss.requires_grad:
                evaluated.loss.register_hook(lambda gradient: gradient * factor)
            return passed, evaluated

        return {
            "evaluate": scaled,
            "optimizer": None if unit.optimizer is None else Recorder(unit, self.note),
            "clip_grad": None,
            "scaler": None,
            "amp": None if unit.amp is torch.float16 else unit.amp,
            "parts": [],
            "sums": {},
        }

    @torch.no_grad()
    def restore_values(self) -> None:
        """Give weights that something has changed their values back, and note which."""
        for parameter, value in zip(self.frozen, self._frozen_values, strict=True):
            parameter.copy_(value)
        pairs = zip(self.parameters, self._values, strict=True)
        for number, (parameter, value) in enumerate(pairs):
            if not torch.equal(parameter, value):
                parameter.copy_(value)
                if not bool(value.isnan().any()):  # such is equal to nothing
                    self.stray.add(number)


@torch.no_grad()
def without_zeros(parameter: nn.Parameter, value: Tensor) -> Tensor:
    """The parameter's values after its zeros have become small random numbers."""
    zeros = value == 0
    if not bool(zeros.any()):
        return value
    generator = torch.Generator().manual_seed(ANY_SEED)
    drawn = SMALL * (torch.rand(value.shape, generator=generator, device="cpu") - 0.5)
    parameter.copy_(torch.where(zeros, drawn.to(value), value))
    return parameter.detach().clone()


def trainable(learner: Learner) -> Iterator[tuple[Weight, nn.Parameter]]:
    """The trainable parameters of the network, then those of heads, each once."""
    owners = {id(p): unit.index for unit in learner.units for p in unit.piece.parameters()}
    frozen = {number for unit in learner.units for number in frozen_weights(unit.piece)}
    seen = set()
    for name, parameter in learner.model.named_parameters():
        seen.add(id(parameter))
        if parameter.requires_grad and id(parameter) not in frozen:
            yield Weight(name, owners.get(id(parameter)), False), parameter
    for unit in learner.units:
        for name, parameter in unit.loss.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Weight(f"{name} in head {unit.index}", unit.index, True), parameter


def batches_tracked(model: nn.Module) -> list[int]:
    """Numbers of batches that the statistics of the network's normalisations are of."""
    return [
        int(buffer)
        for name, buffer in model.named_buffers()
        if name.rpartition(".")[2] == "num_batches_tracked"
    ]


@contextmanager
def everything_kept(learner: Learner) -> Iterator[None]:
    """Leave a learner, its units and modules, and generators as they were; weights aside."""
    holders = [learner, *learner.units]
    before = [dict(vars(holder)) for holder in holders]
    parts = [part for unit in learner.units for part in (unit.piece, unit.loss)]
    modules = nn.ModuleList([learner.model, *(unit.loss for unit in learner.units)])
    with modes_kept(learner.model, *parts), states_kept(modules):
        try:
            learner.step_singly()
            yield
        finally:
            for holder, attributes in zip(holders, before, strict=True):
                vars(holder).clear()
                vars(holder).update(attributes)
