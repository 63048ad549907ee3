"""Activations for the unit that a sequential rule trains: recomputed for every batch, or cached.

The cache is one table of bytes with a row for every image and view (one of its augmentations). A
row is wide enough for the activations that enter any of the units, so the output of a frozen unit
is written over its input, and there is never a second table. The table is in memory, or in a file
without a name, whose space the system frees however the process ends.
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

ALIGNMENT = 8  # bytes: the size of the widest number type


class Batches(Protocol):
    """Training data as a rule reads it.

    Its methods give the number of batches per epoch, the indices of every batch of an epoch, images
    (B, C, H, W) augmented as in that epoch, and the batches: images and labels.

    Attributes:
        labels: labels of the whole set, in its order, (N,).
        views: number of different augmentations of an image; None: a new one each epoch.
    """

    labels: Tensor
    views: int | None

    def __len__(self) -> int: ...
    def order(self, epoch: int) -> list[Tensor]: ...
    def images(self, indices: Tensor, epoch: int) -> Tensor: ...
    def batches(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]: ...


class RecomputedFeatures:
    """Activations that enter a unit, computed for every batch by the frozen units before it."""

    kept_bytes = 0

    def __init__(self, source: Batches) -> None:
        self.source, self.frozen = source, list[Unit]()

    def advance(self, frozen: list[Unit]) -> None:
        """From now on, give activations that have passed these units."""
        self.frozen = frozen

    def batches(
        self, epoch: int, start: int, with_images: bool = False
    ) -> Iterator[tuple[Activations, Tensor, Tensor | None]]:
        """Activations, labels and, if wanted, images of an epoch's batches from ``start`` on."""
        for images, labels in self.source.batches(epoch, start):
            kept = images if with_images else None
            yield pass_through(self.frozen, (images,)), labels, kept


@torch.no_grad()
def pass_through(units: list[Unit], activations: Activations) -> Activations:
    """The output of frozen units, with fewer maps alive where one may be written over."""
    for unit in units:
        with overwriting(sole_readers(unit.piece)):
            activations = unit.forward(activations)
    return activations


def say_on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@dataclass(frozen=True)
class Keeping:
    """Place and limit of cached features.

    Attributes:
        file: path of the file of features; None: they are in memory, on the device that trains.
        limit: most bytes that they may take; None: any number.
        bound: the reason for the limit, in words.
        say: function that is called with one line about what is cached and why not more.
    """

    file: Path | None = None
    limit: int | None = None
    bound: str = "the limit"
    say: Callable[[str], None] = say_on_stderr


IN_MEMORY = Keeping()


class Kind(NamedTuple):
    """Shape for each image, number type and memory format of a tensor that enters a unit."""

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
    """Place in the table of one of the tensors that enter a unit: some bytes of every row."""

    def __init__(self, kind: Kind, table: Tensor, offset: int, device: torch.device) -> None:
        self.kind, self.device = kind, device
        self.cells = table[:, offset : offset + math.prod(kind.shape) * kind.type.itemsize].view(
            kind.type
        )

    def write(self, values: Tensor, first: int) -> None:
        """Write values (B, ...) into the rows from ``first`` on."""
        if self.kind.channels_last:
            values = values.permute(0, 2, 3, 1)
        self.cells[first : first + len(values)] = values.reshape(len(values), -1).to(
            self.cells.device
        )

    def read(self, rows: Tensor) -> Tensor:
        """Read the values in some rows, (B,) -> (B, ...)."""
        values = self.cells.index_select(0, rows.to(self.cells.device)).to(self.device)
        if not self.kind.channels_last:
            return values.view(-1, *self.kind.shape)
        channels, height, width = self.kind.shape
        return values.view(-1, height, width, channels).permute(0, 3, 1, 2)


class CachedFeatures:
    """Activations that enter a unit, cached for every view of the images.

    They pass once through each unit when it is frozen, in each lap. The first unit's inputs are the
    images, which need no cache. The inputs of units from ``first`` on are cached: ``first`` is the
    first unit from which on all inputs fit under the limit. The inputs of the units before it,
    which are the cheapest to compute, are computed for every batch.

    Args:
        source: the training data.
        kinds: kinds of the tensors that enter each unit; see ``kinds_entering``.
        keeping: place and limit of the cache.
    """

    def __init__(self, source: Batches, kinds: list[list[Kind]], keeping: Keeping) -> None:
        self.source, self.kinds, self.keeping = source, kinds, keeping
        self.recomputed = RecomputedFeatures(source)
        self.device, self.count = source.labels.device, len(source.labels)
        self.views = source.views or 1
        self.part_size = max(len(indices) for indices in source.order(0))
        self.parts = torch.arange(self.count, device=self.device).split(self.part_size)
        # number of units that the cached activations have passed; 0: nothing is cached yet
        self.depth, self.columns = 0, list[Column]()
        self.rows, self.first = self.reserve()
        if len(kinds) > 1:
            keeping.say(self.describe())

    def size(self, first: int) -> int:
        """Bytes of a table for the inputs of any unit from ``first`` on."""
        return self.views * self.count * self.row_bytes(first)

    def row_bytes(self, first: int) -> int:
        return max(sum(kind.row_bytes for kind in kinds) for kinds in self.kinds[first:])

    def reserve(self) -> tuple[Tensor | None, int]:
        """The table, (views * images, bytes), and the first unit whose inputs it is for.

        Without room in memory there is no table, and ``first`` is behind the last unit.

        Raises:
            InvalidInput: the file that was asked for cannot be made. Computing features anew could
                give other last bits.
        """
        self.refusal, behind = "", len(self.kinds)
        limit = math.inf if self.keeping.limit is None else self.keeping.limit
        first = next((index for index in range(1, behind) if self.size(index) <= limit), behind)
        if first == behind:
            return None, behind
        width = self.row_bytes(first)
        size = self.views * self.count * width
        try:
            if self.keeping.file is None:
                table = torch.empty(size, dtype=torch.uint8, device=self.device)
            else:
                table = nameless_file(self.keeping.file, size)
            return table.view(-1, width), first
        except OSError as error:
            place = self.keeping.file.parent if self.keeping.file else "memory"
            raise InvalidInput(
                f"Cannot keep {format_size(size)} of features in {place}: "
                f"{error.strerror or error}. Free space, give another --cache-dir or less "
                "--cache-limit, then start again (a run that was begun: with --resume)."
            ) from error
        except (MemoryError, RuntimeError):  # torch raises a RuntimeError when memory is full
            self.refusal = "not enough memory"
            return None, behind

    def describe(self) -> str:
        """One line about what is cached, and why not more."""
        file, bound = self.keeping.file, self.keeping.bound
        place = f"in a nameless file in {file.parent}" if file else "in memory"
        least, whole = format_size(self.size(len(self.kinds) - 1)), format_size(self.size(1))
        if self.refusal:
            return (
                f"cache: no room for {whole} {place} ({self.refusal}), so every unit's inputs are "
                "computed for every batch; the last bits of the weights may differ"
            )
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
        """Memory of the cache, at its largest.

        A file takes only memory that nothing else needs.
        """
        return self.rows.nbytes if self.rows is not None and self.keeping.file is None else 0

    def advance(self, frozen: list[Unit]) -> None:
        """From now on, give activations that have passed these units.

        The cached ones have passed all but the last already. If there are fewer units than those
        have passed, a new lap begins, and they are forgotten: the units will learn again.
        """
        self.recomputed.advance(frozen)
        if len(frozen) < self.depth:
            self.depth, self.columns = 0, []
        for depth in range(max(self.first, self.depth + 1), len(frozen) + 1):
            self.pass_on(frozen[self.depth : depth], depth)

    def pass_on(self, units: list[Unit], depth: int) -> None:
        """Write the output of some units over their input.

        It is computed part by part, always alike, so that a resumed run computes the same.
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

    def batches(
        self, epoch: int, start: int, with_images: bool = False
    ) -> Iterator[tuple[Activations, Tensor, Tensor | None]]:
        """Activations, labels and, if wanted, images of an epoch's batches from ``start`` on."""
        if not self.depth:
            yield from self.recomputed.batches(epoch, start, with_images)
            return
        for indices in self.source.order(epoch)[start:]:
            images = self.source.images(indices, epoch) if with_images else None
            yield self.read(indices, epoch % self.views), self.source.labels[indices], images


def cached_features(
    learner: Learner, source: Batches, keeping: Keeping
) -> Callable[[], CachedFeatures]:
    """A function that makes the cache, returned once everything that can be refused is checked.

    Raises:
        InvalidInput: the images have no fixed number of views, or the activations between two units
            cannot be cached.
    """
    if source.views is None:
        raise InvalidInput(
            "Cannot cache features: without --views every epoch has new augmentations of each "
            "image. Give --views, such as 1 (N of them take N times the space), or --no-augment."
        )
    kinds = kinds_entering(learner, source)
    return lambda: CachedFeatures(source, kinds, keeping)


@torch.no_grad()
def kinds_entering(learner: Learner, source: Batches) -> list[list[Kind]]:
    """The kinds of the tensors that enter each unit, read from three images.

    Raises:
        InvalidInput: something other than a tensor with an entry per image passes between two
            units.
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
                "Cannot cache features: something other than a tensor with an entry per image "
                f"enters unit {unit.index} ({unit.name}), and may differ from batch to batch. "
                "Leave --cache out."
            )
        kinds.append(list(map(kind_of, activations)))
        activations = unit.forward(activations)
    return kinds


def nameless_file(path: Path, size: int) -> Tensor:
    """A new file as a tensor of bytes, (size,).

    The file loses its name at once, so nothing is left of it after the tensor.

    Raises:
        OSError: the file cannot be made, or there is no room for it.
    """
    path.unlink(missing_ok=True)  # left where a process was killed between the next two calls
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        path.unlink()
        # a full disk raises an error here, where a later write would kill the process
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:  # macOS
            block = bytes(1 << 20)
            while (left := size - os.lseek(descriptor, 0, os.SEEK_CUR)) > 0:
                os.write(descriptor, block[:left])
        return torch.frombuffer(mmap.mmap(descriptor, size), dtype=torch.uint8)
    finally:
        os.close(descriptor)
