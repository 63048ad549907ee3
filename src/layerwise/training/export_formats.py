"""File formats that a network is exported in: how each is written, and how it is loaded again."""

import contextlib
import copy
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from layerwise.core.outputs import logits_of
from layerwise.errors import InvalidInput, choose
from layerwise.training.weights import separate

FACTS = "layerwise"  # name of the facts, as JSON, in a file's metadata
Compute = Callable[[Tensor], Tensor]  # images (B, C, H, W) -> logits (B, num_classes)


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        ending: of a file's name.
        write: function of the network in evaluation mode, a sample (2, C, H, W), the facts and
            where to write.
        load: function of the file and the network, of which it may use all but the weights; it
            gives what computes the logits.
        packages: that both need beside this package's own.
    """

    ending: str
    write: Callable[[nn.Module, Tensor, dict[str, Any], Path], None]
    load: Callable[[Path, nn.Module], Compute]
    packages: tuple[str, ...] = ()


def write_safetensors(
    network: nn.Module, sample: Tensor, facts: dict[str, Any], path: Path
) -> None:
    """Write weights and buffers under the network's own names."""
    path.write_bytes(
        save(separate(network.state_dict()), {"format": "pt", FACTS: json.dumps(facts)})
    )


def load_safetensors(path: Path, network: nn.Module) -> Compute:
    """The network with the file's weights alone."""
    loaded = copy.deepcopy(network)
    with torch.no_grad():
        for tensor in loaded.state_dict().values():
            tensor.zero_()
    loaded.load_state_dict(load(path.read_bytes()))
    return loaded


def dynamic_shapes() -> tuple[dict[int, Any]]:
    """The batch's size is open."""
    return ({0: torch.export.Dim("batch", min=1)},)


class Logits(nn.Module):
    """A network whose result holds more than its logits, as one that returns them alone."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = logits_of(self.network(images))
        return logits


def alone(network: nn.Module, sample: Tensor) -> nn.Module:
    """The network, or where it returns more than a tensor, the same with its logits alone."""
    return network if isinstance(network(sample), Tensor) else Logits(network)


def write_torch_export(
    network: nn.Module, sample: Tensor, facts: dict[str, Any], path: Path
) -> None:
    """Write a program, without any of Python's code."""
    program = torch.export.export(
        alone(network, sample), (sample,), dynamic_shapes=dynamic_shapes()
    )
    content = io.BytesIO()  # torch asks a path for its ending
    torch.export.save(program, content, extra_files={FACTS: json.dumps(facts)})
    path.write_bytes(content.getvalue())


def load_torch_export(path: Path, network: nn.Module) -> Compute:
    return torch.export.load(io.BytesIO(path.read_bytes())).module()


def write_onnx(network: nn.Module, sample: Tensor, facts: dict[str, Any], path: Path) -> None:
    """Write a graph from ``images`` to ``logits``, with all weights in the one file."""
    program = torch.onnx.export(
        alone(network, sample),
        (sample,),
        dynamo=True,
        dynamic_shapes=dynamic_shapes(),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[FACTS] = json.dumps(facts)
    path.write_bytes(program.model_proto.SerializeToString())


def load_onnx(path: Path, network: nn.Module) -> Compute:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


EXPORT_FORMATS = {
    "safetensors": Format("safetensors", write_safetensors, load_safetensors),
    "torch-export": Format("pt2", write_torch_export, load_torch_export),
    "onnx": Format("onnx", write_onnx, load_onnx, ("onnx", "onnxscript", "onnxruntime")),
}


def choose_format(name: str) -> Format:
    """A format by its name.

    Raises:
        InvalidInput: it is unknown, or a package that it needs is not installed.
    """
    chosen = EXPORT_FORMATS[choose("format", name, EXPORT_FORMATS)]
    for package in chosen.packages:
        if find_spec(package) is None:
            raise InvalidInput(
                f"Cannot export to {name}: {package} is not installed. Install it with pip install "
                f"'layerwise[{name}]', or give --format torch-export."
            )
    return chosen


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the exporters' remarks about packages of others off the screen."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
