"""Machine, versions, command and commit, on which a number depends beside the run."""

import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from layerwise.utils.device import device_name
from layerwise.utils.version import version
from layerwise.utils.words import counted


def describe_device(device: torch.device, amp: bool) -> str:
    """The device in words, for the line that says what was chosen."""
    number_type = "bfloat16 forward, float32 weights" if amp else "float32"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {number_type}"
    return f"CPU with {counted(torch.get_num_threads(), 'thread')}, {number_type}"


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Versions, hardware, the command and the checkout's commit."""
    return {
        "commit": commit(),
        "command": shlex.join([program(), *sys.argv[1:]]),
        "machine": {
            "layerwise": version(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "system": f"{platform.system()} {platform.machine()}",
            "device": device_name(device),
            "cpu_instructions": torch.backends.cpu.get_cpu_capability(),
            "cpu_threads": torch.get_num_threads(),
        },
    }


def program() -> str:
    """The program's name, also when started as ``python -m layerwise``."""
    name = Path(sys.argv[0]).name
    return "layerwise" if name == "__main__.py" else name


def commit() -> str | None:
    """The commit of the checkout that the program runs from; None when installed.

    It ends with ``+`` where files were changed since.
    """
    here = Path(__file__).parent
    git = ["git", "-C", str(here)]
    try:
        tracked = subprocess.run(
            [*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=False
        )
        if tracked.returncode != 0:
            return None
        name = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        changed = subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", str(here)], capture_output=True, check=False
        )
        return name.strip() + ("+" if changed.returncode else "")
    except (OSError, subprocess.CalledProcessError):
        return None
