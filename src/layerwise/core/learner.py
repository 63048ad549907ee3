"""Learner: a network and the units that train it in place."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.batch import check_batch, check_features, check_images
from layerwise.core.early_exit import early_exit, ensemble
from layerwise.core.outputs import Key
from layerwise.core.pieces import follow_network
from layerwise.core.reach import (
    Reach,
    Span,
    check_reach,
    local_reach,
    reach_of_span,
    span_of_reach,
    span_text,
)
from layerwise.core.result import StepResult
from layerwise.core.schedules import advance
from layerwise.core.state import load_state, state_of
from layerwise.core.structure import Structure
from layerwise.core.table import table_of_units
from layerwise.core.unit import Unit, step_units
from layerwise.core.windows import step_windows
from layerwise.errors import InvalidInput, check_flags
from layerwise.losses import Evaluated, Targets
from layerwise.utils.changing import Change, set_values

# (units, images, targets, steps made before) -> each unit's loss and number of correct examples
MakeStep = Callable[[Sequence[Unit], Tensor, Targets, int], list[Evaluated]]


class Learner:
    """A network and the units that train it in place; made by ``localize``.

    Attributes:
        model: the user's network.
        units: its units, in order.
        num_classes: number of classes.
        leaves: paths of the network's modules that are kept whole.
        output: where the network's result holds its logits; see ``split``.
        image_shape, image_type: shape of an image and its number type, as the sample had them.
        steps: number of steps made; those on parts of a batch count too.
        make_step: function that makes the step of all units on a batch: ``step_units``, or recorded
            steps.
        changes: options of the losses that change over training.
        progress: share of training that their present values belong to.
        structure: the modules and weights that the learner was made of.
        plan: memory budget that the units were planned for, and their predicted peak, if ``at`` was
            a budget; otherwise None.
        stage: where its units live on several ranks; see ``distributed.stage``; None: all are here.
        replicas: where several ranks share every batch; see ``distributed.replicas``; None: this
            process has all of it.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        num_classes: int,
        sample: Tensor,
        leaves: Iterable[str] = (),
        output: Key = None,
    ) -> None:
        self.model = model
        self.units = list(units)
        self.num_classes = num_classes
        self.leaves, self.output = tuple(leaves), output
        self.image_shape, self.image_type = sample.shape[1:], sample.dtype
        self.steps, self._reach = 0, local_reach(len(self.units))
        self.changes: Sequence[Change] = ()
        self.progress = 0.0
        self.plain_step: Callable[..., list[Evaluated]] = step_units
        self.make_step: MakeStep = step_units
        self.training: bool | None = model.training
        self.structure = Structure(model, self.units)
        self.plan: Any = None
        self.stage: Any = None
        self.replicas: Any = None

    def __repr__(self) -> str:
        """A table of the chain: what each unit holds, its head, its loss, its parameters."""
        table = table_of_units(self.units, self.span)
        return table if self.plan is None else f"{table}\n{self.plan}"

    def step(self, images: Tensor, labels: Tensor, update: bool = True) -> StepResult:
        """One simultaneous local update: every unit learns from this batch.

        Args:
            images: (B, ...) with B ≥ 2, on the model's device. Where units live on several ranks,
                the first rank alone reads these arguments.
            labels: (B,), integers from 0 to num_classes − 1.
            update: False: a part of a batch, whose gradients wait for a step that updates. That
                update is by the mean over the examples of all parts.

        Returns:
            The loss and the local accuracy of each unit.

        Raises:
            InvalidInput: the batch cannot be used, or a weight would stay untrained; nothing was
                updated.
            Diverged: a unit's loss is not finite; it and the units behind it were not updated, and
                gradients of parts of a batch are forgotten.
        """
        check_flags(update=update)
        entering, targets = self.take(images, labels)
        if self.training != self.model.training:
            self.train(self.model.training)
        if update and not any(unit.parts for unit in self.units):
            make_step = self.make_step
        else:  # never recorded
            make_step = partial(self.plain_step, update=update)
        try:
            results = make_step(self.units, entering, targets, self.steps)
        except BaseException:
            self.zero_grad()  # some units have the gradients of this part, others not
            raise
        self.steps += 1
        size = len(targets.labels) if self.replicas is None else self.replicas.examples
        return StepResult(results, size)

    def step_arriving(self) -> StepResult:
        """The step of a rank behind the first, whose batch the rank before sends."""
        nothing = torch.empty(0)
        return self.step(nothing, nothing)

    def take(self, images: Tensor, labels: Tensor) -> tuple[Any, Targets]:
        """Input of the first unit, and the targets; on a later rank, what the rank before sent.

        Raises:
            InvalidInput: the batch cannot be used.
        """
        if self.stage is not None and self.stage.before is not None:
            self.structure.check(self.units)
            return self.stage.take()
        self.check(images, labels)
        if images.shape[1:] != self.image_shape or images.dtype != self.image_type:
            raise InvalidInput(
                f"Cannot learn from images of shape {tuple(images.shape)} and type "
                f"{images.dtype}: the sample had shape "
                f"(B, {', '.join(map(str, self.image_shape))}) and type {self.image_type}. Give "
                "such images."
            )
        return images, Targets(labels.long(), self.num_classes, images)

    @property
    def own_units(self) -> list[Unit]:
        """The units that are here: all, or where they live on several ranks, this rank's."""
        return self.units if self.stage is None else self.stage.units

    @property
    def captured(self) -> Any:
        """Recorded steps of the learner, on a GPU; None: steps are made operation by operation."""
        return None if self.make_step is self.plain_step else self.make_step

    @captured.setter
    def captured(self, recorded: MakeStep | None) -> None:
        if recorded is not None and self.windowed:
            raise InvalidInput(
                f"Cannot record steps with span {span_text(self.span)}: only steps of units alone "
                "are recorded. Leave them unrecorded, or set span to 1."
            )
        self.make_step = recorded or self.plain_step

    @property
    def reach(self) -> Reach:
        """Index of the first unit that each unit's loss reaches; see ``core.reach``.

        Raises:
            InvalidInput: it is set so that a unit would not learn, or for another chain.
        """
        return self._reach

    @reach.setter
    def reach(self, reach: Reach) -> None:
        reach = tuple(reach)
        check_reach(reach, self.units)
        self._reach = reach
        self.plain_step = partial(step_windows, reach=reach) if self.windowed else step_units
        if self.replicas is not None:
            self.plain_step = self.replicas.around(self.plain_step)
        self.step_singly()

    @property
    def windowed(self) -> bool:
        """Whether some loss reaches another than its own unit alone."""
        return self._reach != local_reach(len(self.units))

    @property
    def span(self) -> int | tuple[int, ...]:
        """Number of units that a loss reaches, its own counted: one for all, or one for each.

        It is set to a number, a list with one for each unit, or text; see ``core.reach``.

        Raises:
            InvalidInput: it is set to what the chain does not have.
        """
        return span_of_reach(self._reach)

    @span.setter
    def span(self, span: Span) -> None:
        self.reach = reach_of_span(span, len(self.units))

    def refuse_windows(self, rule: str) -> None:
        """Refuse a span above 1, for an order of updates that has none.

        Raises:
            InvalidInput: naming the rule.
        """
        if self.windowed:
            raise InvalidInput(
                f"Cannot train by the rule {rule!r} with span {span_text(self.span)}: the rule "
                "itself says which units learn together. Give span 1, or the rule 'simultaneous'."
            )

    def step_singly(self) -> None:
        """Make steps operation by operation, for an order of updates that cannot be recorded."""
        self.captured = None

    def train(self, mode: bool = True, only: Unit | None = None) -> None:
        """Put the network and all heads in training or evaluation mode.

        If the network overrides ``train``, such as to keep parts frozen, its override decides.

        Args:
            only: the one unit that trains while all others are in evaluation mode; None: all.
        """
        for unit in self.units:
            unit.train(mode)
        self.model.train(mode)
        for unit in self.units:
            follow_network(unit.piece)
            if only is not None and unit is not only:
                unit.train(False)
        self.training = mode if only is None else None  # of several; the next step sets one

    def check(self, images: Tensor, labels: Tensor, enters: Unit | None = None) -> None:
        """Refuse a batch that cannot be learned from, and weights that would stay untrained.

        Args:
            images: what enters a unit: images, or features of the units before.
            enters: that unit; None: the first one.

        Raises:
            InvalidInput: saying what is wrong with the batch or the network.
            Diverged: the features are not finite.
        """
        self.structure.check(self.units)
        weight = next(iter(self.own_units[0].weights()), None)
        device = None if weight is None else weight.device
        check_batch(images, labels, self.num_classes, self.units[0].amp, device)
        if enters is None or enters.index == 0:
            check_images(images)
        else:
            check_features(images, enters.index, enters.name)

    def end_epoch(self, metric: float | None = None) -> None:
        """Advance every unit's learning-rate schedule.

        Args:
            metric: number that ``ReduceLROnPlateau`` looks at; other schedules do not read it.

        Raises:
            InvalidInput: a schedule needs the metric, and it is not given, or a schedule is of
                another optimizer than its unit's; none was advanced.
        """
        advance(self.units, metric)

    def end_step(self) -> None:
        """Advance schedules that count steps, such as ``OneCycleLR``, instead of ``end_epoch``."""
        self.end_epoch()

    def set_progress(self, progress: float) -> None:
        """Set options of losses that change over training to their values at a share of training.

        Args:
            progress: share of training that is done, from 0 to 1. The rules set it at the beginning
                of every epoch.

        Raises:
            InvalidInput: it is not a share, or a value is out of its option's range.
        """
        if not isinstance(progress, Real) or not 0 <= progress <= 1:
            raise InvalidInput(
                f"Cannot set progress {progress}: it is not a share of training. Give 0 to 1."
            )
        values = {change.name: change.at(progress) for change in self.changes}
        for unit in self.units:  # recorded steps see that these numbers changed
            set_values(unit.loss.modules(), values)
        self.progress = progress

    def early_exit(self, units: int) -> nn.Module:
        """The first units as a network of its own, with the local head of the last of them.

        Args:
            units: how many, from 1 to all; all end in the network's own output.

        Returns:
            A copy, in evaluation mode, from images (B, ...) to logits (B, num_classes). Its weights
            have the network's own names, those of the head begin with ``local_head.``.

        Raises:
            InvalidInput: there are not so many units, the loss of the last of them is not a
                classifier's, such as ``sim``, or units live on other ranks.
            CannotSplit: the network was changed since the units were made.
        """
        self.refuse_absent_units("end the network in a local head")
        return early_exit(self.units, units)

    def ensemble(self) -> nn.Module:
        """The network that ends in all its classifiers: the local heads and its own output.

        Returns:
            A copy, in evaluation mode, from images (B, ...) to the logarithm of the mean of their
            probabilities, (B, num_classes). Its weights have the network's own names, those of the
            heads begin with ``local_heads.`` and the unit's index.

        Raises:
            InvalidInput: no unit but the last classifies, or units live on other ranks.
            CannotSplit: the network was changed since the units were made.
        """
        self.refuse_absent_units("make an ensemble of the local heads")
        return ensemble(self.units)

    def zero_grad(self) -> None:
        """Forget the gradients of parts of a batch that wait for an update."""
        for unit in self.units:
            unit.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """State to go on from: network, heads, every unit's optimizer and schedule.

        It holds tensors and plain types only.

        Raises:
            InvalidInput: gradients of parts of a batch wait for their update, or units live on
                other ranks.
        """
        self.refuse_absent_units("save the state")
        state = state_of(self.model, self.units, self.steps)
        return {**state, "progress": self.progress} if self.changes else state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state that ``state_dict`` returned.

        Raises:
            InvalidInput: the state belongs to another network, cut, loss, optimizer or schedule, or
                is none; nothing was loaded.
        """
        self.refuse_absent_units("load a state")
        load_state(self.model, self.units, state)
        self.steps = state["steps"]
        self.set_progress(state.get("progress", 0.0))
        if self.captured is not None:
            self.captured.forget()  # they read the optimizers' state where it was before

    def refuse_absent_units(self, action: str) -> None:
        """Refuse what needs all units while some live on other ranks.

        Raises:
            InvalidInput: as said.
        """
        if self.stage is not None and not self.stage.whole:
            raise InvalidInput(
                f"Cannot {action}: units live on other ranks. Do it inside `with "
                "layerwise.whole(learner):`, which all ranks enter, on the first rank."
            )
