"""The classifier of a network that is made elsewhere: found, checked, and replaced by a new one."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from layerwise.errors import InvalidInput, raised
from layerwise.utils.options import required_arguments

Say = Callable[[str], None]


def fit_classifier(
    name: str, network: nn.Module, images: Tensor, num_classes: int, new: bool, say: Say
) -> None:
    """See to it that a network gives one logit per class.

    Args:
        images: a batch of zeros of its images' shape (B, C, H, W).
        new: whether a layer that gives other logits may be replaced, by one with weights drawn
            anew.
        say: is given a line about what was replaced.

    Raises:
        InvalidInput: the network takes something other than images, has no classifier, or one of
            another number of classes.
    """
    shape = output_shape(name, network, images)
    if shape == (num_classes,):
        return
    if len(shape) != 1:
        raise InvalidInput(
            f"Cannot use {name}: it has no classifier, since its output has shape {shape} per "
            "image. Let it end in pooling and a linear layer."
        )
    if not new:
        raise InvalidInput(
            f"Cannot use {name}: it gives {shape[0]} logits per image, and there are {num_classes} "
            f"classes. Give --num-classes {num_classes} (in Python new_classifier=True) to replace "
            "its classifier, or let it take num_classes."
        )
    path = last_layer(network, images)
    layer = network.get_submodule(path) if path is not None else None
    made = resized(layer, shape[0], num_classes) if layer is not None else None
    if path is None or made is None:
        raise InvalidInput(
            f"Cannot give {name} a new classifier: its {shape[0]} logits are not those of a last "
            "linear layer. Let it take num_classes."
        )
    network.set_submodule(path, made)
    if output_shape(name, network, images) != (num_classes,):
        raise InvalidInput(
            f"Cannot give {name} a new classifier: {num_classes} outputs of {path} do not become "
            f"{num_classes} logits. Let it take num_classes."
        )
    say(f"new classifier: {path}, {num_classes} classes instead of {shape[0]}")


def output_shape(name: str, network: nn.Module, images: Tensor) -> tuple[int, ...]:
    """The shape of a network's logits per image, in evaluation mode.

    Raises:
        InvalidInput: it takes several inputs or none, or cannot process images.
    """
    required = required_arguments(network.forward)
    if len(required) > 1:
        raise InvalidInput(
            f"Cannot use {name}: its forward takes {len(required)} inputs ({', '.join(required)}), "
            "and it is given images alone. Give the others defaults."
        )
    try:
        result = evaluated(network, images)
    except Exception as error:  # the user's code runs here
        raise InvalidInput(
            f"Cannot use {name}: for {images.dtype} images of shape {tuple(images.shape[1:])} it "
            f"{raised(error)}. {remedy_for(error, network)}"
        ) from error
    logits = logits_in(result)
    if not isinstance(logits, Tensor) or len(logits) != len(images):
        what = type(logits).__name__ if not isinstance(logits, Tensor) else tuple(logits.shape)
        raise InvalidInput(
            f"Cannot use {name}: for {len(images)} images it returns {what}. Let it return their "
            "logits, (B, classes), or an object that has them as logits."
        )
    return tuple(logits.shape[1:])


def remedy_for(error: Exception, network: nn.Module) -> str:
    """What to do about a network whose forward raised an error."""
    tensors = [*network.parameters(), *network.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        return "Let its function make weights with contents, on a device other than meta."
    others = {tensor.dtype for tensor in tensors if tensor.is_floating_point()} - {torch.float32}
    if others:
        return f"Its weights are {', '.join(map(str, others))}: let its function return .float()."
    if isinstance(error, RuntimeError):  # as torch raises where shapes do not meet
        return "Give another --image-size, or let its function take in_chans and image_size."
    return "Correct its forward."


def logits_in(result: Any) -> Any:
    """The part of a result that is called logits, if it has one."""
    if isinstance(result, Mapping):
        return result.get("logits", result)
    return getattr(result, "logits", result)


def evaluated(network: nn.Module, images: Tensor) -> Any:
    """What a network returns in evaluation mode; modes and generators stay as they were."""
    modes = [(part, part.training) for part in network.modules()]
    try:
        network.eval()
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return network(images.clone())
    finally:
        for part, mode in modes:
            part.training = mode


def last_layer(network: nn.Module, images: Tensor) -> str | None:
    """Path of the linear layer or convolution that is called last."""
    called: list[nn.Module] = []
    layers: dict[nn.Module, str] = {
        part: path
        for path, part in network.named_modules()
        if path and isinstance(part, nn.Linear | nn.Conv2d)
    }
    hooks = [
        layer.register_forward_hook(lambda layer, inputs, output: called.append(layer))
        for layer in layers
    ]
    try:
        evaluated(network, images)
    finally:
        for hook in hooks:
            hook.remove()
    return layers[called[-1]] if called else None


def resized(layer: nn.Module, classes: int, num_classes: int) -> nn.Module | None:
    """A layer like another, of so many classes; None: the other has not as many as it should."""
    if isinstance(layer, nn.Linear) and layer.out_features == classes:
        return nn.Linear(layer.in_features, num_classes, bias=layer.bias is not None)
    if isinstance(layer, nn.Conv2d) and layer.out_channels == classes and layer.groups == 1:
        return nn.Conv2d(
            layer.in_channels,
            num_classes,
            layer.kernel_size,  # type: ignore[arg-type]
            layer.stride,  # type: ignore[arg-type]
            layer.padding,  # type: ignore[arg-type]
            layer.dilation,  # type: ignore[arg-type]
            bias=layer.bias is not None,
            padding_mode=layer.padding_mode,
        )
    return None


def classifier_weights(
    network: nn.Module, images: Tensor, other: Callable[[], nn.Module] | None
) -> set[str]:
    """Names of the weights that belong to a number of classes.

    Args:
        other: makes the same network for another number of classes; what then has another shape is
            the classifier. None: it cannot be made, and the classifier is the last layer.
    """
    if other is not None:
        with torch.random.fork_rng(devices=[]):
            shapes = {name: value.shape for name, value in other().state_dict().items()}
        own = network.state_dict()
        differing = {name for name in own if shapes.get(name) != own[name].shape}
        if differing:
            return differing
    path = last_layer(network, images)
    return {name for name in network.state_dict() if name.rpartition(".")[0] == path}
