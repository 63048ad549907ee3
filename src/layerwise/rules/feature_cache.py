"""What enters the unit that a sequential rule trains: computed anew for every batch, or kept.

What is kept lies in one table of bytes with a row for every image and view (one of its
augmentations). A row is wide enough for
what enters any of the units, so what leaves a frozen unit is written over what entered it: there is
never a second table. It is in memory, or a file that has no name, whose space the system frees when
the process ends in whichever way.
"""

import math
import mmap
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from layerwise.core.learner import Learner
from layerwise.core.unit import Activations, Unit
from layerwise.errors import InvalidInput
from layerwise.ops.batch_norm import overwriting, sole_readers
from layerwise.utils.sizes import format_size

ALIGNMENT = 8  # bytes, of the widest number type


class Batches(Protocol):
    """What a rule needs of the training data."""

    labels: Tensor  # (N,), of the whole set, in its order
    # how many different augmentations of an image there are; None: a new one each epoch
    views: int | None

    def __len__(self) -> int: ...  # batches per epoch
    def order(self, epoch: int) -> list[Tensor]: ...  # indices of every batch
    # (B, C, H, W), augmented as in that epoch
    def images(self, indices: Tensor, epoch: int) -> Tensor: ...
    # images and labels
    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


class RecomputedFeatures:
    """What enters a unit, computed for every batch by the frozen units before it."""

    kept_bytes = 0

    def __init__(self, source: Batches) -> None:
        self.source, self.frozen = source, list[Unit]()

    def advance(self, frozen: list[Unit]) -> None:
        """From now on, give what has passed these units."""
        self.frozen = frozen

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Activations, Tensor]]:
        """What enters the unit, and the labels, of an epoch's batches from ``start`` on."""
        for images, labels in self.source.batches(epoch, start):
            yield pass_through(self.frozen, (images,)), labels


@torch.no_grad()
def pass_through(units: list[Unit], activations: Activations) -> Activations:
    for unit in units:
        with overwriting(sole_readers(unit.piece)):
            activations = unit.forward(activations)
    return activations


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Keeping:
    """Where features are kept, and how much of them.

    Attributes:
        file: where the file of features is made; None: they are kept in memory, on the device that
            trains.
        limit: bytes they may take; None: any number. bound: what sets the limit, in words.
        say: is given one line about what is kept and why not more.
    """

    file: Path | None = None
    limit: int | None = None
    bound: str = "the limit"
    say: Callable[[str], None] = say_on_stderr


IN_MEMORY = Keeping()


class Kind(NamedTuple):
    """One of the tensors that enter a unit: its shape for each image, its number type, and whether
    maps are channels-last.
    """

    shape: torch.Size
    type: torch.dtype
    channels_last: bool = False

    @property
    def row_bytes(self) -> int:
        return -(-math.prod(self.shape) * self.type.itemsize // ALIGNMENT) * ALIGNMENT


def kind_of(values: Tensor) -> Kind:
    """The kind of a tensor with an entry per image."""
    channels_last = (
        values.dim() == 4
        and not values.is_contiguous()
        and values.is_contiguous(memory_format=torch.channels_last)
    )
    return Kind(values.shape[1:], values.dtype, channels_last)


class Column:
    """The place in the table of one of the tensors that enter a unit: some bytes of every row."""

    def __init__(self, kind: Kind, table: Tensor, offset: int, device: torch.device) -> None:
        self.kind, self.device = kind, device
        self.cells = table[:, offset : offset + math.prod(kind.shape) * kind.type.itemsize].view(
            kind.type
        )

    def write(self, values: Tensor, first: int) -> None:
        """Keep values (B, ...) in the rows from ``first`` on."""
        if self.kind.channels_last:
            values = values.permute(0, 2, 3, 1)
        self.cells[first : first + len(values)] = values.reshape(len(values), -1).to(
            self.cells.device
        )

    def read(self, rows: Tensor) -> Tensor:
        """The values in some rows, (B,) -> (B, ...)."""
        values = self.cells.index_select(0, rows.to(self.cells.device)).to(self.device)
        if not self.kind.channels_last:
            return values.view(-1, *self.kind.shape)
        channels, height, width = self.kind.shape
        return values.view(-1, height, width, channels).permute(0, 3, 1, 2)


class CachedFeatures:
    """What enters a unit, kept for every view of the images and passed on once through each unit
    that is frozen.

    The first unit's inputs are the images, which are there anyway. Units from ``first`` on are
    kept: the first from which on all fit under the limit. The units before it, the cheapest to do
    so, have their inputs computed for every batch.

    Args:
        kinds: what enters each unit; see ``kinds_entering``.
    """

    def __init__(self, source: Batches, kinds: list[list[Kind]], keeping: Keeping) -> None:
        self.source, self.kinds, self.keeping = source, kinds, keeping
        self.recomputed = RecomputedFeatures(source)
        self.device, self.count = source.labels.device, len(source.labels)
        self.views = source.views or 1
        self.part_size = max(len(indices) for indices in source.order(0))
        self.parts = torch.arange(self.count, device=self.device).split(self.part_size)
        # how many units what is kept has passed; 0: nothing is kept yet
        self.depth, self.columns = 0, list[Column]()
        self.rows, self.first = self.reserve()
        if len(kinds) > 1:
            keeping.say(self.describe())

    def size(self, first: int) -> int:
        """Bytes that it takes to keep what enters any unit from ``first`` on."""
        return self.views * self.count * self.row_bytes(first)

    def row_bytes(self, first: int) -> int:
        return max(sum(kind.row_bytes for kind in kinds) for kinds in self.kinds[first:])

    def reserve(self) -> tuple[Tensor | None, int]:
        """The table, (views * images, bytes), and the first unit whose inputs it is for; without
        room: None, and no unit.
        """
        self.refusal, none = "", len(self.kinds)
        limit = math.inf if self.keeping.limit is None else self.keeping.limit
        first = next((index for index in range(1, none) if self.size(index) <= limit), none)
        if first == none:
            return None, none
        width = self.row_bytes(first)
        size = self.views * self.count * width
        try:
            if self.keeping.file is None:
                return torch.empty(size, dtype=torch.uint8, device=self.device).view(
                    -1, width
                ), first
            return nameless_file(self.keeping.file, size).view(-1, width), first
        except (
            OSError,
            MemoryError,
            RuntimeError,
        ) as error:  # torch says by a RuntimeError that memory is full
            self.refusal = (
                error.strerror if isinstance(error, OSError) else None
            ) or "not enough memory"
            return None, none

    def describe(self) -> str:
        """One line: what is kept, and why not more."""
        file, bound = self.keeping.file, self.keeping.bound
        place = f"in a nameless file in {file.parent}" if file else "in memory"
        least, whole = format_size(self.size(len(self.kinds) - 1)), format_size(self.size(1))
        if self.refusal:
            return f"cache: no room for {whole} {place} ({self.refusal}), so every unit's inputs are computed for every batch"
        if self.rows is None:
            return (
                f"cache: {whole} of features exceed {bound}, and so do the {least} of the last "
                "unit, so every unit's inputs are computed for every batch"
            )
        if self.first > 1:
            return (
                f"cache: {whole} of features exceed {bound}: units 1 to {self.first - 1} have "
                f"their inputs computed for every batch, from unit {self.first} on "
                f"{format_size(self.size(self.first))} are kept {place}"
            )
        return f"cache: {whole} of features are kept {place}"

    @property
    def kept_bytes(self) -> int:
        """Memory for what is kept, at its largest; a file takes only memory that nothing else
        needs.
        """
        return self.rows.nbytes if self.rows is not None and self.keeping.file is None else 0

    def advance(self, frozen: list[Unit]) -> None:
        """From now on, give what has passed these units: what is kept has passed all but the last
        already.
        """
        self.recomputed.advance(frozen)
        for depth in range(max(self.first, self.depth + 1), len(frozen) + 1):
            self.pass_on(frozen[self.depth : depth], depth)

    def pass_on(self, units: list[Unit], depth: int) -> None:
        """Write what leaves some units over what entered them, part by part, so that a resumed run
        computes the same.
        """
        assert self.rows is not None
        offset, columns = 0, list[Column]()
        for kind in self.kinds[depth]:
            columns.append(Column(kind, self.rows, offset, self.device))
            offset += kind.row_bytes
        for view in range(self.views):
            for number, part in enumerate(self.parts):
                entering = (
                    self.read(part, view) if self.depth else (self.source.images(part, view),)
                )
                for column, values in zip(columns, pass_through(units, entering), strict=True):
                    column.write(values, view * self.count + number * self.part_size)
        self.depth, self.columns = depth, columns

    def read(self, indices: Tensor, view: int) -> Activations:
        return tuple(column.read(view * self.count + indices) for column in self.columns)

    def batches(self, epoch: int, start: int) -> Iterator[tuple[Activations, Tensor]]:
        """What enters the unit, and the labels, of an epoch's batches from ``start`` on."""
        if not self.depth:
            yield from self.recomputed.batches(epoch, start)
            return
        for indices in self.source.order(epoch)[start:]:
            yield self.read(indices, epoch % self.views), self.source.labels[indices]


def cached_features(
    learner: Learner, source: Batches, keeping: Keeping
) -> Callable[[], CachedFeatures]:
    """What makes the features, after everything has been looked at that may be refused.

    Raises:
        InvalidInput: the images have no fixed number of views, or what passes between two units
            cannot be kept.
    """
    if source.views is None:
        raise InvalidInput(
            "features can only be cached of a fixed number of augmentations per image, and "
            "without --views every epoch has new ones: give --views, such as 1 (N of them take N "
            "times the room), or --no-augment"
        )
    kinds = kinds_entering(learner, source)
    return lambda: CachedFeatures(source, kinds, keeping)


@torch.no_grad()
def kinds_entering(learner: Learner, source: Batches) -> list[list[Kind]]:
    """What enters each unit, learned from three images.

    Raises:
        InvalidInput: something else than a tensor with an entry per image passes between two units.
    """
    indices = torch.arange(min(3, len(source.labels)), device=source.labels.device)
    learner.train(False)
    activations: Activations = (source.images(indices, 0),)
    kinds = []
    for unit in learner.units:
        if not all(
            isinstance(value, Tensor) and value.shape[:1] == indices.shape for value in activations
        ):
            raise InvalidInput(
                "something other than a tensor with an entry per image passes between two units, "
                "and may differ from batch to batch, so it cannot be cached: leave --cache out"
            )
        kinds.append(list(map(kind_of, activations)))
        activations = unit.forward(activations)
    return kinds


def nameless_file(path: Path, size: int) -> Tensor:
    """A new file as a tensor of bytes, (size,). It loses its name at once, so nothing is left of it
    after the tensor.

    Raises:
        OSError: the file cannot be made, or there is no room for it.
    """
    path.unlink(missing_ok=True)  # left where a process was killed between the next two calls
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        path.unlink()
        # a disk that is full says so here, and not by killing the process at a write
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS
            block = bytes(1 << 20)
            while (left := size - os.lseek(descriptor, 0, os.SEEK_CUR)) > 0:
                os.write(descriptor, block[:left])
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    finally:
        os.close(descriptor)
