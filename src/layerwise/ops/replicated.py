"""Operations on a batch that replicas share: rows of all replicas, and their batch statistics.

They communicate by what a ``Share`` offers, on any device and backend. Every replica's loss, a mean
over its own examples, is taken times its portion of the examples before it is differentiated, so
that the gradients of all add up to those of one process.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from layerwise.ops.batch_norm import gradients_asked_for

BATCH_NORM = inspect.signature(F.batch_norm)


class Share(Protocol):
    """A replica's part of a batch, and how it speaks with the others.

    Attributes:
        portion: number of its examples over that of all.
        own_rows: its rows among those of all.
    """

    @property
    def portion(self) -> float: ...
    @property
    def own_rows(self) -> slice: ...
    def all_rows(self, rows: Tensor) -> Tensor: ...  # (b, ...) -> (B, ...)
    def each(self, numbers: Tensor) -> Tensor: ...  # (F,) -> (replicas, F)
    def total(self, numbers: Tensor) -> Tensor: ...  # (F,) -> (F,)


class GatherRows(torch.autograd.Function):
    """Rows of all replicas, (b, ...) -> (B, ...); the gradient goes to the own rows alone.

    Every replica computes the whole loss of all rows, of which no portion is to be taken: the
    gradient is that of its portion of the loss, so it counts B / b times.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, share: Share) -> Tensor:
        ctx.share = share
        return share.all_rows(rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.share.own_rows] / ctx.share.portion, None


class BatchNorm(torch.autograd.Function):
    """f = γ x + β with x = (z − μ) / σ, with μ and σ of each channel over all replicas.

    Replica r has n_r numbers of a channel, with mean μ_r and variance v_r. Then n = Σ n_r,
    μ = Σ n_r μ_r / n and σ² = Σ n_r (v_r + (μ_r − μ)²) / n + ε, which loses no digits where μ is
    large (Chan et al. 1983). With g the gradient of f, ∂β = Σ g and ∂γ = Σ g x are each replica's
    own, to be added up later; ∂z = γ / σ · (g − G / n − x Gx / n), where G and Gx are the sums of
    ∂β and ∂γ over all replicas.
    """

    @staticmethod
    def forward(
        ctx: Any,
        maps: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        share: Share,
    ) -> Tensor:
        count, mean, variance = whole_statistics(maps, share)
        if running_mean is not None and running_var is not None:
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            unbiased = variance * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        ctx.save_for_backward(maps, weight, mean, (variance + eps).rsqrt(), count)
        ctx.share = share
        return along_channels(maps, mean, variance, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, mean, inverse, count = ctx.saved_tensors
        share: Share = ctx.share
        scale = inverse if weight is None else weight * inverse
        _, for_weight, for_bias = torch.ops.aten.native_batch_norm_backward(
            *(gradient, maps, torch.ones_like(mean), None, None, mean, inverse),
            train=True,
            eps=0.0,
            output_mask=[False, True, True],
        )
        whole_weight, whole_bias = share.total(torch.cat([for_weight, for_bias])).chunk(2)
        factor = -whole_weight * inverse / count
        shift = -whole_bias / count - factor * mean
        # factor · z + shift, rounded once
        line = along_channels(
            maps, torch.zeros_like(mean), torch.ones_like(mean), factor, shift, 0.0
        )
        shape = (1, -1, *[1] * (maps.dim() - 2))
        of_maps = line.add_(gradient).mul_(scale.to(maps.dtype).view(shape))
        kind = maps.dtype if weight is None else weight.dtype
        given = [
            each.to(kind) if needed else None
            for each, needed in zip((for_weight, for_bias), ctx.needs_input_grad[1:3], strict=True)
        ]
        return of_maps, *given, None, None, None, None, None


def whole_statistics(maps: Tensor, share: Share) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of a channel, (), and its mean and variance over all replicas, (C,) each."""
    channels = maps.shape[1]
    unused = maps.new_zeros(channels, dtype=torch.promote_types(maps.dtype, torch.float32))
    # running statistics decide about the type of these
    mean, variance = torch.batch_norm_update_stats(maps, unused, unused.clone(), 0.0)
    count = mean.new_full((1,), maps.numel() / channels)
    facts = share.each(torch.cat([count, mean, variance]))  # (replicas, 1 + 2 C)
    counts, means, variances = facts.split([1, channels, channels], dim=1)
    total = counts.sum()
    whole_mean = (counts * means).sum(0) / total
    whole_variance = (counts * (variances + (means - whole_mean) ** 2)).sum(0) / total
    return total, whole_mean, whole_variance


def along_channels(
    maps: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    """Maps normalised by given statistics of each channel."""
    weight, bias = (each if each is None else each.to(mean.dtype) for each in (weight, bias))
    return torch.native_batch_norm(maps, weight, bias, mean, variance, False, 0.0, eps)[0]


class Synchronising(TorchFunctionMode):
    """Batch normalisation, of whatever module, by the statistics of all replicas' examples."""

    def __init__(self, share: Share) -> None:
        super().__init__()
        self.share = share

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is not F.batch_norm:
            return func(*args, **(kwargs or {}))
        bound = BATCH_NORM.bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        given = bound.arguments
        if not given["training"]:
            return func(*args, **(kwargs or {}))
        names = ("input", "weight", "bias", "running_mean", "running_var", "momentum", "eps")
        return BatchNorm.apply(*(given[name] for name in names), self.share)


@contextmanager
def synchronised(share: Share) -> Iterator[None]:
    """Let batch normalisation that trains take the statistics of all replicas' examples."""
    with gradients_asked_for(several=True), Synchronising(share):  # not in place
        yield
