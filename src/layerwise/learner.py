"""A learner: a network cut into units, each with its loss and its optimizer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.chain import split
from layerwise.errors import InvalidInput
from layerwise.graph import modes_kept
from layerwise.losses import Evaluated, LossFactory, Site, Targets, create_loss
from layerwise.units import Carried, StepResult, Unit, precision, seeded

if TYPE_CHECKING:
    from layerwise.captured import CapturedSteps

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], Any]

STATE_VERSION = 1
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class Learner:
    """A network and the units that train it in place; made by ``localize``.

    Attributes:
        model: the user's network.
        units: its units, in order.
        leaves: paths of the network's modules that are kept whole.
        steps: how many steps have been made.
        captured: makes the steps in place of the learner, on a GPU that replays them; or None.
    """

    def __init__(
        self, model: nn.Module, units: Sequence[Unit], num_classes: int, sample: Tensor, leaves: Iterable[str] = ()
    ) -> None:
        self.model = model
        self.units = list(units)
        self.num_classes = num_classes
        self.leaves = tuple(leaves)
        self.image_shape, self.image_type = sample.shape[1:], sample.dtype
        self.steps = 0
        self.captured: CapturedSteps | None = None
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
        results = (self.captured or self).step_units(images, labels)
        self.steps += 1
        return StepResult(results, len(labels))

    def step_units(self, images: Tensor, labels: Tensor) -> list[Evaluated]:
        """The work of ``step``, unit after unit, of a batch that was found good."""
        targets = Targets(labels.long(), self.num_classes)
        carried: list[Carried] = [(images.detach(),)]
        results = []
        for unit in self.units:
            passed, evaluated = unit.step(carried.pop(), targets, self.steps)  # popped: the unit alone keeps it alive
            carried.append(passed)
            del passed
            results.append(evaluated)
        return results

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
                unit.match_optimizer()
            if unit.scheduler is not None and scheduler is not None:
                unit.scheduler.load_state_dict(scheduler)
        self.steps = state["steps"]
        if self.captured is not None:
            self.captured.forget()  # the optimizers' state lies elsewhere now


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
    output: str = "separate",
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
        output: ``"separate"``, the published way: the output layer is a unit of its own, and the
            local loss weighs its cross-entropy (1 − β under predsim); or ``"joined"``: the last
            unit holds the layer before it too, and learns from the network's plain cross-entropy.

    Raises:
        CannotSplit: the network cannot be cut so.
        InvalidInput: an argument does not fit the network.
    """
    check_arguments(model, sample, num_classes, clip_grad, amp, seed, scheduler)
    tensor = next((t for t in (*model.parameters(), *model.buffers())), sample)
    sample = sample[:2].to(tensor.device)
    chain = split(model, at, sample, leaves, output)
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
            site = Site(index, len(chain), shape, num_classes, joined=output == "joined")
            head = create_loss(loss, site, **loss_options)
        head.to(tensor.device, tensor.dtype if tensor.is_floating_point() else None).train(model.training)
        unit = Unit(index, name, piece, head, None, clip_grad=clip_grad, amp=amp, seed=seed)
        if unit.parameters():
            unit.optimizer = checked_optimizer(makers[index](unit.parameters()), name)
            unit.scheduler = scheduler(unit.optimizer) if scheduler else None
        units.append(unit)
    return Learner(model, units, num_classes, sample, leaves)


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
