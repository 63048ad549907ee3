"""The table of a chain of units: what each holds, its head, its loss, its parameters."""

import json
from typing import Any

import pytest
import torch
from torch import nn

import layerwise
from layerwise.cli import main
from layerwise.core.table import describe_units, shortened
from tests.helpers import NETWORKS, learner

WIDEST = 112  # columns


def resnet18(**options: Any) -> layerwise.Learner:
    return layerwise.localize(
        layerwise.create_model("resnet18"), torch.zeros(2, 3, 32, 32), 10, **options
    )


def numbers(line: str) -> list[int]:
    """The two numbers at a line's end."""
    return [int(word.replace(",", "")) for word in line.split()[-2:]]


@pytest.mark.parametrize("output_layer", ["joined", "separate"])
def test_every_unit_has_a_row_and_the_last_holds_the_sums(output_layer: str) -> None:
    local = resnet18(output_layer=output_layer)
    heading, *rows, sums = str(local).splitlines()
    assert heading.split()[:3] == ["unit", "name", "layers"]
    assert [row.split()[:2] for row in rows] == [
        [str(unit.index), unit.name] for unit in local.units
    ]
    columns = zip(*map(numbers, rows), strict=True)
    assert numbers(sums) == [sum(column) for column in columns]
    heads = sum(p.numel() for unit in local.units for p in unit.loss.parameters())
    assert numbers(sums) == [sum(p.numel() for p in local.model.parameters()), heads]
    assert max(map(len, str(local).splitlines())) <= WIDEST


def test_rows_name_layers_losses_and_heads() -> None:
    first, *_, last = describe_units(resnet18().units)
    assert first["layers"] == ["Conv2d"]  # and no normalisation
    assert first["loss"] == "PredSim"
    assert sorted(first["head"]) == ["Conv2d", "Linear"]
    assert last["layers"] == ["Conv2d", "Linear"]
    assert (last["loss"], last["head"], last["head_parameters"]) == ("cross-entropy", [], 0)


def test_a_layer_of_the_users_own_has_its_name() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.eye(8))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.weight

    network = nn.Sequential(Scale(), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10))
    local = layerwise.localize(network, torch.zeros(2, 1, 8, 8), 10, leaves=["0"])
    assert [row["layers"] for row in describe_units(local.units)] == [["Scale", "Linear"]]


@pytest.mark.parametrize("name", NETWORKS)
def test_any_network_can_be_shown(name: str) -> None:
    local = learner(name)
    assert len(repr(local).splitlines()) == len(local.units) + 2
    assert all(row["layers"] for row in describe_units(local.units))


def test_kinds_are_counted_and_of_many_the_first_are_named() -> None:
    assert shortened([]) == ""
    assert shortened(["Conv2d", "Linear", "Conv2d"]) == "2 × Conv2d, Linear"
    assert shortened(["Conv2d", "Linear", "LSTM", "GRU"]) == "Conv2d, Linear, LSTM, …"


def test_the_program_shows_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    main(["show", "resnet18", "--json"])
    *shown, last = capsys.readouterr().out.splitlines()
    assert shown == str(resnet18()).splitlines()
    assert json.loads(last) == {"units": describe_units(resnet18().units), "span": 1}
