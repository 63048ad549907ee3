"""Local losses of a run: one from the first unit on, and others from later units on. No torch."""

from layerwise.errors import InvalidInput, brief
from layerwise.utils.options import is_whole_number


def parse_later_losses(text: str) -> dict[int, str]:
    """Local losses by the unit that each begins at, from ``4=pred,8=sim``.

    Raises:
        InvalidInput: the text is of another form, or the units do not increase from 1 on.
    """
    losses: dict[int, str] = {}
    for part in text.split(","):
        unit, _, loss = (word.strip() for word in part.partition("="))
        if not (is_whole_number(unit) and loss):
            raise InvalidInput(
                f"Cannot use loss_from {brief(repr(part))}: it is not a unit and a loss. Give the "
                "number of the unit from which on a loss is used, such as 4=pred."
            )
        if int(unit) <= max(losses, default=0):
            raise InvalidInput(
                f"Cannot use loss_from {brief(repr(text))}: its units do not increase. Give them "
                "in order, from unit 1 on; --loss is that of unit 0."
            )
        losses[int(unit)] = loss
    return losses


def format_later_losses(losses: dict[int, str]) -> str:
    return ",".join(f"{unit}={loss}" for unit, loss in losses.items())
