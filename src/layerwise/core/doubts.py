"""Warnings of what a learner may do otherwise than its owner expects."""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from layerwise.core.check import varied
from layerwise.core.learner import Learner
from layerwise.core.side_effects import modes_kept, states_kept
from layerwise.core.split import Chain
from layerwise.losses import LossFactory
from layerwise.utils.device import device_of, has_bfloat16
from layerwise.utils.words import few

MOST_NAMED = 5  # names in a warning
LEVEL = 4  # of the stack: the caller of ``layerwise.localize``, which calls ``core.localize``


def warn_of_untrained(chain: Chain) -> None:
    """Name the modules that only auxiliary outputs depend on."""
    if not chain.untrained:
        return
    modules = list(dict.fromkeys(name.rpartition(".")[0] for name in chain.untrained))
    warnings.warn(
        f"Units train the network's output {chain.output!r} alone: "
        f"{few(modules, MOST_NAMED, repr)} ({len(chain.untrained)} parameters), on which only its "
        "other outputs depend, stay untrained.",
        stacklevel=LEVEL,
    )


def warn_of_kept_activations(chain: Chain) -> None:
    """Say that units keep what the network's own forward pass does not."""
    if chain.recomputes:
        warnings.warn(
            "Units keep all activations for their backward passes: the network's checkpointing "
            "(torch.utils.checkpoint) or its hooks on saved tensors are not in them. To save "
            "memory, cut it into more units, or use the rule checkpointed.",
            stacklevel=LEVEL,
        )


def warn_of_whole_stacks(model: nn.Module, chain: Chain) -> None:
    """Name PyTorch's own stacks of layers, which are not looked into."""
    kinds = (nn.Transformer, nn.TransformerEncoder, nn.TransformerDecoder)
    found = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if found and len(chain) > 1:
        warnings.warn(
            f"Each of PyTorch's stacks {few(found, MOST_NAMED, repr)} is kept whole in one unit, "
            "whose layers all learn from one loss. To cut between them, put such layers in an "
            "nn.Sequential.",
            stacklevel=LEVEL,
        )


def warn_of_unused_loss(losses: Sequence[str | LossFactory]) -> None:
    """Say that a loss of the user's own is not that of a network which is one unit."""
    if len(losses) == 1 and not (isinstance(losses[0], str) or hasattr(losses[0], "output")):
        warnings.warn(
            "The network is one unit, which learns by the cross-entropy of its output; the loss "
            "that was given is not used. Cut it into more units, or give the loss a static method "
            "output(site) (docs/adding.md).",
            stacklevel=LEVEL,
        )


def warn_of_slow_bfloat16(learner: Learner) -> None:
    """Say that mixed precision takes longer on this processor than float32 does."""
    if learner.units[0].amp is torch.bfloat16 and not has_bfloat16(device_of(learner.model)):
        warnings.warn(
            "Mixed precision is slow on this processor: PyTorch has no fast convolutions in "
            "bfloat16 for it, and a step takes 10 to 30 times as long as in float32. Leave it off "
            "(amp=None, --no-amp).",
            stacklevel=LEVEL - 1,
        )


def warn_of_constant_features(model: nn.Module, chain: Chain, sample: Tensor) -> None:
    """Name the units whose feature is the same for all images, from which no loss can learn."""
    images = varied(sample)
    activations, constant = (images,), []
    with torch.no_grad(), modes_kept(model, chain), states_kept(model):
        chain.eval()
        for name, piece in zip(chain.names[:-1], chain.pieces, strict=False):
            activations = piece(*activations)
            feature = activations[0]
            if isinstance(feature, Tensor) and bool((feature == feature[:1]).all()):
                constant.append(name)
    if constant:
        raised = "feature of unit" if len(constant) == 1 else "features of units"
        warnings.warn(
            f"The {raised} {few(constant, MOST_NAMED, repr)} "
            f"{'is' if len(constant) == 1 else 'are'} the same for all images of the sample, so a "
            "local loss can learn nothing from it: such as where the last normalisation of a block "
            "starts at zero. Cut elsewhere with at=, such as at='block', or give these weights "
            "another start.",
            stacklevel=LEVEL,
        )
