"""Smallest and largest numbers of a run and of its execution, in one table. No torch.

Beyond the largest nothing would end, or no memory suffices.
"""

import math
import os
from dataclasses import dataclass, fields

from layerwise.errors import InvalidInput, brief
from layerwise.runs.run import Execution, Run

MANY = 2**31 - 1
MOST_EPOCHS = 10**9
MOST_SEEDS = 10_000  # runs of one setting


@dataclass(frozen=True)
class Range:
    """Numbers from ``least`` to ``most``.

    Attributes:
        words: they in words; by default made of the two.
        above, below: whether ``least`` or ``most`` itself is left out.
    """

    least: float
    most: float
    words: str = ""
    above: bool = False
    below: bool = False

    def holds(self, value: float) -> bool:
        too_small = value <= self.least if self.above else value < self.least
        too_large = value >= self.most if self.below else value > self.most
        return not too_small and not too_large

    @property
    def text(self) -> str:
        words = self.words or ("a number above 0" if self.above else f"{self.least} or more")
        return words if self.below else f"{words}, up to {self.most:.15g}"


# three more have their bounds elsewhere: those of crop_padding and cutout depend on the images'
# size, and that of dropout is the network's
RANGES: dict[str, Range] = {
    "num_classes": Range(2, 100_000),
    "width": Range(0, 100, above=True),
    "image_size": Range(1, 4096, "1 pixel or more"),
    "train_images": Range(1, 10**9),
    "val_fraction": Range(0, 1, "0 up to but not including 1", below=True),
    "epochs": Range(1, MOST_EPOCHS),
    "batch_size": Range(2, 10**6, "2 or more, since local losses compare images"),
    "lr": Range(0, 10**9, above=True),
    "head_lr_factor": Range(0, 10**9, above=True),
    "last_lr_factor": Range(0, 10**9, above=True),
    "momentum": Range(0, 1, "0 up to but not including 1", below=True),
    "weight_decay": Range(0, 10**9),
    "decay_rate": Range(0, 1, "above 0", above=True),
    "clip_grad": Range(0, 10**30, above=True),
    "views": Range(1, MOST_EPOCHS),
    "seed": Range(0, 2**63, "0 or more, below 2 to the 63rd", below=True),
    "workers": Range(0, 128),
    "cpu_threads": Range(1, os.cpu_count() or 1),
    "streams": Range(1, 128),
    "eval_every": Range(1, MANY),
    "save_every": Range(1, MANY),
    "separability_every": Range(0, MANY),
    "run_ahead": Range(1, 1000),
    "replicas": Range(1, 10**6),
    "rank_timeout": Range(1, 10**6, "1 second or more"),
}


def check_ranges(run: Run, execution: Execution) -> None:
    """Refuse numbers out of range, by the names of their options.

    Raises:
        InvalidInput: the first of them.
    """
    for kind in (run, execution):
        for item in fields(kind):
            check_number(item.name, getattr(kind, item.name))


def check_number(name: str, value: object) -> None:
    """Refuse a number that is not finite or out of its option's range.

    Raises:
        InvalidInput: as said.
    """
    if not isinstance(value, int | float) or isinstance(value, bool):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise InvalidInput(f"Cannot use {name} {value}: it is not finite. Give a number.")
    if name == "cpu_threads" and not RANGES[name].holds(value):
        most = RANGES[name].most
        raise InvalidInput(
            f"Cannot use cpu_threads {brief(value)}: this machine has {most}. Give 1 to {most}."
        )
    if name in RANGES and not RANGES[name].holds(value):
        raise InvalidInput(
            f"Cannot use {name} {brief(value)}: it is out of range. Give {RANGES[name].text}."
        )
