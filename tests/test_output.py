"""The network's output in a unit of its own, or joined to the layer before it."""

from typing import Any

import pytest
import torch

import layerwise
from layerwise.core.layers import NORMS
from layerwise.core.split import split
from layerwise.errors import CannotSplit, InvalidInput
from layerwise.losses import Output
from layerwise.models import create_model
from tests.helpers import CLASSES, network, same_weights

IMAGES = torch.randn(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(8) % CLASSES


def published(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_model(name, width=1 / 16, in_chans=1, image_size=8)


def weighted(piece: torch.nn.Module) -> set[str]:
    """Paths of a piece's weighted layers in the network."""
    return {
        name.removeprefix("network.")
        for name, module in piece.named_modules()
        if not list(module.children())
        and not isinstance(module, NORMS)
        and any(p.dim() > 1 for p in module.parameters())
    }


@pytest.mark.parametrize("name", ["vgg8b", "resnet18", "resnet50"])
@pytest.mark.parametrize("at", ["layer", "block"])
def test_joined_output_leaves_out_the_last_cut_alone(name: str, at: str) -> None:
    model = published(name)
    separate, joined = (
        split(model, at, output_layer="separate"),
        split(model, at, output_layer="joined"),
    )
    assert joined.names[:-1] == separate.names[:-2]
    assert weighted(joined.pieces[-1]) == weighted(separate.pieces[-2]) | weighted(
        separate.pieces[-1]
    )


@pytest.mark.parametrize("name", ["vgg8b", "resnet18", "plain", "pre-activation", "branches"])
@pytest.mark.parametrize("at", ["layer", "block", 2])
def test_joined_pieces_are_the_network(name: str, at: Any) -> None:
    model = network(name).eval()
    chain = split(model, at, IMAGES, output_layer="joined")
    torch.testing.assert_close(chain(IMAGES), model(IMAGES))
    owned = [id(parameter) for piece in chain.pieces for parameter in piece.parameters()]
    assert sorted(owned) == sorted(map(id, model.parameters()))


def test_last_unit_of_vgg_holds_both_fully_connected_layers() -> None:
    chain = split(published("vgg8b"), output_layer="joined")
    assert weighted(chain.pieces[-1]) == {"hidden.linear", "output"}
    assert chain.names[-1] == "hidden.linear..output"


@pytest.mark.parametrize("count", range(1, 8))
def test_units_are_counted_with_the_joined_output(count: int) -> None:
    chain = split(published("vgg8b"), count, IMAGES, output_layer="joined")
    assert len(chain) == count
    assert len(weighted(chain.pieces[-1])) >= 2


def test_more_units_than_a_joined_output_leaves_are_refused() -> None:
    with pytest.raises(
        CannotSplit,
        match=r"8 units: .* 7 weighted layers, .* with the one before it. Choose 1 to 7",
    ):
        split(published("vgg8b"), 8, IMAGES, output_layer="joined")


def test_paths_are_taken_as_given() -> None:
    model = published("vgg8b")
    assert split(model, ["hidden"], output_layer="joined").names == split(model, ["hidden"]).names


def test_network_of_one_weighted_layer_stays_one_unit() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, CLASSES))
    assert split(model, output_layer="joined").names == split(model).names == ("1",)


def test_learners_join_the_output_by_default_and_chains_do_not() -> None:
    model = published("vgg8b")
    names = split(model, output_layer="joined").names
    learner = layerwise.localize(model, IMAGES, CLASSES)
    assert tuple(unit.name for unit in learner.units) == names
    assert split(model).names == split(model, output_layer="separate").names
    assert split(model).names[-2:] == ("hidden.linear", "output")


def test_unknown_output_is_refused() -> None:
    with pytest.raises(
        InvalidInput, match=r"Cannot use output layer 'join': it is unknown. Did you mean 'joined'"
    ):
        split(published("vgg8b"), output_layer="join")


def trained(output_layer: str, loss: str = "predsim") -> layerwise.Learner:
    learner = layerwise.localize(
        network("resnet18"), IMAGES, CLASSES, loss=loss, output_layer=output_layer, seed=0
    )
    for _ in range(2):
        learner.step(IMAGES, LABELS)
    return learner


@pytest.mark.parametrize("loss", ["pred", "predsim"])
def test_joined_unit_learns_from_the_plain_cross_entropy(loss: str) -> None:
    learner = layerwise.localize(
        published("resnet18"), IMAGES, CLASSES, loss=loss, output_layer="joined", seed=0
    )
    last = learner.units[-1]
    before = {name: value.clone() for name, value in last.piece.named_parameters()}
    assert isinstance(last.loss, Output)
    with torch.no_grad():
        expected = torch.nn.functional.cross_entropy(learner.model(IMAGES), LABELS)
    assert learner.step(IMAGES, LABELS).losses[-1] == pytest.approx(expected.item(), rel=1e-5)
    assert all(
        not torch.equal(before[name], value) for name, value in last.piece.named_parameters()
    )


def test_separate_output_keeps_the_published_scale() -> None:
    assert trained("separate").units[-1].loss.beta == 0.99
    assert type(trained("separate", loss="pred").units[-1].loss) is Output  # not scaled


def test_units_before_the_last_two_learn_alike() -> None:
    separate, joined = trained("separate"), trained("joined")
    assert len(joined.units) == len(separate.units) - 1
    for one, other in zip(joined.units[:-1], separate.units[:-2], strict=True):
        assert same_weights(one.piece, other.piece)
        assert same_weights(one.loss, other.loss)


@pytest.mark.parametrize("at", ["layer", "block", 2])
def test_joined_learners_learn(at: Any) -> None:
    def adam(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=5e-3)

    model = published("vgg8b")
    learner = layerwise.localize(
        model, IMAGES, CLASSES, loss="pred", at=at, optimizer=adam, output_layer="joined", seed=0
    )
    losses = [learner.step(IMAGES, LABELS).losses[-1] for _ in range(40)]
    assert losses[-1] < losses[0] / 2
