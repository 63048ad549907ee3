"""Messages between neighbouring ranks: activations and targets, forward only.

A message is a description of fixed size, on the CPU, and then its tensors, each as it lies in
memory: a map in channels-last arrives in channels-last, so that the next unit computes the same
bits. Sending returns at once; receiving goes on beside the computation of the batch before.
"""

import io
import math
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from layerwise.distributed.world import naming_lost_ranks
from layerwise.errors import InvalidInput

DESCRIPTION, LENGTH = 8192, 4  # bytes; the first ones hold the length
DESCRIBED, CONTENT = 1, 2  # tags
# of values that pass between units beside tensors, in lists, tuples and dictionaries
PLAIN = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device)


@dataclass
class Message:
    """What a rank sends to the next one.

    Attributes:
        values: tensors and plain values.
        facts: plain values by name.
    """

    values: tuple[Any, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> list[Tensor]:
        return [value for value in self.values if isinstance(value, Tensor)]


@dataclass(frozen=True)
class Entry:
    """A value of a message: a tensor's layout, a plain value, or an earlier tensor once more."""

    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    value: Any = None
    same_as: int | None = None


def dense(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy if its numbers do not lie side by side in memory."""
    maps = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if maps or tensor.is_contiguous() else tensor.contiguous()


def flat(tensor: Tensor) -> Tensor:
    """A dense tensor's numbers in the order of memory, (N,)."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())


def entries_of(values: Sequence[Any]) -> list[Entry]:
    """The description of a message's values, whose tensors are dense."""
    entries: list[Entry] = []
    for number, value in enumerate(values):
        if not isinstance(value, Tensor):
            entries.append(Entry(value=value))
            continue
        same = [place for place in range(number) if is_same(values[place], value)]
        layout = tuple(value.shape), tuple(value.stride()), value.dtype
        entries.append(Entry(*layout, same_as=same[0] if same else None))
    return entries


def is_same(one: Any, other: Tensor) -> bool:
    """Whether a value is a tensor of the same memory and layout as another."""
    return (
        isinstance(one, Tensor)
        and one.numel() > 0  # all empty ones have the address 0
        and one.data_ptr() == other.data_ptr()
        and one.dtype == other.dtype
        and one.shape == other.shape
        and one.stride() == other.stride()
    )


def described(facts: dict[str, Any], entries: Sequence[Entry]) -> Tensor:
    """The description of a message, (``DESCRIPTION``,) uint8.

    Raises:
        InvalidInput: its plain values are too long, or of a kind that the next rank does not load.
    """
    refuse_strange_values(entries)
    buffer = io.BytesIO()
    torch.save((facts, [vars(entry) for entry in entries]), buffer)
    content = len(buffer.getvalue()).to_bytes(LENGTH, "big") + buffer.getvalue()
    if len(content) > DESCRIPTION:
        raise InvalidInput(
            f"Cannot send activations to the next rank: their description takes {len(content)} "
            f"bytes, {DESCRIPTION} at most. Let fewer plain values pass between units."
        )
    return torch.frombuffer(bytearray(content.ljust(DESCRIPTION, b"\0")), dtype=torch.uint8)


def refuse_strange_values(entries: Sequence[Entry]) -> None:
    """Refuse values that a rank does not take from another: loading them could run code.

    Raises:
        InvalidInput: naming the first one's class.
    """
    for entry in entries:
        if (strange := strange_in(entry.value)) is not None:
            raise InvalidInput(
                f"Cannot send activations to the next rank: a value of type {strange} passes "
                "between units. Let tensors, numbers, and lists of numbers pass."
            )


def strange_in(value: Any) -> str | None:
    """The class of a value that is not loaded elsewhere, or of one that it holds; else None."""
    if type(value) in (list, tuple, torch.Size):
        return next(filter(None, map(strange_in, value)), None)
    if type(value) is dict:
        return next(filter(None, map(strange_in, [*value.keys(), *value.values()])), None)
    return None if type(value) in PLAIN else type(value).__name__


def read_description(description: Tensor) -> tuple[dict[str, Any], list[Entry]]:
    """What ``described`` was given; no code is run."""
    content = description.numpy().tobytes()
    end = LENGTH + int.from_bytes(content[:LENGTH], "big")
    facts, entries = torch.load(io.BytesIO(content[LENGTH:end]), weights_only=True)
    return facts, [Entry(**entry) for entry in entries]


class Sender:
    """Sends messages to a rank without waiting, up to a number that have not arrived.

    A thread of its own sends them. So a profiler around a step, which follows the calling thread,
    meets no message: PyTorch's writes into freed memory when one ends after it.

    Args:
        rank: whom to send to.
        depth: most messages on their way; one more waits until the oldest has arrived.
        wire: device that content is sent from: the CPU where there is no NCCL.
        rounded: whether numbers of float32 travel as bfloat16.
    """

    def __init__(self, rank: int, depth: int, wire: torch.device, rounded: bool) -> None:
        self.rank, self.depth, self.wire, self.rounded = rank, depth, wire, rounded
        self.places = threading.Semaphore(depth)
        self.waiting: queue.SimpleQueue[list[Tensor]] = queue.SimpleQueue()
        self.error: BaseException | None = None
        threading.Thread(target=self.run, daemon=True).start()

    def send(self, message: Message) -> None:
        """Send a message; its tensors must not change until it has arrived.

        Raises:
            LostRank: the rank does not take messages.
        """
        values = [dense(value) if isinstance(value, Tensor) else value for value in message.values]
        entries = entries_of(values)
        contents = [
            self.on_wire(flat(value))
            for entry, value in zip(entries, values, strict=True)
            if entry.dtype is not None and entry.same_as is None
        ]
        self.places.acquire()
        self.raise_error()
        self.waiting.put([described(message.facts, entries), *contents])

    def on_wire(self, content: Tensor) -> Tensor:
        if self.rounded and content.dtype is torch.float32:
            content = content.to(torch.bfloat16)
        return content.to(self.wire)

    def run(self) -> None:
        if self.wire.type == "cuda":
            torch.cuda.set_device(self.wire)
        while True:
            self.send_now(self.waiting.get())
            self.places.release()

    def send_now(self, contents: list[Tensor]) -> None:
        """Send a message's tensors, unless an earlier one was not taken."""
        try:
            with naming_lost_ranks():
                for number, content in enumerate(contents if self.error is None else ()):
                    dist.send(content, self.rank, tag=CONTENT if number else DESCRIBED)
        except BaseException as error:  # the calling thread raises it
            self.error = error

    def wait(self) -> None:
        """Wait until all messages have arrived.

        Raises:
            LostRank: the rank does not take messages.
        """
        for _ in range(self.depth):
            self.places.acquire()
        self.places.release(self.depth)
        self.raise_error()

    def raise_error(self) -> None:
        if self.error is not None:
            raise self.error


class Receiver:
    """Receives messages from a rank, the next one while the last is worked on.

    Args:
        rank: whom to receive from.
        device: where the tensors are wanted.
        wire: device that content arrives on.
        rounded: whether numbers of float32 travel as bfloat16.
    """

    def __init__(self, rank: int, device: torch.device, wire: torch.device, rounded: bool) -> None:
        self.rank, self.device, self.wire, self.rounded = rank, device, wire, rounded
        self.coming: Beside | None = None
        # what is received does not wait for what is computed
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def receive(self, more: bool = True) -> Message:
        """The next message.

        Args:
            more: begin to receive the one after it, unless this one says that it is the last.

        Raises:
            LostRank: the rank sends nothing.
        """
        coming, self.coming = self.coming or Beside(self.receive_now), None
        message: Message = coming.result()
        if self.stream is not None:
            for tensor in message.tensors():  # its memory is not for the other stream meanwhile
                tensor.record_stream(torch.cuda.current_stream(self.device))
        if more and not message.facts.get("last"):
            self.coming = Beside(self.receive_now)
        return message

    def receive_now(self) -> Message:
        if self.stream is None:
            return self.received()
        with torch.cuda.stream(self.stream):
            message = self.received()
            self.stream.synchronize()
        return message

    def received(self) -> Message:
        description = torch.empty(DESCRIPTION, dtype=torch.uint8)
        with naming_lost_ranks():
            dist.recv(description, self.rank, tag=DESCRIBED)
            facts, entries = read_description(description)
            values: list[Any] = []
            for entry in entries:
                values.append(self.value_of(entry, values))
        return Message(tuple(values), facts)

    def value_of(self, entry: Entry, earlier: Sequence[Any]) -> Any:
        if entry.dtype is None:
            return entry.value
        if entry.same_as is not None:
            return earlier[entry.same_as]
        rounded = self.rounded and entry.dtype is torch.float32
        kind = torch.bfloat16 if rounded else entry.dtype
        content = torch.empty(math.prod(entry.shape), dtype=kind, device=self.wire)
        dist.recv(content, self.rank, tag=CONTENT)
        return content.to(self.device, entry.dtype).as_strided(entry.shape, entry.stride)


class Beside:
    """A function's result, computed beside what goes on; no process waits for it when it ends."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function, self.value = function, None
        self.error: BaseException | None = None
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def run(self) -> None:
        try:
            self.value = self.function()
        except BaseException as error:
            self.error = error

    def result(self) -> Any:
        self.thread.join()
        if self.error is not None:
            raise self.error
        return self.value
