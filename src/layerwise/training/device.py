"""The device that a run trains on, and how this process is set up for it."""

import os

import torch

from layerwise.errors import InvalidInput, brief
from layerwise.runs.run import Execution
from layerwise.utils.allocator import keep_freed_memory
from layerwise.utils.launch import launched_local_rank


def find_device(execution: Execution) -> torch.device:
    """The device to train on.

    Raises:
        InvalidInput: there is no such device.
    """
    name = execution.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device: torch.device | None
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise InvalidInput(
            f"Cannot use device {brief(repr(name))}: it is neither a CPU nor a CUDA GPU. Give cpu, "
            "cuda, cuda:0 … or auto."
        )
    return numbered_gpu(device) if device.type == "cuda" else device


def numbered_gpu(device: torch.device) -> torch.device:
    """A GPU by its number; without one, each rank on a machine has the next.

    Raises:
        InvalidInput: there are fewer.
    """
    count = torch.cuda.device_count()
    index = launched_local_rank() if device.index is None else device.index
    if index >= count:
        raise InvalidInput(
            f"Cannot use device {f'cuda:{index}'!r}: torch sees {count} GPUs. Give --device cpu, "
            "or start at most one rank for each."
        )
    return torch.device("cuda", index)


def apply_execution(device: torch.device, execution: Execution) -> None:
    """Set this process up: the same bits every time, memory that is kept, threads."""
    if device.type == "cuda":
        # cuBLAS gives the same bits only with this
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.cuda.set_device(device)
    elif execution.keep_memory:
        keep_freed_memory()
    if execution.cpu_threads is not None:
        torch.set_num_threads(execution.cpu_threads)
