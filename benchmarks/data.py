"""What training costs beside its steps: reading and augmenting images, and the way from the command
to the first step.

    python benchmarks/data.py --data-dir DATA

The data set must lie in DATA. The start is measured twice.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODEL = ("resnet18", 0.25)


def augmentation(data_dir: str, batches: int = 20) -> dict[str, float]:
    """Seconds of preparing a batch, and its share of a step."""
    import torch

    from layerwise.core.memory_format import set_memory_format
    from layerwise.runs.run import Execution, Run
    from layerwise.training.prepare import apply_execution, prepare

    run = Run(model=MODEL[0], width=MODEL[1], data="cifar10", loss="predsim-lite")
    prepared = prepare(run, Execution(data_dir=data_dir))
    apply_execution(prepared.device, prepared.execution)
    data = prepared.load_data()
    learner = prepared.make_learner(data)
    set_memory_format(learner, "auto")
    learner.train()
    preparing = stepping = 0.0
    drawn = iter(data.train.batches(0))
    for number in range(batches + 2):
        begin = time.perf_counter()
        images, labels = next(drawn)
        middle = time.perf_counter()
        learner.step(images, labels)
        if number >= 2:
            preparing, stepping = (
                preparing + middle - begin,
                stepping + time.perf_counter() - middle,
            )
    assert torch.isfinite(images).all()
    return {
        "prepare_seconds": preparing / batches,
        "step_seconds": stepping / batches,
        "share": preparing / stepping,
    }


START = """
import json, sys, time
import torch
began = time.perf_counter()
from layerwise.progress import Progress
from layerwise.runs import Execution, Run, RunFolder
from layerwise.train import train

class First(Progress):
    def tick(self, tick, meter):
        print(json.dumps(time.perf_counter() - began), flush=True)
        raise KeyboardInterrupt

model, width, data_dir, output = sys.argv[1:]
run = Run(model=model, width=float(width), data="cifar10", loss="predsim-lite", epochs=1)
try:
    train(run, RunFolder(output), Execution(data_dir=data_dir), False, First())
except KeyboardInterrupt:
    pass
"""


def start(data_dir: str) -> list[float]:
    """Seconds from after importing torch to the end of the first step, twice."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            arguments = [MODEL[0], str(MODEL[1]), data_dir, f"{folder}/run{number}"]
            done = subprocess.run(
                [sys.executable, "-c", START, *arguments],
                capture_output=True,
                text=True,
                check=True,
            )
            found.append(float(done.stdout.splitlines()[-1]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", required=True)
    parser.add_argument("--output", type=Path, help="write what was found as JSON")
    options = parser.parse_args()
    found: dict[str, Any] = {
        "start_seconds": start(options.data_dir),
        **augmentation(options.data_dir),
    }
    print(json.dumps(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
