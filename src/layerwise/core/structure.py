"""The modules and weights that a learner was made of, and whether a step still trains them.

A unit holds the network's own modules, and its optimizer their weights. What takes the place of one
of them later is in neither, and would stay untrained without a word. A look at all of ResNet50, cut
into 49 units, takes some 0.15 ms.
"""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import nn

from layerwise.core.unit import Unit
from layerwise.errors import InvalidInput


class Places:
    """What the modules below a module hold, by place: their weights and parts.

    Attributes:
        names: path of each place.
        values: the parameter or module that was there when this was made.
    """

    def __init__(self, module: nn.Module) -> None:
        places = [
            (f"{path}.{name}".lstrip("."), table, name, value)
            for path, part in module.named_modules()
            if not isinstance(part, torch.jit.ScriptModule)  # its parts cannot be replaced
            for table in (part._parameters, part._modules)
            for name, value in table.items()
        ]
        self.names: list[str] = [place[0] for place in places]
        self._tables: list[dict[str, Any]] = [place[1] for place in places]
        self._keys: list[str] = [place[2] for place in places]
        self.values: list[Any] = [place[3] for place in places]
        self._weights = [value for value in self.values if isinstance(value, nn.Parameter)]

    def replaced(self) -> str | None:
        """The path of the first place that holds something else now."""
        now = map(dict.get, self._tables, self._keys)
        if all(map(is_, self.values, now)):
            return None
        return next(
            name
            for name, table, key, value in zip(
                self.names, self._tables, self._keys, self.values, strict=True
            )
            if table.get(key) is not value
        )

    def name_of(self, wanted: nn.Parameter) -> str | None:
        pairs = zip(self.names, self.values, strict=True)
        return next((name for name, value in pairs if value is wanted), None)

    def kinds(self) -> list[tuple[torch.dtype, torch.device]]:
        """Number type and device of every weight."""
        return [(weight.dtype, weight.device) for weight in self._weights]


class Structure:
    """The places of a network and of its units' losses, and the weights of each unit."""

    def __init__(self, model: nn.Module, units: Sequence[Unit]) -> None:
        self.network = Places(model)
        self.kinds = self.network.kinds()
        self.record(units)

    def record(self, units: Sequence[Unit]) -> None:
        """Note the units' modules, which may be others from now on, such as compiled ones."""
        self.parts = [part for unit in units for part in (unit.piece, unit.loss)]
        self.losses = [Places(unit.loss) for unit in units]
        self.weights = [unit.weights() for unit in units]

    def check(self, units: Sequence[Unit]) -> None:
        """Refuse a step that would leave a trainable weight untrained.

        Raises:
            InvalidInput: a weight or a module was replaced, the network was moved or converted, or
                an optimizer does not hold a weight that requires a gradient.
        """
        if not all(map(is_, self.parts, (part for u in units for part in (u.piece, u.loss)))):
            self.record(units)
        if replaced := self.network.replaced():
            raise InvalidInput(
                f"Cannot make a step: the network's {replaced!r} was replaced after localize, so "
                "no unit trains what is there now. Localize again, or write values in place, as "
                "model.load_state_dict does."
            )
        self.refuse_moved()
        for unit, loss, weights in zip(units, self.losses, self.weights, strict=True):
            if replaced := loss.replaced():
                raise InvalidInput(
                    f"Cannot make a step: {replaced!r} in the loss of unit {unit.index} "
                    f"({unit.name}) was replaced after localize. Localize again, or write values "
                    "in place."
                )
            held = {id(weight) for weight in unit.held()}
            for weight in weights:
                if weight.requires_grad and id(weight) not in held:
                    name = self.network.name_of(weight) or loss.name_of(weight)
                    raise InvalidInput(
                        f"Cannot make a step: the optimizer of unit {unit.index} ({unit.name}) "
                        f"does not hold its weight {name!r}. Give it all of the unit's weights, "
                        "or freeze this one with requires_grad_(False)."
                    )

    def refuse_moved(self) -> None:
        """Refuse a network that was moved or converted after localize.

        Raises:
            InvalidInput: a weight is of another type or on another device than at localize.
        """
        now = self.network.kinds()
        if now == self.kinds:
            return
        (kind, device), (earlier_kind, earlier_device) = next(
            pair for pair in zip(now, self.kinds, strict=True) if pair[0] != pair[1]
        )
        raise InvalidInput(
            f"Cannot make a step: the network has weights of {kind} on {device} now, of "
            f"{earlier_kind} on {earlier_device} when units were made. Move or convert it before "
            "localize."
        )
