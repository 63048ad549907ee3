"""Training on a device that is not the CPU, without one: see ``pretended.py``.

On a GPU, ``test_on_a_gpu`` computes too.
"""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import RULES_AND_LOSSES


@pytest.mark.slow
def test_steps_stay_on_their_device_and_wait_for_no_value_of_it():
    program = subprocess.run(
        [sys.executable, "-m", "tests.pretended"],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert program.returncode == 0, program.stderr[-2000:]
    printed = [line.split() for line in program.stdout.splitlines() if line.endswith("True")]
    pairs = [(loss, rule) for rule, loss in RULES_AND_LOSSES]
    wanted = {(model, *pair) for model in ("resnet18", "vgg8b") for pair in pairs}
    assert {tuple(words[:3]) for words in printed} == wanted, program.stdout
    assert all(int(words[3]) >= 2 for words in printed)
