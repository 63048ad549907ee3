"""Buffers of modules that are computed a second time."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

# a module, the name of its buffer, and a value
Buffers = Sequence[tuple[nn.Module, str, Tensor]]


def copied_buffers(piece: nn.Module) -> Buffers:
    """Copies of a piece's buffers, such as running statistics."""
    return [
        (module, name, buffer.clone())
        for module in piece.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]


@contextmanager
def buffers_replaced(values: Buffers) -> Iterator[None]:
    """Let modules read and change other buffers than their own."""
    own = [module._buffers[name] for module, name, _ in values]
    for module, name, value in values:
        module._buffers[name] = value
    try:
        yield
    finally:
        for (module, name, _), buffer in zip(values, own, strict=True):
            module._buffers[name] = buffer
