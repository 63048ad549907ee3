"""Hierarchies: the paper's equations, relations, and exact costs."""

from functools import cache

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from layerwise.core.learner import Learner
from layerwise.core.memory_format import set_memory_format
from layerwise.core.table import count
from layerwise.data import DATASETS, ImageFormat
from layerwise.experiments.accelerate.costs import Costs
from layerwise.hierarchy import (
    Design,
    accelerated,
    deep,
    deeper,
    downsamples_earlier,
    equal_depth,
    fulfils_equation_7,
    relation,
    shallow,
    shallow_scale,
)
from layerwise.memory.accounting import phases
from layerwise.memory.fake_step import SavedBytes
from layerwise.models import create_model, published_hierarchy
from layerwise.paper.rows import ROWS, Row, row_run
from layerwise.profiling.predict import predict_steps
from layerwise.runs.run import Execution, Run
from layerwise.training.prepare import prepare
from tests.helpers import digits

SIDES = (32, 16, 8, 4)
# network -> a hierarchy with stages of one, two, three and four convolutions or blocks
ANY = {
    "resnet18": (3, 1, 2, 4),
    "resnet50": (1, 2, 1, 3),
    "resnet32": (1, 4, 2),
    "vgg8b": (1, 4, 3, 2),
    "vgg16": (2, 1, 4, 3, 1),
}


@cache
def costs(model: str, data: str) -> Costs:
    return Costs(Run(model=model, data=data))


def test_stages_are_split_in_the_middle():
    assert (shallow((1, 2, 3, 4)), deep((1, 2, 3, 4))) == ((1, 2), (3, 4))
    assert (shallow((1, 2, 3, 4, 5)), deep((1, 2, 3, 4, 5))) == ((1, 2), (3, 4, 5))
    assert (shallow((18, 18, 18)), deep((18, 18, 18))) == ((18,), (18, 18))


@pytest.mark.parametrize(
    ("hierarchy", "strictly", "weakly"),
    [
        ((1, 1, 2, 2), True, True),
        ((1, 2, 6, 3), True, True),
        ((1, 2, 8, 5), True, True),
        ((1, 1, 1, 1), False, True),
        ((2, 2, 2, 2), False, True),
        ((2, 3, 6, 3), False, True),
        ((3, 4, 6, 3), False, False),
        ((2, 2, 1, 1), False, False),
        ((2, 1, 1, 1), False, False),
    ],
)
def test_equation_7(hierarchy, strictly, weakly):
    assert fulfils_equation_7(hierarchy) is strictly
    assert fulfils_equation_7(hierarchy, strict=False) is weakly


def test_equation_8_compares_where_shallow_stages_end():
    assert downsamples_earlier((1, 1, 2, 4), (2, 2, 2, 2))
    # the second downsampling comes where it was
    assert downsamples_earlier((1, 3, 3, 3), (2, 2, 2, 2))
    assert not downsamples_earlier((1, 4, 4, 4), (2, 2, 2, 2))
    assert not downsamples_earlier((2, 2, 1, 1), (2, 2, 2, 2))
    # the first three layers of [2,2,2,2] have 32, 32 and 16 pixels a side; deep downsamplings do
    # not count

    assert shallow_scale((2, 2, 2, 2), SIDES, 3) == pytest.approx(80 / 3)
    assert (
        shallow_scale((1, 1, 2, 4), SIDES, 3)
        == shallow_scale((1, 1, 1, 1), SIDES, 3)
        == pytest.approx(56 / 3)
    )
    assert shallow_scale((3, 3, 3, 3), SIDES, 3) == 32


def test_relations():
    base = (2, 2, 2, 2)
    assert accelerated((1, 1, 2, 4), base)
    assert accelerated((1, 2, 8, 5), (3, 4, 6, 3))
    assert not accelerated(base, base)
    assert not accelerated((1, 1, 2, 2), base)  # fewer
    assert not accelerated((1, 1, 1, 5), base)  # a deep stage has lost one
    assert equal_depth((1, 1, 1, 5), base)
    assert deeper((3, 3, 3, 3), base)
    words = [
        relation(one, base)
        for one in (base, (1, 1, 2, 4), (1, 1, 1, 5), (3, 3, 3, 3), (1, 1, 1, 1))
    ]
    assert words == ["the same", "accelerated", "equal depth", "deeper", "shallower"]


@pytest.mark.parametrize(
    "row",
    {(row.model, row.hierarchy, row.data): row for row in ROWS}.values(),
    ids=lambda row: row.label,
)
def test_parameters_and_work_of_the_papers_rows_are_exact(row: Row):
    """Of all 61 rows; tables share some networks."""
    found, hierarchy = costs(row.model, row.data), row.hierarchy
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = create_model(
            row.model, hierarchy, num_classes=DATASETS[row.data].expected().num_classes
        ).eval()
        model(torch.empty(1, 3, 32, 32))
    assert found.amount("parameters", hierarchy) == count(model)
    assert 2 * found.amount("multiply-adds", hierarchy) == counter.get_total_flops()


def if_long(model: str) -> list[pytest.MarkDecorator]:
    """ResNet50 takes as long as all others together."""
    return [pytest.mark.slow] if model == "resnet50" else []


# of each network the row of fewest blocks
FEWEST = {row.model: row for row in sorted(ROWS, key=lambda row: -sum(row.hierarchy))}.values()


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=row.label, marks=if_long(row.model)) for row in FEWEST]
)
def test_activations_of_the_papers_rows_are_what_steps_save(row: Row):
    """Bytes that autograd really keeps in steps of narrow networks, layer-wise and global."""
    found = narrow_costs(row.model, row.data)
    cost = found.cost(row.hierarchy)
    assert cost.local_activation_bytes == max(saved_bytes(found, row, "simultaneous"))
    assert [cost.global_activation_bytes] == saved_bytes(found, row, "global")


@cache
def narrow_costs(model: str, data: str) -> Costs:
    return Costs(Run(model=model, data=data, width=1 / 16, batch_size=8))


def saved_bytes(found: Costs, row: Row, rule: str) -> list[int]:
    """What each unit saves in a step of the network itself."""
    learner = make_learner(found, Design(row.hierarchy), rule)
    set_memory_format(learner, "channels-last")
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    learner.step(images, labels)  # the first makes optimizer state
    with SavedBytes(learner) as saved, phases(learner, saved.mark):
        learner.step(images, labels)
    return [saved.reached(unit.index, unit.index) for unit in learner.units]


def make_learner(found: Costs, design: Design, rule: str) -> Learner:
    """The network as it would be trained."""
    run = found._run(design, rule)
    return prepare(run, Execution(device="cpu")).make_learner(found.images)


LITE = {"data": "digits", "loss": "predsim-lite", "optimizer": "sgd"}
BLOCKS = {"data": "cifar100", "at": "block"}


@pytest.mark.parametrize(
    ("model", "options"),
    [
        *(pytest.param(model, {"data": "cifar10"}, marks=if_long(model)) for model in ANY),
        ("resnet18", LITE),
        ("resnet18", BLOCKS),
    ],
)
def test_steps_cost_what_the_whole_network_is_predicted_to(model, options):
    check_steps(Design(ANY[model]), Run(model=model, width=1 / 16, batch_size=8, **options))


@pytest.mark.parametrize(
    ("model", "hierarchy", "places"),
    [
        ("resnet18", (2, 2, 2, 2), (0, 2, 6)),
        pytest.param("resnet50", (1, 2, 2, 1), (1, 2, 3, 5), marks=if_long("resnet50")),
        pytest.param("vgg16", (2, 2, 3, 3, 3), (1, 2, 7, 10, 13), marks=pytest.mark.slow),
    ],
)
def test_steps_and_work_of_networks_that_halve_elsewhere_are_exact(model, hierarchy, places):
    design = Design(hierarchy, places)
    run = Run(model=model, data="cifar10", width=1 / 16, batch_size=8)
    check_steps(design, run)
    found = Costs(run)
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        network = create_model(model, hierarchy, width=1 / 16, downsample_after=places).eval()
        network(torch.empty(1, 3, 32, 32))
    assert found.amount("parameters", *where(design)) == count(network)
    assert 2 * found.amount("multiply-adds", *where(design)) == counter.get_total_flops()
    assert found.amount("memory", *where(design)) == found.cost(*where(design)).local_peak_bytes


def where(design: Design) -> tuple:
    return design.hierarchy, design.downsample_after


def check_steps(design: Design, run: Run) -> None:
    found = Costs(run)
    cost = found.cost(design.hierarchy, design.downsample_after)
    learners = {}
    for rule, work, activations, peak in (
        (
            "simultaneous",
            cost.local_step_multiply_adds,
            cost.local_activation_bytes,
            cost.local_peak_bytes,
        ),
        (
            "global",
            cost.global_step_multiply_adds,
            cost.global_activation_bytes,
            cost.global_peak_bytes,
        ),
    ):
        learner = learners[rule] = make_learner(found, design, rule)
        step = predict_steps(rule, learner, 8, {}, "channels-last")[0]
        assert work == sum(step.multiply_adds.values())
        assert activations == max(step.saved_bytes.values())
        assert peak == max(step.peaks().values())
        assert cost.parameters == count(learner.model)
    heads = [unit.loss for unit in learners["simultaneous"].units]
    assert cost.head_parameters == sum(map(count, heads))


def test_resolutions():
    assert (
        costs("resnet18", "cifar10").resolutions == costs("vgg8b", "cifar10").resolutions == SIDES
    )
    assert costs("vgg16", "cifar10").resolutions == (32, 16, 8, 4, 2)
    assert costs("resnet50", "digits").resolutions == (8, 4, 2, 1)
    assert Costs(Run(model="resnet18", data="cifar10", image_size=64)).resolutions == (16, 8, 4, 2)


def test_data_sets_are_as_they_are_read():
    data, expected = digits(), DATASETS["digits"].expected()
    assert expected == ImageFormat(data.class_names, data.channels, data.image_size)
    assert costs("resnet18", "digits").images == expected
    assert published_hierarchy("resnet50") == (3, 4, 6, 3)


def test_a_published_row_is_one_of_the_runs():
    row = next(row for row in ROWS if row.label == "V resnet18_r4")
    cost = Costs(row_run(row, "small", "layerwise")).cost(row.hierarchy)
    assert cost.convolutions == 6
    assert cost.describe()["hierarchy"] == [1, 1, 2, 2]
