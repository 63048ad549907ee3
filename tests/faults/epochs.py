"""Very many tiny epochs: the memory of the process and the size of its folder."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from layerwise.runs.folder import LOG, RunFolder
from layerwise.runs.run import Execution, Run
from layerwise.training.loop import train
from layerwise.training.prepare import prepare
from layerwise.training.progress import Progress

TINY = Run(
    model="vgg8b",
    hierarchy="1,1,1,1",
    width=1 / 64,
    at="2",
    train_images=20,
    batch_size=20,
    lr=1e-4,
)
MEMORY_MARGIN = 1.05  # growth of memory that is no leak, after a tenth of the epochs
LINE = 2_000  # bytes of an epoch in the log, at most


@dataclass(frozen=True)
class Size:
    """Bytes after an epoch: of the process, of the log, and of all else in the run's folder."""

    epoch: int
    memory: int
    log: int
    rest: int


class Sizes(Progress):
    """Takes the sizes at some epochs."""

    def __init__(self, folder: Path, every: int, say: Callable[[str], None]) -> None:
        self.folder, self.every, self.say, self.taken = folder, every, say, list[Size]()

    def epoch(self, record: dict[str, Any]) -> None:
        if record["epoch"] % self.every and record["epoch"] != 1:
            return
        files = {path.name: path.stat().st_size for path in self.folder.iterdir()}
        log = files.pop(LOG)
        size = Size(record["epoch"], resident_bytes(), log, sum(files.values()))
        self.taken.append(size)
        self.say(
            f"  epoch {size.epoch}: {size.memory / 1e6:.1f} MB of memory, log {size.log / 1e6:.3f} "
            f"MB, rest of the folder {size.rest / 1e6:.3f} MB"
        )


def resident_bytes() -> int:
    """Memory of this process that is in use."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def many_epochs(place: Path, epochs: int, say: Callable[[str], None]) -> list[str]:
    """Train so many epochs, and return what grows that must not, in words."""
    run = Run(**{**TINY.__dict__, "epochs": epochs})
    folder = place / "epochs"
    sizes = Sizes(folder, max(1, epochs // 10), say)
    execution = Execution(device="cpu", cpu_threads=1)
    train(prepare(run, execution), RunFolder(folder), False, sizes)
    early, last = sizes.taken[1], sizes.taken[-1]
    failures = []
    if last.memory > MEMORY_MARGIN * early.memory:
        failures.append(f"memory grew from {early.memory} to {last.memory} bytes")
    if last.rest > MEMORY_MARGIN * early.rest:
        failures.append(f"the folder grew from {early.rest} to {last.rest} bytes beside its log")
    if last.log > LINE * epochs:
        failures.append(f"the log has {last.log / epochs:.0f} bytes an epoch")
    say(f"{epochs} epochs: memory flat and disk bounded" if not failures else "; ".join(failures))
    return failures
