"""Random seeds and generators."""

import hashlib
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def derived_seed(seed: int, purpose: object, number: int) -> int:
    """A seed for one purpose, unrelated to that of any other."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


# A device's threads share one generator, so those that seed it take turns.
_generator_locks: dict[torch.device, threading.Lock] = defaultdict(threading.Lock)


@contextmanager
def seeded(seed: int | None, unit: int, step: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers as a function of seed, unit and step.

    The device's generator is left as it was.
    """
    if seed is None:
        yield
        return
    with _generator_locks[device]:
        generator = generator_of(device)
        state = generator.get_state()
        generator.manual_seed(derived_seed(seed, unit, step))
        try:
            yield
        finally:
            generator.set_state(state)


@contextmanager
def drawn_again(state: Tensor, device: torch.device) -> Iterator[None]:
    """Draw the random numbers that followed a state of the device's generator.

    The generator is left as it was.
    """
    generator = generator_of(device)
    present = generator.get_state()
    generator.set_state(state)
    try:
        yield
    finally:
        generator.set_state(present)


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that a device's random numbers come from."""
    if device.type == "cpu":
        return torch.default_generator
    return torch.cuda.default_generators[device.index or 0]
