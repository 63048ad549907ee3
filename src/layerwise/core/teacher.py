"""Teacher of a network: a trained network whose units' features the losses of others can match."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.core.feature import Feature
from layerwise.core.order import changes_input
from layerwise.core.settings import Check, Settings
from layerwise.core.split import Chain, split
from layerwise.errors import CannotSplit, InvalidInput


@dataclass(frozen=True)
class Teacher:
    """A trained network, and the modules of it whose features units are compared with.

    Attributes:
        network: any module that ``split`` can cut; it is copied, and stays as it is.
        units: path of the module behind which the teacher's features are taken, by the name of the
            unit that is compared with them; the last unit is compared with the logits. None: the
            teacher is cut as the network is, and units of the same number are compared.
    """

    network: nn.Module
    units: Mapping[str, str] | None = None


class TeacherUnit:
    """The part of a teacher whose features a unit is compared with.

    Attributes:
        own: whether the teacher is the network itself, as it was when its units were made.
    """

    def __init__(self, guide: "Guide", name: str, own: bool) -> None:
        self._guide, self._name, self.own = guide, name, own

    @cached_property
    def _end(self) -> int:
        return self._guide.end_of(self._name)

    @property
    def feature(self) -> Feature:
        """Shape and layout of the features."""
        return self._guide.features[self._end]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the features without the batch, channels first."""
        return self.feature.read

    def claim(self) -> tuple[tuple[nn.Module, ...], list[nn.Module]]:
        """The pieces that lead to the features: those claimed before, and the unit's own."""
        return self._guide.claim(self._end + 1)


class Guide:
    """A teacher's pieces, each of which is claimed by the first unit that it leads to.

    Args:
        teacher: as ``localize`` takes it; None: the chain itself, as it is now.
        chain: the network in units.
        sample: a batch of images (B, ...).
        options: of ``split``, by which a teacher without ``units`` is cut.

    Raises:
        InvalidInput: it is no module, or ``units`` names no unit or leaves one out.
    """

    def __init__(
        self, teacher: Teacher | nn.Module | None, chain: Chain, sample: Tensor, options: Any
    ) -> None:
        self.own = teacher is None
        if isinstance(teacher, nn.Module):
            teacher = Teacher(teacher)
        if teacher is not None:
            check_teacher(teacher, chain.names)
        self.teacher, self.student, self.sample, self.options = teacher, chain, sample, options
        self.names = chain.names
        self.claimed = 0

    def unit(self, name: str) -> TeacherUnit:
        return TeacherUnit(self, name, self.own)

    @cached_property
    def network(self) -> nn.Module:
        """A copy of the teacher's network, where the sample is and of its number type."""
        assert self.teacher is not None
        kind = self.sample.dtype if self.sample.is_floating_point() else None
        return copy.deepcopy(self.teacher.network).to(self.sample.device, kind)

    @cached_property
    def whole(self) -> Chain:
        """The teacher's chain.

        Raises:
            CannotSplit: it cannot be cut so.
        """
        if self.teacher is None:
            return self.student
        paths = self.teacher.units
        at = self.options["at"] if paths is None else list(dict.fromkeys(paths.values()))
        try:
            chain = split(self.network, sample=self.sample, **{**self.options, "at": at})
        except CannotSplit as error:
            raise CannotSplit(f"Cannot use the teacher. {error}") from error
        if paths is None and len(chain) != len(self.names):
            raise InvalidInput(
                f"Cannot use the teacher: cut as the network is, it has {len(chain)} units, and "
                f"the network has {len(self.names)}. Say which of its modules belongs to which "
                "unit, by Teacher(network, {unit: module}), or cut both by at=K."
            )
        return chain

    @cached_property
    def pieces(self) -> list[nn.Module]:
        """Copies of the teacher's pieces, whose weights are buffers."""
        checks = [each.settings for each in self.whole.modules() if isinstance(each, Check)]
        # the copy relies on nothing of the network, and has all of its shared modules once
        copied = copy.deepcopy(list(self.whole.pieces), {id(each): Settings() for each in checks})
        for piece in copied:
            hold_as_buffers(piece.eval(), saved=self.own)
        return [Careful(piece) if changes_input(piece) else piece for piece in copied]

    @cached_property
    def features(self) -> list[Feature]:
        """The feature that leaves each piece."""
        activations: tuple[Any, ...] = (self.sample,)
        features = []
        with torch.no_grad():
            for piece, axis in zip(self.pieces, self.whole.channels, strict=True):
                activations = piece(*activations)
                features.append(Feature(tuple(activations[0].shape[1:]), axis))
        return features

    def end_of(self, name: str) -> int:
        """Number of the piece behind which a unit's features are taken.

        Raises:
            InvalidInput: the module that was named holds no weights, so its place is unknown.
        """
        if self.teacher is None or self.teacher.units is None:
            return self.names.index(name)
        if name == self.names[-1]:
            return len(self.whole) - 1
        path = self.teacher.units[name]
        held = {id(p) for p in self.network.get_submodule(path).parameters()}
        numbers = [
            number
            for number, piece in enumerate(self.whole.pieces)
            if any(id(p) in held for p in piece.parameters())
        ]
        if not numbers:
            raise InvalidInput(
                f"Cannot use the teacher's module {path!r} for unit {name!r}: it holds no weights. "
                "Name one that does."
            )
        return numbers[-1]

    def claim(self, count: int) -> tuple[tuple[nn.Module, ...], list[nn.Module]]:
        """The first pieces, as those that were claimed before and those that were not."""
        before = min(self.claimed, count)
        self.claimed = max(self.claimed, count)
        return tuple(self.pieces[:before]), self.pieces[before:count]

    def refuse_unused(self) -> None:
        """Refuse a teacher that no loss has asked for.

        Raises:
            InvalidInput: as said.
        """
        if not self.own and not self.claimed:
            raise InvalidInput(
                "Cannot use the teacher: no unit's loss compares anything with it. Give the loss "
                "'match', or leave the teacher out."
            )


class Careful(nn.Module):
    """A piece that changes what enters it in place, and is given copies: others read it too."""

    def __init__(self, piece: nn.Module) -> None:
        super().__init__()
        self.piece = piece

    def forward(self, *activations: Any) -> tuple[Any, ...]:
        given = (value.clone() if isinstance(value, Tensor) else value for value in activations)
        result: tuple[Any, ...] = self.piece(*given)
        return result


def hold_as_buffers(module: nn.Module, saved: bool) -> None:
    """Turn all weights into buffers, which move with the module and which no optimizer holds.

    Args:
        saved: whether states hold them: what a network was when it began is nowhere else.
    """
    for part in module.modules():
        for name, weight in list(part._parameters.items()):
            if weight is not None:
                del part._parameters[name]
                part.register_buffer(name, weight.detach())
        part._non_persistent_buffers_set = set() if saved else set(part._buffers)


def check_teacher(teacher: Any, names: Sequence[str]) -> None:
    """Refuse what is no teacher of a network's units.

    Raises:
        InvalidInput: as said.
    """
    if not isinstance(teacher, Teacher) or not isinstance(teacher.network, nn.Module):
        kind = type(getattr(teacher, "network", teacher)).__name__
        raise InvalidInput(
            f"Cannot use teacher=: it is {kind}. Give a network, or Teacher(network, "
            "{unit: module})."
        )
    if teacher.units is None:
        return
    modules = dict(teacher.network.named_modules())
    for name in names[:-1]:
        if name not in teacher.units:
            raise InvalidInput(
                f"Cannot use the teacher: it has no features for unit {name!r}. Name one of its "
                f"modules, such as {{{name!r}: {next(filter(None, modules), 'layer1')!r}}}."
            )
    for name, path in teacher.units.items():
        if name not in names:
            raise InvalidInput(
                f"Cannot use the teacher: the network has no unit {name!r}. Its units are "
                f"{', '.join(names)}."
            )
        if path not in modules:
            raise InvalidInput(
                f"Cannot use the teacher: it has no module {path!r} for unit {name!r}. It has "
                f"{', '.join(filter(None, modules))[:200]}."
            )
