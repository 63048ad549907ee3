"""Compare the units of a network with the network itself, on a sample.

Whatever tracing loses in silence shows here: composed and not detached, the units are the network,
so both have the same output, write the same to buffers and give every weight the same gradient.
"""

from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode

from layerwise.core.outputs import Key, main_output
from layerwise.core.pieces import follow_network
from layerwise.core.settings import keep_whole
from layerwise.core.side_effects import modes_kept, states_kept
from layerwise.core.split import Chain
from layerwise.errors import CannotSplit, InvalidInput, reason_of

OTHER_BUFFER = "other values of a buffer"
ANY_SEED = 0  # of each draw, so that it does not matter which layer draws first


class SameDraws(TorchDispatchMode):
    """Draws of random numbers that depend on their shape alone, not on what was drawn before."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            torch.manual_seed(ANY_SEED)
        return func(*args, **(kwargs or {}))


def compare_with_network(model: nn.Module, chain: Chain, sample: Tensor) -> None:
    """Refuse units that together do not compute what the network computes.

    Outputs, buffers and gradients are compared in training and in evaluation mode. Two numbers are
    the same if they differ by less than the square root of their type's precision, relative to the
    largest of a unit. The generators of random numbers, modes, buffers, attributes and gradients
    stay as they were.

    Args:
        sample: a batch of images (B, ...).

    Raises:
        CannotSplit: naming the unit where they part.
        InvalidInput: the network cannot process the sample in training mode.
    """
    images = varied(sample)
    network, buffers = Whole(model, chain.output), compared_buffers(model, chain)
    with modes_kept(model, chain), precision_as_stored(images), torch.enable_grad():
        for training in (True, False):
            chain.train(training)
            model.train(training)  # last, as in a learner: it may keep parts of itself frozen
            follow_network(chain)
            weights = [weight for weight in model.parameters() if weight.requires_grad]
            expected = result_of(network, model, images, weights, buffers)
            try:
                computed = result_of(chain, model, images, weights, buffers)
            except (RuntimeError, TypeError, IndexError) as error:
                raise CannotSplit(
                    "Cannot split the network: it can process the sample, but its unit "
                    f"{failing_unit(model, chain, images)!r} cannot "
                    f"({reason_of(error)}). Keep its modules whole with leaves=, "
                    "or cut elsewhere with at=."
                ) from error
            part = parting(model, chain, weights, buffers, expected, computed)
            if part is not None:
                refuse_other_each_time(network, model, images, weights, expected)
                raise CannotSplit(message(model, chain, images, part, training))


class Whole(nn.Module):
    """A network whose result is its logits alone.

    Args:
        output: where they are in what the network returns; see ``main_output``.
    """

    def __init__(self, network: nn.Module, output: Key) -> None:
        super().__init__()
        self.network, self.output = network, output

    def forward(self, images: Tensor) -> Any:
        return main_output(self.network(images), self.output)


def compared_buffers(model: nn.Module, chain: Chain) -> list[str]:
    """Names of a network's buffers, without those of auxiliary heads, which units leave alone."""
    held = {id(buffer) for buffer in chain.buffers()}
    return [
        name for name, buffer in model.named_buffers() if not chain.untrained or id(buffer) in held
    ]


def refuse_other_each_time(
    network: nn.Module,
    model: nn.Module,
    images: Tensor,
    weights: Sequence[Tensor],
    expected: "Result",
) -> None:
    """Refuse to compare with a network that differs from itself when it runs again."""
    again = result_of(network, model, images, weights, [])
    pairs = [(expected[0], again[0]), *zip(expected[1], again[1], strict=True)]
    if not all(same(one, other, largest(one)) for one, other in pairs):
        raise CannotSplit(
            "Cannot compare the units with the network: the network itself computes something else "
            "each time that it runs, such as by a clock or by a generator of random numbers that "
            "no module holds. Draw from PyTorch's generator, such as by torch.rand; or keep the "
            "module that does so whole with leaves=[…] and pass check=False."
        )


Result = tuple[Tensor, list[Tensor | None], list[Tensor]]


def varied(sample: Tensor) -> Tensor:
    """Two images or more that differ, which a sample for shapes alone need not hold."""
    images = sample.detach().clone()
    if len(images) < 2:
        images = torch.cat((images, images.flip(-1)))
    if images.is_floating_point() and bool((images == images.flatten()[0]).all()):
        generator = torch.Generator().manual_seed(ANY_SEED)
        images += torch.rand(images.shape, generator=generator, device="cpu").to(images)
    return images


def precision_as_stored(images: Tensor) -> torch.autocast:
    return torch.autocast(images.device.type, enabled=False)


def result_of(
    network: nn.Module,
    model: nn.Module,
    images: Tensor,
    weights: Sequence[Tensor],
    buffers: Sequence[str],
) -> Result:
    """Output, gradients of the weights, and what buffers hold after a pass.

    Raises:
        InvalidInput: the network cannot process the images; of units the error is PyTorch's.
    """
    with kept(model):
        try:
            with SameDraws():
                output = network(images.clone())
        except Exception as error:
            if not isinstance(network, Whole) or isinstance(error, InvalidInput):
                raise
            raise InvalidInput(
                "Cannot localize the network: in "
                f"{'training' if model.training else 'evaluation'} mode it cannot process the "
                f"sample of shape {tuple(images.shape)} ({reason_of(error)}). "
                "Give a batch of images as it is trained on."
            ) from error
        gradients: list[Tensor | None] = [None] * len(weights)
        if output.requires_grad and weights:
            generator = torch.Generator().manual_seed(ANY_SEED)
            drawn = torch.rand(output.shape, generator=generator, device="cpu")
            direction = drawn.to(output) + 0.5
            gradients = gradients_of(output, weights, direction)
        return output.detach(), gradients, [model.get_buffer(name).clone() for name in buffers]


def gradients_of(
    output: Tensor, weights: Sequence[Tensor], direction: Tensor
) -> list[Tensor | None]:
    """Gradients of the weights; those that they hold stay, and no hook of theirs runs.

    Raises:
        InvalidInput: a backward pass raises an error.
    """
    try:
        gradients = torch.autograd.grad(output, weights, direction, allow_unused=True)
        return [g.to_dense() if g is not None and g.is_sparse else g for g in gradients]
    except Exception as error:  # also a backward pass of the user's own
        raise InvalidInput(
            "Cannot compare the units with the network: the backward pass fails on the sample "
            f"({reason_of(error)}). Correct it, or pass check=False."
        ) from error


@contextmanager
def kept(model: nn.Module) -> Iterator[None]:
    """Leave generators, buffers and attributes as they were."""
    with states_kept(model):
        torch.manual_seed(ANY_SEED)
        yield


def parting(
    model: nn.Module,
    chain: Chain,
    weights: Sequence[Tensor],
    buffers: Sequence[str],
    expected: Result,
    computed: Result,
) -> tuple[str, int] | None:
    """What differs, and the index of the unit nearest to the output where it does."""
    if not same(expected[0], computed[0], largest(expected[0])):
        return "another output", len(chain) - 1
    gradients = dict(zip(map(id, weights), zip(expected[1], computed[1], strict=True), strict=True))
    for index in reversed(range(len(chain))):
        pairs = [gradients[id(w)] for w in chain.pieces[index].parameters() if id(w) in gradients]
        if all(equal(ours, theirs) for ours, theirs in pairs):
            continue
        scale = max(largest(gradient) for gradient, _ in pairs)
        if not all(same(ours, theirs, scale) for ours, theirs in pairs):
            return "other gradients", index
    for name, ours, theirs in zip(buffers, expected[2], computed[2], strict=True):
        if not same(ours, theirs, largest(ours)):
            return OTHER_BUFFER, unit_of(chain, model.get_buffer(name))
    return None


def unit_of(chain: Chain, buffer: Tensor) -> int:
    holders = (
        index
        for index, piece in enumerate(chain.pieces)
        if any(own is buffer for own in piece.buffers())
    )
    return next(holders, len(chain) - 1)


def largest(value: Tensor | None) -> float:
    """The largest finite magnitude in a tensor."""
    if value is None or not value.numel():
        return 0.0
    return float(value.detach().abs().nan_to_num(0.0, 0.0, 0.0).max())


def equal(one: Tensor | None, other: Tensor | None) -> bool:
    return one is other or (one is not None and other is not None and torch.equal(one, other))


def same(one: Tensor | None, other: Tensor | None, scale: float) -> bool:
    """Whether two tensors are equal but for rounding; no gradient is one of zeros."""
    if one is None or other is None:
        return all(value is None or not bool(value.any()) for value in (one, other))
    if one.shape != other.shape:
        return False
    if torch.equal(one, other):
        return True
    if not one.is_floating_point():
        return False
    tolerance = torch.finfo(one.dtype).eps ** 0.5 * scale
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)


def message(
    model: nn.Module, chain: Chain, images: Tensor, part: tuple[str, int], training: bool
) -> str:
    what, index = part
    where, suspects = "", [name.partition("..")[0] for name in chain.names[index : index + 1]]
    if what == "another output":
        last, path, index = first_other_layer(model, chain, images)
        where = f", at module {path!r}" if path else ""
        suspects = [last, path]
    holders = [path.rpartition(".")[0] for path in suspects]
    whole = next((holder for holder in holders if holder), "")
    remedy = keep_whole(whole) if whole else "Keep the module that does so whole with leaves=[…]"
    if what == OTHER_BUFFER and training and chain.recomputes and normalises(chain.pieces[index]):
        return (
            "Cannot split the network: on the sample its units have other running statistics; they "
            f"part in unit {chain.names[index]!r}. The network recomputes activations for its "
            "backward pass, as by torch.utils.checkpoint, and updates statistics a second time "
            "then. Units do so once. Take the recomputing out of forward; or, if once is right, "
            "pass check=False."
        )
    return (
        f"Cannot split the network: on the sample its units have {what} in "
        f"{'training' if training else 'evaluation'} mode; they part in unit "
        f"{chain.names[index]!r}{where}. The forward pass does something there that tracing does "
        f"not see. {remedy}; or, if both are right, pass check=False."
    )


def normalises(piece: nn.Module) -> bool:
    """Whether a piece has batch normalisation with running statistics."""
    return any(
        isinstance(module, _NormBase) and module.running_mean is not None
        for module in piece.modules()
    )


def first_other_layer(model: nn.Module, chain: Chain, images: Tensor) -> tuple[str, str, int]:
    """The first layer whose output is another in the units.

    Returns:
        Path of the layer before it, its own path, and its unit.
    """
    paths = {id(module): path for path, module in model.named_modules()}
    units = {
        id(layer): index for index, piece in enumerate(chain.pieces) for layer in piece.modules()
    }
    called = paths.keys() & units.keys()
    expected, computed = (outputs_of(network, model, images, called) for network in (model, chain))
    before = ""
    for layer, ours in expected.items():  # in the order of their first calls
        theirs = computed.get(layer, [])
        if len(ours) != len(theirs) or not all(
            same(a, b, largest(a)) for a, b in zip(ours, theirs, strict=True)
        ):
            return before, paths[layer], units[layer]
        before = paths[layer]
    return before, "", len(chain) - 1


def failing_unit(model: nn.Module, chain: Chain, images: Tensor) -> str:
    """The name of the unit that cannot process the images; of the last, if all can."""
    activations: tuple[Any, ...] = (images.clone(),)
    with kept(model), torch.no_grad():
        for piece, name in zip(chain.pieces, chain.names, strict=True):
            try:
                activations = piece(*activations)
            except Exception:  # a layer of the user's can raise anything
                return name
    return chain.names[-1]


def processes(model: nn.Module, images: Tensor) -> bool:
    """Whether the network itself can process images."""
    try:
        with kept(model), torch.no_grad():
            model(images.clone())
    except Exception:  # the user's forward runs here
        return False
    return True


def outputs_of(
    network: nn.Module, model: nn.Module, images: Tensor, layers: Set[int]
) -> dict[int, list[Tensor]]:
    """Output of every call of some of the model's modules."""
    outputs: dict[int, list[Tensor]] = {}

    def note(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            outputs.setdefault(id(layer), []).append(output.detach().clone())

    hooks = [layer.register_forward_hook(note) for layer in model.modules() if id(layer) in layers]
    try:
        with kept(model), SameDraws(), torch.no_grad():
            network(images.clone())
    finally:
        for hook in hooks:
            hook.remove()
    return outputs
