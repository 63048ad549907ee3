"""The memory of a step, predicted without computing it.

A learner is copied onto PyTorch's fake tensors, which have shapes, types and storages but no
contents. The copy makes the very step that the learner would make, operation by operation, while
the storages that are alive are counted. So the step of a large network with a large batch is
predicted in seconds on a small machine. Memory that an operation uses inside itself and frees
before it ends is not seen, but that of convolutions and of a CPU's batch normalisation is
estimated (``memory.onednn``, ``memory.cuda``).
"""

import copy
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from layerwise.core.learner import Learner
from layerwise.errors import CannotSplit, Diverged, InvalidInput, raised
from layerwise.memory import cuda, onednn
from layerwise.memory.accounting import (
    FORWARD,
    Mark,
    Timeline,
    persistent_tensors,
    storage_bytes,
    unit_tensors,
)
from layerwise.ops.windowed_gradient import GradientInParts, made_whole
from layerwise.utils.device import counting_for, device_kind, device_of
from layerwise.utils.multiply_adds import multiply_adds

BATCH_NORM_BACKWARD = torch.ops.aten.native_batch_norm_backward.default
CONVOLUTIONS = (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default)


class Footprint(TorchDispatchMode):
    """Count of the bytes alive of storages that operations make while it is entered.

    Each storage counts once, however many views it has.

    Args:
        learner: learner whose persistent tensors (weights, optimizer state) are not counted.

    Attributes:
        timeline: bytes since the last ``restart``; the unit of time is one operation.
        multiply_adds: number since then, of the forward and backward passes of each unit.
    """

    def __init__(self, learner: Learner) -> None:
        super().__init__()
        self._alive: dict[int, int] = {}  # bytes of every storage
        self._operations = 0
        self.restart(learner)

    def restart(self, learner: Learner, kept_bytes: int = 0) -> None:
        """Begin a new timeline.

        Args:
            learner: see the class.
            kept_bytes: memory that a rule keeps between steps, which is not counted either.
        """
        self.timeline = Timeline()
        self.multiply_adds: dict[int, int] = defaultdict(int)
        self._alive |= {storage_bytes(tensor)[0]: 0 for tensor in persistent_tensors(learner)}
        self._unit, self._sum = 0, sum(self._alive.values()) - kept_bytes

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if any(issubclass(kind, GradientInParts) for kind in types):
            with self:  # the tensors that it is made of are counted too
                args, kwargs = made_whole((args, kwargs or {}))
        self._operations += 1
        # code reads a value, and a fake tensor has none
        if func is torch.ops.aten._local_scalar_dense.default:
            return args[0].dtype is torch.bool or 1  # a check that passes; a first step; a label
        result = func(*args, **(kwargs or {}))
        if func is BATCH_NORM_BACKWARD and not asked_for_maps(args, kwargs or {}):
            result = (None, *result[1:])  # fake tensors make what was not asked for
        if is_accumulation(func, args):
            self._take_over(args[0], result)
        if inside := workspace_bytes(func, args, result):
            self.timeline.points += [
                (self._operations, self._sum + inside),
                (self._operations, self._sum),
            ]
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value)
        self.multiply_adds[self._unit] += multiply_adds(func, args, kwargs or {}, result)
        return result

    def mark(self, unit: int, phase: str) -> None:
        """Note that a unit begins a phase of its step; see ``accounting.phases``."""
        self._unit = unit
        self.timeline.marks.append(Mark(self._operations, unit, phase))

    def _take_over(self, summand: Tensor, result: Tensor) -> None:
        """Count a sum in the place of its first summand, which is not needed any more."""
        old, new = storage_bytes(summand)[0], storage_bytes(result)[0]
        if new not in self._alive and self._alive.get(old, 0) == allocated_bytes(result):
            self._alive[new], self._alive[old] = self._alive[old], 0
            weakref.finalize(result.untyped_storage(), self._remove, new).atexit = False

    def _add(self, tensor: Tensor) -> None:
        key, size = storage_bytes(tensor)[0], allocated_bytes(tensor)
        if key not in self._alive:
            self._alive[key] = size
            weakref.finalize(tensor.untyped_storage(), self._remove, key).atexit = False
            self._change(size)

    def _remove(self, key: int) -> None:
        self._change(-self._alive.pop(key))

    def _change(self, size: int) -> None:
        self._sum += size
        self.timeline.points.append((self._operations, self._sum))


def allocated_bytes(tensor: Tensor) -> int:
    """Bytes that the device's allocator counts for a tensor's storage."""
    size = tensor.untyped_storage().nbytes()
    return cuda.block_bytes(size) if device_kind(tensor) == "cuda" else size


def workspace_bytes(func: Any, args: Sequence[Any], result: Any) -> int:
    """The most bytes that an operation has alive at once, its result counted, where known."""
    on_gpu = device_kind(args[0]) == "cuda" if args and isinstance(args[0], Tensor) else False
    if func in CONVOLUTIONS:
        return (cuda if on_gpu else onednn).workspace_bytes(func, args, result)
    if func is BATCH_NORM_BACKWARD and result[0] is not None and not on_gpu:
        # a CPU's makes its result a second time where both maps are of one format (docs/log.md)
        gradient, maps = args[:2]
        return (2 if gradient.stride() == maps.stride() else 1) * allocated_bytes(result[0])
    return 0


def asked_for_maps(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a backward pass of batch normalisation makes the gradient of its maps."""
    mask = args[9] if len(args) > 9 else kwargs["output_mask"]
    return bool(mask[0])


def is_accumulation(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation adds two gradients of one tensor, as autograd does in its backward pass.

    It adds real gradients in place where nothing else refers to the first; those without contents
    are a subclass, of which it makes a new sum.
    """
    return (
        func is torch.ops.aten.add.Tensor
        and torch._C._current_graph_task_id() != -1
        and not torch.is_grad_enabled()  # a forward pass that is made again is in a backward pass
        and all(isinstance(summand, Tensor) for summand in args[:2])
        and args[0].shape == args[1].shape
    )


class SavedBytes:
    """Bytes saved for backward passes while it is entered, without those that stay between steps.

    Each storage counts once. Where a batch comes in parts, only the first is counted, of which none
    is larger.

    Attributes:
        units: bytes of every storage that a unit saved, by the unit's index; unit 0 unless ``mark``
            says otherwise. heads: the same of what its loss saved.
    """

    def __init__(self, learner: Learner) -> None:
        self.units: dict[int, dict[int, int]] = defaultdict(dict)
        self.heads: dict[int, dict[int, int]] = defaultdict(dict)
        self._in_head = False
        self._losses = [unit.loss for unit in learner.units]
        self._unit = 0
        self._passes = Counter[int]()
        self._own = {storage_bytes(tensor)[0] for tensor in persistent_tensors(learner)}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    def __enter__(self) -> "SavedBytes":
        self._handles = [loss.register_forward_pre_hook(self._enter_head) for loss in self._losses]
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        for handle in self._handles:
            handle.remove()

    def _enter_head(self, *_: Any) -> None:
        self._in_head = True

    def mark(self, unit: int, phase: str) -> None:
        """Note that a unit begins a phase of its step; see ``accounting.phases``."""
        self._unit, self._in_head = unit, False
        self._passes[unit] += phase == FORWARD

    def reached(self, unit: int, first: int) -> int:
        """Bytes saved for a unit's loss: by itself and by the units that it reaches.

        What earlier units' losses saved is freed before.

        Args:
            first: index of the first unit that the loss reaches.
        """
        saved = dict(self.heads[unit])
        for index in range(min(first, unit), unit + 1):
            saved |= self.units[index]
        return sum(saved.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        key, size = storage_bytes(tensor)
        if key not in self._own and self._passes[self._unit] <= 1:
            (self.heads if self._in_head else self.units)[self._unit][key] = size
        return tensor


@contextmanager
def pretended(
    things: Any, memory_formats: Sequence[torch.memory_format] | None = None
) -> Iterator[Any]:
    """A copy without contents of a learner, or of a tuple of a learner and modules.

    Operations inside the context make no contents either.

    Raises:
        InvalidInput: something cannot be computed without contents.

    Args:
        things: the learner, or a tuple that begins with it and holds modules or lists of them.
        memory_formats: memory format of each unit's weights, and of their optimizer state, in the
            copy; None: as they are.
    """
    learner, *pieces = tree_leaves(things)
    kind = device_kind(next(learner.model.parameters()))
    constants = [buffer for piece in pieces for buffer in piece.buffers()]
    with FakeTensorMode() as mode, counting_for(kind):
        doubles: dict[int, Any] = {
            id(tensor): mode.from_tensor(tensor)
            for tensor in (*persistent_tensors(learner), *constants)
        }
        # a step of the copy always updates, and a scale has no contents to ask
        doubles |= {
            id(unit.scaler): torch.amp.GradScaler(enabled=False)
            for unit in learner.units
            if unit.scaler is not None
        }
        for unit, memory_format in zip(learner.units, memory_formats or (), strict=False):
            for tensor in unit_tensors(unit):
                doubles[id(tensor)] = with_memory_format(doubles[id(tensor)], memory_format)
        for double in doubles.values():
            if isinstance(double, nn.Parameter):
                double.grad = None  # a step begins without gradients of earlier ones
        try:
            yield copy.deepcopy(things, doubles)
        except (InvalidInput, CannotSplit, Diverged, MemoryError):
            raise
        except Exception as error:  # code of any kind runs here, on tensors without contents
            raise InvalidInput(
                "Cannot predict the memory of a step: the network, or its loss, cannot be computed "
                f"without contents, and {raised(error)}. Choose a rule and options that need no "
                "prediction, or replace what reads the contents of tensors."
            ) from error


def blank_batch(learner: Learner, batch_size: int) -> tuple[Tensor, Tensor]:
    """A batch for a learner: images of its shape, whose contents are not set, and labels 0."""
    images = torch.empty(
        batch_size, *learner.image_shape, dtype=learner.image_type, device=device_of(learner.model)
    )
    return images, torch.zeros(batch_size, dtype=torch.int64, device=images.device)


def with_memory_format(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """A tensor of the same shape and type in a memory format; no contents."""
    if tensor.dim() != 4 or tensor.is_contiguous(memory_format=memory_format):
        return tensor
    made = torch.empty_like(tensor, memory_format=memory_format)
    return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made
