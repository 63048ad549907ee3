"""Progress of a training on the screen.

A terminal shows a bar, anything else plain lines. Every epoch has one line per unit.
"""

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, TaskID, TextColumn
from rich.progress import Progress as Bar

from layerwise.hierarchy import format_hierarchy, parse_hierarchy
from layerwise.runs.run import Run
from layerwise.utils.sizes import format_size
from layerwise.utils.terminal import unguarded, visible

if TYPE_CHECKING:
    from layerwise.rules.base import Tick
    from layerwise.training.meter import Meter

MOST_SECONDS = 3_599_999  # what a clock can show
REFRESH = 0.5  # seconds between updates of the bar: each reads losses from the device


def clock(seconds: float) -> str:
    """A stretch of time as hours, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(int(min(seconds, MOST_SECONDS)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}"


def training_words(run: Run, units: int) -> str:
    """Rule, local loss and number of units, with the options of rule and loss that were given."""
    rule = with_options(run.rule, run.rule_options)
    return (
        f"{rule}, {with_options(run.loss_in_words, run.loss_options)}, {units} units"
        if units > 1
        else rule
    )


def with_options(name: str, options: Mapping[str, Any]) -> str:
    words = ", ".join(f"{key.replace('_', '-')} {value}" for key, value in options.items())
    return f"{name} ({words})" if words else name


class Progress:
    """Shows nothing; the base of what does."""

    def data(self, line: str) -> None: ...
    def begin(self, run: Run, path: Path, device: str, units: int, epoch: int) -> None: ...
    def ranks(self, placement: Sequence[Mapping[str, Any]]) -> None: ...
    def tick(self, tick: "Tick", meter: "Meter") -> None: ...
    def epoch(self, record: dict[str, Any]) -> None: ...


class Shown(Progress):
    """Lines on stdout; with ``bar``, a bar on stderr."""

    def __init__(self, bar: Bar | None, units: bool = True) -> None:
        self.bar, self.units = bar, units
        self.console = bar.console if bar else Console(file=unguarded(sys.stderr))
        self.task: TaskID | None = None
        self.refreshed = self.began = time.monotonic()
        self.first_epoch = 0.0

    def data(self, line: str) -> None:
        """Say what was found of a data set; not of every run of a sweep."""
        if self.units:
            self.say(line)

    def begin(self, run: Run, path: Path, device: str, units: int, epoch: int) -> None:
        hierarchy = f" {format_hierarchy(parse_hierarchy(run.hierarchy))}" if run.hierarchy else ""
        hierarchy += f" halved after {run.downsample_after}" if run.downsample_after else ""
        how = training_words(run, units)
        self.say(f"{run.model}{hierarchy} on {run.data}: {how}; {device}; {path}")
        if epoch:
            self.say(f"going on after epoch {epoch}")
        self.began, self.first_epoch = time.monotonic(), float(epoch)
        if self.bar:
            self.task = self.bar.add_task(run.rule, total=None, numbers="")

    def ranks(self, placement: Sequence[Mapping[str, Any]]) -> None:
        """Say which units live on which rank, and what each is predicted to need."""
        for number, rank in enumerate(placement):
            first, last = rank["units"]
            predicted = format_size(rank["predicted_memory_bytes"])
            self.say(f"  rank {number}: units {first} to {last}, {predicted} predicted")

    def tick(self, tick: "Tick", meter: "Meter") -> None:
        if self.bar is None or self.task is None or time.monotonic() - self.refreshed < REFRESH:
            return
        self.refreshed = time.monotonic()
        done = tick.after.epoch + tick.after.batch / tick.batches
        loss, accuracy = meter.running()
        epoch = tick.after.epoch + (tick.after.batch > 0)
        numbers = f"epoch {epoch}/{tick.epochs} loss {loss:.4f} accuracy {accuracy:.1f}%"
        rate = f" {meter.images_per_second():.0f} images/s {self.time_left(done, tick.epochs)} left"
        self.bar.update(self.task, completed=done, total=tick.epochs, numbers=numbers + rate)

    def epoch(self, record: dict[str, Any]) -> None:
        scores = "".join(
            f"  {name} {record[key]:.2f} %"
            for name, key in (("validation", "val_accuracy"), ("test", "test_accuracy"))
            if record[key] is not None
        )
        left = self.time_left(record["epoch"], record["epochs"])
        rate = f"{record['images_per_second']:.0f} images/s  {left} left"
        self.say(
            f"epoch {record['epoch']}/{record['epochs']}{scores}  "
            f"{rate}{'  best' if record['best'] else ''}"
        )
        if not self.units:
            return
        for unit in record["units"]:
            held_out = (
                f"  validation {unit['val_accuracy']:6.2f} %" if "val_accuracy" in unit else ""
            )
            self.say(
                f"  {unit['index']:3d} {unit['name']:<28} loss {unit['loss']:.4f}  accuracy "
                f"{unit['accuracy']:6.2f} %{held_out}"
            )

    def time_left(self, done: float, epochs: int) -> str:
        share = (done - self.first_epoch) / max(1e-9, epochs - self.first_epoch)
        seconds = (time.monotonic() - self.began) * (1 - share) / max(share, 1e-9)
        return clock(seconds)

    def say(self, line: str) -> None:
        if self.bar and sys.stdout.isatty():
            self.console.print(
                visible(line), markup=False, emoji=False, highlight=False, soft_wrap=True
            )
        else:
            print(line, flush=True)


@contextmanager
def shown(units: bool = True) -> Iterator[Shown]:
    """Progress for a stretch of work: a bar when stderr is a terminal."""
    if not sys.stderr.isatty():
        yield Shown(None, units)
        return
    columns = (BarColumn(bar_width=8), TextColumn("{task.fields[numbers]}"))  # fits 80 columns
    with Bar(*columns, console=Console(file=unguarded(sys.stderr)), transient=True) as bar:
        yield Shown(bar, units)
