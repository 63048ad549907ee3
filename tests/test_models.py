"""The networks of the paper: their layers, their sizes, and that they are plain modules."""

import copy
import csv
import subprocess
import sys
from importlib.resources import files
from itertools import accumulate
from typing import Any

import pytest
import torch
from torch import nn

from layerwise.errors import InvalidInput
from layerwise.models import create_model, list_models, published_hierarchy
from layerwise.ops.batch_norm import SLOPE, Normalisation, NormalisedActivation
from tests.helpers import FAMILIES

with files("layerwise.paper").joinpath("tables.csv").open() as file:
    ROWS = list(csv.DictReader(file))
PROJECTIONS = {"resnet18": 3, "resnet50": 4}  # option B: where the width or the resolution changes


def on_meta(name: str, *arguments: Any, **options: Any) -> nn.Module:
    """A network without memory for its weights."""
    with torch.device("meta"):
        return create_model(name, *arguments, **options)


def layers(model: nn.Module, kind: type[nn.Module] | tuple[type[nn.Module], ...]) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, kind)]


def narrow(name: str, image_size: int = 8, seed: int = 0, **options: Any) -> nn.Module:
    torch.manual_seed(seed)
    return create_model(
        name, [1] * len(published_hierarchy(name)), 1 / 16, 10, 1, image_size, **options
    )


def test_the_paper_has_61_rows() -> None:
    assert len(ROWS) == 61


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['table']}-{row['model']}")
def test_every_network_of_the_paper_has_the_layers_of_its_hierarchy(row: dict[str, str]) -> None:
    name, dropout = row["model"].split("_")[0], float(row["dropout"])
    depth = sum(map(int, row["hierarchy"].split(",")))
    model = on_meta(
        name,
        row["hierarchy"],
        num_classes=100 if row["dataset"] == "cifar100" else 10,
        dropout=dropout,
    )
    if row["model"] == name:
        assert tuple(map(int, row["hierarchy"].split(","))) == published_hierarchy(name)
    kernels = [conv.kernel_size[0] for conv in layers(model, nn.Conv2d)]
    if name.startswith("vgg"):
        assert kernels == [3] * depth
        assert [linear.out_features for linear in layers(model, nn.Linear)] == [
            1024,
            model.output.out_features,
        ]
    elif name == "resnet18":
        assert sorted(kernels) == [1] * PROJECTIONS[name] + [3] * (1 + 2 * depth)
    else:
        assert sorted(kernels) == [1] * (PROJECTIONS[name] + 2 * depth) + [3] * (1 + depth)
    norms = layers(model, (nn.BatchNorm1d, Normalisation))
    assert len(norms) == len(kernels) + (1 if name.startswith("vgg") else 0)
    assert {module.p for module in layers(model, nn.modules.dropout._DropoutNd)} == {dropout}
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (
        2,
        100 if row["dataset"] == "cifar100" else 10,
    )


@pytest.mark.parametrize("name", list_models())
def test_batch_norm_with_the_channels_of_its_convolution_follows_it(name: str) -> None:
    modules = layers(on_meta(name), (nn.Conv2d, Normalisation))
    assert len(modules) % 2 == 0
    for conv, norm in zip(modules[::2], modules[1::2], strict=True):
        assert isinstance(conv, nn.Conv2d)
        assert isinstance(norm, Normalisation)
        assert conv.out_channels == norm.num_features
        assert (conv.bias is not None) == name.startswith("vgg")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("vgg8b", 8_903_434),
        ("resnet18", 11_173_962),
        ("resnet50", 23_520_842),
        ("resnet110", 1_727_962),
        ("resnet32", 464_154),
    ],
)
def test_parameter_counts(name: str, count: int) -> None:
    assert sum(parameter.numel() for parameter in on_meta(name).parameters()) == count


@pytest.mark.parametrize(
    ("name", "hierarchy", "widths"),
    [
        ("vgg8", None, [64, 128, 256, 512, 512]),
        ("vgg8b", None, [128, 256, 256, 512, 512, 512]),
        ("vgg11b", None, [128, 128, 128, 256, 256, 512, 512, 512, 512]),
        ("vgg8b", "5,5,4,4", [128] * 4 + [256] + [256] * 4 + [512] + [512] * 8),
        ("vgg8b", "1,1,1,1", [256, 512, 512, 512]),
        ("vgg16", None, [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6),
        ("resnet32", "1,2,1", [16] * 3 + [32] * 4 + [64] * 2),
        (
            "resnet50",
            "1,1,1,1",
            [64, 64, 64, 256, 256, 128, 128, 512, 512, 256, 256, 1024, 1024, 512, 512, 2048, 2048],
        ),
    ],
)
def test_widths(name: str, hierarchy: str | None, widths: list[int]) -> None:
    assert [conv.out_channels for conv in layers(on_meta(name, hierarchy), nn.Conv2d)] == widths
    quarter = on_meta(name, hierarchy, width=0.25)
    assert [conv.out_channels for conv in layers(quarter, nn.Conv2d)] == [
        width // 4 for width in widths
    ]


@pytest.mark.parametrize("size", [1, 8, 16, 28, 32, 64, 96, 224])
@pytest.mark.parametrize("name", ["vgg8", "vgg8b", "resnet18", "resnet32"])
def test_images_of_every_size(name: str, size: int) -> None:
    model = on_meta(name, None, 1 / 16, 7, 1, size)
    assert model(torch.empty(2, 1, size, size, device="meta")).shape == (2, 7)


@pytest.mark.parametrize("size", [63, 64, 65])
@pytest.mark.parametrize("name", list_models())
def test_stem(name: str, size: int) -> None:
    model = on_meta(name, width=1 / 16, image_size=size)
    first, *others = layers(model, nn.Conv2d)
    large = size >= 64 if name.startswith("resnet") else size > 64 and name in ("vgg8b", "vgg11b")
    assert (first.kernel_size, first.stride) == (((7, 7), (2, 2)) if large else ((3, 3), (1, 1)))
    assert {conv.kernel_size for conv in others} <= {(1, 1), (3, 3)}
    pools = [pool.kernel_size for pool in layers(model, nn.MaxPool2d)]
    if name.startswith("resnet"):
        assert pools == ([3] if large else [])
    else:
        assert pools == [2] * len(published_hierarchy(name))


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet32"])
def test_each_stage_but_the_first_halves_the_map(name: str) -> None:
    features = torch.empty(2, 3, 32, 32, device="meta")
    model: Any = on_meta(name)
    features, sizes = model.stem(features), []
    for stage in model.stages:
        features = stage(features)
        sizes.append(features.shape[-1])
    assert sizes == [32, 16, 8, 4][: len(sizes)]
    strided = [
        conv
        for conv in layers(model, nn.Conv2d)
        if conv.stride == (2, 2) and conv.kernel_size == (3, 3)
    ]
    assert len(strided) == len(sizes) - 1  # the 3×3 convolution carries a bottleneck's stride


def test_the_free_shortcut_keeps_every_second_pixel_between_new_zeros() -> None:
    shortcut = narrow("resnet32").stages[1][0].shortcut
    images = torch.randn(2, 1, 5, 4)
    expanded = shortcut(images)
    assert expanded.shape == (2, 2, 3, 2)
    assert torch.equal(expanded[:, :1], images[:, :, ::2, ::2])
    assert not expanded[:, 1:].any()
    assert not list(shortcut.parameters())


@pytest.mark.parametrize("name", list_models())
def test_slope_of_every_leaky_relu(name: str) -> None:
    model = on_meta(name, width=1 / 16)
    assert layers(model, NormalisedActivation)
    assert {0.01, *(module.negative_slope for module in layers(model, nn.LeakyReLU))} == {SLOPE}
    assert not layers(model, nn.ReLU)


def test_the_networks_of_the_tests_are_of_every_family() -> None:
    made = [{str(narrow(name)) for name in names} for names in (list_models(), FAMILIES)]
    assert made[0] == made[1]
    assert len(made[1]) == len(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
def test_state_and_copies_give_the_same_outputs(name: str) -> None:
    model, images = narrow(name).eval(), torch.randn(2, 1, 8, 8)
    twin = narrow(name).eval()
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1)
        clone = copy.deepcopy(model)
        assert not torch.equal(twin(images), model(images))
        twin.load_state_dict(model.state_dict())
        assert torch.equal(twin(images), model(images))
        assert torch.equal(clone(images), model(images))
        next(clone.parameters()).add_(1)
        assert not torch.equal(next(clone.parameters()), next(model.parameters()))


@pytest.mark.parametrize("name", ["vgg8b", "resnet18"])
def test_export(name: str) -> None:
    model, images = narrow(name, dropout=0.2).eval(), torch.randn(2, 1, 8, 8)
    exported = torch.export.export(model, (images,)).module()
    torch.testing.assert_close(exported(images), model(images))


def test_weights_depend_on_the_seed_alone() -> None:
    weights = []
    for seed in (0, 0, 1):
        model = narrow("resnet18", seed=seed)
        weights.append(torch.cat([weight.flatten() for weight in model.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_models_import_nothing_of_local_learning() -> None:
    code = (
        "import sys, layerwise.models; print([m for m in sys.modules if m.startswith('layerwise')])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    for name in ("core", "rules", "losses", "training", "measures"):
        assert f"'layerwise.{name}" not in loaded
    for module in narrow("resnet18").modules():
        assert type(module).__module__.startswith(
            ("torch.nn.", "layerwise.models.", "layerwise.ops.")
        )


def test_list_models() -> None:
    assert list_models("resnet*") == [
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnet32",
        "resnet110",
    ]
    assert list_models("vgg?b") == ["vgg8b"]
    assert list_models("*b") == ["vgg8b", "vgg11b"]
    assert list_models("alexnet") == []
    assert list_models() == list_models("vgg*") + list_models("resnet*")


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("resnet81", {}, r"Cannot use model 'resnet81': it is unknown. Did you mean 'resnet18'\?"),
        ("ResNet18", {}, r"Did you mean 'resnet18'\?"),
        ("xyz", {}, "Cannot use model 'xyz': it is unknown. Accepted: vgg8, "),
        ("", {}, "Cannot use model ''"),
        (
            "resnet18",
            {"hierarchy": "2,2,2"},
            r"hierarchy \[2,2,2\]: it has 3 stages, resnet18 has 4. .* such as \[2,2,2,2\]",
        ),
        ("vgg8", {"hierarchy": [1, 1, 1, 1, 1, 1]}, "has 6 stages, vgg8 has 5"),
        (
            "resnet18",
            {"hierarchy": "2,2,0,2"},
            "hierarchy '2,2,0,2': it is not a list of positive whole numbers",
        ),
        ("resnet18", {"hierarchy": (2, -1, 2, 2)}, r"hierarchy \(2, -1, 2, 2\)"),
        ("resnet18", {"hierarchy": "a,b,c,d"}, "hierarchy 'a,b,c,d'"),
        ("resnet18", {"hierarchy": "2,,2,2"}, "hierarchy '2,,2,2'"),
        ("resnet18", {"hierarchy": "1.5,1,1,1"}, "hierarchy '1.5,1,1,1'"),
        ("resnet18", {"hierarchy": [1.5, 1, 1, 1]}, "hierarchy"),
        ("resnet18", {"hierarchy": [1.0, 1, 1, 1]}, "hierarchy"),
        ("resnet18", {"hierarchy": [True, 1, 1, 1]}, "hierarchy"),
        ("resnet18", {"hierarchy": [None, 1, 1, 1]}, "hierarchy"),
        ("resnet18", {"hierarchy": ""}, "hierarchy ''"),
        ("resnet18", {"hierarchy": []}, r"hierarchy \[\]"),
        (
            "resnet18",
            {"width": 0},
            "Cannot build resnet18 with width 0: it is out of range. Give a number above 0",
        ),
        ("resnet18", {"width": -0.5}, "width -0.5"),
        ("resnet18", {"width": float("nan")}, "width nan"),
        ("resnet18", {"width": float("inf")}, "width inf"),
        ("resnet18", {"width": "half"}, "width half"),
        (
            "vgg8",
            {"num_classes": 1},
            "num_classes 1: it is out of range. Give a whole number, 2 or more",
        ),
        ("vgg8", {"num_classes": 2.5}, "num_classes 2.5"),
        ("vgg8", {"in_chans": 0}, "in_chans 0"),
        ("vgg8", {"in_chans": 1.5}, "in_chans 1.5"),
        ("vgg8", {"image_size": 0}, "image_size 0"),
        ("vgg8", {"image_size": 8.5}, "image_size 8.5"),
        ("vgg8", {"image_size": (32, 32)}, r"image_size \(32, 32\)"),
        (
            "vgg8",
            {"dropout": 1.0},
            "dropout 1.0: it is out of range. Give a number from 0 up to but not including 1",
        ),
        ("vgg8", {"dropout": -0.1}, "dropout -0.1"),
        ("vgg8", {"dropout": None}, "dropout None"),
        (
            "vgg16",
            {"downsample_after": (0, 2)},
            "downsample_after 0: it is not a place in vgg16 .* from 1 to 13",
        ),
        ("resnet18", {"downsample_after": (1, 8)}, "downsample_after 8: .* from 0 to 7"),
        ("resnet18", {"downsample_after": "4,2"}, "not a list of increasing whole numbers"),
        ("resnet18", {"downsample_after": "2,2"}, "not a list of increasing whole numbers"),
        ("resnet18", {"downsample_after": ()}, "not a list of increasing whole numbers"),
        ("resnet18", {"downsample_after": (1.0, 2.0)}, "not a list of increasing whole numbers"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInput, match=words):
        create_model(name, **options)


@pytest.mark.parametrize("name", list_models())
def test_halving_where_stages_end_is_the_published_network(name: str) -> None:
    ends = list(accumulate(published_hierarchy(name)))
    places = ends if name.startswith("vgg") else ends[:-1]
    one, other = (on_meta(name, width=1 / 16, downsample_after=after) for after in (None, places))
    assert str(one) == str(other)


@pytest.mark.parametrize(
    ("name", "places", "sides"),
    [
        ("resnet18", "0,3,4,6", [16, 16, 16, 8, 4, 4, 2, 2]),
        ("resnet32", "1,2", [32, 16, *[8] * 13]),
        ("vgg13", "1,2,6", [32, 16, 8, 8, 8, 8, 4, 4, 4, 4]),
        ("vgg8b", "2,3", [32, 32, 16, 8, 8, 8]),
    ],
)
def test_maps_are_halved_where_asked(name: str, places: str, sides: list[int]) -> None:
    model = on_meta(name, width=1 / 16, downsample_after=places)
    found: list[int] = []
    for stage in model.stages:
        for block in stage:
            if not isinstance(block, nn.MaxPool2d):
                block.register_forward_hook(lambda _, __, output: found.append(output.shape[-1]))
    assert model(torch.empty(2, 3, 32, 32, device="meta")).shape == (2, 10)
    assert found == sides


def test_published_hierarchy_of_an_unknown_model() -> None:
    with pytest.raises(InvalidInput, match=r"Did you mean 'vgg8b'\?"):
        published_hierarchy("vgg-8b")


@pytest.mark.parametrize(
    "hierarchy",
    ["1,1,2,2", "[1, 1, 2, 2]", "(1,1,2,2)", [1, 1, 2, 2], (1, 1, 2, 2), ["1", "1", "2", "2"]],
)
def test_ways_to_write_a_hierarchy(hierarchy: Any) -> None:
    model: Any = on_meta("resnet18", hierarchy, width=1 / 16)
    assert [len(stage) for stage in model.stages] == [1, 1, 2, 2]
