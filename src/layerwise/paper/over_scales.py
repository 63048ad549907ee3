"""The paper's claims over the scales at which they were measured. No torch.

Verdicts of different scales stand side by side. Their numbers are never averaged.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from layerwise.paper.claims import Claim
from layerwise.paper.comparisons import Comparison
from layerwise.paper.numbers import Setting
from layerwise.paper.statistics import FAILS, HOLDS, UNMEASURED, Outcome
from layerwise.paper.verdicts import Evidence, Verdict
from layerwise.runs.run import Run

ERRORS = 2.0  # standard errors beyond which a mean difference is said to change with scale
NEARER, FARTHER, ALIKE = "nearer to the paper", "farther from the paper", "no clear change"


@dataclass(frozen=True)
class Point:
    """The mean difference of a claim's comparisons in one setting, in percentage points.

    Attributes:
        error: the mean of the comparisons' standard errors, which is what it has if all of them
            err alike; None where one has none.
    """

    difference: float
    error: float | None


@dataclass(frozen=True)
class Standing:
    """A claim with its verdicts over the scales, the setting of most weight first.

    Attributes:
        points: of the comparisons that every setting in which the claim is measured has.
        shared: how many those are.
        paper: the mean difference of the same comparisons in the paper's tables; None where the
            paper prints no number for one of them.
    """

    claim: Claim
    verdicts: Mapping[Setting, Verdict]
    points: Mapping[Setting, Point]
    shared: int
    paper: float | None

    @property
    def rests_on(self) -> Setting:
        """The first setting in which the claim is decided; where none decides it, the first."""
        decided = (item for item in self.verdicts if self.verdicts[item].verdict in (HOLDS, FAILS))
        return next(decided, next(iter(self.verdicts)))

    @property
    def verdict(self) -> str:
        return self.verdicts[self.rests_on].verdict

    @property
    def disagree(self) -> bool:
        """Whether the claim holds in one setting and does not in another."""
        return {HOLDS, FAILS} <= {verdict.verdict for verdict in self.verdicts.values()}

    @property
    def trend(self) -> str:
        """The change from the smallest scale to the largest; empty where unknown.

        A setting that departs from its scale is passed over: what 20 of 400 epochs at full width do
        is no effect of scale.
        """
        whole = [value for setting, value in self.points.items() if not setting.departures]
        if len(whole) < 2 or self.paper is None:
            return ""
        most, *_, least = whole
        if most.error is None or least.error is None:
            return ""
        if (
            abs(most.difference - least.difference)
            <= ERRORS * (most.error**2 + least.error**2) ** 0.5
        ):
            return ALIKE
        nearer = abs(most.difference - self.paper) < abs(least.difference - self.paper)
        return NEARER if nearer else FARTHER


def by_weight(settings: Sequence[Setting]) -> list[Setting]:
    """One setting for each scale, of the paper's loss, the largest scale first.

    A setting that departs from its scale (20 of 400 epochs at full width) goes behind those that
    do not.
    """
    chosen: dict[str, Setting] = {}
    for setting in settings:  # by scale, then by the number of departures
        if setting.loss == Run.loss:
            chosen.setdefault(setting.scale, setting)
    return sorted(chosen.values(), key=lambda setting: bool(setting.departures))


def standings(evidence: Evidence) -> Iterator[Standing]:
    """The claims that are measured in any setting, in the paper's order."""
    settings = by_weight(evidence.settings)
    for verdicts in zip(*(evidence.verdicts[setting] for setting in settings), strict=True):
        measured = {
            setting: verdict
            for setting, verdict in zip(settings, verdicts, strict=True)
            if verdict.verdict != UNMEASURED
        }
        if measured:
            yield standing(verdicts[0].claim, measured)


def standing(claim: Claim, verdicts: Mapping[Setting, Verdict]) -> Standing:
    outcomes = {setting: measured(verdict) for setting, verdict in verdicts.items()}
    shared = [item for item in claim.comparisons if all(item in each for each in outcomes.values())]
    points = {setting: point([each[item] for item in shared]) for setting, each in outcomes.items()}
    printed = [item.printed for item in shared if item.printed is not None]
    whole = shared and len(printed) == len(shared)
    return Standing(
        claim,
        verdicts,
        {setting: value for setting, value in points.items() if value},
        len(shared),
        fmean(printed) if whole else None,
    )


def measured(verdict: Verdict) -> dict[Comparison, Outcome]:
    return {
        outcome.comparison: outcome
        for outcome in verdict.outcomes
        if outcome.difference is not None
    }


def point(outcomes: Sequence[Outcome]) -> Point | None:
    """The mean of some comparisons; None of none."""
    if not outcomes:
        return None
    errors = [outcome.error for outcome in outcomes if outcome.error is not None]
    return Point(
        fmean(outcome.difference or 0.0 for outcome in outcomes),
        fmean(errors) if len(errors) == len(outcomes) else None,
    )
