"""Devices: which one a module is on, its name, and waiting for it."""

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_counted_for: ContextVar[str | None] = ContextVar("counted_for", default=None)


@contextmanager
def counting_for(kind: str) -> Iterator[None]:
    """Let tensors without contents take the operations of another kind of device.

    PyTorch built for a CPU cannot differentiate tensors that claim to lie on a GPU, so they lie on
    the CPU, and code that decides by device asks ``device_kind``.

    Args:
        kind: ``cpu`` or ``cuda``.
    """
    token = _counted_for.set(kind)
    try:
        yield
    finally:
        _counted_for.reset(token)


def is_counted() -> bool:
    """Whether operations are only counted here, so that nothing may read a tensor's address."""
    return _counted_for.get() is not None


def device_kind(tensor: Tensor) -> str:
    """The type of a tensor's device, or of the device that its operations are counted for."""
    return _counted_for.get() or tensor.device.type


def device_of(module: nn.Module) -> torch.device:
    """The device that a module's parameters are on.

    Raises:
        StopIteration: the module has no parameters.
    """
    return next(module.parameters()).device


def synchronise(device: torch.device) -> None:
    """Wait until a GPU has finished its queue; a CPU has none."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_name(device: torch.device) -> str:
    """The name of the GPU or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def has_bfloat16(device: torch.device) -> bool:
    """Whether PyTorch computes convolutions in bfloat16 there by instructions for it.

    A processor without them, such as x86 without AVX-512, computes them too, only much slower.
    """
    if device.type != "cpu":
        return True
    mkldnn = torch.backends.mkldnn
    return mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def processor_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
