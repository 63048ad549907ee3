"""Devices: which one a module is on, its name, and waiting for it."""

import platform

import torch
from torch import nn


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


def processor_name() -> str:
    """The processor's name as the system gives it."""
    try:
        with open("/proc/cpuinfo") as lines:
            return next(
                line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")
            )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
