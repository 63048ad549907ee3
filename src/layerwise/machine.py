"""What a number depends on beside the run: the machine, the versions, the command and the code's commit."""

import platform
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from layerwise import __version__
from layerwise.utils.device import synchronise

PRODUCT, REPETITIONS = 512, 10  # the matrices' size, and how often they are multiplied after once that is not counted
SLOWER = 1.1  # multiple of float32's time from which on bfloat16 counts as slower


def describe_device(device: torch.device, amp: bool) -> str:
    """The device in words, for the line that says what was chosen."""
    number_type = f"bfloat16 forward{bfloat16_warning(device)}, float32 weights" if amp else "float32"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {number_type}"
    return f"CPU with {torch.get_num_threads()} threads, {number_type}"


def bfloat16_warning(device: torch.device) -> str:
    """That bfloat16 is slower on this device than float32, in words, if it is: some processors have it without its speed."""
    ratio = bfloat16_time(device)
    return f" (which takes {ratio:.1f} times as long here as float32, by a matrix product)" if ratio > SLOWER else ""


def bfloat16_time(device: torch.device) -> float:
    """How long a matrix product takes in bfloat16, as a multiple of its time in float32; takes some 50 ms."""
    times = dict.fromkeys((torch.float32, torch.bfloat16), float("inf"))
    matrices = {number_type: torch.ones(PRODUCT, PRODUCT, dtype=number_type, device=device) for number_type in times}
    for repetition in range(REPETITIONS + 1):
        for number_type, matrix in matrices.items():
            synchronise(device)
            began = time.perf_counter()
            torch.mm(matrix, matrix)
            synchronise(device)
            seconds = time.perf_counter() - began
            times[number_type] = min(times[number_type], seconds) if repetition else times[number_type]
    return times[torch.bfloat16] / times[torch.float32]


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What a number depends on beside the run: versions, hardware, the command and the checkout's commit."""
    return {
        "commit": commit(),
        "command": shlex.join([program(), *sys.argv[1:]]),
        "machine": {
            "layerwise": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "device": device_name(device),
            "cpu_threads": torch.get_num_threads(),
        },
    }


def program() -> str:
    """The program's name, also when started as ``python -m layerwise``."""
    name = Path(sys.argv[0]).name
    return "layerwise" if name == "__main__.py" else name


def commit() -> str | None:
    """The commit of the checkout that the program runs from, with ``+`` where files were changed since; None when installed."""
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        found = subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False)
        if found.returncode != 0:
            return None
        name = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", str(here)], capture_output=True, check=False)
        return name.strip() + ("+" if changed.returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: torch.device) -> str:
    """What the GPU or the processor is called."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
