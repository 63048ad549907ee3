"""A small sample of ``make faults``, in a process of its own, since it forks."""

import subprocess
import sys
from pathlib import Path


def test_a_sample_of_faults() -> None:
    command = [sys.executable, "-m", "tests.faults", "--seed", "1", "--kills", "3"]
    command += ["--damages", "6", "--epochs", "20"]
    root = Path(__file__).parents[1]
    ended = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "3 of 3 kills survived (seed 1)" in ended.stdout
    assert "commands on damaged files ended rightly" in ended.stdout
    assert "20 epochs: memory flat and disk bounded" in ended.stdout
