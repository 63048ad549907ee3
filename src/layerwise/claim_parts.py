"""What the list of the paper's claims is written with: claims, rows by name, comparisons of several rows at once."""

from dataclasses import dataclass
from itertools import pairwise

from layerwise.comparisons import Amount, Comparison, Number
from layerwise.paper import ROWS, Row, row_run

BY_NAME = {(row.table, row.name): row for row in ROWS}
DISTINCT = tuple({row_run(row, "paper", "layerwise"): row for row in reversed(ROWS)}.values())[
    ::-1
]  # of rows with one run, the first


@dataclass(frozen=True)
class Claim:
    """A claim of the paper.

    Attributes:
        sentence: the paper's, shortened at its ends only.
        meaning: what is compared, in our words.
        comparisons: all must hold; none where nothing that is measured could decide it.
        note: what a reader should know beside the verdict.
        reversed_sentence: the sentence names the two sides the other way round than its reason and the comparisons do.
    """

    key: str
    sentence: str
    meaning: str
    comparisons: tuple[Comparison, ...]
    note: str = ""
    reversed_sentence: bool = False

    @property
    def paper_agrees(self) -> bool | None:
        """Whether the paper's tables bear its sentence out, amounts included; None where it prints no numbers for it."""
        known = [comparison.paper_agrees for comparison in self.comparisons if comparison.paper_agrees is not None]
        return all(known) and not self.reversed_sentence if known else None


@dataclass(frozen=True)
class Inconsistency:
    """Two rows of the paper with the same network, data and options, and different numbers; one run is measured for both."""

    rows: tuple[Row, Row]
    text: str


def number(table: int, name: str, kind: str = "layerwise") -> Number:
    return Number(BY_NAME[table, name], kind)


def better(
    table: int, name: str, *others: str, kind: str = "layerwise", amount: Amount | None = None
) -> tuple[Comparison, ...]:
    """A row of a table above each of some others."""
    return tuple(Comparison(number(table, name, kind), number(table, other, kind), amount) for other in others)


def falling(table: int, *names: str, kind: str = "layerwise") -> tuple[Comparison, ...]:
    """Each row of a table above the next."""
    return tuple(Comparison(number(table, one, kind), number(table, other, kind)) for one, other in pairwise(names))


def apart(table: int, name: str, above: str, below: str) -> tuple[Comparison, ...]:
    """One of a row's numbers above another of the same row."""
    return (Comparison(number(table, name, above), number(table, name, below)),)


FAMILIES = (("vgg16", "vgg16_e1", "vgg16_e2", "vgg16_e3"), ("vgg19", "vgg19_e1", "vgg19_e2", "vgg19_e3"))
VGG8B = ("vgg8b", "vgg8b_e1", "vgg8b_e2", "vgg8b_e3")
RESNET18, RESNET50 = ("resnet18", "resnet18_e1", "resnet18_e2"), ("resnet50", "resnet50_e1", "resnet50_e2")
BASE = ("resnet18", "resnet50")
ABOUT_1, ONE_TO_TWO, OVER_4 = Amount("around 1 %", 0.5, 1.5), Amount("1–2 %", 0.5, 3.0), Amount("over 4 %", 4.0)
NEARLY_7, TWO = Amount("nearly 7 %", 6.0, 7.0), Amount("2 %", 1.5, 2.99)

INCONSISTENCIES = (
    Inconsistency(
        (BY_NAME[4, "resnet18"], BY_NAME[6, "resnet18"]),
        "ResNet18 [2,2,2,2] on CIFAR-100 has rate 3e-4 and dropout 0.1 in both tables, but 62.32 % layer-wise and 72.45 % "
        "globally in Table IV, 66.05 % and 73.13 % in Table VI. A gain of nearly 7 points by ResNet18_r5 needs the first pair.",
    ),
)
