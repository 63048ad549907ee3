"""Hierarchies ranked by what short layer-wise runs of the base say of its units: none of the others is trained.

The score of a hierarchy is what its convolutions (or blocks) are expected to add to the accuracy of a linear probe on held-out
images, in points: the sum of their gains. One that the base has too brings the gain measured there, so that a shallow unit that
adds nothing, or takes something away, costs nothing to give up. The m-th one that the base lacks brings 1/(m + 1) of the mean
gain of that stage's convolutions after its first (which also downsamples), and takes away as much where that is negative.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from layerwise.hierarchy import Design, Hierarchy
from layerwise.runs import Execution, RunFolder
from layerwise.survey import survey

MEASURE = "cross_fitted_probe"  # scores every held-out image, since gains are small beside the error of a few hundred
IMAGES = 5000  # held-out images, at most


@dataclass(frozen=True)
class Ranked:
    """A design's place.

    Attributes:
        rank: from 1; 0 of the base, which is no proposal.
        score: what it is ranked by; None where none is known.
        text: the score in words.
    """

    design: Design
    rank: int
    score: float | None
    text: str

    def describe(self) -> dict[str, Any]:
        """As the command's JSON shows it."""
        return self.design.describe() | {"rank": self.rank, "score": self.score, "text": self.text}


def rank_by_gain(
    proposals: Sequence[Hierarchy], folders: Sequence[RunFolder], execution: Execution
) -> tuple[list[Ranked], list[list[float]]]:
    """Rank hierarchies by the mean gains in trained runs of the base; equal scores keep the order of the proposals.

    Args:
        folders: of the short runs, finished, a seed each.

    Returns:
        All of them, the best first; and the gains, per stage and convolution, in points.

    Raises:
        InvalidInput: the run held out too few images to measure on.
    """
    gains = mean_gains([measured_gains(folder, execution) for folder in folders])
    ordered = sorted(proposals, key=lambda hierarchy: -score(hierarchy, gains))
    return [Ranked(Design(one), rank, *scored(one, gains)) for rank, one in enumerate(ordered, start=1)], gains


def measured_gains(folder: RunFolder, execution: Execution) -> list[list[float]]:
    """The gains of a run, per stage and convolution or block, in points."""
    return stage_gains(survey(folder, execution, (MEASURE,), images=IMAGES, split="validation")["units"])


def mean_gains(runs: Sequence[Sequence[Sequence[float]]]) -> list[list[float]]:
    """The gains of several runs of one network, averaged place by place."""
    return [[mean(places) for places in zip(*stages, strict=True)] for stages in zip(*runs, strict=True)]


def stage_gains(rows: Sequence[Mapping[str, Any]]) -> list[list[float]]:
    """The gains of each stage's convolutions or blocks (the sum of its units'); what was not measured counts as nil."""
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
    return sum(expected(number, measured) for number, measured in zip(hierarchy, gains, strict=True))


def scored(hierarchy: Hierarchy, gains: Sequence[Sequence[float]]) -> tuple[float, str]:
    """The score, also in words."""
    points = score(hierarchy, gains)
    return points, f"{points:+.2f} points"


def expected(number: int, measured: Sequence[float]) -> float:
    """What so many convolutions of a stage bring, given what each of the base's brings."""
    later = measured[1:] or measured
    further = sum(later) / len(later)
    return sum(measured[:number]) + sum(further / (m + 1) for m in range(1, number - len(measured) + 1))
