"""Batch normalisation whose backward pass works in place.

It comes alone, or as one operation with a shortcut and leaky ReLU.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence, Set
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import repeat
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from layerwise.ops.windowed_gradient import LARGE_ELEMENTS, GradientInParts, made_whole
from layerwise.utils.device import device_kind

SLOPE = 0.01  # of the leaky ReLU, in every network of the paper
# the least size of a part of larger maps: it stays in a CPU's cache from one operation to the next
PART_ELEMENTS = 1 << 19
MOST_PARTS = 16  # few operations, and temporary maps of a part that are small beside the whole

# pairs of a network, which are looked for once
_pairs: WeakKeyDictionary[nn.Module, list[tuple[nn.Module, nn.Module]]] = WeakKeyDictionary()
_overwriting: ContextVar[Set[nn.Module]] = ContextVar("overwriting", default=frozenset())

_several_gradients: ContextVar[bool] = ContextVar("several_gradients", default=False)


@contextmanager
def gradients_asked_for(several: bool) -> Iterator[None]:
    """Say whether the gradient of maps will be asked for several times, which takes more memory.

    Inside a context that says so, it stays so.
    """
    token = _several_gradients.set(several or _several_gradients.get())
    try:
        yield
    finally:
        _several_gradients.reset(token)


@contextmanager
def overwriting(modules: Set[nn.Module]) -> Iterator[None]:
    """Let these normalisations write over their maps, on a CPU and where nothing learns."""
    before = _overwriting.set(modules)
    try:
        yield
    finally:
        _overwriting.reset(before)


def sole_readers(piece: nn.Module) -> set[nn.Module]:
    """The normalisations in a traced network that alone read the output of a convolution.

    Those with hooks, which would see that output, are left out.
    """
    if piece not in _pairs:
        _pairs[piece] = lone_pairs(piece) if isinstance(piece, fx.GraphModule) else []
    return {
        norm
        for maker, norm in _pairs[piece]
        if not (maker._forward_hooks or norm._forward_hooks or norm._forward_pre_hooks)
    }


def lone_pairs(piece: fx.GraphModule) -> list[tuple[nn.Module, nn.Module]]:
    """Pairs of a convolution and the normalisation that alone reads its output.

    Only normalisations that are called once are paired.
    """
    calls = Counter(node.target for node in piece.graph.nodes)
    pairs = list[tuple[nn.Module, nn.Module]]()
    for node in piece.graph.nodes:
        norm = called(piece, node)
        if isinstance(norm, Normalisation) and calls[node.target] == 1 and node.args:
            maps = node.args[0]
            maker = called(piece, maps)
            if isinstance(maker, nn.Conv2d) and len(maps.users) == 1:
                pairs.append((maker, norm))
    return pairs


def called(piece: fx.GraphModule, node: Any) -> nn.Module | None:
    """The module that a node calls, if it calls one."""
    calls = isinstance(node, fx.Node) and node.op == "call_module"
    return piece.get_submodule(str(node.target)) if calls else None


class Normalisation(nn.Module):
    """f = BatchNorm(z), with the parameters and buffers of ``BatchNorm2d``.

    While it trains, the gradient of large maps z is written over them, on any device. Nothing else
    may read them after the backward pass, which runs once.

    It is no ``BatchNorm2d``, so functions that replace or reset those
    (``SyncBatchNorm.convert_sync_batchnorm``, ``torch.optim.swa_utils.update_bn``) leave it as it
    is.

    Shapes: z, f: (B, C, H, W).

    Raises:
        ValueError: maps of another shape, or one number per channel to learn the statistics from.
        RuntimeError: a second backward pass through the same large maps.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1) -> None:
        super().__init__()
        self.num_features, self.eps, self.momentum = channels, eps, momentum
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("num_batches_tracked", torch.tensor(0))

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}"

    def forward(self, maps: Tensor) -> Tensor:
        if maps.dim() != 4:
            raise ValueError(
                f"Cannot normalise {maps.dim()}D input: expected 4D input (B, C, H, W). Reshape it."
            )
        if self.is_by_parts(maps):
            return self.in_place(maps)
        evaluates = not self.training and not torch.is_grad_enabled() and device_kind(maps) == "cpu"
        if evaluates and self in _overwriting.get():
            return self.written_over(maps)
        if self.training:
            self.num_batches_tracked.add_(1)
        statistics = self.running_mean, self.running_var
        return F.batch_norm(
            maps, *statistics, self.weight, self.bias, self.training, self.momentum, self.eps
        )

    def written_over(self, maps: Tensor) -> Tensor:
        # outputs for batch statistics, which stay empty in evaluation
        made = tuple(self.running_mean.new_empty(0) for _ in range(2))
        statistics = self.running_mean, self.running_var, False, 0.0, self.eps
        torch.native_batch_norm(maps, self.weight, self.bias, *statistics, out=(maps, *made))
        return maps

    def is_by_parts(self, maps: Tensor) -> bool:
        large = maps.requires_grad and maps.numel() >= LARGE_ELEMENTS
        return self.training and large and not _several_gradients.get()

    def in_place(
        self,
        maps: Tensor,
        shortcut: Tensor | None = None,
        activates: bool = False,
        spare: bool = False,
    ) -> Tensor:
        self.num_batches_tracked.add_(1)
        running = (self.running_mean, self.running_var, self.momentum, self.eps)
        projected = (
            spare and shortcut is not None and getattr(shortcut.grad_fn, "normalises_alone", False)
        )
        normalised: Tensor = Normalise.apply(
            maps, shortcut, activates, projected, self.weight, self.bias, *running
        )
        return normalised


class NormalisedActivation(Normalisation):
    """f = LeakyReLU(BatchNorm(z) + s); see ``Normalisation``.

    Shapes: z, s (optional), f: (B, C, H, W).

    """

    def forward(self, maps: Tensor, shortcut: Tensor | None = None, spare: bool = False) -> Tensor:
        """Shapes: maps z, shortcut s -> f; see the class.

        Args:
            spare: whether nothing else reads s, not even a hook. Where ``Normalisation`` computed
                s from large maps in training, f is then written over it.
        """
        if self.is_by_parts(maps):
            return self.in_place(maps, shortcut, activates=True, spare=spare)
        normalised = super().forward(maps)
        return F.leaky_relu_(normalised if shortcut is None else normalised.add_(shortcut), SLOPE)


class Normalise(torch.autograd.Function):
    """f = LeakyReLU(y) with y = γ x + β + s, or f = γ x + β without an activation.

    x = (z − μ) / σ, with μ and σ of each channel. With g the gradient of y, the n numbers of a
    channel give ∂β = Σ g, ∂γ = Σ g x and ∂z = γ / σ · (g − ∂β / n − x ∂γ / n). The sign of y is
    that of f, so only z and f are saved (z alone, without an activation), and ∂z is written over z.
    Where ``projected`` is set, ``Normalisation`` made s for this operation alone: f is written over
    it, and its gradient is returned in parts.
    """

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        shortcut: Tensor | None,
        activates: bool,
        projected: bool,
        weight: Tensor,
        bias: Tensor,
        running_mean: Tensor,
        running_var: Tensor,
        momentum: float,
        eps: float,
    ) -> Tensor:
        if shortcut is not None and projected:
            mean, variance = torch.batch_norm_update_stats(
                maps, running_mean, running_var, momentum
            )
            inverse, activated = (variance + eps).rsqrt(), shortcut
            for part, out in zip(parts(maps), parts(activated), strict=True):
                normalised = torch.native_batch_norm(
                    part, weight, bias, mean, variance, False, 0.0, eps
                )[0]
                F.leaky_relu_(out.add_(normalised), SLOPE)
            ctx.mark_dirty(activated)
        else:
            activated, mean, inverse = torch.native_batch_norm(
                maps, weight, bias, running_mean, running_var, True, momentum, eps
            )
            addends: Iterable[Any] = repeat(None) if shortcut is None else parts(shortcut)
            for part, addend in zip(parts(activated), addends, strict=False) if activates else ():
                F.leaky_relu_(part if addend is None else part.add_(addend), SLOPE)
        ctx.save_for_backward(maps, activated if activates else None, weight, mean, inverse)
        ctx.spent, ctx.normalises_alone, ctx.projected = False, not activates, projected
        return activated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise RuntimeError(
                "Cannot run backward: the gradient of a normalised activation was asked for twice, "
                "and the first time overwrote its maps. Run backward once."
            )
        ctx.spent = True
        maps, activated, *channels = ctx.saved_tensors
        of_shortcut: Tensor | None = None
        # the shortcut's normalisation takes it in parts, at once
        if ctx.needs_input_grad[1] and ctx.projected:
            of_shortcut = ActivationGradient(gradient, activated)
        elif ctx.needs_input_grad[1]:
            before = torch.empty_like(activated)
            for out, *both in zip(parts(before), parts(gradient), parts(activated), strict=True):
                out.copy_(before_activation(*both))
            of_shortcut, gradient, activated = before, before, None
        for_weight, for_bias = write_gradient(gradient, activated, maps, channels)
        return maps, of_shortcut, None, None, for_weight, for_bias, None, None, None, None


class ActivationGradient(GradientInParts):
    """The gradient of the input of a leaky ReLU, computed where it is read.

    Args:
        gradient: gradient of the output, (B, C, H, W).
        activated: the output, (B, C, H, W).
    """

    gradient: Tensor
    activated: Tensor

    def __new__(cls, gradient: Tensor, activated: Tensor) -> "ActivationGradient":
        made: ActivationGradient = Tensor._make_wrapper_subclass(
            cls, activated.shape, activated.stride(), dtype=activated.dtype, device=activated.device
        )
        made.gradient, made.activated = gradient, activated
        return made

    def segments(self, examples: int) -> Sequence[Tensor]:
        gradients = segments(self.gradient, examples)
        return [
            ActivationGradient(*both)
            for both in zip(gradients, self.activated.split(examples), strict=True)
        ]

    def whole(self) -> Tensor:
        return before_activation(self.gradient, self.activated)


def before_activation(gradient: Tensor, activated: Tensor | None) -> Tensor:
    """The gradient of the activation's input; without an activation, the gradient itself."""
    whole: Tensor = made_whole(gradient)
    return (
        whole
        if activated is None
        else torch.ops.aten.leaky_relu_backward(whole, activated, SLOPE, True)
    )


def write_gradient(
    gradient: Tensor, activated: Tensor | None, maps: Tensor, channels: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Write the maps' gradient over them, part by part, and return those of weight and bias.

    Args:
        channels: weight, mean and inverse deviation of each channel.
    """
    weight, mean, inverse = channels

    signs: Iterable[Any] = repeat(None) if activated is None else parts(activated)
    pieces = list(zip(parts(maps), parts(gradient), signs, strict=False))
    backward = partial(
        torch.ops.aten.native_batch_norm_backward,
        train=True,
        eps=0.0,
        output_mask=[False, True, True],
    )
    sums = [
        backward(before_activation(*both), part, weight, None, None, mean, inverse)[1:]
        for part, *both in pieces
    ]
    for_weight, for_bias = (torch.stack(column).sum(0) for column in zip(*sums, strict=True))
    count = maps.numel() // len(mean)
    factor = -for_weight * inverse / count
    shift = -for_bias / count - factor * mean
    scale = (weight * inverse).to(maps.dtype)[:, None, None]
    unchanged = torch.zeros_like(mean), torch.ones_like(mean)  # a mean and a variance
    for part, *both in pieces:
        # factor · z + shift, rounded once
        line = torch.native_batch_norm(part, factor, shift, *unchanged, False, 0.0, 0.0)[0]
        torch.mul(line.add_(before_activation(*both)), scale, out=part)
        del line
    return for_weight, for_bias


def parts(maps: Tensor) -> Sequence[Tensor]:
    """Maps in segments of examples, about ``MOST_PARTS`` at most."""
    examples = max(1, max(PART_ELEMENTS, maps.numel() // MOST_PARTS) * len(maps) // maps.numel())
    return segments(maps, examples)


def segments(maps: Tensor, examples: int) -> Sequence[Tensor]:
    """Maps, or their gradient in parts, in segments of so many examples."""
    return maps.segments(examples) if isinstance(maps, GradientInParts) else maps.split(examples)
