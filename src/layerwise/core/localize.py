"""Make a learner: cut a network and give every unit its local loss and its optimizer."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from layerwise.core.learner import Learner
from layerwise.core.memory_format import set_memory_format
from layerwise.core.split import split
from layerwise.core.trace import modes_kept
from layerwise.core.unit import Unit, precision
from layerwise.errors import InvalidInput
from layerwise.losses import LossFactory, Site, create_loss
from layerwise.utils.seeds import seeded

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], Any]


def localize(
    model: nn.Module,
    sample: Tensor,
    num_classes: int,
    loss: str | LossFactory = "predsim",
    at: str | int | Sequence[str] = "layer",
    optimizer: OptimizerFactory
    | Sequence[OptimizerFactory]
    | Mapping[str, OptimizerFactory]
    | None = None,
    scheduler: SchedulerFactory | None = None,
    clip_grad: float | None = None,
    amp: torch.dtype | None = None,
    seed: int | None = None,
    leaves: Iterable[str] = (),
    output_layer: str = "joined",
    memory_format: str | None = "auto",
    **loss_options: Any,
) -> Learner:
    """Give every unit of a network its own loss and optimizer.

    Args:
        model: any module that ``split`` can cut; it is trained in place and otherwise left as it
            is.
        sample: a batch of images, to learn the shapes of the features; moved to the model's device.
        loss: a name in ``LOSSES`` or a callable ``(site, **loss_options) -> module``.
        at: where to cut; see ``split``.
        optimizer: makes an optimizer of a list of parameters; one for all units, one per unit in
            order, or one per unit name. Default: fused Adam with rate 5e-4.
        scheduler: makes a learning-rate schedule of an optimizer; ``Learner.end_epoch`` advances
            it.
        clip_grad: largest norm of each unit's gradient.
        amp: ``torch.bfloat16`` computes forward passes in mixed precision; weights stay as they
            are.
        seed: makes the heads' initial weights and every dropout mask a function of seed, unit and
            step.
        leaves: paths of modules to keep whole; see ``split``.
        output_layer: ``"joined"``: the last unit holds the layer before the output layer too, and
            learns from the network's plain cross-entropy (docs/output.md); or ``"separate"``, the
            published way: the output layer is a unit of its own, and the local loss weighs its
            cross-entropy (1 − β under predsim).
        memory_format: of maps while a unit computes: ``"auto"``, a fixed rule by unit and device;
            ``"channels-last"``, ``"contiguous"``; or None: as they come. Weights stay as they are.

    Raises:
        CannotSplit: the network cannot be cut so.
        InvalidInput: an argument does not fit the network.
    """
    check_arguments(model, sample, num_classes, clip_grad, amp, seed, scheduler)
    tensor = next((t for t in (*model.parameters(), *model.buffers())), sample)
    sample = sample[:2].to(tensor.device)
    chain = split(model, at, sample, leaves, output_layer)
    try:
        shapes = feature_shapes(chain.pieces, chain.names, sample, amp)
    except (RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InvalidInput(
            f"the network cannot process the sample of shape {tuple(sample.shape)} and type "
            f"{sample.dtype} ({reason}): give a batch of images as it is trained on, (B, "
            "channels, height, width)"
        ) from error
    if shapes[-1] != (num_classes,):
        raise InvalidInput(
            f"the network gives outputs of shape {shapes[-1]} per image, not ({num_classes},): "
            "pass num_classes as the number of its logits"
        )
    makers = optimizer_makers(optimizer, chain.names)
    units = []
    for index, (piece, name, shape) in enumerate(
        zip(chain.pieces, chain.names, shapes, strict=True)
    ):
        with seeded(seed, index, -1, torch.device("cpu")):
            site = Site(index, len(chain), shape, num_classes, joined=output_layer == "joined")
            head = create_loss(loss, site, **loss_options)
        head.to(tensor.device, tensor.dtype if tensor.is_floating_point() else None).train(
            model.training
        )
        unit = Unit(index, name, piece, head, None, clip_grad=clip_grad, amp=amp, seed=seed)
        if unit.parameters():
            unit.optimizer = checked_optimizer(makers[index](unit.parameters()), name)
            unit.scheduler = scheduler(unit.optimizer) if scheduler else None
        units.append(unit)
    learner = Learner(model, units, num_classes, sample, leaves)
    if memory_format is not None:
        set_memory_format(learner, memory_format, weights=False)
    return learner


def check_arguments(
    model: Any,
    sample: Any,
    num_classes: Any,
    clip_grad: float | None,
    amp: Any,
    seed: int | None,
    scheduler: Any,
) -> None:
    """Refuse arguments of ``localize`` that could only fail later, or silently do something else."""
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        raise InvalidInput(
            f"model is {type(model).__name__}: give an nn.Module, made, and not yet compiled by "
            "torch.compile"
        )
    if not isinstance(sample, Tensor) or sample.dim() < 2:
        raise InvalidInput(
            "sample is not a batch: give a tensor of images as the network is trained on, batch "
            "first"
        )
    for name, value, valid, accepted in (
        (
            "num_classes",
            num_classes,
            isinstance(num_classes, int) and num_classes >= 2,
            "a whole number, 2 or more",
        ),
        (
            "clip_grad",
            clip_grad,
            clip_grad is None or 0 < clip_grad < float("inf"),
            "a number above 0, or None",
        ),
        ("amp", amp, amp in (None, torch.bfloat16), "torch.bfloat16, or None"),
        (
            "seed",
            seed,
            seed is None or (isinstance(seed, int) and seed >= 0),
            "a whole number, 0 or more, or None",
        ),
        (
            "scheduler",
            scheduler,
            scheduler is None or callable(scheduler),
            "a callable that makes one of an optimizer",
        ),
    ):
        if not valid:
            raise InvalidInput(f"{name}={value!r} cannot be used: give {accepted}")


def checked_optimizer(optimizer: Any, name: str) -> Optimizer:
    """Refuse what is no optimizer, or one that needs a closure."""
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, torch.optim.LBFGS):
        raise InvalidInput(
            f"optimizer= made {type(optimizer).__name__} for unit {name!r}: make a "
            "torch.optim.Optimizer whose step needs no closure, of the parameters it is given"
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
            f"optimizer= does not give each of the {len(names)} units a callable: give one "
            "callable for all, a list with one per unit, or a dictionary with the names "
            f"{', '.join(names[:3])} …"
        )
    return makers


def default_optimizer(parameters: list[nn.Parameter]) -> Optimizer:
    """Adam, in one fused operation where the device has one."""
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in parameters)
    return torch.optim.Adam(parameters, lr=5e-4, fused=fused)


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
                f"what passes the cut behind unit {name!r} ({kinds}) cannot be carried: only "
                "tensors and numbers can. Cut elsewhere, or keep the module whole with leaves="
            )
        shapes.append(tuple(carried[0].shape[1:]))
    return shapes
