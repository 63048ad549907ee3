"""Numbers with their nouns, for what is printed."""


def counted(number: int, noun: str) -> str:
    """A number with its noun, such as ``1 run``, ``1,024 runs`` and ``2 batches``."""
    ending = "es" if noun.endswith("tch") else "s"
    return f"{number:,} {noun}{'' if number == 1 else ending}"
