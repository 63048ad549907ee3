"""Make a learner: cut a network and give every unit its local loss and its optimizer."""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.arguments import (
    check_arguments,
    check_normalization,
    refuse_other_output,
)
from layerwise.core.check import compare_with_network, failing_unit, processes
from layerwise.core.doubts import (
    warn_of_constant_features,
    warn_of_kept_activations,
    warn_of_untrained,
    warn_of_unused_loss,
    warn_of_whole_stacks,
)
from layerwise.core.factories import (
    OptimizerFactory,
    PerUnit,
    losses_of_units,
    made_optimizer,
    optimizer_makers,
    refuse_lost_factor,
    scale_rate,
)
from layerwise.core.feature import AS_IT_IS, unit_features
from layerwise.core.frozen import frozen_before, wake
from layerwise.core.head_memory import refuse_large_heads
from layerwise.core.later import places
from layerwise.core.learner import Learner
from layerwise.core.loss_trial import try_losses
from layerwise.core.memory_format import set_memory_format
from layerwise.core.outputs import Key
from layerwise.core.reach import Span
from layerwise.core.schedules import SchedulerFactory, made_scheduler
from layerwise.core.shapes import feature_shapes
from layerwise.core.side_effects import states_kept
from layerwise.core.split import split
from layerwise.core.teacher import Guide, Teacher
from layerwise.core.trace import refuse_made
from layerwise.core.unit import Unit
from layerwise.errors import CannotSplit, InvalidInput, check_flags, names_in, reason_of
from layerwise.losses import (
    LossFactory,
    Site,
    create_loss,
    options_of_each,
    terms_of,
    with_changes,
)
from layerwise.losses.terms import refuse_idle_terms
from layerwise.utils.changing import Change
from layerwise.utils.seeds import seeded


def localize(
    model: nn.Module,
    sample: Tensor,
    num_classes: int,
    loss: PerUnit[str | LossFactory] = "predsim",
    at: str | int | Sequence[str] = "layer",
    optimizer: PerUnit[OptimizerFactory] | None = None,
    scheduler: SchedulerFactory | None = None,
    clip_grad: float | None = None,
    amp: torch.dtype | None = None,
    seed: int | None = None,
    leaves: Iterable[str] = (),
    output_layer: str = "joined",
    output: Key = None,
    memory_format: str | None = "auto",
    span: Span = 1,
    check: bool = True,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    head_lr_factor: float = 1.0,
    channels: Mapping[str, int] | None = None,
    teacher: Teacher | nn.Module | None = None,
    train_from: int | str | None = None,
    **loss_options: Any,
) -> Learner:
    """Give every unit of a network its own loss and optimizer.

    Args:
        model: any module that ``split`` can cut; it is trained in place and otherwise left as it
            is.
        sample: a batch of images (B, ...), from which the shapes of the features are read; it is
            moved to the model's device.
        num_classes: number of classes, which is that of the network's logits.
        loss: a name in ``LOSSES`` or a callable ``(site, **loss_options) -> module``: one for all
            units, a list with one per unit, a dictionary by unit names, or a dictionary by the
            number of the first unit that uses it, ``{0: "dgl-cnn", 4: "pred"}``.
        at: where to cut; see ``split``. ``layerwise.localize`` takes a budget of memory too, such
            as ``"memory:800MB"``: the fewest units whose training is predicted to fit into it, for
            batches as large as the sample; the learner's ``plan`` says what was chosen.
        optimizer: a callable that makes an optimizer from a list of parameters; one for all units,
            or one per unit in the forms of ``loss``. Default: fused Adam with rate 5e-4. It is
            given frozen parameters too, which learn once they are unfrozen.
        scheduler: a callable that makes a learning-rate schedule from an optimizer;
            ``Learner.end_epoch`` or ``end_step`` advances the schedules.
        clip_grad: largest norm of each unit's gradient; None: gradients are not clipped.
        amp: ``torch.bfloat16`` computes forward passes in mixed precision; weights stay as they
            are. ``torch.float16`` does so too, and each unit scales its loss.
        seed: seed of the heads' initial weights and, with unit and step, of every dropout mask;
            None: the global generator draws them.
        leaves: paths of modules to keep whole; see ``split``.
        output_layer: ``"joined"``: the last unit holds the layer before the output layer too, and
            learns from the network's plain cross-entropy (docs/output.md); or ``"separate"``, the
            published way: the output layer is a unit of its own, and the local loss weighs its
            cross-entropy (1 − β under predsim).
        output: key, attribute or index of the logits in what the network returns; see ``split``.
            Parameters that only other outputs depend on stay untrained, and a warning names them.
        memory_format: memory format of maps while a unit computes: ``"auto"``, a fixed rule by unit
            and device; ``"channels-last"``, ``"contiguous"``; or None: as they come. Weights stay
            as they are.
        span: number of units that a loss reaches: 1, its own; 2, the one before it too, so that a
            unit also learns through the next one's loss; or one number for each unit; see
            ``core.reach``.
        check: compare the units with the network on the sample, outputs, buffers and gradients, in
            training and in evaluation mode; see ``compare_with_network``. It costs a few passes of
            the network; False leaves it out.
        normalization: mean and standard deviation of each channel that images were normalised by,
            of values from 0 to 1, for losses that reconstruct images as they were stored.
        head_lr_factor: rate at which heads learn, relative to their units' own; their weights are
            then groups of their own in the optimizers. It is refused where no head has weights.
        channels: axis of a unit's feature that holds its channels, by the name of the unit, the
            batch counted as axis 0; −1 is the last. Units that are left out have the axis that the
            network's graph says (docs/networks.md).
        teacher: trained network whose features the loss ``match`` compares with; it is copied. One
            that is cut otherwise than the network is given as ``Teacher(network, {unit: module})``.
            None: the network itself as it is now.
        train_from: name or number of the first unit that learns. Those before it are frozen: they
            have no loss and no optimizer, stay in evaluation mode, and belong to that first unit,
            which then has number 0. None: all units learn.
        loss_options: keyword arguments of the losses that declare them, such as ``beta`` of
            predsim. One that may change over training can be a function of progress, from 0 to 1;
            see ``Learner.set_progress``.

    Returns:
        The learner, whose ``step`` trains all units on a batch.

    Raises:
        CannotSplit: the network cannot be cut as asked, or its units compute something else.
        InvalidInput: an argument does not fit the network.
    """
    check_arguments(model, sample, num_classes, clip_grad, amp, seed, scheduler, head_lr_factor)
    check_normalization(normalization)
    check_flags(check=check)
    leaves = names_in("leaves", leaves)  # which may be read only once
    tensor = next((t for t in (*model.parameters(), *model.buffers())), sample)
    if amp is torch.float16 and tensor.dtype is amp:
        raise InvalidInput(
            "Cannot use amp=torch.float16: the weights are of that type too, and updates would "
            "round to nothing. Give a network of float32 weights, model.float()."
        )
    sample = sample[:2].to(tensor.device).clone()  # the network may change it in place
    wake(model)
    whole = split(model, at, sample, leaves, output_layer, output)
    warn_of_untrained(whole)
    warn_of_kept_activations(whole)
    warn_of_whole_stacks(model, whole)
    chain = frozen_before(whole, train_from)
    try:
        with states_kept(model) as made:
            shapes = feature_shapes(chain.pieces, chain.names, sample, amp)
        refuse_made(made)  # of modules that are kept whole
    except (InvalidInput, CannotSplit):
        raise
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        reason = reason_of(error)
        if any(weight.is_meta for weight in model.parameters()):
            raise InvalidInput(
                "Cannot localize the network: its weights are on the device meta and have no "
                f"values ({reason}). Load weights, or move it by model.to_empty(device=…)."
            ) from error
        if processes(model, sample):
            raise CannotSplit(
                "Cannot split the network: it can process the sample, but its unit "
                f"{failing_unit(model, chain, sample)!r} cannot ({reason}). Keep its modules whole "
                "with leaves=, or cut elsewhere with at=."
            ) from error
        raise InvalidInput(
            f"Cannot localize the network: it cannot process the sample of shape "
            f"{tuple(sample.shape)} and type {sample.dtype} ({reason}). Give a batch of images as "
            "it is trained on, (B, channels, height, width)."
        ) from error
    refuse_other_output(shapes[-1], num_classes)
    features = unit_features(chain.names, shapes, chain.channels, channels)
    makers = optimizer_makers(optimizer, chain.names)
    losses = losses_of_units(loss, chain.names)
    warn_of_unused_loss(losses)
    changing = with_changes(losses, loss_options)
    options = options_of_each(losses, changing)
    if check:
        compare_with_network(model, whole, sample)
        warn_of_constant_features(model, whole, sample)
    cut = {"at": at, "leaves": leaves, "output_layer": output_layer, "output": output}
    guide = Guide(teacher, whole, sample, cut)
    place = places(model, list(chain.pieces), sample, tuple(leaves), output)
    image_shape = tuple(sample.shape[1:])
    read = [each.read for each in features]
    refuse_large_heads(read, image_shape, num_classes, losses, options, tensor)
    units = []
    for index, (piece, name, feature) in enumerate(
        zip(chain.pieces, chain.names, features, strict=True)
    ):
        entering = features[index - 1] if index else AS_IT_IS
        # whatever device the user has made the default
        with seeded(seed, index, -1, torch.device("cpu")), torch.device("cpu"):
            site = Site(
                index,
                len(chain),
                feature.read,
                num_classes,
                joined=chain.joined,
                image_shape=image_shape,
                entering=entering.read if index else image_shape,
                normalization=normalization,
                place=partial(place, index),
                teacher=guide.unit(name),
                tokens=feature.tokens,
                normalises_layers=chain.normalises_layers,
            )
            head = create_loss(losses[index], site, **options[index])
        head.to(tensor.device, tensor.dtype if tensor.is_floating_point() else None).train(
            model.training
        )
        unit = Unit(
            index,
            name,
            piece,
            head,
            None,
            clip_grad=clip_grad,
            amp=amp,
            seed=seed,
            feature=feature,
            entering=entering,
        )
        if amp is torch.float16:
            unit.scaler = torch.amp.GradScaler(tensor.device.type)
        if weights := unit.weights():
            unit.optimizer = made_optimizer(makers[index], weights, name)
            if head_lr_factor != 1.0:
                scale_rate(unit.optimizer, head.parameters(), head_lr_factor)
            if scheduler is not None:
                rates = [float(group["lr"]) for group in unit.optimizer.param_groups]
                unit.scheduler = made_scheduler(scheduler, unit.optimizer, name)
                if head_lr_factor != 1.0:
                    refuse_lost_factor(unit.scheduler, unit.optimizer, rates)
        units.append(unit)
    guide.refuse_unused()
    heads = [unit.loss for unit in units]
    refuse_idle_terms(terms_of(losses, changing), heads)
    if head_lr_factor != 1.0 and not any(True for head in heads for _ in head.parameters()):
        raise InvalidInput(
            f"Cannot use head_lr_factor={head_lr_factor}: it would change nothing, because no "
            "head has weights. Leave it out, or use a loss whose head learns, such as pred."
        )
    learner = Learner(model, units, num_classes, sample, leaves, output)
    learner.span = span
    learner.changes = [value for value in changing.values() if isinstance(value, Change)]
    for progress in (1.0, 0.5, 0.0):  # what is out of range is refused before training
        learner.set_progress(progress)
    with states_kept(model):
        try_losses(learner, sample)
        if memory_format is not None:
            set_memory_format(learner, memory_format, weights=False)
    return learner
