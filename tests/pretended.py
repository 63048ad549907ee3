"""Training steps on a device that is not there: no number is computed, so nothing may wait for one.

PyTorch lets a program name a device of its own. Tensors without contents that claim to lie there
are refused beside tensors of another device, and refuse to be read, as a value on a GPU would be
waited for. Run as a program of its own by ``test_devices.py``, since a device once named stays;
prints what went through, a line each.
"""

import copy
from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

import layerwise
from layerwise.core.learner import Learner
from layerwise.core.structure import Structure
from layerwise.data.loader import Augmentation, Loader, PixelsInMemory
from layerwise.memory.accounting import persistent_tensors
from layerwise.rules import RULES
from layerwise.rules.base import Position
from tests.helpers import RULES_AND_LOSSES

# maps of 16 channels are then large enough for normalisation to work in place
BATCH, SIZE = 160, 32
HIERARCHIES = {"resnet18": (1, 1, 1, 1), "vgg8b": (2, 2, 1, 1)}
OPTIONS = {"sequential": {"cache": True}}


def moved(mode: FakeTensorMode, tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor like another, without contents, on a device."""
    double = FakeTensor(mode, torch.empty_like(tensor, device="meta", requires_grad=False), device)
    return (
        nn.Parameter(double, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else double
    )


def build(model: str, rule: str, loss: str) -> Learner:
    network = layerwise.create_model(model, HIERARCHIES[model], width=0.25, dropout=0.1)
    sample = torch.zeros(2, 3, SIZE, SIZE)
    at = RULES[rule].at or "block"
    return layerwise.localize(
        network,
        sample,
        10,
        loss=loss,
        at=at,
        optimizer=lambda them: torch.optim.Adam(them, lr=1e-3),
    )


def loader_on(mode: FakeTensorMode, device: torch.device) -> Loader:
    """Two augmented batches."""
    pixels, labels = (
        torch.zeros(2 * BATCH, 3, SIZE, SIZE, dtype=torch.uint8),
        torch.zeros(2 * BATCH, dtype=torch.long),
    )
    loader = Loader(
        PixelsInMemory(pixels),
        labels,
        [0.0] * 3,
        [1.0] * 3,
        SIZE,
        BATCH,
        0,
        Augmentation(4, True, 8),
        views=1,
    )
    loader.pixels = PixelsInMemory(moved(mode, pixels, device))
    for name in ("labels", "mean", "scale"):
        setattr(loader, name, moved(mode, getattr(loader, name), device))
    return loader


def steps(rule: str, learner: Learner, loader: Loader) -> Iterator[Tensor]:
    """The losses of a rule's steps."""
    for tick in RULES[rule].order(
        learner, loader, 1, lambda done: 1.0, Position(), **OPTIONS.get(rule, {})
    ):
        yield tick.result.loss_tensor()


def main() -> None:
    backend_registration._setup_privateuseone_for_python_backend(
        "pretended", backend_module=Module()
    )
    device = torch.device("pretended", 0)
    for model, (rule, loss) in product(HIERARCHIES, RULES_AND_LOSSES):
        learner, mode = build(model, rule, loss), FakeTensorMode()
        loader = loader_on(mode, device)
        doubles = {
            id(tensor): moved(mode, tensor, device) for tensor in persistent_tensors(learner)
        }
        with mode:
            moved_learner = copy.deepcopy(learner, doubles)
            moved_learner.structure = Structure(moved_learner.model, moved_learner.units)
            losses = list(steps(rule, moved_learner, loader))
        print(
            model, loss, rule, len(losses), {loss.device for loss in losses} == {device}, flush=True
        )


class Module(backend_registration._DummyBackendModule):
    """What ``torch.autocast`` asks of a device even where it is off."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


if __name__ == "__main__":
    main()
