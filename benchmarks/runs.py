"""Runs of benchmarks: those of several seeds, trained where they have not ended."""

from collections.abc import Callable
from pathlib import Path

from layerwise.errors import Busy
from layerwise.experiments.entry import folder_of
from layerwise.runs.folder import RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.training.loop import train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress


def carry_out(run: Run, output: Path, execution: Execution) -> None:
    """Train a run that has not ended and is not being trained elsewhere."""
    folder = folder_of(run, output)
    print(folder.path.name, flush=True)
    if folder.has_ended:
        return
    try:
        train(prepare(run, execution), folder, resume=True, progress=Progress())
    except Busy:
        print("  left to the process that trains it", flush=True)


def finished(run_of: Callable[[int], Run], output: Path, seeds: int) -> dict[int, RunFolder]:
    """The folders of finished runs, by seed."""
    folders = {seed: folder_of(run_of(seed), output) for seed in range(seeds)}
    return {seed: folder for seed, folder in folders.items() if folder.has_ended}


def accuracies(run_of: Callable[[int], Run], output: Path, seeds: int) -> dict[int, float]:
    """Test accuracies after the last epoch in percent, of finished runs, by seed."""
    folders = finished(run_of, output, seeds)
    return {seed: folder.result()["test_accuracy"] for seed, folder in folders.items()}
