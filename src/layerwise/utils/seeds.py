"""Random seeds and generators."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from layerwise.errors import InvalidInput


def derived_seed(seed: int, purpose: object, number: int) -> int:
    """A seed for one purpose, unrelated to that of any other."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_of(device: torch.device) -> torch.Generator:
    """The generator that a device's operations draw from.

    Raises:
        InvalidInput: it is not known.
    """
    if device.type == "cpu":
        return torch.default_generator
    if device.type == "cuda":
        return torch.cuda.default_generators[device.index or 0]
    raise InvalidInput(
        f"Cannot draw by a seed on {device}: its generator is not known. Leave seed= out, or move "
        "the model to a CPU or a CUDA GPU."
    )


@contextmanager
def seeded(seed: int | None, unit: int, step: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers as a function of seed, unit and step.

    The device's generator is left as it was.
    """
    if seed is None:
        yield
        return
    generator = generator_of(device)
    state = generator.get_state()
    generator.manual_seed(derived_seed(seed, unit, step))
    try:
        yield
    finally:
        generator.set_state(state)
