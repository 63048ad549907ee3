"""Random seeds and generators."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def derived_seed(seed: int, purpose: object, number: int) -> int:
    """A seed for one purpose, unrelated to that of any other."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int | None, unit: int, step: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers as a function of seed, unit and step.

    The device's generator is left as it was.
    """
    if seed is None:
        yield
        return
    generator = (
        torch.default_generator
        if device.type == "cpu"
        else torch.cuda.default_generators[device.index or 0]
    )
    state = generator.get_state()
    generator.manual_seed(derived_seed(seed, unit, step))
    try:
        yield
    finally:
        generator.set_state(state)
