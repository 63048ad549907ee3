"""Cost of training outside its steps: reading and augmenting images, and the time from the command
to the first step.

    python benchmarks/data.py --data-dir DATA

The data set must lie in DATA. The start is measured twice.
"""

import argparse
import contextlib
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
    from layerwise.runs.run import Execution
    from layerwise.training.device import apply_execution
    from layerwise.training.prepare import prepare

    prepared = prepare(measured_run(), Execution(data_dir=data_dir))
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


def first_step(data_dir: str, output: str) -> float:
    """Seconds from after importing torch to the end of the first step."""
    import torch  # noqa: F401

    began = time.perf_counter()
    from layerwise.runs.folder import RunFolder
    from layerwise.runs.run import Execution
    from layerwise.training.loop import train
    from layerwise.training.prepare import prepare
    from layerwise.training.progress import Progress

    class First(Progress):
        seconds = 0.0

        def tick(self, tick: Any, meter: Any) -> None:
            self.seconds = time.perf_counter() - began
            raise Stepped

    first = First()
    with contextlib.suppress(Stepped):
        prepared = prepare(measured_run(), Execution(data_dir=data_dir))
        train(prepared, RunFolder(output), resume=False, progress=first)
    return first.seconds


class Stepped(Exception):
    """The first step has been made."""


def measured_run() -> Any:
    from layerwise.runs.run import Run

    model, width = MODEL
    return Run(
        model=model,
        width=width,
        data="cifar10",
        loss="predsim-lite",
        output_layer="separate",
        epochs=1,
    )


def start(data_dir: str) -> list[float]:
    """Seconds of the first step, each in a process of its own, twice."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            arguments = ["--data-dir", data_dir, "--first-step", f"{folder}/run{number}"]
            done = subprocess.run(
                [sys.executable, __file__, *arguments],
                stdout=subprocess.PIPE,
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
    # a process of its own makes the first step of a run into this folder
    parser.add_argument("--first-step", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.first_step:
        print(json.dumps(first_step(options.data_dir, options.first_step)))
        return
    found: dict[str, Any] = {
        "start_seconds": start(options.data_dir),
        **augmentation(options.data_dir),
    }
    print(json.dumps(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
