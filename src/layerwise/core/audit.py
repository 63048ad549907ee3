"""Audit of a learner: which weights the loss of each unit really reaches.

The steps that training makes are repeated on a batch, with optimizers that note what they are given
and update nothing. In each repetition the losses count with other factors, which act in the
backward pass alone. A weight that follows a single loss then has its gradients scaled by that
loss's factor, which is exact for powers of two; one that follows none of those that count has
gradients of 0. So a few steps show whether every weight follows the losses that it should. Where
one does not, each loss is let count alone, which shows what it reaches.

A head or a normalisation that starts at 0 passes no gradient back until its first update, so small
random numbers stand in the place of zeros while steps are repeated.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.core.learner import Learner
from layerwise.core.side_effects import modes_kept, states_kept
from layerwise.core.table import aligned
from layerwise.core.unit import Activations, Unit
from layerwise.losses import Evaluated, Targets
from layerwise.utils.device import device_of

ANY_SEED = 0  # of draws from the global generators, so that every repetition has the same
# exponents of losses' factors: gradients of up to 1e14 stay finite in float32
EXPONENTS = [*range(1, 81), *range(-1, -41, -1)]
SMALL = 0.01  # what stands in the place of 0 in weights
ROUNDING = 1e-4  # relative, of two equal computations on a GPU; on a CPU they are equal to the bit
MOST_NAMED = 20  # parameters in a summary

Steps = Callable[[], Iterable[Any]]
# (number of a weight, index of the unit whose optimizer was given the gradient) -> the sum of the
# gradient's magnitudes, for each time; without a unit: of each gradient that autograd brought
Sizes = dict[tuple[int, int | None], list[float]]


@dataclass(frozen=True)
class Weight:
    """A trainable parameter, and the unit that it belongs to.

    Attributes:
        name: its path in the network, or the unit and its path in the unit's head.
        unit: index of the unit; None: no unit holds it.
        in_head: whether it is of the unit's head alone, not of the network.
    """

    name: str
    unit: int | None
    in_head: bool


@dataclass(frozen=True)
class Audit:
    """Locality of a learner's steps, as differentiating shows it, and their memory.

    Attributes:
        units: names of the units.
        declared_span: number of units that a loss may reach, its own counted.
        weights: trainable parameters of the network and of the heads.
        reached: per loss, the numbers in ``weights`` of those that it reaches.
        dead: numbers of those that no update changes, by whatever loss.
        stray: numbers of those that are changed, or get gradients, by something else than the
            losses that units return: a loss that differentiates or updates by itself.
        statistics_updates: the most updates of a batch normalisation's statistics in a step.
        kept_bytes, peak_bytes: memory between steps, and at the peak of a step, both counted whole
            and predicted; None: not predicted.
    """

    units: tuple[str, ...]
    declared_span: int
    weights: tuple[Weight, ...]
    reached: tuple[frozenset[int], ...]
    dead: frozenset[int]
    stray: frozenset[int]
    statistics_updates: int
    kept_bytes: int | None = None
    peak_bytes: int | None = None

    def reaches(self, loss: int) -> list[int]:
        """Indices of the units whose part of the network a loss reaches."""
        weights = [self.weights[number] for number in self.reached[loss]]
        return sorted({w.unit for w in weights if w.unit is not None and not w.in_head})

    @property
    def span(self) -> int:
        """The largest number of units that a loss reaches."""
        return max(len(self.reaches(loss)) for loss in range(len(self.units)))

    @property
    def isolated(self) -> int:
        """Number of parts of the network between which no gradient passes.

        It is 1 where weights learn from something else than the losses that units return, since
        nothing is known of where that comes from.
        """
        if self.stray:
            return 1
        crossed = set()
        for loss in range(len(self.units)):
            touched = [loss, *self.reaches(loss)]
            crossed |= set(range(min(touched), max(touched)))
        return len(self.units) - len(crossed)

    @property
    def leaks(self) -> list[tuple[int, str]]:
        """Indices of losses and names of the parameters that they reach though they should not."""
        return [
            (loss, self.weights[number].name)
            for loss, numbers in enumerate(self.reached)
            for number in sorted(numbers)
            if not may_reach(loss, self.weights[number], self.declared_span)
        ]

    @property
    def problem(self) -> str | None:
        """One sentence on how the locality is not as declared; None: it is."""
        if self.stray:
            names = named(self.weights[number].name for number in sorted(self.stray))
            return (
                f"{names} of the network or its heads learn from something else than the losses "
                "that units return."
            )
        if self.leaks:
            loss, name = self.leaks[0]
            more = f", and {len(self.leaks) - 1} more such" if len(self.leaks) > 1 else ""
            return (
                f"The loss of unit {loss} ({self.units[loss]}) reaches {name}, which is outside "
                f"its span of {self.declared_span}{more}."
            )
        return None

    def summary(self) -> dict[str, Any]:
        """What a run's record says."""
        return {
            "units": len(self.units),
            "isolated": self.isolated,
            "span": self.span,
            "declared_span": self.declared_span,
            "statistics_updates": self.statistics_updates,
            "dead_parameters": len(self.dead),
            "dead": [self.weights[number].name for number in sorted(self.dead)][:MOST_NAMED],
            "leaking_parameters": len(self.leaks),
            "leaks": [f"loss {loss}: {name}" for loss, name in self.leaks[:MOST_NAMED]],
            "stray_parameters": len(self.stray),
            "stray": [self.weights[number].name for number in sorted(self.stray)][:MOST_NAMED],
            "problem": self.problem,
        }

    def rows(self) -> list[dict[str, Any]]:
        """One row per unit: what its loss reaches.

        Returns:
            ``index``, ``name``, ``reaches`` (indices of units), ``network`` and ``head`` (names of
            parameters).
        """
        return [
            {
                "index": index,
                "name": name,
                "reaches": self.reaches(index),
                "network": [w.name for w in self.of(index) if not w.in_head],
                "head": [w.name for w in self.of(index) if w.in_head],
            }
            for index, name in enumerate(self.units)
        ]

    def of(self, loss: int) -> list[Weight]:
        """The parameters that a loss reaches, in order."""
        return [self.weights[number] for number in sorted(self.reached[loss])]

    def __str__(self) -> str:
        """A table of what each loss reaches, and a line on each other finding."""
        rows = [("unit", "name", "loss reaches units", "parameters", "in heads")]
        for row in self.rows():
            reaches = ", ".join(map(str, row["reaches"])) or "none"
            counts = (f"{len(row['network'])}", f"{len(row['head'])}")
            rows.append((str(row["index"]), row["name"], reaches, *counts))
        return "\n".join([aligned(rows, right=(0, 3, 4)), *self.findings()])

    def findings(self) -> list[str]:
        names = [self.weights[number].name for number in sorted(self.dead)]
        lines = [
            f"units: {len(self.units)}, isolated from each other: {self.isolated}, "
            f"span: {self.span} (declared: {self.declared_span})",
            f"updates of batch statistics a step: {self.statistics_updates}",
            f"dead parameters: {named(names) if names else 'none'}",
            f"leaks: {self.problem or 'none'}",
        ]
        if self.kept_bytes is not None and self.peak_bytes is not None:
            lines.append(
                f"memory, predicted: {self.kept_bytes / 1e6:,.1f} MB between steps, "
                f"{self.peak_bytes / 1e6:,.1f} MB at the peak of a step"
            )
        return lines


def named(names: Iterable[str], most: int = 3) -> str:
    """A few names, and how many more there are."""
    listed = list(names)
    more = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + more


def may_reach(loss: int, weight: Weight, span: int) -> bool:
    """Whether a loss is declared to reach a weight: its own head, and the units of its span."""
    if weight.unit is None:
        return False
    return 0 <= loss - weight.unit < (1 if weight.in_head else span)


def audit_steps(
    learner: Learner, images: Tensor, labels: Tensor, make_steps: Steps | None = None
) -> Audit:
    """Find what each loss reaches; the learner stays as it is.

    It takes two or three steps per unit of span where all is as declared, and one per unit where it
    is not. Weights, buffers, attributes of modules, optimizers, modes and generators of random
    numbers get their values back. Steps are made in training mode, without clipping, and those in
    float16 in the weights' own type.

    Args:
        images, labels: see ``Learner.step``.
        make_steps: function that makes an iterator, which makes the steps of training on this batch
            as it is iterated; None: one of ``Learner.step``.

    Raises:
        InvalidInput: the batch cannot be used.
        Diverged: a loss is not finite.
    """

    def one_step() -> Iterator[Any]:
        if not learner.model.training:
            learner.train()
        yield learner.step(images, labels)

    with Probe(learner, make_steps or one_step).entered() as probe:
        reached = as_declared(probe) or of_each_loss(probe)
    return Audit(
        tuple(unit.name for unit in learner.units),
        probe.span,
        tuple(probe.weights),
        tuple(map(frozenset, reached)),
        frozenset(range(len(probe.weights))) - probe.updated,
        frozenset(probe.stray),
        probe.statistics_updates,
    )


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
        span: the declared one.
        updated: numbers of the weights that an optimizer was given a gradient of.
        stray: numbers of those that were changed, though no optimizer changes any, or that had a
            gradient while no loss counted.
        statistics_updates: see ``Audit``.
        exact: whether two equal computations give the same bits.
    """

    def __init__(self, learner: Learner, make_steps: Steps) -> None:
        self.learner, self.make_steps, self.span = learner, make_steps, learner.span
        pairs = list(trainable(learner))
        self.weights = [weight for weight, _ in pairs]
        self.parameters = [parameter for _, parameter in pairs]
        self.updated, self.stray = set[int](), set[int]()
        self.statistics_updates = 0
        self.exact = device_of(learner.model).type == "cpu"
        self._numbers = {id(parameter): n for n, parameter in enumerate(self.parameters)}
        self._sizes: dict[tuple[int, int | None], list[Tensor]] = {}

    @contextmanager
    def entered(self) -> Iterator["Probe"]:
        """Watch the weights, whose values and gradients are given back at the end."""
        own = [parameter.detach().clone() for parameter in self.parameters]
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
            size = torch.linalg.vector_norm(dense, 1, dtype=torch.float64)
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
                pass
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

        def scaled(activations: Activations, targets: Targets) -> tuple[Activations, Evaluated]:
            passed, evaluated = evaluate(activations, targets)
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
    drawn = SMALL * (torch.rand(value.shape, generator=generator) - 0.5)
    parameter.copy_(torch.where(zeros, drawn.to(value), value))
    return parameter.detach().clone()


def trainable(learner: Learner) -> Iterator[tuple[Weight, nn.Parameter]]:
    """The trainable parameters of the network, then those of heads, each once."""
    owners = {id(p): unit.index for unit in learner.units for p in unit.piece.parameters()}
    seen = set()
    for name, parameter in learner.model.named_parameters():
        seen.add(id(parameter))
        if parameter.requires_grad:
            yield Weight(name, owners.get(id(parameter)), False), parameter
    for unit in learner.units:
        for name, parameter in unit.loss.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                yield Weight(f"{name} in head {unit.index}", unit.index, True), parameter


def as_declared(probe: Probe) -> list[set[int]] | None:
    """What each loss reaches, if each weight follows the losses that it should and no other.

    With a span of w, every w-th loss counts at a time, so that at most one of those that count
    should reach a weight.
    """
    count = len(probe.learner.units)
    reached = [set[int]() for _ in range(count)]
    for first in range(probe.span):
        counting = range(first, count, probe.span)
        plain = probe.sizes(dict.fromkeys(counting, 1.0))
        followed = [
            next((loss for loss in counting if may_reach(loss, weight, probe.span)), None)
            for weight in probe.weights
        ]
        for exponents in distinct_exponents(counting):
            scaled = probe.sizes({loss: 2.0**power for loss, power in exponents.items()})
            factors = [0.0 if loss is None else 2.0 ** exponents[loss] for loss in followed]
            if probe.stray or not follow(plain, scaled, factors, probe.exact):
                return None
        for (number, _), sizes in plain.items():
            if (loss := followed[number]) is not None and any(sizes):
                reached[loss].add(number)
    return reached


def distinct_exponents(losses: Sequence[int]) -> list[dict[int, int]]:
    """Exponents of losses, none of them 0, in as many rounds as tell all losses apart."""
    rounds, scale = list[dict[int, int]](), 1
    while not rounds or scale < len(losses):
        rounds.append({k: EXPONENTS[n // scale % len(EXPONENTS)] for n, k in enumerate(losses)})
        scale *= len(EXPONENTS)
    return rounds


def follow(plain: Sizes, scaled: Sizes, factors: Sequence[float], exact: bool) -> bool:
    """Whether every gradient is scaled by the factor of its weight."""
    tolerance = 0.0 if exact else ROUNDING
    return plain.keys() == scaled.keys() and all(
        len(sizes) == len(scaled[key])
        and all(
            math.isfinite(after)
            and (factors[key[0]] or not before)  # a loss that does not count reaches it
            and math.isclose(after, factors[key[0]] * before, rel_tol=tolerance)
            for before, after in zip(sizes, scaled[key], strict=True)
        )
        for key, sizes in plain.items()
    )


def of_each_loss(probe: Probe) -> list[set[int]]:
    """What each loss reaches when it counts alone; the slow way, which supposes nothing."""
    silent = probe.sizes({})
    probe.stray |= {number for (number, _), sizes in silent.items() if any(sizes)}
    return [
        changed(silent, probe.sizes({unit.index: 1.0}), probe.exact) for unit in probe.learner.units
    ]


def changed(silent: Sizes, sounding: Sizes, exact: bool) -> set[int]:
    """Numbers of the weights whose gradients differ."""
    tolerance = 0.0 if exact else ROUNDING
    return {
        key[0]
        for key, sizes in sounding.items()
        for before, after in zip_longest(silent.get(key, ()), sizes, fillvalue=0.0)
        if not math.isclose(before, after, rel_tol=tolerance)
    }


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
