"""Locality of a learner: what an audit says of the weights that each loss reaches."""

from dataclasses import dataclass
from typing import Any

from layerwise.core.reach import Reach
from layerwise.core.table import aligned
from layerwise.utils.words import few

SHOWN = 3  # parameters in a line
MOST_NAMED = 20  # parameters in a summary


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
        declared: index of the first unit that each loss may reach; see ``core.reach``.
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
    declared: Reach
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
    def declared_span(self) -> int:
        """The largest number of units that a loss may reach."""
        return max_span(self.declared)

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
            if not may_reach(loss, self.weights[number], self.declared)
        ]

    @property
    def problem(self) -> str | None:
        """One sentence on how the locality is not as declared; None: it is."""
        if self.stray:
            names = few((self.weights[number].name for number in sorted(self.stray)), SHOWN)
            return (
                f"{names} of the network or its heads learn from something else than the losses "
                "that units return."
            )
        if self.leaks:
            loss, name = self.leaks[0]
            more = f", and {len(self.leaks) - 1} more such" if len(self.leaks) > 1 else ""
            return (
                f"The loss of unit {loss} ({self.units[loss]}) reaches {name}, which is outside "
                f"its span of {loss - self.declared[loss] + 1}{more}."
            )
        return None

    def summary(self) -> dict[str, Any]:
        """Summary for a run's record."""
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
            f"dead parameters: {few(names, SHOWN) if names else 'none'}",
            f"leaks: {self.problem or 'none'}",
        ]
        if self.kept_bytes is not None and self.peak_bytes is not None:
            lines.append(
                f"memory, predicted: {self.kept_bytes / 1e6:,.1f} MB between steps, "
                f"{self.peak_bytes / 1e6:,.1f} MB at the peak of a step"
            )
        return lines


def may_reach(loss: int, weight: Weight, reach: Reach) -> bool:
    """Whether a loss is declared to reach a weight: its own head, and the units of its span."""
    if weight.unit is None:
        return False
    return weight.unit == loss if weight.in_head else reach[loss] <= weight.unit <= loss


def max_span(reach: Reach) -> int:
    """The largest number of units that a loss reaches, its own counted."""
    return max(index - first + 1 for index, first in enumerate(reach))
