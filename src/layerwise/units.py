"""A unit learns from its own loss; a learner is a network cut into units.

A unit's step: forward, its own loss, backward inside itself, its own update, and detached features handed on. Nothing of it is
kept when the next unit begins.
"""

import hashlib
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.chain import split
from layerwise.errors import Diverged, InvalidInput
from layerwise.graph import modes_kept
from layerwise.losses import Evaluated, LossFactory, Site, Targets, create_loss

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], Any]
Carried = tuple[Any, ...]  # what passes between two units: tensors, the feature first; rarely a number such as a size

STATE_VERSION = 1
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


@dataclass
class Unit:
    """A piece of the network with its local loss and its optimizer.

    Attributes:
        index: which unit of the chain, from 0.
        name: the path of its layer or block in the network.
        piece: the network's part; shares the network's modules.
        loss: the local loss, with its auxiliary head.
        optimizer: updates piece and head; None when nothing in them is trainable.
        clip_grad: largest norm of the unit's gradient, or None.
        amp: number type that forward passes are computed in (mixed precision), or None.
        seed: with a seed, the random draws of a step depend on seed, unit and step alone; None: the global generator.
    """

    index: int
    name: str
    piece: nn.Module
    loss: nn.Module
    optimizer: Optimizer | None
    scheduler: Any = None
    clip_grad: float | None = None
    amp: torch.dtype | None = None
    seed: int | None = None

    def train(self, mode: bool = True) -> None:
        self.piece.train(mode)
        self.loss.train(mode)

    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters of piece and head."""
        return [p for module in (self.piece, self.loss) for p in module.parameters() if p.requires_grad]

    def forward(self, carried: Carried) -> Carried:
        """Pass features on without learning; to be called under ``torch.no_grad()`` or to be detached by the caller."""
        with precision(carried, self.amp):
            return self.piece(*carried)

    def evaluate(self, carried: Carried, targets: Targets) -> tuple[Carried, Evaluated]:
        """Forward and loss."""
        with precision(carried, self.amp):
            passed = self.piece(*carried)
            return passed, checked_result(self.loss(passed[0], targets))

    def step(self, carried: Carried, targets: Targets, step: int) -> tuple[Carried, Evaluated]:
        """Learn from one batch.

        Args:
            carried: what the unit before handed on; no gradient is computed for it.
            step: how many steps the unit has made before, for the random draws and for messages.

        Returns:
            The features to hand on and the loss with the number of correct examples, all detached.

        Raises:
            Diverged: the loss is not finite; no weight was updated. (On a GPU this is not looked at here, since it would wait
                for the device; see ``refuse_divergence``.)
        """
        with seeded(self.seed, self.index, step, targets.labels.device):
            passed, (loss, correct) = self.evaluate(carried, targets)
        if loss.device.type == "cpu":
            refuse_divergence(self, step, loss)
        if self.optimizer is not None:
            loss.backward()
            if self.clip_grad is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.clip_grad)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return detached(passed), Evaluated(loss.detach(), correct)


def checked_result(result: Any) -> Evaluated:
    """Refuse what a loss of the user's own returns, unless it is a loss and a number of correct examples."""
    if not isinstance(result, tuple) or len(result) != 2 or not all(isinstance(value, Tensor) for value in result):
        raise InvalidInput(f"the loss returned {type(result).__name__}: return layerwise.Evaluated(loss, correct), two tensors")
    return Evaluated(*result)


class StepResult:
    """Losses and local accuracies of one step, one per unit. They stay on the device until they are read.

    Attributes:
        size: examples in the batch.
    """

    def __init__(self, evaluated: Sequence[Evaluated], size: int) -> None:
        self.size = size
        self._evaluated = evaluated

    @property
    def losses(self) -> list[float]:
        return [float(loss) for loss, _ in self._evaluated]

    @property
    def accuracies(self) -> list[float]:
        """Percent of the batch that each unit alone classifies correctly."""
        return [100.0 * float(correct) / self.size for _, correct in self._evaluated]

    def loss_tensor(self) -> Tensor:
        """All losses, (units,)."""
        return torch.stack([loss.float() for loss, _ in self._evaluated])

    def correct_tensor(self) -> Tensor:
        """Correct examples per unit, (units,)."""
        return torch.stack([correct for _, correct in self._evaluated])


class Learner:
    """A network and the units that train it in place; made by ``localize``.

    Attributes:
        model: the user's network.
        units: its units, in order.
        steps: how many steps have been made.
    """

    def __init__(self, model: nn.Module, units: Sequence[Unit], num_classes: int, sample: Tensor) -> None:
        self.model = model
        self.units = list(units)
        self.num_classes = num_classes
        self.image_shape, self.image_type = sample.shape[1:], sample.dtype
        self.steps = 0
        self.training = model.training

    def step(self, images: Tensor, labels: Tensor) -> StepResult:
        """One simultaneous local update: every unit learns from this batch.

        Args:
            images: (B, ...) with B ≥ 2, on the model's device.
            labels: (B,) integers from 0 to num_classes − 1.

        Raises:
            InvalidInput: the batch cannot be used; nothing was updated.
            Diverged: a unit's loss is not finite; it and the units behind it were not updated.
        """
        self.check(images, labels)
        if images.shape[1:] != self.image_shape or images.dtype != self.image_type:
            raise InvalidInput(
                f"images of shape {tuple(images.shape)} and type {images.dtype} do not fit the sample, which had shape "
                f"(B, {', '.join(map(str, self.image_shape))}) and type {self.image_type}: give such images"
            )
        if self.training != self.model.training:
            self.train(self.model.training)
        targets = Targets(labels.long(), self.num_classes)
        carried: Carried = (images.detach(),)
        results = []
        for unit in self.units:
            carried, evaluated = unit.step(carried, targets, self.steps)
            results.append(evaluated)
        self.steps += 1
        return StepResult(results, len(labels))

    def train(self, mode: bool = True) -> None:
        """Put the network and all heads in training or evaluation mode."""
        for unit in self.units:
            unit.train(mode)
        self.model.train(mode)  # last: a model that keeps parts of itself frozen has the last word
        self.training = mode

    def check(self, images: Tensor, labels: Tensor) -> None:
        """Refuse a batch that cannot be learned from. What lies on a GPU is not read, since that would wait for the device."""
        if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
            raise InvalidInput("images and labels must be tensors: turn arrays and lists into them with torch.as_tensor")
        if not torch.is_grad_enabled():
            raise InvalidInput(
                "gradients are switched off here, so nothing can be learned: take the step out of torch.no_grad()"
            )
        if len(images) < 2:
            raise InvalidInput(
                f"a batch of {len(images)} cannot be learned from: batch normalisation and similarity compare examples; "
                "give batches of 2 or more (drop the last one of an epoch if it is smaller)"
            )
        if labels.dim() != 1 or len(labels) != len(images) or labels.dtype not in INTEGERS:
            raise InvalidInput(
                f"labels of shape {tuple(labels.shape)} and type {labels.dtype} do not fit {len(images)} images: give one "
                "integer per image"
            )
        if labels.device.type == "cpu" and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
            raise InvalidInput(
                f"labels from {int(labels.min())} to {int(labels.max())} are out of range: num_classes={self.num_classes} "
                f"accepts 0 to {self.num_classes - 1}"
            )
        if images.device.type == "cpu" and not bool(torch.isfinite(images).all()):
            raise InvalidInput("the images hold NaN or infinite values: clean or clip them before the step")

    def end_epoch(self) -> None:
        """Advance every unit's learning-rate schedule."""
        for unit in self.units:
            if unit.scheduler is not None:
                unit.scheduler.step()

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on: network, heads, every unit's optimizer and schedule. Tensors and plain types only."""
        return {
            "version": STATE_VERSION,
            "units": [unit.name for unit in self.units],
            "steps": self.steps,
            "model": self.model.state_dict(),
            "losses": [unit.loss.state_dict() for unit in self.units],
            "optimizers": [unit.optimizer.state_dict() if unit.optimizer else None for unit in self.units],
            "optimizer_kinds": [type(unit.optimizer).__name__ for unit in self.units],
            "schedulers": [unit.scheduler.state_dict() if unit.scheduler else None for unit in self.units],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned.

        Raises:
            InvalidInput: the state belongs to another network, cut, loss or optimizer; nothing was loaded.
        """
        names = [unit.name for unit in self.units]
        if state.get("version") != STATE_VERSION or state.get("units") != names:
            raise InvalidInput(
                f"the state is of {len(state.get('units') or [])} units (version {state.get('version')}), this learner has "
                f"{len(names)} (version {STATE_VERSION}): build it with the same model and the same at= as when it was saved"
            )
        kinds = [type(unit.optimizer).__name__ for unit in self.units]
        entries = ("model", "losses", "optimizers", "schedulers", "steps")
        missing = [entry for entry in entries if entry not in state]
        pairs = (
            [(self.model, state["model"]), *zip((u.loss for u in self.units), state["losses"], strict=False)]
            if not missing
            else []
        )
        misfit = next((reason for module, saved in pairs if (reason := difference(module, saved))), None)
        if missing or misfit or state.get("optimizer_kinds") != kinds:
            reason = f"it has no {missing[0]}" if missing else misfit or "its optimizers are of other kinds"
            raise InvalidInput(f"the state does not fit this learner: {reason}. Build the learner as when the state was saved")
        for module, saved in pairs:
            module.load_state_dict(saved)
        for unit, optimizer, scheduler in zip(self.units, state["optimizers"], state["schedulers"], strict=True):
            if unit.optimizer is not None:
                unit.optimizer.load_state_dict(optimizer)
            if unit.scheduler is not None and scheduler is not None:
                unit.scheduler.load_state_dict(scheduler)
        self.steps = state["steps"]


def difference(module: nn.Module, saved: Mapping[str, Tensor]) -> str | None:
    """Where a saved state does not fit a module, in words."""
    own = {name: tensor.shape for name, tensor in module.state_dict().items()}
    for name in sorted(own.keys() ^ saved.keys()):
        return f"{name!r} is only in the {'learner' if name in own else 'state'}"
    for name, shape in own.items():
        if saved[name].shape != shape:
            return f"{name!r} has shape {tuple(saved[name].shape)} in the state and {tuple(shape)} in the learner"
    return None


def localize(
    model: nn.Module,
    sample: Tensor,
    num_classes: int,
    loss: str | LossFactory = "predsim",
    at: str | int | Sequence[str] = "layer",
    optimizer: OptimizerFactory | Sequence[OptimizerFactory] | Mapping[str, OptimizerFactory] | None = None,
    scheduler: SchedulerFactory | None = None,
    clip_grad: float | None = None,
    amp: torch.dtype | None = None,
    seed: int | None = None,
    leaves: Iterable[str] = (),
    **loss_options: Any,
) -> Learner:
    """Give every unit of a network its own loss and optimizer.

    Args:
        model: any module that ``split`` can cut; it is trained in place and otherwise left as it is.
        sample: a batch of images, to learn the shapes of the features; moved to the model's device.
        loss: a name in ``LOSSES`` or a callable ``(site, **loss_options) -> module``.
        at: where to cut; see ``split``.
        optimizer: makes an optimizer of a list of parameters; one for all units, one per unit in order, or one per unit name.
            Default: Adam with rate 5e-4.
        scheduler: makes a learning-rate schedule of an optimizer; ``Learner.end_epoch`` advances it.
        clip_grad: largest norm of each unit's gradient.
        amp: ``torch.bfloat16`` computes forward passes in mixed precision; weights stay as they are.
        seed: makes the heads' initial weights and every dropout mask a function of seed, unit and step.
        leaves: paths of modules to keep whole; see ``split``.

    Raises:
        CannotSplit: the network cannot be cut so.
        InvalidInput: an argument does not fit the network.
    """
    check_arguments(model, sample, num_classes, clip_grad, amp, seed, scheduler)
    tensor = next((t for t in (*model.parameters(), *model.buffers())), sample)
    sample = sample[:2].to(tensor.device)
    chain = split(model, at, sample, leaves)
    try:
        shapes = feature_shapes(chain.pieces, chain.names, sample, amp)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidInput(
            f"the network cannot process the sample of shape {tuple(sample.shape)} and type {sample.dtype} ({reason}): give a "
            "batch of images as it is trained on, (B, channels, height, width)"
        ) from error
    if shapes[-1] != (num_classes,):
        raise InvalidInput(
            f"the network gives outputs of shape {shapes[-1]} per image, not ({num_classes},): pass num_classes as the number "
            "of its logits"
        )
    makers = optimizer_makers(optimizer, chain.names)
    units = []
    for index, (piece, name, shape) in enumerate(zip(chain.pieces, chain.names, shapes, strict=True)):
        with seeded(seed, index, -1, torch.device("cpu")):
            head = create_loss(loss, Site(index, len(chain), shape, num_classes), **loss_options)
        head.to(tensor.device, tensor.dtype if tensor.is_floating_point() else None).train(model.training)
        unit = Unit(index, name, piece, head, None, clip_grad=clip_grad, amp=amp, seed=seed)
        if unit.parameters():
            unit.optimizer = checked_optimizer(makers[index](unit.parameters()), name)
            unit.scheduler = scheduler(unit.optimizer) if scheduler else None
        units.append(unit)
    return Learner(model, units, num_classes, sample)


def check_arguments(
    model: Any, sample: Any, num_classes: Any, clip_grad: float | None, amp: Any, seed: int | None, scheduler: Any
) -> None:
    """Refuse arguments of ``localize`` that could only fail later, or silently do something else."""
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        raise InvalidInput(f"model is {type(model).__name__}: give an nn.Module, made, and not yet compiled by torch.compile")
    if not isinstance(sample, Tensor) or sample.dim() < 2:
        raise InvalidInput("sample is not a batch: give a tensor of images as the network is trained on, batch first")
    for name, value, valid, accepted in (
        ("num_classes", num_classes, isinstance(num_classes, int) and num_classes >= 2, "a whole number, 2 or more"),
        ("clip_grad", clip_grad, clip_grad is None or 0 < clip_grad < float("inf"), "a number above 0, or None"),
        ("amp", amp, amp in (None, torch.bfloat16), "torch.bfloat16, or None"),
        ("seed", seed, seed is None or (isinstance(seed, int) and seed >= 0), "a whole number, 0 or more, or None"),
        ("scheduler", scheduler, scheduler is None or callable(scheduler), "a callable that makes one of an optimizer"),
    ):
        if not valid:
            raise InvalidInput(f"{name}={value!r} cannot be used: give {accepted}")


def checked_optimizer(optimizer: Any, name: str) -> Optimizer:
    """Refuse what is no optimizer, or one that needs a closure."""
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidInput(
            f"optimizer= made {type(optimizer).__name__} for unit {name!r}: make a torch.optim.Optimizer whose step needs no "
            "closure, of the parameters it is given"
        )
    return optimizer


def optimizer_makers(given: Any, names: Sequence[str]) -> list[OptimizerFactory]:
    """One optimizer factory per unit."""
    if given is None:
        given = default_optimizer
    if callable(given):
        return [given] * len(names)
    makers: list[Any] = [given.get(name) for name in names] if isinstance(given, Mapping) else []
    if isinstance(given, Sequence):
        makers = list(given)
    if len(makers) != len(names) or not all(callable(maker) for maker in makers):
        raise InvalidInput(
            f"optimizer= does not give each of the {len(names)} units a callable: give one callable for all, a list with one "
            f"per unit, or a dictionary with the names {', '.join(names[:3])} …"
        )
    return makers


def default_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    return torch.optim.Adam(parameters, lr=5e-4)


@torch.no_grad()
def feature_shapes(
    pieces: Iterable[nn.Module], names: Sequence[str], sample: Tensor, amp: torch.dtype | None
) -> list[tuple[int, ...]]:
    """The shape of every unit's feature without the batch, read in one pass in evaluation mode."""
    shapes, carried = [], (sample,)
    for piece, name in zip(pieces, names, strict=True):
        with modes_kept(piece), precision(carried, amp):
            piece.eval()
            carried = piece(*carried)
        if not isinstance(carried[0], Tensor) or not all(
            isinstance(value, Tensor | int | float | torch.Size) for value in carried
        ):
            kinds = ", ".join(type(value).__name__ for value in carried)
            raise InvalidInput(
                f"what passes the cut behind unit {name!r} ({kinds}) cannot be carried: only tensors and numbers can. Cut "
                "elsewhere, or keep the module whole with leaves="
            )
        shapes.append(tuple(carried[0].shape[1:]))
    return shapes


def detached(carried: Carried) -> Carried:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in carried)


def precision(carried: Carried, amp: torch.dtype | None) -> torch.autocast:
    return torch.autocast(carried[0].device.type, dtype=amp, enabled=amp is not None)


def refuse_divergence(unit: Unit, step: int, loss: Tensor) -> None:
    value = loss.detach().item()
    if value - value != 0:  # NaN or infinite
        raise Diverged(
            f"the loss of unit {unit.index} ({unit.name}) is {value} at step {step}: lower the learning rate, or clip gradients"
        )


# A device's threads share one generator, so those that seed it take turns.
_generator_locks: dict[torch.device, threading.Lock] = defaultdict(threading.Lock)


@contextmanager
def seeded(seed: int | None, unit: int, step: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers as a function of seed, unit and step, and leave the device's generator as it was."""
    if seed is None:
        yield
        return
    with _generator_locks[device]:
        generator = torch.default_generator if device.type == "cpu" else torch.cuda.default_generators[device.index or 0]
        state = generator.get_state()
        digest = hashlib.blake2b(f"{seed}/{unit}/{step}".encode(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest, "little") >> 1)
        try:
            yield
        finally:
            generator.set_state(state)
