"""Networks that make layers or buffers in forward, or hide them; devices, numbers, threads."""

import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import layerwise
from layerwise.errors import CannotSplit, InvalidInput
from layerwise.losses import LOSSES
from tests.helpers import CLASSES, same_weights

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % CLASSES


class Grid(nn.Module):
    """Positions in a buffer that is made for the first images."""

    positions: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("positions", None, persistent=False)

    def forward(self, maps: Tensor) -> Tensor:
        if self.positions is None or self.positions.shape[-1] != maps.shape[-1]:
            self.positions = torch.linspace(0, 1, maps.shape[-1], device=maps.device)
        return maps + self.positions


class Registering(nn.Module):
    """The same, with a name that no buffer has before."""

    def forward(self, maps: Tensor) -> Tensor:
        if not hasattr(self, "positions"):
            self.register_buffer("positions", torch.linspace(0, 1, maps.shape[-1]))
        return maps + self.positions


class Adapter(nn.Module):
    """A layer that is made for the first images."""

    layer: Any

    def __init__(self) -> None:
        super().__init__()
        self.layer = None

    def forward(self, maps: Tensor) -> Tensor:
        if self.layer is None:
            self.layer = nn.Conv2d(4, 4, 1)
        return self.layer(maps)


class Listed(nn.Module):
    """A layer that no module holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = [nn.Conv2d(4, 4, 1)]

    def forward(self, maps: Tensor) -> Tensor:
        return self.layers[0](maps)


class Differentiates(nn.Module):
    """A gradient with respect to the maps, taken inside forward."""

    def forward(self, maps: Tensor) -> Tensor:
        with torch.enable_grad():
            leaf = maps.detach().requires_grad_()
            (gradient,) = torch.autograd.grad((leaf**2).sum(), leaf)
        return maps + gradient


class Counts(nn.Sequential):
    """A network that counts its own batches."""

    batches: Tensor

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.batches += 1
        return super().forward(images)


def network(*middle: nn.Module, kind: type[nn.Sequential] = nn.Sequential) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 4, 3), nn.ReLU(), *middle, nn.Conv2d(4, 4, 3), nn.ReLU()
    return kind(*layers, nn.Flatten(), nn.Linear(64, CLASSES))


def held(model: nn.Module) -> list[Any]:
    return [
        (path, name, id(value))
        for path, module in model.named_modules()
        for of_kind in (module._parameters, module._buffers, module._modules)
        for name, value in of_kind.items()
    ]


@pytest.mark.parametrize("middle", [Grid, Registering])
def test_a_buffer_that_forward_makes_leaves_the_network_as_it_was(middle: type[nn.Module]) -> None:
    model, plain = network(middle()), network(middle())
    before = held(model)
    learner = layerwise.localize(model, IMAGES, CLASSES, "pred")
    assert held(model) == before
    assert torch.equal(model(IMAGES), plain(IMAGES))
    learner.step(IMAGES, LABELS)
    layerwise.separability(
        network(middle()), (torch.randn(32, 1, 8, 8), LABELS.repeat(4)), measures=["fisher"]
    )


@pytest.mark.parametrize("leaves", [(), ("2",)])
def test_layers_that_forward_makes_are_refused_until_it_has_run(leaves: tuple[str, ...]) -> None:
    model = network(Adapter())
    before = held(model)
    for _ in range(2):
        with pytest.raises(CannotSplit, match=r"makes '2\.layer' when it first runs\. Call"):
            layerwise.localize(model, IMAGES, CLASSES, "pred", leaves=leaves)
        assert held(model) == before
    model(IMAGES)
    learner = layerwise.localize(model, IMAGES, CLASSES, "pred", leaves=leaves)
    layer = model[2].layer.weight.clone()
    for _ in range(2):  # the head begins with zeros
        learner.step(IMAGES, LABELS)
    assert not torch.equal(layer, model[2].layer.weight)


def test_a_layer_that_no_module_holds_is_refused_by_its_cause() -> None:
    with pytest.raises(CannotSplit, match=r"module '2' uses a layer .* Hold layers in nn\.Module"):
        layerwise.localize(network(Listed()), IMAGES, CLASSES, "pred")


def test_a_unit_that_cannot_do_what_the_network_can_is_named() -> None:
    with pytest.raises(CannotSplit, match="it can process the sample, but its unit '0' cannot"):
        layerwise.localize(network(Differentiates()), IMAGES, CLASSES, "pred")
    layerwise.localize(network(Differentiates()), IMAGES, CLASSES, "pred", leaves=["2"])


def test_a_buffer_that_the_network_itself_writes_names_the_network() -> None:
    with pytest.raises(CannotSplit, match=r"buffer 'batches' of the network itself.*Move"):
        layerwise.localize(network(kind=Counts), IMAGES, CLASSES, "pred")


@pytest.mark.parametrize("loss", LOSSES)
def test_the_default_device_is_not_asked(loss: str) -> None:
    model = network()
    with torch.device("meta"):
        learner = layerwise.localize(model, IMAGES, CLASSES, loss)
    kinds = {weight.device.type for unit in learner.units for weight in unit.loss.parameters()}
    assert kinds <= {"cpu"}


def test_weights_without_values_are_refused() -> None:
    with torch.device("meta"):
        model = network()
    with pytest.raises(InvalidInput, match="its weights are on the device meta"):
        layerwise.localize(model, IMAGES, CLASSES, "pred")


def test_sparse_gradients_are_compared_and_learned_from() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(0)
        return nn.Sequential(
            nn.EmbeddingBag(20, 8, sparse=True), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, CLASSES)
        )

    tokens = torch.arange(48).reshape(8, 6) % 20
    local, plain = model(), model()
    options: dict[str, Any] = {"optimizer": lambda weights: torch.optim.SGD(weights, lr=0.1)}
    learner = layerwise.localize(local, tokens, CLASSES, at=1, **options)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(2):
        learner.step(tokens, LABELS)
        optimizer.zero_grad()
        nn.functional.cross_entropy(plain(tokens), LABELS).backward()
        optimizer.step()
    assert same_weights(local, plain)


class Sharpness(torch.optim.SGD):
    """An optimizer whose step needs a closure, by any name."""

    def step(self, closure: Any) -> Any:
        return super().step(closure)


@pytest.mark.parametrize(
    ("maker", "words"),
    [
        (lambda weights: Sharpness(weights, lr=0.1), "a step of Sharpness needs a closure"),
        (torch.optim.LBFGS, "a step of LBFGS needs a closure"),
        (lambda weights: torch.optim.Adam(weights, differentiable=True), "differentiable=True"),
    ],
)
def test_optimizers_that_no_step_can_use_are_refused(maker: Any, words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        layerwise.localize(network(), IMAGES, CLASSES, "pred", optimizer=maker)


def test_whole_numbers_of_numpy_are_whole_numbers() -> None:
    classes, seed = np.array([CLASSES, 3])
    given = layerwise.localize(network(), IMAGES, classes, "pred", seed=seed)
    same = layerwise.localize(network(), IMAGES, CLASSES, "pred", seed=3)
    for learner in (given, same):
        learner.step(IMAGES, LABELS)
    assert same_weights(given.model, same.model)


@pytest.mark.parametrize("sample", [IMAGES.to_sparse(), torch.nested.nested_tensor([IMAGES[0]])])
def test_samples_that_are_not_dense_are_refused(sample: Tensor) -> None:
    with pytest.raises(InvalidInput, match="sparse or nested"):
        layerwise.localize(network(), sample, CLASSES)


def test_networks_may_be_localized_and_used_in_several_threads() -> None:
    """While one thread traces, the calls of others are their own."""
    call, drawing = nn.Module.__call__, torch.rand
    own, more, other = network(Grid()), network(Grid()), network()
    expected = other(IMAGES)
    failed: list[BaseException] = []
    stop = threading.Event()

    def guarded(work: Any) -> threading.Thread:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                failed.append(error)

        return threading.Thread(target=run)

    def infer() -> None:
        while not stop.is_set():
            assert torch.equal(other(IMAGES), expected)

    localizing = [
        guarded(lambda model=model: layerwise.localize(model, IMAGES, CLASSES, "pred"))
        for model in (own, more)
    ]
    inferring = guarded(infer)
    for thread in (inferring, *localizing):
        thread.start()
    for thread in localizing:
        thread.join()
    stop.set()
    inferring.join()
    assert not failed
    assert nn.Module.__call__ is call
    assert torch.rand is drawing


def test_a_loss_that_a_network_of_one_unit_does_not_use_is_said() -> None:
    def own(site: layerwise.Site) -> nn.Module:
        return LOSSES["pred"](site)

    with pytest.warns(UserWarning, match="the loss that was given is not used"):
        layerwise.localize(network(), IMAGES, CLASSES, own, at=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layerwise.localize(network(), IMAGES, CLASSES, own)
        layerwise.localize(network(), IMAGES, CLASSES, "pred", at=1)
