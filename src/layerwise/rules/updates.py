"""Updates of a learner in the order of a rule, from any loader of batches."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from layerwise.core.learner import Learner
from layerwise.errors import InvalidInput, brief, check_least, choose
from layerwise.rules import RULES
from layerwise.rules.base import START, Position, Schedule, Tick
from layerwise.utils.device import device_of
from layerwise.utils.options import keyword_only

CACHING = ("cache", "keeping")  # options that need images by their numbers
WITHOUT_NUMBERS = (
    "Cannot read images by their numbers: a loader gives batches alone. Use a rule that reads "
    "batches."
)


class LoaderBatches:
    """The batches of a loader as a rule reads them; see ``Batches``.

    Only their order is the loader's. Its images have no numbers, so no rule can cache features.
    """

    views = None

    def __init__(self, loader: Iterable[Any], device: torch.device) -> None:
        self.loader, self.device = loader, device
        self.count = length_of(loader)

    def __len__(self) -> int:
        return self.count

    @property
    def labels(self) -> Tensor:
        raise InvalidInput(WITHOUT_NUMBERS)

    def order(self, epoch: int) -> list[Tensor]:
        """So many indices for every batch as its largest has images; it is their number alone."""
        size = getattr(self.loader, "batch_size", None)
        size = size if isinstance(size, int) else len(next(self.batches(epoch))[1])
        return [torch.arange(size)] * self.count

    def images(self, indices: Tensor, epoch: int) -> Tensor:
        raise InvalidInput(WITHOUT_NUMBERS)

    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        number = 0
        for number, batch in enumerate(self.loader, start=1):
            if number > self.count:
                break
            if number > start:
                images, labels = pair_of(batch)
                yield images.to(self.device), labels.to(self.device)
        if number != self.count:
            given = f"{number} batches" if number < self.count else "more batches"
            raise InvalidInput(
                f"Cannot go on: the loader gave {given} in an epoch, and its length is "
                f"{self.count}. Give one of that length."
            )


def length_of(loader: Iterable[Any]) -> int:
    """The number of a loader's batches.

    Raises:
        InvalidInput: it has none, or gives its batches only once.
    """
    try:
        count = len(loader)  # type: ignore[arg-type]
    except TypeError:
        raise InvalidInput(
            f"Cannot use loader of type {type(loader).__name__}: it has no length. Give a "
            "DataLoader, or a list of batches."
        ) from None
    check_least(1, batches=count)
    return count


def pair_of(batch: Any) -> tuple[Tensor, Tensor]:
    """A batch's images and labels.

    Raises:
        InvalidInput: it is another thing.
    """
    if isinstance(batch, tuple | list) and len(batch) == 2:
        images, labels = batch
        if isinstance(images, Tensor) and isinstance(labels, Tensor):
            return images, labels
    raise InvalidInput(
        f"Cannot use a batch of type {type(batch).__name__}: it is no pair of tensors. Let the "
        "loader give images and labels."
    )


def updates(
    learner: Learner,
    loader: Iterable[Any],
    epochs: int,
    rule: str = "simultaneous",
    schedule: Schedule | None = None,
    start: Position = START,
    **options: Any,
) -> Iterator[Tick]:
    """Updates of a learner from a loader's batches, in the order of a rule.

    Nothing is learned until the result is iterated over: each tick is one update.

    Args:
        loader: gives batches of images and labels, and has a length; a ``DataLoader``, or a list.
        epochs: passes over the loader; by the rule ``sequential``, of each unit.
        rule: a name in ``RULES``. Rules that train the network as one unit, ``global`` and
            ``checkpointed``, take a learner that was made with ``at=1``.
        schedule: from the share of training that is done, 0 to 1, to a factor of the learning rate;
            it is asked before every epoch. None: 1.
        start: where to go on: ``after`` of the tick at which the learner's state was saved. A
            loader that shuffles gives other batches then.
        options: of the rule, such as ``laps`` of ``sequential``. Features cannot be cached.

    Yields:
        A ``Tick`` after every update.

    Raises:
        InvalidInput: the rule or an option is unknown, the learner's units are not those of the
            rule, it has a scheduler, or the loader gives no pairs of images and labels.
    """
    chosen = RULES[choose("rule", rule, RULES)]
    accepted = [name for name in keyword_only(chosen.order) if name not in CACHING]
    for name in options:
        choose(f"option of the rule {rule}", name, accepted)
    if not isinstance(epochs, int) or isinstance(epochs, bool):
        raise InvalidInput(f"Cannot use epochs={brief(repr(epochs))}: it is no whole number.")
    check_least(1, epochs=epochs)
    if chosen.at is not None and len(learner.units) != chosen.at:
        raise InvalidInput(
            f"Cannot use the rule {rule!r} with {len(learner.units)} units: it trains the network "
            f"as one. Make the learner by localize(…, at={chosen.at})."
        )
    if any(unit.scheduler is not None for unit in learner.units):
        raise InvalidInput(
            "Cannot use a learner that was made with scheduler=: the rule sets the learning rates. "
            "Leave it out, and give schedule= here."
        )
    batches = LoaderBatches(loader, device_of(learner.model))
    return chosen.order(learner, batches, epochs, schedule or constant, start, **options)


def constant(done: float) -> float:
    """The factor 1 of the learning rate throughout."""
    return 1.0
