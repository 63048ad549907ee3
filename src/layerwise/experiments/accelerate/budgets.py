"""Budgets of a hierarchy in words, such as ``convolutions=+2`` and ``memory=4GB``. No torch."""

import re
from collections.abc import Iterable
from dataclasses import dataclass

from layerwise.errors import InvalidInput, choose
from layerwise.utils.sizes import format_size, parse_size

# kind -> what it counts
KINDS = {
    "convolutions": "convolutions, as a hierarchy counts them: a residual block is one",
    "parameters": "parameters of the network, without local heads",
    "multiply-adds": "multiply-adds of the network's forward pass on an image",
    "memory": "peak memory of a layer-wise training step, counted whole",
}
COUNTED = ("convolutions", "parameters", "multiply-adds")  # of every hierarchy at no cost
DEFAULT = "convolutions=+0"
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}
EXAMPLES = "such as +2, -1, x1.2 (of the base's), or an amount"


@dataclass(frozen=True)
class Budget:
    """At most so much of one kind.

    Attributes:
        kind: a key of ``KINDS``.
        sign: ``+`` or ``-``: beside the base's; ``x``: times the base's; empty: in all.
        amount: number, or bytes of memory.
        text: as it was given.
    """

    kind: str
    sign: str
    amount: float
    text: str

    def limit(self, base: int) -> float:
        """The most allowed, given what the base has."""
        return {"+": base + self.amount, "-": base - self.amount, "x": base * self.amount}.get(
            self.sign, self.amount
        )


def parse_budgets(texts: Iterable[str]) -> list[Budget]:
    """Read budgets; without any but of memory, at most as many convolutions as the base.

    Raises:
        InvalidInput: a kind is unknown or given twice, or an amount cannot be read.
    """
    budgets = [parse_budget(text) for text in texts]
    kinds = [budget.kind for budget in budgets]
    for kind in kinds:
        if kinds.count(kind) > 1:
            raise InvalidInput(
                f"Cannot use --budget {kind}: it is given twice. Give each kind once."
            )
    return budgets if set(kinds) & set(COUNTED) else [parse_budget(DEFAULT), *budgets]


def parse_budget(text: str) -> Budget:
    kind, equals, amount = (part.strip() for part in text.partition("="))
    choose("kind of budget", kind, KINDS)
    match = re.fullmatch(r"([+\-x×]?)\s*(.+)", amount)
    if not equals or match is None:
        raise InvalidInput(
            f"Cannot use --budget {text!r}: it has no amount. Give {kind}= and one {EXAMPLES}."
        )
    sign = match[1].replace("×", "x")
    if kind == "memory" and sign != "x":
        none = re.fullmatch(
            r"0[a-z]*", match[2], re.IGNORECASE
        )  # +0: as much as the base, but no size in itself
        return Budget(
            kind,
            sign,
            0 if sign and none else parse_size(f"--budget {text}, memory", match[2]),
            text,
        )
    return Budget(kind, sign, parse_number(text, match[2]), text)


def parse_number(text: str, amount: str) -> float:
    """A number that may end in k, M or G, powers of a thousand."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kKMG]?)", amount)
    if match is None:
        raise InvalidInput(
            f"Cannot use --budget {text!r}: its amount is not understood. Give one {EXAMPLES} "
            "such as 16, 11M or 4GB."
        )
    return float(match[1]) * SUFFIXES[match[2].upper()]


def amount_text(kind: str, amount: float) -> str:
    """An amount as a budget would say it, never below it."""
    if kind == "memory":
        return (
            f"{-(-int(amount) // 10**5) / 10:g}MB" if amount >= 10**6 else format_size(int(amount))
        )
    return f"{int(amount)}"
