"""Networks with downsampling accelerated, within budgets, and their order. No torch.

There are two kinds of move. The first gives up shallow convolutions. A proposal

- fulfils equation 7 at least with ≤: no shallow stage has more convolutions than any deep stage;
- fulfils equation 8 relative to the base: no shallow stage ends after more convolutions than the
  base's, and at least one ends after fewer, so that no shallow layer's map is larger;
- is within every budget but that of memory (see ``Costs.within_memory``).

The order: the least scale of the shallow part (equation 8, ``hierarchy.shallow_scale`` over the
layers of the base's shallow stages); then those that fulfil equation 7 strictly; then more
convolutions; then the least sum of squared differences from the base; then the numbers.

The second keeps every convolution and halves the map earlier, by a stride or pooling of 2 between
shallow convolutions: as often as the base, or once more (then later maps are half as large too).
A proposal

- fulfils equation 7 at least with ≤, of the convolutions between two halvings;
- fulfils equation 8: no shallow convolution has a larger map than in the base, one a smaller;
- halves no map of a single pixel, and is within every budget but that of memory.

The order: as often as the base first; then the least mean height of the shallow part; then the
places.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, combinations, count

from layerwise.errors import InvalidInput
from layerwise.experiments.accelerate.budgets import COUNTED, Budget, amount_text
from layerwise.hierarchy import (
    Design,
    Hierarchy,
    deep_start,
    downsamples_earlier,
    downsamplings,
    format_hierarchy,
    fulfils_equation_7,
    segments,
    shallow,
    shallow_scale,
)

MOST = 20_000  # proposals, which take seconds to find; more are no help

Amount = Callable[
    [str, Hierarchy], int
]  # what a hierarchy has of a budget's kind; grows with every stage's number


def propose(
    base: Hierarchy, budgets: Sequence[Budget], amount: Amount, resolutions: Sequence[int]
) -> list[Hierarchy]:
    """Every proposal, in order.

    Args:
        resolutions: pixels a side of the maps of each stage.

    Raises:
        InvalidInput: there is none, or there are too many.
    """
    limits = {budget.kind: budget.limit(amount(budget.kind, base)) for budget in budgets}
    least = (1,) * len(base)
    if not downsamples_earlier(least, base):
        raise InvalidInput(
            f"Cannot downsample earlier than {format_hierarchy(base)}: it has one convolution in "
            "every shallow stage. Give a deeper --hierarchy to begin with."
        )
    for budget in budgets:
        refuse_too_small(budget, limits[budget.kind], amount(budget.kind, least), least)

    def within(hierarchy: Hierarchy) -> bool:
        return all(amount(kind, hierarchy) <= limits[kind] for kind in limits if kind in COUNTED)

    hierarchies = []
    for hierarchy in enumerate_within(base, within):
        if downsamples_earlier(hierarchy, base):
            hierarchies.append(hierarchy)
        if len(hierarchies) > MOST:
            raise InvalidInput(
                f"Cannot propose so many: more than {MOST:,} hierarchies are within the budgets. "
                "Add --budget convolutions=+0 or a lower one."
            )
    return sorted(hierarchies, key=lambda hierarchy: place_in_order(hierarchy, base, resolutions))


def refuse_too_small(budget: Budget, limit: float, need: int, least: Hierarchy) -> None:
    if need > limit:
        nearest = amount_text(budget.kind, need)
        raise InvalidInput(
            f"Cannot keep to --budget {budget.text}: the hierarchy with the least, "
            f"{format_hierarchy(least)}, has {nearest}. Give {budget.kind}={nearest} or more."
        )


def enumerate_within(base: Hierarchy, within: Callable[[Hierarchy], bool]) -> Iterator[Hierarchy]:
    """Hierarchies within budgets that fulfil equation 7 with ≤ and end no shallow stage later."""
    start, ends = deep_start(len(base)), downsamplings(base)

    def extend(begun: Hierarchy) -> Iterator[Hierarchy]:
        stage = len(begun)
        if stage == len(base):
            yield begun
            return
        most_shallow = max(begun[:start], default=1)
        for number in count(1 if stage < start else most_shallow):
            longer = (*begun, number)
            if stage < start and sum(longer) > ends[stage]:
                return
            if not within(fill(longer, len(base))):
                return  # nor would a larger number be
            yield from extend(longer)

    return extend(())


def fill(begun: Hierarchy, stages: int) -> Hierarchy:
    """The least that a begun hierarchy can become: 1 in shallow stages, then by equation 7."""
    start = deep_start(stages)
    shallows = begun[:start] + (1,) * (start - len(begun))
    return (
        shallows + begun[start:] + (max(shallows, default=1),) * (stages - max(start, len(begun)))
    )


def place_in_order(
    hierarchy: Hierarchy, base: Hierarchy, resolutions: Sequence[int]
) -> tuple[float, bool, int, int, Hierarchy]:
    """Key that proposals are sorted by; see the head of this file."""
    distance = sum((mine - its) ** 2 for mine, its in zip(hierarchy, base, strict=True))
    scale = shallow_scale(hierarchy, resolutions, scale_layers(base))
    return (scale, not fulfils_equation_7(hierarchy), -sum(hierarchy), distance, hierarchy)


def propose_downsampling(
    base: Hierarchy,
    budgets: Sequence[Budget],
    amount: Callable[..., int],
    resolutions: Sequence[int],
    pools: bool,
) -> list[Design]:
    """Every proposal of the second kind, in order.

    Args:
        amount: of a budget's kind, of a hierarchy and where its maps are halved.
        resolutions: pixels a side of the maps of each stage of the base.
        pools: whether maps are halved behind a convolution, also the last, and not by the next
            one's stride.

    Raises:
        InvalidInput: there is none.
    """
    published = published_downsampling(base, pools)
    budgets = [budget for budget in budgets if budget.kind in COUNTED]
    limits = {budget.kind: budget.limit(amount(budget.kind, base)) for budget in budgets}
    earlier = [
        Design(base, places)
        for places in earlier_places(base, published, first=int(pools))
        if resolutions[0] >> len(places)
        and fulfils_equation_7(segments(Design(base, places)), strict=False)
    ]
    affordable = [
        design
        for design in earlier
        if all(amount(kind, base, design.downsample_after) <= most for kind, most in limits.items())
    ]
    if not affordable:
        raise InvalidInput(
            f"Cannot halve maps earlier: no earlier halving of {format_hierarchy(base)} is within "
            "the budgets and equations 7 and 8. Give larger budgets, a deeper --hierarchy, or "
            "--move convolutions."
        )
    layers = scale_layers(base)
    return sorted(
        affordable,
        key=lambda design: (
            len(halvings(design)),
            mean_height(design, resolutions[0], layers),
            halvings(design),
        ),
    )


def published_downsampling(base: Hierarchy, pools: bool) -> tuple[int, ...]:
    """The ends of stages, in convolutions or blocks: where published networks halve maps."""
    ends = tuple(accumulate(base))
    return ends if pools else ends[:-1]


def earlier_places(
    base: Hierarchy, published: tuple[int, ...], first: int
) -> Iterator[tuple[int, ...]]:
    """Places as many as published, or one more, of which the shallow ones come earlier."""
    depth = sum(shallow(base))
    own, later = (
        [place for place in published if place <= depth],
        [place for place in published if place > depth],
    )
    for number in (len(own), len(own) + 1):
        for places in combinations(range(first, depth + 1), number):
            pairs = [(passed(places, layer), passed(own, layer)) for layer in range(depth)]
            if all(mine >= its for mine, its in pairs) and any(mine > its for mine, its in pairs):
                yield (*places, *later)


def passed(places: Sequence[int], layer: int) -> int:
    """Halvings of the map before a convolution or block, or by its stride; the first is 0."""
    return sum(place <= layer for place in places)


def halvings(design: Design) -> tuple[int, ...]:
    return design.downsample_after or ()


def mean_height(design: Design, height: int, layers: int) -> float:
    """Scale(X_i), i ≤ k, of equation 8: the mean height of the first ``layers`` maps, in pixels.

    Args:
        height: of the maps before any was halved.
    """
    return sum(height >> passed(halvings(design), layer) for layer in range(layers)) / layers


def scale_layers(base: Hierarchy) -> int:
    """k of equation 8: the convolutions or blocks of the base's shallow stages.

    The paper writes k < n/2 of n layers, but of its own rows ResNet18 [2,1,1,1] differs from
    [2,2,2,2] in the fourth of eight.
    """
    return sum(shallow(base))
