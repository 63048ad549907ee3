"""Designs ranked without training any of them: by shallow convolutions, or by what the base's gain.

Count: the fewer shallow convolutions, the better. It needs no training, and nothing that was
measured foretells the paper's orders better (docs/accelerate.md).

Gain: the score of a hierarchy is the sum of its convolutions' (or blocks') gains, which is what
they are expected to add to the accuracy of a linear probe on held-out images, in points. One that
the base has too brings the gain measured there, so that a shallow unit that adds nothing costs
nothing to give up. The m-th one that the base lacks brings 1/(m + 1) of the mean gain of that
stage's convolutions after its first (which also downsamples), negative too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from layerwise.analysis.separability import separability_of_run
from layerwise.hierarchy import Design, Hierarchy, shallow
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution

RANKINGS = ("count", "gain")
SHORT_EPOCHS = 1  # of runs of the base that gains are measured in; later gains foretell less
SHORT_SEEDS = 3  # such runs, which are averaged
MEASURE = "cross_fitted_probe"  # scores every held-out image, since gains are small
IMAGES = 5000  # held-out images, at most


@dataclass(frozen=True)
class Ranked:
    """A design's place.

    Attributes:
        rank: from 1.
        score: shallow convolutions, or the sum of gains in points.
        text: the score in words.
    """

    design: Design
    rank: int
    score: float
    text: str

    def describe(self) -> dict[str, Any]:
        """As the command's JSON shows it."""
        score = {"rank": self.rank, "score": self.score, "text": self.text}
        return self.design.describe() | score


def rank_by_count(designs: Sequence[Design]) -> list[Ranked]:
    """Designs with the fewest shallow convolutions or blocks first; of equals the first first."""

    def count(design: Design) -> int:
        return sum(shallow(design.hierarchy))

    ordered = enumerate(sorted(designs, key=count), start=1)
    return [
        Ranked(design, rank, count(design), f"{count(design)} shallow") for rank, design in ordered
    ]


def rank_by_gain(designs: Sequence[Design], gains: Sequence[Sequence[float]]) -> list[Ranked]:
    """Designs with the largest sum of gains first; of equals the first first.

    Args:
        gains: of the base, per stage and convolution, in points.
    """

    def points(design: Design) -> float:
        return score(design.hierarchy, gains)

    ordered = enumerate(sorted(designs, key=points, reverse=True), start=1)
    return [
        Ranked(design, rank, points(design), f"{points(design):+.2f} points")
        for rank, design in ordered
    ]


def measured_gains(folder: RunFolder, execution: Execution) -> list[list[float]]:
    """The gains of a run, per stage and convolution or block, in points.

    Raises:
        InvalidInput: the run held out too few images to measure on.
    """
    measured = separability_of_run(folder, execution, (MEASURE,), images=IMAGES, split="validation")
    return stage_gains(measured["units"])


def mean_gains(runs: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The gains of several runs of one network, averaged place by place."""
    return [
        [mean(places) for places in zip(*stages, strict=True)] for stages in zip(*runs, strict=True)
    ]


def stage_gains(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The gains of each stage's convolutions or blocks, sums over their units.

    A gain that was not measured counts as nil.
    """
    gains: dict[tuple[int, int], float] = {}
    for row in rows:
        path = row["name"].split(".")
        if path[0] == "stages":
            place = int(path[1]), int(path[2])
            gains[place] = gains.get(place, 0.0) + (row["gain"] or 0.0)
    stages = sorted({stage for stage, _ in gains})
    return [[gains[place] for place in sorted(gains) if place[0] == stage] for stage in stages]


def score(hierarchy: Hierarchy, gains: Sequence[Sequence[float]]) -> float:
    """The sum of the gains of a hierarchy's convolutions; see the head of this file."""
    pairs = zip(hierarchy, gains, strict=True)
    return sum(expected(number, measured) for number, measured in pairs)


def expected(number: int, measured: Sequence[float]) -> float:
    """The gains of so many convolutions of a stage, given that of each of the base's."""
    later = measured[1:] or measured
    further = sum(later) / len(later)
    lacking = range(1, number - len(measured) + 1)
    return sum(measured[:number]) + sum(further / (m + 1) for m in lacking)
