"""Multiply-adds of operations: PyTorch's counts, of which some are put right and some are added.

PyTorch 2.13 counts the weights' gradient of a grouped convolution as if it had one group, and does
not know the attention kernel of a CPU, nor the fused layers of transformers. Recurrent layers,
``nn.Bilinear`` and nested tensors are not counted.
"""

from collections.abc import Callable, Mapping
from inspect import unwrap
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

aten = torch.ops.aten


def convolution_backward(
    gradient: Tensor, entering: Tensor, weight: Tensor, *others: Any, out_val: Any
) -> int:
    """Operations of a convolution's gradients, each of which has as many as the convolution."""
    transposed, wanted = others[4], others[7]
    places = (entering if transposed else gradient).shape
    forward: int = 2 * places[0] * prod(places[2:]) * prod(weight.shape)
    return forward * sum(wanted[:2])  # those of a bias are not counted


# FlopCounterMode then hands it tensors, not shapes
convolution_backward._get_raw = True  # type: ignore[attr-defined]


def attention_layer(query: Tensor, key: Tensor, *others: Any, out_val: Any) -> int:
    """Operations of PyTorch's fused attention with its projections, which frozen layers take."""
    if query.is_nested:  # of lengths that differ, of which nothing is asked
        return 0
    images, length, width = query.shape
    projections = 2 * images * width * width * (length + key.shape[1])
    return 2 * (projections + 2 * images * length * key.shape[1] * width)


def encoder_layer(tokens: Tensor, *others: Any, out_val: Any) -> int:
    """Operations of PyTorch's fused layer of a transformer's encoder."""
    if tokens.is_nested:
        return 0
    first_weight = others[13]  # of the perceptron, whose second has as many
    perceptron: int = 2 * tokens.shape[0] * tokens.shape[1] * first_weight.numel()
    return attention_layer(tokens, tokens, out_val=out_val) + 2 * perceptron


FUSED = {
    aten._native_multi_head_attention: attention_layer,
    aten._transformer_encoder_layer_fwd: encoder_layer,
}
for count in FUSED.values():
    count._get_raw = True  # type: ignore[attr-defined]

ATTENTION: Mapping[Any, Callable[..., int]] = {
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
COUNTED = {**flop_registry, **ATTENTION, **FUSED, aten.convolution_backward: convolution_backward}


def multiply_adds(func: Any, args: Any, kwargs: Mapping[str, Any], result: Any) -> int:
    """Multiply-adds of an operation that gave a result; 0 where it has none."""
    count = COUNTED.get(func._overloadpacket)
    return 0 if count is None else count(*args, **kwargs, out_val=result) // 2


class MultiplyAdds(FlopCounterMode):
    """Count of the multiply-adds of all operations while it is entered."""

    def __init__(self) -> None:
        # it wraps functions of shapes itself, which those of its registry are already
        kernels = {kernel: unwrap(count) for kernel, count in ATTENTION.items()}
        kernels |= {aten.convolution_backward: convolution_backward, **FUSED}
        super().__init__(display=False, custom_mapping=kernels)

    @property
    def total(self) -> int:
        """Multiply-adds so far."""
        return self.get_total_flops() // 2
